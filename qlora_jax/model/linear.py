"""Flax modules: a frozen 4-bit linear and a LoRA adapter on it.

    y = x·Wᵀ + scaling · (dropout(x)·Aᵀ)·Bᵀ          W frozen in 4 bits, A [R, in] and B [out, R] trained

In the place of a 4-bit weight a plain matrix [out, in] does as well: that is LoRA without the Q, for comparisons.

Frozen weights are `FrozenParam`s and adapters `nnx.LoRAParam`s, so `nnx.split(module, nnx.LoRAParam, ...)` separates what is
trained from what is not into two trees.

Linears of one input, as queries, keys and values are, go through `project` together, which has the forward and the backward pass
written out.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from qlora_jax.config import QuantizationSettings
from qlora_jax.model.lora_matmul import Draw, MatmulOptions, Pair, Weight, dense, lora_matmul
from qlora_jax.ops import nf4
from qlora_jax.ops.dropout import Dropout
from qlora_jax.ops.operands import Rotation


class FrozenParam(nnx.Variable):
    """A parameter of the base model. It is never trained and no gradient reaches it."""


class LoRA(nnx.Module):
    """The adapter of one linear: A [R, in] and B [out, R] of `dtype`, multiplied in x's.

    A starts uniform in ±1/√in (kaiming uniform with a = √5, as peft) and B at zero, so that a fresh adapter changes nothing. Dropout acts
    on the adapter's input only.
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
        self.scaling, self.dropout = scaling, Dropout.of(dropout)

    def pair(self) -> Pair:
        """Return A and B."""
        return Pair(self.lora_a[...], self.lora_b[...])


class NF4Linear(nnx.Module):
    """A frozen linear, `weight` a 4-bit tensor of shape (out, in), its bias [out] and its adapter if it has them.

    A new one holds random weights (normal, deviation 0.02) until a checkpoint's take their place.

    `recomputed`: when differentiated, its forward pass is recomputed within the same compiled function, where nothing else wants what
        it saves.
    `share_dense`: see `project`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        adapter: LoRA | None,
        quantization: QuantizationSettings,
        rngs: nnx.Rngs,
        *,
        bias: bool = False,
        recomputed: bool = False,
        share_dense: bool = False,
    ) -> None:
        weight = 0.02 * jax.random.normal(rngs.params(), (out_features, in_features), jnp.bfloat16)
        self.weight = FrozenParam(nf4.quantize(weight, quantization.double_quant, quantization.quant_type))
        self.bias = FrozenParam(jnp.zeros(out_features, jnp.bfloat16)) if bias else None
        self.adapter, self.recomputed, self.share_dense = adapter, recomputed or share_dense, share_dense

    def __call__(self, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """x [..., in] → [..., out] in x's dtype; `key` as in `project`."""
        (y,) = project([self], x, key)
        return y

    def dense(self) -> jax.Array:
        """The weight [out, in], dequantized; no gradient reaches it."""
        return jax.lax.stop_gradient(dense(self.weight.get_value()))


def project(
    linears: Sequence[NF4Linear],
    x: jax.Array,
    key: jax.Array | None = None,
    *,
    first: jax.Array | int = 0,
    matrices: Sequence[jax.Array | None] | None = None,
    residual: jax.Array | None = None,
    rotation: Rotation | None = None,
    rotated: Sequence[bool] | None = None,
) -> list[jax.Array]:
    """Linears of one input x [..., in] → what each gives, [..., out] in x's dtype. x may be heads side by side, [..., heads, P].

    The A's of their adapters are one matrix [ΣR, in], so that x and its gradient are read once, and one dropout mask serves them all. What
    is added to an [N, features] array, here or in the backward pass, is added in one go, see `dispatch.low_rank_add`.

    The backward pass keeps x, x·Aᵀ [..., ΣR] and codes and scales, which are dequantized again; or the dense matrices instead if the
    linears say `share_dense`, which is for a forward that is run again within the same compiled function: there they live no longer.

    Args:
        key: draws the dropout mask; None means no dropout.
        first: the number of x's first token among the micro-batch's, for the mask.
        matrices: the linears' weights where they were dequantized before.
        residual: [..., out] to be added to the first output.
        rotation: rotary embedding's, of x's tokens, for the outputs that are `rotated`.
    """
    weights = weights_of(linears, matrices)
    whole = x.shape[-1] == weights[0].shape[1]
    outputs = lora_matmul(
        x,
        weights,
        tuple(None if linear.adapter is None else linear.adapter.pair() for linear in linears),
        tuple(None if linear.bias is None else linear.bias[...] for linear in linears),
        None if residual is None else residual.reshape(-1, residual.shape[-1]),
        None if key is None else Draw(key, first),
        rotation,
        matmul_options(linears, rotated, x.shape),
    )
    return [y.reshape(*x.shape[: -1 if whole else -2], -1) for y in outputs]


def weights_of(linears: Sequence[NF4Linear], matrices: Sequence[jax.Array | None] | None) -> tuple[Weight, ...]:
    """The linears' weights, or the matrices that were made of them before."""
    return tuple(
        linear.weight.get_value() if matrix is None else matrix
        for linear, matrix in zip(linears, matrices or [None] * len(linears), strict=True)
    )


def matmul_options(
    linears: Sequence[NF4Linear], rotated: Sequence[bool] | None = None, shape: tuple[int, ...] = ()
) -> MatmulOptions:
    """Return what is static about linears of one layer, which share dropout's rate."""
    adapters = [linear.adapter for linear in linears]
    return MatmulOptions(
        scalings=tuple(1.0 if adapter is None else adapter.scaling for adapter in adapters),
        dropout=next((adapter.dropout for adapter in adapters if adapter is not None), None),
        recomputed=linears[0].recomputed,
        share_dense=linears[0].share_dense,
        rotated=tuple(rotated or [False] * len(linears)),
        shape=shape,
    )
