"""Frequencies of rotary position embedding, by each method of scaling them; on the host, once, as torch rounds them.

Every method gives a frequency a pair of features and a factor on cos and sin. They are float32 numbers: a frequency that is off by one ulp
turns position 8191 by up to 5e-4 rad more or less.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from qlora_jax.base.reading import shown
from qlora_jax.model.architecture import Rope

F32 = np.float32


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scaling:
    """A `rope_scaling` or `rope_parameters` of one kind of layers, resolved: what transformers would compute from."""

    method: str
    parameters: Mapping[str, Any]
    theta: float
    features: int
    """Features of a head that are rotated; 0 where sizes are not known, and only problems are looked for."""
    longest: int
    """`max_position_embeddings`, or 0 where the config does not say."""
    original: int
    """The positions before scaling: `original_max_position_embeddings`, or `longest`."""
    truncate: bool = True
    """Whether yarn's range is widened to whole features."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """A way to scale frequencies, and the keys it reads, besides those that all have."""

    compute: Callable[[Scaling], tuple[np.ndarray, float]]
    required: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    needs_positions: bool = False
    """Whether it computes with `original` or `longest`."""


def rope_of(scaling: Scaling, interleaved: bool = False) -> Rope:
    """Rotary position embedding as `scaling`, which `problems_of` finds nothing wrong with, says."""
    found, factor = METHODS[scaling.method].compute(scaling)
    rope = Rope(frequencies=_floats(found), scale=factor, interleaved=interleaved)
    if scaling.method != "longrope":
        return rope
    long = F32(1) / (np.asarray(scaling.parameters["long_factor"], F32) * _powers(scaling.theta, scaling.features))
    return dataclasses.replace(rope, long=_floats(long), original=scaling.original)


def plain_frequencies(theta: float, features: int) -> tuple[float, ...]:
    """Frequencies of rotary position embedding without scaling, theta^(-2i / features), as torch rounds them to float32."""
    return _floats(F32(1) / _powers(theta, features))


def problems_of(scaling: Scaling) -> list[str]:
    """Find what keeps `rope_of` from computing: a method that is not known, keys of another method, values that are no such numbers."""
    method, given = METHODS.get(scaling.method), scaling.parameters
    if method is None:
        return [f"rope_type is {shown(scaling.method)}, supported: {', '.join(METHODS)}"]
    problems = [f"{key} is missing" for key in method.required if given.get(key) is None]
    known = {*method.required, *method.optional, *_OF_ALL}
    problems += [
        f"{key} is {shown(value)}, which rope_type {scaling.method!r} does not have"
        for key, value in given.items()
        if key not in known and not (value is None or (key in _NUMBERS and value == 1))
    ]
    for key in sorted(known & given.keys() & {*_NUMBERS, *_LISTS}):
        value = given[key]
        if key in _LISTS and not (isinstance(value, list) and all(map(_is_positive, value))):
            problems.append(f"{key} is {shown(value)}, expected positive numbers")
        elif key in _LISTS and scaling.features and len(value) != scaling.features // 2:
            problems.append(f"{key} has {len(value)} numbers, expected {scaling.features // 2}, one a pair of features")
        elif key in _NUMBERS and value is not None and not _is_positive(value):
            problems.append(f"{key} is {shown(value)}, expected a positive number")
    if scaling.method == "yarn" and scaling.theta <= 1:
        problems.append(f"rope_theta is {shown(scaling.theta)}, expected a number above 1")
    if method.needs_positions and scaling.original and not (_is_positive(scaling.original) and scaling.original > 1):
        problems.append(f"original_max_position_embeddings is {shown(scaling.original)}, expected a number above 1")
    reads_longest = scaling.method == "dynamic" or (method.needs_positions and given.get("factor") is None)
    if (method.needs_positions and not scaling.original) or (reads_longest and not scaling.longest):
        problems.append("max_position_embeddings is missing, which this rope_type reads")
    if not problems and scaling.method == "llama3" and given["low_freq_factor"] >= given["high_freq_factor"]:
        problems.append("low_freq_factor is not below high_freq_factor")
    if given.get("alpha") and scaling.features == 2:
        problems.append(f"alpha cannot scale {scaling.features} features of a head")
    return problems


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < _MOST


def _floats(numbers: np.ndarray) -> tuple[float, ...]:
    return tuple(map(float, numbers))


def _powers(theta: float, features: int) -> np.ndarray:
    """theta^(2i / features), of which the frequencies without scaling are the reciprocals, in float32."""
    exponents = np.arange(0, features, 2, dtype=F32) / F32(features)
    return np.power(np.float64(theta), exponents.astype(np.float64)).astype(F32)


def _plain(scaling: Scaling) -> tuple[np.ndarray, float]:
    return F32(1) / _powers(scaling.theta, scaling.features), 1.0


def _linear(scaling: Scaling) -> tuple[np.ndarray, float]:
    return _plain(scaling)[0] / F32(scaling.parameters["factor"]), 1.0


def _dynamic(scaling: Scaling) -> tuple[np.ndarray, float]:
    """NTK-aware scaling: none up to `longest` positions; with `alpha` (Hunyuan) the same for all lengths."""
    theta, features = scaling.theta, scaling.features
    if alpha := scaling.parameters.get("alpha"):
        theta *= alpha ** (features / (features - 2))
    return F32(1) / _powers(theta, features), 1.0


def _llama3(scaling: Scaling) -> tuple[np.ndarray, float]:
    """Long waves are stretched by `factor`, short ones are not, those between by something between."""
    low, high, factor = (scaling.parameters[key] for key in ("low_freq_factor", "high_freq_factor", "factor"))
    plain = _plain(scaling)[0]
    length = F32(2 * math.pi) / plain
    smooth = (F32(scaling.original) / length - F32(low)) / F32(high - low)
    between = ((1 - smooth) * plain) / F32(factor) + smooth * plain
    stretched = np.where(length > scaling.original / low, plain / F32(factor), plain)
    is_between = (length <= scaling.original / low) & (length >= scaling.original / high)
    return np.where(is_between, between, stretched).astype(F32), 1.0


def _yarn(scaling: Scaling) -> tuple[np.ndarray, float]:
    """YaRN (Peng et al., 2023): features that turn fewer than `beta_slow` times are interpolated, those above `beta_fast` are not."""
    given, features = scaling.parameters, scaling.features
    factor = given.get("factor") or scaling.longest / scaling.original
    powers = _powers(scaling.theta, features)

    def feature(turns: float) -> float:
        return features * math.log(scaling.original / (turns * 2 * math.pi)) / (2 * math.log(scaling.theta))

    first, last = feature(given.get("beta_fast") or 32), feature(given.get("beta_slow") or 1)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, features - 1)
    last += 0.001 if first == last else 0
    ramp = np.clip((np.arange(features // 2, dtype=F32) - F32(first)) / F32(last - first), F32(0), F32(1))
    kept = F32(1) - ramp
    frequencies = (F32(1) / (F32(factor) * powers)) * (F32(1) - kept) + (F32(1) / powers) * kept
    scale = given.get("attention_factor")
    if scale is None:
        by, by_all = given.get("mscale"), given.get("mscale_all_dim")
        scale = _growth(factor, by) / _growth(factor, by_all) if by and by_all else _growth(factor, 1.0)
    return frequencies, float(scale)


def _growth(factor: float, by: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * by * math.log(factor) + 1


def _longrope(scaling: Scaling) -> tuple[np.ndarray, float]:
    """LongRoPE (Ding et al., 2024), for rows up to `original`; the factor on cos and sin is that of longer ones too."""
    given = scaling.parameters
    frequencies = F32(1) / (np.asarray(given["short_factor"], F32) * _powers(scaling.theta, scaling.features))
    factor, scale = given.get("factor") or scaling.longest / scaling.original, given.get("attention_factor")
    if scale is None:
        scale = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(scaling.original))
    return frequencies, float(scale)


_OF_ALL = ("rope_type", "type", "rope_theta", "partial_rotary_factor", "max_position_embeddings")
_NUMBERS = (
    *("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings", "beta_fast", "beta_slow"),
    *("attention_factor", "mscale", "mscale_all_dim", "alpha", "llama_4_scaling_beta"),
)
_LISTS = ("short_factor", "long_factor")
_MOST = 1e30
_POSITIONS = "original_max_position_embeddings"
_YARN = (_POSITIONS, "factor", "beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate")
METHODS = {
    "default": Method(compute=_plain, optional=(_POSITIONS,)),
    "linear": Method(compute=_linear, required=("factor",)),
    "dynamic": Method(
        compute=_dynamic,
        required=("factor",),
        optional=("alpha", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", _POSITIONS),
        needs_positions=True,
    ),
    "llama3": Method(
        compute=_llama3,
        required=("factor", "low_freq_factor", "high_freq_factor"),
        optional=(_POSITIONS,),
        needs_positions=True,
    ),
    "yarn": Method(compute=_yarn, optional=(*_YARN, "llama_4_scaling_beta"), needs_positions=True),
    "longrope": Method(
        compute=_longrope,
        required=_LISTS,
        optional=(_POSITIONS, "factor", "attention_factor"),
        needs_positions=True,
    ),
}
"""Methods by `rope_type`."""
