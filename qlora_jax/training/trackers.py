"""Metrics for TensorBoard and Weights & Biases, for those who ask (`training.report_to`); neither needs a network."""

import importlib
import importlib.util
from pathlib import Path
from typing import Any

from qlora_jax.base.errors import InputError
from qlora_jax.config import Config, TrainingSettings
from qlora_jax.training.metrics import Record, Tracker

PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb"}
"""What each tracker is imported from; the extra of our own package has the tracker's name."""


class TensorBoard:
    """Event files in `output_dir/tensorboard`, written by tensorboardX."""

    def __init__(self, folder: Path, start: int) -> None:
        """Steps after `start` that are there already are of a run that was stopped, and are made again."""
        suffix = f".from-{start:09}"  # a file is named by the second, and a name that is there already is written over
        writer = importlib.import_module("tensorboardX").SummaryWriter
        self._writer = writer(str(folder), purge_step=start + 1, filename_suffix=suffix)

    def write(self, record: Record) -> None:
        """Every number, as a scalar of its step."""
        for name, value in _numbers(record).items():
            self._writer.add_scalar(name, value, record["step"])
        self._writer.flush()

    def close(self) -> None:
        """Close the file."""
        self._writer.close()


class WeightsAndBiases:
    """A run of W&B's; where it goes, or that it stays here, is wandb's own business (`WANDB_MODE=offline`, `wandb login`)."""

    def __init__(self, folder: Path, name: str, run_id: str, config: dict[str, Any]) -> None:
        """A continued run has the same `run_id`.

        Raises:
            InputError: wandb does not start: nobody is logged in, say.
        """
        wandb = importlib.import_module("wandb")
        try:
            self._run = wandb.init(dir=str(folder), name=name, id=run_id, resume="allow", config=config)
        except wandb.Error as error:
            found = f"wandb does not start: {error}"
            fix = "wandb login; or WANDB_MODE=offline, which needs no account; or leave it out of report_to"
            raise InputError("training.report_to", found=found, fix=fix) from None

    def write(self, record: Record) -> None:
        """Every number, at its step."""
        self._run.log(_numbers(record), step=record["step"])

    def close(self) -> None:
        """Let wandb send what it has."""
        self._run.finish()


def check_trackers(settings: TrainingSettings) -> None:
    """Look for the packages now, not when the model is loaded.

    Raises:
        InputError: one that `report_to` needs is not installed.
    """
    missing = [name for name in settings.report_to if importlib.util.find_spec(PACKAGES[name]) is None]
    if missing:
        packages = " ".join(PACKAGES[name] for name in missing)
        found = f"{' and '.join(missing)}, and no package {packages.replace(' ', ' or ')}"
        raise InputError(
            "training.report_to",
            found=found,
            fix=f"pip install {packages}, or leave {'them' if missing[1:] else 'it'} out",
        )


def open_trackers(config: Config, folder: Path, start: int, run_id: str) -> list[Tracker]:
    """Those that `report_to` names, for a run in `folder` that goes on after step `start`.

    Args:
        run_id: the same whenever the run is continued.
    """
    settings = config.training
    trackers: list[Tracker] = []
    if "tensorboard" in settings.report_to:
        trackers.append(TensorBoard(folder / "tensorboard", start))
    if "wandb" in settings.report_to:
        name = settings.run_name or folder.resolve().name
        trackers.append(WeightsAndBiases(folder, name, run_id, config.model_dump(mode="json")))
    return trackers


def _numbers(record: Record) -> dict[str, float]:
    return {name: value for name, value in record.items() if isinstance(value, int | float) and name != "step"}
