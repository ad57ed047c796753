"""A row of a dataset and where it came from, so that every later complaint can name it; and the complaint itself."""

import codecs
import json
from dataclasses import dataclass
from typing import Any, Literal

from qlora_jax.base.errors import InputError

Kind = Literal[
    "unreadable",
    "too large",
    "fields",
    "empty",
    "roles",
    "template",
    "too long",
    "nothing to learn",
    "duplicate",
    "token without a row",
]
"""What can be wrong with a row, as counted in reports."""

EXPECTED_LINE = "one JSON object on each line"


@dataclass(frozen=True)
class Row:
    """One object of a dataset. `where` is "file:line", counted from 1, or names file and row."""

    where: str
    fields: dict[str, Any]


class RowError(InputError):
    """A row that cannot be used: stops a run, or is skipped and counted (`data.bad_rows`)."""

    def __init__(self, where: str, kind: Kind, *, found: str, expected: str = "", fix: str = "") -> None:
        super().__init__(where, found=found, expected=expected, fix=fix)
        self.kind = kind

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles: worker processes hand them over."""
        return _row_error, (self.where, self.kind, self.found, self.expected, self.fix)


def _row_error(where: str, kind: Kind, found: str, expected: str, fix: str) -> RowError:
    return RowError(where, kind, found=found, expected=expected, fix=fix)


@dataclass(frozen=True)
class RawRow:
    """A row as its file has it. Lines of JSON are parsed by whoever tokenizes them, so that all cores share the work."""

    where: str
    content: bytes | dict[str, Any] | RowError
    """A line of JSON, a row read already, or what is wrong with it."""

    def parse(self) -> Row:
        """The row.

        Raises:
            RowError: the line is not UTF-8, not JSON or not an object.
        """
        if isinstance(self.content, RowError):
            raise self.content
        fields = parse_json(self.content, self.where) if isinstance(self.content, bytes) else self.content
        return Row(self.where, fields)


def parse_json(line: bytes, where: str) -> dict[str, Any]:
    """One line of JSON as an object.

    Raises:
        RowError: it is not UTF-8, not JSON or not an object.
    """
    text = decode(line, where)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: JSONDecodeError, or an integer of too many digits
        reason = (
            f"{error.msg.removesuffix(' at')} at column {min(error.pos, len(text.rstrip())) + 1}"
            if isinstance(error, json.JSONDecodeError)
            else error
        )
        fix = "write each row on one line, without commas or brackets around the rows; an array of rows is a .json file"
        raise RowError(where, "unreadable", found=f"not JSON: {reason}", expected=EXPECTED_LINE, fix=fix) from None
    return as_object(value, where)


def as_object(value: Any, where: str) -> dict[str, Any]:
    """`value`, if it is an object.

    Raises:
        RowError: it is not.
    """
    if not isinstance(value, dict):
        found = f"a JSON {type(value).__name__}"
        raise RowError(where, "unreadable", found=found, expected="a JSON object with the row's fields")
    return value


def decode(line: bytes, where: str) -> str:
    """Bytes as UTF-8 text.

    Raises:
        RowError: they are not.
    """
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        found = f"byte 0x{line[error.start]:02x} at column {error.start + 1}, which is not UTF-8"
        found += " but begins UTF-16" if line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else ""
        raise RowError(where, "unreadable", found=found, expected="UTF-8 text", fix="save the file as UTF-8") from None


def too_large(where: str, limit: int) -> RowError:
    """Return the complaint about a row of more than `limit` bytes."""
    fix = "check that rows end in line breaks; where such rows are meant, raise data.max_row_bytes"
    return RowError(
        where, "too large", found=f"a row of more than {limit:,} bytes (data.max_row_bytes)", expected="less", fix=fix
    )
