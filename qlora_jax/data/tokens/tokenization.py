"""Rows to token ids, and which of them count in the loss."""

import contextlib
import dataclasses
import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from qlora_jax.base.errors import InputError
from qlora_jax.data.chat.conversation import Rendered, Renderer
from qlora_jax.data.rows.formats import Chat, Sample, Text
from qlora_jax.data.rows.messages import check_characters
from qlora_jax.data.rows.row import RawRow, RowError
from qlora_jax.data.tokens.encoding import Encoded, Encoder
from qlora_jax.data.tokens.limits import EXPECTED, RESIZE, describe_missing
from qlora_jax.data.tokens.recipe import Recipe

MADE_HERE = {("alpaca", "instruction"), ("alpaca", "input")}
"""Keys that messages of a format have from here, for templates that tell them apart."""


@dataclass(frozen=True)
class Example:
    """A tokenized row; at least one token is supervised."""

    input_ids: np.ndarray
    """[T] int32."""
    loss_mask: np.ndarray
    """[T] bool: the tokens to be predicted, each at its own place (the loss shifts); never the first."""
    where: str
    """The row's "file:line"."""


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
    unused: Counter[str] = field(default_factory=Counter)
    """Rows that have a field, or a message's key, of which nothing was made."""


class RowTokenizer:
    """Does what a recipe says.

    Chats: the template's text, which has its own special tokens; supervised are the assistant's turns (see `chat.py`).
    Prompt and completion: the recipe's start, prompt and completion as one text, EOS; supervised are the completion and EOS.
    A token that joins a prompt's end to the start of what follows counts too, or a prompt that ends in a space would lose the answer's
    first word.
    Text: the same around the text; supervised is everything but the start.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self._encode = Encoder(recipe.tokenizer)
        texts = (recipe.template, recipe.template if recipe.tool_template is None else recipe.tool_template)
        self._renderer, self._tool_renderer = (
            Renderer(text, recipe.special_tokens, recipe.end_tokens, by_transformers=recipe.by_transformers)
            for text in texts
        )
        self._start_ids = np.array(recipe.start_ids, np.int32)

    def __call__(self, rows: Sequence[RawRow]) -> Tokens:
        """Parse, check, render and tokenize; what cannot be used is in `problems`, in the rows' order."""
        problems: dict[int, RowError] = {}
        texts: list[Rendered] = []
        samples: list[Sample] = []  # of each text
        numbers: list[int] = []
        unused: Counter[str] = Counter()
        for number, raw in enumerate(rows):
            try:
                sample, rendered = self.render(raw)
            except RowError as error:
                problems[number] = error
            else:
                unused.update(self._unused(sample))
                texts += rendered
                samples += [sample] * len(rendered)
                numbers += [number] * len(rendered)
        encoded = self._encoded(texts, [rows[number].where for number in numbers])
        is_chat = np.array([isinstance(sample, Chat) for sample in samples], bool)
        if not is_chat.all():
            encoded = self._add_boundaries(encoded, ~is_chat)
        limit = self.recipe.max_seq_length
        usable = encoded.lengths <= limit if self.recipe.too_long != "truncate" else np.ones(len(texts), bool)
        cut = _cut(encoded, limit)
        usable &= np.add.reduceat(np.append(cut.mask, False), cut.starts, dtype=np.int64) > 0 if len(texts) else True
        for text in np.flatnonzero(~usable).tolist():
            here = slice(encoded.starts[text], encoded.starts[text] + encoded.lengths[text])
            problems[numbers[text]] = self._problem(encoded.mask[here], rows[numbers[text]].where)
        for text, token in self._without_row(cut).items():
            usable[text], where = False, rows[numbers[text]].where
            found = describe_missing(token, self._encode.token(token), self.recipe.vocab_size)
            problems[numbers[text]] = RowError(where, "token without a row", found=found, expected=EXPECTED, fix=RESIZE)
        kept = np.repeat(usable, cut.lengths)
        return _hashed(
            Tokens(
                cut.input_ids[kept],
                cut.mask[kept],
                cut.lengths[usable],
                np.array([], np.uint64),
                [rows[number].where for number, is_usable in zip(numbers, usable.tolist(), strict=True) if is_usable],
                len(rows),
                int((usable & (encoded.lengths > limit)).sum()),
                len(numbers) - len(set(numbers)),
                [problems[number] for number in sorted(problems)],
                unused,
            )
        )

    def _encoded(self, texts: Sequence[Rendered], wheres: Sequence[str]) -> Encoded:
        """The texts' tokens. Raises InputError for the first that the tokenizer cannot read."""
        try:
            return self._encode(texts)
        except InputError:
            for text, where in zip(texts, wheres, strict=True):
                self._encode([text], where)
            raise

    def render(self, raw: RawRow) -> tuple[Sample, list[Rendered]]:
        """A row parsed, and the texts that it becomes.

        Raises:
            RowError: it cannot be used.
        """
        sample = self.recipe.layout.read(raw.parse())
        return sample, self._render(sample, raw.where)

    def _unused(self, sample: Sample) -> Iterable[str]:
        """Fields of a row, and keys of its messages, of which nothing was made."""
        if not isinstance(sample, Chat):
            return sample.unused
        renderer = self._renderer if sample.tools is None else self._tool_renderer
        keys = renderer.unused_keys(sample)
        return (
            *sample.unused,
            *(f"messages[].{key}" for key in keys if (self.recipe.layout.format, key) not in MADE_HERE),
        )

    def _render(self, sample: Sample, where: str) -> list[Rendered]:
        loss_on = self.recipe.loss_on
        if isinstance(sample, Chat):
            renderer = self._renderer if sample.tools is None else self._tool_renderer
            rendered = renderer.render(sample, loss_on, where)
            for text in rendered:
                check_characters(where, "what the chat template makes of it", text.text)
            return rendered
        if isinstance(sample, Text):
            return [Rendered(sample.text, ((0, len(sample.text)),))]
        whole = sample.prompt + sample.completion
        return [Rendered(whole, ((0 if loss_on == "all" else len(sample.prompt), len(whole)),))]

    def _add_boundaries(self, encoded: Encoded, at: np.ndarray) -> Encoded:
        """Put the start tokens (unsupervised) and EOS (supervised) around the rows `at` ([rows] bool), unless they spell them."""
        ids, lengths, starts = encoded.input_ids, encoded.lengths, encoded.starts
        begin, eos_id = self._start_ids, self.recipe.eos_id
        spelled = lengths >= len(begin)
        for place, token in enumerate(begin):
            spelled[spelled] = ids[starts[spelled] + place] == token
        num_before = np.where(at & ~spelled, len(begin), 0)
        # A row without a token ends with what is put before it, if that is anything.
        last = np.full(len(lengths), begin[-1] if len(begin) else -1, np.int64)
        last[lengths > 0] = ids[(starts + lengths - 1)[lengths > 0]]
        no_token = lengths + num_before == 0
        num_after = (at & ((last != eos_id) | no_token)).astype(np.int64)
        longer = lengths + num_before + num_after
        new_starts = np.cumsum(longer) - longer
        new_ids, mask = np.full(longer.sum(), eos_id, np.int32), np.ones(longer.sum(), bool)
        places = np.arange(len(ids)) + np.repeat(new_starts + num_before - starts, lengths)
        new_ids[places], mask[places] = ids, encoded.mask
        begins = new_starts[at][:, None] + np.arange(len(begin))
        new_ids[begins], mask[begins] = begin, False
        return Encoded(new_ids, mask, longer)

    def _without_row(self, encoded: Encoded) -> dict[int, int]:
        """The number of each text with a token that the embedding has no row for → the first of them."""
        vocab_size = self.recipe.vocab_size
        if vocab_size is None:
            return {}
        places = np.flatnonzero(encoded.input_ids >= vocab_size)[::-1]  # the first in a text is the last to be noted
        texts = np.searchsorted(np.cumsum(encoded.lengths), places, side="right")
        return dict(zip(texts.tolist(), encoded.input_ids[places].tolist(), strict=True))

    def _problem(self, mask: np.ndarray, where: str) -> RowError:
        """Why a row cannot be used, from its mask before it is cut."""
        limit = self.recipe.max_seq_length
        if len(mask) > limit and self.recipe.too_long != "truncate":
            fix = "raise data.max_seq_length, or cut such rows with data.too_long=truncate"
            expected = f"at most {limit} (data.max_seq_length)"
            return RowError(where, "too long", found=f"{len(mask)} tokens", expected=expected, fix=fix)
        if mask[1:].any():
            found = f"{len(mask)} tokens, and none of the first {limit} (data.max_seq_length) counts in the loss"
            fix = f"raise data.max_seq_length above {int(mask[1:].argmax()) + 1}, shorten the prompt, or drop the row"
        else:
            found = f"{len(mask)} tokens, none of which follows another and counts in the loss"
            fix = "drop the row, or give it text to learn"
        return RowError(where, "nothing to learn", found=found, expected="at least one token to learn", fix=fix)


def _cut(encoded: Encoded, limit: int) -> Encoded:
    """Cut on the right; labels are shifted by one, so the first token is never predicted."""
    lengths, mask, ids = np.minimum(encoded.lengths, limit), encoded.mask.copy(), encoded.input_ids
    mask[encoded.starts[lengths > 0]] = False
    if (encoded.lengths > limit).any():
        kept = np.arange(len(ids)) - np.repeat(encoded.starts, encoded.lengths) < limit
        ids, mask = ids[kept], mask[kept]
    return Encoded(ids, mask, lengths)


def _hashed(tokens: Tokens) -> Tokens:
    ids, masks = tokens.input_ids.tobytes(), tokens.loss_mask.tobytes()
    ends = np.cumsum(tokens.lengths).tolist()
    size = tokens.input_ids.itemsize
    hashes = [_hash(ids[size * a : size * b] + masks[a:b]) for a, b in pairwise([0, *ends])]
    return dataclasses.replace(tokens, hashes=np.array(hashes, np.uint64))


def _hash(content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def example_hash(example: Example) -> int:
    """64 bits that are equal for rows that are equal to the token."""
    return _hash(example.input_ids.tobytes() + example.loss_mask.tobytes())


def tokenize(rows: Sequence[RawRow], recipe: Recipe) -> list[Example]:
    """A few rows at once, in this process, where nothing bounds what template and tokenizer do: see `workers.tokenize_few`.

    Raises:
        RowError: the first that cannot be used.
    """
    return examples(RowTokenizer(recipe)(rows))


def rendered(row: RawRow, recipe: Recipe) -> None:
    """Write a row as the template does, and no more; whether that comes to an end is the question."""
    with contextlib.suppress(RowError):
        RowTokenizer(recipe).render(row)


def examples(tokens: Tokens) -> list[Example]:
    """Tokenized rows one by one.

    Raises:
        RowError: the first that could not be used.
    """
    if tokens.problems:
        raise tokens.problems[0]
    cuts = np.cumsum(tokens.lengths)[:-1]
    pairs = zip(np.split(tokens.input_ids, cuts), np.split(tokens.loss_mask, cuts), tokens.wheres, strict=True)
    return [Example(*pair) for pair in pairs]
