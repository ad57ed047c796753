"""Reading rows from files: JSON lines, JSON arrays, CSV, Parquet and plain text. One row at a time, whatever the file's size.

Bytes are split into lines before they are decoded: only \\n ends a line (JSON strings may hold U+2028), and bad UTF-8 has a line.
"""

import codecs
import csv
import gzip
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from qlora_jax.base.errors import InputError
from qlora_jax.data.rows.row import RawRow, RowError, as_object, decode

SampleBy = Literal["line", "paragraph", "document"]
BOM = b"\xef\xbb\xbf"
READ_AT_ONCE = 2**22
"""Bytes of a JSON array held at a time, unless a single row is longer."""
PARQUET_ROWS_AT_ONCE = 1024
SPACE = re.compile(r"[ \t\r\n]*")
UNDECODED = re.compile("[\udc80-\udcff]")

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".txt")


def is_data_file(path: Path) -> bool:
    """Whether the name says that it holds rows; all but Parquet may be gzipped."""
    return _suffix(path) in SUFFIXES


def read_file(path: Path, sample_by: SampleBy = "line") -> Iterator[RawRow]:
    """The rows of one file, by its suffix. A row that cannot be read is handed on as a `RowError`, and reading goes on where it can.

    Args:
        path: .jsonl or .ndjson: one object a line, blank lines skipped. .json: an array of objects, or objects one after another. .csv,
            .tsv: a header, then rows of text. .parquet. .txt: rows with the field `text`. All but Parquet may end in .gz as well.
        sample_by: what makes a row of a text file, as in `datasets`: a line, a paragraph (blank lines between) or all of it.

    Raises:
        InputError: the file cannot be read at all.
    """
    readers: dict[str, Callable[[Path], Iterator[RawRow]]] = {
        ".jsonl": _json_lines,
        ".ndjson": _json_lines,
        ".json": _json,
        ".csv": lambda path: _csv(path, ","),
        ".tsv": lambda path: _csv(path, "\t"),
        ".parquet": _parquet,
        ".txt": lambda path: _text(path, sample_by),
    }
    try:
        yield from readers[_suffix(path)](path)
    except (OSError, EOFError) as error:  # gzip raises both for a damaged file
        raise InputError(path, found=f"cannot be read: {error}", fix="check the file and its permissions") from None


def _suffix(path: Path) -> str:
    name = path.with_suffix("") if path.suffix == ".gz" else path
    return "" if path.suffix == ".gz" and name.suffix == ".parquet" else name.suffix.lower()


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(number from 1, line with its end), without a byte order mark at the start."""
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            yield number, line.removeprefix(BOM) if number == 1 else line


def _json_lines(path: Path) -> Iterator[RawRow]:
    for number, line in _lines(path):
        if line.strip():
            yield RawRow(f"{path}:{number}", line)


def _json(path: Path) -> Iterator[RawRow]:
    """An array of objects; a file that begins with anything else is taken for lines of JSON, as it often is, if its first line is whole."""
    first = next((line.strip() for _, line in _lines(path) if line.strip()), b"")
    if first.startswith(b"["):
        yield from _json_values(path, in_array=True)
    else:
        yield from (_json_values(path, in_array=False) if _goes_on(first) else _json_lines(path))


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


def _json_values(path: Path, *, in_array: bool) -> Iterator[RawRow]:
    """The elements of an array, or values one after another, decoded one at a time from a buffer that is filled as they are used up."""
    decoder = json.JSONDecoder()
    buffer, row = _Buffer(path), 0
    end = "]" if in_array else ""
    try:
        if in_array:
            buffer.skip("[")
        while buffer.peek() != end:
            row += 1
            where = f"{path}:{buffer.line} (row {row})"
            value = buffer.decode(decoder, where)
            try:
                yield RawRow(where, as_object(value, where))
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

    def __init__(self, path: Path) -> None:
        self.path, self.line = path, 1
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

    def decode(self, decoder: json.JSONDecoder, where: str) -> Any:
        """The JSON value that starts here. More is read until it ends, each time twice as much, so that long rows stay linear."""
        self.peek()
        while True:
            try:
                value, end = decoder.raw_decode(self._text, self._at)
            except (ValueError, RecursionError) as error:
                if self._fill(len(self._text) - self._at):
                    continue
                raise _broken(where, f"not JSON: {self._reason(error)}") from None
            # A number may go on in what is not read yet; no row is one, so its type alone matters.
            self._advance(end)
            return value

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


def _chunks(path: Path) -> Iterator[str]:
    """The file's text in pieces."""
    decoder, line = codecs.getincrementaldecoder("utf-8-sig")(), 1
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
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


def _csv(path: Path, delimiter: str) -> Iterator[RawRow]:
    csv.field_size_limit(2**31 - 1)  # a row of a million characters is a row
    rows = csv.reader(_decoded(path), delimiter=delimiter, strict=True)
    header: list[str] = []
    while True:
        where = f"{path}:{rows.line_num + 1}"
        try:
            values = next(rows, None)
        except csv.Error as error:
            yield RawRow(where, _broken(where, f"not CSV: {error}"))
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


def _decoded(path: Path) -> Iterable[str]:
    """Lines; bytes that are not UTF-8 are handed on as halves of surrogate pairs, so that reading goes on after their row."""
    return (line.decode("utf-8", "surrogateescape") for _, line in _lines(path))


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


def _parquet(path: Path) -> Iterator[RawRow]:
    import pyarrow  # slow to import, and not needed for most
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(PARQUET_ROWS_AT_ONCE):
                for fields in batch.to_pylist():
                    number += 1
                    yield RawRow(f"{path}, row {number}", fields)
    except pyarrow.ArrowException as error:
        raise InputError(path, found=f"not a Parquet file, or a damaged one: {error}", fix="fetch it again") from None


def _text(path: Path, sample_by: SampleBy) -> Iterator[RawRow]:
    if sample_by == "line":
        for number, line in _lines(path):
            if line.strip():
                yield _text_row(f"{path}:{number}", line.rstrip(b"\r\n"))
        return
    start, lines = 1, []
    for number, line in _lines(path):
        if sample_by == "paragraph" and not line.strip():
            if lines:
                yield _text_row(f"{path}:{start}", b"".join(lines).rstrip(b"\r\n"))
            lines = []
            continue
        if not lines:
            start = number
        lines.append(line)
    if lines:
        yield _text_row(f"{path}:{start}", b"".join(lines).rstrip(b"\r\n"))


def _text_row(where: str, text: bytes) -> RawRow:
    try:
        return RawRow(where, {"text": decode(text, where)})
    except RowError as error:
        return RawRow(where, error)
