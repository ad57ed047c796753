"""Folds an adapter into its base model: `python -m convert.merge --adapter DIR --out DIR`.

    W' = round_bf16(float32(W) + scaling · B·A)          one rounding, as peft's `merge_and_unload`

Tensor by tensor, in the base's shards and order. Tensors without an adapter are copied byte for byte.
"""

import argparse
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import ml_dtypes
import numpy as np
from rich.console import Console

from convert import names
from convert.adapter import Adapter, load_adapter, read_adapter_config
from convert.folder import ModelFolder
from convert.hub import resolve_model
from convert.load import read_bfloat16, read_config
from convert.shards import TensorSpec, write_index, write_json, write_shard
from qlora_jax import nf4
from qlora_jax.display import make_console, progress_bar
from qlora_jax.errors import InputError, exit_status
from qlora_jax.placement import put

Base = Literal["original", "dequantized"]

WHICH_BASE = """\
Which base. QLoRA trains the adapter on weights that went to 4 bits and back. `--base dequantized` (the default) adds the adapter to
exactly those weights: the merged model computes what was trained, up to bfloat16 rounding, and its size is that of any bf16 model.
`--base original` adds it to the weights as they were before quantization, which is what peft, unsloth and LLaMA-Factory do: the base
is the better one, but the adapter was not fitted to it. Compare the two on your task if you can."""


def merge(
    folder: ModelFolder, adapter: Adapter, out: Path, base: Base, advance: Callable[[int], object] = lambda nbytes: None
) -> None:
    """Write base + adapter as a Hugging Face folder; `out` appears whole or not at all.

    Args:
        advance: called with the bytes of each tensor written.

    Raises:
        InputError: `out` exists.
        RuntimeError: not every pair of the adapter met its weight (a bug: `load_adapter` checked them).
    """
    if out.exists():
        raise InputError(out, found="something there already", fix="name a new folder, or remove this one")
    aside = out.with_name(f".{out.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    applied: set[tuple[int, str]] = set()
    total, weight_map = 0, {}
    for shard in folder.shards:
        specs = [_merged_spec(spec, adapter, base) for spec in folder.specs(shard)]
        tensors = _merged_tensors(folder, specs, adapter, base, applied, advance)
        write_shard(aside / shard, specs, tensors, folder.metadata(shard))
        weight_map |= {spec.name: shard for spec in specs}
        total += sum(spec.nbytes for spec in specs)
    if applied != adapter.pairs.keys():
        raise RuntimeError(f"{len(applied)} of {len(adapter.pairs)} adapted linears were merged")
    if len(folder.shards) > 1:
        write_index(aside, weight_map, total)
    for companion in folder.companions():
        shutil.copyfile(companion, aside / companion.name)
    config = {key: value for key, value in folder.config.items() if key != "quantization_config"}
    dtype_key = "torch_dtype" if "torch_dtype" in config and "dtype" not in config else "dtype"
    write_json(aside / "config.json", {**config, dtype_key: "bfloat16"})
    aside.rename(out)


def _changes(name: str, adapter: Adapter, base: Base) -> bool:
    """Whether a tensor of the base is another one in the merged model."""
    linear = names.parse_linear(name)
    return linear is not None and (base == "dequantized" or linear in adapter.pairs)


def _merged_spec(spec: TensorSpec, adapter: Adapter, base: Base) -> TensorSpec:
    return TensorSpec(spec.name, "BF16", spec.shape) if _changes(spec.name, adapter, base) else spec


def _merged_tensors(
    folder: ModelFolder,
    specs: Sequence[TensorSpec],
    adapter: Adapter,
    base: Base,
    applied: set[tuple[int, str]],
    advance: Callable[[int], object],
) -> Iterator[np.ndarray | bytes]:
    """The shard's tensors one at a time; `applied` collects the linears whose adapter was added."""
    for spec in specs:
        if not _changes(spec.name, adapter, base):
            yield folder.read_bytes(spec.name)
        else:
            linear = names.parse_linear(spec.name)
            weight = _base_weight(folder, spec.name, adapter, base)
            if linear in adapter.pairs:
                weight = merged_weight(weight, *adapter.pairs[linear], adapter.scaling)
                applied.add(linear)
            yield weight
        advance(spec.nbytes)


def _base_weight(folder: ModelFolder, name: str, adapter: Adapter, base: Base) -> np.ndarray:
    """A linear's weight before the adapter, bfloat16 [out, in]: cast, and for `dequantized` through 4 bits and back."""
    weight = read_bfloat16(folder, name)
    if base == "original":
        return weight
    settings = adapter.quantization
    return np.asarray(nf4.dequantize(nf4.quantize(put(weight, "device"), settings.double_quant, settings.quant_type)))


def merged_weight(weight: np.ndarray, lora_a: np.ndarray, lora_b: np.ndarray, scaling: float) -> np.ndarray:
    """weight [out, in] bfloat16, A [r, in] and B [out, r] float32 → bfloat16 [out, in], rounded once."""
    delta = (lora_b @ lora_a) * np.float32(scaling)
    return (weight.astype(np.float32) + delta).astype(ml_dtypes.bfloat16)


@exit_status
def main(arguments: Sequence[str] | None = None) -> None:
    """The command; see `--help`."""
    parser = argparse.ArgumentParser(
        prog="python -m convert.merge", description=__doc__.split("\n\n")[0], epilog=WHICH_BASE
    )
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--adapter", required=True, type=Path, metavar="DIR", help="the adapter, in PEFT's format")
    parser.add_argument(
        "--out", required=True, type=Path, metavar="DIR", help="the merged model's folder; must not exist"
    )
    parser.add_argument(
        "--model", metavar="ID_OR_DIR", help="the base model (default: the one named in adapter_config.json)"
    )
    parser.add_argument(
        "--base", choices=("original", "dequantized"), default="dequantized", help="default: dequantized; see below"
    )
    options = parser.parse_args(arguments)
    console = make_console(stderr=True)
    name = options.model or read_adapter_config(options.adapter).get("base_model_name_or_path")
    if not name:
        raise InputError(
            options.adapter, found="no base_model_name_or_path in its adapter_config.json", fix="say which with --model"
        )
    folder = ModelFolder(resolve_model(name, log=console.print))
    adapter = load_adapter(options.adapter, read_config(folder))
    merge_with_progress(folder, adapter, options.out, options.base, console)


def merge_with_progress(folder: ModelFolder, adapter: Adapter, out: Path, base: Base, console: Console) -> None:
    """`merge` under a progress bar, and a line that says what was done."""
    total = sum(spec.nbytes for shard in folder.shards for spec in folder.specs(shard))
    with progress_bar(console) as progress:
        task = progress.add_task("merging", total=total)
        merge(folder, adapter, out, base, lambda nbytes: progress.advance(task, nbytes))
    console.print(f"merged {len(adapter.pairs)} adapted linears into the {base} base: {out}")


if __name__ == "__main__":
    sys.exit(main())
