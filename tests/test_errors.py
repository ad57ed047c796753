"""Messages are for people: what no one would read is counted, not shown."""

from qlora_jax.errors import MAX_LINE, MAX_LINES, InputError


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
