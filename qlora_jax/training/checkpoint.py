"""Checkpoints: what a run needs to go on as if it had not been stopped, and nothing of the base model.

    step-120/arrays/          adapters and moments, written by orbax: one array for all layers' `q_proj.lora_a`, and so on
    step-120/about.json       format, step, settings, identity of base and data, and the run's own small values
    step-120/metrics.jsonl    the metrics so far, and other files that grow line by line
    step-120/checksums.json   size and SHA-256 of every file above

A folder is filled under a hidden name, synced and renamed, so `step-120` is whole from the moment it exists, whatever moment the power
goes; what happens to it afterwards (a truncated file, a flipped byte) its checksums show. `Checkpoints.save` only starts the copies to
the host; a thread waits for them and writes while training goes on.

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
import numpy as np

from qlora_jax.base.errors import FULL, InputError
from qlora_jax.base.files import describe_size, publish, write_json
from qlora_jax.runtime.placement import Tree, put

FORMAT = 1
"""Raised whenever an older version could not read what is written, or would read it wrongly."""

Json = Any  # what `json` can write
Layers = Mapping[str, list[Tree]]
"""By name ("adapters", "moments"), one tree of arrays a layer."""

ABOUT, CHECKSUMS, ARRAYS = "about.json", "checksums.json", "arrays"
HASHING_THREADS = 8


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
        wanted = _columns(templates)
        expected = {key: len(leaves) for key, leaves in wanted.items()}
        if expected != self.about["arrays"]:
            differing = sorted(expected.items() ^ self.about["arrays"].items())
            raise InputError(
                self.path,
                found="arrays that this run has no place for: " + "; ".join(f"{n} x {key}" for key, n in differing[:8]),
                fix="resume with the model, lora.* and training.optim it was made with",
            )
        with _orbax() as ocp:
            loaded = ocp.load((self.path / ARRAYS).absolute())
        restored: dict[str, list[Tree]] = {}
        taken = dict.fromkeys(loaded, 0)
        for name, layers in templates.items():
            restored[name] = []
            for index, layer in enumerate(layers):
                leaves, structure = jax.tree.flatten(layer)
                values = []
                for key in _keys(name, layer):
                    values.append(loaded[key][taken[key]])
                    taken[key] += 1
                placed = jax.device_put(values, [leaf.sharding for leaf in leaves])
                restored[name].append(jax.block_until_ready(jax.tree.unflatten(structure, placed)))
                layers[index] = None
        return restored


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
        for path in folder.glob(".step-*"):
            shutil.rmtree(path)

    def save(
        self, step: int, layers: Layers, about: Mapping[str, Json], files: Mapping[str, bytes] | None = None
    ) -> None:
        """Start saving: returns once the copies to the host are issued, and the save before this one is done.

        Args:
            layers: spent arrays may follow at once; arrays on the host are kept, not copied, until they are written.
            about: added to `about.json`.
            files: more files, by name.

        Raises:
            InputError: the save before this one failed, for example on a full disk.
        """
        self.wait()
        if (self.folder / name_of(step)).exists():
            return  # the same step of the same run
        held = {name: [put(layer, "host") for layer in trees] for name, trees in layers.items()}
        self._writing = self._writer.submit(self._write, step, _columns(held), dict(about), dict(files or {}))

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

    def _write(
        self, step: int, columns: dict[str, list[jax.Array]], about: dict[str, Json], files: dict[str, bytes]
    ) -> None:
        """In the writer's thread: the whole folder, and the removal of what is now too old."""
        aside = self.folder / f".{name_of(step)}.partial"
        try:
            aside.mkdir(parents=True)
            counts = {key: len(leaves) for key, leaves in columns.items()}
            with _orbax() as ocp:
                ocp.save((aside / ARRAYS).absolute(), {key: _stack(columns, key) for key in counts})
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


def _keys(name: str, layer: Tree) -> list[str]:
    """A key for each leaf of a layer's tree; layers whose leaf differs in shape or dtype have another key for it."""
    leaves = jax.tree_util.tree_flatten_with_path(layer)[0]
    return [f"{name}{jax.tree_util.keystr(path)} {leaf.dtype}{list(leaf.shape)}" for path, leaf in leaves]


def _columns(layers: Layers) -> dict[str, list[jax.Array]]:
    """Each key's leaves, in the order of the layers that have it."""
    columns: dict[str, list[jax.Array]] = {}
    for name, trees in layers.items():
        for layer in trees:
            for key, leaf in zip(_keys(name, layer), jax.tree.leaves(layer), strict=True):
                columns.setdefault(key, []).append(leaf)
    return columns


def _stack(columns: dict[str, list[jax.Array]], key: str) -> np.ndarray:
    """One array of a column, [layers, ...]; each leaf is let go once it is copied."""
    leaves = columns[key]
    stacked = np.empty((len(leaves), *leaves[0].shape), leaves[0].dtype)
    for index in range(len(leaves)):
        stacked[index], leaves[index] = leaves[index], None
    return stacked


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
def _orbax() -> Iterator[Any]:
    """orbax as we use it: arrays as they are (float32 noise does not compress) and ours to read while they are written.

    Its own log of a failure, a traceback for each of its threads, is left out: the error itself is raised.
    """
    from orbax.checkpoint import v1 as ocp  # half a second to import

    context, log = ocp.Context(), logging.getLogger("absl")
    context.array.saving.use_compression = False
    context.memory.deepcopy_host_arrays = False
    level = log.level
    log.setLevel(logging.CRITICAL + 1)
    try:
        with context:
            yield ocp
    finally:
        log.setLevel(level)
