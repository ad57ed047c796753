"""Reading JSONL and checking formats: what is accepted, and that errors name file, line, expectation and finding."""

import json
from pathlib import Path

import pytest

from qlora_jax.data import Row, check_rows, detect_format, read_rows
from qlora_jax.errors import InputError

USER = {"role": "user", "content": "hi"}
ASSISTANT = {"role": "assistant", "content": "hello"}


def write(folder: Path, content: bytes) -> Path:
    path = folder / "rows.jsonl"
    path.write_bytes(content)
    return path


def test_rows_keep_their_line_numbers_across_blank_lines(tmp_path: Path) -> None:
    path = write(tmp_path, b'\xef\xbb\xbf{"text": "a"}\n\n  \r\n{"text": "b\xe2\x80\xa8\xf0\x9f\x98\x80"}\r\n')
    assert read_rows(path) == [Row(f"{path}:1", {"text": "a"}), Row(f"{path}:4", {"text": "b\u2028😀"})]


@pytest.mark.parametrize(
    ("content", "line", "found"),
    [
        (b'{"text": "a"}\n{"text": "\xff"}\n', ":2", "byte 0xff at column 11, which is not UTF-8"),
        (b'{"text": "a"}\n\n{"text": \n', ":3", "not JSON"),
        (b'[\n{"text": "a"}\n]', ":1", "not JSON"),
        (b'{"text": "a"}\n["b"]\n', ":2", "a JSON list"),
        (b"null\n", ":1", "a JSON NoneType"),
        (b'{"n": ' + b"1" * 5000 + b"}", ":1", "not JSON"),
        (b"", "", "no rows"),
        (b"\n \n", "", "no rows"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, content: bytes, line: str, found: str) -> None:
    path = write(tmp_path, content)
    with pytest.raises(InputError) as error:
        read_rows(path)
    assert error.value.where == f"{path}{line}"
    assert found in error.value.found
    assert error.value.expected


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        read_rows(tmp_path / "none.jsonl")
    with pytest.raises(InputError, match="a folder"):
        read_rows(tmp_path)


@pytest.mark.parametrize(
    ("fields", "format"),
    [
        ({"messages": [USER, ASSISTANT], "id": 1}, "chat"),
        ({"prompt": "a", "completion": "b"}, "prompt_completion"),
        ({"text": "a", "prompt": "unused"}, "text"),
    ],
)
def test_format_is_detected(fields: dict, format: str) -> None:
    rows = [Row("f:1", fields)]
    assert detect_format(rows) == format
    check_rows(rows, format)


def test_undetectable_formats() -> None:
    with pytest.raises(InputError, match=r"f:1\n.*the row's fields: instruction, output\n.*messages.*prompt.*text"):
        detect_format([Row("f:1", {"instruction": "a", "output": "b"})])
    with pytest.raises(InputError, match="fields: none"):
        detect_format([Row("f:1", {})])
    with pytest.raises(InputError, match=r"several formats(?s:.)*one of chat, text"):
        detect_format([Row("f:1", {"messages": [], "text": "a"})])


def test_an_empty_system_message_is_allowed() -> None:
    check_rows([Row("f:1", {"messages": [{"role": "system", "content": ""}, USER, ASSISTANT]})], "chat")


@pytest.mark.parametrize(
    ("format", "fields", "found"),
    [
        ("text", {"txt": "a"}, "no `text`; the row's fields: txt"),
        ("text", {"text": 3}, "`text` is a int, not a string; the row's fields: text"),
        ("text", {"text": None}, "`text` is null, not a string"),
        ("text", {"text": ""}, "`text` is an empty string"),
        ("text", {"text": json.loads('"a\\ud83d"')}, "half of a surrogate pair, '\\ud83d', at character 1"),
        ("prompt_completion", {"prompt": "a"}, "no `completion`; the row's fields: prompt"),
        ("prompt_completion", {"prompt": "a", "completion": ""}, "`completion` is an empty string"),
        ("prompt_completion", {"prompt": ["a"], "completion": "b"}, "`prompt` is a list, not a string"),
        ("chat", {"conversations": []}, "no `messages`; the row's fields: conversations"),
        ("chat", {"messages": "hi"}, "`messages` is a str; the row's fields: messages"),
        ("chat", {"messages": []}, "`messages` is empty"),
        ("chat", {"messages": ["hi"]}, "`messages[0]` is a str"),
        (
            "chat",
            {"messages": [{"from": "human", "value": "a"}]},
            "`messages[0]` has no `role`; its fields: from, value",
        ),
        ("chat", {"messages": [{"role": "user"}]}, "`messages[0]` has no `content`; its fields: role"),
        ("chat", {"messages": [USER, {"role": "gpt", "content": "a"}]}, "`messages[1]` has the role 'gpt'"),
        ("chat", {"messages": [{"role": ["user"], "content": "a"}]}, "has the role ['user']"),
        ("chat", {"messages": [USER, {"role": "assistant", "content": None}]}, "`messages[1].content` is null"),
        (
            "chat",
            {"messages": [USER, {"role": "assistant", "content": ""}]},
            "`messages[1].content` is an empty string",
        ),
        ("chat", {"messages": [USER]}, "no assistant turn"),
    ],
)
def test_every_row_is_checked(format: str, fields: dict, found: str) -> None:
    good = {"text": "a", "prompt": "a", "completion": "b", "messages": [USER, ASSISTANT]}
    with pytest.raises(InputError) as error:
        check_rows([Row("f:1", good), Row("f:2", fields)], format)
    assert error.value.where == "f:2"
    assert found in error.value.found
    assert error.value.expected.startswith("{")
    assert error.value.fix
