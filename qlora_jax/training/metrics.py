"""What a run writes down: `metrics.jsonl`, one object a logged step, and `loss.png`."""

import json
import resource
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from qlora_jax.base.files import replacing
from qlora_jax.runtime.machine import device_memory

Record = dict[str, Any]


class Tracker(Protocol):
    """Another place that metrics go to."""

    def write(self, record: Record) -> None:
        """One record of `metrics.jsonl`."""

    def close(self) -> None:
        """Nothing comes after this."""


class MetricsLog:
    """Appends records to `metrics.jsonl`, each line flushed; `trackers` get them too. Nothing is kept in memory: a run may be long.

    Attributes:
        path: the file.
    """

    def __init__(self, path: Path, before: bytes = b"", trackers: Sequence[Tracker] = ()) -> None:
        """`before`: the lines of a run that is continued; whatever else the file has is of steps that will be made again."""
        self.path, self._trackers = path, trackers
        with replacing(path) as file:
            file.write(before)
        self._file = path.open("ab")

    def write(self, record: Record) -> None:
        """Append one record; numbers are Python's own, finite, or None."""
        self._file.write(json.dumps(record, allow_nan=False).encode() + b"\n")
        self._file.flush()
        for tracker in self._trackers:
            tracker.write(record)

    def records(self) -> list[Record]:
        """All records so far, those of a run that is continued included."""
        with self.path.open("rb") as file:
            return [json.loads(line) for line in file]

    def close(self) -> None:
        """Close the file and the trackers; the records can still be read."""
        self._file.close()
        for tracker in self._trackers:
            tracker.close()


def peak_device_gib() -> float | None:
    """The most memory in use on the first device so far, GiB; None on a CPU, which does not say."""
    stats = device_memory()
    return round(stats["peak_bytes_in_use"] / 2**30, 3) if stats else None


def peak_host_gib() -> float:
    """The most memory this process has had resident so far, GiB."""
    unit = 1 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30, 3)


def plot_loss(records: Sequence[Record], path: Path) -> None:
    """Training loss by step with its running mean, and evaluation loss, as a PNG."""
    from matplotlib.figure import Figure  # slow to import, and needed once, at the end

    training = [(r["step"], r["loss"]) for r in records if r.get("loss") is not None]
    evaluation = [(r["step"], r["eval_loss"]) for r in records if r.get("eval_loss") is not None]
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.subplots()
    if training:
        axes.plot(*zip(*training, strict=True), color="C0", alpha=0.35, linewidth=1, label="training, each logged step")
        axes.plot(*zip(*_running_mean(training), strict=True), color="C0", label="training, running mean")
    if evaluation:
        axes.plot(*zip(*evaluation, strict=True), color="C1", marker="o", label="held-out rows")
    axes.set(xlabel="optimizer step", ylabel="loss (nats a token)")
    axes.grid(alpha=0.3)
    if training or evaluation:
        axes.legend()
    figure.savefig(path)


def _running_mean(points: Sequence[tuple[int, float]], decay: float = 0.8) -> list[tuple[int, float]]:
    """Exponential mean, without the start's bias towards zero."""
    means, total, weight = [], 0.0, 0.0
    for step, value in points:
        total, weight = decay * total + (1 - decay) * value, decay * weight + (1 - decay)
        means.append((step, total / weight))
    return means
