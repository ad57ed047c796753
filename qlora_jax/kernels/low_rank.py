"""A low-rank product added to what it belongs to, in one pass over memory: Σ bases + factor · u·V.

The products of an adapter with its second matrix, and of its gradient with the first, have a rank of 64 to sum over and a whole [tokens,
features] array to write, which is read once more to be added. They cost what moving those arrays costs. Here a program makes a tile of the
product in registers, adds the tiles of the bases, and writes the sum.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from qlora_jax.kernels import triton

ROWS, COLUMNS, WARPS = 128, 128, 8
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
    rank = v.shape[1] if transposed else v.shape[0]
    kernel = functools.partial(
        _add,
        factor=factor,
        first=first,
        rank=rank,
        step=_power_of_two(rank, MAX_STEP),
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


def _add(
    bases: tuple[Any, ...],
    u: Any,
    v: Any,
    drawn: Any,
    out: Any,
    *,
    rank: int,
    step: int,
    factor: float,
    first: int,
    transposed: bool,
    threshold: int,
    rows: int,
    columns: int,
) -> None:
    tokens = out.shape[0]
    row = (pl.program_id(0) * rows + jnp.arange(rows, dtype=jnp.int32))[:, None]
    column = pl.program_id(1) * columns + jnp.arange(columns, dtype=jnp.int32)
    whole = tokens % rows == 0
    read = row if whole else jnp.minimum(row, tokens - 1)  # rows past the end are the last one again, and not written
    total = jnp.zeros((rows, columns), jnp.float32)
    for start in range(0, rank, step):
        inner = start + jnp.arange(step, dtype=jnp.int32)
        left = plt.load(u.at[read, first + inner[None, :]])
        place = (column[:, None], inner[None, :]) if transposed else (inner[:, None], column[None, :])
        contracted = (((1,), (1 if transposed else 0,)), ((), ()))
        total += jax.lax.dot_general(left, plt.load(v.at[place]), contracted, preferred_element_type=jnp.float32)
    total = total if factor == 1 else total * factor
    if drawn is not None:
        total = jnp.where(plt.load(drawn.at[read, column[None, :]]) >= threshold, total, 0)
    for base in bases:
        total += plt.load(base.at[read, column[None, :]]).astype(jnp.float32)
    plt.store(out.at[row, column[None, :]], total.astype(out.dtype), mask=None if whole else row < tokens)
