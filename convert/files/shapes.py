"""The tensors that a checkpoint of an architecture has, and their shapes."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from convert.files.names import Names
from convert.files.shards import TensorSpec
from qlora_jax.base.errors import InputError
from qlora_jax.model.architecture import XIELU, Architecture, QKNorm
from qlora_jax.model.families import read_architecture

Shapes = dict[str, tuple[int, ...]]


def tensor_shapes(config: Architecture) -> Shapes:
    """Every tensor of a checkpoint of this architecture, under Hugging Face's names."""
    names, vocabulary = Names.of(config), (config.vocab_size, config.hidden_size)
    shapes: Shapes = {names.embedding: vocabulary}
    shapes |= {names.final_norm_part(part): (config.hidden_size,) for part in names.norm_parts}
    if not config.tie_word_embeddings:
        shapes[names.lm_head] = vocabulary
    for layer in range(config.num_hidden_layers):
        shapes |= vector_shapes(config, names, layer)
        shapes |= {names.linear(layer, name): shape for name, shape in config.linear_shapes().items()}
    return shapes


def vector_shapes(config: Architecture, names: Names, layer: int) -> Shapes:
    """Every tensor of a decoder layer but its linears' weights."""
    shapes: Shapes = {
        names.norm(layer, name, part): (config.hidden_size,) for name in names.norms for part in names.norm_parts
    }
    shapes |= {names.bias(layer, name): config.linears[name].shape[:1] for name in names.paths if name in names.biased}
    if config.qk_norm is not None:
        both = _qk_norm_shapes(config, config.qk_norm)
        shapes |= {names.qk_norm(layer, name): shape for name, shape in zip(names.qk_norms, both, strict=True)}
    return shapes | {names.act_fn(layer, name): XIELU[name] for name in names.activation}


def _qk_norm_shapes(config: Architecture, norm: QKNorm) -> tuple[tuple[int, ...], tuple[int, ...]]:
    heads, size = (config.num_attention_heads, config.num_key_value_heads), config.head_dim
    if norm.over == "head":
        return (size,), (size,)
    if norm.over == "width":
        return (heads[0] * size,), (heads[1] * size,)
    return (heads[0], size), (heads[1], size)


def refusals(config: Mapping[str, Any], specs: Iterable[TensorSpec], where: Path) -> list[str]:
    """What else will be refused of a folder that is damaged: settings of its `config.json`, or shapes that are not what it says.

    A reader finds these when the folder is whole; told with the rest, they are not a second surprise.
    """
    try:
        shapes = tensor_shapes(read_architecture(config, where))
    except InputError as error:
        return [f"config.json: {error.found}"]
    return [mismatch(spec, shapes[spec.name]) for spec in specs if spec.shape != shapes.get(spec.name, spec.shape)]


def mismatch(spec: TensorSpec, expected: tuple[int, ...]) -> str:
    """A tensor's shape beside the one that `config.json` calls for."""
    return f"{spec.name}: shape {spec.shape}, the config says {expected}"
