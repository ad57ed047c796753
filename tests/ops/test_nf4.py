"""NF4 against three authorities: the paper's formula, a slow oracle written here, and bitsandbytes bit for bit."""

import math
import re
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from scipy.stats import norm

from qlora_jax.base.errors import InputError
from qlora_jax.ops import nf4
from qlora_jax.ops.nf4 import ABSMAX_BLOCK_SIZE, BLOCK_SIZE, CODEBOOK, DYNAMIC_MAP, QuantizedTensor

F32_EPS = float(np.finfo(np.float32).eps)
BF16_ROUNDING = 2.0**-8  # half a step of an 8-bit significand, relative

NF4_HALF_GAP = float(np.diff(CODEBOOK).max()) / 2  # 0.1519: the widest cell is [-1, -0.696]
DYNAMIC_HALF_GAP = max(
    float(np.diff(DYNAMIC_MAP).max()) / 2, float(DYNAMIC_MAP[0]) + 1
)  # 0.00703; -1 itself is no level
ENCODE_ROUNDING = 4 * F32_EPS  # of 1 / absmax, of the product with it, of the boundary, of the level times the scale

SMOLLM2_SHAPES = [(576, 576), (192, 576), (1536, 576), (576, 1536)]
RAGGED_SHAPES = [(1,), (65,), (3, 5), (64 * 256 + 65,)]
DTYPES = [np.float32, np.float16, ml_dtypes.bfloat16]
SOURCES = [(shape, np.float32) for shape in [(64,), (127, 129), *RAGGED_SHAPES]] + [
    ((16, 96), dtype) for dtype in DTYPES
]

JITTED_DEQUANTIZE = jax.jit(nf4.dequantize, static_argnames="dtype")  # compiled it is also quicker to test

LLAMA_2_70B = [(8192, 8192), (1024, 8192), (1024, 8192), (8192, 8192), (28672, 8192), (28672, 8192), (8192, 28672)]


def random_weight(shape: tuple[int, ...], dtype: Any = np.float32, seed: int = 0) -> np.ndarray:
    """Normal values; with room for them, a block of zeros, a block with a huge outlier, and blocks of different scales."""
    rng = np.random.default_rng([seed, *shape])
    flat = rng.standard_normal(math.prod(shape)) * 0.02
    flat *= np.repeat(np.exp(rng.standard_normal(flat.size // BLOCK_SIZE + 1) / 2), BLOCK_SIZE)[: flat.size]
    if flat.size >= 4 * BLOCK_SIZE:
        flat[BLOCK_SIZE : 2 * BLOCK_SIZE] = 0
        flat[2 * BLOCK_SIZE + 7] = -3e4
    return flat.astype(dtype).reshape(shape)


def blocks_of(flat: np.ndarray) -> list[np.ndarray]:
    return [flat[i : i + BLOCK_SIZE] for i in range(0, flat.size, BLOCK_SIZE)]


def slow_quantize(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(packed codes, float32 absmax) by argmin over the 16 levels; argmin's first of equals is the lower."""
    flat = weight.astype(np.float32).reshape(-1)
    absmax = np.array([np.abs(block).max() for block in blocks_of(flat)], np.float32)
    codes: list[int] = []
    for block, scale in zip(blocks_of(flat), absmax, strict=True):
        scaled = np.clip(block * (np.float32(1) / scale), -1, 1) if scale > 0 else np.zeros_like(block)
        distances = np.abs(CODEBOOK.astype(np.float64)[None, :] - scaled.astype(np.float64)[:, None])
        codes += distances.argmin(axis=1).tolist()
    codes += [7] * (len(codes) % 2)
    return np.array([16 * high + low for high, low in zip(codes[::2], codes[1::2], strict=True)], np.uint8), absmax


def slow_absmax(q: QuantizedTensor) -> np.ndarray:
    codes, nested, offset = (None if x is None else np.asarray(x) for x in (q.absmax, q.nested_absmax, q.nested_offset))
    if nested is None:
        return codes
    products = [np.float32(DYNAMIC_MAP[code] * nested[i // ABSMAX_BLOCK_SIZE]) for i, code in enumerate(codes)]
    return np.array([product + offset for product in products], np.float32)


def slow_dequantize(q: QuantizedTensor, dtype: Any) -> np.ndarray:
    nibbles = [nibble for byte in np.asarray(q.codes).tolist() for nibble in (byte >> 4, byte & 15)]
    size, scales = math.prod(q.shape), slow_absmax(q)
    levels = CODEBOOK[nibbles[:size]]
    return (levels * scales[np.arange(size) // BLOCK_SIZE]).astype(dtype).reshape(q.shape)


def nibbles_of(q: QuantizedTensor) -> np.ndarray:
    codes = np.asarray(q.codes)
    return np.stack([codes >> 4, codes & 15], axis=1).reshape(-1)


def bits(x: Any) -> np.ndarray:
    """Bytes, for comparisons to which -0.0 and 0.0 differ."""
    return np.ascontiguousarray(np.asarray(x)).reshape(-1).view(np.uint8)


# ---------------------------------------------------------------------------------------------------------------- tables


def test_codebook_is_the_normal_quantiles() -> None:
    """QLoRA, section 3, as bitsandbytes' `create_normal_map`: 8 positive quantiles, 7 negative ones, zero; over the largest.

    Its probabilities are a float32 grid (torch.linspace, counted from the nearer end), and a float32 is all the table can show of it.
    """

    def quantiles(count: int) -> np.ndarray:
        start, end = np.float32(0.9677083), np.float32(0.5)
        steps, width = np.arange(count, dtype=np.float32), (end - start) / np.float32(count)
        grid = np.where(steps < (count + 1) // 2, start + width * steps, end - width * (count - steps))
        assert grid.dtype == np.float32
        return norm.ppf(grid.astype(np.float64))

    levels = np.sort(np.concatenate([quantiles(8), [0.0], -quantiles(7)]))
    assert (CODEBOOK.dtype, len(CODEBOOK)) == (np.float32, 16)
    np.testing.assert_allclose(CODEBOOK, levels / levels.max(), rtol=F32_EPS, atol=0)
    assert [CODEBOOK[0], CODEBOOK[7], CODEBOOK[15]] == [-1, 0, 1]


def test_dynamic_map_has_the_paper_s_structure() -> None:
    """Without torch: 2^i middles a decade, both signs, plus zero and one."""
    assert DYNAMIC_MAP.dtype == np.float32
    assert (np.diff(DYNAMIC_MAP) > 0).all()
    assert len(DYNAMIC_MAP) == 256
    expected = [0.0, 1.0]
    for i in range(7):
        edges = np.linspace(0.1, 1, 2**i + 1)
        middles = (edges[1:] + edges[:-1]) / 2 * 10.0 ** (i - 6)
        expected += [*middles, *-middles]
    np.testing.assert_allclose(DYNAMIC_MAP, np.sort(expected), rtol=4 * F32_EPS, atol=0)


def test_dynamic_map_equals_bitsandbytes(bnb: ModuleType) -> None:
    expected = bnb.create_dynamic_map(signed=True, max_exponent_bits=7, total_bits=8).numpy()
    np.testing.assert_array_equal(bits(DYNAMIC_MAP), bits(expected))


def test_codebook_equals_bitsandbytes(bnb: ModuleType) -> None:
    np.testing.assert_array_equal(bits(CODEBOOK), bits(bnb.get_4bit_type("nf4", device="cpu").numpy()))


# -------------------------------------------------------------------------------------------------------------- quantize


@pytest.mark.parametrize(("shape", "dtype"), SOURCES)
def test_codes_equal_the_slow_oracle(shape: tuple[int, ...], dtype: Any) -> None:
    weight = random_weight(shape, dtype)
    codes, absmax = slow_quantize(weight)
    q = nf4.quantize(jnp.asarray(weight), double_quant=False)
    np.testing.assert_array_equal(q.codes, codes)
    np.testing.assert_array_equal(bits(q.absmax), bits(absmax))
    assert (q.nested_absmax, q.nested_offset, q.shape) == (None, None, shape)


@pytest.mark.parametrize("absmax", [1.0, 0.25, 2.0**-100, 2.0**100])
def test_ties_go_to_the_lower_level(absmax: float) -> None:
    boundaries = ((CODEBOOK[1:].astype(np.float64) + CODEBOOK[:-1]) / 2).astype(np.float32)
    above, below = np.nextafter(boundaries, np.float32(2)), np.nextafter(boundaries, np.float32(-2))
    block = np.concatenate([[1], boundaries, above, below, CODEBOOK, [-1, 1]]).astype(np.float32)
    assert block.size == BLOCK_SIZE
    expected = [15, *range(15), *range(1, 16), *range(15), *range(16), 0, 15]
    q = nf4.quantize(jnp.asarray(block * np.float32(absmax)), double_quant=False)
    assert nibbles_of(q).tolist() == expected
    assert float(q.absmax[0]) == absmax


def test_zero_blocks_are_code_7_and_scale_0() -> None:
    q = nf4.quantize(jnp.zeros((2, 64)), double_quant=False)
    assert set(np.asarray(q.codes).tolist()) == {0x77}
    assert not np.asarray(q.absmax).any()
    for double_quant in (False, True):
        assert not np.asarray(JITTED_DEQUANTIZE(nf4.quantize(jnp.zeros((2, 64)), double_quant))).any()


def test_first_element_takes_the_high_nibble() -> None:
    weight = np.zeros(BLOCK_SIZE, np.float32)
    weight[:2] = [1, -1]
    assert nf4.quantize(jnp.asarray(weight), double_quant=False).codes[0] == 0xF0


@pytest.mark.parametrize(
    ("shape", "dtype"), [*SOURCES, *((shape, dtype) for shape in SMOLLM2_SHAPES for dtype in DTYPES)]
)
def test_codes_equal_bitsandbytes(bnb: ModuleType, shape: tuple[int, ...], dtype: Any) -> None:
    weight = random_weight(shape, dtype)
    packed, state = bnb.quantize_4bit(to_torch(weight), quant_type="nf4", blocksize=BLOCK_SIZE)
    q = nf4.quantize(jnp.asarray(weight), double_quant=False)
    np.testing.assert_array_equal(q.codes, packed.numpy().reshape(-1))
    np.testing.assert_array_equal(bits(q.absmax), bits(state.absmax.numpy()))


def test_ties_equal_bitsandbytes(bnb: ModuleType) -> None:
    boundaries = ((CODEBOOK[1:] + CODEBOOK[:-1]) / 2).astype(np.float32)
    block = np.concatenate([[1], boundaries, np.nextafter(boundaries, np.float32(2)), np.zeros(33)]).astype(np.float32)
    packed, _ = bnb.quantize_4bit(to_torch(block), quant_type="nf4", blocksize=BLOCK_SIZE)
    np.testing.assert_array_equal(nf4.quantize(jnp.asarray(block), False).codes, packed.numpy().reshape(-1))


# --------------------------------------------------------------------------------------------------- double quantization


@pytest.mark.parametrize("shape", [(1,), (3, 5), (64 * 256,), (64 * 257,), (576, 1536)], ids=str)
def test_nested_codes_are_exact_nearest(shape: tuple[int, ...]) -> None:
    q = nf4.quantize(jnp.asarray(random_weight(shape)), double_quant=True)
    absmax = np.asarray(nf4.quantize(jnp.asarray(random_weight(shape)), double_quant=False).absmax)
    offset = np.asarray(q.nested_offset)
    mean_rounding = 4 * F32_EPS  # two stages of pairwise sums and a division
    np.testing.assert_allclose(offset, absmax.astype(np.float64).mean(), rtol=mean_rounding)
    centred = absmax - offset
    assert q.nested_absmax.shape == (-(-absmax.size // ABSMAX_BLOCK_SIZE),)
    for i, nested in enumerate(np.asarray(q.nested_absmax)):
        block = centred[i * ABSMAX_BLOCK_SIZE : (i + 1) * ABSMAX_BLOCK_SIZE]
        assert nested == np.abs(block).max()
        scaled = (block / (nested if nested > 0 else np.float32(1))).astype(np.float64)
        expected = np.abs(DYNAMIC_MAP.astype(np.float64)[None, :] - scaled[:, None]).argmin(axis=1)
        np.testing.assert_array_equal(q.absmax[i * ABSMAX_BLOCK_SIZE : (i + 1) * ABSMAX_BLOCK_SIZE], expected)


def test_nested_ties_go_to_the_lower_code() -> None:
    """A midpoint of two map values that float32 can hold is a tie; the float32 above it is not."""
    midpoints = (DYNAMIC_MAP[1:].astype(np.float64) + DYNAMIC_MAP[:-1]) / 2
    exact = [i for i, midpoint in enumerate(midpoints) if midpoint == np.float32(midpoint)]
    assert len(exact) > 20  # or this test would test nothing
    ties = midpoints[exact].astype(np.float32)
    above = np.nextafter(ties, np.float32(2))

    @jax.vmap
    def code_of(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The code of one scaled value, by way of four scales whose mean is 0 and whose largest is 1."""
        codes, _, offset = nf4.quantize_absmax(jnp.stack([x, -x, jnp.ones_like(x), -jnp.ones_like(x)]))
        return codes[0], offset

    (on_ties, offsets), (on_above, more_offsets) = code_of(ties), code_of(above)
    assert not np.asarray(offsets).any()
    assert not np.asarray(more_offsets).any()
    np.testing.assert_array_equal(on_ties, exact)
    np.testing.assert_array_equal(on_above, np.array(exact) + 1)


def test_nested_codes_are_near_bitsandbytes(bnb: ModuleType) -> None:
    """bitsandbytes' CPU path looks 8-bit codes up in a table of steps of 2^-15, so a few are not the nearest; more would be our fault.

    Both get the same centred scales: bitsandbytes' mean is summed in another order, which moves many codes where the map is finest.
    """
    weight = (0.02 * np.random.default_rng(0).standard_normal((1536, 576))).astype(np.float32)
    _, state = bnb.quantize_4bit(to_torch(weight), quant_type="nf4", blocksize=BLOCK_SIZE, compress_statistics=True)
    q = nf4.quantize(jnp.asarray(weight), double_quant=True)
    np.testing.assert_allclose(q.nested_offset, state.offset.numpy(), rtol=8 * F32_EPS)

    absmax = nf4.quantize(jnp.asarray(weight), double_quant=False).absmax
    codes, nested = bnb.quantize_blockwise(to_torch(np.array(absmax - q.nested_offset)), blocksize=ABSMAX_BLOCK_SIZE)
    np.testing.assert_array_equal(bits(q.nested_absmax), bits(nested.absmax.numpy()))
    ours, theirs = np.asarray(q.absmax, np.int32), codes.numpy().astype(np.int32)
    scaled = np.asarray(absmax - q.nested_offset) / np.repeat(q.nested_absmax, ABSMAX_BLOCK_SIZE)
    table_step, table_shortfall = 2.0**-15, 0.005  # measured: 0.14 % of these scales
    assert ours.size == 13824
    assert (ours != theirs).mean() <= table_shortfall
    coarser_than_the_table = np.abs(scaled) > 1e-4  # below, a step of the table spans several values of the map
    assert np.abs(ours - theirs)[coarser_than_the_table].max() <= 1
    our_distance, their_distance = (np.abs(DYNAMIC_MAP[x].astype(np.float64) - scaled) for x in (ours, theirs))
    assert (our_distance <= their_distance).all()
    assert (their_distance <= our_distance + table_step).all()


# ------------------------------------------------------------------------------------------------------------ dequantize


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("shape", [*RAGGED_SHAPES, (2, 64)], ids=str)
def test_dequantize_equals_the_slow_oracle(shape: tuple[int, ...], double_quant: bool) -> None:
    q = nf4.quantize(jnp.asarray(random_weight(shape)), double_quant)
    for dtype in (np.float32, ml_dtypes.bfloat16):
        expected = bits(slow_dequantize(q, dtype))
        values = JITTED_DEQUANTIZE(q, dtype)
        assert (values.shape, values.dtype) == (shape, dtype)
        np.testing.assert_array_equal(bits(values), expected)
    np.testing.assert_array_equal(bits(nf4.dequantize(q, np.float32)), bits(slow_dequantize(q, np.float32)))  # eager


@pytest.mark.parametrize("double_quant", [False, True], ids=["single", "double"])
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        *((shape, ml_dtypes.bfloat16) for shape in [(3, 5), (257, 64), *SMOLLM2_SHAPES]),
        ((257, 64), np.float32),
    ],
)
def test_dequantize_equals_bitsandbytes_both_ways(
    bnb: ModuleType, shape: tuple[int, ...], dtype: Any, double_quant: bool
) -> None:
    """Their codes and scales through our `dequantize`, and ours through theirs: the same bits, eager and jitted."""
    weight = random_weight(shape, dtype)
    packed, state = bnb.quantize_4bit(
        to_torch(weight), quant_type="nf4", blocksize=BLOCK_SIZE, compress_statistics=double_quant
    )
    theirs, ours = from_bitsandbytes(packed, state), nf4.quantize(jnp.asarray(weight), double_quant)
    for q, arguments in ((theirs, (packed, state)), (ours, to_bitsandbytes(bnb, ours, dtype))):
        expected = bits(from_torch(bnb.dequantize_4bit(*arguments)))
        if shape not in SMOLLM2_SHAPES:  # nothing new, and slow
            np.testing.assert_array_equal(bits(nf4.dequantize(q, dtype)), expected)
        np.testing.assert_array_equal(bits(JITTED_DEQUANTIZE(q, dtype)), expected)


# ----------------------------------------------------------------------------------------------------- bounds and sizes


@pytest.mark.parametrize("shape", [(1,), (127, 129), (192, 576)], ids=str)
def test_quantization_error_is_bounded(shape: tuple[int, ...]) -> None:
    weight = random_weight(shape)
    flat = weight.reshape(-1).astype(np.float64)
    block = np.arange(flat.size) // BLOCK_SIZE

    q = nf4.quantize(jnp.asarray(weight), double_quant=False)
    absmax = np.asarray(q.absmax, np.float64)[block]
    error = np.abs(flat - np.asarray(JITTED_DEQUANTIZE(q, jnp.float32), np.float64).reshape(-1))
    assert (error <= (NF4_HALF_GAP + ENCODE_ROUNDING) * absmax).all()

    double = nf4.quantize(jnp.asarray(weight), double_quant=True)
    scale_block = np.arange(q.absmax.size) // ABSMAX_BLOCK_SIZE
    nested_absmax = np.asarray(double.nested_absmax, np.float64)[scale_block]
    # The map's half gap of the nested scale, and rounding where mean and difference cancel.
    scale_allowance = DYNAMIC_HALF_GAP * nested_absmax + ENCODE_ROUNDING * (nested_absmax + float(double.nested_offset))
    scale_error = np.abs(np.asarray(nf4.dequantize_absmax(double), np.float64) - np.asarray(q.absmax, np.float64))
    assert (scale_error <= scale_allowance).all()
    error = np.abs(flat - np.asarray(JITTED_DEQUANTIZE(double, jnp.float32), np.float64).reshape(-1))
    assert (error <= (NF4_HALF_GAP + ENCODE_ROUNDING) * absmax + scale_allowance[block]).all()

    in_bf16 = np.asarray(JITTED_DEQUANTIZE(double, jnp.bfloat16), np.float64).reshape(-1)
    in_f32 = np.asarray(JITTED_DEQUANTIZE(double, jnp.float32), np.float64).reshape(-1)
    assert (np.abs(in_bf16 - in_f32) <= BF16_ROUNDING * np.abs(in_f32)).all()


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("shape", RAGGED_SHAPES, ids=str)
def test_sizes_that_do_not_fill_a_block(shape: tuple[int, ...], double_quant: bool) -> None:
    """Levels times one scale a block survive the round trip unchanged, whatever the size; and the sizes are as documented."""
    size = math.prod(shape)
    rng = np.random.default_rng(size)
    codes = rng.integers(0, 16, size)
    codes[::BLOCK_SIZE] = 15  # the block's scale
    weight = jnp.asarray(CODEBOOK[codes].reshape(shape) * np.float32(0.5))
    q = nf4.quantize(weight, double_quant)
    assert q.codes.shape == (-(-size // 2),)
    assert q.absmax.shape == (-(-size // BLOCK_SIZE),)
    np.testing.assert_array_equal(nibbles_of(q)[:size], codes)
    np.testing.assert_array_equal(JITTED_DEQUANTIZE(q, jnp.float32), weight)  # equal scales: their mean is exact


def test_bits_per_weight_and_bytes_of_a_70b_layer() -> None:
    def nbytes(shape: tuple[int, int], double_quant: bool) -> int:
        weight = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
        described = jax.eval_shape(lambda w: nf4.quantize(w, double_quant), weight)
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(described))

    weights = sum(math.prod(shape) for shape in LLAMA_2_70B)
    layer = sum(nbytes(shape, True) for shape in LLAMA_2_70B)
    offsets = 4 * len(LLAMA_2_70B)
    assert weights == 855_638_016
    assert (layer - offsets) * 8 / weights == 4 + 8 / 64 + 32 / (64 * 256)
    assert round(layer * 8 / weights, 3) == 4.127
    assert round(layer / 1e6) == 441
    assert round(80 * layer / 1e9, 1) == 35.3
    assert sum(nbytes(shape, False) for shape in LLAMA_2_70B) * 8 / weights == 4.5


# ------------------------------------------------------------------------------------------------------------ validation


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_check_finite_names_tensor_and_position(bad: float, dtype: Any) -> None:
    weight = np.zeros((3, 4), dtype)
    nf4.check_finite(weight, "fine")
    weight[1, 2], weight[2, 0] = bad, bad
    with pytest.raises(InputError, match=re.escape("layers.0.mlp")) as error:
        nf4.check_finite(weight, "model/layers.0.mlp")
    assert error.value.where == "model/layers.0.mlp"
    assert "2 of 12" in error.value.found
    assert "(1, 2)" in error.value.found


# ---------------------------------------------------------------------------------------------------- to and from torch


@pytest.fixture(scope="module")
def bnb() -> Iterator[ModuleType]:
    torch = pytest.importorskip("torch")
    functional = pytest.importorskip("bitsandbytes.functional")
    with torch.compiler.set_stance("force_eager"):  # it would call a C++ compiler for each odd shape
        yield functional


def to_torch(array: np.ndarray) -> Any:
    torch = pytest.importorskip("torch")
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def from_torch(tensor: Any) -> np.ndarray:
    torch = pytest.importorskip("torch")
    if tensor.dtype == torch.bfloat16:
        return tensor.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def from_bitsandbytes(packed: Any, state: Any) -> QuantizedTensor:
    nested = (state.state2.absmax.numpy(), state.offset.numpy()) if state.nested else (None, None)
    arrays = (packed.numpy().reshape(-1), state.absmax.numpy(), *nested)
    return QuantizedTensor(*(None if x is None else jnp.asarray(x) for x in arrays), shape=tuple(state.shape))


def to_bitsandbytes(bnb: ModuleType, q: QuantizedTensor, dtype: Any) -> tuple[Any, Any]:
    torch = pytest.importorskip("torch")
    tensors = [
        None if x is None else torch.from_numpy(np.array(x)) for x in (q.absmax, q.nested_absmax, q.nested_offset)
    ]
    state2 = tensors[1] is not None and bnb.QuantState(
        absmax=tensors[1], code=torch.from_numpy(DYNAMIC_MAP), blocksize=ABSMAX_BLOCK_SIZE, dtype=torch.float32
    )
    state = bnb.QuantState(
        absmax=tensors[0],
        shape=torch.Size(q.shape),
        code=torch.from_numpy(CODEBOOK),
        blocksize=BLOCK_SIZE,
        quant_type="nf4",
        dtype=torch.bfloat16 if dtype == ml_dtypes.bfloat16 else torch.float32,
        offset=tensors[2],
        state2=state2 or None,
    )
    return torch.from_numpy(np.array(q.codes))[:, None], state
