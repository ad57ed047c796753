"""The facts of a model that decide its mathematics and its names, read from `config.json`."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, Self

from qlora_jax.base.errors import InputError
from qlora_jax.base.reading import shown


@dataclasses.dataclass(frozen=True, kw_only=True)
class Linear:
    """A linear of a decoder layer, as model files and PEFT name it."""

    name: str
    """The last part of its path, which `lora.target_modules` says: `q_proj`."""
    path: str
    """Its place below the layer: `self_attn.q_proj`."""
    shape: tuple[int, int]
    """(out, in)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kind:
    """What may differ from layer to layer along the walk. Layers of equal kinds share their compiled functions."""

    window: int | None = None
    """Keys that a query sees, itself included; None for all before it."""


@dataclasses.dataclass(frozen=True)
class Architecture:
    """Facts of a base model: keys of its `config.json` under Hugging Face's names, and what follows from them.

    The decoder layer, the converters and the planner read these, and never ask which family a model belongs to.
    """

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
    attention_dropout: float = 0.0
    """Of attention weights in training, which `train.py` refuses; no other command computes with it."""

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], where: object = "config.json") -> Self:
        """Read a parsed `config.json`.

        Raises:
            InputError: a key is missing, or one that changes the mathematics has a value that is not supported (all at once).
        """
        missing = [f"{key} is missing" for key in _REQUIRED if key not in config]
        others = [
            f"{key} is {shown(config[key])}, supported: {values[0]!r}"
            for key, values in _ONLY.items()
            if config.get(key, values[0]) not in values
        ]
        ignored = [
            key for key, is_neutral in _IGNORED.items() if config.get(key) and not is_neutral(config[key], config)
        ]
        others += [f"{key} is {shown(config[key])}, not supported" for key in ignored]
        for key in ("rope_scaling", "rope_parameters"):  # the name in transformers 4, and in 5
            if not _is_plain_rope(scaling := config.get(key) or {}):
                others.append(f"{key} is {shown(scaling)}, supported: rope_type 'default'")
        damage = [] if missing or others else _bad_numbers(config)
        if problems := [*missing, *others, *damage]:
            fix = "fetch the model again" if not others else "use another base model"
            if ignored and len(ignored) == len(others):
                fix += f"; or, if it was trained without, as transformers runs it, remove {' and '.join(ignored)} from config.json"
            raise InputError(where, found="; ".join(problems), expected="a Llama without these", fix=fix)
        heads = config["num_attention_heads"]
        rope = config.get("rope_scaling") or config.get("rope_parameters") or {}  # in the order of transformers 5
        return cls(
            **{key: config[key] for key in _REQUIRED},
            num_key_value_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            rms_norm_eps=config.get("rms_norm_eps", 1e-6),
            rope_theta=rope.get("rope_theta") or config.get("rope_theta") or 10000.0,
            tie_word_embeddings=config.get("tie_word_embeddings", False),
            attention_dropout=config.get("attention_dropout") or 0.0,
        )

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """Each layer's kind, first to last."""
        return (Kind(),) * self.num_hidden_layers

    @property
    def linears(self) -> dict[str, Linear]:
        """The linears of a decoder layer by name: those that attention enters by, the one it leaves by, and the MLP's."""
        return _linears(self)

    @property
    def attention_inputs(self) -> tuple[str, ...]:
        """Linears of attention's input: queries, keys and values."""
        return ATTENTION_INPUTS

    @property
    def attention_output(self) -> str:
        """The linear of what attention gives."""
        return ATTENTION_OUTPUT

    @property
    def mlp_linears(self) -> tuple[str, ...]:
        """The MLP's linears, in the order in which they are applied: gate, up, down."""
        return MLP_LINEARS

    @property
    def dropout_inputs(self) -> tuple[str, ...]:
        """For each input that linears of a layer have, the first of these linears: each input draws a dropout mask of its own."""
        return self.attention_inputs[0], self.attention_output, self.mlp_linears[0], self.mlp_linears[-1]

    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """(out, in) of each linear of a decoder layer, by name."""
        return {name: linear.shape for name, linear in self.linears.items()}


ATTENTION_INPUTS, ATTENTION_OUTPUT = ("q_proj", "k_proj", "v_proj"), "o_proj"
MLP_LINEARS = ("gate_proj", "up_proj", "down_proj")
LINEAR_PATHS = {
    **{name: f"self_attn.{name}" for name in (*ATTENTION_INPUTS, ATTENTION_OUTPUT)},
    **{name: f"mlp.{name}" for name in MLP_LINEARS},
}
"""By a linear's name, its place below the layer, in the order in which they are applied."""


@functools.cache
def _linears(shape: Architecture) -> dict[str, Linear]:
    hidden, mlp = shape.hidden_size, shape.intermediate_size
    queries, keys = shape.num_attention_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim
    shapes = {
        "q_proj": (queries, hidden),
        "k_proj": (keys, hidden),
        "v_proj": (keys, hidden),
        "o_proj": (hidden, queries),
        "gate_proj": (mlp, hidden),
        "up_proj": (mlp, hidden),
        "down_proj": (hidden, mlp),
    }
    return {name: Linear(name=name, path=path, shape=shapes[name]) for name, path in LINEAR_PATHS.items()}


def _bad_numbers(config: Mapping[str, Any]) -> list[str]:
    """What is no number of the kind that it should be, or would make a model beyond all machines."""

    def is_number(value: Any, kinds: type | tuple[type, ...], limit: float) -> bool:
        return isinstance(value, kinds) and not isinstance(value, bool) and 0 < value <= limit

    whole = [key for key in (*_REQUIRED, "num_key_value_heads", "head_dim") if config.get(key) or key in _REQUIRED]
    problems = [
        f"{key} is {shown(config[key])}, expected a whole number from 1 to {_MAX_LAYERS if 'layers' in key else _MAX_SIZE}"
        for key in whole
        if not is_number(config[key], int, _MAX_LAYERS if "layers" in key else _MAX_SIZE)
    ]
    ropes = {key: config.get(key) or {} for key in ("rope_scaling", "rope_parameters")}
    numbers = {"rms_norm_eps": config.get("rms_norm_eps", 1e-6), "rope_theta": config.get("rope_theta") or 1.0}
    numbers |= {f"{key}.rope_theta": rope["rope_theta"] for key, rope in ropes.items() if rope.get("rope_theta")}
    problems += [
        f"{key} is {shown(value)}, expected a positive number"
        for key, value in numbers.items()
        if not is_number(value, (int, float), _MAX_NUMBER)
    ]
    if not isinstance(config.get("tie_word_embeddings", False), bool):
        problems.append(f"tie_word_embeddings is {shown(config['tie_word_embeddings'])}, expected true or false")
    dropout = config.get("attention_dropout") or 0.0
    if not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        problems.append(f"attention_dropout is {shown(dropout)}, expected a number from 0 to below 1")
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
        rows = max(config["intermediate_size"], heads * (config.get("head_dim") or hidden // heads))
        if hidden * rows > _MAX_WEIGHTS or hidden * config["vocab_size"] > _MAX_EMBEDDING:
            problems.append(
                f"a linear has {hidden * rows:,} weights and the embedding {hidden * config['vocab_size']:,}, expected at most "
                f"{_MAX_WEIGHTS:,} and {_MAX_EMBEDDING:,}"
            )
    return problems


_MAX_LAYERS, _MAX_SIZE, _MAX_NUMBER = 10_000, 2**27, 1e30
_MAX_WEIGHTS, _MAX_EMBEDDING = 2**31 - 1, 2**36
"""Of one matrix: JAX counts a linear's weights in 32 bits. Llama 3.1 405B's have 872 million, its embedding 2.1 billion."""
_REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_ONLY: dict[str, tuple[Any, ...]] = {
    "model_type": ("llama",),
    "hidden_act": ("silu", "swish"),  # two names of one function
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "is_causal": (True, None),
}
"""Keys that change the mathematics → what is supported. Those that change none in transformers' Llama, such as `pretraining_tp`, which cuts
products into slices and adds these up, are in no list."""


def _is_no_window(window: Any, config: Mapping[str, Any]) -> bool:
    positions = config.get("max_position_embeddings")
    wide = isinstance(window, int) and isinstance(positions, int) and window >= positions
    return wide or config.get("use_sliding_window") is False


_IGNORED: dict[str, Callable[[Any, Mapping[str, Any]], bool]] = {
    "sliding_window": _is_no_window,
    "layer_types": lambda types, _: isinstance(types, list) and all(kind == "full_attention" for kind in types),
    "partial_rotary_factor": lambda factor, _: factor == 1,
    "logit_softcapping": lambda cap, _: False,
    "num_local_experts": lambda number, _: False,
}
"""Keys of other models that transformers ignores in a Llama, as no Llama has them: refused, unless they say what a Llama does anyway."""


def _is_plain_rope(scaling: Any) -> bool:
    """Whether positions are rotated as without any scaling."""
    if not isinstance(scaling, dict):
        return False
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    return kind == "default" or (kind in ("linear", "llama3") and scaling.get("factor") == 1)
