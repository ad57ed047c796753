"""Models whose last adapter would not survive 4 bits: folders that it was merged into after quantization.

Merged into a *dequantized* base, the weights are W' = D + dW, and every weight of D is one of 16 levels times its block's scale. dW is
mostly smaller than half the distance between levels, so that quantizing W' finds D's levels again, and the training is gone. (Merged into
the original weights it is not: they lie anywhere between the levels, and as many cross a boundary as dW is large.)

`convert.merge` counts what would be left and writes it into the merged folder's `config.json`, which every program copies, transformers'
`save_pretrained` too:

    share = <Q(W') - Q(D), dW> / <dW, dW>       0: nothing of the update survives Q, 1: on average all of it

A folder without that entry, or of other weights by now, is recognized by its weights: see `convert.files.levels`. `check_requantize` is
called by every command before it puts a model into 4 bits.
"""

import functools
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pydantic

from convert.adapters.adapter import Adapter
from convert.adapters.delta import base_rows
from convert.files import levels
from convert.files.ahead import in_order
from convert.files.folder import ModelFolder
from convert.files.pieces import Values
from convert.files.shards import write_json
from convert.files.stated import names_of
from convert.jobs.job import Log
from qlora_jax.base.errors import InputError
from qlora_jax.config import QuantizationSettings
from qlora_jax.ops import nf4

KEY = "qlora_jax"
"""In `config.json`. Other programs keep what they do not know there."""
FINGERPRINT_TENSORS, FINGERPRINT_ELEMENTS = 16, 4096
"""Linears, evenly spread, and elements of each that tell whether an entry is about the weights beside it."""


class Left(pydantic.BaseModel, frozen=True):
    """What quantizing a merged folder leaves of its adapter's update."""

    changed: int
    """4-bit codes of the adapted linears that are not those of the base."""
    share: float
    """Of the update that survives, with scales in float32."""
    share_double_quant: float
    """The same with scales in 8 bits."""

    def share_in(self, quantization: QuantizationSettings) -> float:
        """Share of the update that survives this kind of quantization."""
        return self.share_double_quant if quantization.double_quant else self.share


class MergeNote(pydantic.BaseModel, frozen=True):
    """Entry of a merged folder's `config.json`: what it was merged into, and what quantizing it would leave."""

    merged_into: str
    """`dequantized`; of folders that were merged into original weights there is no entry."""
    quantization: QuantizationSettings
    """That the base had gone through."""
    codes: int
    """Weights of the adapted linears."""
    requantized: dict[nf4.QuantType, Left]
    fingerprint: str

    def __str__(self) -> str:
        kept = (
            f"{_share(left.share_double_quant)} in {kind}"
            for kind, left in sorted(self.requantized.items(), reverse=True)
        )
        return f"quantized again it would keep {' and '.join(kept)} of the adapter's update"


def write_note(folder: ModelFolder, adapter: Adapter, written: Path) -> MergeNote | None:
    """Count what 4 bits would leave of an adapter that was merged into a dequantized base, and note it in the merged `config.json`.

    Args:
        folder: the base.
        written: the merged folder, complete.

    Returns:
        the note; None, and nothing is written, where the adapter changes no linear: then 4 bits take nothing out.
    """
    merged = ModelFolder(written)
    tallies = {quant_type: np.zeros(3) for quant_type in nf4.CODEBOOKS}
    codes, squares = 0, 0.0
    for size, square, by_type in in_order(_tasks(folder, adapter, merged)):
        codes, squares = codes + size, squares + float(square)
        for quant_type, tally in by_type.items():
            tallies[quant_type] += np.asarray(tally, np.float64)
    if squares == 0:
        return None
    left = {
        quant_type: Left(
            changed=int(changed), share=round(plain / squares, 4), share_double_quant=round(double / squares, 4)
        )
        for quant_type, (changed, plain, double) in tallies.items()
    }
    note = MergeNote(
        merged_into="dequantized",
        quantization=adapter.quantization,
        codes=codes,
        requantized=left,
        fingerprint=_fingerprint(merged),
    )
    write_json(written / "config.json", {**merged.config, KEY: note.model_dump(mode="json")})
    return note


def check_requantize(
    folder: ModelFolder, quantization: QuantizationSettings, *, accepted: bool, accept: str, log: Log
) -> None:
    """Check, before a folder is quantized, that this does not undo an adapter that was merged into it.

    Args:
        accepted: whether to go on all the same, after a line that says what is lost.
        accept: what a user would say to have it accepted, e.g. `--requantize`.

    Raises:
        InputError: the folder was merged into a dequantized base, and `accepted` is false.
    """
    if folder.is_4bit or (found := _loss(folder, quantization)) is None:
        return
    if accepted:
        log(f"{folder.path}: {found}; accepted")
        return
    raise InputError(
        folder.path,
        found=found,
        expected="a model that keeps what it learned in 4 bits",
        fix="merge the adapter into the original weights (python -m convert.merge --model UNQUANTIZED_MODEL --base original) and give "
        f"that folder; or use this one unquantized, as `python -m qlora_jax generate` does; or accept the loss with {accept}",
    )


def _loss(folder: ModelFolder, quantization: QuantizationSettings) -> str | None:
    """What quantizing a folder would undo, in words; None if nothing."""
    quant_type = quantization.quant_type
    note = read_note(folder)
    if note is not None:
        left = note.requantized[quant_type]
        share = left.share_in(quantization)
        return (
            f"an adapter merged into a dequantized base ({note.quantization.quant_type}); in {quant_type} it changes "
            f"{left.changed:,} of its linears' {note.codes:,} codes ({left.changed / note.codes:.2%}), and {_share(share)} of its update "
            "would survive"
        )
    if (seen := levels.look(folder)) is None:
        return None
    changed, size, share = seen.left(quant_type)
    return (
        f"weights near the levels of {seen.quant_type}, as an adapter merged into a dequantized base leaves them; in {quant_type} it "
        f"changes {changed:,} of {size:,} codes looked at ({changed / size:.2%}), and {_share(share)} of its update would survive"
    )


def read_note(folder: ModelFolder) -> MergeNote | None:
    """A folder's note, if it has one that is about the weights in it."""
    entry = folder.config.get(KEY)
    if entry is None or folder.is_4bit:
        return None
    try:
        note = MergeNote.model_validate(entry)
    except pydantic.ValidationError:
        return None  # its weights will tell
    return note if note.codes > 0 and note.fingerprint == _fingerprint(folder) else None


def _share(share: float) -> str:
    return f"{min(max(share, 0.0), 1.0):.1%}"


def _tasks(folder: ModelFolder, adapter: Adapter, merged: ModelFolder) -> Iterator[Callable[[], Any]]:
    """Each counts some rows of an adapted linear."""
    names = adapter.names
    for name in merged.names:
        target = names.parse_target(name)
        if names.parse_linear(name) is None or target not in adapter.pairs or name in adapter.saved:
            continue
        columns = merged.spec(name).shape[1]
        for rows, values in base_rows(folder, name, adapter.quantization, "dequantized"):
            yield functools.partial(
                _count, values, merged, name, rows.start * columns, (rows.stop - rows.start) * columns
            )


def _count(values: Values, merged: ModelFolder, name: str, begin: int, size: int) -> tuple[int, Any, dict[Any, Any]]:
    return size, *_tally(values().reshape(-1), merged.elements(name, begin, size))


@jax.jit
def _tally(before: jax.Array, after: jax.Array) -> tuple[jax.Array, dict[nf4.QuantType, jax.Array]]:
    """Whole blocks of D [n] and of W' [n], any float dtype → <dW, dW>, and by type [3] float32.

    The three: codes that differ; <Q(W') - Q(D), dW> with scales in float32, and with scales in 8 bits. Scales are quantized a piece of a
    weight at a time, not a weight, which moves shares by less than they are rounded to.
    """
    before, after = before.astype(jnp.float32), after.astype(jnp.float32)
    change = after - before
    found: dict[nf4.QuantType, jax.Array] = {}
    for quant_type in nf4.CODEBOOKS:
        old, new = (_levels(weight, quant_type) for weight in (before, after))
        changed = jnp.sum(old[0] != new[0])
        sums = [
            jnp.sum(
                jnp.sum(_blocks(new[0] * change), 1) * new[scales] - jnp.sum(_blocks(old[0] * change), 1) * old[scales]
            )
            for scales in (1, 2)
        ]
        found[quant_type] = jnp.stack([changed.astype(jnp.float32), *sums])
    return jnp.sum(change * change), found


def _levels(weight: jax.Array, quant_type: nf4.QuantType) -> tuple[jax.Array, jax.Array, jax.Array]:
    """weight [n] float32 → its levels [n], its scales [N], and those after quantizing them too."""
    absmax = nf4.block_absmax(weight)
    levels_of = nf4.round_trip(weight, absmax, jnp.ones_like(absmax), quant_type)
    codes, nested, offset = nf4.quantize_absmax(absmax)
    quantized: Any = nf4.QuantizedTensor  # a dataclass of flax's making, which a checker does not know
    quantized = quantized(jnp.zeros(0, jnp.uint8), codes, nested, offset, weight.shape, quant_type)
    return levels_of, absmax, nf4.dequantize_absmax(quantized)


def _blocks(weight: jax.Array) -> jax.Array:
    missing = -weight.size % nf4.BLOCK_SIZE
    return jnp.pad(weight, (0, missing)).reshape(-1, nf4.BLOCK_SIZE)


def _fingerprint(folder: ModelFolder) -> str:
    """SHA-256 of some of the linears' first elements in bfloat16: the same however they are dealt to files, and in float32 too."""
    names = names_of(folder)
    linears = sorted(name for name in folder.names if names.parse_linear(name) is not None)
    digest = hashlib.sha256()
    for name in linears[:: max(1, len(linears) // FINGERPRINT_TENSORS)]:
        digest.update(name.encode())
        digest.update(folder.elements(name, 0, FINGERPRINT_ELEMENTS).astype(ml_dtypes.bfloat16).tobytes())
    return digest.hexdigest()
