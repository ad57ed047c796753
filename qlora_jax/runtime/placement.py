"""Where arrays live: device memory, pinned host memory or disk; and the prefetcher that makes layers visit the device in time.

Pinned memory is XLA's, in JAX's arrays, for all that comes from the device; frozen weights that come from the disk are in memory of our
own, in numpy's arrays (see pinned.py). Both are copied in the same way.

A copy from pinned host memory runs beside the computation only if it is issued before that computation is dispatched. So a walk over the
layers always asks for the next layer first and hands out the current one then:

    issue copy of layer l + 1  →  dispatch layer l  →  issue copy of layer l + 2  →  dispatch layer l + 1  → ...

Layers that stay on the disk are read by threads, a few ahead of the walk, and copied from plain memory: slower, but for a base
model that is bigger than the host's memory.

Every array gets a `NamedSharding` with a memory kind on the mesh of a `Placement` (of one device, today): the engine never names a device.
"""

import collections
import concurrent.futures
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qlora_jax.runtime import pinned

Where = Literal["device", "host"]
LayerPlace = Literal["device", "host", "disk"]
Tree = Any  # a pytree of arrays
Source = Tree | Callable[[], Tree]

_MEMORY_KINDS = {"device": "device", "host": "pinned_host"}
WHOLE = PartitionSpec()
"""Arrays that are whole on every device of the mesh."""

SLOTS = 3
"""Streamed layers on the device at a time: one computing, one queued behind it, one arriving. More would let Python, which runs
far ahead of the device, fill the memory with layers that wait; fewer would let the device wait for Python."""


READ_AHEAD = 2
"""Layers being read from disk at a time, each by a thread of its own, besides the one that was read last."""


class Placement:
    """Where arrays live: on which devices, in their memory or in pinned memory of the host.

    Holds the mesh, so that nothing else names a device. One device is a mesh of one.
    """

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh
        self._shardings: dict[tuple[Where, PartitionSpec], NamedSharding] = {}

    def sharding(self, where: Where, spec: PartitionSpec = WHOLE) -> NamedSharding:
        """Return the sharding of arrays at `where`: whole on every device, or split over the mesh's axes as `spec` says."""
        if (where, spec) not in self._shardings:
            self._shardings[where, spec] = NamedSharding(self.mesh, spec, memory_kind=_MEMORY_KINDS[where])
        return self._shardings[where, spec]

    def put(self, tree: Tree, where: Where, spec: PartitionSpec = WHOLE) -> Tree:
        """Start copying a tree's arrays (of numpy or jax) to `where`; returns at once. A tree that is there already is returned."""
        if self.lives(tree, where, spec):
            return tree  # device_put would look at each array for 25 µs, which adds up over layers
        return jax.device_put(tree, self.sharding(where, spec))

    def keep(self, tree: Tree, where: Where) -> Tree:
        """Bring a frozen tree to `where` to stay; returns when it is there.

        numpy's arrays that are to be on a GPU's host remain numpy's, in memory of our own, where there can be such: see `pinned.pin`.
        """
        if (
            where == "host"
            and not self.lives(tree, "host")
            and all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(tree))
        ):
            ours = pinned.pin(tree)
            if ours is not None:
                return ours
        return jax.block_until_ready(self.put(tree, where))

    def lives(self, tree: Tree, where: Where, spec: PartitionSpec = WHOLE) -> bool:
        """Whether a tree's arrays are at `where` already.

        Trees move as one, the parts of a tuple of trees each for itself; so a tree's first array answers for all. To look at every array
        of every layer would take milliseconds a step, for which the device waits where layers are small.
        """
        if isinstance(tree, tuple):
            return all(self.lives(part, where, spec) for part in tree)
        first = next(iter(jax.tree.leaves(tree)), None)
        if isinstance(first, jax.Array):
            return first.sharding == self.sharding(where, spec)
        return first is None or (where == "host" and pinned.holds(first))


@functools.cache
def one_device() -> Placement:
    """Return the placement on the first device alone, which a run uses today; JAX's backend is started by it."""
    return Placement(Mesh(np.array(jax.devices()[:1]), ("fsdp",)))


def fetch(array: jax.Array) -> np.ndarray:
    """Return one array, wherever it lives, in plain host memory; it may share the array's own where that is the host's.

    On a GPU it passes through XLA's pool of pinned memory, whose limit follows from the plan. So whatever leaves the device in bulk leaves
    it through here, a few arrays at a time, and the pool holds no more of them. The array keeps no copy of its values, as it does, for as
    long as it lives, where numpy is given the array itself or one of its shards: numpy is given another array of the same memory.
    """
    if not isinstance(array, jax.Array):
        return np.asarray(array)
    shards = [array.addressable_data(0)]
    return np.asarray(jax.make_array_from_single_device_arrays(array.shape, array.sharding, shards))


def nbytes(tree: Tree) -> int:
    """Bytes of a tree's arrays, or of the arrays that a tree of `jax.ShapeDtypeStruct`s describes."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


class Pace:
    """Keeps Python from running further ahead of the device than memory allows.

    Python dispatches far faster than the device computes, and whatever is dispatched takes its memory at once. So before anything is
    brought to the device, or set on its way to the host, the work on older layers has to be done.
    """

    def __init__(self, slots: int) -> None:
        """`slots` layers may be on the device at a time: at least 2, one computing and one arriving."""
        self.slots = slots
        self._unfinished: collections.deque[jax.Array] = collections.deque(maxlen=64)

    def dispatched(self, token: jax.Array) -> None:
        """Work on a layer was dispatched; `token` is a small result of it that is never donated."""
        self._unfinished.append(token)

    def wait(self) -> None:
        """Return when so little is unfinished that another layer may arrive."""
        while len(self._unfinished) > self.slots - 2:
            self._unfinished.popleft().block_until_ready()


class LayerStore:
    """The frozen weights of layers 0 … L-1, each layer resident on the device or streamed, from the host or from disk.

    `fetched` records which streamed layers were copied, in order, since it was last cleared: the schedule, for tests and reports.
    """

    def __init__(
        self,
        layers: Iterable[Source],
        where: LayerPlace | Sequence[LayerPlace],
        *,
        slots: int = SLOTS,
        placement: Placement | None = None,
    ) -> None:
        """Takes the layers one at a time from `layers`, so that no more than one exists outside its place.

        Args:
            layers: trees of arrays; for a layer that stays on disk, a function that reads it anew each time it is called, from any thread.
            where: one place for all, or each layer's own.
            slots: streamed layers on the device at a time, at least 2.
            placement: the devices; by default the first alone.
        """
        self.placement = placement or one_device()
        self._layers: list[Source] = []
        self.places: list[LayerPlace] = []
        for index, layer in enumerate(layers):
            place = where if isinstance(where, str) else where[index]
            self.places.append(place)
            self._layers.append(layer if place == "disk" else self.placement.keep(layer, place))
        self._readers = concurrent.futures.ThreadPoolExecutor(READ_AHEAD) if "disk" in self.places else None
        self.pace = Pace(slots)
        self.fetched: collections.deque[int] = collections.deque(maxlen=4 * len(self._layers))

    def __len__(self) -> int:
        return len(self._layers)

    def walk(self, order: Iterable[int]) -> Iterator[tuple[int, Tree]]:
        """Yield (index, weights on the device) along `order`; the copy of the next streamed layer is issued before a layer is handed out.

        A streamed layer that is the next one too, as at the turn from the forward to the backward walk, is fetched once. Tell `pace` of
        the work dispatched on a layer, and drop the reference to it before asking for the next.
        """
        order = list(order)
        coming = self._fetch(index for index, _ in itertools.groupby(order) if self.places[index] != "device")
        ahead = next(coming, None)
        here_index, here = -1, None  # the streamed layer that was handed out last
        for index in order:
            weights = None
            if self.places[index] == "device":
                weights = self._layers[index]
            elif index != here_index:
                here = None  # nothing here holds the last layer when the next but one is fetched
                (here_index, here), ahead = ahead, None
            if ahead is None:
                ahead = next(coming, None)
            yield index, here if weights is None else weights

    def _fetch(self, streamed: Iterable[int]) -> Iterator[tuple[int, Tree]]:
        """Start the copy of one streamed layer after the other, each when it is asked for and a slot is free."""
        streamed = [index for index, _ in itertools.groupby(streamed)]
        from_disk = self._read(index for index in streamed if self.places[index] == "disk")
        for index in streamed:
            layer = next(from_disk) if self.places[index] == "disk" else self._layers[index]
            self.pace.wait()
            self.fetched.append(index)
            yield index, self.placement.put(layer, "device")

    def _read(self, order: Iterable[int]) -> Iterator[Tree]:
        """Layers from disk, the next `READ_AHEAD` being read while one is used."""
        waiting = iter(order)
        reading = collections.deque(
            self._readers.submit(self._layers[i]) for i in itertools.islice(waiting, READ_AHEAD)
        )
        while reading:
            layer = reading.popleft().result()
            reading.extend(self._readers.submit(self._layers[i]) for i in itertools.islice(waiting, 1))
            yield layer


def visits(source: Callable[[int], Tree], order: Iterable[int], pace: Pace, placement: Placement) -> Iterator[Tree]:
    """Each of `source(index)`'s trees on the device along `order`, the next one's copy issued before one is handed out.

    For what visits the device with its layer: adapters, gradients, moments. Trees that live there are handed out as they are.
    """
    order = list(order)
    coming = _bring(source(order[0]), pace, placement) if order else None
    for index, following in zip(order, [*order[1:], None], strict=True):
        here, coming = coming, None
        if following is not None:
            coming = here if following == index else _bring(source(following), pace, placement)
        yield here


def _bring(tree: Tree, pace: Pace, placement: Placement) -> Tree:
    if not placement.lives(tree, "device"):
        pace.wait()
    return placement.put(tree, "device")


def spread(resident: int, depth: int) -> list[LayerPlace]:
    """Places for `depth` layers of which `resident` stay on the device, as evenly as can be among those streamed from the host."""
    return ["device" if (i + 1) * resident // depth > i * resident // depth else "host" for i in range(depth)]


class LayerInputs:
    """The layer inputs kept from the forward walk for the backward walk: a stack, on the device or on the host.

    From the host, the next entry down is fetched while the current one is used.
    """

    def __init__(self, where: Where, pace: Pace, placement: Placement) -> None:
        self.where, self._pace, self._placement = where, pace, placement
        self._stack: list[Tree] = []
        self._coming: Tree = None

    def push(self, inputs: Tree) -> None:
        """Keep a layer's inputs; a copy to the host is only started here."""
        if self.where == "host":
            self._pace.wait()
        self._stack.append(self._placement.put(inputs, self.where))

    def pop(self) -> Tree:
        """The inputs pushed last, on the device. The next ones set out when the work on older layers is done: without layers that stream,
        nothing else keeps Python from bringing all of them at once."""
        current = self._placement.put(self._stack.pop(), "device") if self._coming is None else self._coming
        if self._stack and self.where == "host":
            self._pace.wait()
        self._coming = self._placement.put(self._stack.pop(), "device") if self._stack else None
        return current
