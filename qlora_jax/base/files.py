"""Files and folders that are whole or not there, and locks that no crash leaves behind.

.NAME.PID.tmp     a file that is being written (`replacing`)
.NAME.partial     a folder that is being written (`replacing_folder`)
.NAME.old         a folder whose successor is taking its name, where the file system cannot exchange two names at once
.NAME.removed     a folder that is being removed
"""

import contextlib
import ctypes
import errno
import fcntl
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

RENAME_NOREPLACE, RENAME_EXCHANGE = 1, 2
"""Flags of Linux's renameat2(2)."""
AT_FDCWD = -100
NOT_SUPPORTED = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP)
"""Errors of a kernel or a file system without these flags."""


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


def replace_folder(folder: Path, out: Path, *, overwrite: bool = True) -> None:
    """Rename a folder that is complete; a folder that has the name already is removed once the new one has it.

    Everything is on the disk before the rename, and the new name after. At any moment one of the two has the name, and it is whole. Where
    the file system cannot exchange two names at once there is a moment at which none has: `recover_folder` then gives it back.

    Args:
        overwrite: whether `out` may exist.

    Raises:
        FileExistsError: `out` exists and may not, or is a file.
    """
    for path in (*folder.rglob("*"), folder):
        if not path.is_symlink():
            sync(path)
    if _renamed(folder, out):
        sync(out.parent)
        return
    if not overwrite or not (out.is_dir() or out.is_symlink()):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(out))
    gone = folder
    if not _rename_with(RENAME_EXCHANGE, folder, out):
        gone = _beside(out, "old")
        _remove(gone)
        out.rename(gone)
        folder.rename(out)
    sync(out.parent)
    _remove(gone)


@contextlib.contextmanager
def replacing_folder(out: Path) -> Iterator[Path]:
    """A folder to fill beside `out`, which takes its place at the end of the block, or is removed if that fails."""
    recover_folder(out)
    aside = _beside(out, "partial")
    aside.mkdir(parents=True)
    try:
        yield aside
        replace_folder(aside, out)
    except BaseException:
        with contextlib.suppress(OSError):
            _remove(aside)
        raise


def recover_folder(out: Path) -> None:
    """Put right what a process left that was killed while it replaced or removed the folder `out`; nothing else is at work there."""
    old = _beside(out, "old")
    if os.path.lexists(old) and not os.path.lexists(out):
        old.rename(out)
    for kind in ("partial", "old", "removed"):
        _remove(_beside(out, kind))


def remove_folder(path: Path) -> None:
    """Remove a folder, if it is there, so that at no moment half of it has its name."""
    gone = _beside(path, "removed")
    _remove(gone)  # of a process that was killed here
    if os.path.lexists(path):
        path.rename(gone)
        _remove(gone)


def remove_unfinished_files(folder: Path) -> None:
    """Remove the files that killed processes left half-written in `folder`; nothing else is at work there."""
    for path in folder.glob(".*.tmp"):
        if re.fullmatch(r"\..+\.\d+\.tmp", path.name):
            path.unlink()


def link_folder(folder: Path, out: Path) -> None:
    """Make `out` a copy of a folder whose files are never written to again: large ones are linked, where the file system can."""
    out.mkdir(exist_ok=True)
    for path in sorted(folder.iterdir()):
        target = out / path.name
        if path.is_dir():
            link_folder(path, target)
            continue
        try:
            if path.stat().st_size < LINKED_BYTES:
                raise OSError
            os.link(path, target)
        except OSError:
            shutil.copyfile(path, target)


LINKED_BYTES = 2**16
"""Files below this size are copied by `link_folder`: those are the ones that people write to in place."""


class Anchor:
    """A folder that is held open, so that it can be written to wherever it is moved, and nothing else that has its name then.

    Attributes:
        path: leads to the folder, whatever its name is now (on Linux; its name elsewhere).
    """

    def __init__(self, folder: Path) -> None:
        self._descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        held = Path(f"/proc/self/fd/{self._descriptor}")
        self.path = held if held.exists() else folder

    def close(self) -> None:
        """Let go of the folder; `path` leads nowhere then."""
        os.close(self._descriptor)


class FileSoFar:
    """A file's bytes as they are now, to be copied later: in the meantime it may grow, or another may take its name."""

    def __init__(self, path: Path) -> None:
        self._name, self._file = path.name, path.open("rb")
        self._size = os.fstat(self._file.fileno()).st_size

    def copy_to(self, folder: Path) -> None:
        """Write the bytes under the same name into `folder`; once."""
        left = self._size
        with self._file, (folder / self._name).open("wb") as out:
            while left and (data := self._file.read(min(left, COPIED_AT_ONCE))):
                out.write(data)
                left -= len(data)

    def close(self) -> None:
        """Let the file go, copied or not."""
        self._file.close()


COPIED_AT_ONCE = 2**20
"""Bytes of a file that are in memory while it is copied."""


class Scratch:
    """A new folder for work that may be killed at any moment: `PARENT/PREFIX...`. Those that ended processes left are removed first.

    Attributes:
        path: the folder, the caller's to fill, and to rename or remove; as a context it is removed at the end.
    """

    def __init__(self, parent: Path, prefix: str) -> None:
        _remove_abandoned(parent, prefix)
        while True:
            self.path = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
            try:
                self._lock = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
            except FileNotFoundError:  # another process took it for abandoned, before it was locked
                continue
            with contextlib.suppress(OSError):  # a file system without locks: then nobody removes it
                if not try_lock(self._lock) or not self.path.exists():
                    os.close(self._lock)
                    continue
            return

    def __enter__(self) -> Path:
        """The folder."""
        return self.path

    def __exit__(self, *_: object) -> None:
        """Remove the folder, if it still has its name."""
        shutil.rmtree(self.path, ignore_errors=True)
        self.close()

    def close(self) -> None:
        """Let go of the lock, once the folder has another name or is gone; the kernel does it for a process that ends."""
        os.close(self._lock)


def _remove_abandoned(parent: Path, prefix: str) -> None:
    """Remove this user's `Scratch` folders that no process holds."""
    for path in parent.glob(".*" if prefix.startswith(".") else "*"):
        if not re.fullmatch(rf"{re.escape(prefix)}[a-z0-9_]{{8}}", path.name):
            continue  # not one of `tempfile`'s names
        with contextlib.suppress(OSError):
            lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                if os.fstat(lock).st_uid == os.getuid() and try_lock(lock):
                    shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(lock)


def _beside(path: Path, kind: str) -> Path:
    return path.with_name(f".{path.name}.{kind}")


def _remove(path: Path) -> None:
    """Whatever it is, if it is there; of a symbolic link the link alone."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _renamed(folder: Path, out: Path) -> bool:
    """Rename, unless `out` exists: then False."""
    try:
        if _rename_with(RENAME_NOREPLACE, folder, out):
            return True
    except FileExistsError:
        return False
    if os.path.lexists(out):
        return False
    folder.rename(out)
    return True


def _rename_with(flag: int, old: Path, new: Path) -> bool:
    """Linux's renameat2; False where there is none."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:
        return False
    sys.audit("os.rename", str(old), str(new), -1, -1)  # as the library's own would
    if rename(AT_FDCWD, os.fsencode(old), AT_FDCWD, os.fsencode(new), flag) == 0:
        return True
    number = ctypes.get_errno()
    if number in NOT_SUPPORTED:
        return False
    raise OSError(number, os.strerror(number), str(old), None, str(new))


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
