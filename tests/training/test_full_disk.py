"""Disks that really take no more: a small one that something else fills midway, and a limit on the size of files."""

import errno
import importlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from convert.adapters.adapter import load_adapter
from convert.cache import cached_folder
from convert.files.folder import ModelFolder
from convert.jobs.job import DestinationError
from convert.load import read_config
from convert.merge import merge
from convert.quantize import quantize
from qlora_jax.base.console import make_console
from qlora_jax.base.errors import EXIT_BAD_INPUT
from qlora_jax.commands import execute, prepare
from qlora_jax.config import QuantizationSettings
from qlora_jax.training.metrics import MetricsLog, Record
from tests.convert.test_job import SHARDS, contents, partial
from tests.convert.test_merge import make_adapter
from tests.helpers import tiny
from tests.helpers.children import environment
from tests.helpers.runs import assert_same, outcome, train_main, write_place

KINDS = QuantizationSettings()
DISK_BYTES = 16 * 2**20
Convert = Callable[[Path, Callable[[int], object]], None]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, in memory."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(place)]
    try:
        mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no mount command")
    if mounted.returncode:
        pytest.skip(f"may not mount: {mounted.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Not to be written to."""
    return tiny.write_model(tmp_path_factory.mktemp("base") / "model", shards=SHARDS, tie_word_embeddings=False)


def fill(place: Path) -> None:
    """Leave no byte free."""
    with (place / "other").open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(2**12))
        except OSError as error:
            assert error.errno == errno.ENOSPC


def quantizing(model: Path, place: Path) -> Convert:
    return lambda out, advance: quantize(ModelFolder(model), out, KINDS, advance)


def merging(model: Path, place: Path) -> Convert:
    adapter = make_adapter(place / "adapter", model)
    folder = ModelFolder(model)
    loaded = load_adapter(adapter, read_config(folder))
    return lambda out, advance: merge(folder, loaded, out, "dequantized", advance=advance)


@pytest.mark.parametrize("kind", [quantizing, merging], ids=lambda kind: kind.__name__)
def test_a_disk_that_something_else_fills(
    tmp_path: Path, small_disk: Path, model: Path, kind: Callable[[Path, Path], Convert]
) -> None:
    convert, out = kind(model, tmp_path), small_disk / "out"
    convert(tmp_path / "whole", lambda nbytes: None)
    shards = partial(out) / "folder"

    def advance(nbytes: int) -> None:
        if len(list(shards.glob("model-*"))) == 2 and not (small_disk / "other").exists():
            fill(small_disk)

    with pytest.raises(DestinationError, match="the disk became full: No space left on device") as caught:
        convert(out, advance)
    assert "run the same command again" in caught.value.fix
    assert not out.exists()
    kept = sorted(path.name for path in shards.iterdir())
    assert kept[:2] == ModelFolder(model).shards[:2], "what was whole is kept"
    assert not [name for name in kept if "tmp" in name], "and no half of a file"
    with pytest.raises(DestinationError, match=r"bytes .* free on this disk"):
        convert(out, advance)
    times = {path.name: path.stat().st_mtime_ns for path in shards.iterdir()}
    (small_disk / "other").unlink()
    convert(out, lambda nbytes: None)
    assert contents(out) == contents(tmp_path / "whole")
    assert all((out / name).stat().st_mtime_ns == times[name] for name in kept[:2]), "not written again"


def test_a_cache_that_something_else_fills(
    tmp_path: Path,
    small_disk: Path,
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The run goes on without it, and the next one completes it."""
    monkeypatch.setenv("QLORA_JAX_CACHE", str(small_disk))
    quantize(ModelFolder(model), tmp_path / "whole", KINDS)
    entries, real = small_disk / "quantized", os.fsync

    def fsync(descriptor: int) -> None:
        real(descriptor)
        if len(list(entries.glob(".*.partial/folder/model-*"))) == 2 and not (small_disk / "other").exists():
            fill(small_disk)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        assert cached_folder(ModelFolder(model), str(model), KINDS, make_console()).path == model
    printed = capsys.readouterr().out
    assert "the same command continues" in printed
    assert "quantizing in memory, for this run only" in printed and "the disk became full" in printed
    (small_disk / "other").unlink()
    entry = cached_folder(ModelFolder(model), str(model), KINDS, make_console()).path
    assert entry.parent == entries
    assert "continuing: 2 of 5 shards" in capsys.readouterr().out
    assert contents(entry) == contents(tmp_path / "whole")


def test_tokens_for_which_there_is_no_room(
    tmp_path: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    place = write_place(tmp_path / "place", max_steps=1)
    for module in (prepare, execute):
        monkeypatch.setattr(module, "cache_dir", lambda: small_disk)
    (small_disk / "tokenized").mkdir()
    fill(small_disk)
    assert train_main(place, tmp_path / "out") == EXIT_BAD_INPUT
    error = capsys.readouterr().err
    assert f"error: {small_disk / 'tokenized'}" in error and "the disk became full: No space left on device" in error
    assert list((small_disk / "tokenized").iterdir()) == [], "nothing half-made is left"
    (small_disk / "other").unlink()
    assert train_main(place, tmp_path / "out") == 0


# Where a write fails, orbax closes its event loop, and now and then a write of tensorstore's ends after that and finds no one to tell.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_run_whose_disk_something_else_fills(
    tmp_path: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """While a line of metrics is written: what was saved before is whole, and the same command goes on from it."""
    place, out, real = write_place(tmp_path / "place", max_steps=4), small_disk / "out", MetricsLog.write
    settings = ["training.save_steps=1", "lora.target_modules=[q_proj]"]

    def write(self: MetricsLog, record: Record) -> None:
        if record["step"] == 3:
            fill(small_disk)
        real(self, record)

    with monkeypatch.context() as patch:
        patch.setattr(MetricsLog, "write", write)
        assert train_main(place, out, *settings) == EXIT_BAD_INPUT
    error = capsys.readouterr().err
    assert "the disk became full" in error and "make room and run the same command again" in error
    (small_disk / "other").unlink()
    assert train_main(place, out, *settings) == 0
    assert "continuing after step" in capsys.readouterr().out
    assert train_main(place, tmp_path / "whole", *settings) == 0
    assert_same(outcome(out), outcome(tmp_path / "whole"))


LIMITED = """
import resource, runpy, sys
limit = int(sys.argv.pop(1))
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize("verb", ["quantize", "merge"])
def test_a_limit_on_the_size_of_files(tmp_path: Path, verb: str) -> None:
    """The commands, as a user runs them, with a limit that the first shards are below and the third is above."""
    model = tiny.write_model(tmp_path / "model", shards=4, tie_word_embeddings=False, intermediate_size=2048)
    adapter = make_adapter(tmp_path / "adapter", model)
    given = ["--model", str(model)] + (["--adapter", str(adapter), "--no-check"] if verb == "merge" else [])
    module = importlib.import_module(f"convert.{verb}")
    assert module.main([*given, "--out", str(tmp_path / "whole")]) == 0
    sizes = [path.stat().st_size for path in sorted((tmp_path / "whole").glob("*.safetensors"))]
    assert sizes.index(max(sizes)) == 2
    given += ["--out", str(tmp_path / "out")]
    command = [sys.executable, "-c", LIMITED, str(max(sizes) - 1), f"convert.{verb}", *given]
    limited = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert limited.returncode == EXIT_BAD_INPUT
    assert "ulimit -f" in limited.stderr and "Traceback" not in limited.stderr
    assert "run the same command again" in limited.stderr
    assert not (tmp_path / "out").exists()
    assert len(list((partial(tmp_path / "out") / "folder").iterdir())) == 2
    assert module.main(given) == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
