"""Where rows come from: a file, a folder of files, or a dataset on the Hugging Face hub. Rows are read one at a time from each."""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_jax.base.errors import InputError
from qlora_jax.config.data import DataSettings, SourceSettings
from qlora_jax.data.rows.files import SUFFIXES, is_data_file, read_file
from qlora_jax.data.rows.row import RawRow

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
    if path.is_dir():
        if any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
            return _saved_dataset(path, settings)
        files = sorted(file for file in path.rglob("*") if is_data_file(file) and not _hidden(file, path))
        if not files:
            found = "a folder without a file of rows"
            raise InputError(
                path, found=found, expected=f"files ending in {', '.join(SUFFIXES)}", fix="check data.path"
            )
        return _files(path, files, settings, data)
    if path.is_file():
        if not is_data_file(path):
            expected = f"a name ending in {', '.join(SUFFIXES)} (all but .parquet may be gzipped: .gz)"
            raise InputError(path, found="a file of an unknown kind", expected=expected, fix="rename or convert it")
        return _files(path, [path], settings, data)
    if HUB_ID.fullmatch(settings.path) and path.suffix not in SUFFIXES:
        return _hub(settings, data.streaming)
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
        lambda: (row for file in files for row in read_file(file, data.sample_by)),
        json.dumps([identity, data.sample_by]),
        nbytes=sum(state.st_size for _, state in states),
    )


def _saved_dataset(path: Path, settings: SourceSettings) -> Source:
    """A folder that `datasets` wrote with `save_to_disk`."""
    import datasets

    try:
        loaded: Any = datasets.load_from_disk(str(path))
        return _arrow(str(path), loaded[settings.split] if isinstance(loaded, datasets.DatasetDict) else loaded)
    except KeyError:
        raise InputError(path, found=f"no split {settings.split!r}", expected=f"one of {', '.join(loaded)}") from None
    except Exception as error:  # whatever pyarrow makes of a damaged file
        raise InputError(path, found=f"a dataset that cannot be loaded: {error}", fix="write it again") from None


def _hub(settings: SourceSettings, streaming: bool) -> Source:
    import datasets  # slow to import, and not needed for files

    name = f"{settings.path} [{settings.split}]"
    try:
        datasets.disable_progress_bars()
        loaded: Any = datasets.load_dataset(
            settings.path, settings.name, split=settings.split, streaming=streaming
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
    if streaming:
        return Source(name, lambda: _numbered(name, iter(loaded)), None)
    return _arrow(name, loaded)


def _arrow(name: str, loaded: Any) -> Source:
    def rows() -> Iterator[RawRow]:
        batches = loaded.with_format("arrow").iter(1024)
        return _numbered(name, (fields for batch in batches for fields in batch.to_pylist()))

    return Source(name, rows, loaded._fingerprint, num_rows=len(loaded))


def _numbered(name: str, rows: Iterator[dict[str, Any]]) -> Iterator[RawRow]:
    for number, fields in enumerate(rows, start=1):
        yield RawRow(f"{name}, row {number}", fields)
