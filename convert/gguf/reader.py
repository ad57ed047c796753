"""GGUF to a Hugging Face folder, without torch: as much of the format as a llama-architecture file needs.

`gguf` reads the file and dequantizes a tensor to float32; here the tensors get their Hugging Face names and are rounded
to bfloat16. llama.cpp stores the rows of q and k in another order than Hugging Face (pairs of a rotation next to each
other, where Hugging Face keeps them half a head apart); `_unpermute` puts them back.

Matched to transformers' own GGUF reader, with one departure, on purpose: that reader (5.23) has no entry for the
`smollm` way of cutting text and falls back to GPT-2's, so it reads two spaces before a digit as other tokens than the
model was trained on. See `convert/gguf/tokenizer.py`.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np

from convert.files.shards import SINGLE_NAME, TensorSpec, write_json, write_shard
from convert.gguf.tokenizer import write_tokenizer
from qlora_jax.base.errors import InputError
from qlora_jax.base.files import Scratch, replace_folder
from qlora_jax.base.reading import is_unicode, open_file, reading, shown

NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""`blk.{i}.X.weight` -> `model.layers.{i}.Y.weight`."""

SHAPE_KEYS = {
    "num_hidden_layers": "block_count",
    "max_position_embeddings": "context_length",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
}
"""Key of config.json -> `llama.X`, for those a file must have."""

OTHER_KEYS = {
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "attention.layer_norm_rms_epsilon",
    "rope.freq_base",
    "rope.dimension_count",
    "rope.scaling.type",
    "vocab_size",
}

FEEDS_NO_MODEL = ("GGUF.", "general.", "tokenizer.", "quantize.", "split.")


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
    _check_types(gguf_path, fields)
    config = _config(gguf_path, fields, tied="output.weight" not in {t.name for t in reader.tensors})
    tensors = _tensors(gguf_path, reader, config)
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    with Scratch(out_dir.parent, f".{out_dir.name}.writing-") as scratch:
        folder = scratch / out_dir.name
        folder.mkdir()
        write_json(folder / "config.json", config)
        write_json(folder / "generation_config.json", _generation_config(config))
        write_tokenizer(folder, gguf_path, fields, config["max_position_embeddings"])
        specs = [TensorSpec(name, "BF16", shape) for name, (_, shape) in tensors.items()]
        write_shard(folder / SINGLE_NAME, specs, _bfloat16_tensors(gguf_path, tensors, config))
        try:
            replace_folder(folder, out_dir, overwrite=False)
        except FileExistsError:
            if not (out_dir / SINGLE_NAME).is_file():  # else another process was first, and its folder is as good
                raise InputError(out_dir, found="already there", fix="remove it, or name another folder") from None


def _open(path: Path) -> gguf.GGUFReader:
    open_file(path, expected="a GGUF file").close()  # the library opens anything
    with reading(path, "not a whole GGUF file", fix="download it again"):
        return gguf.GGUFReader(path)


def _config(path: Path, fields: dict[str, Any], *, tied: bool) -> dict[str, Any]:
    """`config.json` of a LlamaForCausalLM, for transformers 4 and 5 (which moves `rope_theta` where it wants it)."""
    _check_settings(path, fields)
    config: dict[str, Any] = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    for key, name in SHAPE_KEYS.items():
        config[key] = _required(path, fields, f"llama.{name}")
    heads = config["num_attention_heads"]
    config["num_key_value_heads"] = fields.get("llama.attention.head_count_kv", heads)
    config["head_dim"] = fields.get("llama.attention.key_length", config["hidden_size"] // heads)
    if (
        ("llama.attention.key_length" not in fields and config["hidden_size"] % heads)
        or heads % config["num_key_value_heads"]
        or config["head_dim"] % 2
    ):
        found = f"{config['hidden_size']} dimensions, {heads} heads, {config['num_key_value_heads']} of keys, of {config['head_dim']}"
        raise InputError(path, found=found, expected="multiples of one another", fix="download it again")
    for name in ("attention.value_length", "rope.dimension_count"):
        if fields.get(f"llama.{name}", config["head_dim"]) != config["head_dim"]:
            found = f"llama.{name} = {fields[f'llama.{name}']}"
            raise InputError(path, found=found, expected=f"the head dimension, {config['head_dim']}")
    return config | {
        "vocab_size": len(_required(path, fields, "tokenizer.ggml.tokens")),
        "hidden_act": "silu",
        "rms_norm_eps": _shortest(_required(path, fields, "llama.attention.layer_norm_rms_epsilon")),
        "rope_theta": _shortest(fields.get("llama.rope.freq_base", 10000.0)),
        "rope_scaling": None,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "tie_word_embeddings": tied,
        "bos_token_id": fields.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": fields.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": fields.get("tokenizer.ggml.padding_token_id"),
        "initializer_range": 0.02,
        "use_cache": True,
        "dtype": "bfloat16",
        "torch_dtype": "bfloat16",  # the name of `dtype` before transformers 5
    }


def _check_types(path: Path, fields: dict[str, Any]) -> None:
    """Refuse values of other types than these settings have."""
    tokens = fields.get("tokenizer.ggml.tokens")
    number = len(tokens) if isinstance(tokens, list) else 0
    problems = [
        f"{name} is {shown(value)}, expected {kind}"
        for name, value in fields.items()
        if (kind := _kind(name)) and not _IS[kind](value)
    ]
    problems += [
        f"{name} is {value}, and there are {number} tokens"
        for name, value in fields.items()
        if name.endswith("_token_id") and isinstance(value, int) and not 0 <= value < number
    ]
    kinds = fields.get("tokenizer.ggml.token_type", tokens)
    if not problems and tokens is not None and kinds is not None and len(kinds) != number:
        problems.append(f"{len(kinds)} tokenizer.ggml.token_type for {number} tokens")
    if problems:
        raise InputError(path, found="; ".join(problems[:20]), fix="download it again")


def _kind(name: str) -> str | None:
    """The kind of value that a setting has; None for settings that are not used."""
    if name in _KINDS:
        return _KINDS[name]
    known = {f"llama.{key}" for key in (*SHAPE_KEYS.values(), *OTHER_KEYS)}
    return "a size" if name in known else "a token's number" if name.endswith("_token_id") else None


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


MAX_SIZE, MAX_NUMBER = 2**27, 1e30
_KINDS = {
    "general.architecture": "a text",
    "llama.attention.layer_norm_rms_epsilon": "a positive number",
    "llama.rope.freq_base": "a positive number",
    "llama.rope.scaling.type": "a text",
    "split.count": "a size",
    "tokenizer.chat_template": "a text",
    "tokenizer.ggml.merges": "a list of pairs",
    "tokenizer.ggml.model": "a text",
    "tokenizer.ggml.pre": "a text",
    "tokenizer.ggml.token_type": "a list of numbers",
    "tokenizer.ggml.tokens": "a list of texts",
}
_IS: dict[str, Callable[[Any], bool]] = {
    "a size": lambda value: _is_whole(value) and 0 < value <= MAX_SIZE,
    "a token's number": _is_whole,
    "a positive number": lambda value: isinstance(value, int | float) and 0 < value < MAX_NUMBER,
    "a text": lambda value: isinstance(value, str) and is_unicode(value),
    "a list of texts": lambda value: isinstance(value, list) and all(map(_IS["a text"], value)),
    "a list of pairs": lambda value: _IS["a list of texts"](value) and all(text.count(" ") == 1 for text in value),
    "a list of numbers": lambda value: isinstance(value, list) and all(map(_is_whole, value)),
}


def _check_settings(path: Path, fields: dict[str, Any]) -> None:
    """Refuse what would change the model and is not carried over."""
    architecture = fields.get("general.architecture")
    if architecture != "llama":
        raise InputError(path, found=f"architecture {shown(architecture)}", expected="'llama'")
    known = {f"llama.{name}" for name in (*SHAPE_KEYS.values(), *OTHER_KEYS)}
    unknown = [f"{n} = {shown(v)}" for n, v in fields.items() if n not in known and not n.startswith(FEEDS_NO_MODEL)]
    if fields.get("llama.rope.scaling.type", "none") != "none":
        unknown.append(f"llama.rope.scaling.type = {fields['llama.rope.scaling.type']!r}")
    if fields.get("split.count", 1) > 1:
        unknown.append(f"split.count = {fields['split.count']}")
    if unknown:
        raise InputError(path, found=f"settings that are not supported: {', '.join(unknown)}"[:1000])


def _required(path: Path, fields: dict[str, Any], name: str) -> Any:
    if name not in fields:
        raise InputError(path, found=f"no setting {name}", expected="a complete llama-architecture GGUF file")
    return fields[name]


def _shortest(value: float) -> float:
    """The decimal a float32 was written from: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _generation_config(config: dict[str, Any]) -> dict[str, Any]:
    ids = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return {"_from_model_config": True} | {key: value for key, value in ids.items() if value is not None}


def _tensors(
    path: Path, reader: gguf.GGUFReader, config: dict[str, Any]
) -> dict[str, tuple[gguf.ReaderTensor, tuple[int, ...]]]:
    """Hugging Face's name -> (the file's tensor, shape), in the model's order; none missing, none left over."""
    wanted = _wanted(config)
    found = {tensor.name: tensor for tensor in reader.tensors}
    problems = [f"missing: {name}" for name in wanted if name not in found]
    problems += [f"unknown: {name}" for name in found if name not in wanted]
    for name, (_, shape) in wanted.items():
        if name in found and _shape(found[name]) != shape:
            problems.append(f"{name} is {list(_shape(found[name]))}, expected {list(shape)}")
    if problems:
        raise InputError(
            path, found="tensors that do not make the model\n" + "\n".join(f"    {p}" for p in problems[:20])
        )
    return {name: (found[theirs], shape) for theirs, (name, shape) in wanted.items()}


def _wanted(config: dict[str, Any]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The file's name -> (Hugging Face's name, shape `[out, in]`) for every tensor of the model."""
    hidden, mlp, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    q_rows = config["num_attention_heads"] * config["head_dim"]
    kv_rows = config["num_key_value_heads"] * config["head_dim"]
    shapes: dict[str, tuple[int, ...]] = {
        "attn_norm": (hidden,),
        "attn_q": (q_rows, hidden),
        "attn_k": (kv_rows, hidden),
        "attn_v": (kv_rows, hidden),
        "attn_output": (hidden, q_rows),
        "ffn_norm": (hidden,),
        "ffn_gate": (mlp, hidden),
        "ffn_up": (mlp, hidden),
        "ffn_down": (hidden, mlp),
    }
    wanted: dict[str, tuple[str, tuple[int, ...]]] = {
        "token_embd.weight": ("model.embed_tokens.weight", (vocab, hidden))
    }
    for layer in range(config["num_hidden_layers"]):
        for name, shape in shapes.items():
            wanted[f"blk.{layer}.{name}.weight"] = (f"model.layers.{layer}.{NAMES[name]}.weight", shape)
    wanted["output_norm.weight"] = ("model.norm.weight", (hidden,))
    if not config["tie_word_embeddings"]:
        wanted["output.weight"] = ("lm_head.weight", (vocab, hidden))
    return wanted


def _shape(tensor: gguf.ReaderTensor) -> tuple[int, ...]:
    """`[out, in]`: GGUF gives the fastest axis first."""
    return tuple(int(n) for n in reversed(tensor.shape))


def _bfloat16_tensors(
    path: Path, tensors: dict[str, tuple[gguf.ReaderTensor, tuple[int, ...]]], config: dict[str, Any]
) -> Iterator[np.ndarray]:
    heads = {"q_proj.weight": config["num_attention_heads"], "k_proj.weight": config["num_key_value_heads"]}
    for name, (tensor, _) in tensors.items():
        projection = ".".join(name.split(".")[-2:])
        yield _bfloat16(path, tensor, heads.get(projection))


def _bfloat16(path: Path, tensor: gguf.ReaderTensor, heads: int | None) -> np.ndarray:
    with reading(path, f"{tensor.name} is {tensor.tensor_type.name}, which cannot be read"):
        weight = gguf.dequantize(tensor.data, tensor.tensor_type)
    if heads is not None:
        weight = _unpermute(weight, heads)
    return weight.astype(ml_dtypes.bfloat16)


def _unpermute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows `(head, pair, which of the pair)` back to Hugging Face's `(head, which, pair)`; `[out, in]` both."""
    half = weight.shape[0] // heads // 2
    return weight.reshape(heads, half, 2, -1).swapaxes(1, 2).reshape(weight.shape)
