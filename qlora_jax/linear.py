"""Flax modules: a frozen NF4 linear and a LoRA adapter on it.

    y = x·Wᵀ + scaling · (dropout(x)·Aᵀ)·Bᵀ          W frozen in NF4, A [R, in] and B [out, R] trained in float32

Frozen weights are `FrozenParam`s and adapters `nnx.LoRAParam`s, so `nnx.split(module, nnx.LoRAParam, ...)` separates what is
trained from what is not into two trees.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from qlora_jax import nf4
from qlora_jax.config import QuantizationSettings


class FrozenParam(nnx.Variable):
    """A parameter of the base model. It is never trained and no gradient reaches it."""


@jax.custom_vjp
def frozen_matmul(x: jax.Array, weight: nf4.QuantizedTensor) -> jax.Array:
    """x [..., in] times the transpose of an NF4 weight of shape (out, in): [..., out] in x's dtype.

    The weight is dequantized to bfloat16, as bitsandbytes does, and from there to x's dtype.
    """
    return jnp.einsum("...i,oi->...o", x, nf4.dequantize(weight).astype(x.dtype))


def _frozen_matmul_forward(x: jax.Array, weight: nf4.QuantizedTensor) -> tuple[jax.Array, nf4.QuantizedTensor]:
    return frozen_matmul(x, weight), weight  # kept for the backward pass: the 4-bit codes, never the bf16 matrix


def _frozen_matmul_backward(weight: nf4.QuantizedTensor, dy: jax.Array) -> tuple[jax.Array, None]:
    return jnp.einsum("...o,oi->...i", dy, nf4.dequantize(weight).astype(dy.dtype)), None  # frozen: no cotangent


frozen_matmul.defvjp(_frozen_matmul_forward, _frozen_matmul_backward)


class LoRA(nnx.Module):
    """The low-rank term of one linear: scaling · (dropout(x)·Aᵀ)·Bᵀ.

    A starts uniform in ±1/√in (kaiming uniform with a = √5, as peft) and B at zero, so that a fresh adapter changes nothing. Both are
    float32 and are multiplied in x's dtype. Dropout acts on the adapter's input only.
    """

    def __init__(
        self, in_features: int, out_features: int, rank: int, scaling: float, dropout: float, rngs: nnx.Rngs
    ) -> None:
        bound = in_features**-0.5
        self.lora_a = nnx.LoRAParam(jax.random.uniform(rngs.params(), (rank, in_features), jnp.float32, -bound, bound))
        self.lora_b = nnx.LoRAParam(jnp.zeros((out_features, rank), jnp.float32))
        self.scaling, self.dropout = scaling, dropout

    def __call__(self, x: jax.Array, key: jax.Array | None) -> jax.Array:
        """x [..., in] → [..., out]. `key` draws the dropout mask; None means no dropout."""
        if key is not None and self.dropout > 0:
            keep = jax.random.bernoulli(key, 1 - self.dropout, x.shape)
            x = jnp.where(keep, x / (1 - self.dropout), 0).astype(x.dtype)
        down = jnp.einsum("...i,ri->...r", x, self.lora_a[...].astype(x.dtype)) * jnp.asarray(self.scaling, x.dtype)
        # Written with a transpose, B's gradient is a product of rank rows: twice as fast on a CPU as one of rank columns.
        return down @ self.lora_b[...].astype(x.dtype).T


class NF4Linear(nnx.Module):
    """A frozen linear without bias, `weight` an NF4 tensor of shape (out, in), and its adapter if it has one.

    A new one holds random weights (normal, deviation 0.02) until a checkpoint's take their place.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        adapter: LoRA | None,
        quantization: QuantizationSettings,
        rngs: nnx.Rngs,
    ) -> None:
        weight = 0.02 * jax.random.normal(rngs.params(), (out_features, in_features), jnp.bfloat16)
        self.weight = FrozenParam(nf4.quantize(weight, quantization.double_quant, quantization.quant_type))
        self.adapter = adapter

    def __call__(self, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """x [..., in] → [..., out] in x's dtype."""
        y = frozen_matmul(x, self.weight.get_value())
        return y if self.adapter is None else y + self.adapter(x, key)
