"""Tensors some millions of elements at a time, so that no conversion needs more memory for a larger one, and all cores have work.

A piece is made by a function without arguments, to be called by any thread (`convert.files.ahead.in_order`). A linear's 4-bit codes, a
quarter of its bfloat16 bytes, are the most that is held: its scales come first in the file, and they are known only when all of it was
seen.

With a GPU a linear is quantized, dequantized and merged whole, in the GPU's memory. It goes there and comes back in the same pieces: the
next linear's are read and sent while this one's are fetched and written.
"""

import functools
import math
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from convert.files import bitsandbytes, int8
from convert.files.ahead import Shared, in_order
from convert.files.folder import ModelFolder, aligned
from qlora_jax.config import QuantizationSettings
from qlora_jax.ops import dispatch, nf4
from qlora_jax.runtime import pinned
from qlora_jax.runtime.placement import one_device

PIECE = 2**21
"""Elements. A multiple of `nf4.BLOCK_SIZE`; enough rows to multiply fast, few enough that a dozen of them are small beside a linear."""
MOST_PARTS = 120
"""Sent to a GPU and joined there: of more than 128 XLA joins some first, which takes the tensor's size in memory once more."""
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
LARGEST = 0x7F7F
"""The bits of the largest finite bfloat16; those of infinities and NaN, without the sign, are above."""

Values = Callable[[], np.ndarray | jax.Array]
"""Makes a piece."""
FirstPass = Iterator[Callable[[], object]]
"""What any threads must run, or have begun to, in this order, before they make values."""
Rows = Iterator[tuple[slice, Values]]
"""A linear [out, in] some rows at a time: which, and what makes their values [rows, in]."""

_dequantize = jax.jit(nf4.dequantize)
_dequantize_absmax = jax.jit(nf4.dequantize_absmax)
_quantize_absmax = jax.jit(nf4.quantize_absmax)
_quantize_whole = jax.jit(
    dispatch.quantize, static_argnums=(1, 2)
)  # called without jit, a kernel would be compiled every time
_dequantize_whole = jax.jit(dispatch.dequantize)


def bfloat16(folder: ModelFolder, name: str) -> Iterator[Values]:
    """A tensor cast to bfloat16, `PIECE` elements at a time, [PIECE] each.

    Raises:
        InputError: (a piece) a value is not finite then.
    """
    return (functools.partial(_finite, folder, name, begin, size) for begin, size in _cuts(folder, name))


def bfloat16_rows(folder: ModelFolder, name: str) -> Rows:
    """The same with a matrix's rows.

    Raises:
        InputError: (some rows) a value is not finite then.
    """
    rows, columns = folder.spec(name).shape

    def values(some: slice) -> np.ndarray:
        return _finite(folder, name, some.start * columns, (some.stop - some.start) * columns).reshape(-1, columns)

    return ((some, functools.partial(values, some)) for some in row_slices(rows, columns))


def quantized(folder: ModelFolder, name: str, quantization: QuantizationSettings) -> nf4.QuantizedTensor:
    """A linear as it is in 4 bits, or cast to bfloat16 and quantized; arrays are numpy's or the device's.

    Raises:
        InputError: a weight or a scale is not finite.
    """
    if bitsandbytes.is_packed(folder, name):
        return bitsandbytes.read(folder, name)
    shape = folder.spec(name).shape
    if jax.default_backend() != "cpu":
        return _quantize_parts(folder, name, _sent(folder, name), quantization)
    codes = np.empty(-(-math.prod(shape) // 2), np.uint8)
    absmax = np.empty(-(-math.prod(shape) // nf4.BLOCK_SIZE), np.float32)

    def quantize(begin: int, size: int) -> None:
        part = nf4.quantize(
            one_device().put(_cast(folder, name, begin, size), "device"), False, quantization.quant_type
        )
        codes[begin // 2 : begin // 2 + part.codes.size] = part.codes
        absmax[begin // nf4.BLOCK_SIZE : begin // nf4.BLOCK_SIZE + part.absmax.size] = part.absmax

    for _ in in_order(functools.partial(quantize, *cut) for cut in _cuts(folder, name)):
        pass
    return nf4.QuantizedTensor(codes, *_scales(folder, name, absmax, quantization), shape, quantization.quant_type)


def through_4_bits(folder: ModelFolder, name: str, quantization: QuantizationSettings) -> tuple[FirstPass, Rows]:
    """`dequantized(quantized(...))`, bit for bit, in two passes; whatever else there is to do can be done between their parts.

    On a CPU both go over the file, the first for the scales: faster than packing and unpacking codes, and nothing is held.

    Raises:
        InputError: (a task of the first pass) a weight or a scale is not finite.
    """
    if bitsandbytes.is_packed(folder, name):
        return iter(()), _dequantized(folder, name, quantization)
    if folder.is_4bit:  # one of the linears that are not
        return iter(()), bfloat16_rows(folder, name)
    shape = folder.spec(name).shape
    if jax.default_backend() != "cpu":
        sent = [Shared(functools.partial(_send, folder, name, *part)) for part in _parts(folder, name)]
        whole = Shared(
            lambda: _dequantize_whole(_quantize_parts(folder, name, [part.take() for part in sent], quantization))
        )
        return iter([*sent, whole]), _taken(whole.result, shape)
    columns = shape[1]
    found = [Shared(functools.partial(_absmax, folder, name, *cut)) for cut in _cuts(folder, name)]

    def both_scales() -> tuple[np.ndarray, np.ndarray]:
        absmax = np.concatenate([part.take() for part in found])
        of_scales = _scales(folder, name, absmax, quantization)
        return absmax, np.asarray(_dequantize_absmax(nf4.QuantizedTensor(np.empty(0, np.uint8), *of_scales, shape)))

    scales = Shared(both_scales)

    def values(some: slice) -> jax.Array:
        begin, end = some.start * columns, some.stop * columns
        blocks = slice(begin // nf4.BLOCK_SIZE, -(-end // nf4.BLOCK_SIZE))
        piece = _cast(folder, name, begin, end - begin).reshape(-1, columns)
        before, after = scales.result()
        return nf4.round_trip(one_device().put(piece, "device"), before[blocks], after[blocks], quantization.quant_type)

    return iter([*found, scales]), ((some, functools.partial(values, some)) for some in row_slices(*shape))


def _dequantized(folder: ModelFolder, name: str, quantization: QuantizationSettings) -> Rows:
    """Nothing is read before the first rows are asked for."""
    yield from dequantized(quantized(folder, name, quantization))


def dequantized(weight: nf4.QuantizedTensor) -> Rows:
    """A linear's values in what dequantizing rounds to."""
    columns = weight.shape[1]
    if jax.default_backend() != "cpu":
        whole = _dequantize_whole(one_device().put(weight, "device"))
        return _taken(lambda: whole, weight.shape)
    absmax = np.asarray(_dequantize_absmax(weight))

    def values(some: slice) -> jax.Array:
        first, last = some.start * columns, some.stop * columns
        blocks = slice(first // nf4.BLOCK_SIZE, -(-last // nf4.BLOCK_SIZE))
        codes = weight.codes[first // 2 : -(-last // 2)]
        shape = (some.stop - some.start, columns)
        return _dequantize(
            nf4.QuantizedTensor(codes, absmax[blocks], None, None, shape, weight.quant_type, weight.dtype)
        )

    return ((which, functools.partial(values, which)) for which in row_slices(*weight.shape))


def row_slices(rows: int, columns: int) -> list[slice]:
    """All rows in order, about `PIECE` elements at a time, cut between blocks of any `columns`."""
    step = max(PIECE // max(columns, 1) // nf4.BLOCK_SIZE, 1) * nf4.BLOCK_SIZE
    return [slice(first, min(first + step, rows)) for first in range(0, rows, step)]


def on_device(folder: ModelFolder, name: str) -> jax.Array:
    """A tensor on the device, cast to bfloat16. On its way to a GPU it is in registered memory, which threads read it into together.

    Raises:
        InputError: a value is not finite then.
    """
    if jax.default_backend() == "cpu":
        return one_device().put(read_bfloat16(folder, name), "device")
    return jax.block_until_ready(
        one_device().put(pinned.filled(functools.partial(_read_together, folder, name)), "device")
    )


def _read_together(
    folder: ModelFolder, name: str, room: pinned.Room = lambda sizes: list(map(aligned, sizes))
) -> np.ndarray:
    """A tensor cast to bfloat16, in `room`, read by threads."""
    shape = folder.spec(name).shape
    (memory,) = room([math.prod(shape) * BFLOAT16.itemsize])
    whole = memory.view(BFLOAT16)
    direct = folder.spec(name).dtype == "BF16"

    def read(begin: int, size: int) -> None:
        place = whole[begin : begin + size]
        if direct:
            folder.elements(name, begin, size, place.view(np.uint8))
        else:
            place[...] = _cast(folder, name, begin, size)
        if not _is_finite(place):
            _refuse_infinite(folder, name)

    for _ in in_order(functools.partial(read, *cut) for cut in _cuts(folder, name)):
        pass
    return whole.reshape(shape)


def read_bfloat16(folder: ModelFolder, name: str) -> np.ndarray:
    """A tensor cast to bfloat16, as it is before it is quantized.

    Raises:
        InputError: a value is not finite then.
    """
    shape = folder.spec(name).shape
    tensor = _cast(folder, name, 0, math.prod(shape)).reshape(shape)
    if not _is_finite(tensor):
        nf4.check_finite(tensor, f"{folder.path}: {name}")
    return tensor


def _cuts(folder: ModelFolder, name: str, pieces: int = 1) -> Iterator[tuple[int, int]]:
    """(first element, number) of each piece, or of so many at a time."""
    size = PIECE * pieces
    return ((begin, size) for begin in range(0, math.prod(folder.spec(name).shape), size))


def _parts(folder: ModelFolder, name: str) -> Iterator[tuple[int, int]]:
    """(first element, number) of each part that a GPU is sent: pieces, or of a large tensor some at a time."""
    return _cuts(folder, name, -(-math.prod(folder.spec(name).shape) // (PIECE * MOST_PARTS)))


def _cast(folder: ModelFolder, name: str, begin: int, size: int) -> np.ndarray:
    values = folder.elements(name, begin, size)
    if values.dtype == np.int8:
        values = int8.decoded(folder, name, values, begin)
    return values.astype(ml_dtypes.bfloat16, copy=False)


def _finite(folder: ModelFolder, name: str, begin: int, size: int) -> np.ndarray:
    piece = _cast(folder, name, begin, size)
    if not _is_finite(piece):
        _refuse_infinite(folder, name)
    return piece


def _is_finite(values: np.ndarray) -> bool:
    """As `np.isfinite(values).all()`, which takes ten times as long for bfloat16. A piece at a time, for memory's sake."""
    bits = values.reshape(-1).view(np.int16)
    parts = (bits[begin : begin + PIECE] for begin in range(0, bits.size, PIECE))
    return all((part & 0x7FFF).max() <= LARGEST for part in parts)


def _absmax(folder: ModelFolder, name: str, begin: int, size: int) -> np.ndarray:
    return np.asarray(nf4.block_absmax(one_device().put(_cast(folder, name, begin, size), "device")))


def _scales(
    folder: ModelFolder, name: str, absmax: np.ndarray, quantization: QuantizationSettings
) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
    """A linear's absmax [N] float32 → absmax, nested_absmax and nested_offset of a `QuantizedTensor`, as numpy's arrays."""
    if not np.isfinite(absmax).all():  # a block's scale is finite if all of the block is
        _refuse_infinite(folder, name)
    return jax.tree.map(np.asarray, _quantize_absmax(absmax)) if quantization.double_quant else (absmax, None, None)


def _send(folder: ModelFolder, name: str, begin: int, size: int) -> jax.Array:
    """A part of a tensor, in bfloat16, that has arrived on the device."""
    return jax.block_until_ready(one_device().put(_cast(folder, name, begin, size), "device"))


def _quantize_parts(
    folder: ModelFolder, name: str, parts: list[jax.Array], quantization: QuantizationSettings
) -> nf4.QuantizedTensor:
    """A linear of which all parts are on the device. `parts` is emptied."""
    return _quantize_whole(_whole(folder, name, parts), quantization.double_quant, quantization.quant_type)


def _sent(folder: ModelFolder, name: str) -> list[jax.Array]:
    """All parts of a tensor, on the device."""
    return list(in_order(functools.partial(_send, folder, name, *part) for part in _parts(folder, name)))


def _whole(folder: ModelFolder, name: str, parts: list[jax.Array]) -> jax.Array:
    """A tensor of which all parts are on the device. `parts` is emptied."""
    whole, finite = _joined(parts, folder.spec(name).shape)
    parts.clear()
    if not finite:
        _refuse_infinite(folder, name)
    return whole


@functools.partial(jax.jit, static_argnames="shape")
def _joined(parts: list[jax.Array], shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """Parts [n] each of a tensor → it, and whether all of it is finite."""
    whole = jnp.concatenate(parts).reshape(shape)
    return whole, jnp.isfinite(whole).all()


def _taken(whole: Callable[[], jax.Array], shape: tuple[int, int]) -> Rows:
    """A matrix on the device, some rows at a time; it is asked for when they are."""

    def values(some: slice) -> jax.Array:
        return _some_rows(whole(), some.start, some.stop - some.start)

    return ((some, functools.partial(values, some)) for some in row_slices(*shape))


@functools.partial(jax.jit, static_argnames="number")  # not the start: one compilation serves all pieces
def _some_rows(whole: jax.Array, start: int, number: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(whole, start, number)


def _refuse_infinite(folder: ModelFolder, name: str) -> None:
    """Read again, whole, to say which value it is."""
    read_bfloat16(folder, name)
    raise AssertionError(f"{name}: a value was not finite, and now all are")
