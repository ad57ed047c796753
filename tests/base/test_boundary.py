"""What comes from outside, reader by reader: things that are no files, damaged files, files that are somebody's own, foreign programs."""

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

import convert.model
from convert.files.folder import ModelFolder
from convert.jobs.job import refuse_existing
from convert.model import open_tokenizer
from qlora_jax.base import bounded
from qlora_jax.base.bounded import Limits
from qlora_jax.base.errors import InputError
from qlora_jax.config import TrainingSettings
from qlora_jax.data import RawRow
from qlora_jax.data.corpus import tokenize_rows
from qlora_jax.data.rows.files import read_file
from qlora_jax.data.rows.row import RowError
from qlora_jax.data.tokens.store import TokenStore
from qlora_jax.runtime.placement import one_device
from qlora_jax.training.about import check_complete, check_lines
from qlora_jax.training.checkpoint import Checkpoint, Checkpoints, DamagedError, open_checkpoint
from qlora_jax.training.output_dir import OutputDir
from qlora_jax.training.progress import Progress
from tests.helpers import hostile, tiny
from tests.helpers.mutations import spoil_path


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny.write_model(tmp_path / "model", num_hidden_layers=1)


@pytest.mark.parametrize("how", ["folder", "fifo", "zero", "loop", "dangling", "empty"])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_models_file_that_is_none(model: Path, name: str, how: str) -> None:
    spoil_path(model / name, how)
    with pytest.raises(InputError):
        open_tokenizer(str(model))
        ModelFolder(model)


@pytest.mark.parametrize("make", [lambda path: path.symlink_to(path.with_name("nowhere")), lambda path: path.symlink_to(path),
    lambda path: path.write_bytes(b""), os.mkfifo, Path.mkdir], ids=["dangling", "loop", "file", "fifo", "folder"])  # fmt: skip
def test_nothing_is_made_where_something_is(tmp_path: Path, make: Callable[[Path], object]) -> None:
    make(tmp_path / "out")
    with pytest.raises(InputError, match=r"something there already|leads to itself"):
        refuse_existing(tmp_path / "out")


def test_a_name_that_is_too_long(tmp_path: Path) -> None:
    for use in (refuse_existing, ModelFolder, lambda path: list(read_file(path.with_suffix(".jsonl")))):
        with pytest.raises(InputError, match="too long"):
            use(tmp_path / ("a" * 300))


# Rows


@pytest.mark.parametrize("place", [12, 30, -6])
def test_damaged_deflate_data(tmp_path: Path, place: int) -> None:
    data = bytearray(gzip.compress(b'{"text": "a"}\n' * 100, mtime=0))
    data[place] ^= 0xFF
    (tmp_path / "rows.jsonl.gz").write_bytes(data)
    with pytest.raises(InputError, match=r"rows.jsonl.gz\n  found:    cannot be read"):
        list(read_file(tmp_path / "rows.jsonl.gz"))


def test_parquet_whose_text_is_not_utf_8(tmp_path: Path) -> None:
    array = _text_array(b"\xff\xfe")
    pyarrow.parquet.write_table(pyarrow.table({"text": array}), tmp_path / "rows.parquet")
    (row,) = read_file(tmp_path / "rows.parquet")
    with pytest.raises(RowError, match="not UTF-8"):
        row.parse()


def _text_array(data: bytes) -> pyarrow.Array:
    offsets = pyarrow.py_buffer(np.array([0, len(data)], np.int32).tobytes())
    return pyarrow.StringArray.from_buffers(1, offsets, pyarrow.py_buffer(data))


# Foreign programs


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounded, "LIMITS", Limits(seconds=3, memory=2**29))


CHAT = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]}


def changed(model: Path, **parts: Any) -> Path:
    path = model / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | parts))
    return model


def test_a_tokenizers_regular_expression_that_panics_or_never_ends(model: Path, short: None) -> None:
    split = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    tokenizer = open_tokenizer(str(changed(model, pre_tokenizer=split)))
    with pytest.raises(InputError, match="tokenizer cannot read") as caught:
        tokenize_rows([RawRow("f:1", {"text": "fine"}), RawRow("f:2", {"text": "a" * 60 + "!"})], tokenizer, 64)
    assert caught.value.where == "f:2"


def test_a_tokenizers_normalizer_that_doubles(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    doubling = [{"type": "Replace", "pattern": {"String": "x"}, "content": "xx"}] * 50
    changed(model, normalizer={"type": "Sequence", "normalizers": doubling})
    monkeypatch.setattr(convert.model, "TRYING_SECONDS", 2.0)
    with pytest.raises(InputError, match=r"a tokenizer that cannot be loaded: it (needs more|did not end|crashed)"):
        open_tokenizer(str(model))


@pytest.mark.parametrize("trigger", ["y", "z"])
def test_a_row_that_is_too_much_for_its_template_is_named(model: Path, short: None, trigger: str) -> None:
    endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    tokenizer = open_tokenizer(str(model))
    tokenizer.chat_template = f"{{% if messages[0].content == 'y' %}}{endless}{{% endif %}}{tokenizer.chat_template}"
    row = {"messages": [{"role": "user", "content": trigger}, *CHAT["messages"][1:]]}
    rows = [RawRow("f:1", CHAT), RawRow("f:2", row)]
    if trigger == "z":
        assert len(tokenize_rows(rows, tokenizer, 64)) == 2
        return
    with pytest.raises(InputError, match=r"f:2\n  found:    a row that the chat template cannot write: it did not end"):
        tokenize_rows(rows, tokenizer, 64)


# A run's folder


@pytest.mark.parametrize("record", [
    [], {"starts": 3}, {"starts": [3]}, {"starts": {}}, {"state": ["finished"]}, {"id": 3}, {"starts": [{"config": 3}]},
    {"starts": [{"config": {"training": []}}]}, {"starts": [{"versions": []}]}, {"starts": [{"device": "x"}]},
    {"state": "finished", "starts": None},
], ids=str)  # fmt: skip
def test_a_run_json_of_other_types(tmp_path: Path, record: Any) -> None:
    (tmp_path / "run.json").write_text(json.dumps(record))
    folder = OutputDir(TrainingSettings(output_dir=tmp_path))
    assert folder.look() is False
    assert folder.record == {}


@pytest.mark.parametrize("kind", ["file", "dangling", "fifo", "loop"])
def test_an_output_folder_that_is_none(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "out"
    path.write_bytes(b"")
    if kind != "file":
        spoil_path(path, kind)
    with pytest.raises(InputError), OutputDir(TrainingSettings(output_dir=path)) as folder:
        folder.look()
        folder.claim(None)


@pytest.mark.parametrize(
    "name", ["run.json", "config.yaml", "metrics.jsonl", "samples.jsonl", "loss.png", "adapter", "best", "checkpoints"]
)
def test_an_output_folder_with_something_else_in_a_results_place(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name) if "." not in name else (tmp_path / name).mkdir()
    with pytest.raises(InputError), OutputDir(TrainingSettings(output_dir=tmp_path)) as folder:
        folder.look()
        folder.claim(None)
    assert (tmp_path / name).exists()


@pytest.fixture
def step(tmp_path: Path) -> Path:
    """A checkpoint in the place where `hostile.sum_again` looks for them."""
    checkpoints = Checkpoints(tmp_path / "runs" / "checkpoints", 1)
    about = {"config": {"lora": {"r": 2}}, "identity": {"data": "x"}, "position": {"epoch": 0, "row": 1}, "work": {"keep": 1},
        "progress": vars(Progress(step=2))}  # fmt: skip
    (lines := tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1, "loss": 1.0}\n')
    checkpoints.save(2, layers(), about, [lines])
    checkpoints.wait()
    return tmp_path / "runs" / "checkpoints" / "step-2"


def layers() -> dict[str, list[Any]]:
    return {"adapters": [one_device().put({"a": np.zeros((3, 2), np.float32)}, "device")] * 2}


def continue_from(step: Path) -> Checkpoint:
    """What a run does with a checkpoint, until it has its arrays."""
    found = open_checkpoint(step)
    check_complete(found.about, step)
    check_lines("metrics.jsonl", found.file("metrics.jsonl"), step)
    Progress.from_json(found.about["progress"])
    found.restore(layers())
    return found


ABOUT_CHANGES = [
    ("step", "2"), ("step", 3), ("step", 2.5), ("step", -1), ("step", None), ("format", None), ("format", 0.5), ("format", "1"),
    ("arrays", []),
    ("arrays", {}), ("arrays", {"x": 1}), ("arrays", {"adapters['a'] float32[3, 2]": "2"}),
    ("config", 3), ("config", {"lora": 3}), ("config", None),
    ("identity", []), ("identity", {"data": 3}), ("position", [1]), ("position", {"row": "x"}), ("work", 3), ("work", {"keep": [1]}),
    ("progress", {}), ("progress", []), ("progress", None), ("progress", {"step": 3}), ("progress", {"step": "2"}),
    ("progress", {"step": 2, "losses": 3}), ("progress", {"step": 2, "losses": ["x"]}), ("progress", {"step": 2, "other": 1}),
    ("progress", {"step": 2, "best_loss": "x"}), ("progress", {"step": 2, "tokens": 2**70}), ("progress", {"step": 2, "recent": [None]}),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value"), ABOUT_CHANGES, ids=lambda value: str(value)[:40])
def test_a_forged_checkpoint_whose_sums_agree(step: Path, key: str, value: Any) -> None:
    continue_from(step)
    about = json.loads((step / "about.json").read_text())
    (step / "about.json").write_text(json.dumps(about | {key: value}))
    hostile.sum_again(step.parents[2])
    with pytest.raises((InputError, DamagedError)):
        continue_from(step)


@pytest.mark.parametrize(
    "line", [b"\xff\n", b"[]\n", b"{}\n", b"3\n", b'{"step": "x"}\n', b'{"step": 1, "loss": "x"}\n', b"[" * 5000]
)
def test_forged_metrics(step: Path, line: bytes) -> None:
    (step / "metrics.jsonl").write_bytes(line)
    hostile.sum_again(step.parents[2])
    with pytest.raises(InputError, match=":1\n"):
        continue_from(step)


@pytest.mark.parametrize("name", ["arrays/state/_METADATA", "arrays/state/manifest.ocdbt"])
@pytest.mark.parametrize("data", [b"", b"{}", b"[]", b"\xff" * 50])
def test_forged_arrays(step: Path, name: str, data: bytes) -> None:
    (step / name).write_bytes(data)
    hostile.sum_again(step.parents[2])
    with pytest.raises((InputError, DamagedError)):
        continue_from(step)


def test_arrays_of_another_shape_are_not_loaded(step: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = open_checkpoint(step)
    other = {"adapters": [one_device().put({"a": np.zeros((3, 2), np.float32)}, "device")] * 3}
    found.about["arrays"]["adapters['a'] float32[3, 2]"] = 3
    with pytest.raises(InputError, match="arrays that cannot be read"):
        found.restore(other)


# Tokenized rows


@pytest.mark.parametrize("name", ["lengths", "supervised", "hashes", "where_ends"])
@pytest.mark.parametrize("change", [lambda x: x[:0], lambda x: x[:-1], lambda x: x.astype(np.float64), lambda x: x.reshape(1, -1),
    lambda x: np.append(x, x), lambda x: np.array(["a"] * len(x))], ids=["empty", "short", "float", "table", "long", "text"])  # fmt: skip
def test_tokenized_rows_with_another_array(
    tmp_path: Path, name: str, change: Callable[[np.ndarray], np.ndarray]
) -> None:
    store = write_store(tmp_path)
    np.save(store / f"{name}.npy", change(np.load(store / f"{name}.npy")))
    with pytest.raises(InputError):
        TokenStore(store)


@pytest.mark.parametrize("name", ["lengths.npy", "input_ids.bin", "loss_mask.bin", "wheres.bin", "report.json"])
@pytest.mark.parametrize(
    "data", [b"", b"x", b"[]", b"\x93NUMPY\x01\x00\xff\xff{'descr': 'O'}"], ids=["empty", "x", "list", "header"]
)
def test_tokenized_rows_with_another_file(tmp_path: Path, name: str, data: bytes) -> None:
    store = write_store(tmp_path)
    (store / name).write_bytes(data)
    with pytest.raises(InputError):
        TokenStore(store)


def write_store(place: Path) -> Path:
    np.save(place / "lengths.npy", np.array([2, 3]))
    np.save(place / "supervised.npy", np.array([1, 1]))
    np.save(place / "hashes.npy", np.array([1, 2], np.uint64))
    np.save(place / "where_ends.npy", np.array([3, 6]))
    (place / "input_ids.bin").write_bytes(np.arange(5, dtype=np.int32).tobytes())
    (place / "loss_mask.bin").write_bytes(bytes(5))
    (place / "wheres.bin").write_bytes(b"f:1f:2")
    report = {
        "num_read": 2,
        "num_truncated": 0,
        "num_split": 0,
        "num_duplicates": 0,
        "skipped": {},
        "first_skipped": {},
        "unused": {},
    }
    (place / "report.json").write_text(json.dumps(report))
    assert len(TokenStore(place)) == 2
    return place
