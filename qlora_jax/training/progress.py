"""How far a run has come: the small values, besides adapters and moments, that the rest of it depends on."""

import dataclasses
import math
import statistics
from typing import Any, Self

SPIKE_HISTORY = 64
"""Losses that a new one is compared with."""
SPIKE_MIN_HISTORY = 16
SPIKE_DEVIATIONS = 10
"""A loss is a spike if it is further above the median of those before it than so many times their median deviation from it. For
normally distributed losses that is 6.7 standard deviations; a run of 100,000 steps then has no spike by chance."""
SPIKE_FLOOR = 0.05
"""And by this share of the median, for losses that hardly vary."""


@dataclasses.dataclass
class Progress:
    """Everything is a number or a list of numbers, so that JSON holds it exactly."""

    step: int = 0
    """Optimizer steps done, those skipped included."""
    tokens: int = 0
    """Tokens of all logged steps."""
    losses: list[float] = dataclasses.field(default_factory=list)
    """Of the steps since the last logged one; skipped ones are left out."""
    norms: list[float] = dataclasses.field(default_factory=list)
    window_steps: int = 0
    window_tokens: int = 0
    window_seconds: float = 0.0
    """Of the steps since the last logged one, before the run was stopped."""
    recent: list[float] = dataclasses.field(default_factory=list)
    """The last losses, for `is_spike`."""
    skipped: int = 0
    """Steps skipped because they were not finite, since the last one that was."""
    evaluated: int = -1
    """The step after which the last evaluation was made; -1 before the first."""
    best_loss: float | None = None
    best_step: int | None = None
    evaluations_since_best: int = 0

    def to_json(self) -> dict[str, Any]:
        """Fit for `json`."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """The inverse of `to_json`."""
        return cls(**values)

    def add(self, loss: float, norm: float, num_tokens: int) -> bool:
        """One step was made. Returns whether its loss is a spike."""
        spike = is_spike(loss, self.recent)
        self.recent = [*self.recent, loss][-SPIKE_HISTORY:]
        self.losses.append(loss)
        self.norms.append(norm)
        self.skipped = 0
        self._count(num_tokens)
        return spike

    def skip(self, num_tokens: int) -> None:
        """One step was not made."""
        self.skipped += 1
        self._count(num_tokens)

    def _count(self, num_tokens: int) -> None:
        self.step += 1
        self.window_steps += 1
        self.window_tokens += num_tokens

    def clear_window(self) -> None:
        """The steps so far were logged."""
        self.tokens += self.window_tokens
        self.losses, self.norms = [], []
        self.window_steps = self.window_tokens = 0
        self.window_seconds = 0.0

    def forget_best(self) -> None:
        """Nothing is left of the best adapter: the next evaluation's is the best."""
        self.best_loss = self.best_step = None

    def evaluation(self, loss: float, threshold: float) -> bool:
        """An evaluation after this step came to `loss`. Returns whether it is the best yet; one before the first step is not.

        Like transformers' EarlyStoppingCallback: one that is better, but by no more than `threshold`, does not reset the patience.
        """
        if self.step == 0 or not math.isfinite(loss):
            return False
        best = self.best_loss
        self.evaluations_since_best = 0 if best is None or best - loss > threshold else self.evaluations_since_best + 1
        if best is not None and loss >= best:
            return False
        self.best_loss, self.best_step = loss, self.step
        return True


def is_spike(loss: float, before: list[float]) -> bool:
    """Whether a loss stands out above those before it; see `SPIKE_DEVIATIONS`."""
    if len(before) < SPIKE_MIN_HISTORY:
        return False
    median = statistics.median(before)
    deviation = statistics.median(abs(value - median) for value in before)
    return loss - median > max(SPIKE_DEVIATIONS * deviation, SPIKE_FLOOR * abs(median))
