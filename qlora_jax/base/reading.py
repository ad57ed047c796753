"""The boundary for whatever comes from outside: how a file is opened, and what becomes of the errors of a library that reads it.

Files are opened by `open_file`, which takes regular files only: a fifo or a device may never end, and a folder is no file. What is in
one is read inside `reading(where, phase)`, which turns whatever a library raises there into one `InputError` that names file and phase.
Libraries raise nearly anything for a damaged file: zlib and Arrow errors of their own, PyYAML's constructors and numpy's headers KeyError,
IndexError and TypeError, a Rust library a panic, which is no Exception. So the block encloses the library's call and nothing of ours:
what is raised elsewhere is a bug of ours, and stays visible as one.

Programs from outside (templates, tokenizers, regular expressions) are another matter: see `bounded.py`.
"""

import contextlib
import errno
import json
import os
import reprlib
import stat
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from qlora_jax.base.errors import FULL, InputError, InterruptedRunError, disk_full

MAX_JSON_BYTES = 2**24
"""Bytes of a JSON file of settings. Parsed, it may take twenty times its size; the longest seen has some hundred thousand."""
MAX_TEXT_BYTES = 2**24
"""Bytes of a text file that is read whole."""
MAX_YAML_VALUES, MAX_YAML_NUMBER = 100_000, 5000
"""Values in a YAML text, and characters of a number in it."""

KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}
"""What a path may lead to that is no regular file, in words."""
REASONS = {
    errno.ENOENT: "no such file",
    errno.ENOTDIR: "no such file: a part of the path is a file, not a folder",
    errno.EACCES: "a file that may not be read: permission denied",
    errno.EPERM: "a file that may not be read: operation not permitted",
    errno.ELOOP: "a link that leads to itself",
    errno.ENAMETOOLONG: "a name that is too long for a file (most file systems allow 255 bytes)",
    errno.ENXIO: "a socket or a device without anything behind it",
}
"""What is said of a path that cannot be opened, by the system's number."""
PASSED_ON = (InputError, InterruptedRunError, KeyboardInterrupt, SystemExit, GeneratorExit)
"""Exceptions that say all there is to say, or are no errors of a library."""


@contextlib.contextmanager
def reading(where: object, phase: str, *, expected: str = "", fix: str = "") -> Iterator[None]:
    """Turn whatever the block raises into an `InputError`, but for what is one already. Enclose calls of libraries only.

    Args:
        where: the file, setting or row that is read.
        phase: what is wrong if it fails, such as "not JSON" or "a tokenizer that cannot be loaded"; the library's reason follows.
        expected: as for `InputError`.
        fix: as for `InputError`.

    Raises:
        InputError: the block raised something.
    """
    try:
        yield
    except PASSED_ON:
        raise
    except BaseException as error:  # a panic of a Rust library is no Exception
        if isinstance(error, OSError) and error.errno in FULL:
            raise disk_full(error, where) from None
        raise InputError(where, found=f"{phase}: {reason_of(error)}", expected=expected, fix=fix) from None


def reason_of(error: BaseException) -> str:
    """A library's error in words, for a message; with the name of its type where its text is a word or less."""
    if isinstance(error, MemoryError):
        return "it needs more memory than there is"
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = str(error).strip()
    if " " in text and not isinstance(error, KeyError):
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def kind_of(path: str | Path) -> str:
    """What a path leads to: "a file", "a folder", one of `KINDS`, or "nothing", where there is none or a link that leads nowhere.

    Raises:
        InputError: nobody can tell, for the name is too long, has characters that none can have, or its folder may not be searched.
    """
    with _path_errors(path):
        try:
            return KINDS.get(stat.S_IFMT(os.stat(path).st_mode), "a file")  # noqa: PTH116 - Path has it raise other errors
        except (FileNotFoundError, NotADirectoryError):
            return "nothing"


def is_folder(path: str | Path) -> bool:
    """Whether a path leads to a folder. Raises InputError as `kind_of`."""
    return kind_of(path) == "a folder"


def is_file(path: str | Path) -> bool:
    """Whether a path leads to a regular file. Raises InputError as `kind_of`."""
    return kind_of(path) == "a file"


def refuse_odd_files(folder: Path) -> None:
    """Refuse a folder with something in it that is neither file nor folder: a library that opened it might wait for ever.

    Raises:
        InputError: it has a named pipe, a device, a socket or a link that leads to itself.
    """
    with reading(folder, "a folder that cannot be read"):
        names = sorted(os.listdir(folder))  # noqa: PTH208 - Path.iterdir gives paths, which are looked at one by one below
    kinds = {name: kind_of(folder / name) for name in names}
    if odd := [f"{name} is {kind}" for name, kind in kinds.items() if kind not in ("a file", "a folder", "nothing")]:
        raise InputError(
            folder, found=", ".join(odd[:5]), expected="files and folders", fix="take it out of the folder"
        )


def open_file(path: str | Path, *, buffering: int = -1, expected: str = "a file", fix: str = "") -> BinaryIO:
    """Open a regular file for reading its bytes; whatever else there is, is said and not opened.

    Raises:
        InputError: there is no such file, it may not be read, or it is a folder, a device, a named pipe or a socket.
    """
    with _path_errors(path, expected, fix):
        # Without O_NONBLOCK, opening a named pipe would wait for somebody to write into it.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    kind = KINDS.get(stat.S_IFMT(os.fstat(descriptor).st_mode), "a file")
    if kind != "a file":
        os.close(descriptor)
        raise InputError(path, found=kind, expected=expected, fix=fix)
    os.set_blocking(descriptor, True)
    return os.fdopen(descriptor, "rb", buffering)


@contextlib.contextmanager
def _path_errors(path: str | Path, expected: str = "", fix: str = "") -> Iterator[None]:
    try:
        yield
    except OSError as error:
        found = REASONS.get(error.errno or 0, f"cannot be opened: {error.strerror}")
        if error.errno == errno.ENOENT and os.path.islink(path):  # noqa: PTH114
            found = f"a link to {os.readlink(path)}, which is not there"  # noqa: PTH115
        raise InputError(path, found=found, expected=expected, fix=fix) from None
    except ValueError:  # a zero byte, or half of a surrogate pair
        found = "characters that no name of a file can have"
        raise InputError(ascii(str(path)), found=found, expected=expected, fix=fix) from None


def read_bytes(path: str | Path, *, at_most: int = MAX_TEXT_BYTES, expected: str = "a file", fix: str = "") -> bytes:
    """A whole file.

    Raises:
        InputError: it cannot be opened (see `open_file`) or read, or has more than `at_most` bytes.
    """
    with open_file(path, expected=expected, fix=fix) as file:
        with reading(path, "cannot be read", expected=expected, fix=fix):
            data = file.read(min(os.fstat(file.fileno()).st_size, at_most) + 1)  # it makes room for all it is asked for
        if len(data) > at_most:
            size = os.fstat(file.fileno()).st_size
            found = f"{max(size, at_most + 1):,} bytes"
            raise InputError(path, found=found, expected=f"{expected} of at most {at_most:,} bytes", fix=fix)
    return data


def read_text(path: str | Path, *, at_most: int = MAX_TEXT_BYTES, expected: str = "a file", fix: str = "") -> str:
    """A whole file of UTF-8 text. Raises InputError as `read_bytes`, or because it is not UTF-8."""
    data = read_bytes(path, at_most=at_most, expected=expected, fix=fix)
    with reading(path, "not UTF-8 text", expected=expected, fix=fix):
        return data.decode("utf-8")


def read_json(path: str | Path, *, at_most: int = MAX_JSON_BYTES, fix: str = "") -> Any:
    """The value in a JSON file. Raises InputError as `read_text`, or because it is not JSON."""
    text = read_text(path, at_most=at_most, expected="a JSON file", fix=fix)
    with reading(path, "not JSON", fix=fix):
        return json.loads(text)


def read_json_object(path: str | Path, *, at_most: int = MAX_JSON_BYTES, fix: str = "") -> dict[str, Any]:
    """The object in a JSON file. Raises InputError as `read_json`, or because it is another value."""
    value = read_json(path, at_most=at_most, fix=fix)
    if not isinstance(value, dict):
        raise InputError(path, found=f"a JSON {type(value).__name__}, not an object", fix=fix)
    return value


def parse_yaml(text: str, where: object, *, fix: str = "") -> Any:
    """The value that a YAML text writes.

    Raises:
        InputError: it is not YAML, has tags that nothing stands behind, or writes more than `MAX_YAML_VALUES` by repeating itself.
    """
    import yaml  # slow to import, and only settings are written in it

    with reading(where, "not YAML", fix=fix):
        loader = yaml.SafeLoader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            if _size(node, {}) > MAX_YAML_VALUES:
                raise ValueError(f"more than {MAX_YAML_VALUES:,} values, those that aliases repeat counted each time")
            return loader.construct_document(node)
        finally:
            loader.dispose()


def _size(node: Any, known: dict[int, int]) -> int:
    """Values in a YAML node, with those that an alias repeats counted each time; one that contains itself has no end.

    Raises:
        ValueError: a number is too long: one in base 60 takes time that grows with the square.
    """
    if id(node) not in known:
        if isinstance(node.value, str) and len(node.value) > MAX_YAML_NUMBER and node.tag.endswith((":int", ":float")):
            raise ValueError(f"a number of {len(node.value):,} characters")
        known[id(node)] = MAX_YAML_VALUES + 1
        parts = node.value if isinstance(node.value, list) else []
        inner = [value for part in parts for value in (part if isinstance(part, tuple) else (part,))]
        known[id(node)] = 1 + sum(_size(value, known) for value in inner)
    return known[id(node)]


def user_path(text: str | Path) -> Path:
    """A path as a user gave it, with `~` and `~name` replaced by that home folder, as a shell would do.

    Raises:
        ValueError: it is empty, has characters that no name of a file can have, or there is no such user.
    """
    text = str(text)
    if not text:
        raise ValueError("expected a path, found nothing")
    if "\0" in text or not is_unicode(text):
        raise ValueError(f"{text!a} has characters that no name of a file can have")
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise ValueError(f"{text}: there is no user {text[1:].partition('/')[0]!r} with a home folder") from None


def is_unicode(text: str) -> bool:
    """Whether UTF-8 can write a text. Halves of surrogate pairs come from escapes, and from arguments that are not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


class _Shown(reprlib.Repr):
    """`repr` with an end: a few hundred characters, whatever the value; nested lists of lists, or a number of any length."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxstring, self.maxother, self.maxlong = 4, 200, 200, 60
        self.maxlist = self.maxtuple = self.maxdict = self.maxset = self.maxfrozenset = 8

    def repr_dict(self, x: dict[Any, Any], level: int) -> str:
        if level <= 0:
            return "{...}"
        parts = [f"{self.repr1(key, level - 1)}: {self.repr1(x[key], level - 1)}" for key in islice(x, self.maxdict)]
        return f"{{{', '.join(parts)}{', ...' if len(x) > self.maxdict else ''}}}"  # reprlib's own sorts the keys

    def repr_int(self, x: int, level: int) -> str:
        if x.bit_length() > 4 * self.maxlong:  # Python refuses to write thousands of digits, and takes long for fewer
            return f"a whole number of about {int(x.bit_length() * 0.30103):,} digits"
        return repr(x)


def shown(value: Any) -> str:
    """A value of a file, for a message: its `repr`, shortened."""
    return _SHOWN.repr(value)


_SHOWN = _Shown()
