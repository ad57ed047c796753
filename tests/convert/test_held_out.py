"""The held-out loss of a folder as it is, layer by layer, is transformers'."""

import dataclasses
import io
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from convert.files.folder import ModelFolder
from convert.jobs import held_out
from convert.jobs.held_out import held_out_loss, show_held_out_loss
from convert.load import load_weights, read_config
from qlora_jax.config import QuantizationSettings
from qlora_jax.data import Batch
from qlora_jax.engine.engine import Engine
from tests.helpers import tiny

ROWS, LENGTH = 4, 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_model(tmp_path_factory.mktemp("model") / "model", shards=2, num_hidden_layers=3)


def make_batches(number: int) -> list[Batch]:
    """Rows of which the last ones are shorter, and some tokens are not learned."""
    rng, batches = np.random.default_rng(0), []
    for _ in range(number):
        ids = rng.integers(0, 256, (1, ROWS, LENGTH)).astype(np.int32)
        labels = np.where(rng.random(ids.shape) < 0.7, ids, -100).astype(np.int32)
        labels[:, -1, LENGTH // 2 :] = -100
        batches.append(Batch(ids, labels, int((labels[..., 1:] != -100).sum()), ids.size))
    return batches


@pytest.mark.parametrize("hidden_bytes", [2**29, 1], ids=["one pass", "a pass a batch"])
def test_transformers_loss(folder: Path, monkeypatch: pytest.MonkeyPatch, hidden_bytes: int) -> None:
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(held_out, "HIDDEN_BYTES", hidden_bytes)
    batches, advanced = make_batches(3), []
    model, total, count = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), 0.0, 0
    for batch in batches:
        with torch.no_grad():
            logits = model(torch.from_numpy(batch.input_ids[0].astype(np.int64))).logits[:, :-1].reshape(-1, 264)
        labels = torch.from_numpy(batch.labels[0, :, 1:].astype(np.int64)).reshape(-1)
        total += float(torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum"))
        count += batch.num_tokens
    found = held_out_loss(ModelFolder(folder), batches, "float32", lambda: advanced.append(1))
    assert found == pytest.approx(total / count, rel=1e-5)
    assert len(advanced) == (3 if hidden_bytes > 1 else 9)


def test_what_does_not_fit_is_left_out_with_a_word(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(held_out.machine, "available_host_bytes", lambda: 2**20)
    console = Console(file=io.StringIO(), width=200)
    assert show_held_out_loss(folder, make_batches(1), "float32", console) is None
    assert "held-out loss of the merged model: left out" in console.file.getvalue()
    assert "1,048,576 bytes" in console.file.getvalue()


def test_packed_rows_are_what_the_engine_says(folder: Path) -> None:
    """Two rows a line, which do not see each other; by the walk that trains."""
    opened = ModelFolder(folder)
    config = read_config(opened)
    half = np.arange(LENGTH) % (LENGTH // 2)
    positions = np.broadcast_to(half.astype(np.int32), (1, ROWS, LENGTH))
    segments = np.broadcast_to((np.arange(LENGTH) >= LENGTH // 2).astype(np.int32), (1, ROWS, LENGTH))
    batches = [dataclasses.replace(batch, positions=positions, segment_ids=segments) for batch in make_batches(2)]
    engine = Engine(config, None, QuantizationSettings(), compute_dtype="float32")
    weights, nothing = load_weights(opened, config, None, "device"), [{} for _ in range(config.num_hidden_layers)]
    packed = held_out_loss(opened, batches, "float32")
    assert packed == pytest.approx(engine.loss(weights, nothing, batches), rel=1e-6)
    assert packed != pytest.approx(held_out_loss(opened, make_batches(2), "float32"), rel=1e-4)
