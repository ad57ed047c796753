"""The facts of a model that decide its mathematics and its names, as records; `families` reads them from a `config.json`."""

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True, kw_only=True)
class Linear:
    """A linear of a decoder layer, as model files and PEFT name it."""

    name: str
    """The last part of its path, which `lora.target_modules` says: `q_proj`, `qkv_proj`, `c_fc`."""
    path: str
    """Its place below the layer: `self_attn.q_proj`."""
    shape: tuple[int, int]
    """(out, in)."""
    bias: bool = False
    """Whether a frozen bias [out] is added."""
    parts: tuple[int, ...] = ()
    """Rows of each part of a fused linear, in order: (H·P, K·P, K·P) of `qkv_proj`; empty for one that is not fused."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rope:
    """Rotary position embedding of a kind of layers: angles are position · frequency."""

    frequencies: tuple[float, ...]
    """One a pair of features, float32 numbers. The first 2·len features of a head are rotated, the others pass."""
    scale: float = 1.0
    """Factor on cos and sin."""
    interleaved: bool = False
    """Whether pairs are (2i, 2i + 1); otherwise (i, i + half)."""
    long: tuple[float, ...] | None = None
    """The frequencies where a micro-batch's last position is `original` or beyond (longrope)."""
    original: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kind:
    """Facts that may differ from layer to layer along the walk. Layers of equal kinds share their compiled functions."""

    window: int | None = None
    """Keys that a query sees, itself included; None for all before it."""
    rope: Rope | None = None
    """None where positions are not rotated (NoPE)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Norms:
    """A model's norms of its hidden states, and where a layer has them: each name is the module's in model files, None is no norm."""

    eps: float
    centred: bool = False
    """Whether the mean is taken off first (layer norm); otherwise RMSNorm."""
    late: bool = False
    """Whether the weight multiplies in float32, before the one rounding; it is then kept in float32."""
    offset: float = 0.0
    """Added to the file's weight when it is loaded: 1 for Gemma."""
    bias: bool = False
    before_attention: str | None = "input_layernorm"
    after_attention: str | None = None
    before_mlp: str | None = "post_attention_layernorm"
    after_mlp: str | None = None

    @property
    def is_float32(self) -> bool:
        """Whether weights are kept in float32: those that multiply in it, and sums with an offset."""
        return self.late or self.offset != 0

    @property
    def names(self) -> tuple[str, ...]:
        """The norms that a layer has, in the order in which they are applied."""
        places = (self.before_attention, self.after_attention, self.before_mlp, self.after_mlp)
        return tuple(name for name in places if name is not None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class QKNorm:
    """A norm of queries and keys; its eps, offset and rounding are those of `Norms`, unless it says otherwise."""

    over: Literal["head", "width", "heads"]
    """head: each head's P features, one weight [P]; width: all heads' features, a weight [H·P]; heads: each head by its own, [H, P]."""
    after_rope: bool = False
    names: tuple[str, str] = ("q_norm", "k_norm")
    """Modules below `self_attn`."""


XIELU = {"alpha_p": (1,), "alpha_n": (1,), "beta": (), "eps": ()}
"""Shapes of the numbers that a layer with `xielu` has in model files, below `mlp.act_fn`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
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
    kinds: tuple[Kind, ...]
    """Each layer's kind, first to last."""
    norms: Norms
    attention_inputs: tuple[Linear, ...]
    """Linears of attention's input: queries, keys and values, or one that is all three."""
    attention_output: Linear
    """The linear of what attention gives."""
    mlp_inputs: tuple[Linear, ...]
    """Linears of the MLP's input, the gate first; one if they are fused, or if there is no gate."""
    mlp_output: Linear
    tie_word_embeddings: bool = False
    model_type: str = "llama"
    attention_scale: float
    """Factor on q·kᵀ."""
    attention_softcap: float | None = None
    """c of c·tanh(score / c)."""
    qk_norm: QKNorm | None = None
    activation: Literal["silu", "gelu", "gelu_tanh", "relu2", "xielu"] = "silu"
    gated: bool = True
    parallel: bool = False
    """Whether attention and MLP read the same normed input, and both are added to the hidden states (Cohere)."""
    embed_scale: float = 1.0
    embed_scale_rounded: bool = False
    """Whether the factor is rounded to the compute dtype first (Gemma)."""
    noise_scale: float = 1.0
    """Factor on NEFTune's noise: `embed_scale` where transformers adds it to embeddings before they are scaled (Granite)."""
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    layers_prefix: str = "model.layers"
    """The layers' place in model files; the embedding and the final norm are beside them."""
    modules_prefix: str = "model.layers"
    """Their place in the modules that `AutoModelForCausalLM` gives, by which PEFT names what it adapts."""
    max_length: int | None = None
    """The longest row for which these facts hold, where the family computes longer ones otherwise: `dynamic` rope beyond its positions."""
    attention_dropout: float = 0.0
    """Dropout of attention weights in training, which `train.py` refuses; no other command computes with it."""
    other_dropouts: tuple[tuple[str, float], ...] = ()
    """Keys and rates of dropout elsewhere in training, of which the same holds."""
    dropouts_are_left_out: bool = False
    """Whether these dropouts are left out, and said to be, rather than refused: a family's default that fine-tuning does without."""

    @property
    def linears(self) -> dict[str, Linear]:
        """The linears of a decoder layer by name, in the order in which they are applied."""
        every = (*self.attention_inputs, self.attention_output, *self.mlp_inputs, self.mlp_output)
        return {linear.name: linear for linear in every}

    @property
    def dropout_inputs(self) -> tuple[str, ...]:
        """The first linear of each input that linears of a layer have: each input draws a dropout mask of its own."""
        firsts = (self.attention_inputs[0], self.attention_output, self.mlp_inputs[0], self.mlp_output)
        return tuple(linear.name for linear in firsts)

    def qk_norm_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the weights of the norms of queries and keys, by module; empty where there are none."""
        if self.qk_norm is None:
            return {}
        shapes = {}
        for name, heads in zip(self.qk_norm.names, (self.num_attention_heads, self.num_key_value_heads), strict=True):
            by_kind = {"head": (self.head_dim,), "width": (heads * self.head_dim,), "heads": (heads, self.head_dim)}
            shapes[name] = by_kind[self.qk_norm.over]
        return shapes

    def rotates_whole_heads(self, rope: Rope) -> bool:
        """Whether queries and keys are rotated as they leave their linears, whole heads by halves, and nothing else is done to them."""
        is_plain = self.qk_norm is None and not self.attention_inputs[0].parts
        return is_plain and not rope.interleaved and 2 * len(rope.frequencies) == self.head_dim

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
