"""Figures that earlier starts on this machine found out: what compiled functions take, and how fast the card is.

Both cost seconds at each start and give the same figures every time. An entry carries what it depends on (the code of the compiled
functions, jax, the card, the workload), so that another's is not taken for it, whatever its file is called.
"""

import dataclasses
import functools
import hashlib
import json
import os
import platform
from pathlib import Path
from typing import Any

import jax
import jaxlib

from qlora_jax.base.files import write_json
from qlora_jax.planning.estimate import Job, Layout, Workspace
from qlora_jax.planning.hardware import Rates, measured
from qlora_jax.planning.search import compiled_workspace, keeps
from qlora_jax.runtime.machine import device_kind

COMPILED = ("ops", "model", "engine", "planning/hardware.py")
"""Folders and files of code that decides what is compiled, or measured."""


def workspace(folder: Path, job: Job, layout: Layout) -> Workspace:
    """Return `search.compiled_workspace`, remembered in `folder`."""
    mode = {"share_dense": layout.share_dense, "mlp_tokens": layout.mlp_tokens, "keeps": list(keeps(job, layout))}
    about = {"what": "workspace", "job": repr(job), "mode": mode, "flags": os.environ.get("XLA_FLAGS")}
    found = _recall(folder, about)
    if found is None:
        found = dataclasses.asdict(compiled_workspace(job, layout))
        _remember(folder, about, found)
    return Workspace(**found)


def rates(folder: Path) -> Rates:
    """Return `hardware.measured`, remembered in `folder`."""
    about = {"what": "rates", "host": platform.node()}
    found = _recall(folder, about)
    if found is None:
        found = dataclasses.asdict(measured())
        _remember(folder, about, found)
    return Rates(**found)


@functools.cache
def _code() -> str:
    """Return a digest of the code that is compiled."""
    root, digest = Path(__file__).parents[1], hashlib.sha256()
    paths = [path for name in COMPILED for path in (sorted((root / name).rglob("*.py")) or [root / name])]
    for path in paths:
        digest.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    return digest.hexdigest()


def _entry(folder: Path, about: dict[str, Any]) -> tuple[Path, dict[str, Any]]:
    versions = {"jax": jax.__version__, "jaxlib": jaxlib.__version__, "card": device_kind()}
    about = {**about, **versions, "code": _code()}
    name = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:32]
    return folder / f"{about['what']}-{name}.json", about


def _recall(folder: Path, about: dict[str, Any]) -> dict[str, Any] | None:
    """Return an entry's figures, or None where there is none that can be used."""
    path, about = _entry(folder, about)
    try:
        entry = json.loads(path.read_bytes())
        return entry["found"] if entry["about"] == about and all(map(_is_figure, entry["found"].values())) else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None  # it is found out again, and written anew


def _is_figure(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, int | float) and not isinstance(value, bool) and value >= 0)


def _remember(folder: Path, about: dict[str, Any], found: dict[str, Any]) -> None:
    path, about = _entry(folder, about)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"about": about, "found": found})
    except OSError:
        return  # a full disk or one that cannot be written: the next start finds it out again
