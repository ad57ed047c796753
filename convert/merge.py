"""Folds an adapter into its base model: `python -m convert.merge --adapter DIR --out DIR`.

    W' = round_bf16(float32(W) + scaling · B·A)          one rounding, as peft's `merge_and_unload`

Tensor by tensor, in the base's shards and order. Tensors without an adapter are copied byte for byte.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import ml_dtypes
import numpy as np
from rich.console import Console

from convert import names, prequantized
from convert.adapter import Adapter, load_adapter, read_adapter_config
from convert.derived import Shard, write_derived
from convert.folder import ModelFolder
from convert.hub import resolve_model
from convert.load import read_bfloat16, read_config, read_linear
from convert.shards import TensorSpec
from qlora_jax import kernels
from qlora_jax.display import byte_bar, make_console
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
        InputError: `out` exists; or `folder` is in 4 bits, and `base` asks for other weights or the adapter was trained on others.
        RuntimeError: not every pair of the adapter has its weight (a bug: `load_adapter` checked them).
    """
    check_base(folder, base)
    if folder.is_4bit:
        fix = "give the model that the adapter was trained on"
        prequantized.settle(folder, adapter.quantization, where=adapter.path, fix=fix)
    unmet = adapter.pairs.keys() - {names.parse_linear(name) for name in folder.names}
    if unmet:
        raise RuntimeError(f"no weights for {len(unmet)} of {len(adapter.pairs)} adapted linears")

    def change(shard: str) -> Shard:
        specs = _merged_specs(folder, shard, adapter, base)
        return specs, _merged_tensors(folder, specs, adapter, base, advance)

    write_derived(folder, out, change)


def check_base(folder: ModelFolder, base: Base) -> None:
    """Refuse a base that is not there.

    Raises:
        InputError: the original weights are asked for and the folder has only 4-bit ones.
    """
    if folder.is_4bit and base == "original":
        raise InputError(
            folder.path,
            found="a model in 4 bits: its original weights are not here",
            fix="give the unquantized model, or merge into the dequantized base (--base dequantized, training.merge_base)",
        )


def _changes(name: str, adapter: Adapter, base: Base) -> bool:
    """Whether a tensor of the base is another one in the merged model."""
    linear = names.parse_linear(name)
    return linear is not None and (base == "dequantized" or linear in adapter.pairs)


def _merged_specs(folder: ModelFolder, shard: str, adapter: Adapter, base: Base) -> list[TensorSpec]:
    return [
        TensorSpec(spec.name, "BF16", spec.shape) if _changes(spec.name, adapter, base) else spec
        for spec in prequantized.plain_specs(folder, shard)
    ]


def _merged_tensors(
    folder: ModelFolder,
    specs: Sequence[TensorSpec],
    adapter: Adapter,
    base: Base,
    advance: Callable[[int], object],
) -> Iterator[np.ndarray | bytes]:
    """The shard's tensors one at a time."""
    for spec in specs:
        if not _changes(spec.name, adapter, base):
            yield folder.read_bytes(spec.name)
        else:
            linear = names.parse_linear(spec.name)
            weight = _base_weight(folder, spec.name, adapter, base)
            if linear in adapter.pairs:
                weight = merged_weight(weight, *adapter.pairs[linear], adapter.scaling)
            yield weight.astype(ml_dtypes.bfloat16, copy=False)
        advance(spec.nbytes)


def _base_weight(folder: ModelFolder, name: str, adapter: Adapter, base: Base) -> np.ndarray:
    """A linear's weight before the adapter [out, in]: bfloat16; for `dequantized` through 4 bits and back, in what that rounds to."""
    if base == "original":
        return read_bfloat16(folder, name)
    return np.asarray(kernels.dequantize(put(read_linear(folder, name, adapter.quantization), "device")))


def merged_weight(weight: np.ndarray, lora_a: np.ndarray, lora_b: np.ndarray, scaling: float) -> np.ndarray:
    """weight [out, in] of any float dtype, A [r, in] and B [out, r] float32 → bfloat16 [out, in], rounded once."""
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
    total = sum(spec.nbytes for shard in folder.shards for spec in _merged_specs(folder, shard, adapter, base))
    with byte_bar(console) as progress:
        task = progress.add_task("merging", total=total)
        merge(folder, adapter, out, base, lambda nbytes: progress.advance(task, nbytes))
    console.print(f"merged {len(adapter.pairs)} adapted linears into the {base} base: {out}")


if __name__ == "__main__":
    sys.exit(main())
