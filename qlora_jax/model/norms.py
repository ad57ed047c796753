"""Norms of hidden states, and how one leaves the residual stream: with what it was given, so that both gradients are added in one pass.

    RMSNorm:   x / sqrt(mean(x²) + eps) · weight
    LayerNorm: (x - mean(x)) / sqrt(var(x) + eps) · weight (+ bias)

Both are computed in float32. A weight in bfloat16 multiplies what was rounded to x's dtype, as Llama's does ("early"); a weight in float32
multiplies before the one rounding, as Gemma's and OLMo's do ("late").
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from qlora_jax.model.architecture import Norms
from qlora_jax.model.linear import FrozenParam
from qlora_jax.ops import dispatch, twins


class RMSNorm(nnx.Module):
    """x / rms(x), times `weight` of shape [D], or any that broadcasts against x."""

    def __init__(self, size: int | tuple[int, ...], eps: float, dtype: jax.typing.DTypeLike = jnp.bfloat16) -> None:
        self.weight = FrozenParam(jnp.ones(size, dtype))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., D] → the same shape and dtype."""
        return twins.plain_rms_norm(x, self.weight[...], self.eps)

    def and_skip(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """x [..., D] → (normed, x). What goes past the norm should be the second, whose gradient is then added to the norm's in one pass.

        The backward pass keeps x alone.
        """
        return _norm_and_skip(x, self.weight[...], self.eps)


class LayerNorm(nnx.Module):
    """(x - mean(x)) / deviation, times `weight`, plus a bias if there is one."""

    def __init__(self, size: int | tuple[int, ...], norms: Norms, *, bias: bool) -> None:
        self.weight = FrozenParam(jnp.ones(size, _dtype(norms)))
        self.bias = FrozenParam(jnp.zeros(size, jnp.bfloat16)) if bias else None
        self.eps = norms.eps

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., D] → the same shape and dtype."""
        bias = None if self.bias is None else self.bias[...]
        return twins.plain_layer_norm(x, self.weight[...], bias, self.eps)

    def and_skip(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """x [..., D] → (normed, x)."""
        return self(x), x


def make_norm(size: int | tuple[int, ...], norms: Norms, *, of_heads: bool = False) -> RMSNorm | LayerNorm:
    """Return a norm with a weight of shape `size`.

    Args:
        of_heads: a norm of queries or keys, which has no bias.
    """
    if norms.centred:
        return LayerNorm(size, norms, bias=norms.bias and not of_heads)
    return RMSNorm(size, norms.eps, _dtype(norms))


def _dtype(norms: Norms) -> jnp.dtype:
    return jnp.dtype(jnp.float32 if norms.is_float32 else jnp.bfloat16)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _norm_and_skip(x: jax.Array, weight: jax.Array, eps: float) -> tuple[jax.Array, jax.Array]:
    return dispatch.rms_norm(x, weight, eps), x


def _forward(x: jax.Array, weight: jax.Array, eps: float) -> tuple[tuple[jax.Array, jax.Array], Any]:
    return _norm_and_skip(x, weight, eps), (x, weight)


def _backward(eps: float, kept: Any, grads: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
    return dispatch.rms_norm_backward(*kept, *grads, eps), None  # the weight is frozen: no cotangent


_norm_and_skip.defvjp(_forward, _backward)
