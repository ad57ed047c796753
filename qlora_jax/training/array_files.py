"""orbax as checkpoints use it: arrays as they are, read from where they lie while they are written, and no log of errors it raises."""

import contextlib
import logging
import re
from collections.abc import Iterator
from typing import Any

from qlora_jax.base.errors import FULL

CONCURRENT_BYTES = 2**30
"""Host memory that orbax may take for what it is writing or reading, besides the arrays."""
LOGGERS = ("absl", "asyncio")
"""Loggers on which orbax, its threads and their event loops repeat an error that was raised already, each with a traceback."""


@contextlib.contextmanager
def orbax(largest: int) -> Iterator[Any]:
    """orbax's interface, set up for float32 noise (nothing is compressed) and host arrays that nobody changes (nothing is copied).

    What it takes beside the arrays is bounded, by twice the bytes of the `largest` if that is more than `CONCURRENT_BYTES`.

    Folders are made before its threads begin: where that fails, they would wait ten minutes for each other. After an error its loggers
    stay silent: threads that have not noticed yet would each log it again.
    """
    from orbax.checkpoint import v1 as ocp  # half a second to import

    context = ocp.Context()
    context.array.saving.use_compression = False
    context.memory.deepcopy_host_arrays = False
    context.memory.write_concurrent_bytes = context.memory.read_concurrent_bytes = max(CONCURRENT_BYTES, 2 * largest)
    context.asynchronous.create_directories_asynchronously = False
    levels = {name: logging.getLogger(name).level for name in LOGGERS}
    for name in LOGGERS:
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)
    with context:
        yield ocp
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


def import_orbax() -> None:
    """Import what `orbax` needs: half a second and 30 MiB, which a first save would take of its steps' time and memory."""
    from orbax.checkpoint import v1  # noqa: F401


def is_full(error: BaseException) -> bool:
    """Whether an error says that the disk takes no more; tensorstore's have the number in their text only."""
    numbers = "|".join(map(str, FULL))
    return getattr(error, "errno", None) in FULL or re.search(rf"os_error_code='({numbers})'", str(error)) is not None
