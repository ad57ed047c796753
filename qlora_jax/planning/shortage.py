"""Which memory a run ended for want of, and a setting that the planner has tried."""

import dataclasses
import math
import os

from qlora_jax.base.units import GIB
from qlora_jax.config import MemorySettings
from qlora_jax.planning.budget import HOST_SPARE_SHARE, Limits, Plan
from qlora_jax.planning.search import choose, remedies
from qlora_jax.runtime.machine import CONTEXT_BYTES, POOL_VARIABLE

PINNED_ALLOCATOR = "gpu_host_bfc"
"""Part of the name of XLA's allocator of pinned memory, which its messages give."""
SHARES = (0.95, 0.9, 0.85, 0.75, 0.6)
"""Shares of the memory there is that are tried, one after the other: what a plan was wrong by is not known."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shortage:
    """What ran out, and what to do about it."""

    memory: str
    remedies: tuple[str, ...]


def explain(plan: Plan, memory: MemorySettings, gradient_checkpointing: str, error: BaseException) -> Shortage:
    """Return what a failed allocation ran out of, and settings with which a plan for less of it fits.

    Args:
        plan: the plan that the run followed.
        memory: the run's memory settings, with what was `auto` still so.
        error: XLA's `RESOURCE_EXHAUSTED`, a `MemoryError`, or an `OSError` with ENOMEM.
    """
    plan = dataclasses.replace(
        plan, limits=dataclasses.replace(plan.limits, pool=None)
    )  # the next run's follows from its own plan
    if isinstance(error, MemoryError | OSError) or plan.limits.device is None:
        return Shortage(memory="the host's memory", remedies=_with_less_host(plan, memory, gradient_checkpointing))
    text = str(error)
    if PINNED_ALLOCATOR in text or "host memory" in text.lower():
        return Shortage(
            memory="pinned memory of the host", remedies=_with_less_pinned(plan, memory, gradient_checkpointing)
        )
    return Shortage(memory="the GPU's memory", remedies=_with_less_device(plan, memory, gradient_checkpointing))


def _with_less_device(plan: Plan, memory: MemorySettings, gradient_checkpointing: str) -> tuple[str, ...]:
    there = plan.limits.device or 0
    for share in SHARES:
        limits = dataclasses.replace(plan.limits, device=int(share * there))
        found = choose(plan.job, memory, gradient_checkpointing, limits, plan.rates)
        if found.fits:
            size = math.floor(10 * (int(share * there) + CONTEXT_BYTES) / GIB) / 10
            return (f"set memory.device_memory={size:g}GiB, so that the plan leaves more free",)
    return _of(
        plan,
        memory,
        gradient_checkpointing,
        dataclasses.replace(plan.limits, device=int(SHARES[1] * there)),
    )


def _with_less_host(plan: Plan, memory: MemorySettings, gradient_checkpointing: str) -> tuple[str, ...]:
    limits = dataclasses.replace(plan.limits, host=int(SHARES[1] * min(plan.limits.host, plan.host_bytes)))
    return _of(plan, memory, gradient_checkpointing, limits)


def _with_less_pinned(plan: Plan, memory: MemorySettings, gradient_checkpointing: str) -> tuple[str, ...]:
    """Give XLA's pool more where the host has it; or move something to the device, where that fits."""
    pool, limit = plan.pool_bytes(registered=False), os.environ.get(POOL_VARIABLE, "")
    larger = math.ceil(1.25 * max(pool / GIB, float(limit) if limit.isdigit() else 0)) + 1
    found = []
    if plan.host_bytes + (larger * GIB - pool) <= plan.limits.host * (1 - HOST_SPARE_SHARE):
        found.append(f"set the environment variable {POOL_VARIABLE}={larger}, for which the host has room")
    for name in ("optimizer", "adapters", "activations"):
        if getattr(plan.layout, name) == "host":
            moved = memory.model_copy(update={name: "device"})
            if choose(plan.job, moved, gradient_checkpointing, plan.limits, plan.rates).fits:
                found.append(f"set memory.{name}=device")
    return tuple(found) or _with_less_host(plan, memory, gradient_checkpointing)


def _of(plan: Plan, memory: MemorySettings, gradient_checkpointing: str, limits: Limits) -> tuple[str, ...]:
    return tuple(remedies(dataclasses.replace(plan, limits=limits), memory, gradient_checkpointing))
