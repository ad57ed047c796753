"""A model folder made from another one: its config and companions, and shard by shard its tensors, changed."""

import contextlib
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from convert.folder import ModelFolder
from convert.shards import PT_METADATA, TensorSpec, write_index, write_json, write_shard
from qlora_jax.errors import InputError

Shard = tuple[Sequence[TensorSpec], Iterable[np.ndarray | bytes]]


def write_derived(
    folder: ModelFolder,
    out: Path,
    change: Callable[[str], Shard],
    quantization_config: dict[str, Any] | None = None,
) -> None:
    """Write a bfloat16 model derived from `folder`; `out` appears whole or not at all.

    Args:
        change: from a shard's name to its new tensors: their specs, and their data one at a time. A shard without any is left out.
        quantization_config: of the new `config.json`; None for a model that is not quantized.

    Raises:
        InputError: `out` exists or cannot be made.
    """
    total, weight_map = 0, {}
    with new_folder(out) as aside:
        for shard in folder.shards:
            specs, tensors = change(shard)
            if specs:
                (aside / shard).parent.mkdir(parents=True, exist_ok=True)
                write_shard(aside / shard, specs, tensors, {**folder.metadata(shard), **PT_METADATA})
            weight_map |= {spec.name: shard for spec in specs}
            total += sum(spec.nbytes for spec in specs)
        for companion in folder.companions():
            shutil.copyfile(companion, aside / companion.name)
        config = {key: value for key, value in folder.config.items() if key != "quantization_config"}
        dtype_key = "torch_dtype" if "torch_dtype" in config and "dtype" not in config else "dtype"
        config[dtype_key] = "bfloat16"
        if quantization_config is not None:
            config["quantization_config"] = quantization_config
        write_json(aside / "config.json", config)
        if len(folder.shards) > 1:
            write_index(aside, weight_map, total)


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to fill, beside `out`; at the end of the block it becomes `out`, or is removed if the block fails.

    Raises:
        InputError: `out` exists or cannot be made.
    """
    refuse_existing(out)
    aside = out.with_name(f".{out.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
    except OSError as error:
        raise InputError(out, found=f"cannot be made: {error.strerror}", fix="name another folder") from None
    try:
        yield aside
        aside.rename(out)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def refuse_existing(out: Path) -> None:
    """Nothing is overwritten.

    Raises:
        InputError: `out` exists.
    """
    if out.exists():
        raise InputError(out, found="something there already", fix="name a new folder, or remove this one")
