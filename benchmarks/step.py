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
from qlora_jax.llama import MLP_TOKENS, LlamaConfig
from qlora_jax.metrics import peak_device_gib, peak_host_gib
from qlora_jax.optimizer import AdamW
from qlora_jax.placement import SLOTS, LayerPlace, LayerStore, Tree, put, spread

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


def random_weights(engine: Engine, where: LayerPlace | list[LayerPlace], slots: int = SLOTS) -> Weights:
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
        LayerStore(layers(), where, slots=slots),
        put({"norm": {"weight": norm}, "weight": head}, "device"),
    )


class Case:
    """A model, an optimizer and a batch of the shape that was asked for, ready to take steps."""

    def __init__(self, options: argparse.Namespace) -> None:
        name, _, layers = options.model.partition(":")
        shape = {**SHAPES[name], "vocab_size": 32000, "model_type": "llama", "rms_norm_eps": 1e-5}
        self.config = LlamaConfig.from_hf({**shape, "num_hidden_layers": int(layers or shape["num_hidden_layers"])})
        dtype = jnp.dtype(options.dtype)
        self.engine = Engine(
            self.config,
            LoraSettings(r=options.rank, lora_dropout=options.dropout),
            QuantizationSettings(),
            compute_dtype=dtype,
            attention=default_attention(dtype, self.config.head_dim),
            activations=options.activations,
            adapters=options.adapters,
            keep=self.config.num_hidden_layers if options.keep is None else options.keep,
            share_dense=options.share_dense,
            mlp_tokens=options.mlp_tokens,
        )
        places = spread(options.resident, self.config.num_hidden_layers) if options.resident else options.weights
        start = time.perf_counter()
        self.weights = random_weights(self.engine, places, options.slots)
        self.build_s = time.perf_counter() - start
        self.adapters = self.engine.init_adapters(0)
        settings = TrainingSettings(output_dir=Path(), optim=options.optim)
        self.optimizer = AdamW(settings, self.adapters, options.optimizer)
        shape = (options.accumulate, options.batch, options.seq)
        ids = np.random.default_rng(0).integers(0, self.config.vocab_size, shape).astype(np.int32)
        self.batch = Batch(ids, ids, ids[..., 1:].size, ids.size)
        self.steps = 0

    def step(self) -> tuple[float, float]:
        """One optimizer step, to its end: (seconds, loss)."""
        start = time.perf_counter()
        key = put(jax.random.key(self.steps), "device")
        loss, grads = self.engine.value_and_grad(self.weights, self.adapters, self.batch, key)
        self.adapters, _ = self.optimizer.update(self.adapters, grads, 2e-4)
        del grads
        jax.block_until_ready((self.adapters, self.optimizer.moments))
        self.steps += 1
        return time.perf_counter() - start, float(loss)

    def flop(self) -> int:
        """Arithmetic of one step with recomputation: 6 FLOP a base weight (head included) and token; adapters and attention not counted."""
        linear = sum(rows * columns for rows, columns in self.config.linear_shapes().values())
        weights = linear * self.config.num_hidden_layers + self.config.vocab_size * self.config.hidden_size
        return 6 * weights * self.batch.input_ids.size


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Build, warm up, time; see the module's docstring."""
    case = Case(options)
    seconds, losses = zip(*(case.step() for _ in range(options.steps + 1)), strict=True)
    best, tokens = min(seconds[1:]), case.batch.input_ids.size
    return {
        "what": "step",
        **{name: getattr(options, name) for name in ("model", "accumulate", "batch", "seq", "dtype", "dropout")},
        **{
            name: getattr(options, name)
            for name in ("weights", "resident", "activations", "adapters", "optimizer", "optim")
        },
        **{name: getattr(options, name) for name in ("keep", "share_dense", "mlp_tokens", "slots")},
        "memory_fraction": os.environ.get("XLA_CLIENT_MEM_FRACTION"),
        "step_s": round(best, 4),
        "median_s": round(statistics.median(seconds[1:]), 4),
        "compile_s": round(seconds[0] - best, 2),
        "build_s": round(case.build_s, 1),
        "tokens_per_s": round(tokens / best, 1),
        "tflops": round(case.flop() / best / 1e12, 1),
        "peak_device_gib": peak_device_gib(),
        "process_device_gib": process_gpu_gib(),
        "peak_host_gib": peak_host_gib(),
        "losses": losses,
    }


def add_case_arguments(parser: argparse.ArgumentParser) -> None:
    """What makes a case: shape, tokens, places."""
    parser.add_argument("model", metavar="SHAPE[:LAYERS]", help=f"one of {', '.join(SHAPES)}, e.g. 7b:8")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--accumulate", type=int, default=1, help="micro-batches a step")
    parser.add_argument("--seq", type=int, default=2048)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--optim", default="paged_adamw_32bit", choices=("paged_adamw_32bit", "paged_adamw_8bit"))
    parser.add_argument("--resident", type=int, default=0, help="layers on the device, spread among those on the host")
    parser.add_argument("--keep", type=int, default=0, nargs="?", help="layers not run again; without a number all")
    parser.add_argument(
        "--no-share-dense", dest="share_dense", action="store_false", help="see qlora_jax.engine.Engine"
    )
    parser.add_argument("--mlp-tokens", type=int, default=MLP_TOKENS)
    parser.add_argument("--slots", type=int, default=SLOTS)
    for place in ("weights", "activations", "adapters", "optimizer"):
        parser.add_argument(f"--{place}", default="device", choices=("device", "host"))


def main() -> None:
    """Parse, measure, print one JSON line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add_case_arguments(parser)
    parser.add_argument("--steps", type=int, default=4, help="timed steps, after one that compiles")
    parser.add_argument("--machine", action="store_true", help="print the machine's description first")
    options = parser.parse_args()
    if options.machine:
        print(json.dumps(describe()))
    print(json.dumps(measure(options)), flush=True)


if __name__ == "__main__":
    sys.exit(main())
