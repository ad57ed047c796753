"""Registered memory: what is in it, where, and that it is given back in the right order, once; a fake client stands for the driver."""

import ctypes
import dataclasses
import gc
import itertools
import mmap
import subprocess
import sys
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from convert.files import pieces
from convert.files.folder import ModelFolder
from convert.files.pieces import on_device, read_bfloat16
from convert.load import load_weights, read_config, read_linear
from convert.quantize import quantize
from qlora_jax.config import LoraSettings, QuantizationSettings
from qlora_jax.data import Batch
from qlora_jax.engine.engine import Engine
from qlora_jax.runtime import pinned, placement
from qlora_jax.runtime.placement import LayerStore, one_device, spread
from tests.helpers import tiny
from tests.helpers.tiny import NAMES

NF4 = QuantizationSettings()


def is_mapped(address: int) -> bool:
    """Whether the process has memory there."""
    ranges = (line.split()[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines())
    return any(int(begin, 16) <= address < int(end, 16) for begin, end in ranges)


class Driver:
    """A client that keeps account of what is registered, and of what was in it then."""

    def __init__(self) -> None:
        self.ranges: dict[int, int] = {}
        self.contents: list[bytes] = []
        self.released: list[int] = []
        self.refuses = False

    def dma_map(self, address: int, size: int) -> None:
        if self.refuses:
            raise jax.errors.JaxRuntimeError("UNIMPLEMENTED: not on this card\nand more")
        assert not any(begin < address + size and address < begin + n for begin, n in self.ranges.items())
        self.contents.append(ctypes.string_at(address, size))
        self.ranges[address] = size

    def dma_unmap(self, address: int) -> None:
        assert is_mapped(address), "given back to the kernel before it was taken from the driver"
        del self.ranges[address]  # KeyError the second time
        self.released.append(address)

    def has(self, array: np.ndarray) -> bool:
        """Whether all of it is in one range, as XLA wants it."""
        first, last = array.ctypes.data, array.ctypes.data + array.nbytes
        return any(begin <= first and last <= begin + size for begin, size in self.ranges.items())


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    fake = Driver()
    monkeypatch.setattr(pinned, "_refused", threading.Event())
    monkeypatch.setattr(pinned, "_ours", {})  # other tests may have left some
    monkeypatch.setattr(pinned, "client", lambda: None if pinned._refused.is_set() else fake)
    return fake


def make_tree(seed: int = 0, size: int = 3000) -> dict[str, Any]:
    """Every dtype there is, odd sizes, no dimension, an array that is not in one piece."""
    rng = np.random.default_rng(seed)
    values = rng.standard_normal((3, 5)).astype(ml_dtypes.bfloat16)
    return {
        "codes": rng.integers(0, 256, size, np.uint8),
        "nested": {"absmax": rng.standard_normal(7).astype(np.float32), "offset": np.asarray(seed + 0.5, np.float32)},
        "norm": values,
        "turned": values.T,
    }


def assert_same(found: Any, expected: Any) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert (type(a), a.dtype, a.shape, a.tobytes()) == (np.ndarray, b.dtype, b.shape, b.tobytes())


def registered(mappings: int) -> bool:
    """Whether so many are left, once copies are over: JAX lets go of what it copied from a little later."""
    end = time.monotonic() + 10
    while time.monotonic() < end:
        gc.collect()
        if len(pinned._ours) == mappings:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize("size", [1, 64, 4096, 3 * pinned.HUGE_PAGE + 17])
def test_a_tree_is_copied_into_one_registered_range(driver: Driver, size: int) -> None:
    tree = make_tree(size=size)
    found = pinned.pin(tree)
    assert_same(found, tree)
    ((begin, nbytes),) = driver.ranges.items()
    assert pinned.registered_bytes() == nbytes
    assert begin % pinned.HUGE_PAGE == 0 and nbytes % mmap.PAGESIZE == 0
    assert nbytes < placement.nbytes(tree) + 5 * pinned.ALIGNMENT + mmap.PAGESIZE
    for leaf, source in zip(jax.tree.leaves(found), jax.tree.leaves(tree), strict=True):
        assert driver.has(leaf) and leaf.ctypes.data % pinned.ALIGNMENT == 0
        assert driver.contents[0][leaf.ctypes.data - begin :][: leaf.nbytes] == source.tobytes()  # full by then
        assert pinned.holds(leaf) and not pinned.holds(source)
        with pytest.raises(ValueError, match="read-only"):
            leaf[...] = 0
    leaves = jax.tree.leaves(found)
    edges = sorted((leaf.ctypes.data, leaf.ctypes.data + leaf.nbytes) for leaf in leaves)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(edges))


def test_memory_lives_as_long_as_any_view(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    real, mappings = pinned._room, []

    def room(size: int) -> Any:
        made = real(size)
        mappings.append(weakref.ref(made[0]))
        return made

    monkeypatch.setattr(pinned, "_room", room)
    tree = pinned.pin(make_tree())
    (address,) = driver.ranges
    part = tree["codes"][10:20]
    assert pinned.holds(part)
    expected = part.tolist()
    del tree
    gc.collect()
    assert driver.ranges and part.tolist() == expected
    on_device = jax.device_put(part)  # on a CPU the same memory, or a copy
    del part
    on_device.block_until_ready()
    assert on_device.tolist() == expected
    del on_device
    assert registered(0)
    assert (driver.ranges, driver.released) == ({}, [address])
    assert mappings[0]() is None


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_what_the_driver_keeps_is_not_given_back(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    """XLA would take the next array at that address for a registered one, and copy from pages that are no longer its."""
    stuck: list[mmap.mmap] = []
    monkeypatch.setattr(pinned, "_stuck", stuck)
    tree = pinned.pin(make_tree())
    (address,) = driver.ranges

    def dma_unmap(address: int) -> None:
        raise jax.errors.JaxRuntimeError("INTERNAL: it is in use")

    monkeypatch.setattr(driver, "dma_unmap", dma_unmap)
    del tree
    gc.collect()
    assert len(stuck) == 1 and is_mapped(address)


def test_many_threads_pin_at_once(driver: Driver) -> None:
    trees = [make_tree(seed, 10_000 + seed) for seed in range(40)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(pinned.pin, trees))
    for a, b in zip(found, trees, strict=True):
        assert_same(a, b)
    assert len(driver.ranges) == 40
    del a, found
    gc.collect()
    assert not driver.ranges and len(driver.released) == 40


@pytest.mark.parametrize("size", [4096, pinned.HUGE_PAGE - 1, pinned.HUGE_PAGE, 5 * pinned.HUGE_PAGE // 2])
@pytest.mark.parametrize("kernel_has_them", [True, False])
def test_huge_pages_only_as_far_as_they_are_full(
    monkeypatch: pytest.MonkeyPatch, size: int, kernel_has_them: bool
) -> None:
    asked: list[tuple[int, ...]] = []

    class Mapping(mmap.mmap):
        def madvise(self, option: int, *where: int) -> None:
            asked.append((option, *where))
            if option != mmap.MADV_DONTFORK and not kernel_has_them:
                raise OSError("EINVAL")

    monkeypatch.setattr(mmap, "mmap", Mapping)
    mapping, owner, begin = pinned._room(size)
    assert (owner.ctypes.data + begin) % pinned.HUGE_PAGE == 0 and begin + size <= owner.size == len(mapping)
    huge = size // pinned.HUGE_PAGE * pinned.HUGE_PAGE
    expected = [(mmap.MADV_DONTFORK,), (mmap.MADV_NOHUGEPAGE,)]
    expected += [(mmap.MADV_HUGEPAGE, begin, huge)] if huge and kernel_has_them else []
    assert asked == expected


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
@pytest.mark.parametrize("able", [True, False])
@pytest.mark.parametrize("refused", [True, False])
def test_only_a_gpu_whose_client_can(monkeypatch: pytest.MonkeyPatch, backend: str, able: bool, refused: bool) -> None:
    fake = Driver() if able else SimpleNamespace()
    event = threading.Event()
    if refused:
        event.set()
    monkeypatch.setattr(pinned, "_refused", event)
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(client=fake)])
    registers = backend == "gpu" and able and not refused
    assert pinned.client() is (fake if registers else None)
    assert (pinned.pin(make_tree()) is not None) == registers


def test_what_a_refusal_says_and_does(driver: Driver) -> None:
    driver.refuses = True
    tree = make_tree()
    with pytest.warns(UserWarning, match=r"cannot be registered.*not on this card\).*pinned pool.*to load") as caught:
        found = one_device().keep(tree, "host")
    assert len(caught) == 1 and "and more" not in str(caught[0].message)
    driver.refuses = False
    again = one_device().keep(tree, "host")  # would raise if it warned, and is not tried
    for kept in (found, again):
        assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(kept)} == {"pinned_host"}
        assert_same(jax.tree.map(np.asarray, kept), tree)
    assert not driver.ranges and pinned.registered_bytes() == 0


def test_only_numpy_s_arrays_for_the_host_are_registered(driver: Driver) -> None:
    tree = make_tree()
    assert one_device().lives(one_device().keep(tree, "device"), "device")
    from_device = one_device().keep(one_device().put(tree, "device"), "host")
    assert all(leaf.sharding == placement.one_device().sharding("host") for leaf in jax.tree.leaves(from_device))
    assert one_device().lives(one_device().put(tree, "host"), "host")
    assert not driver.contents
    kept = one_device().keep(tree, "host")
    assert len(driver.contents) == 1
    assert (
        one_device().lives(kept, "host")
        and not one_device().lives(kept, "device")
        and not one_device().lives(tree, "host")
    )
    assert one_device().keep(kept, "host") is kept and one_device().put(kept, "host") is kept
    assert one_device().lives(one_device().put(kept, "device"), "device")


@pytest.mark.parametrize("resident", [0, 2])
def test_a_store_of_registered_layers_walks_as_any(driver: Driver, resident: int) -> None:
    layers, places = [make_tree(seed) for seed in range(6)], spread(resident, 6)
    order = [*range(6), *reversed(range(6))]
    given = [one_device().keep(layer, "host") if index % 2 else layer for index, layer in enumerate(layers)]
    store, plain = LayerStore(given, places), LayerStore(layers, places)
    assert all(place == "device" or one_device().lives(store._layers[i], "host") for i, place in enumerate(places))
    seen, schedules = [], []
    for walked in (store, plain):
        for index, layer in walked.walk(order):
            assert one_device().lives(layer, "device")
            seen.append((index, [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(layer)]))
        schedules.append(list(walked.fetched))
    assert seen[:12] == seen[12:] == [(i, [leaf.tobytes() for leaf in jax.tree.leaves(layers[i])]) for i in order]
    assert schedules[0] == schedules[1]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ModelFolder]:
    place = tmp_path_factory.mktemp("pinned")
    model = tiny.write_model(place / "model", num_hidden_layers=4, tie_word_embeddings=False)
    quantize(ModelFolder(model), place / "4bit", NF4)
    return {"bf16": ModelFolder(model), "4bit": ModelFolder(place / "4bit")}


def test_a_folder_in_4_bits_is_registered_a_linear_at_a_time(driver: Driver, folders: dict[str, ModelFolder]) -> None:
    folder = folders["4bit"]
    config = read_config(folder)
    weights, expected = (load_weights(folder, config, NF4, where) for where in ("host", "device"))
    vocabulary = 2 * 3 * (jax.default_backend() == "gpu")  # embedding, head and final norm, on their way to it
    assert len(driver.contents) == 4 * 8 + vocabulary  # seven linears a layer, and its norms
    for found, same in zip(weights.layers._layers, expected.layers._layers, strict=True):
        assert all(map(driver.has, jax.tree.leaves(found)))
        assert_same(found, jax.tree.map(np.asarray, same))
    del weights, expected, found, same
    assert registered(0)
    assert not driver.ranges and len(driver.released) == len(driver.contents)


def test_a_linear_is_read_where_it_stays(
    driver: Driver, folders: dict[str, ModelFolder], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No byte of it goes through other memory."""
    folder, real, into = folders["4bit"], ModelFolder.elements, []

    def elements(self: ModelFolder, name: str, begin: int, size: int, place: Any = None) -> np.ndarray:
        into.append(None if place is None else (place.ctypes.data, place.nbytes))
        return real(self, name, begin, size, place)

    monkeypatch.setattr(ModelFolder, "elements", elements)
    found = read_linear(folder, NAMES.linear(0, "up_proj"), NF4, "host")
    codes, absmax, nested, offset = jax.tree.leaves(found)
    assert into == [(array.ctypes.data, array.nbytes) for array in (codes, absmax, nested)]
    assert len(driver.contents) == 1 and all(map(driver.has, (codes, absmax, nested, offset)))
    assert not any(array.flags.writeable for array in (codes, absmax, nested, offset))


def test_embedding_and_norm_pass_through_registered_memory(
    driver: Driver, folders: dict[str, ModelFolder], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On their way to a GPU, each in a range that was full when it was registered, and is given back afterwards."""
    folder, sent = folders["4bit"], (NAMES.embedding, NAMES.final_norm)
    expected = [read_bfloat16(folder, name) for name in sent]
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(pieces, "PIECE", 512)
    found = [on_device(folder, name) for name in sent]
    assert [full[: array.nbytes] for full, array in zip(driver.contents, expected, strict=True)] == [
        array.tobytes() for array in expected
    ]
    assert_same([np.asarray(array) for array in found], expected)
    assert all(one_device().lives(array, "device") for array in found)
    del found
    assert registered(0)


def test_a_folder_is_loaded_all_the_same_where_the_driver_refuses(
    driver: Driver, folders: dict[str, ModelFolder]
) -> None:
    """Linears that were read before it did are in ordinary memory then, and go on to XLA's pool."""
    driver.refuses, folder = True, folders["4bit"]
    with pytest.warns(UserWarning, match="cannot be registered") as caught:
        weights = load_weights(folder, read_config(folder), NF4, "host")
    assert len(caught) == 1 and not driver.ranges
    for layer in weights.layers._layers:
        assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(layer)} == {"pinned_host"}
    expected = load_weights(folder, read_config(folder), NF4, "device")
    for found, same in zip(weights.layers._layers, expected.layers._layers, strict=True):
        assert_same(jax.tree.map(np.asarray, found), jax.tree.map(np.asarray, same))


@pytest.mark.parametrize("registering", [True, False])
def test_what_cannot_be_filled_is_given_back(
    driver: Driver, monkeypatch: pytest.MonkeyPatch, registering: bool
) -> None:
    """An error while memory is filled is the caller's, and nothing of it was registered."""
    if not registering:
        monkeypatch.setattr(pinned, "client", lambda: None)
    rooms: list[pinned.Room] = []

    def fill(*room: pinned.Room) -> Any:
        rooms.extend(room)
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="gone"):
        pinned.filled(fill)
    assert len(rooms) == registering
    assert not driver.contents and registered(0)


def test_what_is_quantized_on_the_way_in_stays_in_xlas_pool(driver: Driver, folders: dict[str, ModelFolder]) -> None:
    weights = load_weights(folders["bf16"], read_config(folders["bf16"]), NF4, "host")
    for layer in weights.layers._layers:
        assert all(one_device().lives(part, "host") for part in layer.values())
        assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(layer["q_proj"]))


def step_bits(folder: ModelFolder, where: str) -> list[bytes]:
    """A training step's loss and gradients, and an evaluation, with the base in one place or another."""
    config = read_config(folder)
    engine = Engine(config, LoraSettings(r=4, lora_dropout=0.1), NF4, compute_dtype=jnp.float32)
    weights = load_weights(folder, config, NF4, where)
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 256, (2, 2, 24)).astype(np.int32)
    batch = Batch(ids, ids, 2 * 2 * 23, ids.size)
    adapters = [
        one_device().put(jax.tree.map(lambda a: rng.standard_normal(a.shape).astype(np.float32), layer), "device")
        for layer in engine.init_adapters(0)
    ]
    key = one_device().put(jax.random.key(1), "device")
    engine.value_and_grad(weights, adapters, batch, key)  # compiling may move constants
    with jax.transfer_guard("disallow"):
        loss, grads = engine.value_and_grad(weights, adapters, batch, key)
    held_out = engine.loss(weights, adapters, [dataclasses.replace(batch, input_ids=ids[:1], labels=ids[:1])])
    logits, _ = engine.decode(weights, adapters, ids[0, :, :8], 0, engine.new_cache(2, 8))
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves((loss, grads, held_out, logits))]


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU")
def test_the_same_bits_from_registered_memory_on_the_gpu(folders: dict[str, ModelFolder]) -> None:
    """The driver's own registering: nothing is refused, nothing goes to XLA's pool, and everything is given back."""
    assert registered(0)
    weights = load_weights(folders["4bit"], read_config(folders["4bit"]), NF4, "host")
    assert all(pinned.holds(leaf) for layer in weights.layers._layers for leaf in jax.tree.leaves(layer))
    assert registered(4 * 8)
    del weights
    assert registered(0)
    assert step_bits(folders["4bit"], "host") == step_bits(folders["4bit"], "device")
    assert registered(0)


AT_THE_END = """
import numpy as np
from qlora_jax.runtime import pinned
class Driver:
    def dma_map(self, *range): print("registered")
    def dma_unmap(self, *range): print("released")
pinned.client = Driver
kept = pinned.pin([np.ones(5)])
gone = pinned.pin([np.ones(5)])
del gone
"""


def test_a_process_that_ends_leaves_its_memory_to_the_kernel() -> None:
    """Copies may be on their way then, and the client may be gone."""
    result = subprocess.run(
        [sys.executable, "-c", AT_THE_END], capture_output=True, text=True, check=False, timeout=120
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.split() == ["registered", "registered", "released"]
