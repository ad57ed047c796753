"""Tokenizing on all cores: processes of our own that read rows and write tokens through pipes.

Not `multiprocessing`: its children either fork a process in which JAX has threads, or import the main program, JAX and all, anew.
"""

import contextlib
import gc
import os
import pickle
import queue
import subprocess
import sys
import traceback
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain, islice
from typing import IO, Any

from qlora_jax.base.errors import InputError
from qlora_jax.data.rows.row import RawRow
from qlora_jax.data.tokens.tokenization import Recipe, RowTokenizer, Tokens

ROWS_AT_ONCE = 256
BYTES_AT_ONCE = 2**20
"""Rows that travel together: so many, or lines of so many bytes."""
CHUNKS_ALONE = 8
"""Up to so many chunks are done in this process: starting others would take longer."""
AHEAD = 3
"""Chunks in flight for each process."""
GARBAGE_THRESHOLD = 100_000
"""Objects that a child may make before it looks for cycles among them: more than a chunk needs."""
SIZE = 8
"""Bytes of a message's length."""


def tokenize_all(rows: Iterable[RawRow], recipe: Recipe, num_proc: int | None = None) -> Iterator[Tokens]:
    """Tokenize rows in chunks, in their order, on `num_proc` cores (None: all of this process's).

    Raises:
        InputError: a process died.
    """
    chunks = _chunks(rows)
    first = list(islice(chunks, CHUNKS_ALONE + 1))
    num_proc = num_proc or _cores()
    if num_proc == 1 or len(first) <= CHUNKS_ALONE:
        yield from map(RowTokenizer(recipe), chain(first, chunks))
        return
    with Pool(recipe, num_proc) as pool:
        yield from pool.map(chain(first, chunks))


def _cores() -> int:
    """Those this process may use, where the system says."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _chunks(rows: Iterable[RawRow]) -> Iterator[list[RawRow]]:
    chunk, size = [], 0
    for row in rows:
        chunk.append(row)
        size += len(row.content) if isinstance(row.content, bytes) else 0
        if len(chunk) == ROWS_AT_ONCE or size >= BYTES_AT_ONCE:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


class Pool:
    """Processes that each hold one recipe's tokenizer. Use as a context; `map` keeps the order."""

    def __init__(self, recipe: Recipe, num_proc: int) -> None:
        path = os.pathsep.join(entry for entry in sys.path if entry)
        environment = os.environ | {"PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false"}
        command = [sys.executable, "-c", "from qlora_jax.data.tokens.workers import main; main()"]
        self._processes = [
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
            for _ in range(num_proc)
        ]
        self._idle: queue.SimpleQueue[subprocess.Popen[bytes]] = queue.SimpleQueue()
        self._threads = ThreadPoolExecutor(num_proc)
        for process in self._processes:
            self._idle.put(process)
        self._recipe = recipe
        self._has_recipe: set[int] = set()

    def __enter__(self) -> "Pool":
        """Itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the processes, whatever they are doing."""
        for process in self._processes:
            process.kill()
        self._threads.shutdown(cancel_futures=True)
        for process in self._processes:
            process.wait()
            with contextlib.suppress(BrokenPipeError):  # half a message is left in it
                process.stdin.close()
            process.stdout.close()

    def map(self, chunks: Iterable[Sequence[RawRow]]) -> Iterator[Tokens]:
        """Each chunk's tokens, in the chunks' order; a few chunks are read ahead."""
        waiting: deque[Future[Tokens]] = deque()
        for chunk in chunks:
            waiting.append(self._threads.submit(self._one, chunk))
            if len(waiting) > AHEAD * len(self._processes):
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    def _one(self, chunk: Sequence[RawRow]) -> Tokens:
        process = self._idle.get()
        try:
            if process.pid not in self._has_recipe:
                _send(process.stdin, self._recipe)
                self._has_recipe.add(process.pid)
            _send(process.stdin, chunk)
            answer = _receive(process.stdout)
        except (EOFError, OSError):
            status = process.wait()
            found = f"a process that tokenizes ended by itself, status {status}" + (
                ", as if out of memory" if status == -9 else ""
            )
            fix = "start again with fewer of them: data.num_proc"
            raise InputError(f"the rows from {chunk[0].where} to {chunk[-1].where}", found=found, fix=fix) from None
        finally:
            self._idle.put(process)
        if not isinstance(answer, Tokens):
            raise RuntimeError(f"in a process that tokenizes:\n{answer}")  # noqa: TRY004 - it is text, of our own bug
        return answer


def _send(pipe: IO[bytes], value: Any) -> None:
    data = pickle.dumps(value, pickle.HIGHEST_PROTOCOL)
    pipe.write(len(data).to_bytes(SIZE, "little"))
    pipe.write(data)
    pipe.flush()


def _receive(pipe: IO[bytes]) -> Any:
    header = pipe.read(SIZE)
    if len(header) < SIZE:
        raise EOFError
    size = int.from_bytes(header, "little")
    data = pipe.read(size)
    if len(data) < size:
        raise EOFError
    return pickle.loads(data)  # from our own child or parent


def serve(source: IO[bytes], sink: IO[bytes]) -> None:
    """What a child does: take a recipe, then answer chunks of rows with tokens until the pipe is closed."""
    try:
        tokenizer = RowTokenizer(_receive(source))
        while True:
            chunk = _receive(source)
            try:
                answer: Tokens | str = tokenizer(chunk)
            except Exception:  # a bug of ours: the parent shows it
                answer = traceback.format_exc()
            _send(sink, answer)
    except (EOFError, BrokenPipeError, KeyboardInterrupt):
        return


def main() -> None:
    """A child's whole life."""
    # Rows leave no cycles behind, but so many objects at once that looking for some takes a tenth of the time.
    gc.freeze()
    gc.set_threshold(GARBAGE_THRESHOLD)
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever prints must not print into the answers
    serve(sys.stdin.buffer, answers)
