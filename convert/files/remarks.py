"""What a model's folder says that a run should know of, though nothing is wrong with it: in lines for the log, and as limits."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from convert.files import int8, prequantized
from convert.files.companions import left_behind
from convert.files.folder import ModelFolder, some
from convert.files.head import has_own_head
from convert.files.names import Names
from convert.files.shards import FLOATS
from convert.files.stated import text_keys
from qlora_jax.data import ModelLimits
from qlora_jax.model.architecture import Architecture

NO_LIMIT = 10**9
"""As `model_max_length` a number like 1e30 means that nobody said."""
SPECIAL = ("bos_token", "eos_token", "pad_token")
FREQUENCY_TOLERANCE = 2.0**-7
"""Relative: they are stored in 16 bits by some."""


def limits_of(config: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> ModelLimits:
    """What `config.json` and tokenizer say of token ids and lengths."""
    config = text_keys(config)
    stated = {
        "max_position_embeddings in config.json": config.get("max_position_embeddings"),
        "model_max_length in tokenizer_config.json": tokenizer.model_max_length,
    }
    lengths = {name: int(value) for name, value in stated.items() if _is_number(value) and 0 < value < NO_LIMIT}
    vocab_size = config.get("vocab_size")
    return ModelLimits(vocab_size=vocab_size if type(vocab_size) is int else None, lengths=tuple(lengths.items()))


def remarks(folder: ModelFolder, config: Architecture, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """What is odd about a model that can be used, a line each."""
    if has_own_head(folder):
        yield (
            f"{folder.path}: tie_word_embeddings is true, but lm_head.weight is another matrix than the embedding: it is used, as "
            "transformers does"
        )
    yield from _not_in_4_bits(folder)
    yield from _unused_frequencies(folder, config)
    yield from tokens_without_row(folder.path, config.vocab_size, tokenizer)
    if unused := left_behind(folder.path):
        yield f"{folder.path}: {some(unused)}: neither used nor carried into merged or quantized folders"


def tokens_without_row(where: Path, vocab_size: int | None, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """A line about a tokenizer's tokens that the embedding has no row for, if there are any."""
    if vocab_size is None:
        return
    numbers = tokenizer.get_vocab()
    without = sorted((number, token) for token, number in numbers.items() if number >= vocab_size)
    if without:
        shown = some([f"{token!r} ({number})" for number, token in without])
        special = {name: getattr(tokenizer, f"{name}_id") for name in SPECIAL}
        names_of = [name for name, number in special.items() if number is not None and number >= vocab_size]
        among = f", {' and '.join(names_of)} among them" if names_of else ""
        yield (
            f"{where}: {len(without)} of the tokenizer's {len(numbers)} tokens have no row in the embedding, which has {vocab_size}: "
            f"{shown}{among}; rows and prompts with one of them cannot be used"
        )


def _not_in_4_bits(folder: ModelFolder) -> Iterator[str]:
    """Linears of a 4-bit folder that are in another format, each of which is its own."""
    plain = prequantized.plain_linears(folder) if folder.is_4bit else []
    in_8_bits = [name for name in plain if int8.is_int8(folder, name)]
    if in_16_bits := [name for name in plain if name not in in_8_bits]:
        yield f"{folder.path}: {len(in_16_bits)} linears are not in 4 bits ({some(in_16_bits)}): used in bfloat16, as they are"
    if in_8_bits:
        yield f"{folder.path}: {len(in_8_bits)} linears are in 8 bits ({some(in_8_bits)}): used in the bfloat16 that they decode to"


def _unused_frequencies(folder: ModelFolder, config: Architecture) -> Iterator[str]:
    """Old checkpoints store rotary frequencies; the ones that follow from `config.json` are used, here and in transformers."""
    ropes = [kind.rope for kind in config.kinds if kind.rope is not None]
    expected = np.array(ropes[0].frequencies if ropes else (), np.float64)
    names = Names.of(config)
    for name in folder.names:
        if names.is_ignored(name) and folder.spec(name).dtype in FLOATS:
            stored = folder.read(name).astype(np.float64)
            if stored.shape != expected.shape or not np.allclose(stored, expected, rtol=FREQUENCY_TOLERANCE, atol=0):
                yield (
                    f"{folder.path}: {name} holds other frequencies than follow from config.json, whose are used, as in transformers"
                )
                return


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
