"""The run: optimizer steps, evaluation, metrics and checkpoints over an engine, weights and batches that others have made.

What a step depends on is adapters, moments, `Progress` and the step's number: batches, dropout masks and the learning rate are functions
of it. So a run that goes on from a checkpoint makes the steps that it would have made.
"""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from qlora_jax.base.console import Phases
from qlora_jax.base.errors import InputError, InterruptedRunError
from qlora_jax.base.heap import give_back_free_memory
from qlora_jax.config import TrainingSettings
from qlora_jax.data import Batch, Batches
from qlora_jax.engine.engine import Adapters, Engine, Started, Weights
from qlora_jax.engine.optimizer import AdamW, schedule
from qlora_jax.runtime.placement import Where
from qlora_jax.training.checkpoint import Checkpoint, Checkpoints
from qlora_jax.training.display import RunDisplay
from qlora_jax.training.metrics import MetricsLog, Record, Tracker, peak_device_gib, peak_host_gib, plot_loss
from qlora_jax.training.nonfinite import everything, find_fault, shown
from qlora_jax.training.progress import Progress
from qlora_jax.training.signals import Signals

MAX_SKIPPED = 10
"""Steps in a row that `on_nonfinite: skip` leaves out before it gives up: nothing changes any more, so nothing will get better."""


@dataclasses.dataclass(frozen=True)
class Hooks:
    """What a run calls on its way, made by those who know models' names and files."""

    samples: Callable[[int, Adapters], None] = lambda step, adapters: None
    """(steps done, adapters), with every evaluation."""
    best: Callable[[Adapters], None] = lambda adapters: None
    """The best adapters so far, to be kept."""
    best_folder: Path | None = None
    """The folder that `best` keeps them in, which it replaces and does not write into: every checkpoint has a copy."""


def check_evaluation(settings: TrainingSettings, eval_batches: Sequence[Batch]) -> None:
    """Whether what the settings ask of evaluations can be had.

    Raises:
        InputError: it cannot.
    """
    names = [name for name in ("load_best_model_at_end", "early_stopping_patience") if getattr(settings, name)]
    missing = ([] if eval_batches else ["rows to evaluate on"]) + (
        [] if settings.eval_steps else ["training.eval_steps"]
    )
    if names and missing:
        found = f"{' and '.join(names)} without {' and '.join(missing)}"
        fix = "give data.eval_path or data.eval_fraction, and training.eval_steps; or leave these settings out"
        raise InputError("training settings", found=found, fix=fix)


def best_is_gone(folder: Path, step: int) -> InputError:
    """The error where `best/` was removed while the run was at work."""
    found = f"gone: the adapter of step {step}, the best so far, was removed while the run was at work"
    fix = "run the same command again: it continues from the last checkpoint, which has a copy of the best adapter until then"
    return InputError(folder, found=found, fix=fix)


class Trainer:
    """One run. `train` takes fresh adapters and returns trained ones; everything seen on the way is in `metrics.records()`."""

    def __init__(
        self,
        settings: TrainingSettings,
        engine: Engine,
        weights: Weights,
        batches: Batches,
        eval_batches: Sequence[Batch],
        *,
        optimizer: Where,
        output_dir: Path,
        console: Console,
        checkpoints: Checkpoints,
        about: Mapping[str, Any] = {},
        trackers: Sequence[Tracker] = (),
        hooks: Hooks = Hooks(),
        phases: Phases | None = None,
    ) -> None:
        """`about` is for the checkpoints: settings, and the identity of base and data."""
        self.settings, self.engine, self.weights = settings, engine, weights
        self.batches, self.eval_batches = batches, eval_batches
        self.optimizer_where, self.output_dir = optimizer, output_dir
        self.checkpoints, self.about, self.trackers, self.hooks = checkpoints, about, trackers, hooks
        self.display = RunDisplay(console, len(batches))
        self.phases = phases or Phases()
        self.progress = Progress()
        self.learning_rate = schedule(settings, len(batches))
        self._key = jax.random.key(settings.seed)
        self._ahead: tuple[Any, ...] = (None,)  # a step that has begun, and what `_begin` gave for it

    def train(self, adapters: Adapters, resumed: Checkpoint | None = None) -> Adapters:
        """All steps that are left, with an evaluation before the first and after the last; then `loss.png`.

        Raises:
            InputError: the loss or the gradient is no longer finite, or the disk is full.
            InterruptedRunError: a signal asked for it; what was done is saved.
        """
        optimizer = AdamW(self.settings, adapters, self.optimizer_where, self.engine.placement)
        before = b""
        if resumed:
            adapters, optimizer.moments = self._restore(resumed, adapters, optimizer)
            before = resumed.file("metrics.jsonl")
        self.metrics = MetricsLog(self.output_dir / "metrics.jsonl", before, self.trackers)
        with contextlib.closing(self.metrics), self.display.live():
            try:
                adapters = self._steps(adapters, optimizer)
            finally:
                with self.phases.time("saving"):
                    self.checkpoints.wait()
        plot_loss(self.metrics.records(), self.output_dir / "loss.png")
        return adapters

    def _steps(self, adapters: Adapters, optimizer: AdamW) -> Adapters:
        progress, saved = self.progress, (self.progress.step, time.monotonic())
        self._started = time.perf_counter() - progress.window_seconds
        with Signals() as signals:
            while True:
                if signals.received is None:
                    self._evaluate_if_due(adapters)
                over = progress.step >= len(self.batches) or self._stops_early()
                if signals.received is not None or self._save_is_due(*saved, over=over):
                    self._save(adapters, optimizer)
                    saved = progress.step, time.monotonic()
                if signals.received is not None:
                    raise self._interrupted(signals.received)
                if over:
                    return adapters
                with self.phases.time("steps" if "first step" in self.phases.seconds else "first step"):
                    adapters = self._step(adapters, optimizer)

    def _step(self, adapters: Adapters, optimizer: AdamW) -> Adapters:
        """One optimizer step, or none where it is not finite."""
        step = self.progress.step
        batch, started = self._begun(step)
        key, rate = started.key, self.learning_rate(step)
        with jax.transfer_guard("disallow"):  # every byte that crosses the bus in here is one we wrote
            loss, grads = self.engine.go_on(self.weights, adapters, started)
            norm = optimizer.global_norm(grads)
            self.checkpoints.wait_taken()  # the update writes where these adapters and moments are
            # Dispatched before anybody has seen these numbers: if one is not finite, the device leaves everything as it was.
            adapters, _ = optimizer.update(adapters, grads, rate, norm, loss)
            del grads, started
        if step + 1 < len(self.batches):  # while the device is busy
            with contextlib.suppress(Exception):  # which is raised when that step's turn comes
                self._ahead = step + 1, *self._begin(step + 1)
        numbers = [float(value) for value in jax.device_get((loss, norm))]
        if all(map(math.isfinite, numbers)):
            if self.progress.add(*numbers, batch.num_input_tokens):
                rows = shown(everything(self.batches.rows(step)))
                self._note("loss spike", step, f"loss {numbers[0]}; rows {rows}", loss=numbers[0])
        else:
            self._not_finite(adapters, optimizer, batch, key, loss=numbers[0], norm=numbers[1])
        done = step + 1
        if done % self.settings.logging_steps == 0 or done == len(self.batches):
            self._log(rate)
        self.display.done(done)
        return adapters

    def _begun(self, step: int) -> tuple[Batch, Started]:
        """A step's batch, on the device: begun ahead if it was the next one then."""
        (number, *begun), self._ahead = self._ahead, (None,)
        return begun if number == step else self._begin(step)

    def _begin(self, step: int) -> tuple[Batch, Started]:
        batch = self.batches.batch(step)
        key = self.engine.placement.put(jax.random.fold_in(self._key, step), "device") if self.engine.draws else None
        with jax.transfer_guard("disallow"):
            return batch, self.engine.start(self.weights, batch, key)

    def _not_finite(
        self, adapters: Adapters, optimizer: AdamW, batch: Batch, key: jax.Array | None, *, loss: float, norm: float
    ) -> None:
        """Say where it began; then skip the step, or stop before it."""
        step = self.progress.step
        fault = find_fault(self.engine, self.weights, adapters, batch, key, rows=self.batches.rows(step))
        found = f"loss {loss}, gradient norm {norm}, {fault}"
        skipping = self.settings.on_nonfinite == "skip"
        if skipping and self.progress.skipped < MAX_SKIPPED:
            self._note("step skipped", step, found, found=found)
            self.progress.skip(batch.num_input_tokens)
            return
        self._save(adapters, optimizer)
        fix = "lower training.learning_rate, or look for damaged rows in the data; the same command goes on before this step"
        fix += "" if skipping else ", and without it with training.on_nonfinite=skip"
        more = f", after {MAX_SKIPPED} steps in a row that were skipped" if skipping else ""
        raise InputError(f"training step {step + 1}", found=found + more, expected="finite numbers", fix=fix)

    def _note(self, event: str, step: int, text: str, **details: Any) -> None:
        """An event: its details and all rows in `metrics.jsonl`, `text` on the screen."""
        rows = list(everything(self.batches.rows(step)))
        self.metrics.write(
            {"step": step + 1, "event": event, **{f"event_{k}": v for k, v in details.items()}, "rows": rows}
        )
        self.display.note(f"step {step + 1}: {event}: {text}")

    def _log(self, rate: float) -> None:
        """Record the window: the mean loss, the last gradient norm."""
        progress = self.progress
        seconds = time.perf_counter() - self._started
        steps, tokens, losses = progress.window_steps, progress.window_tokens, progress.losses
        record: Record = {
            "step": progress.step,
            "epoch": round(self.batches.epoch(progress.step), 4),
            "loss": sum(losses) / len(losses) if losses else None,
            "learning_rate": rate,
            "grad_norm": progress.norms[-1] if losses else None,
            "tokens": progress.tokens + tokens,
            "tokens_per_s": round(tokens / seconds, 1),
            "step_s": round(seconds / steps, 4),
            "peak_device_gib": peak_device_gib(),
            "peak_host_gib": peak_host_gib(),
        }
        progress.clear_window()
        self._started = time.perf_counter()
        self.metrics.write(record)
        self.display.show(record)

    def _evaluate_if_due(self, adapters: Adapters) -> None:
        step, every = self.progress.step, self.settings.eval_steps
        due = step in (0, len(self.batches)) or (every and step % every == 0)
        if not due or self.progress.evaluated >= step:
            return
        jax.block_until_ready(adapters)  # else the evaluation's time would hold the last step's
        with self._pause("evaluation"):
            if self.eval_batches:
                self._evaluate(adapters)
            self.hooks.samples(step, adapters)
            give_back_free_memory()
        self.progress.evaluated = step

    def _evaluate(self, adapters: Adapters) -> None:
        loss = self.engine.loss(self.weights, adapters, self.eval_batches)
        finite = math.isfinite(loss)
        perplexity = math.exp(min(loss, 700)) if finite else None
        record = {"step": self.progress.step, "eval_loss": loss if finite else None, "eval_perplexity": perplexity}
        self.metrics.write(record)
        self.display.show(record)
        # Without `eval_steps` there is no best/, and so no best: a later start may ask for it.
        if self.settings.eval_steps and self.progress.evaluation(loss, self.settings.early_stopping_threshold):
            self.hooks.best(adapters)

    def _stops_early(self) -> bool:
        progress, patience = self.progress, self.settings.early_stopping_patience
        stops = 0 < patience <= progress.evaluations_since_best and progress.evaluated == progress.step
        if stops:
            best = f"{progress.best_loss:.4f} of step {progress.best_step}"
            why = f"held-out loss no lower than the {best}, training.early_stopping_patience is {patience}"
            self.display.note(f"step {progress.step}: stopped early: {why}")
        return stops

    def _save_is_due(self, step: int, when: float, *, over: bool) -> bool:
        """`step` and `when` (monotonic) are those of the last save."""
        every, minutes = self.settings.save_steps, self.settings.save_interval_minutes
        if self.progress.step == step or not (every or minutes or (over and self.settings.export_merged)):
            return False  # a merge is long: what it needs is saved even where nothing else is
        self.checkpoints.check()
        on_step = every and self.progress.step % every == 0
        return bool(over or on_step or (minutes and time.monotonic() - when >= 60 * minutes))

    def _save(self, adapters: Adapters, optimizer: AdamW) -> None:
        """Start saving; `Checkpoints.save` waits for the save before."""
        self.checkpoints.check_ours()  # or the metrics read back would be another run's
        progress = self.progress
        progress.window_seconds = time.perf_counter() - self._started
        about = {**self.about, "progress": progress.to_json(), "position": self.batches.state(progress.step)}
        files = [path for path in (self.metrics.path, self.output_dir / "samples.jsonl") if path.exists()]
        with self._pause("saving"):
            arrays = {"adapters": adapters, "moments": optimizer.moments}
            self.checkpoints.save(progress.step, arrays, about, files, self._best_folder())

    def _best_folder(self) -> Path | None:
        """The folder of the best adapter so far, if there is one.

        Raises:
            InputError: there was one, and it is gone.
        """
        folder = self.hooks.best_folder
        if folder is None or self.progress.best_step is None:
            return None
        if not folder.is_dir():
            raise best_is_gone(folder, self.progress.best_step)
        return folder

    def _restore(self, resumed: Checkpoint, adapters: Adapters, optimizer: AdamW) -> tuple[Adapters, list[Any]]:
        with self.phases.time("restoring"):
            restored = resumed.restore({"adapters": adapters, "moments": optimizer.moments})
            self.progress = Progress.from_json(resumed.about["progress"])
            if resumed.best is None:
                self.progress.forget_best()
            self.batches.restore(self.progress.step, resumed.about["position"])
        self.display.done(self.progress.step)
        self.display.note(f"continuing after step {self.progress.step}, from {resumed.path}")
        return restored["adapters"], restored["moments"]

    def _interrupted(self, signal: int) -> InterruptedRunError:
        self.checkpoints.wait()
        step, total = self.progress.step, len(self.batches)
        text = f"stopped after step {step} of {total}, saved in {self.checkpoints.folder}: the same command continues from there"
        return InterruptedRunError(signal, text)

    @contextlib.contextmanager
    def _pause(self, phase: str) -> Any:
        """Time that is not the steps'."""
        paused = time.perf_counter()
        with self.phases.time(phase):
            yield
        self._started += time.perf_counter() - paused
