"""The preview: what is supervised can be seen, with colours and without; and the numbers are those of the batches."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from rich.console import Console

from qlora_jax.__main__ import main
from qlora_jax.data import Example
from qlora_jax.data.preview import SUPERVISED_STYLE, decoded, histogram
from tests.data.test_corpus import chat, load, write
from tests.helpers import tiny


@pytest.fixture
def run_file(tmp_path: Path, tiny_folder: Path) -> Path:
    rows = [chat("hi", "hello"), chat("x" * 300, "hidden"), chat("a", "b" * 90), chat("hi", "hello")]
    write(tmp_path / "a.jsonl", rows)
    settings = {
        "model": {"name_or_path": str(tiny_folder)},
        "data": {"path": str(tmp_path / "a.jsonl"), "max_seq_length": 64, "bad_rows": "skip"},
        "training": {
            "output_dir": str(tmp_path / "out"),
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 1,
        },
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def test_the_command(run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "--config", str(run_file), "--rows", "2"]) == 0
    said = capsys.readouterr().out
    rows = run_file.parent / "a.jsonl"
    second = "⟦hello<|im_end|>⟧"
    assert f"{rows}: 3 rows (chat)" in said
    assert "1 cut to 64 tokens, 1 duplicates" in said
    assert f"skipped 1: nothing to learn, first {rows}:2" in said
    assert (
        f"{rows}:1: 28 tokens, 6 supervised\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n{second}\n" in said
    )
    assert f"{rows}:3: 64 tokens" in said and f"{rows}:4" not in said
    assert "tokens a row: median 28, 95 % have at most 60, the longest 64" in said
    assert "       28 to 31              2 ████████████████████████████████████████\n" in said
    # Two steps of two lines: 28 and 64 padded to 64, or packed 64 and 28 + 28.
    assert "padding: " in said and "without packing (chosen)" in said and "with packing\n" in said
    assert not (run_file.parent / "out").exists()


def test_the_commands_complaints(run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "--config", str(run_file), "data.bad_rows=stop"]) == 2
    assert "a.jsonl:2\n" in capsys.readouterr().err
    assert main(["data", "--config", str(run_file), "data.path=nowhere.jsonl"]) == 2
    assert "no such file" in capsys.readouterr().err


def test_in_colour(tmp_path: Path) -> None:
    corpus, _ = load(write(tmp_path / "a.jsonl", [chat("hi", "hello", "and?", "fin")]), tmp_path / "cache")
    text = decoded(corpus.rows[0], corpus.tokenizer, in_colour=True)
    styled = [text.plain[span.start : span.end] for span in text.spans if span.style == SUPERVISED_STYLE]
    assert styled == ["hello<|im_end|>", "fin<|im_end|>"]
    console = Console(file=io.StringIO(), force_terminal=True, color_system="standard")
    console.print(text)
    assert "\x1b[1;32mhello" in console.file.getvalue()


def test_long_rows_are_cut_and_characters_of_several_tokens_are_whole() -> None:
    tokenizer = tiny.make_tokenizer()
    ids = np.array(tokenizer("é" * 500)["input_ids"], np.int32)
    text = decoded(Example(ids, np.arange(1000) >= 3, "f:1"), tokenizer, in_colour=False).plain
    assert text.endswith(" … and 400 tokens more")
    assert text.count("é") == 299


def test_a_histogram_of_one_length() -> None:
    lines = histogram(np.full(7, 5)).splitlines()
    assert lines[0] == "tokens a row: median 5, 95 % have at most 5, the longest 5"
    assert lines[1:] == [f"{'5':>9} to 5 {'7':>15} {'█' * 40}"]


def test_a_histogram_begins_with_the_shortest() -> None:
    lines = histogram(np.array([81, 82, 82, 100])).splitlines()[1:]
    assert [line.split()[:4] for line in lines[:2]] == [["81", "to", "82", "3"], ["83", "to", "84", "0"]]
    assert [line.split()[:4] for line in lines[-1:]] == [["99", "to", "100", "1"]]
    assert len(lines) == 10


def test_padding_is_what_the_batches_have(tmp_path: Path) -> None:
    from qlora_jax.data.preview import padding_line

    rows = [chat("a", "b" * n) for n in (1, 60, 90, 20, 33, 7)]
    training = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 1}
    corpus, _ = load(write(tmp_path / "a.jsonl", rows), tmp_path / "cache", training=training, packing=True)
    shares = []
    for packing in (False, True):
        batches = corpus.batches(packing=packing)
        sizes = [batches.batch(step).input_ids.size for step in range(len(batches))]
        shares.append(1 - corpus.rows.lengths.sum() / sum(sizes))
    line = padding_line(corpus)
    assert f"{shares[0]:.1%} without packing, {shares[1]:.1%} with packing (chosen)" in line
    assert json.dumps(line)
