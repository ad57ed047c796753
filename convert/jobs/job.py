"""A conversion that survives being stopped: its folder is filled beside the one to be, and says whose work it is.

    .NAME.partial/job.json      what is made of what, written first: another job's work is not continued but thrown away
    .NAME.partial/lock          held by the process at work
    .NAME.partial/shards.json   the checksums of the weights' files that are whole (`convert.files.derived`)
    .NAME.partial/folder/       filled file by file, each whole or not there; renamed to NAME when nothing is missing

So NAME is whole from the moment it exists, whatever moment the power goes.
"""

import contextlib
import json
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from convert.files.folder import ModelFolder, some
from qlora_jax.base.errors import FULL, InputError
from qlora_jax.base.files import describe_size, replace_folder, try_lock, write_json
from qlora_jax.base.reading import kind_of, open_file, read_json

FORMAT = 4
"""Raised whenever the same job makes other bytes or checksums: what an older version left is then not continued."""

NOTE = "job.json"
RECORD = "shards.json"
_OURS = re.compile(r"folder|lock|\.?(job|shards)\.json(\.\d+\.tmp)?")
"""What a conversion puts into `.NAME.partial`, half-written notes included."""

Log = Callable[[str], object]


class DestinationError(InputError):
    """The place for a conversion's result, and not what is converted, is the problem."""


def describe(verb: str, source: ModelFolder, **settings: Any) -> dict[str, Any]:
    """What tells one job from another: source, settings, and the versions whose arithmetic decides the last bits. Fit for JSON."""
    versions = {"jax": jax.__version__, "numpy": np.__version__, "backend": jax.default_backend()}
    job = {"format": FORMAT, "verb": verb, "source": _model_identity(source), **settings, "made_with": versions}
    identity: dict[str, Any] = json.loads(json.dumps(job))
    return identity


def files_identity(paths: Iterable[Path], root: Path) -> list[list[Any]]:
    """Each file's name below `root`, size in bytes and time of its last change in nanoseconds."""
    states = ((path.relative_to(root).as_posix(), path.stat()) for path in paths)
    return [[name, state.st_size, state.st_mtime_ns] for name, state in states]


def _model_identity(source: ModelFolder) -> dict[str, Any]:
    """A hub's snapshot is known by its revision, wherever its cache is and whenever it was fetched; any other folder by path and times."""
    path = source.path.absolute()
    files = [path / "config.json", *(path / shard for shard in source.shards), *map(Path.absolute, source.companions())]
    found = files_identity(files, path)
    if path.parent.name == "snapshots" and path.parent.parent.name.startswith("models--"):
        sizes = [[name, size] for name, size, _ in found]
        return {"hub": path.parent.parent.name, "revision": path.name, "files": sizes}
    return {"path": str(path.resolve()), "files": found}


@contextlib.contextmanager
def filling(out: Path, job: dict[str, Any], log: Log) -> Iterator[Path]:
    """A folder to fill; at the end of the block it becomes `out`. Whole files of an earlier, stopped run of the same job are in it.

    If the block fails what it wrote is kept for the next run, unless the input is at fault: then there will be none.

    Args:
        job: see `describe`.
        log: told, in one line each, what became of an earlier run's work and that this one's can be continued.

    Raises:
        DestinationError: `out` exists, cannot be made, is being made by another process, or the disk is full; or another's files are
            where it would be filled.
    """
    refuse_existing(out)
    partial = out.with_name(f".{out.name}.partial")
    try:
        partial.mkdir(parents=True, exist_ok=True)
        _refuse_foreign(partial)
        lock = (partial / "lock").open("wb")
    except OSError as error:
        _raise_if_full(error, out)
        raise DestinationError(out, found=f"cannot be made: {error.strerror}", fix="name another folder") from None
    with lock:
        _lock(lock.fileno(), out)
        refuse_existing(out)
        folder = partial / "folder"
        try:
            _claim(partial, job, log)
            yield folder
            replace_folder(folder, out, overwrite=False)
        except FileExistsError:
            refuse_existing(out)
            raise
        except BaseException as error:
            at_fault = isinstance(error, InputError) and not isinstance(error, DestinationError)
            if at_fault or not any(folder.rglob("*.safetensors")):
                shutil.rmtree(partial, ignore_errors=True)
            else:
                log(f"stopped; the same command continues with what is in {partial}")
            _raise_if_full(error, out)
            raise
        shutil.rmtree(partial, ignore_errors=True)


def refuse_existing(out: Path) -> None:
    """Nothing is overwritten.

    Raises:
        DestinationError: `out` exists, as a link that leads nowhere too, or cannot be a folder's name.
    """
    try:
        taken = kind_of(out) != "nothing" or out.is_symlink()
    except InputError as error:
        raise DestinationError(out, found=error.found, fix="name another folder") from None
    if taken:
        raise DestinationError(out, found="something there already", fix="name a new folder, or remove this one")


def require_space(folder: Path, needed: int, out: Path) -> None:
    """Refuse to begin what cannot end.

    Args:
        folder: where it is written.
        needed: in bytes.

    Raises:
        DestinationError: the disk has less room than that.
    """
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise DestinationError(
            out,
            found=f"{describe_size(free)} free on this disk",
            expected=f"{describe_size(needed)}, which is what remains to be written",
            fix="make room, or name a folder on another disk",
        )


def _raise_if_full(error: BaseException, out: Path) -> None:
    if isinstance(error, OSError) and error.errno in FULL:
        fix = "make room and run the same command again: it continues with the files that are written"
        raise DestinationError(out, found=f"{FULL[error.errno]}: {error.strerror}", fix=fix) from None


def in_use(partial: Path) -> bool:
    """Whether a process is filling this folder's `out` (it is the `.NAME.partial` of a conversion at work)."""
    try:
        with open_file(partial / "lock") as lock:
            return not try_lock(lock.fileno())
    except InputError:  # there is none
        return False


def _lock(descriptor: int, out: Path) -> None:
    if not try_lock(descriptor):
        fix = "wait for it, or name another folder"
        raise DestinationError(out, found="another process is making this folder", fix=fix)


def _refuse_foreign(partial: Path) -> None:
    """What somebody else keeps under our name is not thrown away."""
    foreign = sorted(path.name for path in partial.iterdir() if not _OURS.fullmatch(path.name))
    if foreign:
        raise DestinationError(
            partial,
            found=f"{some(foreign)}, which no conversion wrote",
            expected="what a stopped conversion left, or nothing",
            fix="move it away, or name another output folder",
        )


def _claim(partial: Path, job: dict[str, Any], log: Log) -> None:
    """Make the folder this job's: keep it if it was, empty it if not."""
    note, folder = partial / NOTE, partial / "folder"
    try:
        ours = read_json(note) == job
    except InputError:
        ours = False
    if not ours:
        others = [path for path in partial.iterdir() if path.name != "lock"]
        if note in others:
            log(f"{partial}: left by another conversion, or by this one before its input changed: starting over")
        for path in others:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        write_json(note, job)
    folder.mkdir(exist_ok=True)
