"""What a run minimizes: from the last layer's output to a loss, and to the gradient that starts the backward walk.

The engine knows an `Objective` and nothing of the loss. One that compares rows with each other may ask for rows grouped in a batch.
"""

import functools
from typing import Any, Protocol

import jax

from qlora_jax.engine.programs import Definition, describe
from qlora_jax.model.loss import chunked_loss, chunked_loss_and_grad
from qlora_jax.model.vocabulary import Head
from qlora_jax.runtime.placement import Tree


class Objective(Protocol):
    """A loss over the last layer's output, with compiled functions. All arrays are on the device."""

    def head(self, head: Tree, hidden: jax.Array, labels: jax.Array, weight: jax.Array) -> tuple[jax.Array, jax.Array]:
        """hidden [B, T, D] and labels [B, T] of a micro-batch → (its part of the step's loss, the gradient of hidden).

        Args:
            head: the head's frozen parameters.
            weight: 1 / (counted tokens of the whole optimizer step), a float32 scalar.
        """

    def evaluate(self, head: Tree, hidden: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
        """hidden [B, T, D] and labels [B, T] → (sum of the losses, number of counted tokens), float32 scalars."""

    def lowered(self, head: Tree, hidden: Any, labels: Any, weight: Any) -> jax.stages.Lowered:
        """Return `head`'s function lowered for arguments of these shapes, without running anything."""


class CrossEntropy:
    """Next-token cross-entropy over the supervised tokens: the objective of fine-tuning on examples."""

    def __init__(self, config: Any) -> None:
        self.definition: Definition = describe(Head, config)[0]

    def head(self, head: Tree, hidden: jax.Array, labels: jax.Array, weight: jax.Array) -> tuple[jax.Array, jax.Array]:
        """See `Objective.head`."""
        return _loss_and_grad(self.definition, head, hidden, labels, weight)

    def evaluate(self, head: Tree, hidden: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
        """See `Objective.evaluate`."""
        return _loss(self.definition, head, hidden, labels)

    def lowered(self, head: Tree, hidden: Any, labels: Any, weight: Any) -> jax.stages.Lowered:
        """See `Objective.lowered`."""
        return _loss_and_grad.lower(self.definition, head, hidden, labels, weight)


@functools.partial(jax.jit, static_argnames="definition")
def _loss_and_grad(
    definition: Definition, head: Tree, hidden: jax.Array, labels: jax.Array, weight: jax.Array
) -> tuple[jax.Array, jax.Array]:
    return chunked_loss_and_grad(definition.merge(head), hidden, labels, weight)


@functools.partial(jax.jit, static_argnames="definition")
def _loss(definition: Definition, head: Tree, hidden: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    return chunked_loss(definition.merge(head), hidden, labels)
