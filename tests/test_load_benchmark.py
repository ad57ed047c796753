"""benchmarks.load counts what it moves, and reads and loads all of a folder."""

from pathlib import Path

import numpy as np
import pytest

from benchmarks import load, synthetic
from convert import ahead
from convert.folder import ModelFolder
from convert.load import read_config, total_bytes
from qlora_jax.config import QuantizationSettings
from tests import tiny


@pytest.fixture
def model(tmp_path: Path) -> Path:
    settings = {**synthetic.hf_config("7b", 3), **tiny.hf_config(tie_word_embeddings=False)}
    synthetic.write(tmp_path / "model", settings)
    return tmp_path / "model"


def test_reading_and_filling(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "CHUNK", 2**12)
    files = b"".join(path.read_bytes() for path in sorted(model.glob("*.safetensors")))
    assert load.folder_bytes(model) == len(files)
    places: dict[int, np.ndarray] = {}

    def place(index: int, size: int) -> np.ndarray:
        return places.setdefault(index, np.empty(size, np.uint8))

    assert load.fill(load.chunks(model), 2, place) == len(files)
    assert b"".join(places[index].tobytes() for index in range(len(places))) == files
    (row,) = load.read(model, 2).values()
    assert row["seconds"] >= 0 and row["moved_gb"] == round(len(files) / 1e9, 2)


def test_loading(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "num_threads", ahead.num_threads)  # what the benchmark changes is put back
    moved: list[int] = []
    monkeypatch.setattr(load, "timed", lambda work: moved.append(work()) or {})
    assert load.load(model, 2).keys() == {"", ", again"}
    expected = total_bytes(read_config(ModelFolder(model)), QuantizationSettings(), "host")
    assert moved == [expected, expected]


def test_forgetting_loses_nothing(model: Path) -> None:
    before = {path: path.read_bytes() for path in model.iterdir()}
    load.forget(model)
    assert before == {path: path.read_bytes() for path in model.iterdir()}
