"""Formats: what is recognised, what every row becomes, and what is said of rows that do not fit."""

import json
from typing import Any

import pytest

from qlora_jax.base.errors import InputError
from qlora_jax.data import Chat, Completion, Layout, Row, RowError, Text, detect_format

USER = {"role": "user", "content": "hi"}
ASSISTANT = {"role": "assistant", "content": "hello"}
HUMAN = {"from": "human", "value": "hi"}
GPT = {"from": "gpt", "value": "hello"}
LLAMA_2_TEXT = "<s>[INST] <<SYS>>\nBe kind.\n<</SYS>>\n\nhi [/INST] hello </s><s>[INST] and? [/INST] fin </s>"
GUANACO_TEXT = "### Human: hi### Assistant: hello ### Human: and?### Assistant: fin"
TURNS = [USER, ASSISTANT, {"role": "user", "content": "and?"}, {"role": "assistant", "content": "fin"}]


@pytest.mark.parametrize(
    ("fields", "format", "becomes"),
    [
        ({"messages": [USER, ASSISTANT], "id": 1}, "chat", Chat([USER, ASSISTANT])),
        ({"messages": [HUMAN, GPT]}, "chat", Chat([USER, ASSISTANT])),
        ({"messages": json.dumps([USER, ASSISTANT])}, "chat", Chat([USER, ASSISTANT])),  # as in a CSV file
        ({"conversations": [HUMAN, GPT], "id": "x"}, "sharegpt", Chat([USER, ASSISTANT])),
        ({"conversations": [USER, ASSISTANT]}, "sharegpt", Chat([USER, ASSISTANT])),
        (
            {"conversations": [HUMAN, GPT], "system": "Be kind."},
            "sharegpt",
            Chat([{"role": "system", "content": "Be kind."}, USER, ASSISTANT]),
        ),
        ({"instruction": "hi", "input": "", "output": "hello", "text": "x"}, "alpaca", Chat([USER, ASSISTANT])),
        ({"instruction": "hi", "output": "hello"}, "alpaca", Chat([USER, ASSISTANT])),
        (
            {"instruction": "hi", "input": "there", "output": "hello"},
            "alpaca",
            Chat([{"role": "user", "content": "hi\n\nthere", "instruction": "hi", "input": "there"}, ASSISTANT]),
        ),
        ({"prompt": "a", "completion": "b"}, "prompt_completion", Completion("a", "b")),
        ({"prompt": [USER], "completion": [ASSISTANT]}, "prompt_completion", Chat([USER, ASSISTANT], num_prompt=1)),
        ({"text": "a", "prompt": "unused"}, "text", Text("a")),
        ({"text": GUANACO_TEXT}, "openassistant", Chat(TURNS)),
        ({"text": LLAMA_2_TEXT}, "openassistant", Chat([{"role": "system", "content": "Be kind."}, *TURNS])),
        ({"text": LLAMA_2_TEXT + "<s>[INST] cut"}, "openassistant", Chat([{"role": "system", "content": "Be kind."}, *TURNS])),
        (
            {"messages": [USER, {"role": "assistant", "content": [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]}]},
            "chat",
            Chat([USER, ASSISTANT]),
        ),
    ],
)  # fmt: skip
def test_formats_are_recognised_and_read(fields: dict, format: str, becomes: Any) -> None:
    row = Row("f:1", fields)
    assert detect_format([row]) == format
    assert Layout(format).read(row) == becomes


def test_calls_of_tools_in_sharegpts_way() -> None:
    call = {"name": "add", "arguments": {"a": 1}}
    messages = [HUMAN, {"from": "function_call", "value": json.dumps(call)}, {"from": "observation", "value": "1"}, GPT]
    chat = Layout("sharegpt").read(Row("f:1", {"conversations": messages, "tools": json.dumps([call])}))
    assert chat.messages == [
        USER,
        {"role": "assistant", "tool_calls": [{"type": "function", "function": call}]},
        {"role": "tool", "content": "1"},
        ASSISTANT,
    ]
    assert chat.tools == [{"type": "function", "function": call}]


@pytest.mark.parametrize("tools", [None, "", "null", "[]", []])
def test_no_tools(tools: Any) -> None:
    assert Layout("chat").read(Row("f:1", {"messages": [USER, ASSISTANT], "tools": tools})).tools is None


def test_names_are_mapped() -> None:
    row = Row("f:1", {"question": "a", "answer": "b"})
    fields = {"prompt": "question", "completion": "answer"}
    assert detect_format([row], fields) == "prompt_completion"
    assert Layout("prompt_completion", fields).read(row) == Completion("a", "b")
    row = Row("f:1", {"dialog": [{"who": "customer", "said": "hi"}, {"who": "agent", "said": "hello"}]})
    fields = {"messages": "dialog", "role": "who", "content": "said"}
    assert detect_format([row], fields) == "chat"
    roles = {"customer": "user", "agent": "assistant"}
    assert Layout("chat", fields, roles).read(row) == Chat([USER, ASSISTANT])
    with pytest.raises(RowError, match=r"dialog\[0\]` has the role 'customer'(?s:.*)data.roles, e.g. {customer: user}"):
        Layout("chat", fields).read(row)
    with pytest.raises(RowError, match="no `question`; the row's fields: prompt"):
        Layout("prompt_completion", {"prompt": "question"}).read(Row("f:1", {"prompt": "a", "completion": "b"}))


def test_undetectable_formats() -> None:
    with pytest.raises(
        InputError, match=r"f:1\n.*the row's fields: title, body\n(?s:.*messages.*prompt.*text.*)data.fields"
    ):
        detect_format([Row("f:1", {"title": "a", "body": "b"})])
    with pytest.raises(InputError, match="if `data` holds the rows, make that list all of the file"):
        detect_format([Row("f:1", {"version": 1, "data": [{"text": "a"}]})])
    with pytest.raises(InputError, match="fields: none"):
        detect_format([Row("f:1", {})])
    with pytest.raises(InputError, match=r"several formats(?s:.*)one of chat, prompt_completion"):
        detect_format([Row("f:1", {"messages": [], "prompt": "a", "completion": "b"})])


def test_mixed_schemas() -> None:
    rows = [Row("f:1", {"messages": []}), Row("f:2", {"text": "a"})]
    with pytest.raises(InputError, match=r"f:2\n.*rows of several kinds: f:1 is chat, but here the row's fields: text"):
        detect_format(rows)
    # Where some are to be left out, the commonest kind is read, whatever the first row is.
    assert detect_format([rows[1], *rows[:1] * 2], skips=True) == "chat"
    assert detect_format([Row("f:1", {"title": "a"}), rows[1]], skips=True) == "text"
    guanaco = [Row("f:1", {"text": GUANACO_TEXT})] * 2
    assert detect_format([*guanaco, rows[0]], skips=True) == "openassistant"
    # A row that only lacks a field is of no other kind: it is named, or left out, when it is read.
    assert detect_format([*rows[:1], Row("f:2", {"title": "a"})]) == "chat"
    # Only the first rows are asked; the others are told as they come.
    assert detect_format(rows[:1] * 20 + rows[1:]) == "chat"
    assert detect_format([Row("f:1", {"text": GUANACO_TEXT}), Row("f:2", {"text": "plain"})]) == "text"


def test_an_empty_system_message_is_allowed() -> None:
    messages = [{"role": "system", "content": ""}, USER, ASSISTANT]
    assert Layout("chat").read(Row("f:1", {"messages": messages})).messages == messages


@pytest.mark.parametrize(
    ("format", "fields", "kind", "found"),
    [
        ("text", {"txt": "a"}, "fields", "no `text`; the row's fields: txt"),
        ("text", {"text": 3}, "fields", "`text` is a number, not a string; the row's fields: text"),
        ("text", {"text": None}, "fields", "`text` is null, not a string"),
        ("text", {"text": ""}, "empty", "`text` is an empty string"),
        ("text", {"text": " \n"}, "empty", "`text` is white space alone"),
        ("text", {"text": json.loads('"a\\ud83d"')}, "unreadable", "half of a surrogate pair, '\\ud83d', at character 1"),
        ("prompt_completion", {"prompt": "a"}, "fields", "no `completion`; the row's fields: prompt"),
        ("prompt_completion", {}, "fields", "no `prompt` and no `completion`; the row's fields: none"),
        ("prompt_completion", {"prompt": "a", "completion": ""}, "empty", "`completion` is an empty string"),
        ("prompt_completion", {"prompt": ["a"], "completion": "b"}, "fields", "`prompt` is a list, not a string"),
        ("alpaca", {"instruction": "a", "output": ""}, "empty", "`output` is an empty string"),
        ("alpaca", {"instruction": "a", "input": 3, "output": "b"}, "fields", "`input` is a number"),
        ("alpaca", {"instruction": "a", "system": 3, "output": "b"}, "fields", "`system` is a number"),
        ("sharegpt", {"conversations": [{"from": "human"}]}, "fields", "`conversations[0]` has no `content` or `value`; its fields: from"),
        ("chat", {"conversations": []}, "fields", "no `messages`; the row's fields: conversations"),
        ("chat", {"messages": "hi"}, "fields", "`messages` is a string; the row's fields: messages"),
        ("chat", {"messages": []}, "empty", "`messages` is empty"),
        ("chat", {"messages": ["hi"]}, "fields", "`messages[0]` is a string"),
        ("chat", {"messages": [{"who": "a"}]}, "fields", "`messages[0]` has no `role` or `from`; its fields: who"),
        ("chat", {"messages": [{"role": "user"}]}, "fields", "`messages[0]` has no `content` or `value`; its fields: role"),
        ("chat", {"messages": [USER, {"role": "poet", "content": "a"}]}, "roles", "`messages[1]` has the role 'poet'"),
        ("chat", {"messages": [{"role": ["user"], "content": "a"}]}, "roles", "has the role ['user']"),
        ("chat", {"messages": [USER, {"role": "assistant", "content": None}]}, "fields", "`messages[1].content` is null"),
        ("chat", {"messages": [USER, {"role": "assistant", "content": ""}]}, "empty", "`messages[1].content` is an empty"),
        ("chat", {"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "fields", "a part that is not text"),
        ("chat", {"messages": [USER]}, "nothing to learn", "no assistant turn, so nothing to learn from; its roles: user"),
        ("chat", {"messages": [USER, ASSISTANT], "tools": "no"}, "fields", "`tools` is a string"),
        ("chat", {"messages": [USER, ASSISTANT], "tools": [3]}, "fields", "`tools[0]` is a number"),
        ("sharegpt", {"conversations": [GPT | {"value": ""}]}, "empty", "`conversations[0].value` is an empty string"),
        ("openassistant", {"text": "plain"}, "fields", "does not begin with"),
        ("openassistant", {"text": "### Human: hi"}, "nothing to learn", "no assistant turn"),
    ],
)  # fmt: skip
def test_every_row_is_checked(format: str, fields: dict, kind: str, found: str) -> None:
    with pytest.raises(RowError) as error:
        Layout(format).read(Row("f:2", fields))
    assert (error.value.where, error.value.kind) == ("f:2", kind)
    assert found in error.value.found
    assert error.value.fix or error.value.expected
