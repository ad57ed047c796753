"""Recognizes weights that were in 4 bits once and have moved a little since: those of an adapter merged into a dequantized base.

Of a block of ordinary weights, scaled, the distances to the nearest level are spread over the whole way to the next boundary, half of it
on average. Of D + dW they are as small as dW. A sample of two thousand blocks tells the two apart. Weights that lie *on* the levels, as
those of a model that was dequantized and not changed, are none of our business: quantizing them again loses nothing.
"""

import dataclasses
from collections.abc import Iterator

import ml_dtypes
import numpy as np

from convert.files.folder import ModelFolder
from convert.files.stated import names_of
from qlora_jax.ops import nf4

LAYERS, PLACES, BLOCKS = 4, 2, 32
"""A sample: of so many layers every linear, at so many places so many blocks in a row."""
NEAR = 0.3
"""Mean distance from the levels, as a share of the way to the next boundary, below which a block is near them; ordinary blocks of 64 have
0.5 ± 0.04."""
MOST = 0.9
"""Share of the sampled blocks that must be near the levels."""
MOVED = 0.05
"""Share of them that must not lie on the levels to the last bit."""
ROUNDING = 1.25
"""Error of a weight on a level, in halves of bfloat16's spacing: one rounding's, and float16's before it."""
PASSES = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Seen:
    """A sample of weights that lie near the levels of a type."""

    quant_type: nf4.QuantType
    pairs: list[tuple[np.ndarray, np.ndarray]]
    """(where the weights would be without what moved them, the weights), each [n, 64] float32, of each sampled linear."""

    def left(self, quant_type: nf4.QuantType) -> tuple[int, int, float]:
        """Return what quantizing the sample would leave of what moved it: codes that differ, of how many, and the share of the update.

        As `convert.jobs.requantize` counts it, with scales in float32.
        """
        changed, size, kept, squares = 0, 0, 0.0, 0.0
        for before, after in self.pairs:
            change = after - before
            (old, old_scale), (new, new_scale) = (_nearest(blocks, quant_type) for blocks in (before, after))
            changed, size = changed + int((old != new).sum()), size + after.size
            kept += float(((new * new_scale - old * old_scale) * change).sum(dtype=np.float64))
            squares += float((change * change).sum(dtype=np.float64))
        return changed, size, kept / squares


def look(folder: ModelFolder) -> Seen | None:
    """Return the sample if an unquantized folder's linears lie near, but not on, the levels of a 4-bit type; None if they do not."""
    sample = list(_sample(folder))
    for quant_type in nf4.CODEBOOKS:
        fitted = [_fit(blocks, quant_type) for blocks in sample]
        if not fitted:
            return None
        near = np.concatenate([distance < NEAR for _, distance, _ in fitted])
        moved = near & np.concatenate(
            [~_lies_on(blocks, fit) for blocks, (_, _, fit) in zip(sample, fitted, strict=True)]
        )
        if near.mean() >= MOST and moved.mean() >= MOVED:
            pairs = [(values, blocks) for blocks, (values, _, _) in zip(sample, fitted, strict=True)]
            return Seen(quant_type=quant_type, pairs=pairs)
    return None


def _sample(folder: ModelFolder) -> Iterator[np.ndarray]:
    """Blocks [n, 64] float32 of some linears, none of zeros only."""
    names = names_of(folder)
    linears = {name: parsed[0] for name in folder.names if (parsed := names.parse_linear(name)) is not None}
    layers = sorted(set(linears.values()))
    chosen = {layers[index] for index in np.linspace(0, len(layers) - 1, LAYERS).astype(int)} if layers else set()
    for name, layer in linears.items():
        if layer not in chosen:
            continue
        rows, columns = folder.spec(name).shape
        number = rows * columns // nf4.BLOCK_SIZE
        starts = sorted(set(np.linspace(0, max(0, number - BLOCKS), PLACES).astype(int).tolist()))
        parts = [
            folder.elements(name, start * nf4.BLOCK_SIZE, min(BLOCKS, number) * nf4.BLOCK_SIZE) for start in starts
        ]
        blocks = np.concatenate([part.astype(ml_dtypes.bfloat16).astype(np.float32) for part in parts])
        blocks = blocks.reshape(-1, nf4.BLOCK_SIZE)
        if (kept := blocks[np.isfinite(blocks).all(1) & (blocks != 0).any(1)]).size:
            yield kept


def _fit(blocks: np.ndarray, quant_type: nf4.QuantType) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """blocks [n, 64] → the nearest levels times the scale that fits them best [n, 64], mean distances [n], and the levels [n, 64].

    A distance is a share of the way from the level to the next boundary on that side; beyond the outermost levels there is none.
    """
    _, boundaries = _levels(quant_type)
    level, scale = _nearest(blocks, quant_type)
    for _ in range(PASSES):
        scale = (blocks * level).sum(1, keepdims=True) / (level * level).sum(1, keepdims=True)
        level = _level(blocks / scale, quant_type)
    apart = blocks / scale - level
    index = np.searchsorted(boundaries, blocks / scale)
    edges = np.concatenate([[-np.inf], boundaries, [np.inf]])
    room = np.where(apart >= 0, edges[index + 1] - level, level - edges[index])
    inside = np.isfinite(room)
    distance = np.where(inside, np.abs(apart) / np.where(inside, room, 1), 0).sum(1) / np.maximum(inside.sum(1), 1)
    return level * scale, distance, level


def _nearest(blocks: np.ndarray, quant_type: nf4.QuantType) -> tuple[np.ndarray, np.ndarray]:
    """blocks [n, 64] → their levels as `nf4.quantize` chooses them [n, 64], and their scales [n, 1]."""
    scale = np.abs(blocks).max(1, keepdims=True)
    return _level(blocks / scale, quant_type), scale


def _level(scaled: np.ndarray, quant_type: nf4.QuantType) -> np.ndarray:
    ascending, boundaries = _levels(quant_type)
    return ascending[np.searchsorted(boundaries, scaled)]


def _levels(quant_type: nf4.QuantType) -> tuple[np.ndarray, np.ndarray]:
    """The levels, ascending, FP4's two zeros as one; and the boundaries between them."""
    ascending = np.unique(nf4.CODEBOOKS[quant_type])
    return ascending, (ascending[1:] + ascending[:-1]) / np.float32(2)


def _lies_on(blocks: np.ndarray, level: np.ndarray) -> np.ndarray:
    """Whether there is a scale by which each block's levels round to all of its weights, in float16 first or at once in bfloat16; [n]."""
    half = ROUNDING * np.ldexp(np.float32(0.5), np.frexp(np.abs(blocks))[1] - 8)
    size = np.where(level == 0, 1, np.abs(level))
    low, high = (np.abs(blocks) - half) / size, (np.abs(blocks) + half) / size
    agrees = (np.sign(blocks) == np.sign(level)) | (level == 0) & (blocks == 0)
    low, high = np.where(level == 0, 0, low), np.where(level == 0, np.inf, high)
    return agrees.all(1) & (low.max(1) <= high.min(1) * (1 + 1e-6))
