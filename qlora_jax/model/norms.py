"""RMSNorm, and how it leaves the residual stream: with what it was given, so that both gradients are added in the pass that makes one."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from qlora_jax.model.linear import FrozenParam
from qlora_jax.ops import dispatch, twins


class RMSNorm(nnx.Module):
    """x / rms(x) in float32, rounded to x's dtype, times `weight` [D]."""

    def __init__(self, size: int, eps: float) -> None:
        self.weight = FrozenParam(jnp.ones((size,), jnp.bfloat16))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., D] → the same shape and dtype."""
        return twins.plain_rms_norm(x, self.weight[...], self.eps)

    def and_skip(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """x [..., D] → (normed, x). What goes past the norm should be the second, whose gradient is then added to the norm's in one pass.

        The backward pass keeps x alone.
        """
        return _norm_and_skip(x, self.weight[...], self.eps)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _norm_and_skip(x: jax.Array, weight: jax.Array, eps: float) -> tuple[jax.Array, jax.Array]:
    return dispatch.rms_norm(x, weight, eps), x


def _forward(x: jax.Array, weight: jax.Array, eps: float) -> tuple[tuple[jax.Array, jax.Array], Any]:
    return _norm_and_skip(x, weight, eps), (x, weight)


def _backward(eps: float, kept: Any, grads: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
    return dispatch.rms_norm_backward(*kept, *grads, eps), None  # the weight is frozen: no cotangent


_norm_and_skip.defvjp(_forward, _backward)
