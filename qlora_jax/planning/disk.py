"""What a run takes of the disk, from shapes alone, and whether there is room for it before anything is trained.

A checkpoint is the adapter and its moments (12 bytes a parameter, about 6 with 8-bit moments) and the run's own state; `save_total_limit`
of them are kept, and one more is there while it is written. The results are counted beside them, as if all were there at once: the run's
fullest moment takes no more. What is there already under these names counts as done, whether it is kept (the checkpoints of a run that
goes on) or replaced (those of a run that is overwritten).

What a run cannot do without is `required`, and refused if it does not fit. A cache is a convenience: where it has no room beside the run
it is left out, and the log says so.
"""

import dataclasses
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax

from qlora_jax.base.errors import InputError
from qlora_jax.base.files import describe_size
from qlora_jax.config import Config
from qlora_jax.planning.estimate import Job

STATE_BYTES = 2**15
"""Of a checkpoint, besides its arrays: settings, progress, checksums and what orbax always writes, some 11 kB."""
NAME_BYTES = 2**10
"""And for each array's name, in orbax's tables and ours, some 450."""
RECORD_BYTES = 320
"""Of a line of `metrics.jsonl`: its longest have some 280."""
TOKEN_BYTES = 8
"""Of a token in an answer of `samples.jsonl`."""
SMALL_BYTES = 2**20
"""For everything small in the run's folder: settings, `run.json`, `loss.png`, the adapters' configs and headers."""


@dataclasses.dataclass(frozen=True)
class Need:
    """Something a run writes: how large it will be, and how much of that is on the disk already."""

    name: str
    path: Path
    """The file or folder; it need not be there yet."""
    nbytes: int
    there: int = 0
    required: bool = True

    @property
    def missing(self) -> int:
        """Bytes still to be written."""
        return max(0, self.nbytes - self.there)


@dataclasses.dataclass(frozen=True)
class Disk:
    """A file system, and what a run puts on it."""

    path: Path
    """The folder that the first of the needs is in."""
    free: int
    needs: tuple[Need, ...]

    @property
    def required(self) -> int:
        """Bytes still to be written that the run cannot do without."""
        return sum(need.missing for need in self.needs if need.required)

    def has_room(self, need: Need) -> bool:
        """Whether `need` fits beside what the run cannot do without."""
        return self.required + (0 if need.required else need.missing) <= self.free


@dataclasses.dataclass(frozen=True)
class Space:
    """What a run writes, as a function of its settings."""

    config: Config
    job: Job
    steps: int | None
    """Of the run; None where nobody knows yet, and metrics are left out."""
    merged_bytes: int
    """What `merged/` will take, if `training.export_merged` asks for it."""
    others: tuple[Need, ...] = ()
    """In other places: the caches."""
    free: int | None = None
    """Of every disk, in place of what there is: to plan for another machine."""

    @property
    def checkpoint_bytes(self) -> int:
        """Of one checkpoint at the end of the run: its arrays to the byte, and room for the rest."""
        arrays = self.job.config.num_hidden_layers * (self.job.adapter_bytes + self.job.moments_bytes)
        names = len(jax.tree.leaves((self.job.adapter, self.job.moments)))
        return arrays + STATE_BYTES + NAME_BYTES * names + self._growing_bytes

    @property
    def needs(self) -> list[Need]:
        """Everything, in the order it is shown."""
        training = self.config.training
        out, kept = training.output_dir, training.save_total_limit
        parameters = sum(leaf.size for leaf in jax.tree.leaves(self.job.adapter)) * self.job.config.num_hidden_layers
        adapter = 4 * parameters  # in float32, whatever it was trained in
        has_best = bool(training.eval_steps and self.job.eval_rows)
        each = self.checkpoint_bytes + (
            adapter if has_best else 0
        )  # of which best/ is a part, and need not be the same in each
        name = f"checkpoints: {kept} kept, one being written, {each / 2**20:,.1f} MiB each"
        found = [_need(name, out / "checkpoints", (kept + 1) * each)]
        found.append(Need("adapter", out / "adapter", adapter))
        if has_best:
            found.append(_need("best adapter, twice while it is replaced", out / "best", 2 * adapter))
        if training.export_merged:
            found.append(_need("merged model", out / "merged", self.merged_bytes))
        found.append(Need("metrics, and what is small", out / "metrics.jsonl", SMALL_BYTES + self._growing_bytes))
        return [*found, *self.others]

    @property
    def _growing_bytes(self) -> int:
        """Of `metrics.jsonl` and `samples.jsonl` at the end of the run."""
        training, steps = self.config.training, self.steps or 0
        evaluations = 2 + (steps // training.eval_steps if training.eval_steps else 0)
        answers = sum(
            RECORD_BYTES + len(prompt.encode()) + TOKEN_BYTES * training.sample_max_new_tokens
            for prompt in training.sample_prompts
        )
        return RECORD_BYTES * (steps // training.logging_steps + evaluations) + answers * evaluations

    @property
    def disks(self) -> list[Disk]:
        """The needs by file system, that of `output_dir` first."""
        places: dict[int, list[Need]] = {}
        for need in self.needs:
            places.setdefault(_device(need.path), []).append(need)
        return [
            Disk(
                needs[0].path.parent,
                shutil.disk_usage(_nearest(needs[0].path)).free if self.free is None else self.free,
                tuple(needs),
            )
            for needs in places.values()
        ]

    @property
    def fits(self) -> bool:
        """Whether everything that the run cannot do without has room."""
        return all(disk.required <= disk.free for disk in self.disks)

    def check(self) -> None:
        """Refuse to begin what cannot be saved.

        Raises:
            InputError: on one of the disks there is less room than the run cannot do without; with what would change that.
        """
        for disk in self.disks:
            if disk.required > disk.free:
                parts = "".join(
                    f"\n    {need.name}: {describe_size(need.missing)}"
                    for need in disk.needs
                    if need.required and need.missing
                )
                raise InputError(
                    disk.path,
                    found=f"{describe_size(disk.free)} free on this disk",
                    expected=f"{describe_size(disk.required)}, which the run has still to write:{parts}",
                    fix="; or ".join(self._remedies(disk)),
                )

    def beside(self, folder: Path) -> int:
        """Bytes that the run cannot do without on the disk of `folder`, outside of it: what a cache there has to leave free."""
        needs = (need for need in self.needs if need.required and not need.path.is_relative_to(folder))
        return sum(need.missing for need in needs if _device(need.path) == _device(folder))

    def as_dict(self) -> dict[str, Any]:
        """For `--json` and for a run's records."""
        return {
            "checkpoint_bytes": self.checkpoint_bytes,
            "needs": [dataclasses.asdict(need) | {"path": str(need.path)} for need in self.needs],
            "disks": [
                {"path": str(disk.path), "required_bytes": disk.required, "free_bytes": disk.free}
                for disk in self.disks
            ],
        }

    def _remedies(self, disk: Disk) -> list[str]:
        """What would make room: each alone, settings only if they would do it."""
        training, rank = self.config.training, self.config.lora.r
        found = [f"make room for {describe_size(disk.required - disk.free)} more"]
        if any(need.path.is_relative_to(training.output_dir) for need in disk.needs):
            found.append("name a training.output_dir on another disk")
        if any(need.required and need.missing and need in self.others for need in disk.needs):
            found.append("set QLORA_JAX_CACHE to a folder on another disk")
        tried: list[tuple[str, Iterable[Any]]] = [
            ("training.save_total_limit", range(training.save_total_limit - 1, 0, -1)),
            ("training.export_merged", [False] * training.export_merged),
            ("training.optim", ["paged_adamw_8bit"]),
            ("lora.r", (smaller for smaller in (32, 16, 8) if smaller < rank)),
        ]
        for name, values in tried:
            value = next((value for value in values if self._with(name, value).fits), None)
            if value is not None:
                found.append(f"set {name}={str(value).lower() if value is False else value}")
        return found

    def _with(self, name: str, value: Any) -> "Space":
        """The same run with another value of one setting."""
        section, _, key = name.partition(".")
        config = self.config.model_copy(update={section: getattr(self.config, section).model_copy(update={key: value})})
        job = dataclasses.replace(self.job, lora=config.lora, optim=config.training.optim)
        return dataclasses.replace(self, config=config, job=job)


def bytes_in(path: Path) -> int:
    """Of all files below a folder; 0 if it is not there."""
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def _need(name: str, path: Path, nbytes: int) -> Need:
    return Need(name, path, nbytes, bytes_in(path))


def _device(path: Path) -> int:
    """The number of the file system that a path is on, or will be."""
    return _nearest(path).stat().st_dev


def _nearest(path: Path) -> Path:
    """The path, or the last folder above it that is there already."""
    path = path.absolute()
    return next(place for place in (path, *path.parents) if place.exists())
