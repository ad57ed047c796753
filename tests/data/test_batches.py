"""Batches: the same rows whichever way a step is split, each epoch every row once, few shapes, no labels in padding."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_jax.base.errors import InputError
from qlora_jax.data import IGNORED_LABEL, Batch, Batches, Example, eval_batches, length_bucket

PAD = 0
MAX = 200


def make_examples(lengths: list[int]) -> list[Example]:
    """Row i holds the id i + 1 only, and supervises a part of it that depends on i."""
    return [
        Example(np.full(n, i + 1, np.int32), np.arange(n) >= min(i % 3, n - 1), f"f:{i + 1}")
        for i, n in enumerate(lengths)
    ]


def make_batches(examples: list[Example], split: tuple[int, int] = (4, 2), **kwargs: object) -> Batches:
    size, steps = split
    defaults = {"seed": 0, "pad_token_id": PAD, "max_seq_length": MAX}
    return Batches(examples, micro_batch_size=size, grad_accum_steps=steps, **(defaults | kwargs))


def rows_of(batch: Batch) -> list[int]:
    """The rows of a batch in order; 0 for a padding row."""
    return batch.input_ids[..., 0].ravel().tolist()


lengths_strategy = st.lists(st.integers(2, MAX), min_size=1, max_size=30)


@settings(max_examples=40, deadline=None)
@given(lengths=lengths_strategy, seed=st.integers(0, 2**32), epochs=st.integers(1, 3))
def test_the_split_of_a_step_changes_nothing(lengths: list[int], seed: int, epochs: int) -> None:
    examples = make_examples(lengths)
    splits = [make_batches(examples, split, seed=seed, num_epochs=epochs) for split in ((1, 8), (2, 4), (4, 2), (8, 1))]
    assert len({len(batches) for batches in splits}) == 1
    for step in range(len(splits[0])):
        steps = [batches.batch(step) for batches in splits]
        assert len({(tuple(rows_of(batch)), batch.num_tokens) for batch in steps}) == 1
        flat = [batch.labels.reshape(8, -1) for batch in steps]
        assert all(np.array_equal(flat[0], other) for other in flat)


@settings(max_examples=40, deadline=None)
@given(lengths=lengths_strategy, seed=st.integers(0, 2**32), epochs=st.integers(1, 3))
def test_each_epoch_visits_each_row_once(lengths: list[int], seed: int, epochs: int) -> None:
    batches = make_batches(make_examples(lengths), seed=seed, num_epochs=epochs)
    order = [row for step in range(len(batches)) for row in rows_of(batches.batch(step))]
    num_rows = len(lengths) * epochs
    assert set(order[num_rows:]) <= {PAD}
    assert len(order) - num_rows < 8
    for epoch in range(epochs):
        assert sorted(order[epoch * len(lengths) : (epoch + 1) * len(lengths)]) == list(range(1, len(lengths) + 1))


@settings(max_examples=40, deadline=None)
@given(lengths=lengths_strategy)
def test_labels_tokens_and_padding(lengths: list[int]) -> None:
    examples = make_examples(lengths)
    batches = make_batches(examples)
    for step in range(len(batches)):
        batch = batches.batch(step)
        assert batch.input_ids.dtype == batch.labels.dtype == np.int32
        assert batch.input_ids.shape == batch.labels.shape == (2, 4, batch.labels.shape[2])
        assert batch.num_tokens == (batch.labels[..., 1:] != IGNORED_LABEL).sum() > 0
        pairs = zip(batch.input_ids.reshape(8, -1), batch.labels.reshape(8, -1), strict=True)
        for row, (ids, labels) in zip(rows_of(batch), pairs, strict=True):
            length = len(examples[row - 1].input_ids) if row else 0
            mask = examples[row - 1].loss_mask if row else np.array([], bool)
            assert (ids[:length] == row).all()
            assert (ids[length:] == PAD).all()
            assert np.array_equal(labels[:length], np.where(mask, ids[:length], IGNORED_LABEL))
            assert (labels[length:] == IGNORED_LABEL).all()


def test_pad_equal_to_a_token_hides_no_label() -> None:
    eos = 7
    example = Example(np.array([3, 4, eos], np.int32), np.array([False, True, True]), "f:1")
    batch = make_batches([example], (2, 1), pad_token_id=eos).batch(0)
    assert batch.labels[0, 0, :4].tolist() == [IGNORED_LABEL, 4, eos, IGNORED_LABEL]
    assert (batch.labels[0, 1] == IGNORED_LABEL).all()
    assert batch.num_tokens == 2


def test_order_depends_on_seed_and_epoch_only() -> None:
    examples = make_examples([5] * 16)
    orders = {
        seed: [rows_of(make_batches(examples, seed=seed, num_epochs=2).batch(step)) for step in range(4)]
        for seed in (0, 1)
    }
    again = make_batches(examples, seed=0, num_epochs=2)
    assert [rows_of(again.batch(step)) for step in (3, 2, 1, 0)] == orders[0][::-1]
    assert orders[0] != orders[1]
    assert orders[0][:2] != orders[0][2:]
    longer = make_batches(examples, seed=0, max_steps=9)
    assert [rows_of(longer.batch(step)) for step in range(4)] == orders[0]


def test_number_of_steps_and_epochs() -> None:
    examples = make_examples([5] * 30)
    whole = make_batches(examples, num_epochs=2)
    assert len(whole) == 8
    assert whole.epoch(0) == 0
    assert whole.epoch(3) == 24 / 30
    assert whole.epoch(8) == 2
    part = make_batches(make_examples([5] * 100), num_epochs=0.07)
    assert len(part) == 1
    assert part.epoch(1) == 0.07
    assert rows_of(part.batch(0))[7:] == [PAD]
    steps = make_batches(examples, num_epochs=2, max_steps=5)
    assert len(steps) == 5
    assert steps.epoch(5) == 40 / 30
    assert Counter(row for step in range(5) for row in rows_of(steps.batch(step))).most_common()[-1][1] == 1
    few = make_batches(examples[:3], max_steps=2)
    assert sorted(rows_of(few.batch(0)) + rows_of(few.batch(1))[:7]) == [1] * 5 + [2] * 5 + [3] * 5  # five epochs
    for step in (-1, 8):
        with pytest.raises(IndexError):
            whole.batch(step)


@pytest.mark.parametrize("max_seq_length", [1, 31, 32, 33, 63, 64, 65, 512, 513, 600, 1024, 2048, 4095, 4096])
def test_at_most_eight_lengths(max_seq_length: int) -> None:
    lengths = set()
    for length in (*range(1, max_seq_length, 7), max_seq_length):
        (example,) = make_examples([length])
        size = make_batches([example], (1, 1), max_seq_length=max_seq_length).batch(0).input_ids.shape[2]
        assert length <= size < max_seq_length + 32
        assert size % 32 == 0
        assert size - length < length_bucket(max_seq_length)
        lengths.add(size)
    assert len(lengths) <= 8


def test_eval_batches_hold_each_row_once_in_order() -> None:
    examples = make_examples([5, 70, 9, 3, 8])
    batches = eval_batches(examples, 2, PAD, MAX)
    assert [rows_of(batch) for batch in batches] == [[1, 2], [3, 4], [5, PAD]]
    assert [batch.input_ids.shape for batch in batches] == [(1, 2, 96), (1, 2, 32), (1, 2, 32)]
    assert sum(batch.num_tokens for batch in batches) == sum(int(example.loss_mask[1:].sum()) for example in examples)


def test_refusals() -> None:
    with pytest.raises(InputError, match="no examples"):
        make_batches([])
    with pytest.raises(InputError, match=r"f:2\n.*201 tokens\n.*at most max_seq_length=200"):
        eval_batches(make_examples([3, 201]), 2, PAD, MAX)
