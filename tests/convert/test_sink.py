"""Every byte arrives, with the cache and past it, whatever the pieces' sizes; and a disk's refusal is heard."""

import errno
import fcntl
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from convert.files import sink
from convert.files.sink import BLOCK_BYTES, Sink, checksum

SIZES = (1, 0, 70, BLOCK_BYTES, 3 * BLOCK_BYTES - 71, 5, 10 * BLOCK_BYTES + 1)


@pytest.fixture(autouse=True)
def small_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sink, "BUFFER_BYTES", 2 * BLOCK_BYTES)
    monkeypatch.setattr(sink, "SYNC_BYTES", 3 * BLOCK_BYTES)


def goes_past(path: Path) -> bool:
    """Whether this file system has files that are written past the cache."""
    with path.open("wb") as file:
        try:
            fcntl.fcntl(file, fcntl.F_SETFL, os.O_DIRECT)
        except OSError:
            return False
    return True


def fill(path: Path, sizes: tuple[int, ...], past_cache: bool) -> bytes:
    """Write random pieces of these sizes; returns what must be in the file."""
    pieces = [np.random.default_rng(size).bytes(size) for size in sizes]
    with path.open("wb", buffering=0) as file, Sink(file, past_cache=past_cache) as filled:
        for piece in pieces:
            filled.write(piece)
        summed = filled.finish()
    assert summed == checksum(path)
    return b"".join(pieces)


@pytest.mark.parametrize("past_cache", [False, True])
@pytest.mark.parametrize("sizes", [SIZES, (), (7,), (2 * BLOCK_BYTES,), (4 * BLOCK_BYTES, 1)], ids=str)
def test_every_byte_arrives(tmp_path: Path, sizes: tuple[int, ...], past_cache: bool) -> None:
    assert fill(tmp_path / "file", sizes, past_cache) == (tmp_path / "file").read_bytes()


@pytest.mark.parametrize("past_cache", [False, True])
def test_past_the_cache_where_it_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, past_cache: bool
) -> None:
    """Whole blocks; the rest of the last one goes through the cache."""
    if not goes_past(tmp_path / "trial"):
        pytest.skip("not on this file system")
    direct, synced, real = [], [], os.write
    monkeypatch.setattr(os, "fdatasync", synced.append)

    def write(descriptor: int, data: Any) -> int:
        direct.append((bool(fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT), len(data)))
        return real(descriptor, data)

    monkeypatch.setattr(os, "write", write)
    fill(tmp_path / "file", (5 * BLOCK_BYTES + 3,), past_cache)
    blocks = [2 * BLOCK_BYTES, 2 * BLOCK_BYTES]
    if past_cache:
        assert direct == [*((True, size) for size in blocks), (True, BLOCK_BYTES), (False, 3)]
        assert not synced
    else:
        assert direct == [*((False, size) for size in blocks), (False, BLOCK_BYTES + 3)]
        assert synced


@pytest.mark.parametrize("refused", ["the flag", "a write"])
def test_a_file_system_that_cannot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: str) -> None:
    """It is written as any other file."""
    write, control, calls = os.write, fcntl.fcntl, []

    def no_write(descriptor: int, data: Any) -> int:
        if control(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
            calls.append(len(data))
            raise OSError(errno.EINVAL, "Invalid argument")
        return write(descriptor, data)

    def no_flag(descriptor: int, command: int, value: int = 0) -> int:
        if value & os.O_DIRECT:
            calls.append(value)
            raise OSError(errno.EINVAL, "Invalid argument")
        return control(descriptor, command, value)

    if refused == "the flag":
        monkeypatch.setattr(fcntl, "fcntl", no_flag)
    elif goes_past(tmp_path / "trial"):
        monkeypatch.setattr(os, "write", no_write)
    else:
        pytest.skip("not on this file system")
    assert fill(tmp_path / "file", SIZES, past_cache=True) == (tmp_path / "file").read_bytes()
    assert len(calls) == 1


@pytest.mark.parametrize("past_cache", [False, True])
def test_a_part_is_taken_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, past_cache: bool) -> None:
    real = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: real(descriptor, data[: max(len(data) // 2, 1)]))
    assert fill(tmp_path / "file", SIZES, past_cache) == (tmp_path / "file").read_bytes()


@pytest.mark.parametrize("operation", ["write", "fdatasync"])
@pytest.mark.parametrize("size", [BLOCK_BYTES, 3 * BLOCK_BYTES, 20 * BLOCK_BYTES])
def test_a_full_disk_is_heard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, operation: str, size: int) -> None:
    """At the end, if not before: the next sync of the same file would not say it again."""

    def full(*arguments: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, operation, full)
    if operation == "fdatasync" and size < sink.SYNC_BYTES:
        fill(tmp_path / "file", (size,), past_cache=False)  # nothing to be heard
        return
    with pytest.raises(OSError, match="No space left"):
        fill(tmp_path / "file", (size,), past_cache=False)


def test_the_checksum_tells_what_changed_or_moved(tmp_path: Path) -> None:
    path = tmp_path / "file"
    written = np.frombuffer(fill(path, SIZES, past_cache=False), np.uint8)

    def of(changed: np.ndarray) -> int:
        path.write_bytes(changed.tobytes())
        return checksum(path)

    sound = of(written)
    seen = {sound}
    for place in (0, 1, BLOCK_BYTES - 1, BLOCK_BYTES, 5 * BLOCK_BYTES, written.size - 1):
        for bit in range(8):
            changed = written.copy()
            changed[place] ^= 1 << bit
            seen.add(of(changed))
    lost = written.copy()
    lost[BLOCK_BYTES : 2 * BLOCK_BYTES] = 0
    moved = written.copy()
    moved[: 2 * BLOCK_BYTES] = np.roll(written[: 2 * BLOCK_BYTES], BLOCK_BYTES)
    seen |= {of(lost), of(moved)}
    assert len(seen) == 1 + 6 * 8 + 2
    assert of(written) == sound
