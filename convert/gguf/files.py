"""A GGUF file that was given as a model: converted once to a Hugging Face folder, which is kept in the cache."""

import hashlib
import itertools
import os
import re
from collections.abc import Callable
from pathlib import Path

from convert.gguf.packages import convert_once
from qlora_jax.base.errors import InputError

MAX_NAMES = 10_000
SAMPLE_BYTES = 2**24
KEY_DIGITS = 12
PROJECTOR = "mmproj"
"""In the names of files of vision towers, which lie beside a model's."""


def gguf_file(path: Path) -> Path | None:
    """The GGUF file that a path means: itself, or the only one of a folder without `config.json`; None for anything else.

    Raises:
        InputError: the folder has several.
    """
    if path.suffix.lower() == ".gguf" and path.is_file():
        return path
    if not path.is_dir() or (path / "config.json").exists():
        return None
    with os.scandir(path) as entries:
        names = sorted(entry.name for entry in itertools.islice(entries, MAX_NAMES))
    found = [name for name in names if name.lower().endswith(".gguf") and PROJECTOR not in name.lower()]
    if len(found) > 1:
        raise InputError(
            path,
            found=f"{len(found)} GGUF files and no config.json: {', '.join(found[:5])}",
            expected="one model",
            fix=f"give the file that is meant, such as {path / found[0]}",
        )
    return path / found[0] if found else None


def converted_gguf(path: Path, cache_dir: Path, log: Callable[[str], object]) -> Path:
    """The model of a GGUF file as a Hugging Face folder in bfloat16, converted if this file has not been before.

    Raises:
        InputError: as `write_model_folder`.
    """
    stem = re.sub(r"[^\w.-]+", "-", path.stem).strip(".-") or "model"
    folder = Path(cache_dir) / "gguf" / f"{stem[:100]}-{_fingerprint(path)}"
    if not folder.is_dir():
        log(f"converting {path} to {folder}, in bfloat16")
        convert_once(path, folder)
    return folder


def _fingerprint(path: Path) -> str:
    """A hash of a file's start, size and time of change."""
    status = path.stat()
    with path.open("rb") as file:
        known = hashlib.sha256(file.read(SAMPLE_BYTES))
    known.update(f"{status.st_size} {status.st_mtime_ns}".encode())
    return known.hexdigest()[:KEY_DIGITS]
