"""Messages are for people: what no one would read is counted, not shown."""

import errno
import os

import pytest

from qlora_jax.base.errors import EXIT_BAD_INPUT, FULL, MAX_LINE, MAX_LINES, InputError, exit_status


def test_a_short_message_is_whole() -> None:
    error = InputError("file:1", found="x", expected="y", fix="z")
    assert str(error) == "file:1\n  found:    x\n  expected: y\n  do:       z"


def test_a_name_without_end() -> None:
    text = str(InputError("file", found="a" * 10**6 + "b"))
    assert len(text) < MAX_LINE + 100
    assert f"{10**6 + 1 + len('  found:    ') - MAX_LINE} more characters" in text
    assert text.endswith("b")


def test_faults_without_number() -> None:
    text = str(InputError("file", found="\n".join(map(str, range(10_000))), fix="mend it"))
    lines = text.split("\n")
    assert len(lines) == MAX_LINES + 1
    assert lines[MAX_LINES - 2] == f"    ... and {10_002 - MAX_LINES} more lines"
    assert lines[-2:] == ["9999", "  do:       mend it"]


def test_what_cannot_be_printed() -> None:
    assert str(InputError("file", found="\ud800")).encode() == rb"file" + b"\n  found:    " + rb"\ud800"


@pytest.mark.parametrize("number", [*FULL, errno.EACCES])
def test_a_full_disk_is_not_our_bug(number: int, capsys: pytest.CaptureFixture[str]) -> None:
    @exit_status
    def main() -> None:
        raise OSError(number, os.strerror(number), "runs/metrics.jsonl")

    if number not in FULL:
        with pytest.raises(OSError, match="denied"):
            main()
        return
    assert main() == EXIT_BAD_INPUT
    error = capsys.readouterr().err
    assert error.startswith(f"error: runs/metrics.jsonl\n  found:    {FULL[number]}") and "make room" in error
