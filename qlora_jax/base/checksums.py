"""Sizes and SHA-256 sums of a folder's files: what was written, to be compared with what is there."""

import concurrent.futures
import hashlib
from pathlib import Path
from typing import Any

HASHING_THREADS = 8


def checksums(folder: Path, left_out: str) -> dict[str, tuple[int, str]]:
    """Size in bytes and SHA-256 of every file below `folder`, by its name from there; without the file `left_out`, which will hold them."""
    paths = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    paths.pop(left_out, None)
    with concurrent.futures.ThreadPoolExecutor(HASHING_THREADS) as threads:
        digests = threads.map(_sha256, paths.values())
        return {
            name: (path.stat().st_size, digest) for (name, path), digest in zip(paths.items(), digests, strict=True)
        }


def difference(name: str, written: tuple[Any, Any], found: tuple[int, str] | None) -> str:
    """Say in what a file differs from what was written; None: it is not there."""
    if found is None:
        return f"{name} is missing"
    if found[0] != written[0]:
        return f"{name} has {found[0]} bytes, {written[0]} were written"
    return f"{name} has other bytes than were written"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
