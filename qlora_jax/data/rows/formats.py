"""What a row may look like, and what every row becomes: a chat, a prompt and its completion, or a text."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from qlora_jax.base.errors import InputError
from qlora_jax.config.data import Format
from qlora_jax.data.rows.messages import KNOWN_ROLES, Message, check_text, kind_of, read_json, read_messages
from qlora_jax.data.rows.row import Row, RowError

REQUIRED: dict[Format, tuple[str, ...]] = {
    "chat": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "prompt_completion": ("prompt", "completion"),
    "openassistant": ("text",),
    "text": ("text",),
}
OPTIONAL: dict[Format, tuple[str, ...]] = {
    "chat": ("tools",),
    "sharegpt": ("system", "tools"),
    "alpaca": ("input", "system"),
    "prompt_completion": ("tools",),
    "openassistant": (),
    "text": (),
}
EXPECTED: dict[Format, str] = {
    "chat": '{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}',
    "sharegpt": '{"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}]}',
    "alpaca": '{"instruction": "...", "input": "...", "output": "..."}, input being optional',
    "prompt_completion": '{"prompt": "...", "completion": "..."}',
    "openassistant": '{"text": "### Human: ... ### Assistant: ..."}, or {"text": "<s>[INST] ... [/INST] ... </s>"}',
    "text": '{"text": "..."}',
}
MESSAGE_KEYS = ("role", "content")
SEEN_FOR_DETECTION = 20

HUMAN = re.compile(r"\s*### Human:")
INSTRUCTION = re.compile(r"\s*(?:<s>)?\s*\[INST\]")
SYSTEM = re.compile(r"\s*<<SYS>>\s*(.*?)\s*<</SYS>>\s*(.*)", re.DOTALL)


@dataclass(frozen=True)
class Chat:
    """A conversation, its roles and keys as chat templates know them."""

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None
    num_prompt: int = 0
    """Messages at the start that are a prompt, so never learned, whoever speaks."""


@dataclass(frozen=True)
class Completion:
    """A text and how it goes on."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Text:
    """A text."""

    text: str


Sample = Chat | Completion | Text


@dataclass(frozen=True)
class Layout:
    """How a source's rows are to be read: the format, and the names that its columns, keys and roles have."""

    format: Format
    fields: Mapping[str, str] = field(default_factory=dict)
    """Our name of a field, or of a message's `role` and `content`, to the data's."""
    roles: Mapping[str, str] = field(default_factory=dict)
    """The data's name of a role to the template's."""

    def read(self, row: Row) -> Sample:
        """Check a row and bring it into one of three forms.

        Raises:
            RowError: it does not fit, naming its file and line and the fields it has.
        """
        fields = {ours: row.fields[self.fields.get(ours, ours)] for ours in self._present(row)}
        if self.format in ("chat", "sharegpt"):
            return self._chat(row, fields)
        if self.format == "alpaca":
            return self._alpaca(row, fields)
        if self.format == "prompt_completion":
            return self._completion(row, fields)
        check_text(row, "text", fields["text"], EXPECTED[self.format])
        return _assistant_text(row, fields["text"]) if self.format == "openassistant" else Text(fields["text"])

    def _present(self, row: Row) -> list[str]:
        missing = [name for name in REQUIRED[self.format] if self.fields.get(name, name) not in row.fields]
        if missing:
            found = f"no {' and no '.join(f'`{self.fields.get(name, name)}`' for name in missing)}; {_names(row)}"
            fix = "mend the row, drop it, or map other names with data.fields"
            raise RowError(row.where, "fields", found=found, expected=EXPECTED[self.format], fix=fix)
        optional = [name for name in OPTIONAL[self.format] if row.fields.get(self.fields.get(name, name)) is not None]
        return [*REQUIRED[self.format], *optional]

    def _messages(self, row: Row, name: str, value: Any) -> list[Message]:
        keys = {key: self.fields[key] for key in MESSAGE_KEYS if key in self.fields}
        return read_messages(row, self.fields.get(name, name), value, keys, self.roles, EXPECTED[self.format])

    def _chat(self, row: Row, fields: dict[str, Any]) -> Chat:
        name = REQUIRED[self.format][0]
        messages = self._messages(row, name, fields[name])
        if fields.get("system"):
            check_text(row, self.fields.get("system", "system"), fields["system"], EXPECTED[self.format])
            messages = [{"role": "system", "content": fields["system"]}, *messages]
        _check_answered(row, messages, self.format)
        return Chat(messages, _tools(row, fields.get("tools")))

    def _alpaca(self, row: Row, fields: dict[str, Any]) -> Chat:
        """The instruction and its input are one message; a template may still tell them apart."""
        for name in ("instruction", "output"):
            check_text(row, self.fields.get(name, name), fields[name], EXPECTED["alpaca"])
        user: Message = {"role": "user", "content": fields["instruction"]}
        if fields.get("input"):
            check_text(row, self.fields.get("input", "input"), fields["input"], EXPECTED["alpaca"])
            user |= {"content": f"{fields['instruction']}\n\n{fields['input']}"}
            user |= {"instruction": fields["instruction"], "input": fields["input"]}
        system: list[Message] = []
        if fields.get("system"):
            check_text(row, self.fields.get("system", "system"), fields["system"], EXPECTED["alpaca"])
            system = [{"role": "system", "content": fields["system"]}]
        return Chat([*system, user, {"role": "assistant", "content": fields["output"]}])

    def _completion(self, row: Row, fields: dict[str, Any]) -> Sample:
        prompt, completion = fields["prompt"], fields["completion"]
        if isinstance(prompt, list) and isinstance(completion, list):
            before = self._messages(row, "prompt", prompt)
            messages = [*before, *self._messages(row, "completion", completion)]
            _check_answered(row, messages[len(before) :], "prompt_completion")
            return Chat(messages, _tools(row, fields.get("tools")), num_prompt=len(before))
        check_text(row, self.fields.get("prompt", "prompt"), prompt, EXPECTED["prompt_completion"])
        check_text(row, self.fields.get("completion", "completion"), completion, EXPECTED["prompt_completion"])
        return Completion(prompt, completion)


def detect_format(rows: Sequence[Row], fields: Mapping[str, str] | None = None, *, skips: bool = False) -> Format:
    """The format that the first row has the fields of, and the next ones too; fields that belong to no format are ignored.

    A format that says more wins over `text`: some datasets carry a rendered text beside the fields it was made of. A row that lacks a
    field is of no format, and of none is asked here: it is named when it is read.

    Args:
        skips: rows of another format are to be left out, so that of most rows counts.

    Raises:
        InputError: the first row has the fields of no format, or of several; or the next ones are of another.
    """
    rows = rows[:SEEN_FOR_DETECTION]
    matches = [_formats_of(row, fields or {}) for row in rows]
    alone = Counter(names[0] for names in matches if len(names) == 1)
    if skips and alone:
        format = max(alone, key=alone.__getitem__)
    else:
        format = _the_one(rows[0], matches[0])
        _check_same(rows, matches, format)
    texts = [row.fields for row, names in zip(rows, matches, strict=True) if format in names]
    return "openassistant" if format == "text" and all(map(_is_assistant_text, texts)) else format


def _formats_of(row: Row, fields: Mapping[str, str]) -> list[Format]:
    """All whose fields the row has."""
    names: list[Format] = [name for name in REQUIRED if name != "openassistant"]
    matches = [name for name in names if all(fields.get(ours, ours) in row.fields for ours in REQUIRED[name])]
    return [name for name in matches if name != "text"] or matches


def _the_one(row: Row, matches: Sequence[Format]) -> Format:
    if len(matches) == 1:
        return matches[0]
    if matches:
        fix = f"set data.format to one of {', '.join(matches)}"
        raise InputError(row.where, found=f"{_names(row)}, which fit several formats", expected="one format", fix=fix)
    expected = "the fields of a format:" + "".join(f"\n    {name}: {example}" for name, example in EXPECTED.items())
    fix = "say which column is which, e.g. data.fields={prompt: question, completion: answer}, or rename them"
    for name, value in row.fields.items():
        if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
            fix += f"; if `{name}` holds the rows, make that list all of the file"
    raise InputError(row.where, found=_names(row), expected=expected, fix=fix)


def _check_same(rows: Sequence[Row], matches: Sequence[Sequence[Format]], format: Format) -> None:
    for row, names in zip(rows, matches, strict=True):
        if names and format not in names:
            found = f"rows of several kinds: {rows[0].where} is {format}, but here {_names(row)}"
            fix = "separate them into sources of their own (data.sources), or keep those of the commonest kind with data.bad_rows=skip"
            raise InputError(row.where, found=found, expected=EXPECTED[format], fix=fix)


def _is_assistant_text(fields: dict[str, Any]) -> bool:
    text = fields.get("text")
    return isinstance(text, str) and bool(HUMAN.match(text) or INSTRUCTION.match(text))


def _assistant_text(row: Row, text: str) -> Chat:
    """Turns written out as in openassistant-guanaco, or in Llama 2's way as in guanaco-llama2-1k, as a chat again."""
    if HUMAN.match(text):
        parts = re.split(r"\s*### (Human|Assistant):\s*", text)[1:]
        roles = {"Human": "user", "Assistant": "assistant"}
        messages = [
            {"role": roles[name], "content": said.strip()} for name, said in zip(*[iter(parts)] * 2, strict=True)
        ]
    elif INSTRUCTION.match(text):
        messages = _llama_2_turns(text)
    else:
        found = "a text that does not begin with `### Human:` or `[INST]`"
        raise RowError(row.where, "fields", found=found, expected=EXPECTED["openassistant"], fix="set data.format=text")
    if messages[-1]["role"] == "user":  # a conversation that was cut before its answer
        messages = messages[:-1]
    for number, message in enumerate(messages):
        check_text(row, f"turn {number + 1}", message["content"], EXPECTED["openassistant"])
    _check_answered(row, messages, "openassistant")
    return Chat(messages)


def _llama_2_turns(text: str) -> list[Message]:
    messages: list[Message] = []
    for exchange in re.split(r"\s*(?:<s>)?\s*\[INST\]\s*", text)[1:]:
        asked, _, answered = exchange.partition("[/INST]")
        asked, answered = asked.strip(), answered.replace("</s>", "").strip()
        if system := SYSTEM.fullmatch(asked):
            messages.append({"role": "system", "content": system[1]})
            asked = system[2].strip()
        messages.append({"role": "user", "content": asked})
        if answered:
            messages.append({"role": "assistant", "content": answered})
    return messages


def _check_answered(row: Row, messages: Sequence[Message], format: Format) -> None:
    if all(message["role"] != "assistant" for message in messages):
        found = f"no assistant turn, so nothing to learn from; its roles: {', '.join(m['role'] for m in messages) or 'none'}"
        fix = f"add the answer, drop the row, or name the roles with data.roles (known: {', '.join(KNOWN_ROLES)})"
        raise RowError(row.where, "nothing to learn", found=found, expected=EXPECTED[format], fix=fix)


def _tools(row: Row, value: Any) -> list[dict[str, Any]] | None:
    if not value or value == "null":
        return None
    tools = read_json(value) if isinstance(value, str) else value
    if not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        expected = "a list of JSON schemas, or that list as a string"
        raise RowError(row.where, "fields", found=f"`tools` is {kind_of(value)}", expected=expected)
    return tools or None


def _names(row: Row) -> str:
    return f"the row's fields: {', '.join(row.fields) or 'none'}"
