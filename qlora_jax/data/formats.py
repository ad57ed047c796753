"""What a row may look like: chat messages, prompt and completion, or plain text. All are checked before any is used."""

from collections.abc import Sequence
from typing import Literal

from qlora_jax.data.rows import Row
from qlora_jax.errors import InputError

Format = Literal["chat", "prompt_completion", "text"]

FIELDS: dict[Format, tuple[str, ...]] = {
    "chat": ("messages",),
    "prompt_completion": ("prompt", "completion"),
    "text": ("text",),
}
EXPECTED: dict[Format, str] = {
    "chat": '{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}',
    "prompt_completion": '{"prompt": "...", "completion": "..."}',
    "text": '{"text": "..."}',
}
ROLES = ("system", "user", "assistant")


def detect_format(rows: Sequence[Row]) -> Format:
    """The format whose fields the first row has; fields that belong to no format are ignored.

    Raises:
        InputError: the first row has the fields of no format, or of several.
    """
    first = rows[0]
    matches = [name for name, fields in FIELDS.items() if all(field in first.fields for field in fields)]
    if len(matches) == 1:
        return matches[0]
    if matches:
        fix = f"set data.format to one of {', '.join(matches)}"
        raise InputError(
            first.where, found=f"{_names(first)}, which fit several formats", expected="one format", fix=fix
        )
    raise InputError(first.where, found=_names(first), expected=" or ".join(EXPECTED.values()), fix="rename the fields")


def check_rows(rows: Sequence[Row], format: Format) -> None:
    """Check every row's fields, types, roles and text.

    Raises:
        InputError: at the first row that does not fit, naming its file and line and the fields it has.
    """
    for row in rows:
        for field in FIELDS[format]:
            if field not in row.fields:
                raise _misfit(row, format, f"no `{field}`; {_names(row)}")
            if format != "chat":
                _check_text(row, format, f"`{field}`", row.fields[field])
        if format == "chat":
            _check_messages(row)


def _check_messages(row: Row) -> None:
    messages = row.fields["messages"]
    if not isinstance(messages, list):
        raise _misfit(row, "chat", f"`messages` is {_kind(messages)}; {_names(row)}")
    if not messages:
        raise _misfit(row, "chat", f"`messages` is empty; {_names(row)}")
    for number, message in enumerate(messages):
        name = f"messages[{number}]"
        if not isinstance(message, dict):
            raise _misfit(row, "chat", f"`{name}` is {_kind(message)}")
        for field in ("role", "content"):
            if field not in message:
                raise _misfit(row, "chat", f"`{name}` has no `{field}`; its fields: {', '.join(message) or 'none'}")
        if message["role"] not in ROLES:
            raise _misfit(
                row, "chat", f"`{name}` has the role {message['role']!r}", f"use the roles {', '.join(ROLES)}"
            )
        # An empty system message is how a row asks some templates for no default system prompt.
        _check_text(row, "chat", f"`{name}.content`", message["content"], may_be_empty=message["role"] == "system")
    if all(message["role"] != "assistant" for message in messages):
        raise _misfit(row, "chat", "no assistant turn, so nothing to learn from", "add the answer, or drop the row")


def _check_text(row: Row, format: Format, name: str, value: object, may_be_empty: bool = False) -> None:
    if not isinstance(value, str):
        raise _misfit(row, format, f"{name} is {_kind(value)}, not a string; {_names(row)}")
    if not value and not may_be_empty:
        raise _misfit(row, format, f"{name} is an empty string; {_names(row)}", "fill it, or drop the row")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:  # JSON can write half of a surrogate pair; no tokenizer can read it
        found = f"{name} has half of a surrogate pair, {value[error.start]!r}, at character {error.start}"
        raise _misfit(row, format, found, "write the whole character, or drop it") from None


def _misfit(row: Row, format: Format, found: str, fix: str = "mend the row, or drop it") -> InputError:
    return InputError(row.where, found=found, expected=EXPECTED[format], fix=fix)


def _names(row: Row) -> str:
    return f"the row's fields: {', '.join(row.fields) or 'none'}"


def _kind(value: object) -> str:
    return "null" if value is None else f"a {type(value).__name__}"
