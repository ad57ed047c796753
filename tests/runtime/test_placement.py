"""The schedule of fetches, the bound on layers in flight, and the stack of layer inputs."""

import threading
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from qlora_jax.runtime import pinned, placement
from qlora_jax.runtime.placement import LayerInputs, LayerStore, fetch, nbytes, one_device


def make_store(depth: int, where: placement.Where) -> LayerStore:
    return LayerStore(({"w": np.full((2, 2), i, np.float32)} for i in range(depth)), where)


def kind(array: jax.Array) -> str | None:
    return array.sharding.memory_kind


def test_each_layer_visits_twice_and_the_layer_at_the_turn_once() -> None:
    store = make_store(4, "host")
    seen = []
    for index, weights in store.walk([0, 1, 2, 3, 3, 2, 1, 0]):
        assert kind(weights["w"]) == "device"
        seen.append((index, float(weights["w"][0, 0]), list(store.fetched)))
    assert [(index, value) for index, value, _ in seen] == [(i, float(i)) for i in (0, 1, 2, 3, 3, 2, 1, 0)]
    assert list(store.fetched) == [0, 1, 2, 3, 2, 1, 0]
    # When a layer is handed out, the copy of the next other one has been issued, and none beyond it.
    assert [fetched[-1] for _, _, fetched in seen] == [1, 2, 3, 2, 2, 1, 0, 0]


def test_resident_layers_are_handed_out_as_they_are() -> None:
    store = make_store(3, "device")
    first, second = ([weights["w"] for _, weights in store.walk(range(3))] for _ in range(2))
    assert all(a is b for a, b in zip(first, second, strict=True))
    assert list(store.fetched) == []


@pytest.mark.parametrize(
    "source", [np.asarray, lambda array: one_device().put(array, "device")], ids=["numpy", "device"]
)
def test_streamed_layers_live_in_host_memory(source: Callable[[np.ndarray], Any]) -> None:
    """numpy's arrays in memory of our own where the GPU's driver registers it; XLA's pool is for all else."""
    store = LayerStore(({"w": source(np.full(2, i, np.float32))} for i in range(2)), "host")
    ours = pinned.client() is not None and source is np.asarray
    for index, layer in enumerate(store._layers):
        assert placement.one_device().lives(layer, "host") and layer["w"].tolist() == [index] * 2
        assert pinned.holds(layer["w"]) if ours else kind(layer["w"]) == "pinned_host"


def test_a_copy_waits_until_old_work_is_done() -> None:
    """With SLOTS layers on the device, layer l + 1 may only arrive once the work on layer l + 1 - SLOTS is done."""

    class Token:
        def __init__(self, index: int) -> None:
            self.index = index

        def block_until_ready(self) -> None:
            waited.append(self.index)

    waited: list[int] = []
    store = make_store(6, "host")
    waits_before_fetch = []
    for index, _ in store.walk(range(6)):
        waits_before_fetch.append(list(waited))
        store.pace.dispatched(Token(index))
    # handing out layer l happens after fetching l + 1, which waited for l - (SLOTS - 1) and everything before it
    assert placement.SLOTS == 3
    assert waits_before_fetch == [[], [], [0], [0, 1], [0, 1, 2], [0, 1, 2]]


def test_resident_layers_among_streamed_ones() -> None:
    """The next streamed layer is on its way while resident ones compute; resident layers are never copied."""
    layers = [{"w": np.full((2, 2), i, np.float32)} for i in range(6)]
    places = placement.spread(2, 6)
    assert places == ["host", "host", "device", "host", "host", "device"]
    store = LayerStore(layers, places)
    seen = [(i, float(w["w"][0, 0]), list(store.fetched)) for i, w in store.walk([*range(6), *reversed(range(6))])]
    assert [(i, value) for i, value, _ in seen] == [(i, float(i)) for i in [*range(6), *reversed(range(6))]]
    assert list(store.fetched) == [0, 1, 3, 4, 3, 1, 0]  # 4, the last streamed one, waits at the turn
    assert [fetched[-1] for _, _, fetched in seen[:6]] == [1, 3, 3, 4, 3, 3]


@pytest.mark.parametrize(("resident", "depth"), [(0, 5), (1, 5), (3, 7), (5, 5), (79, 80)])
def test_spread_is_even(resident: int, depth: int) -> None:
    places = placement.spread(resident, depth)
    assert (len(places), places.count("device")) == (depth, resident)
    gaps = [len(gap) for gap in "".join(place[0] for place in places).split("d")]
    assert max(gaps[: resident or 1]) - min(gaps[: resident or 1]) <= 1


def test_layers_on_disk_are_read_ahead_by_threads() -> None:
    read: list[int] = []
    threads = set()

    def reader(index: int) -> placement.Source:
        def layer() -> placement.Tree:
            read.append(index)
            threads.add(threading.current_thread())
            return {"w": np.full((2, 2), index, np.float32)}

        return layer

    store = LayerStore(map(reader, range(6)), "disk")
    assert read == []
    seen = []
    for index, weights in store.walk(range(6)):
        assert kind(weights["w"]) == "device"
        seen.append((index, float(weights["w"][0, 0])))
    assert seen == [(i, float(i)) for i in range(6)]
    assert sorted(read) == list(range(6))
    assert threading.current_thread() not in threads
    assert len(threads) <= placement.READ_AHEAD


def test_no_more_is_read_ahead_than_said() -> None:
    read = []
    store = LayerStore([lambda i=i: read.append(i) or {"w": np.zeros(1, np.float32)} for i in range(9)], "disk")
    walk = store.walk(range(9))
    next(walk)
    store._readers.shutdown(wait=True)
    # handed out; copied to the device; and those being read
    assert len(read) <= 2 + placement.READ_AHEAD


def test_an_error_while_reading_reaches_the_walk() -> None:
    def broken() -> placement.Tree:
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        list(LayerStore([broken], "disk").walk([0]))


@pytest.mark.parametrize("where", ["device", "host"])
def test_layer_inputs_come_back_in_reverse_and_on_the_device(where: placement.Where) -> None:
    stack = LayerInputs(where, placement.Pace(placement.SLOTS), one_device())
    values = [[one_device().put(np.full((3,), 10 * i + j, np.float32), "device") for j in range(2)] for i in range(4)]
    for pair in values:
        stack.push(pair)
    if where == "host":
        assert kind(stack._stack[0][0]) == "pinned_host"
    for pair in reversed(values):
        popped = stack.pop()
        assert [kind(array) for array in popped] == ["device", "device"]
        assert [array.tolist() for array in popped] == [array.tolist() for array in pair]


def test_inputs_come_back_from_the_host_no_faster_than_layers_are_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """At most two are on the device besides those of layers that are done: one at work or waiting for it, and one on its way."""
    pace = placement.Pace(placement.SLOTS)
    stack, events = LayerInputs("host", pace, one_device()), []
    for i in range(5):
        stack.push(one_device().put(np.full((3,), i, np.float32), "device"))
    monkeypatch.setattr(pace, "wait", lambda: events.append("wait"))
    monkeypatch.setattr(
        one_device(), "put", lambda tree, where: (events.append(f"bring {float(tree[0]):.0f}"), tree)[1]
    )
    for _ in range(5):
        stack.pop()
        events.append("work")
    brought = ["bring 4", "wait", "bring 3", "work"]
    assert events == [*brought, *(e for i in (2, 1, 0) for e in ("wait", f"bring {i}", "work")), "work"]


def test_nbytes_of_arrays_and_of_descriptions() -> None:
    tree = {"a": jnp.zeros((3, 5), jnp.bfloat16), "b": jax.ShapeDtypeStruct((7,), jnp.uint8)}
    assert nbytes(tree) == 3 * 5 * 2 + 7


@pytest.mark.parametrize("where", ["device", "host"])
def test_an_array_that_is_fetched_keeps_no_copy(where: str) -> None:
    """Or each checkpoint would take twice its memory. 4-bit numbers are copied on a CPU too, where others share the array's memory."""
    array = jax.block_until_ready(one_device().put(np.arange(16).astype(ml_dtypes.int4), where))
    first, second = fetch(array), fetch(array)
    np.testing.assert_array_equal(first.astype(np.int8), np.arange(16).astype(ml_dtypes.int4).astype(np.int8))
    assert not np.shares_memory(first, second)
    assert first.tobytes() == second.tobytes()
    assert fetch(np.ones(3)).tobytes() == np.ones(3).tobytes()
