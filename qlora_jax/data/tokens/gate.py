"""What becomes of rows that cannot be used: named and refused, or skipped and counted."""

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from qlora_jax.base.errors import InputError
from qlora_jax.config.data import DataSettings
from qlora_jax.data.rows.row import RowError
from qlora_jax.data.tokens.tokenization import Tokens

PROBLEMS_AT_ONCE = 10
"""Bad rows that are named before reading stops."""
MAX_UNUSED, MAX_NAME = 100, 60
"""Names of unused fields that are counted, and the characters of one."""


@dataclass
class Report:
    """What happened to a source's rows on the way."""

    num_read: int = 0
    num_truncated: int = 0
    num_split: int = 0
    num_duplicates: int = 0
    """Rows that repeat an earlier one, kept or not."""
    skipped: Counter[str] = field(default_factory=Counter)
    """By kind of problem."""
    first_skipped: dict[str, str] = field(default_factory=dict)
    """Of each kind the first, in words."""
    unused: Counter[str] = field(default_factory=Counter)
    """Rows that have a field, or a message's key, of which nothing was made; by name."""


class Gate:
    """Lets rows in, or says why not: counts what is wrong, skips or stops as the settings say."""

    def __init__(self, name: str, settings: DataSettings) -> None:
        self.name, self.report = name, Report()
        self._settings = settings
        self._seen: dict[int, str] = {}
        self._stopping: list[RowError] = []

    def pass_on(self, tokens: Tokens) -> np.ndarray:
        """[rows] bool: which of them are kept.

        Raises:
            InputError: rows that the settings do not allow, several at once.
        """
        report = self.report
        report.num_read += tokens.num_read
        report.num_truncated += tokens.num_truncated
        report.num_split += tokens.num_split
        for name, count in tokens.unused.items():
            if name in report.unused or len(report.unused) < MAX_UNUSED:
                report.unused[name[:MAX_NAME]] += count
        for problem in tokens.problems:
            self._refuse(problem)
        kept = np.ones(len(tokens.lengths), bool)
        for row, (key, where) in enumerate(zip(tokens.hashes.tolist(), tokens.wheres, strict=True)):
            first = self._seen.setdefault(key, where)
            if first is not where:
                report.num_duplicates += 1
                if self._settings.duplicates != "keep":
                    kept[row] = False
                    fix = "drop one of them, or set data.duplicates=keep"
                    self._refuse(RowError(where, "duplicate", found=f"the same tokens as {first}", fix=fix))
        if len(self._stopping) >= PROBLEMS_AT_ONCE:
            self.stop_if_refused()
        return kept

    def stop_if_refused(self) -> None:
        """Raise what was gathered.

        Raises:
            InputError: something was.
        """
        if not self._stopping:
            return
        shown = self._stopping[:PROBLEMS_AT_ONCE]
        first = shown[0]
        settings = " and ".join(f"data.{name}=skip" for name in dict.fromkeys(_setting(row) for row in shown))
        fix = "; or ".join(filter(None, (first.fix, f"leave such rows out with {settings}")))
        if len(shown) == 1:
            raise RowError(first.where, first.kind, found=first.found, expected=first.expected, fix=fix)
        lines = "".join(f"\n    {problem.where}: {problem.found}" for problem in shown)
        found = f"rows that cannot be used (of the first {self.report.num_read:,} read):{lines}"
        raise InputError(self.name, found=found, fix=f"as for the first: {fix}")

    def _refuse(self, problem: RowError) -> None:
        if getattr(self._settings, _setting(problem)) == "stop":
            self._stopping.append(problem)
        else:
            self.report.skipped[problem.kind] += 1
            self.report.first_skipped.setdefault(problem.kind, f"{problem.where}: {problem.found}")


def _setting(problem: RowError) -> str:
    """The setting that says what to do with such a row."""
    return {"too long": "too_long", "duplicate": "duplicates"}.get(problem.kind, "bad_rows")


def check_not_empty(gate: Gate, num_rows: int) -> None:
    """Refuse a source none of whose rows can be used.

    Raises:
        InputError: there is no row.
    """
    if num_rows:
        return
    report = gate.report
    if not report.num_read:
        fix = "check that the file was written completely"
        raise InputError(gate.name, found="no rows", expected="at least one", fix=fix)
    lines = [
        f"\n    {count:,} {kind}, the first: {report.first_skipped[kind]}" for kind, count in report.skipped.items()
    ]
    found = f"{report.num_read:,} rows, and every one was skipped:{''.join(lines)}"
    raise InputError(
        gate.name,
        found=found,
        expected="at least one row to learn from",
        fix="mend them, or map names with data.fields",
    )
