"""Rows of a JSONL file, each with the line it came from, so that every later complaint can name it."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_jax.errors import InputError

EXPECTED_LINE = "one JSON object on each line"


@dataclass(frozen=True)
class Row:
    """One JSON object of a dataset. `where` is "file:line", counted from 1."""

    where: str
    fields: dict[str, Any]


def read_rows(path: str | Path) -> list[Row]:
    """Read a JSONL file; blank lines are skipped, a byte order mark at the start is accepted.

    Raises:
        InputError: the file is missing or has no rows, or a line is not UTF-8, not JSON or not an object.
    """
    path = Path(path)
    if not path.is_file():
        found = "a folder" if path.is_dir() else "no such file"
        raise InputError(path, found=found, expected=f"a JSONL file: {EXPECTED_LINE}", fix="check data.path")
    rows = []
    with path.open(
        "rb"
    ) as lines:  # bytes: only \n ends a line (JSON strings may hold U+2028), and bad UTF-8 has a line
        for number, line in enumerate(lines, start=1):
            where = f"{path}:{number}"
            text = _decode(line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line, where)
            if text.strip():
                rows.append(Row(where, _parse(text, where)))
    if not rows:
        raise InputError(
            path, found="no rows", expected=EXPECTED_LINE, fix="check that the file was written completely"
        )
    return rows


def _decode(line: bytes, where: str) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        found = f"byte 0x{line[error.start]:02x} at column {error.start + 1}, which is not UTF-8"
        raise InputError(where, found=found, expected="UTF-8 text", fix="save the file as UTF-8") from None


def _parse(text: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: JSONDecodeError, or an integer of too many digits
        raise InputError(
            where,
            found=f"not JSON: {error}",
            expected=EXPECTED_LINE,
            fix="write each row on one line, without commas or brackets around the rows",
        ) from None
    if not isinstance(value, dict):
        raise InputError(where, found=f"a JSON {type(value).__name__}", expected=EXPECTED_LINE)
    return value
