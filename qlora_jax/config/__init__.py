"""Every setting of a run, typed and validated; how a file of them is read; which may change in a continued run."""

from qlora_jax.config.settings import (
    LINEAR_NAMES,
    NOT_YET,
    Config,
    LoraSettings,
    MemorySettings,
    QuantizationSettings,
    TrainingSettings,
    load_config,
)

__all__ = [
    "LINEAR_NAMES",
    "NOT_YET",
    "Config",
    "LoraSettings",
    "MemorySettings",
    "QuantizationSettings",
    "TrainingSettings",
    "load_config",
]
