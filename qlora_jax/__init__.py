"""QLoRA fine-tuning of large language models in pure JAX and Flax.

What is named in `__all__` is the public API. It is imported when it is first asked for, so that `import qlora_jax` starts neither JAX
nor anything else.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "Batch": "qlora_jax.data",
    "Config": "qlora_jax.config",
    "Corpus": "qlora_jax.data.corpus",
    "Engine": "qlora_jax.engine.engine",
    "InputError": "qlora_jax.base.errors",
    "Plan": "qlora_jax.planning.budget",
    "Sampling": "qlora_jax.engine.generation",
    "Trainer": "qlora_jax.training.trainer",
    "Weights": "qlora_jax.engine.engine",
    "load_adapter": "convert.adapters.adapter",
    "load_config": "qlora_jax.config",
    "load_corpus": "qlora_jax.data.corpus",
    "load_weights": "convert.load",
    "make_engine": "qlora_jax.planning.search",
    "open_model": "convert.model",
    "plan_run": "qlora_jax.commands.plan",
    "save_adapter": "convert.adapters.adapter",
    "train": "qlora_jax.commands.train",
}
"""The module each public name is defined in."""

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    """Return a public name, its module being imported now (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
