"""Describes the machine a figure was measured on, and writes results beside that description."""

import json
import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

from qlora_jax.runtime.machine import device_kind

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")


def describe() -> dict[str, Any]:
    """Device, processor, cores, memory and versions."""
    model = next(
        (line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.processor(),
    )
    memory = next((int(line.split()[1]) for line in _lines("/proc/meminfo") if line.startswith("MemTotal")), 0)
    return {
        "device": device_kind(),
        "cpu": model,
        "cores": os.cpu_count(),
        "memory_gib": round(memory / 2**20, 1),
        "python": platform.python_version(),
        **{package: version(package) for package in PACKAGES},
    }


def process_gpu_gib() -> float | None:
    """Device memory that the driver counts as used, GiB: what a smaller card would have to hold. None without a GPU."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    command = ["nvidia-smi", f"--id={visible}", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    try:
        return round(
            int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]) / 1024, 2
        )
    except (OSError, subprocess.CalledProcessError, ValueError):
        return None


def write_result(name: str, result: dict[str, Any], folder: Path = RESULTS) -> Path:
    """Write `results/NAME.json`: the machine, then the result."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps({"machine": describe(), **result}, indent=2) + "\n", encoding="utf-8")
    return path


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
