"""`adapter_config.json`: which linears an adapter changes and how, by PEFT's own matching rules; what cannot be applied is refused by name.

A name in PEFT's rules is a module's path in the base model, such as `model.layers.0.self_attn.q_proj`. For each of them:

    targeted    its path is, or ends in a dot and, an entry of the list target_modules; or the whole path matches the regular
                expression target_modules; less exclude_modules (same rules) and whatever lies inside modules_to_save
    layers      with layers_to_transform, only the layers of those numbers, and modules whose whole path is in target_modules
    rank, alpha the first key of rank_pattern (alpha_pattern), as the file has them, that matches the path's end, at a dot; else
                r (lora_alpha)
    scaling     alpha / rank, or alpha / sqrt(rank) with use_rslora
    saved       modules whose path ends in an entry of modules_to_save (at no dot: `norm` is every norm) are stored whole
"""

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from convert.files import names
from qlora_jax.base.errors import InputError
from qlora_jax.config import LINEAR_NAMES
from qlora_jax.model.decoder import LlamaConfig

CONFIG_FILE = "adapter_config.json"
MAX_REPEATS = 4
"""In a regular expression: each multiplies the ways to match a name, and a repeated group doubles them with each letter."""

_ONLY: dict[str, Any] = {"peft_type": "LORA", "bias": "none"}
_APPLIED = {
    "r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "target_modules", "exclude_modules",
    "layers_to_transform", "layers_pattern", "modules_to_save", "ensure_weight_tying", "base_model_name_or_path", "init_lora_weights",
}  # fmt: skip
_INITIALISATIONS = (None, True, False, "gaussian", "eva", "orthogonal")
"""The others (PiSSA, OLoRA, CorDA, LoftQ, ...) change the base model's weights too: their adapters belong to another base."""
_NEUTRAL = {
    "task_type", "auto_mapping", "revision", "inference_mode", "lora_dropout", "megatron_config", "megatron_core", "loftq_config",
    "eva_config", "corda_config", "lora_ga_config", "qalora_group_size", "runtime_config", "peft_version",
}  # fmt: skip
"""What changes no result of a trained adapter. A setting that is in none of these lists is refused if it is set."""


@dataclasses.dataclass(frozen=True)
class Target:
    """What an adapter does to one linear: B·A of this rank, times `scaling`."""

    rank: int
    scaling: float


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """A supported `adapter_config.json`; `settings` is the file's object, and is used under PEFT's own names."""

    path: Path
    settings: Mapping[str, Any]

    @property
    def base_model(self) -> str | None:
        """The hub id or folder that the adapter was trained on, as far as the file says."""
        return self.settings.get("base_model_name_or_path") or None

    @property
    def use_dora(self) -> bool:
        """Whether each target has a magnitude vector."""
        return bool(self.settings.get("use_dora"))

    def targets(self, config: LlamaConfig) -> dict[names.Target, Target]:
        """Every weight of a model of this shape that the adapter changes, by (layer, our name): linears in the model's order, then
        what is outside the layers.
        """
        found: dict[names.Target, Target] = {}
        for layer in range(config.num_hidden_layers):
            for name in LINEAR_NAMES:
                path = names.linear(layer, name).removesuffix(".weight")
                if self._is_target(path, layer):
                    found[layer, name] = self._target(path)
        for name, tensor in names.VOCABULARY.items():
            path = tensor.removesuffix(".weight")
            if not self._all_linear and self._is_target(path, None):
                found[None, name] = self._target(path)
        return found

    def saved(self, tensor: str) -> bool:
        """Whether `modules_to_save` has the module that holds a tensor of the base, or one around it."""
        parts = tensor.split(".")[:-1]
        paths = [".".join(parts[: n + 1]) for n in range(len(parts))]
        return any(path.endswith(key) for path in paths for key in self.settings.get("modules_to_save") or ())

    @property
    def _all_linear(self) -> bool:
        """PEFT's short form for every linear but the head."""
        targets = self.settings["target_modules"]
        return isinstance(targets, str) and targets.lower() == "all-linear"

    def _is_target(self, path: str, layer: int | None) -> bool:
        settings = self.settings
        excluded, targets = settings.get("exclude_modules"), settings["target_modules"]
        if excluded and _matches(excluded, path):
            return False
        if any(re.match(rf"(^|.*\.){key}($|\..*)", path) for key in settings.get("modules_to_save") or ()):
            return False
        if self._all_linear:
            return True
        if isinstance(targets, list) and path in targets:
            return True  # in whichever layer
        wanted = settings.get("layers_to_transform")
        if wanted is None or wanted == []:
            return _matches(targets, path)
        patterns = settings.get("layers_pattern") or ["[^.]*"]
        patterns = [patterns] if isinstance(patterns, str) else patterns
        numbered = any(re.match(rf"(?:^|.*?\.){pattern}\.{layer}\.", path) for pattern in patterns)
        return _matches(targets, path) and numbered and layer in ([wanted] if isinstance(wanted, int) else wanted)

    def _target(self, path: str) -> Target:
        settings = self.settings
        rank = _pattern_value(settings.get("rank_pattern"), path, settings["r"])
        alpha = _pattern_value(settings.get("alpha_pattern"), path, settings["lora_alpha"])
        return Target(rank, alpha / (rank**0.5 if settings.get("use_rslora") else rank))


def _matches(wanted: str | list[str], path: str) -> bool:
    if isinstance(wanted, str):
        return re.fullmatch(wanted, path) is not None
    return any(path == key or path.endswith(f".{key}") for key in wanted)


def _pattern_value(patterns: Mapping[str, Any] | None, path: str, default: Any) -> Any:
    for key, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({key})$", path):
            return value
    return default


def read_adapter_config(folder: Path) -> AdapterConfig:
    """Read and check a folder's `adapter_config.json`.

    Raises:
        InputError: it is missing or damaged, or asks for something that cannot be applied (everything named at once).
    """
    path = folder / CONFIG_FILE
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise InputError(folder, found=f"no {CONFIG_FILE}", expected="an adapter's folder, in PEFT's format") from None
    except (ValueError, RecursionError) as error:
        raise InputError(path, found=f"not JSON: {error}", fix="save the adapter again") from None
    if not isinstance(settings, dict):
        raise InputError(path, found=f"a {type(settings).__name__}", expected="an object of adapter settings")
    problems = _unsupported(settings) + _malformed(settings)
    if problems:
        raise InputError(
            path,
            found="; ".join(problems),
            expected="a LoRA adapter, with or without DoRA, rsLoRA, rank and alpha patterns and modules_to_save",
        )
    return AdapterConfig(path, settings)


def _unsupported(settings: Mapping[str, Any]) -> list[str]:
    problems = [
        f"{key} is {settings[key]!r}, supported: {only!r}"
        for key, only in _ONLY.items()
        if key in settings and (settings[key] or None) != only and (settings[key] or key == "peft_type")
    ]
    if settings.get("init_lora_weights") not in _INITIALISATIONS:
        problems.append(
            f"init_lora_weights is {settings['init_lora_weights']!r}, which changes the base model as well (peft can convert "
            "such an adapter to plain LoRA when it saves it)"
        )
    known = _APPLIED | _NEUTRAL | _ONLY.keys()
    return problems + [
        f"{key} is {value!r}, not supported" for key, value in settings.items() if key not in known and value
    ]


def _malformed(settings: Mapping[str, Any]) -> list[str]:
    base_model = settings.get("base_model_name_or_path")
    problems = (
        [] if isinstance(base_model, str | None) else [f"base_model_name_or_path is {base_model!r}, expected a name"]
    )
    problems += [
        f"{key} is {settings.get(key)!r}, expected {_POSITIVE[key == 'r']}"
        for key in ("r", "lora_alpha")
        if not _positive(settings.get(key), whole=key == "r")
    ]
    for key in ("rank_pattern", "alpha_pattern"):
        value = settings.get(key) or {}
        whole = key == "rank_pattern"
        if not isinstance(value, dict) or not all(_positive(number, whole=whole) for number in value.values()):
            problems.append(f"{key} is {value!r}, expected an object, each value {_POSITIVE[whole]}")
    for key in ("target_modules", "exclude_modules", "modules_to_save", "layers_pattern"):
        value = settings.get(key)
        text = isinstance(value, str) and key != "modules_to_save"
        if value is not None and not text and not _is_list_of(str, value):
            problems.append(f"{key} is {value!r}, expected a list of names")
    if not settings.get("target_modules"):
        problems.append(
            f"target_modules is {settings.get('target_modules')!r}, expected names, a pattern or all-linear"
        )
    layers = settings.get("layers_to_transform")
    if layers is not None and not isinstance(layers, int) and not _is_list_of(int, layers):
        problems.append(f"layers_to_transform is {layers!r}, expected layer numbers")
    elif layers is not None and isinstance(settings.get("target_modules"), str):
        problems.append("layers_to_transform with a pattern as target_modules, which PEFT refuses")
    return problems or _bad_patterns(settings)


def _bad_patterns(settings: Mapping[str, Any]) -> list[str]:
    """Regular expressions that do not compile."""
    expressions = [key for name in ("rank_pattern", "alpha_pattern") for key in settings.get(name) or {}]
    expressions += [
        settings[name] for name in ("target_modules", "exclude_modules") if isinstance(settings.get(name), str)
    ]
    patterns = settings.get("layers_pattern") or []
    expressions += [patterns] if isinstance(patterns, str) else patterns
    expressions += settings.get("modules_to_save") or []
    problems = []
    for expression in expressions:
        try:
            re.compile(expression)
        except (re.error, RecursionError, OverflowError) as error:
            problems.append(f"{expression!r} is not a regular expression: {error}")
        if re.search(r"\)[*+{]", expression) or len(re.findall(r"[*+{]", expression)) > MAX_REPEATS:
            problems.append(
                f"{expression!r} repeats a group, or has more than {MAX_REPEATS} repeats: it could take for ever to match"
            )
    return problems


_MAX_RANK, _MAX_ALPHA = 2**27, 1e30
_POSITIVE = {True: f"a whole number from 1 to {_MAX_RANK}", False: f"a positive number up to {_MAX_ALPHA:.0e}"}
"""By whether it has to be whole. JSON's integers have no end: a larger one would not fit a float, or any machine."""


def _positive(value: Any, *, whole: bool = False) -> bool:
    kind, most = (int, _MAX_RANK) if whole else (int | float, _MAX_ALPHA)
    return isinstance(value, kind) and not isinstance(value, bool) and 0 < value <= most


def _is_list_of(kind: type, value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(entry, kind) and not isinstance(entry, bool) for entry in value)
