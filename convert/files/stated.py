"""What a model folder says of its architecture, before its tensors are looked at: `config.json`, and under which names the files are."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from convert.files.folder import ModelFolder
from convert.files.names import Names
from qlora_jax.model.architecture import Architecture
from qlora_jax.model.families import read_architecture


@functools.lru_cache(maxsize=16)
def stated_architecture(folder: ModelFolder) -> Architecture:
    """The architecture that `config.json` states. A text model that is part of another is where the folder's files have it.

    Raises:
        InputError: the config is not supported.
    """
    config = read_architecture(folder.config, folder.path / "config.json")
    for prefix in (config.layers_prefix, config.modules_prefix):
        named = dataclasses.replace(config, layers_prefix=prefix)
        if Names.of(named).embedding in folder:
            return named
    return config


def text_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """A `config.json`'s keys, and those of the text model's own config within it."""
    within = config.get("text_config")
    return {**(within if isinstance(within, Mapping) else {}), **config}


def modules_beside(folder: ModelFolder) -> list[str]:
    """The modules beside a text model that is a part of another: `model.vision_tower`."""
    names = names_of(folder)
    found = {name.removeprefix("model.").partition(".")[0] for name in folder.names if names.is_beside(name)}
    return [f"model.{module}" for module in sorted(found)]


@functools.lru_cache(maxsize=16)
def names_of(folder: ModelFolder) -> Names:
    """The names of a folder's tensors.

    Raises:
        InputError: the config is not supported.
    """
    return Names.of(stated_architecture(folder))
