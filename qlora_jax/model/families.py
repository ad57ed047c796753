"""Reads a `config.json` into an `Architecture`. The one module that looks at `model_type`; the families' facts are rows of `family_rows`.

A key that is in no list is refused unless its value says that it does nothing: an unknown key that changes the mathematics is how a model
goes wrong without a word.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from qlora_jax.base.errors import InputError
from qlora_jax.base.reading import shown
from qlora_jax.model.architecture import Architecture, Norms
from qlora_jax.model.config_keys import key_problems, number_problems
from qlora_jax.model.family import SIZES, Family, kinds_of, linears_of
from qlora_jax.model.family_rows import FAMILIES
from qlora_jax.model.rope import Scaling, plain_frequencies
from qlora_jax.model.rope_config import FULL, read_scalings
from qlora_jax.model.unsupported import UNSUPPORTED, WRAPPERS

__all__ = ["plain_frequencies", "read_architecture"]


def read_architecture(config: Mapping[str, Any], where: object = "config.json") -> Architecture:
    """Read a parsed `config.json`; of a model of images and text, the text half.

    Raises:
        InputError: a key is missing, or one that changes the mathematics has a value that is not supported (all at once).
    """
    if isinstance(name := config.get("model_type"), str) and name in WRAPPERS:
        return _text_half(config, where)
    family, unknown = _family(config)
    said, ignored = key_problems(config, family)
    full = {**family.sizes, **family.defaults, **config}
    missing = [f"{key} is missing" for key in SIZES if key not in full]
    damage = [] if missing else number_problems(full, family)
    scalings, wrong = read_scalings(config, family.rope, None if missing or damage else _head_dim(full))
    others = [*unknown, *said, *wrong]
    if problems := [*missing, *others, *([] if others else damage)]:
        fix = "fetch the model again" if not others else "use another base model"
        if unknown:
            fix = UNSUPPORTED.get(
                str(config["model_type"]), f"use a model of one of these types: {', '.join(FAMILIES)}"
            )
        elif ignored and len(ignored) == len(others):
            fix += f"; or, if it was trained without, as transformers runs it, remove {' and '.join(ignored)} from config.json"
        expected = "a type that is supported" if unknown else f"a model of type {family.model_type} without these"
        raise InputError(where, found="; ".join(problems), expected=expected, fix=fix)
    return _architecture(family, full, scalings)


def _family(config: Mapping[str, Any]) -> tuple[Family, list[str]]:
    """The row of a config's `model_type`, llama's if there is none; and what to say if it is none that is supported."""
    name = config.get("model_type", "llama")
    if isinstance(name, str) and name in FAMILIES:
        return FAMILIES[name], []
    return FAMILIES["llama"], [f"model_type is {shown(name)}, not supported"]


def _text_half(config: Mapping[str, Any], where: object) -> Architecture:
    """The text model within a model of images and text; where both say whether embeddings are tied, the outer counts."""
    text = config.get("text_config")
    if not isinstance(text, Mapping):
        raise InputError(
            where,
            found=f"text_config is {shown(text)}",
            expected="the text model's config",
            fix="fetch the model again",
        )
    name = config["model_type"]
    text = {"model_type": WRAPPERS[name], **text}
    if "tie_word_embeddings" in config:
        text["tie_word_embeddings"] = config["tie_word_embeddings"]
    read = read_architecture(text, f"{where}: text_config")
    return dataclasses.replace(
        read, layers_prefix="language_model.model.layers", modules_prefix="model.language_model.layers"
    )


def _head_dim(config: Mapping[str, Any]) -> int:
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


def _architecture(family: Family, config: Mapping[str, Any], scalings: Mapping[str, Scaling | None]) -> Architecture:
    """The facts of a config without problems, defaults included."""
    heads = config["num_attention_heads"]
    kv_heads, head_dim = config.get("num_key_value_heads") or heads, _head_dim(config)
    facts = {"attention_scale": head_dim**-0.5, **family.fixed, **family.facts(config)}
    norms = Norms(**{"eps": config[family.eps], **family.norms, **facts.pop("norms", {})})
    dropouts = {key: config.get(key) or 0.0 for key in family.dropouts}
    if (scaling := scalings[FULL]) is not None and scaling.method == "dynamic" and not scaling.parameters.get("alpha"):
        facts["max_length"] = scaling.longest
    return Architecture(
        **{key: config[key] for key in SIZES},
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        kinds=kinds_of(family, config, scalings),
        norms=norms,
        **linears_of(family, config, heads, kv_heads, head_dim),
        tie_word_embeddings=config["tie_word_embeddings"],
        model_type=family.model_type,
        activation=family.activations[config[family.activation_key]],
        attention_dropout=dropouts.pop("attention_dropout", 0.0),
        other_dropouts=tuple((key, rate) for key, rate in dropouts.items() if rate),
        dropouts_are_left_out=family.dropouts_are_left_out,
        **facts,
    )
