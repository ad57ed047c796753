"""Rows to token ids, and which of them count in the loss."""

import copy
import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Literal

import numpy as np
import tokenizers
from transformers import PreTrainedTokenizerBase

from qlora_jax.data.chat import Rendered, Renderer
from qlora_jax.data.formats import Chat, Completion, Layout, Sample, Text
from qlora_jax.data.rows import RawRow, RowError
from qlora_jax.data.templates import ChatTemplate
from qlora_jax.data_settings import DataSettings, LossOn
from qlora_jax.errors import InputError

REVISION = 1
"""Raised whenever the same rows may become other tokens or other masks, so that none that were kept are used again."""


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

    def identity(self) -> str:
        """Equal for recipes that do the same."""
        text = json.dumps([REVISION, dataclasses.asdict(self)], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def make_recipe(
    tokenizer: PreTrainedTokenizerBase, layout: Layout, settings: DataSettings, template: ChatTemplate | None
) -> Recipe:
    """How rows of one layout become tokens.

    Args:
        template: for formats that become chats; None where there is none to render.

    Raises:
        InputError: the tokenizer is not a fast one or lacks EOS, or `data.loss_on` says nothing about such rows.
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
    return Recipe(
        layout,
        _plain_tokenizer(tokenizer).to_str(),
        {key: str(value) for key, value in tokenizer.special_tokens_map.items() if isinstance(value, str)},
        tuple(token.content for token in tokenizer.added_tokens_decoder.values()),
        _start_ids(tokenizer),
        -1 if tokenizer.eos_token_id is None else tokenizer.eos_token_id,
        template.text if template else "",
        settings.loss_on,
        settings.max_seq_length,
        settings.too_long,
    )


def _plain_tokenizer(tokenizer: PreTrainedTokenizerBase) -> tokenizers.Tokenizer:
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


def _start_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    plain = tokenizer("x", add_special_tokens=False)["input_ids"]
    special = tokenizer("x")["input_ids"]
    num_start = next(n for n in range(len(special)) if special[n : n + len(plain)] == plain)
    return tuple(special[:num_start])


@dataclass
class Tokens:
    """Some rows, tokenized; flat, so that they travel between processes and to the disk as they are."""

    input_ids: np.ndarray
    """[all tokens] int32."""
    loss_mask: np.ndarray
    """[all tokens] bool."""
    lengths: np.ndarray
    """[rows] int64."""
    hashes: np.ndarray
    """[rows] uint64, equal for rows that are equal to the token."""
    wheres: list[str]
    num_read: int
    num_truncated: int = 0
    num_split: int = 0
    """Rows more than there were, because a template rewrites turns."""
    problems: list[RowError] = field(default_factory=list)


class RowTokenizer:
    """Does what a recipe says.

    Chats: the template's text, which has its own special tokens; supervised are the assistant's turns (see `chat.py`).
    A token counts when it starts inside a turn.
    Prompt and completion: the recipe's start, prompt and completion as one text, EOS; supervised are the completion and EOS. A token
    that joins the prompt's end to the completion's start counts too, or a prompt that ends in a space would lose the completion's
    first word.
    Text: the same around the text; supervised is everything but the start.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self._tokenizer = tokenizers.Tokenizer.from_str(recipe.tokenizer)
        self._renderer = Renderer(recipe.template, recipe.special_tokens, recipe.end_tokens)
        self._start_ids = np.array(recipe.start_ids, np.int32)

    def __call__(self, rows: Sequence[RawRow]) -> Tokens:
        """Parse, check, render and tokenize; what cannot be used is in `problems`, in the rows' order."""
        problems: dict[int, RowError] = {}
        rendered: list[tuple[int, str, Sample, Rendered]] = []
        for number, raw in enumerate(rows):
            try:
                row = raw.parse()
                sample = self.recipe.layout.read(row)
                rendered += [(number, row.where, sample, text) for text in self._render(sample, row.where)]
            except RowError as error:
                problems[number] = error
        examples, num_truncated = [], 0
        encoded = self._encode(
            [text for *_, text in rendered], [isinstance(sample, Completion) for *_, sample, _ in rendered]
        )
        for (number, where, sample, _), (ids, mask) in zip(rendered, encoded, strict=True):
            if not isinstance(sample, Chat):
                ids, mask = self._add_boundaries(ids, mask)
            try:
                examples.append(self._example(ids, mask, where))
            except RowError as error:
                problems[number] = error
            else:
                num_truncated += len(ids) > self.recipe.max_seq_length
        num_split = len(rendered) - len({number for number, *_ in rendered})
        return _flat(examples, len(rows), num_truncated, num_split, [problems[number] for number in sorted(problems)])

    def _render(self, sample: Sample, where: str) -> list[Rendered]:
        loss_on = self.recipe.loss_on
        if isinstance(sample, Chat):
            return self._renderer.render(sample, loss_on, where)
        if isinstance(sample, Text):
            return [Rendered(sample.text, ((0, len(sample.text)),))]
        text = sample.prompt + sample.completion
        return [Rendered(text, ((0 if loss_on == "all" else len(sample.prompt), len(text)),))]

    def _encode(
        self, texts: Sequence[Rendered], count_joined: Sequence[bool]
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(ids [T] int32, mask [T] bool) of each text: the tokens that start inside a span or, with `count_joined`, overlap one."""
        if not texts:
            return
        encodings = self._tokenizer.encode_batch([text.text for text in texts], add_special_tokens=False)
        lengths = [len(encoding) for encoding in encodings]
        ids = np.fromiter(chain.from_iterable(encoding.ids for encoding in encodings), np.int32, sum(lengths))
        offsets = chain.from_iterable(chain.from_iterable(encoding.offsets for encoding in encodings))
        # All texts as one: each token and each span moves by the lengths of the texts before its own.
        bases = np.cumsum([0, *(len(text.text) + 1 for text in texts[:-1])])
        ranges = np.fromiter(offsets, np.int64, 2 * len(ids)).reshape(-1, 2) + np.repeat(bases, lengths)[:, None]
        spans = [
            (base + start, base + end)
            for base, text in zip(bases.tolist(), texts, strict=True)
            for start, end in text.spans
        ]
        mask = _covered(ranges, np.array(spans, np.int64).reshape(-1, 2), np.repeat(count_joined, lengths))
        ends = np.cumsum(lengths)
        for end, length in zip(ends.tolist(), lengths, strict=True):
            yield ids[end - length : end], mask[end - length : end]

    def _add_boundaries(self, ids: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Put the start tokens (unsupervised) and EOS (supervised) around a text, unless the text already spells them."""
        start, eos_id = self._start_ids, self.recipe.eos_id
        if len(start):
            if np.array_equal(ids[: len(start)], start):
                ids, mask = ids[len(start) :], mask[len(start) :]
            ids, mask = np.concatenate([start, ids]), np.concatenate([np.zeros(len(start), bool), mask])
        if not len(ids) or ids[-1] != eos_id:
            ids, mask = np.append(ids, np.int32(eos_id)), np.append(mask, True)
        return ids, mask

    def _example(self, ids: np.ndarray, mask: np.ndarray, where: str) -> Example:
        """Cut to max_seq_length on the right; labels are shifted by one, so the first token is never predicted."""
        limit = self.recipe.max_seq_length
        if len(ids) > limit and self.recipe.too_long != "truncate":
            fix = "raise data.max_seq_length, or choose data.too_long: truncate or skip"
            expected = f"at most {limit} (data.max_seq_length)"
            raise RowError(where, "too long", found=f"{len(ids)} tokens", expected=expected, fix=fix)
        kept = mask[:limit].copy()
        kept[:1] = False
        if kept.any():
            return Example(ids[:limit], kept, where)
        if mask[1:].any():
            found = f"{len(ids)} tokens, and none of the first {limit} (data.max_seq_length) counts in the loss"
            fix = f"raise data.max_seq_length above {int(mask[1:].argmax()) + 1}, shorten the prompt, or drop the row"
        else:
            found = f"{len(ids)} tokens, none of which follows another and counts in the loss"
            fix = "drop the row, or give it text to learn"
        raise RowError(where, "nothing to learn", found=found, expected="at least one token to learn", fix=fix)


def _covered(ranges: np.ndarray, spans: np.ndarray, count_joined: np.ndarray) -> np.ndarray:
    """[tokens] bool: which ranges [tokens, 2] start inside one of the ordered spans [S, 2] or, where `count_joined`, overlap one."""
    if not len(spans):
        return np.zeros(len(ranges), bool)
    starts, ends = ranges.T
    # The last span that begins at or before the token's start; and, for an overlap, before its end.
    at_start = np.searchsorted(spans[:, 0], starts, side="right") - 1
    at_end = np.searchsorted(spans[:, 0], ends, side="left") - 1
    span = np.where(count_joined, np.maximum(at_end, at_start), at_start)
    return (span >= 0) & (starts < spans[span, 1])


def _flat(
    examples: Sequence[Example], num_read: int, num_truncated: int, num_split: int, problems: list[RowError]
) -> Tokens:
    hashes = [example_hash(example) for example in examples]
    return Tokens(
        np.concatenate([np.array([], np.int32), *(example.input_ids for example in examples)]),
        np.concatenate([np.array([], bool), *(example.loss_mask for example in examples)]),
        np.array([len(example.input_ids) for example in examples], np.int64),
        np.array(hashes, np.uint64),
        [example.where for example in examples],
        num_read,
        num_truncated,
        num_split,
        problems,
    )


def example_hash(example: Example) -> int:
    """64 bits that are equal for rows that are equal to the token."""
    content = example.input_ids.tobytes() + example.loss_mask.tobytes()
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def tokenize(rows: Sequence[RawRow], recipe: Recipe) -> list[Example]:
    """A few rows at once, in this process.

    Raises:
        RowError: the first that cannot be used.
    """
    tokens = RowTokenizer(recipe)(rows)
    if tokens.problems:
        raise tokens.problems[0]
    cuts = np.cumsum(tokens.lengths)[:-1]
    pairs = zip(np.split(tokens.input_ids, cuts), np.split(tokens.loss_mask, cuts), tokens.wheres, strict=True)
    return [Example(*pair) for pair in pairs]
