"""Runs PyTorch's side: writes the job, starts the program, shows its progress and passes on why it stopped."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from qlora_jax.base.errors import InputError
from qlora_jax.config import TrainingSettings
from qlora_jax.data import IGNORED_LABEL, Batch

LIBRARIES = ("torch", "bitsandbytes", "peft", "accelerate")
PROGRAM = "qlora_jax.compare.reference"
PROGRESS = "progress "
FAILURE = "failure.json"
LINES_SHOWN = 15

Stage = Literal["weights", "forward", "gradients", "train", "evaluate"]
Progress = Callable[[str, int, int], object]
"""Told what is being done, how many of it are, and how many there will be."""


def no_progress(what: str, done: int, total: int) -> None:
    """For whom nobody watches."""


@dataclasses.dataclass(frozen=True)
class Run:
    """One run of PyTorch's side."""

    out: Path
    """An empty folder for its results."""
    model: Path
    dtype: str
    """What it computes in: float32 or bfloat16."""
    device: str
    tokens: Path
    """What `save_tokens` wrote."""
    stages: Sequence[Stage]
    linears: Mapping[str, str]
    """Our key of each linear → the module's path in transformers' model."""
    adapters: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Our key of each adapter tensor → PEFT's name."""
    adapter: Path | None = None
    quantization: Mapping[str, Any] | None = None
    """What to quantize to; None for a model that is in 4 bits already, or that is not to be quantized."""
    dense: bool = False
    """Compute with plain linears, of what the 4-bit weights dequantize to in bfloat16."""
    settings: TrainingSettings = dataclasses.field(default_factory=lambda: TrainingSettings(output_dir=Path()))
    learning_rates: Sequence[float] = ()

    def as_json(self) -> dict[str, Any]:
        """Fit for the job's file."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        settings: TrainingSettings = values.pop("settings")
        keys = ("adam_beta1", "adam_beta2", "adam_epsilon", "weight_decay", "max_grad_norm")
        values["optimizer"] = {key: getattr(settings, key) for key in keys}
        return {key: str(value) if isinstance(value, Path) else value for key, value in values.items()}


def require_libraries() -> None:
    """Refuse early where PyTorch's side cannot run.

    Raises:
        InputError: a library of the reference is not installed.
    """
    missing = [name for name in LIBRARIES if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(
            "python -m qlora_jax compare",
            found=f"not installed: {', '.join(missing)}",
            expected="PyTorch, bitsandbytes and peft: the reference that our numbers are compared with",
            fix="pip install 'qlora_jax[compare]'",
        )


def save_tokens(path: Path, batches: Sequence[Batch], held_out: Sequence[Batch], pad_token_id: int) -> None:
    """Both lists of batches (of one micro-batch each) as arrays [S, B, T]; shorter ones are padded on the right."""
    arrays = {}
    for prefix, some in (("", batches), ("held_out_", held_out)):
        length = max((batch.input_ids.shape[-1] for batch in some), default=0)
        padded = [pad(batch, length, pad_token_id) for batch in some]
        ids = "input_ids" if not prefix else "held_out_ids"
        arrays[ids] = np.array([batch.input_ids[0] for batch in padded], np.int32)
        arrays[f"{prefix}labels"] = np.array([batch.labels[0] for batch in padded], np.int32)
    np.savez(path, **arrays)


def pad(batch: Batch, length: int, pad_token_id: int) -> Batch:
    """The same batch with rows of `length` tokens; what is added counts for nothing."""
    widths = ((0, 0), (0, 0), (0, length - batch.input_ids.shape[-1]))
    return dataclasses.replace(
        batch,
        input_ids=np.pad(batch.input_ids, widths, constant_values=pad_token_id),
        labels=np.pad(batch.labels, widths, constant_values=IGNORED_LABEL),
    )


def run_reference(runs: Sequence[Run], job: Path, progress: Progress = no_progress) -> None:
    """Do the runs, one after the other, in one process.

    Raises:
        InputError: a library is missing; or PyTorch's side cannot load a model or an adapter.
        RuntimeError: it failed otherwise, with the end of what it said.
    """
    require_libraries()
    for run in runs:
        run.out.mkdir(parents=True)
    job.write_text(json.dumps([run.as_json() for run in runs]), encoding="utf-8")
    with (job.with_suffix(".log")).open("w+", encoding="utf-8") as said:
        child = subprocess.Popen(
            [sys.executable, "-m", PROGRAM, str(job)],
            stdout=subprocess.PIPE,
            stderr=said,
            text=True,
            env=_environment(),
        )
        with child:
            try:
                for line in child.stdout:
                    if line.startswith(PROGRESS):
                        progress(*json.loads(line.removeprefix(PROGRESS)))
            except BaseException:
                child.terminate()
                raise
        said.seek(0)
        tail = "\n".join(f"    {line}" for line in said.read().splitlines()[-LINES_SHOWN:])
    for run in runs:
        if (failure := run.out / FAILURE).exists():
            message = json.loads(failure.read_text(encoding="utf-8"))["message"]
            what = f"{run.model}" + (f" with the adapter {run.adapter}" if run.adapter else "")
            raise InputError(what, found=f"the reference cannot load it: {message}", expected="what transformers loads")
    if child.returncode:
        raise RuntimeError(f"PyTorch's side ended with status {child.returncode}:\n{tail}")


def _environment() -> dict[str, str]:
    """Ours, with this package to be found, and nothing to be asked of the hub."""
    here = str(Path(__file__).parents[2])
    path = os.pathsep.join([here, *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
