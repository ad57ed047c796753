"""A quantized folder whose bytes are known: their checksums, and what it was made of, are in a record outside it.

They are made while the folder is written and checked while tensors are read for use, chunk by chunk, by the threads that read: nothing is
read twice, however large it is.
"""

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from convert.files.folder import READ, ModelFolder
from convert.files.shards import NUMPY_DTYPES, Piece, TensorSpec
from qlora_jax.base.checksum import checksum
from qlora_jax.base.errors import InputError
from qlora_jax.base.files import replacing

CHUNK_BYTES = READ
"""Of a tensor, with a checksum of its own: what is asked of the kernel at a time, and still in the processor's cache when it is checked."""

Sums = dict[str, list[Any]]
"""Of each tensor: dtype, shape, and the checksums of its chunks."""


class DamagedError(InputError):
    """What was kept is not what was written."""


def summing(specs: Sequence[TensorSpec], pieces: Iterator[Piece], sums: Sums) -> Iterator[Piece]:
    """The same pieces; when all were taken, `sums` has the checksums of the tensors that they make."""
    sums |= {spec.name: [spec.dtype, list(spec.shape), []] for spec in specs}
    wanted = ((spec, size) for spec in specs for size in _chunk_sizes(spec.nbytes))
    spec, size = next(wanted, (None, 0))
    chunk, filled = np.empty(CHUNK_BYTES, np.uint8), 0
    for piece in pieces:
        rest = np.frombuffer(piece, np.uint8) if isinstance(piece, bytes) else piece.reshape(-1).view(np.uint8)
        while rest.size and spec is not None:
            part = rest[: size - filled]
            chunk[filled : filled + part.size] = part
            filled, rest = filled + part.size, rest[part.size :]
            if filled == size:
                sums[spec.name][2].append(checksum(chunk[:size]))
                (spec, size), filled = next(wanted, (None, 0)), 0
        yield piece


def _chunk_sizes(nbytes: int) -> Iterator[int]:
    for begin in range(0, nbytes, CHUNK_BYTES):
        yield min(CHUNK_BYTES, nbytes - begin)


def write_record(record: Path, job: Mapping[str, Any], sums: Sums) -> None:
    """Write what a folder is made of, and its tensors' checksums; whole or not at all. Raises OSError."""
    record.parent.mkdir(parents=True, exist_ok=True)
    with replacing(record) as file:
        file.write(json.dumps({"job": job, "tensors": sums}).encode())


class VerifiedFolder(ModelFolder):
    """A folder whose tensors are compared with their checksums whenever they are read.

    Args:
        path: the folder.
        record: the file that `write_record` wrote of it.
        job: what the folder must have been made of, and how.

    Raises:
        DamagedError: there is no record of this job, or the folder's tensors are others. When one is read: its bytes are others. The
            record is then removed, so that nobody takes the folder for whole again.
        InputError: as `ModelFolder`.
    """

    def __init__(self, path: Path, record: Path, job: Mapping[str, Any]) -> None:
        super().__init__(path)
        self._record = record
        try:
            said = json.loads(record.read_text(encoding="utf-8"))
            self._sums: Sums = said["tensors"]
            stated = {name: entry[:2] for name, entry in self._sums.items()}
            is_made_of_this = said["job"] == job
        except FileNotFoundError:
            raise DamagedError(path, found=f"nothing says what its bytes should be: no {record}") from None
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise DamagedError(record, found=f"no checksums that can be read ({error})") from None
        if not is_made_of_this:
            raise DamagedError(path, found="made of another model, in another way or by other versions")
        if stated != {name: [(spec := self.spec(name)).dtype, list(spec.shape)] for name in self.names}:
            raise DamagedError(path, found="other tensors than were written there")

    def elements(self, name: str, begin: int, size: int, into: np.ndarray | None = None) -> np.ndarray:
        """As a `ModelFolder`'s. Whole chunks are read, of which the elements are some."""
        spec = self.spec(name)
        itemsize = NUMPY_DTYPES[spec.dtype].itemsize
        first, last = begin * itemsize, min((begin + size) * itemsize, spec.nbytes)
        start, end = first // CHUNK_BYTES * CHUNK_BYTES, min(-(-last // CHUNK_BYTES) * CHUNK_BYTES, spec.nbytes)
        if (start, end) == (first, last):
            return super().elements(name, begin, size, into)
        wider = super().elements(name, start // itemsize, (end - start) // itemsize)
        found = wider[(first - start) // itemsize : (last - start) // itemsize]
        if into is None:
            return found
        into[: found.nbytes] = found.view(np.uint8)
        return into[: found.nbytes].view(found.dtype)

    def read_bytes(self, name: str) -> bytes:
        """As a `ModelFolder`'s."""
        return self.read(name).tobytes()

    def check_part(self, name: str, start: int, part: np.ndarray) -> None:
        """Compare a chunk of a tensor with its checksum.

        Raises:
            DamagedError: it is another one.
        """
        sums, number = self._sums[name][2], start // CHUNK_BYTES
        if number < len(sums) and checksum(part) == sums[number]:
            return
        with contextlib.suppress(OSError):
            self._record.unlink()
        found = f"other bytes in {name} than were written there"
        raise DamagedError(self.path, found=found, fix="run the same command again: it is made anew")
