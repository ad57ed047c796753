"""What a file or folder is that was given as a model or as an adapter and is none: said by name, with what takes it.

Asked before anything is listed that a model or an adapter would have to have. Only names, a few first bytes and small JSON files are
looked at.
"""

import dataclasses
import itertools
import json
import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from convert.files.companions import PICKLE_SUFFIXES
from qlora_jax.base.errors import InputError, shown

MAX_JSON_BYTES, MAX_NAMES = 10_000_000, 10_000
ADAPTER_CONFIG, ADAPTER_WEIGHTS, ADAPTER_PICKLE = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "adapter_model.bin",
)
MLX_WEIGHTS = "adapters.safetensors"
TOKENIZER_FILES = {"tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json"}
DATASET_FILES = {"dataset_info.json", "dataset_dict.json", "state.json"}
DATASET_SUFFIXES = (".parquet", ".arrow", ".jsonl", ".csv", ".tsv", ".jsonl.gz")
ARCHIVE_SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz", ".7z")
GGUF_MAGIC = b"GGUF"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recognized:
    """What something is, as a phrase, and what to do with it."""

    what: str
    do: str
    is_adapter: bool = False
    is_model: bool = False


def not_a_model(path: Path) -> InputError | None:
    """What was given as a model, if it can be told to be something else; None for a model's folder, or what nothing is known of."""
    if (found := recognize(path)) is None or found.is_model:
        return None
    return InputError(
        path, found=f"{found.what}, not a model", expected="a folder with config.json and safetensors", fix=found.do
    )


def not_an_adapter(folder: Path, settings: Mapping[str, Any] | None = None) -> InputError:
    """What was given as an adapter and is none, or lacks a file.

    Args:
        settings: its `adapter_config.json`, where that could be read.
    """
    expected = f"a PEFT adapter: a folder with {ADAPTER_CONFIG} and {ADAPTER_WEIGHTS}"
    if settings is not None and settings.get("peft_type"):
        return _without_weights(folder, expected)
    found = recognize(folder)
    if found is not None and not (found.is_adapter and settings is not None):
        what = found.what if settings is not None else f"no {ADAPTER_CONFIG}: {found.what}"
        return InputError(folder, found=what, expected=expected, fix=found.do)
    if settings is not None:
        said = "peft_type is None" if "peft_type" in settings else "no peft_type"
        return InputError(
            folder / ADAPTER_CONFIG,
            found=f"{said}: not in PEFT's format, whichever program wrote it",
            expected=expected,
            fix="save it with PEFT, or convert it with the program that wrote it",
        )
    if not folder.is_dir():
        fetch = f"fetch it first: hf download {folder} --local-dir DIR" if len(folder.parts) == 2 else ""
        return InputError(folder, found=f"no {ADAPTER_CONFIG}: no such folder", expected=expected, fix=fetch)
    return InputError(folder, found=f"no {ADAPTER_CONFIG}", expected=expected)


def _without_weights(folder: Path, expected: str) -> InputError:
    names = _names(folder)
    found, fix = f"no {ADAPTER_WEIGHTS}", "fetch the adapter again, both files of it"
    if ADAPTER_PICKLE in names:
        found += f" but {ADAPTER_PICKLE}, which is never unpickled"
        fix = "save it again with PEFT, which writes safetensors, on a machine where you trust it"
    elif others := sorted(name for name in names if name.endswith((".safetensors", *PICKLE_SUFFIXES))):
        found += f", only {', '.join(others[:5])}"
        fix = "save it with PEFT's save_pretrained, which writes one file of that name"
    return InputError(folder, found=found, expected=expected, fix=fix)


def recognize(path: Path) -> Recognized | None:
    """Tell what a file or folder is; None where that is not known, or nothing is there."""
    try:
        if path.is_dir():
            return _folder(path)
        return _file(path) if path.is_file() else None
    except (OSError, ValueError):  # not ours to read, or no name of a file at all
        return None


def _file(path: Path) -> Recognized:
    name, folder = path.name.lower(), path.parent
    with path.open("rb") as file:
        start = file.read(len(GGUF_MAGIC))
    if start == GGUF_MAGIC:
        return _gguf(folder, path.name)
    if name in (ADAPTER_WEIGHTS, ADAPTER_PICKLE, ADAPTER_CONFIG, MLX_WEIGHTS):
        return Recognized(
            what="a file of an adapter's", do=f"give the folder it is in, {folder}, as the adapter", is_adapter=True
        )
    if name.endswith((".safetensors", ".safetensors.index.json")) or name in ("config.json", *TOKENIZER_FILES):
        return Recognized(what="a file", do=f"give the folder it is in, {folder}")
    if name.endswith(".onnx"):
        return _onnx()
    if name.endswith(PICKLE_SUFFIXES):
        return Recognized(what="a file of pickled weights, which is never unpickled", do=_SAFE)
    if name.endswith(ARCHIVE_SUFFIXES):
        return Recognized(what="an archive", do="unpack it and give the folder")
    if name.endswith(DATASET_SUFFIXES):
        return Recognized(what="a file of rows", do="give it as data.path")
    return Recognized(what="a file", do="give the folder of the model or adapter")


_SAFE = "convert it to safetensors with transformers' save_pretrained, on a machine where you trust it, and give that folder"


def _folder(path: Path) -> Recognized | None:
    names = _names(path)
    config = _json(path / "config.json") if "config.json" in names else {}
    if ADAPTER_CONFIG in names and not config.get("model_type"):
        return _adapter(path, names)
    if config.get("model_type"):
        return _model(path, config)
    for look in (_run, _checkpoint, _collection, _other_weights, _data_or_tokenizer):
        if (found := look(path, names)) is not None:
            return found
    return None


def _model(path: Path, config: Mapping[str, Any]) -> Recognized:
    own = config.get("quantization")
    if isinstance(own, dict) and "group_size" in own and "bits" in own:
        undo = f"python -m mlx_lm convert --hf-path {_quoted(path)} --mlx-path OUT -d"
        do = f"give the model it was made from, or undo it where MLX runs: {undo}"
        return Recognized(what=f"a model that MLX quantized to {shown(own['bits'])} bits", do=do)
    do = "give it as the model: model.name_or_path in train.py's settings, --model elsewhere"
    return Recognized(what=f"a model ({shown(config['model_type'])[1:-1]})", do=do, is_model=True)


def _adapter(path: Path, names: set[str]) -> Recognized:
    settings = _json(path / ADAPTER_CONFIG)
    if settings.get("peft_type"):
        base = settings.get("base_model_name_or_path")
        do = (
            f"give its base model, {shown(base) if base else 'which it does not name'}, as the model, and this folder as lora.init_from to "
            f"train it further, or as --adapter of generate and compare; or merge the two: python -m convert.merge "
            f"--adapter {_quoted(path)} --out DIR"
        )
        return Recognized(what="an adapter in PEFT's format", do=do, is_adapter=True)
    if MLX_WEIGHTS in names or settings.keys() & {"fine_tune_type", "lora_parameters", "lora_layers"}:
        base = settings.get("model")
        model = _quoted(base) if isinstance(base, str) and base else "BASE"
        fuse = f"python -m mlx_lm fuse --model {model} --adapter-path {_quoted(path)} --save-path OUT --dequantize"
        do = (
            f"fuse it where MLX runs, {fuse}, and give OUT as the model; or write it as PEFT's: lora_A = lora_aᵀ, lora_B = lora_bᵀ, "
            "lora_alpha = scale · rank"
        )
        return Recognized(what="an adapter of mlx-lm's: no peft_type, so not in PEFT's format", do=do)
    return Recognized(
        what="an adapter whose adapter_config.json has no peft_type, so not in PEFT's format",
        do="save it with PEFT, or convert it with the program that wrote it",
        is_adapter=True,
    )


def _run(path: Path, names: set[str]) -> Recognized | None:
    if "run.json" not in names or not names & {"adapter", "best", "checkpoints", "config.yaml", "metrics.jsonl"}:
        return None
    parts = {"adapter": "its adapter", "best": "its best adapter", "merged": "its merged model"}
    there = [f"{what}, {path / name}" for name, what in parts.items() if name in names]
    do = f"give {' or '.join(there)}" if there else "it has no adapter yet: the same command of train.py continues it"
    return Recognized(what="the folder of a run of train.py", do=do)


def _checkpoint(path: Path, names: set[str]) -> Recognized | None:
    if {"about.json", "checksums.json"} <= names:
        run = path.parent.parent
    elif any(name.startswith("step-") and name[5:].isdigit() for name in names) and path.name == "checkpoints":
        run = path.parent
    else:
        return None
    do = (
        f"the same command of train.py continues the run from it; to use what was trained, give the run's adapter, {run / 'adapter'} "
        f"or {run / 'best'}"
    )
    return Recognized(what="a checkpoint of a run of train.py, which only a run can be continued from", do=do)


def _collection(path: Path, names: set[str]) -> Recognized | None:
    """A folder of folders, one of which is meant."""
    numbered = sorted(int(name[11:]) for name in names if name.startswith("checkpoint-") and name[11:].isdigit())
    if numbered:
        last = path / f"checkpoint-{numbered[-1]}"
        return Recognized(what="a Trainer's output folder", do=f"give one of its checkpoints, such as {last}")
    if "snapshots" in names and path.name.startswith("models--"):
        model = "/".join(path.name.split("--")[1:])
        return Recognized(
            what="the hub's cache of a model", do=f"give the model's id, {model}, or the folder of a snapshot in it"
        )
    if "model_index.json" in names:
        return Recognized(what="a diffusion pipeline", do="give a language model")
    inner = [
        name
        for name in sorted(names)[:100]
        if (path / name / "config.json").is_file() or (path / name / ADAPTER_CONFIG).is_file()
    ]
    if inner:
        return Recognized(
            what="a folder of other folders",
            do=f"give the one that is meant: {', '.join(str(path / name) for name in inner[:5])}",
        )
    return None


def _other_weights(path: Path, names: set[str]) -> Recognized | None:
    """Weights in formats that are not read."""
    if found := sorted(name for name in names if name.lower().endswith(".gguf")):
        return _gguf(path, found[0])
    if "params.json" in names and any(name.startswith("consolidated") for name in names):
        return Recognized(what="a model in Meta's own format", do="give the copy of it in Hugging Face's format")
    if any(name.endswith(".onnx") for name in names) or ("onnx" in names and "config.json" not in names):
        return _onnx()
    if ADAPTER_WEIGHTS in names or ADAPTER_PICKLE in names:
        do = f"put its {ADAPTER_CONFIG} beside it"
        return Recognized(what="an adapter without its settings", do=do, is_adapter=True)
    pickles = [name for name in sorted(names) if name.endswith(PICKLE_SUFFIXES)]
    if pickles and "config.json" not in names:
        return Recognized(
            what=f"a folder of pickled weights ({', '.join(pickles[:3])}), which are never unpickled", do=_SAFE
        )
    return None


def _data_or_tokenizer(path: Path, names: set[str]) -> Recognized | None:
    inner = _names(path / "data") if (path / "data").is_dir() else set()
    if names & DATASET_FILES or any(name.endswith(DATASET_SUFFIXES) for name in names | inner):
        return Recognized(what="a folder of rows", do=f"give it as data.path: data.path={_quoted(path)}")
    if any(name.endswith(".safetensors") for name in names) or "config.json" in names:
        return None
    if names & TOKENIZER_FILES:
        do = "give the folder that has the model's config.json and safetensors too"
        return Recognized(what="a tokenizer alone, without a model", do=do)
    return None


def _gguf(folder: Path, name: str) -> Recognized:
    do = f"give it as the model, which is converted once: {folder / name}; better, give the model it was made from"
    return Recognized(what="a GGUF file, llama.cpp's format", do=do)


def _onnx() -> Recognized:
    return Recognized(what="an ONNX model", do="give the model in safetensors that it was made from")


def _names(folder: Path) -> set[str]:
    with os.scandir(folder) as entries:
        return {entry.name for entry in itertools.islice(entries, MAX_NAMES)}


def _json(path: Path) -> dict[str, Any]:
    """A small JSON object; an empty one where there is none."""
    try:
        if not path.is_file() or path.stat().st_size > MAX_JSON_BYTES:
            return {}
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _quoted(path: Path | str) -> str:
    """A path as a shell takes it."""
    return shlex.quote(str(path))
