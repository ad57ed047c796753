"""Dequantization: 4-bit codes and their scales → the dense matrix, once through memory.

A program takes `CHUNKS` runs of words, a word a thread: eight weights, sixteen bytes of output. All loads of a program are independent, so
that enough are in flight to hide the memory's latency. Scales are decoded for each word rather than each block, which costs eight times
the arithmetic but moves nothing between threads.

An adapter's matrix can be written beside the weight, or below it, on the way: each program copies a part of it. One product with both
reads its other factor once.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from qlora_jax.kernels import triton
from qlora_jax.nf4 import BLOCK_SIZE, CODEBOOKS, QuantizedTensor

WARPS, CHUNKS = 4, 4


def supported(weight: QuantizedTensor, dtype: str) -> bool:
    """Whether the kernel serves this weight: whole blocks only, two values to a register."""
    return math.prod(weight.shape) % BLOCK_SIZE == 0 and dtype in triton.PAIRS


def extends(weight: QuantizedTensor, columns: int) -> bool:
    """Whether the kernel can write a matrix of so many columns beside, or below, a `supported` weight: no word spans two rows."""
    return len(weight.shape) == 2 and weight.shape[1] % triton.WORD_WEIGHTS == 0 and columns % 2 == 0


def dequantize(
    weight: QuantizedTensor,
    dtype: str,
    beside: jax.Array | None = None,
    below: jax.Array | None = None,
    *,
    warps: int = WARPS,
    chunks: int = CHUNKS,
    interpret: bool = False,
) -> jax.Array:
    """A `supported` weight's values in `dtype`, an array of `weight.shape`; the twin is `nf4.dequantize`, bit for bit.

    `beside` [out, R] or `below` [R, in], of that dtype: a matrix written there as well, in what is [out, in + R] or [out + R, in] then.
    """
    more = beside if below is None else below
    shape = weight.shape
    if more is not None:
        rows, columns = shape
        shape = (rows, columns + more.shape[1]) if below is None else (rows + more.shape[0], columns)
    words = jax.lax.bitcast_convert_type(weight.codes.reshape(-1, 4), jnp.int32)
    threads = triton.LANES * warps
    pairs = triton.call(
        functools.partial(
            _kernel,
            dtype=dtype,
            threads=threads,
            chunks=chunks,
            columns=None if beside is None else weight.shape[1] // 2,
            interpret=interpret,
        ),
        (-(-words.size // (threads * chunks)),),
        jax.ShapeDtypeStruct((math.prod(shape) // 2,), jnp.int32),
        (words, jnp.asarray(CODEBOOKS[weight.quant_type]), triton.Scales.of(weight), _as_pairs(more)),
        name="nf4_dequantize",
        num_warps=warps,
        interpret=interpret,
    )
    columns = shape[-1] if shape[-1] % 2 == 0 else math.prod(shape)
    return jax.lax.bitcast_convert_type(pairs.reshape(-1, columns // 2), dtype).reshape(shape)


def _as_pairs(more: jax.Array | None) -> jax.Array | None:
    """A matrix of 16-bit values → [rows, columns / 2] int32, two values each."""
    if more is None:
        return None
    return jax.lax.bitcast_convert_type(more.reshape(more.shape[0], -1, 2), jnp.int32)


def _kernel(
    words: Any,
    codebook: Any,
    scales: triton.Scales,
    more: Any,
    out: Any,
    *,
    dtype: str,
    threads: int,
    chunks: int,
    columns: int | None,
    interpret: bool,
) -> None:
    """`columns`: pairs of a row of the weight, if `more` is beside it."""
    lanes = jnp.arange(threads, dtype=jnp.int32)
    table = plt.load(codebook.at[lanes & 15])
    whole = words.shape[0] % (threads * chunks) == 0
    for chunk in range(chunks):
        start = (pl.program_id(0) * chunks + chunk) * threads
        index = start + lanes if whole else jnp.minimum(start + lanes, words.shape[0] - 1)
        codes = plt.load(words.at[index])
        scale = triton.block_scales(scales, index >> 3, interpret=interpret)
        pairs = [triton.round_pair(codes, scale, table, byte, dtype, interpret=interpret) for byte in range(4)]
        # As two joins of two: Triton has no join of four.
        joined = jnp.stack([jnp.stack(pairs[0::2], -1), jnp.stack(pairs[1::2], -1)], -1).reshape(4 * threads)
        place = start * 4 + jnp.arange(4 * threads, dtype=jnp.int32)
        inside = None if whole else place < words.shape[0] * 4
        if columns is not None:
            place += place // columns * more.shape[1]
        plt.store(out.at[place], joined, mask=inside)
    if more is not None:
        _copy(more, out, columns, words.shape[0] * 4, -(-words.shape[0] // (threads * chunks)), lanes)


def _copy(more: Any, out: Any, columns: int | None, size: int, programs: int, lanes: jax.Array) -> None:
    """This program's part of `more`, to where it stands in `out`: in rows behind the weight's `columns`, or behind its `size` pairs."""
    rows, width = more.shape
    part = -(-rows * width // programs)
    for start in range(0, part, lanes.size):
        index = pl.program_id(0) * part + start + lanes
        inside = (start + lanes < part) & (index < rows * width)
        row, column = index // width, index % width
        place = size + index if columns is None else row * (columns + width) + columns + column
        plt.store(out.at[place], plt.load(more.at[jnp.minimum(row, rows - 1), column]), mask=inside)
