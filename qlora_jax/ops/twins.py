"""The twins of the kernels in XLA's operations: always there, always right, and what a kernel is tested against.

A twin rounds to its inputs' dtype at every step, where a kernel sums in float32 and rounds once. Those of the 4-bit format are in
`nf4.py`.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from qlora_jax.ops.operands import Gated, Rotation


def plain_rotate(x: jax.Array, rotation: Rotation) -> jax.Array:
    """Heads side by side, [N, heads · P] → rotated, in float32 and rounded to x's dtype; in XLA's operations."""
    cos, sin = (each[:, None, :] for each in rotation)
    heads = x.reshape(len(x), -1, 2 * rotation.cos.shape[1]).astype(jnp.float32)
    first, second = jnp.split(heads, 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype).reshape(x.shape)


def plain_low_rank_add(
    bases: Sequence[jax.Array],
    u: jax.Array,
    v: jax.Array,
    *,
    factor: float = 1.0,
    first: int = 0,
    transposed: bool = False,
    drawn: jax.Array | None = None,
    threshold: int = 0,
) -> jax.Array:
    """The twin of the kernel in XLA's operations, see `low_rank_add`."""
    v = v.T if transposed else v
    product = u[:, first : first + v.shape[0]] @ v
    product = product if factor == 1 else product * jnp.asarray(factor, product.dtype)
    if drawn is not None:
        product = jnp.where(drawn >= threshold, product, 0)
    base, *more = bases
    return functools.reduce(jnp.add, more, base + product)


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
}
"""Activations of an MLP by their names in `Architecture`."""


def plain_swiglu(gate: jax.Array, up: jax.Array, activation: str = "silu") -> jax.Array:
    """activation(gate) · up, in XLA's operations."""
    return ACTIVATIONS[activation](gate) * up


def plain_sums(gated: Gated) -> list[jax.Array]:
    """The two products with their adapters' terms, in XLA's operations."""
    return [
        plain_low_rank_add([base], gated.u, v, factor=factor, first=first, transposed=True)
        for base, v, factor, first in gated.halves
    ]


def plain_rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """The twin of `rms_norm`; the weight may be any that broadcasts against x [..., D]."""
    x32 = x.astype(jnp.float32)
    normed = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return _scaled(normed, weight, x)


def plain_layer_norm(x: jax.Array, weight: jax.Array, bias: jax.Array | None, eps: float) -> jax.Array:
    """(x - mean) / deviation over the last axis of x [..., D], times the weight, plus the bias; both broadcast against x."""
    x32 = x.astype(jnp.float32)
    centred = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    normed = centred * jax.lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + eps)
    if bias is None:
        return _scaled(normed, weight, x)
    scale, shift = (jnp.broadcast_to(each.astype(jnp.float32), x.shape) for each in (weight, bias))
    return (normed * scale + shift).astype(x.dtype)


def _scaled(normed: jax.Array, weight: jax.Array, x: jax.Array) -> jax.Array:
    """Multiply in float32 and round once if the weight is in float32; otherwise round to x's dtype, in which the weight multiplies."""
    if weight.dtype == jnp.float32:
        return (normed * jnp.broadcast_to(weight, x.shape)).astype(x.dtype)
    return normed.astype(x.dtype) * jnp.broadcast_to(weight.astype(x.dtype), x.shape)


def dense_matmul(x: jax.Array, dense: jax.Array) -> jax.Array:
    """x [..., in] times the transpose of a dequantized weight [out, in]: [..., out] in x's dtype."""
    return jnp.einsum("...i,oi->...o", x, dense.astype(x.dtype))
