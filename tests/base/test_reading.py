"""The boundary: which files are opened, which errors become one message, and which stay ours."""

import os
import socket
import zlib
from pathlib import Path

import pytest

from qlora_jax.base.errors import InputError
from qlora_jax.base.reading import (
    is_file,
    kind_of,
    open_file,
    read_bytes,
    read_json,
    read_json_object,
    read_text,
    reading,
    shown,
    user_path,
)


@pytest.fixture
def kinds(tmp_path: Path) -> dict[str, Path]:
    paths = {name: tmp_path / name for name in ("file", "folder", "fifo", "loop", "dangling", "socket", "locked")}
    paths["file"].write_bytes(b"{}")
    paths["folder"].mkdir()
    os.mkfifo(paths["fifo"])
    paths["loop"].symlink_to(paths["loop"])
    paths["dangling"].symlink_to(tmp_path / "nowhere")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.path.relpath(paths["socket"]))
    paths["device"] = Path("/dev/zero")
    paths["long"] = tmp_path / ("a" * 300)
    paths["under a file"] = paths["file"] / "x"
    paths["none"] = tmp_path / "none"
    paths["zero byte"] = tmp_path / "a\0b"
    paths["surrogate"] = tmp_path / "\ud800"
    return paths


@pytest.mark.parametrize(("name", "found"), [
    ("folder", "a folder"), ("fifo", "a named pipe"), ("device", "a device"), ("socket", "a socket"),
    ("loop", "a link that leads to itself"), ("dangling", "nowhere, which is not there"), ("none", "no such file"),
    ("under a file", "a part of the path is a file"), ("long", "a name that is too long"),
    ("zero byte", "characters that no name"), ("surrogate", "characters that no name"),
])  # fmt: skip
@pytest.mark.parametrize("read", [open_file, read_bytes, read_text, read_json])
def test_only_regular_files_are_opened(kinds: dict[str, Path], name: str, found: str, read: object) -> None:
    with pytest.raises(InputError) as caught:
        read(kinds[name])
    assert found in caught.value.found


def test_a_fifo_with_a_writer_is_not_opened_either(kinds: dict[str, Path]) -> None:
    reader = os.open(kinds["fifo"], os.O_RDONLY | os.O_NONBLOCK)
    writer = os.open(kinds["fifo"], os.O_WRONLY)
    with pytest.raises(InputError, match="a named pipe"):
        open_file(kinds["fifo"])
    os.close(reader)
    os.close(writer)


def test_kinds(kinds: dict[str, Path]) -> None:
    names = {name: kind_of(kinds[name]) for name in ("file", "folder", "fifo", "device", "socket")}
    assert names == {"file": "a file", "folder": "a folder", "fifo": "a named pipe", "device": "a device",
        "socket": "a socket"}  # fmt: skip
    assert kind_of(kinds["dangling"]) == kind_of(kinds["none"]) == kind_of(kinds["under a file"]) == "nothing"
    for name in ("long", "loop", "zero byte", "surrogate"):
        with pytest.raises(InputError):
            is_file(kinds[name])


def test_a_file_is_as_long_as_it_may_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"12345")
    assert read_bytes(tmp_path / "file", at_most=5) == b"12345"
    with pytest.raises(InputError, match="at most 4 bytes"):
        read_bytes(tmp_path / "file", at_most=4)


@pytest.mark.parametrize(("data", "found"), [
    (b"\xff", "not UTF-8"), (b"{", "not JSON"), (b"[" * 100_000, "nested too deeply"), (b"9" * 5000, "not JSON"),
    (b"[]", "a JSON list"),
])  # fmt: skip
def test_what_is_no_json_object(tmp_path: Path, data: bytes, found: str) -> None:
    (tmp_path / "file").write_bytes(data)
    with pytest.raises(InputError, match=found):
        read_json_object(tmp_path / "file")


class Panic(BaseException):
    pass


@pytest.mark.parametrize("error", [
    zlib.error("bad"), KeyError("x"), IndexError(), MemoryError(), RecursionError(), OSError(5, "a bad sector"), Panic("at line 7"),
    UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"), OverflowError("int too large"),
])  # fmt: skip
def test_whatever_a_library_raises_is_one_message(error: BaseException) -> None:
    with pytest.raises(InputError, match=r"here\n  found:    damaged: .+"), reading("here", "damaged"):
        raise error


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(1), InputError("there", found="x")])
def test_what_is_passed_on(error: BaseException) -> None:
    with pytest.raises(type(error)) as caught, reading("here", "damaged"):
        raise error
    assert caught.value is error


def test_shown_has_an_end() -> None:
    bomb: list[object] = ["lol"]
    for _ in range(40):
        bomb = [bomb] * 10
    assert len(shown(bomb)) < 50_000
    assert shown(10**4999) == "a whole number of about 4,999 digits"
    assert shown([1, "a"]) == "[1, 'a']"


def test_users_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    assert user_path("~/x") == Path("/home/someone/x")
    for text in ("", "a\0b", "\ud800", "~nobody-at-all/x"):
        with pytest.raises(ValueError, match=r"path|characters|no user"):
            user_path(text)
