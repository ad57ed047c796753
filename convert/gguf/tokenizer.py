"""The tokenizer of a GGUF file, as the files a Hugging Face folder has: byte-level BPE with tokens and merges.

A GGUF file does not hold the tokenizer's rules, only a name for them (`tokenizer.ggml.pre`). `smollm` means: digits are
cut off one by one, what is between them is cut by GPT-2's expression, and the pieces are spelled in GPT-2's byte
alphabet.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from convert.files.shards import replacing, write_json
from qlora_jax.base.errors import InputError
from qlora_jax.base.reading import reading

CONTROL, USER_DEFINED = 3, 4
"""`tokenizer.ggml.token_type`s of tokens that are found in the text before it is cut; control tokens are special."""

SPECIAL_TOKENS = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}
READ_OR_HARMLESS = {"model", "pre", "tokens", "token_type", "merges", "scores"}
MUST_BE_FALSE = ("add_bos_token", "add_eos_token", "add_space_prefix")


def write_tokenizer(folder: Path, gguf_path: Path, fields: Mapping[str, Any], max_length: int) -> None:
    """Write `tokenizer.json`, `tokenizer_config.json` and, if the file has one, `chat_template.jinja` into `folder`.

    Args:
        folder: an existing folder.
        gguf_path: the file, for messages.
        fields: the file's fields; read are those under `tokenizer.`.
        max_length: the model's positions.

    Raises:
        InputError: the tokenizer is not byte-level BPE, or has a setting that is not supported, by name.
    """
    ggml = {name.removeprefix("tokenizer.ggml."): v for name, v in fields.items() if name.startswith("tokenizer.ggml.")}
    _check(gguf_path, fields, ggml)
    with (
        replacing(folder / "tokenizer.json") as file,
        reading(gguf_path, "a tokenizer that cannot be made", fix="download it again"),
    ):
        file.write(_tokenizer(ggml).to_str(pretty=True).encode())
    names = {key: ggml["tokens"][ggml[which]] for key, which in SPECIAL_TOKENS.items() if which in ggml}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # transformers 5 rebuilds GPT2Tokenizer, without the digits' rule
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
    }
    write_json(folder / "tokenizer_config.json", config | names)
    if template := fields.get("tokenizer.chat_template"):
        with replacing(folder / "chat_template.jinja") as file:
            file.write(template.encode())


def _check(path: Path, fields: Mapping[str, Any], ggml: Mapping[str, Any]) -> None:
    problems = [
        f"tokenizer.ggml.{key} = {ggml.get(key)!r}, expected {expected!r}"
        for key, expected in (("model", "gpt2"), ("pre", "smollm"))
        if ggml.get(key) != expected
    ]
    problems += [f"tokenizer.ggml.{key} = True, expected False" for key in MUST_BE_FALSE if ggml.get(key)]
    problems += [f"no tokenizer.ggml.{key}" for key in ("tokens", "token_type", "merges") if key not in ggml]
    known = {f"tokenizer.ggml.{key}" for key in (*READ_OR_HARMLESS, *MUST_BE_FALSE)} | {"tokenizer.chat_template"}
    problems += [
        f"{name} is not supported"
        for name in fields
        if name.startswith("tokenizer.") and name not in known and not name.endswith("_token_id")
    ]
    if problems:
        raise InputError(path, found="a tokenizer that cannot be read\n" + "\n".join(f"    {p}" for p in problems))


def _tokenizer(ggml: Mapping[str, Any]) -> tokenizers.Tokenizer:
    vocab = {token: number for number, token in enumerate(ggml["tokens"])}
    merges = [tuple(merge.split(" ")) for merge in ggml["merges"]]
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = list(zip(ggml["tokens"], ggml["token_type"], strict=True))
    tokenizer.add_special_tokens([_added(token) for token, kind in kinds if kind == CONTROL])
    tokenizer.add_tokens([_added(token, special=False) for token, kind in kinds if kind == USER_DEFINED])
    return tokenizer


def _added(token: str, *, special: bool = True) -> tokenizers.AddedToken:
    return tokenizers.AddedToken(token, normalized=False, special=special)
