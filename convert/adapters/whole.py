"""Tensors of the base that an adapter stores whole: the names PEFT gives each, which of them counts, and whether copies agree.

A module that is in `modules_to_save` is written as `X.weight`. With `save_embedding_layers`, which PEFT sets itself where the vocabulary
was resized, the embedding and the head are written as they stand in its model too:

    X.weight                    what counts, of a module in modules_to_save; else the base's, which PEFT loads
    X.modules_to_save.weight    the same again
    X.original_module.weight    the base's before training: loaded, and never used
    X.base_layer.weight         the base's beside a LoRA adapter: what the adapter is added to
    X.token_adapter.…           the same beside rows that were trained one by one (trainable_token_indices)
"""

import dataclasses
from collections.abc import Mapping, Set

from convert.adapters.config import AdapterConfig, Target
from convert.files.names import Names
from convert.files.names import Target as Key
from convert.files.shapes import tensor_shapes
from qlora_jax.model.architecture import Architecture


@dataclasses.dataclass(frozen=True, kw_only=True)
class Whole:
    """The names under which an adapter's file may hold one tensor of the base."""

    key: str
    """Of the values that count."""
    is_required: bool = False
    copies: tuple[str, ...] = ()
    """Of the same values again."""
    unused: tuple[str, ...] = ()

    @property
    def keys(self) -> tuple[str, ...]:
        """All of them."""
        return (self.key, *self.copies, *self.unused)


def saveable(config: Architecture) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors that an adapter may store whole, by Hugging Face's names; a tied head too has one."""
    shapes, names = tensor_shapes(config), Names.of(config)
    return {**shapes, names.lm_head: shapes[names.embedding]}


def whole_tensors(
    settings: AdapterConfig, targets: Mapping[Key, Target], config: Architecture, found: Set[str]
) -> dict[str, Whole]:
    """Hugging Face's name of each tensor that the adapter must or may store whole → what it is called in the file.

    Args:
        found: the names in the file.
    """
    names = Names.of(config)
    tokens, wholes = settings.token_ids(names), {}
    tied = config.tie_word_embeddings and settings.ties
    for tensor in saveable(config):
        saved, is_head = names.saved(tensor), tensor == names.lm_head
        copies, unused = (names.trained_copy(tensor),), (names.untrained_copy(tensor),)
        if settings.saved(names.in_modules(tensor)) and not (
            is_head and config.tie_word_embeddings and saved not in found
        ):
            wholes[tensor] = Whole(key=saved, is_required=True, copies=copies, unused=unused)
        elif is_head and tied and settings.saved(names.in_modules(names.embedding)):
            wholes[tensor] = Whole(key=saved, copies=copies, unused=unused)
        elif names.parse_target(tensor) in targets or (is_head and tied and (None, "embed_tokens") in targets):
            if tensor in names.vocabulary.values():
                base = names.stored_base(tensor)
                wholes[tensor] = Whole(key=base if base in found else saved)  # before 0.6.2 PEFT knew but one name
        elif tensor in tokens or (is_head and config.tie_word_embeddings and names.embedding in tokens):
            wholes[tensor] = Whole(key=names.token_base(tensor))
        elif tensor in names.vocabulary.values():
            wholes[tensor] = Whole(key=saved)
    return wholes
