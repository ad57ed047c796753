"""Quantizes a model once and for all: `python -m convert.quantize --model ID_OR_DIR --out DIR`.

The linears of the decoder layers go to 4 bits, in bitsandbytes' layout (`convert.files.bitsandbytes`); norms, embedding and head stay
bfloat16. Piece by piece, in the model's shards and order (`convert.files.pieces`); stopped and started again it continues
(`convert.jobs.job`).
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from convert.files import bitsandbytes, pieces
from convert.files.ahead import in_order
from convert.files.derived import Shard, write_derived
from convert.files.folder import ModelFolder
from convert.files.names import Names
from convert.files.shards import Piece, TensorSpec
from convert.files.stated import modules_beside, names_of
from convert.files.verified import Sums
from convert.hub import cache_dir, resolve_model
from convert.jobs.job import Log, describe, refuse_existing
from convert.jobs.requantize import check_requantize
from convert.load import read_config
from qlora_jax.base.console import byte_bar, make_console
from qlora_jax.base.errors import InputError, end_process, exit_status
from qlora_jax.config import QuantizationSettings
from qlora_jax.config.arguments import path_argument, text_argument
from qlora_jax.ops import nf4
from qlora_jax.runtime import machine

EPILOG = """\
The folder can be given to train.py (model.name_or_path), `python -m qlora_jax generate` and `python -m convert.merge`, which use it
as it is, and to transformers with bitsandbytes. A run on it is, bit for bit, the run on the unquantized model with the same
quantization, without the time to quantize. The original weights are not in it: merging with `--base original` needs the unquantized
model, and merging into this one gives a model that cannot be quantized again without losing the adapter. Such a model is refused."""


def quantize(
    folder: ModelFolder,
    out: Path,
    quantization: QuantizationSettings,
    advance: Callable[[int], object] = lambda nbytes: None,
    log: Log = lambda line: None,
    record_sums: Callable[[Sums], object] | None = None,
) -> None:
    """Write an unquantized model in 4 bits; `out` appears whole or not at all, and a stopped run is continued.

    Args:
        advance: called with the bytes of each tensor read, or of each shard that a stopped run wrote.
        log: told, in a line each, what is continued.
        record_sums: called with the new tensors' checksums before the folder appears.

    Raises:
        InputError: `folder` is quantized already, or a weight is not finite.
        DestinationError: `out` exists, cannot be made, or the disk has no room for it.
    """
    refuse_quantized(folder)
    names = names_of(folder)

    def change(shard: str) -> Shard:
        kept = [spec for spec in folder.specs(shard) if not names.is_ignored(spec.name)]
        specs = [new for spec in kept for new in quantized_specs(spec, names, quantization)]
        work = sum(spec.nbytes for spec in kept)
        return Shard(specs, _pieces(folder, kept, quantization, advance), work)

    block = bitsandbytes.quantization_config(quantization, modules_beside(folder))
    job = job_of(folder, quantization)
    write_derived(
        folder, out, change, job, quantization_config=block, record_sums=record_sums, advance=advance, log=log
    )


def job_of(folder: ModelFolder, quantization: QuantizationSettings) -> dict[str, Any]:
    """What tells this conversion from any other; fit for JSON."""
    return describe("quantize", folder, quantization=quantization.model_dump())


def refuse_quantized(folder: ModelFolder) -> None:
    """Quantizing twice would lose twice.

    Raises:
        InputError: the folder is in 4 bits.
    """
    if folder.is_4bit:
        raise InputError(
            folder.path,
            found="a model that is in 4 bits already",
            expected="an unquantized model",
            fix="use this folder as it is, or give the unquantized model",
        )


def quantized_specs(spec: TensorSpec, names: Names, quantization: QuantizationSettings) -> list[TensorSpec]:
    """What becomes of one tensor of an unquantized folder."""
    if names.parse_linear(spec.name) is None:
        return [TensorSpec(spec.name, "BF16", spec.shape)]
    return bitsandbytes.specs(spec.name, spec.shape, quantization)


def _pieces(
    folder: ModelFolder,
    kept: Sequence[TensorSpec],
    quantization: QuantizationSettings,
    advance: Callable[[int], object],
) -> Iterator[Piece]:
    """The new bytes of these tensors; besides a piece at most one linear's codes are held."""
    names = names_of(folder)
    for spec in kept:
        if names.parse_linear(spec.name) is None:
            yield from in_order(pieces.bfloat16(folder, spec.name))
        else:
            yield from bitsandbytes.tensors(spec.name, pieces.quantized(folder, spec.name, quantization))
        advance(spec.nbytes)


@exit_status
def main(arguments: Sequence[str] | None = None, prog: str = "python -m convert.quantize") -> None:
    """The command; see `--help`."""
    parser = argparse.ArgumentParser(prog=prog, description=__doc__.split("\n\n")[0], epilog=EPILOG)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "--model", required=True, type=text_argument, metavar="ID_OR_DIR", help="the model: a hub id or a folder"
    )
    parser.add_argument(
        "--out", required=True, type=path_argument, metavar="DIR", help="the new folder; must not exist"
    )
    parser.add_argument("--quant-type", choices=tuple(nf4.CODEBOOKS), default="nf4", help="default: nf4")
    parser.add_argument(
        "--no-double-quant", action="store_true", help="keep the scales in float32: 4.5 bits a weight instead of 4.127"
    )
    parser.add_argument(
        "--requantize",
        action="store_true",
        help="take a model that an adapter was merged into after quantization, though this undoes most of the adapter's update",
    )
    options = parser.parse_args(arguments)
    console = make_console(stderr=True)
    quantization = QuantizationSettings(quant_type=options.quant_type, double_quant=not options.no_double_quant)
    refuse_existing(options.out)
    machine.keep_compiled(cache_dir() / "compiled")
    folder = ModelFolder(resolve_model(options.model, log=console.print))
    refuse_quantized(folder)
    read_config(folder)  # refuses what is not supported, before hours are spent on it
    check_requantize(folder, quantization, accepted=options.requantize, accept="--requantize", log=console.print)
    total = sum(spec.nbytes for shard in folder.shards for spec in folder.specs(shard))
    with byte_bar(console) as progress:
        task = progress.add_task("quantizing", total=total)
        quantize(folder, options.out, quantization, lambda nbytes: progress.advance(task, nbytes), console.print)
    made = ModelFolder(options.out)
    after = sum(spec.nbytes for shard in made.shards for spec in made.specs(shard))
    console.print(f"{total / 2**20:,.1f} MiB became {after / 2**20:,.1f} MiB in {options.quant_type}: {options.out}")


if __name__ == "__main__":
    end_process(main)
