"""Where a step went wrong: the first place in the two walks with a value that is not finite, and the rows it belongs to."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from qlora_jax.data import Batch
from qlora_jax.engine.engine import Adapters, Engine, Weights
from qlora_jax.runtime.placement import Tree

MAX_ROWS_SHOWN = 8


@dataclasses.dataclass(frozen=True)
class Fault:
    """`place` is in words; `rows` are the rows of the step that are bad there, as the data names them."""

    place: str
    rows: tuple[str, ...]

    def __str__(self) -> str:
        return f"first in {self.place}; rows {shown(self.rows)}"


def shown(rows: Sequence[str]) -> str:
    """Their names, for a line that is to be read."""
    more = f" and {len(rows) - MAX_ROWS_SHOWN} more" if len(rows) > MAX_ROWS_SHOWN else ""
    return ", ".join(rows[:MAX_ROWS_SHOWN]) + more


def find_fault(
    engine: Engine,
    weights: Weights,
    adapters: Adapters,
    batch: Batch,
    key: jax.Array | None,
    *,
    rows: Sequence[Sequence[str]],
) -> Fault:
    """Make the step again, watching; the adapters stay as they are.

    Args:
        rows: for each micro-batch the names of its rows; padding rows have none.
    """
    watch = _Watch(rows)
    engine.value_and_grad(weights, adapters, batch, key, watch)
    nowhere = "the norm of the whole gradient, or nowhere when the step is made again"
    return watch.fault or Fault(nowhere, everything(rows))


class _Watch:
    def __init__(self, rows: Sequence[Sequence[str]]) -> None:
        self.fault: Fault | None = None
        self._rows = rows

    def __call__(self, place: str, values: Tree) -> None:
        """`values`: hidden states or their gradients, [B, T, D], of each micro-batch; what else there is concerns all rows."""
        if self.fault is not None:
            return
        finite = jax.device_get([_finite_rows(value) for value in jax.tree.leaves(values)])
        if all(good.all() for good in finite):
            return
        by_row = [good for good in finite if good.ndim]
        bad = [
            name
            for names, good in zip(self._rows, by_row, strict=False)
            for index, name in enumerate(names)
            if not (
                good.all() if len(names) > len(good) else good[index]
            )  # packed: which line a row is in is not known here
        ]
        self.fault = Fault(place, tuple(bad or everything(self._rows)))


def everything(rows: Sequence[Sequence[str]]) -> tuple[str, ...]:
    """The rows of all micro-batches."""
    return tuple(name for names in rows for name in names)


@jax.jit
def _finite_rows(value: jax.Array) -> jax.Array:
    """[B, T, D] → [B]; anything else → one."""
    return jnp.all(jnp.isfinite(value), axis=(1, 2) if value.ndim == 3 else None)
