"""Float32 arrays in 8 bits: what the moments of an 8-bit optimizer are kept in.

As bitsandbytes' 8-bit optimizers (Dettmers et al., "8-bit Optimizers via Block-wise Quantization", 2022): blocks of 256 values are divided
by their own largest magnitude, and each becomes the index of the nearest of the 256 values of a dynamic map, signed for the first moment,
unsigned for the second. 8 + 32/256 = 8.125 bits a value.
"""

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from qlora_jax.ops import nf4

BLOCK_SIZE = 256
_MAPS = {signed: nf4.dynamic_map(signed=signed) for signed in (True, False)}
_THRESHOLDS = {signed: nf4.midpoints(values) for signed, values in _MAPS.items()}
_CUT, _FIRST, _LAST = 16, (127 - 23) << 7, 127 << 7
"""Magnitudes are told apart by their upper 16 bits: an exponent and 7 bits, from 2⁻²³, under which all are next to zero, to 1."""


def _first_codes(thresholds: np.ndarray) -> np.ndarray:
    """By `bucket`: the code of the smallest value in it, [2 · buckets] uint8.

    Values of one bucket have this code or the next: no two thresholds share a bucket.
    """
    edges = (np.arange(_FIRST, _LAST + 2, dtype=np.int32) << _CUT).view(np.float32)
    edges[0] = 0
    smallest = np.stack([edges[:-1], -np.nextafter(edges[1:], np.float32(0))])
    codes = np.searchsorted(thresholds, smallest)
    largest = np.stack([np.nextafter(edges[1:], np.float32(0)), -edges[:-1]])
    assert (np.searchsorted(thresholds, largest) - codes <= 1).all()
    return codes.astype(np.uint8).reshape(-1)


_FIRST_CODES = {signed: _first_codes(thresholds) for signed, thresholds in _THRESHOLDS.items()}


@flax.struct.dataclass
class BlockwiseTensor:
    """n = prod(shape) values, row-major, in N = ceil(n / 256) blocks."""

    codes: jax.Array  # [n] uint8 indices into the dynamic map
    absmax: jax.Array  # [N] float32
    shape: tuple[int, ...] = flax.struct.field(pytree_node=False)
    signed: bool = flax.struct.field(pytree_node=False)


def quantize(values: jax.Array, *, signed: bool) -> BlockwiseTensor:
    """Exact nearest codes of float32 values (of any shape; not negative unless `signed`). A tie goes to the lower code."""
    flat = values.astype(jnp.float32).reshape(-1)
    blocks = jnp.pad(flat, (0, -flat.size % BLOCK_SIZE)).reshape(-1, BLOCK_SIZE)
    absmax = jnp.max(jnp.abs(blocks), axis=1)
    scaled = blocks / jnp.where(absmax > 0, absmax, 1)[:, None]
    codes = _nearest(scaled.reshape(-1)[: flat.size], signed=signed)
    return BlockwiseTensor(codes, absmax, values.shape, signed)


def _nearest(scaled: jax.Array, *, signed: bool) -> jax.Array:
    """How many thresholds are below each value [n], -1 to 1: uint8. In two look-ups, where a search by halves takes eight, which a GPU
    does one after the other with the whole array."""
    _, thresholds, first_codes = tables(signed=signed)
    code = jnp.take(first_codes, bucket(scaled), mode="clip").astype(jnp.int32)
    return (code + (scaled > jnp.take(thresholds, code, mode="clip"))).astype(jnp.uint8)


def bucket(scaled: jax.Array) -> jax.Array:
    """The number of each value's bucket, by its magnitude's upper bits, and for negative values behind the others; int32."""
    magnitude = jax.lax.bitcast_convert_type(scaled, jnp.int32) & 0x7FFFFFFF
    return jnp.clip(magnitude >> _CUT, _FIRST, _LAST) - _FIRST + jnp.where(scaled < 0, _LAST - _FIRST + 1, 0)


def tables(*, signed: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A map's values [256], above which value's threshold the next is nearer [256], and by `bucket` the first code there."""
    return _MAPS[signed], np.append(_THRESHOLDS[signed], np.float32(np.inf)), _FIRST_CODES[signed]


def dequantize(tensor: BlockwiseTensor) -> jax.Array:
    """The values, float32 of `tensor.shape`."""
    values = jnp.take(_MAPS[tensor.signed], tensor.codes.astype(jnp.int32), mode="clip")
    blocks = jnp.pad(values, (0, -values.size % BLOCK_SIZE)).reshape(-1, BLOCK_SIZE) * tensor.absmax[:, None]
    return blocks.reshape(-1)[: values.size].reshape(tensor.shape)
