"""Families of models as rows of a table: what missing keys mean, keys that are read, those of which one value is supported, and facts.

Rows inherit from one another: `derived` takes over what it is not told.
"""

from qlora_jax.model import family_facts
from qlora_jax.model.architecture import QKNorm
from qlora_jax.model.family import SIZES, Family, derived
from qlora_jax.model.layer_types import one_window, pattern, qwen, smollm3
from qlora_jax.model.rope_config import RopeRules

GELU = {"gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}
_NO_NORM_BEFORE = {
    "before_attention": None,
    "after_attention": "post_attention_layernorm",
    "before_mlp": None,
    "after_mlp": "post_feedforward_layernorm",
}


def _sizes(vocab: int, hidden: int, mlp: int, layers: int, heads: int) -> dict[str, int]:
    return dict(zip(SIZES, (vocab, hidden, mlp, layers, heads), strict=True))


# --------------------------------------------------------------------------------------------------------------- families

LLAMA = Family(
    model_type="llama",
    null_head_dim=True,
    defaults={"rms_norm_eps": 1e-6, "tie_word_embeddings": False, "hidden_act": "silu"},
    biases=dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), "attention_bias")
    | dict.fromkeys(("gate_proj", "up_proj", "down_proj"), "mlp_bias"),
)
_ATTENTION_BIAS = dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), "attention_bias")
MISTRAL = derived(
    LLAMA,
    "mistral",
    null_head_dim=True,
    defaults={"sliding_window": 4096, "num_key_value_heads": 8},
    sizes=_sizes(32000, 4096, 14336, 32, 32),
    biases={},
    types=one_window,
)
MINISTRAL = derived(MISTRAL, "ministral", defaults={"head_dim": None}, sizes={}, types=pattern(None, null_is_full=True))
MINISTRAL3 = derived(
    MISTRAL,
    "ministral3",
    defaults={"rms_norm_eps": 1e-5, "head_dim": 128, "sliding_window": None},
    sizes=_sizes(131072, 4096, 14336, 34, 32),
    rope=RopeRules(otherwise=family_facts.MINISTRAL3_ROPE, keys=("llama_4_scaling_beta",)),
    facts=family_facts.ministral3,
)
QWEN2 = derived(
    LLAMA,
    "qwen2",
    defaults={
        **{"num_key_value_heads": 32, "use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28},
    },
    reads=("use_sliding_window", "max_window_layers"),
    biases=dict.fromkeys(("q_proj", "k_proj", "v_proj"), True),
    types=qwen,
)
QWEN3 = derived(
    QWEN2,
    "qwen3",
    defaults={"head_dim": 128},
    biases=_ATTENTION_BIAS,
    fixed={"qk_norm": QKNorm(over="head")},
)
SMOLLM3 = derived(
    LLAMA,
    "smollm3",
    defaults={
        "tie_word_embeddings": True,
        "num_key_value_heads": 4,
        "no_rope_layer_interval": 4,
        "use_sliding_window": False,
        "sliding_window": None,
    },
    reads=("no_rope_layer_interval", "no_rope_layers", "use_sliding_window"),
    rope=RopeRules(theta=2e6),
    types=smollm3,
)
_GRANITE_S = ("embedding_multiplier", "logits_scaling", "residual_multiplier", "attention_multiplier")
GRANITE = derived(
    LLAMA, "granite", defaults=dict.fromkeys(_GRANITE_S, 1.0), reads=_GRANITE_S, facts=family_facts.granite
)
ARCEE = derived(
    LLAMA,
    "arcee",
    null_head_dim=True,
    defaults={"rms_norm_eps": 1e-5, "hidden_act": "relu2"},
    activations={"relu2": "relu2"},
    fixed={"gated": False},
)
SEED_OSS = derived(
    LLAMA,
    "seed_oss",
    null_head_dim=True,
    defaults={
        **{"attention_bias": True, "head_dim": 128, "num_key_value_heads": 8},
        **{"attention_dropout": 0.1, "residual_dropout": 0.1},
    },
    biases={**LLAMA.biases, "o_proj": "attention_out_bias"},
    dropouts=("attention_dropout", "residual_dropout"),
    dropouts_are_left_out=True,
)
ERNIE4_5 = derived(
    LLAMA,
    "ernie4_5",
    null_head_dim=True,
    defaults={"rms_norm_eps": 1e-5, "tie_word_embeddings": True, "head_dim": 128, "num_key_value_heads": 2},
    biases=dict.fromkeys(LLAMA.biases, "use_bias"),
    rope=RopeRules(theta=5e5, interleaved=True),
    dropouts=(),
)
GEMMA = derived(
    LLAMA,
    "gemma",
    defaults={
        **{"head_dim": 256, "num_key_value_heads": 16, "tie_word_embeddings": True, "hidden_act": "gelu_pytorch_tanh"},
    },
    only={"use_bidirectional_attention": (False, None)},
    neutral=("hidden_activation",),
    activations={**GELU, "gelu": "gelu_tanh"},
    biases=_ATTENTION_BIAS,
    norms={"offset": 1.0, "late": True},
    facts=family_facts.gemma,
)
_AFTER = {
    "after_attention": "post_attention_layernorm",
    "before_mlp": "pre_feedforward_layernorm",
    "after_mlp": "post_feedforward_layernorm",
}
_GEMMA2_S = ("query_pre_attn_scalar", "final_logit_softcapping", "attn_logit_softcapping")
GEMMA2 = derived(
    GEMMA,
    "gemma2",
    defaults={
        "num_key_value_heads": 4,
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "final_logit_softcapping": 30.0,
        "attn_logit_softcapping": 50.0,
    },
    only={**GEMMA.only, "sliding_window_pattern": (2, None)},
    reads=_GEMMA2_S,
    neutral=("hidden_act",),
    activation_key="hidden_activation",
    activations=GELU,
    norms={**GEMMA.norms, **_AFTER},
    types=pattern(2),
    facts=family_facts.gemma2,
)
GEMMA3 = derived(
    GEMMA2,
    "gemma3_text",
    defaults={"final_logit_softcapping": None, "attn_logit_softcapping": None, "sliding_window_pattern": 6},
    sizes=_sizes(262208, 2304, 9216, 26, 8),
    only=GEMMA.only,
    reads=("rope_local_base_freq", "sliding_window_pattern"),
    neutral=("hidden_act", "_sliding_window_pattern"),
    fixed={"qk_norm": QKNorm(over="head")},
    rope=RopeRules(theta=1e6, theta_of_windows=1e4, theta_of_windows_key="rope_local_base_freq"),
    types=pattern("sliding_window_pattern"),
    facts=family_facts.gemma3,
)
PHI3 = derived(
    LLAMA,
    "phi3",
    defaults={"rms_norm_eps": 1e-5, "sliding_window": None},
    reads=("original_max_position_embeddings", "partial_rotary_factor"),
    only={"full_attn_mod": (1, None), "interpolate_factor": (1, None), "lm_head_bias": (False, None)},
    biases={},
    fused=("qkv_proj", "gate_up_proj"),
    rope=RopeRules(
        partial=1.0,
        methods=("default", "longrope"),
        aliases={"su": "longrope", "yarn": "longrope"},
        fixed_original=4096,
    ),
    types=one_window,
    dropouts=("attention_dropout", "resid_pdrop", "embd_pdrop"),
)
GLM = derived(
    LLAMA,
    "glm",
    defaults={"rms_norm_eps": 1.5625e-7, "attention_bias": True, "head_dim": 128, "num_key_value_heads": 2},
    reads=("partial_rotary_factor",),
    biases=dict.fromkeys(("q_proj", "k_proj", "v_proj"), "attention_bias"),
    fused=("gate_up_proj",),
    rope=RopeRules(partial=0.5, interleaved=True),
)
GLM4 = derived(
    GLM,
    "glm4",
    norms={"after_attention": "post_self_attn_layernorm", "after_mlp": "post_mlp_layernorm"},
)
OLMO2 = derived(
    LLAMA,
    "olmo2",
    defaults={"rms_norm_eps": 1e-5},
    biases=_ATTENTION_BIAS,
    norms={"late": True, **_NO_NORM_BEFORE},
    fixed={"qk_norm": QKNorm(over="width")},
)
OLMO3 = derived(
    OLMO2,
    "olmo3",
    defaults={"sliding_window": 4096},
    rope=RopeRules(theta=5e5, theta_of_windows=5e5),
    types=pattern(4),
)
EXAONE4 = derived(
    LLAMA,
    "exaone4",
    defaults={
        **{"rms_norm_eps": 1e-5, "num_key_value_heads": 32, "sliding_window": 4096, "sliding_window_pattern": 4},
    },
    reads=("sliding_window_pattern",),
    biases={},
    norms={**_NO_NORM_BEFORE},
    fixed={"qk_norm": QKNorm(over="head")},
    types=pattern("sliding_window_pattern", null_is_full=True),
    full_are_rotated=lambda c: c["sliding_window"] is None,
)
HUNYUAN = derived(
    LLAMA,
    "hunyuan_v1_dense",
    defaults={"rms_norm_eps": 1e-5, "head_dim": None},
    only={"use_qk_norm": (True,), "use_cla": (False, None), "norm_type": ("rms",), "use_rotary_pos_emb": (True,)},
    neutral=("eod_token_id", "attention_head_dim", "cla_share_factor", "org_vocab_size"),
    biases=_ATTENTION_BIAS,
    rope=RopeRules(keys=("alpha",)),
    fixed={"qk_norm": QKNorm(over="head", after_rope=True, names=("query_layernorm", "key_layernorm"))},
)
HELIUM = derived(
    LLAMA,
    "helium",
    defaults={"rms_norm_eps": 1e-8, "head_dim": 128, "num_key_value_heads": 20},
    biases={name: key for name, key in LLAMA.biases.items() if name != "o_proj"},
    norms={"late": True},
    rope=RopeRules(theta=1e5, interleaved=True),
    heads_fill_width=True,
)
COHERE = derived(
    LLAMA,
    "cohere",
    defaults={"tie_word_embeddings": True, "logit_scale": 0.0625, "layer_norm_eps": 1e-5},
    reads=("logit_scale", "use_qk_norm"),
    eps="layer_norm_eps",
    biases=_ATTENTION_BIAS,
    norms={"centred": True, "late": True, "before_mlp": None},
    fixed={"parallel": True},
    rope=RopeRules(theta=5e5, interleaved=True),
    facts=family_facts.cohere,
)
COHERE2 = derived(
    COHERE,
    "cohere2",
    defaults={"sliding_window": 4096, "sliding_window_pattern": 4},
    reads=("logit_scale", "sliding_window_pattern"),
    only={
        "use_qk_norm": (False, None),
        "order_of_interleaved_layers": ("local_attn_first", None),
        "position_embedding_type": ("rope_gptj", None),
        "rotary_pct": (1, None),
        "use_gated_activation": (True, None),
        "use_parallel_block": (True, None),
    },
    neutral=("_sliding_window_pattern", "use_embedding_sharing", "use_parallel_embedding"),
    rope=RopeRules(interleaved=True),
    heads_fill_width=True,
    types=pattern("sliding_window_pattern"),
    full_are_rotated=lambda c: False,
)
STARCODER2 = derived(
    LLAMA,
    "starcoder2",
    null_head_dim=True,
    defaults={
        **{"hidden_act": "gelu_pytorch_tanh", "norm_epsilon": 1e-5, "use_bias": True, "tie_word_embeddings": True},
        **{"num_key_value_heads": 2, "sliding_window": None},
    },
    only={"mlp_type": ("default", None), "norm_type": ("layer_norm", None)},
    neutral=("activation_function",),
    eps="norm_epsilon",
    activations={**GELU, "gelu": "gelu"},
    biases=dict.fromkeys(LLAMA.biases, "use_bias"),
    names={"up_proj": "c_fc", "down_proj": "c_proj"},
    norms={"centred": True, "late": True, "bias": True},
    fixed={"gated": False},
    types=one_window,
    dropouts=("attention_dropout", "residual_dropout", "embedding_dropout"),
)
NEMOTRON = derived(
    LLAMA,
    "nemotron",
    null_head_dim=True,
    defaults={"hidden_act": "relu2", "norm_eps": 1e-5},
    reads=("partial_rotary_factor",),
    eps="norm_eps",
    activations={"relu2": "relu2"},
    norms={"centred": True, "late": True, "offset": 1.0, "bias": True},
    rope=RopeRules(partial=0.5),
    fixed={"gated": False},
)
_APERTUS_ROPE = {
    **{"rope_type": "llama3", "rope_theta": 12e6, "factor": 8.0, "original_max_position_embeddings": 8192},
    **{"low_freq_factor": 1.0, "high_freq_factor": 4.0},
}
APERTUS = derived(
    LLAMA,
    "apertus",
    defaults={"rms_norm_eps": 1e-5, "hidden_act": "xielu"},
    only={"qk_norm": (True, None), "post_norm": (False, None)},
    activations={"xielu": "xielu"},
    biases=_ATTENTION_BIAS,
    norms={"before_attention": "attention_layernorm", "before_mlp": "feedforward_layernorm"},
    fixed={"gated": False, "qk_norm": QKNorm(over="head")},
    rope=RopeRules(theta=12e6, otherwise=_APERTUS_ROPE),
)

FAMILIES = {
    row.model_type: row
    for row in (
        *(LLAMA, MISTRAL, MINISTRAL, MINISTRAL3, QWEN2, QWEN3, SMOLLM3, GRANITE, ARCEE, SEED_OSS, ERNIE4_5, GEMMA),
        *(GEMMA2, GEMMA3, PHI3, GLM, GLM4, OLMO2, OLMO3, EXAONE4, HUNYUAN, HELIUM, COHERE, COHERE2, STARCODER2),
        *(NEMOTRON, APERTUS),
    )
}
"""Rows by `model_type`."""
