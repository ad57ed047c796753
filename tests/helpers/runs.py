"""Runs of `train.main` on a tiny model, and what they leave."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from convert.adapters.adapter import WEIGHTS_FILE
from qlora_jax.commands import train
from tests.helpers import tiny

TIMES = {"tokens_per_s", "step_s", "peak_device_gib", "peak_host_gib"}
"""What of a metrics record depends on the machine and the moment."""


def write_place(place: Path, *, max_steps: int, **changes: Any) -> Path:
    """A model, rows to train on, rows held out, and `run.yaml`. `changes` are the model's."""
    tiny.write_model(place / "model", **changes)
    tiny.write_chats(place / "train.jsonl", 64)
    tiny.write_chats(place / "eval.jsonl", 8, seed=1)
    settings = {
        "model": {"name_or_path": str(place / "model")},
        "lora": {"r": 8, "lora_dropout": 0.0},
        "data": {"path": str(place / "train.jsonl"), "max_seq_length": 64},
        "training": {
            "output_dir": str(place / "never-used"),
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 2,
            "learning_rate": 1e-2,
            "max_grad_norm": 1.0,
            "max_steps": max_steps,
        },
    }
    (place / "run.yaml").write_text(yaml.safe_dump(settings))
    return place


def train_main(place: Path, out: Path, *overrides: str) -> int:
    """The exit status of a run in `out`."""
    return train.main(["--config", str(place / "run.yaml"), f"training.output_dir={out}", *overrides])


def adapter_bytes(out: Path) -> bytes:
    """Of the adapter that the run left."""
    return (out / "adapter" / WEIGHTS_FILE).read_bytes()


def records(out: Path) -> list[dict[str, Any]]:
    """`metrics.jsonl`, which must be JSON: no NaN."""

    def no_constant(text: str) -> Any:
        raise ValueError(f"{text} is not JSON")

    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=no_constant) for line in lines]


def timeless(text: str) -> str:
    """The lines of `metrics.jsonl`, byte for byte but for the times."""
    return re.sub(rf'"({"|".join(sorted(TIMES))})": [^,}}]+', r'"\1": ...', text)


def outcome(out: Path) -> dict[str, Any]:
    """Everything a run leaves that must be the same however often it was stopped."""
    from orbax.checkpoint import v1 as ocp

    last = max((out / "checkpoints").glob("step-*"), key=lambda path: int(path.name.removeprefix("step-")))
    arrays = ocp.load(last / "arrays")
    about = json.loads((last / "about.json").read_text())
    about["progress"].pop("window_seconds")
    about["config"]["training"].pop("output_dir")
    about["config"].pop("memory")  # the same bits wherever things live
    samples = out / "samples.jsonl"
    folders = {name: out / name for name in ("adapter", "merged", "best")}
    return {
        "arrays": {key: (np.asarray(x).tobytes(), x.dtype.str, x.shape) for key, x in arrays.items()},
        "about": about,
        "metrics": timeless((out / "metrics.jsonl").read_text()),
        "samples": samples.read_text() if samples.exists() else None,
        **{
            name: {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
            for name, folder in folders.items()
        },
    }


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Equal, with a short message where not."""
    assert found.keys() == expected.keys()
    assert [name for name in expected if found[name] != expected[name]] == []
