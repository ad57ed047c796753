"""A run quantizes a model once: the next one reads what the first one kept, if it is sound and of the same model and settings."""

import errno
import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import yaml

import train
from convert import cache as cache_module
from convert.adapters.adapter import WEIGHTS_FILE
from convert.cache import cached_folder, entry_of, is_kept, main
from convert.files.folder import ModelFolder
from convert.quantize import quantize
from qlora_jax.base.console import make_console
from qlora_jax.base.errors import EXIT_BAD_INPUT, InputError
from qlora_jax.config import QuantizationSettings
from tests.helpers import tiny

NF4 = QuantizationSettings()


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model to write to, and an empty cache."""
    monkeypatch.setenv("QLORA_JAX_CACHE", str(tmp_path / "cache"))
    tiny.write_model(tmp_path / "model", shards=3, tie_word_embeddings=False)
    return tmp_path


def cached(place: Path, quantization: QuantizationSettings = NF4) -> ModelFolder:
    return cached_folder(ModelFolder(place / "model"), str(place / "model"), quantization, make_console())


def never(*args: Any) -> None:
    raise AssertionError("quantized again")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_once(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    source = ModelFolder(place / "model"), str(place / "model"), NF4
    assert not is_kept(*source)
    first = cached(place)
    assert is_kept(*source) and is_kept(first, str(first.path), NF4)
    assert not is_kept(*source[:2], QuantizationSettings(double_quant=False))
    assert first.path.parent == place / "cache" / "quantized"
    assert first.path.name.startswith("model-")
    said = f"nf4, double quantization: quantized once, kept in {first.path} (0.00 GiB, 0.00 with all others; see python -m convert.cache)"
    assert capsys.readouterr().out == f"{said}\n"
    quantize(ModelFolder(place / "model"), place / "by-hand", NF4)
    assert contents(first.path) == contents(place / "by-hand")
    monkeypatch.setattr(cache_module, "quantize", never)
    assert cached(place).path == first.path
    assert capsys.readouterr().out == f"nf4, double quantization: quantized by an earlier run, {first.path}\n"


def test_another_model_or_kind_is_another_entry(place: Path) -> None:
    first = cached(place)
    assert cached(place, QuantizationSettings(double_quant=False)).path != first.path
    os.utime(place / "model" / "model-00002-of-00003.safetensors", ns=(1, 1))
    assert cached(place).path != first.path
    assert len(list((place / "cache" / "quantized").iterdir())) == 3


def test_what_is_in_4_bits_is_not_kept_again(place: Path) -> None:
    quantize(ModelFolder(place / "model"), place / "4bit", NF4)
    folder = ModelFolder(place / "4bit")
    assert cached_folder(folder, "4bit", NF4, make_console()) is folder
    assert not (place / "cache").exists()


def truncated(entry: Path) -> None:
    path = entry / "model-00002-of-00003.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def another_models(entry: Path) -> None:
    other = tiny.write_model(entry.with_name("other"), tie_word_embeddings=False, num_hidden_layers=1)
    shutil.rmtree(entry)
    quantize(ModelFolder(other), entry, NF4)
    shutil.rmtree(other)


def a_file(entry: Path) -> None:
    shutil.rmtree(entry)
    entry.write_text("what is this?")


def gone(name: str) -> Callable[[Path], None]:
    return lambda entry: (entry / name).unlink()


@pytest.mark.parametrize(
    "damage",
    [truncated, another_models, a_file, gone("config.json"), gone("model-00001-of-00003.safetensors")],
)
def test_a_damaged_entry_is_made_again(
    place: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[Path], None]
) -> None:
    entry = cached(place).path
    whole = contents(entry)
    damage(entry)
    capsys.readouterr()
    assert contents(cached(place).path) == whole
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 2 and f"{entry}: damaged, made again" in printed[0]


def test_a_half_written_entry_is_completed(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quantize(ModelFolder(place / "model"), place / "whole", NF4)
    entry = entry_of(ModelFolder(place / "model"), str(place / "model"), NF4)
    seen = []

    def stop(*args: Any) -> None:
        if len(seen) == 10:
            raise KeyboardInterrupt
        seen.append(args)

    with pytest.raises(KeyboardInterrupt):
        quantize(ModelFolder(place / "model"), entry, NF4, stop)
    assert not entry.exists()
    assert contents(cached(place).path) == contents(place / "whole")


@pytest.mark.parametrize("where", ["before", "midway", "no folder"])
def test_no_room_for_a_cache(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], where: str
) -> None:
    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if where == "before":
        monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10})())
    elif where == "midway":
        monkeypatch.setattr(os, "fsync", full)
    else:
        (place / "cache").write_text("a file")
    assert cached(place).path == place / "model"
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 1 and printed[0].startswith("quantizing in memory, for this run only: ")


def test_a_run_with_it_is_the_run_without(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.write_chats(place / "train.jsonl", 8)
    settings = {
        "model": {"name_or_path": str(place / "model")},
        "lora": {"r": 4, "target_modules": ["q_proj"]},
        "data": {"path": str(place / "train.jsonl"), "max_seq_length": 64},
        "training": {"output_dir": str(place / "out"), "max_steps": 2, "per_device_train_batch_size": 2},
    }
    (place / "run.yaml").write_text(yaml.safe_dump(settings))
    adapters = []
    for number in range(3):  # without, first and second with
        with monkeypatch.context() as patch:
            if number == 0:
                patch.setattr(train, "cached_folder", lambda folder, *args, **options: folder)
            if number == 2:
                patch.setattr(cache_module, "quantize", never)
            out = place / str(number)
            assert train.main(["--config", str(place / "run.yaml"), f"training.output_dir={out}"]) == 0
        adapters.append((out / "adapter" / WEIGHTS_FILE).read_bytes())
    assert adapters[0] == adapters[1] == adapters[2]


def test_a_weight_that_is_not_finite_is_not_kept(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:

    path = place / "model" / "model-00001-of-00003.safetensors"
    tensors = safetensors.numpy.load_file(path)
    next(iter(tensors.values())).flat[0] = ml_dtypes.bfloat16(np.nan)
    safetensors.numpy.save_file(tensors, path, {"format": "pt"})
    with pytest.raises(InputError, match="NaN"):
        cached(place)
    assert list((place / "cache" / "quantized").iterdir()) == []


# The command


def test_what_is_kept_is_listed_and_removed(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([]) == 0
    assert capsys.readouterr().out.split() == ["0.00", "GiB", "in", "all,", "in", str(place / "cache" / "quantized")]
    first, second = cached(place).path, cached(place, QuantizationSettings(double_quant=False)).path
    half = first.with_name(".other-0123.partial")
    half.mkdir()
    with (half / "shard").open("wb") as file:
        file.truncate(3 * 2**29)
    capsys.readouterr()
    assert main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[3] for line in lines[:-1]] == sorted([first.name, second.name, half.name])
    assert lines[0].split()[:2] == lines[-1].split()[:2] == ["1.50", "GiB"] and "unfinished" in lines[0]
    assert main(["--remove", first.name, "nothing"]) == EXIT_BAD_INPUT
    assert "nothing: not there" in capsys.readouterr().err
    with (half / "lock").open("wb") as lock:
        fcntl.flock(lock.fileno(), fcntl.LOCK_EX)
        assert main(["--all"]) == EXIT_BAD_INPUT
        assert f"{half.name}: being written by another process" in capsys.readouterr().err
    assert sorted(first.parent.iterdir()) == sorted([first, second, half]), "nothing was removed"
    assert main(["--remove", first.name]) == 0
    assert sorted(first.parent.iterdir()) == sorted([second, half])
    assert main(["--all"]) == 0
    assert "2 removed, 1.50 GiB" in capsys.readouterr().out
    assert list(first.parent.iterdir()) == []
