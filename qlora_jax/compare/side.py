"""What one side of a comparison came to, in float32 numpy arrays, whatever it computed in."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors

Tensors = dict[str, np.ndarray]


@dataclasses.dataclass
class Side:
    """Results of one run. Adapter tensors go by `LAYER.LINEAR.PART`, such as `0.q_proj.lora_a`."""

    loss: float = float("nan")
    """Of the first batch, mean over its supervised tokens, before any step."""
    hidden: list[np.ndarray] = dataclasses.field(default_factory=list)
    """[B, T, D] of the first batch: the embedding's output, then each layer's."""
    logits: np.ndarray | None = None
    """[B, T, V] of the first batch."""
    gradients: Tensors = dataclasses.field(default_factory=dict)
    """Of the first batch's loss."""
    losses: list[float] = dataclasses.field(default_factory=list)
    """Of each optimizer step, before it is taken."""
    trained: Tensors = dataclasses.field(default_factory=dict)
    """The adapter after the last step."""
    held_out: list[float] = dataclasses.field(default_factory=list)
    """Mean loss over the held-out tokens: before the first step, and after the last."""
    about: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Device, libraries and their versions."""


def read_reference(folder: Path, adapters: Mapping[str, str]) -> Side:
    """The files that `reference.py` left; `adapters` is our key → PEFT's name of each adapter tensor."""
    numbers = json.loads((folder / "numbers.json").read_text(encoding="utf-8"))
    side = Side(about={key: numbers[key] for key in ("device", "versions")})
    side.loss, side.losses = numbers.get("loss", side.loss), numbers.get("losses", [])
    side.held_out = numbers.get("held_out", [])
    if (path := folder / "forward.safetensors").exists():
        tensors = read_tensors(path)
        side.logits = tensors.pop("logits")
        side.hidden = [tensors[f"hidden.{i}"] for i in range(len(tensors))]
    if (path := folder / "gradients.safetensors").exists():
        side.gradients = read_tensors(path)
    if (path := folder / "adapter" / "adapter_model.safetensors").exists():
        tensors = read_tensors(path)
        side.trained = {key: tensors[name].astype(np.float32) for key, name in adapters.items()}
    return side


def read_tensors(path: Path) -> Tensors:
    """A safetensors file, whole."""
    with safetensors.safe_open(path, framework="numpy") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - the file is no mapping
