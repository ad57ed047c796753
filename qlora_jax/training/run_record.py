"""What `run.json` says of a start: the time, the versions of packages, the device; and how it is read again."""

import contextlib
import datetime
import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

from qlora_jax.base.errors import InputError
from qlora_jax.base.reading import read_json_object
from qlora_jax.runtime.machine import device_kind, device_memory, platform_version

PACKAGES = ("qlora_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "transformers", "safetensors")
MAX_RECORD_BYTES = 2**28
"""Bytes of a `run.json`: each start of a run adds some thousands."""


def read_record(path: Path) -> dict[str, Any]:
    """A `run.json`; nothing where there is none, or where it is not ours: a value is of another type than we write."""
    try:
        record = read_json_object(path, at_most=MAX_RECORD_BYTES)
    except InputError:
        return {}
    starts = record.get("starts", [])
    ours = isinstance(starts, list) and all(isinstance(start, dict) for start in starts)
    ours = ours and all(isinstance(record.get(name, ""), str) for name in ("id", "state"))
    parts = [start.get(part, {}) for start in starts for part in ("versions", "device", "config")] if ours else [None]
    ours = all(isinstance(part, dict) for part in parts)
    settings = [start.get("config", {}).get("training", {}) for start in starts] if ours else [None]
    return record if ours and all(isinstance(part, dict) for part in settings) else {}


def now() -> str:
    """The time, in UTC and ISO 8601, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide a result, of those that are installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def device() -> dict[str, Any]:
    """Names and sizes of the device and the host."""
    return {
        "kind": device_kind(),
        "platform": platform_version(),
        "memory": (device_memory() or {}).get("bytes_limit"),
        "host": platform.platform(),
        "cpus": os.cpu_count(),
    }
