"""Errors for people: what the user gave, what was expected, what to do. A traceback is for our bugs."""

import errno
import functools
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, NoReturn

EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130
EXIT_SIGNAL = 128
"""A command that a signal ended has this plus the signal's number as its exit status: 130 for Ctrl-C, 143 for SIGTERM."""

EXIT_FAILED = 1
"""Exit status after a fault of our own, which ends in a traceback."""
EXIT_GRACE = 10.0
"""Seconds that threads have to end by themselves after a command has failed."""

MAX_LINES, MAX_LINE = 80, 2000
"""Of a message."""


FULL = {
    errno.ENOSPC: "the disk became full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "a file became larger than the file system or a limit of this process (ulimit -f) allows",
}
"""What is said of the errors of a disk that takes no more."""


class InputError(Exception):
    """Something the user gave cannot be used.

    Args:
        where: the file, `file:line`, setting, tensor or command the problem is in.
        found: what is there.
        expected: what would have been right, if that is not obvious from `found`.
        fix: what to do about it.
    """

    def __init__(self, where: object, *, found: str, expected: str = "", fix: str = "") -> None:
        self.where, self.found, self.expected, self.fix = str(where), found, expected, fix
        lines = [self.where, f"  found:    {found}"]
        if expected:
            lines.append(f"  expected: {expected}")
        if fix:
            lines.append(f"  do:       {fix}")
        super().__init__(_clipped("\n".join(lines)))

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles: processes of ours hand errors over."""
        return _input_error, (type(self), self.where, self.found, self.expected, self.fix)


def _input_error(kind: type[InputError], where: str, found: str, expected: str, fix: str) -> InputError:
    return kind(where, found=found, expected=expected, fix=fix)


def _clipped(text: str) -> str:
    """A file may have a name of a megabyte in it, or a thousand faults: what no one would read is left out, and counted."""
    lines = text.split("\n")
    left_out = [f"    ... and {len(lines) - MAX_LINES} more lines"] if len(lines) > MAX_LINES else []
    kept = lines[: MAX_LINES - 2] + left_out + lines[-2:] if left_out else lines
    return (
        "\n".join(
            line
            if len(line) <= MAX_LINE
            else f"{line[: MAX_LINE // 2]} [... {len(line) - MAX_LINE} more characters ...] {line[-MAX_LINE // 2 :]}"
            for line in kept
        )
        .encode(errors="backslashreplace")
        .decode()
    )  # half of a surrogate pair cannot be printed


MAX_SHOWN = 300
"""Characters of a value in a message."""


def shown(value: object) -> str:
    """A value as a message shows it: its `repr`, cut where it is long; one of any depth or size will do."""
    try:
        text = repr(value)
    except (RecursionError, ValueError, MemoryError):  # nested too deeply, or an integer of too many digits
        return f"a {type(value).__name__} that is too large to be shown"
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]} [... {len(text) - MAX_SHOWN} more characters]"


def disk_full(error: OSError, where: object = None) -> InputError:
    """Of a file that could not be written, because the disk takes no more (`FULL`)."""
    place = where or error.filename or "writing a file"
    fix = "make room and run the same command again: a run goes on from what was saved"
    return InputError(place, found=f"{FULL[error.errno or 0]}: {error.strerror}", fix=fix)


class InterruptedRunError(Exception):
    """A signal asked the run to stop, and it has saved what it did; the message says how to continue."""

    def __init__(self, signal: int, message: str) -> None:
        self.status = EXIT_SIGNAL + signal
        super().__init__(message)


def exit_status(main: Callable[..., int | None]) -> Callable[..., int]:
    """Turn a command's `main` into one that returns an exit status: `InputError`, or a full disk, becomes one message and status 2."""

    @functools.wraps(main)
    def wrapped(*args: object, **kwargs: object) -> int:
        try:
            return main(*args, **kwargs) or 0
        except InputError as error:
            print(f"error: {error}", file=sys.stderr)
            return EXIT_BAD_INPUT
        except OSError as error:
            if error.errno not in FULL:
                raise
            print(f"error: {disk_full(error)}", file=sys.stderr)
            return EXIT_BAD_INPUT
        except InterruptedRunError as stopped:
            print(stopped, file=sys.stderr)
            return stopped.status
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return EXIT_INTERRUPTED

    return wrapped


def end_process(main: Callable[[], int]) -> NoReturn:
    """Call a command's `main` and end the process with the exit status that it returns.

    After a failure threads may wait for what will not come, a library's writers for a folder that is gone: `EXIT_GRACE` seconds later
    the process ends without them.
    """
    try:
        status = main()
    except SystemExit:  # argparse's, before anything has begun
        raise
    except BaseException:
        _end_later(EXIT_FAILED)
        raise
    if status:
        _end_later(status)
    sys.exit(status)


def _end_later(status: int) -> None:
    threading.Thread(target=_end_without_threads, args=(status,), daemon=True).start()


def _end_without_threads(status: int) -> None:
    time.sleep(EXIT_GRACE)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(status)
