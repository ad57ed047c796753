"""Dropout whose masks depend on a token's number alone, and take few random bits."""

import dataclasses
import math
from typing import Self

import jax
import jax.numpy as jnp

TOLERANCE = 0.02

GOLDEN = 0x9E3779B9  # 2^32 over the golden ratio: multiples of it are spread evenly
MULTIPLIERS = (0x7FEB352D, 0x846CA68B)
"""Of Wellons' `lowbias32`, a mixing function found by search: each bit that goes in changes every bit that comes out half of the time."""


def scrambled(seeds: jax.Array, words: int) -> jax.Array:
    """Seeds [N, 2] → so many random words [N, words], uint32: each a hash of its number, with the seeds mixed in.

    JAX's own generator, which is a cipher, takes four times the instructions, a quarter of what dropout costs on a GPU. It draws the seeds.
    """
    first, second = seeds[:, :1], seeds[:, 1:]
    x = jnp.arange(words, dtype=jnp.uint32)[None] * jnp.uint32(GOLDEN) + first
    x = (x ^ (x >> 16)) * jnp.uint32(MULTIPLIERS[0]) ^ second
    x = (x ^ (x >> 15)) * jnp.uint32(MULTIPLIERS[1])
    return x ^ (x >> 16)


@dataclasses.dataclass(frozen=True)
class Dropout:
    """Sets values to zero where a random integer of so many `bits` is below `threshold`, and divides the others by their share."""

    bits: int
    threshold: int

    @classmethod
    def of(cls, rate: float) -> Self | None:
        """For values to be zero with probability `rate`; None for a rate of 0.

        Eight bits if the nearest of 256 rates is within 2 % of the one asked for, as 26/256 is of 0.1, and 16 or 32 otherwise. The division
        is by the share that is really left, so that the expectation is right.
        """
        if rate == 0:
            return None
        for bits in (8, 16):
            threshold = round(rate * 2**bits)
            if abs(threshold / 2**bits - rate) <= TOLERANCE * min(rate, 1 - rate):
                return cls(bits, threshold)
        return cls(32, min(max(round(rate * 2**32), 1), 2**32 - 1))

    @property
    def share(self) -> float:
        """Of the values that are left."""
        return 1 - self.threshold / 2**self.bits

    def draw(self, shape: tuple[int, ...], key: jax.Array, first: jax.Array | int) -> jax.Array:
        """Random integers [N, features] for the tokens from number `first` on.

        Each token's come from its own number: however tokens are cut into chunks, they draw the same.
        """
        tokens, features = math.prod(shape[:-1]), shape[-1]
        words = -(-features * self.bits // 32)
        seeds = jax.vmap(lambda number: jax.random.bits(jax.random.fold_in(key, number), (2,), jnp.uint32))
        drawn = scrambled(seeds(first + jnp.arange(tokens)), words)
        drawn = jax.lax.optimization_barrier(drawn)  # or XLA draws a word for each of its values
        return jax.lax.bitcast_convert_type(drawn, f"uint{self.bits}").reshape(tokens, -1)[:, :features]

    def __call__(self, x: jax.Array, drawn: jax.Array) -> jax.Array:
        """x and what was drawn for it [N, features] → [N, features]."""
        return jnp.where(drawn >= self.threshold, x / self.share, 0).astype(x.dtype)
