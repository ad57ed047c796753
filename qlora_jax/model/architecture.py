"""What a Llama's `config.json` says of its mathematics."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

from qlora_jax.base.errors import InputError
from qlora_jax.config import LINEAR_NAMES


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """The keys of a Hugging Face `config.json` that decide the mathematics, under Hugging Face's names."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    tie_word_embeddings: bool

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], where: object = "config.json") -> Self:
        """Read a parsed `config.json`.

        Raises:
            InputError: a key is missing, or one that changes the mathematics has a value that is not supported (all at once).
        """
        problems = [f"{key} is missing" for key in _REQUIRED if key not in config]
        problems += [
            f"{key} is {config[key]!r}, supported: {only!r}"
            for key, only in _ONLY.items()
            if config.get(key, only) != only
        ]
        problems += [f"{key} is {config[key]!r}, not supported" for key in _REFUSED if config.get(key)]
        for key in ("rope_scaling", "rope_parameters"):  # the name in transformers 4, and in 5
            scaling = config.get(key) or {}
            if not isinstance(scaling, dict) or scaling.get("rope_type", scaling.get("type", "default")) != "default":
                problems.append(f"{key} is {scaling!r}, supported: rope_type 'default'")
        problems = problems or _bad_numbers(config)
        if problems:
            raise InputError(
                where, found="; ".join(problems), expected="a Llama without these", fix="use another base model"
            )
        heads = config["num_attention_heads"]
        rope = config.get("rope_scaling") or config.get("rope_parameters") or {}  # in the order of transformers 5
        return cls(
            **{key: config[key] for key in _REQUIRED},
            num_key_value_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            rms_norm_eps=config.get("rms_norm_eps", 1e-6),
            rope_theta=rope.get("rope_theta") or config.get("rope_theta") or 10000.0,
            tie_word_embeddings=config.get("tie_word_embeddings", False),
        )

    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """(out, in) of each linear of a decoder layer, by name."""
        hidden, mlp = self.hidden_size, self.intermediate_size
        queries, keys = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        shapes = (
            (queries, hidden),
            (keys, hidden),
            (keys, hidden),
            (hidden, queries),
            (mlp, hidden),
            (mlp, hidden),
            (hidden, mlp),
        )
        return dict(zip(LINEAR_NAMES, shapes, strict=True))


def _bad_numbers(config: Mapping[str, Any]) -> list[str]:
    """What is no number of the kind that it should be, or would make a model beyond all machines."""

    def is_number(value: Any, kinds: type | tuple[type, ...], limit: float) -> bool:
        return isinstance(value, kinds) and not isinstance(value, bool) and 0 < value <= limit

    whole = [key for key in (*_REQUIRED, "num_key_value_heads", "head_dim") if config.get(key) or key in _REQUIRED]
    problems = [
        f"{key} is {config[key]!r}, expected a whole number from 1 to {_MAX_LAYERS if 'layers' in key else _MAX_SIZE}"
        for key in whole
        if not is_number(config[key], int, _MAX_LAYERS if "layers" in key else _MAX_SIZE)
    ]
    ropes = {key: config.get(key) or {} for key in ("rope_scaling", "rope_parameters")}
    numbers = {"rms_norm_eps": config.get("rms_norm_eps", 1e-6), "rope_theta": config.get("rope_theta") or 1.0}
    numbers |= {f"{key}.rope_theta": rope["rope_theta"] for key, rope in ropes.items() if rope.get("rope_theta")}
    problems += [
        f"{key} is {value!r}, expected a positive number"
        for key, value in numbers.items()
        if not is_number(value, (int, float), _MAX_NUMBER)
    ]
    if not isinstance(config.get("tie_word_embeddings", False), bool):
        problems.append(f"tie_word_embeddings is {config['tie_word_embeddings']!r}, expected true or false")
    if not problems:
        hidden, heads = config["hidden_size"], config["num_attention_heads"]
        if not config.get("head_dim") and hidden % heads:
            problems.append(
                f"hidden_size {hidden} is no multiple of num_attention_heads {heads}, and there is no head_dim"
            )
        if heads % (config.get("num_key_value_heads") or heads):
            problems.append(
                f"num_attention_heads {heads} is no multiple of num_key_value_heads {config['num_key_value_heads']}"
            )
    return problems


_MAX_LAYERS, _MAX_SIZE, _MAX_NUMBER = 10_000, 2**27, 1e30
_REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_ONLY: dict[str, Any] = {
    "model_type": "llama",
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "pretraining_tp": 1,
    "attention_dropout": 0.0,
}
_REFUSED = (
    "sliding_window",
    "use_sliding_window",
    "layer_types",
    "partial_rotary_factor",
    "logit_softcapping",
    "num_local_experts",
)
