"""Adapters that PEFT itself makes and merges, and the same merged here."""

import copy
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from convert.adapters.adapter import load_adapter
from convert.files.folder import ModelFolder
from convert.jobs.check import check_merge
from convert.load import read_config
from convert.merge import merge
from tests.helpers.tiny import NAMES

GRID = 2.0**-10
"""A and B in multiples of this, below 1: their products are multiples of 2^-20, and float32 adds four of them exactly in any order."""


def reference(model: Path, dtype: str = "bfloat16") -> Any:
    """transformers' model."""
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype))


def resized(model: Path, out: Path, rows: int) -> Path:
    """The model with more tokens, as transformers resizes and saves it; the name of the one it was stays known to `peft_adapter`."""
    torch = pytest.importorskip("torch")
    torch.manual_seed(1)
    bigger = reference(model)
    bigger.resize_token_embeddings(rows, mean_resizing=False)
    bigger.save_pretrained(out)
    return out


def peft_adapter(
    folder: Path,
    model: Path,
    dtype: str = "float32",
    *,
    base_dtype: str = "bfloat16",
    named: Path | None = None,
    save: dict[str, Any] | None = None,
    **settings: Any,
) -> Path:
    """What PEFT saves, every tensor of it changed from what it starts at.

    Args:
        named: the base that it is to name, where that is another: of a model that was resized after it was loaded.
        save: options of PEFT's `save_pretrained`.
    """
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    settings = copy.deepcopy(settings)  # PEFT changes lists that it is given
    config = peft.LoraConfig(r=4, lora_alpha=16, task_type="CAUSAL_LM", **settings)
    base = reference(model, base_dtype)
    base.config._name_or_path = base.name_or_path = str(named or model)
    wrapped = peft.get_peft_model(base, config)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name and "magnitude" not in name:
                parameter.copy_((torch.randn_like(parameter) * 0.1 / GRID).round() * GRID)
            elif parameter.requires_grad:
                parameter.mul_(1 + 0.2 * torch.rand_like(parameter))
    wrapped.to(getattr(torch, dtype)).save_pretrained(folder, **(save or {}))
    return folder


def merged(model: Path, adapter: Path, out: Path) -> dict[str, np.ndarray]:
    """Every tensor of the folder that is written here, once the merge has proved itself."""
    folder = ModelFolder(model)
    loaded = load_adapter(adapter, read_config(folder), folder)
    merge(folder, loaded, out, "original")
    check_merge(folder, loaded, out, "original")
    result = ModelFolder(out)
    return {name: result.read(name) for name in result.names}


def pefts_merge(model: Path, adapter: Path, dtype: str = "bfloat16") -> dict[str, np.ndarray]:
    """An embedding: what it merges into the float32 model, rounded: in bfloat16 it rounds the delta before it is added, and then again.

    Args:
        dtype: of the model that everything else is merged into.
    """
    import peft
    import torch

    state = peft.PeftModel.from_pretrained(reference(model, dtype), adapter).merge_and_unload().state_dict()
    in_float32 = peft.PeftModel.from_pretrained(reference(model, "float32"), adapter).merge_and_unload().state_dict()
    state[NAMES.embedding] = in_float32[NAMES.embedding].to(torch.bfloat16)
    return {
        name: tensor.to(torch.bfloat16).view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
        for name, tensor in state.items()
    }
