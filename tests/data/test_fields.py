"""Fields that change what is learned mean what OpenAI, axolotl, LLaMA-Factory and TRL mean; all others are named and counted."""

from pathlib import Path
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from qlora_jax.base.errors import InputError
from qlora_jax.data import Chat, Layout, Renderer, Row, RowError, detect_format
from qlora_jax.data.chat.templates import CHATML
from tests.data.test_corpus import chat, load, write

UNMARKED = CHATML.replace("{% generation %}", "").replace("{% endgeneration %}", "")
USER, ASSISTANT = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}


def learned(columns: dict[str, Any], template: str = CHATML, loss_on: str = "assistant", **layout: Any) -> list[str]:
    row = Row("f:1", columns)
    sample = Layout(detect_format([row]), **layout).read(row)
    rendered = Renderer(template, {}, ["<|im_end|>"]).render(sample, loss_on, "f:1")
    return [text.text[start:end] for text in rendered for start, end in text.spans]


def turns(*flags: dict[str, Any]) -> dict[str, Any]:
    """Answers `a0`, `a1`, ... each with some more keys."""
    pairs = [
        [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": f"a{i}", **more}]
        for i, more in enumerate(flags)
    ]
    return {"messages": [message for pair in pairs for message in pair]}


@pytest.mark.parametrize("template", [CHATML, UNMARKED], ids=["marked", "unmarked"])
@pytest.mark.parametrize(
    "off", [{"weight": 0}, {"weight": 0.0}, {"train": False}, {"training": False}, {"train": 0}], ids=str
)
def test_turns_that_are_not_learned(template: str, off: dict[str, Any]) -> None:
    on = {key: type(value)(1) for key, value in off.items()}
    assert learned(turns(off, on, {}), template) == ["a1<|im_end|>", "a2<|im_end|>"]
    assert learned(turns({}, off, {}), template) == ["a0<|im_end|>", "a2<|im_end|>"]
    assert learned(turns({}, off), template) == ["a0<|im_end|>"]
    assert learned(turns(off, {}, on), template, "last_assistant") == ["a2<|im_end|>"]
    everything = "".join(learned(turns({}, off), template, "all"))
    assert "a0" in everything and "q1" in everything and "a1" not in everything
    for loss_on, row in (("assistant", turns(off, off)), ("last_assistant", turns({}, off))):
        with pytest.raises(RowError, match=r"no turn to learn(?s:.*)drop the row") as error:
            learned(row, template, loss_on)
        assert error.value.kind == "nothing to learn"
    completion = {"prompt": [USER], "completion": [ASSISTANT | off, USER, {"role": "assistant", "content": "bye"}]}
    assert learned(completion, template, "completion") == ["bye<|im_end|>"]
    sharegpt = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a", **off}] * 2
    sharegpt[3] = {"from": "gpt", "value": "b"}
    assert learned({"conversations": sharegpt, "system": "Be kind."}, template) == ["b<|im_end|>"]


def test_a_template_does_not_see_the_flags() -> None:
    chat = Layout("chat").read(Row("f:1", turns({"weight": 0, "train": True}, {"training": True})))
    assert chat.messages == turns({}, {})["messages"] and chat.unlearned == {1}
    assert learned(turns({"learn": False}, {}), fields={"train": "learn"}) == ["a1<|im_end|>"]
    assert learned(turns({"train": False}, {}), fields={"train": "none"}) == ["a0<|im_end|>", "a1<|im_end|>"]


@pytest.mark.parametrize(
    ("message", "found"),
    [
        ({"weight": 0.5}, "`messages[1].weight` is 0.5"),
        ({"weight": "0"}, "`messages[1].weight` is '0'"),
        ({"train": "no"}, "`messages[1].train` is 'no'"),
        ({"role": "user", "train": True}, "`messages[1]` is user's, and to be learned (`train`)"),
        ({"train_detail": [{"begin_offset": 0, "end_offset": 1, "train": False}]}, "`messages[1]` has `train_detail`"),
    ],
)
def test_flags_that_cannot_be_honoured_are_named(message: dict[str, Any], found: str) -> None:
    with pytest.raises(RowError) as error:
        Layout("chat").read(Row("f:1", {"messages": [USER, ASSISTANT | message, USER, ASSISTANT]}))
    assert found in error.value.found and error.value.fix


def test_alpacas_history_is_earlier_turns() -> None:
    row = {"instruction": "and?", "output": "fin", "history": [["hi", "hello"]], "system": "Be kind."}
    later = [{"role": "user", "content": "and?"}, {"role": "assistant", "content": "fin"}]
    expected = Chat([{"role": "system", "content": "Be kind."}, USER, ASSISTANT, *later])
    assert Layout("alpaca").read(Row("f:1", row)) == expected
    assert learned(row) == ["hello<|im_end|>", "fin<|im_end|>"]  # LLaMA-Factory's default: mask_history is off
    assert Layout("alpaca").read(Row("f:1", row | {"history": '[["hi", "hello"]]'})) == expected
    for empty in (None, [], "", "[]"):
        assert len(Layout("alpaca").read(Row("f:1", row | {"history": empty})).messages) == 3
    for bad in ("hi", [["hi"]], {"a": 1}, [["hi", 3]]):
        with pytest.raises(RowError, match="history"):
            Layout("alpaca").read(Row("f:1", row | {"history": bad}))


@pytest.mark.parametrize("name", ["messages", "conversations"])
def test_a_system_prompt_beside_the_messages(name: str) -> None:
    row = {name: [USER, ASSISTANT], "system": "Be kind."}
    layout = Layout(detect_format([Row("f:1", row)]))
    system = {"role": "system", "content": "Be kind."}
    assert layout.read(Row("f:1", row)) == Chat([system, USER, ASSISTANT])
    own = {"role": "system", "content": "Be brief."}
    read = layout.read(Row("f:1", {name: [own, USER, ASSISTANT], "system": "Be kind."}))
    assert (read.messages[0], read.unused) == (own, ("system",))  # as in LLaMA-Factory and axolotl
    assert layout.read(Row("f:1", {name: [system, USER, ASSISTANT], "system": "Be kind."})).unused == ()
    both = Layout("prompt_completion").read(
        Row("f:1", {"prompt": [USER], "completion": [ASSISTANT], "system": "Be kind."})
    )
    assert (both.messages, both.num_prompt) == ([system, USER, ASSISTANT], 2)


def test_what_trl_tells_a_template_in_a_row() -> None:
    template = CHATML + "{{ 'thinking' if enable_thinking else 'quiet' }}"
    for kwargs in ({"enable_thinking": True}, {"enable_thinking": False}, '{"enable_thinking": true}'):
        row = {"messages": [USER, ASSISTANT], "chat_template_kwargs": kwargs}
        told = {"enable_thinking": kwargs != {"enable_thinking": False}}
        (expected,), _ = render_jinja_template([row["messages"]], chat_template=template, **told)
        assert "".join(learned(row, template, "all")) == expected
        assert learned(row, template) == ["hello<|im_end|>"]
    with pytest.raises(RowError, match="sets chat_template, tools"):
        learned({"messages": [USER, ASSISTANT], "chat_template_kwargs": {"tools": [], "chat_template": ""}})


@pytest.mark.parametrize("name", ["images", "image", "videos", "audios", "input_ids"])
def test_what_cannot_be_learned_is_refused_by_name(name: str) -> None:
    row = {"messages": [USER, ASSISTANT], name: ["a.png"]}
    with pytest.raises(RowError, match=rf"`{name}`, which a model of text(?s:.*)data.fields={{{name}: none}}"):
        learned(row)
    assert learned(row, fields={name: "none"}) == learned(row | {name: []}) == ["hello<|im_end|>"]


def test_fields_and_keys_that_are_not_used_are_named_and_counted(tmp_path: Path) -> None:
    rows = [chat("a", str(i)) | {"id": i, "score": None} for i in range(30)]
    rows[3]["source"] = "web"
    rows[4]["messages"][1] |= {"name": "Ann", "weight": 1}
    rows[5]["messages"][0]["time"] = 3
    rows.append({"broken": 1, "unseen": 2})
    path = write(tmp_path / "a.jsonl", rows)
    for _ in range(2):  # the second time from the cache
        corpus, said = load(path, tmp_path / "cache", bad_rows="skip", num_proc=1)
        assert said.endswith(
            "\n  not used: id (30 rows), messages[].name (1 rows), messages[].time (1 rows), source (1 rows)\n"
        )
    assert corpus.rows.stores[0].report.unused["id"] == 30
    template = tmp_path / "t.jinja"
    template.write_text(
        "{% for m in messages %}{{ m.role + ':' + m.content }}{{ m['name'] if 'name' in m }}{{ '\\n' }}{% endfor %}"
    )
    assert "messages[].name" not in load(path, tmp_path / "cache", bad_rows="skip", chat_template=str(template))[1]
    template.write_text("{% for m in messages %}{{ m | tojson }}{{ '\\n' }}{% endfor %}")
    _, said = load(path, tmp_path / "cache", bad_rows="skip", chat_template=str(template))
    assert "messages[]" not in said and "id (30 rows)" in said


def test_columns_of_texts_and_alpacas(tmp_path: Path) -> None:
    texts = write(tmp_path / "a.jsonl", [{"text": "a", "meta": {"url": "b"}, "prompt": "c"}])
    assert "not used: meta (1 rows), prompt (1 rows)" in load(texts, tmp_path / "cache")[1]
    alpacas = write(tmp_path / "b.jsonl", [{"instruction": "a", "input": "b", "output": "c", "text": "whole"}])
    assert load(alpacas, tmp_path / "cache")[1].endswith("not used: text (1 rows)\n")
    completions = write(tmp_path / "c.jsonl", [{"prompt": "a", "completion": "b", "system": "c"}])
    assert load(completions, tmp_path / "cache")[1].endswith("not used: system (1 rows)\n")
    many = write(tmp_path / "d.jsonl", [{"text": "a", **{f"n{i}": i for i in range(500)}}])
    assert load(many, tmp_path / "cache")[1].endswith(" and 80 more\n")


@pytest.mark.parametrize(
    ("rows", "settings", "found"),
    [
        (
            [{"text": "a"}],
            {"fields": {"text": "text", "summary": "b"}},
            r"data.fields, for .*\n.*summary\n.*text's fields: text",
        ),
        ([{"text": "a"}], {"roles": {"customer": "user"}}, r"data.roles, for .*\n.*roles for rows without \(text\)"),
        (
            [{"text": "a"}],
            {"chat_template": "chatml"},
            r"data.chat_template\n.*chatml\n.*no source's rows are conversations",
        ),
    ],
)
def test_settings_that_such_rows_have_no_use_for(
    tmp_path: Path, rows: list[Any], settings: dict[str, Any], found: str
) -> None:
    with pytest.raises(InputError, match=found):
        load(write(tmp_path / "a.jsonl", rows), tmp_path / "cache", **settings)
