"""A conversion that is stopped, at any moment and by anything, is continued by the next run; its folder is whole or not there."""

import errno
import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from convert.adapters.adapter import load_adapter, save_adapter
from convert.files import derived, shards
from convert.files.folder import ModelFolder
from convert.jobs import job
from convert.load import read_config
from convert.merge import merge
from convert.quantize import main, quantize
from qlora_jax.base.errors import EXIT_BAD_INPUT, EXIT_INTERRUPTED, InputError
from qlora_jax.config import LoraSettings, QuantizationSettings
from tests.helpers import tiny
from tests.helpers.children import environment

SHARDS = 5
KINDS = QuantizationSettings()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Not to be written to."""
    return tiny.write_model(tmp_path_factory.mktemp("base") / "model", shards=SHARDS, tie_word_embeddings=False)


@pytest.fixture(scope="module")
def quantized(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("quantized") / "out"
    quantize(ModelFolder(model), out, KINDS)
    return contents(out)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def partial(out: Path) -> Path:
    return out.with_name(f".{out.name}.partial")


def stop_after(number: int, error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    """The shard after `number` whole ones fails in its middle."""
    real, begun = derived.write_pieces, itertools.count()

    def failing(pieces: Iterator[Any]) -> Iterator[Any]:
        yield next(pieces)
        raise error

    def write(path: Path, specs: Any, pieces: Iterator[Any], metadata: Any, **how: bool) -> int:
        return real(path, specs, failing(pieces) if next(begun) == number else pieces, metadata, **how)

    monkeypatch.setattr(derived, "write_pieces", write)


def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the shards that are written from now on."""
    real, written = shards.write_pieces, []

    def write(path: Path, *args: Any, **how: bool) -> int:
        written.append(path.name)
        return real(path, *args, **how)

    monkeypatch.setattr(derived, "write_pieces", write)
    return written


@pytest.fixture
def stopped(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a conversion to `out` was stopped with two shards written."""
    with monkeypatch.context() as patch:
        stop_after(2, KeyboardInterrupt(), patch)
        with pytest.raises(KeyboardInterrupt):
            quantize(ModelFolder(model), tmp_path / "out", KINDS)
    assert len(list((partial(tmp_path / "out") / "folder").iterdir())) == 2
    return tmp_path / "out"


# Killed

DIES = """
import itertools, os, signal, sys
from pathlib import Path

def watch(event, args):
    if event in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir") and place in str(args[0]) and next(count) >= limit:
        os.kill(os.getpid(), signal.SIGKILL)

verb, model, place = sys.argv[1:4]
from convert.files.derived import Shard, write_derived
from convert.files.folder import ModelFolder
from convert.quantize import quantize
from qlora_jax.config import QuantizationSettings
folder, out = ModelFolder(model), Path(place) / "out"

def run():
    if verb == "quantize":
        return quantize(folder, out, QuantizationSettings())
    def same(shard):
        specs = folder.specs(shard)
        return Shard(specs, (piece for spec in specs for piece in folder.pieces(spec.name, 5000)), 0)
    write_derived(folder, out, same, {"verb": "copy"})

sys.addaudithook(watch)
for limit in map(int, sys.argv[4:]):
    count = itertools.count()
    if not out.exists():
        if (pid := os.fork()) == 0:
            run()
            os._exit(0)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), out.exists(), flush=True)
"""
"""Converts in children, each killed at the given number of file operations in its folder. JAX is only used once they are forked; what it
compiles is kept."""


@pytest.mark.parametrize(
    ("verb", "limits", "killed"),
    [("copy", [*range(20), *range(12, 40), 10**6], 20), ("quantize", [9, 13, 17, 10**6], 3)],
)
def test_killed_at_any_file_operation(
    tmp_path: Path, cache: Path, model: Path, quantized: dict[str, bytes], verb: str, limits: list[int], killed: int
) -> None:
    """One run after another, each killed a little later, the last one not."""
    command = [sys.executable, "-c", DIES, verb, str(model), str(tmp_path), *map(str, limits)]
    compiled = {
        "JAX_COMPILATION_CACHE_DIR": str(cache / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
    }
    printed = subprocess.run(
        command, env=environment(JAX_PLATFORMS="cpu", **compiled), check=True, stdout=subprocess.PIPE, text=True
    ).stdout
    *before, last = [line.split() for line in printed.splitlines()]
    assert before == [[str(-signal.SIGKILL), "False"]] * len(before), "killed, and nothing there that looks whole"
    assert len(before) >= killed
    assert last[1] == "True"
    found = contents(tmp_path / "out")
    if verb == "quantize":
        assert found == quantized
    else:
        assert found.keys() == quantized.keys()
        weights = [name for name in found if name.endswith(".safetensors")]
        assert all(found[name] == (model / name).read_bytes() for name in weights)


# Continued


def test_only_what_is_missing_is_written(
    model: Path, quantized: dict[str, bytes], stopped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written, lines, advanced = counted(monkeypatch), [], []
    folder = ModelFolder(model)
    quantize(folder, stopped, KINDS, advanced.append, lines.append)
    assert written == folder.shards[2:]
    assert lines == [
        "reading what an earlier run wrote: 2 shards",
        f"continuing: 2 of {SHARDS} shards are written already",
    ]
    assert sum(advanced) == sum(spec.nbytes for shard in folder.shards for spec in folder.specs(shard))
    assert contents(stopped) == quantized
    assert [path.name for path in stopped.parent.iterdir()] == ["out"], "nothing half-made is left"


def shorter(data: bytes) -> bytes:
    return data[:-1]


def longer(data: bytes) -> bytes:
    return data + b"\0"


def another_header(data: bytes) -> bytes:
    return data.replace(b"U8", b"I8", 1)


def flipped(data: bytes) -> bytes:
    """One bit of the last weight."""
    return data[:-1] + bytes([data[-1] ^ 1])


@pytest.mark.parametrize("damage", [shorter, longer, another_header, flipped, lambda data: b""])
def test_a_damaged_shard_is_made_again(
    model: Path,
    quantized: dict[str, bytes],
    stopped: Path,
    monkeypatch: pytest.MonkeyPatch,
    damage: Callable[[bytes], bytes],
) -> None:
    first, second = ModelFolder(model).shards[:2]
    path = partial(stopped) / "folder" / first
    path.write_bytes(damage(path.read_bytes()))
    written = counted(monkeypatch)
    quantize(ModelFolder(model), stopped, KINDS)
    assert first in written and second not in written
    assert contents(stopped) == quantized


@pytest.mark.parametrize("record", [None, "{", "[]", '{"model-00001-of-00005.safetensors": "?"}'])
def test_shards_without_a_checksum_are_made_again(
    model: Path, quantized: dict[str, bytes], stopped: Path, record: str | None
) -> None:
    path = partial(stopped) / job.RECORD
    path.unlink() if record is None else path.write_text(record)
    quantize(ModelFolder(model), stopped, KINDS)
    assert contents(stopped) == quantized


def test_what_a_dead_run_left_is_removed(model: Path, quantized: dict[str, bytes], stopped: Path) -> None:
    folder = partial(stopped) / "folder"
    (folder / ".model-00003-of-00005.safetensors.999.tmp").write_bytes(b"half")
    (folder / "model-00009-of-00009.safetensors").write_bytes(b"of another layout")
    (folder / "config.json").write_text("{}")
    quantize(ModelFolder(model), stopped, KINDS)
    assert contents(stopped) == quantized


def touched(model: Path) -> QuantizationSettings:
    os.utime(model / "model-00001-of-00005.safetensors", ns=(1, 1))
    return KINDS


def another_tokenizer(model: Path) -> QuantizationSettings:
    (model / "tokenizer.json").write_text("{}")
    return KINDS


@pytest.mark.parametrize("change", [touched, another_tokenizer, lambda model: QuantizationSettings(double_quant=False)])
def test_another_job_starts_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], QuantizationSettings]
) -> None:
    model, out = tiny.write_model(tmp_path / "model", shards=SHARDS), tmp_path / "out"
    with monkeypatch.context() as patch:
        stop_after(2, KeyboardInterrupt(), patch)
        with pytest.raises(KeyboardInterrupt):
            quantize(ModelFolder(model), out, KINDS)
    kind, written, lines = change(model), counted(monkeypatch), []
    quantize(ModelFolder(model), out, kind, log=lines.append)
    assert written == ModelFolder(model).shards
    assert len(lines) == 1 and "starting over" in lines[0]
    quantize(ModelFolder(model), tmp_path / "fresh", kind)
    assert contents(out) == contents(tmp_path / "fresh")


def test_a_merge_is_continued_with_its_adapter_only(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, config = ModelFolder(model), read_config(ModelFolder(model))
    lora = LoraSettings(r=4)

    def saved(seed: int) -> Any:
        rng = np.random.default_rng(seed)
        shapes = {n: {"lora_a": (4, s[1]), "lora_b": (s[0], 4)} for n, s in config.linear_shapes().items()}
        tree = {
            name: {"adapter": {part: jnp.asarray(rng.standard_normal(s), jnp.float32) for part, s in parts.items()}}
            for name, parts in shapes.items()
        }
        save_adapter(tmp_path / "adapter", [tree, tree], lora, KINDS, str(model), architecture=config)
        return load_adapter(tmp_path / "adapter", config)

    adapter, out = saved(0), tmp_path / "out"
    merge(folder, adapter, tmp_path / "whole", "dequantized")
    for number, fresh in ((2, False), (1, True)):
        with monkeypatch.context() as patch:
            stop_after(number, OSError(errno.EIO, "it hangs"), patch)
            with pytest.raises(OSError, match="it hangs"):
                merge(folder, adapter, out, "dequantized")
        if fresh:
            adapter = saved(1)
        with monkeypatch.context() as patch:
            written = counted(patch)
            merge(folder, adapter, out, "dequantized")
        assert len(written) == (SHARDS if fresh else SHARDS - number)
        assert (contents(out) == contents(tmp_path / "whole")) == (not fresh)
        out = tmp_path / "other"


def test_a_hubs_snapshot_is_known_by_its_revision(tmp_path: Path) -> None:
    jobs = []
    for place, time in (("here", 1), ("there", 2)):
        path = tiny.write_model(tmp_path / place / "models--org--name" / "snapshots" / "abc")
        os.utime(path / "model.safetensors", ns=(time, time))
        jobs.append(job.describe("quantize", ModelFolder(path)))
    assert jobs[0] == jobs[1]
    other = path.rename(path.with_name("def"))
    assert job.describe("quantize", ModelFolder(other)) != jobs[0]


def test_two_at_once(tmp_path: Path, model: Path) -> None:
    out = tmp_path / "out"
    with (
        job.filling(out, {}, print),
        pytest.raises(InputError, match="another process is making this folder"),
        job.filling(out, {}, print),
    ):
        pass
    assert out.is_dir()


# Disks and commands


def test_too_little_room_is_said_before(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    with pytest.raises(InputError, match=r"1,000 bytes .* free") as caught:
        quantize(ModelFolder(model), tmp_path / "out", KINDS)
    needed = int(caught.value.expected.split()[0].replace(",", ""))
    monkeypatch.undo()
    quantize(ModelFolder(model), tmp_path / "whole", KINDS)
    total = sum(map(len, contents(tmp_path / "whole").values()))
    assert total <= needed <= total + derived.SPARE_BYTES
    assert [path.name for path in tmp_path.iterdir()] == ["whole"]


def test_what_is_written_already_needs_no_room(model: Path, stopped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    with pytest.raises(InputError) as caught:
        quantize(ModelFolder(model), stopped, KINDS)
    needed = int(caught.value.expected.split()[0].replace(",", ""))
    monkeypatch.undo()
    quantize(ModelFolder(model), stopped, KINDS)  # it was kept although there was no room
    weights = [len(data) for name, data in contents(stopped).items() if name.endswith(".safetensors")]
    rest = sum(len(data) for name, data in contents(stopped).items() if not name.endswith(".safetensors"))
    assert needed <= sum(weights[2:]) + rest + derived.SPARE_BYTES


@pytest.mark.parametrize("at", ["write", "fsync"])
def test_a_disk_that_fills_midway(
    tmp_path: Path,
    model: Path,
    quantized: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    at: str,
) -> None:
    arguments = ["--model", str(model), "--out", str(tmp_path / "out")]
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with monkeypatch.context() as patch:
        if at == "write":
            stop_after(3, full, patch)
        else:
            fsync_fails_after(3, full, patch)
        assert main(arguments) == EXIT_BAD_INPUT
    error = capsys.readouterr().err
    assert "the disk became full: No space left on device" in error
    assert "run the same command again" in error and "Traceback" not in error
    assert not (tmp_path / "out").exists()
    assert main(arguments) == 0
    assert "continuing: 3 of 5 shards" in capsys.readouterr().err
    assert contents(tmp_path / "out") == quantized


def fsync_fails_after(number: int, error: OSError, monkeypatch: pytest.MonkeyPatch) -> None:
    """That of a shard, after `number` of them were fine."""
    real, whole = os.fsync, itertools.count()

    def fsync(descriptor: int) -> None:
        name = str(Path(f"/proc/self/fd/{descriptor}").readlink())
        if "safetensors" in name and next(whole) >= number:
            raise error
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)


def test_an_interrupted_command_says_how_to_go_on(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stop_after(1, KeyboardInterrupt(), monkeypatch)
    assert main(["--model", str(model), "--out", str(tmp_path / "out")]) == EXIT_INTERRUPTED
    assert "the same command continues" in capsys.readouterr().err
    assert json.loads((partial(tmp_path / "out") / "job.json").read_text())["verb"] == "quantize"


def test_input_at_fault_leaves_nothing(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop_after(2, InputError("a tensor", found="NaN"), monkeypatch)
    with pytest.raises(InputError, match="NaN"):
        quantize(ModelFolder(model), tmp_path / "out", KINDS)
    assert list(tmp_path.iterdir()) == []
