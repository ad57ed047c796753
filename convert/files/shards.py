"""Writes safetensors files tensor by tensor, so that a shard never has to fit in memory.

The format (safetensors' own documentation): 8 bytes, little-endian, the length of the header; the header, JSON; then
the tensors' bytes one after the other. safetensors' `save_file` wants every tensor at once and chooses their order
itself; here they are written in the order given.
"""

import dataclasses
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import IO, Any

import ml_dtypes
import numpy as np

from convert.files.ahead import made_ahead
from convert.files.sink import Sink
from qlora_jax.base.files import replacing, write_json

ALIGNMENT = 8
HEADER_LENGTH_BYTES = 8
INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
PT_METADATA: Mapping[str, str] = MappingProxyType({"format": "pt"})
"""What transformers looks for before it accepts a file, whoever wrote it."""

NUMPY_DTYPES: Mapping[str, np.dtype] = MappingProxyType(
    {
        "BOOL": np.dtype(np.bool_),
        "U8": np.dtype(np.uint8),
        "I8": np.dtype(np.int8),
        "U16": np.dtype("<u2"),
        "I16": np.dtype("<i2"),
        "F16": np.dtype("<f2"),
        "BF16": np.dtype(ml_dtypes.bfloat16),
        "U32": np.dtype("<u4"),
        "I32": np.dtype("<i4"),
        "F32": np.dtype("<f4"),
        "U64": np.dtype("<u8"),
        "I64": np.dtype("<i8"),
        "F64": np.dtype("<f8"),
    }
)
"""safetensors' dtype names, as numpy dtypes: those that its numpy reader can read (no 8-bit floats)."""

FLOATS = frozenset({"BF16", "F16", "F32", "F64"})
"""Of these the dtypes that weights can have; integers are codes of some quantization, or no weights."""

Piece = np.ndarray | bytes
"""Consecutive bytes of a file: an array's, row-major and little-endian, or as they are."""


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """A tensor before its bytes: `dtype` is a key of `NUMPY_DTYPES`, `shape` as in the file (`[out, in]` if linear)."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.dtype not in NUMPY_DTYPES:
            raise ValueError(f"{self.name}: dtype {self.dtype!r} is none of {', '.join(NUMPY_DTYPES)}")

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor's data."""
        return math.prod(self.shape) * NUMPY_DTYPES[self.dtype].itemsize


def write_shard(
    path: str | Path,
    specs: Sequence[TensorSpec],
    tensors: Iterable[np.ndarray | bytes],
    metadata: Mapping[str, str] = PT_METADATA,
) -> None:
    """Write one safetensors file; whole or not at all.

    Args:
        path: the file; an existing one is replaced when the new one is complete.
        specs: the tensors of the file, in the order of their bytes.
        tensors: their data in that order: arrays of the spec's dtype and shape, or the little-endian bytes of one.
            Taken one at a time; the previous one is let go before the next is asked for.
        metadata: the header's `__metadata__`.

    Raises:
        ValueError: a tensor is not what its spec says, or there are fewer or more tensors than specs.
    """
    source = iter(tensors)
    with replacing(path) as file:
        file.write(_header(specs, metadata))
        for position, spec in enumerate(specs):
            try:
                # Passed on without a name: `zip` or a loop variable would hold it while the next one is made.
                _write_tensor(file, spec, next(source))
            except StopIteration:
                raise ValueError(f"{path}: {position} tensors for {len(specs)} specs; {spec.name} is missing") from None
        if next(source, None) is not None:
            raise ValueError(f"{path}: more tensors than the {len(specs)} specs")


def write_pieces(
    path: str | Path,
    specs: Sequence[TensorSpec],
    pieces: Iterator[Piece],
    metadata: Mapping[str, str] = PT_METADATA,
    *,
    past_cache: bool = False,
) -> int:
    """Write one safetensors file; whole or not at all. The next pieces are made while some are written.

    Args:
        path: the file; an existing one is replaced when the new one is complete.
        specs: the tensors of the file, in the order of their bytes.
        pieces: all their bytes in that order, cut anywhere.
        metadata: the header's `__metadata__`.
        past_cache: see `convert.files.sink`.

    Returns:
        The file's `convert.files.sink.checksum`.

    Raises:
        ValueError: the pieces are fewer or more bytes than the specs say.
    """
    expected, written, header = sum(spec.nbytes for spec in specs), 0, _header(specs, metadata)
    with (
        replacing(path, buffering=0) as file,
        made_ahead(pieces) as ahead,
        Sink(file, past_cache=past_cache) as sink,
    ):
        sink.write(header)
        for piece in ahead:
            buffer = _buffer(piece)
            sink.write(buffer)
            written += len(buffer)
            del piece, buffer  # else it is held while the next one is waited for
        summed = sink.finish()
        if written != expected:
            raise ValueError(f"{path}: {written} bytes, expected {expected} for {len(specs)} tensors")
    return summed


def file_size(specs: Sequence[TensorSpec], metadata: Mapping[str, str]) -> int:
    """Bytes of the file that these specs and metadata make."""
    return len(_header(specs, metadata)) + sum(spec.nbytes for spec in specs)


def is_whole(path: Path, specs: Sequence[TensorSpec], metadata: Mapping[str, str]) -> bool:
    """Whether a file is there, begins with the header of these specs and metadata, and is as long as they say."""
    header = _header(specs, metadata)
    try:
        with path.open("rb") as file:
            return file.read(len(header)) == header and path.stat().st_size == file_size(specs, metadata)
    except OSError:
        return False


def write_index(folder: str | Path, weight_map: Mapping[str, str], total_size: int) -> None:
    """Write `model.safetensors.index.json`: which shard (a file name) holds which tensor; `total_size` is in bytes."""
    write_json(Path(folder) / INDEX_NAME, {"metadata": {"total_size": total_size}, "weight_map": dict(weight_map)})


def _header(specs: Sequence[TensorSpec], metadata: Mapping[str, str]) -> bytes:
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for spec in specs:
        if spec.name in header:
            raise ValueError(f"tensor {spec.name} appears twice")
        header[spec.name] = {
            "dtype": spec.dtype,
            "shape": list(spec.shape),
            "data_offsets": [offset, offset + spec.nbytes],
        }
        offset += spec.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    return len(text).to_bytes(HEADER_LENGTH_BYTES, "little") + text


def _write_tensor(file: IO[bytes], spec: TensorSpec, tensor: np.ndarray | bytes) -> None:
    if isinstance(tensor, np.ndarray):
        if tensor.shape != spec.shape or tensor.dtype != NUMPY_DTYPES[spec.dtype]:
            raise ValueError(
                f"{spec.name}: {tensor.dtype}{list(tensor.shape)}, expected {spec.dtype}{list(spec.shape)}"
            )
        file.write(_buffer(tensor))
    elif len(tensor) != spec.nbytes:
        raise ValueError(f"{spec.name}: {len(tensor)} bytes, expected {spec.nbytes} for {spec.dtype}{list(spec.shape)}")
    else:
        file.write(tensor)


def _buffer(piece: Piece) -> memoryview | bytes:
    """bfloat16 has no buffer of its own."""
    return piece.reshape(-1).view(np.uint8).data if isinstance(piece, np.ndarray) else piece


def is_inside(shard: str) -> bool:
    """Whether an index's file name stays in the folder. Links are not followed: the hub's cache is made of them."""
    path = PurePosixPath(shard.replace("\\", "/"))
    drive = ":" in shard
    return not (drive or path.is_absolute() or ".." in path.parts) and path.suffix == ".safetensors"
