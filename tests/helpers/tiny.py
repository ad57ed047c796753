"""A tiny random Llama as a Hugging Face folder, with a byte-level tokenizer and a chat template; made in milliseconds, without torch."""

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from benchmarks.tokenizer import byte_tokenizer as make_tokenizer
from convert.files.names import Names
from convert.files.shapes import tensor_shapes
from convert.files.shards import TensorSpec, write_index, write_json, write_shard
from qlora_jax.model.architecture import Architecture
from qlora_jax.model.families import read_architecture


def hf_config(**changes: Any) -> dict[str, Any]:
    """A config.json with grouped-query attention and tied embeddings; `changes` replace keys."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 264,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "hidden_act": "silu",
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": None,
        "eos_token_id": 257,
        "pad_token_id": 257,
        "torch_dtype": "bfloat16",
        **changes,
    }


def shape_of(
    vocab_size: int, hidden: int, mlp: int, layers: int, heads: int, kv_heads: int, head_dim: int, eps: float
) -> Architecture:
    """A Llama's architecture from its numbers, its embedding not tied."""
    sizes = {"vocab_size": vocab_size, "hidden_size": hidden, "intermediate_size": mlp, "num_hidden_layers": layers}
    heads_of = {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": head_dim}
    return read_architecture({"model_type": "llama", **sizes, **heads_of, "rms_norm_eps": eps})


ARCHITECTURE = read_architecture(hf_config())
NAMES = Names.of(ARCHITECTURE)
"""Names of any Llama's tensors."""
LINEAR_NAMES = tuple(NAMES.paths)


def random_tensors(config: dict[str, Any], seed: int = 0, dtype: Any = ml_dtypes.bfloat16) -> dict[str, np.ndarray]:
    """Weights under Hugging Face's names: norms near 1, the rest normal with a deviation that keeps activations near 1."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, shape in tensor_shapes(read_architecture(config)).items():
        values = rng.standard_normal(shape)
        tensors[name] = (1 + 0.1 * values if len(shape) == 1 else values * shape[-1] ** -0.5).astype(dtype)
    return tensors


def write_model(
    folder: Path, *, shards: int = 1, seed: int = 0, dtype: Any = ml_dtypes.bfloat16, **changes: Any
) -> Path:
    """Write a whole model folder; tensors are dealt out to `shards` files."""
    config = hf_config(**changes)
    tensors = random_tensors(config, seed, dtype)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", {"eos_token_id": 257})
    make_tokenizer().save_pretrained(folder)
    safetensors_dtype = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}[np.dtype(dtype).name]
    names = list(tensors)
    weight_map = {}
    for index in range(shards):
        chosen = names[index::shards]
        file = "model.safetensors" if shards == 1 else f"model-{index + 1:05d}-of-{shards:05d}.safetensors"
        specs = [TensorSpec(name, safetensors_dtype, tensors[name].shape) for name in chosen]
        write_shard(folder / file, specs, (tensors[name] for name in chosen))
        weight_map |= dict.fromkeys(chosen, file)
    if shards > 1:
        write_index(folder, weight_map, sum(tensor.nbytes for tensor in tensors.values()))
    return folder


def write_chats(path: Path, number: int, seed: int = 0) -> Path:
    """JSONL of one-turn chats: the answer is the question's word in capitals."""
    rng = np.random.default_rng(seed)
    words = ["".join(rng.choice(list("abcdefgh"), 4)) for _ in range(number)]
    rows = [
        {"messages": [{"role": "user", "content": word}, {"role": "assistant", "content": word.upper()}]}
        for word in words
    ]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return path
