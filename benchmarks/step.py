"""Seconds and memory of one optimizer step on random weights of a Llama shape, wherever they live.

    python -m benchmarks.step 7b:8 --batch 4 --seq 2048
    python -m benchmarks.step 70b --batch 1 --seq 4096 --gpu-memory 24GiB --auto auto     # plays a 24 GiB card, as the planner would

Adapters of rank 64 on all linears, AdamW and clipping included. One process measures one case: peaks are a process's own. Beside what is
measured stands what the planner predicts for the same layout. `tflops` counts 6 FLOP a base weight and token, recomputed or not.
"""

import argparse
import dataclasses
import json
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
from convert.hub import cache_dir
from qlora_jax.base.units import GIB, parse_bytes
from qlora_jax.config import LoraSettings, MemorySettings, QuantizationSettings, TrainingSettings
from qlora_jax.data import Batch
from qlora_jax.engine.engine import Engine, Started, Weights
from qlora_jax.engine.optimizer import AdamW
from qlora_jax.model.architecture import Architecture
from qlora_jax.model.attention import default_attention
from qlora_jax.model.decoder import MLP_TOKENS
from qlora_jax.model.families import read_architecture
from qlora_jax.planning.budget import PINNED_SLACK, Limits, Plan
from qlora_jax.planning.estimate import Job, Layout, workspace
from qlora_jax.planning.hardware import measured, published
from qlora_jax.planning.search import compiled_workspace, make_engine, make_plan
from qlora_jax.runtime import machine
from qlora_jax.runtime.placement import SLOTS, LayerPlace, LayerStore, Tree, one_device
from qlora_jax.training.metrics import peak_device_gib, peak_host_gib

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
        if len(description.shape) > 1:
            return (
                0.02 * jax.random.normal(jax.random.fold_in(key, zlib.crc32(name.encode())), description.shape)
            ).astype(description.dtype)
        return jnp.full(description.shape, 0.03 if "nested" in name else 1.0, description.dtype)

    return jax.tree_util.tree_map_with_path(leaf, abstract)


def unquantized(abstract: Tree, config: Architecture) -> Tree:
    """A described layer with plain bfloat16 matrices for its linears: LoRA without the Q."""
    matrices = {
        name: {"weight": jax.ShapeDtypeStruct(shape, jnp.bfloat16)} for name, shape in config.linear_shapes().items()
    }
    return {**abstract, **matrices}


def random_weights(engine: Engine, places: list[LayerPlace], slots: int, distinct: int, base: str = "nf4") -> Weights:
    """A whole random model, its layers made on the device one at a time and moved to their place.

    Layers on the host from number `distinct` on are the first ones again: the same bytes to copy, in less memory.
    """
    abstract = engine.abstract_layer if base == "nf4" else unquantized(engine.abstract_layer, engine.config)
    make = jax.jit(lambda key: random_tree(abstract, key))
    on_host: list[Tree] = []

    def layers() -> Iterator[Tree]:
        for layer, place in enumerate(places):
            if place == "device" or len(on_host) < distinct:
                made = make(jax.random.key(layer))
                tree = one_device().keep(
                    jax.device_get(made) if place == "host" else made, place
                )  # as if it came from the disk
                on_host.extend([tree] if place == "host" else [])
                yield tree
            else:
                yield on_host[layer % distinct]

    vocabulary = (engine.config.vocab_size, engine.config.hidden_size)
    embedding, head = (0.02 * jax.random.normal(jax.random.key(i), vocabulary, jnp.bfloat16) for i in (1, 2))
    norm = jnp.ones(vocabulary[1:], jnp.bfloat16)
    return Weights(
        one_device().put({"weight": embedding}, "device"),
        LayerStore(layers(), places, slots=slots),
        one_device().put({"norm": {"weight": norm}, "weight": head}, "device"),
    )


def shape_name(text: str) -> str:
    """A key of `SHAPES`, which may be called `llama2-70b` as well as `70b`."""
    return text.removeprefix("llama2-")


def llama(name: str) -> Architecture:
    """`7b`, or `7b:8` for its first eight layers."""
    shape, _, layers = shape_name(name).partition(":")
    settings = {**SHAPES[shape], "vocab_size": 32000, "model_type": "llama", "rms_norm_eps": 1e-5}
    return read_architecture({**settings, "num_hidden_layers": int(layers or settings["num_hidden_layers"])})


def settle(options: argparse.Namespace) -> Plan:
    """The case's layout, as the options have it or as the planner chooses, and what it is predicted to cost. Starts JAX's backend."""
    gpu, on_gpu = machine.find_gpu(), machine.find_gpu() is not None
    config = llama(options.model)
    lora = LoraSettings(r=options.rank, lora_dropout=options.dropout)
    attention = default_attention(options.dtype, config.head_dim, on_gpu=on_gpu)
    shape = (options.batch, options.seq, options.accumulate)
    job = Job(config, lora, QuantizationSettings(), options.optim, *shape, options.dtype, attention, on_gpu)
    asked = parse_bytes(options.gpu_memory) if options.gpu_memory else None
    host = machine.available_host_bytes()
    limits = Limits(machine.usable_bytes(gpu, asked) if gpu else None, host)
    if options.auto:
        guess = make_plan(job, MemorySettings(), options.auto, limits, published(gpu.name) if gpu else None)
    else:
        depth = config.num_hidden_layers
        resident = depth if options.weights == "device" else options.resident
        guess = Plan(
            job,
            Layout(
                resident,
                "host",
                options.activations,
                options.adapters,
                options.optimizer,
                depth if options.keep is None else options.keep,
                options.share_dense,
                options.mlp_tokens,
                options.slots,
            ),
            workspace(job, Layout(resident)),
            limits,
            published(),
        )
    registered = gpu is not None and machine.registers_host_memory()
    pool_bytes = int(PINNED_SLACK * guess.pool_bytes(registered=registered))
    machine.prepare(gpu, limits.device, pool_bytes, cache_dir() / "compiled")
    if gpu is None:
        return dataclasses.replace(guess, rates=None)
    if options.auto:
        return make_plan(job, MemorySettings(), options.auto, limits, measured(), workspace_of=compiled_workspace)
    return dataclasses.replace(guess, work=compiled_workspace(job, guess.layout), rates=measured())


class Case:
    """A model, an optimizer and a batch of the shape that was asked for, ready to take steps."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.plan = plan = settle(options)
        job, layout = plan.job, plan.layout
        self.config = job.config
        self.engine = make_engine(job, layout)
        start = time.perf_counter()
        places = layout.places(job.config.num_hidden_layers)
        self.weights = random_weights(self.engine, places, layout.slots, options.distinct or len(places), options.base)
        self.build_s = time.perf_counter() - start
        self.adapters = self.engine.init_adapters(0)
        settings = TrainingSettings(output_dir=Path(), optim=job.optim)
        self.optimizer = AdamW(settings, self.adapters, layout.optimizer)
        shape = (job.micro_batches, job.rows, job.length)
        ids = np.random.default_rng(0).integers(0, self.config.vocab_size, shape).astype(np.int32)
        self.batch = Batch(ids, ids, ids[..., 1:].size, ids.size)
        self.steps = 0
        self._started = self._start()

    def _start(self) -> Started:
        key = one_device().put(jax.random.key(self.steps), "device") if self.engine.draws else None
        return self.engine.start(self.weights, self.batch, key)

    def step(self) -> tuple[float, float]:
        """One optimizer step, to its end: (seconds, loss)."""
        start = time.perf_counter()
        loss, grads = self.engine.go_on(self.weights, self.adapters, self._started)
        self.adapters, _ = self.optimizer.update(self.adapters, grads, 2e-4)
        del grads
        self.steps += 1
        self._started = self._start()  # of the next one, while the device is busy: as train.py does
        jax.block_until_ready((self.adapters, self.optimizer.moments))
        return time.perf_counter() - start, float(loss)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Build, warm up, time; see the module's docstring."""
    case = Case(options)
    seconds, losses = zip(*(case.step() for _ in range(options.steps + 1)), strict=True)
    plan, best, tokens = case.plan, min(seconds[1:]), case.batch.input_ids.size
    speed: dict[str, Any] = {}
    if plan.rates is not None:
        predicted = plan.seconds
        speed = {
            "predicted_s": round(predicted.total, 4),
            "matmul_peak_tflops": round(plan.rates.flop / 1e12, 1),
            "bus_gb_per_s": round(predicted.bus_bytes / best / 1e9, 1),
            "bus_peak_gb_per_s": round(plan.rates.bus / 1e9, 1),
        }
    return {
        "what": "step",
        **{
            name: getattr(options, name)
            for name in ("model", "base", "accumulate", "batch", "seq", "dtype", "dropout", "optim")
        },
        "gpu_memory": options.gpu_memory,
        "layout": {"chosen": options.auto or "by hand", **dataclasses.asdict(plan.layout)},
        "step_s": round(best, 4),
        "median_s": round(statistics.median(seconds[1:]), 4),
        "steps_s": [round(each, 4) for each in seconds[1:]],
        "compile_s": round(seconds[0] - best, 2),
        "build_s": round(case.build_s, 1),
        "tokens_per_s": round(tokens / best, 1),
        "tflops": round(plan.job.flop / best / 1e12, 1),
        **speed,
        "peak_device_gib": peak_device_gib(),
        "predicted_device_gib": round(plan.device_bytes / GIB, 3),
        "process_device_gib": process_gpu_gib(),
        "peak_host_gib": peak_host_gib(),
        "predicted_host_gib": round(plan.host_bytes / GIB, 3),
        "distinct": options.distinct,
        "losses": losses,
    }


def add_case_arguments(parser: argparse.ArgumentParser) -> None:
    """What makes a case: shape, tokens, places."""
    parser.add_argument("model", metavar="SHAPE[:LAYERS]", help=f"one of {', '.join(SHAPES)}, e.g. 7b:8")
    parser.add_argument(
        "--base",
        default="nf4",
        choices=("nf4", "bfloat16"),
        help="bfloat16: LoRA on plain matrices; predictions stay NF4's",
    )
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
        "--no-share-dense", dest="share_dense", action="store_false", help="see qlora_jax.engine.engine.Engine"
    )
    parser.add_argument("--mlp-tokens", type=int, default=MLP_TOKENS)
    parser.add_argument("--slots", type=int, default=SLOTS)
    parser.add_argument(
        "--auto", choices=("auto", "full", "none"), help="let the planner choose, with this gradient_checkpointing"
    )
    parser.add_argument("--gpu-memory", metavar="SIZE", help="play a card with so much memory, e.g. 24GiB")
    parser.add_argument("--distinct", type=int, default=0, metavar="N", help="make only N different layers on the host")
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
    result = measure(options)
    if options.machine:  # afterwards: it asks the device, and XLA's share of it is settled by the plan before
        print(json.dumps(describe()))
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    sys.exit(main())
