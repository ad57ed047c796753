"""Where rows come from: a file, a folder of files, or a dataset on the Hugging Face hub. Rows are read one at a time from each."""

import functools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from qlora_jax.base.errors import InputError
from qlora_jax.base.reading import kind_of, reading, refuse_odd_files
from qlora_jax.config.data import DataSettings, SourceSettings
from qlora_jax.data.rows.arrow import ROWS_AT_ONCE, decoded_rows, table_rows
from qlora_jax.data.rows.files import SUFFIXES, is_data_file, read_file, suffix
from qlora_jax.data.rows.row import RawRow
from qlora_jax.data.rows.splits import DEFAULT, Splits, folder_splits, is_cut, parts, shown, splits_of

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
OFFLINE_ADVICE = "check the name and the connection, or give a file's path: JSONL, JSON, CSV, Parquet or text"


@dataclass(frozen=True)
class Source:
    """Rows that can be read, in a fixed order, as often as needed."""

    name: str
    """As it is shown: a path, or the hub's id and split."""
    rows: Callable[[], Iterator[RawRow]]
    identity: str | None
    """Equal for equal rows, so that what was made of them can be kept; None where nobody can say."""
    nbytes: int | None = None
    """Of the files, as a measure of how much there is to read."""
    num_rows: int | None = None
    notes: tuple[str, ...] = ()
    """What is left out of it, for the log."""
    reads_sample_by: bool = False
    """Whether there are text files among them, which `data.sample_by` cuts."""


def open_source(settings: SourceSettings, data: DataSettings) -> Source:
    """Find a source; nothing is read from it yet, except what tells that it is one.

    Raises:
        InputError: there is no such file, folder, dataset or split, or it holds no file of rows.
    """
    path = Path(settings.path)
    kind = kind_of(path)
    if kind == "a folder":
        if any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
            return _saved_dataset(path, settings, data)
        return _files(path, folder_splits(path, settings.name), settings, data)
    if kind == "a file":
        if not is_data_file(path):
            expected = f"a name ending in {', '.join(SUFFIXES)} (all but .parquet may be gzipped: .gz)"
            raise InputError(path, found="a file of an unknown kind", expected=expected, fix="rename or convert it")
        _check_no_name(path, settings, "a file has no configurations")
        return _files(path, Splits(files={DEFAULT: [path]}), settings, data)
    if kind != "nothing":
        raise InputError(path, found=kind, expected="a file of rows, or a folder of them", fix="check data.path")
    if HUB_ID.fullmatch(settings.path) and path.suffix not in SUFFIXES:
        return _hub(settings, data)
    expected = "a file of rows, a folder of them, or a dataset's id on the hub (owner/name)"
    raise InputError(path, found="no such file", expected=expected, fix="check data.path")


def _check_no_name(path: Path, settings: SourceSettings, why: str) -> None:
    if settings.name is not None:
        fix = f"take it out: {why}; name is for the hub's datasets and for folders whose README.md lists several"
        raise InputError(path, found=f"name: {settings.name!r} for local files", fix=fix)


def _spec(path: Path, settings: SourceSettings, splits: Sequence[str]) -> tuple[str, list[str]]:
    """(what is asked for, the splits that it takes rows from)."""
    spec = "+".join(splits) if settings.split == "all" else settings.split
    return spec, splits_of(spec, splits, path)


def _files(path: Path, splits: Splits, settings: SourceSettings, data: DataSettings) -> Source:
    spec, used = _spec(path, settings, list(splits.files))
    files = [file for split in used for file in splits.files[split]]
    states = [(file, file.stat()) for file in dict.fromkeys(files)]
    identity = [(str(file.resolve()), state.st_size, state.st_mtime_ns) for file, state in states]

    def rows_of(split: str) -> Iterator[RawRow]:
        return (row for file in splits.files[split] for row in read_file(file, data.sample_by, data.max_row_bytes))

    num_rows = functools.cache(lambda split: sum(1 for _ in rows_of(split)))

    def rows() -> Iterator[RawRow]:
        if not is_cut(spec):
            return (row for split in used for row in rows_of(split))
        chosen = parts(spec, num_rows, path)
        return (row for part in chosen for row in islice(rows_of(part.split), part.start, part.stop))

    return Source(
        str(path) if (spec, list(splits.files)) == (DEFAULT, [DEFAULT]) else f"{path} [{settings.split}]",
        rows,
        json.dumps([identity, spec, data.sample_by, data.max_row_bytes]),
        nbytes=sum(state.st_size for _, state in states),
        notes=_notes(path, splits, used),
        reads_sample_by=any(suffix(file) == ".txt" for file in files),
    )


def _notes(path: Path, splits: Splits, used: Sequence[str]) -> tuple[str, ...]:
    notes = []
    if others := [split for split in splits.files if split not in used]:
        notes.append(f"{path}: not read: split {', '.join(others)}")
    if splits.left_out:
        notes.append(f"{path}: not read: {shown(splits.left_out)} (as `datasets`, which takes no rows from there)")
    return tuple(notes)


def _saved_dataset(path: Path, settings: SourceSettings, data: DataSettings) -> Source:
    """A folder that `datasets` wrote with `save_to_disk`."""
    import datasets

    _check_no_name(path, settings, "what save_to_disk wrote has no configurations")
    refuse_odd_files(path)
    with reading(path, "a dataset that cannot be loaded", fix="write it again"):
        loaded: Any = datasets.load_from_disk(str(path))
    if isinstance(loaded, datasets.DatasetDict):
        tables: Mapping[str, Any] = loaded
    else:  # by its own name, or as any single file
        tables = {str(split): loaded for split in (DEFAULT, loaded.split) if split}
    spec, used = _spec(path, settings, list(tables))
    if is_cut(spec):
        chosen = parts(spec, lambda split: len(tables[split]), path)
        found = [tables[part.split].select(range(part.start, part.stop)) for part in chosen]
    else:
        found = [tables[split] for split in used]
    one = found[0] if len(found) == 1 else datasets.concatenate_datasets(found)
    is_whole = not isinstance(loaded, datasets.DatasetDict) and not is_cut(spec)
    return _arrow(str(path) if is_whole else f"{path} [{settings.split}]", one, data.max_row_bytes)


def _hub(settings: SourceSettings, data: DataSettings) -> Source:
    import datasets  # slow to import, and not needed for files

    name = f"{settings.path} [{settings.split}]"
    try:
        datasets.disable_progress_bars()
        loaded: Any = datasets.load_dataset(
            settings.path, settings.name, split=settings.split, streaming=data.streaming
        )  # no code of the dataset's is ever run
    except (
        Exception
    ) as error:  # of every kind: not found, no connection, no such split or name, a script instead of data
        raise InputError(
            f"{name}, on the Hugging Face hub",
            found=f"{type(error).__name__}: {str(error).strip()}",
            expected="a dataset, its split (data.split) and, if it has several configurations, its name (data.name)",
            fix=OFFLINE_ADVICE,
        ) from None
    if data.streaming:
        return Source(name, lambda: _streamed(name, loaded, data.max_row_bytes), None)
    return _arrow(name, loaded, data.max_row_bytes)


def _streamed(name: str, loaded: Any, max_row_bytes: int) -> Iterator[RawRow]:
    schema = None if loaded.features is None else loaded.features.arrow_schema
    return _readable(name, decoded_rows(name, schema, iter(loaded), max_row_bytes))


def _readable(name: str, rows: Iterator[RawRow]) -> Iterator[RawRow]:
    with reading(name, "a dataset that cannot be read", fix="check the connection, or write or fetch it again"):
        yield from rows


def _arrow(name: str, loaded: Any, max_row_bytes: int) -> Source:
    def rows() -> Iterator[RawRow]:
        tables = loaded.with_format("arrow")
        found = table_rows(name, loaded.features.arrow_schema, tables.iter(ROWS_AT_ONCE), max_row_bytes)
        return _readable(name, found)

    identity = json.dumps([loaded._fingerprint, max_row_bytes])
    return Source(name, rows, identity, num_rows=len(loaded))
