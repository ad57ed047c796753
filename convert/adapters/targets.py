"""`lora.target_modules` against a model: names, paths, a regular expression or PEFT's own choice become the names of its linears."""

from pathlib import Path

from convert.adapters.patterns import evaluate
from convert.files.names import Names
from qlora_jax.base.errors import InputError, shown
from qlora_jax.config import LoraSettings
from qlora_jax.model.architecture import Architecture

SETTING = "lora.target_modules"
DEFAULTS = dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text"), ("q_proj", "v_proj"))
"""By model type, what PEFT 0.21 adapts where it is not told; for all others it wants to be told."""


def resolve_targets(lora: LoraSettings, config: Architecture) -> LoraSettings:
    """The settings with a `target_modules` that is `all-linear` or names of this model's linears; one that is already stays as it is.

    Entries of a list match as in PEFT: a linear's path, or its end from a dot on.

    Raises:
        InputError: an entry matches no linear, or only those of some layers; or the model has no default.
    """
    asked = lora.target_modules
    if asked is None:
        asked = _default(config)
    if asked == "all-linear" or (not isinstance(asked, str) and config.linears.keys() >= set(asked)):
        return lora.model_copy(update={"target_modules": asked})
    names = Names.of(config)
    paths = {(i, name): names.module(i, name) for i in range(config.num_hidden_layers) for name in names.paths}
    if isinstance(asked, str):
        matched = evaluate(Path(SETTING), {SETTING: ("whole", [asked])}, list(paths.values()))[SETTING]
        found, strangers = {key for key, path in paths.items() if path in matched}, [] if matched else [asked]
    else:
        by_entry = {entry: {key for key, path in paths.items() if _is_end(entry, path)} for entry in asked}
        found, strangers = set().union(*by_entry.values()), [entry for entry, keys in by_entry.items() if not keys]
    has = f"{config.model_type} has {', '.join(names.paths)}"
    if strangers:
        texts = ", ".join(shown(entry)[1:-1] for entry in strangers)
        raise InputError(SETTING, found=f"{has}; found {texts}", expected="all-linear, or some of these", fix="")
    targets = tuple(name for name in names.paths if (0, name) in found)
    if len(found) != len(targets) * config.num_hidden_layers:
        raise InputError(
            SETTING,
            found=f"{len(found)} linears of some layers only",
            expected="the same linears in every layer",
            fix=f"name them without a layer's number: {has}",
        )
    return lora.model_copy(update={"target_modules": targets})


def _default(config: Architecture) -> tuple[str, ...]:
    if config.model_type in DEFAULTS and not Names.of(config).is_part:
        return DEFAULTS[config.model_type]
    raise InputError(
        SETTING,
        found=f"null, and PEFT has no default for {config.model_type}",
        expected="names of linears, or all-linear",
        fix=f"name some of {', '.join(config.linears)}",
    )


def _is_end(entry: str, path: str) -> bool:
    return path == entry or path.endswith(f".{entry}")
