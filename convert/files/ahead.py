"""Threads that make what comes next while the caller is busy with what is there."""

import collections
import concurrent.futures
import contextlib
import os
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Generic, TypeVar

Item = TypeVar("Item")

MOST_THREADS = 8
"""More would hold more pieces in memory, and disks are not faster for them."""


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


def num_threads() -> int:
    """One for each processor that this process may use, up to `MOST_THREADS`."""
    return min(len(os.sched_getaffinity(0)), MOST_THREADS)


class Shared(Generic[Item]):
    """A task for `in_order` whose result others of its tasks wait for. It must come before them, or all threads might wait for it."""

    def __init__(self, make: Callable[[], Item]) -> None:
        self._make: Callable[[], Item] | None = make
        self._made: concurrent.futures.Future[Item] = concurrent.futures.Future()

    def __call__(self) -> None:
        """Run it; once."""
        make, self._make = self._make, None  # with whatever it holds
        assert make is not None
        try:
            self._made.set_result(make())
        except BaseException as error:
            self._made.set_exception(error)
            raise

    def result(self) -> Item:
        """What it made, once it has; or its exception."""
        return self._made.result()

    def take(self) -> Item:
        """The same, for the last who asks: it is not held here any longer."""
        made, self._made = self._made, concurrent.futures.Future()
        return made.result()


def in_order(tasks: Iterable[Callable[[], Item]]) -> Iterator[Item]:
    """What the tasks return, in their order. `num_threads()` run at a time; besides the caller's item one more at most is kept.

    `tasks` is advanced by the caller's thread, no further than that. An exception of a task is raised where its item would have come.
    """
    threads, waiting = num_threads(), collections.deque[concurrent.futures.Future[Item]]()
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        try:
            for task in tasks:
                waiting.append(pool.submit(task))
                del task  # with whatever it holds
                if len(waiting) > threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
