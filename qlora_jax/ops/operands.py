"""Records that operations, their kernels and their twins take: what belongs together comes as one argument."""

from typing import Any, NamedTuple

import jax


class Rotation(NamedTuple):
    """Rotary embedding's angles of N tokens for heads of P features, of which (i, i + P/2) are a pair."""

    cos: jax.Array  # [N, P/2] float32
    sin: jax.Array

    @property
    def inverse(self) -> "Rotation":
        """The other way round."""
        return Rotation(self.cos, -self.sin)


class Gated(NamedTuple):
    """The two products of a gated MLP (SwiGLU, GeGLU), and their adapters' terms: gate + factors[0] · u[:, firsts[0]:]·gate_vᵀ, and so
    for up."""

    gate: jax.Array  # [tokens, features]
    up: jax.Array  # [tokens, features]
    u: jax.Array  # [tokens, R']
    gate_v: jax.Array  # [features, R]
    up_v: jax.Array  # [features, R]
    factors: tuple[float, float]
    firsts: tuple[int, int]
    activation: str = "silu"
    """What the gate goes through, see `twins.ACTIVATIONS`."""

    @property
    def halves(self) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """(base, v, factor, first) of the gate and of what it lets through."""
        return tuple(zip((self.gate, self.up), (self.gate_v, self.up_v), self.factors, self.firsts, strict=True))


class Adam(NamedTuple):
    """What is constant about AdamW."""

    beta1: float
    beta2: float
    epsilon: float
    weight_decay: float
