"""What a run takes of the disk: asked of those who know models' folders and caches, and shown."""

import dataclasses
from pathlib import Path

from rich.console import Console
from rich.table import Table

from convert.adapters.delta import resolve_base
from convert.cache import entry_of, unfinished_bytes
from convert.files.folder import ModelFolder
from convert.files.names import Names
from convert.files.sizes import companion_bytes, merged_bytes, quantized_bytes, tensors_for, tensors_of
from convert.files.stated import names_of
from convert.hub import cache_dir, resolve_config
from qlora_jax.base.errors import InputError
from qlora_jax.base.units import GIB
from qlora_jax.config import Config
from qlora_jax.data.rows.sources import open_source
from qlora_jax.planning.disk import Need, Space
from qlora_jax.planning.estimate import Job

TOKEN_BYTES = 5
"""Of a token in the store: four of its number, one of the mask."""
FILE_BYTES_A_TOKEN = 3
"""A guess, on the safe side: English in JSON lines has 3.6 to 4."""


def space_of(config: Config, job: Job, steps: int | None, folder: ModelFolder | None, name_or_path: str) -> Space:
    """What a run writes.

    Args:
        steps: of the run; None where nobody knows yet.
        folder: the base model's; None where it is not here, and its shape has to do.
        name_or_path: what the model is called, as its place in the cache is named by it.
    """
    tensors = tensors_for(job.config) if folder is None else tensors_of(folder)
    companions = 0 if folder is None else companion_bytes(folder)
    merge_base = resolve_base(config.training.merge_base, folder)
    names = Names.of(job.config) if folder is None else names_of(folder)
    merged = companions + merged_bytes(tensors, names, config.lora.targets(names.paths), merge_base)
    others = ()
    if folder is None or not folder.is_4bit:
        size = companions + quantized_bytes(tensors, names, config.quantization)
        place, there = cache_dir() / "quantized" / "model", 0
        if folder is not None:
            place = entry_of(folder, name_or_path, config.quantization)
            there = size if place.exists() else unfinished_bytes(place)
        required = config.memory.base_weights == "disk"  # then layers are read from it
        others = (Need("quantized model, for the next run", place, size, there, required),)
    return Space(config, job, steps, merged, others)


def with_guessed_tokens(space: Space) -> Space:
    """With what the tokens of local files will take, at a guess; datasets on the hub are left out."""
    data = space.config.data
    asked = [*data.all_sources, *([data.eval_source] if data.eval_source else [])]
    sizes = [open_source(source, data).nbytes or 0 for source in asked if Path(source.path).exists()]
    if not any(sizes):
        return space
    size = TOKEN_BYTES * sum(sizes) // FILE_BYTES_A_TOKEN
    need = Need("tokens, guessed from the files' size", cache_dir() / "tokenized" / "rows", size)
    return dataclasses.replace(space, others=(*space.others, need))


def local_folder(name_or_path: str) -> ModelFolder | None:
    """The model, if all of it is here."""
    try:
        return ModelFolder(resolve_config(name_or_path, log=lambda line: None).parent)
    except InputError:
        return None


def show_space(space: Space, console: Console) -> None:
    """What is still to be written, as a table with a column for each disk."""
    disks = space.disks
    table = Table(box=None, padding=(0, 2))
    table.add_column("GiB still to be written", justify="left")
    for title in ("disk",) if len(disks) == 1 else ("output_dir", *["cache"] * (len(disks) - 1)):
        table.add_column(title, justify="right")
    for need in space.needs:
        kept = all(disk.has_room(need) for disk in disks if need in disk.needs)
        if need.missing:
            figure = f"{need.missing / GIB:.2f}" if kept else "no room"
            table.add_row(need.name, *(figure if need in disk.needs else "" for disk in disks))
    together = [sum(need.missing for need in disk.needs if disk.has_room(need)) for disk in disks]
    table.add_row("total", *(f"{nbytes / GIB:.2f}" for nbytes in together), style="bold")
    table.add_row("available", *(f"{disk.free / GIB:.2f}" for disk in disks))
    console.print(table)
