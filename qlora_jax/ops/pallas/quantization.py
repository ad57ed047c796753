"""Quantization on the GPU: a weight is read once, and its codes and scales written.

The level of a scaled weight is found by a tree of four comparisons with the boundaries between levels. Divisions are correctly rounded, as
those of a CPU are, so that both give the same bytes.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from qlora_jax.ops import nf4
from qlora_jax.ops.nf4 import ABSMAX_BLOCK_SIZE, BLOCK_SIZE, QuantizedTensor, QuantType
from qlora_jax.ops.pallas import triton

WARPS, BLOCKS = 4, 64
BLOCK_WORDS = BLOCK_SIZE // 2
"""32-bit words of a block of bfloat16 weights, two to a word, the first one low."""


def supported(weight: jax.Array) -> bool:
    """Whether the kernel serves this weight: bfloat16, whole blocks."""
    return weight.dtype == jnp.bfloat16 and weight.size % BLOCK_SIZE == 0


def quantize(
    weight: jax.Array,
    double_quant: bool,
    quant_type: QuantType,
    *,
    warps: int = WARPS,
    blocks: int = BLOCKS,
    interpret: bool = False,
) -> QuantizedTensor:
    """A `supported` weight in 4 bits; the twin is `nf4.quantize`, byte for byte but for the scales' mean, a sum in another order."""
    words = jax.lax.bitcast_convert_type(weight.reshape(-1, BLOCK_WORDS, 2), jnp.int32)
    number = weight.size // BLOCK_SIZE
    codes, absmax = triton.call(
        functools.partial(_kernel, quant_type=quant_type, blocks=blocks, interpret=interpret),
        (-(-number // blocks),),
        (jax.ShapeDtypeStruct((number, BLOCK_WORDS), jnp.uint8), jax.ShapeDtypeStruct((number,), jnp.float32)),
        (words,),
        name="nf4_quantize",
        num_warps=warps,
        interpret=interpret,
    )
    nested = quantize_absmax(absmax, interpret=interpret) if double_quant else (absmax, None, None)
    return QuantizedTensor(codes.reshape(-1), *nested, weight.shape, quant_type, weight.dtype.name)


def _kernel(words: Any, codes: Any, absmax: Any, *, quant_type: QuantType, blocks: int, interpret: bool) -> None:
    number = absmax.shape[0]
    block = pl.program_id(0) * blocks + jnp.arange(blocks, dtype=jnp.int32)
    inside = block < number
    rows = block[:, None], jnp.arange(BLOCK_WORDS, dtype=jnp.int32)[None, :]
    pairs = plt.load(words.at[rows], mask=inside[:, None], other=0)
    # As integers, magnitudes keep their order, and subnormal ones their value.
    largest = jnp.max(jnp.maximum(pairs << 16 & 0x7FFFFFFF, pairs & 0x7FFF0000), axis=1)
    divisor = jax.lax.bitcast_convert_type(jnp.maximum(largest, int(nf4.SMALLEST_DIVISOR.view(np.int32))), jnp.float32)
    inverse = jnp.broadcast_to(triton.inverse(divisor, interpret=interpret)[:, None], pairs.shape)
    packed = pack_pair(pairs, inverse, quant_type, interpret=interpret)
    plt.store(codes.at[rows], packed.astype(jnp.uint8), mask=inside[:, None])
    plt.store(absmax.at[block], jax.lax.bitcast_convert_type(largest, jnp.float32), mask=inside)


def pack_pair(pairs: jax.Array, inverse: jax.Array, quant_type: QuantType, *, interpret: bool) -> jax.Array:
    """Two bfloat16 weights a word [n] int32, times `inverse` [n] float32 → their two codes in a byte, [n] int32."""
    if interpret:
        halves = [jax.lax.bitcast_convert_type(half, jnp.float32) * inverse for half in (pairs << 16, pairs & ~0xFFFF)]
        ranks = [sum((half > b).astype(jnp.int32) for b in nf4.boundaries(quant_type).tolist()) for half in halves]
        high, low = (
            sum(jnp.where(rank == i, code, 0) for i, code in enumerate(nf4.order(quant_type))) for rank in ranks
        )
        return high << 4 | low
    return triton.asm(pack_pair_asm(quant_type), "=&r,r,f", jnp.int32, pairs, inverse)


@functools.cache
def pack_pair_asm(quant_type: QuantType) -> str:
    """PTX of `pack_pair`."""
    rank = _rank_asm(quant_type)
    return "\n".join(
        [
            "{",
            ".reg .pred p0, p1, p2, p3;",
            ".reg .f32 x, t0, t1, t2, t3;",
            ".reg .b32 h, r;",
            ".reg .b64 w;",
            *("shl.b32 r, $1, 16;", "mov.b32 x, r;", *rank, "shl.b32 h, r, 4;"),
            *("and.b32 r, $1, 0xFFFF0000;", "mov.b32 x, r;", *rank, "or.b32 $0, h, r;"),
            "}",
        ]
    )


def _rank_asm(quant_type: QuantType) -> list[str]:
    """x becomes x · $2, and r its code: a tree of four comparisons, whose answers p0 … p3 are the bits of the level's rank."""
    boundaries = [f"0f{bits:08X}" for bits in nf4.boundaries(quant_type).view(np.uint32).tolist()]
    lines = ["mul.rn.f32 x, x, $2;"]
    for depth in range(4):
        values = boundaries[
            8 // 2**depth - 1 :: 16 // 2**depth
        ]  # what x may have to be compared with, by the answers so far
        for answer in reversed(range(depth)):
            pairs = zip(values[0::2], values[1::2], strict=True)
            lines += [f"selp.f32 t{i}, {yes}, {no}, p{answer};" for i, (no, yes) in enumerate(pairs)]
            values = [f"t{i}" for i in range(len(values) // 2)]
        lines.append(f"setp.gt.f32 p{depth}, x, {values[0]};")
    lines += ["selp.b32 r, 8, 0, p0;", "@p1 or.b32 r, r, 4;", "@p2 or.b32 r, r, 2;", "@p3 or.b32 r, r, 1;"]
    order = nf4.order(quant_type)
    if order == tuple(range(16)):
        return lines
    table = sum(code << 4 * rank for rank, code in enumerate(order))
    return [
        *lines,
        "shl.b32 r, r, 2;",
        f"mov.b64 w, 0x{table:016X};",
        "shr.b64 w, w, r;",
        "cvt.u32.u64 r, w;",
        "and.b32 r, r, 15;",
    ]


def quantize_absmax(
    absmax: jax.Array, *, warps: int = WARPS, interpret: bool = False
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Scales [N] float32 → (codes [N] uint8, nested_absmax [ceil(N / 256)], nested_offset []); the twin is `nf4.quantize_absmax`."""
    offset = nf4.mean(absmax)
    thresholds = jnp.asarray(np.append(nf4.DYNAMIC_THRESHOLDS, np.float32(np.inf)))
    rows = -(-absmax.size // ABSMAX_BLOCK_SIZE)
    codes, nested = triton.call(
        functools.partial(_absmax_kernel, interpret=interpret),
        (rows,),
        (jax.ShapeDtypeStruct((absmax.size,), jnp.uint8), jax.ShapeDtypeStruct((rows,), jnp.float32)),
        (absmax, offset.reshape(1), thresholds),
        name="nf4_quantize_absmax",
        num_warps=warps,
        interpret=interpret,
    )
    return codes, nested, offset


def _absmax_kernel(absmax: Any, offset: Any, thresholds: Any, codes: Any, nested: Any, *, interpret: bool) -> None:
    place = pl.program_id(0) * ABSMAX_BLOCK_SIZE + jnp.arange(ABSMAX_BLOCK_SIZE, dtype=jnp.int32)
    inside = place < absmax.shape[0]
    offset = offset[0]
    centred = plt.load(absmax.at[place], mask=inside, other=offset) - offset
    largest = jnp.max(jnp.abs(centred))
    divisor = jnp.broadcast_to(jnp.where(largest > 0, largest, 1), centred.shape)
    scaled = triton.divide(centred, divisor, interpret=interpret)
    position = jnp.zeros(centred.shape, jnp.int32)
    for step in (128, 64, 32, 16, 8, 4, 2, 1):
        above = scaled > plt.load(thresholds.at[position + (step - 1)])
        position += jnp.where(above, step, 0)
    plt.store(codes.at[place], position.astype(jnp.uint8), mask=inside)
    nested[pl.program_id(0)] = largest
