"""Figures of earlier starts are used only for what they were found out for."""

import json
from pathlib import Path

import pytest

from qlora_jax.config import LoraSettings, QuantizationSettings
from qlora_jax.planning import remembered
from qlora_jax.planning.estimate import Job, Layout, Workspace
from qlora_jax.planning.hardware import published
from tests.helpers.tiny import shape_of

CONFIG = shape_of(264, 64, 128, 2, 4, 2, 16, 1e-5)


def job(length: int = 32) -> Job:
    return Job(CONFIG, LoraSettings(r=4), QuantizationSettings(), "adamw", 2, length, 1, "float32", "xla")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The lengths that the compiler was asked about; it answers with them."""
    lengths: list[int] = []

    def compiled(job: Job, layout: Layout) -> Workspace:
        lengths.append(job.length)
        return Workspace(job.length, 2, 3)

    monkeypatch.setattr(remembered, "compiled_workspace", compiled)
    return lengths


def test_a_workspace_is_found_out_once(tmp_path: Path, asked: list[int]) -> None:
    """For each workload and way of working: layers kept or not, but not how many."""
    for _ in range(2):
        assert remembered.workspace(tmp_path, job(), Layout(2)) == Workspace(32, 2, 3)
        assert remembered.workspace(tmp_path, job(64), Layout(2)) == Workspace(64, 2, 3)
        remembered.workspace(tmp_path, job(), Layout(1))
        remembered.workspace(tmp_path, job(), Layout(2, keep=1))
        remembered.workspace(tmp_path, job(), Layout(2, share_dense=False))
    assert asked == [32, 64, 32, 32]


@pytest.mark.parametrize("change", ["code", "flags"])
def test_it_is_asked_again_when_something_else_is_compiled(
    tmp_path: Path, asked: list[int], monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    remembered.workspace(tmp_path, job(), Layout(2))
    if change == "code":
        monkeypatch.setattr(remembered, "_code", lambda: "another")
    else:
        monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_exclude_nondeterministic_ops=true")
    remembered.workspace(tmp_path, job(), Layout(2))
    assert asked == [32, 32]


@pytest.mark.parametrize("text", ["", "[]", '{"found": {"forward": 1}}', "null", '{"about": 1}'])
def test_a_damaged_entry_is_written_anew(tmp_path: Path, asked: list[int], text: str) -> None:
    remembered.workspace(tmp_path, job(), Layout(2))
    (entry,) = tmp_path.iterdir()
    sound = json.loads(entry.read_bytes())
    entry.write_text(text)
    assert remembered.workspace(tmp_path, job(), Layout(2)).forward == 32
    assert json.loads(entry.read_bytes()) == sound
    entry.write_text(json.dumps({**sound, "found": {**sound["found"], "forward": -1}}))
    assert remembered.workspace(tmp_path, job(), Layout(2)).forward == 32
    assert asked == [32, 32, 32]


def test_rates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = [published("H200"), published("A100")]
    monkeypatch.setattr(remembered, "measured", lambda: found.pop(0))
    assert remembered.rates(tmp_path) == remembered.rates(tmp_path) == published("H200")
    assert len(found) == 1


def test_the_modules_whose_code_counts_are_there() -> None:
    root = Path(remembered.__file__).parents[1]
    assert not [name for name in remembered.COMPILED if not (root / name).exists()]
