"""AdamW on moments in 8 bits, once through memory: gradients and codes in, parameters and codes out.

What XLA makes of it is a dozen kernels for every tensor, which pass on in float32 what they computed. Here a program has some blocks of
256 values in its registers from the first load to the last store. Codes are found as in `blockwise.py`, by two look-ups.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from qlora_jax.ops import blockwise
from qlora_jax.ops.blockwise import BLOCK_SIZE, BlockwiseTensor
from qlora_jax.ops.operands import Adam
from qlora_jax.ops.pallas import triton

BLOCKS, WARPS = 4, 4
IN_PLACE = {0: 0, 2: 1, 3: 2, 4: 3, 5: 4}
"""Every array but the gradient."""


class _Tables(NamedTuple):
    """Of a signed or an unsigned map: its values, its thresholds and what `blockwise` finds the first of these with."""

    values: Any  # [256] float32
    thresholds: Any  # [256] float32
    first_codes: Any  # [2 · buckets] uint8


def supported(param: jax.Array, mu: Any) -> bool:
    """Whether the kernel serves this parameter: moments in 8 bits, of whole blocks."""
    return isinstance(mu, BlockwiseTensor) and param.size % BLOCK_SIZE == 0


def update(
    param: jax.Array,
    grad: jax.Array,
    mu: BlockwiseTensor,
    nu: BlockwiseTensor,
    numbers: jax.Array,
    adam: Adam,
    *,
    interpret: bool = False,
) -> tuple[jax.Array, BlockwiseTensor, BlockwiseTensor]:
    """As `dispatch.adamw_8bit`, for what is `supported`."""
    number = param.size // BLOCK_SIZE
    blocks = min(BLOCKS, number & -number)
    flat, codes = (jax.ShapeDtypeStruct((param.size,), dtype) for dtype in (param.dtype, jnp.uint8))
    absmax = jax.ShapeDtypeStruct((number,), jnp.float32)
    tables = [_Tables(*map(jnp.asarray, blockwise.tables(signed=signed))) for signed in (True, False)]
    new, *moments = triton.call(
        functools.partial(_kernel, adam=adam, blocks=blocks, interpret=interpret),
        (number // blocks,),
        (flat, codes, absmax, codes, absmax),
        (param.reshape(-1), grad.reshape(-1), mu.codes, mu.absmax, nu.codes, nu.absmax, numbers, *tables),
        name="adamw_8bit",
        num_warps=WARPS,
        interpret=interpret,
        in_place=IN_PLACE,
    )
    packed = [
        old.replace(codes=codes, absmax=absmax)
        for old, codes, absmax in zip((mu, nu), moments[0::2], moments[1::2], strict=True)
    ]
    return new.reshape(param.shape), *packed


def _kernel(
    param: Any,
    grad: Any,
    mu_codes: Any,
    mu_absmax: Any,
    nu_codes: Any,
    nu_absmax: Any,
    numbers: Any,
    signed: _Tables,
    unsigned: _Tables,
    new_param: Any,
    new_mu_codes: Any,
    new_mu_absmax: Any,
    new_nu_codes: Any,
    new_nu_absmax: Any,
    *,
    adam: Adam,
    blocks: int,
    interpret: bool,
) -> None:
    block = pl.program_id(0) * blocks + jnp.arange(blocks, dtype=jnp.int32)
    place = block[:, None] * BLOCK_SIZE + jnp.arange(BLOCK_SIZE, dtype=jnp.int32)[None, :]
    factor, rate, mu_share, nu_share, made = (numbers[i] for i in range(5))
    old = plt.load(param.at[place]).astype(jnp.float32)
    slope = plt.load(grad.at[place]).astype(jnp.float32) * factor
    kept = [
        (plt.load(codes.at[place]), plt.load(absmax.at[block]))
        for codes, absmax in ((mu_codes, mu_absmax), (nu_codes, nu_absmax))
    ]
    mu = _decoded(*kept[0], signed) * adam.beta1 + (1 - adam.beta1) * slope
    nu = _decoded(*kept[1], unsigned) * adam.beta2 + (1 - adam.beta2) * slope * slope
    divide = functools.partial(triton.divide, interpret=interpret)
    mean, spread = divide(mu, jnp.full_like(mu, mu_share)), divide(nu, jnp.full_like(nu, nu_share))
    step = divide(mean, jnp.sqrt(spread) + adam.epsilon) + adam.weight_decay * old
    plt.store(new_param.at[place], jnp.where(made > 0, old - rate * step, old).astype(new_param.dtype))
    for moment, (old_codes, old_absmax), tables, codes, absmax in (
        (mu, kept[0], signed, new_mu_codes, new_mu_absmax),
        (nu, kept[1], unsigned, new_nu_codes, new_nu_absmax),
    ):
        largest = jnp.max(jnp.abs(moment), axis=1)
        plt.store(absmax.at[block], jnp.where(made > 0, largest, old_absmax))
        whole = jnp.broadcast_to(jnp.where(largest > 0, largest, 1)[:, None], moment.shape)
        plt.store(codes.at[place], jnp.where(made > 0, _encoded(divide(moment, whole), tables), old_codes))


def _decoded(codes: jax.Array, absmax: jax.Array, tables: _Tables) -> jax.Array:
    """Codes [blocks, 256] and absmax [blocks] → the moments, [blocks, 256] float32."""
    return plt.load(tables.values.at[codes.astype(jnp.int32)]) * absmax[:, None]


def _encoded(scaled: jax.Array, tables: _Tables) -> jax.Array:
    """The codes of values from -1 to 1, uint8."""
    first = plt.load(tables.first_codes.at[blockwise.bucket(scaled)]).astype(jnp.int32)
    return (first + jnp.where(scaled > plt.load(tables.thresholds.at[first]), 1, 0)).astype(jnp.uint8)
