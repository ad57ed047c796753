"""Which of a config's rope settings count: transformers 4's `rope_theta` and `rope_scaling`, 5's `rope_parameters`, or the family's own."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from qlora_jax.base.reading import shown
from qlora_jax.model.rope import Scaling, problems_of

FULL, SLIDING = "full_attention", "sliding_attention"


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeRules:
    """A family's way to say what rope is."""

    theta: float = 10000.0
    """Without a `rope_theta`."""
    theta_of_windows: float | None = None
    """That of windowed layers, where these have a rope of their own: `rope_scaling` is full attention's alone then."""
    theta_of_windows_key: str = ""
    """The key of transformers 4 for it, if there was one."""
    otherwise: Mapping[str, Any] | None = None
    """The settings of a config without any, where a missing key is no plain rope."""
    partial: float | None = None
    """The share of a head's features that is rotated, unless the config says otherwise; None where all are, whatever it says."""
    interleaved: bool = False
    methods: tuple[str, ...] = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")
    aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Former names of methods."""
    fixed_original: int | None = None
    """`original_max_position_embeddings` of a config without it, where the top level's counts and not the dict's (Phi-3)."""
    keys: tuple[str, ...] = ()
    """Keys of a rope dict that only this family has."""


def read_scalings(
    config: Mapping[str, Any], rules: RopeRules, head_dim: int | None
) -> tuple[dict[str, Scaling | None], list[str]]:
    """Find the scaling that counts, by layer type; and what is wrong with what the config says.

    With both dicts, transformers takes `rope_scaling` and drops the other: they are refused unless they agree.
    """
    both = config.get("rope_scaling") and config.get("rope_parameters")
    spellings = [{**config, "rope_parameters": None}, {**config, "rope_scaling": None}] if both else [config]
    read = [_read(spelling, rules, head_dim) for spelling in spellings]
    problems = [problem for _, found in read for problem in found]
    if both and not problems and _effect(read[0][0]) != _effect(read[1][0]):
        said = f"{shown(config['rope_scaling'])}, but rope_parameters {shown(config['rope_parameters'])}"
        problems.append(f"rope_scaling is {said}: they contradict each other")
    return read[0][0], problems


def _effect(scalings: Mapping[str, Scaling | None]) -> Any:
    """The numbers that the scalings compute from, however they are spelled."""
    names = ("rope_type", "type", "rope_theta", "partial_rotary_factor", "max_position_embeddings")
    return {
        kind: scaling
        and dataclasses.replace(
            scaling, parameters={k: v for k, v in scaling.parameters.items() if k not in names and v is not None}
        )
        for kind, scaling in scalings.items()
    }


def _read(
    config: Mapping[str, Any], rules: RopeRules, head_dim: int | None
) -> tuple[dict[str, Scaling | None], list[str]]:
    key = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    given = config.get(key) or {}
    if not isinstance(given, dict):
        return {}, [f"{key} is {shown(given)}, expected an object with a rope_type"]
    nested = {kind: given[kind] for kind in (FULL, SLIDING) if kind in given}
    two_ropes = key == "rope_parameters" and rules.theta_of_windows is not None
    if given and bool(nested) != two_ropes:
        wanted = f"an object for each of {FULL} and {SLIDING}" if two_ropes else "one object for all layers"
        return {}, [f"{key} is {shown(given)}, expected {wanted}"]
    if extra := [name for name in given if nested and name not in nested]:
        return {}, [f"{key}.{name} is {shown(given[name])}, not supported beside {FULL}" for name in extra]
    if not all(isinstance(own or {}, dict) for own in nested.values()):
        return {}, [f"{key} is {shown(given)}, expected objects with a rope_type"]
    if not given and config.get("rope_parameters") is None and rules.otherwise is not None:
        given = dict(rules.otherwise)
        config = {**config, "rope_theta": None}  # which is not read then
    scalings: dict[str, Scaling | None] = {}
    problems = []
    for kind in (FULL, SLIDING):
        own = (nested.get(kind) or {}) if nested else given
        theta = config.get("rope_theta") or rules.theta
        if kind == SLIDING and rules.theta_of_windows is not None:
            own = nested.get(kind) or {}
            theta = config.get(rules.theta_of_windows_key) or rules.theta_of_windows
        scaling, found = _scaling(own, theta, config, rules, head_dim)
        where = f"{key}.{kind}" if nested else key
        new = [f"{where}: {problem}" if given else problem for problem in found]
        problems += [problem for problem in new if problem not in problems]
        scalings[kind] = scaling
    return scalings, problems


def _scaling(
    own: Mapping[str, Any], theta: Any, config: Mapping[str, Any], rules: RopeRules, head_dim: int | None
) -> tuple[Scaling | None, list[str]]:
    """One kind's settings, and what is wrong with them."""
    named = {rules.aliases.get(own[key], own[key]) for key in ("rope_type", "type") if isinstance(own.get(key), str)}
    if len(named) > 1:
        return None, [f"rope_type is {shown(own['rope_type'])}, but type is {shown(own['type'])}"]
    method = next(iter(named), "default" if not {"rope_type", "type"} & own.keys() else own.get("rope_type"))
    if method not in rules.methods:
        return None, [f"rope_type is {shown(method)}, supported: {', '.join(rules.methods)}"]
    if foreign := [key for key in _FAMILIES_OWN if own.get(key) is not None and key not in rules.keys]:
        return None, [f"{key} is {shown(own[key])}, not supported" for key in foreign]
    theta = own.get("rope_theta") or theta
    above = None if rules.partial is None else config.get("partial_rotary_factor", rules.partial)
    share = own.get("partial_rotary_factor") or above or 1.0
    for name, value, most in (("rope_theta", theta, 1e30), ("partial_rotary_factor", share, 1.0)):
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value <= most:
            expected = "a positive number" if most > 1 else "a number above 0, to 1"
            return None, [f"{name} is {shown(value)}, expected {expected}"]
    if share != 1 and rules.partial is None:
        return None, [f"partial_rotary_factor is {shown(share)}, not supported"]
    features = int(head_dim * share) if head_dim else 0
    if head_dim and (features < 2 or features % 2):
        return None, [f"{features} features of a head are rotated, expected an even number"]
    longest = config.get("max_position_embeddings") or 0
    original = own.get("original_max_position_embeddings") or longest
    if rules.fixed_original is not None:
        original = config.get("original_max_position_embeddings") or rules.fixed_original
    scaling = Scaling(
        method=method,
        parameters=own,
        theta=float(theta),
        features=features,
        longest=longest,
        original=original,
        truncate=rules.theta_of_windows is not None or own.get("truncate") is not False,
    )
    return scaling, problems_of(scaling)


_FAMILIES_OWN = ("alpha", "llama_4_scaling_beta")
