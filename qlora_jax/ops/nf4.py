"""The NF4 format: 4-bit codes, one scale per 64 weights, and the scales quantized again.

The idea (Dettmers et al., "QLoRA", 2023, section 3). Trained weights are close to normally distributed, so 16 levels placed at
normal quantiles lose less than 16 levels placed evenly. A weight tensor is flattened row-major and cut into blocks of 64. Each block
is divided by its largest magnitude (`absmax`), which puts it in [-1, 1], and each value becomes the index of the nearest level of
`CODEBOOK`. Two indices share a byte, the first in the high nibble.

One float32 scale per 64 weights costs half a bit a weight. Double quantization stores the scales in 8 bits: their mean is
subtracted (`nested_offset`), blocks of 256 are divided by their own float32 `nested_absmax`, and each becomes the index of the nearest of
the 256 values of `DYNAMIC_MAP`, whose steps are fine near zero and coarse near one. The bill, in bits a weight:

    codes 4  +  8-bit scales 8/64  +  nested scales 32/(64·256)  =  4.127      (4.5 without double quantization)

A Llama-2-70B decoder layer has 855.6 M weights in its linears: 441 MB, and eighty of them 35.3 GB.

Which bits. The packed codes equal those of bitsandbytes 0.50 on a CPU byte for byte, and dequantizing equals it bit for bit:

    a = DYNAMIC_MAP[absmax] · nested_absmax + nested_offset      two roundings in float32 (a fused multiply-add would make it one)
    w = round(CODEBOOK[code] · a)                                one rounding in float32, then one to bfloat16

Where we depart: the 8-bit scale codes are exact-nearest (bitsandbytes' CUDA kernel is as well), while its CPU path goes through a
look-up table in steps of 2^-15 that misses the nearest by one code (by up to three next to zero) for about one scale in a thousand;
and the mean behind `nested_offset` may differ in the last bits, because it is a sum in another order. A stored checkpoint carries
its own offset, so reading one back is exact.
"""

import functools
from collections.abc import Callable
from typing import Literal

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from qlora_jax.base.errors import InputError

BLOCK_SIZE = 64
ABSMAX_BLOCK_SIZE = 256

CODEBOOK = np.array(
    [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
        -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ],
    np.float32,
)  # fmt: skip
"""The 16 levels of NF4, ascending. Not symmetric: 7 negative levels, zero, 8 positive."""

FP4_CODEBOOK = np.array([0, 0.0625, 8, 12, 4, 6, 2, 3, 0, -0.0625, -8, -12, -4, -6, -2, -3], np.float32) / np.float32(
    12
)
"""The 16 values of bitsandbytes' FP4 in the order of their bits: a sign, two bits of exponent, one of mantissa. Zero comes twice."""

QuantType = Literal["nf4", "fp4"]
CODEBOOKS: dict[QuantType, np.ndarray] = {"nf4": CODEBOOK, "fp4": FP4_CODEBOOK}

SMALLEST_DIVISOR = np.float32(1e-38)
"""bitsandbytes divides by no smaller scale, so that a block of zeros divides by something."""


def dynamic_map(*, signed: bool = True) -> np.ndarray:
    """The 256 values of the 8-bit dynamic map, ascending, float32 [256].

    For each decimal exponent i - 6, i in 0..6: the middles of 2^i equal steps from 0.1 to 1, times 10^(i-6), with both signs, or of
    twice as many steps without signs; and zero and one. Source: bitsandbytes `create_dynamic_map(signed, max_exponent_bits=7,
    total_bits=8)`, whose float32 steps (torch.linspace) are counted from the nearer end and rounded once.
    """
    values = [0.0, 1.0]
    start, end = np.float32(0.1), np.float32(1)
    for i in range(7):
        number = 2**i if signed else 2 ** (i + 1)
        steps = np.arange(number + 1)
        width = np.float64((end - start) / np.float32(number))
        from_start, from_end = start + width * steps, end - width * steps[::-1]
        edges = np.where(steps <= number // 2, from_start, from_end).astype(np.float32)
        middles = (edges[1:] + edges[:-1]) / np.float32(2) * np.float32(10.0 ** (i - 6))
        values += [*middles, *-middles] if signed else [*middles]
    return np.sort(np.array(values, np.float32))


DYNAMIC_MAP = dynamic_map()


def midpoints(values: np.ndarray) -> np.ndarray:
    """The largest float32 not above each exact midpoint: `x > threshold` is then exactly "x is nearer the upper value"."""
    exact = (values[1:].astype(np.float64) + values[:-1].astype(np.float64)) / 2
    rounded = exact.astype(np.float32)
    return np.where(rounded > exact, np.nextafter(rounded, np.float32(-np.inf)), rounded)


DYNAMIC_THRESHOLDS = midpoints(DYNAMIC_MAP)
"""The 255 values, ascending, above which a scaled scale belongs to the next value of the map; float32."""


@flax.struct.dataclass
class QuantizedTensor:
    """A frozen weight in NF4 (or FP4). n = prod(shape) weights, row-major, in N = ceil(n / 64) blocks.

    `nested_absmax` and `nested_offset` are None without double quantization, and `absmax` is then float32.
    """

    codes: jax.Array  # [ceil(n / 2)] uint8, first weight in the high nibble
    absmax: jax.Array  # [N] uint8 indices into DYNAMIC_MAP, or float32
    nested_absmax: jax.Array | None  # [ceil(N / 256)] float32
    nested_offset: jax.Array | None  # [] float32
    shape: tuple[int, ...] = flax.struct.field(pytree_node=False)
    quant_type: QuantType = flax.struct.field(pytree_node=False, default="nf4")
    dtype: str = flax.struct.field(pytree_node=False, default="bfloat16")
    """What dequantizing rounds to: the dtype that was quantized, as in bitsandbytes' `QuantState`."""


@functools.partial(jax.jit, static_argnames=("double_quant", "quant_type"))
def quantize(weight: jax.Array, double_quant: bool = True, quant_type: QuantType = "nf4") -> QuantizedTensor:
    """Quantize a weight of any shape and float dtype; arithmetic in float32.

    The weight must be finite (`check_finite` says so by name). A tie goes to the lower level; an all-zero block gets the code of 0.
    """
    flat, ascending = weight.reshape(-1), np.array(order(quant_type))
    absmax = _absmax_bits(flat)
    ranks = _scaled(flat, absmax, lambda scaled: sum((scaled > b).astype(jnp.uint8) for b in boundaries(quant_type)))
    ranks = ranks.reshape(-1, 2)
    codes = (ranks[:, 0] << 4 | ranks[:, 1])[: (weight.size + 1) // 2]
    if (np.diff(ascending) < 0).any():  # the type's codes do not ascend: a second look-up, a byte at a time
        pairs = (ascending[:, None] << 4 | ascending[None, :]).astype(np.uint8).reshape(-1)
        codes = jnp.take(pairs, codes.astype(jnp.int32), mode="clip")
    absmax = jax.lax.bitcast_convert_type(absmax, jnp.float32)
    nested = quantize_absmax(absmax) if double_quant else (absmax, None, None)
    return QuantizedTensor(codes, *nested, weight.shape, quant_type, weight.dtype.name)


@jax.jit
def block_absmax(weight: jax.Array) -> jax.Array:
    """The scales that `quantize` finds, [N] float32, before they are quantized themselves."""
    return jax.lax.bitcast_convert_type(_absmax_bits(weight.reshape(-1)), jnp.float32)


@functools.partial(jax.jit, static_argnames="quant_type")
def round_trip(weight: jax.Array, absmax: jax.Array, scales: jax.Array, quant_type: QuantType = "nf4") -> jax.Array:
    """A weight through 4 bits and back in its own shape and dtype: the bits of `quantize`, then `dequantize`.

    No codes are packed, which makes it faster than the two, and a part of a weight (whole blocks) will do.

    Args:
        absmax: the part's `block_absmax`, [N] float32.
        scales: what became of them in quantizing them too, [N] float32.
    """
    first, *higher = np.sort(CODEBOOKS[quant_type])

    def values(scaled: jax.Array) -> jax.Array:
        levels = jnp.full(scaled.shape, first)
        for boundary, level in zip(boundaries(quant_type), higher, strict=True):
            levels = jnp.where(scaled > boundary, level, levels)
        return (levels * scales[:, None]).astype(weight.dtype)

    bits = jax.lax.bitcast_convert_type(absmax, jnp.int32)
    return _scaled(weight.reshape(-1), bits, values).reshape(-1)[: weight.size].reshape(weight.shape)


def order(quant_type: QuantType) -> tuple[int, ...]:
    """The 16 codes in the order of their levels; FP4's two zeros in the order of their codes."""
    return tuple(np.argsort(CODEBOOKS[quant_type], kind="stable").tolist())


def boundaries(quant_type: QuantType) -> np.ndarray:
    """The 15 values, ascending, above which a scaled weight belongs to the next level; float32."""
    levels = np.sort(CODEBOOKS[quant_type])
    return (levels[1:] + levels[:-1]) / np.float32(2)


def _absmax_bits(flat: jax.Array) -> jax.Array:
    """Weights [n] → the bits of their blocks' largest magnitudes, [N] int32. Among the bits, because XLA's CPU backend takes subnormal
    numbers for zero, which would lose blocks of tiny weights.
    """
    if flat.dtype == jnp.bfloat16:  # 16 bits have the order of all 32
        blocks = _pad(jax.lax.bitcast_convert_type(flat, jnp.int16) & 0x7FFF, BLOCK_SIZE).reshape(-1, BLOCK_SIZE)
        halves = jnp.maximum(blocks[:, : BLOCK_SIZE // 2], blocks[:, BLOCK_SIZE // 2 :])  # twice as fast on a CPU
        absmax = jnp.max(halves, axis=1).astype(jnp.int32) << 16
    else:
        bits = jax.lax.bitcast_convert_type(flat.astype(jnp.float32), jnp.int32)
        absmax = jnp.max(_pad(bits & _MAGNITUDE, BLOCK_SIZE).reshape(-1, BLOCK_SIZE), axis=1)
    # In a block that is not full bitsandbytes also stores what it divides by.
    return absmax.at[-1].max(_bits(SMALLEST_DIVISOR)) if flat.size % BLOCK_SIZE else absmax


def _scaled(flat: jax.Array, absmax_bits: jax.Array, then: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """Weights [n] over their block's absmax, clipped to ±1, float32 [N, 64], 0 where a block is not full; and what `then` makes of them.

    bitsandbytes' arithmetic: x · (1 / absmax), but x / absmax in a last block that is not full. Where 1 / absmax is subnormal or absmax
    tiny (see `_absmax_bits`), blocks are first moved by a power of two to where float32 has all its digits. `then` is part of either
    road, so that a compiler makes one loop of it all.
    """
    ragged = flat.size % BLOCK_SIZE > 0

    def road(scale: Callable[[jax.Array, jax.Array, bool], jax.Array]) -> Callable[[jax.Array, jax.Array], jax.Array]:
        def scale_and_go_on(flat: jax.Array, absmax_bits: jax.Array) -> jax.Array:
            blocks = _pad(flat.astype(jnp.float32), BLOCK_SIZE).reshape(-1, BLOCK_SIZE)
            return then(jnp.clip(scale(blocks, absmax_bits, ragged), -1, 1))

        return scale_and_go_on

    ordinary = (absmax_bits == 0) | (absmax_bits >= _bits(2.0**-64)) & (absmax_bits < _bits(2.0**126))
    return jax.lax.cond(jnp.all(ordinary), road(_scale_ordinary), road(_scale_any), flat, absmax_bits)


def _scale_ordinary(blocks: jax.Array, absmax_bits: jax.Array, ragged: bool) -> jax.Array:
    absmax = jax.lax.bitcast_convert_type(absmax_bits, jnp.float32)
    scaled = blocks * jnp.where(absmax > 0, 1 / absmax, 0)[:, None]
    return scaled.at[-1].set(jnp.where(absmax[-1] > 0, blocks[-1] / absmax[-1], scaled[-1])) if ragged else scaled


def _scale_any(blocks: jax.Array, absmax_bits: jax.Array, ragged: bool) -> jax.Array:
    divisor = jnp.maximum(absmax_bits, _bits(SMALLEST_DIVISOR))
    huge = divisor >= _bits(2.0**126)
    power = jnp.where(divisor < _bits(2.0**-64), 96, jnp.where(huge, -64, 0))
    bits = jax.lax.bitcast_convert_type(blocks, jnp.int32)
    moved, moved_divisor = _times_power(bits, power[:, None]), _times_power(divisor, power)
    scaled = moved * jnp.where(huge, _subnormal_inverse(divisor), 1 / moved_divisor)[:, None]
    return scaled.at[-1].set(moved[-1] / moved_divisor[-1]) if ragged else scaled


_MAGNITUDE = 0x7FFFFFFF  # all bits of a float32 but its sign; as integers, magnitudes keep their order


def _bits(value: float) -> int:
    return int(np.float32(value).view(np.int32))


def _times_power(bits: jax.Array, power: jax.Array) -> jax.Array:
    """The float32 numbers with these bits, times 2^power, for a power of 96, 0 or -64. Only 96 brings subnormal numbers back from zero."""
    value = jax.lax.bitcast_convert_type(bits, jnp.float32) * jnp.where(
        power == 96, 2.0**96, jnp.where(power == -64, 2.0**-64, 1)
    )
    step = jnp.where(power == 96, 2.0 ** (96 - 149), 0)
    subnormal = (bits & _MAGNITUDE).astype(jnp.float32) * jnp.where(bits < 0, -step, step)
    return jnp.where((bits & _MAGNITUDE) < _bits(2.0**-126), subnormal, value)


def _subnormal_inverse(bits: jax.Array) -> jax.Array:
    """2^64 / x for x >= 2^126, given by its bits, with 1 / x rounded to the subnormal number that it is: a multiple of 2^-149."""
    mantissa = bits & 0x7FFFFF | 0x800000  # x = mantissa · 2^103 or 2^104
    quotient = jnp.where(bits >= _bits(2.0**127), 2.0**45, 2.0**46) / mantissa.astype(jnp.float32)
    whole = jnp.floor(quotient).astype(jnp.int32)
    # Rounding twice goes wrong where the first lands on a half. The exact remainder 2^46 or 2^47 - (2·whole + 1)·mantissa is less than
    # 2^31, so that arithmetic modulo 2^32 gives it.
    remainder = -(2 * whole + 1) * mantissa
    up = (remainder > 0) | (remainder == 0) & (whole % 2 == 1)
    rounded = jnp.where(quotient - whole == 0.5, whole + up, jnp.round(quotient).astype(jnp.int32))
    return rounded.astype(jnp.float32) * 2.0 ** (64 - 149)


def quantize_absmax(absmax: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Scales [N] float32 → (codes [N] uint8, nested_absmax [ceil(N / 256)] float32, nested_offset [] float32)."""
    offset = mean(absmax)
    centred = _pad(absmax - offset, ABSMAX_BLOCK_SIZE).reshape(-1, ABSMAX_BLOCK_SIZE)
    nested_absmax = jnp.max(jnp.abs(centred), axis=1)
    scaled = centred / jnp.where(nested_absmax > 0, nested_absmax, 1)[:, None]
    codes = jnp.searchsorted(DYNAMIC_THRESHOLDS, scaled.reshape(-1)).astype(jnp.uint8)
    return codes[: absmax.size], nested_absmax, offset


def mean(absmax: jax.Array) -> jax.Array:
    """The scales' mean, summed in two stages, so that the rounding error of millions of addends stays near one ulp."""
    mean = _pad(absmax, ABSMAX_BLOCK_SIZE).reshape(-1, ABSMAX_BLOCK_SIZE).sum(1).sum() / absmax.size
    return jnp.minimum(mean, np.finfo(np.float32).max)  # rounded before it is used: see `dequantize_absmax`


def dequantize(weight: QuantizedTensor, dtype: jax.typing.DTypeLike | None = None) -> jax.Array:
    """The weight's values, rounded once to `dtype` (default: the weight's own): an array of `weight.shape`. Usable inside jit."""
    size = int(np.prod(weight.shape))
    codebook = CODEBOOKS[weight.quant_type]
    pairs = np.stack([np.repeat(codebook, 16), np.tile(codebook, 16)], axis=1)  # [256, 2]: a byte's two levels
    # One look-up a byte, not a nibble: 6 times faster on a CPU.
    levels = jnp.take(pairs, weight.codes.astype(jnp.int32), axis=0, mode="clip").reshape(-1)
    blocks = _pad(levels, BLOCK_SIZE).reshape(-1, BLOCK_SIZE)
    values = (blocks * dequantize_absmax(weight)[:, None]).astype(dtype or weight.dtype)
    return values.reshape(-1)[:size].reshape(weight.shape)


def dequantize_absmax(weight: QuantizedTensor) -> jax.Array:
    """The scales of the blocks, [N] float32."""
    if weight.nested_absmax is None:
        return weight.absmax
    size = weight.absmax.size
    # Broadcast, not jnp.repeat: that counts its way through a cumulative sum, which takes a GPU compiler seconds a matrix.
    nested = jnp.broadcast_to(weight.nested_absmax[:, None], (weight.nested_absmax.size, ABSMAX_BLOCK_SIZE)).reshape(
        -1
    )[:size]
    product = jnp.take(DYNAMIC_MAP, weight.absmax.astype(jnp.int32), mode="clip") * nested
    # The minimum changes no finite value; it keeps compilers from fusing product and sum into one rounding (an FMA), which an
    # optimization barrier does not do on every version of XLA's CPU backend.
    return jnp.minimum(product, np.finfo(np.float32).max) + weight.nested_offset


def check_finite(weight: np.ndarray, name: str) -> None:
    """Refuse NaN and infinity, naming the tensor: one of them would spoil its whole block.

    Raises:
        InputError: `weight` holds a value that is not finite.
    """
    finite = np.isfinite(weight)
    if not finite.all():
        count, first = int((~finite).sum()), tuple(int(i) for i in np.argwhere(~finite)[0])
        raise InputError(
            name,
            found=f"{count} of {weight.size} values are NaN or infinite, the first at {first}",
            expected="finite weights",
            fix="the checkpoint is damaged or was saved from a diverged run; fetch it again",
        )


def _ceil(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _pad(flat: jax.Array, multiple: int) -> jax.Array:
    missing = _ceil(flat.size, multiple) - flat.size
    return jnp.pad(flat, (0, missing)) if missing else flat
