"""Opens a base model by hub id or folder: its files, its shape, its tokenizer. Nothing of a model folder is ever run or unpickled."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from convert.files.folder import ModelFolder
from convert.files.remarks import limits_of, remarks, tokens_without_row
from convert.hub import CONFIG_NAME, resolve_config, resolve_model
from convert.load import read_config
from qlora_jax.base import bounded
from qlora_jax.base.bounded import Limits, ProgramError, explained
from qlora_jax.base.errors import InputError
from qlora_jax.base.reading import PASSED_ON, is_file, read_json_object, reason_of, refuse_odd_files
from qlora_jax.data import ModelLimits
from qlora_jax.data.chat.codec import try_tokenizer
from qlora_jax.model.architecture import Architecture
from qlora_jax.model.families import read_architecture

UNLOADABLE = "a tokenizer that cannot be loaded"
MAX_TOKENIZER_BYTES = 2**28
TRYING_SECONDS, MEMORY_A_BYTE = 8.0, 32
"""Limits for trying a tokenizer: seconds, and one more for each MiB of its file; bytes of memory for each of its file's."""


@dataclasses.dataclass(frozen=True)
class BaseModel:
    """A model folder that was found complete and supported; no weight is read yet."""

    name_or_path: str
    """What names this model to other programs: the hub id where the files came from the hub, the folder otherwise."""
    folder: ModelFolder
    config: Architecture
    tokenizer: PreTrainedTokenizerBase
    limits: ModelLimits


def open_model(name_or_path: str, *, log: Callable[[str], object] = print) -> BaseModel:
    """Find, check and describe a base model; what is odd about it but can be used is told to `log`.

    Raises:
        InputError: it cannot be found, is damaged or is not supported.
    """
    bounded.companion().start()  # so that it is ready when the tokenizer is to be tried
    path = resolve_model(name_or_path, log=log)
    folder = ModelFolder(path)
    from_hub = not Path(name_or_path).exists() and "snapshots" in path.parts
    config, tokenizer = read_config(folder), load_tokenizer(path)
    for line in remarks(folder, config, tokenizer):
        log(line)
    name = name_or_path if from_hub else str(path.resolve())
    limits = dataclasses.replace(limits_of(folder.config, tokenizer), vocab_size=config.vocab_size)
    return BaseModel(name, folder, config, tokenizer, limits)


def open_shape(name_or_path: str, *, log: Callable[[str], object] = print) -> Architecture:
    """The model's shape alone, from its `config.json`: no weight has to be there.

    Raises:
        InputError: it cannot be found or is not supported.
    """
    path = resolve_config(name_or_path, log=log)
    return read_architecture(read_json_object(path, fix="fetch the model again"), path)


def open_tokenizer(name_or_path: str, *, log: Callable[[str], object] = print) -> PreTrainedTokenizerBase:
    """A model's tokenizer alone; its weights are not downloaded for it.

    Raises:
        InputError: it cannot be found or loaded.
    """
    return open_tokens(name_or_path, log=log)[0]


def open_tokens(
    name_or_path: str, *, log: Callable[[str], object] = print
) -> tuple[PreTrainedTokenizerBase, ModelLimits]:
    """A model's tokenizer, and the limits that its `config.json` and the tokenizer state.

    Raises:
        InputError: either cannot be found or loaded.
    """
    path = resolve_model(name_or_path, weights=False, log=log)
    tokenizer = load_tokenizer(path)
    config = read_json_object(path / CONFIG_NAME) if is_file(path / CONFIG_NAME) else {}
    limits = limits_of(config, tokenizer)
    for line in tokens_without_row(path, limits.vocab_size, tokenizer):
        log(line)
    return tokenizer, limits


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder; no code of its own is run.

    Raises:
        InputError: it cannot be loaded, does not work or has no EOS.
    """
    refuse_odd_files(path)
    _try_in_child(path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False, local_files_only=True)
        _try(tokenizer)
    except PASSED_ON:
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


def _try_in_child(path: Path) -> None:
    """A tokenizer is a program: loading it already normalizes its tokens.

    Raises:
        InputError: it takes too long or too much memory, or crashes.
    """
    if (size := _size(path / "tokenizer.json")) is None:
        return
    limits = Limits(seconds=TRYING_SECONDS + size / 2**20, memory=2**30 + MEMORY_A_BYTE * size)
    try:
        bounded.companion().ask(try_tokenizer, str(path), limits=limits)
    except ProgramError as error:
        raise explained(error, path, UNLOADABLE, "fetch the model again") from None


def _size(path: Path) -> int | None:
    """Bytes of a tokenizer's file; None where there is none. Raises InputError if it is too large to be one."""
    if not is_file(path):
        return None
    size = path.stat().st_size
    if size > MAX_TOKENIZER_BYTES:
        expected = f"a tokenizer of at most {MAX_TOKENIZER_BYTES:,}"
        raise InputError(path, found=f"{size:,} bytes", expected=expected, fix="fetch the model again")
    return size


def _cannot_be_loaded(path: Path, error: BaseException) -> InputError:
    """Without transformers' advice to trust the code of a tokenizer that needs its own: there is no such setting here."""
    if "trust_remote_code" not in str(error):
        return InputError(path, found=f"{UNLOADABLE}: {reason_of(error)}", fix="fetch the model again")
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
