"""Tokenized rows on the disk, mapped into memory: a dataset's size costs no memory, and the next run need not tokenize again."""

import atexit
import contextlib
import hashlib
import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import overload

import numpy as np

from qlora_jax.base.errors import FULL, InputError, disk_full
from qlora_jax.config.data import DataSettings
from qlora_jax.data.rows.row import RowError
from qlora_jax.data.rows.sources import Source
from qlora_jax.data.tokens.tokenization import Example, Recipe, Tokens

PROBLEMS_AT_ONCE = 10
"""So many bad rows are named before reading stops."""
KEY_DIGITS = 16


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


class TokenStore(Sequence[Example]):
    """A source's examples, in its own order, read from the disk when they are asked for.

    Attributes:
        lengths: [N] int64, tokens of each row.
        supervised: [N] int64, of these the ones that count in the loss.
        hashes: [N] uint64, equal for equal rows.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lengths, self.supervised, self.hashes, self._where_ends = (
            np.load(folder / f"{name}.npy") for name in ("lengths", "supervised", "hashes", "where_ends")
        )
        self._ends = np.cumsum(self.lengths)
        self._input_ids, self._loss_mask, self._wheres = (
            np.memmap(folder / f"{name}.bin", dtype, mode="r") if len(self) else np.array([], dtype)
            for name, dtype in (("input_ids", np.int32), ("loss_mask", np.bool_), ("wheres", np.uint8))
        )
        values = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        self.report = Report(**values | {"skipped": Counter(values["skipped"])})

    def __len__(self) -> int:
        """Rows that can be used."""
        return len(self.lengths)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        """Row `index`."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        here = slice(self._ends[index] - self.lengths[index], self._ends[index])
        start = self._where_ends[index - 1] if index % len(self) else 0
        where = self._wheres[start : self._where_ends[index]].tobytes().decode()
        return Example(np.asarray(self._input_ids[here]), np.asarray(self._loss_mask[here]), where)


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


class Kept:
    """Where tokenized rows are kept: `FOLDER/NAME-KEY`, known by the source's rows, the recipe and what is done with bad rows."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def find(self, source: Source, recipe: Recipe, settings: DataSettings) -> TokenStore | None:
        """What an earlier run kept."""
        entry = self._entry(source, recipe, settings)
        if entry is None or not (entry / "report.json").is_file():
            return None
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # damaged: it is made again
            return TokenStore(entry)
        return None

    def write(
        self,
        source: Source,
        recipe: Recipe,
        settings: DataSettings,
        chunks: Iterable[Tokens],
        progress: Callable[[int], object],
    ) -> TokenStore:
        """Keep a source's tokens; where the folder cannot be written or the rows not be known again, for this run only.

        Args:
            progress: called with the number of rows done.

        Raises:
            InputError: rows that cannot be used, or none that can; or the disk became full.
        """
        entry = self._entry(source, recipe, settings)
        place = self._writable(entry)
        try:
            _write(place, Gate(source.name, settings), chunks, progress)
        except BaseException as error:
            shutil.rmtree(place, ignore_errors=True)
            if isinstance(error, OSError) and error.errno in FULL:
                raise disk_full(error, place.parent) from None
            raise
        if entry is None or place.parent != entry.parent:
            return TokenStore(place)
        with contextlib.suppress(OSError):
            return TokenStore(place.rename(entry))
        if self.find(source, recipe, settings) is None:  # what is there is damaged; else another run was faster
            shutil.rmtree(entry, ignore_errors=True)
            return TokenStore(place.rename(entry))
        shutil.rmtree(place, ignore_errors=True)
        return TokenStore(entry)

    def _entry(self, source: Source, recipe: Recipe, settings: DataSettings) -> Path | None:
        if source.identity is None:
            return None
        policies = [settings.bad_rows, settings.duplicates, settings.max_rows]
        text = json.dumps([source.name, source.identity, recipe.identity(), policies])
        name = "".join(c if c.isalnum() else "-" for c in Path(source.name).name).strip("-")
        return self.folder / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:KEY_DIGITS]}"

    def _writable(self, entry: Path | None) -> Path:
        if entry is not None:
            with contextlib.suppress(OSError):
                self.folder.mkdir(parents=True, exist_ok=True)
                return Path(tempfile.mkdtemp(prefix=".writing-", dir=self.folder))
        place = Path(tempfile.mkdtemp(prefix="qlora_jax-tokens-"))
        atexit.register(shutil.rmtree, place, ignore_errors=True)
        return place


def _write(place: Path, gate: Gate, chunks: Iterable[Tokens], progress: Callable[[int], object]) -> None:
    lengths, supervised, hashes, where_lengths = [], [], [], []
    with contextlib.ExitStack() as stack:
        names = ("input_ids", "loss_mask", "wheres")
        ids, masks, wheres = (stack.enter_context((place / f"{name}.bin").open("wb")) for name in names)
        for tokens in chunks:
            kept = gate.pass_on(tokens)
            here = np.repeat(kept, tokens.lengths)
            starts = np.cumsum(tokens.lengths) - tokens.lengths
            counts = np.add.reduceat(tokens.loss_mask, starts, dtype=np.int64) if len(starts) else starts
            names_kept = [where.encode() for where, keep in zip(tokens.wheres, kept, strict=True) if keep]
            ids.write(tokens.input_ids[here].tobytes())
            masks.write(tokens.loss_mask[here].tobytes())
            wheres.write(b"".join(names_kept))
            lengths.append(tokens.lengths[kept])
            supervised.append(counts[kept])
            hashes.append(tokens.hashes[kept])
            where_lengths.append(np.array([len(name) for name in names_kept], np.int64))
            progress(gate.report.num_read)
    gate.stop_if_refused()
    _check_not_empty(gate, sum(map(len, lengths)))
    np.save(place / "lengths.npy", np.concatenate(lengths))
    np.save(place / "supervised.npy", np.concatenate(supervised))
    np.save(place / "hashes.npy", np.concatenate(hashes))
    np.save(place / "where_ends.npy", np.cumsum(np.concatenate(where_lengths)))
    (place / "report.json").write_text(json.dumps(vars(gate.report)), encoding="utf-8")


def _check_not_empty(gate: Gate, num_rows: int) -> None:
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
