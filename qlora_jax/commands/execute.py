"""A prepared run, executed: weights and adapters loaded, trained, exported."""

import functools
from collections.abc import Sequence

import jax
import numpy as np

from convert.adapters.adapter import Adapter, as_adapters
from convert.cache import cached_folder, discard
from convert.files.prequantized import extra_bytes
from convert.files.stated import modules_beside
from convert.files.verified import DamagedError
from convert.hub import cache_dir
from convert.load import load_weights, total_bytes
from convert.model import BaseModel
from qlora_jax.base.console import byte_bar
from qlora_jax.commands.export import conclude, export, finish, save
from qlora_jax.commands.generate import answer
from qlora_jax.commands.plan import memory_explained
from qlora_jax.commands.prepare import PreparedRun
from qlora_jax.config import Config
from qlora_jax.engine import optimizer
from qlora_jax.engine.compiled_memory import Ahead, StepShapes
from qlora_jax.engine.engine import Adapters, Engine, Weights
from qlora_jax.engine.generation import Sampling
from qlora_jax.planning.budget import Plan
from qlora_jax.planning.search import keeps, make_engine
from qlora_jax.runtime.machine import device_kind
from qlora_jax.runtime.placement import nbytes
from qlora_jax.training.samples import Samples
from qlora_jax.training.trackers import open_trackers
from qlora_jax.training.trainer import Hooks, Trainer


def execute(run: PreparedRun, command: Sequence[str]) -> None:
    """Load, train and export, or do what is left of it.

    Args:
        command: the command line, for `run.json`.

    Raises:
        InputError: memory or the disk ran out, or the loss is no longer finite.
        InterruptedRunError: a signal asked for it; what was done is saved.
    """
    config, model, plan, folder, console, phases = run.config, run.model, run.plan, run.folder, run.console, run.phases
    checkpoints = folder.claim(run.resumed)
    plans = {**plan.as_dict(len(run.training)), "disk": run.space.as_dict()}
    for line in folder.begin(config, command, run.resumed, plans):
        console.print(line)
    with memory_explained(plan, run.asked.memory, run.asked.training.gradient_checkpointing, folder.path):
        engine = make_engine(plan.job, plan.layout, config.training.neftune_noise_alpha)
        weights = load(run, engine)
        adapters = first_adapters(config, engine, model, run.start)
        describe(run, engine, weights, adapters)
        samples = make_samples(run, engine, weights)
        trainer = Trainer(
            config.training, engine, weights, run.training, run.held_out,
            optimizer=plan.layout.optimizer, output_dir=folder.path, console=console, checkpoints=checkpoints, about=run.about,
            trackers=open_trackers(config, folder.path, run.resumed.step if run.resumed else 0, folder.record["id"]),
            hooks=make_hooks(run, samples), phases=phases,
        )  # fmt: skip
        adapters = trainer.train(adapters, run.resumed)
        best_step, last_step = trainer.progress.best_step, trainer.progress.step
        del engine, weights, trainer
        best_step = export(run, adapters, best_step)
    conclude(run, samples, best_step)
    finish(config, folder, checkpoints, last_step)


def load(run: PreparedRun, engine: Engine) -> Weights:
    """Load the base model in 4 bits, each layer where the plan wants it. What was kept of it and is damaged is made again, once.

    Meanwhile a step's functions are compiled.
    """
    config, model, plan, console, phases = run.config, run.model, run.plan, run.console, run.phases
    on_gpu = plan.limits.device is not None  # a processor is busy enough, and may never see the longest row's shape
    ahead = compiled_ahead(engine, plan, config) if on_gpu else None
    reserved = run.space.beside(cache_dir() / "quantized")
    places = plan.layout.places(model.config.num_hidden_layers)
    for last in (False, True):
        with phases.time("quantizing"):
            in_4_bits = cached_folder(
                model.folder, model.name_or_path, config.quantization, console, leave_free=reserved
            )
        try:
            with phases.time("loading"), byte_bar(console) as progress:
                total = total_bytes(model.config, config.quantization, config.memory.base_weights)
                advance = functools.partial(progress.advance, progress.add_task("loading", total=total))
                weights = load_weights(in_4_bits, model.config, config.quantization, places, advance)
            break
        except DamagedError as error:
            if last:
                raise
            discard(in_4_bits.path, error.found, console)
    weights.layers.pace.slots = plan.layout.slots
    if ahead is not None:
        with phases.time("compiling"):
            ahead.wait()
    return weights


def compiled_ahead(engine: Engine, plan: Plan, config: Config) -> Ahead:
    """Begin to compile the functions of a training step, while the weights are loaded."""
    job = plan.job
    shapes = StepShapes(engine, job.rows, job.length, packed=job.packed, micro_batches=job.micro_batches)
    update = optimizer.lowered(config.training, shapes.adapter, shapes.gradients, shapes.array(dtype=np.float32))
    return Ahead(shapes, keeps(job, plan.layout), update)


def first_adapters(config: Config, engine: Engine, model: BaseModel, start: Adapter | None) -> Adapters:
    """Return the adapters that training begins with, fresh or those of `start`, where they are to live."""
    if start is None:
        return engine.init_adapters(config.training.seed)
    return as_adapters(start, model.config, engine.adapters, config.lora.dtype)[1]


def describe(run: PreparedRun, engine: Engine, weights: Weights, adapters: Adapters) -> None:
    """Print what is about to run, in three lines."""
    config, training, console = run.config, run.training, run.console
    others = extra_bytes(run.model.folder, config.quantization)  # some linears may not be in 4 bits
    layers = nbytes(engine.abstract_layer) * len(weights.layers) + sum(others)
    trainable = sum(leaf.size for leaf in jax.tree.leaves(adapters))
    places, quant_type = config.memory, config.quantization.quant_type
    console.print(
        f"{len(weights.layers)} layers in {quant_type.upper()}: {layers / 2**20:,.0f} MiB ({places.base_weights}), embedding and head: "
        f"{nbytes(weights.embedding) / 2**20:,.0f} MiB, {engine.compute_dtype.name} on {device_kind()}"
    )
    targets = config.lora.targets(engine.config.linears)
    rest = [
        *(name for name in engine.config.linears if name not in targets),
        "lm_head",
        *modules_beside(run.model.folder),
    ]
    console.print(
        f"LoRA r={config.lora.r} on {', '.join(targets)} of each of {len(weights.layers)} layers: {trainable:,} trainable parameters; "
        f"not adapted: {', '.join(rest)}"
    )
    rows = config.training.per_device_train_batch_size * config.training.gradient_accumulation_steps
    name = "packed lines" if config.data.packing else "rows"
    console.print(f"{len(training)} optimizer steps of {rows} {name}, {training.epoch(len(training)):.2f} epochs")


def make_samples(run: PreparedRun, engine: Engine, weights: Weights) -> Samples:
    """Return the run's sample prompts, and how they are answered."""
    sampling, path = Sampling(run.config.training.sample_max_new_tokens), run.folder.path / "samples.jsonl"
    before = run.resumed.file(path.name) if run.resumed else b""

    def answer_one(adapters: Adapters, prompt: str) -> str:
        return answer(engine, weights, adapters, run.conversation, prompt, sampling)

    return Samples(path, run.config.training.sample_prompts, answer_one, run.console, before)


def make_hooks(run: PreparedRun, samples: Samples) -> Hooks:
    """Return what the trainer calls with an evaluation; the best adapter so far is kept in the run's `best/`."""
    best = run.folder.path / "best"
    return Hooks(samples.take, lambda adapters: save(best, adapters, run.config, run.model, run.conversation), best)
