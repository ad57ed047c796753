"""Splits of local copies of hub datasets: the rows that `datasets.load_dataset` gives for the same folder, and refusals by name."""

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from qlora_jax.base.errors import InputError
from qlora_jax.config.data import DataSettings, SourceSettings
from qlora_jax.data import Source, open_source
from tests.data.test_corpus import chat, load, write

datasets = pytest.importorskip("datasets")


def make(folder: Path, files: dict[str, Any]) -> Path:
    """Files of rows, by suffix; a text is written as it is. Rows say which file they are of."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = [{"text": f"{name} {row}"} for row in range(content)] if isinstance(content, int) else []
        if isinstance(content, str):
            path.write_text(content)
        elif path.suffix == ".parquet":
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        elif path.suffix == ".csv":
            path.write_text("text\n" + "".join(row["text"] + "\n" for row in rows))
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def opened(path: Path, split: str | None = None, **settings: Any) -> Source:
    settings |= {} if split is None else {"split": split}
    return open_source(SourceSettings(path=str(path), **settings), DataSettings(path=str(path)))


def texts(source: Source) -> list[str]:
    return [raw.parse().fields["text"] for raw in source.rows()]


HUB_COPY = {
    "data/train-00000-of-00002.parquet": 4,
    "data/train-00001-of-00002.parquet": 2,
    "data/test-00000-of-00001.parquet": 2,
}
README = """---
configs:
- config_name: main
  default: true
  data_files:
  - split: train
    path: [one/*.jsonl, two/b.jsonl]
  - split: heldout
    path: two/c.jsonl
- config_name: other
  data_files: "two/*.jsonl"
---
# Rows
"""
CONFIGURED = {"README.md": README, "one/a.jsonl": 3, "two/b.jsonl": 2, "two/c.jsonl": 2}

FOLDERS = {
    "hub copy": (HUB_COPY | {"README.md": "# Rows", "LICENSE.txt": "no rows"}, ["train", "test", "train+test", "all"]),
    "slices": (HUB_COPY, ["train[:50%]", "train[1:-1]", "train[-2:]", "train[:10]", "test[:50%]+train[4:]"]),
    "any split in data/": ({"data/train-00000-of-00001.parquet": 2, "data/random-00000-of-00001.parquet": 3}, ["random"]),
    "file names": ({"my-train.jsonl": 2, "dev.jsonl": 1, "x_test_0.jsonl": 2, "notes.jsonl": 3}, ["train", "validation", "test"]),
    "folder names": ({"train/a.jsonl": 2, "train/b.jsonl": 1, "eval/a.jsonl": 3}, ["train", "test"]),
    "csv": ({"training.csv": 2, "valid.csv": 1}, ["train", "validation"]),
    "no names": ({"a.jsonl": 2, "deep/b.jsonl": 1, ".hidden/c.jsonl": 3, "__pycache__/d.jsonl": 2}, ["train", "train[1:]"]),
    "no names, other files": ({"a.jsonl": 2, "LICENSE.txt": "mine", "dataset_infos.json": "{}"}, ["train"]),
    "configurations": (CONFIGURED, ["train", "heldout", "train[:60%]"]),
    "test alone": ({"test.jsonl": 3}, ["test"]),
}  # fmt: skip


@pytest.mark.parametrize("kind", FOLDERS)
def test_a_folder_has_the_splits_that_datasets_finds(tmp_path: Path, kind: str) -> None:
    files, specs = FOLDERS[kind]
    folder = make(tmp_path / "rows", files)
    for spec in specs:
        expected = datasets.load_dataset(str(folder), split=spec, cache_dir=str(tmp_path / "cache"))
        source = opened(folder, spec)
        assert texts(source) == texts(source) == expected["text"], spec


def test_a_configuration_by_name(tmp_path: Path) -> None:
    folder = make(tmp_path / "rows", CONFIGURED)
    expected = datasets.load_dataset(str(folder), "other", split="train", cache_dir=str(tmp_path / "cache"))
    assert texts(opened(folder, name="other")) == expected["text"]
    with pytest.raises(InputError, match=r"'none' not found(?s:.*)main(?s:.*)data.name"):
        opened(folder, name="none")
    (folder / "README.md").write_text(README.replace("  default: true\n", ""))
    with pytest.raises(InputError, match=r"one among the available configs: \['main', 'other'\]"):
        opened(folder)
    (folder / "README.md").write_text(README.replace('"two/*.jsonl"', '"two/*.jsonl"\n  field: rows'))
    with pytest.raises(InputError, match=r"README.md\n.*a configuration with field, which is not read here"):
        opened(folder, name="other")


@pytest.mark.parametrize(
    ("files", "split", "found"),
    [
        (HUB_COPY, "nonsense[:10%]", r"no split 'nonsense'\n.*of train, test"),
        (HUB_COPY, "train+tset", "no split 'tset'"),
        (HUB_COPY, "train[:10%", "split 'train\\[:10%'"),
        (HUB_COPY, "train[a:b]", "split 'train\\[a:b\\]'"),
        ({"test.jsonl": 3}, "train", r"no split 'train'\n.*of test"),
        ({"a.jsonl": 3}, "test", r"no split 'test'\n.*of train"),
        ({"train.jsonl": 3, "test.csv": 2}, "train", "cannot load: .*same data file format"),
        (
            {"train.jsonl.zst": "?", "test.jsonl": 2},
            "test",
            r"1 files of a kind that is not read here: train.jsonl.zst",
        ),
    ],
)
def test_what_a_folder_has_not_is_refused_by_name(
    tmp_path: Path, files: dict[str, Any], split: str, found: str
) -> None:
    folder = make(tmp_path / "rows", files)
    with pytest.raises(InputError, match=found):
        opened(folder, split)


def test_a_file_is_a_train_split(tmp_path: Path) -> None:
    path = make(tmp_path, {"test.jsonl": 10}) / "test.jsonl"
    whole = datasets.load_dataset("json", data_files=str(path), cache_dir=str(tmp_path / "cache"))
    assert list(whole) == ["train"]
    for spec in ("train", "train[:30%]", "train[-1:]"):
        expected = datasets.load_dataset("json", data_files=str(path), split=spec, cache_dir=str(tmp_path / "cache"))
        assert texts(opened(path, spec)) == expected["text"]
    with pytest.raises(InputError, match=r"no split 'test'\n.*of train"):
        opened(path, "test[:10%]")
    rows = [raw.where for raw in opened(path, "train[8:]").rows()]
    assert rows == [f"{path}:9", f"{path}:10"]


def test_what_save_to_disk_wrote(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_list([{"text": str(n)} for n in range(10)])
    datasets.DatasetDict({"train": rows, "test": rows.select([3])}).save_to_disk(tmp_path / "both")
    rows.save_to_disk(tmp_path / "one")
    assert texts(opened(tmp_path / "both", "train[:20%]+test")) == ["0", "1", "3"]
    assert texts(opened(tmp_path / "one", "train[-2:]")) == ["8", "9"]
    for folder, split in (("both", "nonsense"), ("one", "test")):
        with pytest.raises(InputError, match=f"no split '{split}'\n.*of train"):
            opened(tmp_path / folder, split)
    with pytest.raises(InputError, match=r"name: 'en'(?s:.*)no configurations"):
        opened(tmp_path / "one", name="en")


def test_six_rows_train_and_two_evaluate(tmp_path: Path) -> None:
    folder = tmp_path / "rows"
    (folder / "data").mkdir(parents=True)
    for split, count in (("train", 6), ("test", 2)):
        rows = [chat(f"{split} {n}", "fine") for n in range(count)]
        datasets.Dataset.from_list(rows).to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")
    corpus, said = load(folder, tmp_path / "cache", split="train", eval_split="test")
    assert (len(corpus.rows), len(corpus.held_out)) == (6, 2)
    assert f"{folder} [train]: 6 rows (chat)" in said and f"{folder} [test]: 2 rows (chat)" in said
    corpus, said = load(folder, tmp_path / "cache")
    assert len(corpus.rows) == 6 and f"{folder}: not read: split test\n" in said
    with pytest.raises(InputError, match="no split 'nonsense'"):
        load(folder, tmp_path / "cache", split="nonsense[:10%]")


def test_held_out_rows_in_a_file_have_no_split_of_their_own(tmp_path: Path) -> None:
    folder = make(tmp_path / "rows", HUB_COPY)
    held_out = write(tmp_path / "mine.jsonl", [{"text": "a"}, {"text": "b"}])
    corpus, _ = load(folder, tmp_path / "cache", split="train[:50%]", eval_path=str(held_out))
    assert (len(corpus.rows), len(corpus.held_out)) == (3, 2)
    with pytest.raises(InputError, match=r"mine.jsonl\n.*no split 'test'(?s:.*)data.eval_split"):
        load(folder, tmp_path / "cache", eval_path=str(held_out), eval_split="test")


def test_settings_that_no_source_reads_are_refused(tmp_path: Path) -> None:
    rows = write(tmp_path / "a.jsonl", [{"text": "a"}])
    with pytest.raises(InputError, match=r"data.sample_by\n.*paragraph\n.*no source has text files"):
        load(rows, tmp_path / "cache", sample_by="paragraph")
    (tmp_path / "b.txt").write_text("one\n\ntwo\n")
    sources = [{"path": str(rows)}, {"path": str(tmp_path / "b.txt")}]
    assert len(load(None, tmp_path / "cache", sources=sources, sample_by="paragraph")[0].rows) == 3
