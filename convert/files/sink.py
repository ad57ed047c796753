"""A file's bytes on their way to the disk, written by a thread; past the kernel's cache of files where that is asked for and can be.

The cache costs a copy, and memory to be found for each page of it. On a virtual machine whose host takes back what is not used, that alone
takes longer than a merge; and of a folder bigger than the memory the cache keeps no more than its end, in exchange for what was there.

    the caller fills one buffer, with pieces of any size  ‖  the thread writes the other one
"""

import concurrent.futures
import errno
import fcntl
import mmap
import os
import zlib
from pathlib import Path
from typing import IO, Self

import numpy as np

BUFFER_BYTES = 2**23
BLOCK_BYTES = 2**12
"""What goes past the cache begins and ends at multiples of this, in memory and in the file."""
SYNC_BYTES = 2**26
"""Of what is in the cache the disk begins to write after so many: else all of it would be waited for at the end of the file."""


def checksum(path: Path) -> int:
    """Of a file: tells that bytes of it changed or moved by accident. It is the CRC-32 of the blocks' sums, because that of all the bytes
    takes 15 times as long, a tenth of a merge.
    """
    summed = 0
    with path.open("rb") as file:
        while read := file.read(BUFFER_BYTES):
            summed = _checksum(np.frombuffer(read, np.uint8), summed)
    return summed


def _checksum(part: np.ndarray, before: int) -> int:
    """part [n] uint8: whole blocks, or the file's end, as if zeros followed. A block's sum is its 64-bit words', modulo 2^64."""
    whole = part.size - part.size % BLOCK_BYTES
    rest = np.pad(part[whole:], (0, -part.size % BLOCK_BYTES))
    for blocks in (part[:whole], rest):
        before = zlib.crc32(blocks.view("<u8").reshape(-1, BLOCK_BYTES // 8).sum(1), before)
    return before


class Sink:
    """Fills a file that is open, unbuffered and empty. What was given is in it once `finish` returns.

    Args:
        past_cache: a file that is not soon read. File systems that cannot do it write it as any other.
    """

    def __init__(self, file: IO[bytes], *, past_cache: bool = False) -> None:
        self._descriptor = file.fileno()
        self._buffers = [np.frombuffer(mmap.mmap(-1, BUFFER_BYTES), np.uint8) for _ in range(2)]  # at page boundaries
        self._filled = 0
        self._unsynced = self._summed = 0
        self._direct = past_cache and self._set_direct(True)
        self._pool, self._syncing_pool = (concurrent.futures.ThreadPoolExecutor(1) for _ in range(2))
        self._writing = self._syncing = self._pool.submit(lambda: None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown()
        self._syncing_pool.shutdown()

    def write(self, data: np.ndarray | bytes | memoryview) -> None:
        """Take a copy of bytes. Raises OSError, perhaps about earlier ones: the disk is full, for one."""
        rest = np.frombuffer(data, np.uint8)
        while rest.size:
            part = rest[: BUFFER_BYTES - self._filled]
            self._buffers[0][self._filled : self._filled + part.size] = part
            self._filled += part.size
            rest = rest[part.size :]
            if self._filled == BUFFER_BYTES:
                self._hand_over()

    def finish(self) -> int:
        """Wait until all is written; returns the file's `checksum`. Raises OSError as `write`."""
        self._hand_over()
        self._writing.result()
        self._syncing.result()  # an error that this one was told is not told to the next
        return self._summed

    def _hand_over(self) -> None:
        given = self._buffers[0][: self._filled]
        self._summed = _checksum(given, self._summed)
        self._writing.result()
        self._writing = self._pool.submit(self._write, given.data)
        self._buffers.reverse()
        self._filled = 0

    def _write(self, rest: memoryview) -> None:
        """A call may take a part only, as much as the disk has room for, before the next one says that it is full."""
        while rest:
            whole = rest[: len(rest) // BLOCK_BYTES * BLOCK_BYTES]
            if self._direct and not whole:  # the end of the file
                self._direct = self._set_direct(False)
            try:
                number = os.write(self._descriptor, whole if self._direct else rest)
            except OSError as error:
                if not self._direct or error.errno != errno.EINVAL:
                    raise
                self._direct = self._set_direct(False)  # other rules than ours about blocks
            else:
                rest = rest[number:]
                self._unsynced += 0 if self._direct else number
        self._sync()

    def _sync(self) -> None:
        """A thread of its own waits for the disk. A disk that is full may say so here only."""
        if self._unsynced >= SYNC_BYTES and self._syncing.done():
            self._syncing.result()
            self._syncing, self._unsynced = self._syncing_pool.submit(os.fdatasync, self._descriptor), 0

    def _set_direct(self, wanted: bool) -> bool:
        flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL) & ~os.O_DIRECT
        try:
            fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags | (os.O_DIRECT if wanted else 0))
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            return False
        return wanted
