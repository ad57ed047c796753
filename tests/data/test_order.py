"""Which rows make a step: packing without waste, epochs by weight, steps of one length; all of it from the seed and a number."""

import threading
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_jax.data import Batches, Example, Mix
from qlora_jax.data.batching.batches import AHEAD
from qlora_jax.data.batching.order import Order, apportion
from qlora_jax.data.batching.packing import join, one_a_line, pack


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(1, 50), min_size=1, max_size=60), seed=st.integers(0, 9))
def test_packing_puts_every_row_in_one_line_that_holds_it(lengths: list[int], seed: int) -> None:
    array = np.array(lengths)
    lines = pack(array, 50, rng(seed))
    assert sorted(lines.flat.tolist()) == list(range(len(lengths)))
    filled = lines.lengths(array)
    assert filled.max() <= 50
    assert filled.tolist() == [sum(lengths[row] for row in lines[i]) for i in range(len(lines))]
    best_possible = -(-sum(lengths) // 50)
    assert len(lines) <= 11 / 9 * max(best_possible, sum(length > 25 for length in lengths)) + 4
    again = pack(array, 50, rng(seed))
    assert np.array_equal(again.flat, lines.flat) and np.array_equal(again.starts, lines.starts)


def slow_best_fit(lengths: np.ndarray, capacity: int) -> list[int]:
    """The plain words: each row, the longest first, where the least room is left after it."""
    left: list[int] = []
    for length in sorted(lengths.tolist(), reverse=True):
        fits = [space for space in left if space >= length]
        if fits:
            left[left.index(min(fits))] -= length
        else:
            left.append(capacity - length)
    return sorted(left)


@settings(max_examples=40, deadline=None)
@given(lengths=st.lists(st.integers(1, 64), min_size=1, max_size=80))
def test_packing_is_best_fit(lengths: list[int]) -> None:
    array = np.array(lengths)
    assert sorted(64 - pack(array, 64, rng()).lengths(array)) == slow_best_fit(array, 64)


@pytest.mark.parametrize("capacity", [2048, 4096])
def test_packing_wastes_little_on_lengths_like_sharegpts(capacity: int) -> None:
    """Log-normal with the median and deviation of ShareGPT V3's conversations, cut at the capacity, as long rows are."""
    lengths = np.clip(rng().lognormal(np.log(900), 1.2, 20_000).astype(int), 8, capacity)
    lines = pack(lengths, capacity, rng())
    assert lengths.sum() / (len(lines) * capacity) >= 0.97


def test_lines_of_several_groups() -> None:
    lengths = np.array([3, 4, 5, 6, 7])
    lines = join([pack(lengths[:2], 10, rng()), one_a_line(1), pack(lengths[3:], 10, rng())])
    assert sorted(lines.flat.tolist()) == [0, 1, 2, 3, 4]
    assert [sorted(lines[i].tolist()) for i in range(len(lines))][:2] == [[0, 1], [2]]
    assert lines.lengths(lengths).sum() == 25


@pytest.mark.parametrize(
    ("total", "weights", "shares"),
    [(10, [1, 1], [5, 5]), (10, [1, 2], [3, 7]), (7, [1, 1, 1], [3, 2, 2]), (10, [1e-9, 1], [1, 9]), (100, [0.5, 0.3, 0.2], [50, 30, 20])],
)  # fmt: skip
def test_apportion(total: int, weights: list[float], shares: list[int]) -> None:
    assert apportion(total, weights) == shares


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 20), min_size=1, max_size=4),
    data=st.data(),
    seed=st.integers(0, 99),
    step=st.integers(1, 6),
)
def test_weighted_epochs(sizes: list[int], data: st.DataObject, seed: int, step: int) -> None:
    weights = data.draw(st.lists(st.floats(0.1, 10), min_size=len(sizes), max_size=len(sizes)))
    order = Order(sizes, weights, seed, step)
    shares = apportion(sum(sizes), weights)
    source_of = np.repeat(np.arange(len(sizes)), sizes)
    seen: Counter[int] = Counter()
    for epoch in range(4):
        lines = order.epoch(epoch)
        assert [int((source_of[lines] == i).sum()) for i in range(len(sizes))] == shares
        seen.update(lines.tolist())
    for source in range(len(sizes)):  # no line a second time more often than another of its source
        counts = [seen[line] for line in np.flatnonzero(source_of == source).tolist()]
        assert max(counts) - min(counts) <= 1
    again = Order(sizes, weights, seed, step)
    assert np.array_equal(again.epoch(3), order.epoch(3))  # of its number alone


@settings(max_examples=40, deadline=None)
@given(lengths=st.lists(st.integers(1, 99), min_size=1, max_size=80), step=st.integers(1, 8), epoch=st.integers(0, 3))
def test_grouped_epochs_are_permutations(lengths: list[int], step: int, epoch: int) -> None:
    order = Order([len(lengths)], None, 3, step, np.array(lengths))
    assert sorted(order.epoch(epoch).tolist()) == list(range(len(lengths)))


def make(lengths: np.ndarray, **options: object) -> Batches:
    examples = [Example(np.full(n, i, np.int32), np.arange(n) > 0, f"f:{i}") for i, n in enumerate(lengths.tolist())]
    defaults = {"micro_batch_size": 4, "grad_accum_steps": 2, "seed": 0, "pad_token_id": 0, "max_seq_length": 512}
    return Batches(examples, **(defaults | options))


def test_grouping_by_length_wastes_less_and_packing_less_still() -> None:
    lengths = rng().integers(2, 513, 603)
    kinds = {"plain": {}, "grouped": {"group_by_length": True}, "packed": {"packing": True}}
    waste = {}
    for name, options in kinds.items():
        batches = make(lengths, **options)
        waste[name] = batches.padding_share()
        shapes = [batches.batch(step).input_ids.shape for step in range(len(batches))]
        seen = sum(int(np.prod(shape)) for shape in shapes)
        assert waste[name] == pytest.approx(1 - lengths.sum() / seen)  # what is foretold is what comes
        assert len(set(shapes)) <= 8
        tokens = sum(batches.batch(step).num_input_tokens for step in range(len(batches)))
        assert tokens == lengths.sum()
    assert waste["plain"] > 0.4 > 0.15 > waste["grouped"] > waste["packed"]
    assert waste["packed"] < 0.03 + 7 * 512 / seen  # the last step's empty lines


def test_steps_of_one_length_in_later_epochs_too() -> None:
    """603 lines in steps of 8: every epoch begins within a step, and the steps after it are whole again."""
    lengths = rng().integers(2, 513, 603)
    batches = make(lengths, group_by_length=True, num_epochs=3)
    for epoch in range(3):
        first, last = -(-epoch * 603 // 8), (epoch + 1) * 603 // 8
        spreads = []
        for step in range(first, last):
            ids = batches.batch(step).input_ids.reshape(8, -1)[:, 0]
            spreads.append(int(np.ptp(lengths[ids])))
        assert np.median(spreads) < 20


def test_the_next_batches_are_made_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    batches = make(rng().integers(2, 513, 97), num_epochs=2)
    made: list[tuple[int, str]] = []
    real = batches._make
    monkeypatch.setattr(
        batches, "_make", lambda step: made.append((step, threading.current_thread().name)) or real(step)
    )
    for step in (0, 1, 2, 7, 8, 7, len(batches) - 1):
        batches.batch(step)
    batches._thread.shutdown()
    here = [step for step, name in made if name == threading.current_thread().name]
    assert here == [0, 7, 7, len(batches) - 1]  # all others were there when they were asked for
    elsewhere = {step for step, name in made if name != threading.current_thread().name}
    assert (
        {1, 2, 8} <= elsewhere <= {*range(1, 3 + AHEAD), *range(8, 9 + AHEAD)}
    )  # what nobody asks for may be left out


def test_a_step_is_a_function_of_its_number() -> None:
    lengths = rng().integers(2, 513, 97)
    for options in ({}, {"packing": True}, {"group_by_length": True}, {"mix": Mix([40, 57], [1, 3]), "packing": True}):
        forwards, backwards = make(lengths, num_epochs=3, **options), make(lengths, num_epochs=3, **options)
        steps = range(len(forwards))
        expected = {step: forwards.batch(step) for step in steps}
        for step in reversed(steps):
            batch = backwards.batch(step)
            assert np.array_equal(batch.input_ids, expected[step].input_ids)
            assert (batch.segment_ids is None) == ("packing" not in options)
