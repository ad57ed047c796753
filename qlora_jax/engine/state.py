"""What a step is made of besides its batch: frozen weights, adapters, their gradients, and who watches."""

import dataclasses
import functools
from collections.abc import Callable

import jax

from qlora_jax.runtime.placement import LayerStore, Tree

Adapters = list[Tree]
"""One tree a layer: {"q_proj": {"adapter": {"lora_a": [R, in], "lora_b": [out, R]}}, ...}, of `lora.dtype`, on the device or the host."""

Observer = Callable[[str, Tree], None]
"""Given a place, in words, and the values there: [B, T, D] of each micro-batch, and others."""


def ignore(place: str, values: Tree) -> None:
    """The observer that sees nothing."""


@dataclasses.dataclass(frozen=True)
class Weights:
    """The frozen base model: plain trees, as `Engine.abstract` describes them."""

    embedding: Tree
    layers: LayerStore
    head: Tree


@functools.partial(jax.tree_util.register_dataclass, data_fields=["layers", "square_sums"], meta_fields=[])
@dataclasses.dataclass
class Gradients:
    """Of the adapters, where the adapters live. A layer's is finished, and measured, while it is on the device."""

    layers: Adapters
    square_sums: list[jax.Array]  # of each layer, float32 scalars; not finite if anything in the layer is not
