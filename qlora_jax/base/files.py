"""Files that are whole or not there, and locks that no crash leaves behind."""

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any


@contextlib.contextmanager
def replacing(path: str | Path, buffering: int = -1) -> Iterator[IO[bytes]]:
    """A file to write beside `path`, which takes its place at the end of the block, or is removed if that fails."""
    path = Path(path)
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with aside.open("wb", buffering) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # before the rename: after a power cut the name must not point at missing bytes
        aside.replace(path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def write_json(path: str | Path, obj: Any) -> None:
    """Write `obj` as indented JSON; whole or not at all."""
    with replacing(path) as file:
        file.write(json.dumps(obj, indent=2, ensure_ascii=False).encode() + b"\n")


def sync(path: Path) -> None:
    """Wait until a file's bytes, or a folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish(folder: Path, out: Path) -> None:
    """Rename a folder that is complete, with everything on the disk before and the new name after."""
    for path in (*folder.rglob("*"), folder):
        sync(path)
    folder.rename(out)
    sync(out.parent)


def try_lock(descriptor: int) -> bool:
    """Lock an open file for this process, unless another has. The kernel lets go of it when the process ends, however it ends."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def describe_size(nbytes: int) -> str:
    """`1,234 bytes (0.00 GiB)`."""
    return f"{nbytes:,} bytes ({nbytes / 2**30:,.2f} GiB)"
