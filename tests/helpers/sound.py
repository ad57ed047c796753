"""A tiny model in each of the forms that the fuzz tests damage, and an adapter of it."""

from pathlib import Path

from convert.adapters.adapter import save_adapter
from convert.files.folder import ModelFolder
from convert.load import read_config
from convert.quantize import quantize
from qlora_jax.config import LoraSettings, QuantizationSettings
from qlora_jax.engine.engine import Engine
from tests.helpers import tiny


def write_sound(place: Path, name: str) -> None:
    """Write the folders `name`, `sharded`, `nf4` and `adapter` into `place`."""
    tiny.write_model(place / name, num_hidden_layers=1)
    tiny.write_model(place / "sharded", num_hidden_layers=1, shards=3)
    model = ModelFolder(place / name)
    quantize(model, place / "nf4", QuantizationSettings())
    lora, shape = LoraSettings(r=2, target_modules=("q_proj",)), read_config(model)
    adapters = Engine(shape, lora, QuantizationSettings(), compute_dtype="float32").init_adapters(0)
    save_adapter(place / "adapter", adapters, lora, QuantizationSettings(), name, architecture=shape)
