"""Programs from outside, in a process of their own with limits of time and memory.

A chat template is a program, and so are a tokenizer's normalizer and a regular expression: a line of one can compute for ever, take all
memory, or crash its library. None of them is run in the process that trains. A `Child` runs them, and what exceeds its limits ends that
child, and is said in a `ProgramError`. The next question starts a new one.

    child = Child()
    child.ask(function, *arguments)                     a function of a module of ours, in the child
    child.ask(Program(make, *arguments), *more)         what `make(*arguments)` made there, kept for the next questions

Time is the processor's, not the clock's, so that a busy or suspended machine is no reason; memory is address space beyond what the child
has when it is asked. Both grow with the question's size. Nothing is forked: JAX has threads.
"""

import atexit
import contextlib
import dataclasses
import functools
import itertools
import math
import os
import pickle
import resource
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from qlora_jax.base.errors import InputError
from qlora_jax.base.reading import reason_of

SIZE = 8
"""Bytes of a message's length."""
MAX_ANSWER_BYTES = 2**29
SECONDS_A_MIB, MEMORY_A_BYTE = 20.0, 200
"""Added to the limits for the question's size. Tokenizing takes about a second and a hundred bytes of memory a byte at worst."""
CLOCK = 5
"""Seconds of the clock for each of the processor's, before a child that does not compute either is given up."""
STARTING = 60.0
"""Seconds of the clock for a child to start."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits for one question: seconds of the processor's time, and bytes of memory beyond what the child has already."""

    seconds: float = 10.0
    memory: int = 2**30


LIMITS = Limits()


class ProgramError(Exception):
    """A program from outside was ended: it took too long or too much memory, or crashed. The message says which, without a subject."""


class Program:
    """An object that a child makes when it is first asked, and keeps: `make(*arguments)`, a callable.

    Args:
        make: a function or class of a module, which the child imports.
        arguments: picklable.
    """

    _numbers = itertools.count()

    def __init__(self, make: Callable[..., Callable[..., Any]], *arguments: Any) -> None:
        self.make, self.arguments, self.number = make, arguments, next(self._numbers)


def _pipe(pipe: IO[bytes] | None) -> IO[bytes]:
    assert pipe is not None, "made with the process"
    return pipe


class Child:
    """A process that answers one question at a time, started when it is first asked. For any thread."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._errors: IO[bytes] | None = None
        self._has: set[int] = set()
        self._lock = threading.Lock()
        self.is_closed = False
        """Whether `close` was called: questions are then answered with a ProgramError."""

    def start(self) -> None:
        """Start the process, without waiting until it is ready."""
        with self._lock:
            self._start()

    def ask(self, program: Program | Callable[..., Any], *arguments: Any, limits: Limits | None = None) -> Any:
        """The answer of a program or a function, called with `arguments` in the child.

        Raises:
            ProgramError: it exceeds `limits` (by default `LIMITS`) or crashes.
            InputError: it raised one.
        """
        with self._lock:
            self._start()
            made = None
            if isinstance(program, Program):
                made = None if program.number in self._has else (program.make, program.arguments)
                self._has.add(program.number)
            asked: Any = program.number if isinstance(program, Program) else program
            try:
                kind, answer = self._exchange((made, asked, arguments), limits or LIMITS)
            except BaseException:  # a child that is interrupted while it answers has half an answer left
                self._close()
                raise
            if kind == "failed":
                self._close()
                raise ProgramError(answer)
        if kind == "raised":
            raise answer
        if kind == "bug":
            raise RuntimeError(f"in a process of ours:\n{answer}")
        return answer

    def close(self) -> None:
        """End the process, whatever it is doing, also for a thread that waits for its answer. It is not started again."""
        self.is_closed = True
        process = self._process
        if process is not None:
            process.kill()
        with self._lock:
            self._close()

    def _start(self) -> None:
        if self.is_closed:
            raise ProgramError("its process was closed")
        if self._process is not None:
            return
        path = os.pathsep.join(entry for entry in sys.path if entry)
        environment = os.environ | {"PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
        command = [sys.executable, "-c", "from qlora_jax.base.bounded import main; main()"]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, env=environment,
            process_group=0,  # Ctrl-C is for the parent, which may want to ask again before it leaves
        )  # fmt: skip
        self._has = set()

    def _close(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait()
        with contextlib.suppress(OSError):  # half a message is left in it
            _pipe(process.stdin).close()
        _pipe(process.stdout).close()
        _pipe(self._errors).close()

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:  # closed by another thread while it was asked
            raise ProgramError("its process was closed")
        return self._process

    def _exchange(self, message: tuple[Any, ...], limits: Limits) -> tuple[str, Any]:
        data = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
        seconds = limits.seconds + SECONDS_A_MIB * len(data) / 2**20
        memory = limits.memory + MEMORY_A_BYTE * len(data)
        header = pickle.dumps((seconds, memory), pickle.HIGHEST_PROTOCOL)
        deadline = time.monotonic() + STARTING + CLOCK * seconds
        questions = _pipe(self._running().stdin)
        try:
            for part in (header, data):
                questions.write(len(part).to_bytes(SIZE, "little"))
                questions.write(part)
            questions.flush()
            size = int.from_bytes(self._read(SIZE, deadline), "little")
            return pickle.loads(self._read(size, deadline))  # from our own child
        except TimeoutError:
            return "failed", f"it did not end within {STARTING + CLOCK * seconds:.0f} s by the clock"
        except (EOFError, OSError):
            return "failed", self._end(seconds, memory)

    def _read(self, size: int, deadline: float) -> bytearray:
        """So many bytes of the answer."""
        buffer, descriptor, filled = bytearray(size), _pipe(self._running().stdout).fileno(), 0
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        with memoryview(buffer) as view:
            while filled < size:
                if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
                    raise TimeoutError
                read = os.readv(descriptor, [view[filled:]])
                if not read:
                    raise EOFError
                filled += read
        return buffer

    def _end(self, seconds: float, memory: int) -> str:
        """Why the process is no more."""
        status, errors = self._running().wait(), _pipe(self._errors)
        errors.seek(max(0, errors.seek(0, os.SEEK_END) - 2000))
        last = errors.read().decode(errors="replace").strip()
        if status == -signal.SIGXCPU:
            return f"it did not end within {seconds:.0f} s"
        if status == -signal.SIGKILL:
            return "it was killed, as if out of memory"
        if "memory allocation" in last or "MemoryError" in last:
            return f"it needs more than {memory / 2**20:,.0f} MiB of memory"
        named = f"signal {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
        return f"it crashed ({named})" + (f": {last.splitlines()[-1]}" if last else "")


@functools.cache
def companion() -> Child:
    """The one child that this process asks whatever is asked once; it ends with this process."""
    child = Child()
    atexit.register(child.close)
    return child


def explained(error: ProgramError, where: object, what: str, fix: str) -> InputError:
    """An error of a program for people.

    Args:
        where: the file or setting that the program comes from.
        what: what it was to do, such as "a chat template that cannot be used".
    """
    return InputError(where, found=f"{what}: {error}", fix=fix)


def main() -> None:
    """The whole life of a child: questions from standard input, answers to standard output, until there are no more."""
    import gc

    gc.freeze()  # rows leave no cycles behind, but so many objects at once that looking for some takes a tenth of the time
    gc.set_threshold(100_000)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever prints must not print into the answers
    kept: dict[int, Callable[..., Any]] = {}
    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            limits, question = _receive(sys.stdin.buffer), _receive(sys.stdin.buffer)
            answer = _answer(limits, question, kept)
            data = pickle.dumps(answer, pickle.HIGHEST_PROTOCOL)
            if len(data) > MAX_ANSWER_BYTES:
                data = pickle.dumps(("failed", f"it makes more than {MAX_ANSWER_BYTES / 2**20:,.0f} MiB of text"))
            answers.write(len(data).to_bytes(SIZE, "little"))
            answers.write(data)
            answers.flush()


def _answer(limits: tuple[float, int], question: tuple[Any, ...], kept: dict[int, Callable[..., Any]]) -> Any:
    made, asked, arguments = question
    _limit(*limits)
    try:
        if made:
            kept[asked] = made[0](*made[1])
        function = kept[asked] if isinstance(asked, int) else asked
        return "value", function(*arguments)
    except InputError as error:
        return "raised", error
    except MemoryError:
        return "failed", f"it needs more than {limits[1] / 2**20:,.0f} MiB of memory"
    except RecursionError as error:
        return "failed", reason_of(error)
    except Exception:  # a bug of ours: the parent shows it
        return "bug", traceback.format_exc()
    except BaseException as error:  # a panic of a Rust library
        return "failed", f"it crashed: {reason_of(error)}"


def _limit(seconds: float, memory: int) -> None:
    """Set the soft limits, for what comes now; the kernel ends the process at the first, and gives no more memory at the second."""
    _set(resource.RLIMIT_CPU, math.ceil(sum(resource.getrusage(resource.RUSAGE_SELF)[:2]) + seconds))
    with contextlib.suppress(OSError):  # there is no /proc but on Linux
        has = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
        _set(resource.RLIMIT_AS, has + memory)


def _set(kind: int, soft: int) -> None:
    hard = resource.getrlimit(kind)[1]
    resource.setrlimit(kind, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard))


def _receive(pipe: IO[bytes]) -> Any:
    header = pipe.read(SIZE)
    if len(header) < SIZE:
        raise EOFError
    size = int.from_bytes(header, "little")
    data = pipe.read(size)
    if len(data) < size:
        raise EOFError
    return pickle.loads(data)  # from our own parent
