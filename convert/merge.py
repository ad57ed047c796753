"""Folds an adapter into its base model: `python -m convert.merge --adapter DIR --out DIR`.

    W' = round_bf16(float32(W) + scaling · B·A)          one rounding, as peft's `merge_and_unload`; DoRA: see `convert.adapters.delta`

(peft rounds an embedding's delta before it adds it; here it is one rounding too.)

Piece by piece, in the base's shards and order (`convert.files.pieces`); stopped and started again it continues (`convert.jobs.job`).
Tensors without an adapter are copied byte for byte, and those that the adapter stores whole (modules_to_save) take the base's place. Then
the merged model proves itself (`convert.jobs.check`), and only then the folder gets its name.
"""

import argparse
import contextlib
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
from rich.console import Console

from convert.adapters.adapter import WEIGHTS_FILE, Adapter, load_adapter
from convert.adapters.config import CONFIG_FILE, read_adapter_config
from convert.adapters.delta import Base, Pair, base_passes, merged_weight, resolve_base
from convert.adapters.quantization import base_remark, needed_base
from convert.files import bitsandbytes, pieces, prequantized
from convert.files.ahead import in_order
from convert.files.derived import Shard, write_derived
from convert.files.folder import ModelFolder
from convert.files.head import is_tied
from convert.files.shards import Piece, TensorSpec
from convert.files.stated import names_of
from convert.hub import cache_dir, resolve_model
from convert.jobs.check import Differences, check_merge
from convert.jobs.job import Log, describe, files_identity, refuse_existing
from convert.jobs.requantize import check_requantize, read_note, write_note
from convert.load import read_config
from convert.stops import merged_companions
from qlora_jax.base.console import byte_bar, make_console, progress_bar
from qlora_jax.base.errors import InputError, end_process, exit_status
from qlora_jax.config.arguments import path_argument, text_argument
from qlora_jax.runtime import machine
from qlora_jax.runtime.placement import one_device

WHICH_BASE = """\
Which base. `--base original` adds the adapter to the weights as they were before quantization, as the published recipe, peft, unsloth and
LLaMA-Factory do: the base is the better one, and the merged model can be quantized again. It is the default (`auto`) wherever those
weights are at hand. `--base dequantized` adds it to what QLoRA trained it on, weights that went to 4 bits and back: the merged model
computes what was trained, up to bfloat16 rounding. But its weights lie so near to the 4-bit levels that quantizing it again undoes most
of the training; the folder says so (in config.json), and what would quantize it refuses. `auto` takes it for a model that is in 4 bits
and has no other weights. An adapter that was trained on unquantized weights (LoRA, not QLoRA) belongs to `--base original`."""


def merge(
    folder: ModelFolder,
    adapter: Adapter,
    out: Path,
    base: Base,
    *,
    advance: Callable[[int], object] = lambda nbytes: None,
    log: Log = lambda line: None,
    verify: Callable[[Path], object] = lambda written: None,
) -> None:
    """Write base + adapter as a Hugging Face folder; `out` appears whole or not at all, and a stopped run is continued.

    With the dequantized base its `config.json` says what another quantization would leave of the adapter: see `convert.jobs.requantize`.

    Args:
        advance: called with the bytes of each tensor written, or of each shard that a stopped run wrote.
        log: told, in a line each, what is continued.
        verify: called with the merged folder before it becomes `out`; with an InputError of its it never does.

    Raises:
        DestinationError: `out` exists, cannot be made, or the disk has no room for it.
        InputError: `folder` is in 4 bits, and `base` asks for other weights or the adapter was trained on others.
        RuntimeError: not every pair of the adapter has its weight (a bug: `load_adapter` checked them).
    """
    check_base(folder, base)
    if folder.is_4bit:
        prequantized.settle(folder, adapter.quantization, where=adapter.path, fix=needed_base(adapter.quantization))
    unmet = adapter.pairs.keys() - {adapter.names.parse_target(name) for name in folder.names}
    if unmet:
        raise RuntimeError(f"no weights for {len(unmet)} of {len(adapter.pairs)} adapted weights")

    def change(shard: str) -> Shard:
        specs = _merged_specs(folder, shard, adapter, base)
        work = sum(spec.nbytes for spec in specs)
        made = in_order(_merged_tensors(folder, specs, adapter, base, advance))
        return Shard(specs, (piece for piece in made if piece is not None), work)

    files = files_identity((adapter.path / name for name in (CONFIG_FILE, WEIGHTS_FILE)), adapter.path)
    trained_on = adapter.quantization.model_dump()
    settings = {
        "base": base,
        "adapter": {"path": str(adapter.path.resolve()), "files": files, "trained_on": trained_on},
    }
    job = describe("merge", folder, **settings)
    companions = merged_companions(folder, adapter.path, read_config(folder).vocab_size, log)

    def finish(written: Path) -> None:
        if base == "dequantized":
            write_note(folder, adapter, written)
        verify(written)

    write_derived(
        folder, out, change, job, companions=companions, past_cache=True, advance=advance, log=log, verify=finish
    )


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


def _changes(folder: ModelFolder, name: str, adapter: Adapter, base: Base) -> bool:
    """Whether a tensor of the base is another one in the merged model."""
    names = adapter.names
    is_linear = names.parse_linear(name) is not None
    through_4_bits = base == "dequantized" and (is_linear or bitsandbytes.is_packed(folder, name))
    name = adapter.of(name)
    return (
        through_4_bits or name in adapter.saved or name in adapter.tokens or names.parse_target(name) in adapter.pairs
    )


def _merged_specs(folder: ModelFolder, shard: str, adapter: Adapter, base: Base) -> list[TensorSpec]:
    """A head that is a copy of the embedding is left out where the adapter replaces the embedding: it would be another head."""
    names = adapter.names
    replaced = names.embedding in adapter.saved and names.lm_head not in adapter.saved
    return [
        TensorSpec(spec.name, "BF16", spec.shape) if _changes(folder, spec.name, adapter, base) else spec
        for spec in prequantized.plain_specs(folder, shard)
        if not (replaced and spec.name == names.lm_head and is_tied(folder))
    ]


def _merged_tensors(
    folder: ModelFolder,
    specs: Sequence[TensorSpec],
    adapter: Adapter,
    base: Base,
    advance: Callable[[int], object],
) -> Iterator[Callable[[], Piece | None]]:
    """What makes the shard's bytes, some rows of a tensor at a time; and, between them, what must be known before the next tensor's are."""
    tensors = (_passes(folder, spec, adapter, base) for spec in specs)
    first, values = next(tensors, (iter(()), iter(())))
    yield from first
    for spec in specs:
        first, following = next(tensors, (iter(()), iter(())))
        for pair in itertools.zip_longest(values, first):
            yield from filter(None, pair)
        values = following
        advance(spec.nbytes)


def _passes(
    folder: ModelFolder, spec: TensorSpec, adapter: Adapter, base: Base
) -> tuple[Iterator[Callable[[], None]], Iterator[Callable[[], Piece]]]:
    """What comes before any of a tensor's pieces, and the pieces. Nothing is held before they are asked for."""
    if not _changes(folder, spec.name, adapter, base):
        cuts = range(0, math.prod(spec.shape), pieces.PIECE)
        return iter(()), (functools.partial(folder.elements, spec.name, begin, pieces.PIECE) for begin in cuts)
    if len(spec.shape) == 1:
        return iter(()), iter([functools.partial(_bfloat16, adapter.saved[spec.name])])
    name = adapter.of(spec.name)
    stored, tokens = adapter.saved.get(name), adapter.tokens.get(name)
    first, rows = base_passes(folder, spec.name, adapter.quantization, base, stored, tokens)
    return first, _merged_rows(rows, adapter.pairs.get(adapter.names.parse_target(name)))


def _merged_rows(rows: pieces.Rows, pair: Pair | None) -> Iterator[Callable[[], np.ndarray]]:
    if pair is not None:
        pair = dataclasses.replace(pair, lora_a=one_device().put(pair.lora_a, "device"))
    for some, values in rows:
        yield functools.partial(_merged, values, None if pair is None else pair.rows(some))


def _merged(values: pieces.Values, pair: Pair | None) -> np.ndarray:
    return _bfloat16(values() if pair is None else merged_weight(values(), pair))


def _bfloat16(values: np.ndarray | jax.Array) -> np.ndarray:
    return np.asarray(values).astype(ml_dtypes.bfloat16, copy=False)


@exit_status
def main(arguments: Sequence[str] | None = None, prog: str = "python -m convert.merge") -> None:
    """The command; see `--help`."""
    parser = argparse.ArgumentParser(prog=prog, description=__doc__.split("\n\n")[0], epilog=WHICH_BASE)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "--adapter", required=True, type=path_argument, metavar="DIR", help="the adapter, in PEFT's format"
    )
    parser.add_argument(
        "--out", required=True, type=path_argument, metavar="DIR", help="the merged model's folder; must not exist"
    )
    parser.add_argument(
        "--model",
        type=text_argument,
        metavar="ID_OR_DIR",
        help="the base model (default: the one named in adapter_config.json)",
    )
    parser.add_argument(
        "--base", choices=("auto", "original", "dequantized"), default="auto", help="default: auto; see below"
    )
    parser.add_argument(
        "--requantize",
        action="store_true",
        help="with --base dequantized: take a model that another adapter was merged into, though 4 bits undo that adapter",
    )
    parser.add_argument(
        "--check",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="run a few tokens through base + adapter and through the merged model, and compare (default: yes)",
    )
    options = parser.parse_args(arguments)
    console = make_console(stderr=True)
    refuse_existing(options.out)
    name = options.model or read_adapter_config(options.adapter).base_model
    machine.keep_compiled(cache_dir() / "compiled")
    if not name:
        raise InputError(
            options.adapter, found="no base_model_name_or_path in its adapter_config.json", fix="say which with --model"
        )
    folder = ModelFolder(resolve_model(name, log=console.print))
    adapter = load_adapter(options.adapter, read_config(folder), folder)
    base = resolve_base(options.base, folder)
    if base == "dequantized" and (remark := base_remark(adapter.stated, folder, name)):
        console.print(remark)
    if adapter.base_model not in (None, name):
        console.print(f"the adapter says that it was trained on {adapter.base_model}")
    if base == "dequantized":
        check_requantize(
            folder, adapter.quantization, accepted=options.requantize, accept="--requantize", log=console.print
        )
    merge_with_progress(folder, adapter, options.out, base, console, check=options.check)


def merge_with_progress(
    folder: ModelFolder, adapter: Adapter, out: Path, base: Base, console: Console, *, check: bool = True
) -> None:
    """`merge` and its check under progress bars, and a line each that says what was done and found.

    Raises:
        InputError: as `merge`; or the check found another model than base + adapter, and `out` is not there.
    """
    total = sum(spec.nbytes for shard in folder.shards for spec in _merged_specs(folder, shard, adapter, base))
    found: list[Differences] = []
    with contextlib.ExitStack() as bars:
        progress = bars.enter_context(byte_bar(console))
        task = progress.add_task("merging", total=total)

        def verify(written: Path) -> None:
            bars.close()
            with progress_bar(console) as layers:
                checking = layers.add_task("checking layers", total=len({layer for layer, _ in _linears(folder)}))
                found.append(check_merge(folder, adapter, written, base, lambda: layers.advance(checking), out))

        advance = functools.partial(progress.advance, task)
        verify = verify if check else lambda written: None
        merge(folder, adapter, out, base, advance=advance, log=console.print, verify=verify)
    stored = [name for name in adapter.saved if adapter.names.parse_target(name) not in adapter.pairs]
    whole = f" and {len(stored)} whole tensor{'s'[: len(stored) > 1]}" if stored else ""
    whole += "".join(f", {rows.indices.size} rows of {name}" for name, rows in adapter.tokens.items())
    beyond = [name for layer, name in adapter.pairs if layer is None]
    linears = f"{len(adapter.pairs) - len(beyond)} adapted linears{''.join(f', {name}' for name in beyond)}"
    console.print(f"merged {linears}{whole} into the {base} base: {out}")
    if base == "dequantized" and (note := read_note(ModelFolder(out))) is not None:
        better = "python -m convert.merge --model UNQUANTIZED_MODEL --base original merges into weights that can be"
        console.print(f"{note}; {better}")
    for differences in found:
        console.print(f"checked: {differences}")


def _linears(folder: ModelFolder) -> list[tuple[int, str]]:
    names = names_of(folder)
    return [linear for name in folder.names if (linear := names.parse_linear(name)) is not None]


if __name__ == "__main__":
    end_process(main)
