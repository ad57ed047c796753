"""Tokenized rows on the disk, mapped into memory: a dataset's size costs no memory, and the next run need not tokenize again."""

import atexit
import contextlib
import hashlib
import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import overload

import numpy as np

from qlora_jax.base.checksum import file_checksum
from qlora_jax.base.errors import FULL, InputError, disk_full
from qlora_jax.base.files import Scratch
from qlora_jax.base.reading import open_file, read_json_object, reading
from qlora_jax.config.data import DataSettings
from qlora_jax.data.rows.sources import Source
from qlora_jax.data.tokens.gate import Gate, Report, check_not_empty
from qlora_jax.data.tokens.recipe import Recipe
from qlora_jax.data.tokens.tokenization import Example, Tokens

KEY_DIGITS = 16
ARRAYS = ("lengths", "supervised", "hashes", "where_ends")
"""An entry's arrays, [rows] each."""
REPORT, CHECKSUMS = "report.json", "checksums.json"


class TokenStore(Sequence[Example]):
    """A source's examples, in its own order, read from the disk when they are asked for.

    Attributes:
        lengths: [N] int64, tokens of each row.
        supervised: [N] int64, of these the ones that count in the loss.
        hashes: [N] uint64, equal for equal rows.
    """

    def __init__(self, folder: Path) -> None:
        """Open what `_write` left.

        Raises:
            InputError: a file is not there, damaged, or does not fit the others.
        """
        self.folder = folder
        self.lengths, self.supervised, self.hashes, self._where_ends = (
            _array(folder / f"{name}.npy", dtype)
            for name, dtype in (
                ("lengths", np.int64), ("supervised", np.int64), ("hashes", np.uint64), ("where_ends", np.int64),
            )
        )  # fmt: skip
        self._ends = np.cumsum(self.lengths)
        self._input_ids, self._loss_mask, self._wheres = (
            _mapped(folder / f"{name}.bin", dtype) for name, dtype in (
                ("input_ids", np.int32), ("loss_mask", np.bool_), ("wheres", np.uint8),
            )
        )  # fmt: skip
        self.report = _report(folder / "report.json")
        self._check()

    def _check(self) -> None:
        rows, ends = len(self.lengths), self._where_ends
        sound = (
            rows == len(self.supervised) == len(self.hashes) == len(ends) > 0
            and bool((self.lengths > 0).all() and (self.lengths < 2**31).all())
            and bool((self.supervised >= 0).all() and (self.supervised <= self.lengths).all())
            and self._ends[-1] == len(self._input_ids) == len(self._loss_mask)
            and bool((np.diff(ends, prepend=0) >= 0).all()) and ends[-1] == len(self._wheres)
            and self.report.num_read >= 0
        )  # fmt: skip
        if not sound:
            raise InputError(self.folder, found="tokenized rows whose files do not fit one another")

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


def _array(path: Path, dtype: type) -> np.ndarray:
    """A whole array [N], of this dtype."""
    with open_file(path) as file, reading(path, "a damaged array"):
        array: np.ndarray = np.load(file, allow_pickle=False)
    if array.dtype != dtype or array.ndim != 1:
        raise InputError(path, found=f"an array {array.dtype}{list(array.shape)}", expected=f"{np.dtype(dtype)}[N]")
    return array


def _mapped(path: Path, dtype: type) -> np.ndarray:
    """A file as an array [N], mapped."""
    open_file(path).close()
    with reading(path, "cannot be mapped"):
        return np.memmap(path, dtype, mode="r")


def _report(path: Path) -> Report:
    values = read_json_object(path)
    with reading(path, "a damaged report"):
        counts = {name: values.pop(name) for name in ("skipped", "unused", "first_skipped")}
        skipped, unused, first_skipped = Counter(counts["skipped"]), Counter(counts["unused"]), counts["first_skipped"]
        report = Report(**values, skipped=skipped, unused=unused, first_skipped=first_skipped)
        numbers = [*values.values(), *skipped.values(), *unused.values()]
        if (
            not all(type(number) is int for number in numbers)
            or counts["skipped"].keys() != counts["first_skipped"].keys()
        ):
            raise ValueError("its counts are no numbers")
    return report


class Kept:
    """Where tokenized rows are kept: `FOLDER/NAME-KEY`, known by the source's rows, the recipe and what is done with bad rows.

    Each entry says in `checksums.json` what it was made of and what its files' checksums are.

    Args:
        log: told, in a line, of an entry that is damaged or another's and therefore made anew.
    """

    def __init__(self, folder: Path, log: Callable[[str], object] = lambda line: None) -> None:
        self.folder, self._log = folder, log

    def find(self, source: Source, recipe: Recipe, settings: DataSettings) -> TokenStore | None:
        """What an earlier run kept, if it is what was written; any other is removed. All of it is read for that, once."""
        entry = self._entry(source, recipe, settings)
        if entry is None or not entry.exists():
            return None
        try:
            _verify(entry, _identity(source, recipe, settings))
            return TokenStore(entry)
        except Exception as error:  # numpy and json raise nearly anything for a damaged file
            self._log(f"{entry}: damaged or of other rows, made again ({error})")
        with contextlib.suppress(OSError):
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
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
        scratch = self._writable(entry)
        place = scratch.path
        try:
            _write(place, Gate(source.name, settings), chunks, progress)
            _write_checksums(place, _identity(source, recipe, settings))
        except BaseException as error:
            shutil.rmtree(place, ignore_errors=True)
            scratch.close()
            if isinstance(error, OSError) and error.errno in FULL:
                raise disk_full(error, place.parent) from None
            raise
        if entry is None or place.parent != entry.parent:
            return TokenStore(place)  # its lock is held as long as it is read
        with contextlib.closing(scratch):
            return self._named(place, entry, source, recipe, settings)

    def _named(self, place: Path, entry: Path, source: Source, recipe: Recipe, settings: DataSettings) -> TokenStore:
        """The store at `place` under its own name, or that of another run that was faster."""
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
        name = "".join(c if c.isalnum() else "-" for c in Path(source.name).name).strip("-")
        return self.folder / f"{name}-{_identity(source, recipe, settings)[:KEY_DIGITS]}"

    def _writable(self, entry: Path | None) -> Scratch:
        if entry is not None:
            with contextlib.suppress(OSError):
                self.folder.mkdir(parents=True, exist_ok=True)
                return Scratch(self.folder, ".writing-")
        scratch = Scratch(Path(tempfile.gettempdir()), "qlora_jax-tokens-")
        atexit.register(shutil.rmtree, scratch.path, ignore_errors=True)
        return scratch


def _identity(source: Source, recipe: Recipe, settings: DataSettings) -> str:
    """Hexadecimal digits that tell rows, recipe and policies from any others."""
    policies = [settings.bad_rows, settings.duplicates, settings.max_rows]
    text = json.dumps([source.name, source.identity, recipe.identity(), policies])
    return hashlib.sha256(text.encode()).hexdigest()


def _write_checksums(place: Path, identity: str) -> None:
    files = {path.name: [path.stat().st_size, file_checksum(path)] for path in sorted(place.iterdir())}
    (place / CHECKSUMS).write_text(json.dumps({"made_of": identity, "files": files}), encoding="utf-8")


def _verify(entry: Path, identity: str) -> None:
    """Raises ValueError, OSError, or what json raises: the entry is not what was written there, or was made of something else."""
    record = json.loads((entry / CHECKSUMS).read_text(encoding="utf-8"))
    if record["made_of"] != identity:
        raise ValueError("made of other rows or in another way")
    found = {path.name: path.stat().st_size for path in entry.iterdir() if path.name != CHECKSUMS}
    if found != {name: size for name, (size, _) in record["files"].items()}:
        raise ValueError("other files, or files of another size, than were written")
    changed = [name for name, (_, summed) in record["files"].items() if file_checksum(entry / name) != summed]
    if changed:
        raise ValueError(f"other bytes in {', '.join(changed)} than were written")


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
    check_not_empty(gate, sum(map(len, lengths)))
    np.save(place / "lengths.npy", np.concatenate(lengths))
    np.save(place / "supervised.npy", np.concatenate(supervised))
    np.save(place / "hashes.npy", np.concatenate(hashes))
    np.save(place / "where_ends.npy", np.cumsum(np.concatenate(where_lengths)))
    (place / REPORT).write_text(json.dumps(vars(gate.report)), encoding="utf-8")
