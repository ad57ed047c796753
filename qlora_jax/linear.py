"""Flax modules: a frozen 4-bit linear and a LoRA adapter on it.

    y = x·Wᵀ + scaling · (dropout(x)·Aᵀ)·Bᵀ          W frozen in 4 bits, A [R, in] and B [out, R] trained

In the place of a 4-bit weight a plain matrix [out, in] does as well: that is LoRA without the Q, for comparisons.

Frozen weights are `FrozenParam`s and adapters `nnx.LoRAParam`s, so `nnx.split(module, nnx.LoRAParam, ...)` separates what is
trained from what is not into two trees.

Linears of one input, as queries, keys and values are, go through `project` together, which has the forward and the backward pass
written out.
"""

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from qlora_jax import kernels, nf4
from qlora_jax.config import QuantizationSettings
from qlora_jax.dropout import Dropout

ADAPTER_OUTPUT = "adapter"
"""The name of x·Aᵀ [..., R] for what chooses the values to keep for the backward pass."""


class FrozenParam(nnx.Variable):
    """A parameter of the base model. It is never trained and no gradient reaches it."""


Weight = nf4.QuantizedTensor | jax.Array
Pair = tuple[jax.Array, jax.Array]  # an adapter's A [R, in] and B [out, R]


def dense(weight: Weight) -> jax.Array:
    """A frozen weight as a matrix [out, in]: dequantized if it is in 4 bits, else as it is."""
    return kernels.dequantize(weight) if isinstance(weight, nf4.QuantizedTensor) else weight


def matmul(x: jax.Array, weight: Weight) -> jax.Array:
    """x [N, in] times the transpose of a frozen weight of shape (out, in)."""
    return kernels.matmul(x, weight) if isinstance(weight, nf4.QuantizedTensor) else kernels.dense_matmul(x, weight)


@dataclasses.dataclass(frozen=True)
class How:
    """What is compiled for a group of linears: each one's scaling, dropout if any, whether dense matrices are kept, which outputs are
    rotated."""

    scalings: tuple[float, ...]
    dropout: Dropout | None
    share_dense: bool
    rotated: tuple[bool, ...] = ()


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _multiply(
    x: jax.Array,
    weights: tuple[Weight, ...],
    pairs: tuple[Pair | None, ...],
    residual: jax.Array | None,
    drawn: jax.Array | None,
    rotation: kernels.Rotation | None,
    how: How,
) -> list[jax.Array]:
    """`project` on x [N, in], its residual [N, out] and what dropout drew [N, in]."""
    return _multiply_forward(x, weights, pairs, residual, drawn, rotation, how)[0]


def _multiply_forward(
    x: jax.Array,
    weights: tuple[Weight, ...],
    pairs: tuple[Pair | None, ...],
    residual: jax.Array | None,
    drawn: jax.Array | None,
    rotation: kernels.Rotation | None,
    how: How,
) -> tuple[list[jax.Array], Any]:
    if how.share_dense:
        weights = tuple(map(dense, weights))
    bases = [[matmul(x, weight)] for weight in weights]
    if residual is not None:
        bases[0].append(residual)
    down = adapter_output(x, pairs, drawn, how.dropout) if any(pairs) else None
    outputs = []
    for base, pair, scaling, first, turned in zip(bases, pairs, how.scalings, firsts(pairs), how.rotated, strict=True):
        turn = rotation if turned else None
        if pair is None:
            total = functools.reduce(jnp.add, base)
            outputs.append(total if turn is None else kernels.plain_rotate(total, turn))
        else:
            options = {"factor": scaling, "first": first, "transposed": True, "rotation": turn}
            outputs.append(kernels.low_rank_add(base, down, pair[1].astype(x.dtype), **options))
    kept = x if any(pairs) else None, weights, pairs, drawn, down, rotation, residual is not None
    return outputs, kept


def _multiply_backward(how: How, kept: Any, dys: list[jax.Array]) -> tuple[Any, ...]:
    x, weights, pairs, drawn, down, rotation, added = kept
    dresidual = dys[0] if added else None
    dys = [
        kernels.plain_rotate(dy, rotation.inverse) if turned else dy
        for dy, turned in zip(dys, how.rotated, strict=True)
    ]
    bases, ddown = toward_input(dys, weights, pairs, how.scalings)
    dx, dpairs = functools.reduce(jnp.add, bases), pairs
    if any(pairs):
        dx = input_gradient(bases, ddown, pairs, drawn, how.dropout)
        seen = seen_by_adapters(x, drawn, how.dropout)
        dpairs = pair_gradients(dys, ddown, seen, down, pairs, how.scalings)
    return dx, None, dpairs, dresidual, None, None  # weights are frozen: no cotangent


_multiply.defvjp(_multiply_forward, _multiply_backward)


def seen_by_adapters(x: jax.Array, drawn: jax.Array | None, dropout: Dropout | None) -> jax.Array:
    """x [N, in] after dropout, if anything was drawn for it."""
    return x if drawn is None else dropout(x, drawn)


def adapter_output(
    x: jax.Array, pairs: Sequence[Pair | None], drawn: jax.Array | None, dropout: Dropout | None
) -> jax.Array:
    """x [N, in] through all A's: [N, ΣR], under the name `ADAPTER_OUTPUT`."""
    seen = seen_by_adapters(x, drawn, dropout)
    return checkpoint_name(jnp.einsum("ni,ri->nr", seen, stacked(pairs, x.dtype)), ADAPTER_OUTPUT)


def toward_input(
    dys: Sequence[jax.Array], weights: Sequence[Weight], pairs: Sequence[Pair | None], scalings: Sequence[float]
) -> tuple[list[jax.Array], jax.Array | None]:
    """Gradients of outputs [N, out] → through the weights, [N, in] each; through the B's, [N, ΣR], if there is any."""
    bases = [
        jnp.einsum("no,oi->ni", dy, dense(weight).astype(dy.dtype)) for dy, weight in zip(dys, weights, strict=True)
    ]
    pieces = []
    for dy, pair, scaling in zip(dys, pairs, scalings, strict=True):
        if pair is not None:
            piece = jnp.einsum("no,or->nr", dy, pair[1].astype(dy.dtype), preferred_element_type=jnp.float32)
            pieces.append((piece * scaling).astype(dy.dtype))
    return bases, jnp.concatenate(pieces, axis=-1) if pieces else None


def dropped(drawn: jax.Array | None, dropout: Dropout | None) -> dict[str, Any]:
    """What `kernels.low_rank_add` is told of dropout on the way back."""
    return {} if drawn is None else {"drawn": drawn, "threshold": dropout.threshold, "factor": 1 / dropout.share}


def input_gradient(
    bases: Sequence[jax.Array],
    ddown: jax.Array,
    pairs: Sequence[Pair | None],
    drawn: jax.Array | None,
    dropout: Dropout | None,
) -> jax.Array:
    """What `toward_input` gives, summed: the gradient of x [N, in]."""
    return kernels.low_rank_add(bases, ddown, stacked(pairs, ddown.dtype), **dropped(drawn, dropout))


def pair_gradients(
    dys: Sequence[jax.Array],
    ddown: jax.Array,
    seen: jax.Array,
    down: jax.Array,
    pairs: Sequence[Pair | None],
    scalings: Sequence[float],
) -> tuple[Pair | None, ...]:
    """The gradients of A's and B's: from those of the outputs [N, out] and of x·Aᵀ [N, ΣR], what the adapters saw [N, in], and x·Aᵀ."""
    das = jnp.einsum("nr,ni->ri", ddown, seen, preferred_element_type=jnp.float32)
    gradients: list[Pair | None] = []
    for dy, pair, scaling, first in zip(dys, pairs, scalings, firsts(pairs), strict=True):
        if pair is None:
            gradients.append(None)
            continue
        lora_a, lora_b = pair
        rows = slice(first, first + len(lora_a))
        # Written with a transpose, it is a product of rank rows: twice as fast on a CPU as one of rank columns.
        db = jnp.einsum("nr,no->ro", down[:, rows], dy, preferred_element_type=jnp.float32).T * scaling
        gradients.append((das[rows].astype(lora_a.dtype), db.astype(lora_b.dtype)))
    return tuple(gradients)


def stacked(pairs: Sequence[Pair | None], dtype: jax.typing.DTypeLike) -> jax.Array:
    """All A's as one matrix [ΣR, in]."""
    return jnp.concatenate([pair[0] for pair in pairs if pair is not None]).astype(dtype)


def firsts(pairs: Sequence[Pair | None]) -> list[int]:
    """Where each linear's rows begin in `stacked`."""
    ranks = [0 if pair is None else pair[0].shape[0] for pair in pairs]
    return list(itertools.accumulate(ranks[:-1], initial=0))


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
        """(A, B)."""
        return self.lora_a[...], self.lora_b[...]


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
    rotation: kernels.Rotation | None = None,
    rotated: Sequence[bool] | None = None,
) -> list[jax.Array]:
    """Linears of one input x [..., in] → what each gives, [..., out] in x's dtype.

    The A's of their adapters are one matrix [ΣR, in], so that x and its gradient are read once, and one dropout mask serves them all. What
    is added to an [N, features] array, here or in the backward pass, is added in one go, see `kernels.low_rank_add`.

    The backward pass keeps x, x·Aᵀ [..., ΣR] and codes and scales, which are dequantized again; or the dense matrices instead if the
    linears say `share_dense`, which is for a forward that is run again within the same compiled function: there they live no longer.

    Args:
        key: draws the dropout mask; None means no dropout.
        first: the number of x's first token among the micro-batch's, for the mask.
        matrices: the linears' weights where they were dequantized before.
        residual: [..., out] to be added to the first output.
        rotation: rotary embedding's, of x's tokens, for the outputs that are `rotated`.
    """
    x = jax.lax.optimization_barrier(x)  # or XLA makes it again for every product, instead of once
    rows = x.reshape(-1, x.shape[-1])
    how = how_to(linears, rotated)
    outputs = _multiply(
        rows,
        weights_of(linears, matrices),
        tuple(None if linear.adapter is None else linear.adapter.pair() for linear in linears),
        None if residual is None else residual.reshape(len(rows), -1),
        None if key is None or how.dropout is None else how.dropout.draw(rows.shape, key, first),
        rotation,
        how,
    )
    return [y.reshape(*x.shape[:-1], -1) for y in outputs]


def weights_of(linears: Sequence[NF4Linear], matrices: Sequence[jax.Array | None] | None) -> tuple[Weight, ...]:
    """The linears' weights, or the matrices that were made of them before."""
    return tuple(
        linear.weight.get_value() if matrix is None else matrix
        for linear, matrix in zip(linears, matrices or [None] * len(linears), strict=True)
    )


def how_to(linears: Sequence[NF4Linear], rotated: Sequence[bool] | None = None) -> How:
    """What is static about linears of one layer, which share dropout's rate."""
    adapters = [linear.adapter for linear in linears]
    return How(
        tuple(1.0 if adapter is None else adapter.scaling for adapter in adapters),
        next((adapter.dropout for adapter in adapters if adapter is not None), None),
        linears[0].share_dense,
        tuple(rotated or [False] * len(linears)),
    )
