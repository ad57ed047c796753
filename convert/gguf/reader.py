"""GGUF to a Hugging Face folder, without torch: architectures of `convert.gguf.architectures`.

`gguf` reads the file and dequantizes its tensors to float32; here these get their Hugging Face names and are rounded to
bfloat16. What llama.cpp changed on the way is undone: it stores the rows of a llama's q and k in another order (pairs of a
rotation next to each other, where Hugging Face keeps them half a head apart) and Gemma's norms with 1 added.

Matched to transformers' own GGUF reader, with departures, on purpose. That reader (5.24) drops rope scaling, sliding windows'
pattern and qwen3's size of heads; they are kept here. It has no entry for the `smollm` way of cutting text and falls back to
GPT-2's, and it leaves out what llama.cpp only knows by name of Llama 3's and Qwen's tokenizers: see `convert.gguf.tokenizer`.
"""

from pathlib import Path
from typing import Any

import gguf
import numpy as np

from convert.files.shards import SINGLE_NAME, TensorSpec, write_json, write_shard
from convert.gguf.metadata import check_metadata, config_of
from convert.gguf.tensors import bfloat16_tensors, check_tensors, float32_values, shape_of, wanted_tensors
from convert.gguf.tokenizer import write_tokenizer
from qlora_jax.base.errors import InputError
from qlora_jax.base.files import Scratch, replace_folder
from qlora_jax.base.reading import open_file, reading

MAX_ROPE_FREQUENCIES = 65_536


def write_model_folder(gguf_path: str | Path, out_dir: str | Path) -> None:
    """Convert a GGUF file to a Hugging Face folder: config, bfloat16 safetensors, tokenizer, generation config.

    Written beside `out_dir` and renamed, so that a folder of that name is a whole one. If another process finishes the
    same folder first, its folder stays.

    Raises:
        InputError: the file is not GGUF, or its architecture, a setting, a tensor or the tokenizer is not supported
            (named); or `out_dir` exists.
    """
    gguf_path, out_dir = Path(gguf_path), Path(out_dir)
    if out_dir.exists():
        raise InputError(out_dir, found="already there", fix="remove it, or name another folder")
    reader = _open(gguf_path)
    with reading(gguf_path, "settings that cannot be read", fix="download it again"):
        fields = {name: field.contents() for name, field in reader.fields.items()}
    architecture = check_metadata(gguf_path, fields)
    found = {tensor.name: tensor for tensor in reader.tensors}
    config = config_of(gguf_path, fields, {name: _frequencies(gguf_path, tensor) for name, tensor in found.items()})
    wanted = wanted_tensors(config, architecture)
    check_tensors(gguf_path, found, wanted)
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    with Scratch(out_dir.parent, f".{out_dir.name}.writing-") as scratch:
        folder = scratch / out_dir.name
        folder.mkdir()
        write_json(folder / "config.json", config)
        write_json(folder / "generation_config.json", _generation_config(config))
        write_tokenizer(folder, gguf_path, fields, config["max_position_embeddings"])
        specs = [TensorSpec(tensor.name, "BF16", tensor.shape) for tensor in wanted.values()]
        write_shard(folder / SINGLE_NAME, specs, bfloat16_tensors(gguf_path, found, wanted))
        try:
            replace_folder(folder, out_dir, overwrite=False)
        except FileExistsError:
            if not (out_dir / SINGLE_NAME).is_file():  # else another process was first, and its folder is as good
                raise InputError(out_dir, found="already there", fix="remove it, or name another folder") from None


def _open(path: Path) -> gguf.GGUFReader:
    open_file(path, expected="a GGUF file").close()  # the library opens anything
    with reading(path, "not a whole GGUF file", fix="download it again"):
        return _Reader(path)


class _Reader(gguf.GGUFReader):
    """The library's reader on a plain array: it cuts a vocabulary into a million views, which numpy's memmap makes slowly."""

    @property  # type: ignore[override]
    def data(self) -> np.ndarray:
        """The file's bytes."""
        return self._bytes

    @data.setter
    def data(self, mapped: np.memmap) -> None:
        self._bytes = np.asarray(mapped)


def _frequencies(path: Path, tensor: gguf.ReaderTensor) -> np.ndarray | None:
    if tensor.name != "rope_freqs.weight":
        return None
    if len(shape := shape_of(tensor)) != 1 or shape[0] > MAX_ROPE_FREQUENCIES:
        raise InputError(path, found=f"rope_freqs.weight of shape {list(shape)}", expected="one number a frequency")
    return float32_values(path, tensor)


def _generation_config(config: dict[str, Any]) -> dict[str, Any]:
    ids = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return {"_from_model_config": True} | {key: value for key, value in ids.items() if value is not None}
