"""What dropout draws is as random as it need be; masks, rates and keys are tested with the linears."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.ops.dropout import Dropout, scrambled

TOKENS, WORDS = 512, 1024
SIGMAS = 5.5
"""Of the normal distribution: exceeded once in 26 million draws, and there are some ten thousand."""


@pytest.fixture(scope="module")
def drawn() -> np.ndarray:
    """Bytes [TOKENS, 4 · WORDS], as a layer's dropout draws them."""
    dropout = Dropout(8, 26)
    return np.asarray(jax.jit(lambda key: dropout.draw((TOKENS, 4 * WORDS), key, 0))(jax.random.key(3)))


def deviations(counts: np.ndarray, trials: int, probability: float) -> np.ndarray:
    """How far counts are from what is expected, in standard deviations of the binomial distribution."""
    return (counts - trials * probability) / (trials * probability * (1 - probability)) ** 0.5


def test_every_byte_is_as_frequent(drawn: np.ndarray) -> None:
    counts = np.bincount(drawn.reshape(-1), minlength=256)
    assert np.abs(deviations(counts, drawn.size, 1 / 256)).max() < SIGMAS


@pytest.mark.parametrize("axis", [0, 1])
def test_tokens_and_features_are_dropped_as_often(drawn: np.ndarray, axis: int) -> None:
    """And not more evenly than chance has it."""
    found = deviations((drawn < 26).sum(axis), drawn.shape[axis], 26 / 256)
    assert np.abs(found).max() < SIGMAS
    assert found.std() == pytest.approx(1, abs=5 / (2 * found.size) ** 0.5)


@pytest.mark.parametrize("shift", [(0, 1), (0, 2), (0, 4), (0, 64), (0, 2048), (1, 0), (1, 1), (2, 0), (64, 0), (1, 4)])
def test_neighbours_are_dropped_independently(drawn: np.ndarray, shift: tuple[int, int]) -> None:
    dropped = drawn < 26
    both = dropped & np.roll(dropped, shift, (0, 1))
    assert abs(deviations(both.sum(), both.size, (26 / 256) ** 2)) < SIGMAS


def test_other_keys_draw_otherwise(drawn: np.ndarray) -> None:
    dropout, dropped = Dropout(8, 26), drawn < 26
    for seed in range(4, 8):
        other = np.asarray(dropout.draw(drawn.shape, jax.random.key(seed), 0)) < 26
        assert abs(deviations((dropped & other).sum(), other.size, (26 / 256) ** 2)) < SIGMAS


def test_every_bit_of_a_seed_changes_half_of_the_bits() -> None:
    seeds = np.random.default_rng(0).integers(0, 2**32, (64, 2), np.uint32)
    before = np.asarray(scrambled(jnp.asarray(seeds), 64))
    for part in range(2):
        for bit in range(32):
            other = seeds.copy()
            other[:, part] ^= np.uint32(1 << bit)
            changed = np.bitwise_count(before ^ np.asarray(scrambled(jnp.asarray(other), 64))).sum()
            assert changed / (before.size * 32) == pytest.approx(0.5, abs=0.12), (part, bit)
