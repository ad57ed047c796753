"""Models that a run quantized, kept so that the next run with the same model and quantization need not: `CACHE/quantized/NAME-KEY`."""

import hashlib
import json
import re
import shutil
from pathlib import Path

from rich.console import Console

from convert.folder import ModelFolder
from convert.hub import cache_dir
from convert.job import DestinationError
from convert.load import read_config
from convert.prequantized import settle
from convert.quantize import job_of, quantize
from qlora_jax.config import QuantizationSettings
from qlora_jax.display import byte_bar
from qlora_jax.errors import InputError

KEY_DIGITS = 16


def cached_folder(
    folder: ModelFolder, name_or_path: str, quantization: QuantizationSettings, console: Console
) -> ModelFolder:
    """The model in 4 bits: from the cache, quantized into it first if it is not there. To the bit what loading `folder` gives.

    A folder that is in 4 bits already is returned as it is; so is `folder` where the cache cannot be written, after a line that says so.

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
    try:
        with byte_bar(console) as progress:
            task = progress.add_task("quantizing", total=total)
            quantize(folder, entry, quantization, lambda nbytes: progress.advance(task, nbytes), console.print)
    except (DestinationError, OSError) as error:
        reason = error.found if isinstance(error, DestinationError) else error
        console.print(f"quantizing in memory, for this run only: {entry}: {reason}")
        return folder
    console.print(f"{kind}: quantized once, kept in {entry}")
    return ModelFolder(entry)


def entry_of(folder: ModelFolder, name_or_path: str, quantization: QuantizationSettings) -> Path:
    """Where a model's quantized form is kept: known by what it was made of (revision, or files, sizes and times) and how."""
    name = re.sub(r"[^\w.-]+", "-", name_or_path if not Path(name_or_path).exists() else Path(name_or_path).name)
    key = hashlib.sha256(json.dumps(job_of(folder, quantization), sort_keys=True).encode()).hexdigest()[:KEY_DIGITS]
    return cache_dir() / "quantized" / f"{name.strip('.-')}-{key}"


def _opened(
    entry: Path, source: ModelFolder, quantization: QuantizationSettings, console: Console
) -> ModelFolder | None:
    """The entry if it is there and sound; a damaged one is removed."""
    if not entry.exists():
        return None
    try:
        found = ModelFolder(entry)
        if found.is_4bit and read_config(found) == read_config(source):
            settle(found, quantization, where=entry, fix="")
            return found
        reason = "another model"
    except InputError as error:
        reason = error.found
    console.print(f"{entry}: damaged, made again ({reason.replace(chr(10), ' ')})")
    try:
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    except OSError:
        return None  # quantizing will say that something is there already
    return None
