"""Decides where everything lives, from shapes alone, before any weight is read.

Every combination of places and working modes that the settings leave open is a `Layout`. Those that fit the device and the host are
compared by the seconds they are predicted to take; the fastest wins, and of equals the one that works in the usual way and moves least.
How many layers are resident, or keep their intermediates, follows from what the rest leaves over. `estimate.py` has the bytes and seconds.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any

from qlora_jax.base.errors import InputError
from qlora_jax.base.units import GIB
from qlora_jax.config import MemorySettings
from qlora_jax.engine.compiled_memory import temporary_bytes
from qlora_jax.engine.engine import Engine
from qlora_jax.model.decoder import MLP_TOKENS
from qlora_jax.planning.budget import Limits, Plan, spare_bytes
from qlora_jax.planning.estimate import Job, Layout, Workspace, items, total, workspace
from qlora_jax.planning.hardware import Rates
from qlora_jax.runtime.placement import SLOTS

CHUNKS = (MLP_TOKENS, 4096, 2048, 1024)
"""Tokens that the MLP may work on at a time where all of a micro-batch's are too many."""
SAME_SPEED = 0.02
"""Layouts whose predicted seconds differ by no more than this share count as equally fast."""

WorkspaceOf = Callable[[Job, Layout], Workspace]


def make_plan(
    job: Job,
    memory: MemorySettings,
    gradient_checkpointing: str,
    limits: Limits,
    rates: Rates | None,
    *,
    workspace_of: WorkspaceOf = workspace,
) -> Plan:
    """The fastest layout that fits. On a processor there is one: nothing is streamed or moved unless that was asked for.

    Args:
        memory: what the user has settled; every `auto` is decided here.
        gradient_checkpointing: `none`; `full`: no layer keeps its intermediates but the last, if that takes no more memory; or `auto`: as
            many do as fit.
        workspace_of: the compiled functions' own figures, where they can be had; asked for the layout that wins by the estimate,
            which is then chosen again with the answer.

    Raises:
        InputError: nothing fits; it says by how much, and which setting would do it.
    """
    plan = choose(job, memory, gradient_checkpointing, limits, rates, workspace_of=workspace_of)
    if not plan.fits:
        raise _does_not_fit(plan, memory, gradient_checkpointing)
    return plan


def choose(
    job: Job,
    memory: MemorySettings,
    gradient_checkpointing: str,
    limits: Limits,
    rates: Rates | None,
    *,
    workspace_of: WorkspaceOf = workspace,
) -> Plan:
    """The fastest plan that fits, or the one that exceeds the limits least."""
    if limits.device is None:
        return _on_a_processor(job, memory, gradient_checkpointing, limits)
    known: dict[Any, Workspace] = {}

    def best_guess(job: Job, layout: Layout) -> Workspace:
        return known.get(_mode(job, layout)) or workspace(job, layout)

    while True:
        plans = list(_candidates(job, memory, gradient_checkpointing, limits, rates, work_of=best_guess))
        fitting = [plan for plan in plans if plan.fits]
        if fitting:
            fastest = min(plan.seconds.total for plan in fitting)
            equal = [plan for plan in fitting if plan.seconds.total <= fastest * (1 + SAME_SPEED)]
            plan = min(equal, key=lambda plan: (_oddity(plan.layout), plan.seconds.bus_bytes, -plan.layout.keep))
        else:
            plan = min(plans, key=lambda plan: plan.excess)
        if workspace_of is workspace or _mode(job, plan.layout) in known:
            return plan
        known[_mode(job, plan.layout)] = workspace_of(job, plan.layout)


def _on_a_processor(job: Job, memory: MemorySettings, gradient_checkpointing: str, limits: Limits) -> Plan:
    depth = job.config.num_hidden_layers
    asked = {name: getattr(memory, name) for name in ("activations", "adapters", "optimizer")}
    places = {name: "device" if where == "auto" else where for name, where in asked.items()}
    resident = depth if memory.base_weights in ("auto", "device") else 0
    if resident == 0 and memory.resident_layers != "auto":
        resident = min(depth, memory.resident_layers)
    keep = {"none": depth, "full": 0}.get(gradient_checkpointing, memory.kept_layers)
    keep = 0 if keep == "auto" else min(depth, keep)
    layout = Layout(
        resident,
        "disk" if memory.base_weights == "disk" else "host",
        keep=keep,
        mlp_tokens=max(job.tokens, MLP_TOKENS) if keep else MLP_TOKENS,
        **places,
    )
    return Plan(job, layout, workspace(job, layout), limits, None)


def make_engine(job: Job, layout: Layout, neftune_noise_alpha: float = 0.0) -> Engine:
    """The engine that does a job in the way of a layout."""
    return Engine(
        job.config,
        job.lora,
        job.quantization,
        compute_dtype=job.dtype,
        attention=job.attention,
        activations=layout.activations,
        adapters=layout.adapters,
        keep=layout.keep,
        neftune_noise_alpha=neftune_noise_alpha,
        share_dense=layout.share_dense,
        mlp_tokens=layout.mlp_tokens,
    )


def compiled_workspace(job: Job, layout: Layout) -> Workspace:
    """Return the workspace of the functions as they are compiled for this machine's device; the run finds them compiled."""
    options = {"packed": job.packed, "micro_batches": job.micro_batches, "saves": keeps(job, layout)}
    found = temporary_bytes(make_engine(job, layout), job.rows, job.length, **options)
    return Workspace(**{field.name: found.get(field.name, 0) for field in dataclasses.fields(Workspace)})


def keeps(job: Job, layout: Layout) -> tuple[bool, ...]:
    """Return which kinds of layers a layout has: layers that are run again (False), that keep their intermediates (True), or both."""
    kinds = (False, layout.keep < job.config.num_hidden_layers), (True, layout.keep > 0)
    return tuple(kind for kind, present in kinds if present)


def _mode(job: Job, layout: Layout) -> Any:
    """What of a layout the compiled functions depend on."""
    return layout.share_dense, layout.mlp_tokens, keeps(job, layout)


def _oddity(layout: Layout) -> tuple[Any, ...]:
    """How far a layout is from the usual, to choose among equals."""
    return not layout.share_dense, -min(layout.mlp_tokens, MLP_TOKENS), -layout.slots


def _candidates(
    job: Job, memory: MemorySettings, gradient_checkpointing: str, limits: Limits, rates: Rates, *, work_of: WorkspaceOf
) -> Iterator[Plan]:

    def open_to(asked: str) -> tuple[Any, ...]:
        return ("device", "host") if asked == "auto" else (asked,)

    streamed_from = "disk" if memory.base_weights == "disk" else "host"
    chunks = [max(job.tokens, MLP_TOKENS), *(size for size in CHUNKS if size < job.tokens)]
    for activations, adapters, optimizer, share_dense, mlp_tokens, slots in itertools.product(
        open_to(memory.activations),
        open_to(memory.adapters),
        open_to(memory.optimizer),
        (True, False),
        chunks,
        (SLOTS, 2),
    ):
        bare = Layout(
            0,
            streamed_from,
            activations,
            adapters,
            optimizer,
            share_dense=share_dense,
            mlp_tokens=mlp_tokens,
            slots=slots,
        )
        for resident in _resident_counts(bare, job, memory, limits, work_of):
            layout = dataclasses.replace(bare, resident=resident)
            for keep in _keep_counts(layout, job, gradient_checkpointing, memory.kept_layers, limits, work_of=work_of):
                settled = dataclasses.replace(layout, keep=keep)
                yield Plan(job, settled, work_of(job, settled), limits, rates)


def _resident_counts(
    layout: Layout, job: Job, memory: MemorySettings, limits: Limits, work_of: WorkspaceOf
) -> list[int]:
    """Numbers of resident layers worth a try: what was asked for, or as many as fit, or all."""
    depth = job.config.num_hidden_layers
    if memory.base_weights == "device":
        return [depth]
    if memory.resident_layers != "auto":
        return [min(depth, memory.resident_layers)]
    if memory.base_weights in ("host", "disk"):
        return [0]
    most = _largest(depth, lambda n: _fits(job, dataclasses.replace(layout, resident=n), limits, work_of))
    return sorted({0, most, depth})


def _keep_counts(
    layout: Layout, job: Job, gradient_checkpointing: str, asked: str | int, limits: Limits, *, work_of: WorkspaceOf
) -> list[int]:
    """Numbers of layers that keep their intermediates. An MLP in chunks keeps none, so that its layer is not worth keeping."""
    depth = job.config.num_hidden_layers
    if gradient_checkpointing == "auto" and asked != "auto":
        return [min(depth, asked)]
    if gradient_checkpointing == "none":
        return [depth]
    if layout.mlp_tokens < job.tokens:
        return [0]
    if gradient_checkpointing == "full":
        return [0, 1] if _last_is_free(layout, job, work_of) else [0]
    most = _largest(depth, lambda n: _fits(job, dataclasses.replace(layout, keep=n), limits, work_of))
    return sorted({0, most, depth})  # all may fit where one fewer does not, see `spare_bytes`


def _last_is_free(layout: Layout, job: Job, work_of: WorkspaceOf) -> bool:
    """Whether the peak is as low if the last layer keeps its intermediates: its turn comes at once, and it then needs less workspace than
    one that is run again."""
    none, last = layout, dataclasses.replace(layout, keep=1)
    work = work_of(job, last)
    return total(items(job, last, work))[0] <= total(items(job, none, work))[0]


def _fits(job: Job, layout: Layout, limits: Limits, work_of: WorkspaceOf) -> bool:
    work = work_of(job, layout)
    return total(items(job, layout, work))[0] <= limits.device - spare_bytes(limits.device, job, layout, work)


def _largest(most: int, fits: Callable[[int], bool]) -> int:
    """The largest number up to `most` that fits, all smaller ones doing so too; 0 if none does."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _does_not_fit(plan: Plan, memory: MemorySettings, gradient_checkpointing: str) -> InputError:
    """What the nearest plan takes, and the settings that would make one fit."""
    taken = f"{plan.host_bytes / GIB:.1f} GiB of the host's {plan.limits.host / GIB:.1f}"
    if plan.limits.device is None:
        taken = (
            f"{(plan.device_bytes + plan.host_bytes) / GIB:.1f} GiB of the {plan.limits.host / GIB:.1f} that are free"
        )
    else:
        taken = f"{plan.device_bytes / GIB:.1f} GiB of the GPU's {plan.limits.device / GIB:.1f} and {taken}"
    found = f"the run does not fit: at least {taken}; most of it: " + ", ".join(_largest_items(plan))
    return InputError("the plan", found=found, fix="; or ".join(remedies(plan, memory, gradient_checkpointing)))


def _largest_items(plan: Plan) -> list[str]:
    lines = sorted(plan.items, key=lambda item: -max(item.device, item.host))[:3]
    return [f"{line.name} {line.device / GIB:.1f} + {line.host / GIB:.1f} GiB" for line in lines]


def remedies(plan: Plan, memory: MemorySettings, gradient_checkpointing: str) -> list[str]:
    """Single changes of a setting that make the run fit, tried one after the other."""

    def works(
        job: Job = plan.job, memory: MemorySettings = memory, checkpointing: str = gradient_checkpointing
    ) -> bool:
        return choose(job, memory, checkpointing, plan.limits, plan.rates).fits

    job, found = plan.job, []
    if gradient_checkpointing == "none" and works(checkpointing="auto"):
        found.append("set training.gradient_checkpointing=auto")
    for name, value in memory.model_dump().items():
        if (
            value not in ("auto", "disk")
            and name != "device_memory"
            and works(memory=memory.model_copy(update={name: "auto"}))
        ):
            found.append(f"set memory.{name}=auto")
    if memory.base_weights == "auto" and works(memory=memory.model_copy(update={"base_weights": "disk"})):
        found.append("set memory.base_weights=disk (slower: every layer is read anew each time)")
    if job.rows > 1 and (rows := _largest(job.rows - 1, lambda n: n == 0 or works(dataclasses.replace(job, rows=n)))):
        found.append(f"set training.per_device_train_batch_size={rows} (with more accumulation steps instead)")
    if job.eval_rows > 1 and works(dataclasses.replace(job, eval_rows=1)):
        found.append("set training.per_device_eval_batch_size=1")
    step = 32
    length = step * _largest(job.length // step, lambda n: n == 0 or works(dataclasses.replace(job, length=n * step)))
    if length:
        found.append(f"set data.max_seq_length={length}")
    for rank in (32, 16, 8):
        smaller = job.lora.model_copy(update={"r": rank})
        if rank < job.lora.r and works(dataclasses.replace(job, lora=smaller)):
            found.append(f"set lora.r={rank}")
            break
    if job.optim != "paged_adamw_8bit" and works(dataclasses.replace(job, optim="paged_adamw_8bit")):
        found.append("set training.optim=paged_adamw_8bit")
    return found or ["use a smaller model, or a machine with more memory: no single setting would do it"]
