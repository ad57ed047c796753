"""The tensors that a checkpoint of a Llama has, and their shapes."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from convert.files import names
from convert.files.shards import TensorSpec
from qlora_jax.base.errors import InputError
from qlora_jax.model.architecture import Architecture


def tensor_shapes(config: Architecture) -> dict[str, tuple[int, ...]]:
    """Every tensor of a checkpoint of this shape, under Hugging Face's names."""
    vocabulary, hidden = (config.vocab_size, config.hidden_size), (config.hidden_size,)
    shapes: dict[str, tuple[int, ...]] = {names.EMBEDDING: vocabulary, names.FINAL_NORM: hidden}
    if not config.tie_word_embeddings:
        shapes[names.LM_HEAD] = vocabulary
    for layer in range(config.num_hidden_layers):
        shapes |= {names.norm(layer, name): hidden for name in names.NORM_NAMES}
        shapes |= {names.linear(layer, name): shape for name, shape in config.linear_shapes().items()}
    return shapes


def refusals(config: Mapping[str, Any], specs: Iterable[TensorSpec], where: Path) -> list[str]:
    """What else will be refused of a folder that is damaged: settings of its `config.json`, or shapes that are not what it says.

    A reader finds these when the folder is whole; told with the rest, they are not a second surprise.
    """
    try:
        shapes = tensor_shapes(Architecture.from_hf(config, where))
    except InputError as error:
        return [f"config.json: {error.found}"]
    return [mismatch(spec, shapes[spec.name]) for spec in specs if spec.shape != shapes.get(spec.name, spec.shape)]


def mismatch(spec: TensorSpec, expected: tuple[int, ...]) -> str:
    """A tensor's shape beside the one that `config.json` calls for."""
    return f"{spec.name}: shape {spec.shape}, the config says {expected}"
