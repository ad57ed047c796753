"""Starting a run: a model in 4 bits, from disk into host memory that the device reads, beside a plain read and a memory copy.

    python -m benchmarks.load --layers 16 --work DIR           # 70B's shapes: 8.1 GB on DIR's disk; two minutes
    python -m benchmarks.load --model DIR                      # a folder that `benchmarks.synthetic` or `convert.quantize` wrote

Each line in a process of its own, with as many threads as `convert.load` takes. `cold`: the folder's pages are dropped from the page cache
first (best effort: the disk may have a cache of its own); `warm`: they are in it. `of_read_or_copy` is a rate's share of the slower of
reading what is in the page cache and copying memory, which no load can beat; `of_cold_read`, of a cold load, its share of reading from
the disk. `thread_seconds` are those of all threads of a load together in each of `STAGES`, `cpu_seconds` the processors'. `registered_gb`
is what went into memory of our own (see `qlora_jax.runtime.pinned`): all layers on a GPU whose driver registers it, nothing elsewhere.
Then each layer is copied to the device, as a step's walk does it.
"""

import argparse
import contextlib
import functools
import json
import math
import os
import subprocess
import sys
import tempfile
import threading
import time
import unittest.mock
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks import synthetic
from benchmarks.convert import held
from benchmarks.machine import write_result
from benchmarks.step import SHAPES, shape_name
from convert.files import ahead
from convert.files.folder import ModelFolder
from convert.load import load_weights, read_config
from qlora_jax.config import QuantizationSettings
from qlora_jax.runtime import pinned
from qlora_jax.runtime.placement import LayerStore, nbytes, one_device

ROOT = Path(__file__).parents[1]
CHUNK = 2**24
"""Bytes read or copied at a time."""
THREADS = (1, 2, 4, 8)
STAGES = {
    "reading": [(ModelFolder, "elements")],
    "mapping": [(pinned, "_room")],
    "registering": [(pinned, "_register")],
    "sending": [(jax, "device_put"), (jax, "block_until_ready")],
}
"""Functions that a load's threads spend their time in, none within another: into memory that is new, if it is; new memory of our own;
its pages; and to the device, until they are there."""


def main() -> None:
    """Make the folder if none is given, measure, and write `results/load-DEVICE.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--shape", type=shape_name, choices=sorted(SHAPES), default="70b", help="of the synthetic folder (default: 70b)"
    )
    parser.add_argument("--layers", type=int, default=16, help="of the synthetic folder (default: 16)")
    parser.add_argument("--work", type=Path, metavar="DIR", help="where the synthetic folder is made and removed again")
    parser.add_argument("--model", type=Path, metavar="DIR", help="measure with this folder instead")
    parser.add_argument("--child", choices=CHILDREN, help=argparse.SUPPRESS)
    parser.add_argument("--threads", type=int, default=ahead.num_threads(), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(CHILDREN[options.child](options.model, options.threads)))
        return
    with tempfile.TemporaryDirectory(dir=options.work) as work:
        model = options.model or Path(work) / "model"
        if not options.model:
            synthetic.write(model, synthetic.hf_config(options.shape, options.layers))
        result = {"what": "load", "folder_mb": round(folder_bytes(model) / 1e6), "runs": list(runs(model))}
    add_shares(result["runs"])
    print(write_result(f"load-{jax.default_backend()}", result))


def add_shares(rows: list[dict[str, Any]]) -> None:
    """Each rate beside what it cannot be above; printed again."""
    rates = {row["name"]: row["gb_per_s"] for row in rows}
    slower = min(rates["read, warm"], rates["memory copy"])
    for row in rows:
        row["of_read_or_copy"] = round(row["gb_per_s"] / slower, 2)
        if row["name"] == "load, cold":
            row["of_cold_read"] = round(row["gb_per_s"] / rates["read, cold"], 2)
        shares = ", ".join(f"{key} {value}" for key, value in row.items() if key.startswith("of_"))
        print(f"{row['name']}, {row['threads']} threads: {row['gb_per_s']} GB/s, {shares}")


def runs(model: Path) -> Any:
    """Every measurement, as it is made; each is printed."""
    threads = sorted({*(n for n in THREADS if n < ahead.num_threads()), ahead.num_threads()})
    plan = [("read", "read", True, threads[-1:]), ("read", "read", False, threads[-1:])]
    plan += [("memory copy", "copy", None, threads[-1:])]
    plan += [("load", "load", True, threads[-1:]), ("load", "load", False, threads)]
    for name, child, cold, counts in plan:
        for count in counts:
            if cold:
                forget(model)
            found = run_child(child, model, count)
            state = "" if cold is None else f", {'cold' if cold else 'warm'}"
            for kind, values in found.items():
                row = {"name": f"{name}{state}{kind}", "threads": count, **values}
                print(json.dumps(row), flush=True)
                yield row


def run_child(name: str, model: Path, threads: int) -> dict[str, Any]:
    """One measurement in a process of its own."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.load",
        "--child",
        name,
        "--model",
        str(model),
        "--threads",
        str(threads),
    ]
    environment = {**os.environ, "XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB": str(math.ceil(folder_bytes(model) / 2**30) + 2)}
    printed = subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
    found: dict[str, Any] = json.loads(printed.splitlines()[-1])
    return found


def folder_bytes(model: Path) -> int:
    """Of its weights."""
    return sum(path.stat().st_size for path in model.glob("*.safetensors"))


def forget(model: Path) -> None:
    """Have the kernel drop the folder's pages; they must be on the disk first."""
    os.sync()
    for path in model.glob("*.safetensors"):
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def timed(work: Callable[[], int]) -> dict[str, Any]:
    """`work` returns how many bytes it moved."""
    before, start = held("VmRSS:"), time.perf_counter()
    moved = work()
    seconds = time.perf_counter() - start
    row = {"gb_per_s": round(moved / seconds / 1e9, 2), "seconds": round(seconds, 2)}
    return {**row, "above_gb": round((held("VmHWM:") - before) / 1e9, 2), "moved_gb": round(moved / 1e9, 2)}


def chunks(model: Path) -> list[tuple[Path, int, int]]:
    """Every part of every file: (file, from, bytes)."""
    return [
        (path, begin, min(CHUNK, path.stat().st_size - begin))
        for path in sorted(model.glob("*.safetensors"))
        for begin in range(0, path.stat().st_size, CHUNK)
    ]


def read(model: Path, threads: int) -> dict[str, Any]:
    """Every byte of the folder, by threads, into memory that is used again."""
    return {"": timed(lambda: fill(chunks(model), threads, lambda index, size: np.empty(size, np.uint8)))}


def fill(parts: list[tuple[Path, int, int]], threads: int, place: Callable[[int, int], np.ndarray]) -> int:
    """Read the parts, each into `place(its number, its bytes)`; returns the bytes."""

    def one(index: int) -> int:
        path, begin, size = parts[index]
        with path.open("rb", buffering=0) as file:
            file.seek(begin)
            read = file.readinto(place(index, size).data)
        assert read == size, path
        return size

    with ThreadPoolExecutor(threads) as pool:
        return sum(pool.map(one, range(len(parts))))


def copy(model: Path, threads: int) -> dict[str, Any]:
    """As many bytes as the folder has, from memory to memory that exists."""
    source, target = (np.ones(CHUNK * 16, np.uint8) for _ in range(2))
    parts = list(range(0, source.size, CHUNK))

    def one(begin: int) -> int:
        np.copyto(target[begin : begin + CHUNK], source[begin : begin + CHUNK])
        return CHUNK

    def work() -> int:
        with ThreadPoolExecutor(threads) as pool:
            return sum(pool.map(one, parts * max(1, folder_bytes(model) // source.size)))

    return {"": timed(work)}


def load(model: Path, threads: int) -> dict[str, Any]:
    """`load_weights` into host memory; then a walk over the layers, the second of two."""
    ahead.num_threads = lambda: threads
    folder = ModelFolder(model)
    config = read_config(folder)
    # As in train.py, where the plan has measured it: the first copy to a GPU takes a second or two, whatever is copied.
    jax.block_until_ready(
        [jax.device_put(np.zeros(1, np.uint8), one_device().sharding(where)) for where in ("host", "device")]
    )
    loaded: list[LayerStore] = []

    def work() -> int:
        moved: list[int] = []
        loaded.append(load_weights(folder, config, QuantizationSettings(), "host", moved.append).layers)
        return sum(moved)

    def walk() -> int:
        (layers,) = loaded
        moved = 0
        for _, layer in layers.walk(range(len(layers))):
            moved += nbytes(jax.block_until_ready(layer))
            del layer
        return moved

    before = time.process_time()
    with watched() as seconds:
        row = timed(work)
    row["cpu_seconds"] = round(time.process_time() - before, 2)
    row["thread_seconds"] = {stage: round(spent, 2) for stage, spent in seconds.items()}
    row["registered_gb"] = round(pinned.registered_bytes() / 1e9, 2)
    walk()
    return {"": row, ", to the device": timed(walk)}


@contextlib.contextmanager
def watched() -> Iterator[dict[str, float]]:
    """The seconds that all threads together have spent in each of `STAGES` meanwhile."""
    seconds, lock = dict.fromkeys(STAGES, 0.0), threading.Lock()

    def timing(stage: str, real: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(real)
        def call(*args: Any, **options: Any) -> Any:
            start = time.perf_counter()
            try:
                return real(*args, **options)
            finally:
                with lock:
                    seconds[stage] += time.perf_counter() - start

        return call

    with contextlib.ExitStack() as stack:
        for stage, functions in STAGES.items():
            for owner, name in functions:
                stack.enter_context(unittest.mock.patch.object(owner, name, timing(stage, getattr(owner, name))))
        yield seconds


CHILDREN = {"read": read, "copy": copy, "load": load}


if __name__ == "__main__":
    main()
