"""Snapshots: adapters and moments as they were at one moment, in plain host memory, taken while the device goes on.

A run's arrays change in an optimizer's update only, where new values take the memory of the old (donation). So a thread may copy them, one
array after the other, from one update to the next, which waits until all are taken: byte for byte the values of that moment. No more than
a few arrays are in XLA's pool of pinned memory at a time, wherever they live; all of them are in the snapshot, which the plan counts.
"""

import concurrent.futures
import threading
from collections.abc import Mapping

import jax
import numpy as np

from qlora_jax.runtime.placement import Tree, fetch

FETCHERS = 4
"""Arrays on their way at a time, each copied by a thread: most of the time goes to memory that is touched for the first time."""
Layers = Mapping[str, list[Tree]]
"""By name ("adapters", "moments"), one tree of arrays a layer."""


class Snapshot:
    """The arrays of a checkpoint on their way into plain host memory."""

    def __init__(self, layers: Layers) -> None:
        self._columns: dict[str, list[jax.Array]] | None = columns(layers)
        self.taken = threading.Event()
        """Set when the arrays have been copied, or could not be: from then on they may change."""

    def take(self) -> dict[str, np.ndarray]:
        """Copy the arrays, a layer's at a time: by key, one array for all layers that have it, [layers, ...]."""
        taking, self._columns = self._columns, None
        try:
            stacked = {
                key: np.empty((len(leaves), *leaves[0].shape), leaves[0].dtype) for key, leaves in taking.items()
            }
            places = [(key, layer) for key, leaves in taking.items() for layer in range(len(leaves))]
            places.sort(key=lambda place: place[1])

            def take_one(place: tuple[str, int]) -> None:
                key, layer = place
                stacked[key][layer], taking[key][layer] = fetch(taking[key][layer]), None

            with concurrent.futures.ThreadPoolExecutor(FETCHERS, thread_name_prefix="checkpoint") as fetchers:
                list(fetchers.map(take_one, places))  # raises what one of them raises
            return stacked
        finally:
            self.taken.set()


def keys(name: str, layer: Tree) -> list[str]:
    """Return a key for each leaf of a layer's tree; layers whose leaf differs in shape or dtype have another key for it."""
    leaves = jax.tree_util.tree_flatten_with_path(layer)[0]
    return [f"{name}{jax.tree_util.keystr(path)} {leaf.dtype}{list(leaf.shape)}" for path, leaf in leaves]


def columns(layers: Layers) -> dict[str, list[jax.Array]]:
    """Return each key's leaves, in the order of the layers that have it."""
    found: dict[str, list[jax.Array]] = {}
    for name, trees in layers.items():
        for layer in trees:
            for key, leaf in zip(keys(name, layer), jax.tree.leaves(layer), strict=True):
                found.setdefault(key, []).append(leaf)
    return found
