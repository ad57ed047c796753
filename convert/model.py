"""Opens a base model by hub id or folder: its files, its shape, its tokenizer. Nothing of a model folder is ever run or unpickled."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from convert.files.folder import ModelFolder
from convert.hub import resolve_config, resolve_model
from convert.load import read_config
from qlora_jax.base.errors import InputError
from qlora_jax.model.decoder import LlamaConfig


@dataclasses.dataclass(frozen=True)
class BaseModel:
    """A model folder that was found complete and supported; no weight is read yet."""

    name_or_path: str
    """What names this model to other programs: the hub id where the files came from the hub, the folder otherwise."""
    folder: ModelFolder
    config: LlamaConfig
    tokenizer: PreTrainedTokenizerBase


def open_model(name_or_path: str, *, log: Callable[[str], object] = print) -> BaseModel:
    """Find, check and describe a base model.

    Raises:
        InputError: it cannot be found, is damaged or is not supported.
    """
    path = resolve_model(name_or_path, log=log)
    folder = ModelFolder(path)
    from_hub = not Path(name_or_path).exists() and "snapshots" in path.parts
    return BaseModel(
        name_or_path if from_hub else str(path.resolve()), folder, read_config(folder), _load_tokenizer(path)
    )


def open_shape(name_or_path: str, *, log: Callable[[str], object] = print) -> LlamaConfig:
    """The model's shape alone, from its `config.json`: no weight has to be there.

    Raises:
        InputError: it cannot be found or is not supported.
    """
    path = resolve_config(name_or_path, log=log)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(path, found=f"not JSON: {error}", fix="fetch the model again") from None
    if not isinstance(config, dict):
        raise InputError(path, found="JSON that is not an object", fix="fetch the model again")
    return LlamaConfig.from_hf(config, path)


def open_tokenizer(name_or_path: str, *, log: Callable[[str], object] = print) -> PreTrainedTokenizerBase:
    """A model's tokenizer alone; its weights are not downloaded for it.

    Raises:
        InputError: it cannot be found or loaded.
    """
    return _load_tokenizer(resolve_model(name_or_path, weights=False, log=log))


def _load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False, local_files_only=True)
        _try(tokenizer)
    except (KeyboardInterrupt, SystemExit):
        raise
    except (
        BaseException
    ) as error:  # the libraries behind it raise nearly anything for a damaged file, Rust's panics too
        raise _cannot_be_loaded(path, error) from None
    if tokenizer.eos_token_id is None:
        raise InputError(
            path, found="a tokenizer without an end-of-sequence token", expected="eos_token in tokenizer_config.json"
        )
    return tokenizer


def _cannot_be_loaded(path: Path, error: BaseException) -> InputError:
    """Without transformers' advice to trust the code of a tokenizer that needs its own: there is no such setting here."""
    if "trust_remote_code" not in str(error):
        return InputError(path, found=f"a tokenizer that cannot be loaded: {error}", fix="fetch the model again")
    return InputError(
        path,
        found="a tokenizer that needs Python code of its own (auto_map): refused, no code of a model's is run",
        expected="a tokenizer.json, and in tokenizer_config.json a tokenizer_class of transformers'",
        fix="save it as a PreTrainedTokenizerFast, on a machine where you trust the code, or take a copy of the model that has one",
    )


MAX_UNUSED = 2**16
"""Numbers without a token below the largest. A tokenizer that is copied or written makes room for each of them, up to 2³² of them."""


def _try(tokenizer: PreTrainedTokenizerBase) -> None:
    """Use it once: some damage shows only then.

    Raises:
        ValueError, or whatever the tokenizer raises: it does not work.
    """
    numbers = tokenizer.get_vocab()
    token = max(numbers, key=numbers.get, default=None)
    if token is not None and numbers[token] > len(numbers) + MAX_UNUSED:
        raise ValueError(f"its token {token[:100]!r} is number {numbers[token]}, and it has {len(numbers)} tokens")
    plain, whole = tokenizer("x", add_special_tokens=False)["input_ids"], tokenizer("x")["input_ids"]
    if not plain or plain not in [whole[start : start + len(plain)] for start in range(len(whole))]:
        raise ValueError(f"it makes {plain} of a letter, and {whole} of a text of that letter")
    tokenizer.decode(whole, skip_special_tokens=True)
    ids = [tokenizer.eos_token_id, tokenizer.pad_token_id]
    if not all(number is None or isinstance(number, int) for number in ids):
        raise ValueError(f"its end-of-sequence and padding tokens are {ids}, expected numbers")
