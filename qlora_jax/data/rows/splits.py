"""Splits of what lies on the disk, as `datasets` has them: which files of a folder are in which, and the rows that `train[:10%]` names.

`datasets` itself says both; the files are then read here, so that a row keeps its file and line.
"""

import dataclasses
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_jax.base.errors import InputError
from qlora_jax.data.rows.files import SUFFIXES, is_data_file, suffix

if TYPE_CHECKING:
    import datasets  # slow to import, and not needed for a single file

DEFAULT = "train"
"""The split that a file is, and a folder in which nothing says otherwise."""
KINDS = {".jsonl": "json", ".ndjson": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
NO_DATA = {"config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json"}
"""Files that `datasets` takes for descriptions, not for rows."""
KNOWN_OPTIONS = {"name", "version", "data_dir", "data_files", "description", "features"}
"""Options of a configuration that are read here, or do not change a row."""
CUT = re.compile(r"[\[(]")
SHOWN = 3


@dataclass(frozen=True, kw_only=True)
class Splits:
    """Files by split, and what is to be said about them."""

    files: Mapping[str, Sequence[Path]]
    left_out: Sequence[Path] = ()
    """Files of rows that belong to no split."""

    def __str__(self) -> str:
        """The splits' names."""
        return ", ".join(self.files)


@dataclass(frozen=True, kw_only=True)
class Part:
    """Rows `start` to `stop` of a split."""

    split: str
    start: int
    stop: int


def folder_splits(folder: Path, name: str | None) -> Splits:
    """The splits of a folder: by its README's configurations, by the names of files and folders, or all of it as `train`.

    Args:
        name: the configuration, where there are several.

    Raises:
        InputError: there is no file of rows or no such configuration, or `datasets` cannot make sense of the folder.
    """
    ours = sorted(file for file in folder.rglob("*") if is_data_file(file) and not _is_hidden(file, folder))
    if not ours:
        expected = f"files ending in {', '.join(SUFFIXES)}"
        raise InputError(folder, found="a folder without a file of rows", expected=expected, fix="check data.path")
    builder = _builder(folder, name)
    root = folder.resolve()
    listed = {
        str(split): [folder / Path(file).relative_to(root) if Path(file).is_relative_to(root) else Path(file) for file in files]
        for split, files in (builder.config.data_files or {}).items()
    }  # fmt: skip
    named = {file for files in listed.values() for file in files}
    others = [file for file in ours if file not in named and file.name not in NO_DATA]
    if list(listed) == [DEFAULT] and _is_all(folder, builder, named, others):
        return _all(sorted({*named, *others}))
    _check_readable(folder, builder, named)
    return Splits(files=listed, left_out=others)


def _is_hidden(file: Path, folder: Path) -> bool:
    return any(part.startswith((".", "__")) for part in file.relative_to(folder).parts)


def _builder(folder: Path, name: str | None) -> "datasets.DatasetBuilder":
    import datasets

    datasets.disable_progress_bars()
    try:
        with tempfile.TemporaryDirectory(prefix="qlora_jax-splits-") as cache:
            return datasets.load_dataset_builder(str(folder), name, cache_dir=cache)
    except Exception as error:  # of every kind: a damaged README, files of several kinds, no such configuration
        raise InputError(
            folder,
            found=f"a folder that `datasets` cannot load: {str(error).strip()}",
            expected="files of one kind, and a configuration (data.name) if its README.md has several",
            fix="mend README.md or the names of the files, or give one file's path",
        ) from None


def _is_all(folder: Path, builder: "datasets.DatasetBuilder", named: set[Path], others: Sequence[Path]) -> bool:
    """Whether nothing says which of the folder's files are of which split, so that all of them are meant.

    `datasets` then reads the files of the commonest kind; here the others are read as well.
    """
    from datasets.data_files import get_data_patterns

    kinds = {_kind(file) for file in named}
    return (
        {str(split): patterns for split, patterns in get_data_patterns(str(folder)).items()} == {DEFAULT: ["**"]}
        and builder.config.name == "default"
        and not any(_kind(file) in kinds for file in others)
    )


def _kind(file: Path) -> str:
    return KINDS.get(suffix(file), suffix(file))


def _all(files: Sequence[Path]) -> Splits:
    """All files of rows; texts only where there is nothing else, for beside other files they are licences and notes."""
    rows = [file for file in files if suffix(file) not in (".txt", "")]
    if not rows:
        return Splits(files={DEFAULT: [file for file in files if is_data_file(file)]})
    return Splits(files={DEFAULT: rows}, left_out=[file for file in files if file not in rows])


def _check_readable(folder: Path, builder: "datasets.DatasetBuilder", files: set[Path]) -> None:
    if unknown := sorted(file for file in files if not (is_data_file(file) and file.is_file())):
        found = f"{len(unknown)} files of a kind that is not read here: {shown(unknown)}"
        raise InputError(folder, found=found, expected=f"files ending in {', '.join(SUFFIXES)}", fix="convert them")
    options = {field.name for field in dataclasses.fields(builder.config)} - KNOWN_OPTIONS
    default = type(builder.config)()
    changed = {option for option in options if getattr(builder.config, option) != getattr(default, option)}
    if all(suffix(file) == ".tsv" for file in files):
        changed.discard("sep")
    if changed:
        found = f"a configuration with {', '.join(sorted(changed))}, which is not read here"
        raise InputError(
            folder / "README.md", found=found, fix="give the files' paths in data.sources, or convert them"
        )


def shown(files: Sequence[Path]) -> str:
    """Names of the first few files."""
    names = ", ".join(file.name for file in files[:SHOWN])
    return names if len(files) <= SHOWN else f"{names} and {len(files) - SHOWN} more"


def splits_of(spec: str, splits: Sequence[str], where: object) -> list[str]:
    """The splits that a specification such as `train[:10%]+test` takes rows from.

    Raises:
        InputError: there is no such split, or it is no specification.
    """
    names = [CUT.split(part)[0] for part in re.split(r"\s*\+\s*", spec)]
    expected = f"of {', '.join(splits)}, all of it or a part: {splits[0]}[:10%]"
    fix = "name one with data.split (or data.eval_split, for the held-out rows)"
    if unknown := [name for name in names if name not in splits]:
        raise InputError(where, found=f"no split {unknown[0]!r}", expected=expected, fix=fix)
    if CUT.search(spec):
        import datasets

        try:
            datasets.ReadInstruction.from_spec(spec)
        except (ValueError, AssertionError) as error:
            raise InputError(where, found=f"split {spec!r}: {error}", expected=expected, fix=fix) from None
    return names


def is_cut(spec: str) -> bool:
    """Whether a specification names parts of splits, so that their numbers of rows have to be known."""
    return bool(CUT.search(spec))


def parts(spec: str, num_rows: Callable[[str], int], where: object) -> list[Part]:
    """The rows that a specification names, by `datasets`' rules.

    Args:
        num_rows: the number of rows of a split.

    Raises:
        InputError: it is no specification for so many rows.
    """
    import datasets

    try:
        found: list[Any] = datasets.ReadInstruction.from_spec(spec).to_absolute(_Sizes(num_rows))
    except (ValueError, AssertionError) as error:
        raise InputError(where, found=f"split {spec!r}: {error}", fix="name other rows with data.split") from None
    return [Part(split=part.splitname, start=part.from_, stop=part.to) for part in found]


class _Sizes(Mapping[str, int]):
    """Rows of a split, counted when asked."""

    def __init__(self, num_rows: Callable[[str], int]) -> None:
        self._num_rows = num_rows

    def __getitem__(self, split: str) -> int:
        return self._num_rows(split)

    def __contains__(self, split: object) -> bool:
        return True

    def __iter__(self) -> Iterator[str]:
        return iter(())

    def __len__(self) -> int:
        return 0
