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
from hypothesis import given, settings
from hypothesis import strategies as st

from convert import cache as cache_module
from convert.adapters.adapter import WEIGHTS_FILE
from convert.cache import cached_folder, entry_of, is_kept, main
from convert.files.folder import ModelFolder, aligned
from convert.files.shards import TensorSpec, write_pieces
from convert.files.verified import DamagedError, VerifiedFolder, summing, write_record
from convert.load import load_weights, read_config
from convert.quantize import quantize
from qlora_jax.base.checksum import BLOCK_BYTES, READ_BYTES, checksum, file_checksum
from qlora_jax.base.console import make_console
from qlora_jax.base.errors import EXIT_BAD_INPUT, InputError
from qlora_jax.commands import execute, train
from qlora_jax.config import QuantizationSettings
from tests.helpers import tiny
from tests.helpers.tiny import NAMES

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
                patch.setattr(execute, "cached_folder", lambda folder, *args, **options: folder)
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


# Bytes that changed


def run_config(place: Path) -> Path:
    tiny.write_chats(place / "train.jsonl", 8)
    settings = {
        "model": {"name_or_path": str(place / "model")},
        "lora": {"r": 4, "target_modules": ["q_proj"]},
        "data": {"path": str(place / "train.jsonl"), "max_seq_length": 64},
        "training": {"max_steps": 1, "per_device_train_batch_size": 2},
    }
    (place / "run.yaml").write_text(yaml.safe_dump(settings))
    return place / "run.yaml"


def flipped(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 0x10
    path.write_bytes(data)


@pytest.mark.parametrize("where", ["codes", "scales", "norm", "embedding", "another model's", "another dtype"])
def test_bytes_that_changed_are_noticed_while_they_are_read(place: Path, where: str) -> None:
    """A test that must fail without checksums: the entry is otherwise what the model calls for."""
    found = cached(place)
    whole = contents(found.path)
    linear, other = NAMES.linear(1, "up_proj"), NAMES.norm(0, "input_layernorm")
    name = {"scales": f"{linear}.absmax", "norm": other, "embedding": NAMES.embedding}.get(where, linear)
    shard = next(path for path in found.path.glob("*.safetensors") if name in safetensors.numpy.load_file(path))
    if where == "another model's":  # of the same shape, copied in place
        tiny.write_model(place / "other", shards=3, tie_word_embeddings=False, seed=5)
        quantize(ModelFolder(place / "other"), place / "other-4bit", NF4)
        for path in (place / "other-4bit").iterdir():
            shutil.copyfile(path, found.path / path.name)
    elif where == "another dtype":
        text = shard.read_bytes().replace(b'"BF16"', b'"F16" ', 1)
        shard.write_bytes(text)
    else:
        tensors = safetensors.numpy.load_file(shard)
        data = shard.read_bytes()
        flipped(shard, data.index(tensors[name].tobytes()) + tensors[name].nbytes // 2)
    config = read_config(ModelFolder(place / "model"))
    assert contents(found.path) != whole
    if not where.startswith("another"):  # these are noticed when it is opened
        with pytest.raises(DamagedError):
            load_weights(cached(place), config, NF4, "host")
    load_weights(cached(place), config, NF4, "host")
    assert contents(found.path) == whole


@pytest.mark.parametrize("base_weights", ["device", "disk"])
def test_a_run_makes_a_damaged_entry_anew_and_says_so(
    place: Path, capsys: pytest.CaptureFixture[str], base_weights: str
) -> None:
    """With layers on disk they are read when they are needed: then the run stops, and the next one makes it anew."""
    run, adapters = run_config(place), []
    arguments = ["--config", str(run), f"memory.base_weights={base_weights}"]
    for number in range(2):
        entry = entry_of(ModelFolder(place / "model"), str(place / "model"), NF4)
        if number:
            for path in sorted(entry.glob("*.safetensors")):
                flipped(path, path.stat().st_size - 1500)
            capsys.readouterr()
        status = train.main([*arguments, f"training.output_dir={place / str(number)}"])
        if base_weights == "disk" and number:
            assert status == EXIT_BAD_INPUT and "than were written there" in capsys.readouterr().err
            status = train.main([*arguments, f"training.output_dir={place / str(number)}"])
        assert status == 0
        adapters.append((place / str(number) / "adapter" / WEIGHTS_FILE).read_bytes())
    assert adapters[0] == adapters[1]
    said = " ".join(capsys.readouterr().out.split())
    assert f"{entry}: damaged, made again (" in said and "quantized once, kept in" in said


@pytest.mark.parametrize(
    "record", [b"", b"{}", b'{"job": 1, "tensors": []}', b'{"job": {}, "tensors": {"a": 1}}', None]
)
def test_an_entry_without_a_record_is_made_again(
    place: Path, capsys: pytest.CaptureFixture[str], record: bytes | None
) -> None:
    entry = cached(place).path
    path = place / "cache" / "checksums" / f"{entry.name}.json"
    assert path.is_file()
    path.unlink() if record is None else path.write_bytes(record)
    capsys.readouterr()
    cached(place)
    assert f"{entry}: damaged, made again" in capsys.readouterr().out
    assert main(["--all"]) == 0 and not path.exists()


@pytest.mark.parametrize(
    ("begin", "size"), [(0, 300_000), (5, 7), (299_990, 100), (2_097_152, 10), (2_000_000, 200_000)]
)
def test_parts_of_a_tensor_are_checked_too(place: Path, begin: int, size: int) -> None:
    """Tensors of more than one chunk; reads that begin and end anywhere."""
    rng = np.random.default_rng(0)
    name, values = NAMES.embedding, rng.integers(0, 2**16, 4_500_000, dtype=np.uint16).view(ml_dtypes.bfloat16)
    specs, sums = [TensorSpec(name, "BF16", values.shape)], {}
    path = place / "big"
    shutil.copytree(place / "model", path)
    for shard in path.glob("model*"):
        shard.unlink()
    cuts = [values[:1_000_001], values[1_000_001:4_000_000].tobytes(), values[4_000_000:]]
    write_pieces(path / "model.safetensors", specs, summing(specs, iter(cuts), sums))
    write_record(place / "record.json", {"a": 1}, sums)
    folder = VerifiedFolder(path, place / "record.json", {"a": 1})
    expected = values[begin : begin + size].view(np.uint16)
    np.testing.assert_array_equal(folder.elements(name, begin, size).view(np.uint16), expected)
    into = aligned(2 * size)
    np.testing.assert_array_equal(folder.elements(name, begin, size, into).view(np.uint16), expected)
    np.testing.assert_array_equal(into[: expected.nbytes].view(np.uint16), expected)
    flipped(path / "model.safetensors", (path / "model.safetensors").stat().st_size - 2 * (values.size - begin))
    with pytest.raises(DamagedError, match="other bytes in"):
        folder.elements(name, begin, size)


@settings(max_examples=50, deadline=None)
@given(st.binary(min_size=1, max_size=3 * BLOCK_BYTES), st.data())
def test_the_checksum_sees_every_change(data: bytes, draw: st.DataObject) -> None:
    """Of a byte, of the length, and two words exchanged, within a block too."""
    values = np.frombuffer(data, np.uint8)
    summed = checksum(values)
    changed = values.copy()
    changed[draw.draw(st.integers(0, values.size - 1))] ^= np.uint8(draw.draw(st.integers(1, 255)))
    assert checksum(changed) != summed
    assert checksum(np.append(values, np.uint8(0))) != summed
    words = values[: values.size // 8 * 8].reshape(-1, 8).copy()
    if len(words) > 1 and words[0].tobytes() != words[-1].tobytes():
        words[[0, -1]] = words[[-1, 0]]
        assert checksum(words.reshape(-1)) != checksum(values[: words.size])
    half = values.size // BLOCK_BYTES // 2 * BLOCK_BYTES
    assert isinstance(checksum(values[half:], checksum(values[:half])), int)


def test_a_file_s_checksum_is_that_of_its_bytes(tmp_path: Path) -> None:
    for size in (0, 1, READ_BYTES, READ_BYTES + 5):
        data = np.random.default_rng(size).integers(0, 256, size, dtype=np.uint8)
        (tmp_path / "file").write_bytes(data.tobytes())
        expected, rest = 0, data
        while rest.size:
            expected, rest = checksum(rest[:READ_BYTES], expected), rest[READ_BYTES:]
        assert file_checksum(tmp_path / "file") == expected
