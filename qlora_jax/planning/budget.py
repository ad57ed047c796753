"""What a layout costs, beside what there is."""

import dataclasses
import functools
from typing import Any

from qlora_jax.planning.estimate import Item, Job, Layout, Workspace, items, total
from qlora_jax.planning.hardware import Rates
from qlora_jax.planning.roofline import Seconds, seconds

SPARE_SHARE = 0.04
"""Of the device's memory, left free: what the estimate may be wrong by."""
FRAGMENTS_SHARE = 0.25
"""Of the workspace, left free if that is more: it is one block, and free memory is in pieces. On an H200 with 6 GiB for XLA a plan that
left 0.3 GiB beside a workspace of 3 GiB did not find room for it; one that left 0.9 GiB of 23 did."""
HOST_SPARE_SHARE = 0.05
PINNED_SLACK = 1.03
"""The limit of the pinned pool over what is to be in it: blocks are lost between others. The pool takes all of its limit."""
PASSING_LAYERS = 4
"""Layers whose adapters and moments are on their way through the pool at a time: new ones return to the host before the old ones are let
go, and what is saved, restored or exported passes through it an array, or a layer, at a time."""
CHECKPOINT_COPIES = {True: 2, False: 1}
"""Copies of adapters and moments on the host while a checkpoint is written: the snapshot, and on a GPU's machine what the writer has of it
in its own memory. On an H200 a save of 4.6 GiB took 9.2 GiB, on a CPU one of 1.1 GiB took 1.2 GiB."""
CHECKPOINT, PASSING, PROCESS = "checkpoint, while it is written", "on the way to or from the device", "the process"
"""Lines of the plan. The first and the last are in plain memory of the host, not in the pool."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """Memory a run may take."""

    device: int | None
    """XLA's share of the card; None where the device is the host's own processor."""
    host: int
    pool: int | None = None
    """The limit of XLA's pool of pinned memory, once it is settled; None while it will follow from the plan."""
    registered: bool = False
    """Whether weights on the host are in memory of our own (see pinned.py), and not in the pool."""


def saving(job: Job) -> list[Item]:
    """Return what checkpoints, adapters' files and a resume take of the host: copies of adapters and moments, and what passes the pool."""
    layer = job.adapter_bytes + job.moments_bytes
    passing = [Item(PASSING, 0, PASSING_LAYERS * layer)] if job.on_gpu else []
    return [*passing, Item(CHECKPOINT, 0, CHECKPOINT_COPIES[job.on_gpu] * job.config.num_hidden_layers * layer)]


def spare_bytes(device: int, job: Job, layout: Layout, work: Workspace) -> float:
    """What a plan leaves free of the device's memory at its peak; never all of it.

    Where some layers keep their intermediates and others are run again, the larger workspace of the latter is needed when what was kept is
    gone. But it is one block, and what was kept leaves pieces, gradients between them: so its place is left free from the beginning.
    """
    largest = max(vars(work).values())
    spare = max(SPARE_SHARE * device, FRAGMENTS_SHARE * largest)
    if 0 < layout.keep < job.config.num_hidden_layers:
        spare += max(0, work.backward - max(work.kept_forward, work.kept_backward))
    return min(spare, device / 2)


@dataclasses.dataclass(frozen=True)
class Plan:
    """A layout with what it costs."""

    job: Job
    layout: Layout
    work: Workspace
    limits: Limits
    rates: Rates | None
    """None for a processor, whose speed nobody plans with."""

    @functools.cached_property
    def items(self) -> list[Item]:
        """What takes memory."""
        *lines, process = items(self.job, self.layout, self.work)
        return [*lines, *saving(self.job), process]

    @property
    def device_bytes(self) -> int:
        """The predicted peak in XLA's memory."""
        return total(self.items)[0]

    @property
    def host_bytes(self) -> int:
        """The predicted peak of the process."""
        return total(self.items)[1]

    def pool_bytes(self, *, registered: bool) -> int:
        """Bytes of it in XLA's pool of pinned memory; without the weights if those on the host will be `registered` (see pinned.py)."""
        elsewhere = {CHECKPOINT, PROCESS}
        if registered and self.layout.streamed_from == "host":
            elsewhere.add("base weights")
        return sum(item.host for item in self.items if item.name not in elsewhere)

    @property
    def seconds(self) -> Seconds:
        """Of a step."""
        return seconds(self.job, self.layout, self.rates)

    @property
    def fits(self) -> bool:
        """Whether it stays within its limits, with something to spare."""
        return self.excess <= 0

    @property
    def excess(self) -> float:
        """By how much it exceeds its limits, in shares of them, device, host and pool added up; 0 if it fits."""
        on_host = self.host_bytes + (self.device_bytes if self.limits.device is None else 0)
        host = on_host / (self.limits.host * (1 - HOST_SPARE_SHARE)) - 1
        if self.limits.device is None:
            return max(host, 0)
        device = (
            self.device_bytes / (self.limits.device - spare_bytes(self.limits.device, self.job, self.layout, self.work))
            - 1
        )
        pool = 0 if self.limits.pool is None else self._pool_excess
        return max(host, 0) + max(device, 0) + max(pool, 0)

    @property
    def _pool_excess(self) -> float:
        return PINNED_SLACK * self.pool_bytes(registered=self.limits.registered) / self.limits.pool - 1

    def as_dict(self, steps: int | None = None) -> dict[str, Any]:
        """For `--json` and for a run's records."""
        speed = {} if self.rates is None else self._speed(steps)
        return {
            "layout": dataclasses.asdict(self.layout),
            "layers": self.job.config.num_hidden_layers,
            "rows": self.job.rows,
            "length": self.job.length,
            "micro_batches": self.job.micro_batches,
            "items": [dataclasses.asdict(item) for item in self.items],
            "device_bytes": self.device_bytes,
            "device_limit_bytes": self.limits.device,
            "host_bytes": self.host_bytes,
            "host_limit_bytes": self.limits.host,
            "pool_bytes": self.pool_bytes(registered=self.limits.registered),
            "pool_limit_bytes": self.limits.pool,
            **speed,
        }

    def _speed(self, steps: int | None) -> dict[str, Any]:
        spent = self.seconds
        return {
            "bus_bytes_per_step": spent.bus_bytes,
            "seconds_per_step": round(spent.total, 4),
            "tokens_per_second": round(self.job.tokens * self.job.micro_batches / spent.total, 1),
            "hours": None if steps is None else round(steps * spent.total / 3600, 3),
            "card": dataclasses.asdict(self.rates),
        }
