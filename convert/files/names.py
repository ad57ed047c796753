"""One table of names for both directions: ours ↔ Hugging Face's ↔ PEFT's, for each architecture."""

import dataclasses
import functools
import re
from collections.abc import Iterable
from typing import Self

from qlora_jax.model.architecture import XIELU, Architecture

VOCABULARY = ("embed_tokens", "lm_head")
"""What else an adapter may change, outside the layers, under PEFT's names."""

Target = tuple[int | None, str]
"""A weight that an adapter may change: layer and our name, or None and one of `VOCABULARY`."""

ADAPTER_PARTS = {"lora_a": "lora_A", "lora_b": "lora_B"}
"""Ours → PEFT's; shapes agree: A [r, in], B [out, r]. The embedding's are A [r, vocabulary] and B [hidden, r]."""

_OURS_BY_PART = {part: name for name, part in ADAPTER_PARTS.items()}
_SAVED = "base_model.model."


@dataclasses.dataclass(frozen=True, kw_only=True)
class Names:
    """Names of the tensors of one architecture. A linear's "our name" is the last part of its path: `q_proj`."""

    root: str
    """Where model files have the embedding, the layers and the final norm: `model`."""
    module_root: str
    """Where the modules that `AutoModelForCausalLM` gives have them, by which PEFT names what it adapts."""
    paths: dict[str, str]
    """A linear's name → its path below the layer, in the order in which they are applied."""
    biased: frozenset[str]
    """The linears that have a bias."""
    norms: tuple[str, ...]
    """The norms of the hidden states, in the order in which they are applied."""
    norm_parts: tuple[str, ...] = ("weight",)
    """The parts of such a norm: a weight, perhaps a bias."""
    qk_norms: tuple[str, ...] = ()
    """The norms of queries and keys, if there are any."""
    activation: tuple[str, ...] = ()
    """Tensors of the activation function, if it has any."""

    @classmethod
    def of(cls, config: Architecture) -> Self:
        """The names of an architecture's tensors."""
        return cls(
            root=config.layers_prefix.removesuffix(".layers"),
            module_root=config.modules_prefix.removesuffix(".layers"),
            paths={name: linear.path for name, linear in config.linears.items()},
            biased=frozenset(name for name, linear in config.linears.items() if linear.bias),
            norms=config.norms.names,
            norm_parts=("weight", "bias") if config.norms.bias else ("weight",),
            qk_norms=() if config.qk_norm is None else config.qk_norm.names,
            activation=tuple(XIELU) if config.activation == "xielu" else (),
        )

    @property
    def is_part(self) -> bool:
        """Whether the text model is a part of what `AutoModelForCausalLM` gives, beside a vision tower."""
        return self.module_root != "model"

    def pattern(self, linears: Iterable[str]) -> str:
        """A regular expression that matches the paths of the text model's linears so named, and nothing else's."""
        paths = "|".join(re.escape(self.paths[name]) for name in linears)
        return rf"{re.escape(self.module_root)}\.layers\.\d+\.({paths})"

    @property
    def embedding(self) -> str:
        """Hugging Face's tensor name of the embedding."""
        return f"{self.root}.embed_tokens.weight"

    @property
    def final_norm(self) -> str:
        """Hugging Face's tensor name of the weight of the norm before the head."""
        return self.final_norm_part("weight")

    @property
    def lm_head(self) -> str:
        """Hugging Face's tensor name of the head: beside the text model, wherever that is."""
        around, _, text_model = self.root.rpartition(".")
        return f"{around}.lm_head.weight" if around and text_model == "model" else "lm_head.weight"

    @property
    def vocabulary(self) -> dict[str, str]:
        """PEFT's name of what an adapter may change outside the layers → the tensor."""
        return dict(zip(VOCABULARY, (self.embedding, self.lm_head), strict=True))

    def linear(self, layer: int, name: str) -> str:
        """Hugging Face's tensor name of a linear's weight."""
        return f"{self._layer(layer)}.{self.paths[name]}.weight"

    def bias(self, layer: int, name: str) -> str:
        """Hugging Face's tensor name of a linear's bias."""
        return f"{self._layer(layer)}.{self.paths[name]}.bias"

    def norm(self, layer: int, name: str, part: str = "weight") -> str:
        """Hugging Face's tensor name of a layer norm's weight or bias."""
        return f"{self._layer(layer)}.{name}.{part}"

    def qk_norm(self, layer: int, name: str) -> str:
        """Hugging Face's tensor name of the weight of a norm of queries or keys."""
        return f"{self._layer(layer)}.self_attn.{name}.weight"

    def act_fn(self, layer: int, name: str) -> str:
        """Hugging Face's tensor name of a number of the activation function."""
        return f"{self._layer(layer)}.mlp.act_fn.{name}"

    def final_norm_part(self, part: str) -> str:
        """Hugging Face's tensor name of the weight or bias of the norm before the head."""
        return f"{self.root}.norm.{part}"

    def parse_linear(self, tensor: str) -> tuple[int, str] | None:
        """The inverse of `linear`: (layer, our name), or None for a tensor that is not a decoder layer's linear."""
        match = self._linear_pattern.fullmatch(tensor)
        return (int(match[1]), self._by_path[match[2]]) if match and match[2] in self._by_path else None

    def target(self, layer: int | None, name: str) -> str:
        """Hugging Face's tensor name of a weight that an adapter may change."""
        return self.vocabulary[name] if layer is None else self.linear(layer, name)

    def parse_target(self, tensor: str) -> Target | None:
        """The inverse of `target`, or None for a tensor that no adapter changes."""
        found = [name for name, of_vocabulary in self.vocabulary.items() if of_vocabulary == tensor]
        return (None, found[0]) if found else self.parse_linear(tensor)

    def module(self, layer: int | None, name: str) -> str:
        """The path of a module that an adapter may change, by which PEFT's rules find it."""
        return self.in_modules(self.target(layer, name)).removesuffix(".weight")

    def in_modules(self, tensor: str) -> str:
        """The name that a tensor of the model's files has in the modules that `AutoModelForCausalLM` gives."""
        if tensor == self.lm_head:
            return "lm_head.weight"
        if tensor.startswith(f"{self.root}."):
            return self.module_root + tensor.removeprefix(self.root)
        return tensor

    def adapter(self, layer: int | None, name: str, part: str) -> str:
        """PEFT's tensor name; `part` is `lora_a` or `lora_b`."""
        module = _SAVED + self.module(layer, name)
        if name == "embed_tokens":
            return f"{module}.{ADAPTER_PARTS[part].replace('_', '_embedding_')}"
        return f"{module}.{ADAPTER_PARTS[part]}.weight"

    def parse_adapter(self, tensor: str) -> tuple[int, str, str] | None:
        """The inverse of `adapter`: (layer, our name, part), or None for a name that is not of that form."""
        match = self._adapter_pattern.fullmatch(tensor)
        return (
            (int(match[1]), self._by_path[match[2]], _OURS_BY_PART[match[3]])
            if match and match[2] in self._by_path
            else None
        )

    def magnitude(self, layer: int | None, name: str) -> str:
        """PEFT's name of a linear's DoRA magnitudes."""
        return f"{_SAVED}{self.module(layer, name)}.lora_magnitude_vector"

    def stored_base(self, tensor: str) -> str:
        """PEFT's name of a copy of the base's tensor, beside whose adapter it is stored: of an adapted embedding or head."""
        return self._beside(tensor, "base_layer.")

    def trained_copy(self, tensor: str) -> str:
        """PEFT's second name of a tensor that is in modules_to_save, which it writes with `save_embedding_layers`."""
        return self._beside(tensor, "modules_to_save.")

    def untrained_copy(self, tensor: str) -> str:
        """PEFT's name of the base's tensor that one in modules_to_save took the place of: nothing uses it."""
        return self._beside(tensor, "original_module.")

    def token_rows(self, tensor: str) -> str:
        """PEFT's name of the rows of an embedding or head that were trained one by one (trainable_token_indices)."""
        return self._beside(tensor, "token_adapter.").removesuffix("weight") + "trainable_tokens_delta"

    def token_base(self, tensor: str) -> str:
        """PEFT's name of a copy of the base's tensor, some rows of which were trained one by one."""
        return self._beside(tensor, "token_adapter.base_layer.")

    def velora(self, layer: int | None, name: str) -> str:
        """PEFT's name of what VeLoRA's gradients are computed with."""
        return f"{_SAVED}{self.module(layer, name)}.lora_velora_embed"

    def saved(self, tensor: str) -> str:
        """PEFT's name of a tensor of the base that an adapter stores whole, from Hugging Face's."""
        return _SAVED + self.in_modules(tensor)

    def is_ignored(self, tensor: str) -> bool:
        """Whether a tensor is one that old checkpoints carry and no model reads: rotary frequencies, which follow from the config."""
        return self._ignored_pattern.fullmatch(tensor) is not None

    def is_beside(self, tensor: str) -> bool:
        """Whether a tensor of a model's files is no part of its text model: of a vision tower, in files whose text model is a part."""
        around = self.root.rpartition(".")[0]
        return bool(around) and tensor != self.lm_head and not tensor.startswith(f"{self.root}.")

    def _layer(self, layer: int) -> str:
        return f"{self.root}.layers.{layer}"

    def _beside(self, tensor: str, name: str) -> str:
        module, _, leaf = self.saved(tensor).rpartition(".")
        return f"{module}.{name}{leaf}"

    @functools.cached_property
    def _by_path(self) -> dict[str, str]:
        return {path: name for name, path in self.paths.items()}

    @functools.cached_property
    def _linear_pattern(self) -> re.Pattern[str]:
        return re.compile(rf"{re.escape(self.root)}\.layers\.(\d+)\.(\w+\.\w+)\.weight")

    @functools.cached_property
    def _adapter_pattern(self) -> re.Pattern[str]:
        return re.compile(rf"{re.escape(_SAVED + self.module_root)}\.layers\.(\d+)\.(\w+\.\w+)\.(lora_[AB])\.weight")

    @functools.cached_property
    def _ignored_pattern(self) -> re.Pattern[str]:
        return re.compile(rf"{re.escape(self.root)}\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")


def is_saved(name: str) -> bool:
    """Whether a name in an adapter's file has the form that PEFT writes."""
    return name.startswith(_SAVED)
