"""The console: plain text, progress bars that show only on a terminal, and the seconds of a run's phases."""

import contextlib
import time
from collections.abc import Iterator

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text


def make_console(*, stderr: bool = False) -> Console:
    """Text is shown as it is: what looks like rich's markup or emoji may be part of a path or of a model's answer."""
    return Console(stderr=stderr, soft_wrap=True, markup=False, emoji=False)


def progress_bar(console: Console) -> Progress:
    """A bar for work before or after training; it leaves nothing behind, and shows nothing where there is no terminal."""
    return Progress(console=console, transient=True, disable=not console.is_terminal)


class _SpeedColumn(ProgressColumn):
    """In the unit of the bytes beside it; rich's own counts in powers of ten."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed / 2**20:,.1f} MiB/s", style="progress.data.speed")


def byte_bar(console: Console) -> Progress:
    """The same for work that is counted in bytes."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True), _SpeedColumn())
    return Progress(*columns, TimeRemainingColumn(), console=console, transient=True, disable=not console.is_terminal)


class Phases:
    """How long each part of a run took, in the order in which they began."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def time(self, name: str) -> Iterator[None]:
        """Count the block's time under `name`, in addition to what is there."""
        started = time.perf_counter()
        self.seconds.setdefault(name, 0.0)
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - started

    @contextlib.contextmanager
    def told(self, console: Console, *, once: str) -> Iterator[None]:
        """Say them when the block ends, in whatever way, if it came to the phase `once`."""
        try:
            yield
        finally:
            if once in self.seconds:
                console.print(str(self))

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {_duration(seconds)}" for name, seconds in self.seconds.items())
        return f"time: {_duration(sum(self.seconds.values()))} ({parts})"


def _duration(seconds: float) -> str:
    """`4.2 s`, `3:07`, `12:03:07`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
