"""Metrics in TensorBoard and Weights & Biases: every number, at its step, also of a run that was continued."""

import importlib.util
import re
import sys
import time
import types
from pathlib import Path
from typing import Any

import pytest

from qlora_jax.base.errors import EXIT_BAD_INPUT
from qlora_jax.config import load_config
from qlora_jax.training import metrics, trackers
from tests.helpers.runs import records, train_main, write_place
from tests.training.test_resume import killed

PLAIN = ["training.optim=adamw", "lora.target_modules=[down_proj]", "training.save_steps=3", "training.max_steps=6"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_place(tmp_path_factory.mktemp("place"), max_steps=6)


def scalars(folder: Path) -> dict[tuple[str, int], float]:
    """As TensorBoard shows them: of files in the order of their names, a later one's start purges the steps from there on."""
    event_file_loader = pytest.importorskip("tensorboardX.proto.event_pb2")
    found: dict[tuple[str, int], float] = {}
    for path in sorted(folder.glob("events*")):
        data, at = path.read_bytes(), 0
        while at < len(data):  # TFRecord: length, its checksum, the event, its checksum
            length = int.from_bytes(data[at : at + 8], "little")
            event = event_file_loader.Event.FromString(data[at + 12 : at + 12 + length])
            at += 16 + length
            if event.session_log.status == event.session_log.START:
                found = {key: value for key, value in found.items() if key[1] < event.step}
            for value in event.summary.value:
                found[value.tag, event.step] = value.simple_value
    return found


def expected(out: Path) -> dict[tuple[str, int], float]:
    logged = records(out)
    return {
        (name, record["step"]): value
        for record in logged
        for name, value in record.items()
        if name != "step" and isinstance(value, int | float)
    }


def test_two_starts_in_one_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboardX")
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now)
    for start, steps in ((0, (1, 2, 3, 4, 5)), (3, (4, 5, 6))):
        tracker = trackers.TensorBoard(tmp_path, start)
        for step in steps:
            tracker.write({"step": step, "loss": float(start)})
        tracker.close()
    assert scalars(tmp_path) == {("loss", step): 0.0 if step <= 3 else 3.0 for step in range(1, 7)}


def test_tensorboard(place: Path, tmp_path: Path) -> None:
    """Stopped after step 5 and continued from step 3: each step is there once."""
    pytest.importorskip("tensorboardX")
    more = [*PLAIN, "training.report_to=tensorboard", "training.eval_steps=2", f"data.eval_path={place / 'eval.jsonl'}"]
    killed(place, tmp_path, *more, step=5)
    assert ("loss", 5) in scalars(tmp_path / "tensorboard")
    assert train_main(place, tmp_path, *more) == 0
    found, wanted = scalars(tmp_path / "tensorboard"), expected(tmp_path)
    assert found.keys() == wanted.keys()
    assert {name for name, _ in found} >= {
        "loss",
        "eval_loss",
        "eval_perplexity",
        "learning_rate",
        "grad_norm",
        "tokens_per_s",
    }
    assert [found[key] for key in wanted] == pytest.approx(list(wanted.values()), rel=1e-6)  # float32 there


class Wandb(types.ModuleType):
    """What we use of wandb, and what it was told."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.__spec__ = importlib.util.spec_from_loader("wandb", None)
        self.begun: list[dict[str, Any]] = []
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.finished = 0

    def init(self, **arguments: Any) -> Any:
        self.begun.append(arguments)

        def log(values: dict[str, float], step: int) -> None:
            self.logged.append((step, values))

        def finish() -> None:
            self.finished += 1

        return types.SimpleNamespace(log=log, finish=finish)


def test_weights_and_biases(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The continued run is the same run to W&B."""
    wandb = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    more = [*PLAIN, "training.report_to=[wandb]"]
    killed(place, tmp_path / "mine", *more, step=5)
    assert train_main(place, tmp_path / "mine", *more, "training.run_name=again") == 0
    first, second = wandb.begun
    assert (first["name"], second["name"]) == ("mine", "again")
    assert first["id"] == second["id"] and re.fullmatch(r"[0-9a-f]{8}", first["id"])
    assert first["resume"] == second["resume"] == "allow"
    assert first["dir"] == str(tmp_path / "mine")
    assert first["config"]["training"]["max_steps"] == 6
    assert wandb.finished == 2
    assert [step for step, _ in wandb.logged] == [1, 2, 3, 4, 5, 4, 5, 6]
    wanted = expected(tmp_path / "mine")
    assert {(name, step): value for step, values in wandb.logged[5:] for name, value in values.items()} == {
        key: value for key, value in wanted.items() if key[1] > 3
    }


def test_weights_and_biases_without_an_account(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wandb = Wandb()
    wandb.Error = type("Error", (Exception,), {})

    def init(**arguments: Any) -> Any:
        raise wandb.Error("No API key configured.")

    wandb.init = init
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    assert train_main(place, tmp_path / "out", *PLAIN, "training.report_to=[wandb]") == EXIT_BAD_INPUT
    error = capsys.readouterr().err
    assert "training.report_to\n  found:    wandb does not start: No API key configured.\n" in error
    assert "WANDB_MODE=offline" in error


def test_what_is_not_installed(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("tensorboard", "wandb"):
        monkeypatch.setitem(trackers.PACKAGES, name, f"no_{name}")
    out = tmp_path / "out"
    assert train_main(place, out, "training.report_to=[tensorboard,wandb]") == EXIT_BAD_INPUT
    error = capsys.readouterr().err
    assert "training.report_to\n  found:    tensorboard and wandb, and no package no_tensorboard or no_wandb\n" in error
    assert "pip install no_tensorboard no_wandb, or leave them out" in error
    assert not out.exists()


@pytest.mark.parametrize(("given", "found"), [("none", ()), ("wandb", ("wandb",)), ("[tensorboard]", ("tensorboard",))])
def test_report_to(place: Path, given: str, found: tuple[str, ...]) -> None:
    assert load_config(place / "run.yaml", [f"training.report_to={given}"]).training.report_to == found


def test_metrics_of_a_continued_run(tmp_path: Path) -> None:
    """What was logged after the checkpoint is dropped, a torn line too."""
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2}\n{"st')
    log = metrics.MetricsLog(path, b'{"step": 1}\n')
    log.write({"step": 2, "loss": 0.5})
    assert path.read_bytes() == b'{"step": 1}\n{"step": 2, "loss": 0.5}\n'
    assert [record["step"] for record in log.records()] == [1, 2]
    with pytest.raises(ValueError, match="not JSON compliant"):
        log.write({"step": 3, "loss": float("nan")})
    log.close()
