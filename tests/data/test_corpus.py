"""From settings to batches through everything between: sources, the cache, skipping and stopping, held-out rows, the hub."""

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from rich.console import Console
from transformers import PreTrainedTokenizerFast

from qlora_jax.base.errors import InputError
from qlora_jax.config import Config
from qlora_jax.data import IGNORED_LABEL
from qlora_jax.data.corpus import Corpus, load_corpus
from qlora_jax.data.tokens import workers
from tests.helpers import tiny
from tests.helpers.children import REPOSITORY, environment


def chat(*contents: str) -> dict[str, Any]:
    roles = ["user", "assistant"] * len(contents)
    return {"messages": [{"role": role, "content": text} for role, text in zip(roles, contents, strict=False)]}


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8"
    )
    return path


def load(
    path: Path | str | None,
    cache: Path,
    tokenizer: PreTrainedTokenizerFast | None = None,
    training: dict | None = None,
    **data: Any,
) -> tuple[Corpus, str]:
    """A corpus and what was said on the way."""
    data = data if path is None else {"path": str(path), **data}
    config = Config.model_validate(
        {"model": {"name_or_path": "m"}, "data": data, "training": {"output_dir": "out", **(training or {})}}
    )
    said = io.StringIO()
    return load_corpus(
        config, tokenizer or tiny.make_tokenizer(), cache, Console(file=said, width=1000, markup=False, emoji=False)
    ), said.getvalue()


def wheres(rows: Any) -> list[str]:
    return [Path(row.where).name for row in rows]


def test_a_corpus_is_kept_and_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.jsonl", [chat("a", "b"), chat("c", "d", "e", "f")])
    first, said = load(path, tmp_path / "cache")
    tokens, supervised = first.rows.lengths.sum(), first.rows.supervised.sum()
    assert said == f"{path}: 2 rows (chat), {tokens} tokens, {supervised / tokens:.0%} supervised\n"
    assert first.config.data.format == "chat"
    assert (first.config.data.chat_template, first.config.data.loss_on) == ("model", "assistant")
    with monkeypatch.context() as patch:
        patch.setattr(workers, "_chunks", lambda rows: pytest.fail("tokenized again"))
        again, repeated = load(path, tmp_path / "cache")
        assert repeated == said
        for one, other in zip(first.rows, again.rows, strict=True):
            assert np.array_equal(one.input_ids, other.input_ids)
            assert np.array_equal(one.loss_mask, other.loss_mask)
            assert one.where == other.where
        with pytest.raises(pytest.fail.Exception):
            load(path, tmp_path / "cache", max_seq_length=9)
    write(path, [chat("a", "b")])
    os.utime(path, ns=(1, 1))
    assert len(load(path, tmp_path / "cache")[0].rows) == 1  # the file changed
    for entry in (tmp_path / "cache").iterdir():
        (entry / "lengths.npy").write_bytes(b"damaged")
    assert len(load(path, tmp_path / "cache")[0].rows) == 1
    assert not list((tmp_path / "cache").glob(".writing*"))


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [chat("a", "b")])
    (tmp_path / "file").write_text("")
    corpus, _ = load(path, tmp_path / "file" / "cache")
    assert len(corpus.rows) == 1


@pytest.mark.parametrize("num_proc", [1, 2])
def test_the_number_of_processes_changes_nothing(
    tmp_path: Path, num_proc: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "ROWS_AT_ONCE", 16)
    started = []
    pool = workers.Pool
    monkeypatch.setattr(workers, "Pool", lambda recipe, number: started.append(number) or pool(recipe, number))
    rows = [chat("q" * (i % 7 + 1), f"answer {i}") if i % 50 else {"broken": i} for i in range(400)]
    path = write(tmp_path / "a.jsonl", [{"messages": chat("a", "b")["messages"]}, *rows[1:]])
    corpus, _ = load(path, tmp_path / "cache", num_proc=num_proc, bad_rows="skip", format="chat")
    assert started == [2] * (num_proc == 2)
    assert wheres(corpus.rows) == [f"a.jsonl:{i + 1}" for i in range(400) if i % 50 or i == 0]
    assert corpus.rows.stores[0].report.skipped == {"fields": 7}
    expected, _ = load(path, tmp_path / "other", num_proc=1, bad_rows="skip", format="chat")
    assert all(np.array_equal(a.input_ids, b.input_ids) for a, b in zip(corpus.rows, expected.rows, strict=True))
    batches, same = corpus.batches(), expected.batches()
    assert len(batches) == len(same) == 400 // 16 + 0
    assert all(np.array_equal(batches.batch(i).input_ids, same.batch(i).input_ids) for i in range(len(batches)))


def test_a_process_that_dies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "ROWS_AT_ONCE", 4)
    path = write(tmp_path / "a.jsonl", [chat("a", "b")] * 100)
    pool_type = workers.Pool

    def killed(recipe: Any, number: int) -> workers.Pool:
        pool = pool_type(recipe, number)
        for child in pool._children:
            child._process.kill()
        return pool

    monkeypatch.setattr(workers, "Pool", killed)
    with pytest.raises(
        InputError, match=r"rows from .*a.jsonl:\d+ to (?s:.*)killed, as if out of memory(?s:.*)data.num_proc"
    ):
        load(path, tmp_path / "cache", num_proc=2)
    assert not list((tmp_path / "cache").iterdir())


BAD = [
    chat("fine", "fine"),
    '{"messages": ',
    {"other": 1},
    chat("", "a"),
    {"messages": [{"role": "poet", "content": "a"}]},
    {"messages": [{"role": "user", "content": "a"}]},
    chat("fine", "fine"),
    chat("long", "x" * 600),
    chat("x" * 600, "hidden"),
]


def named(name: str) -> dict[str, Any]:
    user, assistant = chat("a", "b")["messages"]
    return {"messages": [user | {"name": name}, assistant]}


ROWS_APART = {
    "malformed": ('{"messages": [}', "not JSON: Expecting value at column 15", "bad_rows"),
    "cut off": ('{"messages":', "not JSON: Expecting value at column 13", "bad_rows"),
    "not an object": ("[1]", "a JSON list", "bad_rows"),
    "another kind": ({"text": "hi"}, "no `messages`", "bad_rows"),
    "empty": (chat("a", ""), "`messages[1].content` is an empty string", "bad_rows"),
    "unknown role": ({"messages": [{"role": "poet", "content": "a"}]}, "the role 'poet'", "bad_rows"),
    "not alternating": ({"messages": [*chat("a")["messages"], *chat("a", "b")["messages"]]}, "must alternate", "bad_rows"),
    "no answer": (chat("a"), "no assistant turn", "bad_rows"),
    "long": (chat("a", "b" * 99), "tokens\n  expected: at most 40 (data.max_seq_length)", "too_long"),
    "a million characters": (chat("a" * 10**6, "b"), "expected: at most 40 (data.max_seq_length)", "too_long"),
    "nothing left to learn": (chat("a" * 10**6, "b"), "none of the first 40 (data.max_seq_length)", "bad_rows"),
    "repeated": (chat("a", "b"), "the same tokens as", "duplicates"),
    "half a character": (named("\ud800"), "half of a surrogate pair, '\\ud800', at character 0", "bad_rows"),
}  # fmt: skip


@pytest.mark.parametrize("kind", ROWS_APART)
def test_every_bad_row_is_named_and_so_is_the_setting_that_leaves_it_out(tmp_path: Path, kind: str) -> None:
    bad, found, setting = ROWS_APART[kind]
    path = write(tmp_path / "a.jsonl", [chat("a", "b"), bad])
    template = tmp_path / "t.jinja"
    template.write_text(
        "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('turns must alternate') }}"
        "{% endif %}{{ m.name }}[{{ m.content }}{% endfor %}{% if add_generation_prompt %}[{% endif %}"
    )
    settings = {"format": "chat", "chat_template": str(template), "max_seq_length": 40}
    stop = "truncate" if kind == "nothing left to learn" else "stop"
    with pytest.raises(InputError) as error:
        load(path, tmp_path / "cache", **{"duplicates": "stop", "too_long": stop} | settings)
    assert str(error.value).startswith(f"{path}:2\n")
    assert found in str(error.value)
    assert str(error.value).endswith(f"leave such rows out with data.{setting}=skip")
    corpus, said = load(path, tmp_path / "cache", **{setting: "skip"} | settings)
    assert wheres(corpus.rows) == ["a.jsonl:1"]
    assert "skipped 1: " in said and f"first {path}:2: " in said


def test_rows_of_several_kinds_of_trouble_name_each_setting(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [chat("a", "b"), chat("a", "b"), chat("a", ""), chat("a", "b" * 99)])
    with pytest.raises(InputError) as error:
        load(path, tmp_path / "cache", duplicates="stop", too_long="stop", max_seq_length=60)
    names = ("bad_rows", "duplicates", "too_long")
    assert all(f"data.{name}=skip" in str(error.value) for name in names)
    with pytest.raises(InputError) as error:
        load(write(tmp_path / "b.jsonl", [chat("a", "b")] * 3), tmp_path / "cache", duplicates="stop")
    assert "data.duplicates=skip" in str(error.value) and "data.bad_rows" not in str(error.value)


def test_a_source_that_begins_with_damage(tmp_path: Path) -> None:
    """What its rows are, the first that can be read tell, however late they come."""
    path = write(tmp_path / "a.jsonl", ["{"] * 25 + [chat("a", "b")])
    corpus, said = load(path, tmp_path / "cache", bad_rows="skip")
    assert wheres(corpus.rows) == ["a.jsonl:26"] and "skipped 25: unreadable" in said
    with pytest.raises(InputError, match=r"a.jsonl:1\n.*not JSON"):
        load(path, tmp_path / "cache")


def test_a_chunk_of_bad_rows_alone(tmp_path: Path) -> None:
    """With a tokenizer that says its offsets, and one whose tokens tile the text."""
    path = write(tmp_path / "a.jsonl", [*[{"text": ""}] * workers.ROWS_AT_ONCE, {"text": "good"}])
    offsets = tiny.make_tokenizer()
    offsets.backend_tokenizer.normalizer = tokenizers.normalizers.NFC()
    for name, tokenizer in (("bytes", tiny.make_tokenizer()), ("offsets", offsets)):
        corpus, _ = load(path, tmp_path / name, tokenizer, bad_rows="skip")
        assert wheres(corpus.rows) == [f"a.jsonl:{workers.ROWS_AT_ONCE + 1}"]


def test_a_template_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_text("{% for m in messages %}\n{% endif %}")
    path = write(tmp_path / "a.jsonl", [chat("a", "b")])
    with pytest.raises(InputError, match=r"chat template \(.*t.jinja\)\n.*line 2: .*endif(?s:.*)data.chat_template"):
        load(path, tmp_path / "cache", chat_template=str(tmp_path / "t.jinja"))


def test_bad_rows_are_named_together(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", BAD)
    with pytest.raises(InputError) as error:
        load(path, tmp_path / "cache", format="chat", too_long="truncate")
    message = str(error.value)
    for line, found in (
        (2, "not JSON"),
        (3, "no `messages`"),
        (4, "empty string"),
        (5, "'poet'"),
        (6, "no assistant turn"),
        (9, "none of the first 512"),
    ):
        assert f"{path}:{line}: " in message
        assert found in message
    assert "data.bad_rows=skip" in message
    assert not list((tmp_path / "cache").iterdir())


def test_bad_rows_are_skipped_and_counted(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", BAD)
    corpus, said = load(path, tmp_path / "cache", format="chat", bad_rows="skip")
    assert wheres(corpus.rows) == ["a.jsonl:1", "a.jsonl:7", "a.jsonl:8"]
    assert "3 rows (chat)" in said
    assert "1 cut to 512 tokens, 1 duplicates" in said
    for kind, line in (("unreadable", 2), ("fields", 3), ("empty", 4), ("roles", 5), ("nothing to learn", 6)):
        assert f"{kind}, first {path}:{line}: " in said
    assert "skipped 2: nothing to learn" in said
    report = load(path, tmp_path / "cache", format="chat", bad_rows="skip")[0].rows.stores[0].report
    assert sum(report.skipped.values()) == 6 == report.num_read - 3


def test_what_to_do_with_long_rows_and_duplicates(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [chat("a", "b"), chat("x", "y" * 99), chat("a", "b"), chat("a", "c")])
    skipped, said = load(path, tmp_path / "cache", max_seq_length=60, too_long="skip", duplicates="skip")
    assert wheres(skipped.rows) == ["a.jsonl:1", "a.jsonl:4"]
    assert "skipped 1: too long, first " in said and "skipped 1: duplicate, first " in said and "1 duplicates" in said
    with pytest.raises(InputError, match=r"a.jsonl:2\n.*tokens\n.*at most 60"):
        load(path, tmp_path / "cache", max_seq_length=60, too_long="stop")
    with pytest.raises(InputError, match=r"a.jsonl:3\n.*the same tokens as .*a.jsonl:1"):
        load(path, tmp_path / "cache", duplicates="stop")
    kept, said = load(path, tmp_path / "cache")
    assert len(kept.rows) == 4 and "1 duplicates" in said


def test_nothing_is_left(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no rows"):
        load(write(tmp_path / "empty.jsonl", []), tmp_path / "cache")
    path = write(tmp_path / "a.jsonl", [{"messages": []}] * 3)
    with pytest.raises(InputError, match=r"3 rows, and every one was skipped:\n    3 empty, the first: .*a.jsonl:1"):
        load(path, tmp_path / "cache", bad_rows="skip")
    with pytest.raises(InputError, match="not JSON"):
        load(write(tmp_path / "b.jsonl", ["{", "}"]), tmp_path / "cache", bad_rows="skip")


def test_a_file_that_ends_too_early_is_used_up_to_there(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps([chat("a", "b"), chat("c", "d"), chat("e", "f")], indent=1)[:-40])
    corpus, said = load(path, tmp_path / "cache", bad_rows="skip")
    assert len(corpus.rows) == 2
    assert f"skipped 1: unreadable, first {path}:26 (row 3): not JSON" in said
    with pytest.raises(InputError, match=r"a.json:26 \(row 3\)\n.*not JSON(?s:.*)written completely"):
        load(path, tmp_path / "cache")


def test_max_rows(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [chat("a", str(i)) for i in range(9)])
    assert len(load(path, tmp_path / "cache", max_rows=4)[0].rows) == 4
    assert len(load(path, tmp_path / "cache")[0].rows) == 9


def test_a_fraction_is_held_out(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [chat("a", str(i)) for i in range(40)])
    splits = [load(path, tmp_path / "cache", eval_fraction=0.1, training={"seed": seed})[0] for seed in (0, 0, 1)]
    held_out = [wheres(split.held_out) for split in splits]
    assert [len(rows) for rows in held_out] == [4, 4, 4]
    assert held_out[0] == held_out[1] != held_out[2]
    assert sorted(held_out[0] + wheres(splits[0].rows)) == sorted(f"a.jsonl:{i + 1}" for i in range(40))
    assert sum(batch.num_tokens for batch in splits[0].eval_batches()) == splits[0].held_out.supervised.sum()
    with pytest.raises(InputError, match="at least two rows"):
        load(write(tmp_path / "b.jsonl", [chat("a", "b")]), tmp_path / "cache", eval_fraction=0.5)


def test_held_out_rows_that_are_training_rows(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [chat("a", "b"), chat("c", "d")])
    other = write(tmp_path / "b.jsonl", [chat("c", "d"), chat("e", "f")])
    corpus, said = load(path, tmp_path / "cache", eval_path=str(other))
    assert wheres(corpus.held_out) == ["b.jsonl:1", "b.jsonl:2"]
    assert "1 of 2 held-out rows are training rows too" in said


def test_sources_are_mixed_by_weight(tmp_path: Path) -> None:
    """Each epoch has a source's share, and none of its rows again before all of them came."""
    many = write(tmp_path / "many.jsonl", [chat("m", str(i)) for i in range(60)])
    few = write(tmp_path / "few.jsonl", [{"instruction": "f", "output": str(i)} for i in range(20)])
    sources = [{"path": str(many), "weight": 1}, {"path": str(few), "weight": 3}]
    training = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 5, "num_train_epochs": 3}
    corpus, _ = load(None, tmp_path / "cache", sources=sources, training=training)
    assert [source.format for source in corpus.config.data.sources] == ["chat", "alpaca"]
    batches = corpus.batches()
    assert len(batches) == 12
    names = {row.input_ids.tobytes(): row.where for row in corpus.rows}
    lines = [ids.tobytes() for step in range(12) for ids in batches.batch(step).input_ids.reshape(20, -1)]
    seen = [next(where for tokens, where in names.items() if line.startswith(tokens)) for line in lines]
    epochs = [seen[i : i + 80] for i in (0, 80, 160)]
    for epoch in epochs:
        assert sum(names_of.count("few.jsonl") for names_of in epoch) == 60
        assert {epoch.count(where) for where in set(epoch) if "few" in where} == {3}
    from_many = [where for where in seen if "many" in where]
    assert len(from_many) == len(set(from_many)) == 60
    assert epochs[0] != epochs[1]


def test_packed_batches_hold_the_same_rows(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [chat("a" * (i % 9 + 1), str(i)) for i in range(60)])
    training = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 1}
    packed = load(path, tmp_path / "cache", packing=True, max_seq_length=256, training=training)[0]
    alone = load(path, tmp_path / "cache", packing=False, max_seq_length=256, training=training)[0]
    rows = []
    for batch in (packed.batches().batch(step) for step in range(len(packed.batches()))):
        assert batch.input_ids.shape == (1, 2, 256)
        lines = (array.reshape(2, -1) for array in (batch.input_ids, batch.labels, batch.segment_ids, batch.positions))
        for ids, labels, segments, positions in zip(*lines, strict=True):
            for segment in range(1, segments.max() + 1):
                here = np.flatnonzero(segments == segment)
                assert np.array_equal(here, np.arange(here[0], here[-1] + 1)), "a row lies in one piece"
                assert np.array_equal(positions[here], np.arange(len(here)))
                assert labels[here[0]] == IGNORED_LABEL, "no label where the row before would predict it"
                rows.append((ids[here].tobytes(), (labels[here] != IGNORED_LABEL).tobytes()))
    assert sorted(rows) == sorted((row.input_ids.tobytes(), row.loss_mask.tobytes()) for row in alone.rows)
    total = sum(batch.num_tokens for batch in packed.eval_batches()) if packed.held_out else 0
    assert total == 0
    held_out = load(path, tmp_path / "cache", packing=True, eval_fraction=0.5)[0]
    assert sum(batch.num_tokens for batch in held_out.eval_batches()) == held_out.held_out.supervised.sum()


# Templates


def base_tokenizer() -> PreTrainedTokenizerFast:
    """A base model's: BOS before every text, no chat template."""
    from tests.data.test_tokenization import make_tokenizer

    return make_tokenizer(bos=True)


def test_a_base_model_gets_a_template_and_is_told(tmp_path: Path) -> None:
    tokenizer = base_tokenizer()
    corpus, said = load(
        write(tmp_path / "a.jsonl", [chat("hi", "hello", "and?", "fin")]), tmp_path / "cache", tokenizer
    )
    assert said.startswith("chat template: llama-2, because the model has none (data.chat_template chooses another)\n")
    (row,) = corpus.rows
    assert tokenizer.decode(row.input_ids) == "<s>[INST] hi [/INST] hello</s>[INST] and? [/INST] fin</s>"
    assert tokenizer.decode(row.input_ids[row.loss_mask]) == " hello</s> fin</s>"
    assert tokenizer.chat_template == corpus.template.text  # for generation
    assert corpus.config.data.chat_template == "llama-2"

    alpaca = write(
        tmp_path / "b.jsonl",
        [{"instruction": "Add.", "input": "1 1", "output": "2"}, {"instruction": "Go.", "output": "Gone."}],
    )
    tokenizer = base_tokenizer()
    corpus, said = load(alpaca, tmp_path / "cache", tokenizer)
    assert "chat template: alpaca" in said
    texts = [tokenizer.decode(row.input_ids) for row in corpus.rows]
    assert texts[0] == (
        "<s>Below is an instruction that describes a task, paired with an input that provides further context. Write a response that "
        "appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Input:\n1 1\n\n### Response:\n2</s>"
    )
    assert texts[1] == (
        "<s>Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nGo.\n\n### Response:\nGone.</s>"
    )
    assert [tokenizer.decode(row.input_ids[row.loss_mask]) for row in corpus.rows] == ["2</s>", "Gone.</s>"]


def test_guanaco_llama2_1k_on_a_base_model_is_its_own_text(tmp_path: Path) -> None:
    text = "<s>[INST] Me gradué hace poco. [/INST] Ésto es ... </s><s>[INST] and? [/INST] fin </s>"
    tokenizer = base_tokenizer()
    corpus, _ = load(write(tmp_path / "a.jsonl", [{"text": text}]), tmp_path / "cache", tokenizer)
    (row,) = corpus.rows
    assert (
        tokenizer.decode(row.input_ids)
        == "<s>[INST] Me gradué hace poco. [/INST] Ésto es ...</s>[INST] and? [/INST] fin</s>"
    )
    assert tokenizer.decode(row.input_ids[row.loss_mask]) == " Ésto es ...</s> fin</s>"
    verbatim, _ = load(tmp_path / "a.jsonl", tmp_path / "cache", base_tokenizer(), format="text")
    (row,) = verbatim.rows
    assert tokenizer.decode(row.input_ids) == text  # neither BOS nor EOS a second time
    assert row.loss_mask.tolist() == [False] + [True] * (len(row.input_ids) - 1)


def test_a_template_by_path_and_by_name(tmp_path: Path) -> None:
    rows = write(tmp_path / "a.jsonl", [chat("hi", "hello")])
    template = tmp_path / "mine.jinja"
    template.write_text(
        "{{ bos_token }}{% for m in messages %}{{ m.role[0] }}:{{ m.content }}{{ eos_token }}{% endfor %}"
    )
    tokenizer = base_tokenizer()
    corpus, _ = load(rows, tmp_path / "cache", tokenizer, chat_template=str(template))
    assert tokenizer.decode(corpus.rows[0].input_ids) == "<s>u:hi</s>a:hello</s>"
    assert corpus.config.data.chat_template == str(template)
    with pytest.raises(InputError, match=r"data.chat_template\n.*none.jinja(?s:.*)chatml"):
        load(rows, tmp_path / "cache", chat_template="none.jinja")
    with pytest.raises(InputError, match="the model has no chat template"):
        load(rows, tmp_path / "cache", base_tokenizer(), chat_template="model")
    tokenizer.chat_template = {"rag": "x"}
    with pytest.raises(InputError, match="no usable chat template"):
        load(rows, tmp_path / "cache", tokenizer)


def test_the_ends_of_a_template_are_checked(tmp_path: Path) -> None:
    rows = write(tmp_path / "a.jsonl", [chat("hi", "hello")])
    tokenizer = base_tokenizer()
    tokenizer.chat_template = (
        "{{ bos_token + bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    )
    with pytest.raises(InputError, match="starts with <s> twice"):
        load(rows, tmp_path / "cache", tokenizer)
    tokenizer = base_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ '\\n' }}{% endfor %}"
    _, said = load(rows, tmp_path / "cache", tokenizer)
    assert "conversations start without <s>, though plain texts do" in said
    assert "ends with '\\n' and no end token" in said
    _, said = load(rows, tmp_path / "cache", tiny.make_tokenizer())
    assert "chat template" not in said


# The hub


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub as `datasets` sees it when it is out of reach and a dataset was loaded before: its own cache, made by its own builder."""
    import datasets

    rows = [{"text": f"<s>[INST] question {i} [/INST] answer {i} </s>"} for i in range(12)]
    cache = tmp_path / "datasets"
    name = "mlabonne/guanaco-llama2-1k"
    folder = tmp_path / "files"
    folder.mkdir()
    for split, some in (("train", rows), ("test", rows[:3])):
        datasets.Dataset.from_list(some).to_parquet(folder / f"{split}.parquet")
    files = {split: str(folder / f"{split}.parquet") for split in ("train", "test")}
    builder = datasets.load_dataset_builder("parquet", data_files=files, cache_dir=str(cache))
    builder.download_and_prepare()
    made = Path(builder.cache_dir)
    target = cache / name.replace("/", "___") / "default" / "0.0.0" / made.name
    target.parent.mkdir(parents=True)
    shutil.move(made, target)
    for file in target.glob("parquet-*.arrow"):
        file.rename(target / file.name.replace("parquet-", "guanaco-llama2-1k-"))
    info = json.loads((target / "dataset_info.json").read_text())
    info |= {"dataset_name": "guanaco-llama2-1k", "config_name": "default"}
    (target / "dataset_info.json").write_text(json.dumps(info))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    return cache


def test_the_recipes_dataset_by_its_id(hub: Path, tmp_path: Path) -> None:
    corpus, said = load(
        "mlabonne/guanaco-llama2-1k", tmp_path / "cache", base_tokenizer(), split="train", eval_split="test"
    )
    assert "mlabonne/guanaco-llama2-1k [train]: 12 rows (openassistant)" in said
    assert corpus.rows[11].where == "mlabonne/guanaco-llama2-1k [train], row 12"
    assert len(corpus.held_out) == 3
    assert "3 of 3 held-out rows are training rows too" in said
    part, _ = load("mlabonne/guanaco-llama2-1k", tmp_path / "cache", base_tokenizer(), split="train[:5]")
    assert len(part.rows) == 5
    with pytest.raises(InputError, match=r"guanaco-llama2-1k \[trian\], on the Hugging Face hub\n.*trian"):
        load("mlabonne/guanaco-llama2-1k", tmp_path / "cache", split="trian")
    with pytest.raises(InputError, match=r"nobody/nothing \[train\](?s:.*)give a file's path"):
        load("nobody/nothing", tmp_path / "cache")


def test_streaming_reads_as_rows_arrive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    rows = [chat("a", str(i)) for i in range(30)]
    taken = []

    def endless() -> Any:
        for row in rows:
            taken.append(row)
            yield row

    def load_dataset(path: str, name: str | None, *, split: str, streaming: bool) -> Any:
        assert streaming
        return datasets.IterableDataset.from_generator(endless)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    corpus, _ = load("some/stream", tmp_path / "cache", streaming=True, max_rows=10)
    assert len(corpus.rows) == 10
    assert len(taken) <= 31  # twenty to see what they are, then ten; and not the rest
    assert not (tmp_path / "cache").exists()  # nobody can say whether the next run's rows are these


def test_a_dataset_saved_to_disk(tmp_path: Path) -> None:
    import datasets

    dataset = datasets.Dataset.from_list([chat("a", "b"), chat("c", "d")])
    dataset.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": dataset, "test": dataset.select([0])}).save_to_disk(tmp_path / "two")
    assert len(load(tmp_path / "one", tmp_path / "cache")[0].rows) == 2
    assert len(load(tmp_path / "two", tmp_path / "cache", split="test")[0].rows) == 1
    with pytest.raises(InputError, match=r"no split 'x'\n.*train, test"):
        load(tmp_path / "two", tmp_path / "cache", split="x")


def test_datasets_and_pyarrow_are_only_imported_when_needed() -> None:
    command = "import sys, qlora_jax.data.corpus; print([m for m in ('datasets', 'pyarrow', 'pandas', 'torch') if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", command], cwd=REPOSITORY, env=environment(), capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
