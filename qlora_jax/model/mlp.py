"""The MLP: down(activation(gate(x)) · up(x)), forward and backward pass written out; and its other forms, as they are.

The arrays here are [N, F], the largest of a layer, and all that is done to them but the matmuls is moving them. Forward, one pass adds
the adapters' terms to gate and up and multiplies. Backward, one pass takes gate, up and the gradient that comes through down_proj, and
writes the gradients of both and down_proj's input, for its adapter's gradient; nothing but gate and up is saved, or recomputed, before.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from qlora_jax.model.architecture import XIELU
from qlora_jax.model.linear import FrozenParam, NF4Linear, matmul_options, project, weights_of
from qlora_jax.model.lora_matmul import (
    AdapterInput,
    Draw,
    Gradients,
    MatmulOptions,
    Pair,
    Weight,
    dense,
    drop_out,
    drop_out_again,
    dropout_bits,
    dropout_options,
    dropped_out,
    first_rows,
    input_gradient,
    matmul,
    pair_gradients,
    project_down,
    stacked_a,
    toward_input,
)
from qlora_jax.ops import dispatch, twins
from qlora_jax.ops.operands import Gated

GATED_PRODUCTS = ("gate", "up")
"""Names of gate and up [N, F] before the adapters' terms, for the policy that chooses which activations are saved."""


class Xielu(nnx.Module):
    """An activation with numbers of its own: α⁺x² + βx for x > 0, α⁻(expm1(min(x, ε)) - x) + βx elsewhere, as Apertus has it."""

    def __init__(self) -> None:
        self.alpha_p, self.alpha_n = (
            FrozenParam(jnp.zeros(XIELU[name], jnp.bfloat16)) for name in ("alpha_p", "alpha_n")
        )
        self.beta, self.eps = (FrozenParam(jnp.zeros(XIELU[name], jnp.bfloat16)) for name in ("beta", "eps"))

    def __call__(self, x: jax.Array) -> jax.Array:
        """x of any shape → the same shape and dtype."""
        positive, negative, beta, eps = (
            each[...].astype(x.dtype).reshape((1,) * x.ndim)
            for each in (self.alpha_p, self.alpha_n, self.beta, self.eps)
        )
        above, below = jax.nn.softplus(positive), beta + jax.nn.softplus(negative)
        return jnp.where(x > 0, above * x * x + beta * x, (jnp.expm1(jnp.minimum(x, eps)) - x) * below + beta * x)


class Draws(NamedTuple):
    """Where dropout's bits come from, for each of the two inputs that linears have here."""

    x: Draw | None  # [N, D]
    inner: Draw | None  # SwiGLU's output [N, F]


class _Residuals(NamedTuple):
    """What the forward pass saves for the backward pass."""

    input: AdapterInput
    inner_draw: Draw | None
    inner_bits: jax.Array | None
    """Dropout bits of SwiGLU's output, if both passes are in one compiled function; drawn again otherwise."""
    weights: tuple[Weight, ...]
    pairs: tuple[Pair, ...]
    products: tuple[jax.Array, ...]
    """gate and up [N, F], without the adapters' terms."""
    lora_x: jax.Array
    """That of gate and up."""
    inner_lora_x: jax.Array | None
    """That of down; None if the backward pass makes it again."""


class Activation(NamedTuple):
    """A function between an MLP's linears."""

    name: str = "silu"
    """A name of `twins.ACTIVATIONS`, or xielu."""
    gated: bool = True
    numbers: Xielu | None = None


SILU = Activation()
"""SwiGLU's."""


def feed_forward(
    linears: Sequence[NF4Linear],
    x: jax.Array,
    residual: jax.Array | None,
    keys: tuple[jax.Array | None, jax.Array | None] = (None, None),
    *,
    activation: Activation = SILU,
    first: jax.Array | int = 0,
    matrices: Sequence[jax.Array | None] | None = None,
) -> jax.Array:
    """Return residual + down(activation(gate(x)) · up(x)) [N, D] in x's dtype, for x and residual [N, D].

    Args:
        linears: gate, up and down; or one that is gate and up, the gate's rows first, and down; or, without a gate, up and down.
        residual: None for none.
        keys: draw the dropout masks of x and of SwiGLU's output; None means no dropout.
        first: the number of x's first token among the micro-batch's, for the masks.
        matrices: the linears' weights where they were dequantized before.
    """
    adapted = all(linear.adapter and linear.bias is None for linear in linears)
    if not (adapted and len(linears) == len(GATED_PRODUCTS) + 1 and activation.numbers is None):
        return _one_by_one(linears, x, residual, keys, activation=activation, first=first, matrices=matrices)
    draws = Draws(*(None if key is None else Draw(key, first) for key in keys))
    pairs = tuple(linear.adapter.pair() for linear in linears)
    x = jax.lax.optimization_barrier(x)  # or XLA makes it again for every matmul, instead of once
    options = dataclasses.replace(
        matmul_options(linears), activation=activation.name, adds_residual=residual is not None
    )
    return _feed_forward(x, residual, weights_of(linears, matrices), pairs, draws, options)


def _one_by_one(
    linears: Sequence[NF4Linear],
    x: jax.Array,
    residual: jax.Array | None,
    keys: tuple[jax.Array | None, jax.Array | None],
    *,
    activation: Activation,
    first: jax.Array | int,
    matrices: Sequence[jax.Array | None] | None,
) -> jax.Array:
    """`feed_forward` of linears that not all have an adapter, are fused, have biases or no gate."""
    *entering, down = linears
    matrices = matrices or [None] * len(linears)
    products = project(entering, x, keys[0], first=first, matrices=matrices[:-1])
    named = [checkpoint_name(product, name) for product, name in zip(products, GATED_PRODUCTS, strict=False)]
    inner = activated(named, activation)
    (out,) = project([down], inner, keys[1], first=first, matrices=matrices[-1:], residual=residual)
    return out


def activated(products: Sequence[jax.Array], activation: Activation) -> jax.Array:
    """Return what an MLP's last linear is given [..., F].

    Args:
        products: gate and up [..., F]; or both in one [..., 2F]; or, without a gate, up [..., F].
    """
    if activation.gated:
        gate, up = products if len(products) == len(GATED_PRODUCTS) else jnp.split(products[0], 2, axis=-1)
        return twins.plain_swiglu(gate, up, activation.name)
    (up,) = products
    return twins.ACTIVATIONS[activation.name](up) if activation.numbers is None else activation.numbers(up)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _feed_forward(
    x: jax.Array,
    residual: jax.Array | None,
    weights: tuple[Weight, ...],
    pairs: tuple[Pair, ...],
    draws: Draws,
    options: MatmulOptions,
) -> jax.Array:
    return _forward(x, residual, weights, pairs, draws, options)[0]


def _forward(
    x: jax.Array,
    residual: jax.Array | None,
    weights: tuple[Weight, ...],
    pairs: tuple[Pair, ...],
    draws: Draws,
    options: MatmulOptions,
) -> tuple[jax.Array, _Residuals]:
    if options.share_dense:
        weights = tuple(map(dense, weights))
    products = tuple(
        checkpoint_name(matmul(x, weight), name) for weight, name in zip(weights, GATED_PRODUCTS, strict=False)
    )
    dropped = drop_out(x, draws.x, options)
    lora_x = project_down(dropped.x, pairs[:2])
    inner = dispatch.swiglu(_gated(products, lora_x, pairs, options), spent=options.recomputed)
    inner_bits = dropout_bits(inner.shape, draws.inner, options)
    inner_lora_x = project_down(dropped_out(inner, inner_bits, options.dropout), pairs[2:])
    bases, lora_b = [matmul(inner, weights[2])], pairs[2].lora_b.astype(x.dtype)
    if residual is not None:
        bases.append(residual)
    out = dispatch.low_rank_add(bases, inner_lora_x, lora_b, factor=options.scalings[2], transposed=True)
    saves_dropped = options.recomputed and dropped.bits is not None
    return out, _Residuals(
        input=AdapterInput(None if saves_dropped else x, draws.x, dropped if saves_dropped else None),
        inner_draw=draws.inner,
        inner_bits=inner_bits if options.recomputed else None,
        weights=weights,
        pairs=pairs,
        products=products,
        lora_x=lora_x,
        # A forward pass recomputed for its backward pass alone need not come as far: `_backward` makes SwiGLU's output anyway.
        inner_lora_x=None if options.recomputed else inner_lora_x,
    )


def _backward(options: MatmulOptions, saved: _Residuals, dy: jax.Array) -> tuple[Any, ...]:
    weights, pairs, products, lora_x = saved.weights, saved.pairs, saved.products, saved.lora_x
    dropped = drop_out_again(saved.input, options)
    inner_bits = saved.inner_bits
    if inner_bits is None:
        inner_bits = dropout_bits(products[0].shape, saved.inner_draw, options)
    down, gate_up = slice(2, 3), slice(2)
    (dinner,), dinner_lora_x = toward_input([dy], weights[down], pairs[down], options.scalings[down])
    inner, *dproducts = dispatch.swiglu_backward(
        _gated(products, lora_x, pairs, options),
        dinner,
        dinner_lora_x,
        stacked_a(pairs[down], dy.dtype),
        **dropout_options(inner_bits, options.dropout),
        spent=options.recomputed,
    )
    inner_dropped = dropped_out(inner, inner_bits, options.dropout)
    inner_lora_x = saved.inner_lora_x
    if inner_lora_x is None:
        inner_lora_x = project_down(inner_dropped, pairs[down])
    parts = Gradients(dinner_lora_x, inner_dropped, inner_lora_x)
    dpairs = pair_gradients([dy], parts, pairs[down], options.scalings[down])
    # What is made of dy and of `inner` is made before the rest, which then may take their memory.
    dproducts, dpairs = jax.lax.optimization_barrier((dproducts, dpairs))
    bases, dlora_x = toward_input(dproducts, weights[gate_up], pairs[gate_up], options.scalings[gate_up])
    dx = input_gradient(bases, dlora_x, pairs[gate_up], dropped.bits, options.dropout)
    parts = Gradients(dlora_x, dropped.x, lora_x)
    dpairs = pair_gradients(dproducts, parts, pairs[gate_up], options.scalings[gate_up]) + dpairs
    return dx, dy if options.adds_residual else None, None, dpairs, None  # weights are frozen: no cotangent


_feed_forward.defvjp(_forward, _backward)


def _gated(
    products: tuple[jax.Array, ...], lora_x: jax.Array, pairs: tuple[Pair, ...], options: MatmulOptions
) -> Gated:
    """Gate and up with their adapters, as SwiGLU takes them."""
    gate_v, up_v = (pair.lora_b.astype(lora_x.dtype) for pair in pairs[:2])
    firsts = tuple(first_rows(pairs[:2]))
    return Gated(*products, lora_x, gate_v, up_v, options.scalings[:2], firsts, options.activation)
