"""What of an `adapter_config.json` cannot be applied, setting by setting: kinds of adapters that are refused by name, and damaged values.

A setting is applied, or changes no result of an adapter that was trained (`_NEUTRAL`), or is refused where it is set. Matched to PEFT 0.21.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qlora_jax.base.errors import InputError, shown

_APPLIED = {
    "r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "target_modules", "exclude_modules",
    "layers_to_transform", "layers_pattern", "modules_to_save", "trainable_token_indices", "ensure_weight_tying",
    "base_model_name_or_path", "init_lora_weights", "peft_type", "bias",
}  # fmt: skip
_INITIALISATIONS = (None, True, False, "gaussian", "eva", "orthogonal", "mica")
"""The others (PiSSA, OLoRA, CorDA, LoftQ, ...) change the base model's weights too: their adapters belong to another base."""
_BIASES = ("none", "all", "lora_only")
"""Which biases were trained. Of a model that has some, an adapter with trained ones is refused: see `convert.adapters.tensors`."""
_NEUTRAL = {
    "task_type", "auto_mapping", "revision", "inference_mode", "lora_dropout", "megatron_config", "megatron_core", "loftq_config",
    "eva_config", "corda_config", "lora_ga_config", "qalora_group_size", "runtime_config", "peft_version",
    "fan_in_fan_out",  # PEFT turns it off for torch's linears, and all of these models' are
    "velora_config",  # how gradients are computed
}  # fmt: skip
_KINDS = {
    "lora_bias": "adds biases to what it adapts",
    "alora_invocation_tokens": "changes only the tokens after its invocation, which no merged model does",
    "layer_replication": "builds a deeper model out of the base's layers",
    "target_parameters": "adapts parameters of experts, which these models have not",
    "use_qalora": "averages groups of inputs before A",
    "use_bdlora": "keeps A or B in blocks",
    "arrow_config": "chooses between several adapters token by token",
    "kasa_config": "truncates the base's weights as well",
    "monteclora_config": "samples its weights",
}
"""What PEFT's other variants of LoRA do."""
_NEVER_MERGED = {"alora_invocation_tokens", "arrow_config"}
_PROMPTS = (
    "PROMPT_TUNING",
    "MULTITASK_PROMPT_TUNING",
    "P_TUNING",
    "PREFIX_TUNING",
    "ADAPTION_PROMPT",
    "CPT",
    "XLORA",
    "POLY",
)
"""Types of PEFT's that are no change of weights, or choose one token by token."""
_PATTERNS = ("target_modules", "exclude_modules", "modules_to_save", "layers_pattern")
_FLAGS = ("use_rslora", "use_dora", "ensure_weight_tying")
_MAX_RANK, _MAX_ALPHA = 2**27, 1e30
_POSITIVE = {True: f"a whole number from 1 to {_MAX_RANK}", False: f"a positive number up to {_MAX_ALPHA:.0e}"}
"""By whether it has to be whole. JSON's integers have no end: a larger one would not fit a float, or any machine."""


def refuse_unsupported(path: Path, settings: Mapping[str, Any]) -> None:
    """Check the settings of an `adapter_config.json`.

    Raises:
        InputError: a kind of adapter that cannot be applied, or values that are no settings: everything named at once.
    """
    kinds, damage = _unsupported(settings), _malformed(settings)
    if not kinds and not damage:
        return
    fixes = []
    if kinds and (settings.get("peft_type") in _PROMPTS or any(settings.get(key) for key in _NEVER_MERGED)):
        fixes.append("run it with peft itself: such an adapter cannot be merged into a model")
    elif kinds:
        base = settings.get("base_model_name_or_path")
        fixes.append(
            f"let peft merge it, PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({shown(base or 'BASE')}), "
            f"{str(path.parent)!r}).merge_and_unload().save_pretrained(OUT), and give OUT as the model"
        )
    if damage:
        fixes.append("fetch or save the adapter again: PEFT does not write such values")
    raise InputError(
        path,
        found="; ".join(kinds + damage),
        expected="a LoRA adapter, with or without DoRA, rsLoRA, rank and alpha patterns, modules_to_save and trainable_token_indices",
        fix="; ".join(fixes),
    )


def _unsupported(settings: Mapping[str, Any]) -> list[str]:
    problems = []
    if settings["peft_type"] != "LORA":
        problems.append(f"peft_type is {shown(settings['peft_type'])}, supported: 'LORA'")
    if (start := settings.get("init_lora_weights")) not in _INITIALISATIONS:
        problems.append(f"init_lora_weights is {shown(start)}, which changes the base model as well")
    problems += [f"{key} is {shown(settings[key])}, which {does}" for key, does in _KINDS.items() if settings.get(key)]
    known = _APPLIED | _NEUTRAL | _KINDS.keys()
    return problems + [
        f"{key} is {shown(value)}, not supported" for key, value in settings.items() if key not in known and value
    ]


def _malformed(settings: Mapping[str, Any]) -> list[str]:
    problems = []

    def check(key: str, right: bool, expected: str) -> None:
        if not right:
            problems.append(f"{key} is {shown(settings.get(key))}, expected {expected}")

    base_model = settings.get("base_model_name_or_path")
    check("base_model_name_or_path", isinstance(base_model, str | None), "a name")
    check("bias", settings.get("bias") in (None, *_BIASES), " or ".join(map(repr, _BIASES)))
    for key in _FLAGS:
        check(key, settings.get(key) in (None, True, False), "true or false")
    for key in ("r", "lora_alpha"):
        check(key, _positive(settings.get(key), whole=key == "r"), _POSITIVE[key == "r"])
    for key, whole in (("rank_pattern", True), ("alpha_pattern", False)):
        value = settings.get(key) or {}
        right = isinstance(value, dict) and all(_positive(number, whole=whole) for number in value.values())
        check(key, right, f"an object, each value {_POSITIVE[whole]}")
    for key in _PATTERNS:
        value = settings.get(key)
        text = isinstance(value, str) and key != "modules_to_save"
        check(key, value is None or text or _is_list_of(str, value), "a list of names")
    check("target_modules", bool(settings.get("target_modules")), "names, a pattern or all-linear")
    layers = settings.get("layers_to_transform")
    is_number = isinstance(layers, int) and not isinstance(layers, bool)
    check("layers_to_transform", layers is None or is_number or _is_list_of(int, layers), "layer numbers")
    if layers is not None and isinstance(settings.get("target_modules"), str):
        problems.append("layers_to_transform with a pattern as target_modules, which PEFT refuses")
    tokens = settings.get("trainable_token_indices")
    named = tokens if isinstance(tokens, dict) else {} if tokens is None else {"embed_tokens": tokens}
    check("trainable_token_indices", all(map(_are_token_ids, named.values())), "token ids, none of them twice")
    return problems


def _positive(value: Any, *, whole: bool = False) -> bool:
    kind, most = (int, _MAX_RANK) if whole else (int | float, _MAX_ALPHA)
    return isinstance(value, kind) and not isinstance(value, bool) and 0 < value <= most


def _is_list_of(kind: type, value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(entry, kind) and not isinstance(entry, bool) for entry in value)


def _are_token_ids(value: Any) -> bool:
    return _is_list_of(int, value) and len(set(value)) == len(value) and all(0 <= token < 2**31 for token in value)
