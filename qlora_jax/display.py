"""What a run shows: a live line on a terminal, plain lines elsewhere."""

import contextlib
import time
from collections.abc import Iterator

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from qlora_jax.metrics import Record


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


class RunDisplay:
    """Progress of the training steps. On a terminal one line is kept up to date; elsewhere every logged step is printed."""

    def __init__(self, console: Console, total_steps: int) -> None:
        self.console = console
        self._progress = Progress(
            TextColumn("step"), MofNCompleteColumn(), BarColumn(bar_width=None), TextColumn("{task.description}"),
            TimeRemainingColumn(), console=console, disable=not console.is_terminal, expand=True,
        )  # fmt: skip
        self._task = self._progress.add_task("compiling", total=total_steps)
        self._total = total_steps

    @contextlib.contextmanager
    def live(self) -> Iterator[None]:
        """Show the bar for the length of the block."""
        with self._progress:
            yield

    def done(self, steps: int) -> None:
        """So many optimizer steps are done."""
        self._progress.update(self._task, completed=steps)

    def note(self, text: str) -> None:
        """A line that stays."""
        self.console.print(text)

    def show(self, record: Record) -> None:
        """A logged step."""
        if "eval_loss" in record:
            loss, perplexity = _number(record["eval_loss"]), _number(record["eval_perplexity"], ".2f")
            self.console.print(f"step {record['step']}: held-out loss {loss}, perplexity {perplexity}")
            return
        memory = record["peak_device_gib"] or record["peak_host_gib"]
        text = (
            f"loss {_number(record['loss'])}  lr {record['learning_rate']:.2e}  grad {_number(record['grad_norm'], '.3f')}  "
            f"{record['tokens_per_s']:.0f} tok/s  {memory:.1f} GiB"
        )
        self._progress.update(self._task, description=text)
        if not self.console.is_terminal:
            left = (self._total - record["step"]) * record["step_s"]
            self.console.print(
                f"step {record['step']}/{self._total}  {text}  ETA {int(left) // 60}:{int(left) % 60:02d}",
                soft_wrap=True,
            )


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


def _number(value: float | None, form: str = ".4f") -> str:
    return "not finite" if value is None else f"{value:{form}}"


def _duration(seconds: float) -> str:
    """`4.2 s`, `3:07`, `12:03:07`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
