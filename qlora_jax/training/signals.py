"""SIGTERM and Ctrl-C as a wish to stop: the run finishes its step, saves and leaves."""

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self

WISHES = (signal.SIGTERM, signal.SIGINT)
SHOW_CURSOR = "\x1b[?25h"


class Signals:
    """While this context is entered, the first of these signals is only noted; the next one ends the process at once.

    Handlers can only be set in the main thread; in any other this does nothing.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in WISHES}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        for wish in WISHES:  # by the kernel itself: Python's handlers wait for a computation to return
            signal.signal(wish, signal.SIG_DFL)
        name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        text = f"\n{name}: finishing this step and saving; once more leaves at once, without the steps since the last save\n"
        shown = SHOW_CURSOR if os.isatty(2) else ""  # the progress bar hid it, and the next signal leaves no time
        os.write(2, (shown + text).encode())  # print() may be what was interrupted
