"""A second thread that makes the next item while the caller is busy with one."""

import contextlib
import queue
import threading
from collections.abc import Iterator
from typing import Any, TypeVar

Item = TypeVar("Item")


@contextlib.contextmanager
def made_ahead(items: Iterator[Item], depth: int = 1) -> Iterator[Iterator[Item]]:
    """The same items, made by a thread of their own; besides the caller's, at most `depth` wait and one is being made.

    An exception of `items` is raised where its item would have come. At the end of the block the thread has ended.
    """
    made: queue.Queue[tuple[str, Any]] = queue.Queue(depth)
    stop = threading.Event()

    def put(kind: str, value: Any) -> None:
        while not stop.is_set():
            with contextlib.suppress(queue.Full):
                made.put((kind, value), timeout=0.05)
                return

    def work() -> None:
        try:
            while not stop.is_set():
                try:
                    put("item", next(items))  # not in a variable, which would hold it while the next one is made
                except StopIteration:
                    put("end", None)
                    return
        except BaseException as error:
            put("error", error)

    def take() -> Iterator[Item]:
        while True:
            kind, value = made.get()
            if kind == "end":
                return
            if kind == "error":
                raise value
            yield value
            del value

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield take()
    finally:
        stop.set()
        thread.join()
