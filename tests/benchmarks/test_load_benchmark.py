"""benchmarks.load counts what it moves, and reads and loads all of a folder."""

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks import load, synthetic
from convert.files import ahead
from convert.files.folder import ModelFolder
from convert.load import read_config, total_bytes
from qlora_jax.config import QuantizationSettings
from qlora_jax.runtime import pinned
from tests.helpers import tiny


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
    found = load.load(model, 2)
    assert found.keys() == {"", ", to the device"} and found[", to the device"] == {}
    row = found[""]
    assert row.keys() == {"cpu_seconds", "thread_seconds", "registered_gb"} and row["registered_gb"] == 0
    assert row["thread_seconds"].keys() == load.STAGES.keys()
    config = read_config(ModelFolder(model))
    whole, none = (total_bytes(config, QuantizationSettings(), where) for where in ("host", "disk"))
    assert moved == [whole, whole - none]


def test_what_goes_into_registered_memory_is_counted(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "num_threads", ahead.num_threads)
    driver = SimpleNamespace(dma_map=lambda address, size: None, dma_unmap=lambda address: None)
    monkeypatch.setattr(pinned, "client", lambda: driver)
    monkeypatch.setattr(pinned, "registered_bytes", lambda: sum(pinned._ours.values()) * 10**6)
    whole, none = (total_bytes(read_config(ModelFolder(model)), QuantizationSettings(), w) for w in ("host", "disk"))
    assert load.load(model, 2)[""]["registered_gb"] >= (whole - none) / 1e3


def test_the_seconds_of_all_threads_are_added(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of those meanwhile, of calls that end in an error too; afterwards everything is as it was."""
    owner = SimpleNamespace(work=lambda seconds: time.sleep(seconds) or 1 / seconds)
    real = owner.work
    monkeypatch.setattr(load, "STAGES", {"working": [(owner, "work")], "nothing": []})
    with load.watched() as seconds, ThreadPoolExecutor(4) as pool:
        assert list(pool.map(owner.work, [0.05] * 8)) == [20.0] * 8
        with pytest.raises(ZeroDivisionError):
            owner.work(0)
    assert 0.4 <= seconds["working"] < 4 and seconds["nothing"] == 0
    assert owner.work is real


def test_shares() -> None:
    """Of the slower of two, and for the cold load of the disk's own rate too."""
    rates = {"read, cold": 2.0, "read, warm": 10.0, "memory copy": 8.0, "load, cold": 1.5, "load, warm": 6.0}
    rows = [{"name": name, "threads": 8, "gb_per_s": rate} for name, rate in rates.items()]
    load.add_shares(rows)
    assert [row["of_read_or_copy"] for row in rows] == [0.25, 1.25, 1.0, 0.19, 0.75]
    assert [row.get("of_cold_read") for row in rows] == [None, None, None, 0.75, None]


def test_forgetting_loses_nothing(model: Path) -> None:
    before = {path: path.read_bytes() for path in model.iterdir()}
    load.forget(model)
    assert before == {path: path.read_bytes() for path in model.iterdir()}
