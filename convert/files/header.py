"""Headers of safetensors files, parsed here and not by the safetensors library, so that a damaged file is refused with words."""

import dataclasses
import functools
import json
import math
from pathlib import Path
from typing import Any

from convert.files.shards import HEADER_LENGTH_BYTES, NUMPY_DTYPES, TensorSpec
from qlora_jax.base.errors import InputError
from qlora_jax.base.reading import open_file, reading

MAX_HEADER_BYTES = 100_000_000
"""As in the safetensors library: a longer header is damage or an attack."""
SHOWN_NAMES = 5
"""Names, or reasons, that a message shows."""
MAX_DIMENSIONS, MAX_DIMENSION = 64, 2**63 - 1
"""Of a shape: numpy's most, and what 64 bits hold. More would be a product without end."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """A tensor and where its bytes begin, counted from the end of the header."""

    spec: TensorSpec
    begin: int
    end: int


@dataclasses.dataclass(frozen=True)
class Header:
    """A safetensors header; `entries` in the order of the bytes, `data_start` in bytes from the start of the file."""

    entries: dict[str, Entry] = dataclasses.field(default_factory=dict)
    metadata: dict[str, str] = dataclasses.field(default_factory=dict)
    data_start: int = 0


def read_header(path: Path, problems: list[str]) -> Header:
    """Parse and check one file's header; what is wrong with it is appended to `problems`."""
    complain = functools.partial(_complain, problems, path.name)
    size = path.stat().st_size
    with open_file(path) as file, reading(path, "cannot be read"):
        length = int.from_bytes(file.read(HEADER_LENGTH_BYTES), "little")
        if size < HEADER_LENGTH_BYTES or length > size - HEADER_LENGTH_BYTES:
            return complain(f"truncated or not safetensors: a header of {length} bytes in a file of {size}")
        if length > MAX_HEADER_BYTES:
            return complain(f"a header of {length} bytes; at most {MAX_HEADER_BYTES} are read")
        text = file.read(length)
    try:
        with reading(path, "damaged: its header is not JSON"):
            header = json.loads(text)
    except InputError as error:
        return complain(error.found)
    if not isinstance(header, dict) or not isinstance(header.get("__metadata__", {}), dict):
        return complain("damaged: its header is not a table of tensors")
    metadata = header.pop("__metadata__", {})
    parsed = [_entry(name, value) for name, value in header.items()]
    wrong = [entry for entry in parsed if isinstance(entry, str)]
    entries = sorted((e for e in parsed if isinstance(e, Entry)), key=lambda e: (e.begin, e.end))
    wrong = wrong or _layout_problems(entries, size - HEADER_LENGTH_BYTES - length)
    for reason in wrong[:SHOWN_NAMES]:
        complain(reason)
    return Header({e.spec.name: e for e in entries}, metadata, HEADER_LENGTH_BYTES + length)


def _complain(problems: list[str], where: str, text: str) -> Header:
    problems.append(f"{where}: {text}")
    return Header()


def _entry(name: str, value: Any) -> Entry | str:
    """One tensor of a header, or what is wrong with it."""
    match value:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [int(begin), int(end)]}:
            pass
        case _:
            return f"damaged: {name} has no dtype, shape and data_offsets"
    if dtype not in NUMPY_DTYPES:
        kind = (
            "8-bit floats: give the model in bfloat16"
            if dtype.startswith("F8")
            else f"known: {', '.join(NUMPY_DTYPES)}"
        )
        return f"{name} has dtype {dtype}, which cannot be read; {kind}"
    if not all(type(n) is int and 0 <= n <= MAX_DIMENSION for n in shape) or len(shape) > MAX_DIMENSIONS or begin < 0:
        return f"damaged: {name} has shape {shape} at byte {begin}"
    nbytes = math.prod(shape) * NUMPY_DTYPES[dtype].itemsize
    if end - begin != nbytes:
        return f"damaged: {name} is {dtype}{shape}, {nbytes} bytes, but is given {end - begin}"
    return Entry(TensorSpec(name, dtype, tuple(shape)), begin, end)


def _layout_problems(entries: list[Entry], data_bytes: int) -> list[str]:
    """Tensors must follow one another without gap or overlap and fill the file, as the safetensors library demands."""
    expected = 0
    for entry in entries:
        if entry.end > data_bytes:
            return [
                f"truncated: {entry.spec.name} ends at data byte {entry.end}, the file at {data_bytes}; download it again"
            ]
        if entry.begin != expected:
            kind = "overlaps the tensor before it" if entry.begin < expected else "leaves a gap before it"
            return [f"damaged: {entry.spec.name} {kind} (begins at data byte {entry.begin}, expected {expected})"]
        expected = entry.end
    return [f"damaged: {data_bytes - expected} bytes after the last tensor"] if expected != data_bytes else []
