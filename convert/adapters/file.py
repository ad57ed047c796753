"""The tensors in an adapter's safetensors file, some rows at a time: pages of a mapped file count as memory until it is closed."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import safetensors

from qlora_jax.base.reading import reading

ELEMENTS = 2**22
"""Of a tensor that are in memory at once where a whole one is not needed."""


def read_tensor(path: Path, name: str) -> np.ndarray:
    """One tensor in the stored dtype."""
    with reading(path, f"{name} cannot be read"), safetensors.safe_open(path, framework="numpy") as file:
        tensor: np.ndarray = file.get_tensor(name)
    return tensor


def row_slices(shape: tuple[int, ...]) -> Iterator[slice]:
    """A tensor's rows, so many at a time that they are about `ELEMENTS`; all of a tensor that has no rows."""
    step = max(1, ELEMENTS // max(1, int(np.prod(shape[1:], dtype=np.float64))))
    number = shape[0] if shape else 0
    return (slice(begin, min(begin + step, number)) for begin in range(0, number, step))


def read_rows(path: Path, name: str, rows: slice) -> np.ndarray:
    """Some of a tensor's rows, in float32."""
    with reading(path, f"{name} cannot be read"), safetensors.safe_open(path, framework="numpy") as file:
        return np.asarray(file.get_slice(name)[rows.start : rows.stop]).astype(np.float32)


def is_finite(path: Path, name: str, shape: tuple[int, ...]) -> bool:
    """Whether every value of a tensor is finite in the dtype it is stored in."""
    return all(np.isfinite(_stored(path, name, rows)).all() for rows in row_slices(shape))


def are_equal(path: Path, one: str, other: str, shape: tuple[int, ...], *, transposed: bool = False) -> bool:
    """Whether two tensors hold the same values, whatever their dtypes; `transposed`: the other one's shape is the reverse."""
    if transposed:
        return np.array_equal(read_tensor(path, one), read_tensor(path, other).T)
    return all(np.array_equal(read_rows(path, one, rows), read_rows(path, other, rows)) for rows in row_slices(shape))


def _stored(path: Path, name: str, rows: slice) -> np.ndarray:
    with reading(path, f"{name} cannot be read"), safetensors.safe_open(path, framework="numpy") as file:
        return np.asarray(file.get_slice(name)[rows.start : rows.stop])
