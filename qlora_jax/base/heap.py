"""The C library's heap: free memory in it is given back to the system."""

import contextlib
import ctypes


def give_back_free_memory() -> None:
    """Give free pages of the heap back; where the C library cannot (only glibc can), do nothing.

    Saves and evaluations take and release blocks of all sizes in many threads. glibc keeps those pages, a little more each time: over 100
    saves in 1,000 steps of a tiny model 7.6 MiB, and 1.6 MiB with this call after each, which takes milliseconds.
    """
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
