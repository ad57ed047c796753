"""Whether an adapter's tensors are what its `adapter_config.json` and the model call for: every difference, both ways."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from convert import names
from convert.adapter_config import AdapterConfig, Target
from convert.load import tensor_shapes
from qlora_jax.llama import LlamaConfig


def saveable(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors that an adapter may store whole, by Hugging Face's names; a tied head too has one."""
    shapes = tensor_shapes(config)
    return {**shapes, names.LM_HEAD: shapes[names.EMBEDDING]}


def tensor_problems(
    file: Any, settings: AdapterConfig, targets: Mapping[tuple[int, str], Target], config: LlamaConfig
) -> list[str]:
    """What is wrong with the tensors of an open safetensors file, one line each; one tensor at a time is read.

    Args:
        targets: every linear that the adapter must have a pair for.
    """
    found = set(file.keys())
    if not found:
        return ["no adapter tensors"]
    wanted = _wanted(settings, targets, config)
    # PEFT stores these unasked too, when it believes that the vocabulary was resized.
    optional = {names.saved(name): saveable(config)[name] for name in (names.EMBEDDING, names.LM_HEAD)}
    problems = [] if targets else ["target_modules match no linear of this model"]
    problems += [f"{name} is missing, expected {shape}" for name, shape in wanted.items() if name not in found]
    shapes = {**optional, **wanted}
    problems += [_unknown(name, config) for name in sorted(found - shapes.keys())]
    for name in sorted(found & shapes.keys()):
        problems += _tensor_problems(file, name, shapes[name])
    return problems or list(_untied(file, settings, config))


def _wanted(
    settings: AdapterConfig, targets: Mapping[tuple[int, str], Target], config: LlamaConfig
) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors that must be there, by PEFT's names."""
    linears = config.linear_shapes()
    wanted: dict[str, tuple[int, ...]] = {}
    for (layer, name), target in targets.items():
        out_features, in_features = linears[name]
        wanted[names.adapter(layer, name, "lora_a")] = (target.rank, in_features)
        wanted[names.adapter(layer, name, "lora_b")] = (out_features, target.rank)
        if settings.use_dora:
            wanted[names.magnitude(layer, name)] = (out_features,)
    return wanted | {names.saved(name): shape for name, shape in tensor_shapes(config).items() if settings.saved(name)}


def _unknown(name: str, config: LlamaConfig) -> str:
    parsed = names.parse_adapter(name)
    if parsed is None:
        return f"unknown tensor {name}"
    layer, linear, _ = parsed
    if layer >= config.num_hidden_layers:
        return f"layer {layer} of {linear}: the model has {config.num_hidden_layers} layers ({name})"
    return f"unknown tensor {name}: target_modules does not name this linear"


def _tensor_problems(file: Any, name: str, shape: tuple[int, ...]) -> list[str]:
    view = file.get_slice(name)
    if tuple(view.get_shape()) != shape:
        return [f"{name} is of shape {tuple(view.get_shape())}, expected {shape}"]
    if view.get_dtype() not in ("F32", "F16", "BF16", "F64"):
        return [f"{name} is of dtype {view.get_dtype()}, expected a float"]
    return [] if np.isfinite(file.get_tensor(name)).all() else [f"{name} holds values that are not finite"]


def _untied(file: Any, settings: AdapterConfig, config: LlamaConfig) -> Iterator[str]:
    """A model whose head is its embedding stays one model only if both get the same values, as PEFT's does then."""
    embedding, head = names.saved(names.EMBEDDING), names.saved(names.LM_HEAD)
    if not config.tie_word_embeddings:
        return
    if head in file.keys():  # noqa: SIM118 - the file is no mapping
        same = embedding in file.keys() and np.array_equal(file.get_tensor(head), file.get_tensor(embedding))  # noqa: SIM118
        if not same:
            yield f"{head}: the model's head is its embedding (tie_word_embeddings), and the adapter stores another head"
    elif settings.saved(names.EMBEDDING) and not settings.settings.get("ensure_weight_tying"):
        yield (
            f"{embedding}: the model's head is its embedding (tie_word_embeddings), and the adapter changes one of them only "
            "(trained without ensure_weight_tying)"
        )
