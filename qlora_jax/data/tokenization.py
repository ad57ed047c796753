"""Rows to token ids, and which of them count in the loss."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import tokenizers
from transformers import PreTrainedTokenizerBase

from qlora_jax.data.chat import Rendered, render_chat
from qlora_jax.data.formats import Format, check_rows, detect_format
from qlora_jax.data.rows import Row
from qlora_jax.errors import InputError

ROWS_AT_ONCE = 256
"""Rows given to the fast tokenizer together; it spreads them over the cores."""


@dataclass(frozen=True)
class Example:
    """A tokenized row; at least one token is supervised."""

    input_ids: np.ndarray
    """[T] int32."""
    loss_mask: np.ndarray
    """[T] bool: the tokens to be predicted, each at its own place (the loss shifts); never the first."""
    where: str
    """The row's "file:line"."""


@dataclass(frozen=True)
class Tokenized:
    """A dataset's examples, in the file's order, and how many of them were cut to max_seq_length."""

    examples: list[Example]
    num_truncated: int


def tokenize(
    rows: Sequence[Row],
    format: Format | Literal["auto"],
    tokenizer: PreTrainedTokenizerBase,
    max_seq_length: int,
    progress: Callable[[int, int], None] | None = None,
) -> Tokenized:
    """Check all rows, then tokenize each with its loss mask.

    chat: the template's text, which has its own special tokens; supervised are the assistant's turns (see `chat.py`).
    A token counts when it starts inside a turn.
    prompt_completion: the tokenizer's tokens for the start of a text (BOS, if it has one), prompt and completion as one
    text, EOS; supervised are the completion and EOS. A token that joins the prompt's end to the completion's start
    counts too, or a prompt that ends in a space would lose the completion's first word.
    text: the same around the text; supervised is everything but the tokens for the start.

    Args:
        rows: at least one.
        progress: called with (rows done, rows) now and then.

    Raises:
        InputError: a row does not fit the format, or has no token to learn from within max_seq_length; the tokenizer is
            not a fast one, or lacks the EOS token or chat template that the format needs.
    """
    format = detect_format(rows) if format == "auto" else format
    check_rows(rows, format)
    offsets_tokenizer = _offsets_tokenizer(tokenizer)
    start_ids, eos_id = _boundary_ids(tokenizer, format)
    examples, num_truncated = [], 0
    for first in range(0, len(rows), ROWS_AT_ONCE):
        some = rows[first : first + ROWS_AT_ONCE]
        rendered = [_render(row, format, tokenizer) for row in some]
        encodings = offsets_tokenizer.encode_batch([r.text for r in rendered], add_special_tokens=False)
        for row, text, encoding in zip(some, rendered, encodings, strict=True):
            mask = _loss_mask(encoding, text, count_joined=format == "prompt_completion")
            ids = np.array(encoding.ids, np.int32)
            if format != "chat":
                ids, mask = _add_boundaries(ids, mask, start_ids, eos_id)
            num_truncated += len(ids) > max_seq_length
            examples.append(_example(ids, mask, max_seq_length, row))
        if progress is not None:
            progress(len(examples), len(rows))
    return Tokenized(examples, num_truncated)


def _render(row: Row, format: Format, tokenizer: PreTrainedTokenizerBase) -> Rendered:
    if format == "chat":
        return render_chat(row.fields["messages"], tokenizer, row.where)
    if format == "text":
        return Rendered(row.fields["text"], ((0, len(row.fields["text"])),))
    prompt, text = row.fields["prompt"], row.fields["prompt"] + row.fields["completion"]
    return Rendered(text, ((len(prompt), len(text)),))


def _offsets_tokenizer(tokenizer: PreTrainedTokenizerBase) -> tokenizers.Tokenizer:
    """A copy of the tokenizer whose offsets cover each token's whole text.

    The post-processor of many byte-level tokenizers leaves spaces out of the offsets (`trim_offsets`), so that a token
    that starts with the space before a turn would seem to start inside it. Without one no special tokens are added,
    which is what is wanted here.
    """
    if not tokenizer.is_fast:
        raise InputError(
            tokenizer.name_or_path or type(tokenizer).__name__,
            found="a tokenizer without character offsets",
            expected="a fast tokenizer (tokenizer.json)",
            fix="convert it once with transformers, and save it in the model's folder",
        )
    backend: tokenizers.Tokenizer = copy.deepcopy(tokenizer.backend_tokenizer)
    backend.post_processor = None
    backend.no_truncation()
    backend.no_padding()
    return backend


def _boundary_ids(tokenizer: PreTrainedTokenizerBase, format: Format) -> tuple[np.ndarray, int]:
    """The ids the tokenizer puts before a text ([S] int32, often just BOS or none), and EOS; unused for chat."""
    if format == "chat":
        return np.array([], np.int32), -1
    if tokenizer.eos_token_id is None:
        raise InputError(
            tokenizer.name_or_path or type(tokenizer).__name__,
            found="a tokenizer without an EOS token",
            expected=f"one, to end each row of format `{format}`",
            fix="set eos_token in the model's tokenizer_config.json",
        )
    plain = tokenizer("x", add_special_tokens=False)["input_ids"]
    special = tokenizer("x")["input_ids"]
    num_start = next(n for n in range(len(special)) if special[n : n + len(plain)] == plain)
    return np.array(special[:num_start], np.int32), tokenizer.eos_token_id


def _loss_mask(encoding: tokenizers.Encoding, text: Rendered, count_joined: bool) -> np.ndarray:
    """[T] bool: the tokens that start inside a span or, with `count_joined`, overlap one."""
    starts, ends = np.array(encoding.offsets, np.int64).reshape(-1, 2).T
    mask = np.zeros(len(starts), bool)
    for start, end in text.spans:
        mask |= (starts < end) & ((ends > start) if count_joined else (starts >= start))
    return mask


def _add_boundaries(
    ids: np.ndarray, mask: np.ndarray, start_ids: np.ndarray, eos_id: int
) -> tuple[np.ndarray, np.ndarray]:
    """Put the start tokens (unsupervised) and EOS (supervised) around a text, unless the text already spells them."""
    if len(start_ids) and not np.array_equal(ids[: len(start_ids)], start_ids):
        ids, mask = np.concatenate([start_ids, ids]), np.concatenate([np.zeros(len(start_ids), bool), mask])
    if not len(ids) or ids[-1] != eos_id:
        ids, mask = np.append(ids, np.int32(eos_id)), np.append(mask, True)
    return ids, mask


def _example(ids: np.ndarray, mask: np.ndarray, max_seq_length: int, row: Row) -> Example:
    """Cut to max_seq_length on the right; labels are shifted by one, so the first token is never predicted."""
    kept = mask[:max_seq_length].copy()
    kept[:1] = False
    if not kept.any():
        if mask[1:].any():
            found = (
                f"{len(ids)} tokens, and none of the first {max_seq_length} (data.max_seq_length) counts in the loss"
            )
            fix = f"raise data.max_seq_length above {int(mask[1:].argmax()) + 1}, shorten the prompt, or drop the row"
        else:
            found = f"{len(ids)} tokens, none of which follows another and counts in the loss"
            fix = "drop the row, or give it text to learn"
        raise InputError(row.where, found=found, expected="at least one token to learn", fix=fix)
    return Example(ids[:max_seq_length], kept, row.where)
