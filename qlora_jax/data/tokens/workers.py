"""Tokenizing on all cores, in processes of our own within limits: a row is rendered by a template and cut by a tokenizer from outside.

A few rows go to this process's `companion`; many to a child for each core. What a row exceeds the limits with, template or tokenizer, is
found by asking again, of each row of the chunk alone.
"""

import os
import queue
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain, islice

from qlora_jax.base import bounded
from qlora_jax.base.bounded import Child, Limits, Program, ProgramError
from qlora_jax.base.errors import InputError
from qlora_jax.data.rows.row import RawRow
from qlora_jax.data.tokens.recipe import Recipe
from qlora_jax.data.tokens.tokenization import Example, RowTokenizer, Tokens, examples, rendered

ROWS_AT_ONCE = 256
BYTES_AT_ONCE = 2**20
"""Rows that travel together: so many, or lines of so many bytes."""
CHUNKS_ALONE = 8
"""Up to so many chunks are done by one process: starting others would take longer."""
AHEAD = 3
"""Chunks in flight for each process."""
ALONE = Limits(seconds=3)
"""Of a row that is asked alone, because its chunk exceeded the limits."""


def tokenize_all(rows: Iterable[RawRow], recipe: Recipe, num_proc: int | None = None) -> Iterator[Tokens]:
    """Tokenize rows in chunks, in their order, on `num_proc` cores (None: all of this process's).

    Raises:
        InputError: a process died, or a row takes the template or the tokenizer too long or too much memory.
    """
    chunks = _chunks(rows)
    first = list(islice(chunks, CHUNKS_ALONE + 1))
    num_proc = num_proc or _cores()
    if num_proc == 1 or len(first) <= CHUNKS_ALONE:
        program = Program(RowTokenizer, recipe)
        for chunk in chain(first, chunks):
            yield _tokens(bounded.companion(), program, chunk)
        return
    with Pool(recipe, num_proc) as pool:
        yield from pool.map(chain(first, chunks))


def tokenize_few(rows: Sequence[RawRow], recipe: Recipe) -> list[Example]:
    """A few rows at once.

    Raises:
        RowError: the first that cannot be used.
        InputError: as `tokenize_all`.
    """
    return examples(_tokens(bounded.companion(), Program(RowTokenizer, recipe), rows))


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
        self._children = [Child() for _ in range(num_proc)]
        self._idle: queue.SimpleQueue[Child] = queue.SimpleQueue()
        self._threads = ThreadPoolExecutor(num_proc)
        self._program = Program(RowTokenizer, recipe)
        for child in self._children:
            child.start()
            self._idle.put(child)

    def __enter__(self) -> "Pool":
        """Itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the processes, whatever they are doing."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        for child in self._children:
            child.close()
        self._threads.shutdown()

    def map(self, chunks: Iterable[Sequence[RawRow]]) -> Iterator[Tokens]:
        """Each chunk's tokens, in the chunks' order; a few chunks are read ahead."""
        waiting: deque[Future[Tokens]] = deque()
        for chunk in chunks:
            waiting.append(self._threads.submit(self._one, chunk))
            if len(waiting) > AHEAD * len(self._children):
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    def _one(self, chunk: Sequence[RawRow]) -> Tokens:
        child = self._idle.get()
        try:
            return _tokens(child, self._program, chunk)
        finally:
            self._idle.put(child)


def _tokens(child: Child, program: Program, chunk: Sequence[RawRow]) -> Tokens:
    try:
        return child.ask(program, chunk)
    except ProgramError as error:
        if child.is_closed:  # by the pool, which is left
            raise
        for row in chunk:
            _blame(child, program, row)
        found = f"a process that tokenizes was ended: {error}"
        fix = "start again with fewer of them: data.num_proc"
        raise InputError(f"the rows from {chunk[0].where} to {chunk[-1].where}", found=found, fix=fix) from None


def _blame(child: Child, program: Program, row: RawRow) -> None:
    """Raise InputError if a row alone is too much, and say for what."""
    try:
        child.ask(program, [row], limits=ALONE)
    except ProgramError as error:
        reason = str(error)
    else:
        return
    try:
        child.ask(rendered, row, *program.arguments, limits=ALONE)
    except ProgramError as error:
        fix = "mend the template or choose another with data.chat_template, or drop the row"
        raise InputError(row.where, found=f"a row that the chat template cannot write: {error}", fix=fix) from None
    fix = "drop the row, or take a model with a sound tokenizer"
    raise InputError(row.where, found=f"a row that the tokenizer cannot read: {reason}", fix=fix) from None
