"""A Hugging Face model folder, opened and checked without reading a tensor's data.

The safetensors headers are parsed here and not by the safetensors library, so that a damaged file is refused with words
that say which file, which tensor and what is wrong with it. Everything wrong with a folder is reported at once.
"""

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from convert.files.companions import MAX_COMPANION_BYTES, OTHER_WEIGHT_SUFFIXES, PICKLE_SUFFIXES, companion_files
from convert.files.header import MAX_HEADER_BYTES, SHOWN_NAMES, read_header
from convert.files.recognition import not_a_model
from convert.files.shapes import refusals
from convert.files.shards import INDEX_NAME, NUMPY_DTYPES, SINGLE_NAME, TensorSpec, is_inside
from qlora_jax.base.errors import InputError
from qlora_jax.base.reading import (
    MAX_JSON_BYTES,
    is_file,
    kind_of,
    open_file,
    read_json_object,
    reading,
    refuse_odd_files,
)

PACKED = ".quant_state."
"""What the name of a tensor in bitsandbytes' 4 bits has, beside that of the weight."""
MAX_REFUSALS = 20
XLA_ALIGNMENT = 64
"""Bytes."""
READ = 2**21
"""Bytes asked of the kernel at a time: until it has read them, it may keep other threads from memory that is new to them."""


class ModelFolder:
    """A folder of `config.json` and safetensors: `model.safetensors`, or shards and their index.

    Attributes:
        path: the folder.
        config: `config.json`.
        shards: the safetensors files' names, sorted (which is their order).
        names: every tensor, shard by shard, in the order of their bytes.

    Raises:
        InputError: the folder or anything in it cannot be used; the message lists every reason.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if (kind := kind_of(self.path)) not in ("a folder", "a file", "nothing"):
            raise InputError(self.path, found=kind, expected="a folder with config.json and safetensors")
        if (other := not_a_model(self.path)) is not None:
            raise other
        if kind != "a folder":
            found = "no such folder" if kind == "nothing" else kind
            raise InputError(self.path, found=found, expected="a folder with config.json and safetensors")
        refuse_odd_files(self.path)
        problems: list[str] = []
        self.config: dict[str, Any] = _json_object(self.path / "config.json", problems) or {}
        weight_map = self._weight_map(problems)
        self.shards = sorted(set(weight_map.values())) if weight_map else []
        self._headers = {shard: read_header(self.path / shard, problems) for shard in self.shards}
        self._where = self._locate(weight_map, problems)
        self.names = list(self._where)
        problems += _quantization_problems(self.config, is_packed=any(PACKED in name for name in self.names))
        if problems:
            problems += self._refusals()
            raise InputError(
                self.path,
                found="a model folder that cannot be used\n" + "\n".join(f"    {p}" for p in problems),
                expected="config.json, and model.safetensors or shards with their index; unquantized, or in bitsandbytes' 4 bits",
            )

    def specs(self, shard: str) -> list[TensorSpec]:
        """The tensors of one shard, in the order of their bytes."""
        return [entry.spec for entry in self._headers[shard].entries.values()]

    def metadata(self, shard: str) -> dict[str, str]:
        """The `__metadata__` of one shard's header."""
        return dict(self._headers[shard].metadata)

    def __contains__(self, name: str) -> bool:
        return name in self._where

    @property
    def is_4bit(self) -> bool:
        """Whether `config.json` says that the linears are in bitsandbytes' 4 bits, which `convert.files.bitsandbytes` reads."""
        quantization = self.config.get("quantization_config")
        return isinstance(quantization, dict) and bool(quantization.get("load_in_4bit"))

    def spec(self, name: str) -> TensorSpec:
        """One tensor's dtype and shape. Raises KeyError for a name that is not in `names`."""
        return self._headers[self._where[name]].entries[name].spec

    def read(self, name: str, into: np.ndarray | None = None) -> np.ndarray:
        """One tensor, in the file's dtype (`ml_dtypes.bfloat16` for BF16) and shape. Raises InputError as `elements`."""
        shape = self.spec(name).shape
        return self.elements(name, 0, math.prod(shape), into).reshape(shape)

    def read_bytes(self, name: str) -> bytes:
        """One tensor's bytes as they are in the file."""
        shard = self._where[name]
        entry = self._headers[shard].entries[name]
        with open_file(self.path / shard) as file, reading(self.path / shard, f"{name} cannot be read"):
            file.seek(self._headers[shard].data_start + entry.begin)
            return file.read(entry.spec.nbytes)

    def elements(self, name: str, begin: int, size: int, into: np.ndarray | None = None) -> np.ndarray:
        """Some of one tensor's elements, row-major, from number `begin`: [size], fewer at its end, in the file's dtype.

        Read, not mapped: pages of a mapped file would count as this process's memory. Into memory that XLA uses without copying it, or
        that of `into` [at least their bytes] uint8.

        Raises:
            InputError: the file ends before the tensor does; it was whole when the folder was opened.
        """
        shard = self._where[name]
        entry = self._headers[shard].entries[name]
        dtype = NUMPY_DTYPES[entry.spec.dtype]
        skipped = begin * dtype.itemsize
        nbytes = min(size * dtype.itemsize, entry.spec.nbytes - skipped)
        piece = aligned(nbytes) if into is None else into[:nbytes]
        with open_file(self.path / shard, buffering=0) as file:
            file.seek(self._headers[shard].data_start + entry.begin + skipped)
            if nbytes > READ:
                _name_all(piece, file)
            filled = 0
            while filled < nbytes:
                end = min(filled - filled % READ + READ, nbytes)
                with reading(self.path / shard, f"{name} cannot be read"):
                    read = file.readinto(piece[filled:end].data)  # type: ignore[attr-defined]  # unbuffered, so an io.FileIO
                if not read:
                    raise InputError(self.path / shard, found=f"a file that was cut off at {name} while it was read")
                filled += read
                if filled == end:
                    begun = (end - 1) // READ * READ
                    self.check_part(name, skipped + begun, piece[begun:end])
        return piece.view(dtype)

    def check_part(self, name: str, start: int, part: np.ndarray) -> None:
        """Do with [bytes] uint8, up to `READ`, of a tensor, from its byte `start`, what is to be done once they are read: here nothing."""

    def pieces(self, name: str, size: int) -> Iterator[np.ndarray]:
        """One tensor's elements, `size` at a time: see `elements`."""
        for begin in range(0, math.prod(self.spec(name).shape), size):
            yield self.elements(name, begin, size)

    def companions(self) -> list[Path]:
        """The files that go along with the weights (tokenizer, chat templates, generation config, licence), some of them below, sorted."""
        return companion_files(self.path, MAX_COMPANION_BYTES)

    def _refusals(self) -> list[str]:
        if not self.config:
            return []
        whole = [] if self.is_4bit else [self.spec(name) for name in self.names]
        return refusals(self.config, whole, self.path / "config.json")[:MAX_REFUSALS]

    def _weight_map(self, problems: list[str]) -> dict[str, str]:
        """Tensor name -> shard; for a single file, `{"": "model.safetensors"}`. Empty if there is a problem."""
        if is_file(self.path / SINGLE_NAME):  # transformers too prefers it to an index
            return {"": SINGLE_NAME}
        if is_file(self.path / INDEX_NAME):
            index = _json_object(self.path / INDEX_NAME, problems, MAX_HEADER_BYTES)
            return {} if index is None else self._checked_map(index.get("weight_map"), problems)
        files = sorted(p.name for p in self.path.iterdir() if p.is_file())
        tensors = [name for name in files if name.endswith(".safetensors")]
        pickles = [name for name in files if name.endswith(PICKLE_SUFFIXES)]
        if tensors:
            problems.append(f"neither {SINGLE_NAME} nor {INDEX_NAME}, only {some(tensors)}: which files are the model?")
        elif pickles:
            problems.append(
                f"only pickled weights ({some(pickles)}): refused, because unpickling can run any code; convert them "
                "to safetensors first, e.g. with transformers' save_pretrained, on a machine where you trust them"
            )
        else:
            others = some([name for name in files if name.endswith(OTHER_WEIGHT_SUFFIXES)])
            instead = others and f"; formats that are not read: {others}"
            problems.append(f"no weights: neither {SINGLE_NAME} nor {INDEX_NAME}{instead}")
        return {}

    def _checked_map(self, weight_map: Any, problems: list[str]) -> dict[str, str]:
        if not isinstance(weight_map, dict) or not weight_map:
            problems.append(f"{INDEX_NAME}: no weight_map of tensor names to files")
            return {}
        bad = set()
        for shard in sorted(set(map(str, weight_map.values()))):
            if not is_inside(shard):
                bad.add(shard)
                problems.append(f"{INDEX_NAME}: names {shard!r}, which is not a safetensors file inside the folder")
            elif not is_file(self.path / shard):
                bad.add(shard)
                problems.append(f"{INDEX_NAME}: names {shard}, which is missing; download the model again")
        return {name: shard for name, shard in weight_map.items() if str(shard) not in bad}

    def _locate(self, weight_map: dict[str, str], problems: list[str]) -> dict[str, str]:
        where: dict[str, str] = {}
        for shard, header in self._headers.items():
            for name in header.entries:
                if name in where:
                    problems.append(f"{shard}: holds {name}, as {where[name]} does")
                where[name] = shard
        sound = {shard for shard, header in self._headers.items() if header.entries}
        for shard in sorted(sound):
            lacking = sorted(
                n for n, s in weight_map.items() if n and s == shard and n not in self._headers[shard].entries
            )
            if lacking:
                problems.append(f"{shard}: lacks {some(lacking)}, which {INDEX_NAME} says it holds")
        return where


def aligned(nbytes: int) -> np.ndarray:
    """Memory to fill, [nbytes] uint8, that begins where XLA wants it; it copies arrays that do not."""
    room = np.empty(nbytes + XLA_ALIGNMENT, np.uint8)
    return room[-room.ctypes.data % XLA_ALIGNMENT :][:nbytes]


def _name_all(memory: np.ndarray, file: BinaryIO) -> None:
    """Have the kernel see to all of some new memory at once, by naming it in a read of the file's last byte, into its first.

    The kernel of a sandbox (gVisor's) sees to what a read names while no other thread reads, and lets none begin to see to more until that
    read is over. Piece by piece, threads that fill new memory would take turns.
    """
    os.preadv(file.fileno(), [memory.data], max(os.fstat(file.fileno()).st_size - 1, 0))


def _json_object(path: Path, problems: list[str], at_most: int = MAX_JSON_BYTES) -> dict[str, Any] | None:
    """A JSON file's object; None, and a problem, if it is missing or something else."""
    if kind_of(path) == "nothing":
        problems.append(f"no {path.name}")
        return None
    try:
        return read_json_object(path, at_most=at_most)
    except InputError as error:
        problems.append(f"{path.name}: {error.found}")
    return None


def _quantization_problems(config: dict[str, Any], *, is_packed: bool) -> list[str]:
    """Only bitsandbytes' 4 bits can be read. Settings that ask for nothing are left over from another model, and none to transformers."""
    if (quantization := config.get("quantization_config")) in (None, {}):
        return []
    settings = quantization if isinstance(quantization, dict) else {}
    flags = [flag for flag in ("load_in_4bit", "load_in_8bit") if settings.get(flag)]
    method = settings.get("quant_method", "bitsandbytes" if flags else "unnamed")  # old transformers did not write it
    if method == "bitsandbytes" and (flags == ["load_in_4bit"] or (not flags and not is_packed)):
        return []
    kind = f"{method}, {' and '.join(flags) or 'without load_in_4bit'}" if method == "bitsandbytes" else method
    return [
        f"already quantized ({kind}), and only bitsandbytes' load_in_4bit can be read: give the unquantized model, which is "
        "quantized on the way in"
    ]


def some(names: list[str]) -> str:
    """The first few names, and how many more there are."""
    more = len(names) - SHOWN_NAMES
    return ", ".join(names[:SHOWN_NAMES]) + (f" and {more} more" if more > 0 else "")
