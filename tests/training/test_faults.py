"""Steps that are not finite change nothing, and are explained; losses that stand out are noted."""

import json
import math
import statistics
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.base.errors import EXIT_BAD_INPUT
from qlora_jax.config import LoraSettings, QuantizationSettings
from qlora_jax.data import IGNORED_LABEL, Batch, Batches
from qlora_jax.engine.engine import Engine, Weights
from qlora_jax.runtime.placement import one_device
from qlora_jax.training.nonfinite import Fault, find_fault
from qlora_jax.training.progress import SPIKE_HISTORY, Progress, is_spike
from qlora_jax.training.trainer import MAX_SKIPPED
from tests.helpers.runs import adapter_bytes, outcome, records, train_main, write_place

PLAIN = ["training.optim=adamw", "lora.target_modules=[down_proj]", "training.max_steps=6"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_place(tmp_path_factory.mktemp("place"), max_steps=6)


def poisoned(monkeypatch: pytest.MonkeyPatch, *steps: int) -> None:
    """The rows of these steps (from 1) come with a token beyond all numbers: their losses are NaN."""
    real = Engine.start

    def start(self: Engine, weights: Weights, batch: Batch, key: jax.Array) -> Any:
        if not getattr(batch, "poisoned", False):
            return real(self, weights, batch, key)
        with jax.transfer_guard("allow"):
            embedding = jax.tree.map(lambda x: x.at[256].set(jnp.nan), weights.embedding)  # in every row
        return real(self, Weights(embedding, weights.layers, weights.head), batch, key)

    batch = Batches.batch

    def marked(self: Batches, step: int) -> Batch:
        made = batch(self, step)
        object.__setattr__(made, "poisoned", step + 1 in steps)
        return made

    monkeypatch.setattr(Engine, "start", start)
    monkeypatch.setattr(Batches, "batch", marked)


# In a run


def test_stopped_before_the_update(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What was good is saved; the same command goes on before the step, and, when it is finite now, to the same end."""
    assert train_main(place, tmp_path / "good", *PLAIN) == 0
    capsys.readouterr()
    with monkeypatch.context() as patch:
        poisoned(patch, 4)
        assert train_main(place, tmp_path / "out", *PLAIN) == EXIT_BAD_INPUT
    error = capsys.readouterr().err
    assert error.startswith(
        "error: training step 4\n  found:    loss nan, gradient norm nan, first in the embedding; rows "
    )
    assert error.count("train.jsonl:") == 8
    assert "the same command goes on before this step, and without it with training.on_nonfinite=skip" in error
    assert [record["step"] for record in records(tmp_path / "out")] == [1, 2, 3]
    assert (tmp_path / "out" / "checkpoints" / "step-3").is_dir()
    assert train_main(place, tmp_path / "out", *PLAIN) == 0
    assert adapter_bytes(tmp_path / "out") == adapter_bytes(tmp_path / "good")


def test_skipped(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As if the step had not been: adapters and moments are those of a run that makes the other five."""
    skip = ["training.on_nonfinite=skip", "training.logging_steps=2"]
    with monkeypatch.context() as patch:
        poisoned(patch, 2)
        assert train_main(place, tmp_path / "out", *PLAIN, *skip) == 0
    printed = capsys.readouterr().out
    line = next(line for line in printed.splitlines() if line.startswith("step 2: step skipped"))
    assert line.startswith("step 2: step skipped: loss nan, gradient norm nan, first in the embedding; rows ")
    assert line.count("train.jsonl:") == 8, "each row once"
    found = records(tmp_path / "out")
    assert [record["event"] for record in found if "event" in record] == ["step skipped"]
    assert [record["step"] for record in found if "loss" in record] == [2, 4, 6]
    assert all(math.isfinite(record["loss"]) for record in found if "loss" in record)

    batch = Batches.batch
    monkeypatch.setattr(Batches, "batch", lambda self, step: batch(self, [0, 2, 3, 4, 5][step]))
    with pytest.raises(IndexError):  # at its sixth step
        train_main(place, tmp_path / "five", *PLAIN, "training.save_steps=5")
    assert outcome(tmp_path / "out")["arrays"] == outcome(tmp_path / "five")["arrays"]


def test_all_of_a_logged_window_skipped(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    poisoned(monkeypatch, 2)
    assert train_main(place, tmp_path, *PLAIN, "training.on_nonfinite=skip") == 0
    record = next(r for r in records(tmp_path) if r["step"] == 2 and "loss" in r)
    assert (record["loss"], record["grad_norm"]) == (None, None)
    assert (tmp_path / "loss.png").stat().st_size > 10_000


def test_skipping_ends(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    poisoned(monkeypatch, *range(3, 100))
    more = ["training.on_nonfinite=skip", "training.max_steps=40"]
    assert train_main(place, tmp_path, *PLAIN, *more) == EXIT_BAD_INPUT
    error = capsys.readouterr().err
    assert error.startswith(f"error: training step {3 + MAX_SKIPPED}\n")
    assert f"after {MAX_SKIPPED} steps in a row that were skipped" in error


def test_a_spike_is_noted(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = Engine.go_on

    def go_on(self: Engine, *arguments: Any) -> Any:
        _, grads = real(self, *arguments)
        count.append(1)
        return one_device().put(np.float32(9 if len(count) == 21 else 2 + len(count) % 3 / 10), "device"), grads

    count: list[int] = []
    monkeypatch.setattr(Engine, "go_on", go_on)
    assert train_main(place, tmp_path, *PLAIN, "training.max_steps=24") == 0
    events = [record for record in records(tmp_path) if "event" in record]
    assert [(e["step"], e["event"], e["event_loss"]) for e in events] == [(21, "loss spike", 9.0)]
    assert len(events[0]["rows"]) == 8 and "train.jsonl:" in events[0]["rows"][0]
    assert f"step 21: loss spike: loss 9.0; rows {events[0]['rows'][0]}," in capsys.readouterr().out


# Where it began


@pytest.fixture(scope="module")
def parts(tiny_folder: Path) -> tuple[Engine, Weights, Any, Batch]:
    from convert.files.folder import ModelFolder
    from convert.load import load_weights, read_config

    folder = ModelFolder(tiny_folder)
    config, lora = read_config(folder), LoraSettings(r=2, lora_dropout=0.0, target_modules=("q_proj", "down_proj"))
    engine = Engine(config, lora, QuantizationSettings(), compute_dtype=jnp.float32)
    weights = load_weights(folder, config, QuantizationSettings(), "device")
    ids = np.arange(2 * 2 * 32, dtype=np.int32).reshape(2, 2, 32) % 100
    labels = np.where(ids % 3 == 0, IGNORED_LABEL, ids)
    return engine, weights, engine.init_adapters(0), Batch(ids, labels, 80, 128)


ROWS = [["f:1", "f:2"], ["f:3", "f:4"]]


def fault(parts: Any, weights: Weights | None = None, adapters: Any = None, batch: Batch | None = None) -> Fault:
    engine, own, fresh, usual = parts
    return find_fault(
        engine,
        weights or own,
        adapters or fresh,
        batch or usual,
        one_device().put(jax.random.key(0), "device"),
        rows=ROWS,
    )


def test_the_row_of_an_embedding(parts: Any) -> None:
    _, weights, _, batch = parts
    embedding = jax.tree.map(lambda x: x.at[200].set(jnp.inf), weights.embedding)
    ids = batch.input_ids.copy()
    ids[1, 0, 3] = 200
    odd = Batch(ids, batch.labels, batch.num_tokens, batch.num_input_tokens)
    found = fault(parts, Weights(embedding, weights.layers, weights.head), batch=odd)
    assert found == Fault("the embedding", ("f:3",))
    assert str(found) == "first in the embedding; rows f:3"


@pytest.mark.parametrize("layer", [0, 1])
def test_the_layer_of_an_adapter(parts: Any, layer: int) -> None:
    """B·A overflows in that layer, for all rows."""
    adapters = jax.tree.map(lambda x: x, parts[2])
    adapters[layer] = jax.tree.map(
        lambda x: one_device().put(np.full(x.shape, 1e30, np.float32), "device"), adapters[layer]
    )
    found = fault(parts, adapters=adapters)
    assert found == Fault(f"layer {layer}", ("f:1", "f:2", "f:3", "f:4"))


def test_the_head(parts: Any) -> None:
    _, weights, _, _ = parts
    head = jax.tree.map(lambda x: x * np.float32("nan").astype(x.dtype), weights.head)
    found = fault(parts, Weights(weights.embedding, weights.layers, head))
    assert found.place == "the head and the loss"


def test_the_layer_of_a_gradient(parts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The backward walk comes to layer 1 first; here only layer 0 goes wrong."""
    from qlora_jax.engine.layer_program import LayerProgram

    real, calls = LayerProgram.backward, []

    def backward(*args: Any, **more: Any) -> Any:
        calls.append(1)
        grads, dh, token = real(*args, **more)
        return (grads, dh.at[0].set(jnp.nan), token) if len(calls) == 4 else (grads, dh, token)

    monkeypatch.setattr(LayerProgram, "backward", backward)
    assert fault(parts) == Fault("the gradient of layer 0", ("f:3",))


def test_nothing_when_it_is_made_again(parts: Any) -> None:
    assert "nowhere when the step is made again" in fault(parts).place


def test_many_rows_are_not_all_shown() -> None:
    assert str(Fault("x", tuple("abcdefghij"))) == "first in x; rows a, b, c, d, e, f, g, h and 2 more"


# The small values


def test_progress_survives_json() -> None:
    progress = Progress()
    for number in range(5):
        progress.add(1 / (number + 3), 0.1 + number, 7)
    progress.skip(7)
    progress.evaluation(1 / 7, 0.0)
    assert Progress.from_json(json.loads(json.dumps(progress.to_json()))) == progress
    assert (progress.step, progress.window_steps, progress.window_tokens, progress.skipped) == (6, 6, 42, 1)


def test_what_is_a_spike() -> None:
    rng = np.random.default_rng(0)
    losses = (2 + 0.1 * rng.standard_normal(SPIKE_HISTORY)).tolist()
    deviation = statistics.median(abs(loss - statistics.median(losses)) for loss in losses)
    assert is_spike(statistics.median(losses) + 10.1 * deviation, losses)
    assert not is_spike(statistics.median(losses) + 9.9 * deviation, losses)
    assert not is_spike(0.0, losses), "a loss that falls is none"
    assert not is_spike(99.0, losses[:15]), "too few to compare with"
    assert not is_spike(2.05, [2.0] * 20) and is_spike(2.2, [2.0] * 20)
    normal = (2 + 0.1 * rng.standard_normal(20_000)).tolist()
    assert not any(is_spike(normal[i], normal[i - 64 : i]) for i in range(64, len(normal)))
