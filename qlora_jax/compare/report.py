"""What a comparison shows: a table, `report.json`, and plots of the differences by layer and of both loss curves."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from qlora_jax.compare.stages import Check, Comparison


def as_json(found: Comparison) -> dict[str, Any]:
    """Everything of a comparison, fit for JSON."""
    report = {
        "holds": not found.exceeded,
        **found.about,
        "checks": [dataclasses.asdict(check) | {"holds": check.holds} for check in found.checks],
        "hidden_states_by_layer": found.by_layer,
        "gradients_by_tensor": found.by_tensor,
        "losses": found.losses,
    }
    return _finite(report)


def _finite(value: Any) -> Any:
    """The same with null for each number that JSON has no name for."""
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def show(found: Comparison, console: Console) -> None:
    """The table and the verdict."""
    table = Table(box=None, pad_edge=False)
    for heading in ("stage", "what", "value", "bound", ""):
        table.add_column(heading, justify="right" if heading in ("value", "bound") else "left")
    before = ""
    for check in found.checks:
        stage, before = ("" if check.stage == before else check.stage), check.stage
        row = (stage, check.name, number(check.value), "" if check.bound is None else number(check.bound), mark(check))
        table.add_row(*(Text(cell) for cell in row))
    console.print(table, soft_wrap=False)
    console.print(verdict(found))


def number(value: float) -> str:
    """Short, and exact where it is a whole number."""
    return f"{int(value)}" if float(value).is_integer() and abs(value) < 1e6 else f"{value:.3g}"


def mark(check: Check) -> str:
    """Whether a bound holds."""
    return "" if check.bound is None else "ok" if check.holds else "EXCEEDED"


def verdict(found: Comparison) -> str:
    """The last line."""
    judged = [check for check in found.checks if check.bound is not None]
    if not found.exceeded:
        return f"the same numbers: all {len(judged)} bounds hold"
    names = "; ".join(f"{check.stage}: {check.name}" for check in found.exceeded)
    return f"NOT the same numbers: {len(found.exceeded)} of {len(judged)} bounds exceeded ({names})"


def write(found: Comparison, folder: Path) -> None:
    """`report.json`, `layers.png`, and `losses.png` if steps were taken."""
    (folder / "report.json").write_text(json.dumps(as_json(found), indent=2) + "\n", encoding="utf-8")
    plot_layers(found, folder / "layers.png")
    if found.losses:
        plot_losses(found.losses, folder / "losses.png")


def plot_layers(found: Comparison, path: Path) -> None:
    """Relative differences of the hidden states, layer by layer; exact ones are not drawn."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.subplots()
    for name, values in found.by_layer.items():
        axes.plot(range(len(values)), [value or float("nan") for value in values], marker=".", label=name)
    axes.set(xlabel="layer (0: the embedding)", ylabel="relative difference of the hidden states", yscale="log")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path)


def plot_losses(losses: dict[str, list[float]], path: Path) -> None:
    """All curves, and below how far ours is from theirs."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6), dpi=120, layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    for name, style in zip(losses, ("-", "--", ":"), strict=False):
        above.plot(range(1, len(losses[name]) + 1), losses[name], style, label=name)
    apart = [abs(a - b) / abs(b) or float("nan") for a, b in zip(losses["ours"], losses["theirs"], strict=True)]
    below.plot(range(1, len(apart) + 1), apart, color="C3")
    above.set(ylabel="loss (nats a token)")
    below.set(xlabel="optimizer step", ylabel="relative difference", yscale="log")
    for axes in (above, below):
        axes.grid(alpha=0.3)
    above.legend()
    figure.savefig(path)
