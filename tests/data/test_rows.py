"""Reading files of every kind: what is accepted, and that complaints name file, line, expectation and finding."""

import csv
import gzip
import io
import json
import pickle
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_jax.base.errors import InputError
from qlora_jax.config.data import DataSettings, SourceSettings
from qlora_jax.data import RawRow, Row, RowError, open_source
from qlora_jax.data.rows import files
from qlora_jax.data.rows.files import read_file


def write(folder: Path, content: bytes, name: str = "rows.jsonl") -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


def rows_of(path: Path, **options: Any) -> list[Row]:
    return [raw.parse() for raw in read_file(path, **options)]


def test_rows_keep_their_line_numbers_across_blank_lines(tmp_path: Path) -> None:
    path = write(tmp_path, b'\xef\xbb\xbf{"text": "a"}\n\n  \r\n{"text": "b\xe2\x80\xa8\xf0\x9f\x98\x80"}\r\n')
    assert rows_of(path) == [Row(f"{path}:1", {"text": "a"}), Row(f"{path}:4", {"text": "b\u2028😀"})]


@pytest.mark.parametrize(
    ("content", "line", "found"),
    [
        (b'{"text": "a"}\n{"text": "\xff"}\n', ":2", "byte 0xff at column 11, which is not UTF-8"),
        (b'{"text": "a"}\n\n{"text": \n', ":3", "not JSON"),
        (b'[\n{"text": "a"}\n]', ":1", "not JSON"),
        (b'{"text": "a"}\n["b"]\n', ":2", "a JSON list"),
        (b"null\n", ":1", "a JSON NoneType"),
        (b'{"n": ' + b"1" * 5000 + b"}", ":1", "not JSON"),
    ],
)
def test_bad_lines_are_named_and_the_others_are_read(tmp_path: Path, content: bytes, line: str, found: str) -> None:
    path = write(tmp_path, content)
    good, problems = [], []
    for raw in read_file(path):
        try:
            good.append(raw.parse())
        except RowError as error:
            problems.append(error)
    assert problems[0].where == f"{path}{line}"
    assert problems[0].kind == "unreadable"
    assert found in problems[0].found
    assert problems[0].expected
    assert len(good) == content.count(b'{"text": "a"}')


def test_a_complaint_travels_between_processes() -> None:
    error = RowError("f:1", "empty", found="a", expected="b", fix="c")
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.kind) == (str(error), "empty")


ROWS = [{"text": "a\nb", "n": 1}, {"text": 'quoted "b", and\u2028😀', "n": 2}, {"text": "c" * 9, "n": 3}]


def as_csv(delimiter: str) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, ["text", "n"], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(ROWS)
    return text.getvalue().encode()


def as_parquet() -> bytes:
    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), sink)
    return sink.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "wheres"),
    [
        ("a.jsonl", "\n".join(map(json.dumps, ROWS)).encode(), [":1", ":2", ":3"]),
        ("a.ndjson", "\n".join(map(json.dumps, ROWS)).encode(), [":1", ":2", ":3"]),
        ("a.json", json.dumps(ROWS).encode(), [":1 (row 1)", ":1 (row 2)", ":1 (row 3)"]),
        ("b.json", json.dumps(ROWS, indent=1).encode(), [":2 (row 1)", ":6 (row 2)", ":10 (row 3)"]),
        ("c.json", "\n".join(map(json.dumps, ROWS)).encode(), [":1", ":2", ":3"]),
        (
            "d.json",
            "\n".join(json.dumps(row, indent=1) for row in ROWS).encode(),
            [":1 (row 1)", ":5 (row 2)", ":9 (row 3)"],
        ),
        ("a.csv", as_csv(","), [":2", ":4", ":5"]),
        ("a.tsv", as_csv("\t"), [":2", ":4", ":5"]),
        ("a.parquet", as_parquet(), [", row 1", ", row 2", ", row 3"]),
    ],
)
def test_every_kind_of_file_has_the_same_rows(tmp_path: Path, name: str, content: bytes, wheres: list[str]) -> None:
    for path in [write(tmp_path, content, name)] + [write(tmp_path, gzip.compress(content), f"{name}.gz")] * (
        "parquet" not in name
    ):
        found = rows_of(path)
        assert [row.where for row in found] == [f"{path}{where}" for where in wheres]
        assert [row.fields["text"] for row in found] == [row["text"] for row in ROWS]
        assert [int(row.fields["n"]) for row in found] == [1, 2, 3]


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(
        st.dictionaries(st.text(max_size=3), st.text(max_size=30) | st.lists(st.integers()), max_size=3), max_size=9
    ),
    indent=st.sampled_from([None, 0, 3]),
    size=st.integers(1, 40),
)
def test_a_json_array_in_pieces_is_the_array(
    tmp_path_factory: pytest.TempPathFactory, rows: list, indent: int, size: int
) -> None:
    path = write(
        tmp_path_factory.mktemp("array"),
        json.dumps(rows, indent=indent, ensure_ascii=False).encode("utf-8", "replace"),
        "a.json",
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "READ_AT_ONCE", size)
        assert [row.fields for row in rows_of(path)] == json.loads(path.read_bytes())


@pytest.mark.parametrize(
    ("name", "content", "before", "where", "found"),
    [
        ("a.json", b'[{"a": 1},\n{"a": ]', 1, ":2 (row 2)", "not JSON"),
        ("a.json", b'[{"a": 1}\n{"a": 2}]', 1, ":2", "'{' after row 1"),
        ("a.json", b'[{"a": 1},\n{"a": 2}', 2, ":2", "the end of the file after row 2"),
        ("a.json", b'[{"a": 1},\n{"a": "\xff"}]', 0, ":2", "byte 0xff, which is not UTF-8"),
        ("a.csv", b'a,b\n1,2\n1,"2\n', 1, ":3", "not CSV"),
        ("a.csv", b"a,\xff\n1,2\n", 0, ":1", "byte 0xff, which is not UTF-8"),
        (
            "a.json",
            b'{\n "a": [1,\n',
            0,
            ":1 (row 1)",
            "not JSON: Expecting value at line 3; nothing after this can be read",
        ),
        (
            "a.json",
            b'{"a": 1\n}\n{"b',
            1,
            ":3 (row 2)",
            "not JSON: Unterminated string starting at line 3; nothing after",
        ),
        ("a.csv", b"a,a\n1,2\n", 0, ":1", "a header that names a column twice: a, a"),
        ("a.parquet", b"PAR1 not", 0, "", "not a Parquet file"),
        ("a.jsonl.gz", b"\x1f\x8b\x08\x00damaged", 0, "", "cannot be read"),
    ],
)
def test_damaged_files(tmp_path: Path, name: str, content: bytes, before: int, where: str, found: str) -> None:
    """The rows before the damage are there; then comes the complaint, and nothing more."""
    path = write(tmp_path, content, name)
    with pytest.raises(InputError) as error:
        rows_of(path)
    assert error.value.where == f"{path}{where}"
    assert found in error.value.found
    if isinstance(error.value, RowError):
        *good, last = read_file(path)
        assert isinstance(last.content, RowError)
        assert [isinstance(raw.content, dict) for raw in good] == [True] * before


def test_a_table_is_read_on_after_a_row_that_is_not_utf8(tmp_path: Path) -> None:
    path = write(tmp_path, 'a,b\n1,é\n1,"\n?"\n3,4\n'.encode().replace(b"?", b"\xe9"), "a.csv")
    good, bad, last = read_file(path)
    assert (good.content, last.content) == ({"a": "1", "b": "é"}, {"a": "3", "b": "4"})
    with pytest.raises(RowError, match=r"a.csv:3\n.*byte 0xe9, which is not UTF-8\n(?s:.*)save the file as UTF-8"):
        bad.parse()


def test_utf16_is_named(tmp_path: Path) -> None:
    path = write(tmp_path, '{"text": "a"}\n'.encode("utf-16"), "a.jsonl")
    with pytest.raises(RowError, match=r":1\n.*byte 0xff at column 1, which is not UTF-8 but begins UTF-16"):
        next(read_file(path)).parse()


def test_single_rows_of_arrays_and_tables_that_do_not_fit(tmp_path: Path) -> None:
    path = write(tmp_path, b'[1,\n{"a": 2}]', "a.json")
    bad, good = list(read_file(path))
    assert good.parse().fields == {"a": 2}
    with pytest.raises(RowError, match=r"a.json:1 \(row 1\)\n.*a JSON int"):
        bad.parse()
    path = write(tmp_path, b"a,b\n1,2\n3\n\n4,5\n", "a.csv")
    one, bad, two = list(read_file(path))
    assert (one.content, two.content) == ({"a": "1", "b": "2"}, {"a": "4", "b": "5"})
    with pytest.raises(RowError, match=r"a.csv:3\n.*1 values where the header has 2 \(a, b\)"):
        bad.parse()


def test_text_files_as_datasets_cuts_them(tmp_path: Path) -> None:
    path = write(tmp_path, b"one\r\ntwo\n\n  \nthree\nfour", "a.txt")
    expected = {
        "line": [("one", 1), ("two", 2), ("three", 5), ("four", 6)],
        "paragraph": [("one\r\ntwo", 1), ("three\nfour", 5)],
        "document": [("one\r\ntwo\n\n  \nthree\nfour", 1)],
    }
    for sample_by, rows in expected.items():
        assert rows_of(path, sample_by=sample_by) == [Row(f"{path}:{line}", {"text": text}) for text, line in rows]
    with pytest.raises(RowError, match=r"b.txt:2\n.*byte 0xff"):
        rows_of(write(tmp_path, b"a\n\xff\n", "b.txt"))


def source(path: Path | str, **settings: Any) -> list[RawRow]:
    return list(open_source(SourceSettings(path=str(path), **settings), DataSettings(path=str(path))).rows())


def test_a_folder_holds_all_its_files_in_order(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / ".hidden").mkdir()
    write(tmp_path, b'{"text": "b"}\n', "b.jsonl")
    write(tmp_path, b'[{"text": "a"}]', "a.json")
    write(tmp_path, b"text\nd\n", "deep/d.csv")
    write(tmp_path, b"not rows", "README.md")
    write(tmp_path, b"no", ".hidden/e.jsonl")
    assert [raw.parse().fields["text"] for raw in source(tmp_path)] == ["a", "b", "d"]


def test_sources_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        source(tmp_path / "none.jsonl")
    with pytest.raises(InputError, match="no such file"):
        source("data/none.jsonl")  # looks like owner/name, but nobody calls a dataset that
    with pytest.raises(InputError, match="a folder without a file of rows"):
        source(tmp_path)
    with pytest.raises(InputError, match=r"unknown kind(?s:.*)\.parquet"):
        source(write(tmp_path, b"", "a.docx"))
    with pytest.raises(InputError, match="name: 'en' for local files"):
        source(write(tmp_path, b"{}"), name="en")
