"""Fine-tune a Llama-family model with QLoRA: `python train.py --config FILE [section.key=value ...]`."""

import argparse
import contextlib
import os
import shutil
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # else it remarks that torch is absent, which is as we want it
if __name__ == "__main__":
    STARTED = time.perf_counter()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until `main`: Ctrl-C in the middle of an import is no news
    sys.modules.setdefault(
        "torch", None
    )  # absent: where it is installed transformers would load it, for seconds and for nothing

import jax
from rich.console import Console

from convert.adapters.adapter import Adapter, as_adapters, load_adapter, plain_settings, save_adapter
from convert.cache import cached_folder, is_kept
from convert.files.identity import model_identity
from convert.files.prequantized import settle
from convert.hub import cache_dir
from convert.load import load_weights, total_bytes
from convert.merge import check_base, merge_with_progress
from convert.model import BaseModel, open_model
from qlora_jax.base.console import Phases, byte_bar, make_console
from qlora_jax.base.errors import InputError, exit_status
from qlora_jax.commands.generate import answer
from qlora_jax.commands.plan import memory_explained, plan_run, resolved, show
from qlora_jax.commands.space import show_space, space_of
from qlora_jax.config import Config, load_config
from qlora_jax.config.changes import check_changes, check_identity, work_changes
from qlora_jax.data import Batches, save_template
from qlora_jax.data.corpus import Corpus, load_corpus
from qlora_jax.data.preview import preview
from qlora_jax.engine.engine import Adapters, Engine, Weights
from qlora_jax.engine.generation import Sampling
from qlora_jax.model.decoder import LlamaConfig
from qlora_jax.planning.budget import Plan
from qlora_jax.planning.disk import Space
from qlora_jax.planning.search import make_engine
from qlora_jax.runtime.placement import Tree, nbytes, put
from qlora_jax.training.checkpoint import Checkpoint
from qlora_jax.training.output_dir import OutputDir
from qlora_jax.training.samples import Samples
from qlora_jax.training.trackers import check_trackers, open_trackers
from qlora_jax.training.trainer import Hooks, Trainer, check_evaluation

EPILOG = """\
Any setting of the file can be given on the command line, e.g. training.max_steps=20 lora.r=16.
A run leaves in training.output_dir: adapter/ (PEFT's format), metrics.jsonl, loss.png, config.yaml (all settings, resolved), run.json
(what happened), checkpoints/, samples.jsonl when training.sample_prompt is set, best/ when there is something to evaluate on, and merged/
(a Hugging Face folder) when training.export_merged is true.
A run that was stopped, by Ctrl-C, SIGTERM or anything else, is continued by the same command."""


@exit_status
def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and run."""
    if __name__ == "__main__":
        signal.signal(signal.SIGINT, signal.default_int_handler)
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="a YAML file of settings; see configs/")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that replace the file's")
    options = parser.parse_args(arguments)
    command = ["train.py", *(sys.argv[1:] if arguments is None else arguments)]
    phases = Phases()
    if __name__ == "__main__":
        phases.seconds["starting"] = time.perf_counter() - STARTED
    run(load_config(options.config, options.overrides), make_console(), command, phases)


def run(config: Config, console: Console, command: Sequence[str], phases: Phases) -> None:
    """One whole run, or what is left of it: read, quantize, train, export, show."""
    if config.training.full_determinism:  # XLA reads this once, when the device is first used
        os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_exclude_nondeterministic_ops=true"
    check_trackers(config.training)
    with phases.told(console, once="loading"), OutputDir(config.training, phases.seconds) as folder:
        folder.look()
        with phases.time("checking"):
            resumed = folder.newest(console.print)
        with phases.time("model"):
            model = open_model(config.model.name_or_path, log=console.print)
            config, start = settle_adapter(config, model)
            config = settle_quantization(config, model, console)
        with phases.time("data"):
            corpus = load_corpus(config, model.tokenizer, cache_dir() / "tokenized", console)
            config, training, held_out = corpus.config, corpus.batches(), corpus.eval_batches()
        preview(corpus, console, config.data.preview_rows)
        check_evaluation(config.training, held_out)
        folder.refuse_nothing_to_do(resumed, len(training))
        with phases.time("planning"):
            on_disk = is_kept(model.folder, model.name_or_path, config.quantization)
            plan = plan_as_before(config, model.config, training.longest, resumed, on_disk=on_disk)
        show(plan, console, len(training))
        config = resolved(config, plan)
        space = space_of(config, plan.job, len(training), model.folder, model.name_or_path)
        show_space(space, console)
        space.check()
        about = about_run(config, model, training, plan)
        if resumed:
            continued(resumed, about, console)
        checkpoints = folder.claim(resumed)
        for line in folder.begin(config, command, resumed, {**plan.as_dict(len(training)), "disk": space.as_dict()}):
            console.print(line)
        weights = load(config, model, plan, space, console, phases)
        engine = make_engine(plan.job, plan.layout, config.training.neftune_noise_alpha)
        adapters = as_adapters(start, model.config)[1] if start else engine.init_adapters(config.training.seed)
        adapters = [put(in_dtype(layer, config.lora.dtype), plan.layout.adapters) for layer in adapters]
        describe(config, engine, weights, adapters, training, console)
        samples = make_samples(config, engine, weights, model, folder.path / "samples.jsonl", console, resumed)
        trainer = Trainer(
            config.training, engine, weights, training, held_out,
            optimizer=plan.layout.optimizer, output_dir=folder.path, console=console, checkpoints=checkpoints, about=about,
            trackers=open_trackers(config, folder.path, resumed.step if resumed else 0, folder.record["id"]),
            hooks=Hooks(samples.take, lambda best: save(folder.path / "best", best, config, corpus)), phases=phases,
        )  # fmt: skip
        with memory_explained(plan, folder.path):
            adapters = trainer.train(adapters, resumed)
        best_step = trainer.progress.best_step if config.training.load_best_model_at_end else None
        del engine, weights, trainer
        export(config, corpus, model, adapters, folder, console, phases, best_step)
        samples.show(best_step)
        folder.end("finished")


def about_run(config: Config, model: BaseModel, training: Batches, plan: Plan) -> dict[str, Any]:
    """What a checkpoint says of its run: the settings, and what tells base and data from others."""
    identity = {"base model": model_identity(model.folder), "data": training.fingerprint()}
    work = {name: getattr(plan.layout, name) for name in ("keep", "share_dense", "mlp_tokens")}
    return {"config": config.model_dump(mode="json"), "identity": identity, "work": work}


def plan_as_before(
    config: Config, shape: LlamaConfig, length: int, resumed: Checkpoint | None, *, on_disk: bool = False
) -> Plan:
    """The plan, see `plan_run`.

    A continued run keeps the intermediates of as many layers as before, if it can, because that decides the last bits.
    """
    before = resumed.about.get("work", {}).get("keep", "auto") if resumed else "auto"
    if before != "auto" and config.memory.kept_layers == "auto":
        memory = config.memory.model_copy(update={"kept_layers": before})
        with contextlib.suppress(InputError):  # another machine may have less room
            return plan_run(config.model_copy(update={"memory": memory}), shape, length, on_disk=on_disk)
    return plan_run(config, shape, length, on_disk=on_disk)


def continued(resumed: Checkpoint, about: Mapping[str, Any], console: Console) -> None:
    """Check that the run can go on, and say what is not as it was.

    Raises:
        InputError: it is another run: other settings, another base model, other data.
    """
    check_identity(resumed.path, resumed.about["identity"], about["identity"])
    changed = check_changes(resumed.path, resumed.about["config"], about["config"])
    for line in changed + work_changes(resumed.about.get("work", {}), about["work"]):
        console.print(f"changed: {line}")


def save(folder: Path, adapters: Adapters, config: Config, corpus: Corpus) -> None:
    """An adapter in PEFT's format, and the chat template it learned, where the model has none."""
    save_adapter(folder, adapters, config.lora, config.quantization, config.model.name_or_path)
    save_template(corpus.template, folder)


def export(
    config: Config,
    corpus: Corpus,
    model: BaseModel,
    adapters: Adapters,
    folder: OutputDir,
    console: Console,
    phases: Phases,
    best_step: int | None,
) -> None:
    """`adapter/`, the last or that of `best_step`, and `merged/` if it is asked for. What is there of an earlier run is replaced."""
    out, best = folder.path, folder.path / "best"
    folder.check_ours()
    with phases.time("export"):
        if best_step is not None and best.exists():
            adapters = as_adapters(load_adapter(best, model.config), model.config)[1]
            console.print(f"the adapter is that of step {best_step}, which had the lowest held-out loss")
        save(out / "adapter", adapters, config, corpus)
        # Another run's merged model would not be this adapter's. It is only there if overwriting was asked for.
        shutil.rmtree(out / "merged", ignore_errors=True)
        console.print(f"adapter: {out / 'adapter'}   loss curve: {out / 'loss.png'}")
        if config.training.export_merged:
            export_merged(config, model, out, console)
            save_template(corpus.template, out / "merged")


def settle_adapter(config: Config, model: BaseModel) -> tuple[Config, Adapter | None]:
    """The settings with those of the adapter that `lora.init_from` names, and that adapter, its tensors not read yet.

    Raises:
        InputError: it cannot be used, or settings given by name contradict it (all at once).
    """
    if config.lora.init_from is None:
        return config, None
    adapter = load_adapter(config.lora.init_from, model.config)
    own = plain_settings(adapter, model.config)
    lora = {key: getattr(own, key) for key in ("r", "lora_alpha", "use_rslora", "target_modules")}
    quantization = {key: getattr(adapter.quantization, key) for key in adapter.quantization.model_fields_set}
    problems = [
        f"{section}.{key} is {getattr(asked, key)!r}, the adapter's is {value!r}"
        for section, asked, values in (("lora", config.lora, lora), ("quantization", config.quantization, quantization))
        for key, value in values.items()
        if key in asked.model_fields_set
        and (asked.targets != own.targets if key == "target_modules" else getattr(asked, key) != value)
    ]
    if problems:
        raise InputError(
            config.lora.init_from,
            found="an adapter that the settings contradict: " + "; ".join(problems),
            fix="leave these settings out: they come from the adapter",
        )
    update = {
        "lora": config.lora.model_copy(update=lora),
        "quantization": config.quantization.model_copy(update=quantization),
    }
    return config.model_copy(update=update), adapter


def settle_quantization(config: Config, model: BaseModel, console: Console) -> Config:
    """The settings with the model folder's own quantization, where it is in 4 bits already."""
    if not model.folder.is_4bit:
        return config
    fix = "leave these settings out, or give the unquantized model"
    where = f"settings quantization.*, model {model.name_or_path}"
    quantization = settle(model.folder, config.quantization, where=where, fix=fix)
    if config.training.export_merged:
        check_base(model.folder, config.training.merge_base)  # now, not when the training is done
    double = ", double quantization" if quantization.double_quant else ""
    console.print(f"{model.folder.path} is in 4 bits already ({quantization.quant_type}{double}): used as it is")
    return config.model_copy(update={"quantization": quantization})


def load(config: Config, model: BaseModel, plan: Plan, space: Space, console: Console, phases: Phases) -> Weights:
    """The base model in 4 bits, each layer where the plan wants it."""
    with phases.time("quantizing"):
        reserved = space.beside(cache_dir() / "quantized")
        in_4_bits = cached_folder(model.folder, model.name_or_path, config.quantization, console, leave_free=reserved)
    with phases.time("loading"), byte_bar(console) as progress:
        task = progress.add_task(
            "loading", total=total_bytes(model.config, config.quantization, config.memory.base_weights)
        )
        weights = load_weights(
            in_4_bits,
            model.config,
            config.quantization,
            plan.layout.places(model.config.num_hidden_layers),
            lambda nbytes: progress.advance(task, nbytes),
        )
    weights.layers.pace.slots = plan.layout.slots
    return weights


def in_dtype(adapter: Tree, dtype: str) -> Tree:
    """A layer's adapter in the dtype it is trained in."""
    return jax.tree.map(lambda x: x if x.dtype == dtype else x.astype(dtype), adapter)


def describe(
    config: Config, engine: Engine, weights: Weights, adapters: Adapters, training: Batches, console: Console
) -> None:
    """What is about to run, in three lines."""
    layers = nbytes(engine.abstract_layer) * len(weights.layers)
    trainable = sum(leaf.size for leaf in jax.tree.leaves(adapters))
    places, quant_type = config.memory, config.quantization.quant_type
    console.print(
        f"{len(weights.layers)} layers in {quant_type.upper()}: {layers / 2**20:,.0f} MiB ({places.base_weights}), embedding and head: "
        f"{nbytes(weights.embedding) / 2**20:,.0f} MiB, {engine.compute_dtype.name} on {jax.devices()[0].device_kind}"
    )
    console.print(f"LoRA r={config.lora.r} on {', '.join(config.lora.targets)}: {trainable:,} trainable parameters")
    rows = config.training.per_device_train_batch_size * config.training.gradient_accumulation_steps
    name = "packed lines" if config.data.packing else "rows"
    console.print(f"{len(training)} optimizer steps of {rows} {name}, {training.epoch(len(training)):.2f} epochs")


def make_samples(
    config: Config,
    engine: Engine,
    weights: Weights,
    model: BaseModel,
    path: Path,
    console: Console,
    resumed: Checkpoint | None,
) -> Samples:
    """The sample prompts, and how they are answered."""
    sampling = Sampling(config.training.sample_max_new_tokens)
    before = resumed.file(path.name) if resumed else b""

    def answer_one(adapters: Adapters, prompt: str) -> str:
        return answer(engine, weights, adapters, model.tokenizer, prompt, sampling)

    return Samples(path, config.training.sample_prompts, answer_one, console, before)


def export_merged(config: Config, model: BaseModel, output_dir: Path, console: Console) -> None:
    """`merged/`, as `python -m convert.merge` would write it."""
    adapter = load_adapter(output_dir / "adapter", model.config)
    merge_with_progress(model.folder, adapter, output_dir / "merged", config.training.merge_base, console)


if __name__ == "__main__":
    sys.exit(main())
