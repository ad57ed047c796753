"""`training.output_dir`: what an earlier run left there, the lock that keeps others out, and `run.json`.

adapter/  merged/         the result
best/                     the adapter with the lowest evaluation loss so far
checkpoints/              see checkpoint.py
metrics.jsonl  samples.jsonl  loss.png  config.yaml
run.json                  what happened: versions, device, settings, command; state, and how long each phase took
.lock                     held by the process at work, and only by a living one
"""

import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
import secrets
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import jax

from qlora_jax.base.errors import InputError, InterruptedRunError
from qlora_jax.base.files import try_lock, write_json
from qlora_jax.config import Config, TrainingSettings
from qlora_jax.training.checkpoint import Checkpoint, Checkpoints

PACKAGES = ("qlora_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "transformers", "safetensors")
GROWING = ("metrics.jsonl", "samples.jsonl")
"""Files that grow line by line; checkpoints hold them as they were."""
LOCK = ".lock"
LENGTH = ("max_steps", "num_train_epochs")


class OutputDir:
    """The folder of one run. Until `claim` nothing in it is changed; from then on it is this process's alone."""

    def __init__(self, settings: TrainingSettings, seconds: Mapping[str, float] = {}) -> None:
        """`seconds` fills while the run goes on: by name of its phases, for `run.json`."""
        self.path, self._settings, self._seconds = settings.output_dir, settings, seconds
        self.checkpoints_path = self.path / "checkpoints"
        self.record: dict[str, Any] = {}
        self._lock: IO[bytes] | None = None
        self._fresh = True

    def look(self) -> bool:
        """Before anything is read or written: may a run go here? Returns whether it is to be continued from a checkpoint.

        Raises:
            InputError: a finished run is here, or one to be continued but for `resume: never`, and overwriting was not asked for;
                or another process is at work.
        """
        if (self.path / LOCK).exists():
            self._take_lock()
        self.record = _read(self.path / "run.json")
        settings, results = self._settings, self._has_results()
        saved = any(self.checkpoints_path.glob("step-*"))
        finished = results and (not saved or self.record.get("state", "finished") == "finished")
        self._fresh = not saved
        if finished:
            longer = self._length() != {key: getattr(settings, key) for key in LENGTH}
            if settings.overwrite_output_dir:
                self._fresh = True
            elif self._fresh or settings.resume == "never" or not longer:
                raise self._finished()
        elif saved and settings.resume == "never":
            self._fresh = True
            if not settings.overwrite_output_dir:
                raise InputError(
                    self.path,
                    found="a run that was stopped, with checkpoints, and training.resume=never",
                    expected="a new or empty folder",
                    fix="continue it with training.resume=auto, or drop it with training.overwrite_output_dir=true",
                )
        return not self._fresh

    def newest(self, log: Callable[[str], object]) -> Checkpoint | None:
        """The checkpoint to go on from, if `look` said that there is one to be found; see `Checkpoints.newest`."""
        if self._fresh:
            return None
        self._take_lock()
        return Checkpoints(self.checkpoints_path, self._settings.save_total_limit).newest(log)

    def claim(self, resumed: Checkpoint | None) -> Checkpoints:
        """Make the folder ours. A run that is not continued begins with nothing there but metrics, kept under another name.

        Raises:
            InputError: the folder cannot be made or another process has it.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            fix = "name another training.output_dir"
            raise InputError(self.path, found=f"cannot be made: {error.strerror}", fix=fix) from None
        self._take_lock()
        if resumed is None:
            for name in ("checkpoints", "best"):
                shutil.rmtree(self.path / name, ignore_errors=True)
            metrics = self.path / "metrics.jsonl"
            if metrics.exists():
                number = 1 + len(list(self.path.glob("metrics.before-*.jsonl")))
                metrics.rename(self.path / f"metrics.before-{number}.jsonl")
        return Checkpoints(self.checkpoints_path, self._settings.save_total_limit, self.check_ours)

    def check_ours(self) -> None:
        """Before something is written that others could take for theirs.

        Raises:
            InputError: the folder was removed or moved while the run was at work; another run may be in its place.
        """
        if not self._is_ours():
            found = "its lock is gone: the folder was removed, moved or begun anew while this run was at work"
            fix = "start the run again; to drop a folder stop its run first"
            raise InputError(self.path, found=found, fix=fix)

    def _is_ours(self) -> bool:
        """Whether the lock that is held is the folder's. A file's number is not enough: it need not last on a network's disk."""
        held = os.fstat(self._lock.fileno())
        try:
            there = (self.path / LOCK).stat()
        except FileNotFoundError:
            return False
        return held.st_nlink > 0 or os.path.samestat(held, there)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Write in `run.json` how it ended, unless `end` has, and let others in."""
        self.end("interrupted" if isinstance(error, InterruptedRunError | KeyboardInterrupt) else "failed")
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def begin(
        self, config: Config, command: Sequence[str], resumed: Checkpoint | None, plan: Mapping[str, Any] = {}
    ) -> list[str]:
        """Write `config.yaml`, and in `run.json` that the run is at work.

        Returns:
            a line for each version or device that is not what the run went on with until now: the last bits may differ.
        """
        (self.path / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
        starts = self.record.get("starts", []) if resumed else []
        run_id = self.record.get("id") if resumed else None
        start = {
            "time": _now(), "process": os.getpid(), "command": list(command), "after_step": resumed.step if resumed else 0,
            "versions": _versions(), "device": _device(), "config": config.model_dump(mode="json"), "plan": dict(plan),
        }  # fmt: skip
        self.record = {"id": run_id or secrets.token_hex(4), "state": "running", "starts": [*starts, start]}
        write_json(self.path / "run.json", self.record)
        return [
            f"{name} {key}: {old[key]} → {start[part][key]}, so the last bits may differ"
            for part, name in (("versions", "version of"), ("device", "device"))
            for old in ([starts[-1].get(part, {})] if starts else [])
            for key in old
            if key in start[part] and key not in ("host", "cpus", "memory") and old[key] != start[part][key]
        ]

    def end(self, state: str) -> None:
        """Write in `run.json` how this start of the run ended, `finished`, `interrupted` or `failed`, and how long its phases took."""
        if self.record.get("state") != "running" or not self._is_ours():
            return  # it did not get so far, or the folder has become another run's
        self.record["state"] = state
        self.record["starts"][-1] |= {"ended": _now(), "state": state, "seconds": dict(self._seconds)}
        with contextlib.suppress(OSError):  # a full disk has been reported already
            write_json(self.path / "run.json", self.record)

    def refuse_nothing_to_do(self, resumed: Checkpoint | None, total_steps: int) -> None:
        """Once the number of steps is known.

        Raises:
            InputError: the run is finished, and no longer one was asked for.
        """
        if resumed and self.record.get("state") == "finished" and self._has_results() and resumed.step >= total_steps:
            raise self._finished()

    def _has_results(self) -> bool:
        return (self.path / "adapter").exists() or (self.path / "merged").exists()

    def _length(self) -> dict[str, Any]:
        """The settings of the finished run that say how long it was."""
        starts = self.record.get("starts") or [{}]
        training = starts[-1].get("config", {}).get("training", {})
        return {key: training.get(key) for key in LENGTH}

    def _finished(self) -> InputError:
        fix = "name another training.output_dir, or allow it with training.overwrite_output_dir=true"
        if any(self.checkpoints_path.glob("step-*")) and self._settings.resume == "auto":
            fix += "; a larger training.max_steps or num_train_epochs continues this run"
        return InputError(
            self.path, found="a finished run (adapter/ or merged/)", expected="a new or empty folder", fix=fix
        )

    def _take_lock(self) -> None:
        if self._lock is not None:
            return
        try:
            lock = (self.path / LOCK).open("ab")
            taken = try_lock(lock.fileno())
        except OSError as error:
            raise InputError(
                self.path / LOCK, found=f"cannot be locked: {error.strerror}", fix="name another training.output_dir"
            ) from None
        if not taken:
            lock.close()
            raise InputError(
                self.path,
                found="another process is training there",
                fix="wait for it or stop it, or name another training.output_dir",
            )
        self._lock = lock


def _read(path: Path) -> dict[str, Any]:
    """A `run.json`; nothing where there is none, or where it is not ours."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _device() -> dict[str, Any]:
    device = jax.devices()[0]
    stats = device.memory_stats() or {}
    return {
        "kind": device.device_kind,
        "platform": device.client.platform_version,
        "memory": stats.get("bytes_limit"),
        "host": platform.platform(),
        "cpus": os.cpu_count(),
    }
