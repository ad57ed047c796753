"""Both ends of a model, where the vocabulary is: the embedding, and the head with the final norm."""

import jax
import jax.numpy as jnp
from flax import nnx

from qlora_jax.model.architecture import Architecture
from qlora_jax.model.linear import FrozenParam
from qlora_jax.model.norms import make_norm

NOISE = 2**31 - 1
"""A number that no layer has, to fold a step's key with."""


class Embedding(nnx.Module):
    """Token ids to vectors; `weight` [V, D] stays bfloat16."""

    def __init__(self, config: Architecture, rngs: nnx.Rngs) -> None:
        self.weight = FrozenParam(
            0.02 * jax.random.normal(rngs.params(), (config.vocab_size, config.hidden_size), jnp.bfloat16)
        )
        self.scale, self.scale_is_rounded = config.embed_scale, config.embed_scale_rounded

    def __call__(self, input_ids: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
        """input_ids [B, T] → h [B, T, D] in `dtype`."""
        h = jnp.take(self.weight[...], input_ids, axis=0, mode="clip").astype(dtype)
        if self.scale == 1.0:
            return h
        scale = jnp.asarray(self.scale, dtype if self.scale_is_rounded else jnp.float32)
        return (h.astype(jnp.float32) * scale.astype(jnp.float32)).astype(dtype)


def add_noise(h: jax.Array, alpha: jax.Array, key: jax.Array, micro_batch: jax.Array) -> jax.Array:
    """NEFTune (Jain et al., 2023) as transformers has it: uniform noise within ± alpha / sqrt(T·D) on h [B, T, D], padding counted in T.

    The step's `key` is folded with a number that no layer has, so that no dropout mask is drawn from the same bits.
    """
    key = jax.random.fold_in(jax.random.fold_in(key, NOISE), micro_batch)
    bound = alpha / (h.shape[1] * h.shape[2]) ** 0.5
    return h + (bound * jax.random.uniform(key, h.shape, jnp.float32, -1, 1)).astype(h.dtype)


class Head(nnx.Module):
    """Final norm and projection to the vocabulary; `weight` [V, D] is the embedding's own array when the two are tied."""

    def __init__(self, config: Architecture, rngs: nnx.Rngs) -> None:
        self.norm = make_norm(config.hidden_size, config.norms)
        self.scale, self.softcap = config.logit_scale, config.logit_softcap
        self.weight = FrozenParam(
            0.02 * jax.random.normal(rngs.params(), (config.vocab_size, config.hidden_size), jnp.bfloat16)
        )

    def __call__(self, h: jax.Array) -> jax.Array:
        """h [..., D] → logits [..., V] float32."""
        x = self.norm(h)
        logits = _project(x, self.weight[...].astype(x.dtype))
        logits = logits if self.scale == 1.0 else logits * self.scale
        return logits if self.softcap is None else self.softcap * jnp.tanh(logits / self.softcap)


@jax.custom_vjp
def _project(x: jax.Array, weight: jax.Array) -> jax.Array:
    """x [..., D] on weight [V, D] → [..., V] float32. The gradient is rounded to x's dtype before it meets the weight again, as where
    torch's autocast makes logits: a product of float32 numbers costs twice the time."""
    return jnp.einsum("...d,vd->...v", x, weight, preferred_element_type=jnp.float32)


_project.defvjp(
    lambda x, weight: (_project(x, weight), weight),
    lambda weight, dy: (jnp.einsum("...v,vd->...d", dy.astype(weight.dtype), weight), None),
)
