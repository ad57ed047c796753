"""Tokens and masks found from the lengths of tokens, beside those found from the tokenizer's own offsets: the same, or not attempted."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from qlora_jax.data import Rendered
from qlora_jax.data.tokens.encoding import Encoded, Encoder, token_bytes
from tests.data.test_tokenization import recipe

BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
JOINS = [("h", "i"), ("Ġ", "hi"), ("Ċ", "Ċ"), ("ð", "Ł")]
SPECIAL = ("<s>", "<s><s>", "<|im_start|>", "<|im_end|>", "é<")
CHARACTERS = [*"hi \n:7é日<s", "😀", "👩‍👩‍👧", "e\u0301", "\x00", "\u202e", "\ufeff", "\U000e0067"]
CONTROLS = ["\x04", "\x16"]
PIECES = [*CHARACTERS, *SPECIAL, "hi hi", "<|im_start|>assistant\n"]


def byte_level(
    *,
    without: Sequence[str] = (),
    unk: str | None = None,
    fuse_unk: bool = False,
    added: Sequence[AddedToken] = (),
    before: Sequence[Any] = (pre_tokenizers.Digits(individual_digits=True),),
    normalizer: Any = None,
    add_prefix_space: bool = False,
) -> tokenizers.Tokenizer:
    """A byte-level tokenizer with a few merges; `without` the bytes of some characters."""
    lacking = {BYTES.pre_tokenize_str(character)[0][0] for character in without}
    tokens = [c for c in sorted(BYTES.alphabet()) if c not in lacking] + [left + right for left, right in JOINS]
    vocabulary = {token: i for i, token in enumerate(tokens if unk is None else [unk, *tokens])}
    made = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=JOINS, unk_token=unk, fuse_unk=fuse_unk))
    made.pre_tokenizer = pre_tokenizers.Sequence([*before, pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)])
    if normalizer is not None:
        made.normalizer = normalizer
    made.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL])
    made.add_tokens(list(added))
    return made


TILING = {
    "whole": byte_level(),
    "lacking": byte_level(without=CONTROLS),
    "unknown": byte_level(without=CONTROLS, unk="<unk>"),
    "normalized": byte_level(added=[AddedToken("hi hi", normalized=True), AddedToken("日<", normalized=True)]),
    "words": byte_level(added=[AddedToken("hi", normalized=False, single_word=True)]),
    "split": byte_level(before=[pre_tokenizers.Split(tokenizers.Regex(r"\p{N}{1,3}|\s+|[^\s\p{N}]+"), "isolated")]),
}
NOT_TILING = {
    "prefix": byte_level(add_prefix_space=True),
    "normalizer": byte_level(normalizer=normalizers.NFC()),
    "fused": byte_level(without=CONTROLS, unk="<unk>", fuse_unk=True),
    "short name": byte_level(without=CONTROLS, unk="?"),
    "removing": byte_level(before=[pre_tokenizers.Split(" ", "removed")]),
    "stripping": byte_level(added=[AddedToken("<x>", lstrip=True)]),
    "not bytes": tokenizers.Tokenizer(models.WordLevel({"?": 0}, unk_token="?")),
}


@st.composite
def rendered(draw: st.DrawFn, pieces: Sequence[str]) -> Rendered:
    """A text of these pieces, some of its stretches supervised."""
    text = "".join(draw(st.lists(st.sampled_from(pieces))))
    ends = sorted(draw(st.lists(st.integers(0, len(text)), max_size=6)))
    return Rendered(text, tuple(zip(ends[::2], ends[1::2], strict=False)))


def assert_equal(found: Encoded, expected: Encoded) -> None:
    for name in ("input_ids", "mask", "lengths"):
        ours, theirs = getattr(found, name), getattr(expected, name)
        assert ours.dtype == theirs.dtype and ours.tolist() == theirs.tolist(), name


def assert_same(encoder: Encoder, texts: Sequence[Rendered]) -> bool:
    """Compare both ways; returns whether the short one was taken."""
    expected, found = encoder._by_offsets(texts), encoder._by_bytes(texts)
    if found is not None:
        assert_equal(found, expected)
    assert_equal(encoder(texts), expected)
    return found is not None


@pytest.mark.parametrize("kind", TILING)
def test_by_bytes_equals_by_offsets(kind: str) -> None:
    tokenizer = TILING[kind]
    encoder = Encoder(tokenizer.to_str())
    complete = kind not in ("lacking", "unknown")

    @settings(max_examples=150, deadline=None)
    @given(st.lists(rendered(PIECES + CONTROLS), min_size=1, max_size=5))
    def check(texts: list[Rendered]) -> None:
        has_all = complete or not any(control in text.text for control in CONTROLS for text in texts)
        assert assert_same(encoder, texts) == has_all

    check()


@pytest.mark.parametrize("kind", NOT_TILING)
def test_other_tokenizers_say_their_offsets(kind: str) -> None:
    tokenizer = NOT_TILING[kind]
    assert token_bytes(tokenizer) is None
    encoder = Encoder(tokenizer.to_str())
    texts = [Rendered("hi  日\x04😀 <s>", ((1, 4),))]
    assert_equal(encoder(texts), encoder._by_offsets(texts))


def test_nothing_to_tokenize() -> None:
    for tokenizer in (TILING["whole"], NOT_TILING["normalizer"]):
        encoded = Encoder(tokenizer.to_str())([])
        assert encoded.input_ids.size == encoded.mask.size == encoded.lengths.size == 0


def test_what_recurs_between_special_tokens_is_tokenized_once(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = Encoder(TILING["whole"].to_str())
    seen: list[str] = []

    class Listening:
        def encode_batch_fast(self, texts: list[str], **options: Any) -> Any:
            seen.extend(texts)
            return TILING["whole"].encode_batch_fast(texts, **options)

    monkeypatch.setattr(encoder, "_tokenizer", Listening())
    encoder([Rendered(f"<|im_start|>a\nbe kind<|im_end|>\n{i}", ()) for i in range(4)])
    assert sorted(seen) == sorted(["", "<|im_start|>", "a\nbe kind", "<|im_end|>", "\n0", "\n1", "\n2", "\n3"])


def test_a_real_tokenizer_takes_the_short_way(smollm2_folder: Path) -> None:
    """Its vocabulary lacks 21 bytes: a text that has one of them is tokenized with offsets, and all others need none."""
    plain = recipe({"text": "hi"}, PreTrainedTokenizerFast.from_pretrained(smollm2_folder)).tokenizer
    encoder = Encoder(plain)
    rng = np.random.default_rng(0)
    choices = np.array(
        [*PIECES, *(chr(i) for i in (*range(1, 4), *range(0x20, 0x3000, 7), *range(0x4E00, 0x9000, 31)))]
    )
    texts = [Rendered(text, ((0, len(text) // 2),)) for text in map("".join, rng.choice(choices, (2000, 12)).tolist())]
    for start in range(0, len(texts), 250):
        assert assert_same(encoder, texts[start : start + 250])
    for control in CONTROLS:
        assert not assert_same(encoder, [*texts[:3], Rendered(f"a{control}b", ((1, 3),))])
