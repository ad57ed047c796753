"""Bytes of model folders before they are made: from a folder's headers, or from a shape alone."""

from collections.abc import Iterable, Sequence

from convert.adapters.delta import Base
from convert.files import prequantized
from convert.files.derived import SPARE_BYTES
from convert.files.folder import ModelFolder
from convert.files.names import Names
from convert.files.shapes import tensor_shapes
from convert.files.shards import TensorSpec
from convert.quantize import quantized_specs
from qlora_jax.config import QuantizationSettings
from qlora_jax.model.architecture import Architecture

NAME_BYTES = 2**9
"""For a tensor's entry in a shard's header and in the index: about 300 for a companion's of a linear."""


def tensors_of(folder: ModelFolder) -> list[TensorSpec]:
    """A folder's tensors as an unquantized one would have them."""
    return [spec for shard in folder.shards for spec in prequantized.plain_specs(folder, shard)]


def tensors_for(config: Architecture) -> list[TensorSpec]:
    """The tensors of a bfloat16 folder of this shape."""
    return [TensorSpec(name, "BF16", shape) for name, shape in tensor_shapes(config).items()]


def quantized_bytes(tensors: Iterable[TensorSpec], names: Names, quantization: QuantizationSettings) -> int:
    """Of the folder that `convert.quantize` makes of these tensors, at most; without its companions, such as the tokenizer."""
    kept = (spec for spec in tensors if not names.is_ignored(spec.name))
    return _total(new for spec in kept for new in quantized_specs(spec, names, quantization))


def merged_bytes(tensors: Iterable[TensorSpec], names: Names, target_modules: Sequence[str], base: Base) -> int:
    """The same of the folder that `convert.merge` makes of them, with an adapter on linears so named."""

    def changes(spec: TensorSpec) -> bool:
        linear = names.parse_linear(spec.name)
        return linear is not None and (base == "dequantized" or linear[1] in target_modules)

    return _total(TensorSpec(spec.name, "BF16", spec.shape) if changes(spec) else spec for spec in tensors)


def companion_bytes(folder: ModelFolder) -> int:
    """Of what goes along with the weights."""
    return sum(path.stat().st_size for path in folder.companions())


def _total(specs: Iterable[TensorSpec]) -> int:
    return SPARE_BYTES + sum(spec.nbytes + NAME_BYTES for spec in specs)
