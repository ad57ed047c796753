"""Models that a run quantized, kept so that the next run with the same model and quantization need not: `CACHE/quantized/NAME-KEY`,
and their checksums: `CACHE/checksums/NAME-KEY.json`.

    python -m convert.cache                       what is kept, and how large it is
    python -m convert.cache --remove NAME ...     removes entries; --all: every one

Nothing is removed unasked. CACHE is $QLORA_JAX_CACHE, or else ~/.cache/qlora_jax.
"""

import argparse
import contextlib
import datetime
import functools
import hashlib
import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from convert.files.folder import ModelFolder
from convert.files.prequantized import settle
from convert.files.sizes import companion_bytes, quantized_bytes, tensors_of
from convert.files.stated import names_of
from convert.files.verified import VerifiedFolder, write_record
from convert.hub import cache_dir
from convert.jobs.job import DestinationError, in_use
from convert.load import read_config
from convert.quantize import job_of, quantize
from qlora_jax.base.console import byte_bar, make_console
from qlora_jax.base.errors import InputError, end_process, exit_status
from qlora_jax.base.files import describe_size
from qlora_jax.config import QuantizationSettings

KEY_DIGITS = 16


def cached_folder(
    folder: ModelFolder,
    name_or_path: str,
    quantization: QuantizationSettings,
    console: Console,
    *,
    leave_free: int = 0,
) -> ModelFolder:
    """The model in 4 bits: from the cache, quantized into it first if it is not there. To the bit what loading `folder` gives.

    A folder that is in 4 bits already is returned as it is; so is `folder` where the cache cannot be written, after a line that says so.
    What comes from the cache is compared with its checksums when it is read (`convert.files.verified`); then a DamagedError may come.

    Args:
        leave_free: bytes of the cache's disk that are for others: if they would not be left over, nothing is written.

    Raises:
        InputError: a weight is not finite.
    """
    if folder.is_4bit:
        return folder
    entry = entry_of(folder, name_or_path, quantization)
    kind = f"{quantization.quant_type}{', double quantization' if quantization.double_quant else ''}"
    if (found := _opened(entry, folder, quantization, console)) is not None:
        console.print(f"{kind}: quantized by an earlier run, {entry}")
        return found
    total = sum(spec.nbytes for shard in folder.shards for spec in folder.specs(shard))
    job = job_of(folder, quantization)
    try:
        if leave_free:
            _require_room(entry, folder, quantization, leave_free)
        with byte_bar(console) as progress:
            task = progress.add_task("quantizing", total=total)
            advance, record = (
                functools.partial(progress.advance, task),
                functools.partial(write_record, _record_of(entry), job),
            )
            quantize(folder, entry, quantization, advance, console.print, record)
    except (DestinationError, OSError) as error:
        reason = f"{error.found}; {error.expected}" if isinstance(error, DestinationError) else error
        console.print(f"quantizing in memory, for this run only: {entry}: {reason}")
        return folder
    size = f"{_bytes(entry) / 2**30:.2f} GiB, {sum(map(_bytes, entries())) / 2**30:.2f} with all others"
    console.print(f"{kind}: quantized once, kept in {entry} ({size}; see python -m convert.cache)")
    return VerifiedFolder(entry, _record_of(entry), job)


def is_kept(folder: ModelFolder, name_or_path: str, quantization: QuantizationSettings) -> bool:
    """Whether `cached_folder` has the model in 4 bits on the disk already, and need not quantize it."""
    return folder.is_4bit or entry_of(folder, name_or_path, quantization).is_dir()


def entry_of(folder: ModelFolder, name_or_path: str, quantization: QuantizationSettings) -> Path:
    """Where a model's quantized form is kept: known by what it was made of (revision, or files, sizes and times) and how."""
    name = re.sub(r"[^\w.-]+", "-", name_or_path if not Path(name_or_path).exists() else Path(name_or_path).name)
    key = hashlib.sha256(json.dumps(job_of(folder, quantization), sort_keys=True).encode()).hexdigest()[:KEY_DIGITS]
    return _place() / f"{name.strip('.-')}-{key}"


def unfinished_bytes(entry: Path) -> int:
    """What a run that was stopped has written of an entry."""
    return _bytes(entry.with_name(f".{entry.name}.partial"))


def entries() -> list[Path]:
    """Everything in the cache, unfinished entries too, by name."""
    place = _place()
    return sorted(path for path in place.iterdir() if path.is_dir()) if place.is_dir() else []


def remove(names: Sequence[str]) -> None:
    """Delete entries by name.

    Raises:
        InputError: one of them is not there, or is being written; nothing is deleted then.
    """
    there = {path.name: path for path in entries()}
    problems = [f"{name}: not there" for name in names if name not in there]
    problems += [f"{name}: being written by another process" for name in names if name in there and in_use(there[name])]
    if problems:
        fix = "give names that `python -m convert.cache` lists"
        raise InputError(_place(), found="; ".join(problems), expected="entries of the cache", fix=fix)
    for name in names:
        shutil.rmtree(there[name])
        _record_of(there[name]).unlink(missing_ok=True)


def _require_room(entry: Path, folder: ModelFolder, quantization: QuantizationSettings, leave_free: int) -> None:
    """Raises DestinationError: the entry would take room that is for others."""
    missing = (
        quantized_bytes(tensors_of(folder), names_of(folder), quantization)
        + companion_bytes(folder)
        - unfinished_bytes(entry)
    )
    place = entry.parent
    place.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(place).free
    if missing + leave_free > free:
        raise DestinationError(
            entry,
            found=f"{describe_size(free)} free on this disk",
            expected=f"{describe_size(missing)} for it beside {describe_size(leave_free)} for the run",
        )


def _place() -> Path:
    return cache_dir() / "quantized"


def _record_of(entry: Path) -> Path:
    """Where an entry's checksums are: not in it, so that it is what `convert.quantize` makes."""
    return cache_dir() / "checksums" / f"{entry.name}.json"


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _opened(
    entry: Path, source: ModelFolder, quantization: QuantizationSettings, console: Console
) -> ModelFolder | None:
    """The entry if it is there, sound and made of this model in this way; any other is removed."""
    if not entry.exists():
        return None
    try:
        found = VerifiedFolder(entry, _record_of(entry), job_of(source, quantization))
        if found.is_4bit and read_config(found) == read_config(source):
            settle(found, quantization, where=entry, fix="")
            return found
        reason = "another model"
    except InputError as error:
        reason = error.found
    discard(entry, reason, console)
    return None


def discard(entry: Path, reason: str, console: Console) -> None:
    """Remove an entry that cannot be used, and say why; where it cannot be removed, quantizing will say that something is there."""
    console.print(f"{entry}: damaged, made again ({reason.replace(chr(10), ' ')})")
    with contextlib.suppress(OSError):
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


@exit_status
def main(arguments: Sequence[str] | None = None, prog: str = "python -m convert.cache") -> None:
    """The command; see `--help`."""
    parser = argparse.ArgumentParser(prog=prog, description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--remove", nargs="+", default=[], metavar="NAME", help="entries to delete, as they are listed")
    parser.add_argument("--all", action="store_true", help="delete every entry")
    options = parser.parse_args(arguments)
    console = make_console()
    if doomed := [path.name for path in entries()] if options.all else options.remove:
        freed = sum(_bytes(_place() / name) for name in doomed)
        remove(doomed)
        console.print(f"{len(doomed)} removed, {freed / 2**30:.2f} GiB")
        return
    for path in entries():
        day = datetime.datetime.fromtimestamp(path.stat().st_mtime).date()
        unfinished = "  (unfinished: the next run on that model continues it)" if path.name.startswith(".") else ""
        console.print(f"{_bytes(path) / 2**30:9.2f} GiB  {day}  {path.name}{unfinished}")
    console.print(f"{sum(map(_bytes, entries())) / 2**30:9.2f} GiB  in all, in {_place()}")


if __name__ == "__main__":
    end_process(main)
