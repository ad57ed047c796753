"""orbax as checkpoints use it: arrays as they are, read from where they lie while they are written, and no log of errors it raises."""

import contextlib
import logging
import re
import sys
from collections.abc import Iterator
from typing import Any

CONCURRENT_BYTES = 2**30
"""Host memory that orbax may take for what it is writing or reading, besides the arrays."""
LOGGERS = ("absl", "asyncio")
"""Loggers on which orbax, its threads and their event loops repeat an error that was raised already, each with a traceback."""


@contextlib.contextmanager
def orbax(largest: int) -> Iterator[Any]:
    """orbax's interface, set up for float32 noise (nothing is compressed) and host arrays that nobody changes (nothing is copied).

    What it takes beside the arrays is bounded, by twice the bytes of the `largest` if that is more than `CONCURRENT_BYTES`.

    Folders are made before its threads begin: where that fails, they would wait ten minutes for each other. After an error its threads
    are not heard any more: those that have not noticed yet would each tell of it again.
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
    _leave_out_late_errors()
    with context:
        yield ocp
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


def _leave_out_late_errors() -> None:
    """Print no traceback of a write that ends after an error has ended the loop that waited for it; tensorstore prints one for each.

    Installed before the writes begin: the first may end before the error has come back here.
    """
    report, report_unraisable = sys.excepthook, sys.unraisablehook
    if getattr(report, "leaves_out_late_errors", False):
        return

    def excepthook(kind: type[BaseException], error: BaseException, trace: Any) -> None:
        if not _is_late(error):
            report(kind, error, trace)

    def unraisablehook(unraisable: Any) -> None:
        if not _is_late(unraisable.exc_value):
            report_unraisable(unraisable)

    excepthook.leaves_out_late_errors = True
    sys.excepthook, sys.unraisablehook = excepthook, unraisablehook


def _is_late(error: BaseException | None) -> bool:
    return isinstance(error, RuntimeError) and str(error) == "Event loop is closed"


def import_orbax() -> None:
    """Import what `orbax` needs: half a second and 30 MiB, which a first save would take of its steps' time and memory."""
    from orbax.checkpoint import v1  # noqa: F401


def system_error(error: BaseException) -> int | None:
    """The system's number for an error while a file is written, None for any other; tensorstore's errors have it in their text only."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"os_error_code='(\d+)'", str(error))
    return int(found[1]) if found else None
