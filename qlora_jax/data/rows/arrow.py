"""Rows of Arrow tables: Parquet files and what `datasets` loads. They become what the same rows would be as JSON.

A column has one type for all of its rows, so an object has every key that any row's has, null where a row has none. Which nulls
the author wrote nobody can tell any more; a key with null is taken for one that is not there, as TRL's `remove_none_values` and
axolotl do. Values inside lists are kept. Columns of JSON (`datasets.Json`) say what was written, and so keep their nulls.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_jax.base.reading import open_file, reading
from qlora_jax.data.rows.row import RawRow, RowError, too_large

if TYPE_CHECKING:
    import pyarrow  # slow to import, and not needed for most

ROWS_AT_ONCE = 1024
BYTES_AT_ONCE = 2**27
"""Rows that are decoded together: so many, or fewer if they may have more bytes than this."""
UTF8_FIX = "write the text as UTF-8"

Mend = Callable[[Any], Any]


def parquet_rows(path: Path, max_row_bytes: int) -> Iterator[RawRow]:
    """Rows of a Parquet file.

    Raises:
        InputError: it is none, or is damaged.
    """
    import pyarrow.parquet

    with open_file(path) as opened, reading(path, "not a Parquet file, or a damaged one", fix="fetch it again"):
        file = pyarrow.parquet.ParquetFile(opened)
        yield from table_rows(str(path), file.schema_arrow, _row_groups(file, max_row_bytes), max_row_bytes)


def _row_groups(file: "pyarrow.parquet.ParquetFile", max_row_bytes: int) -> Iterator["pyarrow.RecordBatch | int"]:
    """Batches of rows; the number of rows instead, where a row is too large to be read at all."""
    for number in range(file.num_row_groups):
        group = file.metadata.row_group(number)
        if group.num_rows == 1 and group.total_byte_size > 2 * max_row_bytes:
            yield 1
            continue
        chunks = [group.column(column).total_uncompressed_size for column in range(group.num_columns)]
        # A dictionary may repeat its largest value in every row.
        largest = max(1, min(max_row_bytes, max(chunks, default=0)), group.total_byte_size // max(group.num_rows, 1))
        size = min(ROWS_AT_ONCE, max(1, BYTES_AT_ONCE // largest))
        yield from file.iter_batches(size, row_groups=[number])


def table_rows(
    name: str,
    schema: "pyarrow.Schema",
    batches: Iterable["pyarrow.RecordBatch | pyarrow.Table | int"],
    max_row_bytes: int,
) -> Iterator[RawRow]:
    """Rows of batches of one schema, counted from 1; a batch that is a number stands for so many rows that are too large."""
    mend = _mend_row(schema, is_decoded=False)
    number = 0
    for batch in batches:
        if isinstance(batch, int):
            for _ in range(batch):
                number += 1
                yield RawRow(where := f"{name}, row {number}", too_large(where, max_row_bytes))
            continue
        pieces = [batch]
        if batch.nbytes > max_row_bytes:
            pieces = [batch.slice(row, 1) for row in range(batch.num_rows)]
        for piece in pieces:
            for content in _contents(name, number, piece, max_row_bytes):
                number += 1
                yield RawRow(f"{name}, row {number}", mend(content) if isinstance(content, dict) else content)


def _contents(
    name: str, before: int, batch: "pyarrow.RecordBatch | pyarrow.Table", max_row_bytes: int
) -> list[dict[str, Any] | RowError]:
    """The rows of a batch as Python has them, `before` rows being before them."""
    where = f"{name}, row {before + 1}"
    if batch.num_rows == 1 and batch.nbytes > max_row_bytes:
        return [too_large(where, max_row_bytes)]
    try:
        return batch.to_pylist()
    except UnicodeDecodeError as error:
        if batch.num_rows == 1:
            found = f"byte 0x{error.object[error.start]:02x}, which is not UTF-8"
            return [RowError(where, "unreadable", found=found, expected="UTF-8 text", fix=UTF8_FIX)]
        rows = range(batch.num_rows)
        return [_contents(name, before + row, batch.slice(row, 1), max_row_bytes)[0] for row in rows]


def decoded_rows(
    name: str, schema: "pyarrow.Schema | None", rows: Iterable[dict[str, Any]], max_row_bytes: int
) -> Iterator[RawRow]:
    """Rows that `datasets` has made Python objects of, as it does when it streams.

    Args:
        schema: the types of the columns; None where nobody knows them before the end.
    """
    mend = _without_nulls if schema is None else _mend_row(schema, is_decoded=True)
    for number, fields in enumerate(rows, start=1):
        where = f"{name}, row {number}"
        yield RawRow(
            where, too_large(where, max_row_bytes) if _num_bytes(fields) > max_row_bytes else mend(dict(fields))
        )


def _num_bytes(value: Any) -> int:
    """Bytes of the texts in a value, keys aside."""
    if isinstance(value, str | bytes):
        return len(value) if isinstance(value, bytes) or value.isascii() else len(value.encode("utf-8", "replace"))
    if isinstance(value, dict):
        return sum(map(_num_bytes, value.values()))
    return sum(map(_num_bytes, value)) if isinstance(value, list) else 1


def _without_nulls(value: Any) -> Any:
    """As TRL's `remove_none_values`."""
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


def _mend_row(schema: "pyarrow.Schema", *, is_decoded: bool) -> Mend:
    return _struct({field.name: _mend(field.type, is_decoded) for field in schema})


def _mend(kind: "pyarrow.DataType", is_decoded: bool) -> Mend | None:
    """What takes the nulls of a type's values that Arrow put there; None where the type has none.

    Args:
        is_decoded: columns of JSON are objects already.
    """
    from pyarrow import types

    if getattr(kind, "extension_name", "") == "arrow.json":
        return None if is_decoded else _json_value
    if types.is_struct(kind):
        return _struct({kind.field(i).name: _mend(kind.field(i).type, is_decoded) for i in range(kind.num_fields)})
    if types.is_map(kind):
        return _map(_mend(kind.item_type, is_decoded))
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        inner = _mend(kind.value_type, is_decoded)
        return None if inner is None else lambda values: values and [_applied(inner, value) for value in values]
    return None


def _applied(mend: Mend | None, value: Any) -> Any:
    return value if mend is None or value is None else mend(value)


def _struct(mends: dict[str, Mend | None]) -> Mend:
    return lambda fields: {
        name: _applied(mends.get(name), value) for name, value in fields.items() if value is not None
    }


def _map(mend: Mend | None) -> Mend:
    """A map is a list of pairs in Python, and an object in JSON."""
    return lambda pairs: {
        key: _applied(mend, value)
        for key, value in (pairs.items() if isinstance(pairs, dict) else pairs)
        if value is not None
    }


def _json_value(text: Any) -> Any:
    try:
        return json.loads(text)
    except (TypeError, ValueError, RecursionError):
        return text
