"""A conversation as a chat template writes it, and which of its characters the model has to learn to write.

Searching the rendered text for "<|im_start|>assistant" or for the answer breaks as soon as a message contains either.
The template itself knows: it either marks the assistant's part with `{% generation %}`, or it is asked twice, for the
text up to where the assistant is to speak and for the text after it has spoken; the difference is what it said.

Some templates write a turn differently once others follow it: they strip its thoughts, say. Such a turn cannot be learned
from the whole conversation, where it is not what the model wrote. It becomes a row of its own: the conversation up to it,
as the model will see it, with that turn alone supervised.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from qlora_jax.config.data import LossOn
from qlora_jax.data.chat.jinja import JinjaTemplate, RenderError, Span, Tools
from qlora_jax.data.rows.formats import Chat
from qlora_jax.data.rows.messages import Message
from qlora_jax.data.rows.row import RowError

MARKS_FIX = "put {% generation %} ... {% endgeneration %} around the assistant's text in the chat template"
PROBE = "zqxprobezqx"
Conversation = tuple[list[Message], Tools | None]


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
        self._leaves_out: dict[str, bool] = {}

    def render(self, chat: Chat, loss_on: LossOn, where: str) -> list[Rendered]:
        """One text with its supervised spans; several where the template rewrites turns.

        A template with `{% generation %}` marks decides itself what is supervised. For any other, turn i is what lies
        between render(messages[:i], add_generation_prompt=True) and render(messages[:i + 1]), including the turn's end
        token but not the whitespace the template writes after that token. A template that ignores add_generation_prompt
        leaves the turn's header to the model, so there the header is supervised too.

        Raises:
            RowError: the template cannot render the row or leaves a role, calls or tools of it out, or the turns cannot be told apart.
        """
        messages = [{key: value for key, value in message.items() if value is not None} for message in chat.messages]
        try:
            self._check_roles(messages, where)
            self._check_tools(messages, chat.tools, where)
            if loss_on == "all":
                text = self._template.writer(messages, chat.tools)(len(messages), False)
                return [Rendered(text, ((0, len(text)),))]
            if self._template.is_marked:
                return [self._render_marked(messages, chat, loss_on)]
            return self._by_turns(messages, chat, loss_on, where)
        except RenderError as error:
            found = f"messages the chat template cannot render: {error}"
            fix = "mend the row (templates may ask for alternating roles, or refuse `system`), or choose another data.chat_template"
            raise RowError(where, "template", found=found, fix=fix) from error

    def _by_turns(self, messages: list[Message], chat: Chat, loss_on: LossOn, where: str) -> list[Rendered]:
        turns = [i for i in range(chat.num_prompt, len(messages)) if messages[i]["role"] == "assistant"]
        if loss_on == "last_assistant" or (loss_on == "completion" and not chat.num_prompt):
            turns = turns[-1:]
        if turns == [0]:
            found = "the assistant alone speaks, and the chat template does not mark where its text starts"
            fix = f"drop the row, add a user's turn, or {MARKS_FIX}"
            raise RowError(where, "template", found=found, expected="a user's turn first", fix=fix)
        write = self._template.writer(messages, chat.tools)
        text = write(len(messages), False)
        spans, alone = [], []
        for turn in turns:
            if turn == 0:  # what is said before anyone asked is read, not learned
                continue
            before = write(turn, True)
            after = write(turn + 1, False) if turn + 1 < len(messages) else text
            if not after.startswith(before):
                found = f"this chat template rewrites its own prompt: messages[{turn}] does not begin where that ends"
                expected = "a template whose add_generation_prompt writes the start of an assistant's turn"
                raise RowError(where, "template", found=found, expected=expected, fix=MARKS_FIX)
            span = self._without_white_space(after, len(before))
            if text.startswith(after):
                spans.append(span)
            else:
                alone.append(Rendered(after, (span,)))
        return [*alone, Rendered(text, tuple(spans))] if spans else alone

    def _without_white_space(self, after: str, start: int) -> Span:
        """The turn that ends `after`. Without an end token, the white space is itself how the model ends it, and is learned."""
        stripped = after[start:].rstrip()
        return (start, start + len(stripped)) if stripped.endswith(self._end_tokens) else (start, len(after))

    def _render_marked(self, messages: list[Message], chat: Chat, loss_on: LossOn) -> Rendered:
        """Render a template that has marks; the spans are what transformers' `return_assistant_tokens_mask` starts from.

        Its token mask is not used: it looks up the tokens of a span's first and last character, which leaves out part of
        an emoji at the end, and all later turns when a tokenizer's offsets leave out the space a turn starts with.
        """
        text, spans = self._template.render_marked(messages, chat.tools)
        if chat.num_prompt:
            _, prompt = self._template.render_marked(messages[: chat.num_prompt], chat.tools)
            spans = spans[len(prompt) :]
        elif loss_on in ("last_assistant", "completion"):
            spans = spans[-1:]
        return Rendered(text, tuple(spans))

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

    def _check_tools(self, messages: list[Message], tools: Tools | None, where: str) -> None:
        """Stop where the template leaves out calls of tools, so that an empty turn would be learned, or the tools themselves."""
        callers = [number for number, message in enumerate(messages) if message.get("tool_calls")]
        silent = [{key: value for key, value in message.items() if key != "tool_calls"} for message in messages]
        if callers and self._looks_like((messages, tools), (silent, tools)):
            found = f"messages[{callers[0]}] calls a tool, which the chat template leaves out"
            fix = "choose another data.chat_template, write the call as `content`, or drop the row"
            raise RowError(where, "template", found=found, expected="a template that writes `tool_calls`", fix=fix)
        if tools and self._looks_like((messages, tools), (messages, None)):
            found = "`tools`, which the chat template leaves out"
            fix = "choose another data.chat_template, or read rows without theirs: data.fields={tools: none}"
            raise RowError(where, "template", found=found, expected="a template that writes `tools`", fix=fix)

    def _looks_like(self, one: Conversation, other: Conversation) -> bool:
        text = self._text(*one)
        return text is not None and text == self._text(*other)

    def _text(self, messages: list[Message], tools: Tools | None) -> str | None:
        try:
            return self._template.writer(messages, tools)(len(messages), False)
        except RenderError:  # it is not silent about it: the row itself will tell
            return None

    def _probe(self, role: str) -> bool:
        asked, answered = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
        probe = {"role": role, "content": PROBE}
        chat = [probe, asked, answered] if role in ("system", "developer") else [asked, answered, probe, answered]
        text = self._text(chat, None)
        return text is not None and PROBE not in text
