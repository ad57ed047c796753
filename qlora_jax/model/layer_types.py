"""Each layer's type, full or windowed attention, as the families' configs say it."""

from collections.abc import Callable, Mapping
from typing import Any

from qlora_jax.base.reading import shown
from qlora_jax.model.rope_config import FULL, SLIDING

Config = Mapping[str, Any]
Types = Callable[[Config], list[str]]


def full(config: Config) -> list[str]:
    """Full attention in every layer."""
    return [FULL] * config["num_hidden_layers"]


def one_window(config: Config) -> list[str]:
    """The same window in every layer, if there is one."""
    return [FULL if config["sliding_window"] is None else SLIDING] * config["num_hidden_layers"]


def pattern(full_every: int | str | None, null_is_full: bool = False) -> Types:
    """`layer_types`, or full attention in every layer of this number (or of the one under this key); None: windows in all.

    `null_is_full` where a window of null means full attention in all, rather than a contradiction.
    """

    def types(config: Config) -> list[str]:
        if config.get("layer_types"):
            return list(config["layer_types"])
        if full_every is None or (null_is_full and config["sliding_window"] is None):
            return one_window(config)
        every = config[full_every] if isinstance(full_every, str) else full_every
        layers = range(config["num_hidden_layers"])
        if isinstance(every, str):  # letter by letter: L, a window ("local"), and G ("global")
            return [SLIDING if every[i % len(every)] == "L" else FULL for i in layers]
        return [SLIDING if (i + 1) % every else FULL for i in layers]

    return types


def qwen(config: Config) -> list[str]:
    """`layer_types`, or windows from layer `max_window_layers` on, if they are in use."""
    if config.get("layer_types"):
        return list(config["layer_types"])
    used = config["use_sliding_window"] and config["sliding_window"] is not None
    first = config["max_window_layers"] if used else config["num_hidden_layers"]
    return [SLIDING if i >= first else FULL for i in range(config["num_hidden_layers"])]


def smollm3(config: Config) -> list[str]:
    """`layer_types`, or windows in layers without rope, if they are in use."""
    if config.get("layer_types"):
        return list(config["layer_types"])
    used = config["use_sliding_window"] and config["sliding_window"] is not None
    every = config["no_rope_layer_interval"]
    rotated = config.get("no_rope_layers") or [(i + 1) % every for i in range(config["num_hidden_layers"])]
    return [SLIDING if used and not turned else FULL for turned in rotated]


def type_problems(config: Config, types: Types) -> list[str]:
    """Find what is wrong with a config's keys of windows and layers; sizes are already known to be right."""
    layers, given, period = config["num_hidden_layers"], config.get("layer_types"), config.get("sliding_window_pattern")
    window, rotated = config.get("sliding_window"), config.get("no_rope_layers") if types is smollm3 else None
    problems = []
    if window is not None and not _is_whole(window):
        problems.append(f"sliding_window is {shown(window)}, expected a whole number from 1, or null")
    if rotated is not None and not (
        isinstance(rotated, list) and len(rotated) == layers and all(n in (0, 1) for n in rotated)
    ):
        problems.append(f"no_rope_layers is {shown(rotated)}, expected 0 or 1 for each of {layers} layers")
    letters = isinstance(period, str) and period and set(period) <= {"L", "G"}
    if period and not letters and not _is_whole(period):
        problems.append(f"sliding_window_pattern is {shown(period)}, expected a whole number from 1")
    problems += [
        f"{key} is {shown(config[key])}, expected a whole number"
        for key, least, reader in (("max_window_layers", 0, qwen), ("no_rope_layer_interval", 1, smollm3))
        if types is reader and not _is_whole(config[key], least)
    ]
    if given:
        known = isinstance(given, list) and all(kind in (FULL, SLIDING) for kind in given)
        if not known or len(given) != layers:
            problems.append(f"layer_types is {shown(given)}, expected {FULL} or {SLIDING} for each of {layers} layers")
    if not period and not given and (window is not None or period is not None) and "sliding_window_pattern" in config:
        problems.append(f"sliding_window_pattern is {shown(period)}, expected a whole number from 1")
    if problems:
        return problems
    found = types(config)
    if given and found != given:
        problems.append(f"layer_types is {shown(given)}, but the layers of this family are {shown(found)}")
    used = config.get("use_sliding_window", True)
    if SLIDING in found and (window is None or not used):
        off = "sliding_window is null" if window is None else "use_sliding_window is false"
        problems.append(f"layer_types has {SLIDING}, but {off}: they contradict each other")
    return problems


def _is_whole(value: Any, least: int = 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value < 2**31
