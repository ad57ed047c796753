"""Products with frozen weights and their adapters, the backward pass written out.

    y = x·Wᵀ + scaling · (dropout(x)·Aᵀ)·Bᵀ          W frozen, in 4 bits or a plain matrix [out, in]; A [R, in] and B [out, R] trained

`multiply` is that for several linears of one input; the other functions are its parts, for who writes a longer piece out (feed_forward.py).
"""

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from qlora_jax.ops import dispatch, nf4, twins
from qlora_jax.ops.dropout import Dropout
from qlora_jax.ops.operands import Rotation

ADAPTER_OUTPUT = "adapter"
"""The name of x·Aᵀ [..., R] for what chooses the values to keep for the backward pass."""

Weight = nf4.QuantizedTensor | jax.Array
Pair = tuple[jax.Array, jax.Array]  # an adapter's A [R, in] and B [out, R]
Draw = tuple[jax.Array, jax.Array | int]  # dropout's key; the number of the input's first token among the micro-batch's


def dense(weight: Weight) -> jax.Array:
    """A frozen weight as a matrix [out, in]: dequantized if it is in 4 bits, else as it is."""
    return dispatch.dequantize(weight) if isinstance(weight, nf4.QuantizedTensor) else weight


def matmul(x: jax.Array, weight: Weight) -> jax.Array:
    """x [N, in] times the transpose of a frozen weight of shape (out, in)."""
    return dispatch.matmul(x, weight) if isinstance(weight, nf4.QuantizedTensor) else twins.dense_matmul(x, weight)


@dataclasses.dataclass(frozen=True)
class How:
    """What is compiled for a group of linears: each one's scaling, dropout if any, whether the forward is run again within the function
    that differentiates it, and whether dense matrices are kept there; in `multiply` also which outputs are rotated, and the shape of x."""

    scalings: tuple[float, ...]
    dropout: Dropout | None
    run_again: bool
    share_dense: bool
    rotated: tuple[bool, ...] = ()
    shape: tuple[int, ...] = ()


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def multiply(
    x: jax.Array,
    weights: tuple[Weight, ...],
    pairs: tuple[Pair | None, ...],
    residual: jax.Array | None,
    draw: Draw | None,
    rotation: Rotation | None,
    how: How,
) -> list[jax.Array]:
    """`project` on x of any shape that is [N, in] in memory, and its residual [N, out]."""
    return _multiply_forward(x, weights, pairs, residual, draw, rotation, how)[0]


def _multiply_forward(
    x: jax.Array,
    weights: tuple[Weight, ...],
    pairs: tuple[Pair | None, ...],
    residual: jax.Array | None,
    draw: Draw | None,
    rotation: Rotation | None,
    how: How,
) -> tuple[list[jax.Array], Any]:
    kept_x, x = x if any(pairs) else None, _as_rows(x, weights)
    if how.share_dense:
        weights = tuple(map(dense, weights))
    bases = [[matmul(x, weight)] for weight in weights]
    if residual is not None:
        bases[0].append(residual)
    drawn = drawn_for(x.shape, draw, how)
    seen = seen_by_adapters(x, drawn, how.dropout)
    down = adapter_output(seen, pairs) if any(pairs) else None
    outputs = []
    for base, pair, scaling, first, turned in zip(bases, pairs, how.scalings, firsts(pairs), how.rotated, strict=True):
        turn = rotation if turned else None
        if pair is None:
            total = functools.reduce(jnp.add, base)
            outputs.append(total if turn is None else twins.plain_rotate(total, turn))
        else:
            options = {"factor": scaling, "first": first, "transposed": True, "rotation": turn}
            outputs.append(dispatch.low_rank_add(base, down, pair[1].astype(x.dtype), **options))
    again = draw, (drawn, seen) if how.run_again and drawn is not None else None
    return outputs, (None if again[1] else kept_x, weights, pairs, again, down, rotation, residual is not None)


def _multiply_backward(how: How, kept: Any, dys: list[jax.Array]) -> tuple[Any, ...]:
    x, weights, pairs, again, down, rotation, added = kept
    dresidual = dys[0] if added else None
    dys = [
        twins.plain_rotate(dy, rotation.inverse) if turned else dy for dy, turned in zip(dys, how.rotated, strict=True)
    ]
    bases, ddown = toward_input(dys, weights, pairs, how.scalings)
    if not any(pairs):
        return functools.reduce(jnp.add, bases).reshape(how.shape), None, pairs, dresidual, None, None
    drawn, seen = seen_again(None if x is None else _as_rows(x, weights), again, how)
    dx = input_gradient(bases, ddown, pairs, drawn, how.dropout).reshape(how.shape)
    dpairs = pair_gradients(dys, ddown, seen, down, pairs, how.scalings)
    return dx, None, dpairs, dresidual, None, None  # weights are frozen: no cotangent


multiply.defvjp(_multiply_forward, _multiply_backward)


def _as_rows(x: jax.Array, weights: Sequence[Weight]) -> jax.Array:
    """x of any shape as [N, in].

    Its shape is changed on this side of what the backward pass keeps: kept in another shape, it would be another array. And it is made
    once: without the barrier XLA makes it again for every product.
    """
    return jax.lax.optimization_barrier(x.reshape(-1, weights[0].shape[1]))


def drawn_for(shape: tuple[int, ...], draw: Draw | None, how: How) -> jax.Array | None:
    """What dropout draws for an input [N, features], if anything."""
    return None if draw is None or how.dropout is None else how.dropout.draw(shape, *draw)


def seen_again(
    x: jax.Array | None, again: tuple[Draw | None, tuple[jax.Array, jax.Array] | None], how: How
) -> tuple[jax.Array | None, jax.Array]:
    """What was drawn for x [N, features], if anything, and what the adapters saw of it, in the backward pass.

    That is given both, and no x, if it runs within the same compiled function; else it draws again.
    """
    draw, both = again
    if both is not None:
        return both
    drawn = drawn_for(x.shape, draw, how)
    return drawn, seen_by_adapters(x, drawn, how.dropout)


def seen_by_adapters(x: jax.Array, drawn: jax.Array | None, dropout: Dropout | None) -> jax.Array:
    """x [N, in] after dropout, if anything was drawn for it."""
    return x if drawn is None else dropout(x, drawn)


def adapter_output(seen: jax.Array, pairs: Sequence[Pair | None]) -> jax.Array:
    """What adapters see [N, in] through all A's: [N, ΣR], under the name `ADAPTER_OUTPUT`."""
    return checkpoint_name(jnp.einsum("ni,ri->nr", seen, stacked(pairs, seen.dtype)), ADAPTER_OUTPUT)


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
    return dispatch.low_rank_add(bases, ddown, stacked(pairs, ddown.dtype), **dropped(drawn, dropout))


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
