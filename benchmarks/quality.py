"""What 4 bits cost: perplexities of SmolLM2-135M on real text, and QLoRA beside LoRA on the bfloat16 model. `python -m benchmarks.quality`.

The text is the Python documentation that every Python carries (`pydoc_data.topics`), cut into rows of 512 tokens. Measured on it: the
bfloat16 model and its NF4 form (double quantization), each here and in transformers with bitsandbytes, which quantizes the model itself.
All of them compute in float32. Then ours trains the same adapter on the 4-bit model and on the bfloat16 one, with the settings and data
of `configs/quickstart.yaml`, once for each seed. Writes `results/quality.json` and `quality.png`.
"""

import argparse
import hashlib
import json
import math
import platform
import sys
import tempfile
from pathlib import Path
from pydoc_data import topics
from typing import Any

import jax
import numpy as np

from benchmarks.machine import RESULTS, write_result
from benchmarks.parity import Parity
from convert.gguf.packages import SMOLLM2_ID as MODEL_ID
from convert.load import load_weights
from convert.model import BaseModel
from qlora_jax.base.console import make_console, progress_bar
from qlora_jax.base.errors import exit_status
from qlora_jax.compare import ours
from qlora_jax.compare.process import Run, require_libraries, run_reference, save_tokens
from qlora_jax.compare.side import read_reference
from qlora_jax.config import QuantizationSettings
from qlora_jax.data import Batch
from qlora_jax.engine.engine import Engine, Weights

ROW_TOKENS, ROWS_A_BATCH = 512, 4
EQUAL = 1e-3
"""Relative, of ours' and bitsandbytes' perplexity."""
FORMS: dict[str, QuantizationSettings | None] = {"bfloat16": None, "nf4": QuantizationSettings()}


@exit_status
def main() -> int:
    """Measure, print and write; 1 if ours and bitsandbytes' perplexities are not equal."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", default=MODEL_ID, metavar="ID_OR_DIR")
    parser.add_argument("--rows", type=int, default=40, help="of 512 tokens, taken evenly from the text; default: 40")
    parser.add_argument("--steps", type=int, default=50, help="of training; default: 50")
    parser.add_argument("--seeds", type=int, default=2, help="how often the training is done; default: 2")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="default: benchmarks/results")
    options = parser.parse_args()
    require_libraries()
    with tempfile.TemporaryDirectory() as work:
        training = argparse.Namespace(
            model=options.model, dtype="float32", steps=options.steps, rows=4, max_seq_length=96
        )
        parity = Parity(training, Path(work))
        about, batches = text_of(parity.model, options.rows)
        found = perplexities(parity.model, batches, Path(work))
        runs = [trained(parity, seed) for seed in range(options.seeds)]
    print(json.dumps(found, indent=2))
    apart = abs(found["nf4"]["ours"] / found["nf4"]["bitsandbytes"] - 1)
    result = {
        "what": "quality",
        "model": options.model,
        "text": about,
        "perplexity": found,
        "relative_difference": apart,
    }
    result |= {"steps": options.steps, "training": runs, "holds": apart <= EQUAL}
    print(write_result("quality", result, options.results))
    plot(runs, options.results / "quality.png")
    return 0 if result["holds"] else 1


def text_of(model: BaseModel, rows: int) -> tuple[dict[str, Any], list[Batch]]:
    """What the text is, and its rows in batches, every token but a row's first counted."""
    text = "\n\n".join(topics.topics[key] for key in sorted(topics.topics))
    ids = np.array(model.tokenizer(text, verbose=False)["input_ids"], np.int32)
    cut = ids[: ids.size // ROW_TOKENS * ROW_TOKENS].reshape(-1, ROW_TOKENS)
    chosen = cut[np.linspace(0, len(cut) - 1, min(rows, len(cut)) // ROWS_A_BATCH * ROWS_A_BATCH).astype(int)]
    batches = [
        Batch(each, each, each[..., 1:].size, each.size) for each in chosen.reshape(-1, 1, ROWS_A_BATCH, ROW_TOKENS)
    ]
    about = {
        "source": f"pydoc_data.topics of Python {platform.python_version()}",
        "sha256": hashlib.sha256(text.encode()).hexdigest(),
        "tokens": int(chosen.size),
        "row_tokens": ROW_TOKENS,
    }
    return about, batches


def perplexities(model: BaseModel, batches: list[Batch], work: Path) -> dict[str, dict[str, float]]:
    """Of each form of the model, on each side."""
    save_tokens(work / "text.npz", batches[:1], batches, 0)
    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    runs = {
        name: Run(
            work / name, model.folder.path, "float32", device, work / "text.npz", ["evaluate"], {},
            quantization=None if form is None else form.model_dump(),
        )
        for name, form in FORMS.items()
    }  # fmt: skip
    console = make_console()
    with progress_bar(console) as progress:
        task = progress.add_task("PyTorch's side", total=None)
        run_reference(
            list(runs.values()), work / "text.json",
            lambda what, done, total: progress.update(task, description=what, completed=done, total=total),
        )  # fmt: skip
    engine = Engine(model.config, None, QuantizationSettings(), compute_dtype="float32")
    nothing = [{} for _ in range(model.config.num_hidden_layers)]
    found = {}
    for name, form in FORMS.items():
        weights = load_weights(model.folder, model.config, form, "device")
        other = "transformers" if form is None else "bitsandbytes"
        theirs = read_reference(runs[name].out, {}).held_out[0]
        found[name] = {
            "ours": math.exp(ours.evaluate(engine, weights, nothing, batches)),
            other: math.exp(theirs),
        }
        console.print(f"{name}: {found[name]}")
    return found


def trained(parity: Parity, seed: int) -> dict[str, Any]:
    """The same adapter trained on the 4-bit model (QLoRA) and on the bfloat16 one (LoRA), by the same engine."""
    engine, _, _ = parity.prepare()
    start, found = engine.init_adapters(seed), {"seed": seed}
    for name, form in (("qlora", parity.config.quantization), ("lora", None)):
        weights: Weights = load_weights(parity.model.folder, parity.model.config, form, "device")
        before = parity.evaluate(engine, weights, start)
        losses, adapters = parity.train(engine, weights, start, f"{name}, seed {seed}")
        after = parity.evaluate(engine, weights, adapters)
        parity.console.print(f"{name}, seed {seed}: held-out loss {before:.4f} -> {after:.4f}")
        found[name] = {"held_out_before": before, "held_out_after": after, "losses": losses}
    return found


def plot(runs: list[dict[str, Any]], path: Path) -> None:
    """The loss of each run, QLoRA and LoRA."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.subplots()
    for run in runs:
        for name, color in (("qlora", "C0"), ("lora", "C1")):
            losses, label = run[name]["losses"], {"qlora": "QLoRA, NF4", "lora": "LoRA, bfloat16"}[name]
            after = run[name]["held_out_after"]
            axes.plot(range(1, len(losses) + 1), losses, color=color, alpha=0.5, linewidth=1)
            axes.plot(
                [len(losses)],
                [after],
                color=color,
                marker="o",
                label=f"{label}, seed {run['seed']}: held out {after:.3f}",
            )
    axes.set(xlabel="optimizer step", ylabel="loss (nats a token)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path)


if __name__ == "__main__":
    sys.exit(main())
