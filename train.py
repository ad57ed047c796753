"""Fine-tune a Llama-family model with QLoRA: `python train.py --config FILE [section.key=value ...]`."""

import argparse
import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # else it remarks that torch is absent, which is as we want it

import jax
from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from convert.adapter import Adapter, as_adapters, load_adapter, plain_settings, save_adapter
from convert.cache import cached_folder
from convert.load import load_weights, total_bytes
from convert.merge import check_base, merge_with_progress
from convert.model import BaseModel, open_model
from convert.prequantized import settle
from qlora_jax.budget import Plan
from qlora_jax.commands.generate import answer
from qlora_jax.commands.plan import memory_explained, plan_run, resolved, show
from qlora_jax.config import Config, load_config
from qlora_jax.data import Batch, Batches, Example, Row, detect_format, eval_batches, read_rows, tokenize
from qlora_jax.data.batches import LENGTH_MULTIPLE
from qlora_jax.display import byte_bar, make_console, progress_bar
from qlora_jax.engine import Adapters, Engine, Weights
from qlora_jax.errors import InputError, exit_status
from qlora_jax.generate import Sampling
from qlora_jax.placement import nbytes, put
from qlora_jax.trainer import Trainer, make_output_dir, refuse_finished_run

EPILOG = """\
Any setting of the file can be given on the command line, e.g. training.max_steps=20 lora.r=16.
A run leaves in training.output_dir: adapter/ (PEFT's format), metrics.jsonl, loss.png, config.yaml (all settings, resolved), samples.jsonl
when training.sample_prompt is set, and merged/ (a Hugging Face folder) when training.export_merged is true."""


@exit_status
def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="a YAML file of settings; see configs/")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that replace the file's")
    options = parser.parse_args(arguments)
    run(load_config(options.config, options.overrides), make_console())


def run(config: Config, console: Console) -> None:
    """One whole run: read, quantize, train, export, show."""
    if config.training.full_determinism:  # XLA reads this once, when the device is first used
        os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_exclude_nondeterministic_ops=true"
    refuse_finished_run(config.training)
    model = open_model(config.model.name_or_path, log=console.print)
    config, start = settle_adapter(config, model)
    config = settle_quantization(config, model, console)
    rows = read_rows(config.data.path)
    config = settle_format(config, rows)
    training, held_out = load_batches(config, rows, model, console)
    plan = plan_run(config, model.config, longest_row(config))
    show(plan, console, len(training))
    config = resolved(config, plan)
    output_dir = make_output_dir(config.training)
    (output_dir / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
    weights = load(config, model, plan, console)
    engine = make_engine(config, plan)
    adapters = as_adapters(start, model.config)[1] if start else engine.init_adapters(config.training.seed)
    adapters = [put(layer, plan.layout.adapters) for layer in adapters]
    describe(config, engine, weights, adapters, training, console)
    samples = Samples(config, engine, weights, model, output_dir / "samples.jsonl")
    samples.take(0, adapters)
    trainer = Trainer(
        config.training,
        engine,
        weights,
        training,
        held_out,
        optimizer=plan.layout.optimizer,
        output_dir=output_dir,
        console=console,
    )
    with memory_explained(plan, output_dir):
        adapters = trainer.train(adapters)
    save_adapter(output_dir / "adapter", adapters, config.lora, config.quantization, model.name_or_path)
    # Another run's merged model would not be this adapter's. It is only there if overwriting was asked for.
    shutil.rmtree(output_dir / "merged", ignore_errors=True)
    console.print(f"adapter: {output_dir / 'adapter'}   loss curve: {output_dir / 'loss.png'}")
    samples.take(len(training), adapters)
    if config.training.export_merged:
        del weights
        export_merged(config, model, output_dir, console)
    samples.show(console)


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


def settle_format(config: Config, rows: Sequence[Row]) -> Config:
    """The settings with `data.format` as the training rows have it, where it is `auto`."""
    if config.data.format != "auto":
        return config
    return config.model_copy(update={"data": config.data.model_copy(update={"format": detect_format(rows)})})


def load_batches(
    config: Config, rows: Sequence[Row], model: BaseModel, console: Console
) -> tuple[Batches, list[Batch]]:
    """Tokenize the training rows, and read and tokenize the held-out rows."""
    training = config.training
    pad_token_id = (
        model.tokenizer.eos_token_id if model.tokenizer.pad_token_id is None else model.tokenizer.pad_token_id
    )
    examples = load_examples(config, config.data.path, rows, model, console)
    batches = Batches(
        examples,
        micro_batch_size=training.per_device_train_batch_size,
        grad_accum_steps=training.gradient_accumulation_steps,
        seed=training.seed,
        pad_token_id=pad_token_id,
        max_seq_length=config.data.max_seq_length,
        num_epochs=training.num_train_epochs,
        max_steps=training.max_steps,
    )
    if config.data.eval_path is None:
        return batches, []
    eval_path = config.data.eval_path
    held_out = load_examples(config, eval_path, read_rows(eval_path), model, console)
    return batches, eval_batches(
        held_out, training.per_device_eval_batch_size, pad_token_id, config.data.max_seq_length
    )


def load_examples(config: Config, path: Path, rows: Sequence[Row], model: BaseModel, console: Console) -> list[Example]:
    """One file's rows as token ids and masks, and a line about them."""
    with progress_bar(console) as progress:
        task = progress.add_task(f"tokenizing {path.name}", total=len(rows))
        tokenized = tokenize(
            rows,
            config.data.format,
            model.tokenizer,
            config.data.max_seq_length,
            lambda done, _: progress.update(task, completed=done),
        )
    tokens = sum(example.input_ids.size for example in tokenized.examples)
    supervised = sum(int(example.loss_mask.sum()) for example in tokenized.examples)
    cut = f", {tokenized.num_truncated} cut to {config.data.max_seq_length} tokens" if tokenized.num_truncated else ""
    console.print(f"{path}: {len(rows)} rows, {tokens:,} tokens, {supervised / tokens:.0%} supervised{cut}")
    return tokenized.examples


def load(config: Config, model: BaseModel, plan: Plan, console: Console) -> Weights:
    """The base model in 4 bits, each layer where the plan wants it."""
    in_4_bits = cached_folder(model.folder, model.name_or_path, config.quantization, console)
    with byte_bar(console) as progress:
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


def longest_row(config: Config) -> int:
    """Tokens of the longest row a step can have, its padding included."""
    return LENGTH_MULTIPLE * -(-config.data.max_seq_length // LENGTH_MULTIPLE)


def make_engine(config: Config, plan: Plan) -> Engine:
    """The engine, working as the plan says."""
    job, layout = plan.job, plan.layout
    return Engine(
        job.config,
        config.lora,
        config.quantization,
        compute_dtype=job.dtype,
        attention=job.attention,
        activations=layout.activations,
        adapters=layout.adapters,
        keep=layout.keep,
        neftune_noise_alpha=config.training.neftune_noise_alpha,
        share_dense=layout.share_dense,
        mlp_tokens=layout.mlp_tokens,
    )


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
    console.print(f"{len(training)} optimizer steps of {rows} rows, {training.epoch(len(training)):.2f} epochs")


class Samples:
    """The sample prompt, answered at some steps; kept in `samples.jsonl`."""

    def __init__(self, config: Config, engine: Engine, weights: Weights, model: BaseModel, path: Path) -> None:
        self.prompt, self.path = config.training.sample_prompt, path
        self.answers: dict[int, str] = {}
        self._sampling = Sampling(config.training.sample_max_new_tokens)
        self._answer = lambda adapters: answer(engine, weights, adapters, model.tokenizer, self.prompt, self._sampling)

    def take(self, step: int, adapters: Adapters) -> None:
        """Answer the prompt with these adapters."""
        if self.prompt is None:
            return
        self.answers[step] = self._answer(adapters)
        lines = [
            json.dumps({"step": step, "prompt": self.prompt, "answer": text}) for step, text in self.answers.items()
        ]
        self.path.write_text("\n".join(lines) + "\n", encoding="utf-8")

    def show(self, console: Console) -> None:
        """The first answer and the last, one above the other."""
        if self.prompt is not None:
            before, *_, after = self.answers.values()
            for when, text in (("before", before), ("after", after)):  # as Text: an answer may look like rich's markup
                panel = Panel(Text(text), title=Text(f"{when}: {self.prompt}"), title_align="left")
                console.print(panel, soft_wrap=False)


def export_merged(config: Config, model: BaseModel, output_dir: Path, console: Console) -> None:
    """`merged/`, as `python -m convert.merge` would write it."""
    adapter = load_adapter(output_dir / "adapter", model.config)
    merge_with_progress(model.folder, adapter, output_dir / "merged", config.training.merge_base, console)


if __name__ == "__main__":
    sys.exit(main())
