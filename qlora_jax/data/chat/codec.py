"""A model's tokenizer and chat template for a prompt and its answer, asked in a child process: see `qlora_jax.base.bounded`.

The same as transformers' own `apply_chat_template`, `tokenizer(...)` and `decode`, which would run a model's programs in this process.
"""

import contextlib
import functools
import weakref
from collections.abc import Iterator, Sequence
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

import tokenizers

from qlora_jax.base import bounded
from qlora_jax.base.bounded import Program, ProgramError, explained
from qlora_jax.base.errors import InputError
from qlora_jax.base.reading import read_json, reading
from qlora_jax.data.chat.jinja import JinjaTemplate, RenderError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase  # slow to import, and children need none

TEMPLATE_FIX = "mend the template (chat_template.jinja, or chat_template in tokenizer_config.json), or take it out"
TOKENIZER_FIX = "fetch the model again, or take one with a sound tokenizer"


class Coder:
    """A fast tokenizer, made from `tokenizer.json`'s text. `coder(method, *arguments)` calls one of the methods below."""

    def __init__(self, text: str) -> None:
        self._tokenizer = tokenizers.Tokenizer.from_str(text)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    def __call__(self, method: str, *arguments: Any) -> Any:
        """What the method answers."""
        return getattr(self, method)(*arguments)

    def encode(self, text: str, special: bool) -> list[int]:
        """A text's ids, with the special tokens around it if `special`."""
        with reading("the prompt", "a text that the tokenizer cannot read", fix=TOKENIZER_FIX):
            return self._tokenizer.encode(text, add_special_tokens=special).ids

    def decode(self, rows: Sequence[Sequence[int]], skip_special: bool) -> list[str]:
        """The texts of several rows of ids."""
        with reading("tokens", "what the tokenizer cannot write", fix=TOKENIZER_FIX):
            return [self._tokenizer.decode(row, skip_special_tokens=skip_special) for row in rows]


MAX_TRIED, MAX_TRIED_LENGTH = 10_000, 1000
"""Texts of a tokenizer's own files that are tried, and the characters of one."""


def try_tokenizer(folder: str) -> None:
    """Use a folder's `tokenizer.json` on "x" and on its own files' texts, as loading it with transformers does.

    What it raises is left to transformers to say; whether it comes to an end is the question. For a child.
    """
    try:
        tokenizer = tokenizers.Tokenizer.from_file(f"{folder}/tokenizer.json")
        added = [token.content for token in tokenizer.get_added_tokens_decoder().values()]
        settings: list[Any] = []
        for name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
            with contextlib.suppress(InputError):
                settings.append(read_json(f"{folder}/{name}"))
        for text in islice(chain("x", added, _texts(settings)), MAX_TRIED):
            ids = tokenizer.encode(text[:MAX_TRIED_LENGTH]).ids
            tokenizer.decode(ids, skip_special_tokens=False)
    except MemoryError:
        raise
    except Exception:
        return


def _texts(value: Any) -> Iterator[str]:
    """Every text in a JSON value, keys too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in chain(value, value.values()) if isinstance(value, dict) else value:
            yield from _texts(inner)


def prompt_ids(tokenizer: "PreTrainedTokenizerBase", prompt: str, template: str | None) -> list[int]:
    """The ids of a user's message, through a chat template if there is one, up to where the assistant begins.

    Raises:
        InputError: the template or the tokenizer cannot do it, or takes too long or too much memory; or there is not one id.
    """
    name = _name(tokenizer)
    if template is not None:
        special_tokens = {key: str(value) for key, value in tokenizer.special_tokens_map.items()}
        asked = template, special_tokens, prompt, f"chat template of {name}"
        try:
            text = bounded.companion().ask(_written, *asked)
        except ProgramError as error:
            raise explained(error, asked[-1], "it cannot write a prompt", TEMPLATE_FIX) from None
    else:
        text = prompt
    ids = _ask(tokenizer, "encode", text, template is None)
    if not ids:
        fix = "give a longer --prompt, or mend the chat template"
        raise InputError(name, found="no token to begin with: the prompt comes to nothing", fix=fix)
    return ids


def _written(template: str, special_tokens: dict[str, str], prompt: str, where: str) -> str:
    """A prompt as a template writes it. Raises InputError where it cannot."""
    try:
        write = JinjaTemplate(template, special_tokens, by_transformers=True).writer(
            [{"role": "user", "content": prompt}], None
        )
        text = write(1, True)
    except RenderError as error:
        raise InputError(where, found=f"it cannot write a prompt: {error}", fix=TEMPLATE_FIX) from None
    with reading(where, "it writes what is no text", fix=TEMPLATE_FIX):
        text.encode()
    return text


def decode(
    tokenizer: "PreTrainedTokenizerBase",
    rows: Sequence[Sequence[int]],
    *,
    skip_special_tokens: bool,
    clean_up: bool | None = None,
) -> list[str]:
    """The texts of several rows of ids.

    Args:
        clean_up: take spaces before punctuation out, as BERT's tokenizers want it; None as the tokenizer's settings say.

    Raises:
        InputError: the tokenizer cannot do it, or takes too long or too much memory.
    """
    texts: list[str] = _ask(tokenizer, "decode", [list(map(int, row)) for row in rows], skip_special_tokens)
    clean_up = tokenizer.clean_up_tokenization_spaces if clean_up is None else clean_up
    if clean_up and not isinstance(tokenizer.backend_tokenizer.model, tokenizers.models.BPE):
        return list(map(tokenizer.clean_up_tokenization, texts))
    return texts


def _ask(tokenizer: "PreTrainedTokenizerBase", method: str, *arguments: Any) -> Any:
    try:
        return bounded.companion().ask(_program(tokenizer), method, *arguments)
    except ProgramError as error:
        raise explained(error, _name(tokenizer), f"a tokenizer that cannot {method} this", TOKENIZER_FIX) from None


def _program(tokenizer: "PreTrainedTokenizerBase") -> Program:
    if tokenizer not in _programs():
        _programs()[tokenizer] = Program(Coder, tokenizer.backend_tokenizer.to_str())
    return _programs()[tokenizer]


@functools.cache
def _programs() -> "weakref.WeakKeyDictionary[PreTrainedTokenizerBase, Program]":
    return weakref.WeakKeyDictionary()


def _name(tokenizer: "PreTrainedTokenizerBase") -> str:
    return tokenizer.name_or_path or type(tokenizer).__name__
