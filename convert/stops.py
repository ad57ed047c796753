"""Where a turn ends: the one set of token ids at which sampling, `generate` and every exported folder stop.

It comes from three places, because none of them is enough: the tokenizer's EOS; what the model's generation config stops at (or, where it
has none, its `config.json`, as transformers reads them); and the tokens that end the assistant's turn in the chat template in use. A base
model whose EOS is `<|endoftext|>`, trained on a template that ends turns with `<|im_end|>`, never writes the first.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from convert.files.companions import CHAT_TEMPLATE, GENERATION_CONFIG, Files, as_files, is_tokenizer_s, tokenizer_files
from convert.files.folder import ModelFolder
from convert.files.stated import text_keys
from convert.model import load_tokenizer
from qlora_jax.base.errors import InputError
from qlora_jax.base.reading import kind_of, read_json
from qlora_jax.config.data import DataSettings
from qlora_jax.data import ChatTemplate, Layout, check_rows, end_ids, make_recipe
from qlora_jax.data.chat import codec
from qlora_jax.data.chat.templates import own_template, read_template

STATED = ("bos_token_id", "eos_token_id", "pad_token_id")
"""What transformers takes from a `config.json` where there is no generation config."""
SHOWN = 60
"""Characters of a prompt in a message."""


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """How one talks to a model."""

    tokenizer: PreTrainedTokenizerBase
    template: ChatTemplate | None
    """What writes a user's message; None for a model that only continues texts."""
    stop_ids: tuple[int, ...]

    def prompt_ids(self, prompt: str, vocab_size: int) -> list[int]:
        """A user's message as token ids, up to where the assistant is to speak; plain text without a template.

        Raises:
            InputError: the embedding, of `vocab_size` rows, has none for one of them.
        """
        input_ids = codec.prompt_ids(self.tokenizer, prompt, None if self.template is None else self.template.text)
        check_rows(input_ids, vocab_size, self.tokenizer, f"the prompt {prompt[:SHOWN]!r}")
        return input_ids


def open_conversation(
    folder: ModelFolder,
    tokenizer: PreTrainedTokenizerBase,
    vocab_size: int,
    *,
    adapter: Path | None = None,
    template: ChatTemplate | None = None,
) -> Conversation:
    """The model's own tokenizer, template and stop ids, but the adapter's where it brings some along, which it was trained with.

    Args:
        template: in place of either's.

    Raises:
        InputError: one of these files is damaged.
    """
    if adapter is not None and tokenizer_files(adapter):
        tokenizer = load_tokenizer(adapter)
    template = template or template_of(tokenizer, adapter)
    stops = stop_ids(trained_generation(folder, adapter), tokenizer, template, vocab_size)
    return Conversation(tokenizer=tokenizer, template=template, stop_ids=stops)


def generation_config(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """A folder's generation config; where it has none, what its `config.json` says of one.

    Raises:
        InputError: it is damaged, or its `eos_token_id` is no token id or list of them.
    """
    path = folder / GENERATION_CONFIG
    stated = text_keys(config)
    settings: Any = {key: stated[key] for key in STATED if stated.get(key) is not None}
    if kind_of(path) != "nothing":
        settings = read_json(path, fix="fetch the model again, or remove this file")
    eos = settings.get("eos_token_id") if isinstance(settings, dict) else settings
    if not isinstance(settings, dict) or not all(type(token) is int for token in _listed(eos)):
        found = f"eos_token_id {eos!r}" if isinstance(settings, dict) else f"a JSON {type(settings).__name__}"
        raise InputError(
            path, found=found, expected="a JSON object, and in it eos_token_id as a number or a list of them"
        )
    return settings


def stop_ids(
    generation: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, template: ChatTemplate | None, vocab_size: int
) -> tuple[int, ...]:
    """The token ids that end an answer, each once: the generation config's, the tokenizer's, the template's.

    Without those that the model has no row for, which it can never write.

    Args:
        generation: see `generation_config`.
        template: which writes conversations; None where there is none.
    """
    found = [*_listed(generation.get("eos_token_id")), *_listed(tokenizer.eos_token_id)]
    if template is not None and tokenizer.is_fast:
        found += end_ids(make_recipe(tokenizer, Layout("chat"), DataSettings(path="a probe"), template))
    return tuple(dict.fromkeys(token for token in found if 0 <= token < vocab_size))


def with_stops(generation: Mapping[str, Any], stops: tuple[int, ...]) -> dict[str, Any]:
    """A generation config that stops there: one id as a number, several as a list."""
    return {**generation, "eos_token_id": stops[0] if len(stops) == 1 else list(stops)} if stops else dict(generation)


def as_json(generation: Mapping[str, Any]) -> bytes:
    """The file's bytes."""
    return json.dumps(generation, indent=2, ensure_ascii=False).encode() + b"\n"


def template_of(tokenizer: PreTrainedTokenizerBase, adapter: Path | None = None) -> ChatTemplate | None:
    """The chat template that writes conversations: the adapter's, which it was trained with, or the tokenizer's own, or None.

    Raises:
        InputError: the adapter's cannot be read, or the tokenizer has several and no default.
    """
    if adapter is not None and (adapter / CHAT_TEMPLATE).is_file():
        return ChatTemplate(read_template(adapter / CHAT_TEMPLATE), CHAT_TEMPLATE, is_own=False)
    return own_template(tokenizer) if tokenizer.chat_template else None


def trained_generation(folder: ModelFolder, adapter: Path | None) -> dict[str, Any]:
    """The generation config that an adapter brings along, or else its base's.

    Raises:
        InputError: as `generation_config`.
    """
    if adapter is not None and (adapter / GENERATION_CONFIG).is_file():
        return generation_config(adapter, folder.config)
    return generation_config(folder.path, folder.config)


def merged_companions(
    folder: ModelFolder, adapter: Path, vocab_size: int, log: Callable[[str], object] = lambda line: None
) -> Files:
    """What goes along with a merged model: the base's companions, but the adapter's tokenizer and chat template where it brings some.

    The generation config stops where the adapter learned to stop; it is the base's (or the adapter's), byte for byte, if that says so
    already.

    Args:
        log: told, in a line, what could not be found out.

    Raises:
        InputError: a generation config is damaged.
    """
    files = as_files(folder.path)
    if brought := tokenizer_files(adapter):
        files = {name: file for name, file in files.items() if not is_tokenizer_s(name)} | brought
    files |= {name: adapter / name for name in (CHAT_TEMPLATE, GENERATION_CONFIG) if (adapter / name).is_file()}
    generation = trained_generation(folder, adapter)
    try:
        tokenizer = load_tokenizer(adapter if brought else folder.path)
        stops = stop_ids(generation, tokenizer, template_of(tokenizer, adapter), vocab_size)
    except InputError as error:
        log(f"where a turn ends is what {GENERATION_CONFIG} says: {error.where}: {error.found}")
        return files
    if stops and set(_listed(generation.get("eos_token_id"))) != set(stops):
        files[GENERATION_CONFIG] = as_json(with_stops(generation, stops))
    return files


def _listed(value: Any) -> list[Any]:
    return [] if value is None else list(value) if isinstance(value, list | tuple) else [value]
