"""Texts to token ids, many at once, and which tokens lie in the supervised spans."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import tokenizers
from tokenizers import models, pre_tokenizers

from qlora_jax.base.reading import reading
from qlora_jax.data.chat.conversation import Rendered
from qlora_jax.data.chat.jinja import Span

UNREADABLE, UNREADABLE_FIX = "a text that the tokenizer cannot read", "drop it, or take a model with a sound tokenizer"


@dataclass(frozen=True)
class Encoded:
    """Rows of tokens, laid end to end."""

    input_ids: np.ndarray
    """[all tokens] int32."""
    mask: np.ndarray
    """[all tokens] bool: supervised."""
    lengths: np.ndarray
    """[rows] int64."""

    @property
    def starts(self) -> np.ndarray:
        """[rows] int64: where each begins."""
        return np.cumsum(self.lengths) - self.lengths


class Encoder:
    """One fast tokenizer, without special tokens of its own.

    A mask needs to know where in the text each token is. Tokenizers can say, but that is a third of their work. The tokens of a
    byte-level tokenizer tile the text, so there the lengths of the tokens say it as well. Such a tokenizer also cuts a text at the
    special tokens before it does anything else, and never looks across such a cut: what recurs between them, a system prompt in
    every row say, is tokenized once.
    """

    def __init__(self, tokenizer: str) -> None:
        self._tokenizer = tokenizers.Tokenizer.from_str(tokenizer)
        self._token_bytes = token_bytes(self._tokenizer)
        self._cut = piece_splitter(self._tokenizer)

    def __call__(self, texts: Sequence[Rendered], where: str = "a text") -> Encoded:
        """Return the texts' tokens and masks; `where` names the texts in errors.

        Supervised are the tokens that overlap a span: one that joins a prompt's last space to an answer's first word is learned.

        Raises:
            InputError: the tokenizer cannot read a text.
        """
        if not texts:
            return Encoded(np.array([], np.int32), np.array([], bool), np.array([], np.int64))
        if self._token_bytes is not None and (encoded := self._by_bytes(texts, where)) is not None:
            return encoded
        return self._by_offsets(texts, where)

    def token(self, number: int) -> str | None:
        """Return what a token is called."""
        return self._tokenizer.id_to_token(number)

    def _by_bytes(self, texts: Sequence[Rendered], where: str = "a text") -> Encoded | None:
        """None where the tokens do not add up to the texts."""
        cut = [self._cut(text.text) for text in texts]
        numbers: dict[str, int] = {}
        order = [numbers.setdefault(piece, len(numbers)) for pieces in cut for piece in pieces]
        with reading(where, UNREADABLE, fix=UNREADABLE_FIX):
            encodings = self._tokenizer.encode_batch_fast(list(numbers), add_special_tokens=False)
        piece_ids, piece_lengths = _ids(encodings)
        ends = np.cumsum(self._token_bytes[piece_ids], dtype=np.int64)
        piece_bytes = np.array([len(piece) if piece.isascii() else len(piece.encode()) for piece in numbers], np.int64)
        if not np.array_equal(np.append(0, ends)[np.cumsum(piece_lengths)], np.cumsum(piece_bytes)):
            return None
        firsts = np.cumsum([0, *map(len, cut[:-1])])
        ids = piece_ids[_laid_out(piece_lengths, order)]
        lengths = np.add.reduceat(piece_lengths[order], firsts)
        ends = np.cumsum(self._token_bytes[ids], dtype=np.int64)
        bases = np.append(0, np.cumsum(np.add.reduceat(piece_bytes[order], firsts))[:-1])
        spans = [
            (base + start, base + end)
            for base, text in zip(bases.tolist(), texts, strict=True)
            for start, end in _in_bytes(text)
        ]
        ranges = np.stack([ends - self._token_bytes[ids], ends], axis=1)
        return Encoded(ids, _covered(ranges, spans), lengths)

    def _by_offsets(self, texts: Sequence[Rendered], where: str = "a text") -> Encoded:
        with reading(where, UNREADABLE, fix=UNREADABLE_FIX):
            encodings = self._tokenizer.encode_batch([text.text for text in texts], add_special_tokens=False)
        ids, lengths = _ids(encodings)
        offsets = chain.from_iterable(chain.from_iterable(encoding.offsets for encoding in encodings))
        # All texts as one: each token and each span moves by the lengths of the texts before its own.
        bases = np.cumsum([0, *(len(text.text) + 1 for text in texts[:-1])])
        ranges = np.fromiter(offsets, np.int64, 2 * len(ids)).reshape(-1, 2) + np.repeat(bases, lengths)[:, None]
        spans = [
            (base + start, base + end)
            for base, text in zip(bases.tolist(), texts, strict=True)
            for start, end in text.spans
        ]
        return Encoded(ids, _covered(ranges, spans), lengths)


def token_bytes(tokenizer: tokenizers.Tokenizer) -> np.ndarray | None:
    """[vocabulary] int64: the bytes of text that each token stands for; None unless the sum tells whether a text's tokens tile it.

    It does for byte-level BPE tokenizers (GPT-2, Llama 3, SmolLM2) that change nothing before and swallow no white space around
    special tokens: there each character of a token is one byte. Where the vocabulary lacks a byte (SmolLM2's lacks 21, a few control
    characters among them), the tokenizer drops it, and the sum is less than the text; or it writes one unknown token for it, which
    counts with the length of its name, and the sum is more.
    """
    model, splits, added = tokenizer.model, tokenizer.pre_tokenizer, tokenizer.get_added_tokens_decoder()
    steps = list(splits) if isinstance(splits, pre_tokenizers.Sequence) else [splits]
    *before, last = steps
    vocabulary = tokenizer.get_vocab(with_added_tokens=False)
    tiles = (
        tokenizer.normalizer is None
        and isinstance(model, models.BPE)
        and not (model.dropout or model.continuing_subword_prefix or model.end_of_word_suffix or model.byte_fallback)
        and (model.unk_token is None or (len(model.unk_token) > 1 and not model.fuse_unk))
        and all(isinstance(step, pre_tokenizers.Split | pre_tokenizers.Digits) for step in before)
        and all(step.behavior != "removed" for step in before if isinstance(step, pre_tokenizers.Split))
        and isinstance(last, pre_tokenizers.ByteLevel)
        and not last.add_prefix_space
        and not any(token.lstrip or token.rstrip for token in added.values())
        and not any(not token.content.isascii() and token.content in vocabulary for token in added.values())
    )
    if not tiles:
        return None
    lengths = np.zeros(1 + max(chain(vocabulary.values(), added)), np.int64)
    for token, index in vocabulary.items():
        lengths[index] = len(token)
    for index, token in added.items():
        lengths[index] = len(token.content.encode())
    return lengths


def piece_splitter(tokenizer: tokenizers.Tokenizer) -> Callable[[str], list[str]]:
    """Cuts a text into special tokens and what is between them, as the tokenizer does: the leftmost, and of those the longest.

    Tokens that are looked for after normalizing are found by the tokenizer, in the pieces. Whole words (`single_word`) depend on what
    is beside them, so where there is one, nothing is cut.
    """
    added = tokenizer.get_added_tokens_decoder().values()
    special = sorted(
        {token.content for token in added if not token.normalized and token.content}, key=len, reverse=True
    )
    if not special or any(token.single_word for token in added):
        return lambda text: [text]
    return re.compile(f"({'|'.join(map(re.escape, special))})").split


def _laid_out(lengths: np.ndarray, order: Sequence[int]) -> np.ndarray:
    """[all tokens] int64: the tokens' places when pieces of these lengths ([pieces], stored end to end) are laid in this order."""
    starts, chosen = (np.cumsum(lengths) - lengths)[order], lengths[order]
    return np.arange(chosen.sum()) + np.repeat(starts - (np.cumsum(chosen) - chosen), chosen)


def _ids(encodings: Sequence[tokenizers.Encoding]) -> tuple[np.ndarray, np.ndarray]:
    rows = [encoding.ids for encoding in encodings]
    lengths = np.fromiter(map(len, rows), np.int64, len(rows))
    return np.fromiter(chain.from_iterable(rows), np.int32, int(lengths.sum())), lengths


def _in_bytes(text: Rendered) -> Sequence[Span]:
    """The spans as ranges of UTF-8 bytes."""
    if text.text.isascii():
        return text.spans
    data = np.frombuffer(text.text.encode(), np.uint8)
    starts = np.append(np.flatnonzero(data & 0xC0 != 0x80), len(data))  # all but continuation bytes start a character
    return [(int(starts[start]), int(starts[end])) for start, end in text.spans]


def _covered(ranges: np.ndarray, spans: Sequence[Span]) -> np.ndarray:
    """[tokens] bool: which ranges [tokens, 2] overlap one of the ordered spans, or are empty and inside one."""
    if not spans:
        return np.zeros(len(ranges), bool)
    (starts, ends), bounds = ranges.T, np.array(spans, np.int64)
    # The last span that begins at or before the token's start, or before its end.
    at_start, at_end = np.searchsorted(bounds[:, 0], starts, side="right"), np.searchsorted(bounds[:, 0], ends)
    span = np.maximum(at_start, at_end) - 1
    return (span >= 0) & (starts < bounds[span, 1])
