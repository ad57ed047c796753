"""A family's row, and what of an `Architecture` follows from a row and a config: linears and kinds."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from qlora_jax.model.architecture import ATTENTION_INPUTS, ATTENTION_OUTPUT, LINEAR_PATHS, MLP_LINEARS, Kind, Linear
from qlora_jax.model.layer_types import FULL, SLIDING, full
from qlora_jax.model.rope import Scaling, rope_of
from qlora_jax.model.rope_config import RopeRules

Config = Mapping[str, Any]
"""A `config.json`, with the family's defaults for keys that it lacks."""
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """A family: what distinguishes its configs and mathematics from the others'."""

    model_type: str
    defaults: Config
    """Values of keys that a config lacks."""
    sizes: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """Sizes of a config that lacks them, where files that do are known; elsewhere they are required."""
    reads: tuple[str, ...] = ()
    """Keys that are read, besides those that have a default, name a bias, or are every family's."""
    only: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)
    """Keys of which transformers reads none, but which say what it computes: the values that say so."""
    neutral: tuple[str, ...] = ()
    """Keys that change nothing, besides those of every family."""
    eps: str = "rms_norm_eps"
    """The key of the norms' eps."""
    activation_key: str = "hidden_act"
    activations: Mapping[str, str] = dataclasses.field(default_factory=lambda: {"silu": "silu", "swish": "silu"})
    """Supported values of that key → an `Architecture`'s."""
    null_head_dim: bool = False
    """Whether a `head_dim` of null is hidden_size / num_attention_heads, rather than damage."""
    heads_fill_width: bool = False
    """Whether heads · head_dim must be hidden_size."""
    biases: Mapping[str, str | bool] = dataclasses.field(default_factory=dict)
    """Linears that may have a bias → the key that says so, or True."""
    fused: tuple[str, ...] = ()
    """`qkv_proj`, `gate_up_proj`: the linears that are one in files."""
    names: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Llama's names of linears → the family's, where they differ."""
    norms: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Fields of `Norms`."""
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Fields of `Architecture` that no key changes."""
    facts: Callable[[Config], dict[str, Any]] = lambda config: {}
    """Fields of `Architecture` that keys of this family change; `norms` as fields of `Norms`."""
    rope: RopeRules = dataclasses.field(default_factory=RopeRules)
    types: Callable[[Config], list[str]] = full
    """Each layer's type, under transformers' names."""
    full_are_rotated: Callable[[Config], bool] = lambda config: True
    """Whether layers of full attention have rope, rather than none."""
    dropouts: tuple[str, ...] = ("attention_dropout",)
    """Keys of dropout in training."""
    dropouts_are_left_out: bool = False
    """Whether fine-tuning leaves these out, as the class has them by default and nobody trains with them."""

    @property
    def keys_read(self) -> frozenset[str]:
        """Every key that this family's facts come from."""
        biases = [key for key in self.biases.values() if isinstance(key, str)]
        types = () if self.types is full else ("layer_types", "sliding_window")
        own = (*self.defaults, *self.reads, *biases, *types, *self.dropouts, self.eps, self.activation_key)
        return frozenset((*_EVERY_FAMILY_S, *own))


def derived(base: Family, model_type: str, *, defaults: Config | None = None, **changes: Any) -> Family:
    """A family like `base`; a default that is given replaces the base's of that key."""
    renamed = [getattr(base, field) for field in ("eps", "activation_key") if field in changes]
    kept = {key: value for key, value in base.defaults.items() if key not in renamed}
    changes = {"null_head_dim": False, **changes}
    return dataclasses.replace(base, model_type=model_type, defaults={**kept, **(defaults or {})}, **changes)


def linears_of(family: Family, config: Config, heads: int, kv_heads: int, head_dim: int) -> dict[str, Any]:
    """The fields of an `Architecture` that are linears."""
    hidden, mlp = config["hidden_size"], config["intermediate_size"]
    queries, keys = heads * head_dim, kv_heads * head_dim
    rows = dict(zip(ATTENTION_INPUTS, (queries, keys, keys), strict=True))

    def linear(name: str, out: int, width: int, parts: Sequence[int] = (), room: str = "") -> Linear:
        key = family.biases.get(name, False)
        own = family.names.get(name, name)
        path = f"{room or LINEAR_PATHS[name].partition('.')[0]}.{own}"
        has_bias = bool(config.get(key)) if isinstance(key, str) else key
        return Linear(name=own, path=path, shape=(out, width), bias=has_bias, parts=tuple(parts))

    if "qkv_proj" in family.fused:
        inputs = (linear("qkv_proj", sum(rows.values()), hidden, list(rows.values()), "self_attn"),)
    else:
        inputs = tuple(linear(name, out, hidden) for name, out in rows.items())
    gate, up, down = MLP_LINEARS
    if "gate_up_proj" in family.fused:
        mlp_inputs = (linear("gate_up_proj", 2 * mlp, hidden, (mlp, mlp), "mlp"),)
    else:
        mlp_inputs = tuple(
            linear(name, mlp, hidden) for name in ((gate, up) if family.fixed.get("gated", True) else (up,))
        )
    return {
        "attention_inputs": inputs,
        "attention_output": linear(ATTENTION_OUTPUT, hidden, queries),
        "mlp_inputs": mlp_inputs,
        "mlp_output": linear(down, hidden, mlp),
    }


def kinds_of(family: Family, config: Config, scalings: Mapping[str, Scaling | None]) -> tuple[Kind, ...]:
    """Each layer's kind; layers of equal kinds are given the same object."""
    layers = config["num_hidden_layers"]
    ropes = {kind: rope_of(scaling, family.rope.interleaved) if scaling else None for kind, scaling in scalings.items()}
    if not family.full_are_rotated(config):
        ropes[FULL] = None
    window = {FULL: None, SLIDING: config.get("sliding_window")}
    rotated = config.get("no_rope_layers") if "no_rope_layers" in family.reads else None  # 1 is a layer with rope
    if rotated is None:
        interval = config.get("no_rope_layer_interval") if "no_rope_layers" in family.reads else None
        rotated = [int(not interval or (i + 1) % interval != 0) for i in range(layers)]
    kinds: dict[tuple[str, bool], Kind] = {}
    return tuple(
        kinds.setdefault((kind, bool(turned)), Kind(window=window[kind], rope=ropes[kind] if turned else None))
        for kind, turned in zip(family.types(config), rotated, strict=True)
    )


_EVERY_FAMILY_S = (
    *SIZES,
    *("num_key_value_heads", "head_dim", "tie_word_embeddings", "rope_theta", "rope_scaling", "rope_parameters"),
    *("max_position_embeddings", "model_type"),
)
