"""Adapters in PEFT's format: `adapter_model.safetensors` and `adapter_config.json`, out and in."""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors

from convert.adapters.advice import unfit
from convert.adapters.config import CONFIG_FILE, AdapterConfig, Target, read_adapter_config
from convert.adapters.delta import Pair, TokenRows
from convert.adapters.file import read_rows, read_tensor, row_slices
from convert.adapters.quantization import Stated, stated_quantization
from convert.adapters.tensors import DAMAGED, DAMAGED_FIX, tensor_problems
from convert.adapters.whole import Whole, whole_tensors
from convert.files.folder import ModelFolder, some
from convert.files.names import ADAPTER_PARTS, Names
from convert.files.names import Target as Key
from convert.files.recognition import not_an_adapter
from convert.files.shards import PT_METADATA, TensorSpec, write_json, write_shard
from qlora_jax.base.errors import InputError
from qlora_jax.base.files import replacing_folder
from qlora_jax.base.reading import kind_of, open_file, reading
from qlora_jax.config import LoraSettings, QuantizationSettings
from qlora_jax.engine.engine import Adapters
from qlora_jax.model.architecture import Architecture
from qlora_jax.runtime.placement import Tree, Where, fetch, one_device

WEIGHTS_FILE = "adapter_model.safetensors"
QUANTIZATION_KEY = "quantization"
"""Our own entry in the file's metadata: what the adapter was trained on, which a merge into that needs to know. PEFT ignores it."""


class Pairs(Mapping[Key, Pair]):
    """The adapted weights, (layer, our name) → Pair. Each look-up reads the file, so that one pair at a time is in memory.

    An embedding [vocabulary, hidden] changes by (B·A)ᵀ: its pair is Aᵀ for `lora_b` and Bᵀ for `lora_a`.
    """

    def __init__(self, path: Path, targets: Mapping[Key, Target], names: Names, *, use_dora: bool) -> None:
        self._path, self._targets, self._names, self._use_dora = path, targets, names, use_dora

    def __getitem__(self, key: Key) -> Pair:
        scaling, names = self._targets[key].scaling, self._names
        lora_a, lora_b = (_read32(self._path, names.adapter(*key, part)) for part in ADAPTER_PARTS)
        if key[1] == "embed_tokens":
            lora_a, lora_b = np.ascontiguousarray(lora_b.T), np.ascontiguousarray(lora_a.T)
        magnitude = _read32(self._path, names.magnitude(*key)) if self._use_dora else None
        return Pair(lora_a, lora_b, scaling, magnitude)

    def __contains__(self, key: object) -> bool:
        return key in self._targets  # the inherited one would read the file

    def __iter__(self) -> Iterator[Key]:
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adapter:
    """An adapter's folder, read and checked against a model's shape; its tensors stay in the file until they are asked for."""

    path: Path
    config: AdapterConfig
    names: Names
    """Names of the model's tensors."""
    stated: Stated
    """What it was trained on, as far as anything says."""
    targets: Mapping[Key, Target]
    pairs: Pairs
    saved: Saved
    tokens: Mapping[str, TokenRows]
    """Hugging Face's name of the embedding's or head's tensor → the rows of it that were trained one by one."""
    is_tied: bool
    """Whether the model's head is its embedding: whatever the adapter does to the one it does to the other."""

    @property
    def quantization(self) -> QuantizationSettings:
        """What the base was quantized to; by default, where nothing says so, what ours would be."""
        return self.stated.quantization

    @property
    def base_model(self) -> str | None:
        """What the adapter says it was trained on: a hub id or a folder."""
        return self.config.base_model

    def of(self, tensor: str) -> str:
        """The tensor whose changes are this one's too: the embedding, of a head that is one with it."""
        return self.names.embedding if self.is_tied and tensor == self.names.lm_head else tensor


def save_adapter(
    folder: Path,
    adapters: Adapters,
    lora: LoraSettings,
    quantization: QuantizationSettings,
    base_model_name_or_path: str,
    *,
    architecture: Architecture,
) -> None:
    """Write an adapter that PEFT loads. The folder appears whole or not at all; one that is there is replaced."""
    with replacing_folder(folder) as aside:
        write_adapter(aside, adapters, lora, quantization, base_model_name_or_path, architecture=architecture)


def write_adapter(
    folder: Path,
    adapters: Adapters,
    lora: LoraSettings,
    quantization: QuantizationSettings,
    base_model_name_or_path: str,
    *,
    architecture: Architecture,
) -> None:
    """Write an adapter's files into a folder that is there."""
    names, targets = Names.of(architecture), lora.targets(architecture.linears)
    arrays = {
        names.adapter(layer, name, part): tree[name]["adapter"][part]
        for layer, tree in enumerate(adapters)
        for name in targets
        for part in ADAPTER_PARTS
    }
    specs = [TensorSpec(name, "F32", array.shape) for name, array in arrays.items()]
    metadata = {**PT_METADATA, QUANTIZATION_KEY: quantization.model_dump_json()}
    tensors = (fetch(array).astype(np.float32, copy=False) for array in arrays.values())  # one at a time
    write_shard(folder / WEIGHTS_FILE, specs, tensors, metadata)
    write_json(
        folder / CONFIG_FILE,
        _peft_config(lora, names.pattern(targets) if names.is_part else list(targets), base_model_name_or_path),
    )


def _peft_config(lora: LoraSettings, targets: str | list[str], base_model_name_or_path: str) -> dict[str, Any]:
    """The core fields of PEFT's LoraConfig; older versions refuse fields that they do not know.

    Args:
        targets: what `target_modules` is: names; or, as names would match linears of a vision tower too, an expression.
    """
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model_name_or_path,
        "r": lora.r,
        "lora_alpha": lora.lora_alpha,
        "lora_dropout": lora.lora_dropout,
        "use_rslora": lora.use_rslora,
        "use_dora": False,
        "target_modules": targets,
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }


def load_adapter(folder: str | Path, config: Architecture, model: ModelFolder | None = None) -> Adapter:
    """Read and check an adapter for a model of this shape.

    Args:
        model: the model's folder, where the caller has it. What the adapter stores of the base unchanged is then not its own, and advice
            can name the model.

    Raises:
        InputError: files are missing or damaged, the kind of adapter is not supported, or tensors do not fit the model or
            `adapter_config.json` (all named at once).
    """
    folder = Path(folder)
    settings = read_adapter_config(folder)
    path = folder / WEIGHTS_FILE
    if kind_of(path) == "nothing":
        raise not_an_adapter(folder, settings.settings)
    targets = settings.targets(config)
    open_file(path, expected="an adapter's tensors").close()  # the library opens anything
    with reading(path, DAMAGED, fix=DAMAGED_FIX):
        with safetensors.safe_open(path, framework="numpy") as file:
            note = (file.metadata() or {}).get(QUANTIZATION_KEY)
            held = set(file.keys())
        wholes = whole_tensors(settings, targets, config, held)
        problems = tensor_problems(path, settings, targets, wholes, config)
        if problems:
            raise unfit(path, problems, settings, config, model)
        return Adapter(
            path=folder,
            config=settings,
            names=Names.of(config),
            stated=stated_quantization(folder, settings.base_model, path, note),
            targets=targets,
            pairs=Pairs(path, targets, Names.of(config), use_dora=settings.use_dora),
            saved=Saved(path, _changed(path, wholes, held, config, model)),
            tokens=_tokens(path, settings, config),
            is_tied=config.tie_word_embeddings,
        )


def _changed(
    path: Path, wholes: Mapping[str, Whole], held: set[str], config: Architecture, model: ModelFolder | None
) -> dict[str, str]:
    """The tensors that are stored whole, and are not what the model has already: Hugging Face's name → the file's."""
    names = Names.of(config)
    stored = {tensor: whole.key for tensor, whole in wholes.items() if whole.key in held}
    if config.tie_word_embeddings:
        stored.pop(names.lm_head, None)  # the embedding's values again
    return {
        tensor: key
        for tensor, key in stored.items()
        if model is None or tensor not in names.vocabulary.values() or not _is_the_models(path, key, tensor, model)
    }


def _is_the_models(path: Path, key: str, tensor: str, model: ModelFolder) -> bool:
    """Whether a stored embedding or head has the values that the model's has."""
    shape = model.spec(tensor).shape
    columns = shape[1]
    return all(
        np.array_equal(
            read_rows(path, key, rows),
            model.elements(tensor, rows.start * columns, (rows.stop - rows.start) * columns)
            .astype(np.float32)
            .reshape(-1, columns),
        )
        for rows in row_slices(shape)
    )


def _tokens(path: Path, settings: AdapterConfig, config: Architecture) -> dict[str, TokenRows]:
    names = Names.of(config)
    found = {
        tensor: TokenRows(indices=np.array(ids, np.int64), values=_read32(path, names.token_rows(tensor)))
        for tensor, ids in settings.token_ids(names).items()
        if not (config.tie_word_embeddings and tensor == names.lm_head)
    }
    return {tensor: rows for tensor, rows in found.items() if rows.indices.size}


def plain_settings(adapter: Adapter, config: Architecture) -> LoraSettings:
    """What a plain adapter's modules need to know, with no dropout; its tensors are not read.

    Raises:
        InputError: it is of a kind that can only be merged; everything that makes it so is named.
    """
    adapted = {name for layer, name in adapter.targets if layer is not None}
    targets = tuple(name for name in config.linears if name in adapted)
    beyond = [name for layer, name in adapter.targets if layer is None]
    kinds = set(adapter.targets.values())
    reasons = ["DoRA (use_dora)"] if adapter.config.use_dora else []
    reasons += [f"LoRA on {' and '.join(beyond)}"] if beyond else []
    saved = [name for name in adapter.saved if adapter.names.parse_target(name) not in adapter.targets]
    reasons += [f"modules_to_save ({some(saved)})"] if saved else []
    reasons += [f"trainable_token_indices ({some(list(adapter.tokens))})"] if adapter.tokens else []
    reasons += ["rank_pattern or alpha_pattern"] if len(kinds) > 1 else []
    if len(adapter.targets) - len(beyond) != len(targets) * config.num_hidden_layers or not kinds:
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
    lora = LoraSettings(r=kind.rank, lora_alpha=alpha, use_rslora=rslora, lora_dropout=0.0, target_modules=targets)
    if lora.scaling != kind.scaling:  # by a pattern that matches everything
        lora = lora.model_copy(update={"lora_alpha": kind.scaling * (kind.rank**0.5 if rslora else kind.rank)})
    return lora


def as_adapters(
    adapter: Adapter, config: Architecture, where: Where = "device", dtype: str = "float32"
) -> tuple[LoraSettings, Adapters]:
    """Return a plain adapter in the engine's form: its settings (see `plain_settings`), and one tree a layer, brought there layer by layer.

    Args:
        where: where the adapters are to live.
        dtype: the dtype that they are trained in.

    Raises:
        InputError: it is of a kind that can only be merged.
    """
    lora = plain_settings(adapter, config)

    def matrices(pair: Pair) -> Tree:
        return {part: np.asarray(getattr(pair, part)).astype(dtype) for part in ADAPTER_PARTS}

    def layer_tree(layer: int) -> Tree:
        return {name: {"adapter": matrices(adapter.pairs[layer, name])} for name in lora.targets(config.linears)}

    return lora, [
        jax.block_until_ready(one_device().put(layer_tree(layer), where)) for layer in range(config.num_hidden_layers)
    ]
