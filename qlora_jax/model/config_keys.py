"""Checks of a config's keys and numbers: each key that changes the mathematics is read, or refused by name."""

from collections.abc import Iterable, Mapping
from typing import Any

from qlora_jax.base.reading import shown
from qlora_jax.model.family import SIZES, Config, Family
from qlora_jax.model.layer_types import FULL, type_problems

MAX_LAYERS, MAX_SIZE, MAX_NUMBER = 10_000, 2**27, 1e30
MAX_WEIGHTS, MAX_EMBEDDING = 2**31 - 1, 2**36
"""Most weights of one matrix: JAX counts a linear's weights in 32 bits. Llama 3.1 405B's have 872 million, its embedding 2.1 billion."""
NEUTRAL = frozenset(
    (
        # Who saved it, how, and under which name.
        *("_name_or_path", "architectures", "auto_map", "transformers_version", "dtype", "torch_dtype"),
        *(
            "quantization_config",
            "qlora_jax",
            "tokenizer_class",
            "transformers.js_config",
            "unsloth_version",
            "unsloth_fixed",
        ),
        *("is_llama_config", "model_max_length", "max_sequence_length", "name_or_path", "finetuning_task"),
        # Training and initialization elsewhere; ours has its own settings.
        *("initializer_range", "id2label", "label2id", "problem_type", "num_labels", "classifier_dropout"),
        # How transformers' forward and generate behave, and what they return.
        *("use_cache", "return_dict", "output_attentions", "output_hidden_states", "chunk_size_feed_forward"),
        *("is_encoder_decoder", "is_decoder", "cache_implementation", "attn_implementation", "_attn_implementation"),
        *("_attn_implementation_autoset", "use_flash_attention", "_flash_attn_2_enabled", "torchscript"),
        *("max_length", "min_length", "do_sample", "early_stopping", "num_beams", "temperature", "top_k", "top_p"),
        *("repetition_penalty", "length_penalty", "num_return_sequences", "max_new_tokens", "task_specific_params"),
        # Token ids that the tokenizer and generation_config.json settle.
        *("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "sep_token_id", "cls_token_id"),
        *("decoder_start_token_id", "mask_token_id"),
        # How older versions of transformers cut products up.
        "pretraining_tp",
    )
)
"""Keys that change nothing, in no family."""
_ONLY: dict[str, tuple[Any, ...]] = {"is_causal": (True, None)}
"""Keys of every family of which one value is supported."""


def key_problems(config: Mapping[str, Any], family: Family) -> tuple[list[str], list[str]]:
    """Say which keys' values are refused; and name those of them that the family does not know, which transformers ignores."""
    only = {**_ONLY, **family.only}
    said, ignored = [], []
    for key, value in config.items():
        if key in family.keys_read or key in NEUTRAL or key in family.neutral:
            continue
        if key in only:
            if (value, isinstance(value, bool)) not in [(good, isinstance(good, bool)) for good in only[key]]:
                said.append(f"{key} is {shown(value)}, supported: {only[key][0]!r}")
            continue
        if not _does_nothing(key, value, config):
            said.append(f"{key} is {shown(value)}, not supported")
            ignored.append(key)
    value = config.get(family.activation_key, family.defaults.get(family.activation_key))
    if not isinstance(value, str) or value not in family.activations:
        said.append(f"{family.activation_key} is {shown(value)}, supported: {', '.join(map(repr, family.activations))}")
    return said, ignored


def _does_nothing(key: str, value: Any, config: Mapping[str, Any]) -> bool:
    """Whether an unknown key's value says that what it is about is absent, or what this family does anyway."""
    if key == "max_window_layers":
        return not config.get("use_sliding_window")
    if key == "layer_types":  # which other files than this family's have, and transformers 5 writes for some
        return not value or (isinstance(value, list) and all(kind == FULL for kind in value))
    if key == "sliding_window" and isinstance(value, int):
        positions = config.get("max_position_embeddings")
        wide = isinstance(positions, int) and value >= positions
        return wide or config.get("use_sliding_window") is False
    return value in (None, False, 0, 1, "", [], {}) and value is not True


def number_problems(config: Config, family: Family) -> list[str]:
    """Find what is no number of the kind that it should be, or would make a model beyond all machines."""
    optional = ["num_key_value_heads"] if config.get("num_key_value_heads") is not None else []
    if config.get("head_dim") is not None or (not family.null_head_dim and "head_dim" in config):
        optional.append("head_dim")
    problems = [
        f"{key} is {shown(config[key])}, expected a whole number from 1 to {_limit(key)}"
        for key in (*SIZES, *optional)
        if not _is_number(config[key], int, _limit(key))
    ]
    problems += [
        f"{key} is {shown(config[key])}, expected a positive number"
        for key in _positive(config, family)
        if not _is_number(config[key], (int, float), MAX_NUMBER)
    ]
    flags = {"tie_word_embeddings", "use_sliding_window", "use_qk_norm", *filter(_is_text, family.biases.values())}
    problems += [
        f"{key} is {shown(config[key])}, expected true or false"
        for key in sorted(flags & family.keys_read & config.keys())
        if not isinstance(config[key], bool) and not (config[key] is None and key != "tie_word_embeddings")
    ]
    for key in family.dropouts:
        dropout = config.get(key) or 0.0
        if not isinstance(dropout, int | float) or not 0 <= dropout < 1:
            problems.append(f"{key} is {shown(dropout)}, expected a number from 0 to below 1")
    return problems or [*_size_problems(config, family), *type_problems(config, family.types)]


def _positive(config: Config, family: Family) -> Iterable[str]:
    """Keys that are read as positive numbers."""
    yield family.eps
    for key in _POSITIVE:
        if key in family.keys_read & config.keys() and (config[key] is not None or key not in _NULLABLE):
            yield key


def _size_problems(config: Config, family: Family) -> list[str]:
    problems = []
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    if not config.get("head_dim") and hidden % heads:
        problems.append(f"hidden_size {hidden} is no multiple of num_attention_heads {heads}, and there is no head_dim")
    if heads % kv_heads:
        problems.append(f"num_attention_heads {heads} is no multiple of num_key_value_heads {kv_heads}")
    width = heads * (config.get("head_dim") or hidden // heads)
    if family.heads_fill_width and width != hidden:
        problems.append(
            f"hidden_size is {hidden}, but num_attention_heads times head_dim {width}, expected equal numbers"
        )
    rows = max(config["intermediate_size"], width)
    if "qkv_proj" in family.fused:
        rows = max(rows, width + 2 * kv_heads * (width // heads))
    if "gate_up_proj" in family.fused:
        rows = max(rows, 2 * config["intermediate_size"])
    if hidden * rows > MAX_WEIGHTS or hidden * config["vocab_size"] > MAX_EMBEDDING:
        problems.append(
            f"a linear has {hidden * rows:,} weights and the embedding {hidden * config['vocab_size']:,}, expected at most "
            f"{MAX_WEIGHTS:,} and {MAX_EMBEDDING:,}"
        )
    return problems


def _is_number(value: Any, kinds: type | tuple[type, ...], limit: float) -> bool:
    return isinstance(value, kinds) and not isinstance(value, bool) and 0 < value <= limit


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _limit(key: str) -> int:
    return MAX_LAYERS if "layers" in key else MAX_SIZE


_POSITIVE = (
    *(
        "rope_theta",
        "rope_local_base_freq",
        "query_pre_attn_scalar",
        "final_logit_softcapping",
        "attn_logit_softcapping",
    ),
    *("embedding_multiplier", "logits_scaling", "residual_multiplier", "attention_multiplier", "logit_scale"),
    *("max_position_embeddings", "original_max_position_embeddings"),
)
_NULLABLE = (
    *("rope_theta", "rope_local_base_freq", "final_logit_softcapping", "attn_logit_softcapping"),
    *("max_position_embeddings", "original_max_position_embeddings"),
)
