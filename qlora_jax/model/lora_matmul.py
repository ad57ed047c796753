"""LoRA matmuls: frozen weights with their adapters, the backward pass written out.

    y = x·Wᵀ + b + scaling · (dropout(x)·Aᵀ)·Bᵀ      W frozen, in 4 bits or a plain matrix [out, in], b [out] frozen, if there is one;
                                                    A [R, in] and B [out, R] trained

`lora_matmul` is that for several linears of one input; the other functions are its parts, for whoever writes a longer stretch out
(mlp.py). `lora_x` is dropout(x)·Aᵀ [N, ΣR] of all the linears, whose A's are one matrix [ΣR, in]: x and its gradient are read once.
"""

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from qlora_jax.ops import dispatch, nf4, twins
from qlora_jax.ops.dropout import Dropout
from qlora_jax.ops.operands import Rotation

LORA_X = "lora_x"
"""Name of dropout(x)·Aᵀ [..., ΣR] for the policy that chooses which activations are saved for the backward pass."""

Weight = nf4.QuantizedTensor | jax.Array


class Pair(NamedTuple):
    """The matrices of a linear's adapter."""

    lora_a: jax.Array  # [R, in]
    lora_b: jax.Array  # [out, R]


class Draw(NamedTuple):
    """Where dropout's random bits come from."""

    key: jax.Array
    first: jax.Array | int
    """The number of the input's first token among the micro-batch's."""


class DroppedOut(NamedTuple):
    """An input of adapters after dropout."""

    bits: jax.Array | None  # [N, in] unsigned integers, None without dropout
    x: jax.Array  # [N, in]


class AdapterInput(NamedTuple):
    """What a backward pass is given of the input of adapters.

    Either x, and where its dropout bits come from; or, if the backward pass is in the same compiled function as the forward pass, the
    dropped-out input itself, and no x.
    """

    x: jax.Array | None
    draw: Draw | None
    dropped: DroppedOut | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class MatmulOptions:
    """Static options of the LoRA matmuls of one input."""

    scalings: tuple[float, ...]
    """Factor on B·A of each linear; 1 without an adapter."""
    dropout: Dropout | None
    recomputed: bool
    """Whether the forward pass is recomputed within the function that differentiates it."""
    share_dense: bool
    """Whether the dense matrices are saved for the backward pass instead of codes and scales."""
    rotated: tuple[bool, ...] = ()
    """Which outputs are rotated."""
    shape: tuple[int, ...] = ()
    """The shape of x, which the gradient has too."""
    activation: str = "silu"
    """What an MLP's gate goes through."""
    adds_residual: bool = True
    """Whether an MLP's output is added to the hidden states."""


class _Residuals(NamedTuple):
    """What `lora_matmul` saves for its backward pass."""

    input: AdapterInput
    weights: tuple[Weight, ...]
    pairs: tuple[Pair | None, ...]
    lora_x: jax.Array | None
    rotation: Rotation | None
    added: bool
    """Whether a residual was added to the first output, which then has its gradient."""


def dense(weight: Weight) -> jax.Array:
    """Return a frozen weight as a matrix [out, in]: dequantized if it is in 4 bits, else as it is."""
    return dispatch.dequantize(weight) if isinstance(weight, nf4.QuantizedTensor) else weight


def matmul(x: jax.Array, weight: Weight) -> jax.Array:
    """Multiply x [N, in] by the transpose of a frozen weight of shape (out, in)."""
    return dispatch.matmul(x, weight) if isinstance(weight, nf4.QuantizedTensor) else twins.dense_matmul(x, weight)


@functools.partial(jax.custom_vjp, nondiff_argnums=(7,))
def lora_matmul(
    x: jax.Array,
    weights: tuple[Weight, ...],
    pairs: tuple[Pair | None, ...],
    biases: tuple[jax.Array | None, ...],
    residual: jax.Array | None,
    draw: Draw | None,
    rotation: Rotation | None,
    options: MatmulOptions,
) -> list[jax.Array]:
    """Apply linears to x of any shape that is [N, in] in memory: one output [N, out] a linear, in x's dtype.

    Args:
        biases: [out] each, or None.
        residual: [N, out], added to the first output.
        rotation: rotary embedding's angles, for the outputs that `options.rotated` says.
    """
    return _forward(x, weights, pairs, biases, residual, draw, rotation, options)[0]


def _forward(
    x: jax.Array,
    weights: tuple[Weight, ...],
    pairs: tuple[Pair | None, ...],
    biases: tuple[jax.Array | None, ...],
    residual: jax.Array | None,
    draw: Draw | None,
    rotation: Rotation | None,
    options: MatmulOptions,
) -> tuple[list[jax.Array], _Residuals]:
    saved_x, x = x if any(pairs) else None, _as_rows(x, weights)
    if options.share_dense:
        weights = tuple(map(dense, weights))
    bases = [[_biased(matmul(x, weight), bias)] for weight, bias in zip(weights, biases, strict=True)]
    if residual is not None:
        bases[0].append(residual)
    dropped = drop_out(x, draw, options)
    lora_x = project_down(dropped.x, pairs) if any(pairs) else None
    outputs = []
    for base, pair, scaling, first, turned in zip(
        bases, pairs, options.scalings, first_rows(pairs), options.rotated, strict=True
    ):
        turn = rotation if turned else None
        if pair is None:
            total = functools.reduce(jnp.add, base)
            outputs.append(total if turn is None else twins.plain_rotate(total, turn))
        else:
            how = {"factor": scaling, "first": first, "transposed": True, "rotation": turn}
            outputs.append(dispatch.low_rank_add(base, lora_x, pair.lora_b.astype(x.dtype), **how))
    saves_dropped = options.recomputed and dropped.bits is not None
    given = AdapterInput(None if saves_dropped else saved_x, draw, dropped if saves_dropped else None)
    return outputs, _Residuals(given, weights, pairs, lora_x, rotation, residual is not None)


def _backward(options: MatmulOptions, saved: _Residuals, dys: list[jax.Array]) -> tuple[Any, ...]:
    given, weights, pairs, lora_x, rotation, added = saved
    dresidual = dys[0] if added else None
    dys = [
        twins.plain_rotate(dy, rotation.inverse) if turned else dy
        for dy, turned in zip(dys, options.rotated, strict=True)
    ]
    bases, dlora_x = toward_input(dys, weights, pairs, options.scalings)
    if not any(pairs):
        return functools.reduce(jnp.add, bases).reshape(options.shape), None, pairs, None, dresidual, None, None
    dropped = drop_out_again(given._replace(x=None if given.x is None else _as_rows(given.x, weights)), options)
    dx = input_gradient(bases, dlora_x, pairs, dropped.bits, options.dropout).reshape(options.shape)
    dpairs = pair_gradients(dys, Gradients(dlora_x, dropped.x, lora_x), pairs, options.scalings)
    return dx, None, dpairs, None, dresidual, None, None  # weights and biases are frozen: no cotangent


lora_matmul.defvjp(_forward, _backward)


def _biased(product: jax.Array, bias: jax.Array | None) -> jax.Array:
    return product if bias is None else product + bias.astype(product.dtype)[None]


def _as_rows(x: jax.Array, weights: Sequence[Weight]) -> jax.Array:
    """x of any shape as [N, in].

    Its shape is changed on this side of what the backward pass saves: saved in another shape, it would be another array. And it is made
    once: without the barrier XLA makes it again for every matmul.
    """
    return jax.lax.optimization_barrier(x.reshape(-1, weights[0].shape[1]))


def dropout_bits(shape: tuple[int, ...], draw: Draw | None, options: MatmulOptions) -> jax.Array | None:
    """Draw dropout's bits for an input [N, features]; None where there is no dropout."""
    return None if draw is None or options.dropout is None else options.dropout.draw(shape, *draw)


def dropped_out(x: jax.Array, bits: jax.Array | None, dropout: Dropout | None) -> jax.Array:
    """Apply dropout to x [N, in], if bits were drawn for it."""
    return x if bits is None else dropout(x, bits)


def drop_out(x: jax.Array, draw: Draw | None, options: MatmulOptions) -> DroppedOut:
    """Draw dropout's bits for x [N, in] and apply them."""
    bits = dropout_bits(x.shape, draw, options)
    return DroppedOut(bits, dropped_out(x, bits, options.dropout))


def drop_out_again(given: AdapterInput, options: MatmulOptions) -> DroppedOut:
    """Return in the backward pass the dropped-out input [N, in] of the forward pass: as saved, or drawn again."""
    return drop_out(given.x, given.draw, options) if given.dropped is None else given.dropped


def project_down(x: jax.Array, pairs: Sequence[Pair | None]) -> jax.Array:
    """Multiply the dropped-out input [N, in] by all A's: lora_x [N, ΣR]."""
    return checkpoint_name(jnp.einsum("ni,ri->nr", x, stacked_a(pairs, x.dtype)), LORA_X)


def toward_input(
    dys: Sequence[jax.Array], weights: Sequence[Weight], pairs: Sequence[Pair | None], scalings: Sequence[float]
) -> tuple[list[jax.Array], jax.Array | None]:
    """Pull gradients of outputs [N, out] back: through the weights, [N, in] each; through the B's, dlora_x [N, ΣR] if there is any."""
    bases = [
        jnp.einsum("no,oi->ni", dy, dense(weight).astype(dy.dtype)) for dy, weight in zip(dys, weights, strict=True)
    ]
    pieces = []
    for dy, pair, scaling in zip(dys, pairs, scalings, strict=True):
        if pair is not None:
            piece = jnp.einsum("no,or->nr", dy, pair.lora_b.astype(dy.dtype), preferred_element_type=jnp.float32)
            pieces.append((piece * scaling).astype(dy.dtype))
    return bases, jnp.concatenate(pieces, axis=-1) if pieces else None


def dropout_options(bits: jax.Array | None, dropout: Dropout | None) -> dict[str, Any]:
    """Options of `dispatch.low_rank_add` that apply dropout to a gradient."""
    return {} if bits is None else {"drawn": bits, "threshold": dropout.threshold, "factor": 1 / dropout.share}


def input_gradient(
    bases: Sequence[jax.Array],
    dlora_x: jax.Array,
    pairs: Sequence[Pair | None],
    bits: jax.Array | None,
    dropout: Dropout | None,
) -> jax.Array:
    """Sum what `toward_input` gives: the gradient of x [N, in]."""
    return dispatch.low_rank_add(bases, dlora_x, stacked_a(pairs, dlora_x.dtype), **dropout_options(bits, dropout))


class Gradients(NamedTuple):
    """The arrays that the gradients of A's and B's are made of, besides those of the outputs."""

    dlora_x: jax.Array  # [N, ΣR]
    dropped_x: jax.Array  # [N, in]
    lora_x: jax.Array  # [N, ΣR]


def pair_gradients(
    dys: Sequence[jax.Array], parts: Gradients, pairs: Sequence[Pair | None], scalings: Sequence[float]
) -> tuple[Pair | None, ...]:
    """Return the gradients of A's and B's from those of the outputs [N, out], in the matrices' own dtypes."""
    das = jnp.einsum("nr,ni->ri", parts.dlora_x, parts.dropped_x, preferred_element_type=jnp.float32)
    gradients: list[Pair | None] = []
    for dy, pair, scaling, first in zip(dys, pairs, scalings, first_rows(pairs), strict=True):
        if pair is None:
            gradients.append(None)
            continue
        lora_a, lora_b = pair
        rows = slice(first, first + len(lora_a))
        # Written with a transpose, it is a matmul of rank rows: twice as fast on a CPU as one of rank columns.
        db = jnp.einsum("nr,no->ro", parts.lora_x[:, rows], dy, preferred_element_type=jnp.float32).T * scaling
        gradients.append(Pair(das[rows].astype(lora_a.dtype), db.astype(lora_b.dtype)))
    return tuple(gradients)


def stacked_a(pairs: Sequence[Pair | None], dtype: jax.typing.DTypeLike) -> jax.Array:
    """Concatenate all A's to one matrix [ΣR, in]."""
    return jnp.concatenate([pair.lora_a for pair in pairs if pair is not None]).astype(dtype)


def first_rows(pairs: Sequence[Pair | None]) -> list[int]:
    """Return where each linear's rows begin in `stacked_a`."""
    ranks = [0 if pair is None else pair.lora_a.shape[0] for pair in pairs]
    return list(itertools.accumulate(ranks[:-1], initial=0))
