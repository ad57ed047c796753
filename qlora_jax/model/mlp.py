"""SwiGLU between its three linears: down(silu(gate(x)) · up(x)), forward and backward pass written out.

The arrays here are [tokens, F], the largest of a layer, and all that is done to them but the products is moving them. Forwards, one pass
adds the adapters' terms to the two products and multiplies. Backwards, one pass takes the two products and what comes back through
down_proj, and writes the gradients of both and what down_proj saw, for its adapter's gradient; nothing but the products is kept, or made
again, before.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

from qlora_jax.model.linear import NF4Linear, how_to, project, weights_of
from qlora_jax.model.lora_matmul import (
    Draw,
    How,
    Pair,
    Weight,
    adapter_output,
    dense,
    drawn_for,
    dropped,
    firsts,
    input_gradient,
    matmul,
    pair_gradients,
    seen_again,
    seen_by_adapters,
    stacked,
    toward_input,
)
from qlora_jax.ops import dispatch, twins
from qlora_jax.ops.operands import Gated

GATED_PRODUCTS = ("gate", "up")
"""The names of the two products that enter SwiGLU, for what chooses the values to keep for the backward pass."""

Draws = tuple[Draw | None, Draw | None]  # dropout's, for x [N, D] and for what SwiGLU gives [N, F]


def feed_forward(
    linears: Sequence[NF4Linear],
    x: jax.Array,
    residual: jax.Array,
    keys: tuple[jax.Array | None, jax.Array | None] = (None, None),
    *,
    first: jax.Array | int = 0,
    matrices: Sequence[jax.Array | None] | None = None,
) -> jax.Array:
    """x and residual [N, D] → residual + down(silu(gate(x)) · up(x)) [N, D] in x's dtype.

    Args:
        linears: gate, up and down.
        keys: draw the dropout masks of x and of what SwiGLU gives; None means no dropout.
        first: the number of x's first token among the micro-batch's, for the masks.
        matrices: the linears' weights where they were dequantized before.
    """
    if not all(linear.adapter for linear in linears):
        return _one_by_one(linears, x, residual, keys, first, matrices)
    draws = tuple(None if key is None else (key, first) for key in keys)
    pairs = tuple(linear.adapter.pair() for linear in linears)
    x = jax.lax.optimization_barrier(x)  # or XLA makes it again for every product, instead of once
    return _feed_forward(x, residual, weights_of(linears, matrices), pairs, draws, how_to(linears))


def _one_by_one(
    linears: Sequence[NF4Linear],
    x: jax.Array,
    residual: jax.Array,
    keys: tuple[jax.Array | None, jax.Array | None],
    first: jax.Array | int,
    matrices: Sequence[jax.Array | None] | None,
) -> jax.Array:
    """`feed_forward` of linears that not all have an adapter."""
    matrices = matrices or [None] * 3
    products = project(linears[:2], x, keys[0], first=first, matrices=matrices[:2])
    inner = twins.plain_swiglu(*map(checkpoint_name, products, GATED_PRODUCTS))
    (out,) = project(linears[2:], inner, keys[1], first=first, matrices=matrices[2:], residual=residual)
    return out


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _feed_forward(
    x: jax.Array, residual: jax.Array, weights: tuple[Weight, ...], pairs: tuple[Pair, ...], draws: Draws, how: How
) -> jax.Array:
    return _forward(x, residual, weights, pairs, draws, how)[0]


def _forward(
    x: jax.Array, residual: jax.Array, weights: tuple[Weight, ...], pairs: tuple[Pair, ...], draws: Draws, how: How
) -> tuple[jax.Array, Any]:
    if how.share_dense:
        weights = tuple(map(dense, weights))
    products = tuple(
        checkpoint_name(matmul(x, weight), name) for weight, name in zip(weights, GATED_PRODUCTS, strict=False)
    )
    drawn = drawn_for(x.shape, draws[0], how)
    seen = seen_by_adapters(x, drawn, how.dropout)
    u = adapter_output(seen, pairs[:2])
    inner = dispatch.swiglu(_gated(products, u, pairs, how), spent=how.run_again)
    inner_drawn = drawn_for(inner.shape, draws[1], how)
    down = adapter_output(seen_by_adapters(inner, inner_drawn, how.dropout), pairs[2:])
    bases, lora_b = [matmul(inner, weights[2]), residual], pairs[2][1].astype(x.dtype)
    out = dispatch.low_rank_add(bases, down, lora_b, factor=how.scalings[2], transposed=True)
    # A forward that is run again for its backward pass alone need not come as far as `down`: `_backward` makes what SwiGLU gives anyway.
    masked = how.run_again and drawn is not None
    again = (draws[0], (drawn, seen) if masked else None), (draws[1], inner_drawn if how.run_again else None)
    return out, (None if masked else x, weights, pairs, again, products, u, None if how.run_again else down)


def _backward(how: How, kept: Any, dy: jax.Array) -> tuple[Any, ...]:
    x, weights, pairs, (again, (inner_draw, inner_drawn)), products, u, down = kept
    drawn, seen_outside = seen_again(x, again, how)
    if inner_drawn is None:
        inner_drawn = drawn_for(products[0].shape, inner_draw, how)
    outer, inmost = slice(2, 3), slice(2)
    (dinner,), ddown = toward_input([dy], weights[outer], pairs[outer], how.scalings[outer])
    inner, *dproducts = dispatch.swiglu_backward(
        _gated(products, u, pairs, how),
        dinner,
        ddown,
        stacked(pairs[outer], dy.dtype),
        **dropped(inner_drawn, how.dropout),
        spent=how.run_again,
    )
    seen = seen_by_adapters(inner, inner_drawn, how.dropout)
    if down is None:
        down = adapter_output(seen, pairs[outer])
    dpairs = pair_gradients([dy], ddown, seen, down, pairs[outer], how.scalings[outer])
    # What is made of dy and of `inner` is made before the rest, which then may take their memory.
    dproducts, dpairs = jax.lax.optimization_barrier((dproducts, dpairs))
    bases, du = toward_input(dproducts, weights[inmost], pairs[inmost], how.scalings[inmost])
    dx = input_gradient(bases, du, pairs[inmost], drawn, how.dropout)
    dpairs = pair_gradients(dproducts, du, seen_outside, u, pairs[inmost], how.scalings[inmost]) + dpairs
    return dx, dy, None, dpairs, None  # weights are frozen: no cotangent


_feed_forward.defvjp(_forward, _backward)


def _gated(products: tuple[jax.Array, ...], u: jax.Array, pairs: tuple[Pair, ...], how: How) -> Gated:
    """Two linears' products and their adapters, as SwiGLU takes them."""
    gate_v, up_v = (lora_b.astype(u.dtype) for _, lora_b in pairs[:2])
    return Gated(*products, u, gate_v, up_v, how.scalings[:2], tuple(firsts(pairs[:2])))
