"""Tiny GGUF files of each architecture that is read, written with gguf-py's writer from random tensors."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, MLP, LAYERS = 256, 2, 1, 128, 512, 2
"""Widths that K-quants take: their blocks have 256 values of a row."""
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
PIECES = ["▁", "a", "b", "c", "▁a", "ab", "abc", "▁abc", "▁ab", "é", "  ", "   ", "1", "12", "\n", "\n\n"]
SPM_TOKENS = ["<pad>", "<eos>", "<bos>", "<unk>", *BYTES, *PIECES, "<turn>"]
SPM_TYPES = [3, 3, 3, 2, *[6] * 256, *[1] * (len(PIECES) - 6), 4, 4, 1, 1, 4, 4, 3]
ALPHABET = [chr(n) for n in (*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324))]
"""GPT-2's alphabet of bytes."""
MERGES = ["a b", "ab c", "Ġ ab", "Ġ abc", "1 2", "12 3", "e Ì", "Ċ Ċ"]
BPE_TOKENS = [*ALPHABET, *(merge.replace(" ", "") for merge in MERGES), "whole", "<|endoftext|>", "<think>"]
BPE_TYPES = [*[1] * (len(BPE_TOKENS) - 2), 3, 4]


def spm(**more: Any) -> dict[str, Any]:
    """SentencePiece's settings; without a space before text for Gemma."""
    settings = {"model": "llama", "pre": "default", "tokens": SPM_TOKENS, "token_type": SPM_TYPES}
    settings |= {"scores": [0.0] * 260 + [-float(n) for n in range(len(SPM_TOKENS) - 260)], "add_bos_token": True}
    ids = {"padding_token_id": 0, "eos_token_id": 1, "bos_token_id": 2, "unknown_token_id": 3}
    return settings | ids | more


def bpe(pre: str, **more: Any) -> dict[str, Any]:
    """Byte-level BPE's settings."""
    settings = {"model": "gpt2", "pre": pre, "tokens": BPE_TOKENS, "token_type": BPE_TYPES, "merges": MERGES}
    return settings | {"eos_token_id": len(BPE_TOKENS) - 2, "add_bos_token": False} | more


TOKENIZERS = {
    "llama": spm(),
    "qwen2": bpe("qwen2"),
    "qwen3": bpe("qwen2"),
    "gemma2": spm(add_space_prefix=False),
    "gemma3": spm(add_space_prefix=False),
}
SETTINGS: dict[str, dict[str, Any]] = {
    "llama": {"rope.dimension_count": HEAD_DIM, "rope.freq_base": 5e5},
    "qwen2": {"rope.freq_base": 1e6},
    "qwen3": {"rope.freq_base": 1e6, "attention.key_length": HEAD_DIM, "attention.value_length": HEAD_DIM},
    "gemma2": {
        **{"attention.key_length": HEAD_DIM, "attention.value_length": HEAD_DIM, "attention.sliding_window": 8},
        **{"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    },
    "gemma3": {
        **{"attention.key_length": HEAD_DIM, "attention.value_length": HEAD_DIM, "attention.sliding_window": 8},
        "rope.freq_base": 1e6,
    },
}
WEIGHTS = {
    "attn_q": (HEADS * HEAD_DIM, HIDDEN),
    "attn_k": (KV_HEADS * HEAD_DIM, HIDDEN),
    "attn_v": (KV_HEADS * HEAD_DIM, HIDDEN),
    "attn_output": (HIDDEN, HEADS * HEAD_DIM),
    "ffn_gate": (MLP, HIDDEN),
    "ffn_up": (MLP, HIDDEN),
    "ffn_down": (HIDDEN, MLP),
}
NORMS = {
    "llama": ("attn_norm", "ffn_norm"),
    "qwen2": ("attn_norm", "ffn_norm"),
    "qwen3": ("attn_norm", "ffn_norm", "attn_q_norm", "attn_k_norm"),
    "gemma2": ("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm"),
    "gemma3": ("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm", "attn_q_norm", "attn_k_norm"),
}


def write_architecture(path: Path, architecture: str, kinds: tuple[str, ...] = ("F32",), **more: Any) -> None:
    """Write a tied model of `architecture`.

    Args:
        path: the file.
        architecture: a key of `SETTINGS`.
        kinds: types of the weights, taken in turn; those that gguf-py cannot quantize to are random blocks with small scales.
        more: settings that replace or add (`__` for a dot), `tensors` (name -> shape) and `values` (name -> array) to add, `tokenizer`.
    """
    writer = gguf.GGUFWriter(path, architecture)
    settings: dict[str, Any] = {
        **{"block_count": LAYERS, "context_length": 128, "embedding_length": HIDDEN, "feed_forward_length": MLP},
        **{"attention.head_count": HEADS, "attention.head_count_kv": KV_HEADS},
        **{"attention.layer_norm_rms_epsilon": 1e-6, **SETTINGS[architecture]},
        **{
            key.replace("__", "."): value
            for key, value in more.items()
            if key not in ("tensors", "values", "tokenizer")
        },
    }
    tokenizer = more.get("tokenizer", TOKENIZERS[architecture])
    for key, value in [
        *((f"{architecture}.{key}", value) for key, value in settings.items()),
        *((f"tokenizer.ggml.{key}", value) for key, value in tokenizer.items()),
    ]:
        if value is None:
            continue
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        add.get(type(value), writer.add_array)(key, value)
    rng = np.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (len(tokenizer["tokens"]), HIDDEN),
        "output_norm.weight": (HIDDEN,),
    }
    for layer in range(LAYERS):
        for norm in NORMS[architecture]:
            shapes[f"blk.{layer}.{norm}.weight"] = (HEAD_DIM if norm in ("attn_q_norm", "attn_k_norm") else HIDDEN,)
        shapes |= {f"blk.{layer}.{name}.weight": shape for name, shape in WEIGHTS.items()}
        if architecture == "qwen2":
            shapes |= {f"blk.{layer}.attn_{x}.bias": WEIGHTS[f"attn_{x}"][:1] for x in "qkv"}
    shapes |= more.get("tensors", {})
    for number, (name, shape) in enumerate(shapes.items()):
        kind = gguf.GGMLQuantizationType[kinds[number % len(kinds)] if len(shape) == 2 else "F32"]
        data = random_tensor(rng, shape, kind)
        writer.add_tensor(name, data, raw_dtype=kind)
    for name, values in more.get("values", {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


HALVES = {
    **{"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "IQ4_XS": (0,)},
    **{"IQ4_NL": (0,)},
}
"""Where a block of a type that gguf-py cannot write has its float16 scales."""


def random_tensor(rng: np.random.Generator, shape: tuple[int, ...], kind: gguf.GGMLQuantizationType) -> np.ndarray:
    """Draw a tensor's bytes in the file."""
    values = rng.standard_normal(shape).astype(np.float32)
    if kind.name not in HALVES:
        return gguf.quants.quantize(values, kind)
    block, size = gguf.GGML_QUANT_SIZES[kind]
    blocks = rng.integers(0, 256, (values.size // block, size), np.uint8)
    for start in HALVES[kind.name]:
        blocks[:, start : start + 2] = (rng.uniform(-0.01, 0.01, (len(blocks), 1))).astype(np.float16).view(np.uint8)
    return blocks.reshape(shape[0], -1)
