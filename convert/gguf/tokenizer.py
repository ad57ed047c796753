"""The tokenizer of a GGUF file, as the files a Hugging Face folder has: byte-level BPE, or SentencePiece's BPE.

A GGUF file does not hold the rules of byte-level BPE, only a name for them (`tokenizer.ggml.pre`): how text is cut before merges,
whether a piece that is a token is taken whole, whether text is normalized. They are those of the families' own tokenizers.
`smollm` means: digits are cut off one by one, and what is between them is cut by GPT-2's expression.

SentencePiece's BPE (`tokenizer.ggml.model` is `llama`) has scores instead of merges: two pieces that make a token may be merged,
best score first. Gemma's scores do not follow its merges; the order of its tokens does.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

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
READ_OR_HARMLESS = {"model", "pre", "tokens", "token_type", "merges", "scores", "add_bos_token", "add_space_prefix"}
MUST_BE_FALSE = ("add_eos_token", "add_sep_token", "remove_extra_whitespaces")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cut:
    """Rules by which a byte-level BPE tokenizer cuts text before merges."""

    expression: str | None = None
    """What a piece is; None for GPT-2's."""
    digits_first: bool = False
    takes_whole_tokens: bool = False
    """Whether a piece that is a token is that token, though merges would not lead to it."""
    composes: bool = False
    """Whether text is brought to Unicode's composed form (NFC) first."""


_ENGLISH = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = Cut(expression=rf"{_ENGLISH}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_REST}", takes_whole_tokens=True)
_QWEN2 = rf"{_ENGLISH}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_REST}"
CUTS = {
    "gpt-2": Cut(),
    "smollm": Cut(digits_first=True),
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": Cut(expression=_QWEN2, composes=True),
    "deepseek-r1-qwen": Cut(expression=_QWEN2),
}
"""By `tokenizer.ggml.pre`."""


def write_tokenizer(folder: Path, gguf_path: Path, fields: Mapping[str, Any], max_length: int) -> None:
    """Write `tokenizer.json`, `tokenizer_config.json` and, if the file has one, `chat_template.jinja` into `folder`.

    Args:
        folder: an existing folder.
        gguf_path: the file, for messages.
        fields: the file's fields, checked; read are the architecture and those under `tokenizer.`.
        max_length: the model's positions.

    Raises:
        InputError: the tokenizer is of another kind, or has a setting that is not supported, by name.
    """
    ggml = {name.removeprefix("tokenizer.ggml."): v for name, v in fields.items() if name.startswith("tokenizer.ggml.")}
    is_sentencepiece = ggml.get("model") == "llama"
    _check(gguf_path, fields, ggml)
    names = {key: ggml["tokens"][ggml[which]] for key, which in SPECIAL_TOKENS.items() if which in ggml}
    adds_bos = ggml.get("add_bos_token", is_sentencepiece) and "bos_token" in names
    with (
        replacing(folder / "tokenizer.json") as file,
        reading(gguf_path, "a tokenizer that cannot be made", fix="download it again"),
    ):
        if not is_sentencepiece:
            tokenizer = _byte_level(ggml)
        elif str(fields["general.architecture"]).startswith("gemma"):
            tokenizer = _gemma(ggml, names.get("unk_token"))
        else:
            tokenizer = _sentencepiece(ggml, names.get("unk_token"))
        _add_tokens(tokenizer, ggml)
        if adds_bos:
            bos = names["bos_token"]
            tokenizer.post_processor = processors.TemplateProcessing(
                single=[bos, "$A"], pair=[bos, "$A", f"{bos}:1", "$B:1"], special_tokens=[(bos, ggml["bos_token_id"])]
            )
        file.write(tokenizer.to_str(pretty=True).encode())
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # transformers 5 rebuilds GPT2Tokenizer, without the digits' rule
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
    }
    write_json(folder / "tokenizer_config.json", config | ({"add_bos_token": True} if adds_bos else {}) | names)
    if template := fields.get("tokenizer.chat_template"):
        with replacing(folder / "chat_template.jinja") as file:
            file.write(template.encode())


def _check(path: Path, fields: Mapping[str, Any], ggml: Mapping[str, Any]) -> None:
    kind, pre = ggml.get("model"), ggml.get("pre", "default")
    needed = ["tokens", "token_type"]
    problems = []
    if kind == "gpt2":
        needed.append("merges")
        if pre not in CUTS:
            problems.append(f"tokenizer.ggml.pre = {pre!r}, expected one of {', '.join(map(repr, CUTS))}")
    elif kind == "llama":
        needed += ["scores"] if "merges" not in ggml else []
        if pre not in ("default", "llama-spm"):
            problems.append(f"tokenizer.ggml.pre = {pre!r}, expected 'default'")
    else:
        problems.append(f"tokenizer.ggml.model = {kind!r}, expected 'gpt2' or 'llama'")
    problems += [f"tokenizer.ggml.{key} = True, expected False" for key in MUST_BE_FALSE if ggml.get(key)]
    if kind == "gpt2" and ggml.get("add_space_prefix"):
        problems.append("tokenizer.ggml.add_space_prefix = True, expected False")
    problems += [f"no tokenizer.ggml.{key}" for key in needed if key not in ggml]
    bos = ggml["tokens"][ggml["bos_token_id"]] if "bos_token_id" in ggml and "tokens" in ggml else ""
    if ggml.get("add_bos_token", kind == "llama") and bos.startswith("$"):  # the library takes it for the text's place
        problems.append(f"{bos!r} cannot be put before a text")
    known = {f"tokenizer.ggml.{key}" for key in (*READ_OR_HARMLESS, *MUST_BE_FALSE)} | {"tokenizer.chat_template"}
    problems += [
        f"{name} is not supported"
        for name in fields
        if name.startswith("tokenizer.") and name not in known and not name.endswith("_token_id")
    ]
    if problems:
        raise InputError(path, found="a tokenizer that cannot be read\n" + "\n".join(f"    {p}" for p in problems))


def _byte_level(ggml: Mapping[str, Any]) -> tokenizers.Tokenizer:
    cut = CUTS[ggml["pre"]]
    vocab = {token: number for number, token in enumerate(ggml["tokens"])}
    merges = [tuple(merge.split(" ")) for merge in ggml["merges"]]
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=cut.takes_whole_tokens))
    first: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if cut.digits_first else []
    if cut.expression is not None:
        first.append(pre_tokenizers.Split(tokenizers.Regex(cut.expression), behavior="isolated"))
    spelling = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=cut.expression is None)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*first, spelling])
    if cut.composes:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(ggml: Mapping[str, Any], unknown: str | None) -> tokenizers.Tokenizer:
    """Llama 1's and 2's, and Mistral's: a space before the text, unless the file says otherwise."""
    tokens, prefix = ggml["tokens"], ggml.get("add_space_prefix", True)
    merges = _given_merges(ggml) or _merges(tokens, ggml["scores"])
    tokenizer = tokenizers.Tokenizer(_spm_model(tokens, merges, unknown))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(
        replacement="▁", prepend_scheme="first" if prefix else "never", split=False
    )
    strip = [decoders.Strip(content=" ", left=1)] if prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer


def _gemma(ggml: Mapping[str, Any], unknown: str | None) -> tokenizers.Tokenizer:
    """Gemma's: no space before the text; runs of spaces are tokens, which files spell with spaces."""
    tokens = ["▁" * len(token) if token and not token.strip(" ") else token for token in ggml["tokens"]]
    merges = _given_merges(ggml) or _merges(tokens, range(0, -len(tokens), -1))
    tokenizer = tokenizers.Tokenizer(_spm_model(tokens, merges, unknown))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


def _spm_model(tokens: Sequence[str], merges: list[tuple[str, str]], unknown: str | None) -> models.BPE:
    vocab = {token: number for number, token in enumerate(tokens)}
    return models.BPE(vocab=vocab, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)


def _given_merges(ggml: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(left, right) for left, _, right in (merge.partition(" ") for merge in ggml.get("merges", ()))]


def _merges(tokens: Sequence[str], scores: Sequence[float]) -> list[tuple[str, str]]:
    """Every two tokens that make a third, best score first; of equal scores the longest left side first."""
    vocab = {token: number for number, token in enumerate(tokens)}
    found: list[tuple[float, int, int, int, int]] = []
    for token, score in zip(tokens, scores, strict=True):
        for cut in range(1, len(token)):
            left, right = vocab.get(token[:cut]), vocab.get(token[cut:])
            if left is not None and right is not None:
                found.append((-score, -cut, cut - len(token), left, right))
    found.sort(key=lambda pair: pair[:3])
    return [(tokens[left], tokens[right]) for *_, left, right in found]


def _add_tokens(tokenizer: tokenizers.Tokenizer, ggml: Mapping[str, Any]) -> None:
    kinds = [
        (token, kind)
        for token, kind in zip(ggml["tokens"], ggml["token_type"], strict=True)
        if kind in (CONTROL, USER_DEFINED)
        and tokenizer.token_to_id(token) is not None  # not a run of spaces, spelled anew
    ]
    tokenizer.add_special_tokens([_added(token) for token, kind in kinds if kind == CONTROL])
    tokenizer.add_tokens([_added(token, special=False) for token, kind in kinds if kind == USER_DEFINED])


def _added(token: str, *, special: bool = True) -> tokenizers.AddedToken:
    return tokenizers.AddedToken(token, normalized=False, special=special)
