"""A run and its folder: best/ belongs to the checkpoint, a folder that is taken away is noticed by whoever writes, and a run without
checkpoints continues too."""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlora_jax.base.checksums import checksums
from qlora_jax.base.errors import EXIT_BAD_INPUT
from qlora_jax.base.files import write_json
from qlora_jax.commands import execute, export
from qlora_jax.training import checkpoint, trainer
from qlora_jax.training.checkpoint import ABOUT, CHECKSUMS, open_checkpoint
from qlora_jax.training.trainer import Trainer
from tests.helpers.children import environment
from tests.helpers.runs import adapter_bytes, assert_same, outcome, records, train_main, write_place
from tests.training.test_resume import Killed, at_step, contents, kill, killed

PLAIN = ["training.optim=adamw", "lora.target_modules=[q_proj]", "data.preview_rows=0", "training.max_steps=6"]
OFF = [*PLAIN, "training.save_steps=0", "training.save_interval_minutes=0", "training.export_merged=true"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_place(tmp_path_factory.mktemp("place"), max_steps=6)


# The best adapter


@pytest.fixture
def losses(monkeypatch: pytest.MonkeyPatch) -> dict[int, float]:
    """Held-out losses by step, made up."""
    made_up: dict[int, float] = {}
    current: list[int] = [0]
    real = Trainer._evaluate

    def evaluate(self: Trainer, adapters: Any) -> None:
        current[0] = self.progress.step
        real(self, adapters)

    monkeypatch.setattr(Trainer, "_evaluate", evaluate)
    monkeypatch.setattr(trainer.Engine, "loss", lambda *args: made_up[current[0]])
    return made_up


def best_settings(place: Path) -> list[str]:
    """Evaluations after steps 2, 4 and 6, a checkpoint after step 3; the best adapter is what is exported."""
    saving = ["training.save_steps=3", "training.eval_steps=2", "training.load_best_model_at_end=true"]
    return [*PLAIN, *saving, f"data.eval_path={place / 'eval.jsonl'}"]


def stopped_with_an_abandoned_best(place: Path, out: Path, losses: dict[int, float]) -> None:
    """Killed after evaluation 4, which is to be made again: best/ is its adapter, the checkpoint is that of step 3."""
    losses |= {0: 9.0, 2: 3.0, 4: 2.0, 6: 4.0}
    killed(place, out, *best_settings(place), step=5)
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-3"]
    losses[4] = 3.5  # with another learning rate it is not as good


def test_an_abandoned_best_adapter_is_never_exported(
    place: Path, tmp_path: Path, losses: dict[int, float], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    stopped_with_an_abandoned_best(place, out, losses)
    abandoned = (out / "best" / "adapter_model.safetensors").read_bytes()
    assert train_main(place, out, *best_settings(place), "training.learning_rate=1e-3") == 0
    assert "the adapter is that of step 2, which had the lowest held-out loss" in capsys.readouterr().out
    assert train_main(place, tmp_path / "two", *PLAIN, "training.max_steps=2") == 0
    assert adapter_bytes(out) == adapter_bytes(tmp_path / "two") != abandoned
    assert contents(out / "best") == {
        out / "best" / path.name: path.read_bytes() for path in (out / "adapter").iterdir()
    }


def test_the_best_adapter_comes_back_with_the_checkpoint(place: Path, tmp_path: Path, losses: dict[int, float]) -> None:
    """Though best/ be lost, half removed or another's; at any moment while it is put back."""
    out = tmp_path / "out"
    stopped_with_an_abandoned_best(place, out, losses)
    vouched = contents(out / "checkpoints" / "step-3" / "best")
    shutil.rmtree(out / "best")
    (out / ".best.partial").mkdir()
    with at_step(3, kill), pytest.raises(Killed):
        train_main(place, out, *best_settings(place))
    assert {path.name: data for path, data in contents(out / "best").items()} == {p.name: d for p, d in vouched.items()}
    assert not (out / ".best.partial").exists()
    open_checkpoint(out / "checkpoints" / "step-3")


def test_a_best_adapter_that_is_removed_meanwhile(
    place: Path, tmp_path: Path, losses: dict[int, float], capsys: pytest.CaptureFixture[str]
) -> None:
    """The run ends in place of saving or exporting another, and the same command has it again."""
    losses |= {0: 9.0, 2: 3.0, 4: 3.5, 6: 4.0}
    expected = tmp_path / "whole"
    assert train_main(place, expected, *best_settings(place)) == 0
    for step, out in ((5, tmp_path / "saving"), (None, tmp_path / "exporting")):
        gone = lambda out=out: shutil.rmtree(out / "best")  # noqa: E731
        with pytest.MonkeyPatch.context() as patch:
            if step is None:
                patch.setattr(trainer, "plot_loss", lambda *args, gone=gone: gone())
                status = train_main(place, out, *best_settings(place))
            else:
                with at_step(step, gone):
                    status = train_main(place, out, *best_settings(place))
        assert status == EXIT_BAD_INPUT
        error = capsys.readouterr().err
        assert f"error: {out / 'best'}\n  found:    gone: the adapter of step 2" in error
        assert "run the same command again" in error
        assert train_main(place, out, *best_settings(place)) == 0
        assert_same(outcome(out), outcome(expected))


def test_a_checkpoint_of_an_earlier_version(
    place: Path, tmp_path: Path, losses: dict[int, float], capsys: pytest.CaptureFixture[str]
) -> None:
    """It has no best adapter in it: refused where that is asked for, said where it is not."""
    out = tmp_path / "out"
    stopped_with_an_abandoned_best(place, out, losses)
    step = out / "checkpoints" / "step-3"
    shutil.rmtree(step / "best")
    write_json(step / CHECKSUMS, checksums(step, CHECKSUMS))
    before = contents(out)
    capsys.readouterr()
    assert train_main(place, out, *best_settings(place)) == EXIT_BAD_INPUT
    assert contents(out) == before, "nothing is touched"
    assert "nothing of the adapter of step 2, the best so far" in capsys.readouterr().err
    assert train_main(place, out, *best_settings(place), "training.load_best_model_at_end=false") == 0
    assert (
        f"{step} has nothing of the best adapter so far, that of step 2: best/ begins anew\n" in capsys.readouterr().out
    )
    assert (out / "best.before-1").is_dir(), "nobody knows whose it is"
    about = json.loads((out / "checkpoints" / "step-6" / ABOUT).read_text())
    assert about["progress"]["best_step"] == 4


# A folder that is taken away


def begun_anew(out: Path) -> None:
    out.mkdir()
    (out / ".lock").write_bytes(b"of another run")


def linked(out: Path) -> None:
    begun_anew(out.with_name("elsewhere"))
    out.symlink_to(out.with_name("elsewhere"))


INSTEAD: dict[str, Callable[[Path], object]] = {
    "nothing": lambda out: None,
    "a file": lambda out: out.write_text("mine"),
    "another run": begun_anew,
    "a link to another run": linked,
}


@pytest.mark.parametrize("instead", INSTEAD)
@pytest.mark.parametrize("moment", ["a checkpoint is written", "a step is made"])
def test_a_folder_that_is_moved(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], instead: str, moment: str
) -> None:
    """One message; whatever has the folder's name then is left alone, and the run can be continued where it is."""
    out, moved, kept = tmp_path / "out", tmp_path / "moved", dict[Path, bytes]()
    real = checkpoint.write_json

    def move() -> None:
        if not moved.exists():
            out.rename(moved)
            INSTEAD[instead](out)
            kept.update(contents(tmp_path))

    def write(path: Path, value: Any) -> None:
        if path.name == ABOUT:
            move()
        real(path, value)

    with pytest.MonkeyPatch.context() as patch:
        if moment == "a step is made":
            patch.setattr(
                Trainer,
                "_begun",
                lambda self, step, real=Trainer._begun: (move() if step == 4 else None, real(self, step))[1],
            )
        else:
            patch.setattr(checkpoint, "write_json", write)
        assert train_main(place, out, *PLAIN, "training.save_steps=2") == EXIT_BAD_INPUT
    error = capsys.readouterr().err
    assert (
        error.count("its lock is gone: the folder was removed, moved or begun anew") == 1 and "Traceback" not in error
    )
    outside = {path: data for path, data in contents(tmp_path).items() if not path.is_relative_to(moved)}
    assert outside == {path: data for path, data in kept.items() if not path.is_relative_to(moved)}
    patience = time.monotonic() + 30
    while list(moved.rglob(".step-*")) and time.monotonic() < patience:  # the writer's thread removes what it had begun
        time.sleep(0.05)
    assert not list(moved.rglob(".step-*"))
    assert train_main(place, moved, *PLAIN, "training.save_steps=2") == 0


def test_a_folder_that_cannot_be_written_to(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder of our own that became a file: a message that names it, no traceback."""
    out = tmp_path / "out"
    with at_step(4, lambda: (out / "checkpoints").write_text("")):
        assert train_main(place, out, *PLAIN, "training.save_steps=5") == EXIT_BAD_INPUT
    error = capsys.readouterr().err
    assert f"error: {out / 'checkpoints'}\n  found:    cannot be used: File exists\n" in error
    assert "run the same command again" in error


HANGS = """
import sys, threading
from qlora_jax.base import errors

errors.EXIT_GRACE = 0.2
threading.Thread(target=threading.Event().wait).start()  # as a library's that waits for what will not come

def main():
    if sys.argv[1] == "raise":
        raise ZeroDivisionError
    return 2

errors.end_process(main)
"""


@pytest.mark.parametrize(("how", "status"), [("raise", 1), ("return", 2)])
def test_a_failure_ends_the_process_with_its_threads(how: str, status: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", HANGS, how], env=environment(), capture_output=True, text=True, timeout=30
    )
    assert done.returncode == status
    assert ("ZeroDivisionError" in done.stderr) == (how == "raise")


# Without checkpoints


@pytest.fixture(scope="module")
def whole(place: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Everything that an uninterrupted run without checkpoints leaves."""
    out = tmp_path_factory.mktemp("whole") / "out"
    assert train_main(place, out, *OFF) == 0
    return everything(out)


def everything(out: Path) -> dict[str, Any]:
    return {
        "names": sorted(str(path.relative_to(out)) for path in out.rglob("*") if ".before-" not in path.name),
        **{name: {p.name: p.read_bytes() for p in (out / name).iterdir()} for name in ("adapter", "merged")},
        "losses": [record["loss"] for record in records(out)],
    }


@pytest.mark.parametrize("phase", ["a step", "the adapter", "the merge", "the end"])
def test_killed_where_nothing_is_saved(
    place: Path, tmp_path: Path, whole: dict[str, Any], capsys: pytest.CaptureFixture[str], phase: str
) -> None:
    """The same command continues: from the start, or, once everything is trained, with the export."""
    out, deaths = tmp_path / "out", {
        "the adapter": (export, "save"), "the merge": (export, "merge_with_progress"), "the end": (execute, "finish"),
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(
            "qlora_jax.training.output_dir.OutputDir.end", lambda self, state: None
        )  # which a killed process does not come to
        if phase == "a step":
            patch.setattr(
                Trainer, "_begun", lambda self, step, real=Trainer._begun: kill() if step == 3 else real(self, step)
            )
        else:
            patch.setattr(*deaths[phase], lambda *args: kill())
        train_main(place, out, *OFF)
    assert json.loads((out / "run.json").read_text())["state"] == "running"
    capsys.readouterr()
    assert train_main(place, out, *OFF) == 0
    assert ("continuing after step 6" in capsys.readouterr().out) == (phase != "a step")
    assert everything(out) == whole
    assert not (out / "checkpoints").exists(), "the one for the merge is not needed any more"
    assert train_main(place, out, *OFF) == EXIT_BAD_INPUT
    assert "a finished run" in capsys.readouterr().err


def test_what_another_run_left_is_not_overwritten_unasked(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A finished run that another, allowed to, was replacing when it was killed: the adapter is still the first one's."""
    out, short = tmp_path / "out", [*OFF, "training.max_steps=2", "training.export_merged=false"]
    assert train_main(place, out, *short) == 0
    adapter = adapter_bytes(out)
    with at_step(1, kill), pytest.raises(Killed):
        train_main(place, out, *short, "training.overwrite_output_dir=true", "training.learning_rate=1e-3")
    capsys.readouterr()
    assert train_main(place, out, *short) == EXIT_BAD_INPUT
    assert "a finished run" in capsys.readouterr().err and adapter_bytes(out) == adapter
    assert train_main(place, out, *short, "training.overwrite_output_dir=true") == 0
    assert json.loads((out / "run.json").read_text()).keys() == {"id", "state", "starts"}
