"""Training here beside training in PyTorch: 50 optimizer steps of SmolLM2-135M from the same adapter, on the same batches.

    python -m benchmarks.parity                                          # float32
    python -m benchmarks.parity --dtype bfloat16 --rows 2 --max-seq-length 64

NF4 with double quantization, LoRA of rank 16 on all linears, AdamW, clipping and the learning rates of `configs/quickstart.yaml`, its
data too. PyTorch's side (transformers, bitsandbytes, peft) quantizes the model itself and runs in a process of its own. Ours trains
twice: on the bytes that it quantized to, as a user would, and on bitsandbytes', which leaves arithmetic alone. Then each side's adapter is
evaluated on the other side. Writes `results/parity-DTYPE.json` and `.png`.
"""

import argparse
import dataclasses
import json
import math
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from benchmarks.machine import RESULTS, write_result
from convert.adapters.adapter import as_adapters, load_adapter, save_adapter
from convert.gguf.packages import SMOLLM2_ID as MODEL_ID
from convert.model import BaseModel, open_model
from qlora_jax.base.console import make_console, progress_bar
from qlora_jax.base.errors import exit_status
from qlora_jax.commands.compare import ours_of, pad_token_id, subject_of
from qlora_jax.compare import ours
from qlora_jax.compare.process import Run, require_libraries, run_reference, save_tokens
from qlora_jax.compare.report import plot_losses
from qlora_jax.compare.side import read_reference
from qlora_jax.config import Config, LoraSettings, load_config
from qlora_jax.data import Batch, Batches, eval_batches
from qlora_jax.data.corpus import read_examples
from qlora_jax.engine.engine import Adapters, Engine, Weights
from qlora_jax.engine.optimizer import schedule

ROOT = Path(__file__).parents[1]
CURVE_BOUND = {"float32": 1e-3, "bfloat16": 1e-2}
"""Relative, of the loss at every step."""
HELD_OUT_BOUND = 5e-3
"""Relative, of the held-out loss after the last step."""
SAME_ADAPTER_BOUND = {"float32": 1e-3, "bfloat16": 5e-3}
"""Relative, of the held-out loss of one adapter on the two sides."""


@exit_status
def main() -> int:
    """Train on both sides, write the curves and what they come to; 1 if they are not the same."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.parity", description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", default=MODEL_ID, metavar="ID_OR_DIR")
    parser.add_argument(
        "--dtype", choices=tuple(CURVE_BOUND), default="float32", help="of the computation; default: float32"
    )
    parser.add_argument("--steps", type=int, default=50, help="default: 50")
    parser.add_argument("--rows", type=int, default=4, help="a step; default: 4")
    parser.add_argument("--max-seq-length", type=int, default=96, help="default: 96")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="default: benchmarks/results")
    options = parser.parse_args()
    require_libraries()
    with tempfile.TemporaryDirectory() as work:
        result = Parity(options, Path(work)).run()
    name = f"parity-{options.dtype}"
    print(json.dumps({key: value for key, value in result.items() if key != "losses"}, indent=2))
    print(write_result(name, result, options.results))
    plot_losses({key: result["losses"][key] for key in ("ours", "theirs")}, options.results / f"{name}.png")
    return 0 if result["holds"] else 1


class Parity:
    """One run of both sides."""

    def __init__(self, options: argparse.Namespace, work: Path) -> None:
        self.options, self.work, self.console = options, work, make_console()
        overrides = [
            f"training.max_steps={options.steps}", f"training.per_device_train_batch_size={options.rows}",
            f"data.max_seq_length={options.max_seq_length}", f"training.output_dir={work}",
        ]  # fmt: skip
        self.config: Config = load_config(ROOT / "configs" / "quickstart.yaml", overrides)
        self.lora: LoraSettings = self.config.lora.model_copy(update={"lora_dropout": 0.0})
        self.model: BaseModel = open_model(options.model, log=self.console.print)
        self.batches, self.held_out = self.load_batches()
        rate = schedule(self.config.training, len(self.batches))
        self.rates = [rate(step) for step in range(len(self.batches))]

    def load_batches(self) -> tuple[list[Batch], list[Batch]]:
        """Training steps, and the held-out rows."""
        data, padding = self.config.data, pad_token_id(self.model)
        found = [
            read_examples(ROOT / path, self.model.tokenizer, data.max_seq_length)
            for path in (data.path, data.eval_path)
        ]
        batches = Batches(
            found[0], micro_batch_size=self.options.rows, grad_accum_steps=1, seed=self.config.training.seed,
            pad_token_id=padding, max_seq_length=data.max_seq_length, max_steps=self.options.steps,
        )  # fmt: skip
        return [batches.batch(step) for step in range(len(batches))], eval_batches(
            found[1], self.options.rows, padding, data.max_seq_length
        )

    def run(self) -> dict[str, Any]:
        """Everything, in the order that needs each side's process once and a half."""
        engine, weights, start = self.prepare()
        theirs = self.theirs()
        their_adapter = as_adapters(load_adapter(theirs.out / "adapter", self.model.config), self.model.config)[1]
        reference = read_reference(theirs.out, theirs.adapters)
        losses: dict[str, Sequence[float]] = {"theirs": reference.losses}
        shared = ours.with_reference_bytes(weights, theirs.out, self.options.dtype, "device")
        losses["ours"], adapters = self.train(engine, weights, start, "on our own bytes")
        losses["ours, on bitsandbytes' bytes"], twin = self.train(engine, shared, start, "on bitsandbytes' bytes")
        held_out = {
            "before": {"ours": self.evaluate(engine, weights, start), "theirs": reference.held_out[0]},
            "our adapter": {
                "ours": self.evaluate(engine, weights, adapters),
                "theirs": self.theirs_of(theirs, adapters),
            },
            "their adapter": {"ours": self.evaluate(engine, weights, their_adapter), "theirs": reference.held_out[1]},
        }
        own = {"on bitsandbytes' bytes": self.evaluate(engine, shared, twin)}
        return self.result(losses, held_out, own, reference.about)

    def prepare(self) -> tuple[Engine, Weights, Adapters]:
        """Our side, with fresh adapters, which are also written for PyTorch's."""
        made = ours_of(self.model, self.work / "start", self.lora, self.config.quantization, self.options.dtype)
        engine = made.engine()
        start = engine.init_adapters(self.config.training.seed)
        save_adapter(
            self.work / "start",
            start,
            self.lora,
            self.config.quantization,
            self.model.name_or_path,
            architecture=self.model.config,
        )
        return engine, made.weights(), start

    def theirs(self) -> Run:
        """PyTorch's side: quantize, evaluate, train, evaluate."""
        subject = subject_of(self.model, self.work / "start", self.lora, self.config.quantization)
        save_tokens(self.work / "tokens.npz", self.batches, self.held_out, subject.pad_token_id)
        run = Run(
            self.work / "theirs", subject.model, self.options.dtype, "cuda" if jax.default_backend() == "gpu" else "cpu",
            self.work / "tokens.npz", ["weights", "evaluate", "train"], subject.linears, subject.adapters, subject.adapter,
            subject.quantization.model_dump(), settings=self.config.training, learning_rates=self.rates,
        )  # fmt: skip
        self.reference(run)
        return run

    def theirs_of(self, theirs: Run, adapters: Adapters) -> float:
        """Held-out loss of an adapter of ours on PyTorch's side."""
        folder = self.work / "ours"
        save_adapter(
            folder,
            adapters,
            self.lora,
            self.config.quantization,
            self.model.name_or_path,
            architecture=self.model.config,
        )
        run = dataclasses.replace(theirs, out=self.work / "evaluated", adapter=folder, stages=["evaluate"])
        self.reference(run)
        return read_reference(run.out, run.adapters).held_out[0]

    def reference(self, run: Run) -> None:
        """Do a run of PyTorch's, and say how long it took."""
        begun = time.perf_counter()
        with progress_bar(self.console) as progress:
            task = progress.add_task("PyTorch's side", total=None)
            run_reference(
                [run], self.work / f"{run.out.name}.json",
                lambda what, done, total: progress.update(task, description=what, completed=done, total=total),
            )  # fmt: skip
        self.console.print(f"PyTorch's side, {', '.join(run.stages)}: {time.perf_counter() - begun:.0f} s")

    def train(self, engine: Engine, weights: Weights, start: Adapters, what: str) -> tuple[list[float], Adapters]:
        """Our side."""
        begun = time.perf_counter()
        with progress_bar(self.console) as progress:
            task = progress.add_task(f"training, ours, {what}", total=len(self.batches))
            found = ours.train(
                engine, weights, start, self.batches, settings=self.config.training, learning_rates=self.rates,
                advance=lambda: progress.advance(task),
            )  # fmt: skip
        self.console.print(f"ours, {what}: {time.perf_counter() - begun:.0f} s")
        return found

    def evaluate(self, engine: Engine, weights: Weights, adapters: Adapters) -> float:
        """Our held-out loss."""
        return ours.evaluate(engine, weights, adapters, self.held_out)

    def result(
        self, losses: dict[str, Any], held_out: dict[str, Any], own: dict[str, float], about: Any
    ) -> dict[str, Any]:
        """The numbers, beside what they may be."""
        dtype = self.options.dtype
        after = relative(held_out["our adapter"]["ours"], held_out["their adapter"]["theirs"])
        same = {name: relative(sides["ours"], sides["theirs"]) for name, sides in held_out.items()}
        worst = max(map(relative, losses["ours"], losses["theirs"]))
        arithmetic = max(map(relative, losses["ours, on bitsandbytes' bytes"], losses["theirs"]))
        bounds = (CURVE_BOUND[dtype], CURVE_BOUND[dtype], HELD_OUT_BOUND, SAME_ADAPTER_BOUND[dtype])
        return {
            "what": "parity",
            "reference": about,
            **{key: getattr(self.options, key) for key in ("dtype", "steps", "rows", "max_seq_length")},
            "tokens": sum(batch.num_input_tokens for batch in self.batches),
            "lora_r": self.lora.r,
            "learning_rate": self.config.training.learning_rate,
            "largest_relative_difference_of_a_step": worst,
            "the_same_on_bitsandbytes_bytes": arithmetic,
            "held_out_loss": {**held_out, **own},
            "held_out_perplexity": {
                name: {side: math.exp(value) for side, value in sides.items()} for name, sides in held_out.items()
            },
            "relative_difference_of_held_out_loss_after": after,
            "relative_difference_of_held_out_loss_of_one_adapter": same,
            "bounds": {"step": bounds[0], "held_out": bounds[2], "one_adapter": bounds[3]},
            "holds": all(
                value <= bound
                for value, bound in zip((worst, arithmetic, after, max(same.values())), bounds, strict=True)
            ),
            "losses": losses,
        }


def relative(found: float, expected: float) -> float:
    """|found - expected| / |expected|."""
    return abs(found - expected) / abs(expected)


if __name__ == "__main__":
    sys.exit(main())
