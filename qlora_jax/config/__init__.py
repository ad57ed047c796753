"""Every setting of a run, typed and validated; how a file of them is read; which may change in a continued run."""

from qlora_jax.config.settings import (
    NOT_YET,
    Config,
    LoraSettings,
    MemorySettings,
    QuantizationSettings,
    TrainingSettings,
    load_config,
)

__all__ = [
    "NOT_YET",
    "Config",
    "LoraSettings",
    "MemorySettings",
    "QuantizationSettings",
    "TrainingSettings",
    "load_config",
]
