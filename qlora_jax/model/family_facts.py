"""Facts of an `Architecture` that keys of one family alone change, as functions of its config."""

from typing import Any

from qlora_jax.model.architecture import QKNorm
from qlora_jax.model.family import Config

MINISTRAL3_ROPE = {
    **{"rope_type": "yarn", "rope_theta": 1e6, "factor": 16.0, "original_max_position_embeddings": 16384},
    **{"beta_fast": 32.0, "beta_slow": 1.0, "mscale_all_dim": 1.0, "mscale": 1.0, "llama_4_scaling_beta": 0.1},
}
"""The rope of a Ministral 3 whose config has none."""


def granite(c: Config) -> dict[str, Any]:
    """Multipliers. With residual_multiplier m, hidden states are kept as 1/m of transformers': norms see no difference but in eps."""
    m = c["residual_multiplier"]
    return {
        "embed_scale": c["embedding_multiplier"] / m,
        "noise_scale": c["embedding_multiplier"] / m,
        "norms": {"eps": c["rms_norm_eps"] / m**2},
        "logit_scale": 1 / c["logits_scaling"],
        "attention_scale": c["attention_multiplier"],
    }


def gemma(c: Config) -> dict[str, Any]:
    """Embeddings times √D."""
    return {"embed_scale": c["hidden_size"] ** 0.5, "embed_scale_rounded": True}


def gemma2(c: Config) -> dict[str, Any]:
    """Scores scaled by a number of the config in the place of head_dim; caps on scores and logits."""
    return {
        **gemma(c),
        "attention_scale": c["query_pre_attn_scalar"] ** -0.5,
        "attention_softcap": c["attn_logit_softcapping"],
        "logit_softcap": c["final_logit_softcapping"],
    }


def gemma3(c: Config) -> dict[str, Any]:
    """Gemma 2's without the cap on scores: the key is there, and not used."""
    return {**gemma2(c), "attention_softcap": None}


def cohere(c: Config) -> dict[str, Any]:
    """Scaled logits; norms of queries and keys with a weight for each head, in some."""
    return {"logit_scale": c["logit_scale"], "qk_norm": QKNorm(over="heads") if c.get("use_qk_norm") else None}


def ministral3(c: Config) -> dict[str, Any]:
    """Queries are scaled from position `original_max_position_embeddings` on: rows are kept below."""
    rope = c.get("rope_scaling") or c.get("rope_parameters") or MINISTRAL3_ROPE
    original = rope.get("original_max_position_embeddings") or c.get("max_position_embeddings")
    return {"max_length": original} if rope.get("llama_4_scaling_beta") else {}
