"""What a model can take: token ids that its embedding has rows for, and rows of text as long as its positions.

A tokenizer and an embedding need not agree. Fewer tokens than rows are common (the embedding is padded), more are harmless until one of
them is used: then there is no vector for it, and PyTorch stops with an IndexError where JAX would take the last row.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qlora_jax.base.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase  # slow to import; a process that tokenizes need not

RESIZE = (
    "give the embedding rows for the tokenizer's tokens (in transformers: model.resize_token_embeddings(len(tokenizer)), then save the "
    "model), or leave the token out"
)
EXPECTED = "tokens that the model's embedding has rows for"


@dataclass(frozen=True, kw_only=True)
class ModelLimits:
    """What a model's folder states; None and empty where it states nothing."""

    vocab_size: int | None = None
    """Rows of the embedding."""
    lengths: tuple[tuple[str, int], ...] = ()
    """Tokens that a row may have, by the name of whatever says so."""


NO_LIMITS = ModelLimits()


def without_row(input_ids: Iterable[int], vocab_size: int | None) -> int | None:
    """The first of some token ids that an embedding of `vocab_size` rows has no row for."""
    return None if vocab_size is None else next((int(token) for token in input_ids if token >= vocab_size), None)


def describe_missing(token: int, name: object, vocab_size: int | None) -> str:
    """A token without a row, in words."""
    rows = vocab_size or 0
    return f"token {name!r} is number {token}, and the model's embedding has {rows} rows (0 to {rows - 1})"


def check_rows(
    input_ids: Iterable[int], vocab_size: int | None, tokenizer: "PreTrainedTokenizerBase", where: object
) -> None:
    """Check that an embedding has a row for every token id.

    Raises:
        InputError: (at `where`) it has none for one of them, which is named.
    """
    token = without_row(input_ids, vocab_size)
    if token is not None:
        name = tokenizer.convert_ids_to_tokens(token)
        raise InputError(where, found=describe_missing(token, name, vocab_size), expected=EXPECTED, fix=RESIZE)


def padding_id(tokenizer: "PreTrainedTokenizerBase", vocab_size: int | None) -> int:
    """The token that fills lines up: the tokenizer's padding token, or EOS, or 0, whichever has a row first.

    Equal to EOS in many models: harmless, since labels and not ids say what counts, and no token attends to what follows it.
    """
    found = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((token for token in found if token is not None and without_row([token], vocab_size) is None), 0)
