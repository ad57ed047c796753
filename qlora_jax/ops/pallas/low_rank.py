"""A low-rank product added to what it belongs to, in one pass over memory: Σ bases + factor · u·V, or that rotated, or SwiGLU of two.

The products of an adapter with its second matrix, and of its gradient with the first, have a rank of 64 to sum over and a whole [tokens,
features] array to write, which is read once more to be added. They cost what moving those arrays costs. Here a program makes a tile of the
product in registers, adds the tiles of the bases, and writes the sum in the place of the first.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from qlora_jax.ops.operands import Gated, Rotation
from qlora_jax.ops.pallas import triton

SMALLEST, MAX_STEP = 16, 64
"""The size that a tensor core takes at least, and how much of the rank is multiplied at a time."""


@dataclasses.dataclass(frozen=True)
class Tiling:
    """What a program works on, how many warps it has, and whether programs are numbered along a row first."""

    rows: int
    columns: int
    warps: int
    along_rows: bool = False
    interpret: bool = False


ADD = Tiling(64, 128, 8, along_rows=True)
ROTATED = Tiling(64, 128, 8, along_rows=True)
SWIGLU = Tiling(64, 64, 8, along_rows=True)
SWIGLU_BACKWARD = Tiling(64, 64, 4, along_rows=True)
"""The fastest of some tried on an H100."""


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


def rotates(rotation: Rotation | None, transposed: bool) -> bool:
    """Whether the kernel serves this rotation, if any: half a head is a tile's columns, and a sum's v is [features, R]."""
    if rotation is None:
        return True
    half = rotation.cos.shape[1]
    return transposed and half >= SMALLEST and half & (half - 1) == 0


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
    rotation: Rotation | None = None,
    tiling: Tiling | None = None,
) -> jax.Array:
    """As `dispatch.low_rank_add`, for what is `supported`."""
    shape = jax.ShapeDtypeStruct(bases[0].shape, bases[0].dtype)
    options = {"factor": factor, "first": first, "transposed": transposed, "threshold": threshold}
    in_place = {0: 0}
    if rotation is None:
        return _call(
            functools.partial(_add, **options),
            (tuple(bases), u, v, drawn),
            shape,
            tiling or ADD,
            "low_rank_add",
            in_place,
        )
    arguments = (tuple(bases), u, v, drawn, rotation.cos, rotation.sin)
    half = rotation.cos.shape[1]
    kernel = functools.partial(_add_rotated, half=half, **options)
    heads = max(1, (tiling or ROTATED).columns // (2 * half))
    tiling = dataclasses.replace(
        tiling or ROTATED, columns=2 * half * _power_of_two(shape.shape[1] // (2 * half), heads)
    )
    return _call(kernel, arguments, shape, tiling, "low_rank_add_rotated", in_place)


def swiglu(gated: Gated, *, spent: bool = False, tiling: Tiling = SWIGLU) -> jax.Array:
    """As `dispatch.swiglu`, for what is `supported`."""
    shape = jax.ShapeDtypeStruct(gated.gate.shape, gated.gate.dtype)
    kernel = functools.partial(_swiglu, factors=gated.factors, firsts=gated.firsts)
    return _call(kernel, tuple(gated[:5]), shape, tiling, "swiglu", {0: 0} if spent else {})


def swiglu_backward(
    gated: Gated,
    dy: jax.Array,
    u: jax.Array,
    v: jax.Array,
    *,
    factor: float = 1.0,
    drawn: jax.Array | None = None,
    threshold: int = 0,
    spent: bool = False,
    tiling: Tiling = SWIGLU_BACKWARD,
) -> list[jax.Array]:
    """As `dispatch.swiglu_backward`, for what is `supported`."""
    shapes = [jax.ShapeDtypeStruct(gated.gate.shape, gated.gate.dtype)] * 3
    kernel = functools.partial(
        _swiglu_backward, factors=gated.factors, firsts=gated.firsts, factor=factor, threshold=threshold
    )
    in_place = {5: 0, 0: 1, 1: 2} if spent else {5: 0}  # dy, the gate and what it lets through
    return _call(kernel, (tuple(gated[:5]), dy, u, v, drawn), shapes, tiling, "swiglu_backward", in_place)


def _call(
    kernel: Callable[..., None],
    arguments: tuple[Any, ...],
    out_shape: Any,
    tiling: Tiling,
    name: str,
    in_place: dict[int, int],
) -> Any:
    tokens, features = jax.tree.leaves(out_shape)[0].shape
    if features % tiling.columns:
        tiling = dataclasses.replace(tiling, columns=_power_of_two(features, tiling.columns))
    grid = (-(-tokens // tiling.rows), features // tiling.columns)
    return triton.call(
        functools.partial(kernel, tiling=tiling),
        grid[::-1] if tiling.along_rows else grid,
        out_shape,
        arguments,
        name=name,
        num_warps=tiling.warps,
        interpret=tiling.interpret,
        in_place=in_place,
    )


def _power_of_two(size: int, limit: int) -> int:
    """The largest power of two up to `limit` that divides a size."""
    return min(limit, size & -size)


class _Tile:
    """The rows and columns of a [tokens, features] array that a program works on; `columns` of them, from `start` on, of the program's."""

    def __init__(self, tokens: int, tiling: Tiling, start: int = 0, columns: int | None = None) -> None:
        down, across = (1, 0) if tiling.along_rows else (0, 1)
        self.rows, self.columns = tiling.rows, columns or tiling.columns
        self.row = (pl.program_id(down) * tiling.rows + jnp.arange(tiling.rows, dtype=jnp.int32))[:, None]
        self.column = pl.program_id(across) * tiling.columns + start + jnp.arange(self.columns, dtype=jnp.int32)
        whole = tokens % tiling.rows == 0
        # Rows past the end are the last one again, and not written.
        self.read = self.row if whole else jnp.minimum(self.row, tokens - 1)
        self.inside = None if whole else self.row < tokens

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

    def sum(
        self,
        bases: Sequence[Any],
        u: Any,
        v: Any,
        drawn: Any = None,
        *,
        factor: float,
        first: int = 0,
        transposed: bool = False,
        threshold: int = 0,
    ) -> jax.Array:
        """The tile of `dispatch.low_rank_add`'s sum in float32."""
        loaded = [self.load(base) for base in bases]  # before the product is waited for
        bits = None if drawn is None else self.load(drawn)
        total = self.product(u, v, first, transposed)
        total = total if factor == 1 else total * factor
        if bits is not None:
            total = jnp.where(bits >= threshold, total, 0)
        return functools.reduce(lambda total, base: total + base.astype(jnp.float32), loaded, total)


def _add(bases: tuple[Any, ...], u: Any, v: Any, drawn: Any, out: Any, *, tiling: Tiling, **options: Any) -> None:
    tile = _Tile(out.shape[0], tiling)
    tile.store(out, tile.sum(bases, u, v, drawn, **options))


def _add_rotated(
    bases: tuple[Any, ...],
    u: Any,
    v: Any,
    drawn: Any,
    cos: Any,
    sin: Any,
    out: Any,
    *,
    half: int,
    tiling: Tiling,
    **options: Any,
) -> None:
    """Head by head of a program's columns, in halves."""
    read, angles = _Tile(out.shape[0], tiling).read, jnp.arange(half, dtype=jnp.int32)[None, :]
    cosines, sines = (plt.load(each.at[read, angles]) for each in (cos, sin))
    for start in range(0, tiling.columns, 2 * half):
        halves = [_Tile(out.shape[0], tiling, start + offset, half) for offset in (0, half)]
        left, right = (tile.sum(bases, u, v, drawn, **options) for tile in halves)
        halves[0].store(out, left * cosines - right * sines)
        halves[1].store(out, right * cosines + left * sines)


def _gate_and_up(
    tile: _Tile, arrays: Sequence[Any], factors: tuple[float, float], firsts: tuple[int, int]
) -> list[jax.Array]:
    """Tiles of the gate and of what it lets through, their adapters' terms included; float32."""
    gate, up, u, *vs = arrays
    return [
        tile.sum([base], u, v, factor=factor, first=first, transposed=True)
        for base, v, factor, first in zip((gate, up), vs, factors, firsts, strict=True)
    ]


def _sigmoid(x: jax.Array) -> jax.Array:
    return 1 / (1 + jnp.exp(-x))


def _swiglu(*refs: Any, factors: tuple[float, float], firsts: tuple[int, int], tiling: Tiling) -> None:
    *arrays, out = refs
    tile = _Tile(out.shape[0], tiling)
    gate, up = _gate_and_up(tile, arrays, factors, firsts)
    tile.store(out, gate * _sigmoid(gate) * up)


def _swiglu_backward(
    arrays: tuple[Any, ...],
    dy: Any,
    u: Any,
    v: Any,
    drawn: Any,
    inner: Any,
    dgate: Any,
    dup: Any,
    *,
    factors: tuple[float, float],
    firsts: tuple[int, int],
    factor: float,
    threshold: int,
    tiling: Tiling,
) -> None:
    tile = _Tile(dy.shape[0], tiling)
    gate, up = _gate_and_up(tile, arrays, factors, firsts)
    grad = tile.sum(
        [dy], u, v, drawn, factor=factor, threshold=threshold
    )  # before anything is written: `inner` is where dy was
    opened = _sigmoid(gate)
    tile.store(inner, gate * opened * up)
    tile.store(dgate, grad * up * opened * (1 + gate * (1 - opened)))
    tile.store(dup, grad * gate * opened)
