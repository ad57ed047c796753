"""The messages of a chat: roles and keys by their several names, text in parts, calls of tools; checked one by one."""

from collections.abc import Mapping
from typing import Any

from qlora_jax.data.rows.calls import kind_of, read_calls, read_json
from qlora_jax.data.rows.row import Row, RowError

Message = dict[str, Any]

ROLES: dict[str, str] = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "ipython": "ipython",
    # ShareGPT's
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "function": "tool",
    "function_response": "tool",
}
"""Roles as data names them, and as templates do."""
KNOWN_ROLES = tuple(ROLES)
CALL_ROLE = "function_call"
ALIASES = {
    "role": ("role", "from"),
    "content": ("content", "value"),
    "train": ("train", "training"),
    "weight": ("weight",),
}
"""Our names of a message's keys to the data's. `weight` is OpenAI's and axolotl's, `train` axolotl's."""
LEGACY_CALL = "function_call"
"""One call in a message, as OpenAI had it before `tool_calls`."""
IN_PARTS = ("train_detail", "training_detail")
"""axolotl's keys for parts of a turn that are learned."""


def read_messages(
    row: Row, name: str, value: Any, keys: Mapping[str, str], roles: Mapping[str, str], expected: str
) -> tuple[list[Message], list[int]]:
    """A row's messages, each with `role` and `content` and whatever else it has; and the numbers of those that are not to be learned.

    Args:
        name: the field's name in the row.
        value: what the field holds: a list of objects, or (from a CSV file) that list as JSON.
        keys: the data's names for those of `ALIASES`.
        roles: the data's names of roles to the template's, beside `ROLES`.
        expected: an example of a right row.

    Raises:
        RowError: one of them does not fit.
    """
    messages = read_json(value) if isinstance(value, str) else value
    if not isinstance(messages, list):
        found = f"`{name}` is {kind_of(value)}; the row's fields: {', '.join(row.fields)}"
        raise RowError(row.where, "fields", found=found, expected=expected, fix="mend the row, or drop it")
    if not messages:
        raise RowError(row.where, "empty", found=f"`{name}` is empty", expected=expected, fix="drop the row")
    read = [_message(row, f"{name}[{i}]", message, keys, roles, expected) for i, message in enumerate(messages)]
    learned = [
        _is_learned(row, f"{name}[{i}]", message, ours["role"], keys)
        for i, (message, ours) in enumerate(zip(messages, read, strict=True))
    ]
    return read, [i for i, is_learned in enumerate(learned) if not is_learned]


def _message(
    row: Row, name: str, message: Any, keys: Mapping[str, str], roles: Mapping[str, str], expected: str
) -> Message:
    if not isinstance(message, dict):
        fix = "mend the row, or drop it"
        raise RowError(row.where, "fields", found=f"`{name}` is {kind_of(message)}", expected=expected, fix=fix)
    role_key = _key(row, name, message, "role", keys, expected)
    content_key = _key(row, name, message, "content", keys, expected)
    said, content = message[role_key], message.get(content_key)
    role = roles.get(said, ROLES.get(said)) if isinstance(said, str) else None
    if role is None:
        fix = f"use the roles {', '.join(KNOWN_ROLES[:5])}, or say what it is with data.roles, e.g. {{{said!s}: user}}"
        raise RowError(row.where, "roles", found=f"`{name}` has the role {said!r}", expected=expected, fix=fix)
    flags = {name for our in ("weight", "train") for name in _names(our, keys)}
    others = {
        key: value
        for key, value in message.items()
        if key not in (role_key, content_key, LEGACY_CALL, *flags) and value is not None
    }
    if calls := _calls(row, name, message, said, content):
        others["tool_calls"] = calls
        if said == CALL_ROLE:
            return {"role": role, **others}
    elif "tool_calls" in others:  # an empty list
        del others["tool_calls"]
    if isinstance(content, list):
        content = _joined(row, name, content, expected)
    if content is None and calls:  # as transformers, which hands null to no template
        return {"role": role, **others}
    # An empty system message is how a row asks some templates for no default system prompt; a call needs no words.
    if (content is None or content == "") and (role == "tool" or calls):
        return {"role": role, "content": "", **others}
    check_text(row, f"{name}.{content_key}", content, expected, may_be_empty=role == "system")
    return {"role": role, "content": content, **others}


def _calls(row: Row, name: str, message: Message, said: str, content: Any) -> list[dict[str, Any]]:
    """A message's calls of tools, in any writing; of the assistant alone."""
    if said == CALL_ROLE:
        return read_calls(row, name, content)
    if message.get("tool_calls"):
        return read_calls(row, f"{name}.tool_calls", message["tool_calls"])
    if message.get(LEGACY_CALL):
        return read_calls(row, f"{name}.{LEGACY_CALL}", message[LEGACY_CALL])
    return []


def _is_learned(row: Row, name: str, message: Message, role: str, keys: Mapping[str, str]) -> bool:
    """What `weight` and `train` say; without either, yes.

    Raises:
        RowError: they are neither 0 nor 1, or ask for what another than the assistant said.
    """
    if detail := next((key for key in IN_PARTS if message.get(key)), None):
        fix = "drop it, or divide the turn: a turn is learned whole, or (`train`: false) not at all"
        raise RowError(row.where, "fields", found=f"`{name}` has `{detail}`, for parts of a turn", fix=fix)
    learned = True
    for our in ("weight", "train"):
        for key in _names(our, keys):
            value = message.get(key)
            if value is None:
                continue
            if not (isinstance(value, int | float) and value in (0, 1)):
                found, expected = f"`{name}.{key}` is {value!r:.40}", "0 or 1: whether the turn is learned"
                raise RowError(row.where, "fields", found=found, expected=expected, fix="mend the row, or drop it")
            if our == "train" and value and role != "assistant":
                found = f"`{name}` is {role}'s, and to be learned (`{key}`)"
                fix = f"drop `{key}`, give the turn to the assistant, or set data.loss_on=all and data.fields={{train: none}}"
                raise RowError(row.where, "fields", found=found, expected="the assistant's turns alone", fix=fix)
            learned = learned and bool(value)
    return learned


def _names(our: str, keys: Mapping[str, str]) -> tuple[str, ...]:
    return (keys[our],) if our in keys else ALIASES[our]


def _key(row: Row, name: str, message: Message, key: str, keys: Mapping[str, str], expected: str) -> str:
    names = _names(key, keys)
    for candidate in names:
        if candidate in message:
            return candidate
    if key == "content" and (message.get("tool_calls") or message.get(LEGACY_CALL)):
        return names[0]
    found = f"`{name}` has no `{'` or `'.join(names)}`; its fields: {', '.join(message) or 'none'}"
    raise RowError(
        row.where, "fields", found=found, expected=expected, fix="mend the row, or map names with data.fields"
    )


def _joined(row: Row, name: str, parts: list[Any], expected: str) -> str:
    """Text given in parts, as some APIs have it."""
    for part in parts:
        if not (isinstance(part, dict) and isinstance(part.get("text"), str)):
            found = f"`{name}` has a part that is not text: {str(part)[:60]}"
            raise RowError(
                row.where, "fields", found=found, expected=expected, fix="only text can be learned; drop the row"
            )
    return "".join(part["text"] for part in parts)


def check_text(row: Row, name: str, value: object, expected: str, *, may_be_empty: bool = False) -> None:
    """Check that a value is a string that a tokenizer can read.

    Raises:
        RowError: it is not.
    """
    if not isinstance(value, str):
        found = f"`{name}` is {kind_of(value)}, not a string; the row's fields: {', '.join(row.fields)}"
        raise RowError(row.where, "fields", found=found, expected=expected, fix="mend the row, or drop it")
    if not may_be_empty and (not value or value.isspace()):
        found = f"`{name}` is {'white space alone' if value else 'an empty string'}"
        raise RowError(row.where, "empty", found=found, expected=expected, fix="fill it, or drop the row")
    check_characters(row.where, f"`{name}`", value, expected)


def check_characters(where: str, name: str, text: str, expected: str = "") -> None:
    """Check that a text has only whole characters: JSON can write half of a surrogate pair, and no tokenizer can read it.

    Raises:
        RowError: it has half of one.
    """
    if text.isascii():
        return
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        found = f"{name} has half of a surrogate pair, {text[error.start]!r}, at character {error.start}"
        fix = "write the whole character, or drop it"
        raise RowError(where, "unreadable", found=found, expected=expected, fix=fix) from None
