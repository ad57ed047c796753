"""Next-token cross-entropy in chunks over tokens: no [tokens, V] array of float32 ever exists."""

import jax
import jax.numpy as jnp

from qlora_jax.data import IGNORED_LABEL
from qlora_jax.model.vocabulary import Head

LOGIT_BYTES = 128 * 2**20
"""What one chunk of float32 logits may take; sets the number of tokens a chunk."""


def shift(labels: jax.Array) -> jax.Array:
    """Labels [B, T] as stored (label t is token t) → targets [B, T] (target t is token t + 1; the last one is ignored)."""
    return jnp.pad(labels[:, 1:], ((0, 0), (0, 1)), constant_values=IGNORED_LABEL)


def cross_entropy(head: Head, h: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
    """h [N, D] and targets [N] → (sum of the losses over counted targets, their number), float32 scalars.

    Equal to torch's `cross_entropy(head(h), targets, reduction="sum")`.
    """
    logits = head(h)
    counted = targets != IGNORED_LABEL
    picked = _pick(logits, jnp.where(counted, targets, 0))
    losses = jax.nn.logsumexp(logits, axis=1) - picked
    return jnp.sum(jnp.where(counted, losses, 0)), jnp.sum(counted, dtype=jnp.float32)


@jax.custom_vjp
def _pick(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """logits [N, V] and targets [N] → each row's logit of its target [N].

    The gradient is a comparison with every column. As the scatter that it would be otherwise, it wants an array of float32 to add to, and
    the softmax's gradient is then written in float32, and once more when it is rounded; so it is one pass, in the head's dtype.
    """
    return jnp.take_along_axis(logits, targets[:, None], axis=1)[:, 0]


_pick.defvjp(
    lambda logits, targets: (_pick(logits, targets), (targets[:, None], jnp.arange(logits.shape[1])[None])),
    lambda kept, dy: (jnp.where(kept[0] == kept[1], dy[:, None], 0), None),
)


def chunked_loss(head: Head, h: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """h [B, T, D], labels [B, T] → (sum, count), chunk by chunk; for evaluation."""
    chunks = _chunks(head, h, labels)
    sums, counts = jax.lax.map(lambda chunk: cross_entropy(head, *chunk), chunks)
    return sums.sum(), counts.sum()


def chunked_loss_and_grad(
    head: Head, h: jax.Array, labels: jax.Array, weight: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """h [B, T, D], labels [B, T] → (`weight` · sum of losses, its gradient dh [B, T, D] in h's dtype).

    `weight` is 1 / (supervised tokens of the whole optimizer step): dividing once, whatever the cut into micro-batches, is what
    keeps the loss independent of that cut. Each chunk's dh is taken while its logits are at hand, so nothing is recomputed.
    """
    loss_and_dh = jax.value_and_grad(lambda h, targets: weight * cross_entropy(head, h, targets)[0])
    losses, dh = jax.lax.map(lambda chunk: loss_and_dh(*chunk), _chunks(head, h, labels))
    tokens = h.shape[0] * h.shape[1]
    return losses.sum(), dh.reshape(-1, h.shape[-1])[:tokens].reshape(h.shape)


def _chunks(head: Head, h: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Flatten to tokens and cut: h [C, chunk, D], targets [C, chunk], the last chunk filled with ignored targets."""
    tokens, vocab_size = h.shape[0] * h.shape[1], head.weight.shape[0]
    number = -(-tokens * vocab_size * 4 // LOGIT_BYTES)
    chunk = -(-tokens // number)
    missing = number * chunk - tokens
    h = jnp.pad(h.reshape(tokens, -1), ((0, missing), (0, 0)))
    targets = jnp.pad(shift(labels).reshape(tokens), (0, missing), constant_values=IGNORED_LABEL)
    return h.reshape(number, chunk, -1), targets.reshape(number, chunk)
