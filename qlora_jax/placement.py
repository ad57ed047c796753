"""Where arrays live: device memory or pinned host memory; and the prefetcher that makes layers visit the device in time.

A copy from pinned host memory runs beside the computation only if it is issued before that computation is dispatched. So a walk over the
layers always asks for the next layer first and hands out the current one then:

    issue copy of layer l + 1  →  dispatch layer l  →  issue copy of layer l + 2  →  dispatch layer l + 1  → ...

Every array gets a `NamedSharding` with a memory kind on a mesh (of one device, today): the engine never names a device.
"""

import collections
import functools
import itertools
from collections.abc import Iterable, Iterator
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

Where = Literal["device", "host"]
Tree = Any  # a pytree of arrays

_MEMORY_KINDS = {"device": "device", "host": "pinned_host"}

SLOTS = 3
"""Streamed layers on the device at a time: one computing, one queued behind it, one arriving. More would let Python, which runs
far ahead of the device, fill the memory with layers that wait; fewer would let the device wait for Python."""


@functools.cache
def sharding(where: Where) -> NamedSharding:
    """Whole arrays on the mesh's device, in its own memory or in pinned host memory."""
    mesh = Mesh(np.array(jax.devices()[:1]), ("fsdp",))
    return NamedSharding(mesh, PartitionSpec(), memory_kind=_MEMORY_KINDS[where])


def put(tree: Tree, where: Where) -> Tree:
    """Start copying a tree's arrays (of numpy or jax) to `where`; returns at once. A tree that is there already is returned."""
    target = sharding(where)
    if all(isinstance(leaf, jax.Array) and leaf.sharding == target for leaf in jax.tree.leaves(tree)):
        return tree  # device_put would look at each array for 25 µs, which adds up over layers
    return jax.device_put(tree, target)


def nbytes(tree: Tree) -> int:
    """Bytes of a tree's arrays, or of the arrays that a tree of `jax.ShapeDtypeStruct`s describes."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


class LayerStore:
    """The frozen weights of layers 0 … L-1, each layer resident on the device or streamed from the host.

    `fetched` records which streamed layers were copied, in order, since it was last cleared: the schedule, for tests and reports.
    """

    def __init__(self, layers: Iterable[Tree], where: Where) -> None:
        """Takes the layers one at a time from `layers`, so that no more than one exists outside its place."""
        self.where = where
        self._layers = [jax.block_until_ready(put(layer, where)) for layer in layers]
        self._unfinished: collections.deque[jax.Array] = collections.deque()
        self.fetched: collections.deque[int] = collections.deque(maxlen=4 * len(self._layers))

    def __len__(self) -> int:
        return len(self._layers)

    def walk(self, order: Iterable[int]) -> Iterator[tuple[int, Tree]]:
        """Yield (index, weights on the device) along `order`, fetching one layer ahead.

        A layer that comes twice in a row, as at the turn from the forward to the backward walk, is fetched once. Call `used` after
        dispatching the work on a layer, and drop the reference to it before asking for the next.
        """
        runs = [(index, len(list(run))) for index, run in itertools.groupby(order)]
        coming = self._fetch(runs[0][0])
        for (index, repeats), following in itertools.zip_longest(runs, runs[1:]):
            weights = coming
            coming = None if following is None else self._fetch(following[0])
            for _ in range(repeats):
                yield index, weights

    def used(self, token: jax.Array) -> None:
        """Tell that work on the current layer was dispatched; `token` is a small result of it that is never donated."""
        if self.where == "host":
            self._unfinished.append(token)

    def _fetch(self, index: int) -> Tree:
        if self.where == "device":
            return self._layers[index]
        while len(self._unfinished) > SLOTS - 2:
            self._unfinished.popleft().block_until_ready()
        self.fetched.append(index)
        return put(self._layers[index], "device")


class LayerInputs:
    """The layer inputs kept from the forward walk for the backward walk: a stack, on the device or on the host.

    From the host, the next entry down is fetched while the current one is used.
    """

    def __init__(self, where: Where) -> None:
        self.where = where
        self._stack: list[Tree] = []
        self._coming: Tree = None

    def push(self, inputs: Tree) -> None:
        """Keep a layer's inputs; a copy to the host is only started here."""
        self._stack.append(put(inputs, self.where))

    def pop(self) -> Tree:
        """The inputs pushed last, on the device."""
        current = put(self._stack.pop(), "device") if self._coming is None else self._coming
        self._coming = put(self._stack.pop(), "device") if self._stack else None
        return current
