"""RMSNorm, and its gradient added to that of the residual stream, each in one pass over memory.

A program takes whole rows and holds them in registers between the two sums over a row and what is made of them. Nothing is kept from the
forward pass: 1 / rms is made again from x, which the gradient has to read anyway.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from qlora_jax.ops.pallas import triton

ELEMENTS, WARP_ELEMENTS = 4096, 1024
"""What a program takes at least, in rows, and what a warp takes of it: 32 a thread."""
ALIGNED, LONGEST = 8, 16384
"""Elements of a thread's load, which a row has to be a multiple of, and of the longest row that fits the registers."""


def supported(x: jax.Array, weight: jax.Array) -> bool:
    """Whether the kernels serve x [N, D] and weight [D]: 16-bit arrays of one dtype, rows that can be read 16 bytes at a time."""
    return (
        x.dtype == weight.dtype
        and x.dtype in (jnp.bfloat16, jnp.float16)
        and x.shape[1] % ALIGNED == 0
        and x.shape[1] <= LONGEST
    )


def forward(x: jax.Array, weight: jax.Array, eps: float, *, interpret: bool = False) -> jax.Array:
    """As `dispatch.rms_norm`, for what is `supported`."""
    return _call(_forward, x, weight, (), eps, interpret)


def backward(
    x: jax.Array, weight: jax.Array, dnormed: jax.Array, dskip: jax.Array, eps: float, *, interpret: bool = False
) -> jax.Array:
    """As `dispatch.rms_norm_backward`, for what is `supported`."""
    return _call(_backward, x, weight, (dnormed, dskip), eps, interpret)


def _call(
    kernel: Callable[..., None],
    x: jax.Array,
    weight: jax.Array,
    more: tuple[jax.Array, ...],
    eps: float,
    interpret: bool,
) -> jax.Array:
    number, size = x.shape
    columns = 1 << (size - 1).bit_length()
    rows = max(1, ELEMENTS // columns)
    return triton.call(
        functools.partial(kernel, rows=rows, columns=columns, eps=eps),
        (-(-number // rows),),
        jax.ShapeDtypeStruct(x.shape, x.dtype),
        (x, weight, *more),
        name=f"rms_norm{kernel.__name__}",
        num_warps=rows * columns // WARP_ELEMENTS,
        interpret=interpret,
    )


class _Rows:
    """The rows of an [N, D] array that a program works on, as tensors of `columns`, the power of two from D on."""

    def __init__(self, shape: tuple[int, int], rows: int, columns: int) -> None:
        number, self.size = shape
        self.row = (pl.program_id(0) * rows + jnp.arange(rows, dtype=jnp.int32))[:, None]
        self.column = jnp.arange(columns, dtype=jnp.int32)[None, :]
        # Rows past the end are the last one again, and not written.
        self.read = self.row if number % rows == 0 else jnp.minimum(self.row, number - 1)
        self.filled = None if columns == self.size else self.column < self.size
        self.inside = jnp.broadcast_to(self.row < number, (rows, columns))
        if self.filled is not None:
            self.inside &= self.filled

    def load(self, array: Any) -> jax.Array:
        """An array's rows, float32, with zeros after their end."""
        return self._load(array.at[self.read, self.column], (self.row.shape[0], self.column.shape[1]))

    def load_row(self, array: Any) -> jax.Array:
        """[1, columns] of an array [D], float32."""
        return self._load(array.at[self.column], self.column.shape)

    def _load(self, place: Any, shape: tuple[int, int]) -> jax.Array:
        if self.filled is None:
            return plt.load(place).astype(jnp.float32)
        return plt.load(place, mask=jnp.broadcast_to(self.filled, shape), other=0).astype(jnp.float32)

    def store(self, array: Any, values: jax.Array) -> None:
        """Write them, rounded to the array's dtype."""
        plt.store(array.at[self.row, self.column], values.astype(array.dtype), mask=self.inside)

    def mean(self, values: jax.Array) -> jax.Array:
        """Over each row; float32 [rows, 1]."""
        return (jnp.sum(values, axis=1) * (1 / self.size))[:, None]


def _forward(x: Any, weight: Any, out: Any, *, rows: int, columns: int, eps: float) -> None:
    tile = _Rows(out.shape, rows, columns)
    values, scale = tile.load(x), tile.load_row(weight)
    normed = values * jax.lax.rsqrt(tile.mean(values * values) + eps)
    tile.store(out, normed.astype(out.dtype).astype(jnp.float32) * scale)


def _backward(x: Any, weight: Any, dnormed: Any, dskip: Any, out: Any, *, rows: int, columns: int, eps: float) -> None:
    tile = _Rows(out.shape, rows, columns)
    values, grad, skipped = tile.load(x), tile.load(dnormed), tile.load(dskip)
    grad *= tile.load_row(weight)
    # With r = 1 / rms: d(x·r) = r · (g - x·r · mean(g·x·r)).
    square, product = tile.mean(values * values), tile.mean(grad * values)
    inverse = jax.lax.rsqrt(square + eps)
    tile.store(out, skipped + inverse * (grad - values * inverse * (product * inverse)))
