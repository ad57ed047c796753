"""Batches as a pure function of the step number, so that the step number is all a resumed run needs to know.

Axes: M micro-batches of an optimizer step, B rows of a micro-batch, T time.
"""

import collections
import hashlib
import math
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain

import numpy as np

from qlora_jax.base.errors import InputError
from qlora_jax.data.batching.order import Order
from qlora_jax.data.batching.packing import Lines, join, one_a_line, pack
from qlora_jax.data.tokens.tokenization import Example, example_hash

IGNORED_LABEL = -100
PACKING = 2**32 - 1
"""Beside the seed in random numbers that decide what is packed with what."""
LENGTH_MULTIPLE = 32
MAX_LENGTHS = 8
"""Distinct T of one dataset, and so compilations of the step, at most."""
AHEAD = 3
"""Batches made before they are asked for: one that takes longer than a step is made up for by those that do not."""


@dataclass(frozen=True)
class Batch:
    """The rows of one optimizer step, padded on the right."""

    input_ids: np.ndarray
    """[M, B, T] int32."""
    labels: np.ndarray
    """[M, B, T] int32: the input id where it is supervised, else IGNORED_LABEL. Not shifted: the loss does that."""
    num_tokens: int
    """Labels that count in the loss, over the whole step: (labels[..., 1:] != IGNORED_LABEL).sum()."""
    num_input_tokens: int
    """Tokens of the rows, supervised or not, without the padding."""
    positions: np.ndarray | None = None
    """[M, B, T] int32: each token's place in its own row, where several rows are packed into one; None where none are."""
    segment_ids: np.ndarray | None = None
    """[M, B, T] int32: equal for the tokens of one row, which attend to each other only. Given exactly when `positions` are."""


def length_bucket(max_seq_length: int) -> int:
    """T is a multiple of this: an eighth of max_seq_length, rounded up to a multiple of 32."""
    return LENGTH_MULTIPLE * math.ceil(max_seq_length / (MAX_LENGTHS * LENGTH_MULTIPLE))


@dataclass(frozen=True)
class Mix:
    """Several sources in one dataset."""

    sizes: Sequence[int]
    """Rows of each source; the sources lie one after another."""
    weights: Sequence[float] | None = None
    """Their shares of an epoch; None: all rows of all sources."""


class Batches:
    """Training batches: each epoch is a fresh permutation of all rows, and the epochs follow each other without a gap.

    A step takes `micro_batch_size * grad_accum_steps` lines, the same ones whichever way that product is split, and may straddle two
    epochs. A line is a row or, with packing, several. Lines past the end of the last epoch are padding: no label, so no part in the
    loss. The step number is all the state there is.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        *,
        micro_batch_size: int,
        grad_accum_steps: int,
        seed: int,
        pad_token_id: int,
        max_seq_length: int,
        num_epochs: float = 1.0,
        max_steps: int = -1,
        packing: bool = False,
        group_by_length: bool = False,
        mix: Mix | None = None,
    ) -> None:
        """Args as in TrainingSettings: max_steps -1 lets num_epochs, which may be a fraction, decide.

        Raises:
            InputError: there are no examples, or one is longer than max_seq_length.
        """
        row_lengths = lengths_of(examples)
        _check_examples(examples, row_lengths, max_seq_length)
        mix = mix or Mix([len(examples)])
        self._examples = examples
        self._shape = (grad_accum_steps, micro_batch_size)
        self._padding = _Padding(pad_token_id, max_seq_length, packing)
        self._lines, sizes = _lay_out(row_lengths, mix.sizes, max_seq_length if packing else None, seed)
        self._line_lengths = self._lines.lengths(row_lengths)
        self._order = Order(
            sizes, mix.weights, seed, math.prod(self._shape), self._line_lengths if group_by_length else None
        )
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._ahead: collections.deque[tuple[int, Future[Batch]]] = collections.deque()
        lines_per_step = math.prod(self._shape)
        if max_steps > 0:
            self._num_steps, self._num_lines = max_steps, max_steps * lines_per_step
        else:
            # The rounding keeps 0.07 epochs of 100 rows at 7 rows: 0.07 * 100 is a little more than 7.
            self._num_lines = math.ceil(round(num_epochs * len(self._lines), 6))
            self._num_steps = math.ceil(self._num_lines / lines_per_step)

    def __len__(self) -> int:
        """Optimizer steps."""
        return self._num_steps

    @property
    def longest(self) -> int:
        """T of the step with the longest line, its padding included."""
        return self._padding.length(int(self._line_lengths.max()))

    @property
    def lines_per_epoch(self) -> int:
        """Rows, or lines of packed rows, in an epoch."""
        return len(self._lines)

    def batch(self, step: int) -> Batch:
        """The rows of optimizer step `step`, counted from 0. Always the same for the same arguments.

        While the caller trains on it the next `AHEAD` are laid out by a thread, so that a batch of many rows, a new epoch's order or a
        slow disk keeps no step waiting.

        Raises:
            IndexError: there is no such step.
        """
        if not 0 <= step < len(self):
            raise IndexError(f"step {step} of {len(self)}")
        ahead = self._ahead
        while ahead and ahead[0][0] != step:
            ahead.popleft()[1].cancel()
        batch = ahead.popleft()[1].result() if ahead else self._make(step)
        for later in range(step + 1 + len(ahead), min(step + 1 + AHEAD, len(self))):
            ahead.append((later, self._thread.submit(self._make, later)))
        return batch

    def _make(self, step: int) -> Batch:
        lines = [[self._examples[row] for row in self._lines[line].tolist()] for line in self._chosen(step)]
        return self._padding.fill(lines, self._shape)

    def rows(self, step: int) -> list[list[str]]:
        """For each micro-batch of a step the places of its rows in the data; the padding after the last epoch has none."""
        micro_batches, size = self._shape
        lines = [[self._examples[row].where for row in self._lines[line].tolist()] for line in self._chosen(step)]
        return [list(chain.from_iterable(lines[m * size : (m + 1) * size])) for m in range(micro_batches)]

    def state(self, step: int) -> dict[str, int]:
        """A small value, fit for JSON, from which `restore` goes on after `step` steps: the epoch, and the rows (or packed lines)
        of it that are seen."""
        epoch, row = divmod(self._line_range(step)[0], len(self._lines))
        return {"epoch": epoch, "row": row}

    def restore(self, step: int, state: dict[str, int]) -> None:
        """Go on after `step` steps. There is nothing to do but to see that this is the place.

        Raises:
            InputError: `state` is another place.
        """
        if state != self.state(step):
            raise InputError(
                "the data", found=f"step {step} begins at {self.state(step)}", expected=f"at {state}, where it was left"
            )

    def fingerprint(self) -> str:
        """SHA-256 of all rows' tokens and masks, in hexadecimal: the same data and tokenization have the same."""
        return hashlib.sha256(hashes_of(self._examples).tobytes()).hexdigest()

    def epoch(self, step: int) -> float:
        """Epochs seen once `step` steps are done: 0.0 before the first, num_epochs after the last."""
        return min(step * math.prod(self._shape), self._num_lines) / len(self._lines)

    def padding_share(self) -> float:
        """The share of the first epoch's tokens, as the device sees them, that is padding."""
        lines_per_step = math.prod(self._shape)
        lengths = self._line_lengths[self._order.epoch(0)]
        longest = np.maximum.reduceat(lengths, np.arange(0, len(lengths), lines_per_step))
        seen = sum(self._padding.length(length) for length in longest.tolist()) * lines_per_step
        return 1 - int(lengths.sum()) / seen

    def _line_range(self, step: int) -> tuple[int, int]:
        """A step's first line and the one after its last, counted through all epochs."""
        first = step * math.prod(self._shape)
        return first, max(first, min(first + math.prod(self._shape), self._num_lines))

    def _chosen(self, step: int) -> list[int]:
        """The lines of a step: a part of the epochs' orders, laid end to end."""
        first, last = self._line_range(step)
        num_lines, chosen = len(self._lines), []
        for epoch in range(first // num_lines, math.ceil(last / num_lines)):
            start = epoch * num_lines
            chosen.extend(self._order.epoch(epoch)[max(first - start, 0) : last - start].tolist())
        return chosen


def eval_batches(
    examples: Sequence[Example], batch_size: int, pad_token_id: int, max_seq_length: int, *, packing: bool = False
) -> list[Batch]:
    """All rows once, in their own order unless they are packed, as batches of one micro-batch (M = 1); the last is filled up.

    Raises:
        InputError: there are no examples, or one is longer than max_seq_length.
    """
    row_lengths = lengths_of(examples)
    _check_examples(examples, row_lengths, max_seq_length)
    lines, _ = _lay_out(row_lengths, [len(examples)], max_seq_length if packing else None, seed=0)
    padding = _Padding(pad_token_id, max_seq_length, packing)
    return [
        padding.fill(
            [
                [examples[row] for row in lines[line].tolist()]
                for line in range(first, min(first + batch_size, len(lines)))
            ],
            (1, batch_size),
        )
        for first in range(0, len(lines), batch_size)
    ]


def lengths_of(examples: Sequence[Example]) -> np.ndarray:
    """Tokens of each example, [N] int64; of a store without reading its tokens."""
    known = getattr(examples, "lengths", None)
    return np.array([len(example.input_ids) for example in examples], np.int64) if known is None else known


def hashes_of(examples: Sequence[Example]) -> np.ndarray:
    """A hash of each example's tokens and mask, [N] uint64; of a store without reading its tokens."""
    known = getattr(examples, "hashes", None)
    return np.array([example_hash(example) for example in examples], np.uint64) if known is None else known


def _lay_out(row_lengths: np.ndarray, sizes: Sequence[int], capacity: int | None, seed: int) -> tuple[Lines, list[int]]:
    """Lines, and how many of them are each source's: no line holds rows of two, so that weights can count lines."""
    if capacity is None:
        return one_a_line(len(row_lengths)), list(sizes)
    packed, start = [], 0
    for source, size in enumerate(sizes):
        packed.append(pack(row_lengths[start : start + size], capacity, np.random.default_rng((seed, PACKING, source))))
        start += size
    return join(packed), [len(lines) for lines in packed]


def _check_examples(examples: Sequence[Example], lengths: np.ndarray, max_seq_length: int) -> None:
    if not len(examples):
        raise InputError("the dataset", found="no examples", expected="at least one")
    longest = int(lengths.argmax())
    if lengths[longest] > max_seq_length:
        found = f"{lengths[longest]} tokens"
        raise InputError(examples[longest].where, found=found, expected=f"at most max_seq_length={max_seq_length}")


@dataclass(frozen=True)
class _Padding:
    """How lines become rectangles."""

    pad_token_id: int
    max_seq_length: int
    packing: bool

    def length(self, longest: int) -> int:
        """T for lines of up to `longest` tokens: one of at most eight values, or always the same one with packing."""
        limit = LENGTH_MULTIPLE * math.ceil(self.max_seq_length / LENGTH_MULTIPLE)
        bucket = length_bucket(self.max_seq_length)
        return limit if self.packing else min(bucket * math.ceil(longest / bucket), limit)

    def fill(self, lines: Sequence[Sequence[Example]], shape: tuple[int, int]) -> Batch:
        """Lay examples out line by line; what is left of the shape is padding."""
        length = self.length(max(sum(len(example.input_ids) for example in line) for line in lines))
        input_ids = np.full((math.prod(shape), length), self.pad_token_id, np.int32)
        labels = np.full_like(input_ids, IGNORED_LABEL)
        positions, segment_ids = np.zeros_like(input_ids), np.zeros_like(input_ids)
        num_input_tokens = 0
        for number, line in enumerate(lines):
            start = 0
            for segment, example in enumerate(line, start=1):
                here = np.s_[number, start : start + len(example.input_ids)]
                input_ids[here] = example.input_ids
                labels[here] = np.where(example.loss_mask, example.input_ids, IGNORED_LABEL)
                positions[here], segment_ids[here] = np.arange(len(example.input_ids)), segment
                start += len(example.input_ids)
            num_input_tokens += start
        num_tokens = int((labels[:, 1:] != IGNORED_LABEL).sum())
        ids, targets, places, segments = (
            array.reshape(*shape, length) for array in (input_ids, labels, positions, segment_ids)
        )
        packing = (places, segments) if self.packing else (None, None)
        return Batch(ids, targets, num_tokens, num_input_tokens, *packing)
