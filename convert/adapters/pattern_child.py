"""Matches an adapter's regular expressions against modules' names: the work itself, and a program that does it under limits.

As a program it is a process of its own (see `convert.adapters.patterns`), because the time and memory that an expression takes cannot
be known without evaluating it. It needs the standard library alone, and is started by its path. Standard input: one JSON object; standard
output: a JSON line [rule, number] before each expression, and a last one with the outcome.
"""

import json
import re
import resource
import sys
import warnings
from collections.abc import Callable, Sequence

Match = tuple[int, int | None]
"""The number of the first expression that matches a name; with the rule `layer` also the layer's number."""

RULES = {
    "whole": ("", ""),
    "inside": (r"(^|.*\.)", r"($|\..*)"),
    "ending": (r"(.*\.)?(", ")$"),
    "layer": (r"(?:^|.*?\.)", r"\.(?P<idx>\d+)\."),
}
"""What PEFT puts before and after an expression that it matches with modules' names (`check_target_module_exists`, `get_pattern_key`)."""


def first_matches(
    rule: str, texts: Sequence[str], paths: Sequence[str], begin: Callable[[int], object] = lambda number: None
) -> dict[str, Match]:
    """Find the first expression that matches each name. Names that none matches are left out.

    Args:
        rule: a key of `RULES`.
        begin: called with each expression's number before it is evaluated.

    Raises:
        ValueError: some are no regular expressions; the message lists each with its reason.
        MemoryError: an expression needs more than there is.
    """
    found: dict[str, Match] = {}
    wrong: list[str] = []
    left = list(paths)
    before, after = RULES[rule]
    for number, text in enumerate(texts):
        begin(number)
        try:
            expression = re.compile(f"{before}{text}{after}")
        except (re.error, RecursionError, OverflowError) as error:
            wrong.append(f"{text!r} is not a regular expression: {error}")
            continue
        match = expression.fullmatch if rule == "whole" else expression.match
        for path in left:
            if (hit := match(path)) is not None:
                found[path] = number, int(hit["idx"]) if rule == "layer" else None
        left = [path for path in left if path not in found]
    if wrong:
        raise ValueError("; ".join(wrong))
    return found


def main() -> None:
    """Answer the question on standard input: under its limits, for each rule by name the matches, or what is wrong with it."""
    asked = json.load(sys.stdin)
    resource.setrlimit(resource.RLIMIT_AS, (asked["memory"], asked["memory"]))
    resource.setrlimit(resource.RLIMIT_CPU, (asked["seconds"], asked["seconds"]))
    warnings.simplefilter("ignore")
    outcome: dict[str, object] = {}
    for name, (rule, texts) in asked["rules"].items():

        def begin(number: int, name: str = name) -> None:
            print(json.dumps([name, number]), flush=True)

        try:
            outcome[name] = first_matches(rule, texts, asked["paths"], begin)
        except ValueError as error:
            outcome[name] = str(error)
    print(json.dumps(outcome), flush=True)


if __name__ == "__main__":
    main()
