"""Checkpoints: what a run needs to go on as if it had not been stopped, and nothing of the base model.

    step-120/arrays/          adapters and moments, written by orbax: one array for all layers' `q_proj.lora_a`, and so on
    step-120/about.json       format, step, settings, identity of base and data, and the run's own small values
    step-120/metrics.jsonl    the metrics so far, and other files that grow line by line
    step-120/best/            the adapter that was the best so far; links to the files of the run's best/ where the disk can
    step-120/checksums.json   size and SHA-256 of every file above

A folder is filled under a hidden name, synced and renamed, so `step-120` is whole from the moment it exists, whatever moment the power
goes; what happens to it afterwards (a truncated file, a flipped byte) its checksums show.

A thread copies the arrays into plain host memory, one after the other (see `placement.fetch`), while the next step runs: adapters and
moments change in its update only, which waits for the copy (`Checkpoints.wait_taken`). Then the thread writes them while training goes on,
into the folder that was the run's when `save` was called, whatever has its name by then, and publishes nothing once that has been taken
away. So a checkpoint takes as much host memory as it has bytes, which the plan counts, and hardly any that is pinned.

The arrays hold values, not places: a run may be resumed with moments, adapters or layers elsewhere than they were.
"""

import concurrent.futures
import contextlib
import dataclasses
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from qlora_jax.base.checksums import checksums, difference
from qlora_jax.base.errors import FULL, InputError
from qlora_jax.base.files import (
    Anchor,
    FileSoFar,
    describe_size,
    link_folder,
    remove_folder,
    replace_folder,
    write_json,
)
from qlora_jax.base.heap import give_back_free_memory
from qlora_jax.base.reading import kind_of, read_bytes, read_json, read_json_object, reading, shown
from qlora_jax.runtime.placement import Tree
from qlora_jax.training.about import check_about
from qlora_jax.training.array_files import import_orbax, orbax, system_error
from qlora_jax.training.snapshot import Layers, Snapshot, columns, keys

FORMAT = 1
"""Raised whenever an older version could not read what is written, or would read it wrongly."""

Json = Any  # what `json` can write

ABOUT, CHECKSUMS, ARRAYS, BEST = "about.json", "checksums.json", "arrays", "best"
MAX_LINES_BYTES = 2**30
"""Bytes of a file that is saved along."""
LOOKS_EVERY = 0.5
"""Seconds between two looks, while a save is waited for, at whether the folder is still the run's."""


class DamagedError(Exception):
    """A checkpoint's files are not what was written; the message names the first that is not."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason[:500])  # the damage may be a name without end


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A sound checkpoint: its folder, and what its `about.json` says."""

    path: Path
    about: Mapping[str, Json]

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return int(self.about["step"])

    @property
    def best(self) -> Path | None:
        """The folder of the adapter that was the best so far, if there was one."""
        return path if (path := self.path / BEST).is_dir() else None

    def file(self, name: str) -> bytes:
        """A file that was saved along; empty if it was not there."""
        path = self.path / name
        return read_bytes(path, at_most=MAX_LINES_BYTES) if kind_of(path) != "nothing" else b""

    def restore(self, templates: Layers) -> dict[str, list[Tree]]:
        """The arrays, each where the template's is. A layer of the template is let go when its own is there.

        Raises:
            InputError: the arrays are not those of the template: names, shapes, dtypes and number of layers are compared.
        """
        wanted = columns(templates)
        expected = {key: len(leaves) for key, leaves in wanted.items()}
        if expected != self.about["arrays"]:
            differing = sorted(expected.items() ^ self.about["arrays"].items())
            raise InputError(
                self.path,
                found="arrays that this run has no place for: " + "; ".join(f"{n} x {key}" for key, n in differing[:8]),
                fix="resume with the model, lora.* and training.optim it was made with",
            )
        shapes = {key: ((len(leaves), *leaves[0].shape), leaves[0].dtype) for key, leaves in wanted.items()}
        with orbax(self._largest(templates)) as ocp, reading(self.path, "arrays that cannot be read"):
            stored = ocp.metadata((self.path / ARRAYS).absolute()).metadata
            found = {key: (tuple(array.shape), np.dtype(array.dtype)) for key, array in stored.items()}
            if found != shapes:  # before there is memory for them
                raise ValueError(f"they are {shown(found)}, and not what {ABOUT} says")
            loaded = ocp.load((self.path / ARRAYS).absolute())
        restored: dict[str, list[Tree]] = {}
        taken = dict.fromkeys(loaded, 0)
        for name, layers in templates.items():
            restored[name] = []
            for index, layer in enumerate(layers):
                leaves, structure = jax.tree.flatten(layer)
                values = []
                for key in keys(name, layer):
                    values.append(loaded[key][taken[key]])
                    taken[key] += 1
                placed = jax.device_put(values, [leaf.sharding for leaf in leaves])
                restored[name].append(jax.block_until_ready(jax.tree.unflatten(structure, placed)))
                layers[index] = None
        return restored

    def _largest(self, templates: Layers) -> int:
        """Bytes of the largest of the arrays, each for all layers."""
        return max((sum(leaf.nbytes for leaf in leaves) for leaves in columns(templates).values()), default=0)


class Checkpoints:
    """A run's folder of checkpoints, the newest `keep` of them. One process at a time: the run's lock sees to that."""

    def __init__(self, folder: Path, keep: int, check_ours: Callable[[], None] = lambda: None) -> None:
        """The folder is only made by the first save; what a dead process left half-written is removed.

        Args:
            check_ours: raises where the folder has ceased to be this process's; for whoever is about to save.
        """
        self.folder, self.keep, self.check_ours = folder, keep, check_ours
        self._writer = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: concurrent.futures.Future[None] | None = None
        self._snapshot: Snapshot | None = None
        for path in folder.glob(".step-*"):
            shutil.rmtree(path)

    def prepare(self) -> None:
        """Start, in the writer's thread, what the first save would wait for."""
        self._writer.submit(import_orbax)

    def save(
        self,
        step: int,
        layers: Layers,
        about: Mapping[str, Json],
        files: Sequence[Path] = (),
        best: Path | None = None,
    ) -> None:
        """Start saving: returns at once, when the save before this one is done.

        Args:
            layers: the arrays must stay as they are until `wait_taken` returns.
            about: added to `about.json`.
            files: more files, saved as they are now: they may grow or be replaced at once.
            best: the folder of the best adapter so far. It may be replaced at once; its files must not be written to.

        Raises:
            InputError: the save before this one failed, for example on a full disk.
        """
        self.wait()
        if (self.folder / name_of(step)).exists():
            return  # the same step of the same run
        self.folder.mkdir(parents=True, exist_ok=True)
        place, parts = self._begin(step, best, files)
        self._snapshot = Snapshot(layers)
        self._writing = self._writer.submit(self._write, step, self._snapshot, dict(about), parts, place)

    def wait_taken(self) -> None:
        """Return when the arrays that are being saved may change: before each update."""
        if self._snapshot is not None:
            self._snapshot.taken.wait()
            self._snapshot = None

    def _begin(self, step: int, best: Path | None, files: Sequence[Path]) -> tuple[Anchor, list[FileSoFar]]:
        """Make the folder to fill, with the best adapter in it, which is replaced while the rest is written; open what is saved along."""
        self.folder.mkdir(parents=True, exist_ok=True)
        place = Anchor(self.folder)
        aside, parts = place.path / f".{name_of(step)}.partial", list[FileSoFar]()
        try:
            aside.mkdir()
            parts.extend(map(FileSoFar, files))
            if best is not None:
                link_folder(best, aside / BEST)
        except OSError as error:
            shutil.rmtree(aside, ignore_errors=True)
            for each in (place, *parts):
                each.close()
            raise self._not_saved(step, error) from None
        return place, parts

    def wait(self) -> None:
        """Until the save that was started last, if any, is done.

        Raises:
            InputError: it failed.
        """
        if self._writing is not None:
            writing, self._writing = self._writing, None
            while not concurrent.futures.wait([writing], LOOKS_EVERY).done:
                self.check_ours()  # orbax may wait for minutes for a folder that was taken away
            writing.result()

    def idle(self) -> bool:
        """Whether nothing is being written."""
        return self._writing is None or self._writing.done()

    def check(self) -> None:
        """As `wait`, but without waiting: tells of a save that has failed already."""
        if self.idle():
            self.wait()

    def remove(self, step: int) -> None:
        """Remove a checkpoint that is not needed any more, if it is there; the folder too, if nothing else is in it."""
        remove_folder(self.folder / name_of(step))
        if self.folder.is_dir() and not any(self.folder.iterdir()):
            self.folder.rmdir()

    def newest(self, log: Callable[[str], object]) -> Checkpoint | None:
        """The newest sound checkpoint. Damaged ones are named to `log`, and set aside as `step-120.damaged`.

        Raises:
            InputError: there are checkpoints, and none is sound; or one is of a later format.
        """
        damaged: dict[Path, DamagedError] = {}
        for _, path in sorted(_steps(self.folder).items(), reverse=True):
            try:
                found = open_checkpoint(path)
            except DamagedError as error:
                damaged[path] = error
                continue
            for bad, error in damaged.items():
                log(f"{bad} is damaged ({error}): going back to {path.name}")
                shutil.rmtree(aside := bad.with_name(f"{bad.name}.damaged"), ignore_errors=True)
                bad.rename(aside)
            return found
        if damaged:
            reasons = "".join(f"\n    {path.name}: {error}" for path, error in damaged.items())
            fix = "restore one from a copy, or start again: training.resume=never training.overwrite_output_dir=true"
            raise InputError(self.folder, found=f"no checkpoint that is not damaged{reasons}", fix=fix)
        return None

    def _write(
        self, step: int, snapshot: Snapshot, about: dict[str, Json], files: list[FileSoFar], place: Anchor
    ) -> None:
        """Write the whole folder and remove what is now too old, in the writer's thread."""
        with contextlib.ExitStack() as opened:
            for each in (place, *files):
                opened.callback(each.close)
            aside = place.path / f".{name_of(step)}.partial"
            try:
                arrays = snapshot.take()
                counts = {key: len(array) for key, array in arrays.items()}
                with orbax(max((array.nbytes for array in arrays.values()), default=0)) as ocp:
                    ocp.save((aside / ARRAYS).absolute(), arrays)
                del arrays
                for part in files:
                    part.copy_to(aside)
                write_json(aside / ABOUT, {"format": FORMAT, "step": step, **about, "arrays": counts})
                write_json(aside / CHECKSUMS, checksums(aside, CHECKSUMS))
                self.check_ours()
                replace_folder(aside, place.path / name_of(step), overwrite=False)
            except BaseException as error:
                shutil.rmtree(aside, ignore_errors=True)
                self.check_ours()
                if system_error(error) is None:
                    raise
                raise self._not_saved(step, error) from None
            self._prune(place.path)
        give_back_free_memory()

    def _not_saved(self, step: int, error: BaseException) -> InputError:
        """The error of a file that could not be written, for people."""
        number, kept = system_error(error), max(_steps(self.folder), default=None)
        found, fix = f"step {step} could not be saved: {os.strerror(number)}", "see to that disk"
        if number in FULL:
            free = describe_size(shutil.disk_usage(self.folder).free)
            found, fix = f"the disk became full while step {step} was saved: {free} free", "make room"
        more = "" if kept is None else f": it continues after step {kept}"
        return InputError(self.folder, found=found, fix=f"{fix} and run the same command again{more}")

    def _prune(self, folder: Path) -> None:
        """All but the newest `keep`."""
        old = [path for _, path in sorted(_steps(folder).items())[: -self.keep]]
        for path in (*old, *folder.glob("step-*.damaged")):
            remove_folder(path)


def name_of(step: int) -> str:
    """The folder's name."""
    return f"step-{step}"


def checkpoint_bytes(layers: Layers) -> int:
    """Bytes of one checkpoint's arrays, but for a few thousand: 9.9 GB for 828 M parameters with 32-bit moments."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(dict(layers)))


def open_checkpoint(path: Path) -> Checkpoint:
    """Read and check every file.

    Raises:
        DamagedError: one is missing, or not what was written.
        InputError: the checkpoint is of a later format.
    """
    try:
        with reading(path, "not what was written"):
            expected = {name: (size, digest) for name, (size, digest) in read_json(path / CHECKSUMS).items()}
        with reading(path, "cannot be read"):
            found = checksums(path, CHECKSUMS)
    except InputError as error:
        raise DamagedError(f"{CHECKSUMS}: {error.found}") from None
    if not {ABOUT, f"{ARRAYS}/_CHECKPOINT_METADATA"} <= expected.keys():
        raise DamagedError(f"{CHECKSUMS} names too few files")
    for name, written in expected.items():
        if found.get(name) != written:
            raise DamagedError(difference(name, written, found.get(name)))
    try:
        about = read_json_object(path / ABOUT, at_most=MAX_LINES_BYTES)
    except InputError as error:
        raise DamagedError(f"{ABOUT}: {error.found}") from None
    if isinstance(format := about.get("format"), int) and format > FORMAT:
        fix = "resume with the version of qlora_jax that wrote it, or a later one"
        raise InputError(path, found=f"format {shown(format)}", expected=f"at most {FORMAT}", fix=fix)
    try:
        return Checkpoint(path, check_about(about, _step(path), ABOUT))
    except InputError as error:
        raise DamagedError(f"{error.where}: {error.found}") from None


def _steps(folder: Path) -> dict[int, Path]:
    named = ((_step(path), path) for path in folder.glob("step-*"))
    return {step: path for step, path in named if step is not None}


def _step(path: Path) -> int | None:
    match = re.fullmatch(r"step-([0-9]{1,18})", path.name)
    return int(match[1]) if match else None
