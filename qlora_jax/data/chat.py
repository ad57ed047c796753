"""A conversation as the model's chat template writes it, and which of its characters the model has to learn to write.

Searching the rendered text for "<|im_start|>assistant" or for the answer breaks as soon as a message contains either.
The template itself knows: it either marks the assistant's part with `{% generation %}`, or it is asked twice, for the
text up to where the assistant is to speak and for the text after it has spoken; the difference is what it said.
"""

import re
from dataclasses import dataclass
from typing import Any, cast

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from qlora_jax.errors import InputError

Message = dict[str, Any]

GENERATION_MARK = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
MARKS_FIX = "put {% generation %} ... {% endgeneration %} around the assistant's text in the chat template"


@dataclass(frozen=True)
class Rendered:
    """A text and its supervised characters: half-open ranges (start, end) into it, in order and disjoint."""

    text: str
    spans: tuple[tuple[int, int], ...]


def render_chat(messages: list[Message], tokenizer: PreTrainedTokenizerBase, where: str) -> Rendered:
    """Render a conversation with the tokenizer's chat template and find the assistant's turns in it.

    A template with `{% generation %}` marks decides itself what is supervised. For any other, turn i is what lies
    between render(messages[:i], add_generation_prompt=True) and render(messages[:i + 1]), including the turn's end
    token but not the whitespace the template writes after that token. A template that ignores add_generation_prompt
    leaves the turn's header to the model, so there the header is supervised too.

    Raises:
        InputError: the tokenizer has no chat template; the template cannot render the row; or the turns cannot be told
            apart, because the template renders a turn differently once others follow it.
    """
    template = _template(tokenizer, where)
    messages = [{key: value for key, value in message.items() if value is not None} for message in messages]
    if GENERATION_MARK.search(template):
        return _render_marked(messages, tokenizer, template, where)
    text = _render(messages, tokenizer, where)
    end_tokens = tuple(token.content for token in tokenizer.added_tokens_decoder.values())
    spans = []
    for turn, message in enumerate(messages):
        if message["role"] == "assistant":
            start, end = _turn(messages, turn, text, tokenizer, where)
            stripped = text[start:end].rstrip()
            # Without an end token before it, the whitespace is itself how the model ends its turn, and is learned.
            spans.append((start, start + len(stripped)) if stripped.endswith(end_tokens) else (start, end))
    return Rendered(text, tuple(spans))


def _turn(
    messages: list[Message], turn: int, text: str, tokenizer: PreTrainedTokenizerBase, where: str
) -> tuple[int, int]:
    """Where messages[turn], the assistant's, starts and ends in `text`, the rendering of all messages."""
    if turn == 0:
        found = "the assistant speaks first, and the chat template does not mark where its text starts"
        raise InputError(where, found=found, expected="a user's turn first", fix=f"add one, or {MARKS_FIX}")
    before = _render(messages[:turn], tokenizer, where, add_generation_prompt=True)
    after = _render(messages[: turn + 1], tokenizer, where) if turn + 1 < len(messages) else text
    if not text.startswith(after):
        raise InputError(
            where,
            found=f"this chat template rewrites earlier turns: messages[{turn}] changes once others follow it",
            expected="a template that only appends, or one with {% generation %} marks",
            fix=f"{MARKS_FIX}, or train on rows with a single assistant turn at the end",
        )
    if not after.startswith(before):
        raise InputError(
            where,
            found=f"this chat template rewrites its own prompt: messages[{turn}] does not begin where that ends",
            expected="a template whose add_generation_prompt writes the start of an assistant's turn",
            fix=MARKS_FIX,
        )
    return len(before), len(after)


def _render(
    messages: list[Message], tokenizer: PreTrainedTokenizerBase, where: str, add_generation_prompt: bool = False
) -> str:
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
        return cast(str, text)
    except ImportError:  # jinja2 is missing: the installation's fault, not the row's
        raise
    except Exception as error:  # a template is a program: it can raise what it likes
        raise _unrenderable(error, where) from error


def _render_marked(messages: list[Message], tokenizer: PreTrainedTokenizerBase, template: str, where: str) -> Rendered:
    """Render a template that has marks; the spans are what transformers' `return_assistant_tokens_mask` starts from.

    Its token mask is not used: it looks up the tokens of a span's first and last character, which leaves out part of an
    emoji at the end, and all later turns when a tokenizer's offsets leave out the space a turn starts with.
    """
    special_tokens: dict[str, Any] = tokenizer.special_tokens_map
    try:
        rendered: Any = render_jinja_template(
            [messages], chat_template=template, return_assistant_tokens_mask=True, **special_tokens
        )
    except ImportError:
        raise
    except Exception as error:
        raise _unrenderable(error, where) from error
    (text,), (spans,) = rendered
    return Rendered(text, tuple(spans))


def _template(tokenizer: PreTrainedTokenizerBase, where: str) -> str:
    try:
        return tokenizer.get_chat_template()
    except ValueError as error:  # none, or several by name without a default
        raise InputError(
            where,
            found=f"chat messages, but the tokenizer has no usable chat template: {str(error).partition('!')[0]}",
            expected="a chat_template in the model's tokenizer files",
            fix="use an instruct model, add chat_template.jinja to its folder, or write rows of prompt and completion",
        ) from None


def _unrenderable(error: Exception, where: str) -> InputError:
    found = f"messages the chat template cannot render: {type(error).__name__}: {error}"
    return InputError(
        where, found=found, fix="mend the row: templates may ask for alternating roles, or refuse `system`"
    )
