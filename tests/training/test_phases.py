"""`kill -9` in every phase of a run, one after the other in one folder: what is left in the end is, file by file, what a run leaves that
nobody killed."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.phases import PHASES
from tests.helpers.runs import assert_same, outcome, write_place
from tests.training.test_crash import environment_of

SETTINGS = ["training.max_steps=6", "lora.lora_dropout=0.1", "lora.target_modules=[q_proj]", "training.logging_steps=2",
    "training.eval_steps=1", "training.load_best_model_at_end=true", "training.export_merged=true", "data.preview_rows=0",
    "training.sample_prompt=abc", "training.sample_max_new_tokens=2"]  # fmt: skip
SAVING = ["training.save_steps=2"]
NOT_SAVING = ["training.save_steps=0", "training.save_interval_minutes=0"]
ORDER = ("planning", "quantizing", "step", "checkpoint", "best replaced", "best restored", "adapter", "merge")
"""The phases of one test: each is come to after the one before."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_place(tmp_path_factory.mktemp("phases") / "place", max_steps=6, num_hidden_layers=1)


def run(place: Path, out: Path, settings: list[str], *phases: str) -> dict[str, Any]:
    """What is left after a run that was killed in these phases, with a cache of its own if it is to be killed while it quantizes."""
    environment = environment_of(place.parent) | {"QLORA_JAX_CACHE": str(place.parent / "cache")}
    if "quantizing" in phases:
        environment["QLORA_JAX_CACHE"] = str(out.with_name("cache"))
    arguments = ["--config", str(place / "run.yaml"), f"data.eval_path={place / 'eval.jsonl'}", *SETTINGS, *settings]
    command = [sys.executable, "-m", "tests.helpers.phases", str(out), ",".join(phases)]
    done = subprocess.run([*command, *arguments], env=environment, stdout=subprocess.PIPE, text=True, check=True)
    log = Path(f"{out}.log")
    expected = [f"{phase}: -9" for phase in phases] + ["nowhere: 0"]
    assert done.stdout.splitlines() == expected, log.read_text()[-3000:]
    assert json.loads((out / "run.json").read_text())["state"] == "finished"
    return everything(out)


def everything(out: Path) -> dict[str, Any]:
    """All that must be the same: every file's name, and every file but for times, the lock's bytes and orbax's own."""
    files = [path for path in out.rglob("*") if "arrays" not in path.parts and ".before-" not in path.name]
    names = sorted(str(path.relative_to(out)) for path in files)
    contents = {
        name: (out / name).read_bytes() for name in ("config.yaml", "loss.png", "metrics.jsonl", "samples.jsonl")
    }
    found = outcome(out) if (out / "checkpoints").exists() else {}
    for name in ("adapter", "best", "merged"):
        contents |= {str(path.relative_to(out)): path.read_bytes() for path in (out / name).iterdir()}
    del contents["metrics.jsonl"]  # `outcome` has it without the times
    contents["config.yaml"] = contents["config.yaml"].replace(str(out).encode(), b"OUT")
    return {"names": names, **contents, **found}


@pytest.fixture(scope="module")
def whole(place: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What nobody killed, with checkpoints."""
    return run(place, tmp_path_factory.mktemp("whole") / "out", SAVING)


def test_killed_in_one_phase_after_the_other(place: Path, whole: dict[str, Any], tmp_path: Path) -> None:
    assert_same(run(place, tmp_path / "out", SAVING, *ORDER), whole)


@pytest.mark.slow
@pytest.mark.parametrize("phase", [phase for phase in PHASES if phase not in ("best restored", "nowhere")])
def test_killed_twice_in_a_phase(place: Path, whole: dict[str, Any], tmp_path: Path, phase: str) -> None:
    assert_same(run(place, tmp_path / "out", SAVING, phase, phase), whole)


@pytest.mark.slow
def test_killed_in_every_phase_without_checkpoints(place: Path, tmp_path: Path) -> None:
    phases = [phase for phase in PHASES if phase not in ("checkpoint", "best restored", "nowhere", "end")]
    expected = run(place, tmp_path / "whole", NOT_SAVING)
    assert_same(run(place, tmp_path / "out", NOT_SAVING, *phases, "end"), expected)
