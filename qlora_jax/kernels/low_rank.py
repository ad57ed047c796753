"""A low-rank product added to what it belongs to, in one pass over memory: Σ bases + factor · u·V, and SwiGLU of two such sums.

The products of an adapter with its second matrix, and of its gradient with the first, have a rank of 64 to sum over and a whole [tokens,
features] array to write, which is read once more to be added. They cost what moving those arrays costs. Here a program makes a tile of the
product in registers, adds the tiles of the bases, and writes the sum.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from qlora_jax.kernels import Gated, triton

ROWS, GATED_ROWS, COLUMNS, WARPS = 128, 64, 128, 8
SMALLEST, MAX_STEP = 16, 64
"""The size that a tensor core takes at least, and how much of the rank is multiplied at a time."""


def supported(bases: Sequence[jax.Array], u: jax.Array, v: jax.Array) -> bool:
    """Whether the kernel serves these: 16-bit arrays of one dtype, more tokens than generation has, sizes that fill tiles."""
    dtypes = {array.dtype for array in (*bases, u, v)}
    return (
        len(dtypes) == 1
        and u.dtype in (jnp.bfloat16, jnp.float16)
        and u.shape[0] >= SMALLEST
        and min(v.shape) % SMALLEST == 0
        and bases[0].shape[1] % SMALLEST == 0
    )


def add(
    bases: Sequence[jax.Array],
    u: jax.Array,
    v: jax.Array,
    *,
    factor: float = 1.0,
    first: int = 0,
    transposed: bool = False,
    drawn: jax.Array | None = None,
    threshold: int = 0,
    rows: int = ROWS,
    columns: int = COLUMNS,
    warps: int = WARPS,
    interpret: bool = False,
) -> jax.Array:
    """As `kernels.low_rank_add`, for what is `supported`."""
    tokens, features = bases[0].shape
    kernel = functools.partial(
        _add,
        factor=factor,
        first=first,
        transposed=transposed,
        threshold=threshold,
        rows=rows,
        columns=_power_of_two(features, columns),
    )
    return triton.call(
        kernel,
        (-(-tokens // rows), features // _power_of_two(features, columns)),
        jax.ShapeDtypeStruct((tokens, features), bases[0].dtype),
        (tuple(bases), u, v, drawn),
        name="low_rank_add",
        num_warps=warps,
        interpret=interpret,
    )


def _power_of_two(size: int, limit: int) -> int:
    """The largest power of two up to `limit` that divides a size."""
    return min(limit, size & -size)


class _Tile:
    """The rows and columns of a [tokens, features] array that a program works on."""

    def __init__(self, shape: tuple[int, int], rows: int, columns: int) -> None:
        self.rows, self.columns = rows, columns
        self.row = (pl.program_id(0) * rows + jnp.arange(rows, dtype=jnp.int32))[:, None]
        self.column = pl.program_id(1) * columns + jnp.arange(columns, dtype=jnp.int32)
        whole = shape[0] % rows == 0
        # Rows past the end are the last one again, and not written.
        self.read = self.row if whole else jnp.minimum(self.row, shape[0] - 1)
        self.inside = None if whole else self.row < shape[0]

    def load(self, array: Any) -> jax.Array:
        """The tile of an array, in its dtype."""
        return plt.load(array.at[self.read, self.column[None, :]])

    def store(self, array: Any, values: jax.Array) -> None:
        """Write it, rounded to the array's dtype."""
        plt.store(array.at[self.row, self.column[None, :]], values.astype(array.dtype), mask=self.inside)

    def product(self, u: Any, v: Any, first: int, transposed: bool) -> jax.Array:
        """The tile of u[:, first:]·v in float32; v is [features, R] if `transposed`, else [R, features]."""
        rank = v.shape[1] if transposed else v.shape[0]
        step = _power_of_two(rank, MAX_STEP)
        contracted = (((1,), (1 if transposed else 0,)), ((), ()))
        total = jnp.zeros((self.rows, self.columns), jnp.float32)
        for start in range(0, rank, step):
            inner = start + jnp.arange(step, dtype=jnp.int32)
            left = plt.load(u.at[self.read, first + inner[None, :]])
            place = (self.column[:, None], inner[None, :]) if transposed else (inner[:, None], self.column[None, :])
            total += jax.lax.dot_general(left, plt.load(v.at[place]), contracted, preferred_element_type=jnp.float32)
        return total


def _add(
    bases: tuple[Any, ...],
    u: Any,
    v: Any,
    drawn: Any,
    out: Any,
    *,
    factor: float,
    first: int,
    transposed: bool,
    threshold: int,
    rows: int,
    columns: int,
) -> None:
    tile = _Tile(out.shape, rows, columns)
    total = tile.product(u, v, first, transposed)
    total = total if factor == 1 else total * factor
    if drawn is not None:
        total = jnp.where(tile.load(drawn) >= threshold, total, 0)
    for base in bases:
        total += tile.load(base).astype(jnp.float32)
    tile.store(out, total)


def swiglu(
    gated: Gated,
    *,
    rows: int = GATED_ROWS,
    columns: int = COLUMNS,
    warps: int = WARPS,
    interpret: bool = False,
) -> jax.Array:
    """As `kernels.swiglu`, for what is `supported`."""
    return _call_gated(_swiglu, gated, (), 1, rows, columns, warps, interpret)[0]


def swiglu_backward(
    gated: Gated,
    dy: jax.Array,
    *,
    rows: int = GATED_ROWS,
    columns: int = COLUMNS,
    warps: int = WARPS,
    interpret: bool = False,
) -> list[jax.Array]:
    """As `kernels.swiglu_backward`, for what is `supported`."""
    return _call_gated(_swiglu_backward, gated, (dy,), 2, rows, columns, warps, interpret)


def _call_gated(
    kernel: Callable[..., None],
    gated: Gated,
    more: tuple[jax.Array, ...],
    outputs: int,
    rows: int,
    columns: int,
    warps: int,
    interpret: bool,
) -> list[jax.Array]:
    tokens, features = gated.gate.shape
    columns = _power_of_two(features, columns)
    return triton.call(
        functools.partial(kernel, factors=gated.factors, firsts=gated.firsts, rows=rows, columns=columns),
        (-(-tokens // rows), features // columns),
        [jax.ShapeDtypeStruct((tokens, features), gated.gate.dtype)] * outputs,
        (gated.gate, gated.up, gated.u, gated.gate_v, gated.up_v, *more),
        name=kernel.__name__.strip("_"),
        num_warps=warps,
        interpret=interpret,
    )


def _gate_and_up(
    tile: _Tile, arrays: Sequence[Any], factors: tuple[float, float], firsts: tuple[int, int]
) -> list[Any]:
    """Tiles of the gate and of what it lets through, their adapters' terms included; float32."""
    gate, up, u, *vs = arrays
    return [
        tile.load(base).astype(jnp.float32) + tile.product(u, v, first, transposed=True) * factor
        for base, v, factor, first in zip((gate, up), vs, factors, firsts, strict=True)
    ]


def _sigmoid(x: jax.Array) -> jax.Array:
    return 1 / (1 + jnp.exp(-x))


def _swiglu(*refs: Any, factors: tuple[float, float], firsts: tuple[int, int], rows: int, columns: int) -> None:
    *arrays, out = refs
    tile = _Tile(out.shape, rows, columns)
    gate, up = _gate_and_up(tile, arrays, factors, firsts)
    tile.store(out, gate * _sigmoid(gate) * up)


def _swiglu_backward(
    *refs: Any, factors: tuple[float, float], firsts: tuple[int, int], rows: int, columns: int
) -> None:
    *arrays, dy, dgate, dup = refs
    tile = _Tile(dy.shape, rows, columns)
    gate, up = _gate_and_up(tile, arrays, factors, firsts)
    grad, open_ = tile.load(dy).astype(jnp.float32), _sigmoid(gate)
    tile.store(dgate, grad * up * open_ * (1 + gate * (1 - open_)))
    tile.store(dup, grad * gate * open_)
