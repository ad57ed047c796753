"""A model folder made from another one: its config and companions, and shard by shard its tensors, changed."""

import dataclasses
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from convert.files.companions import Files, as_files, total_size
from convert.files.folder import ModelFolder
from convert.files.head import has_own_head
from convert.files.shards import (
    PT_METADATA,
    Piece,
    TensorSpec,
    file_size,
    is_whole,
    write_index,
    write_json,
    write_pieces,
)
from convert.files.sink import checksum
from convert.files.verified import Sums, summing
from convert.jobs.job import RECORD, Log, filling, require_space
from qlora_jax.base.errors import InputError
from qlora_jax.base.reading import read_json_object

SPARE_BYTES = 2**20
"""For config, index and the file system's own needs."""


@dataclasses.dataclass(frozen=True)
class Shard:
    """One shard of the new folder: its tensors, and their bytes one after the other in pieces of any size, made as they are asked for."""

    specs: Sequence[TensorSpec]
    pieces: Iterator[Piece]
    work: int
    """Bytes by which progress advances while the pieces are made."""


def write_derived(
    folder: ModelFolder,
    out: Path,
    change: Callable[[str], Shard],
    job: dict[str, Any],
    *,
    quantization_config: dict[str, Any] | None = None,
    companions: Files | None = None,
    record_sums: Callable[[Sums], object] | None = None,
    past_cache: bool = False,
    advance: Callable[[int], object] = lambda nbytes: None,
    log: Log = lambda line: None,
    verify: Callable[[Path], object] = lambda written: None,
) -> None:
    """Write a bfloat16 model derived from `folder`; `out` appears whole or not at all. What a stopped run wrote is kept: see `filling`.

    Args:
        change: from a shard's name to its new tensors. A shard without any is left out.
        job: `convert.jobs.job.describe`: whatever the new bytes depend on.
        quantization_config: of the new `config.json`; None for a model that is not quantized.
        companions: what goes along with the weights; by default the folder's own.
        record_sums: called with the checksums of all tensors before the folder becomes `out`: see `convert.files.verified`.
        past_cache: write the weights as what is not soon read: see `convert.files.sink`.
        advance: called with the work of each shard that is there already.
        log: told what can be continued, a line each.
        verify: called with the folder that is complete, before it becomes `out`; with an InputError of its it never does.

    Raises:
        DestinationError: `out` exists or cannot be made, or the disk has no room for it.
    """
    with filling(out, job, log) as aside:
        shards = {shard: made for shard in folder.shards if (made := change(shard)).specs}
        metadata = {shard: {**folder.metadata(shard), **PT_METADATA} for shard in shards}
        record = aside.with_name(RECORD)
        recorded = _recorded(record, with_tensors=record_sums is not None)
        kept = _kept(aside, shards, metadata, recorded, log)
        if kept:
            log(f"continuing: {len(kept)} of {len(shards)} shards are written already")
        missing = sum(file_size(made.specs, metadata[shard]) for shard, made in shards.items() if shard not in kept)
        companions = as_files(folder.path) if companions is None else companions
        require_space(aside, missing + total_size(companions) + SPARE_BYTES, out)
        for shard, made in shards.items():
            if shard in kept:
                advance(made.work)
            else:
                (aside / shard).parent.mkdir(parents=True, exist_ok=True)
                sums: Sums = {}
                made_pieces = summing(made.specs, made.pieces, sums) if record_sums else made.pieces
                written = write_pieces(aside / shard, made.specs, made_pieces, metadata[shard], past_cache=past_cache)
                kept[shard] = {"checksum": written, "tensors": sums}
                write_json(record, kept)
        for name, file in companions.items():
            (aside / name).parent.mkdir(parents=True, exist_ok=True)
            (aside / name).write_bytes(file) if isinstance(file, bytes) else shutil.copyfile(file, aside / name)
        write_json(aside / "config.json", _config(folder, quantization_config))
        if len(folder.shards) > 1:
            total = sum(spec.nbytes for made in shards.values() for spec in made.specs)
            write_index(aside, {spec.name: shard for shard, made in shards.items() for spec in made.specs}, total)
        if record_sums is not None:
            record_sums({name: entry for shard in shards for name, entry in kept[shard]["tensors"].items()})
        verify(aside)


def _recorded(record: Path, *, with_tensors: bool) -> dict[str, Any]:
    """What is known of the shards that a stopped run wrote: of each its file's checksum and its tensors'; of the last it may be missing.

    Args:
        with_tensors: without those whose tensors' checksums nobody wanted then.
    """
    try:
        found = read_json_object(record)
    except InputError:
        return {}
    known = {shard: entry for shard, entry in found.items() if isinstance(entry, dict) and "checksum" in entry}
    return {shard: entry for shard, entry in known.items() if entry.get("tensors") or not with_tensors}


def _kept(
    aside: Path, shards: dict[str, Shard], metadata: dict[str, dict[str, str]], recorded: dict[str, Any], log: Log
) -> dict[str, Any]:
    """The shards that a stopped run wrote, with header, size and checksum as they must be; whatever else it left is removed."""
    whole = [
        shard
        for shard, made in shards.items()
        if shard in recorded and is_whole(aside / shard, made.specs, metadata[shard])
    ]
    if whole:
        log(f"reading what an earlier run wrote: {len(whole)} shards")
    kept = {shard: recorded[shard] for shard in whole if checksum(aside / shard) == recorded[shard]["checksum"]}
    for path in aside.rglob("*"):
        if not path.is_dir() and path.relative_to(aside).as_posix() not in kept:
            path.unlink()
    return kept


def _config(folder: ModelFolder, quantization_config: dict[str, Any] | None) -> dict[str, Any]:
    """The folder's, without the names of Python code, which is not carried along: see `convert.files.companions`."""
    config = {key: value for key, value in folder.config.items() if key not in ("quantization_config", "auto_map")}
    for key in {"dtype", "torch_dtype"} & config.keys() or {"dtype"}:  # the older name too, where it is there
        config[key] = "bfloat16"
        if isinstance(text := config.get("text_config"), dict) and key in text:
            config["text_config"] = text | {key: "bfloat16"}
    if has_own_head(folder):
        config["tie_word_embeddings"] = False
    if quantization_config is not None:
        config["quantization_config"] = quantization_config
    return config
