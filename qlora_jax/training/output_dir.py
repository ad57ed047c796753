"""`training.output_dir`: what an earlier run left there, the lock that keeps others out, and `run.json`.

adapter/  merged/         the result
best/                     the adapter with the lowest evaluation loss so far; every checkpoint has its own
checkpoints/              see checkpoint.py
metrics.jsonl  samples.jsonl  loss.png  config.yaml
run.json                  what happened: versions, device, settings, command; state, and how long each phase took
.lock                     held by the process at work, and only by a living one
"""

import contextlib
import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from qlora_jax.base.errors import FULL, InputError, InterruptedRunError
from qlora_jax.base.files import (
    link_folder,
    recover_folder,
    remove_folder,
    remove_unfinished_files,
    replacing_folder,
    try_lock,
    write_json,
)
from qlora_jax.base.reading import kind_of
from qlora_jax.config import Config, TrainingSettings
from qlora_jax.training.about import LINES, check_complete, check_lines
from qlora_jax.training.checkpoint import Checkpoint, Checkpoints
from qlora_jax.training.run_record import device, now, read_record, versions

GROWING = ("metrics.jsonl", "samples.jsonl")
"""Files that grow line by line; checkpoints hold them as they were."""
LOCK = ".lock"
LENGTH = ("max_steps", "num_train_epochs")
FILES = (*GROWING, "loss.png", "config.yaml", "run.json")
FOLDERS = ("adapter", "best", "checkpoints", "merged")
"""What a run leaves."""
ANOTHER = "name another training.output_dir"


class OutputDir:
    """The folder of one run. Until `claim` nothing in it is changed; from then on it is this process's alone."""

    def __init__(self, settings: TrainingSettings, seconds: Mapping[str, float] = {}) -> None:
        """`seconds` fills while the run goes on: by name of its phases, for `run.json`."""
        self.path, self._settings, self._seconds = settings.output_dir, settings, seconds
        self.checkpoints_path = self.path / "checkpoints"
        self.record: dict[str, Any] = {}
        self._lock: IO[bytes] | None = None
        self._token = b""
        self._fresh = True

    def look(self) -> bool:
        """Before anything is read or written: may a run go here? Returns whether it is to be continued from a checkpoint.

        Raises:
            InputError: a finished run is here, or one to be continued but for `resume: never`, and overwriting was not asked for;
                or another process is at work.
        """
        if (kind := kind_of(self.path)) not in ("a folder", "nothing") or (
            kind == "nothing" and self.path.is_symlink()
        ):
            found = kind if kind != "nothing" else "a link to what is not there"
            raise InputError(self.path, found=found, expected="a folder, or nothing", fix=ANOTHER)
        if kind_of(self.path / LOCK) != "nothing":
            self._take_lock()
        self.record = read_record(self.path / "run.json")
        settings, results = self._settings, self._has_results()
        saved = any(self.checkpoints_path.glob("step-*"))
        finished = results and (
            self.record.get("state", "finished") == "finished" or (not saved and self.record.get("replaces", False))
        )
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
        found = Checkpoints(self.checkpoints_path, self._settings.save_total_limit).newest(log)
        if found is not None:
            check_complete(found.about, found.path)
            for name in LINES:
                check_lines(name, found.file(name), found.path / name)
        return found

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
        self._refuse_odd()
        self._mark_lock()
        for name in ("adapter", "best"):
            recover_folder(self.path / name)
        remove_unfinished_files(self.path)
        if resumed is None:
            for name in ("checkpoints", "best"):
                remove_folder(self.path / name)
            metrics = self.path / "metrics.jsonl"
            if metrics.exists():
                number = 1 + len(list(self.path.glob("metrics.before-*.jsonl")))
                metrics.rename(self.path / f"metrics.before-{number}.jsonl")
        else:
            self._restore_best(resumed)
        checkpoints = Checkpoints(self.checkpoints_path, self._settings.save_total_limit, self.check_ours)
        if self._settings.save_steps or self._settings.save_interval_minutes:
            checkpoints.prepare()
        return checkpoints

    def check_best(self, resumed: Checkpoint) -> str:
        """Check that the run can go on with the best adapter that it had; a line to show where it cannot, and need not.

        Raises:
            InputError: `load_best_model_at_end` asks for it, and the checkpoint has none.
        """
        step = resumed.about["progress"].get("best_step")
        if step is None or resumed.best is not None:
            return ""
        if self._settings.load_best_model_at_end:
            found = f"nothing of the adapter of step {step}, the best so far: an earlier version did not keep it here"
            fix = "go on without it, training.load_best_model_at_end=false, or start again in another output_dir"
            raise InputError(resumed.path, found=found, fix=fix)
        return f"{resumed.path} has nothing of the best adapter so far, that of step {step}: best/ begins anew"

    def _restore_best(self, resumed: Checkpoint) -> None:
        """Make `best/` what it was when the checkpoint was made: an evaluation since then is made again."""
        best = self.path / "best"
        if resumed.best is not None:
            with replacing_folder(best) as aside:
                link_folder(resumed.best, aside)
        elif resumed.about["progress"].get("best_step") is None:
            remove_folder(best)
        elif best.exists():  # of an earlier version, which did not say whose it is
            best.rename(self.path / f"best.before-{1 + len(list(self.path.glob('best.before-*')))}")

    def _refuse_odd(self) -> None:
        """Raises InputError: what a run writes as a file is a folder there, or the other way round, or neither."""
        wanted = dict.fromkeys(FILES, "a file") | dict.fromkeys(FOLDERS, "a folder")
        kinds = {name: kind_of(self.path / name) for name in wanted}
        odd = [f"{name} is {kind}" for name, kind in kinds.items() if kind not in ("nothing", wanted[name])]
        if odd:
            fix = f"take it out of the folder, or {ANOTHER}"
            raise InputError(self.path, found=", ".join(odd), expected="what a run leaves, or nothing", fix=fix)

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
        """Whether the lock that is held is the folder's.

        A file's number alone does not say so: it need not last on a network's disk. There the random bytes in it do.
        """
        held = os.fstat(self._lock.fileno())
        try:
            with (self.path / LOCK).open("rb") as lock:
                there, token = os.fstat(lock.fileno()), lock.read(len(self._token))
        except OSError:
            return False
        return os.path.samestat(held, there) or (held.st_nlink > 0 and token == self._token != b"")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Write in `run.json` how it ended, unless `end` has, and let others in.

        Raises:
            InputError: in place of an OSError because of the folder, which was taken away or cannot be written to.
        """
        self.end("interrupted" if isinstance(error, InterruptedRunError | KeyboardInterrupt) else "failed")
        if self._lock is None:
            return
        with contextlib.closing(self._lock):
            if isinstance(error, OSError) and error.errno not in FULL:
                self._explain(error)
        self._lock = None

    def _explain(self, error: OSError) -> None:
        """Raises InputError: the error is of this folder's."""
        self.check_ours()
        if error.filename is not None and Path(os.fsdecode(error.filename)).absolute().is_relative_to(
            self.path.absolute()
        ):
            fix = "see to it and run the same command again: it continues from what was saved"
            raise InputError(error.filename, found=f"cannot be used: {error.strerror}", fix=fix) from None

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
            "time": now(), "process": os.getpid(), "command": list(command), "after_step": resumed.step if resumed else 0,
            "versions": versions(), "device": device(), "config": config.model_dump(mode="json"), "plan": dict(plan),
        }  # fmt: skip
        replaces = self._has_results() if resumed is None else self.record.get("replaces", False)
        self.record = {"id": run_id or secrets.token_hex(4), "state": "running", "starts": [*starts, start]}
        self.record |= {"replaces": True} if replaces else {}
        write_json(self.path / "run.json", self.record)
        return [
            f"{name} {key}: {old[key]} → {start[part][key]}, so the last bits may differ"
            for part, name in (("versions", "version of"), ("device", "device"))
            for old in ([starts[-1].get(part, {})] if starts else [])
            for key in old
            if key in start[part] and key not in ("host", "cpus", "memory") and old[key] != start[part][key]
        ]

    def has_adapter(self) -> None:
        """Write in `run.json`, where it says otherwise, that `adapter/` is this run's and no more that of the run it replaces."""
        if self.record.pop("replaces", False):
            write_json(self.path / "run.json", self.record)

    def end(self, state: str) -> None:
        """Write in `run.json` how this start of the run ended, `finished`, `interrupted` or `failed`, and how long its phases took."""
        if self.record.get("state") != "running" or not self._is_ours():
            return  # it did not get so far, or the folder has become another run's
        self.record["state"] = state
        self.record["starts"][-1] |= {"ended": now(), "state": state, "seconds": dict(self._seconds)}
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
            kind = kind_of(self.path / LOCK)
            if kind not in ("a file", "nothing"):  # a named pipe would be waited for
                raise InputError(self.path / LOCK, found=kind, expected="the lock of a run", fix=ANOTHER)
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

    def _mark_lock(self) -> None:
        """Write random bytes into the lock, by which it is told from the lock of a run that is begun in this one's place."""
        if not self._token:
            self._token = secrets.token_hex(16).encode()
            self._lock.truncate(0)
            self._lock.write(self._token)
            self._lock.flush()
