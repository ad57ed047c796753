"""Configurations of tiny models of every family, and models of transformers made from them, whose parameters are all random.

A case is a `config.json`, spelled as files of the family are: mostly as transformers 4 wrote them, with keys left out that most files leave
out. `as_saved` gives the same model's as transformers 5 writes it; both must be read alike.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

SMALL: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LENGTH = 40
"""Of the rows that tests feed: longer than windows and original lengths of rope, shorter than `max_position_embeddings`."""
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LONG = {"long_factor": [1.5 + i for i in range(6)], "short_factor": [1.0 + 0.1 * i for i in range(6)]}


def case(model_type: str, *without: str, **keys: Any) -> dict[str, Any]:
    """A tiny model's `config.json`: `SMALL` with `keys`, and some keys missing, so that the family's default counts."""
    config = {"model_type": model_type, **SMALL, **keys}
    return json.loads(json.dumps({key: value for key, value in config.items() if key not in without}))


CASES: dict[str, dict[str, Any]] = {
    "llama": case("llama", rope_theta=5e5, rms_norm_eps=1e-5),
    "llama-bias": case("llama", attention_bias=True, mlp_bias=True),
    "llama3-rope": case("llama", rope_theta=5e5, rope_scaling=LLAMA3, tie_word_embeddings=True, head_dim=16),
    "llama3-rope-v5": case("llama", rope_parameters={**LLAMA3, "rope_theta": 5e5}),
    "llama-linear": case("llama", rope_scaling={"type": "linear", "factor": 4.0}),
    "llama-dynamic": case("llama", rope_scaling={"type": "dynamic", "factor": 4.0}),
    "llama-yarn": case("llama", rope_scaling=YARN, rope_theta=1e4),
    "mistral": case("mistral", sliding_window=8, head_dim=32, rope_theta=1e6),
    "mistral-null": case("mistral", sliding_window=None),
    "ministral": case(
        "ministral", sliding_window=8, head_dim=32, layer_types=["full_attention", "sliding_attention"] * 2
    ),
    "ministral3": case(
        "ministral3",
        head_dim=32,
        rope_parameters={
            **YARN,
            "original_max_position_embeddings": 64,
            "rope_theta": 1e6,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "llama_4_scaling_beta": 0.3,
        },
    ),
    "qwen2": case("qwen2", rope_theta=1e6),
    "qwen2-window": case("qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=2),
    "qwen3": case("qwen3", head_dim=32, rope_theta=1e6, tie_word_embeddings=True),
    "qwen3-yarn": case("qwen3", head_dim=32, rope_theta=1e6, rope_scaling={**YARN, "attention_factor": 1.3}),
    "gemma": case("gemma", head_dim=32, hidden_act="gelu"),
    "gemma2": case(
        "gemma2",
        head_dim=32,
        sliding_window=8,
        query_pre_attn_scalar=20,
        attn_logit_softcapping=3.0,
        final_logit_softcapping=8.0,
    ),
    "gemma3": case(
        "gemma3_text",
        head_dim=32,
        sliding_window=8,
        sliding_window_pattern=2,
        query_pre_attn_scalar=20,
        rope_scaling={"rope_type": "linear", "factor": 8.0},
        rope_theta=1e6,
        rope_local_base_freq=1e4,
        final_logit_softcapping=None,
    ),
    "gemma3-v5": case(
        "gemma3_text",
        head_dim=32,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"] * 2,
        attn_logit_softcapping=3.0,  # which its attention does not use
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        },
    ),
    "gemma3-defaults": case("gemma3_text", "num_attention_heads", "num_key_value_heads", sliding_window=8),
    "phi3": case("phi3", sliding_window=9),
    "phi3-long": case(
        "phi3",
        partial_rotary_factor=0.75,
        rope_scaling={"type": "longrope", **LONG},
        original_max_position_embeddings=16,
    ),
    "phi3-short": case(
        "phi3",
        partial_rotary_factor=0.75,
        rope_scaling={"type": "longrope", **LONG},
        original_max_position_embeddings=64,
    ),
    "olmo2": case("olmo2", rope_theta=5e5),
    "olmo3": case(
        "olmo3",
        sliding_window=8,
        rope_theta=3e5,
        rope_scaling={**YARN, "attention_factor": 1.2, "beta_fast": 32, "beta_slow": 1},
    ),
    "smollm3": case("smollm3", rope_theta=5e6, no_rope_layer_interval=2),
    "smollm3-list": case("smollm3", no_rope_layers=[1, 0, 0, 1]),
    "granite": case(
        "granite",
        embedding_multiplier=3.0,
        logits_scaling=2.0,
        residual_multiplier=0.22,
        attention_multiplier=0.3,
        tie_word_embeddings=True,
    ),
    "glm": case("glm", head_dim=16),
    "glm4": case("glm4", head_dim=16, partial_rotary_factor=0.5),
    "cohere": case("cohere", use_qk_norm=True),
    "cohere2": case("cohere2", sliding_window=8, sliding_window_pattern=2, rope_theta=5e4),
    "starcoder2": case("starcoder2", sliding_window=8, rope_theta=1e5),
    "seed_oss": case("seed_oss", head_dim=32, rope_theta=1e7, attention_dropout=0.0, residual_dropout=0.0),
    "hunyuan": case("hunyuan_v1_dense", head_dim=32, rope_scaling={"type": "dynamic", "alpha": 3.0, "factor": 1.0}),
    "exaone4": case("exaone4", sliding_window=8, sliding_window_pattern=2, rope_scaling=LLAMA3, rope_theta=1e6),
    "exaone4-full": case("exaone4", sliding_window=None, layer_types=["full_attention"] * 4),
    "apertus": case("apertus"),
    "apertus-theta": case("apertus", rope_theta=1e4),
    "ernie4_5": case("ernie4_5", head_dim=16, use_bias=True),
    "helium": case("helium", head_dim=16),
    "nemotron": case("nemotron", partial_rotary_factor=0.5),
    "arcee": case("arcee"),
}
"""Text models by name; the family's name is the beginning of the case's."""

_VISION = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
WRAPPERS: dict[str, dict[str, Any]] = {
    "gemma3-wrapper": {
        "model_type": "gemma3",
        "text_config": CASES["gemma3"],
        "vision_config": {"model_type": "siglip_vision_model", "image_size": 28, "patch_size": 14, **_VISION},
        "mm_tokens_per_image": 4,
    },
    "mistral3-wrapper": {
        "model_type": "mistral3",
        "text_config": {**CASES["mistral"], "sliding_window": None},
        "tie_word_embeddings": False,
        "vision_config": {"model_type": "pixtral", "image_size": 28, "patch_size": 14, "head_dim": 16, **_VISION},
        "spatial_merge_size": 2,
    },
    "ministral3-wrapper": {
        "model_type": "mistral3",
        "text_config": CASES["ministral3"],
        "tie_word_embeddings": False,
        "vision_config": {"model_type": "pixtral", "image_size": 28, "patch_size": 14, "head_dim": 16, **_VISION},
        "spatial_merge_size": 2,
    },
}
"""Models of images and text, of which the text half is read."""


def as_saved(config: dict[str, Any]) -> dict[str, Any]:
    """The `config.json` that transformers 5 writes of this model."""
    from transformers import AutoConfig

    with tempfile.TemporaryDirectory() as folder:
        AutoConfig.for_model(**json.loads(json.dumps(config))).save_pretrained(folder)
        return json.loads((Path(folder) / "config.json").read_text())


def tiny_model(config: dict[str, Any], seed: int = 0) -> Any:
    """A model of transformers' in float32 (a text model, or a wrapper), with no parameter left at a constant.

    Hidden states begin near one: beside an embedding that is scaled up, what the layers add would hardly be seen.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    made = AutoConfig.for_model(**json.loads(json.dumps(config)))
    torch.manual_seed(seed)
    kind = AutoModelForImageTextToText if "text_config" in config else AutoModelForCausalLM
    model = kind.from_config(made, attn_implementation="eager", dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)
    text = made.get_text_config()
    is_gemma = text.model_type.startswith("gemma")
    embed_scale = text.hidden_size**0.5 if is_gemma else getattr(text, "embedding_multiplier", 1.0)

    def draw(tensor: torch.Tensor, mean: float, deviation: float) -> None:
        tensor.copy_(mean + deviation * torch.randn(tensor.shape, generator=generator))

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            first = float(parameter.flatten()[0])
            if "embed" in name:
                draw(parameter, 0, 1 / embed_scale)
            elif "lm_head" in name:
                draw(parameter, 0, parameter.shape[-1] ** -0.5)
            elif "act_fn" in name or ("norm" in name and name.endswith(".weight")):
                draw(parameter, first, 0.3)
            elif parameter.ndim == 1:
                draw(parameter, 0, 0.5)
            else:
                draw(parameter, 0, 1.5 * parameter.shape[-1] ** -0.5)
    return model
