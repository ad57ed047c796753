"""Dequantization: 4-bit codes and their scales → the dense matrix, once through memory.

A program takes `CHUNKS` runs of words, a word a thread: eight weights, sixteen bytes of output. All loads of a program are independent, so
that enough are in flight to hide the memory's latency. Scales are decoded for each word rather than each block, which costs eight times
the arithmetic but moves nothing between threads.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from qlora_jax.ops.nf4 import BLOCK_SIZE, CODEBOOKS, QuantizedTensor
from qlora_jax.ops.pallas import triton

WARPS, CHUNKS = 4, 4


def supported(weight: QuantizedTensor, dtype: str) -> bool:
    """Whether the kernel serves this weight: whole blocks only, two values to a register."""
    return math.prod(weight.shape) % BLOCK_SIZE == 0 and dtype in triton.PAIRS


def dequantize(
    weight: QuantizedTensor, dtype: str, *, warps: int = WARPS, chunks: int = CHUNKS, interpret: bool = False
) -> jax.Array:
    """A `supported` weight's values in `dtype`, an array of `weight.shape`; the twin is `nf4.dequantize`, bit for bit."""
    size = math.prod(weight.shape)
    words = jax.lax.bitcast_convert_type(weight.codes.reshape(-1, 4), jnp.int32)
    threads = triton.LANES * warps
    scales = triton.Scales.of(weight)
    pairs = triton.call(
        functools.partial(_kernel, dtype=dtype, threads=threads, chunks=chunks, interpret=interpret),
        (-(-words.size // (threads * chunks)),),
        jax.ShapeDtypeStruct((size // 2,), jnp.int32),
        (words, jnp.asarray(CODEBOOKS[weight.quant_type]), scales),
        name="nf4_dequantize",
        num_warps=warps,
        interpret=interpret,
    )
    columns = weight.shape[-1] if weight.shape[-1] % 2 == 0 else size
    return jax.lax.bitcast_convert_type(pairs.reshape(-1, columns // 2), dtype).reshape(weight.shape)


def _kernel(
    words: Any,
    codebook: Any,
    scales: triton.Scales,
    out: Any,
    *,
    dtype: str,
    threads: int,
    chunks: int,
    interpret: bool,
) -> None:
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
        plt.store(out.at[place], joined, mask=None if whole else place < out.shape[0])
