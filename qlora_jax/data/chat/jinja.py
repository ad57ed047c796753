"""A chat template as transformers renders it, without what transformers does anew on each call.

transformers has no public way to a compiled template, so templates are compiled here, in the environment that it documents
(`sandbox.py`). That the two agree is not taken for granted: each run's template is compared first (`agrees_with_transformers`),
and where they differ transformers renders every row, which the log says.
"""

import functools
import re
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

from qlora_jax.data.rows.messages import Message

if TYPE_CHECKING:
    import jinja2  # slow to import; texts need none

    from qlora_jax.data.chat.sandbox import Sandbox

Span = tuple[int, int]
Tools = list[dict[str, Any]]

GENERATION_MARK = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
REASONING_KEYS = {"reasoning_content", "thinking", "reasoning"}
"""Keys of a message that transformers copies to one another."""
PROBE = "zqxprobezqx"
"""A text that no template writes by itself."""
TRIED = (
    ("user",),
    ("user", "assistant"),
    ("user", "assistant", "user", "assistant"),
    ("system", "user", "assistant"),
    ("system", "user", "assistant", "user", "assistant", "tool"),
    ("assistant", "assistant"),
)
"""Who speaks in the conversations that both have to render alike."""


class RenderError(Exception):
    """What a template raised, in words: it is a program, and can raise what it likes."""


class JinjaTemplate:
    """One template, compiled.

    Most messages are strings under a few keys. transformers hands these to the template as they are, so here the compiled template
    is asked itself, with a context made once: a third of the time. Whatever transformers would change on the way (tools, calls of
    tools, reasoning, values that are not strings) goes through transformers.

    Args:
        text: the template's text.
        special_tokens: `bos_token` and others that templates use, by name.
        by_transformers: all goes through transformers.

    Attributes:
        is_marked: whether it says with `{% generation %}` what the assistant writes.
    """

    def __init__(self, text: str, special_tokens: dict[str, str], *, by_transformers: bool = False) -> None:
        self.text, self._special_tokens, self._by_transformers = text, special_tokens, by_transformers
        self.is_marked = bool(GENERATION_MARK.search(text))

    def writer(
        self, messages: list[Message], tools: Tools | None, kwargs: Mapping[str, Any] | None = None
    ) -> Callable[[int, bool], str]:
        """A function that writes the first so many messages of a conversation and, if asked, the start of the assistant's turn.

        Both raise RenderError.

        Args:
            kwargs: what the template is told beside the messages and the tools.
        """
        if not kwargs and self._is_ours(messages, tools):
            write = self._write
        else:
            write = functools.partial(self._write_through_transformers, kwargs or {})

        def first(number: int, add_generation_prompt: bool) -> str:
            try:
                return write(messages[:number], tools, add_generation_prompt)
            except Exception as error:
                raise _failed(error) from error

        return first

    def render_marked(
        self, messages: list[Message], tools: Tools | None, kwargs: Mapping[str, Any] | None = None
    ) -> tuple[str, list[Span]]:
        """The text, and what lies between `{% generation %}` and `{% endgeneration %}`, as half-open ranges of characters.

        Raises:
            RenderError: see there.
        """
        try:
            if not kwargs and self._is_ours(messages, tools):
                return self._write_marked(messages)
            (text,), (spans,) = self._through_transformers(
                messages, tools, kwargs or {}, return_assistant_tokens_mask=True
            )
        except Exception as error:
            raise _failed(error) from error
        return text, spans

    def _write(self, messages: list[Message], _: Tools | None, add_generation_prompt: bool) -> str:
        return "".join(self._compiled.root_render_func(self._context(messages, add_generation_prompt)))

    def _write_marked(self, messages: list[Message]) -> tuple[str, list[Span]]:
        marks, blocks = cast("Sandbox", self._compiled.environment).marks, []
        marks.begin()
        for block in self._compiled.root_render_func(self._context(messages, False)):
            blocks.append(block)
            marks.written += len(block)
        return "".join(blocks), marks.spans

    def _write_through_transformers(
        self, kwargs: Mapping[str, Any], messages: list[Message], tools: Tools | None, add_generation_prompt: bool
    ) -> str:
        (text,), _ = self._through_transformers(messages, tools, kwargs, add_generation_prompt=add_generation_prompt)
        return text

    def _is_ours(self, messages: list[Message], tools: Tools | None) -> bool:
        if tools is not None or self._by_transformers:
            return False
        for message in messages:
            for key, value in message.items():
                if type(value) is not str or key in REASONING_KEYS:
                    return False
        return True

    def _context(self, messages: list[Message], add_generation_prompt: bool) -> "jinja2.runtime.Context":
        """Made directly: `Template.new_context` first gathers the names that imports would need, and templates here import nothing."""
        template = self._compiled
        values = {**self._values, "messages": messages, "add_generation_prompt": add_generation_prompt}
        return template.environment.context_class(template.environment, values, template.name, template.blocks)

    @cached_property
    def _compiled(self) -> "jinja2.Template":
        from qlora_jax.data.chat.sandbox import Sandbox

        return Sandbox().from_string(self.text)

    @cached_property
    def words(self) -> frozenset[str] | None:
        """Every name that the template asks anything for, and every text in it: a key of a message that is not among them is not written.

        None where a message is written whole, whatever its keys.
        """
        import jinja2
        from jinja2 import nodes

        from qlora_jax.data.chat.sandbox import Sandbox

        probe = [{"role": "user", "content": "a", PROBE: PROBE}, {"role": "assistant", "content": "b", PROBE: PROBE}]
        try:
            tree = Sandbox().parse(self.text)
            if PROBE in self.writer(probe, None)(len(probe), False):
                return None
        except jinja2.TemplateSyntaxError:
            return None
        except RenderError:
            pass
        words = {node.attr for node in tree.find_all(nodes.Getattr)}
        words |= {node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)}
        return frozenset(words | REASONING_KEYS if words & REASONING_KEYS else words)

    @cached_property
    def _values(self) -> dict[str, Any]:
        """All that a template sees but for the conversation: jinja would gather it again for each."""
        return {**self._compiled.globals, "tools": None, "documents": None, **self._special_tokens}

    def _through_transformers(
        self, messages: list[Message], tools: Tools | None, kwargs: Mapping[str, Any], **options: bool
    ) -> tuple[list[str], list[list[Span]]]:
        from transformers.utils.chat_template_utils import render_jinja_template  # slow to import

        told = {**self._special_tokens, **kwargs, **options}
        return render_jinja_template([messages], tools=tools, chat_template=self.text, **told)


def _failed(error: Exception) -> Exception:
    # Where jinja2 or transformers is missing, that is the installation's fault, not the template's; and memory is limited (`bounded.py`).
    return error if isinstance(error, ImportError | MemoryError) else RenderError(f"{type(error).__name__}: {error}")


def syntax_problem(text: str) -> str | None:
    """What keeps a text from being a template, here and in transformers; None where nothing does."""
    import jinja2
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        render_jinja_template([[]], chat_template=text)
    except jinja2.TemplateSyntaxError as error:
        return f"line {error.lineno}: {error.message}"
    except Exception:  # what it makes of no messages at all is its own affair
        return None
    return None


def agrees_with_transformers(text: str, special_tokens: dict[str, str]) -> bool:
    """Whether a template writes some small conversations here as it does through transformers; complaints count as well."""
    ours, theirs = (JinjaTemplate(text, special_tokens, by_transformers=way) for way in (False, True))
    for roles in TRIED:
        messages = [{"role": role, "content": f" {role} é\n"} for role in roles]
        for prompt in (False, True):
            if _outcome(ours, messages, prompt) != _outcome(theirs, messages, prompt):
                return False
    return True


def _outcome(template: JinjaTemplate, messages: list[Message], prompt: bool) -> object:
    try:
        text = template.writer(messages, None)(len(messages), prompt)
        return text, template.render_marked(messages, None) if template.is_marked else None
    except RenderError as error:
        return str(error)
