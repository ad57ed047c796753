"""How many bytes a row may have: a larger one is named, whatever kind of file it is in, and no more than so many are held of it."""

import gzip
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from qlora_jax.config.data import MAX_ROW_BYTES, DataSettings
from qlora_jax.data import RawRow, RowError, open_source
from qlora_jax.data.rows import files
from qlora_jax.data.rows.arrow import decoded_rows
from qlora_jax.data.rows.files import read_file

LIMIT = 100
SMALL, LARGE = {"text": "a" * 20}, {"text": "b" * 200}


def outcome(rows: list[RawRow]) -> list[str]:
    """`ok`, or what is wrong and where."""
    found = []
    for raw in rows:
        try:
            raw.parse()
        except RowError as error:
            assert error.kind == "too large" or "more than 100 bytes" in error.found
            found.append(error.where)
        else:
            found.append("ok")
    return found


def lines(*rows: dict[str, Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.jsonl", lines(SMALL, LARGE, SMALL), ["ok", ":2", "ok"]),
        ("b.jsonl", lines(SMALL) + b" " * 300 + b"\n" + lines(SMALL), ["ok", ":2", "ok"]),
        ("c.jsonl", lines(SMALL) + b"{" * 300, ["ok", ":2"]),  # without an end
        ("a.json", json.dumps([SMALL, LARGE, SMALL]).encode(), ["ok", ":1 (row 2)", "ok"]),
        ("b.json", b"[" + lines(SMALL) + b',{"text": "' + b"c" * 300, ["ok", ":2 (row 2)"]),
        ("c.json", lines(LARGE, SMALL), [":1", "ok"]),
        ("d.json", json.dumps(LARGE, indent=1).encode() + lines(SMALL), [":1 (row 1)", "ok"]),
        ("e.json", json.dumps([{"text": "é" * 60}], ensure_ascii=False).encode(), [":1 (row 1)"]),
        ("a.csv", b"text\n" + b"a" * 90 + b"\n" + b"b" * 200 + b"\nc\n", ["ok", ":3"]),
        ("b.csv", b"text,n\n" + b'"a\n",1\n' * 40, ["ok"] * 40),
        ("c.csv", b'text,n\n1,2\n1,"a\n' + b"a\n" * 60, ["ok", ":3"]),
        ("a.txt", b"a\n" + b"b" * 200 + b"\nc\n", ["ok", ":2", "ok"]),
    ],
)
@pytest.mark.parametrize("size", [16, 2**22])
def test_too_large_rows_are_named(
    tmp_path: Path, name: str, content: bytes, expected: list[str], size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "READ_AT_ONCE", size)
    for path, data in ((tmp_path / name, content), (tmp_path / f"{name}.gz", gzip.compress(content))):
        path.write_bytes(data)
        found = outcome(list(read_file(path, max_row_bytes=LIMIT)))
        if size < LIMIT and name.endswith(".json") and len(found) < len(expected):
            expected = expected[: len(found)]  # a row that was not read to its end: nothing after it can be
        assert found == [word if word == "ok" else f"{path}{word}" for word in expected]


def test_paragraphs_and_documents(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"a\na\n\n" + b"b\n" * 100 + b"\nc\n")
    assert outcome(list(read_file(path, "paragraph", LIMIT))) == ["ok", f"{path}:4", "ok"]
    assert outcome(list(read_file(path, "document", LIMIT))) == [f"{path}:1"]
    assert outcome(list(read_file(path, "document"))) == ["ok"]


@pytest.mark.parametrize("dictionary", [True, False])
def test_parquet(tmp_path: Path, dictionary: bool) -> None:
    path = tmp_path / "a.parquet"
    table = pyarrow.Table.from_pylist([SMALL, LARGE, SMALL] + [LARGE] * 3)
    pyarrow.parquet.write_table(table, path, use_dictionary=dictionary)
    expected = ["ok", f"{path}, row 2", "ok", *(f"{path}, row {n}" for n in (4, 5, 6))]
    assert outcome(list(read_file(path, max_row_bytes=LIMIT))) == expected
    nested = [{"messages": [{"role": "user", "content": text}] * 3} for text in ("a", "b" * 60)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(nested), path, row_group_size=1)
    assert outcome(list(read_file(path, max_row_bytes=LIMIT))) == ["ok", f"{path}, row 2"]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"text": "x" * 10**6}]), path, compression="zstd")
    assert outcome(list(read_file(path, max_row_bytes=LIMIT))) == [f"{path}, row 1"]


def test_streamed_rows() -> None:
    rows = [SMALL, {"messages": [{"content": "é" * 60}]}, SMALL]
    assert outcome(list(decoded_rows("hub", None, rows, LIMIT))) == ["ok", "hub, row 2", "ok"]


def test_the_setting_reaches_every_source(tmp_path: Path) -> None:
    import datasets

    (tmp_path / "a.jsonl").write_bytes(lines(SMALL, LARGE))
    datasets.Dataset.from_list([SMALL, LARGE]).save_to_disk(tmp_path / "saved")
    for path in (tmp_path / "a.jsonl", tmp_path / "saved"):
        kept = []
        for limit in (LIMIT, MAX_ROW_BYTES):
            data = DataSettings(path=str(path), max_row_bytes=limit)
            source = open_source(data.all_sources[0], data)
            kept.append(source.identity)
            found = outcome(list(source.rows()))
            assert (found[0], found[1] == "ok") == ("ok", limit != LIMIT)
        assert kept[0] != kept[1]


@pytest.mark.parametrize(
    ("name", "start"), [("a.jsonl.gz", b""), ("a.json.gz", b'[{"text": "'), ("a.csv.gz", b"text\n"), ("a.txt.gz", b"")]
)
def test_a_line_without_an_end_takes_no_memory(tmp_path: Path, name: str, start: bytes) -> None:
    """64 MiB in a little gzip."""
    path = tmp_path / name
    path.write_bytes(gzip.compress(start) + gzip.compress(b"a" * 2**20) * 64)
    tracemalloc.start()
    try:
        (row,) = list(read_file(path, max_row_bytes=2**20))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert "a row of more than 1,048,576 bytes (data.max_row_bytes)" in str(row.content)
    assert peak < 32 * 2**20
