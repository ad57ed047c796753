"""Adapters in PEFT's format: `adapter_model.safetensors` and `adapter_config.json`, out and in."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pydantic
import safetensors
import safetensors.numpy

from convert import names
from convert.shards import PT_METADATA, TensorSpec, write_json, write_shard
from qlora_jax.config import LINEAR_NAMES, LoraSettings, QuantizationSettings
from qlora_jax.engine import Adapters
from qlora_jax.errors import InputError
from qlora_jax.llama import LlamaConfig
from qlora_jax.placement import put

WEIGHTS_FILE, CONFIG_FILE = "adapter_model.safetensors", "adapter_config.json"
QUANTIZATION_KEY = "quantization"
"""Our own entry in the file's metadata: what the adapter was trained on, which a merge into that needs to know. PEFT ignores it."""

_ONLY: dict[str, Any] = {
    "peft_type": "LORA", "bias": "none", "fan_in_fan_out": False, "use_dora": False, "modules_to_save": None, "rank_pattern": {},
    "alpha_pattern": {}, "layers_to_transform": None, "layer_replication": None, "lora_bias": False, "target_parameters": None,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Adapter:
    """A LoRA adapter read from a folder: for each adapted linear (layer, our name), A [r, in] and B [out, r] in float32."""

    path: Path
    base_model: str | None
    scaling: float
    quantization: QuantizationSettings
    pairs: dict[tuple[int, str], tuple[np.ndarray, np.ndarray]]


def save_adapter(
    folder: Path,
    adapters: Adapters,
    lora: LoraSettings,
    quantization: QuantizationSettings,
    base_model_name_or_path: str,
) -> None:
    """Write an adapter that PEFT loads. The folder appears whole or not at all; one that is there is replaced."""
    aside = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    tensors: dict[str, np.ndarray] = {}
    for layer, tree in enumerate(adapters):
        for name in lora.targets:
            for part in names.ADAPTER_PARTS:
                tensors[names.adapter(layer, name, part)] = np.asarray(tree[name]["adapter"][part])
    specs = [TensorSpec(name, "F32", tensor.shape) for name, tensor in tensors.items()]
    write_shard(
        aside / WEIGHTS_FILE, specs, tensors.values(), {**PT_METADATA, QUANTIZATION_KEY: quantization.model_dump_json()}
    )
    write_json(aside / CONFIG_FILE, _peft_config(lora, base_model_name_or_path))
    shutil.rmtree(folder, ignore_errors=True)
    aside.rename(folder)


def _peft_config(lora: LoraSettings, base_model_name_or_path: str) -> dict[str, Any]:
    """The core fields of PEFT's LoraConfig; older versions refuse fields that they do not know."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model_name_or_path,
        "r": lora.r,
        "lora_alpha": lora.lora_alpha,
        "lora_dropout": lora.lora_dropout,
        "use_rslora": lora.use_rslora,
        "use_dora": False,
        "target_modules": list(lora.targets),
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }


def load_adapter(folder: str | Path, config: LlamaConfig) -> Adapter:
    """Read and check an adapter for a model of this shape.

    Raises:
        InputError: files are missing or damaged, the kind of adapter is not supported, or tensors do not fit the model.
    """
    folder = Path(folder)
    settings = read_adapter_config(folder)
    try:
        tensors = safetensors.numpy.load_file(folder / WEIGHTS_FILE)
        with safetensors.safe_open(folder / WEIGHTS_FILE, framework="numpy") as file:
            quantization = (file.metadata() or {}).get(QUANTIZATION_KEY, "{}")
    except (safetensors.SafetensorError, OSError) as error:
        raise InputError(
            folder / WEIGHTS_FILE, found=f"a damaged safetensors file: {error}", fix="save the adapter again"
        ) from None
    rank = settings["r"]
    scaling = settings["lora_alpha"] / (rank**0.5 if settings.get("use_rslora") else rank)
    pairs = _pairs(folder, tensors, rank, config)
    base_model = settings.get("base_model_name_or_path")
    return Adapter(folder, base_model, scaling, _quantization(folder, quantization), pairs)


def _quantization(folder: Path, text: str) -> QuantizationSettings:
    try:
        return QuantizationSettings.model_validate_json(text)
    except pydantic.ValidationError:
        raise InputError(
            folder / WEIGHTS_FILE,
            found=f"metadata {QUANTIZATION_KEY!r} that cannot be used: {text}",
            expected=f"settings such as {QuantizationSettings().model_dump_json()}",
            fix="save the adapter again",
        ) from None


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """`adapter_config.json`, refused if it asks for something that cannot be applied.

    Raises:
        InputError: the folder is not an adapter's, or the adapter's kind is not supported.
    """
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise InputError(folder, found=f"no {name}", expected=f"a PEFT adapter: {CONFIG_FILE} and {WEIGHTS_FILE}")
    try:
        settings = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(folder / CONFIG_FILE, found=f"not JSON: {error}", fix="save the adapter again") from None
    if not isinstance(settings, dict):
        raise InputError(
            folder / CONFIG_FILE, found=f"a {type(settings).__name__}", expected="an object of adapter settings"
        )
    problems = [
        f"{key} is {settings[key]!r}, supported: {only!r}"
        for key, only in _ONLY.items()
        if (settings.get(key) or None) != (only or None) and key in settings  # null, {} and false all mean "not used"
    ]
    problems += [
        f"{key} is {settings.get(key)!r}, expected a positive number"
        for key in ("r", "lora_alpha")
        if not _positive(settings.get(key))
    ]
    if problems:
        raise InputError(folder / CONFIG_FILE, found="; ".join(problems), expected="a plain LoRA adapter")
    return settings


def _positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


def _pairs(
    folder: Path, tensors: dict[str, np.ndarray], rank: int, config: LlamaConfig
) -> dict[tuple[int, str], tuple[np.ndarray, np.ndarray]]:
    """Group tensors into (A, B) by linear; every name known, every pair complete, every shape right."""
    shapes = config.linear_shapes()
    parts = {name: names.parse_adapter(name) for name in tensors}
    problems = [f"unknown tensor {name}" for name, found in parts.items() if found is None]
    found = {key: tensors[name].astype(np.float32) for name, key in parts.items() if key is not None}
    linears = sorted({key[:2] for key in found}, key=lambda key: (key[0], LINEAR_NAMES.index(key[1])))
    pairs = {}
    for layer, name in linears:
        out_features, in_features = shapes[name]
        expected = {"lora_a": (rank, in_features), "lora_b": (out_features, rank)}
        for part, shape in expected.items():
            tensor = found.get((layer, name, part))
            if tensor is None or tensor.shape != shape:
                what = "missing" if tensor is None else f"of shape {tensor.shape}"
                problems.append(f"{names.adapter(layer, name, part)} is {what}, expected {shape}")
            elif not np.isfinite(tensor).all():
                problems.append(f"{names.adapter(layer, name, part)} holds values that are not finite")
        if layer >= config.num_hidden_layers:
            problems.append(f"layer {layer} of {name}: the model has {config.num_hidden_layers} layers")
        pairs[layer, name] = (found.get((layer, name, "lora_a")), found.get((layer, name, "lora_b")))
    if problems or not pairs:
        found_text = (
            "\n    ".join(["tensors that do not fit the model", *problems[:20]]) if problems else "no adapter tensors"
        )
        raise InputError(folder / WEIGHTS_FILE, found=found_text, fix="give the model this adapter was trained on")
    return pairs


def as_adapters(adapter: Adapter, config: LlamaConfig) -> tuple[LoraSettings, Adapters]:
    """An adapter in the engine's form: the settings its modules need, and one tree a layer on the device.

    Raises:
        InputError: it does not adapt the same linears in every layer.
    """
    targets = sorted({name for _, name in adapter.pairs}, key=LINEAR_NAMES.index)
    if len(adapter.pairs) != len(targets) * config.num_hidden_layers:
        raise InputError(
            adapter.path, found="linears adapted in some layers only", expected="the same target_modules in every layer"
        )
    rank = next(iter(adapter.pairs.values()))[0].shape[0]
    lora = LoraSettings(r=rank, lora_alpha=adapter.scaling * rank, lora_dropout=0.0, target_modules=targets)
    trees = [
        {
            name: {"adapter": dict(zip(("lora_a", "lora_b"), put(adapter.pairs[layer, name], "device"), strict=True))}
            for name in targets
        }
        for layer in range(config.num_hidden_layers)
    ]
    return lora, trees
