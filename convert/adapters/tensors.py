"""Whether an adapter's tensors are what its `adapter_config.json` and the model call for: every difference, both ways."""

from collections.abc import Iterator, Mapping, Set
from pathlib import Path

import numpy as np
import safetensors

from convert.adapters.config import AdapterConfig, Target
from convert.files import names
from convert.files.shapes import tensor_shapes
from qlora_jax.model.decoder import LlamaConfig


def saveable(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors that an adapter may store whole, by Hugging Face's names; a tied head too has one."""
    shapes = tensor_shapes(config)
    return {**shapes, names.LM_HEAD: shapes[names.EMBEDDING]}


def read_tensor(path: Path, name: str) -> np.ndarray:
    """One tensor in the stored dtype. The file is opened anew: pages of a mapped file count as memory until it is closed."""
    with safetensors.safe_open(path, framework="numpy") as file:
        tensor: np.ndarray = file.get_tensor(name)
    return tensor


def tensor_problems(
    path: Path, settings: AdapterConfig, targets: Mapping[names.Target, Target], config: LlamaConfig
) -> list[str]:
    """What is wrong with a safetensors file's tensors, one line each; one tensor at a time is read.

    Args:
        targets: every weight that the adapter must have a pair for.

    Raises:
        SafetensorError, OSError: the file cannot be read.
    """
    with safetensors.safe_open(path, framework="numpy") as file:
        views = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - the file is no mapping
        found = {name: (tuple(view.get_shape()), view.get_dtype()) for name, view in views.items()}
        del views
    if not found:
        return ["no adapter tensors"]
    wanted = _wanted(settings, targets, config)
    # PEFT stores these unasked too: when it believes that the vocabulary was resized, and beside their own adapters.
    optional = {names.saved(name): saveable(config)[name] for name in names.VOCABULARY.values()}
    of_targets = [names.target(*target) for target in targets if target[0] is None]
    optional |= {names.stored_base(name): saveable(config)[name] for name in of_targets}
    problems = [] if targets else ["target_modules match no linear of this model"]
    problems += [f"{name} is missing, expected {shape}" for name, shape in wanted.items() if name not in found]
    shapes = {**optional, **wanted}
    problems += [_unknown(name, config) for name in sorted(found.keys() - shapes.keys())]
    for name in sorted(found.keys() & shapes.keys()):
        problems += _tensor_problems(path, name, *found[name], shapes[name])
    return (
        problems
        or list(_beyond_the_layers(targets, settings, config))
        or list(_untied(path, found.keys(), settings, config))
    )


def _wanted(
    settings: AdapterConfig, targets: Mapping[names.Target, Target], config: LlamaConfig
) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors that must be there, by PEFT's names."""
    shapes = config.linear_shapes() | dict.fromkeys(names.VOCABULARY, (config.vocab_size, config.hidden_size))
    wanted: dict[str, tuple[int, ...]] = {}
    for (layer, name), target in targets.items():
        out_features, in_features = shapes[name] if name != "embed_tokens" else shapes[name][::-1]
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


def _tensor_problems(path: Path, name: str, shape: tuple[int, ...], dtype: str, expected: tuple[int, ...]) -> list[str]:
    if shape != expected:
        return [f"{name} is of shape {shape}, expected {expected}"]
    if dtype not in ("F32", "F16", "BF16", "F64"):
        return [f"{name} is of dtype {dtype}, expected a float"]
    return [] if np.isfinite(read_tensor(path, name)).all() else [f"{name} holds values that are not finite"]


def _beyond_the_layers(
    targets: Mapping[names.Target, Target], settings: AdapterConfig, config: LlamaConfig
) -> Iterator[str]:
    """What PEFT can do to an embedding or a head, and we cannot."""
    for name in [name for layer, name in targets if layer is None]:
        if config.tie_word_embeddings:
            yield f"{name} is adapted, but the model's head is its embedding (tie_word_embeddings), which would change with it"
        elif name == "embed_tokens" and settings.use_dora:
            yield "embed_tokens is adapted with DoRA, which is supported for linears"


def _untied(path: Path, found: Set[str], settings: AdapterConfig, config: LlamaConfig) -> Iterator[str]:
    """A model whose head is its embedding stays one model only if both get the same values, as PEFT's does then."""
    embedding, head = names.saved(names.EMBEDDING), names.saved(names.LM_HEAD)
    if not config.tie_word_embeddings:
        return
    if head in found:
        if embedding not in found or not np.array_equal(read_tensor(path, head), read_tensor(path, embedding)):
            yield f"{head}: the model's head is its embedding (tie_word_embeddings), and the adapter stores another head"
    elif settings.saved(names.EMBEDDING) and not settings.settings.get("ensure_weight_tying"):
        yield (
            f"{embedding}: the model's head is its embedding (tie_word_embeddings), and the adapter changes one of them only "
            "(trained without ensure_weight_tying)"
        )
