"""Model folders that are in bitsandbytes' 4 bits already: whether everything in one is as it must be, and what the linears are in.

Those that are not in 4 bits are used as they are: in bfloat16, or in the bfloat16 that 8 bits decode to (`convert.files.int8`).
"""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from convert.files import bitsandbytes, int8
from convert.files.bitsandbytes import STATE, QuantState, companion_of, parse_state, read_state, specs
from convert.files.folder import ModelFolder
from convert.files.shards import TensorSpec
from convert.files.stated import names_of, stated_architecture
from qlora_jax.base.errors import InputError
from qlora_jax.config import QuantizationSettings
from qlora_jax.ops import nf4

BFLOAT16_BYTES = 2
MAP_TOLERANCE = 1e-6
"""Relative. Dequantizing uses our maps, not the stored ones: with equal ones (all we have seen) its bits are bitsandbytes' own. A map
computed by another version or on another CPU may be an ulp (1.2e-7) off; a value further away makes it another format."""


def plain_linears(folder: ModelFolder) -> list[str]:
    """The linears of a 4-bit folder that are not in 4 bits, by tensor name, in the order of the folder."""
    names = names_of(folder)
    return [
        name
        for name in folder.names
        if names.parse_linear(name) is not None and not bitsandbytes.is_packed(folder, name)
    ]


def extra_bytes(folder: ModelFolder, quantization: QuantizationSettings) -> list[int]:
    """For each layer, by how many bytes its linears that are not in 4 bits are larger than if they were."""
    names = names_of(folder)
    extra = [0] * stated_architecture(folder).num_hidden_layers
    for name in plain_linears(folder) if folder.is_4bit else ():
        shape = folder.spec(name).shape
        parsed = names.parse_linear(name)
        extra[0 if parsed is None else parsed[0]] += BFLOAT16_BYTES * math.prod(shape) - _packed_bytes(
            shape, quantization
        )
    return extra


def _packed_bytes(shape: tuple[int, ...], quantization: QuantizationSettings) -> int:
    """Bytes of a linear in 4 bits in memory: codes and scales."""
    blocks = -(-math.prod(shape) // nf4.BLOCK_SIZE)
    nested = -(-blocks // nf4.ABSMAX_BLOCK_SIZE) + 1  # and the offset
    return -(-math.prod(shape) // 2) + (blocks + 4 * nested if quantization.double_quant else 4 * blocks)


def plain_specs(folder: ModelFolder, shard: str) -> list[TensorSpec]:
    """A shard's tensors as an unquantized folder would have them: no companions, linears in 4 or 8 bits as BF16 [out, in]."""
    if not folder.is_4bit:
        return folder.specs(shard)
    weights = {companion_of(name) for name in folder.names}
    found = []
    for spec in folder.specs(shard):
        if companion_of(spec.name) is not None or int8.is_companion(folder, spec.name):
            continue
        if spec.name in weights:
            spec = TensorSpec(spec.name, "BF16", read_state(folder, spec.name).shape)
        elif spec.dtype == "I8":
            spec = TensorSpec(spec.name, "BF16", spec.shape)
        found.append(spec)
    return found


def settle(folder: ModelFolder, asked: QuantizationSettings, *, where: object, fix: str) -> QuantizationSettings:
    """What the linears will be in: a 4-bit folder's own type, or else what is asked for.

    Raises:
        InputError: (at `where`) the folder is in something else than what was asked for by name, not by default.
    """
    if not folder.is_4bit:
        return asked
    state = read_state(folder, next(filter(None, map(companion_of, folder.names))))
    own = {"quant_type": state.quant_type, "double_quant": state.nested}
    named = {key: getattr(asked, key) for key in own if key in asked.model_fields_set}
    if named != {key: own[key] for key in named}:
        found = f"{_settings(named)}, but {folder.path} is in 4 bits already"
        raise InputError(where, found=found, expected=f"what that folder is in: {_settings(own)}", fix=fix)
    return asked.model_copy(update=own)


def _settings(values: dict[str, Any]) -> str:
    return ", ".join(f"{key} {json.dumps(value)}" for key, value in values.items())


def check(folder: ModelFolder, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """What is wrong with a folder whose `config.json` says 4 bits, one line each; nothing is read but headers, states and maps.

    Args:
        shapes: of every linear of the decoder layers, by tensor name.
    """
    companions: dict[str, list[str]] = {}
    for tensor in sorted(folder.names):
        if (weight := companion_of(tensor)) is not None:
            companions.setdefault(weight, []).append(tensor)
    if not companions:
        return [f"config.json says 4 bits, but the weights are not: no tensor is called *.{STATE}nf4 or fp4"]
    problems = [
        f"{weight}: in 4 bits; only the linears of decoder layers can be"
        for weight in companions
        if weight not in shapes and not names_of(folder).is_beside(weight)
    ]
    for name in sorted(shapes.keys() - companions.keys()):
        if name in folder and int8.is_int8(folder, name):
            problems += int8.problems(folder, name, shapes[name])
    kinds: set[tuple[str, bool]] = set()
    for name in companions.keys() & shapes.keys():
        state = parse_state(folder, name, [tensor for tensor in companions[name] if STATE in tensor])
        if isinstance(state, str):
            problems.append(state)
        else:
            problems += _linear_problems(folder, name, shapes[name], state, companions[name])
            kinds.add((state.quant_type, state.nested))
    return sorted(problems) + _kind_problems(folder.config["quantization_config"], kinds)


def _linear_problems(
    folder: ModelFolder, name: str, shape: tuple[int, ...], state: QuantState, companions: Sequence[str]
) -> list[str]:
    """One linear's tensors against what its state and config.json's `shape` call for."""
    if state.shape != shape:
        return [f"{name}: its quant_state says shape {state.shape}, the config says {shape}"]
    quantization = QuantizationSettings(quant_type=state.quant_type, double_quant=state.nested)
    wanted = {spec.name: spec for spec in specs(name, shape, quantization)}
    problems = [f"{tensor}: its quant_state does not call for it" for tensor in companions if tensor not in wanted]
    # Of `name` itself the caller says that it is missing, as of any tensor.
    problems += [f"missing: {tensor}" for tensor in wanted if tensor not in folder and tensor != name]
    for tensor, expected in wanted.items():
        spec = folder.spec(tensor) if tensor in folder else expected
        if tensor == name and (spec.nbytes != expected.nbytes or spec.shape[1:] != (1,)):
            problems.append(f"{name}: {_text(spec)}, expected {_text(expected)}, or its bytes as another dtype")
        elif tensor != name and STATE not in tensor and spec != expected:
            problems.append(f"{tensor}: {_text(spec)}, expected {_text(expected)}")
    return problems or [
        f"{tensor}: other values than bitsandbytes'"
        for part, values in (("quant_map", nf4.CODEBOOKS[state.quant_type]), ("nested_quant_map", nf4.DYNAMIC_MAP))
        if (tensor := f"{name}.{part}") in wanted
        and not np.allclose(np.frombuffer(folder.read_bytes(tensor), "<f4"), values, rtol=MAP_TOLERANCE, atol=0)
    ]


def _kind_problems(stated: dict[str, Any], kinds: set[tuple[str, bool]]) -> list[str]:
    """One kind for all linears, and the one that `config.json` names."""
    texts = sorted(f"{quant_type} with{'' if nested else 'out'} double quantization" for quant_type, nested in kinds)
    if len(texts) > 1:
        return [f"linears of several kinds: {', '.join(texts)}"]
    return [
        f"config.json: {key} is {stated[key]!r}, but the linears are {texts[0]}"
        for quant_type, nested in kinds
        for key, value in (("bnb_4bit_quant_type", quant_type), ("bnb_4bit_use_double_quant", nested))
        if stated.get(key, value) != value
    ]


def _text(spec: TensorSpec) -> str:
    return f"{spec.dtype}{list(spec.shape)}"
