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
GATED_PRODUCTS = ("gate", "up")
"""Likewise of the two products that enter SwiGLU, before their adapters' terms are added."""


class FrozenParam(nnx.Variable):
    """A parameter of the base model. It is never trained and no gradient reaches it."""


Weight = nf4.QuantizedTensor | jax.Array
Pair = tuple[jax.Array, jax.Array]  # an adapter's A [R, in] and B [out, R]


def dense(weight: Weight) -> jax.Array:
    """A frozen weight as a matrix [out, in]: dequantized if it is in 4 bits, else as it is."""
    return kernels.dequantize(weight) if isinstance(weight, nf4.QuantizedTensor) else weight


def _matmul(x: jax.Array, weight: Weight) -> jax.Array:
    return kernels.matmul(x, weight) if isinstance(weight, nf4.QuantizedTensor) else kernels.dense_matmul(x, weight)


@dataclasses.dataclass(frozen=True)
class _How:
    """What `_multiply` is compiled for: each linear's scaling, dropout if any, whether dense matrices are kept, and whether the outputs are
    those of two linears or SwiGLU of them."""

    scalings: tuple[float, ...]
    dropout: Dropout | None
    share_dense: bool
    gated: bool


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _multiply(
    x: jax.Array,
    weights: tuple[Weight, ...],
    pairs: tuple[Pair | None, ...],
    residual: jax.Array | None,
    drawn: jax.Array | None,
    how: _How,
) -> list[jax.Array]:
    """`project` on x [N, in], its residual [N, out] and what dropout drew [N, in]."""
    return _multiply_forward(x, weights, pairs, residual, drawn, how)[0]


def _multiply_forward(
    x: jax.Array,
    weights: tuple[Weight, ...],
    pairs: tuple[Pair | None, ...],
    residual: jax.Array | None,
    drawn: jax.Array | None,
    how: _How,
) -> tuple[list[jax.Array], Any]:
    if how.share_dense:
        weights = tuple(map(dense, weights))
    bases = [[_matmul(x, weight)] for weight in weights]
    if residual is not None:
        bases[0].append(residual)
    down = None
    if any(pairs):
        seen = x if drawn is None else how.dropout(x, drawn)
        down = checkpoint_name(jnp.einsum("ni,ri->nr", seen, _stacked(pairs, x.dtype)), ADAPTER_OUTPUT)
    kept = (x if any(pairs) else None, weights, pairs, drawn, down, residual is not None)
    if how.gated:
        gate, up = (checkpoint_name(each[0], name) for each, name in zip(bases, GATED_PRODUCTS, strict=True))
        return [kernels.swiglu(_gated(gate, up, down, pairs, how))], (*kept, (gate, up))
    outputs = [
        functools.reduce(jnp.add, each)
        if pair is None
        else kernels.low_rank_add(each, down, pair[1].astype(x.dtype), factor=scaling, first=first, transposed=True)
        for each, pair, scaling, first in zip(bases, pairs, how.scalings, _firsts(pairs), strict=True)
    ]
    return outputs, (*kept, None)


def _multiply_backward(how: _How, kept: Any, dys: list[jax.Array]) -> tuple[Any, ...]:
    x, weights, pairs, drawn, down, added, entered = kept
    if entered is not None:
        dys = kernels.swiglu_backward(_gated(*entered, down, pairs, how), dys[0])
    bases = [
        jnp.einsum("no,oi->ni", dy, dense(weight).astype(dy.dtype)) for dy, weight in zip(dys, weights, strict=True)
    ]
    dresidual = dys[0] if added else None
    if not any(pairs):
        return functools.reduce(jnp.add, bases), None, pairs, dresidual, None
    pieces, dpairs = [], []
    for dy, pair, scaling, first in zip(dys, pairs, how.scalings, _firsts(pairs), strict=True):
        if pair is not None:
            lora_b = pair[1]
            piece = jnp.einsum("no,or->nr", dy, lora_b.astype(dy.dtype), preferred_element_type=jnp.float32)
            pieces.append((piece * scaling).astype(dy.dtype))
            part = down[:, first : first + lora_b.shape[1]]
            # Written with a transpose, it is a product of rank rows: twice as fast on a CPU as one of rank columns.
            db = jnp.einsum("nr,no->ro", part, dy, preferred_element_type=jnp.float32).T * scaling
        dpairs.append(None if pair is None else [None, db.astype(lora_b.dtype)])
    ddown = jnp.concatenate(pieces, axis=-1)
    masked = (
        {} if drawn is None else {"drawn": drawn, "threshold": how.dropout.threshold, "factor": 1 / how.dropout.share}
    )
    dx = kernels.low_rank_add(bases, ddown, _stacked(pairs, x.dtype), **masked)
    seen = x if drawn is None else how.dropout(x, drawn)
    da = jnp.einsum("nr,ni->ri", ddown, seen, preferred_element_type=jnp.float32)
    for pair, dpair, first in zip(pairs, dpairs, _firsts(pairs), strict=True):
        if pair is not None:
            dpair[0] = da[first : first + pair[0].shape[0]].astype(pair[0].dtype)
    dpairs = tuple(None if dpair is None else tuple(dpair) for dpair in dpairs)
    return dx, None, dpairs, dresidual, None  # weights are frozen: no cotangent


_multiply.defvjp(_multiply_forward, _multiply_backward)


def _gated(gate: jax.Array, up: jax.Array, down: jax.Array, pairs: tuple[Pair, ...], how: _How) -> kernels.Gated:
    """Two linears' products and their adapters, as SwiGLU takes them."""
    gate_v, up_v = (lora_b.astype(down.dtype) for _, lora_b in pairs)
    return kernels.Gated(gate, up, down, gate_v, up_v, how.scalings, tuple(_firsts(pairs)))


def _stacked(pairs: Sequence[Pair | None], dtype: jax.typing.DTypeLike) -> jax.Array:
    """All A's as one matrix [ΣR, in]."""
    return jnp.concatenate([pair[0] for pair in pairs if pair is not None]).astype(dtype)


def _firsts(pairs: Sequence[Pair | None]) -> list[int]:
    """Where each linear's rows begin in `_stacked`."""
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
    gated: bool = False,
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
        gated: of two linears, return silu(first) · second alone.
    """
    x = jax.lax.optimization_barrier(x)  # or XLA makes it again for every product, instead of once
    adapters = [linear.adapter for linear in linears]
    dropout = next((adapter.dropout for adapter in adapters if adapter is not None), None)
    rows = x.reshape(-1, x.shape[-1])
    drawn = None if key is None or dropout is None else dropout.draw(rows.shape, key, first)
    outputs = _multiply(
        rows,
        tuple(
            linear.weight.get_value() if matrix is None else matrix
            for linear, matrix in zip(linears, matrices or [None] * len(linears), strict=True)
        ),
        tuple(None if adapter is None else adapter.pair() for adapter in adapters),
        None if residual is None else residual.reshape(len(rows), -1),
        drawn,
        _How(
            tuple(1.0 if adapter is None else adapter.scaling for adapter in adapters),
            dropout,
            linears[0].share_dense,
            gated and all(adapters),
        ),
    )
    if gated and len(outputs) == 2:  # an adapter is missing
        outputs = [
            kernels.plain_swiglu(*(checkpoint_name(y, name) for y, name in zip(outputs, GATED_PRODUCTS, strict=True)))
        ]
    return [y.reshape(*x.shape[:-1], -1) for y in outputs]
