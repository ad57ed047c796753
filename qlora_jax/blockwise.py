"""Float32 arrays in 8 bits: what the moments of an 8-bit optimizer are kept in.

As bitsandbytes' 8-bit optimizers (Dettmers et al., "8-bit Optimizers via Block-wise Quantization", 2022): blocks of 256 values are divided
by their own largest magnitude, and each becomes the index of the nearest of the 256 values of a dynamic map, signed for the first moment,
unsigned for the second. 8 + 32/256 = 8.125 bits a value.
"""

import flax.struct
import jax
import jax.numpy as jnp

from qlora_jax import nf4

BLOCK_SIZE = 256
_MAPS = {signed: nf4.dynamic_map(signed=signed) for signed in (True, False)}
_THRESHOLDS = {signed: nf4.midpoints(values) for signed, values in _MAPS.items()}


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
    codes = jnp.searchsorted(_THRESHOLDS[signed], scaled.reshape(-1)[: flat.size], method="scan_unrolled")
    return BlockwiseTensor(codes.astype(jnp.uint8), absmax, values.shape, signed)


def dequantize(tensor: BlockwiseTensor) -> jax.Array:
    """The values, float32 of `tensor.shape`."""
    values = jnp.take(_MAPS[tensor.signed], tensor.codes.astype(jnp.int32), mode="clip")
    blocks = jnp.pad(values, (0, -values.size % BLOCK_SIZE)).reshape(-1, BLOCK_SIZE) * tensor.absmax[:, None]
    return blocks.reshape(-1)[: values.size].reshape(tensor.shape)
