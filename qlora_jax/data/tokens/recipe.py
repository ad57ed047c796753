"""Everything that decides which tokens and which mask a row becomes, settled from settings, tokenizer and template."""

import copy
import dataclasses
import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import tokenizers

from qlora_jax.base import bounded
from qlora_jax.base.bounded import ProgramError, explained
from qlora_jax.base.errors import InputError
from qlora_jax.config.data import DataSettings, LossOn
from qlora_jax.data.chat.jinja import agrees_with_transformers
from qlora_jax.data.chat.templates import ChatTemplate
from qlora_jax.data.rows.formats import Layout
from qlora_jax.data.tokens.limits import check_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase  # slow to import; a process that tokenizes need not

REVISION = 5
"""Raised whenever the same rows may become other tokens or other masks, so that none that were kept are used again."""


@dataclass(frozen=True)
class Recipe:
    """Everything that decides which tokens and which mask a row becomes; small, picklable, without a tokenizer object."""

    layout: Layout
    tokenizer: str
    """tokenizer.json's text, without a post-processor."""
    special_tokens: dict[str, str]
    end_tokens: tuple[str, ...]
    start_ids: tuple[int, ...]
    """What the tokenizer puts before a text: often BOS, or nothing."""
    eos_id: int
    template: str
    loss_on: LossOn
    max_seq_length: int
    too_long: Literal["truncate", "skip", "stop"]
    by_transformers: bool = False
    """Whether transformers renders every chat, because it renders the template differently."""
    tool_template: str | None = None
    """What writes conversations that offer tools, where it is another template."""
    vocab_size: int | None = None
    """Rows of the model's embedding; None where nobody knows."""

    def identity(self) -> str:
        """Equal for recipes that do the same."""
        text = json.dumps([REVISION, dataclasses.asdict(self)], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def make_recipe(
    tokenizer: "PreTrainedTokenizerBase",
    layout: Layout,
    settings: DataSettings,
    template: ChatTemplate | None,
    vocab_size: int | None = None,
) -> Recipe:
    """How rows of one layout become tokens.

    Args:
        template: for formats that become chats; None where there is none to render.
        vocab_size: rows of the model's embedding.

    Raises:
        InputError: the tokenizer is not a fast one or lacks EOS, or `data.loss_on` says nothing about such rows; or the embedding has no
            row for what goes around each text.
    """
    name = tokenizer.name_or_path or type(tokenizer).__name__
    if not tokenizer.is_fast:
        fix = "convert it once with transformers, and save it in the model's folder"
        expected = "a fast tokenizer (tokenizer.json)"
        raise InputError(name, found="a tokenizer without character offsets", expected=expected, fix=fix)
    if tokenizer.eos_token_id is None and layout.format in ("text", "prompt_completion"):
        expected = f"one, to end each row of format `{layout.format}`"
        fix = "set eos_token in the model's tokenizer_config.json"
        raise InputError(name, found="a tokenizer without an EOS token", expected=expected, fix=fix)
    if layout.format == "text" and settings.loss_on not in ("auto", "all"):
        expected = "auto or all: a text has neither turns nor a completion"
        raise InputError("data.loss_on", found=f"{settings.loss_on} for rows of format text", expected=expected)
    start_ids = _start_ids(tokenizer)
    if template is None or layout.format == "text":  # else the rows will tell
        around = (*start_ids, *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]))
        check_rows(around, vocab_size, tokenizer, f"{name}: what goes around each row of format `{layout.format}`")
    special_tokens = {key: str(value) for key, value in tokenizer.special_tokens_map.items() if isinstance(value, str)}
    return Recipe(
        layout,
        _plain_tokenizer(tokenizer).to_str(),
        special_tokens,
        tuple(token.content for token in tokenizer.added_tokens_decoder.values()),
        start_ids,
        -1 if tokenizer.eos_token_id is None else tokenizer.eos_token_id,
        template.text if template else "",
        settings.loss_on,
        settings.max_seq_length,
        settings.too_long,
        by_transformers=template is not None and not _agrees(template, special_tokens),
        tool_template=template.tool_use if template else None,
        vocab_size=vocab_size,
    )


def _agrees(template: ChatTemplate, special_tokens: dict[str, str]) -> bool:
    try:
        return bounded.companion().ask(agrees_with_transformers, template.text, special_tokens)
    except ProgramError as error:
        where, fix = f"chat template ({template.name})", "mend it, or choose another with data.chat_template"
        raise explained(error, where, "it cannot write a small conversation", fix) from None


def _plain_tokenizer(tokenizer: "PreTrainedTokenizerBase") -> tokenizers.Tokenizer:
    """A copy of the tokenizer whose offsets cover each token's whole text.

    The post-processor of many byte-level tokenizers leaves spaces out of the offsets (`trim_offsets`), so that a token
    that starts with the space before a turn would seem to start inside it. Without one no special tokens are added,
    which is what is wanted here.
    """
    backend: tokenizers.Tokenizer = copy.deepcopy(tokenizer.backend_tokenizer)
    backend.post_processor = None
    backend.no_truncation()
    backend.no_padding()
    return backend


def _start_ids(tokenizer: "PreTrainedTokenizerBase") -> tuple[int, ...]:
    plain = tokenizer("x", add_special_tokens=False)["input_ids"]
    special = tokenizer("x")["input_ids"]
    num_start = next(n for n in range(len(special)) if special[n : n + len(plain)] == plain)
    return tuple(special[:num_start])
