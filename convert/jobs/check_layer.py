"""A decoder layer for several models side by side: its linears are any function, its norms have a weight for each model.

Axes: M models, T tokens, D hidden, H heads, P head dim, F mlp.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from qlora_jax.config import QuantizationSettings
from qlora_jax.model.architecture import Architecture, Kind
from qlora_jax.model.decoder import DecoderLayer
from qlora_jax.model.linear import FrozenParam
from qlora_jax.model.mlp import Xielu, activated
from qlora_jax.model.norms import make_norm
from qlora_jax.ops import twins
from qlora_jax.ops.operands import Rotation

Part = Callable[[jax.Array], jax.Array]


class SideLayer(DecoderLayer):
    """A decoder layer whose linears are `linear(name, x)`, and whose norms are any functions."""

    linear: Callable[[str, jax.Array], jax.Array]

    def normed(self, name: str | None, h: jax.Array) -> tuple[jax.Array, jax.Array]:
        """As a `DecoderLayer`."""
        return (h if name is None else getattr(self, name)(h)), h

    def project(self, names: Sequence[str], x: jax.Array, key: jax.Array | None, **options: Any) -> list[jax.Array]:
        """As a `DecoderLayer`; its sharing is not for us."""
        if x.ndim == 4:  # heads side by side
            x = x.reshape(*x.shape[:2], -1)
        outputs = [self.linear(name, x) for name in names]
        if (residual := options.get("residual")) is not None:
            outputs[0] += residual
        if (rotation := options.get("rotation")) is not None:
            outputs = [
                _turn(y, rotation) if turned else y for y, turned in zip(outputs, options["rotated"], strict=True)
            ]
        return outputs

    def feed_forward(self, x: jax.Array, residual: jax.Array | None, *unused: Any) -> jax.Array:
        """As a `DecoderLayer`."""
        products = self.project([linear.name for linear in self.config.mlp_inputs], x, None)
        inner = activated(products, self.activation)
        (out,) = self.project([self.config.mlp_output.name], inner, None, residual=residual)
        return out


def abstract_layer(config: Architecture, kind: Kind) -> SideLayer:
    """A decoder layer of a kind, without weights."""
    settings = QuantizationSettings()
    return nnx.eval_shape(lambda: SideLayer(config, None, settings, "xla", nnx.Rngs(0), kind=kind))


def norm(config: Architecture, weights: jax.Array, biases: jax.Array | None = None) -> Part:
    """A norm of x [M, ..., D] with a weight and a bias, as they are in files, for each model: `weights` [M, ...]."""
    norms = dataclasses.replace(config.norms, bias=biases is not None)

    def normed(x: jax.Array) -> jax.Array:
        module = nnx.eval_shape(lambda: make_norm(weights.shape[1:], norms))
        module.weight = FrozenParam(_beside(weights, x) + norms.offset)
        if biases is not None:
            module.bias = FrozenParam(_beside(biases, x))
        return module(x)

    return normed


def _beside(vectors: jax.Array, x: jax.Array) -> jax.Array:
    """Vectors [M, ...] with axes of one, so that they broadcast against x [M, ..., D]."""
    return vectors.reshape(vectors.shape[0], *(1,) * (x.ndim - vectors.ndim), *vectors.shape[1:])


def xielu(numbers: dict[str, jax.Array]) -> Part:
    """The activation function of x [M, ...], with its numbers [M, ...] for each model."""

    def activate(x: jax.Array) -> jax.Array:
        rows = []
        for index, row in enumerate(x):
            module = nnx.eval_shape(Xielu)
            for name, values in numbers.items():
                setattr(module, name, FrozenParam(values[index]))
            rows.append(module(row))
        return jnp.stack(rows)

    return activate


def apart(part: Part, models: int) -> Part:
    """A part of a layer for x [M, T, ...]; of a layer that works on [M · T, ...] at once, in that form."""

    def separately(x: jax.Array) -> jax.Array:
        if x.shape[0] == models and x.ndim > 2:
            return part(x)
        y = part(x.reshape(models, -1, *x.shape[1:]))
        return y.reshape(*x.shape[:-1], -1)

    return separately


def _turn(y: jax.Array, rotation: Rotation) -> jax.Array:
    """y [M, T, heads · P], rotated."""
    return twins.plain_rotate(y.reshape(-1, y.shape[-1]), rotation).reshape(y.shape)
