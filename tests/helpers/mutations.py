"""Damage for the fuzz tests: values, bytes, files and paths as accidents and attackers make them. Each takes a `random.Random`."""

import copy
import gzip
import io
import json
import os
import shutil
import struct
from pathlib import Path
from random import Random
from typing import Any

NASTY = [None, True, False, 0, -1, 1, 3, 2**31, 2**32 - 1, 2**63, -2**63, 10**400, 10**4299, -10**4299, "1e400", 1e308, 5e-324,
    float("nan"), float("inf"), 0.5, "", "\0", "\ud800",
    "../../../etc/passwd", "/etc/passwd", "a" * 100_000, "model.safetensors", "model.embed_tokens.weight",
    "F64", "I4", "(a+)+$", "(.|.)*Z", ".*.*.*.*.*.*.*Z", "[",
    [], {}, [0], [[]],
    [-1, 5], [0, 2**62], [2**40] * 4, [1] * 1000, {"": ""}, {"a": {"a": {"a": 1}}}]  # fmt: skip
NASTY_YAML = ["!!bool x", "!!int ''", "!!timestamp x", "!!python/name:os.system", "&a [*a]", "0x" + "f" * 9000, "1" + ":59" * 3000,
    '"\\ud800"', '"a\\0b"', "~/x", "~nobody/x", ".inf", ".nan", "1e400", "-1", "[" * 3000, "{a: b}", "[1, 2]", "2001-99-99",
    "{<<: [1]}", "\x07", "* a", "a" * 300, "/dev/zero", "/dev/null", ".", "''", "9" * 4000, "yes", "null", "!!binary x"]  # fmt: skip
BOMB = "a: &a [l, l, l, l, l, l, l, l, l]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
NASTY_TEMPLATES = [
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{% set ns = namespace(x='ab') %}{% for a in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}{{ ns.x }}",
    "{{ 'a' * 10**12 }}", "{{ raise_exception('no') }}", "{{ messages[0].__class__.__mro__ }}", "{% if %}", "{{ 1 / 0 }}",
    "{{ messages.pop() }}", "{{ 9 ** 9 ** 9 ** 9 }}", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{% include 'x' %}", "",
    "{{ '\\ud800' }}", "{{ messages }}", "{{ namespace(__class__=1) }}", "{% for m in messages %}{{ m.content }}{% endfor %}",
    "{{ lipsum(n=100000, min=1000, max=1001) }}", "{{ strftime_now('%Y' * 10000) }}", "{{ [1] | tojson(indent=10**9) }}",
    "{{ 'x' | center(10**10) }}", "{{ (1,) * 10**9 }}", "{{ messages[0].content | replace('', 'a' * 100000) }}", "{{" * 5000,
]  # fmt: skip
NASTY_PATHS = ("folder", "fifo", "zero", "loop", "dangling", "empty", "gone", "unreadable")


def paths_of(value: Any, at: tuple[Any, ...] = ()) -> Any:
    """Every place in a JSON value."""
    yield at
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from paths_of(inner, (*at, key))


def changed_json(text: bytes, random: Random) -> bytes:
    """One to three values replaced, removed, moved or nested deeply; or the text itself cut or spoiled."""
    value = json.loads(text)
    for _ in range(random.randint(1, 3)):
        at = random.choice(list(paths_of(value)))
        nasty = copy.deepcopy(random.choice(NASTY))
        if not at:
            if random.random() < 0.1:
                return json.dumps(nasty).encode("utf-8", "surrogatepass")
            continue
        parent = value
        for key in at[:-1]:
            parent = parent[key]
        action = random.random()
        if action < 0.7:
            parent[at[-1]] = nasty
        elif action < 0.85:
            del parent[at[-1]]
        elif isinstance(parent, dict):
            parent[str(random.choice(NASTY))[:50]] = nasty
    data = json.dumps(value).encode("utf-8", "surrogatepass").replace(b'"1e400"', b"1e400")
    if random.random() < 0.1:
        depth = random.choice((50, 2000, 100_000))
        data = data[:-1] + b', "deep": ' + b"[" * depth + b"]" * depth + b"}"
    return changed_bytes(data, random) if random.random() < 0.15 else data


def changed_bytes(data: bytes, random: Random) -> bytes:
    """Bits flipped, bytes put in, taken out or cut off."""
    data = bytearray(data)
    for _ in range(random.randint(1, 4)):
        at = random.randrange(len(data) + 1)
        action = random.randrange(5)
        if action == 0 and data:
            data[at % len(data)] ^= 1 << random.randrange(8)
        elif action == 1:
            del data[at:]
        elif action == 2:
            data[at:at] = random.randbytes(random.randint(1, 40))
        elif action == 3:
            del data[at : at + random.randint(1, 40)]
        elif data:
            data[at % len(data)] = random.choice(b'\0\xff{}[]",:0-e')
    return bytes(data)


def changed_safetensors(data: bytes, random: Random) -> bytes:
    """Mostly the header: as JSON, or its length."""
    (length,) = struct.unpack("<Q", data[:8])
    header, rest = data[8 : 8 + length], data[8 + length :]
    action = random.random()
    if action < 0.6:
        header = changed_json(header, random)
        return struct.pack("<Q", len(header)) + header + rest
    if action < 0.8:
        length = random.choice((0, 1, length - 1, length + 1, len(data), 2**31, 2**63, 2**64 - 1, 99_999_999))
        return struct.pack("<Q", length) + header + rest
    return changed_bytes(data[:200] if action < 0.85 else data, random)


def changed_yaml(text: bytes, random: Random) -> bytes:
    """A value replaced by a nasty one, a bomb put in front, or bytes spoiled."""
    action = random.random()
    if action < 0.6:
        lines = text.decode().splitlines()
        at = random.choice([number for number, line in enumerate(lines) if ": " in line])
        lines[at] = f"{lines[at].partition(': ')[0]}: {random.choice(NASTY_YAML)}"
        return "\n".join(lines).encode("utf-8", "surrogatepass")
    return BOMB.encode() + text if action < 0.65 else changed_bytes(text, random)


def changed_gzip(data: bytes, random: Random) -> bytes:
    """The packed bytes spoiled, or what is in them."""
    if random.random() < 0.6:
        return changed_bytes(data, random)
    return gzip.compress(changed_bytes(gzip.decompress(data), random), mtime=0)


def changed_npy(data: bytes, random: Random) -> bytes:
    """An array emptied, of another type or shape, or spoiled in its header."""
    import numpy as np

    array, other = np.load(io.BytesIO(data)), io.BytesIO()
    action = random.randrange(6)
    if action == 5:
        return changed_bytes(data[:128], random) + data[128:]
    changed = (array[:0], array.astype(np.float64), array.reshape(1, -1), -array, np.array(["x"] * len(array)))[action]
    np.save(other, changed)
    return other.getvalue()


def changed_template(data: bytes, random: Random) -> bytes:
    """A nasty template, whole or put into this one, or bytes spoiled."""
    action = random.random()
    nasty = random.choice(NASTY_TEMPLATES).encode()
    return nasty if action < 0.6 else data + nasty if action < 0.75 else changed_bytes(data, random)


def changed_tokenizer(data: bytes, random: Random) -> bytes:
    """A normalizer, a splitter or a decoder that computes for ever or makes text without end; or the JSON spoiled."""
    if random.random() < 0.5:
        return changed_json(data, random)
    value, pattern = (
        json.loads(data),
        {"Regex": random.choice(("(a+)+$", "(x|xx)+y", "", "(?=x)", "(((a{99}){99}){99})", "[", "\\p{"))},
    )
    doubling = {"type": "Sequence", "normalizers": [
        {"type": "Replace", "pattern": {"String": random.choice(("e", "x", ""))}, "content": "ee"}] * 40}  # fmt: skip
    changes: list[tuple[str, Any]] = [
        ("normalizer", doubling),
        ("normalizer", {"type": "Replace", "pattern": pattern, "content": "aa"}),
        ("normalizer", {"type": "Precompiled", "precompiled_charsmap": random.choice(("", "AAAA", "//////////8="))}),
        ("pre_tokenizer", {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": random.random() < 0.5}),
        ("decoder", {"type": "Sequence", "decoders": [{"type": "Replace", "pattern": {"String": ""}, "content": "aa"}] * 40}),
        ("post_processor", None), ("pre_tokenizer", None), ("decoder", None),
    ]  # fmt: skip
    key, new = random.choice(changes)
    value[key] = new
    return json.dumps(value).encode()


def spoil_path(path: Path, how: str) -> None:
    """Put something else in a file's place."""
    path.unlink()
    if how == "folder":
        path.mkdir()
    elif how == "fifo":
        os.mkfifo(path)
    elif how == "zero":
        path.symlink_to("/dev/zero")
    elif how == "loop":
        path.symlink_to(path)
    elif how == "dangling":
        path.symlink_to(path.with_name("nowhere"))
    elif how in ("empty", "unreadable"):
        path.write_bytes(b"")
        path.chmod(0 if how == "unreadable" else 0o644)


def copied(source: Path, target: Path) -> Path:
    """A folder copied, whatever is there of it already."""
    shutil.rmtree(target, ignore_errors=True)
    return shutil.copytree(source, target, symlinks=True)
