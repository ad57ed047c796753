"""Architectures of GGUF files that are read: their names for a layer's tensors, and what sets their configurations apart.

llama.cpp names tensors alike in all of these, `blk.{i}.X.weight`. What differs is which tensors a layer has, what llama.cpp
changed when it wrote them (it interleaves the rows of a llama's q and k, and adds 1 to Gemma's norms), and which keys of the
metadata and of `config.json` there are.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

LINEARS = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""`blk.{i}.X` -> `model.layers.{i}.Y`, in the order in which they are applied."""
QKV, ATTENTION, MLP = ("attn_q", "attn_k", "attn_v"), ("attn_q", "attn_k", "attn_v", "attn_output"), tuple(LINEARS)[4:]
NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
QK_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
GEMMA_NORMS = {
    "attn_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}

SIZES = {
    "num_hidden_layers": "block_count",
    "max_position_embeddings": "context_length",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
}
"""Key of `config.json` -> `{architecture}.X`, for those that a file must have."""
KINDS = {
    **dict.fromkeys(SIZES.values(), "a size"),
    "vocab_size": "a size",
    "attention.head_count_kv": "a size",
    "attention.key_length": "a size",
    "attention.value_length": "a size",
    "attention.layer_norm_rms_epsilon": "a positive number",
    "attention.causal": "true",
    "rope.freq_base": "a positive number",
    "rope.dimension_count": "a size",
    "rope.scaling.type": "a text",
    "rope.scaling.factor": "a positive number",
    "rope.scaling.original_context_length": "a size",
    "rope.scaling.finetuned": "true or false",
    "rope.scaling.yarn_beta_fast": "a positive number",
    "rope.scaling.yarn_beta_slow": "a positive number",
}
"""Settings that every architecture may have, `{architecture}.X`, and the kinds of their values."""
GEMMA_KINDS = {
    "attention.sliding_window": "a size",
    "attention.sliding_window_pattern": "a size or a list of booleans",
    "attention.scale": "a positive number",
    "final_logit_softcapping": "a positive number",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class GGUFArchitecture:
    """Rules by which a GGUF architecture's metadata and tensors become a Hugging Face model's."""

    model_type: str
    class_name: str
    norms: Mapping[str, str] = dataclasses.field(default_factory=lambda: NORMS)
    """`blk.{i}.X.weight` -> `model.layers.{i}.Y.weight`."""
    qk_norms: Mapping[str, str] = dataclasses.field(default_factory=dict)
    interleaves_rows: bool = False
    """Whether the rows of q and k are stored with the two of a rotated pair next to each other."""
    norm_offset: float = 0.0
    """What the file's norms hold above Hugging Face's."""
    always_biased: tuple[str, ...] = ()
    may_be_biased: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    """Key of `config.json` -> linears that it gives biases; it is true where the file has one of them."""
    kinds: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Settings of this architecture beyond `KINDS`."""
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Keys of `config.json` that are the same for all models."""
    default_head_dim: int | None = None
    default_window: int | None = None
    full_attention_every: int = 0
    """Layers from one with full attention to the next, where the others see a window; 0 if all have full attention."""
    largest: int = 0
    """Layers of the one size whose attention is scaled by width / heads, not by the head's size: llama.cpp tells it by these."""

    @property
    def all_kinds(self) -> dict[str, str]:
        """Every setting that is read, without the architecture's name before it, and the kind of its value."""
        return {**KINDS, **self.kinds}


_SILU = {"hidden_act": "silu", "attention_dropout": 0.0}
_GELU = {
    "hidden_activation": "gelu_pytorch_tanh",
    "attention_dropout": 0.0,
    "attention_bias": False,
}
ARCHITECTURES = {
    "llama": GGUFArchitecture(
        model_type="llama",
        class_name="LlamaForCausalLM",
        interleaves_rows=True,
        may_be_biased={"attention_bias": ATTENTION, "mlp_bias": MLP},
        config=_SILU,
    ),
    "qwen2": GGUFArchitecture(
        model_type="qwen2",
        class_name="Qwen2ForCausalLM",
        always_biased=QKV,
        config={**_SILU, "use_sliding_window": False},
    ),
    "qwen3": GGUFArchitecture(
        model_type="qwen3",
        class_name="Qwen3ForCausalLM",
        qk_norms=QK_NORMS,
        may_be_biased={"attention_bias": ATTENTION},
        config={**_SILU, "use_sliding_window": False},
        default_head_dim=128,
    ),
    "gemma2": GGUFArchitecture(
        model_type="gemma2",
        class_name="Gemma2ForCausalLM",
        norms=GEMMA_NORMS,
        norm_offset=1.0,
        kinds={**GEMMA_KINDS, "attn_logit_softcapping": "a positive number"},
        config=_GELU,
        default_head_dim=256,
        default_window=4096,
        full_attention_every=2,
        largest=46,
    ),
    "gemma3": GGUFArchitecture(
        model_type="gemma3_text",
        class_name="Gemma3ForCausalLM",
        norms=GEMMA_NORMS,
        qk_norms=QK_NORMS,
        norm_offset=1.0,
        kinds={**GEMMA_KINDS, "rope.freq_base_swa": "a positive number"},
        config=_GELU,
        default_head_dim=256,
        full_attention_every=6,
        largest=62,
    ),
}
"""By `general.architecture`."""
