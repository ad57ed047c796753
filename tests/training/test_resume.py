"""A run that was stopped and continued is the run that was not: adapters, moments and metrics byte for byte. And what is refused."""

import contextlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from qlora_jax.base.errors import EXIT_BAD_INPUT
from qlora_jax.runtime.machine import device_kind
from qlora_jax.training import output_dir, snapshot, trainer
from qlora_jax.training.samples import Samples
from qlora_jax.training.trainer import Trainer
from tests.helpers.children import environment
from tests.helpers.runs import adapter_bytes, assert_same, outcome, records, train_main, write_place

STEPS = 20
STOPPED = 7
FULL = ["lora.lora_dropout=0.1", "training.optim=paged_adamw_8bit", "training.logging_steps=3", "training.eval_steps=5",
    "training.save_steps=3", "training.lr_scheduler_type=cosine", "training.warmup_ratio=0.2", "training.sample_prompt=abc",
    "training.sample_max_new_tokens=4"]  # fmt: skip
PLAIN = ["training.optim=adamw", "training.save_steps=3", "lora.target_modules=[down_proj,q_proj]"]
HOST = ["memory.base_weights=host", "memory.activations=host", "memory.optimizer=host"]
DEVICE = ["memory.base_weights=device", "memory.activations=device", "memory.optimizer=device"]


class Killed(BaseException):
    """Nothing that handles errors handles this."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_place(tmp_path_factory.mktemp("place"), max_steps=STEPS)


def evaluated(place: Path) -> str:
    return f"data.eval_path={place / 'eval.jsonl'}"


@pytest.fixture(scope="module")
def straight(place: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What 20 steps in one go leave, by name of the settings."""
    out = tmp_path_factory.mktemp("straight")
    assert train_main(place, out / "full", *FULL, evaluated(place)) == 0
    assert train_main(place, out / "plain", *PLAIN) == 0
    return {"full": outcome(out / "full"), "plain": outcome(out / "plain"), "out": {"path": out}}


@contextlib.contextmanager
def at_step(step: int, act: Callable[[], object]) -> Iterator[None]:
    """Do something when step `step` (from 0) is about to be made."""
    real = Trainer._begun

    def begun(self: Trainer, number: int) -> Any:
        if number == step:
            act()
        return real(self, number)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_begun", begun)
        yield


def kill() -> None:
    raise Killed


def killed(place: Path, out: Path, *overrides: str, step: int = STOPPED) -> None:
    with at_step(step, kill), pytest.raises(Killed):
        train_main(place, out, *overrides)


# The same run


def test_killed_and_continued(
    place: Path, straight: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Dropout, accumulation, 8-bit moments, warm-up and decay; killed between two logged steps, after an evaluation."""
    killed(place, tmp_path, *FULL, evaluated(place))
    assert "step-6" in {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert [record["step"] for record in records(tmp_path) if "loss" in record] == [3, 6]
    capsys.readouterr()
    assert train_main(place, tmp_path, *FULL, evaluated(place)) == 0
    assert f"continuing after step 6, from {tmp_path / 'checkpoints' / 'step-6'}\n" in capsys.readouterr().out
    assert_same(outcome(tmp_path), straight["full"])


def test_an_update_waits_until_a_checkpoint_has_its_arrays(
    place: Path, straight: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The writer's copies are slower than a step, whose update writes where they read."""
    fetch = snapshot.fetch
    monkeypatch.setattr(snapshot, "fetch", lambda array: (time.sleep(0.02), fetch(array))[1])
    killed(place, tmp_path, *PLAIN)
    assert train_main(place, tmp_path, *PLAIN) == 0
    assert_same(outcome(tmp_path), straight["plain"])


def test_packed_rows(place: Path, tmp_path: Path) -> None:
    """Into lines of 200 tokens; stopped in the second epoch."""
    more = [*PLAIN, "data.packing=true", "data.max_seq_length=200", "training.gradient_accumulation_steps=1"]
    more += ["training.per_device_train_batch_size=2", "training.max_steps=9", "lora.lora_dropout=0.1"]
    assert train_main(place, tmp_path / "straight", *more) == 0
    killed(place, tmp_path / "out", *more)
    assert train_main(place, tmp_path / "out", *more) == 0
    assert records(tmp_path / "out")[6]["epoch"] > 1
    assert_same(outcome(tmp_path / "out"), outcome(tmp_path / "straight"))


@pytest.mark.parametrize(("before", "after"), [(HOST, DEVICE), (DEVICE, HOST)], ids=["to the device", "to the host"])
def test_continued_elsewhere(
    place: Path, straight: dict[str, Any], tmp_path: Path, before: list[str], after: list[str]
) -> None:
    """From streamed to resident, moments from the host to the device, and back."""
    killed(place, tmp_path, *FULL, evaluated(place), *before)
    assert train_main(place, tmp_path, *FULL, evaluated(place), *after) == 0
    assert_same(outcome(tmp_path), straight["full"])


def test_killed_again_and_again(place: Path, straight: dict[str, Any], tmp_path: Path) -> None:
    """Before the first save, after it, twice at one step, and after the last step."""
    for step in (1, 4, 7, 7, 8, 19):
        killed(place, tmp_path, *PLAIN, step=step)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "plot_loss", lambda *args: kill())
        with pytest.raises(Killed):
            train_main(place, tmp_path, *PLAIN)
    assert train_main(place, tmp_path, *PLAIN) == 0
    assert_same(outcome(tmp_path), straight["plain"])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"])
def test_a_signal(
    place: Path, straight: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], number: signal.Signals
) -> None:
    """The step is finished and saved, in the middle of a logged window and where an evaluation is due, which is left for later."""
    handlers = {wish: signal.getsignal(wish) for wish in (signal.SIGTERM, signal.SIGINT)}
    with at_step(9, lambda: os.kill(os.getpid(), number)):
        assert train_main(place, tmp_path, *FULL, evaluated(place)) == 128 + number
    assert {wish: signal.getsignal(wish) for wish in handlers} == handlers
    message = (
        f"stopped after step 10 of {STEPS}, saved in {tmp_path / 'checkpoints'}: the same command continues from there"
    )
    said = capsys.readouterr()
    assert said.err.splitlines()[-1] == message
    assert re.fullmatch(r"time: .* \(checking .*, steps .*\)", said.out.splitlines()[-1])
    assert [record["step"] for record in records(tmp_path) if "eval_loss" in record] == [0, 5]
    run = json.loads((tmp_path / "run.json").read_text())
    assert run["state"] == "interrupted"
    assert run["starts"][0]["seconds"].keys() >= {"loading", "first step", "steps", "saving", "evaluation"}
    assert train_main(place, tmp_path, *FULL, evaluated(place)) == 0
    assert_same(outcome(tmp_path), straight["full"])


def test_a_signal_saves_where_saving_is_off(place: Path, tmp_path: Path) -> None:
    off = [*PLAIN, "training.save_steps=0", "training.save_interval_minutes=0"]
    with at_step(3, lambda: os.kill(os.getpid(), signal.SIGTERM)):
        assert train_main(place, tmp_path, *off) == 143
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-4"]


def test_save_interval_minutes(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock of our own, on which a step takes a minute."""
    now = 0.0

    def tick(self: Trainer, *args: Any) -> Any:
        nonlocal now
        now += 60
        return step(self, *args)

    step = Trainer._step
    monkeypatch.setattr(Trainer, "_step", tick)
    monkeypatch.setattr(trainer.time, "monotonic", lambda: now)
    saved: list[int] = []
    save = trainer.Checkpoints.save
    monkeypatch.setattr(
        trainer.Checkpoints, "save", lambda self, number, *args: (saved.append(number), save(self, number, *args))
    )
    more = ["training.save_steps=10", "training.save_interval_minutes=3", "training.max_steps=14"]
    assert train_main(place, tmp_path, *PLAIN, *more) == 0
    assert saved == [3, 6, 9, 10, 13, 14]


def test_damage_goes_back_one(
    place: Path, straight: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    killed(place, tmp_path, *PLAIN)
    path = tmp_path / "checkpoints" / "step-6" / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-3])
    assert train_main(place, tmp_path, *PLAIN) == 0
    printed = capsys.readouterr().out
    assert re.search(
        r"step-6 is damaged \(metrics.jsonl has \d+ bytes, \d+ were written\): going back to step-3\n", printed
    )
    assert_same(outcome(tmp_path), straight["plain"])


def test_more_steps(place: Path, straight: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A finished run of 12 steps goes on to 20: the run of 20, with a constant learning rate."""
    assert train_main(place, tmp_path, *PLAIN, "training.max_steps=12") == 0
    capsys.readouterr()
    assert train_main(place, tmp_path, *PLAIN) == 0
    assert "changed: training.max_steps: 12 → 20, from here on\n" in capsys.readouterr().out
    assert_same(outcome(tmp_path), straight["plain"])


# Early stopping and the best adapter


def test_the_best_adapter_and_early_stopping(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Evaluations that we make up; stopped between them, and continued."""
    losses = {0: 9.0, 2: 5.0, 4: 4.0, 6: 4.5, 8: 3.995, 10: 4.1, 12: 0.0}
    monkeypatch.setattr(trainer.Engine, "loss", lambda *args: losses[current[0]])
    current = [0]
    real = Trainer._evaluate

    def evaluate(self: Trainer, adapters: Any) -> None:
        current[0] = self.progress.step
        real(self, adapters)

    monkeypatch.setattr(Trainer, "_evaluate", evaluate)
    more = ["training.eval_steps=2", "training.early_stopping_patience=3", "training.early_stopping_threshold=0.01"]
    more += [*PLAIN, "training.save_steps=3", "training.load_best_model_at_end=true", evaluated(place)]
    more += ["training.sample_prompt=hi", "training.sample_max_new_tokens=2"]
    killed(place, tmp_path / "out", *more, step=7)
    capsys.readouterr()
    assert train_main(place, tmp_path / "out", *more) == 0
    said = capsys.readouterr().out
    assert "step 10: stopped early: held-out loss no lower than the 3.9950 of step 8" in said
    assert "the adapter is that of step 8, which had the lowest held-out loss" in said
    assert "after: hi" in said
    found = {record["step"]: record["eval_loss"] for record in records(tmp_path / "out") if "eval_loss" in record}
    assert found == {step: loss for step, loss in losses.items() if step <= 10}, "6, 8 and 10 were not better by 0.01"
    assert train_main(place, tmp_path / "eight", *PLAIN, "training.max_steps=8") == 0
    assert adapter_bytes(tmp_path / "out") == adapter_bytes(tmp_path / "eight"), "the lowest was after step 8"
    best = (tmp_path / "out" / "best" / "adapter_model.safetensors").read_bytes()
    assert best == adapter_bytes(tmp_path / "out")


def test_samples_beside_each_other_are_the_first_and_those_of_the_exported_step(tmp_path: Path) -> None:
    answers = iter("abc")
    console = Console(file=io.StringIO(), width=60)
    samples = Samples(tmp_path / "samples.jsonl", ["hi"], lambda adapters, prompt: f"answer {next(answers)}", console)
    for step in (0, 2, 4):
        samples.take(step, [])
    for step, last in ((None, "c"), (2, "b")):
        console.file = io.StringIO()
        samples.show(step)
        shown = console.file.getvalue()
        assert "answer a" in shown and f"answer {last}" in shown and shown.count("answer") == 2


def test_what_has_no_evaluation_is_refused(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert train_main(place, out, "training.load_best_model_at_end=true") == EXIT_BAD_INPUT
    assert "load_best_model_at_end without rows to evaluate on and training.eval_steps" in capsys.readouterr().err
    assert not out.exists()


# What is refused


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refusal(capsys: pytest.CaptureFixture[str], place: Path, out: Path, *overrides: str) -> str:
    before = contents(out)
    capsys.readouterr()
    assert train_main(place, out, *overrides) == EXIT_BAD_INPUT
    assert contents(out) == before, "nothing is touched"
    return capsys.readouterr().err


@pytest.fixture(scope="module")
def stopped(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run stopped after step 4; not to be continued."""
    out = tmp_path_factory.mktemp("stopped") / "out"
    with at_step(3, lambda: os.kill(os.getpid(), signal.SIGTERM)):
        assert train_main(place, out, *PLAIN) == 143
    return out


@pytest.mark.parametrize(
    ("overrides", "lines"),
    [
        (["lora.r=4"], ["lora.r: 8 → 4"]),
        (["training.seed=1", "training.optim=paged_adamw_8bit"], ["training.optim: 'adamw' → 'paged_adamw_8bit'", "training.seed: 0 → 1"]),
        (["training.gradient_accumulation_steps=1"], ["training.gradient_accumulation_steps: 2 → 1"]),
        (["data.max_seq_length=40"], ["data.max_seq_length: 64 → 40"]),
    ],
)  # fmt: skip
def test_other_settings(
    capsys: pytest.CaptureFixture[str], place: Path, stopped: Path, overrides: list[str], lines: list[str]
) -> None:
    error = refusal(capsys, place, stopped, *PLAIN, *overrides)
    assert f"error: {stopped / 'checkpoints' / 'step-4'}\n  found:    a run with other settings\n" in error
    for line in lines:
        assert f"\n    {line}\n" in error
    assert "give the old values back, or start another run: another training.output_dir" in error


def test_other_data(capsys: pytest.CaptureFixture[str], place: Path, stopped: Path, tmp_path: Path) -> None:
    """The same rows under another name are the same data; one letter is not."""
    text = (place / "train.jsonl").read_text()
    (tmp_path / "moved.jsonl").write_text(text)
    (tmp_path / "other.jsonl").write_text(text.replace("A", "B", 1))
    error = refusal(capsys, place, stopped, *PLAIN, f"data.path={tmp_path / 'other.jsonl'}")
    assert "a run whose data had other contents than now" in error
    out = shutil.copytree(stopped, tmp_path / "out")
    moved = f"data.path={tmp_path / 'moved.jsonl'}"
    assert train_main(place, out, *PLAIN, "training.max_steps=5", moved) == 0
    assert f"changed: data.path: '{place / 'train.jsonl'}' → '{tmp_path / 'moved.jsonl'}'\n" in capsys.readouterr().out


def test_another_base_model(capsys: pytest.CaptureFixture[str], place: Path, stopped: Path, tmp_path: Path) -> None:
    other = write_place(tmp_path / "other", max_steps=1, seed=1)
    error = refusal(capsys, place, stopped, *PLAIN, f"model.name_or_path={other / 'model'}")
    assert "a run whose base model had other contents than now" in error


def test_never_resume(capsys: pytest.CaptureFixture[str], place: Path, stopped: Path, tmp_path: Path) -> None:
    error = refusal(capsys, place, stopped, *PLAIN, "training.resume=never")
    assert "a run that was stopped, with checkpoints, and training.resume=never" in error
    out = shutil.copytree(stopped, tmp_path / "out")
    drop = ["training.resume=never", "training.overwrite_output_dir=true", "training.max_steps=2"]
    assert train_main(place, out, *PLAIN, *drop) == 0
    assert [record["step"] for record in records(out) if "loss" in record] == [1, 2]
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-2"]
    assert (out / "metrics.before-1.jsonl").read_bytes() == (stopped / "metrics.jsonl").read_bytes()


def test_a_finished_run_has_nothing_left_to_do(capsys: pytest.CaptureFixture[str], place: Path, tmp_path: Path) -> None:
    assert train_main(place, tmp_path, *PLAIN, "training.max_steps=2") == 0
    error = refusal(capsys, place, tmp_path, *PLAIN, "training.max_steps=2")
    assert "a finished run" in error and "a larger training.max_steps or num_train_epochs continues this run" in error


# Two processes


def python(text: str, *arguments: str) -> subprocess.Popen[str]:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(
        [sys.executable, "-c", text, *arguments], env=environment(JAX_PLATFORMS="cpu"), text=True, **pipes
    )


HANGS = """
import sys, time
from qlora_jax.commands import train
from qlora_jax.training.trainer import Trainer

real = Trainer._begun

def begun(self, step):
    if step == 4:
        print("hanging", flush=True)
        time.sleep(600)
    return real(self, step)

Trainer._begun = begun
sys.exit(train.main(sys.argv[1:]))
"""


def test_the_lock_and_a_second_ctrl_c(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run that hangs in its fifth step: no other may use its folder; a second Ctrl-C ends it and its lock, and what it saved is there."""
    out = tmp_path / "out"
    settings = [*PLAIN, "training.compute_dtype=float32"]  # the other process has no GPU
    arguments = ["--config", str(place / "run.yaml"), f"training.output_dir={out}", *settings]
    with python(HANGS, *arguments) as process:
        try:
            assert any(line == "hanging\n" for line in process.stdout), process.stderr.read()
            while not (out / "checkpoints" / "step-3").exists():
                time.sleep(0.01)
            error = refusal(capsys, place, out, *settings)
            assert "another process is training there" in error
            process.send_signal(signal.SIGINT)
            assert process.stderr.readline() == "\n"
            assert "Ctrl-C: finishing this step and saving; once more leaves at once" in process.stderr.readline()
            process.send_signal(signal.SIGINT)
            assert process.wait(30) == -signal.SIGINT
        finally:
            process.kill()
    assert train_main(place, out, *settings, "training.max_steps=5") == 0
    assert "continuing after step 3" in capsys.readouterr().out


def test_a_folder_that_is_taken_away(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Moved, or removed and begun anew by another run, while a run is at work: it ends, and leaves what is there now alone."""
    out, moved = tmp_path / "out", tmp_path / "moved"
    with at_step(2, lambda: out.rename(moved)):
        assert train_main(place, out, *PLAIN) == EXIT_BAD_INPUT
    assert "its lock is gone: the folder was removed, moved or begun anew while this run" in capsys.readouterr().err
    assert not out.exists()
    short = [*PLAIN, "training.max_steps=2"]

    def begin_anew() -> None:
        shutil.rmtree(out)
        assert train_main(place, out, *short) == 0

    kept: dict[Path, bytes] = {}
    with at_step(2, lambda: (begin_anew(), kept.update(contents(out)))):
        assert train_main(place, out, *PLAIN) == EXIT_BAD_INPUT
    assert contents(out) == kept
    assert json.loads((out / "run.json").read_text())["state"] == "finished"


# What happened


def test_run_json(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_verysecret")
    killed(place, tmp_path, *PLAIN)
    failed = json.loads((tmp_path / "run.json").read_text())
    assert (failed["state"], len(failed["starts"])) == ("failed", 1)
    with monkeypatch.context() as newer:
        versions = output_dir.versions
        newer.setattr(output_dir, "versions", lambda: {**versions(), "jax": "99.0"})
        assert train_main(place, tmp_path, *PLAIN) == 0
    run = json.loads((tmp_path / "run.json").read_text())
    assert (run["state"], run["id"]) == ("finished", failed["id"])
    first, second = run["starts"]
    assert (first["after_step"], second["after_step"]) == (0, 6)
    assert first["versions"].keys() >= {"python", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy"}
    assert first["command"][:2] == ["train.py", "--config"] and f"training.output_dir={tmp_path}" in first["command"]
    assert first["device"]["kind"] == device_kind()
    assert first["config"]["memory"]["optimizer"] == "device"
    assert second["seconds"].keys() >= {
        "model",
        "data",
        "loading",
        "restoring",
        "first step",
        "steps",
        "saving",
        "export",
    }
    everything = "".join(path.read_text(errors="ignore") for path in tmp_path.rglob("*") if path.is_file())
    assert "verysecret" not in everything


def test_what_changes_the_last_bits_is_said(
    place: Path, stopped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whether layers are run again; the settings' line and the plan's."""
    out = shutil.copytree(stopped, tmp_path / "out")
    before = json.loads((out / "checkpoints" / "step-4" / "about.json").read_text())["work"]["keep"]
    other, kept = ("none", 2) if before == 0 else ("full", 0)
    assert train_main(place, out, *PLAIN, f"training.gradient_checkpointing={other}", "training.max_steps=5") == 0
    printed = capsys.readouterr().out
    assert re.search(rf"changed: training.gradient_checkpointing: '\w+' → '{other}', from here on\n", printed)
    assert f"changed: plan: keep: {before} → {kept}, so the last bits may differ\n" in printed


def test_the_log_tells_what_changed_and_how_long_it_took(
    place: Path, stopped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = shutil.copytree(stopped, tmp_path / "out")
    monkeypatch.setattr(output_dir, "versions", lambda: {"jax": "99.0"})
    assert (
        train_main(
            place, out, *PLAIN, "training.learning_rate=1e-3", "training.logging_steps=2", "training.max_steps=6"
        )
        == 0
    )
    printed = capsys.readouterr().out
    assert "changed: training.learning_rate: 0.01 → 0.001, from here on\n" in printed
    assert "changed: training.logging_steps: 1 → 2\n" in printed
    assert re.search(r"version of jax: [\d.]+ → 99.0, so the last bits may differ\n", printed)
    assert re.search(r"checkpoints: 2 kept, one being written, \d+\.\d MiB each +0\.00", printed)
    assert re.search(
        r"time: [\d.]+ s \(checking [\d.]+ s, model [\d.]+ s, .*first step [\d.]+ s, .*export [\d.]+ s\)\n", printed
    )
