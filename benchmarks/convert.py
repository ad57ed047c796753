"""Quantizing and merging a folder of Llama-2-7B's shapes, beside copying it and beside peft.

    python -m benchmarks.convert --layers 4                    # on a CPU: 2.1 GB, two minutes
    python -m benchmarks.convert --layers 12 --work DIR        # on a GPU: 5.4 GB, under three minutes; DIR on the disk that is meant

Each in a process of its own, two times in turn, the better one counts; every time includes a `sync`, and compiling what the compilation
cache does not have. The copy is made twice in a row, so that one of the two finds the memory that the other has just left: where a virtual
machine's host takes back what lay idle for some seconds, to get it again costs more than the copy, and a conversion, whose process starts
slowly, always pays that. Weights are random. Memory is the process's peak (VmHWM) less what it held once everything was imported and the
device had run something, as multiples of the largest tensor in bfloat16. peft merges on the CPU, which is what it does unasked, and where
torch sees a GPU on that one as well.
"""

import argparse
import importlib.util
import inspect
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from benchmarks.machine import write_result
from convert.adapters.adapter import save_adapter
from convert.files.folder import ModelFolder
from convert.files.shapes import tensor_shapes
from convert.files.shards import TensorSpec, write_index, write_json, write_pieces
from qlora_jax.config import LoraSettings, QuantizationSettings
from qlora_jax.model.families import read_architecture

ROOT = Path(__file__).parents[1]
SHARD_BYTES = 10**9
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}


def held(key: str) -> int:
    """A line of the kernel's account of this process's memory (`VmRSS:` now, `VmHWM:` at most so far), in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


SELF = f"""
import json, os, sys, time
from pathlib import Path

{inspect.getsource(held)}
def measure(work):
    before, start, begun = held("VmRSS:"), time.perf_counter(), os.times()
    work()
    os.sync()
    seconds, used = time.perf_counter() - start, os.times()
    cpu = used.user + used.system - begun.user - begun.system
    found = dict(seconds=seconds, cpu_seconds=cpu, imported_bytes=before, peak_bytes=held("VmHWM:"))
    print(json.dumps(found))

model, adapter, out = sys.argv[1:]
"""
OURS = """
import jax
from convert.adapters.adapter import load_adapter
from convert.files.folder import ModelFolder
from convert.load import read_config
from convert.merge import merge
from convert.quantize import quantize
from convert.hub import cache_dir
from qlora_jax.ops import dispatch
from qlora_jax.runtime import machine
from qlora_jax.config import QuantizationSettings
machine.keep_compiled(cache_dir() / "compiled")
dispatch.available()
def merged(base):
    folder = ModelFolder(model)
    merge(folder, load_adapter(adapter, read_config(folder)), Path(out), base)
"""
PEFT = """
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
def load_merge_save(device):
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).to(device)
    PeftModel.from_pretrained(base, adapter).merge_and_unload().save_pretrained(out)
"""
CHILDREN = {
    "quantize": SELF + OURS + "measure(lambda: quantize(ModelFolder(model), Path(out), QuantizationSettings()))",
    "merge_dequantized": SELF + OURS + 'measure(lambda: merged("dequantized"))',
    "merge_original": SELF + OURS + 'measure(lambda: merged("original"))',
    "peft_merge": SELF + PEFT + 'measure(lambda: load_merge_save("cpu"))',
    "peft_merge_on_gpu": SELF
    + PEFT
    + 'torch.ones(64, 64).to("cuda") @ torch.ones(64, 64).to("cuda"); measure(lambda: load_merge_save("cuda"))',
}


def main() -> None:
    """Make the folder, measure, and write `results/convert-DEVICE.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4, help="4: 2.1 GB; 32: 13.5 GB")
    parser.add_argument("--rounds", type=int, default=2, help="how often each is run; the best counts")
    parser.add_argument("--rank", type=int, default=64, help="of the adapter on all linears")
    parser.add_argument("--work", type=Path, default=None, metavar="DIR", help="where there is room for three of these")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.work) as work:
        model, adapter = Path(work) / "model", Path(work) / "adapter"
        make_model(model, options.layers)
        make_adapter(adapter, model, options.rank)
        found: dict[str, list[dict[str, float]]] = {}
        for _ in range(options.rounds):
            for name in ["copy", "copy", *children()]:
                out = Path(work) / "out"
                found.setdefault(name, []).append(
                    copy(model, out) if name == "copy" else run_child(name, model, adapter, out)
                )
                print(name, found[name][-1], file=sys.stderr, flush=True)
        result = summarize({name: min(runs, key=lambda run: run["seconds"]) for name, runs in found.items()}, model)
    import jax

    result = {"what": "convert", "layers": options.layers, "rank": options.rank, "rounds": options.rounds, **result}
    print(json.dumps(result, indent=2))
    print(write_result(f"convert-{jax.default_backend()}", result))


def children() -> list[str]:
    """What can be run here."""
    names = [name for name in CHILDREN if not name.startswith("peft")]
    if all(map(importlib.util.find_spec, ("torch", "peft"))):
        sees_gpu = [sys.executable, "-c", "import torch, sys; sys.exit(not torch.cuda.is_available())"]
        names += ["peft_merge"] + ["peft_merge_on_gpu"] * (subprocess.run(sees_gpu, check=False).returncode == 0)
    return names


def make_model(folder: Path, layers: int, **changes: int) -> None:
    """Random bfloat16 weights in shards of about a gigabyte; `changes` replace keys of the shape."""
    config = {**CONFIG, **changes, "num_hidden_layers": layers}
    specs = [TensorSpec(name, "BF16", shape) for name, shape in tensor_shapes(read_architecture(config)).items()]
    shards: list[list[TensorSpec]] = [[]]
    for spec in specs:
        if shards[-1] and sum(other.nbytes for other in shards[-1]) + spec.nbytes > SHARD_BYTES:
            shards.append([])
        shards[-1].append(spec)
    folder.mkdir()
    write_json(folder / "config.json", config)
    rng, weight_map = np.random.default_rng(0), {}
    for number, chosen in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_pieces(folder / file, chosen, _random(rng, sum(math.prod(spec.shape) for spec in chosen)))
        weight_map |= {spec.name: file for spec in chosen}
    write_index(folder, weight_map, sum(spec.nbytes for spec in specs))


def _random(rng: np.random.Generator, size: int, step: int = 2**22) -> Iterator[np.ndarray]:
    """Normal weights: stretches, from anywhere, of a few million of them."""
    drawn = (rng.standard_normal(4 * step, np.float32) * np.float32(0.02)).astype(ml_dtypes.bfloat16)
    for begin in range(0, size, step):
        first = int(rng.integers(3 * step))
        yield drawn[first : first + min(step, size - begin)]


def make_adapter(folder: Path, model: Path, rank: int) -> None:
    """Random A and B on all linears."""
    config = read_architecture(ModelFolder(model).config)
    rng, lora = np.random.default_rng(1), LoraSettings(r=rank)

    def pair(rows: int, columns: int) -> dict[str, np.ndarray]:
        shapes = {"lora_a": (rank, columns), "lora_b": (rows, rank)}
        return {part: rng.standard_normal(shape, np.float32) * np.float32(0.01) for part, shape in shapes.items()}

    adapters = [
        {name: {"adapter": pair(*shape)} for name, shape in config.linear_shapes().items()}
        for _ in range(config.num_hidden_layers)
    ]
    save_adapter(folder, adapters, lora, QuantizationSettings(), str(model), architecture=config)


def copy(model: Path, out: Path) -> dict[str, float]:
    """`cp` and `sync`."""
    os.sync()
    start = time.perf_counter()
    subprocess.run(["cp", "-r", str(model), str(out)], check=True)
    os.sync()
    seconds = time.perf_counter() - start
    shutil.rmtree(out)
    return {"seconds": seconds}


def run_child(name: str, model: Path, adapter: Path, out: Path) -> dict[str, float]:
    """One conversion in a process of its own; what it made is removed again."""
    os.sync()
    command = [sys.executable, "-c", CHILDREN[name], str(model), str(adapter), str(out)]
    printed = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout
    shutil.rmtree(out)
    found: dict[str, float] = json.loads(printed.splitlines()[-1])
    return found


def summarize(best: dict[str, dict[str, float]], model: Path) -> dict[str, Any]:
    """Rates of the folder's own bytes and weights, and memory over the largest tensor."""
    folder = ModelFolder(model)
    specs = [folder.spec(name) for name in folder.names]
    nbytes, largest = sum(spec.nbytes for spec in specs), max(spec.nbytes for spec in specs)
    rows = {}
    for name, run in best.items():
        rows[name] = {
            "seconds": round(run["seconds"], 2),
            "mb_per_s": round(nbytes / run["seconds"] / 1e6),
            "million_weights_per_s": round(nbytes / 2 / run["seconds"] / 1e6, 1),
            "of_copying": round(best["copy"]["seconds"] / run["seconds"], 2),
        }
        if "cpu_seconds" in run:
            rows[name]["cpu_seconds"] = round(run["cpu_seconds"], 2)
        if "peak_bytes" in run:
            above = run["peak_bytes"] - run["imported_bytes"]
            rows[name] |= {"peak_mb": round(run["peak_bytes"] / 1e6), "above_imports_mb": round(above / 1e6)}
            rows[name]["largest_tensors"] = round(above / largest, 2)
    return {"folder_mb": round(nbytes / 1e6), "largest_tensor_mb": round(largest / 1e6), "runs": rows}


if __name__ == "__main__":
    main()
