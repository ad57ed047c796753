"""`python -m qlora_jax compare`: our numbers beside those of transformers + bitsandbytes + peft, on the same model, adapter and tokens."""

import argparse
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from convert.adapters.adapter import as_adapters, load_adapter, plain_settings, save_adapter
from convert.files.names import Names
from convert.files.prequantized import plain_linears, settle
from convert.jobs.job import refuse_existing
from convert.jobs.requantize import check_requantize
from convert.load import load_weights
from convert.model import BaseModel, open_model
from qlora_jax.base.console import make_console, progress_bar
from qlora_jax.base.errors import InputError
from qlora_jax.base.reading import shown
from qlora_jax.compare.both import Ours, Steps, Subject, compare
from qlora_jax.compare.ours import PARTS, linear_key
from qlora_jax.compare.process import require_libraries
from qlora_jax.compare.report import as_json, show, write
from qlora_jax.compare.stages import Comparison
from qlora_jax.config import LoraSettings, QuantizationSettings, TrainingSettings
from qlora_jax.config.arguments import path_argument, text_argument
from qlora_jax.config.section import MAX_WHOLE
from qlora_jax.data import Batch, Batches, RawRow, padding_id
from qlora_jax.data.corpus import read_examples, tokenize_rows
from qlora_jax.engine.engine import Adapters, Engine
from qlora_jax.model.attention import default_attention

EXIT_EXCEEDED = 1
FRESH_B = 0.01
"""Deviation of a made-up adapter's B: at zero, where training begins, A would have no gradient to compare."""
PASSAGES = (
    "The tide tables hang by the door, and the keeper reads them twice before he climbs. High water is at four, with the "
    "wind backing to the north-west, and the glass has fallen three tenths since noon.",
    "A matrix of rank sixteen can be written as the product of a tall one and a wide one. Storing the two costs far less "
    "than storing what they make, and that is all the trick there is.",
    "In 1838 the steamer Forfarshire broke her back on the Farne Islands. Nine people were taken off the rock in an open "
    "boat, rowed by a lighthouse keeper and his daughter, twenty-two years old.",
    "To make bread you need flour, water, salt and time. Mix the first three, leave them alone for a night, fold the "
    "dough a few times, and bake it hot: 230 degrees for half an hour, until the crust sings.",
)
"""What is compared on where no data is given."""


EPILOG = """\
PyTorch's side runs first, in a process of its own, on the GPU if JAX has one; both hold the whole model. Stages: packed codes and scales,
dequantized weights, hidden states after each layer, logits, the next token's distribution, loss, gradients, and the adapter after the
steps. In float32 the two sides are compared with each other; in bfloat16 the reference also runs in float32, and ours may be no further
from that than 1.5 times PyTorch's bfloat16. The exit status is 1 if a bound is exceeded. Needs: pip install 'qlora_jax[compare]'."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.epilog = EPILOG
    parser.add_argument(
        "--model", required=True, type=text_argument, metavar="ID_OR_DIR", help="the base model: a hub id or a folder"
    )
    parser.add_argument(
        "--adapter", type=path_argument, metavar="DIR", help="an adapter in PEFT's format; else one is made up"
    )
    parser.add_argument(
        "--data", type=path_argument, metavar="FILE", help="JSONL rows, as for training; else four short texts"
    )
    parser.add_argument("--max-seq-length", type=int, default=128, metavar="N", help="tokens a row; default: 128")
    parser.add_argument("--rows", type=int, default=2, metavar="N", help="rows an optimizer step; default: 2")
    parser.add_argument("--steps", type=int, default=3, metavar="N", help="optimizer steps; 0 for none; default: 3")
    parser.add_argument("--learning-rate", type=float, default=2e-4, metavar="X", help="default: 2e-4")
    parser.add_argument(
        "--r", type=int, default=16, metavar="N", help="rank of an adapter that is made up; default: 16"
    )
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="of the computation, on both sides"
    )
    parser.add_argument(
        "--quant-type", choices=("nf4", "fp4"), help="for a model that is not in 4 bits yet; default: nf4"
    )
    parser.add_argument("--no-double-quant", action="store_true", help="the same: scales stay in float32")
    parser.add_argument(
        "--requantize",
        action="store_true",
        help="take a model that 4 bits would rob of an adapter that was merged into it",
    )
    parser.add_argument(
        "--out", type=path_argument, metavar="DIR", help="the report's folder; must not exist; default: runs/compare-N"
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON instead of the table")


def run(options: argparse.Namespace) -> int:
    """Compare, show, write the report; exit status 1 if a bound is exceeded."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch's side needs the device's memory first
    console = make_console(stderr=options.json)
    require_libraries()
    refuse_bad_numbers(options)
    model = open_model(options.model, log=console.print)
    adapter = load_adapter(options.adapter, model.config, model.folder) if options.adapter else None
    lora = plain_settings(adapter, model.config) if adapter else LoraSettings(r=options.r, lora_dropout=0.0)
    quantization = settle_quantization(options, model)
    check_requantize(model.folder, quantization, accepted=options.requantize, accept="--requantize", log=console.print)
    batches = make_batches(options, model)
    out = make_folder(options.out)
    refuse_small_disk(out, model)
    work = out / "work"
    work.mkdir()
    try:
        folder = options.adapter or make_adapter(work / "adapter", model, lora, quantization)
        found = compare_model(
            model, folder, lora, quantization, batches=batches, options=options, work=work, console=console
        )
    except BaseException:
        shutil.rmtree(out)
        raise
    shutil.rmtree(work)
    write(found, out)
    if options.json:
        print(json.dumps(as_json(found), indent=2))
    else:
        show(found, console)
    console.print(
        f"report: {out / 'report.json'}   plots: {', '.join(str(path) for path in sorted(out.glob('*.png')))}"
    )
    return EXIT_EXCEEDED if found.exceeded else 0


def refuse_bad_numbers(options: argparse.Namespace) -> None:
    """All at once.

    Raises:
        InputError: a number that nothing can be done with.
    """
    least = {"max_seq_length": 2, "rows": 1, "steps": 0, "r": 1}
    problems = [
        f"--{name.replace('_', '-')} {getattr(options, name)} is less than {value}"
        for name, value in least.items()
        if getattr(options, name) < value
    ]
    problems += [
        f"--{name.replace('_', '-')} {shown(getattr(options, name))} is more than {MAX_WHOLE}"
        for name in least
        if getattr(options, name) > MAX_WHOLE
    ]
    if not 0 < options.learning_rate < float("inf"):
        problems.append(f"--learning-rate {options.learning_rate} is not a positive number")
    if problems:
        raise InputError("python -m qlora_jax compare", found="; ".join(problems), fix="see --help")


def settle_quantization(options: argparse.Namespace, model: BaseModel) -> QuantizationSettings:
    """What was asked for, or the model's own."""
    named = {"quant_type": options.quant_type} if options.quant_type else {}
    if options.no_double_quant:
        named["double_quant"] = False
    fix = "leave --quant-type and --no-double-quant out, or give the unquantized model"
    return settle(model.folder, QuantizationSettings(**named), where=model.name_or_path, fix=fix)


def make_batches(options: argparse.Namespace, model: BaseModel) -> list[Batch]:
    """One batch an optimizer step, and at least one.

    Raises:
        InputError: the data cannot be used, or has no token to learn from.
    """
    if options.data is None:
        rows = [RawRow(f"passage {number}", {"text": text}) for number, text in enumerate(PASSAGES, 1)]
        examples = tokenize_rows(rows, model.tokenizer, options.max_seq_length, vocab_size=model.config.vocab_size)
    else:
        examples = read_examples(options.data, model.tokenizer, options.max_seq_length, model.config.vocab_size)
    batches = Batches(
        examples,
        micro_batch_size=options.rows,
        grad_accum_steps=1,
        seed=0,
        pad_token_id=pad_token_id(model),
        max_seq_length=options.max_seq_length,
        max_steps=max(options.steps, 1),
    )
    return [batches.batch(step) for step in range(len(batches))]


def pad_token_id(model: BaseModel) -> int:
    """The id of the token that fills lines up."""
    return padding_id(model.tokenizer, model.config.vocab_size)


def make_folder(out: Path | None) -> Path:
    """The report's folder, new.

    Raises:
        InputError: it exists, or cannot be made.
    """
    if out is None:
        number = next(n for n in range(1, 10**6) if not Path(f"runs/compare-{n}").exists())
        out = Path(f"runs/compare-{number}")
    refuse_existing(out)
    try:
        out.mkdir(parents=True)
    except OSError as error:
        raise InputError(out, found=f"cannot be made: {error.strerror}", fix="name another --out") from None
    return out


BYTES_A_WEIGHT = 2.6
"""On disk, for a while: the reference's codes, scales and dequantized values."""


def refuse_small_disk(out: Path, model: BaseModel) -> None:
    """Before an hour is spent.

    Raises:
        InputError: the disk has no room.
    """
    weights = sum(rows * columns for rows, columns in model.config.linear_shapes().values())
    needed = BYTES_A_WEIGHT * weights * model.config.num_hidden_layers
    if (free := shutil.disk_usage(out).free) < needed:
        out.rmdir()
        found, expected = (
            f"{free / 2**30:.1f} GiB free on its disk",
            f"{needed / 2**30:.1f} GiB, until the comparison is done",
        )
        raise InputError(out, found=found, expected=expected, fix="name an --out on another disk")


def make_adapter(folder: Path, model: BaseModel, lora: LoraSettings, quantization: QuantizationSettings) -> Path:
    """An adapter with A as training begins and B near zero, so that every tensor has a gradient."""
    rng = np.random.default_rng(0)

    def pair(rows: int, columns: int) -> dict[str, np.ndarray]:
        bound = columns**-0.5
        lora_a = rng.uniform(-bound, bound, (lora.r, columns)).astype(np.float32)
        return {"lora_a": lora_a, "lora_b": rng.normal(0, FRESH_B, (rows, lora.r)).astype(np.float32)}

    shapes = model.config.linear_shapes()
    layers = [
        {name: {"adapter": pair(*shapes[name])} for name in lora.targets(shapes)}
        for _ in range(model.config.num_hidden_layers)
    ]
    save_adapter(folder, layers, lora, quantization, model.name_or_path, architecture=model.config)
    return folder


def compare_model(
    model: BaseModel,
    adapter: Path,
    lora: LoraSettings,
    quantization: QuantizationSettings,
    *,
    batches: Sequence[Batch],
    options: argparse.Namespace,
    work: Path,
    console: Console,
) -> Comparison:
    """Both sides, and the differences."""
    with progress_bar(console) as progress:
        task = progress.add_task("PyTorch's side", total=None)

        def advance(what: str, done: int, total: int) -> None:
            progress.update(task, description=what, completed=done, total=total)

        found = compare(
            subject_of(model, adapter, lora, quantization),
            ours_of(model, adapter, lora, quantization, options.dtype),
            Steps(batches, [options.learning_rate] * options.steps, TrainingSettings(output_dir=work)),
            dtype=options.dtype,
            device="cuda" if jax.default_backend() == "gpu" else "cpu",
            work=work,
            progress=advance,
        )
    found.about |= {"model": options.model, "adapter": str(options.adapter) if options.adapter else None}
    found.about |= {"lora": lora.model_dump(mode="json"), "quantization": quantization.model_dump()}
    found.about |= {"tokens_a_step": [batch.num_input_tokens for batch in batches], "steps": options.steps}
    return found


def subject_of(model: BaseModel, adapter: Path, lora: LoraSettings, quantization: QuantizationSettings) -> Subject:
    """What is compared, with the names that it has over there."""
    layers, names = range(model.config.num_hidden_layers), Names.of(model.config)
    plain = set(plain_linears(model.folder)) if model.folder.is_4bit else set()
    every = ((i, name) for i in layers for name in names.paths)
    linears = {linear_key(*key): names.module(*key) for key in every if names.linear(*key) not in plain}
    adapters = {
        f"{linear_key(i, name)}.{part}": names.adapter(i, name, part)
        for i in layers
        for name in lora.targets(names.paths)
        for part in PARTS
    }
    return Subject(
        model.folder.path, quantization, model.folder.is_4bit, adapter, linears, adapters, pad_token_id(model)
    )


def ours_of(
    model: BaseModel, adapter: Path, lora: LoraSettings, quantization: QuantizationSettings, dtype: str
) -> Ours:
    """Our side of it, not made yet."""

    def engine() -> Engine:
        attention = default_attention(jnp.dtype(dtype), model.config.head_dim)
        return Engine(model.config, lora, quantization, compute_dtype=jnp.dtype(dtype), attention=attention)

    def start() -> Adapters:
        return as_adapters(load_adapter(adapter, model.config, model.folder), model.config)[1]

    return Ours(engine, lambda: load_weights(model.folder, model.config, quantization, "device"), start)
