"""Rows laid end to end into lines of one length: best fit, the longest first, so that hardly anything is left over."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Lines:
    """Lines of a batch and the rows in each: line i holds rows flat[starts[i] : starts[i + 1]]."""

    flat: np.ndarray
    """[rows] int64."""
    starts: np.ndarray
    """[lines + 1] int64."""

    def __len__(self) -> int:
        """Lines."""
        return len(self.starts) - 1

    def __getitem__(self, line: int) -> np.ndarray:
        """The rows of a line, in order, [R] int64."""
        return self.flat[self.starts[line] : self.starts[line + 1]]

    def lengths(self, row_lengths: np.ndarray) -> np.ndarray:
        """Tokens in each line, [lines] int64, of rows that have so many each."""
        return np.add.reduceat(row_lengths[self.flat], self.starts[:-1]) if len(self) else np.array([], np.int64)


def one_a_line(num_rows: int) -> Lines:
    """Every row alone."""
    return Lines(np.arange(num_rows), np.arange(num_rows + 1))


def join(parts: Sequence[Lines]) -> Lines:
    """Lines of several groups of rows that lie one after another, as lines of all of them."""
    first_rows = np.cumsum([0, *(len(part.flat) for part in parts)])
    flat = [part.flat + first for part, first in zip(parts, first_rows[:-1], strict=True)]
    starts = [part.starts[1:] + first for part, first in zip(parts, first_rows[:-1], strict=True)]
    return Lines(np.concatenate(flat), np.concatenate([[0], *starts]))


def pack(lengths: np.ndarray, capacity: int, rng: np.random.Generator) -> Lines:
    """Best fit, decreasing: each row, the longest first, goes where the least room is left after it.

    Linear in the rows: the spaces that some line has left are the bits of one integer, so the smallest that is big enough takes one
    shift to find. Never more than 11/9 of the best possible number of lines and a few (Johnson, 1973), and as good as no waste where
    there are many short rows.

    Args:
        lengths: [rows] int, none above `capacity`.
        rng: decides between rows of equal length.
    """
    shuffled = rng.permutation(len(lengths))
    order = shuffled[np.argsort(-lengths[shuffled], kind="stable")]
    lines: list[list[int]] = []
    having_left: list[list[int]] = [[] for _ in range(capacity + 1)]
    spaces = 0
    for row, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        if big_enough := spaces >> length:
            space = length + (big_enough & -big_enough).bit_length() - 1
            line = having_left[space].pop()
            if not having_left[space]:
                spaces ^= 1 << space
            lines[line].append(row)
        else:
            space, line = capacity, len(lines)
            lines.append([row])
        if space > length:
            having_left[space - length].append(line)
            spaces |= 1 << (space - length)
    starts = np.cumsum([0, *map(len, lines)])
    return Lines(np.array([row for line in lines for row in line], np.int64), starts)
