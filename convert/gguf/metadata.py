"""The metadata of a GGUF file: its values' kinds checked, and the `config.json` written from it."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from convert.gguf.architectures import ARCHITECTURES, SIZES, GGUFArchitecture
from qlora_jax.base.errors import InputError
from qlora_jax.base.reading import is_unicode, shown

FEEDS_NO_MODEL = ("GGUF.", "general.", "tokenizer.", "quantize.", "split.")
MAX_SIZE, MAX_NUMBER, MAX_LAYERS = 2**27, 1e30, 10_000
MAX_TOKEN_LENGTH = 1024
"""Characters of a token: splitting one into merges takes the square of it."""


def check_metadata(path: Path, fields: Mapping[str, Any]) -> GGUFArchitecture:
    """Refuse values of wrong kinds and settings that would change the model and are not carried over; the file's architecture."""
    name = fields.get("general.architecture")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        fix = "give the model it was made from, as a folder or a hub id"
        expected = f"one of {', '.join(ARCHITECTURES)}"
        raise InputError(path, found=f"architecture {shown(name)}", expected=expected, fix=fix)
    architecture = ARCHITECTURES[name]
    kinds = {f"{name}.{key}": kind for key, kind in architecture.all_kinds.items()} | _TOKENIZER_KINDS
    kinds |= {key: "a token's number" for key in fields if key.endswith("_token_id")}
    problems = [
        f"{key} is {shown(value)}, expected {kinds[key]}"
        for key, value in fields.items()
        if key in kinds and not _IS[kinds[key]](value)
    ]
    problems += _bad_tokens(fields)
    if fields.get(f"{name}.block_count", 0) and not problems and fields[f"{name}.block_count"] > MAX_LAYERS:
        problems.append(f"{name}.block_count is {fields[f'{name}.block_count']}, expected at most {MAX_LAYERS}")
    if problems:
        raise InputError(path, found="; ".join(problems[:20]), fix="download it again")
    if fields.get("split.count", 1) > 1:
        found = f"split.count = {fields['split.count']}: a part of a model"
        raise InputError(path, found=found, fix="make one file of the parts with llama.cpp's llama-gguf-split --merge")
    unknown = [f"{n} = {shown(v)}" for n, v in fields.items() if n not in kinds and not n.startswith(FEEDS_NO_MODEL)]
    if unknown:
        raise InputError(path, found=f"settings that are not supported: {', '.join(unknown)}"[:1000])
    return architecture


def _bad_tokens(fields: Mapping[str, Any]) -> list[str]:
    tokens = fields.get("tokenizer.ggml.tokens")
    if tokens is not None and not _IS["a list of texts"](tokens):
        return []  # said already
    number = len(tokens or ())
    problems = [
        f"{name} is {value}, and there are {number} tokens"
        for name, value in fields.items()
        if name.endswith("_token_id") and isinstance(value, int) and not 0 <= value < number
    ]
    if tokens is None:
        return problems
    for name in ("token_type", "scores"):
        values = fields.get(f"tokenizer.ggml.{name}")
        if isinstance(values, list) and len(values) != number:
            problems.append(f"{len(values)} tokenizer.ggml.{name} for {number} tokens")
    if len(set(tokens)) != number:
        problems.append(f"{number - len(set(tokens))} tokens that are there twice")
    if any(len(token) > MAX_TOKEN_LENGTH for token in tokens):
        problems.append(f"a token of more than {MAX_TOKEN_LENGTH} characters")
    return problems


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


_TOKENIZER_KINDS = {
    "general.architecture": "a text",
    "split.count": "a size",
    "tokenizer.chat_template": "a text",
    "tokenizer.ggml.merges": "a list of pairs",
    "tokenizer.ggml.model": "a text",
    "tokenizer.ggml.pre": "a text",
    "tokenizer.ggml.scores": "a list of finite numbers",
    "tokenizer.ggml.token_type": "a list of numbers",
    "tokenizer.ggml.tokens": "a list of texts",
    **dict.fromkeys(
        (f"tokenizer.ggml.add_{what}" for what in ("bos_token", "eos_token", "sep_token", "space_prefix")),
        "true or false",
    ),
}
_IS: dict[str, Callable[[Any], bool]] = {
    "a size": lambda value: _is_whole(value) and 0 < value <= MAX_SIZE,
    "a size or a list of booleans": lambda value: (
        all(isinstance(each, bool) for each in value) if isinstance(value, list) else _IS["a size"](value)
    ),
    "a token's number": _is_whole,
    "a positive number": lambda value: (
        isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < MAX_NUMBER
    ),
    "a text": lambda value: isinstance(value, str) and is_unicode(value),
    "a list of texts": lambda value: isinstance(value, list) and all(map(_IS["a text"], value)),
    "a list of pairs": lambda value: _IS["a list of texts"](value) and all(text.count(" ") == 1 for text in value),
    "a list of numbers": lambda value: isinstance(value, list) and all(map(_is_whole, value)),
    "a list of finite numbers": lambda value: (
        isinstance(value, list) and all(isinstance(each, int | float) and abs(each) < MAX_NUMBER for each in value)
    ),
    "true": lambda value: value is True,
    "true or false": lambda value: isinstance(value, bool),
}


def config_of(path: Path, fields: Mapping[str, Any], tensors: Mapping[str, np.ndarray | None]) -> dict[str, Any]:
    """Write a `config.json` from checked metadata, for transformers 4 and 5 (which moves `rope_theta` where it wants it).

    Args:
        path: the file, for messages.
        fields: the metadata.
        tensors: the names of the file's tensors; with the values of `rope_freqs.weight`.
    """
    name = fields["general.architecture"]
    architecture = ARCHITECTURES[name]
    own = {key.removeprefix(f"{name}."): value for key, value in fields.items() if key.startswith(f"{name}.")}
    config: dict[str, Any] = {"architectures": [architecture.class_name], "model_type": architecture.model_type}
    for key, setting in SIZES.items():
        config[key] = _required(path, fields, f"{name}.{setting}")
    config |= _heads(path, own, config, architecture)
    config |= {
        "vocab_size": len(_required(path, fields, "tokenizer.ggml.tokens")),
        "rms_norm_eps": _shortest(_required(path, fields, f"{name}.attention.layer_norm_rms_epsilon")),
        "rope_theta": _shortest(own.get("rope.freq_base", 10000.0)),
        **architecture.config,
        "tie_word_embeddings": "output.weight" not in tensors,
        "bos_token_id": fields.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": fields.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": fields.get("tokenizer.ggml.padding_token_id"),
        "initializer_range": 0.02,
        "use_cache": True,
        "dtype": "bfloat16",
        "torch_dtype": "bfloat16",  # the name of `dtype` before transformers 5
    }
    for key, linears in architecture.may_be_biased.items():
        config[key] = any(f"blk.0.{linear}.bias" in tensors for linear in linears)
    config["rope_scaling"] = _rope_scaling(path, own, config, tensors.get("rope_freqs.weight"))
    return config | _windows(path, own, config, architecture)


def _heads(
    path: Path, own: Mapping[str, Any], config: Mapping[str, Any], architecture: GGUFArchitecture
) -> dict[str, Any]:
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    keys = own.get("attention.head_count_kv", heads)
    given = own.get("attention.key_length", architecture.default_head_dim)
    if given is None and architecture.model_type == "llama":
        given = own.get("rope.dimension_count")
    head_dim = given or hidden // heads
    if (given is None and hidden % heads) or heads % keys or head_dim % 2:
        found = f"{hidden} dimensions, {heads} heads, {keys} of keys, of {head_dim}"
        raise InputError(path, found=found, expected="multiples of one another", fix="download it again")
    for name in ("attention.value_length", "rope.dimension_count"):
        if own.get(name, head_dim) != head_dim:
            raise InputError(path, found=f"{name} = {own[name]}", expected=f"the head dimension, {head_dim}")
    return {"num_key_value_heads": keys, "head_dim": head_dim}


def _rope_scaling(
    path: Path, own: Mapping[str, Any], config: Mapping[str, Any], divisors: np.ndarray | None
) -> dict[str, Any] | None:
    kind = own.get("rope.scaling.type", "none")
    if divisors is not None:
        if kind != "none":
            raise InputError(path, found=f"rope_freqs.weight and rope.scaling.type = {kind!r}", expected="one of them")
        return _llama3_scaling(path, config, divisors)
    if kind == "none":
        scaled = [f"{key} = {own[key]}" for key in own if key.startswith("rope.scaling.") and key.endswith("factor")]
        if scaled and own["rope.scaling.factor"] != 1:
            raise InputError(path, found=f"{', '.join(scaled)} without rope.scaling.type", expected="linear or yarn")
        return None
    if kind not in ("linear", "yarn") or "rope.scaling.factor" not in own:
        found = f"rope.scaling.type = {kind!r}, factor {own.get('rope.scaling.factor')}"
        raise InputError(path, found=found, expected="none, linear or yarn, with a factor")
    scaling: dict[str, Any] = {"rope_type": kind, "factor": _shortest(own["rope.scaling.factor"])}
    if kind == "yarn":
        original = own.get("rope.scaling.original_context_length", config["max_position_embeddings"])
        scaling["original_max_position_embeddings"] = original
        betas = {"beta_fast": "rope.scaling.yarn_beta_fast", "beta_slow": "rope.scaling.yarn_beta_slow"}
        scaling |= {key: _shortest(own[name]) for key, name in betas.items() if name in own}
    return scaling


LLAMA3_ORIGINAL, LLAMA3_LOW, LLAMA3_HIGH = 8192, 1.0, 4.0


def _llama3_scaling(path: Path, config: Mapping[str, Any], divisors: np.ndarray) -> dict[str, Any] | None:
    """Recover Llama 3.1's scaling from the divisors of the frequencies, which are all that a file keeps of it."""
    half = config["head_dim"] // 2
    factor = float(divisors[-1]) if divisors.shape == (half,) else 0.0
    is_known = factor > 0
    if is_known:
        wave = 2 * np.pi * config["rope_theta"] ** (np.arange(half) / half)
        turns = np.clip((LLAMA3_ORIGINAL / wave - LLAMA3_LOW) / (LLAMA3_HIGH - LLAMA3_LOW), 0, 1)
        is_known = np.allclose(divisors, 1 / ((1 - turns) / factor + turns), rtol=1e-4, atol=0)
    if not is_known:
        found = f"rope_freqs.weight, divisors of {divisors.size} frequencies up to {factor:g}"
        expected_text = f"those of Llama 3.1's scaling from {LLAMA3_ORIGINAL} positions for {half} frequencies"
        raise InputError(path, found=found, expected=expected_text, fix="give the model it was made from")
    if factor == 1:
        return None
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": LLAMA3_LOW,
        "high_freq_factor": LLAMA3_HIGH,
        "original_max_position_embeddings": LLAMA3_ORIGINAL,
    }


def _windows(
    path: Path, own: Mapping[str, Any], config: Mapping[str, Any], architecture: GGUFArchitecture
) -> dict[str, Any]:
    """Gemma's keys: windows, softcaps, the scale of attention and the rope of windowed layers."""
    if not architecture.full_attention_every:
        return {}
    layers, every = config["num_hidden_layers"], own.get("attention.sliding_window_pattern")
    if isinstance(every, list):
        if len(every) != layers:
            found = f"attention.sliding_window_pattern of {len(every)} layers"
            raise InputError(path, found=found, expected=f"{layers}", fix="download it again")
        windowed = every
    else:
        every = every or architecture.full_attention_every
        windowed = [(layer + 1) % every != 0 for layer in range(layers)]
    window = own.get("attention.sliding_window", architecture.default_window)
    if window is None:
        raise InputError(path, found="no setting attention.sliding_window", expected="a complete GGUF file")
    keys: dict[str, Any] = {"sliding_window": window}
    keys["layer_types"] = ["sliding_attention" if each else "full_attention" for each in windowed]
    keys["query_pre_attn_scalar"] = config["head_dim"]
    if "attention.scale" in own:
        keys["query_pre_attn_scalar"] = own["attention.scale"] ** -2.0
    elif layers == architecture.largest:
        keys["query_pre_attn_scalar"] = config["hidden_size"] // config["num_attention_heads"]
    for key in ("final_logit_softcapping", "attn_logit_softcapping"):
        keys[key] = _shortest(own[key]) if key in own else None
    if architecture.model_type == "gemma2":
        default = {"final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0}  # llama.cpp's, where none are said
        return keys | {key: keys[key] or value for key, value in default.items()}
    del keys["attn_logit_softcapping"]
    return keys | {"rope_local_base_freq": _shortest(own.get("rope.freq_base_swa", 10000.0))}


def _required(path: Path, fields: Mapping[str, Any], name: str) -> Any:
    if name not in fields:
        raise InputError(path, found=f"no setting {name}", expected="a complete GGUF file")
    return fields[name]


def _shortest(value: float) -> float:
    """The decimal a float32 was written from: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))
