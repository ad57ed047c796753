"""`adapter_config.json`: which linears an adapter changes and how, by PEFT's own matching rules; what cannot be applied is refused by name.

A name in PEFT's rules is a module's path in the base model, such as `model.layers.0.self_attn.q_proj`. For each of them:

    targeted    its path is, or ends in a dot and, an entry of the list target_modules; or the whole path matches the regular
                expression target_modules; less exclude_modules (same rules) and whatever lies inside modules_to_save
    layers      with layers_to_transform, only the layers of those numbers, and modules whose whole path is in target_modules
    rank, alpha the first key of rank_pattern (alpha_pattern), as the file has them, that matches the path's end, at a dot; else
                r (lora_alpha)
    scaling     alpha / rank, or alpha / sqrt(rank) with use_rslora
    saved       modules whose path ends in an entry of modules_to_save (at no dot: `norm` is every norm) are stored whole
    tokens      trainable_token_indices: rows of the embedding, or of the modules whose path ends in a key, are stored
    tied        with ensure_weight_tying, what is done to the embedding is done to a head that is the embedding too
"""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from convert.adapters.patterns import evaluate
from convert.adapters.settings import refuse_unsupported
from convert.files.names import VOCABULARY, Names
from convert.files.names import Target as Key
from convert.files.recognition import not_an_adapter
from qlora_jax.base.reading import kind_of, read_json_object
from qlora_jax.model.architecture import Architecture

CONFIG_FILE = "adapter_config.json"
MAX_CONFIG_BYTES = 100_000_000
ANY_LAYERS = ["[^.]*"]
"""What `layers_pattern` is without one: the name of any numbered list of modules."""


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

    @property
    def ties(self) -> bool:
        """Whether PEFT kept a head that is the embedding what it is (`ensure_weight_tying`)."""
        return bool(self.settings.get("ensure_weight_tying"))

    def targets(self, config: Architecture) -> dict[Key, Target]:
        """Every weight of a model of this shape that the adapter changes, by (layer, our name): linears in the model's order, then
        what is outside the layers. A head that is the embedding is not apart from it with `ensure_weight_tying`.

        Raises:
            InputError: a regular expression is none, or cannot be evaluated within limits.
        """
        names = Names.of(config)
        linears = [(layer, name) for layer in range(config.num_hidden_layers) for name in names.paths]
        keys: list[Key] = [*linears, *((None, name) for name in VOCABULARY)]
        paths = {key: names.module(*key) for key in keys}
        matcher = _Matcher(self, list(paths.values()))
        found = {key: matcher.target(path) for key, path in paths.items() if matcher.is_target(path, *key)}
        if config.tie_word_embeddings and self.ties and (None, "embed_tokens") in found:
            found.pop((None, "lm_head"), None)
        return found

    def saved(self, tensor: str) -> bool:
        """Whether `modules_to_save` has the module that holds a tensor of the base, or one around it.

        Args:
            tensor: its name among the modules, see `Names.in_modules`.
        """
        wanted = set(self.settings.get("modules_to_save") or ())
        parts = tensor.split(".")[:-1]
        paths = [".".join(parts[: n + 1]) for n in range(len(parts))]
        return any(not wanted.isdisjoint(_endings(path)) for path in paths)

    def token_ids(self, names: Names) -> dict[str, list[int]]:
        """The rows that are stored one by one: Hugging Face's name of the embedding's or head's tensor → token ids, in the file's order."""
        asked = self.settings.get("trainable_token_indices")
        if asked is None:
            return {}
        by_name = asked if isinstance(asked, dict) else {"embed_tokens": asked}
        paths = {names.target(None, name): names.module(None, name) for name in VOCABULARY}
        return {tensor: ids for name, ids in by_name.items() for tensor, path in paths.items() if path.endswith(name)}


class _Matcher:
    """The answers of an adapter's settings for some modules' paths; its regular expressions are evaluated once, for all of them."""

    def __init__(self, config: AdapterConfig, paths: list[str]) -> None:
        settings = self._settings = config.settings
        targets, excluded = settings["target_modules"], settings.get("exclude_modules")
        self._all_linear = isinstance(targets, str) and targets.lower() == "all-linear"
        self._listed = {
            key: set(value)
            for key in ("target_modules", "exclude_modules")
            if isinstance(value := settings.get(key), list)
        }
        wanted = settings.get("layers_to_transform")
        self._layers = None if wanted is None or wanted == [] else {wanted} if isinstance(wanted, int) else set(wanted)
        pattern = settings.get("layers_pattern") or ANY_LAYERS
        rules = {
            "target_modules": ("whole", [targets] if isinstance(targets, str) and not self._all_linear else []),
            "exclude_modules": ("whole", [excluded] if excluded and isinstance(excluded, str) else []),
            "modules_to_save": ("inside", settings.get("modules_to_save") or []),
            "layers_pattern": ("layer", [] if self._layers is None else [pattern] if isinstance(pattern, str) else pattern),
            "rank_pattern": ("ending", list(settings.get("rank_pattern") or {})),
            "alpha_pattern": ("ending", list(settings.get("alpha_pattern") or {})),
        }  # fmt: skip
        self._found = evaluate(config.path, rules, paths)

    def is_target(self, path: str, layer: int | None, name: str) -> bool:
        if self._matches("exclude_modules", path) or path in self._found["modules_to_save"]:
            return False
        if self._all_linear:
            return layer is not None
        if self._layers is None or path in self._listed.get("target_modules", ()):  # the latter in whichever layer
            return self._matches("target_modules", path)
        _, number = self._found["layers_pattern"].get(path, (0, None))
        return self._matches("target_modules", path) and number in self._layers

    def target(self, path: str) -> Target:
        settings = self._settings
        rank = self._pattern_value("rank_pattern", path, settings["r"])
        alpha = self._pattern_value("alpha_pattern", path, settings["lora_alpha"])
        return Target(rank, alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank))

    def _matches(self, setting: str, path: str) -> bool:
        listed = self._listed.get(setting)
        if listed is None:
            return path in self._found[setting]
        return any(path[start:] in listed for start in range(len(path)) if start == 0 or path[start - 1] == ".")

    def _pattern_value(self, setting: str, path: str, default: Any) -> Any:
        if path not in self._found[setting]:
            return default
        return list(self._settings[setting].values())[self._found[setting][path][0]]


def _endings(text: str) -> list[str]:
    return [text[start:] for start in range(len(text) + 1)]


def read_adapter_config(folder: Path) -> AdapterConfig:
    """Read and check a folder's `adapter_config.json`.

    Raises:
        InputError: the folder is something else, its file is damaged, or asks for something that cannot be applied (everything named
            at once).
    """
    path = folder / CONFIG_FILE
    if kind_of(path) == "nothing":
        raise not_an_adapter(folder)
    settings = read_json_object(path, fix="fetch or save the adapter again")
    if not settings.get("peft_type"):
        raise not_an_adapter(folder, settings)
    refuse_unsupported(path, settings)
    return AdapterConfig(path, settings)
