"""Tensors a million elements at a time, so that no conversion needs more memory for a larger one.

A linear's 4-bit codes, a quarter of its bfloat16 bytes, are the most that is held: its scales come first in the file, and they are
known only when all of it was seen. On a GPU a linear is quantized whole, in the GPU's memory.
"""

from collections.abc import Iterator

import jax
import ml_dtypes
import numpy as np

from convert import bitsandbytes
from convert.folder import ModelFolder
from qlora_jax import kernels, nf4
from qlora_jax.config import QuantizationSettings
from qlora_jax.placement import put

PIECE = 2**20
"""Elements. A multiple of `nf4.BLOCK_SIZE`; enough to keep all cores busy, few enough for the processor's cache."""
EXPONENT = 0x7F80
"""The bits of a bfloat16 that are all ones in infinities and NaN, and only there."""

_dequantize = jax.jit(nf4.dequantize)
_dequantize_absmax = jax.jit(nf4.dequantize_absmax)
_quantize_absmax = jax.jit(nf4.quantize_absmax)


def bfloat16(folder: ModelFolder, name: str, size: int | None = None) -> Iterator[np.ndarray]:
    """A tensor cast to bfloat16, `size` (default: `PIECE`) elements at a time, [size] each.

    Raises:
        InputError: a value is not finite then.
    """
    for piece in _cast(folder, name, size or PIECE):
        if piece.size and (piece.view(np.uint16) & EXPONENT).max() == EXPONENT:
            _refuse_infinite(folder, name)
        yield piece
        del piece


def quantized(folder: ModelFolder, name: str, quantization: QuantizationSettings) -> nf4.QuantizedTensor:
    """A linear as it is in 4 bits, or cast to bfloat16 and quantized; arrays are numpy's or the device's.

    Raises:
        InputError: a weight or a scale is not finite.
    """
    if folder.is_4bit:
        return bitsandbytes.read(folder, name)
    shape = folder.spec(name).shape
    if (size := int(np.prod(shape))) <= PIECE or jax.default_backend() != "cpu":
        weight = read_bfloat16(folder, name)
        return kernels.quantize(put(weight, "device"), quantization.double_quant, quantization.quant_type)
    codes = np.empty(-(-size // 2), np.uint8)
    absmax = np.empty(-(-size // nf4.BLOCK_SIZE), np.float32)
    for begin, piece in zip(range(0, size, PIECE), _cast(folder, name, PIECE), strict=True):
        part = nf4.quantize(put(piece, "device"), False, quantization.quant_type)
        codes[begin // 2 : begin // 2 + part.codes.size] = part.codes
        absmax[begin // nf4.BLOCK_SIZE : begin // nf4.BLOCK_SIZE + part.absmax.size] = part.absmax
    if not np.isfinite(absmax).all():  # a block's scale is finite if all of the block is
        _refuse_infinite(folder, name)
    return _with_scales(codes, absmax, shape, quantization)


def _with_scales(
    codes: np.ndarray, absmax: np.ndarray, shape: tuple[int, ...], quantization: QuantizationSettings
) -> nf4.QuantizedTensor:
    """absmax [N] float32 → the tensor with its scales, quantized or not, as numpy's arrays."""
    scales = jax.tree.map(np.asarray, _quantize_absmax(absmax)) if quantization.double_quant else (absmax, None, None)
    return nf4.QuantizedTensor(codes, *scales, shape, quantization.quant_type)


def through_4_bits(
    folder: ModelFolder, name: str, quantization: QuantizationSettings
) -> Iterator[tuple[slice, np.ndarray]]:
    """`dequantized(quantized(...))`, bit for bit: a linear [out, in] some rows at a time.

    On a CPU in two passes over the file, the first for the scales: faster than packing and unpacking codes, and nothing is held.

    Raises:
        InputError: a weight or a scale is not finite.
    """
    shape = folder.spec(name).shape
    if folder.is_4bit or int(np.prod(shape)) <= PIECE or jax.default_backend() != "cpu":
        yield from dequantized(quantized(folder, name, quantization))
        return
    rows, columns = shape
    some = row_slices(rows, columns)
    size = some[0].stop * columns
    absmax = np.concatenate([nf4.block_absmax(put(piece, "device")) for piece in _cast(folder, name, size)])
    if not np.isfinite(absmax).all():
        _refuse_infinite(folder, name)
    scales = np.asarray(_dequantize_absmax(_with_scales(np.empty(0, np.uint8), absmax, shape, quantization)))
    for which, piece in zip(some, _cast(folder, name, size), strict=True):
        part = scales[which.start * columns // nf4.BLOCK_SIZE :][: -(-piece.size // nf4.BLOCK_SIZE)]
        values = nf4.round_trip(put(piece, "device"), put(part, "device"), quantization.quant_type)
        yield which, np.asarray(values).reshape(-1, columns)


def dequantized(weight: nf4.QuantizedTensor) -> Iterator[tuple[slice, np.ndarray]]:
    """A linear [out, in] some rows at a time: which, and their values in what dequantizing rounds to."""
    rows, columns = weight.shape
    if jax.default_backend() != "cpu":
        weight = put(weight, "device")
        yield slice(0, rows), np.asarray(kernels.dequantize(weight))
        return
    absmax = np.asarray(_dequantize_absmax(weight))
    for some in row_slices(rows, columns):
        first, last = some.start * columns, some.stop * columns
        blocks = slice(first // nf4.BLOCK_SIZE, -(-last // nf4.BLOCK_SIZE))
        codes = weight.codes[first // 2 : -(-last // 2)]
        shape = (some.stop - some.start, columns)
        part = nf4.QuantizedTensor(codes, absmax[blocks], None, None, shape, weight.quant_type, weight.dtype)
        yield some, np.asarray(_dequantize(part))


def row_slices(rows: int, columns: int) -> list[slice]:
    """All rows in order, about `PIECE` elements at a time, cut between blocks of any `columns`."""
    step = max(PIECE // max(columns, 1) // nf4.BLOCK_SIZE, 1) * nf4.BLOCK_SIZE
    return [slice(first, min(first + step, rows)) for first in range(0, rows, step)]


def read_bfloat16(folder: ModelFolder, name: str) -> np.ndarray:
    """A tensor cast to bfloat16, as it is before it is quantized.

    Raises:
        InputError: a value is not finite then.
    """
    tensor = folder.read(name).astype(ml_dtypes.bfloat16, copy=False)
    nf4.check_finite(tensor, f"{folder.path}: {name}")
    return tensor


def _cast(folder: ModelFolder, name: str, size: int) -> Iterator[np.ndarray]:
    for piece in folder.pieces(name, size):
        yield piece.astype(ml_dtypes.bfloat16, copy=False)
        del piece


def _refuse_infinite(folder: ModelFolder, name: str) -> None:
    """Read again, whole, to say which value it is."""
    read_bfloat16(folder, name)
    raise AssertionError(f"{name}: a value was not finite, and now all are")
