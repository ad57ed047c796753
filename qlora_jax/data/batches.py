"""Batches as a pure function of the step number, so that the step number is all a resumed run needs to know.

Axes: M micro-batches of an optimizer step, B rows of a micro-batch, T time.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from qlora_jax.data.tokenization import Example
from qlora_jax.errors import InputError

IGNORED_LABEL = -100
LENGTH_MULTIPLE = 32
MAX_LENGTHS = 8
"""Distinct T of one dataset, and so compilations of the step, at most."""


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


class Batches:
    """Training batches: each epoch is a fresh permutation of all rows, and the epochs follow each other without a gap.

    A step takes `micro_batch_size * grad_accum_steps` rows, the same ones whichever way that product is split, and may
    straddle two epochs. Rows past the end of the last epoch are padding: no label, so no part in the loss.
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
    ) -> None:
        """Args as in TrainingSettings: max_steps -1 lets num_epochs, which may be a fraction, decide.

        Raises:
            InputError: there are no examples, or one is longer than max_seq_length.
        """
        _check_examples(examples, max_seq_length)
        self._examples = examples
        self._shape = (grad_accum_steps, micro_batch_size)
        self._seed, self._pad_token_id, self._max_seq_length = seed, pad_token_id, max_seq_length
        rows_per_step = micro_batch_size * grad_accum_steps
        if max_steps > 0:
            self._num_steps, self._num_rows = max_steps, max_steps * rows_per_step
        else:
            # The rounding keeps 0.07 epochs of 100 rows at 7 rows: 0.07 * 100 is a little more than 7.
            self._num_rows = math.ceil(round(num_epochs * len(examples), 6))
            self._num_steps = math.ceil(self._num_rows / rows_per_step)

    def __len__(self) -> int:
        """Optimizer steps."""
        return self._num_steps

    def batch(self, step: int) -> Batch:
        """The rows of optimizer step `step`, counted from 0. Always the same for the same arguments.

        Raises:
            IndexError: there is no such step.
        """
        if not 0 <= step < len(self):
            raise IndexError(f"step {step} of {len(self)}")
        chosen = [self._examples[index] for index in self._row_order(*self._row_range(step))]
        return _fill(chosen, self._shape, self._pad_token_id, self._max_seq_length)

    def rows(self, step: int) -> list[list[str]]:
        """For each micro-batch of a step the places of its rows in the data; the padding after the last epoch has none."""
        micro_batches, rows = self._shape
        chosen = [self._examples[index].where for index in self._row_order(*self._row_range(step))]
        return [chosen[m * rows : (m + 1) * rows] for m in range(micro_batches)]

    def state(self, step: int) -> dict[str, int]:
        """A small value, fit for JSON, from which `restore` goes on after `step` steps: the epoch, and the rows of it that are seen."""
        epoch, row = divmod(self._row_range(step)[0], len(self._examples))
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
        digest = hashlib.sha256()
        for example in self._examples:
            digest.update(len(example.input_ids).to_bytes(8, "little"))
            digest.update(np.ascontiguousarray(example.input_ids, np.int32).data)
            digest.update(np.packbits(example.loss_mask).data)
        return digest.hexdigest()

    def epoch(self, step: int) -> float:
        """Epochs seen once `step` steps are done: 0.0 before the first, num_epochs after the last."""
        return min(step * math.prod(self._shape), self._num_rows) / len(self._examples)

    def _row_range(self, step: int) -> tuple[int, int]:
        """A step's first row and the one after its last, counted through all epochs."""
        first = step * math.prod(self._shape)
        return first, max(first, min(first + math.prod(self._shape), self._num_rows))

    def _row_order(self, first: int, last: int) -> list[int]:
        """Entries first:last of the epochs' permutations, laid end to end."""
        num_examples, order = len(self._examples), []
        for epoch in range(first // num_examples, math.ceil(last / num_examples)):
            permutation = np.random.default_rng((self._seed, epoch)).permutation(num_examples)
            start = epoch * num_examples
            order.extend(permutation[max(first - start, 0) : last - start].tolist())
        return order


def eval_batches(examples: Sequence[Example], batch_size: int, pad_token_id: int, max_seq_length: int) -> list[Batch]:
    """All rows once, in their own order, as batches of one micro-batch (M = 1); the last is filled with padding rows.

    Raises:
        InputError: there are no examples, or one is longer than max_seq_length.
    """
    _check_examples(examples, max_seq_length)
    firsts = range(0, len(examples), batch_size)
    return [_fill(examples[i : i + batch_size], (1, batch_size), pad_token_id, max_seq_length) for i in firsts]


def _check_examples(examples: Sequence[Example], max_seq_length: int) -> None:
    if not examples:
        raise InputError("the dataset", found="no examples", expected="at least one")
    longest = max(examples, key=lambda example: len(example.input_ids))
    if len(longest.input_ids) > max_seq_length:
        found = f"{len(longest.input_ids)} tokens"
        raise InputError(longest.where, found=found, expected=f"at most max_seq_length={max_seq_length}")


def _fill(examples: Sequence[Example], shape: tuple[int, int], pad_token_id: int, max_seq_length: int) -> Batch:
    """Lay examples out row by row; what is left of the shape is padding."""
    longest = max(len(example.input_ids) for example in examples)
    bucket = length_bucket(max_seq_length)
    limit = LENGTH_MULTIPLE * math.ceil(max_seq_length / LENGTH_MULTIPLE)
    length = min(bucket * math.ceil(longest / bucket), limit)
    input_ids = np.full((math.prod(shape), length), pad_token_id, np.int32)
    labels = np.full_like(input_ids, IGNORED_LABEL)
    for row, example in enumerate(examples):
        here = slice(0, len(example.input_ids))
        input_ids[row, here] = example.input_ids
        labels[row, here] = np.where(example.loss_mask, example.input_ids, IGNORED_LABEL)
    num_tokens = int((labels[:, 1:] != IGNORED_LABEL).sum())
    num_input_tokens = sum(len(example.input_ids) for example in examples)
    return Batch(input_ids.reshape(*shape, length), labels.reshape(*shape, length), num_tokens, num_input_tokens)
