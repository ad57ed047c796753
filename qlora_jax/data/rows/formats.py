"""What a row may look like, and what every row becomes: a chat, a prompt and its completion, or a text."""

import dataclasses
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from qlora_jax.base.errors import InputError
from qlora_jax.config.data import Format
from qlora_jax.data.rows.calls import kind_of, read_json, read_tools
from qlora_jax.data.rows.messages import KNOWN_ROLES, Message, check_text, read_messages
from qlora_jax.data.rows.row import Row, RowError

REQUIRED: dict[Format, tuple[str, ...]] = {
    "chat": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "prompt_completion": ("prompt", "completion"),
    "openassistant": ("text",),
    "text": ("text",),
}
OF_CHATS = ("system", "tools", "functions", "chat_template_kwargs")
OPTIONAL: dict[Format, tuple[str, ...]] = {
    "chat": OF_CHATS,
    "sharegpt": OF_CHATS,
    "alpaca": ("input", "history", *OF_CHATS),
    "prompt_completion": OF_CHATS,
    "openassistant": (),
    "text": (),
}
"""Fields that are read where a row has them. `history` and `system` are LLaMA-Factory's, `chat_template_kwargs` TRL's, `functions` what
OpenAI called `tools` before."""
REFUSED = ("images", "image", "videos", "video", "audios", "audio", "input_ids")
"""Fields that say of a row what cannot be learned here: pictures, sounds, ids of another tokenizer."""
RESERVED = {
    "messages", "conversation", "conversations", "tools", "chat_template", "add_generation_prompt", "continue_final_message",
    "tokenize", "return_dict", "return_assistant_tokens_mask", "return_tensors", "padding", "truncation", "max_length",
}  # fmt: skip
"""Names that `chat_template_kwargs` cannot set: they are ours to say."""
EXPECTED: dict[Format, str] = {
    "chat": '{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}',
    "sharegpt": '{"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}]}',
    "alpaca": '{"instruction": "...", "input": "...", "output": "..."}, input being optional',
    "prompt_completion": '{"prompt": "...", "completion": "..."}',
    "openassistant": '{"text": "### Human: ... ### Assistant: ..."}, or {"text": "<s>[INST] ... [/INST] ... </s>"}',
    "text": '{"text": "..."}',
}
MESSAGE_KEYS = ("role", "content", "weight", "train")
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
    unlearned: frozenset[int] = frozenset()
    """Messages that are not learned though the assistant speaks."""
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    """What the template is told beside the messages."""
    unused: tuple[str, ...] = field(default=(), compare=False)
    """Fields of the row that nothing was made of."""


@dataclass(frozen=True)
class Completion:
    """A text and how it goes on."""

    prompt: str
    completion: str
    unused: tuple[str, ...] = field(default=(), compare=False)


@dataclass(frozen=True)
class Text:
    """A text."""

    text: str
    unused: tuple[str, ...] = field(default=(), compare=False)


Sample = Chat | Completion | Text


@dataclass(frozen=True)
class Layout:
    """How a source's rows are to be read: the format, and the names that its columns, keys and roles have."""

    format: Format
    fields: Mapping[str, str] = field(default_factory=dict)
    """Our name of a field, or of a message's `role` and `content`, to the data's."""
    roles: Mapping[str, str] = field(default_factory=dict)
    """The data's name of a role to the template's."""

    @property
    def known_fields(self) -> tuple[str, ...]:
        """Our names of all fields, and of a message's keys, that rows of this format may have, or that can be left out by another name."""
        of_messages = MESSAGE_KEYS if self.format in ("chat", "sharegpt", "prompt_completion") else ()
        return (*REQUIRED[self.format], *OPTIONAL[self.format], *of_messages, *REFUSED)

    def read(self, row: Row) -> Sample:
        """Check a row and bring it into one of three forms.

        Raises:
            RowError: it does not fit, naming its file and line and the fields it has.
        """
        fields = {ours: row.fields[self.fields.get(ours, ours)] for ours in self._present(row)}
        self._check_nothing_refused(row)
        if self.format in ("chat", "sharegpt"):
            sample: Sample = self._chat(row, fields)
        elif self.format == "alpaca":
            sample = self._alpaca(row, fields)
        elif self.format == "prompt_completion":
            sample = self._completion(row, fields)
        else:
            check_text(row, "text", fields["text"], EXPECTED[self.format])
            is_chat = self.format == "openassistant"
            sample = _assistant_text(row, fields["text"]) if is_chat else Text(fields["text"])
        read = REQUIRED[self.format] if isinstance(sample, Completion) else fields
        names = {self.fields.get(ours, ours) for ours in read}
        unused = [name for name, value in row.fields.items() if value is not None and name not in names]
        return dataclasses.replace(sample, unused=(*sample.unused, *unused)) if unused else sample

    def _check_nothing_refused(self, row: Row) -> None:
        for ours in REFUSED:
            name = self.fields.get(ours, ours)
            if row.fields.get(name) and not self._reads(name):
                found = f"`{name}`, which a model of text and its tokenizer cannot learn from"
                fix = f"drop the row, or read rows without theirs: data.fields={{{ours}: none}}"
                raise RowError(row.where, "fields", found=found, expected="text", fix=fix)

    def _reads(self, name: str) -> bool:
        return name in {self.fields.get(ours, ours) for ours in (*REQUIRED[self.format], *OPTIONAL[self.format])}

    def _present(self, row: Row) -> list[str]:
        missing = [name for name in REQUIRED[self.format] if self.fields.get(name, name) not in row.fields]
        if missing:
            found = f"no {' and no '.join(f'`{self.fields.get(name, name)}`' for name in missing)}; {_names(row)}"
            fix = "mend the row, drop it, or map other names with data.fields"
            raise RowError(row.where, "fields", found=found, expected=EXPECTED[self.format], fix=fix)
        optional = [name for name in OPTIONAL[self.format] if row.fields.get(self.fields.get(name, name)) is not None]
        return [*REQUIRED[self.format], *optional]

    def _messages(self, row: Row, name: str, value: Any) -> tuple[list[Message], list[int]]:
        keys = {key: self.fields[key] for key in MESSAGE_KEYS if key in self.fields}
        return read_messages(row, self.fields.get(name, name), value, keys, self.roles, EXPECTED[self.format])

    def _chat(self, row: Row, fields: dict[str, Any]) -> Chat:
        name = REQUIRED[self.format][0]
        messages, unlearned = self._messages(row, name, fields[name])
        return self._made(row, fields, Chat(messages, unlearned=frozenset(unlearned)))

    def _made(self, row: Row, fields: dict[str, Any], chat: Chat) -> Chat:
        """A chat, and what else the row says of it."""
        _check_answered(row, chat.messages[chat.num_prompt :], self.format)
        if fields.get("system"):
            chat = self._with_system(row, fields["system"], chat)
        ours = next((ours for ours in ("tools", "functions") if fields.get(ours)), "tools")
        tools = read_tools(row, self.fields.get(ours, ours), fields.get(ours))
        return dataclasses.replace(chat, tools=tools, template_kwargs=self._template_kwargs(row, fields))

    def _with_system(self, row: Row, system: Any, chat: Chat) -> Chat:
        """The system prompt that a row has beside its messages; one among them wins, as in LLaMA-Factory and axolotl."""
        name = self.fields.get("system", "system")
        check_text(row, name, system, EXPECTED[self.format])
        first = chat.messages[0]
        if first["role"] == "system":
            return chat if first["content"] == system else dataclasses.replace(chat, unused=(name,))
        return dataclasses.replace(
            chat,
            messages=[{"role": "system", "content": system}, *chat.messages],
            num_prompt=chat.num_prompt + bool(chat.num_prompt),
            unlearned=frozenset(i + 1 for i in chat.unlearned),
        )

    def _template_kwargs(self, row: Row, fields: dict[str, Any]) -> dict[str, Any]:
        name, value = (
            self.fields.get("chat_template_kwargs", "chat_template_kwargs"),
            fields.get("chat_template_kwargs"),
        )
        kwargs = (read_json(value) if isinstance(value, str) else value) or {}
        if not isinstance(kwargs, dict):
            expected = '{"enable_thinking": false}'
            raise RowError(row.where, "fields", found=f"`{name}` is {kind_of(value)}", expected=expected)
        if reserved := sorted(RESERVED & kwargs.keys()):
            fix = "take it out; the settings of `data` say this"
            raise RowError(row.where, "fields", found=f"`{name}` sets {', '.join(reserved)}", fix=fix)
        return kwargs

    def _alpaca(self, row: Row, fields: dict[str, Any]) -> Chat:
        """The instruction and its input are one message; a template may still tell them apart. `history` comes before it."""
        for name in ("instruction", "output"):
            check_text(row, self.fields.get(name, name), fields[name], EXPECTED["alpaca"])
        user: Message = {"role": "user", "content": fields["instruction"]}
        if fields.get("input"):
            check_text(row, self.fields.get("input", "input"), fields["input"], EXPECTED["alpaca"])
            user |= {"content": f"{fields['instruction']}\n\n{fields['input']}"}
            user |= {"instruction": fields["instruction"], "input": fields["input"]}
        turns = [*self._history(row, fields), user, {"role": "assistant", "content": fields["output"]}]
        return self._made(row, fields, Chat(turns))

    def _history(self, row: Row, fields: dict[str, Any]) -> list[Message]:
        """Earlier turns: pairs of what was asked and answered."""
        name, value = self.fields.get("history", "history"), fields.get("history")
        pairs = read_json(value) if isinstance(value, str) and value else value
        if not pairs and (not value or value in ("[]", "null")):
            return []
        if not (isinstance(pairs, list) and all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs)):
            expected = '[["asked", "answered"], ...]'
            raise RowError(
                row.where, "fields", found=f"`{name}` is {kind_of(value)} of other than pairs", expected=expected
            )
        turns: list[Message] = []
        for number, pair in enumerate(pairs):
            for role, text in zip(("user", "assistant"), pair, strict=True):
                check_text(row, f"{name}[{number}]", text, EXPECTED["alpaca"])
                turns.append({"role": role, "content": text})
        return turns

    def _completion(self, row: Row, fields: dict[str, Any]) -> Sample:
        prompt, completion = fields["prompt"], fields["completion"]
        if isinstance(prompt, list) and isinstance(completion, list):
            before, _ = self._messages(row, "prompt", prompt)
            after, unlearned = self._messages(row, "completion", completion)
            shifted = frozenset(i + len(before) for i in unlearned)
            return self._made(row, fields, Chat([*before, *after], num_prompt=len(before), unlearned=shifted))
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


def _names(row: Row) -> str:
    return f"the row's fields: {', '.join(row.fields) or 'none'}"
