"""Reading rows from files: JSON lines, JSON arrays, CSV, Parquet and plain text. One row at a time, whatever the file's size.

Bytes are split into lines before they are decoded: only \\n ends a line (JSON strings may hold U+2028), and bad UTF-8 has a line.
No more of a row is read than it may have bytes: one without an end is an error, and takes no memory.
"""

import codecs
import contextlib
import csv
import gzip
import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, Literal

from qlora_jax.base.errors import InputError
from qlora_jax.base.reading import open_file, reading
from qlora_jax.config.data import MAX_ROW_BYTES
from qlora_jax.data.rows.arrow import parquet_rows
from qlora_jax.data.rows.row import RawRow, RowError, as_object, decode, too_large

SampleBy = Literal["line", "paragraph", "document"]
BOM = b"\xef\xbb\xbf"
READ_AT_ONCE = 2**22
"""Bytes of a JSON array held at a time, unless a single row is longer."""
LONGEST_WORD = 64
"""Characters before the end of a text within which JSON that was cut there may be found wrong."""
SPACE = re.compile(r"[ \t\r\n]*")
UNDECODED = re.compile("[\udc80-\udcff]")

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".txt")


def is_data_file(path: Path) -> bool:
    """Whether the name says that it holds rows; all but Parquet may be gzipped."""
    return suffix(path) in SUFFIXES


def read_file(path: Path, sample_by: SampleBy = "line", max_row_bytes: int = MAX_ROW_BYTES) -> Iterator[RawRow]:
    """The rows of one file, by its suffix. A row that cannot be read is handed on as a `RowError`, and reading goes on where it can.

    Args:
        path: .jsonl or .ndjson: one object a line, blank lines skipped. .json: an array of objects, or objects one after another. .csv,
            .tsv: a header, then rows of text. .parquet. .txt: rows with the field `text`. All but Parquet may end in .gz as well.
        sample_by: what makes a row of a text file, as in `datasets`: a line, a paragraph (blank lines between) or all of it.
        max_row_bytes: bytes that a row may have. A larger one is an error, and no more than that of it is held.

    Raises:
        InputError: the file cannot be read at all.
    """
    readers: dict[str, Callable[[Path, int], Iterator[RawRow]]] = {
        ".jsonl": _json_lines,
        ".ndjson": _json_lines,
        ".json": _json,
        ".csv": lambda path, limit: _csv(path, limit, ","),
        ".tsv": lambda path, limit: _csv(path, limit, "\t"),
        ".parquet": parquet_rows,
        ".txt": lambda path, limit: _text(path, limit, sample_by),
    }
    yield from readers[suffix(path)](path, max_row_bytes)


def suffix(path: Path) -> str:
    """The end of a file's name that says what is in it: `.jsonl` of `a.jsonl.gz`."""
    name = path.with_suffix("") if path.suffix == ".gz" else path
    return "" if path.suffix == ".gz" and name.suffix == ".parquet" else name.suffix.lower()


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    """A file's bytes, unpacked if it is gzipped. What zlib or the disk raise in the block is an InputError."""
    fix = "check the file and its permissions"
    with open_file(path, expected="a file of rows", fix=fix) as file, reading(path, "cannot be read", fix=fix):
        if path.suffix == ".gz":
            with gzip.GzipFile(fileobj=file) as unpacked:
                yield unpacked
        else:
            yield file


def _lines(path: Path, limit: int) -> Iterator[tuple[int, bytes]]:
    """(number from 1, line with its end), without a byte order mark at the start; of a line of more than `limit` bytes, limit + 1."""
    with _opened(path) as file:
        number = 0
        while line := file.readline(limit + 1):
            number, rest = number + 1, line
            while len(rest) > limit and not rest.endswith(b"\n"):
                rest = file.readline(limit + 1)
            yield number, line.removeprefix(BOM) if number == 1 else line


def _json_lines(path: Path, limit: int) -> Iterator[RawRow]:
    for number, line in _lines(path, limit):
        where = f"{path}:{number}"
        if len(line) > limit:
            yield RawRow(where, too_large(where, limit))
        elif line.strip():
            yield RawRow(where, line)


def _json(path: Path, limit: int) -> Iterator[RawRow]:
    """An array of objects; a file that begins with anything else is taken for lines of JSON, as it often is, if its first line is whole."""
    first = next((line for _, line in _lines(path, limit) if line.strip()), b"")
    if first.lstrip().startswith(b"["):
        yield from _json_values(path, limit, in_array=True)
    else:
        goes_on = len(first) <= limit and _goes_on(first.strip())
        yield from _json_values(path, limit, in_array=False) if goes_on else _json_lines(path, limit)


def _goes_on(line: bytes) -> bool:
    """Whether a JSON value that begins in this line does not end there."""
    text = line.decode(errors="replace")
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        return error.pos >= len(text) > 0
    except (ValueError, RecursionError):
        pass
    return False


def _json_values(path: Path, limit: int, *, in_array: bool) -> Iterator[RawRow]:
    """The elements of an array, or values one after another, decoded one at a time from a buffer that is filled as they are used up."""
    decoder = json.JSONDecoder()
    buffer, row = _Buffer(path, limit), 0
    end = "]" if in_array else ""
    try:
        if in_array:
            buffer.skip("[")
        while buffer.peek() != end:
            row += 1
            where = f"{path}:{buffer.line} (row {row})"
            value, size = buffer.decode(decoder, where)
            try:
                yield RawRow(where, too_large(where, limit) if size > limit else as_object(value, where))
            except RowError as error:
                yield RawRow(where, error)
            if in_array and not buffer.skip(",") and (following := buffer.peek()) != end:
                found = f"{following!r} after row {row}" if following else f"the end of the file after row {row}"
                raise _broken(f"{path}:{buffer.line}", f"not JSON: {found}")
    except RowError as error:
        yield RawRow(error.where, error)


def _broken(where: str, found: str) -> RowError:
    """What is wrong with a file from here on; the rows before it are rows all the same."""
    fix = "check that the file was written completely"
    return RowError(where, "unreadable", found=f"{found}; nothing after this can be read", fix=fix)


class _Buffer:
    """The text of a file from some place on, and the line that place is in."""

    def __init__(self, path: Path, limit: int) -> None:
        self.path, self.line, self._limit = path, 1, limit
        self._chunks = _chunks(path)
        self._text, self._at = "", 0

    def peek(self) -> str:
        """The next character that is not white space; "" at the end."""
        while True:
            self._advance(SPACE.match(self._text, self._at).end())
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._fill():
                return ""

    def skip(self, character: str) -> bool:
        """Go past the next character if it is this one."""
        if self.peek() != character:
            return False
        self._advance(self._at + 1)
        return True

    def decode(self, decoder: json.JSONDecoder, where: str) -> tuple[Any, int]:
        """The JSON value that starts here, and its bytes. More is read until it ends, each time twice as much: long rows stay linear."""
        self.peek()
        while True:
            try:
                value, end = decoder.raw_decode(self._text, self._at)
            except (ValueError, RecursionError) as error:
                held = len(self._text) - self._at
                if held <= self._limit and self._fill(held):
                    continue
                if held > self._limit and self._is_cut(error):
                    raise _broken(where, too_large(where, self._limit).found) from None
                raise _broken(where, f"not JSON: {self._reason(error)}") from None
            # A number may go on in what is not read yet; no row is one, so its type alone matters.
            size = _num_bytes(self._text, self._at, end, self._limit)
            self._advance(end)
            return value, size

    def _is_cut(self, error: Exception) -> bool:
        """Whether what is wrong may be the end of the text that is held."""
        if not isinstance(error, json.JSONDecodeError):
            return False
        return error.msg.startswith("Unterminated") or error.pos >= len(self._text) - LONGEST_WORD

    def _reason(self, error: Exception) -> str:
        if not isinstance(error, json.JSONDecodeError):
            return str(error)
        line = self.line + self._text.count("\n", self._at, error.pos)
        return f"{error.msg.removesuffix(' at')} at line {line}"

    def _advance(self, to: int) -> None:
        self.line += self._text.count("\n", self._at, to)
        self._at = to

    def _fill(self, at_least: int = 1) -> bool:
        """Read on; False at the end of the file."""
        more, size = [], 0
        for chunk in self._chunks:
            more.append(chunk)
            size += len(chunk)
            if size >= at_least:
                break
        self._text, self._at = self._text[self._at :] + "".join(more), 0
        return bool(more)


def _num_bytes(text: str, start: int, end: int, limit: int) -> int:
    """Bytes of text[start:end], counted only where they may be more than `limit`."""
    return len(text[start:end].encode("utf-8", "surrogatepass")) if 4 * (end - start) > limit else end - start


def _chunks(path: Path) -> Iterator[str]:
    """The file's text in pieces."""
    decoder, line = codecs.getincrementaldecoder("utf-8-sig")(), 1
    with _opened(path) as file:
        while True:
            data = file.read(READ_AT_ONCE)
            try:
                text = decoder.decode(data, final=not data)
            except UnicodeDecodeError as error:
                line += error.object[: error.start].count(b"\n")
                found = f"byte 0x{error.object[error.start]:02x}, which is not UTF-8"
                raise _broken(f"{path}:{line}", found) from None
            line += text.count("\n")
            if text:
                yield text
            if not data:
                return


def _csv(path: Path, limit: int, delimiter: str) -> Iterator[RawRow]:
    csv.field_size_limit(2**31 - 1)  # a row of a million characters is a row
    lines = _Decoded(path, limit)
    rows = csv.reader(lines, delimiter=delimiter, strict=True)
    header: list[str] = []
    while True:
        where, lines.num_bytes = f"{path}:{rows.line_num + 1}", 0
        try:
            values = next(rows, None)
        except (csv.Error, RowError) as error:
            found = error.found if isinstance(error, RowError) else f"not CSV: {error}"
            yield RawRow(where, _broken(where, found))
            return
        if values is None:
            return
        if undecoded := _undecoded(values):
            found = f"byte 0x{undecoded:02x}, which is not UTF-8"
            problem = RowError(where, "unreadable", found=found, expected="UTF-8 text", fix="save the file as UTF-8")
            yield RawRow(where, problem)
            if not header:
                return
        elif not header:
            header = values
            _check_header(header, where)
        elif len(values) == len(header):
            yield RawRow(where, dict(zip(header, values, strict=True)))
        elif values:
            found = f"{len(values)} values where the header has {len(header)} ({', '.join(header)})"
            fix = "quote values that hold the delimiter"
            yield RawRow(where, RowError(where, "unreadable", found=found, fix=fix))


class _Decoded:
    """Lines; bytes that are not UTF-8 are handed on as halves of surrogate pairs, so that reading goes on after their row.

    Attributes:
        num_bytes: of the lines since a row began, which is for the reader to say.
    """

    def __init__(self, path: Path, limit: int) -> None:
        self._path, self._limit, self._lines, self.num_bytes = path, limit, _lines(path, limit), 0

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        number, line = next(self._lines)
        self.num_bytes += len(line)
        if self.num_bytes > self._limit:
            raise too_large(f"{self._path}:{number}", self._limit)
        return line.decode("utf-8", "surrogateescape")


def _undecoded(values: Sequence[str]) -> int:
    """The first byte that `_decoded` could not decode; 0 where there is none."""
    for value in values:
        if not value.isascii() and (found := UNDECODED.search(value)):
            return ord(found[0]) - 0xDC00
    return 0


def _check_header(header: list[str], where: str) -> None:
    if len(set(header)) < len(header):
        found = f"a header that names a column twice: {', '.join(header)}"
        raise InputError(where, found=found, fix="rename one of them")


def _text(path: Path, limit: int, sample_by: SampleBy) -> Iterator[RawRow]:
    if sample_by == "line":
        for number, line in _lines(path, limit):
            if line.strip():
                yield _text_row(f"{path}:{number}", line, limit)
        return
    start, lines, size = 1, [], 0
    for number, line in _lines(path, limit):
        if sample_by == "paragraph" and not line.strip():
            if lines:
                yield _text_row(f"{path}:{start}", b"".join(lines), limit)
            lines, size = [], 0
            continue
        if not lines:
            start = number
        if size <= limit:  # of a text that is too large already, no more is held
            lines.append(line)
            size += len(line)
    if lines:
        yield _text_row(f"{path}:{start}", b"".join(lines), limit)


def _text_row(where: str, text: bytes, limit: int) -> RawRow:
    try:
        if len(text) > limit:
            raise too_large(where, limit)
        return RawRow(where, {"text": decode(text.rstrip(b"\r\n"), where)})
    except RowError as error:
        return RawRow(where, error)
