"""`python -m qlora_jax plan`: what a run would take of the GPU and the host, and how long, before anything is read."""

import argparse
import contextlib
import dataclasses
import errno
import functools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from convert.adapters.targets import resolve_targets
from convert.hub import cache_dir
from convert.model import open_shape
from qlora_jax.base.console import make_console
from qlora_jax.base.errors import InputError
from qlora_jax.base.units import GIB, parse_bytes
from qlora_jax.commands.space import local_folder, show_space, space_of, with_guessed_tokens
from qlora_jax.config import Config, MemorySettings, load_config
from qlora_jax.config.arguments import path_argument
from qlora_jax.data.batching.batches import LENGTH_MULTIPLE
from qlora_jax.model.architecture import Architecture
from qlora_jax.model.attention import default_attention
from qlora_jax.planning import remembered
from qlora_jax.planning.budget import PINNED_SLACK, Limits, Plan
from qlora_jax.planning.estimate import Job
from qlora_jax.planning.hardware import Rates, published
from qlora_jax.planning.search import choose, make_plan
from qlora_jax.planning.shortage import explain
from qlora_jax.runtime import machine
from qlora_jax.training.metrics import peak_device_gib

EPILOG = """\
The longest row is taken to have data.max_seq_length tokens; train.py takes the longest there is. Without --gpu-memory the plan is for
this machine's GPU, and the workspace is that of the compiled layer; with it, for a card of that size, from estimates. What the hub's own
cache takes of the disk is not counted, nor the tokens of its datasets: 5 bytes each."""


SMALLER = 0.9
"""Share of the device's memory for which the pool of pinned memory must be large enough too."""
SIZES = ("gpu-memory", "host-memory", "disk-space")
"""Options that are a number of bytes."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.epilog = EPILOG
    parser.add_argument(
        "--config", required=True, type=path_argument, metavar="FILE", help="a YAML file of settings; see configs/"
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that replace the file's")
    parser.add_argument("--gpu-memory", metavar="SIZE", help="plan for a card with so much memory, e.g. 24GiB")
    parser.add_argument(
        "--gpu", metavar="NAME", help="the card whose speed is assumed with --gpu-memory, e.g. 'RTX 3090'"
    )
    parser.add_argument(
        "--host-memory", metavar="SIZE", help="plan for a host with so much memory to spare, e.g. 64GiB"
    )
    parser.add_argument("--disk-space", metavar="SIZE", help="plan for disks with so much free, e.g. 200GiB")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")


def run(options: argparse.Namespace) -> None:
    """Print the plan to standard output."""
    console = make_console(stderr=options.json)
    config = load_config(options.config, options.overrides)
    shape = open_shape(config.model.name_or_path, log=console.print)
    config = config.model_copy(update={"lora": resolve_targets(config.lora, shape)})
    length = LENGTH_MULTIPLE * -(-config.data.max_seq_length // LENGTH_MULTIPLE)
    sizes = {name: _size(name, getattr(options, name.replace("-", "_"))) for name in SIZES}
    if sizes["gpu-memory"] is None:
        plan = plan_run(config, shape, length, host_bytes=sizes["host-memory"])
    else:
        job = make_job(config, shape, length, on_gpu=True)
        limits = Limits(
            sizes["gpu-memory"] - machine.CONTEXT_BYTES, sizes["host-memory"] or machine.available_host_bytes()
        )
        rates = published(options.gpu or "")
        plan = make_plan(job, config.memory, config.training.gradient_checkpointing, limits, rates)
    steps = config.training.max_steps if config.training.max_steps > 0 else None
    name = config.model.name_or_path
    space = with_guessed_tokens(space_of(config, plan.job, steps, local_folder(name), name))
    space = dataclasses.replace(space, free=sizes["disk-space"])
    space.check()
    if options.json:
        print(json.dumps({**plan.as_dict(steps), "disk": space.as_dict()}, indent=2))
    else:
        show(plan, console, steps)
        show_space(space, console)


def _size(option: str, text: str | None) -> int | None:
    try:
        return None if text is None else parse_bytes(text)
    except ValueError as error:
        raise InputError(f"--{option}", found=repr(text), expected=str(error).removeprefix("expected ")) from None


def make_job(config: Config, shape: Architecture, length: int, *, on_gpu: bool, extra_bytes: Sequence[int] = ()) -> Job:
    """What the settings ask for, its longest row having `length` tokens."""
    training, data = config.training, config.data
    held_out = data.eval_source is not None or data.eval_fraction > 0
    dtype = training.compute_dtype if training.compute_dtype != "auto" else "bfloat16" if on_gpu else "float32"
    return Job(
        shape,
        config.lora,
        config.quantization,
        training.optim,
        training.per_device_train_batch_size,
        length,
        training.gradient_accumulation_steps,
        dtype,
        default_attention(dtype, shape.head_dim, on_gpu=on_gpu),
        on_gpu=on_gpu,
        eval_rows=training.per_device_eval_batch_size if held_out else 0,
        packed=bool(config.data.packing),
        extra_bytes=tuple(extra_bytes),
    )


def plan_run(
    config: Config,
    shape: Architecture,
    length: int,
    host_bytes: int | None = None,
    *,
    on_disk: bool = False,
    kept_before: int | None = None,
    extra_bytes: Sequence[int] = (),
) -> Plan:
    """The plan for this machine; JAX's backend is started by it, with the memory that the plan needs.

    Args:
        on_disk: whether the model is in 4 bits on the disk already.
        kept_before: the layers whose intermediates a continued run kept until now. It goes on with as many where they fit and the
            settings do not say otherwise.
        extra_bytes: of linears that are not in 4 bits, see `Job`.

    Raises:
        InputError: the run does not fit, or the GPU cannot be asked for.
    """
    gpu = machine.find_gpu()
    job = make_job(config, shape, length, on_gpu=gpu is not None, extra_bytes=extra_bytes)
    wishes, checkpointing = _wishes(config.memory, kept_before), config.training.gradient_checkpointing
    host_bytes = host_bytes or machine.available_host_bytes()
    cache = cache_dir() / "compiled"
    if gpu is None:
        machine.prepare(None, None, 0, cache)
        return next(_plans(job, wishes, checkpointing, Limits(None, host_bytes), None))
    wanted_memory = config.memory.device_memory
    asked = None if wanted_memory == "auto" else parse_bytes(wanted_memory)
    limits = Limits(machine.usable_bytes(gpu, asked), host_bytes)
    # A model that is yet to be quantized may have to be in memory, for want of disk: its weights then come from the device, to the pool.
    limits = dataclasses.replace(limits, registered=on_disk and machine.registers_host_memory())
    pool = guessed_pool(job, wishes, checkpointing, limits, published(gpu.name))
    pool = machine.prepare(gpu, limits.device, int(PINNED_SLACK * pool), cache)  # settled here, the plan below
    stats = machine.device_memory()
    device = min(limits.device, stats["bytes_limit"]) if stats else limits.device
    limits = dataclasses.replace(limits, device=device, pool=pool)
    folder = cache_dir() / "planned"
    workspace_of = functools.partial(remembered.workspace, folder)
    return next(_plans(job, wishes, checkpointing, limits, remembered.rates(folder), workspace_of=workspace_of))


def guessed_pool(job: Job, wishes: Sequence[MemorySettings], checkpointing: str, limits: Limits, rates: Rates) -> int:
    """Return bytes that the pool of pinned memory has to have room for, before the backend starts and the plan can be made.

    The plan is made from the compiled functions' own workspaces, which may leave less room on the device than the estimate does. Then more
    lives on the host: so the plans for a smaller device are asked too.

    Raises:
        InputError: the run does not fit.
    """
    guesses = list(_plans(job, wishes, checkpointing, limits, rates))
    smaller = dataclasses.replace(limits, device=int(SMALLER * limits.device))
    tighter = [choose(job, memory, checkpointing, smaller, rates) for memory in wishes]
    plans = [*guesses, *(plan for plan in tighter if plan.fits)]
    return max(plan.pool_bytes(registered=limits.registered) for plan in plans)


def _wishes(memory: MemorySettings, kept_before: int | None) -> list[MemorySettings]:
    """The settings as they are to be tried, in this order."""
    if kept_before is None or memory.kept_layers != "auto":
        return [memory]
    return [memory.model_copy(update={"kept_layers": kept_before}), memory]


def _plans(job: Job, wishes: Sequence[MemorySettings], *how: Any, **options: Any) -> Iterator[Plan]:
    """A plan for each of the wishes but those that do not fit, in their order; `how`, `options`: the rest of `make_plan`'s arguments.

    Raises:
        InputError: none of them fits; of the last.
    """
    fitting = 0
    for number, memory in enumerate(wishes, 1):
        try:
            plan = make_plan(job, memory, *how, **options)
        except InputError:
            if number == len(wishes) and not fitting:
                raise
            continue  # another machine may have less room than the one before
        fitting += 1
        yield plan


def resolved(config: Config, plan: Plan) -> Config:
    """The settings with every `auto` replaced by what the plan made of it."""
    layout, depth = plan.layout, plan.job.config.num_hidden_layers
    checkpointing = {0: "full", depth: "none"}.get(layout.keep, "auto")
    memory = {
        "base_weights": "device" if layout.resident == depth else layout.streamed_from,
        "resident_layers": layout.resident,
        "kept_layers": layout.keep,
        "activations": layout.activations,
        "adapters": layout.adapters,
        "optimizer": layout.optimizer,
    }
    training = {"compute_dtype": plan.job.dtype, "gradient_checkpointing": checkpointing}
    update = {
        "memory": config.memory.model_copy(update=memory),
        "training": config.training.model_copy(update=training),
    }
    return config.model_copy(update=update)


@contextlib.contextmanager
def memory_explained(
    plan: Plan, memory: MemorySettings, gradient_checkpointing: str, output_dir: Path
) -> Iterator[None]:
    """Turn a failed allocation within the block into an answer for people: which memory, and a setting that the planner has tried.

    Raises:
        InputError: memory of the device, pinned memory or the host's ran out within the block.
    """
    try:
        yield
    except (jax.errors.JaxRuntimeError, MemoryError, OSError) as error:
        if isinstance(error, OSError) and error.errno != errno.ENOMEM:
            raise
        text = str(error)
        if (
            isinstance(error, jax.errors.JaxRuntimeError)
            and "RESOURCE_EXHAUSTED" not in text
            and "Out of memory" not in text
        ):
            raise
        shortage = explain(plan, memory, gradient_checkpointing, error)
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        found = f"out of {shortage.memory}: {first_line}"
        peak, limit = peak_device_gib(), plan.limits.device
        if peak is not None and limit is not None:
            found += f"; the GPU's peak before was {peak:.1f} GiB, the plan expected {plan.device_bytes / GIB:.1f} of {limit / GIB:.1f}"
        fix = "; or ".join(shortage.remedies) + ". What was saved before is intact"
        raise InputError(output_dir, found=found, fix=fix) from None


def show(plan: Plan, console: Console, steps: int | None) -> None:
    """The plan as a table, and what it comes to in a few lines."""
    layout, depth, job = plan.layout, plan.job.config.num_hidden_layers, plan.job
    on_gpu = plan.rates is not None
    table = Table(title_justify="left", box=None, padding=(0, 2))
    table.add_column("GiB", justify="left")
    columns = ("device", "host") if on_gpu else ("memory",)
    for name in columns:
        table.add_column(name, justify="right")
    for item in plan.items:
        name = item.name
        if name == "base weights":
            name += (
                f", {depth - layout.resident} of {depth} layers streamed"
                if layout.resident < depth
                else f", {depth} layers"
            )
        if name == "kept intermediates":
            name += f" of {layout.keep} layers"
        figures = (item.device, item.host) if on_gpu else (item.device + item.host,)
        if any(figures):
            table.add_row(name, *(f"{figure / GIB:.2f}" if figure else "" for figure in figures))
    if on_gpu:
        table.add_row("total", f"{plan.device_bytes / GIB:.2f}", f"{plan.host_bytes / GIB:.2f}", style="bold")
        table.add_row("available", f"{plan.limits.device / GIB:.2f}", f"{plan.limits.host / GIB:.2f}")
    else:
        table.add_row("total", f"{(plan.device_bytes + plan.host_bytes) / GIB:.2f}", style="bold")
        table.add_row("available", f"{plan.limits.host / GIB:.2f}")
    rows = f"{job.micro_batches} x {job.rows} rows of up to {job.length} tokens a step"
    console.print(f"plan: {rows}")
    console.print(table)
    if on_gpu:
        spent = plan.seconds
        length = "" if steps is None else f", {steps} steps in {steps * spent.total / 3600:.2f} h"
        tokens = job.tokens * job.micro_batches / spent.total
        console.print(
            f"predicted: {spent.total:.3g} s a step ({tokens:,.0f} tokens/s), {spent.bus_bytes / 1e9:.1f} GB over the bus{length} "
            f"(speed of {plan.rates.name}: {plan.rates.source})"
        )
