"""Some rows of some stores, as one sequence."""

from collections.abc import Sequence
from typing import overload

import numpy as np

from qlora_jax.data.tokens.store import TokenStore
from qlora_jax.data.tokens.tokenization import Example

HELD_OUT = 2**32 - 4
"""Beside the seed, in the choice of the held-out rows."""


class Selection(Sequence[Example]):
    """Rows of several stores, laid end to end, of which `chosen` are there.

    Attributes:
        sizes: rows of each store among them.
        lengths, supervised, hashes: [N], as a store's.
    """

    def __init__(self, stores: Sequence[TokenStore], chosen: np.ndarray | None = None) -> None:
        self.stores = list(stores)
        self._firsts = np.cumsum([0, *map(len, stores)])
        self._chosen = np.arange(self._firsts[-1]) if chosen is None else np.sort(chosen)
        self.sizes: list[int] = np.diff(np.searchsorted(self._chosen, self._firsts)).tolist()
        self.lengths, self.supervised, self.hashes = (
            np.concatenate([getattr(store, name) for store in stores])[self._chosen]
            for name in ("lengths", "supervised", "hashes")
        )

    def __len__(self) -> int:
        """Rows."""
        return len(self._chosen)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        """Row `index`."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        row = int(self._chosen[index])
        store = int(np.searchsorted(self._firsts, row, side="right")) - 1
        return self.stores[store][row - int(self._firsts[store])]

    def hold_out(self, fraction: float, seed: int) -> tuple["Selection", "Selection"]:
        """(the others, `fraction` of the rows but at least one), the same ones for the same seed."""
        shuffled = np.random.default_rng((seed, HELD_OUT)).permutation(self._chosen)
        number = max(1, round(fraction * len(self)))
        return Selection(self.stores, shuffled[number:]), Selection(self.stores, shuffled[:number])
