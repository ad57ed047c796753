"""Flax modules: a frozen 4-bit linear and a LoRA adapter on it.

    y = x·Wᵀ + scaling · (dropout(x)·Aᵀ)·Bᵀ          W frozen in 4 bits, A [R, in] and B [out, R] trained

In the place of a 4-bit weight a plain matrix [out, in] does as well: that is LoRA without the Q, for comparisons.

Frozen weights are `FrozenParam`s and adapters `nnx.LoRAParam`s, so `nnx.split(module, nnx.LoRAParam, ...)` separates what is
trained from what is not into two trees.
"""

import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from qlora_jax import kernels, nf4
from qlora_jax.config import QuantizationSettings

ADAPTER_OUTPUT = "adapter"
"""The name of x·Aᵀ [..., R] for what chooses the values to keep for the backward pass."""


class FrozenParam(nnx.Variable):
    """A parameter of the base model. It is never trained and no gradient reaches it."""


Weight = nf4.QuantizedTensor | jax.Array


def dense(weight: Weight) -> jax.Array:
    """A frozen weight as a matrix [out, in]: dequantized if it is in 4 bits, else as it is."""
    return kernels.dequantize(weight) if isinstance(weight, nf4.QuantizedTensor) else weight


def _matmul(x: jax.Array, weight: Weight) -> jax.Array:
    return kernels.matmul(x, weight) if isinstance(weight, nf4.QuantizedTensor) else kernels.dense_matmul(x, weight)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def frozen_matmul(x: jax.Array, weight: Weight, share_dense: bool = False) -> jax.Array:
    """x [..., in] times the transpose of a frozen weight of shape (out, in): [..., out] in x's dtype. No gradient reaches the weight.

    What the backward pass keeps are the codes and scales: it dequantizes again. With `share_dense` it keeps the dequantized matrix
    instead, which is for a forward that is recomputed within the same compiled function: there it lives no longer than that.
    """
    return _matmul(x, weight)


def _frozen_matmul_forward(x: jax.Array, weight: Weight, share_dense: bool) -> tuple[jax.Array, Weight]:
    if not share_dense:
        return _matmul(x, weight), weight
    matrix = dense(weight)
    return kernels.dense_matmul(x, matrix), matrix


def _frozen_matmul_backward(share_dense: bool, kept: Weight, dy: jax.Array) -> tuple[jax.Array, None]:
    return jnp.einsum("...o,oi->...i", dy, dense(kept).astype(dy.dtype)), None  # frozen: no cotangent


frozen_matmul.defvjp(_frozen_matmul_forward, _frozen_matmul_backward)


class LoRA(nnx.Module):
    """The low-rank term of one linear: scaling · (dropout(x)·Aᵀ)·Bᵀ.

    A starts uniform in ±1/√in (kaiming uniform with a = √5, as peft) and B at zero, so that a fresh adapter changes nothing. Both are
    of `dtype` and are multiplied in x's. Dropout acts on the adapter's input only.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        scaling: float,
        dropout: float,
        rngs: nnx.Rngs,
        dtype: jax.typing.DTypeLike = jnp.float32,
    ) -> None:
        bound = in_features**-0.5
        lora_a = jax.random.uniform(rngs.params(), (rank, in_features), jnp.float32, -bound, bound)
        self.lora_a = nnx.LoRAParam(lora_a.astype(dtype))
        self.lora_b = nnx.LoRAParam(jnp.zeros((out_features, rank), dtype))
        self.scaling, self.dropout = scaling, dropout

    def __call__(self, x: jax.Array, key: jax.Array | None, first: jax.Array | int = 0) -> jax.Array:
        """x [..., in], the micro-batch's tokens from `first` on → [..., out]. `key` draws the dropout mask; None means no dropout."""
        if key is not None and self.dropout > 0:
            keep = dropout_mask(key, 1 - self.dropout, x.shape, first)
            x = jnp.where(keep, x / (1 - self.dropout), 0).astype(x.dtype)
        down = jnp.einsum("...i,ri->...r", x, self.lora_a[...].astype(x.dtype)) * jnp.asarray(self.scaling, x.dtype)
        down = checkpoint_name(down, ADAPTER_OUTPUT)
        # Written with a transpose, B's gradient is a product of rank rows: twice as fast on a CPU as one of rank columns.
        return down @ self.lora_b[...].astype(x.dtype).T


def dropout_mask(key: jax.Array, keep: float, shape: tuple[int, ...], first: jax.Array | int) -> jax.Array:
    """Booleans [..., in], True with probability `keep`, each token's drawn from its own number: however tokens are cut into chunks,
    they draw the same."""
    numbers = first + jnp.arange(math.prod(shape[:-1]))
    draw = jax.vmap(lambda number: jax.random.bernoulli(jax.random.fold_in(key, number), keep, shape[-1:]))
    return draw(numbers).reshape(shape)


class NF4Linear(nnx.Module):
    """A frozen linear without bias, `weight` a 4-bit tensor of shape (out, in), and its adapter if it has one.

    A new one holds random weights (normal, deviation 0.02) until a checkpoint's take their place.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        adapter: LoRA | None,
        quantization: QuantizationSettings,
        rngs: nnx.Rngs,
        *,
        share_dense: bool = False,
    ) -> None:
        weight = 0.02 * jax.random.normal(rngs.params(), (out_features, in_features), jnp.bfloat16)
        self.weight = FrozenParam(nf4.quantize(weight, quantization.double_quant, quantization.quant_type))
        self.adapter, self.share_dense = adapter, share_dense

    def __call__(
        self,
        x: jax.Array,
        key: jax.Array | None = None,
        first: jax.Array | int = 0,
        dense: jax.Array | None = None,
    ) -> jax.Array:
        """x [..., in] → [..., out] in x's dtype; `key` and `first` as in `LoRA`, `dense` is what `dense()` gave."""
        weight = self.weight.get_value()
        y = kernels.dense_matmul(x, dense) if dense is not None else frozen_matmul(x, weight, self.share_dense)
        return y if self.adapter is None else y + self.adapter(x, key, first)

    def dense(self) -> jax.Array:
        """The weight [out, in], dequantized; no gradient reaches it."""
        return jax.lax.stop_gradient(dense(self.weight.get_value()))
