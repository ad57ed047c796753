"""A random model of Llama-2-7B's shape against PyTorch on the same device, in float32 and in bfloat16.

    python -m benchmarks.compare_gpu                                     # the GPU's: 4 layers, 2 x 512 tokens
    JAX_PLATFORMS=cpu python -m benchmarks.compare_gpu --tiny --results DIR      # to try it out

What `python -m qlora_jax compare` does, on random tokens: codes, hidden states, logits, loss, gradients and two optimizer steps. In
bfloat16 both sides are also measured from PyTorch in float32 on the same dequantized weights. PyTorch's side runs first, in a process of
its own, and has left the device when ours begins. Needs torch, transformers, bitsandbytes and peft. Writes `results/compare-DEVICE.json`.
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the two processes take turns, but share the device

import jax
import numpy as np

from benchmarks.convert import make_model
from benchmarks.machine import RESULTS, write_result
from benchmarks.tokenizer import byte_tokenizer
from convert.model import open_model
from qlora_jax.base.console import make_console, progress_bar
from qlora_jax.base.errors import exit_status
from qlora_jax.commands.compare import make_adapter, ours_of, subject_of
from qlora_jax.compare.both import Steps, differences, run_theirs
from qlora_jax.compare.process import require_libraries
from qlora_jax.compare.report import as_json, plot_layers, show
from qlora_jax.config import LoraSettings, QuantizationSettings, TrainingSettings
from qlora_jax.data import Batch
from qlora_jax.runtime.machine import device_kind

DTYPES = ("float32", "bfloat16")
LEARNING_RATE = 2e-4
STEPS = 2
TINY = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 4}


@exit_status
def main() -> int:
    """Make the model, run both sides in both dtypes, show and write the differences; 1 if a bound is exceeded."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare_gpu", description=__doc__.split("\n\n")[0])
    parser.add_argument("--layers", type=int, default=4, help="default: 4, of 202 million weights each")
    parser.add_argument("--rank", type=int, default=64, help="of the adapters on all linears; default: 64")
    parser.add_argument("--rows", type=int, default=2, help="default: 2")
    parser.add_argument("--tokens", type=int, default=512, help="a row; default: 512")
    parser.add_argument("--tiny", action="store_true", help="a small shape, to try this out on a CPU")
    parser.add_argument("--work", type=Path, metavar="DIR", help="where there is room for 1.6 GB and 0.7 GB a layer")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="default: benchmarks/results")
    options = parser.parse_args()
    require_libraries()
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=options.work) as work:
        found = measure(options, Path(work))
    name = f"compare-{card_name(device_kind())}"
    shape = {key: getattr(options, key) for key in ("layers", "rank", "rows", "tokens", "tiny")}
    result = {"what": "compare_gpu", **shape, "seconds": round(time.perf_counter() - started, 1)}
    print(write_result(name, {**result, **{dtype: as_json(found[dtype]) for dtype in DTYPES}}, options.results))
    plot_layers(found["bfloat16"], options.results / f"{name}.png")
    return 1 if any(comparison.exceeded for comparison in found.values()) else 0


def card_name(device_kind: str) -> str:
    """`NVIDIA H100 80GB HBM3` → `h100`, `NVIDIA GeForce RTX 4090` → `rtx-4090`."""
    words = [word for word in device_kind.lower().split() if word not in ("nvidia", "geforce", "tesla")]
    return "-".join(words[: 2 if words[0] == "rtx" else 1])


def measure(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Both sides; the comparison in each dtype."""
    console = make_console()
    console.print("writing a random model")
    make_model(work / "model", options.layers, **(TINY if options.tiny else {}))
    byte_tokenizer().save_pretrained(work / "model")
    model = open_model(str(work / "model"), log=console.print)
    lora, quantization = LoraSettings(r=options.rank, lora_dropout=0.0), QuantizationSettings()
    adapter = make_adapter(work / "adapter", model, lora, quantization)
    rng = np.random.default_rng(0)
    batches = [random_batch(rng, options.rows, options.tokens, model.config.vocab_size) for _ in range(STEPS)]
    steps = Steps(batches, [LEARNING_RATE] * STEPS, TrainingSettings(output_dir=work))
    subject = subject_of(model, adapter, lora, quantization)
    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    with progress_bar(console) as progress:
        task = progress.add_task("PyTorch's side", total=None)
        references = run_theirs(
            subject, steps, DTYPES, device=device, work=work,
            progress=lambda what, done, total: progress.update(task, description=what, completed=done, total=total),
        )  # fmt: skip
    found = {}
    for dtype in DTYPES:
        console.print(f"\n{dtype}")
        found[dtype] = differences(
            subject, ours_of(model, adapter, lora, quantization, dtype), steps, references[dtype]
        )
        show(found[dtype], console)
    return found


def random_batch(rng: np.random.Generator, rows: int, tokens: int, vocab_size: int) -> Batch:
    """Any tokens, all of them supervised."""
    ids = rng.integers(0, vocab_size, (1, rows, tokens), dtype=np.int32)
    return Batch(ids, ids, rows * (tokens - 1), rows * tokens)


if __name__ == "__main__":
    sys.exit(main())
