"""Linears and adapters of given values."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from qlora_jax.config import QuantizationSettings
from qlora_jax.model.linear import FrozenParam, LoRA, NF4Linear
from qlora_jax.ops import nf4


def linear_of(
    weight: nf4.QuantizedTensor | jax.Array, adapter: LoRA | None = None, *, share_dense: bool = False
) -> NF4Linear:
    """A linear with this weight of shape (out, in)."""
    rows, columns = weight.shape
    linear = NF4Linear(columns, rows, adapter, QuantizationSettings(), nnx.Rngs(0), share_dense=share_dense)
    linear.weight = FrozenParam(weight)
    return linear


def frozen_matmul(x: jax.Array, weight: nf4.QuantizedTensor | jax.Array, share_dense: bool = False) -> jax.Array:
    """x [..., in] through a linear without an adapter."""
    return linear_of(weight, share_dense=share_dense)(x)


def term(lora: LoRA, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
    """What an adapter adds: its linear's output if the weight is zero."""
    zero = jnp.zeros((lora.lora_b[...].shape[0], lora.lora_a[...].shape[1]), x.dtype)
    return linear_of(zero, lora)(x, key)


def make_lora(a: Any, b: Any, scaling: float = 1.0, dropout: float = 0.0) -> LoRA:
    """An adapter with given matrices."""
    (rank, columns), rows = a.shape, b.shape[0]
    lora = LoRA(columns, rows, rank, scaling, dropout, nnx.Rngs(0))
    lora.lora_a[...], lora.lora_b[...] = jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32)
    return lora
