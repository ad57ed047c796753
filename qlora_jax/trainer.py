"""The run: optimizer steps, evaluation and metrics over an engine, weights and batches that others have made."""

import contextlib
import dataclasses
import math
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from rich.console import Console

from qlora_jax.config import TrainingSettings
from qlora_jax.data import Batch, Batches
from qlora_jax.display import RunDisplay
from qlora_jax.engine import Adapters, Engine, Weights
from qlora_jax.errors import InputError
from qlora_jax.metrics import MetricsLog, Record, peak_device_gib, peak_host_gib, plot_loss
from qlora_jax.optimizer import AdamW, schedule
from qlora_jax.placement import Where, put


def refuse_finished_run(settings: TrainingSettings) -> None:
    """Stop before anything is read or written if `output_dir` holds a finished run.

    Raises:
        InputError: it does, and `overwrite_output_dir` was not asked for.
    """
    folder = settings.output_dir
    if not settings.overwrite_output_dir and ((folder / "adapter").exists() or (folder / "merged").exists()):
        fix = "name another training.output_dir, or allow it with training.overwrite_output_dir=true"
        raise InputError(
            folder, found="a finished run (adapter/ or merged/)", expected="a new or empty folder", fix=fix
        )


def make_output_dir(settings: TrainingSettings) -> Path:
    """Make `output_dir`; the metrics that an earlier run left there are kept under another name.

    Raises:
        InputError: the folder cannot be made.
    """
    folder = settings.output_dir
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            folder, found=f"cannot be made: {error.strerror}", fix="name another training.output_dir"
        ) from None
    metrics = folder / "metrics.jsonl"
    if metrics.exists():
        number = 1 + len(list(folder.glob("metrics.before-*.jsonl")))
        metrics.rename(folder / f"metrics.before-{number}.jsonl")
    return folder


@dataclasses.dataclass
class _Window:
    """What happened since the last logged step; losses and norms are still on the device."""

    losses: list[jax.Array] = dataclasses.field(default_factory=list)
    norms: list[jax.Array] = dataclasses.field(default_factory=list)
    tokens: int = 0
    started: float = dataclasses.field(default_factory=time.perf_counter)


class Trainer:
    """One run. `train` takes fresh adapters and returns trained ones; everything seen on the way is in `metrics.records`."""

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
    ) -> None:
        self.settings, self.engine, self.weights = settings, engine, weights
        self.batches, self.eval_batches = batches, eval_batches
        self.optimizer_where = optimizer
        self.output_dir = output_dir
        self.metrics = MetricsLog(output_dir / "metrics.jsonl")
        self.display = RunDisplay(console, len(batches))
        self.tokens = 0

    def train(self, adapters: Adapters) -> Adapters:
        """All steps, with an evaluation before the first and after the last; then `loss.png`.

        Raises:
            InputError: the loss or the gradient is no longer finite.
        """
        with contextlib.closing(self.metrics):
            adapters = self._train(adapters)
        plot_loss(self.metrics.records, self.output_dir / "loss.png")
        return adapters

    def _train(self, adapters: Adapters) -> Adapters:
        optimizer = AdamW(self.settings, adapters, self.optimizer_where)
        learning_rate = schedule(self.settings, len(self.batches))
        key = jax.random.key(self.settings.seed)
        self._evaluate(adapters, 0)
        window = _Window()
        with self.display.live():
            for step in range(len(self.batches)):
                batch, step_key = self.batches.batch(step), put(jax.random.fold_in(key, step), "device")
                with jax.transfer_guard("disallow"):  # every byte that crosses the bus in here is one we wrote
                    loss, grads = self.engine.value_and_grad(self.weights, adapters, batch, step_key)
                    adapters, norm = optimizer.update(adapters, grads, learning_rate(step))
                window.losses.append(loss)
                window.norms.append(norm)
                window.tokens += batch.num_input_tokens
                done = step + 1
                if done % self.settings.logging_steps == 0 or done == len(self.batches):
                    window = self._log(done, learning_rate(step), window)
                self.display.advance()
                if self.settings.eval_steps and done % self.settings.eval_steps == 0 and done < len(self.batches):
                    jax.block_until_ready(
                        (window.losses, window.norms)
                    )  # else the evaluation's time would hold these steps'
                    paused = time.perf_counter()
                    self._evaluate(adapters, done)
                    window.started += time.perf_counter() - paused
        self._evaluate(adapters, len(self.batches))
        return adapters

    def _log(self, step: int, learning_rate: float, window: _Window) -> _Window:
        """Wait for the window's steps and record them: the mean loss, the last gradient norm. Returns a new window."""
        losses, norms = jax.device_get((window.losses, window.norms))
        seconds = time.perf_counter() - window.started
        self.tokens += window.tokens
        record: Record = {
            "step": step,
            "epoch": round(self.batches.epoch(step), 4),
            "loss": float(np.mean(losses)),
            "learning_rate": learning_rate,
            "grad_norm": float(norms[-1]),
            "tokens": self.tokens,
            "tokens_per_s": round(window.tokens / seconds, 1),
            "step_s": round(seconds / len(losses), 4),
            "peak_device_gib": peak_device_gib(),
            "peak_host_gib": peak_host_gib(),
        }
        if not (math.isfinite(record["loss"]) and np.isfinite(norms).all()):
            found = f"loss {record['loss']}, gradient norm {record['grad_norm']}"
            raise InputError(
                f"training step {step}",
                found=found,
                fix="lower training.learning_rate, or look for damaged rows in the data",
            )
        self.metrics.write(record)
        self.display.show(record)
        return _Window()

    def _evaluate(self, adapters: Adapters, step: int) -> None:
        if not self.eval_batches:
            return
        loss = self.engine.loss(self.weights, adapters, self.eval_batches)
        record = {"step": step, "eval_loss": loss, "eval_perplexity": math.exp(min(loss, 700))}
        self.metrics.write(record)
        self.display.show(record)
