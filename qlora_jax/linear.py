"""Flax modules: a frozen 4-bit linear and a LoRA adapter on it.

    y = x·Wᵀ + scaling · (dropout(x)·Aᵀ)·Bᵀ          W frozen in 4 bits, A [R, in] and B [out, R] trained

In the place of a 4-bit weight a plain matrix [out, in] does as well: that is LoRA without the Q, for comparisons.

Frozen weights are `FrozenParam`s and adapters `nnx.LoRAParam`s, so `nnx.split(module, nnx.LoRAParam, ...)` separates what is
trained from what is not into two trees.
"""

import functools
import itertools
import math
from collections.abc import Sequence

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
        (term,) = low_rank_terms([self], x, key, first)
        return term


def low_rank_terms(
    adapters: Sequence[LoRA], x: jax.Array, key: jax.Array | None, first: jax.Array | int = 0
) -> list[jax.Array]:
    """What adapters of one input x [..., in] give, each [..., out].

    Their A's are one matrix [ΣR, in], so that x and its gradient are read once. One dropout mask serves them all.
    """
    if key is not None and adapters[0].dropout > 0:
        x = dropout(x, key, adapters[0].dropout, first)
    stacked = jnp.concatenate([adapter.lora_a[...] for adapter in adapters]).astype(x.dtype)
    down = checkpoint_name(jnp.einsum("...i,ri->...r", x, stacked), ADAPTER_OUTPUT)
    ends = itertools.accumulate(adapter.lora_a[...].shape[0] for adapter in adapters)
    parts = jnp.split(down, list(ends)[:-1], axis=-1)
    # Written with a transpose, B's gradient is a product of rank rows: twice as fast on a CPU as one of rank columns.
    return [
        part * jnp.asarray(adapter.scaling, x.dtype) @ adapter.lora_b[...].astype(x.dtype).T
        for adapter, part in zip(adapters, parts, strict=True)
    ]


def dropout(x: jax.Array, key: jax.Array, rate: float, first: jax.Array | int) -> jax.Array:
    """x [..., in], the micro-batch's tokens from `first` on, with a share of `rate` set to 0 and the rest divided by what is left.

    Each token's mask is drawn from its own number: however tokens are cut into chunks, they draw the same. A value's draw takes 8 bits
    if the nearest of 256 rates is within 2 % of the one asked for, as 26/256 is of 0.1, and 16 or 32 otherwise; the division is by
    the rate that was drawn, so that the expectation is x.
    """
    bits, threshold = drawn_rate(rate)
    numbers = first + jnp.arange(math.prod(x.shape[:-1]))
    words = -(-x.shape[-1] * bits // 32)
    draw = jax.vmap(lambda number: jax.random.bits(jax.random.fold_in(key, number), (words,), jnp.uint32))
    drawn = jax.lax.optimization_barrier(draw(numbers))  # or XLA draws a word for each of its values anew
    drawn = jax.lax.bitcast_convert_type(drawn, f"uint{bits}").reshape(len(numbers), -1)[:, : x.shape[-1]]
    return jnp.where(drawn.reshape(x.shape) >= threshold, x / (1 - threshold / 2**bits), 0).astype(x.dtype)


def drawn_rate(rate: float) -> tuple[int, int]:
    """(bits, threshold): of so many random bits, values below the threshold have a probability near enough to `rate`."""
    for bits in (8, 16):
        threshold = round(rate * 2**bits)
        if abs(threshold / 2**bits - rate) <= 0.02 * min(rate, 1 - rate):
            return bits, threshold
    return 32, min(max(round(rate * 2**32), 1), 2**32 - 1)


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

    def __call__(self, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """x [..., in] → [..., out] in x's dtype; `key` as in `LoRA`."""
        (y,) = project([self], x, key)
        return y

    def base(self, x: jax.Array, dense: jax.Array | None = None) -> jax.Array:
        """The frozen weight's product x [..., in] → [..., out]; `dense` is what `dense()` gave."""
        if dense is not None:
            return kernels.dense_matmul(x, dense)
        return frozen_matmul(x, self.weight.get_value(), self.share_dense)

    def dense(self) -> jax.Array:
        """The weight [out, in], dequantized; no gradient reaches it."""
        return jax.lax.stop_gradient(dense(self.weight.get_value()))


def project(
    linears: Sequence[NF4Linear],
    x: jax.Array,
    key: jax.Array | None = None,
    first: jax.Array | int = 0,
    dense: Sequence[jax.Array | None] = (),
) -> list[jax.Array]:
    """Linears of one input x [..., in] → what each gives, [..., out] in x's dtype.

    Args:
        key, first: as in `low_rank_terms`.
        dense: the linears' weights, if they were dequantized before.
    """
    x = jax.lax.optimization_barrier(x)  # or XLA makes it again for every product, instead of once
    outputs = [linear.base(x, given) for linear, given in zip(linears, dense or [None] * len(linears), strict=True)]
    adapted = [i for i, linear in enumerate(linears) if linear.adapter is not None]
    if adapted:
        terms = low_rank_terms([linears[i].adapter for i in adapted], x, key, first)
        for i, term in zip(adapted, terms, strict=True):
            outputs[i] = outputs[i] + term
    return outputs
