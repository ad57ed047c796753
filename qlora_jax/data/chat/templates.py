"""Which chat template writes a conversation: the model's own, a file's, or one of these, for base models.

Ours mark what the assistant writes, its end included, and begin with BOS, so that nothing has to be found out about them.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_jax.base.errors import InputError
from qlora_jax.base.reading import read_text, shown
from qlora_jax.config.data import Format

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase  # slow to import; a process that tokenizes need not

# transformers drops a newline that follows a block's end, hence the line breaks as expressions.
LLAMA_2 = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set system = '<<SYS>>\\n' + messages[0].content | trim + '\\n<</SYS>>\\n\\n' %}"
    "{% set turns = messages[1:] %}{% else %}{% set system = '' %}{% set turns = messages %}{% endif %}"
    "{% for m in turns %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if m.role == 'user' %}[INST] {{ (system if loop.first else '') + m.content | trim }} [/INST]"
    "{% elif m.role == 'assistant' %}{% generation %} {{ m.content | trim }}{{ eos_token }}{% endgeneration %}"
    "{% else %}{{ raise_exception('only user, assistant and a first system message are supported') }}{% endif %}{% endfor %}"
)
ALPACA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ messages[0].content | trim + '\\n\\n' }}"
    "{% elif messages[0].input %}{{ 'Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\\n\\n' }}{% else %}{{ 'Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\\n\\n' }}{% endif %}"
    "{% for m in (messages[1:] if messages[0].role == 'system' else messages) %}"
    "{% if m.role == 'user' %}{{ ('' if loop.first else '\\n\\n') + '### Instruction:\\n' + "
    "(m.instruction or m.content) + '\\n\\n' + ('### Input:\\n' + m.input + '\\n\\n' if m.input else '') + '### Response:\\n' }}"
    "{% elif m.role == 'assistant' %}{% generation %}{{ m.content + eos_token }}{% endgeneration %}"
    "{% else %}{{ raise_exception('only user, assistant and a first system message are supported') }}{% endif %}{% endfor %}"
)
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
OWN = "model"
TOOL_USE = "tool_use"
"""The name under which transformers looks for a template where tools are offered."""
TEMPLATE_FILE = "chat_template.jinja"
NAMED = {"llama-2": LLAMA_2, "alpaca": ALPACA, "chatml": CHATML}


@dataclass(frozen=True)
class ChatTemplate:
    """A Jinja template and what to call it."""

    text: str
    name: str
    is_own: bool
    """Whether it is the model's own, so that a model folder already has it."""
    tool_use: str | None = None
    """The template of conversations that offer tools, where the model has one for them; as transformers chooses."""


def choose_template(
    setting: str, tokenizer: "PreTrainedTokenizerBase", formats: Collection[Format], log: Callable[[str], object]
) -> ChatTemplate:
    """The template that `data.chat_template` names; a choice made for a model without one is told to `log`.

    Raises:
        InputError: there is no such template, or the model has several and no default.
    """
    if setting in NAMED:
        return ChatTemplate(NAMED[setting], setting, is_own=False)
    if setting not in ("auto", OWN):
        return ChatTemplate(read_template(Path(setting)), setting, is_own=False)
    if tokenizer.chat_template:
        return own_template(tokenizer)
    if setting == OWN:
        fix = f"choose another: auto, {', '.join(NAMED)}, or a file"
        raise InputError("data.chat_template", found="model, but the model has no chat template", fix=fix)
    name = "alpaca" if set(formats) == {"alpaca"} else "llama-2"
    log(f"chat template: {name}, because the model has none (data.chat_template chooses another)")
    return ChatTemplate(NAMED[name], name, is_own=False)


def save_template(template: ChatTemplate | None, folder: Path) -> None:
    """Leave a template that the model's own folder lacks where transformers looks for one: FOLDER/chat_template.jinja."""
    if template is not None and not template.is_own:
        (folder / TEMPLATE_FILE).write_text(template.text, encoding="utf-8")


def own_template(tokenizer: "PreTrainedTokenizerBase") -> ChatTemplate:
    """A tokenizer's own chat template, or of several the default one, and that for tools.

    Raises:
        InputError: it has several and no default, or one that is no text.
    """
    several = tokenizer.chat_template if isinstance(tokenizer.chat_template, dict) else {}
    try:
        template, tool_use = tokenizer.get_chat_template(), several.get(TOOL_USE)
    except ValueError as error:  # several by name, without a default
        raise InputError(
            tokenizer.name_or_path or type(tokenizer).__name__,
            found=f"no usable chat template: {str(error).partition('!')[0]}",
            expected="one chat template, or a default among several",
            fix=f"name one with data.chat_template: {', '.join(NAMED)}, or a file",
        ) from None
    for text in (template, tool_use):
        if text is not None and not isinstance(text, str):
            found = f"a chat template that is no text: {shown(text)}"
            raise InputError(tokenizer.name_or_path, found=found, fix="mend chat_template in its tokenizer_config.json")
    return ChatTemplate(template, OWN, is_own=True, tool_use=tool_use)


def read_template(path: Path) -> str:
    """A chat template in a file of its own.

    Raises:
        InputError: it cannot be read.
    """
    try:
        return read_text(path)
    except InputError as error:
        expected = f"auto, {', '.join(NAMED)}, or a file with a Jinja template"
        raise InputError("data.chat_template", found=f"{str(path)!r}: {error.found}", expected=expected) from None
