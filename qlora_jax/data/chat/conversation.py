"""A conversation as a chat template writes it, and which of its characters the model has to learn to write.

Searching the rendered text for "<|im_start|>assistant" or for the answer breaks as soon as a message contains either.
The template itself knows: it either marks the assistant's part with `{% generation %}`, or it is asked twice, for the
text up to where the assistant is to speak and for the text after it has spoken; the difference is what it said.

Some templates write a turn differently once others follow it: they strip its thoughts, say. Such a turn cannot be learned
from the whole conversation, where it is not what the model wrote. It becomes a row of its own: the conversation up to it,
as the model will see it, with that turn alone supervised.

Some (GLM's) end no turn: the next one's first token, `<|user|>` or `<|observation|>`, is what generation stops at. It is learned with the
turn before it, and written after the last.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from qlora_jax.config.data import LossOn
from qlora_jax.data.chat.jinja import PROBE, JinjaTemplate, RenderError, Span, Tools
from qlora_jax.data.rows.calls import PROBED_CALL, Form, call_form, tool_form, words_of
from qlora_jax.data.rows.formats import Chat
from qlora_jax.data.rows.messages import Message
from qlora_jax.data.rows.row import RowError

MARKS_FIX = "put {% generation %} ... {% endgeneration %} around the assistant's text in the chat template"
OURS = {"role", "content", "tool_calls"}
OPENED = re.compile(r"<(\w*think\w*)>\s*(?:</\1>\s*)?\Z")
"""A thought that a generation prompt begins (or says to be empty) for the model, where a turn without a thought is written without it."""


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """What a template is given, calls and tools in the form that it knows."""

    messages: list[Message]
    tools: Tools | None = None
    kwargs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Rendered:
    """A text and its supervised characters: half-open ranges (start, end) into it, in order and disjoint."""

    text: str
    spans: tuple[Span, ...]


class Renderer:
    """Writes conversations with one chat template.

    Args:
        template: a Jinja template as transformers reads it.
        special_tokens: `bos_token` and others that templates use, by name.
        end_tokens: the texts of all tokens that are never plain text; one of them ends a turn.
        by_transformers: see `JinjaTemplate`.
    """

    def __init__(
        self, template: str, special_tokens: dict[str, str], end_tokens: Sequence[str], *, by_transformers: bool = False
    ) -> None:
        self._template = JinjaTemplate(template, special_tokens, by_transformers=by_transformers)
        self._end_tokens = tuple(end_tokens)
        self._bos = special_tokens.get("bos_token")
        self._leaves_out: dict[str, bool] = {}
        self._next_tokens: dict[bool, str] = {}

    def render(self, chat: Chat, loss_on: LossOn, where: str) -> list[Rendered]:
        """One text with its supervised spans; several where the template rewrites turns.

        A template with `{% generation %}` marks decides itself what is supervised. For any other, turn i is what lies
        between render(messages[:i], add_generation_prompt=True) and render(messages[:i + 1]), including the turn's end
        token but not the whitespace the template writes after that token. A template that ignores add_generation_prompt
        leaves the turn's header to the model, so there the header is supervised too.

        Raises:
            RowError: the template cannot render the row or leaves a role, calls or tools of it out, or the turns cannot be told apart.
        """
        try:
            conversation = self._conversation(chat)
            self._check_roles(conversation.messages, where)
            self._check_tools(conversation, where)
            if loss_on == "all" and not chat.unlearned:
                text = self._write(conversation)
                return [Rendered(text, ((0, len(text)),))]
            if self._template.is_marked:
                return [self._render_marked(conversation, chat, loss_on, where)]
            return self._by_turns(conversation, chat, loss_on, where)
        except RenderError as error:
            found = f"messages the chat template cannot render: {error}"
            fix = "mend the row (templates may ask for alternating roles, or refuse `system`), or choose another data.chat_template"
            raise RowError(where, "template", found=found, fix=fix) from error

    def unused_keys(self, chat: Chat) -> set[str]:
        """Keys of a conversation's messages that the template does not write."""
        keys = {key for message in chat.messages for key in message} - OURS
        words = self._template.words if keys else None
        return set() if words is None else keys - words

    def _conversation(self, chat: Chat) -> Conversation:
        """The messages without nulls, as transformers hands them on; calls and tools in the form that the template writes."""
        messages = [{key: value for key, value in message.items() if value is not None} for message in chat.messages]
        messages = [
            message | {"tool_calls": list(map(self._call_form, message["tool_calls"]))} if "tool_calls" in message else message
            for message in messages
        ]  # fmt: skip
        tools = None if chat.tools is None else list(map(self._tool_form, chat.tools))
        conversation = Conversation(messages=messages, tools=tools, kwargs=chat.template_kwargs)
        if all("content" in message for message in messages) or self._text(conversation) is not None:
            return conversation
        # A template that joins a text to what is not there: with an empty one it can go on.
        with_content = [message if "content" in message else message | {"content": ""} for message in messages]
        return dataclasses.replace(conversation, messages=with_content)

    @cached_property
    def _call_form(self) -> Form:
        return call_form(lambda messages, tools: self._text(Conversation(messages=messages, tools=tools)))

    @cached_property
    def _tool_form(self) -> Form:
        return tool_form(lambda messages, tools: self._text(Conversation(messages=messages, tools=tools)))

    def _write(self, conversation: Conversation) -> str:
        messages = conversation.messages
        return self._template.writer(messages, conversation.tools, conversation.kwargs)(len(messages), False)

    def _by_turns(self, conversation: Conversation, chat: Chat, loss_on: LossOn, where: str) -> list[Rendered]:
        messages = conversation.messages
        turns = [i for i in range(chat.num_prompt, len(messages)) if messages[i]["role"] == "assistant"]
        if loss_on == "last_assistant" or (loss_on == "completion" and not chat.num_prompt):
            turns = turns[-1:]
        is_all = loss_on == "all"
        turns = [i for i in turns if (i in chat.unlearned) == is_all]
        _check_some(turns, is_all, where)
        if turns == [0] or (is_all and 0 in turns):
            found = "the assistant alone speaks, and the chat template does not mark where its text starts"
            fix = f"drop the row, add a user's turn, or {MARKS_FIX}"
            raise RowError(where, "template", found=found, expected="a user's turn first", fix=fix)
        write = self._template.writer(messages, conversation.tools, conversation.kwargs)
        text = write(len(messages), False)
        spans, alone = [], []
        for turn in turns:
            if turn == 0:  # what is said before anyone asked is read, not learned
                continue
            is_last = turn + 1 == len(messages)
            after = text if is_last else write(turn + 1, False)
            start = self._start(write(turn, True), after, messages[turn])
            if start is None:
                found = f"this chat template rewrites its own prompt: messages[{turn}] does not begin where that ends"
                expected = "a template whose add_generation_prompt writes the start of an assistant's turn"
                raise RowError(where, "template", found=found, expected=expected, fix=MARKS_FIX)
            ended = after if is_all else self._ended(after, start, bool(messages[turn].get("tool_calls")))
            if is_last:
                text = ended
            elif not text.startswith(ended) and (inner := self._without_tail(after, start, text)) is not None:
                ended = inner
            span = self._without_white_space(ended, start)
            if text.startswith(ended):
                spans.append(span)
            else:
                alone.append(Rendered(ended, (span,)))
        if is_all:
            if alone:
                found = "a turn that is not to be learned, and the chat template rewrites it once others follow"
                raise RowError(where, "template", found=found, fix="drop the row, or set data.loss_on=assistant")
            return [Rendered(text, _without(text, spans))]
        return [*alone, Rendered(text, tuple(spans))] if spans else alone

    def _start(self, before: str, after: str, turn: Message) -> int | None:
        """Find where in `after`, a conversation up to a turn's end, the model begins to write the turn; `before` is what it is given.

        A prompt that opens a thought, and a turn that is written without one: it begins where the thought would, unless it had one.
        """
        if after.startswith(before):
            return len(before)
        opened, content = OPENED.search(before), turn.get("content")
        if opened is None or not isinstance(content, str) or not after.startswith(before[: opened.start()]):
            return None
        return opened.start() if content.strip() in after[opened.start() :] else None

    def _ended(self, after: str, start: int, calls: bool) -> str:
        """A turn with the token that ends it, where the template leaves that to the next turn's beginning."""
        if after[start:].rstrip().endswith(self._end_tokens):
            return after
        if calls not in self._next_tokens:
            self._next_tokens[calls] = self._next_token(calls)
        return after + self._next_tokens[calls]

    def _next_token(self, calls: bool) -> str:
        """The token with which what follows an assistant's turn begins: a user's turn, or a tool's answer to a call. Empty if none does."""
        answered: Message = {"role": "assistant", "content": "b"}
        follower: Message = {"role": "user", "content": "c"}
        if calls:
            answered = {"role": "assistant", "content": "", "tool_calls": [self._call_form(PROBED_CALL)]}
            follower = {
                "role": "tool",
                "content": "c",
                "name": PROBED_CALL["function"]["name"],
                "tool_call_id": PROBED_CALL["id"],
            }
        messages: list[Message] = [{"role": "user", "content": "a"}, answered, follower]
        shorter, longer = (self._text(Conversation(messages=messages[:number])) for number in (2, 3))
        if shorter is None or longer is None or not longer.startswith(shorter):
            return ""
        rest = longer[len(shorter) :]
        begins = [token for token in self._end_tokens if token != self._bos and rest.lstrip().startswith(token)]
        return rest[: rest.index(max(begins, key=len)) + len(max(begins, key=len))] if begins else ""

    def _without_tail(self, after: str, start: int, text: str) -> str | None:
        """A turn as `text`, the whole conversation, begins: without end tokens that a template writes after the last message only."""
        while not text.startswith(after):
            stripped = after.rstrip()
            tails = [token for token in self._end_tokens if stripped.endswith(token)]
            if not tails:
                return None
            after = stripped.removesuffix(max(tails, key=len))
            if not after[start:].rstrip().endswith(self._end_tokens):
                return None
        return after

    def _without_white_space(self, after: str, start: int) -> Span:
        """The turn that ends `after`. Without an end token, the white space is itself how the model ends it, and is learned."""
        stripped = after[start:].rstrip()
        return (start, start + len(stripped)) if stripped.endswith(self._end_tokens) else (start, len(after))

    def _render_marked(self, conversation: Conversation, chat: Chat, loss_on: LossOn, where: str) -> Rendered:
        """Render a template that has marks; the spans are what transformers' `return_assistant_tokens_mask` starts from.

        Its token mask is not used: it looks up the tokens of a span's first and last character, which leaves out part of
        an emoji at the end, and all later turns when a tokenizer's offsets leave out the space a turn starts with.
        """
        text, spans = self._marked(conversation, len(conversation.messages))
        unlearned = {
            number
            for turn in sorted(chat.unlearned)
            if conversation.messages[turn]["role"] == "assistant"
            for number in range(self._num_marks(conversation, turn), self._num_marks(conversation, turn + 1))
        }
        if loss_on == "all":
            return Rendered(text, _without(text, [spans[number] for number in sorted(unlearned)]))
        numbers = range(len(spans))
        if chat.num_prompt:
            numbers = numbers[self._num_marks(conversation, chat.num_prompt) :]
        elif loss_on in ("last_assistant", "completion"):
            numbers = numbers[-1:]
        learned = [spans[number] for number in numbers if number not in unlearned]
        if unlearned:
            _check_some(learned, False, where)
        return Rendered(text, tuple(learned))

    def _marked(self, conversation: Conversation, number: int) -> tuple[str, list[Span]]:
        messages = conversation.messages[:number]
        return self._template.render_marked(messages, conversation.tools, conversation.kwargs)

    def _num_marks(self, conversation: Conversation, number: int) -> int:
        """Marks in the first so many messages."""
        return len(self._marked(conversation, number)[1]) if number else 0

    def _check_roles(self, messages: list[Message], where: str) -> None:
        """Stop at a role that the template leaves out without a word: what was said would be missing."""
        for number, message in enumerate(messages):
            role = message["role"]
            if role in ("user", "assistant") or not message.get("content"):
                continue
            if role not in self._leaves_out:
                self._leaves_out[role] = self._probe(role)
            if self._leaves_out[role]:
                found = f"messages[{number}] has the role {role!r}, which the chat template leaves out"
                fix = "say what it is with data.roles, drop the row, or choose another data.chat_template"
                raise RowError(where, "template", found=found, expected="a role that the template knows", fix=fix)

    def _check_tools(self, conversation: Conversation, where: str) -> None:
        """Stop where the template leaves out calls of tools, so that an empty turn would be learned, or the tools themselves."""
        messages, tools = conversation.messages, conversation.tools
        callers = [number for number, message in enumerate(messages) if message.get("tool_calls")]
        if not callers and not tools:
            return
        text = self._text(conversation)
        if text is None:  # it is not silent about it: the row itself will tell
            return
        silent = [{key: value for key, value in message.items() if key != "tool_calls"} for message in messages]
        if callers and text == self._text(dataclasses.replace(conversation, messages=silent)):
            found = f"messages[{callers[0]}] calls a tool, which the chat template leaves out"
            fix = "choose another data.chat_template, write the call as `content`, or drop the row"
            raise RowError(where, "template", found=found, expected="a template that writes `tool_calls`", fix=fix)
        if tools and text == self._text(dataclasses.replace(conversation, tools=None)):
            found = "`tools`, which the chat template leaves out"
            fix = "choose another data.chat_template, or read rows without theirs: data.fields={tools: none}"
            raise RowError(where, "template", found=found, expected="a template that writes `tools`", fix=fix)
        for number in callers:
            for call in messages[number]["tool_calls"]:
                for word in words_of(call):
                    if word not in text:
                        found = f"messages[{number}] calls a tool with {word!r:.60}, which the chat template leaves out"
                        fix = "choose another data.chat_template, write the call as `content`, or drop the row"
                        raise RowError(where, "template", found=found, expected="calls written whole", fix=fix)

    def _text(self, conversation: Conversation) -> str | None:
        try:
            return self._write(conversation)
        except RenderError:
            return None

    def _probe(self, role: str) -> bool:
        asked, answered = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
        probe = {"role": role, "content": PROBE}
        chat = [probe, asked, answered] if role in ("system", "developer") else [asked, answered, probe, answered]
        texts = [self._text(Conversation(messages=chat))]
        if role in ("tool", "ipython"):  # some templates write an answer beside its call alone
            calling = {"role": "assistant", "tool_calls": [self._call_form(PROBED_CALL)]}
            answer = probe | {"name": PROBED_CALL["function"]["name"], "tool_call_id": PROBED_CALL["id"]}
            texts.append(self._text(Conversation(messages=[asked, calling, answer, answered])))
        return texts[0] is not None and not any(text and PROBE in text for text in texts)


def _check_some(turns: Sequence[object], is_all: bool, where: str) -> None:
    if not turns and not is_all:
        found = "no turn to learn: all that data.loss_on chooses have `weight`: 0 or `train`: false"
        raise RowError(where, "nothing to learn", found=found, expected="one turn to learn", fix="drop the row")


def _without(text: str, spans: Sequence[Span]) -> tuple[Span, ...]:
    """What lies between some spans of a text."""
    edges = [0, *(edge for span in spans for edge in span), len(text)]
    pairs = zip(edges[::2], edges[1::2], strict=True)
    return tuple((start, end) for start, end in pairs if start < end)
