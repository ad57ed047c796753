"""One table of names for both directions: ours ↔ Hugging Face's ↔ PEFT's."""

import re

from qlora_jax.model.architecture import LINEAR_PATHS

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
LM_HEAD = "lm_head.weight"
NORM_NAMES = ("input_layernorm", "post_attention_layernorm")

MODULES = LINEAR_PATHS
"""A linear's name in our decoder layer → its path in Hugging Face's."""

VOCABULARY = {"embed_tokens": EMBEDDING, "lm_head": LM_HEAD}
"""What else an adapter may change, outside the layers: PEFT's name for it → the tensor."""

Target = tuple[int | None, str]
"""A weight that an adapter may change: layer and our name, or None and one of `VOCABULARY`."""

ADAPTER_PARTS = {"lora_a": "lora_A", "lora_b": "lora_B"}
"""Ours → PEFT's; shapes agree: A [r, in], B [out, r]. The embedding's are A [r, vocabulary] and B [hidden, r]."""

_OURS_BY_MODULE = {module: name for name, module in MODULES.items()}
_OURS_BY_PART = {part: name for name, part in ADAPTER_PARTS.items()}
_LINEAR = re.compile(r"model\.layers\.(\d+)\.(\w+\.\w+)\.weight")
_ADAPTER = re.compile(r"base_model\.model\.model\.layers\.(\d+)\.(\w+\.\w+)\.(lora_[AB])\.weight")
_SAVED = "base_model.model."
_IGNORED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")


def linear(layer: int, name: str) -> str:
    """Hugging Face's tensor name of a linear's weight."""
    return f"model.layers.{layer}.{MODULES[name]}.weight"


def norm(layer: int, name: str) -> str:
    """Hugging Face's tensor name of a layer norm's weight."""
    return f"model.layers.{layer}.{name}.weight"


def parse_linear(tensor: str) -> tuple[int, str] | None:
    """The inverse of `linear`: (layer, our name), or None for a tensor that is not a decoder layer's linear."""
    match = _LINEAR.fullmatch(tensor)
    return (int(match[1]), _OURS_BY_MODULE[match[2]]) if match and match[2] in _OURS_BY_MODULE else None


def target(layer: int | None, name: str) -> str:
    """Hugging Face's tensor name of a weight that an adapter may change."""
    return VOCABULARY[name] if layer is None else linear(layer, name)


def parse_target(tensor: str) -> Target | None:
    """The inverse of `target`, or None for a tensor that no adapter changes."""
    found = [name for name, of_vocabulary in VOCABULARY.items() if of_vocabulary == tensor]
    return (None, found[0]) if found else parse_linear(tensor)


def adapter(layer: int | None, name: str, part: str) -> str:
    """PEFT's tensor name; `part` is `lora_a` or `lora_b`."""
    module = _SAVED + target(layer, name).removesuffix(".weight")
    if name == "embed_tokens":
        return f"{module}.{ADAPTER_PARTS[part].replace('_', '_embedding_')}"
    return f"{module}.{ADAPTER_PARTS[part]}.weight"


def parse_adapter(tensor: str) -> tuple[int, str, str] | None:
    """The inverse of `adapter`: (layer, our name, part), or None for a name that is not of that form."""
    match = _ADAPTER.fullmatch(tensor)
    return (
        (int(match[1]), _OURS_BY_MODULE[match[2]], _OURS_BY_PART[match[3]])
        if match and match[2] in _OURS_BY_MODULE
        else None
    )


def magnitude(layer: int | None, name: str) -> str:
    """PEFT's name of a linear's DoRA magnitudes."""
    return f"{_SAVED}{target(layer, name).removesuffix('.weight')}.lora_magnitude_vector"


def stored_base(tensor: str) -> str:
    """PEFT's name of a copy of the base's tensor, beside whose adapter it is stored: of an adapted embedding or head."""
    return _beside(tensor, "base_layer.weight")


def trained_copy(tensor: str) -> str:
    """PEFT's second name of a tensor that is in modules_to_save, which it writes with `save_embedding_layers`."""
    return _beside(tensor, "modules_to_save.weight")


def untrained_copy(tensor: str) -> str:
    """PEFT's name of the base's tensor that one in modules_to_save took the place of: nothing uses it."""
    return _beside(tensor, "original_module.weight")


def token_rows(tensor: str) -> str:
    """PEFT's name of the rows of an embedding or head that were trained one by one (trainable_token_indices)."""
    return _beside(tensor, "token_adapter.trainable_tokens_delta")


def token_base(tensor: str) -> str:
    """PEFT's name of a copy of the base's tensor, some rows of which were trained one by one."""
    return _beside(tensor, "token_adapter.base_layer.weight")


def _beside(tensor: str, name: str) -> str:
    return f"{_SAVED}{tensor.removesuffix('weight')}{name}"


def velora(layer: int | None, name: str) -> str:
    """PEFT's name of what VeLoRA's gradients are computed with."""
    return f"{_SAVED}{target(layer, name).removesuffix('.weight')}.lora_velora_embed"


def saved(tensor: str) -> str:
    """PEFT's name of a tensor of the base that an adapter stores whole, from Hugging Face's."""
    return _SAVED + tensor


def parse_saved(tensor: str) -> str:
    """The inverse of `saved`: a name that is not of that form comes back as it is."""
    return tensor.removeprefix(_SAVED)


def is_ignored(tensor: str) -> bool:
    """Tensors that old checkpoints carry and no model reads: rotary frequencies, which follow from the config."""
    return _IGNORED.fullmatch(tensor) is not None
