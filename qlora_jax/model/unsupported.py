"""Models that are refused by name, and what to do instead."""

WRAPPERS = {"gemma3": "gemma3_text", "mistral3": "mistral"}
"""Models of images and text whose text half is read, and the text half's `model_type` where it does not say one."""
_TEXT_ONLY = (
    "take a text-only copy of this model: save_pretrained of its language_model, with the text_config as config.json"
)
_EXPERTS = "mixtures of experts are not supported; use a dense model of this family"
_LATENT = "multi-head latent attention is not supported; use a dense model, or a distillation of this one"
_STATE = "state-space and linear-attention layers are not supported; use a model with attention in every layer"
_OWN_CODE = (
    "this model needs code of its own repository; use a copy that was converted to llama's layout, if there is one"
)
_OTHER = "use a model of a family that is supported"
_BY_REASON: dict[str, tuple[str, ...]] = {
    _TEXT_ONLY: (
        *("gemma3n", "gemma4", "gemma4_unified", "llama4", "qwen3_5", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava"),
        *("llava_next", "mllama", "idefics3", "smolvlm", "paligemma", "pixtral", "internvl", "aya_vision", "glm4v"),
        *("phi4_multimodal", "phi3_v", "cohere2_vision"),
    ),
    _EXPERTS: (
        *("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "granitemoe", "granitemoeshared", "gpt_oss", "glm4_moe"),
        *("llama4_text", "phimoe", "ernie4_5_moe", "hunyuan_v1_moe", "dbrx", "jetmoe", "qwen3_vl_moe", "minimax"),
        *("flex_olmo", "dots1", "qwen3_5_moe", "glm4v_moe"),
    ),
    _LATENT: (
        *("deepseek_v2", "deepseek_v3", "deepseek_v32", "deepseek_v4", "glm4_moe_lite", "longcat_flash", "kimi_k2"),
        *("minicpm3",),
    ),
    _STATE: (
        *("mamba", "mamba2", "falcon_mamba", "jamba", "bamba", "zamba", "zamba2", "granitemoehybrid", "nemotron_h"),
        *("falcon_h1", "lfm2", "lfm2_moe", "qwen3_next", "qwen3_5_text", "recurrent_gemma", "rwkv", "kimi_linear"),
    ),
    _OWN_CODE: ("baichuan", "qwen", "chatglm", "internlm", "internlm2", "deci", "nemotron-nas", "minicpm", "exaone"),
    _OTHER: (
        *("gemma3n_text", "gemma4_text", "gemma4_unified_text", "phi", "gpt2", "gpt_neox", "gptj", "opt", "bloom"),
        *("falcon", "mpt", "stablelm", "olmo", "t5", "bert", "persimmon", "codegen", "gpt_bigcode", "gpt_neo"),
    ),
}
UNSUPPORTED = {model_type: fix for fix, names in _BY_REASON.items() for model_type in names}
"""The way out, by `model_type`."""
