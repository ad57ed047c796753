"""What is left of an adapter in a merged folder that is quantized again, for both bases. `python -m benchmarks.merge_formats`.

The quickstart's adapter is merged into the original and into the dequantized base, and each folder's decoder linears are taken as they
are, through NF4 and FP4 (double quantization), and through llama.cpp's Q8_0 and Q4_0 (by the gguf package). All compute in float32, on the
quickstart's held-out rows. Writes `results/merge-formats.json` and `merge-formats.png`.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.machine import RESULTS, write_result
from convert.adapters.adapter import Adapter, as_adapters, load_adapter
from convert.adapters.delta import Base
from convert.files.folder import ModelFolder
from convert.hub import cache_dir
from convert.jobs.held_out import mean_loss
from convert.jobs.requantize import read_note
from convert.load import load_weights, read_layer
from convert.merge import merge
from convert.model import BaseModel, open_model
from qlora_jax.base.console import make_console
from qlora_jax.base.errors import exit_status
from qlora_jax.config import Config, QuantizationSettings, load_config
from qlora_jax.data import Batch
from qlora_jax.data.corpus import load_corpus
from qlora_jax.engine.engine import Engine, Weights
from qlora_jax.runtime.placement import LayerStore, Tree

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "configs" / "quickstart.yaml"
DTYPE = "float32"
BASES: tuple[Base, ...] = ("dequantized", "original")


def through_bitsandbytes(folder: ModelFolder, model: BaseModel, quantization: QuantizationSettings | None) -> Weights:
    """The model with its linears in 4 bits, or with None as they are."""
    return load_weights(folder, model.config, quantization, "device")


def through_gguf(folder: ModelFolder, model: BaseModel, kind: gguf.GGMLQuantizationType) -> Weights:
    """The model with its linears through one of llama.cpp's formats and back, float32."""

    def back(weight: np.ndarray) -> jax.Array:
        packed = gguf.quants.quantize(np.asarray(weight, np.float32), kind)
        return jnp.asarray(gguf.quants.dequantize(packed, kind))

    def layers() -> Iterator[Tree]:
        for index in range(model.config.num_hidden_layers):
            layer = read_layer(folder, index, None)
            yield layer | {name: {"weight": back(layer[name]["weight"])} for name in model.config.linears}

    plain = load_weights(folder, model.config, None, "disk")
    return Weights(plain.embedding, LayerStore(layers(), "device"), plain.head)


FORMATS: dict[str, Callable[[ModelFolder, BaseModel], Weights]] = {
    "bf16": lambda folder, model: through_bitsandbytes(folder, model, None),
    "NF4": lambda folder, model: through_bitsandbytes(folder, model, QuantizationSettings()),
    "FP4": lambda folder, model: through_bitsandbytes(folder, model, QuantizationSettings(quant_type="fp4")),
    "Q8_0": lambda folder, model: through_gguf(folder, model, gguf.GGMLQuantizationType.Q8_0),
    "Q4_0": lambda folder, model: through_gguf(folder, model, gguf.GGMLQuantizationType.Q4_0),
}


@exit_status
def main() -> None:
    """Train if need be, merge, measure, print and write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.merge_formats", description=__doc__.split("\n\n")[0])
    parser.add_argument("--adapter", type=Path, metavar="DIR", help="the quickstart's; default: it is trained anew")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="default: benchmarks/results")
    options = parser.parse_args()
    console, config = make_console(), load_config(CONFIG)
    with tempfile.TemporaryDirectory() as work:
        place = options.adapter or trained_adapter(Path(work))
        model = open_model(config.model.name_or_path, log=console.print)
        adapter = load_adapter(place, model.config)
        batches = load_corpus(config, model.tokenizer, cache_dir() / "tokenized", console).eval_batches()
        found = {"base and adapter": trained_losses(model, adapter, config, batches)}
        for base in BASES:
            out = Path(work) / base
            merge(model.folder, adapter, out, base, log=console.print)
            merged = ModelFolder(out)
            losses = {
                name: mean_loss(model.config, read(merged, model), batches, DTYPE) for name, read in FORMATS.items()
            }
            note = read_note(merged)
            found[base] = {"held_out_loss": losses, "requantized": note and note.model_dump(mode="json")["requantized"]}
            console.print(f"{base}: {losses}")
    weights = "the hub's" if "snapshots" in model.folder.path.parts else "a GGUF copy's, in 4 bits before"
    about = {"model": config.model.name_or_path, "weights": weights, "rows": str(config.data.eval_path)}
    result = {"what": "merge-formats", **about, **found}
    print(json.dumps(result, indent=2))
    print(write_result("merge-formats", result, options.results))
    plot(found, options.results / "merge-formats.png")


def trained_adapter(work: Path) -> Path:
    """The adapter of a quickstart that is run now."""
    out = work / "run"
    command = [sys.executable, "train.py", "--config", str(CONFIG), f"training.output_dir={out}"]
    subprocess.run([*command, "training.export_merged=false", "training.sample_prompt=null"], cwd=ROOT, check=True)
    return out / "adapter"


def trained_losses(model: BaseModel, adapter: Adapter, config: Config, batches: list[Batch]) -> dict[str, float]:
    """Of what was trained: the base in NF4 without and with the adapter."""
    lora, adapters = as_adapters(adapter, model.config)
    weights = load_weights(model.folder, model.config, config.quantization, "device")
    engine = Engine(model.config, lora, config.quantization, compute_dtype=DTYPE)
    nothing = mean_loss(model.config, weights, batches, DTYPE)
    return {"untrained": nothing, "trained": engine.loss(weights, adapters, batches)}


def plot(found: dict[str, Any], path: Path) -> None:
    """A bar for each format and base, beside what was trained."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes, places = figure.subplots(), np.arange(len(FORMATS))
    for offset, base in zip((-0.2, 0.2), BASES, strict=True):
        losses = list(found[base]["held_out_loss"].values())
        bars = axes.bar(places + offset, losses, 0.38, label=f"merged into the {base} base")
        axes.bar_label(bars, fmt="%.3f", fontsize=8)
    for name, style in (("untrained", ":"), ("trained", "--")):
        axes.axhline(found["base and adapter"][name], color="grey", linestyle=style, label=f"NF4 base, {name}")
    axes.set(ylabel="held-out loss (nats a token)", ylim=(2, None))
    axes.set_xticks(places, list(FORMATS))
    axes.legend()
    figure.savefig(path)


if __name__ == "__main__":
    main()
