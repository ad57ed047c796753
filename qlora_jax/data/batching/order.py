"""The order of an epoch, as a pure function of its number: the same for every way to count processes, batches or resumptions."""

from collections.abc import Sequence

import numpy as np

GROUPED_STEPS = 50
"""Steps among which lines are sorted by length; as in transformers' LengthGroupedSampler."""
GROUPING = 2**32 - 2
SOURCES = 2**32 - 3
"""Beside the seed, so that no two decisions draw the same random numbers."""


class Order:
    """Each epoch's lines.

    Without weights an epoch is a permutation of all lines. With weights it has as many lines, and source i has its share of them:
    its own permutations, laid end to end, go on from one epoch to the next, so no line comes again before all of its source have come.

    Args:
        sizes: lines of each source; the sources lie one after another.
        weights: their shares of an epoch, relative to each other.
        lines_per_step: lines of one optimizer step.
        lengths: [lines], to make steps of lines of about the same length; None not to.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        weights: Sequence[float] | None,
        seed: int,
        lines_per_step: int,
        lengths: np.ndarray | None = None,
    ) -> None:
        self._sizes, self._seed, self._lines_per_step, self._lengths = list(sizes), seed, lines_per_step, lengths
        self._num_lines = sum(self._sizes)
        self._shares = None if weights is None else apportion(self._num_lines, weights)
        self._known: dict[int, np.ndarray] = {}

    def epoch(self, epoch: int) -> np.ndarray:
        """The lines of an epoch in order, [lines] int64."""
        order = self._known.get(epoch)
        if order is None:
            order = self._shuffled(epoch)
            if self._lengths is not None:
                order = self._grouped(order, epoch)
            # A new dictionary each time: two threads may ask.
            self._known = {number: kept for number, kept in self._known.items() if abs(number - epoch) == 1} | {
                epoch: order
            }
        return order

    def _shuffled(self, epoch: int) -> np.ndarray:
        permutation = np.random.default_rng((self._seed, epoch)).permutation(self._num_lines)
        if self._shares is None:
            return permutation
        chosen, start = [], 0
        for source, (size, share) in enumerate(zip(self._sizes, self._shares, strict=True)):
            chosen.append(start + self._of_source(source, size, epoch * share, (epoch + 1) * share))
            start += size
        return np.concatenate(chosen)[permutation]

    def _of_source(self, source: int, size: int, first: int, last: int) -> np.ndarray:
        """Entries first:last of a source's permutations, laid end to end."""
        rounds = range(first // size, -(-last // size))
        laid = [np.random.default_rng((self._seed, SOURCES, source, number)).permutation(size) for number in rounds]
        return np.concatenate([np.array([], np.int64), *laid])[first - rounds.start * size :][: last - first]

    def _grouped(self, order: np.ndarray, epoch: int) -> np.ndarray:
        """Sorted by length within some steps' lines, then cut into steps again, and these shuffled.

        Steps may straddle epochs, so the first cut is where the epoch's first whole step begins.
        """
        assert self._lengths is not None
        step, start = self._lines_per_step, -(epoch * self._num_lines) % self._lines_per_step
        rng = np.random.default_rng((self._seed, GROUPING, epoch))
        steps = [order[:start]] if start else []
        for first in range(start, len(order), step * GROUPED_STEPS):
            some = order[first : first + step * GROUPED_STEPS]
            some = some[np.argsort(-self._lengths[some], kind="stable")]
            cut = [some[i : i + step] for i in range(0, len(some), step)]
            whole = [part for part in cut if len(part) == step]
            steps += [whole[i] for i in rng.permutation(len(whole)).tolist()] + cut[len(whole) :]
        return np.concatenate(steps)


def apportion(total: int, weights: Sequence[float]) -> list[int]:
    """Whole shares of `total`, as near to the weights as can be and at least 1 each where there is enough: largest remainders."""
    exact = np.array(weights, np.float64) / sum(weights) * total
    shares = np.floor(exact).astype(np.int64)
    for index in np.argsort(shares - exact, kind="stable")[: total - int(shares.sum())]:
        shares[index] += 1
    for index in np.flatnonzero(shares == 0)[: total - 1]:
        shares[int(shares.argmax())] -= 1
        shares[index] = 1
    return shares.tolist()
