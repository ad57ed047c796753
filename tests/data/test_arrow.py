"""Rows from Arrow (Parquet, saved datasets, the hub's as they arrive) are what the same rows from JSONL are, nested nulls included."""

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from qlora_jax.config.data import DataSettings
from qlora_jax.data import RowError, open_source
from qlora_jax.data.rows.arrow import decoded_rows
from qlora_jax.data.rows.files import read_file
from tests.data.test_corpus import load, write

datasets = pytest.importorskip("datasets")


def calling(name: str, arguments: Any, **parameters: str) -> dict[str, Any]:
    """A row with a tool and its call."""
    properties = {key: {"type": kind} for key, kind in parameters.items()}
    return {
        "messages": [
            {"role": "user", "content": "Go."},
            {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": name, "arguments": arguments}}]},
            {"role": "tool", "name": name, "content": "3"},
            {"role": "assistant", "content": "Done.", "weight": 1},
        ],
        "tools": [{"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": properties}}}],
    }  # fmt: skip


ROWS = [
    calling("draw", {"width": 3}, width="integer"),
    calling("write", {"label": "a", "places": [{"x": 1}, {"y": 2}]}, label="string"),
    {"messages": [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Ho."}], "tools": []},
]
AS_TEXT = [calling("draw", '{"width": 3, "label": null}', n="integer"), calling("write", '{"label": "a"}', m="string")]


def from_parquet(rows: list[dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    path = folder / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=2)
    return [raw.parse().fields for raw in read_file(path)]


def from_saved(rows: list[dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    datasets.Dataset.from_list(rows).save_to_disk(folder / "saved")
    data = DataSettings(path=str(folder / "saved"))
    return [raw.parse().fields for raw in open_source(data.all_sources[0], data).rows()]


def from_stream(rows: list[dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    path = folder / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    stream = datasets.load_dataset("parquet", data_files=str(path), split="train", streaming=True)
    schema = None if stream.features is None else stream.features.arrow_schema
    found = [raw.parse().fields for raw in decoded_rows("s", schema, iter(stream), 10**6)]
    assert found == [raw.parse().fields for raw in decoded_rows("s", None, iter(stream), 10**6)]
    return found


@pytest.mark.parametrize("read", [from_parquet, from_saved, from_stream])
@pytest.mark.parametrize("rows", [ROWS, AS_TEXT], ids=["objects", "texts"])
def test_nulls_that_arrow_put_there_are_not_the_rows(tmp_path: Path, read: Any, rows: list[dict[str, Any]]) -> None:
    assert any(None in _values(fields) for fields in pyarrow.Table.from_pylist(rows).to_pylist()) or rows is AS_TEXT
    assert read(rows, tmp_path) == json.loads(json.dumps(rows))


def _values(value: Any) -> list[Any]:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [value, *(leaf for item in inner for leaf in _values(item))] if inner else [value]


def test_as_trl_takes_nulls_out() -> None:
    from trl.trainer.utils import remove_none_values

    rows = pyarrow.Table.from_pylist(
        [*ROWS, {"tools": None, "messages": [{"role": "user", "content": [None, "a"]}]}][:3]
    ).to_pylist()
    rows.append({"a": None, "b": [None, {"c": None, "d": [None]}], "e": {}, "f": ""})
    found = [raw.parse().fields for raw in decoded_rows("s", None, rows, 10**6)]
    assert found == [remove_none_values(row) for row in rows]


def test_columns_of_json_keep_the_nulls_that_were_written(tmp_path: Path) -> None:
    """What `datasets` makes of values of several types: text in the file, and an object again here as there."""
    written = [calling("draw", {"width": 3, "label": None}), calling("write", {"label": "a"})]
    dataset = datasets.Dataset.from_list(written, on_mixed_types="use_json")
    dataset.to_parquet(tmp_path / "a.parquet")
    dataset.save_to_disk(tmp_path / "saved")
    stream = datasets.load_dataset("parquet", data_files=str(tmp_path / "a.parquet"), split="train", streaming=True)
    data = DataSettings(path=str(tmp_path / "saved"))
    for rows in (
        read_file(tmp_path / "a.parquet"),
        open_source(data.all_sources[0], data).rows(),
        decoded_rows("s", stream.features.arrow_schema, iter(stream), 10**6),
    ):
        assert [raw.parse().fields for raw in rows] == written


def test_maps_are_objects(tmp_path: Path) -> None:
    kind = pyarrow.map_(pyarrow.string(), pyarrow.int64())
    table = pyarrow.table({"arguments": pyarrow.array([[("a", 1), ("b", None)], None], kind), "n": [1, 2]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    found = [raw.parse().fields for raw in read_file(tmp_path / "a.parquet")]
    assert found == [{"arguments": {"a": 1}, "n": 1}, {"n": 2}]


def test_the_same_tokens_as_from_lines(tmp_path: Path) -> None:
    template = tmp_path / "t.jinja"
    template.write_text(
        "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}{% for m in messages %}{{ m.role + ':' }}"
        "{% for c in m.tool_calls or [] %}{{ c | tojson }}{% endfor %}{{ m.content }}|{% endfor %}"
    )
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    lines = write(tmp_path / "a.jsonl", ROWS)
    settings = {"chat_template": str(template), "loss_on": "all", "max_seq_length": 4096, "num_proc": 1}
    one, said = load(lines, tmp_path / "cache", **settings)
    other, also_said = load(tmp_path / "a.parquet", tmp_path / "cache", **settings)
    assert [row.input_ids.tolist() for row in one.rows] == [row.input_ids.tolist() for row in other.rows]
    assert said.replace("jsonl", "parquet") == also_said
    text = one.tokenizer.decode(other.rows[0].input_ids)
    assert '"arguments": {"width": 3}}' in text and "null" not in text


def test_text_that_is_not_utf8_is_one_bad_row(tmp_path: Path) -> None:
    offsets = pyarrow.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0\3\0\0\0")
    bad = pyarrow.Array.from_buffers(pyarrow.string(), 3, [None, offsets, pyarrow.py_buffer(b"a\xffc")])
    pyarrow.parquet.write_table(pyarrow.table({"text": bad}), tmp_path / "a.parquet")
    one, two, three = read_file(tmp_path / "a.parquet")
    assert (one.content, three.content) == ({"text": "a"}, {"text": "c"})
    with pytest.raises(RowError, match=r"a.parquet, row 2\n.*byte 0xff, which is not UTF-8"):
        two.parse()
