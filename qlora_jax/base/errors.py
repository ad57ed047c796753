"""Errors for people: what the user gave, what was expected, what to do. A traceback is for our bugs."""

import errno
import functools
import sys
from collections.abc import Callable

EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130
EXIT_SIGNAL = 128
"""A command that a signal ended has this plus the signal's number as its exit status: 130 for Ctrl-C, 143 for SIGTERM."""

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


def disk_full(error: OSError, where: object = None) -> InputError:
    """Of a file that could not be written, because the disk takes no more (`FULL`)."""
    place = where or error.filename or "writing a file"
    fix = "make room and run the same command again: a run goes on from what was saved"
    return InputError(place, found=f"{FULL[error.errno]}: {error.strerror}", fix=fix)


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
