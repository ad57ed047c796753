"""Adapters in PEFT's format: `adapter_model.safetensors` and `adapter_config.json`, out and in."""

import dataclasses
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pydantic
import safetensors

from convert.adapters.config import CONFIG_FILE, AdapterConfig, Target, read_adapter_config
from convert.adapters.delta import Pair
from convert.adapters.tensors import read_tensor, saveable, tensor_problems
from convert.files import names
from convert.files.folder import some
from convert.files.shards import PT_METADATA, TensorSpec, write_json, write_shard
from qlora_jax.base.errors import InputError
from qlora_jax.config import LINEAR_NAMES, LoraSettings, QuantizationSettings
from qlora_jax.engine.engine import Adapters
from qlora_jax.model.decoder import LlamaConfig
from qlora_jax.runtime.placement import Tree, put

WEIGHTS_FILE, PICKLE_FILE = "adapter_model.safetensors", "adapter_model.bin"
QUANTIZATION_KEY = "quantization"
"""Our own entry in the file's metadata: what the adapter was trained on, which a merge into that needs to know. PEFT ignores it."""


class Pairs(Mapping[names.Target, Pair]):
    """The adapted weights, (layer, our name) → Pair. Each look-up reads the file, so that one pair at a time is in memory.

    An embedding [vocabulary, hidden] changes by (B·A)ᵀ: its pair is Aᵀ for `lora_b` and Bᵀ for `lora_a`.
    """

    def __init__(self, path: Path, targets: Mapping[names.Target, Target], use_dora: bool) -> None:
        self._path, self._targets, self._use_dora = path, targets, use_dora

    def __getitem__(self, key: names.Target) -> Pair:
        scaling = self._targets[key].scaling
        lora_a, lora_b = (_read32(self._path, names.adapter(*key, part)) for part in names.ADAPTER_PARTS)
        if key[1] == "embed_tokens":
            lora_a, lora_b = np.ascontiguousarray(lora_b.T), np.ascontiguousarray(lora_a.T)
        magnitude = _read32(self._path, names.magnitude(*key)) if self._use_dora else None
        return Pair(lora_a, lora_b, scaling, magnitude)

    def __contains__(self, key: object) -> bool:
        return key in self._targets  # the inherited one would read the file

    def __iter__(self) -> Iterator[names.Target]:
        return iter(self._targets)

    def __len__(self) -> int:
        return len(self._targets)


class Saved(Mapping[str, np.ndarray]):
    """Tensors that take the place of the base's: Hugging Face's name → values in the stored dtype, read when looked up.

    With an adapter on it too, it is what the adapter is added to.
    """

    def __init__(self, path: Path, tensors: Mapping[str, str]) -> None:
        """`tensors`: Hugging Face's names → the file's."""
        self._path, self._tensors = path, tensors

    def __getitem__(self, name: str) -> np.ndarray:
        return read_tensor(self._path, self._tensors[name])

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def _read32(path: Path, name: str) -> np.ndarray:
    return read_tensor(path, name).astype(np.float32, copy=False)


@dataclasses.dataclass(frozen=True)
class Adapter:
    """An adapter's folder, read and checked against a model's shape; its tensors stay in the file until they are asked for."""

    path: Path
    config: AdapterConfig
    quantization: QuantizationSettings
    targets: Mapping[names.Target, Target]
    pairs: Pairs
    saved: Saved

    @property
    def base_model(self) -> str | None:
        """What the adapter says it was trained on: a hub id or a folder."""
        return self.config.base_model


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
                tensors[names.adapter(layer, name, part)] = np.asarray(tree[name]["adapter"][part], np.float32)
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
        InputError: files are missing or damaged, the kind of adapter is not supported, or tensors do not fit the model or
            `adapter_config.json` (all named at once).
    """
    folder = Path(folder)
    settings = read_adapter_config(folder)
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        pickled = " but adapter_model.bin, which is never unpickled" if (folder / PICKLE_FILE).exists() else ""
        raise InputError(
            folder, found=f"no {WEIGHTS_FILE}{pickled}", expected=f"a PEFT adapter: {CONFIG_FILE} and {WEIGHTS_FILE}"
        )
    targets = settings.targets(config)
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            note = (file.metadata() or {}).get(QUANTIZATION_KEY, "{}")
            held = set(file.keys())
        problems = tensor_problems(path, settings, targets, config)
    except (safetensors.SafetensorError, OSError) as error:
        raise InputError(path, found=f"a damaged safetensors file: {error}", fix="save the adapter again") from None
    if problems:
        shown = problems[:20] + ([f"... and {len(problems) - 20} more"] if len(problems) > 20 else [])
        raise InputError(
            path,
            found="\n    ".join(["tensors that do not fit the model or adapter_config.json", *shown]),
            fix=f"give the model this adapter was trained on ({settings.base_model or 'it does not say which'})",
        )
    stored = ((name, key) for name in saveable(config) for key in (names.saved(name), names.stored_base(name)))
    saved = Saved(path, {name: key for name, key in stored if key in held})
    return Adapter(
        folder, settings, _quantization(folder, note), targets, Pairs(path, targets, settings.use_dora), saved
    )


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


def plain_settings(adapter: Adapter, config: LlamaConfig) -> LoraSettings:
    """What a plain adapter's modules need to know, with no dropout; its tensors are not read.

    Raises:
        InputError: it is of a kind that can only be merged; everything that makes it so is named.
    """
    names_of = sorted({name for layer, name in adapter.targets if layer is not None}, key=LINEAR_NAMES.index)
    beyond = [name for layer, name in adapter.targets if layer is None]
    kinds = set(adapter.targets.values())
    reasons = ["DoRA (use_dora)"] if adapter.config.use_dora else []
    reasons += [f"LoRA on {' and '.join(beyond)}"] if beyond else []
    saved = [name for name in adapter.saved if names.parse_target(name) not in adapter.targets]
    reasons += [f"modules_to_save ({some(saved)})"] if saved else []
    reasons += ["rank_pattern or alpha_pattern"] if len(kinds) > 1 else []
    if len(adapter.targets) - len(beyond) != len(names_of) * config.num_hidden_layers or not kinds:
        reasons.append("linears adapted in some layers only")
    if reasons:
        raise InputError(
            adapter.path,
            found=f"an adapter with {'; '.join(reasons)}, which can be merged but not run or trained here",
            expected="one rank and scaling, and the same target_modules in every layer",
            fix="merge it first (python -m convert.merge) and give the merged folder as the model",
        )
    (kind,) = kinds
    rslora = bool(adapter.config.settings.get("use_rslora"))
    alpha = adapter.config.settings["lora_alpha"]
    lora = LoraSettings(r=kind.rank, lora_alpha=alpha, use_rslora=rslora, lora_dropout=0.0, target_modules=names_of)
    if lora.scaling != kind.scaling:  # by a pattern that matches everything
        lora = lora.model_copy(update={"lora_alpha": kind.scaling * (kind.rank**0.5 if rslora else kind.rank)})
    return lora


def as_adapters(adapter: Adapter, config: LlamaConfig) -> tuple[LoraSettings, Adapters]:
    """A plain adapter in the engine's form: its settings (see `plain_settings`), and one tree a layer on the device.

    Raises:
        InputError: it is of a kind that can only be merged.
    """
    lora = plain_settings(adapter, config)
    return lora, [
        {name: {"adapter": _pair_on_device(adapter.pairs[layer, name])} for name in lora.targets}
        for layer in range(config.num_hidden_layers)
    ]


def _pair_on_device(pair: Pair) -> Tree:
    return put({"lora_a": pair.lora_a, "lora_b": pair.lora_b}, "device")
