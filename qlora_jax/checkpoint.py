"""Checkpoints: what a run needs to go on as if it had not been stopped, and nothing of the base model.

    step-120/arrays/          adapters and moments, written by orbax: one array for all layers' `q_proj.lora_a`, and so on
    step-120/about.json       format, step, settings, identity of base and data, and the run's own small values
    step-120/metrics.jsonl    the metrics so far, and other files that grow line by line
    step-120/checksums.json   size and SHA-256 of every file above

A folder is filled under a hidden name, synced and renamed, so `step-120` is whole from the moment it exists, whatever moment the power
goes; what happens to it afterwards (a truncated file, a flipped byte) its checksums show.

A thread copies the arrays into plain host memory, one after the other (see `placement.fetch`), while the next step runs: adapters and
moments change in its update only, which waits for the copy (`Checkpoints.wait_taken`). Then the thread writes them while training goes on.
So a checkpoint takes as much host memory as it has bytes, which the plan counts, and hardly any that is pinned.

The arrays hold values, not places: a run may be resumed with moments, adapters or layers elsewhere than they were.
"""

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import logging
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from qlora_jax.errors import FULL, InputError
from qlora_jax.files import describe_size, publish, write_json
from qlora_jax.placement import Tree
from qlora_jax.snapshot import Layers, Snapshot, columns, keys

FORMAT = 1
"""Raised whenever an older version could not read what is written, or would read it wrongly."""

Json = Any  # what `json` can write

ABOUT, CHECKSUMS, ARRAYS = "about.json", "checksums.json", "arrays"
HASHING_THREADS = 8
CONCURRENT_BYTES = 2**30
"""Host memory that orbax may take for what it is writing or reading, besides the arrays."""


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

    def file(self, name: str) -> bytes:
        """A file that was saved along; empty if it was not there."""
        path = self.path / name
        return path.read_bytes() if path.exists() else b""

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
        with _orbax(self._largest(templates)) as ocp:
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

    def save(
        self, step: int, layers: Layers, about: Mapping[str, Json], files: Mapping[str, bytes] | None = None
    ) -> None:
        """Start saving: returns at once, when the save before this one is done.

        Args:
            layers: the arrays must stay as they are until `wait_taken` returns.
            about: added to `about.json`.
            files: more files, by name.

        Raises:
            InputError: the save before this one failed, for example on a full disk.
        """
        self.wait()
        if (self.folder / name_of(step)).exists():
            return  # the same step of the same run
        self._snapshot = Snapshot(layers)
        self._writing = self._writer.submit(self._write, step, self._snapshot, dict(about), dict(files or {}))

    def wait_taken(self) -> None:
        """Return when the arrays that are being saved may change: before each update."""
        if self._snapshot is not None:
            self._snapshot.taken.wait()
            self._snapshot = None

    def wait(self) -> None:
        """Until the save that was started last, if any, is done.

        Raises:
            InputError: it failed.
        """
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()

    def idle(self) -> bool:
        """Whether nothing is being written."""
        return self._writing is None or self._writing.done()

    def check(self) -> None:
        """As `wait`, but without waiting: tells of a save that has failed already."""
        if self.idle():
            self.wait()

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

    def _write(self, step: int, snapshot: Snapshot, about: dict[str, Json], files: dict[str, bytes]) -> None:
        """Write the whole folder and remove what is now too old, in the writer's thread."""
        aside = self.folder / f".{name_of(step)}.partial"
        try:
            arrays = snapshot.take()
            aside.mkdir(parents=True)
            counts = {key: len(array) for key, array in arrays.items()}
            with _orbax(max((array.nbytes for array in arrays.values()), default=0)) as ocp:
                ocp.save((aside / ARRAYS).absolute(), arrays)
            del arrays
            for name, data in files.items():
                (aside / name).write_bytes(data)
            write_json(aside / ABOUT, {"format": FORMAT, "step": step, **about, "arrays": counts})
            write_json(aside / CHECKSUMS, _checksums(aside))
            publish(aside, self.folder / name_of(step))
        except BaseException as error:
            shutil.rmtree(aside, ignore_errors=True)
            if _is_full(error):
                raise self._full(step) from None
            raise
        self._prune()

    def _full(self, step: int) -> InputError:
        kept = max(_steps(self.folder), default=None)
        fix = "make room and run the same command again" + ("" if kept is None else f": it continues after step {kept}")
        free = describe_size(shutil.disk_usage(self.folder).free)
        return InputError(self.folder, found=f"the disk became full while step {step} was saved: {free} free", fix=fix)

    def _prune(self) -> None:
        """All but the newest `keep`. Renamed first: what is half removed must not look whole."""
        old = [path for _, path in sorted(_steps(self.folder).items())[: -self.keep]]
        for path in (*old, *self.folder.glob("step-*.damaged")):
            path.rename(gone := path.with_name(f".{path.name}.old"))
            shutil.rmtree(gone)


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
        expected = {
            name: (size, digest) for name, (size, digest) in json.loads((path / CHECKSUMS).read_bytes()).items()
        }
        found = _checksums(path)
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedError(f"{CHECKSUMS}: {error}") from None
    if not {ABOUT, f"{ARRAYS}/_CHECKPOINT_METADATA"} <= expected.keys():
        raise DamagedError(f"{CHECKSUMS} names too few files")
    for name, written in expected.items():
        if found.get(name) != written:
            raise DamagedError(_difference(name, written, found.get(name)))
    about = json.loads((path / ABOUT).read_text(encoding="utf-8"))
    if about["format"] > FORMAT:
        fix = "resume with the version of qlora_jax that wrote it, or a later one"
        raise InputError(path, found=f"format {about['format']}", expected=f"at most {FORMAT}", fix=fix)
    return Checkpoint(path, about)


def _difference(name: str, written: tuple[Any, Any], found: tuple[int, str] | None) -> str:
    if found is None:
        return f"{name} is missing"
    if found[0] != written[0]:
        return f"{name} has {found[0]} bytes, {written[0]} were written"
    return f"{name} has other bytes than were written"


def _steps(folder: Path) -> dict[int, Path]:
    named = ((re.fullmatch(r"step-(\d+)", path.name), path) for path in folder.glob("step-*"))
    return {int(match[1]): path for match, path in named if match}


def _checksums(folder: Path) -> dict[str, tuple[int, str]]:
    """By name below `folder`, size and SHA-256 of every file but the checksums themselves."""
    paths = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    paths.pop(CHECKSUMS, None)
    with concurrent.futures.ThreadPoolExecutor(HASHING_THREADS) as threads:
        digests = threads.map(_sha256, paths.values())
        return {
            name: (path.stat().st_size, digest) for (name, path), digest in zip(paths.items(), digests, strict=True)
        }


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is_full(error: BaseException) -> bool:
    """tensorstore's errors carry the number in their text only."""
    numbers = "|".join(map(str, FULL))
    return getattr(error, "errno", None) in FULL or re.search(rf"os_error_code='({numbers})'", str(error)) is not None


@contextlib.contextmanager
def _orbax(largest: int) -> Iterator[Any]:
    """orbax as we use it: arrays as they are (float32 noise does not compress) and ours to read while they are written.

    What it takes beside them is bounded, by the bytes of the largest array if that is more.

    Its own log of a failure, a traceback for each of its threads, is left out: the error itself is raised.
    """
    from orbax.checkpoint import v1 as ocp  # half a second to import

    context, log = ocp.Context(), logging.getLogger("absl")
    context.array.saving.use_compression = False
    context.memory.deepcopy_host_arrays = False
    context.memory.write_concurrent_bytes = context.memory.read_concurrent_bytes = max(CONCURRENT_BYTES, 2 * largest)
    level = log.level
    log.setLevel(logging.CRITICAL + 1)
    try:
        with context:
            yield ocp
    finally:
        log.setLevel(level)
