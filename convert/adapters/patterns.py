"""Evaluates an adapter's regular expressions as PEFT does, in a process with limits of time and memory.

They are programs of someone else's: a few characters can take for ever (`(a+)+$`), and which do cannot be told by looking at them. So the
evaluation is bounded, not the expression. Expressions that repeat nothing are matched here: each takes no longer than its name is long.
"""

import json
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from convert.adapters import pattern_child
from convert.adapters.pattern_child import Match, first_matches
from qlora_jax.base.errors import InputError

CPU_SECONDS, WALL_SECONDS, MEMORY_BYTES = 5, 40.0, 512 * 2**20
"""Limits on evaluating all expressions of an adapter: CPU time decides, the other is for a process that waits. Those of a usual adapter,
against the 562 modules of an 80-layer model, take 0.01 s."""
MAX_PLAIN = 1000
"""Length up to which an expression without repeats is matched in this process, and the number of such expressions."""
_PLAIN = re.compile(r"[\w.\-]*")

Rules = Mapping[str, tuple[str, Sequence[str]]]
"""The setting that holds the expressions → how PEFT matches them (a key of `pattern_child.RULES`), and the expressions."""


def evaluate(where: Path, rules: Rules, paths: Sequence[str]) -> dict[str, dict[str, Match]]:
    """Match modules' names with each setting's expressions: for each setting, by name, the first expression that matches.

    Args:
        where: the file that holds the settings, for messages.
        paths: the modules' names, such as `model.layers.0.self_attn.q_proj`.

    Raises:
        InputError: an expression is none, or takes more time or memory than the limits allow.
    """
    texts = [text for _, expressions in rules.values() for text in expressions]
    if len(texts) <= MAX_PLAIN and all(len(text) <= MAX_PLAIN and _PLAIN.fullmatch(text) for text in texts):
        return {name: first_matches(rule, expressions, paths) for name, (rule, expressions) in rules.items()}
    lines, status = _ask_child(rules, paths)
    outcome = lines[-1] if lines else None
    if not isinstance(outcome, dict):
        name, number = outcome or (next(name for name, (_, expressions) in rules.items() if expressions), 0)
        raise _beyond_limits(where, name, rules[name][1], number, status)
    problems = [f"{name}: {found}" for name, found in outcome.items() if isinstance(found, str)]
    if problems:
        raise InputError(
            where,
            found="; ".join(problems),
            expected="names of modules, or regular expressions of Python's",
            fix="correct the expression, or list the names of the modules",
        )
    return {name: {path: tuple(match) for path, match in found.items()} for name, found in outcome.items()}


def _ask_child(rules: Rules, paths: Sequence[str]) -> tuple[list[Any], int | None]:
    """The lines that the child wrote, and its exit status; None where it was stopped for taking too long."""
    question = {"rules": rules, "paths": list(paths), "seconds": CPU_SECONDS, "memory": MEMORY_BYTES}
    command = [sys.executable, "-I", "-S", pattern_child.__file__]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as child:
        try:
            written, _ = child.communicate(json.dumps(question), timeout=WALL_SECONDS)
            status: int | None = child.returncode
        except subprocess.TimeoutExpired:
            child.kill()
            written, _ = child.communicate()
            status = None
    lines = []
    for line in written.splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:  # cut off where the child was killed
            break
    return lines, status


def _beyond_limits(where: Path, name: str, texts: Sequence[str], number: int, status: int | None) -> InputError:
    """Of an expression in whose evaluation the child ended."""
    limit = f"{CPU_SECONDS} s" if status is None or status < 0 else f"{MEMORY_BYTES >> 20} MiB"
    many = f", number {number + 1} of {len(texts):,}," if len(texts) > 1 else ""
    return InputError(
        where,
        found=f"{name} holds {texts[number]!r}: matching it{many} with the modules' names takes more than {limit}",
        expected="names of modules, or regular expressions that can be evaluated",
        fix=f"write {name} with the names of the modules, such as q_proj",
    )
