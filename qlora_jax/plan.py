"""Decides where things live, from shapes alone."""

import dataclasses

import jax
from flax import nnx

from qlora_jax.config import MemorySettings, QuantizationSettings
from qlora_jax.llama import DecoderLayer, LlamaConfig
from qlora_jax.placement import LayerPlace, Where, nbytes

RESIDENT_SHARE = 0.5
"""Weights stay on the device by default if they take no more than this share of its memory; the rest is for everything else."""


@dataclasses.dataclass(frozen=True)
class Placements:
    """Where the base model's layers, the kept layer inputs and the optimizer's moments live."""

    base_weights: LayerPlace
    activations: Where
    optimizer: Where


def layer_bytes(config: LlamaConfig, quantization: QuantizationSettings) -> int:
    """Bytes of one decoder layer's frozen weights, from its shapes: 441 MB for Llama-2-70B."""
    layer = nnx.eval_shape(lambda: DecoderLayer(config, None, quantization, "xla", nnx.Rngs(0)))
    return nbytes(nnx.state(layer))


def choose_placements(memory: MemorySettings, optim: str, weight_bytes: int, device_bytes: int | None) -> Placements:
    """What the settings say, and for each `auto`: weights on the device if they leave it room, layer inputs on the device, moments on
    the host for a paged optimizer and on the device otherwise.

    Args:
        weight_bytes: of the whole quantized model.
        device_bytes: of the device's memory; None if it is the host's own (a CPU), where nothing is gained by streaming.
    """
    fits = device_bytes is None or weight_bytes <= RESIDENT_SHARE * device_bytes
    automatic = Placements("device" if fits else "host", "device", "host" if optim.startswith("paged") else "device")
    chosen = {name: where for name, where in memory.model_dump().items() if where != "auto"}
    return dataclasses.replace(automatic, **chosen)


def device_bytes() -> int | None:
    """Memory that XLA may use on the first device; None on a CPU."""
    stats = jax.devices()[0].memory_stats()
    return stats["bytes_limit"] if stats else None
