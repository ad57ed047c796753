"""Where rows come from: a file, a folder of files, or a dataset on the Hugging Face hub. Rows are read one at a time from each."""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_jax.data.arrow import ROWS_AT_ONCE, decoded_rows, table_rows
from qlora_jax.data.files import SUFFIXES, is_data_file, read_file
from qlora_jax.data.rows import RawRow
from qlora_jax.data_settings import DataSettings, SourceSettings
from qlora_jax.errors import InputError
from qlora_jax.reading import kind_of, reading, refuse_odd_files

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


def open_source(settings: SourceSettings, data: DataSettings) -> Source:
    """Find a source; nothing is read from it yet, except what tells that it is one.

    Raises:
        InputError: there is no such file, folder or dataset, or it holds no file of rows.
    """
    path = Path(settings.path)
    kind = kind_of(path)
    if kind == "a folder":
        if any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
            return _saved_dataset(path, settings, data)
        files = sorted(file for file in path.rglob("*") if is_data_file(file) and not _hidden(file, path))
        if not files:
            found = "a folder without a file of rows"
            raise InputError(
                path, found=found, expected=f"files ending in {', '.join(SUFFIXES)}", fix="check data.path"
            )
        return _files(path, files, settings, data)
    if kind == "a file":
        if not is_data_file(path):
            expected = f"a name ending in {', '.join(SUFFIXES)} (all but .parquet may be gzipped: .gz)"
            raise InputError(path, found="a file of an unknown kind", expected=expected, fix="rename or convert it")
        return _files(path, [path], settings, data)
    if kind != "nothing":
        raise InputError(path, found=kind, expected="a file of rows, or a folder of them", fix="check data.path")
    if HUB_ID.fullmatch(settings.path) and path.suffix not in SUFFIXES:
        return _hub(settings, data)
    expected = "a file of rows, a folder of them, or a dataset's id on the hub (owner/name)"
    raise InputError(path, found="no such file", expected=expected, fix="check data.path")


def _hidden(file: Path, folder: Path) -> bool:
    return any(part.startswith((".", "_")) for part in file.relative_to(folder).parts)


def _files(path: Path, files: Sequence[Path], settings: SourceSettings, data: DataSettings) -> Source:
    if settings.name is not None:
        raise InputError(path, found=f"name: {settings.name!r} for local files", fix="name is for the hub's datasets")
    states = [(file, file.stat()) for file in files]
    identity = [(str(file.resolve()), state.st_size, state.st_mtime_ns) for file, state in states]
    return Source(
        str(path),
        lambda: (row for file in files for row in read_file(file, data.sample_by, data.max_row_bytes)),
        json.dumps([identity, data.sample_by, data.max_row_bytes]),
        nbytes=sum(state.st_size for _, state in states),
    )


def _saved_dataset(path: Path, settings: SourceSettings, data: DataSettings) -> Source:
    """A folder that `datasets` wrote with `save_to_disk`."""
    import datasets

    refuse_odd_files(path)
    with reading(path, "a dataset that cannot be loaded", fix="write it again"):
        loaded: Any = datasets.load_from_disk(str(path))
    if not isinstance(loaded, datasets.DatasetDict):
        return _arrow(str(path), loaded, data.max_row_bytes)
    if settings.split not in loaded:
        raise InputError(path, found=f"no split {settings.split!r}", expected=f"one of {', '.join(loaded)}")
    return _arrow(str(path), loaded[settings.split], data.max_row_bytes)


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
