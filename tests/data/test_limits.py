"""What a model can take: tokens that it has a row for, and rows as long as its positions; said when it is opened, refused where used."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from transformers import PreTrainedTokenizerBase

from convert.model import load_tokenizer, open_model
from qlora_jax.__main__ import main
from qlora_jax.base.console import make_console
from qlora_jax.base.errors import EXIT_BAD_INPUT, InputError
from qlora_jax.commands import train
from qlora_jax.config import Config
from qlora_jax.data import ModelLimits, RawRow, padding_id
from qlora_jax.data.corpus import load_corpus, tokenize_rows
from qlora_jax.data.rows.row import RowError
from tests.convert.test_head import changed
from tests.helpers import tiny
from tests.helpers.tiny import NAMES

ROWS = 264
FIRST = ROWS  # the number of the first token without a row


def add_tokens(folder: Path, **special: str) -> PreTrainedTokenizerBase:
    """Fill the vocabulary up to the embedding's rows, and add two more: the embedding is not resized."""
    tokenizer = load_tokenizer(folder)
    tokenizer.add_tokens([f"<|fill{number}|>" for number in range(ROWS - len(tokenizer))])
    tokenizer.add_tokens(["<|new|>", "<|other|>"], special_tokens=True)
    if special:
        tokenizer.add_special_tokens(special)
    tokenizer.save_pretrained(folder)
    return load_tokenizer(folder)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tiny.write_model(tmp_path / "model")
    add_tokens(folder)
    return folder


def chat(user: str, assistant: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]}


def write_run(place: Path, rows: list[dict[str, Any]], **data: Any) -> Path:
    (place / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    settings = {
        "model": {"name_or_path": str(place / "model")},
        "data": {"path": str(place / "rows.jsonl"), "max_seq_length": 64, "preview_rows": 0, **data},
        "training": {"output_dir": str(place / "out"), "max_steps": 1, "per_device_train_batch_size": 2},
    }
    (place / "run.yaml").write_text(yaml.safe_dump(settings))
    return place / "run.yaml"


def refused(run: Path, capsys: pytest.CaptureFixture[str], command: str, *overrides: str) -> str:
    """The message, and nothing was made."""
    config = ["--config", str(run), *overrides]
    capsys.readouterr()
    assert (train.main(config) if command == "train" else main(["data", *config])) == EXIT_BAD_INPUT
    assert not (run.parent / "out" / "adapter").exists()
    return capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------------ tokens


@pytest.mark.parametrize("command", ["train", "data"])
@pytest.mark.parametrize(("user", "assistant"), [("a <|new|>", "b"), ("a", "b<|new|>")], ids=["prompt", "answer"])
def test_a_row_with_a_token_without_a_row_is_refused_by_name(
    model: Path, capsys: pytest.CaptureFixture[str], command: str, user: str, assistant: str
) -> None:
    """transformers: IndexError."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    with pytest.raises(IndexError):
        transformers.AutoModelForCausalLM.from_pretrained(model)(torch.tensor([[5, FIRST]]))
    run = write_run(model.parent, [chat("a", "b"), chat(user, assistant)])
    message = refused(run, capsys, command)
    assert "rows.jsonl:2" in message
    assert f"token '<|new|>' is number {FIRST}, and the model's embedding has {ROWS} rows (0 to {ROWS - 1})" in message
    assert "resize_token_embeddings" in message


def test_such_rows_can_be_skipped(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(model.parent, [chat("a", "b"), chat("<|new|>", "c")], bad_rows="skip", packing=True)
    assert main(["data", "--config", str(run)]) == 0
    assert "skipped 1: token without a row, first" in capsys.readouterr().out


def test_a_token_beyond_the_cut_is_not_used(model: Path) -> None:
    tokenizer = load_tokenizer(model)
    rows = [RawRow("f:1", chat("a", "b" * 40 + "<|new|>"))]
    (example,) = tokenize_rows(rows, tokenizer, 32, vocab_size=ROWS)
    assert example.input_ids.max() < ROWS
    with pytest.raises(RowError, match="number 264"):
        tokenize_rows(rows, tokenizer, 64, vocab_size=ROWS)


def test_the_first_of_several_is_named(model: Path) -> None:
    rows = [RawRow("f:1", {"text": "ab<|other|>c<|new|><|other|>"})]
    with pytest.raises(RowError, match=r"'<\|other\|>' is number 265"):
        tokenize_rows(rows, load_tokenizer(model), 64, vocab_size=ROWS)


def test_unused_tokens_are_a_remark(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines: list[str] = []
    open_model(str(model), log=lines.append)
    (line,) = lines
    assert f"2 of the tokenizer's {ROWS + 2} tokens have no row in the embedding, which has {ROWS}: " in line
    assert f"'<|new|>' ({FIRST}), '<|other|>' ({FIRST + 1}); rows and prompts" in line
    assert main(["generate", "--model", str(model), "--prompt", "ab", "--max-new-tokens", "2"]) == 0
    assert "have no row" in capsys.readouterr().err


def test_a_smaller_tokenizer_is_nothing_to_speak_of(tmp_path: Path) -> None:
    lines: list[str] = []
    open_model(str(tiny.write_model(tmp_path / "model")), log=lines.append)
    assert lines == []


@pytest.mark.parametrize("command", ["generate", "samples"])
def test_a_prompt_is_refused(model: Path, capsys: pytest.CaptureFixture[str], command: str) -> None:
    """A sample prompt before anything is read, not when the first step is done."""
    if command == "generate":
        assert main(["generate", "--model", str(model), "--prompt", "a<|other|>"]) == EXIT_BAD_INPUT
        message = capsys.readouterr().err
    else:
        run = write_run(model.parent, [chat("a", "b")])
        message = refused(run, capsys, "train", "training.sample_prompt=a<|other|>")
    assert "the prompt 'a<|other|>'" in message and "is number 265" in message


def test_a_template_that_writes_such_a_token_is_refused(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (model / "chat_template.jinja").write_text("{% for m in messages %}<|new|>{{ m.content }}<|im_end|>{% endfor %}")
    run = write_run(model.parent, [chat("a", "b")], bad_rows="skip")
    message = refused(run, capsys, "data")
    assert "chat template (model)" in message and "number 264" in message


def test_an_eos_without_a_row_is_refused_where_it_is_learned(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny.write_model(tmp_path / "model")
    add_tokens(tmp_path / "model", eos_token="<|new|>")
    run = write_run(tmp_path, [{"text": "abc"}], bad_rows="skip")
    message = refused(run, capsys, "data")
    assert "what goes around each row of format `text`" in message and "'<|new|>' is number 264" in message
    write_run(tmp_path, [chat("a", "b")])  # where turns end with <|im_end|> nothing uses it
    assert main(["data", "--config", str(run)]) == 0
    assert "eos_token among them" in capsys.readouterr().out


def test_compare_refuses_too(model: Path) -> None:
    tokenizer = load_tokenizer(model)
    with pytest.raises(InputError, match="number 264"):
        tokenize_rows([RawRow("f:1", {"text": "a<|new|>"})], tokenizer, 64, vocab_size=ROWS)


def test_padding_has_a_row(tmp_path: Path) -> None:
    folder = tiny.write_model(tmp_path / "model")
    tokenizer = add_tokens(folder, pad_token="<|new|>")
    assert tokenizer.pad_token_id == FIRST and padding_id(tokenizer, ROWS) == 257 == tokenizer.eos_token_id
    assert padding_id(tokenizer, None) == FIRST
    tokenizer.eos_token = "<|other|>"
    assert padding_id(tokenizer, ROWS) == 0
    (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(chat('a' * n, 'b'))}\n" for n in (1, 40)))
    config = Config.model_validate(
        yaml.safe_load(write_run(tmp_path, [chat("a", "b"), chat("a" * 40, "b")]).read_text())
    )
    corpus = load_corpus(
        config, load_tokenizer(folder), tmp_path / "cache", make_console(), ModelLimits(vocab_size=ROWS)
    )
    assert corpus.batches().batch(0).input_ids.max() < ROWS


# ------------------------------------------------------------------------------------------------------------------ lengths


def test_longer_rows_than_positions_are_remarked_upon(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tiny.write_model(tmp_path / "model", max_position_embeddings=48)
    tokenizer = load_tokenizer(folder)
    tokenizer.model_max_length = 40
    tokenizer.save_pretrained(folder)
    run = write_run(tmp_path, [chat("a", "b"), chat("a" * 30, "b"), chat("a" * 20, "b")])
    assert main(["data", "--config", str(run)]) == 0
    out = " ".join(capsys.readouterr().out.split())
    lengths = [len(tokenizer.apply_chat_template(chat("a" * n, "b")["messages"])["input_ids"]) for n in (1, 30, 20)]
    assert [sum(length > limit for length in lengths) for limit in (48, 40)] == [1, 2]
    assert (
        "1 of 3 rows are longer than the model's 48 tokens (max_position_embeddings in config.json), the longest" in out
    )
    assert f"the longest {max(lengths)}: " in out
    assert "2 of 3 rows are longer than the model's 40 tokens (model_max_length in tokenizer_config.json)" in out
    assert "data.max_seq_length=48 cuts rows there" in out
    assert main(["data", "--config", str(run), "data.max_seq_length=40", "data.bad_rows=skip"]) == 0
    assert "longer than the model's" not in capsys.readouterr().out


def test_a_model_max_length_that_nobody_chose_says_nothing(tmp_path: Path) -> None:
    folder = tiny.write_model(tmp_path / "model")
    assert load_tokenizer(folder).model_max_length > 1e9
    assert open_model(str(folder)).limits == ModelLimits(
        vocab_size=ROWS, lengths=(("max_position_embeddings in config.json", 512),)
    )


# --------------------------------------------------------------------------------------------- what else a model folder has


def test_a_head_and_frequencies_that_are_not_what_the_config_says(tmp_path: Path) -> None:
    frequencies = "model.layers.1.self_attn.rotary_emb.inv_freq"
    right = (10000.0 ** -(np.arange(0, 16, 2) / 16)).astype(np.float32)

    def change(tensors: dict[str, np.ndarray]) -> None:
        tensors[NAMES.lm_head] = tensors[NAMES.embedding] * 2
        tensors[frequencies.replace("1", "0")] = right
        tensors[frequencies] = right / 2

    lines: list[str] = []
    folder = changed(tiny.write_model(tmp_path / "model"), change)
    (folder / "modeling_llama.py").write_text("raise SystemExit")
    open_model(str(folder), log=lines.append)
    head, rotary, code = lines
    assert "lm_head.weight is another matrix than the embedding" in head
    assert f"{frequencies} holds other frequencies" in rotary
    assert "modeling_llama.py: neither used nor carried" in code
