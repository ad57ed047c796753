"""Programs from outside in a process of their own: answers, limits, crashes, and a new child after each."""

import os
import re
import signal
import threading
import time
from collections.abc import Iterator

import pytest

from qlora_jax.base.bounded import Child, Limits, Program, ProgramError
from qlora_jax.base.errors import InputError

SHORT = Limits(seconds=1, memory=2**28)


@pytest.fixture(scope="module")
def child() -> Iterator[Child]:
    child = Child()
    yield child
    child.close()


class Adder:
    def __init__(self, start: int) -> None:
        self.total = start

    def __call__(self, number: int) -> int:
        self.total += number
        return self.total


def count_for_ever() -> None:
    while True:
        pass


def double_for_ever() -> str:
    text = "ab"
    while True:
        text += text


def kill_itself(number: int) -> None:
    os.kill(os.getpid(), number)


def leave() -> None:
    os._exit(3)


def refuse() -> None:
    raise InputError("there", found="nothing", expected="something", fix="look")


def be_wrong() -> None:
    raise KeyError("a bug")


def panic() -> None:
    raise BaseException("as Rust's panics are")


def print_a_lot() -> str:
    print("not an answer")
    return "an answer"


def recurse() -> None:
    recurse()


def test_answers(child: Child) -> None:
    assert child.ask(pow, 2, 10) == 1024
    adder = Program(Adder, 5)
    assert [child.ask(adder, 1), child.ask(adder, 1), child.ask(Program(Adder, 0), 1)] == [6, 7, 1]
    assert child.ask(print_a_lot) == "an answer"
    assert len(child.ask(bytes, 2**22)) == 2**22, "more than a pipe holds"


@pytest.mark.parametrize(("program", "arguments", "reason"), [
    (count_for_ever, (), "did not end within 1 s"),
    (re.match, ("(a+)+$", "a" * 40 + "!"), "did not end within 1 s"),
    (double_for_ever, (), "needs more than 256 MiB of memory"),
    (bytes, (10**12,), "needs more than 256 MiB of memory"),
    (kill_itself, (signal.SIGSEGV,), "crashed (signal SIGSEGV)"),
    (leave, (), "crashed (exit status 3)"),
    (panic, (), "crashed: as Rust's panics are"),
    (recurse, (), "nested too deeply"),
])  # fmt: skip
def test_what_exceeds_its_limits_or_crashes_ends_its_child_alone(
    child: Child, program: object, arguments: tuple[object, ...], reason: str
) -> None:
    adder = Program(Adder, 0)
    assert child.ask(adder, 1) == 1
    with pytest.raises(ProgramError, match=re.escape(reason)):
        child.ask(program, *arguments, limits=SHORT)
    assert child.ask(adder, 1) == 1, "made anew"


def test_errors_for_people_come_back_as_they_are(child: Child) -> None:
    with pytest.raises(InputError) as caught:
        child.ask(refuse)
    assert (caught.value.where, caught.value.found, caught.value.fix) == ("there", "nothing", "look")


def test_a_bug_of_ours_stays_visible(child: Child) -> None:
    with pytest.raises(RuntimeError, match="be_wrong"):
        child.ask(be_wrong)


def test_a_long_question_has_more_of_both(child: Child) -> None:
    assert child.ask(len, b"x" * 2**22, limits=Limits(seconds=1, memory=2**20)) == 2**22


def test_closing_ends_a_question() -> None:
    child, errors = Child(), []

    def ask() -> None:
        try:
            child.ask(count_for_ever)
        except ProgramError as error:
            errors.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    while child._process is None:
        time.sleep(0.01)
    child.close()
    thread.join(20)
    assert not thread.is_alive() and len(errors) == 1
