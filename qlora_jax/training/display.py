"""Progress of the training steps: a live line on a terminal, plain lines elsewhere."""

import contextlib
from collections.abc import Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from qlora_jax.training.metrics import Record


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


def _number(value: float | None, form: str = ".4f") -> str:
    return "not finite" if value is None else f"{value:{form}}"
