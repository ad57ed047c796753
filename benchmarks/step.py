"""Seconds and memory of one optimizer step on random weights of a Llama shape, wherever they live.

    python -m benchmarks.step 7b:8 --batch 4 --seq 2048
    XLA_CLIENT_MEM_FRACTION=0.163 python -m benchmarks.step 70b --batch 1 --seq 4096 --weights host     # plays a 24 GB card

Adapters of rank 64 on all linears, recomputation, AdamW and clipping included. One process measures one case: peaks are a process's own.
"""

import argparse
import json
import os
import statistics
import sys
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.machine import describe, process_gpu_gib
from qlora_jax.config import LoraSettings, QuantizationSettings, TrainingSettings
from qlora_jax.data import Batch
from qlora_jax.engine import Engine, Weights, default_attention
from qlora_jax.llama import LlamaConfig
from qlora_jax.metrics import peak_device_gib, peak_host_gib
from qlora_jax.optimizer import AdamW
from qlora_jax.placement import LayerStore, Tree, put

SHAPES = {
    "7b": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
    },
    "13b": {
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "num_key_value_heads": 40,
    },
    "70b": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
    "135m": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
    },
}


def random_tree(abstract: Tree, key: jax.Array) -> Tree:
    """Random arrays for a described tree: any codes, scales that make weights of ordinary size, norms of one."""

    def leaf(path: Any, description: jax.ShapeDtypeStruct) -> jax.Array:
        name = jax.tree_util.keystr(path)
        if description.dtype == jnp.uint8:
            return jax.random.bits(jax.random.fold_in(key, zlib.crc32(name.encode())), description.shape, jnp.uint8)
        return jnp.full(description.shape, 0.03 if "nested" in name else 1.0, description.dtype)

    return jax.tree_util.tree_map_with_path(leaf, abstract)


def random_weights(engine: Engine, where: str) -> Weights:
    """A whole random model, its layers made on the device one at a time and moved to their place."""
    make = jax.jit(lambda key: random_tree(engine.abstract_layer, key))

    def layers() -> Iterator[Tree]:
        for layer in range(engine.config.num_hidden_layers):
            yield make(jax.random.key(layer))

    vocabulary = (engine.config.vocab_size, engine.config.hidden_size)
    embedding, head = (0.02 * jax.random.normal(jax.random.key(i), vocabulary, jnp.bfloat16) for i in (1, 2))
    norm = jnp.ones(vocabulary[1:], jnp.bfloat16)
    return Weights(
        put({"weight": embedding}, "device"),
        LayerStore(layers(), where),
        put({"norm": {"weight": norm}, "weight": head}, "device"),
    )


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Build, warm up, time; see the module's docstring."""
    name, _, layers = options.model.partition(":")
    shape = {**SHAPES[name], "vocab_size": 32000, "model_type": "llama", "rms_norm_eps": 1e-5}
    config = LlamaConfig.from_hf({**shape, "num_hidden_layers": int(layers or shape["num_hidden_layers"])})
    dtype = jnp.dtype(options.dtype)
    lora = LoraSettings(r=64, lora_dropout=options.dropout)
    attention = default_attention(dtype, config.head_dim)
    engine = Engine(
        config, lora, QuantizationSettings(), compute_dtype=dtype, attention=attention, activations=options.activations
    )
    start = time.perf_counter()
    weights = random_weights(engine, options.weights)
    build = time.perf_counter() - start
    adapters = engine.init_adapters(0)
    optimizer = AdamW(TrainingSettings(output_dir=Path()), adapters, options.optimizer)
    ids = np.random.default_rng(0).integers(0, 32000, (options.accumulate, options.batch, options.seq)).astype(np.int32)
    batch = Batch(ids, ids, ids[..., 1:].size, ids.size)
    seconds, losses = [], []
    for step in range(options.steps + 1):
        start = time.perf_counter()
        loss, grads = engine.value_and_grad(weights, adapters, batch, put(jax.random.key(step), "device"))
        adapters, _ = optimizer.update(adapters, grads, 2e-4)
        del grads
        jax.block_until_ready((adapters, optimizer.moments))
        seconds.append(time.perf_counter() - start)
        losses.append(float(loss))
    best = min(seconds[1:])
    linear = sum(rows * columns for rows, columns in config.linear_shapes().values()) * config.num_hidden_layers
    flop = 6 * (linear + config.vocab_size * config.hidden_size) * ids.size
    return {
        "what": "step",
        **{name: getattr(options, name) for name in ("model", "accumulate", "batch", "seq", "dtype", "dropout")},
        **{name: getattr(options, name) for name in ("weights", "activations", "optimizer")},
        "memory_fraction": os.environ.get("XLA_CLIENT_MEM_FRACTION"),
        "step_s": round(best, 4),
        "median_s": round(statistics.median(seconds[1:]), 4),
        "compile_s": round(seconds[0] - best, 2),
        "build_s": round(build, 1),
        "tokens_per_s": round(ids.size / best, 1),
        "tflops": round(flop / best / 1e12, 1),
        "peak_device_gib": peak_device_gib(),
        "process_device_gib": process_gpu_gib(),
        "peak_host_gib": peak_host_gib(),
        "losses": losses,
    }


def main() -> None:
    """Parse, measure, print one JSON line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("model", metavar="SHAPE[:LAYERS]", help=f"one of {', '.join(SHAPES)}, e.g. 7b:8")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--accumulate", type=int, default=1, help="micro-batches a step")
    parser.add_argument("--seq", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=4, help="timed steps, after one that compiles")
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    for place in ("weights", "activations", "optimizer"):
        parser.add_argument(f"--{place}", default="device", choices=("device", "host"))
    parser.add_argument("--machine", action="store_true", help="print the machine's description first")
    options = parser.parse_args()
    if options.machine:
        print(json.dumps(describe()))
    print(json.dumps(measure(options)), flush=True)


if __name__ == "__main__":
    sys.exit(main())
