"""Tensors of a GGUF file under Hugging Face's names, dequantized in bounded pieces and rounded to bfloat16."""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np

from convert.gguf.architectures import LINEARS, GGUFArchitecture
from qlora_jax.base.errors import InputError
from qlora_jax.base.reading import reading

READ_TYPES = frozenset(
    {"F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"}
    | {"IQ4_NL", "IQ4_XS"}
)
PIECE_VALUES = 2**22
"""Values dequantized at once; a row that has more is a piece of its own."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wanted:
    """A tensor that a model has, and how the file's becomes it."""

    name: str
    shape: tuple[int, ...]
    interleaved_heads: int = 0
    """Heads whose rows have the two of a rotated pair next to each other; 0 if rows are in Hugging Face's order."""
    offset: float = 0.0
    """Subtracted from the file's values."""


def wanted_tensors(config: Mapping[str, Any], architecture: GGUFArchitecture) -> dict[str, Wanted]:
    """The file's name -> what it becomes, for every tensor of the model, in the model's order."""
    hidden, mlp, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    heads, kv_heads, head_dim = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
    queries, keys = heads * head_dim, kv_heads * head_dim
    shapes = {
        "attn_q": (queries, hidden),
        "attn_k": (keys, hidden),
        "attn_v": (keys, hidden),
        "attn_output": (hidden, queries),
        "ffn_gate": (mlp, hidden),
        "ffn_up": (mlp, hidden),
        "ffn_down": (hidden, mlp),
    }
    biased = {*architecture.always_biased}
    biased |= {linear for key, linears in architecture.may_be_biased.items() if config[key] for linear in linears}
    interleaved = {"attn_q": heads, "attn_k": kv_heads} if architecture.interleaves_rows else {}
    wanted = {"token_embd.weight": Wanted(name="model.embed_tokens.weight", shape=(vocab, hidden))}
    for layer in range(config["num_hidden_layers"]):
        ours, theirs = f"model.layers.{layer}", f"blk.{layer}"
        for norms, size in ((architecture.norms, hidden), (architecture.qk_norms, head_dim)):
            for short, name in norms.items():
                weight = Wanted(name=f"{ours}.{name}.weight", shape=(size,), offset=architecture.norm_offset)
                wanted[f"{theirs}.{short}.weight"] = weight
        for short, name in LINEARS.items():
            for suffix, shape in (("weight", shapes[short]), ("bias", shapes[short][:1])):
                if suffix == "weight" or short in biased:
                    wanted[f"{theirs}.{short}.{suffix}"] = Wanted(
                        name=f"{ours}.{name}.{suffix}", shape=shape, interleaved_heads=interleaved.get(short, 0)
                    )
    wanted["output_norm.weight"] = Wanted(name="model.norm.weight", shape=(hidden,), offset=architecture.norm_offset)
    if not config["tie_word_embeddings"]:
        wanted["output.weight"] = Wanted(name="lm_head.weight", shape=(vocab, hidden))
    return wanted


def check_tensors(path: Path, found: Mapping[str, gguf.ReaderTensor], wanted: Mapping[str, Wanted]) -> None:
    """Refuse a file with tensors missing, left over, of other shapes or of types that are not read; all named at once."""
    problems = [f"missing: {name}" for name in wanted if name not in found]
    problems += [f"unknown: {name}" for name in found if name not in wanted and name != "rope_freqs.weight"]
    for name, tensor in wanted.items():
        if name in found and (shape := shape_of(found[name])) != tensor.shape:
            problems.append(f"{name} is {list(shape)}, expected {list(tensor.shape)}")
    if problems:
        lines = "\n".join(f"    {problem}" for problem in problems[:20])
        raise InputError(path, found=f"tensors that do not make the model\n{lines}")
    if others := sorted({tensor.tensor_type.name for tensor in found.values()} - READ_TYPES):
        expected = f"tensors of {', '.join(sorted(READ_TYPES))}"
        raise InputError(path, found=f"tensors of type {', '.join(others)}", expected=expected)


def shape_of(tensor: gguf.ReaderTensor) -> tuple[int, ...]:
    """`[out, in]`: GGUF gives the fastest axis first."""
    return tuple(int(n) for n in reversed(tensor.shape))


def bfloat16_tensors(
    path: Path, found: Mapping[str, gguf.ReaderTensor], wanted: Mapping[str, Wanted]
) -> Iterator[np.ndarray]:
    """Yield the model's tensors in bfloat16, in the order of `wanted`."""
    for name, tensor in wanted.items():
        yield _bfloat16(path, found[name], tensor)


def float32_values(path: Path, tensor: gguf.ReaderTensor) -> np.ndarray:
    """Dequantize a small tensor whole."""
    with reading(path, f"{tensor.name} is {tensor.tensor_type.name}, which cannot be read"):
        return np.asarray(gguf.dequantize(tensor.data, tensor.tensor_type), np.float32)


def _bfloat16(path: Path, tensor: gguf.ReaderTensor, wanted: Wanted) -> np.ndarray:
    values = np.empty(wanted.shape, ml_dtypes.bfloat16)
    rows = max(1, PIECE_VALUES // wanted.shape[-1]) if len(wanted.shape) > 1 else wanted.shape[0]
    with reading(path, f"{tensor.name} is {tensor.tensor_type.name}, which cannot be read"):
        for start in range(0, wanted.shape[0], rows):
            piece = gguf.dequantize(tensor.data[start : start + rows], tensor.tensor_type)
            values[start : start + rows] = piece - np.float32(wanted.offset) if wanted.offset else piece
    return _in_halves(values, wanted.interleaved_heads) if wanted.interleaved_heads else values


def _in_halves(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows `(head, pair, which of the pair)` back to Hugging Face's `(head, which, pair)`; `[out, in]` both, or a bias."""
    half = weight.shape[0] // heads // 2
    return np.ascontiguousarray(weight.reshape(heads, half, 2, -1).swapaxes(1, 2)).reshape(weight.shape)
