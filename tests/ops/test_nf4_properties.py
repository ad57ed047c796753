"""What holds for any weight, not only for weights as they come: bitsandbytes' bytes and bits, whatever the size, scale and outliers."""

import math
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qlora_jax.ops import nf4
from qlora_jax.ops.nf4 import ABSMAX_BLOCK_SIZE, BLOCK_SIZE, CODEBOOKS, DYNAMIC_MAP, FP4_CODEBOOK
from tests.ops.test_nf4 import bits, from_torch, to_torch

SMALLEST_NORMAL = 2.0**-126
SIZES = (1, 63, 64, 65, 127, 130, 192)  # few, because each is compiled once
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
DYNAMIC_HALF_GAP = float(max(np.diff(DYNAMIC_MAP).max() / 2, DYNAMIC_MAP[0] + 1))

thorough = settings(max_examples=150, deadline=None, derandomize=True)


@st.composite
def weights(draw: st.DrawFn, dtypes: tuple[str, ...] = tuple(DTYPES)) -> np.ndarray:
    """Flat weights of any finite values: blocks from subnormal to huge, zeros, boundaries between levels, perhaps an outlier."""
    size, dtype = draw(st.sampled_from(SIZES)), DTYPES[draw(st.sampled_from(dtypes))]
    levels = np.concatenate([CODEBOOKS["nf4"], nf4.boundaries("nf4"), nf4.boundaries("fp4"), [0]]).astype(np.float64)
    shape = st.floats(-1, 1, width=32) | st.sampled_from(levels.tolist())
    values = draw(hnp.arrays(np.float64, size, elements=shape))
    largest = float(ml_dtypes.finfo(dtype).max)
    top = math.floor(math.log2(largest))
    exponents = st.integers(-149, top) | st.integers(-20, 4)
    for start in range(0, size, BLOCK_SIZE):
        values[start : start + BLOCK_SIZE] *= 2.0 ** draw(exponents)
    if draw(st.booleans()):
        values[draw(st.integers(0, size - 1))] = draw(st.sampled_from([-1, 1])) * 2.0 ** draw(exponents)
    return np.clip(values, -largest, largest).astype(dtype)


@pytest.fixture(scope="module")
def bnb() -> Iterator[ModuleType]:
    torch = pytest.importorskip("torch")
    functional = pytest.importorskip("bitsandbytes.functional")
    with torch.compiler.set_stance("force_eager"):
        yield functional


# ----------------------------------------------------------------------------------------------------------------- bytes


@thorough
@given(weight=weights())
def test_nf4_codes_and_scales_are_bitsandbytes_bytes(bnb: ModuleType, weight: np.ndarray) -> None:
    packed, state = bnb.quantize_4bit(to_torch(weight), quant_type="nf4", blocksize=BLOCK_SIZE)
    q = nf4.quantize(jnp.asarray(weight), double_quant=False)
    np.testing.assert_array_equal(q.codes, packed.numpy().reshape(-1))
    np.testing.assert_array_equal(bits(q.absmax), bits(state.absmax.numpy()))


@thorough
@given(weight=weights())
def test_fp4_codes_and_scales_are_bitsandbytes_bytes(bnb: ModuleType, weight: np.ndarray) -> None:
    """But for which of its two zeros stands for a positive weight that is less than 2^-126 of its block's scale, or of one."""
    packed, state = bnb.quantize_4bit(to_torch(weight), quant_type="fp4", blocksize=BLOCK_SIZE)
    q = nf4.quantize(jnp.asarray(weight), double_quant=False, quant_type="fp4")
    np.testing.assert_array_equal(bits(q.absmax), bits(state.absmax.numpy()))
    ours, theirs = (np.stack([x >> 4, x & 15], 1).reshape(-1) for x in (np.asarray(q.codes), packed.numpy()[:, 0]))
    flat = np.append(weight, np.zeros(ours.size - weight.size, weight.dtype)).astype(np.float64)
    scale = np.repeat(np.asarray(q.absmax, np.float64), BLOCK_SIZE)[: flat.size]
    either_zero = (flat > 0) & (flat < SMALLEST_NORMAL * np.maximum(scale, 1))
    np.testing.assert_array_equal(np.where(either_zero, ours % 8, ours), np.where(either_zero, theirs % 8, theirs))


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_dequantizing_gives_bitsandbytes_bits(bnb: ModuleType, quant_type: Any) -> None:
    """Any codes with any scales, in every dtype; what float32 holds only as a subnormal number may come out as zero (XLA on a CPU)."""
    torch = pytest.importorskip("torch")

    @thorough
    @given(weight=weights(), dtype=st.sampled_from(sorted(DTYPES)))
    def check(weight: np.ndarray, dtype: str) -> None:
        packed, state = bnb.quantize_4bit(to_torch(weight), quant_type=quant_type, blocksize=BLOCK_SIZE)
        state.dtype = getattr(torch, dtype)
        q = nf4.QuantizedTensor(
            jnp.asarray(packed.numpy()[:, 0]),
            jnp.asarray(state.absmax.numpy()),
            None,
            None,
            weight.shape,
            quant_type,
            dtype,
        )
        ours, theirs = np.asarray(nf4.dequantize(q)), from_torch(bnb.dequantize_4bit(packed, state)).reshape(-1)
        assert ours.dtype == theirs.dtype == DTYPES[dtype]
        with np.errstate(over="ignore"):
            subnormal = np.abs(theirs.astype(np.float64)) < SMALLEST_NORMAL
        np.testing.assert_array_equal(bits(np.where(subnormal, 0, ours)), bits(np.where(subnormal, 0, theirs)))
        assert (np.abs(ours.astype(np.float64)[subnormal]) < SMALLEST_NORMAL).all()

    check()


def test_fp4_codebook_equals_bitsandbytes(bnb: ModuleType) -> None:
    np.testing.assert_array_equal(bits(FP4_CODEBOOK), bits(bnb.get_4bit_type("fp4", device="cpu").numpy()))


def test_fp4_codebook_is_a_float_format() -> None:
    """One sign bit, two of exponent, one of mantissa: (1 + m/2) · 2^(4 - e), and for e = 0 a subnormal m/16; over the largest."""
    values = []
    for code in range(16):
        sign, exponent, mantissa = -1 if code >> 3 else 1, code >> 1 & 3, code & 1
        values.append(sign * (mantissa / 16 if exponent == 0 else (1 + mantissa / 2) * 2 ** (4 - exponent)))
    np.testing.assert_array_equal(FP4_CODEBOOK, (np.array(values) / max(values)).astype(np.float32) + np.float32(0))


# -------------------------------------------------------------------------------------------------- double quantization

SCALES = st.integers(1, 600).flatmap(
    lambda size: hnp.arrays(np.float32, size, elements=st.floats(2.0**-20, 2.0**10, width=32))
)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(absmax=SCALES)
def test_nested_codes_are_exact_nearest(absmax: np.ndarray) -> None:
    padded = np.full(600, absmax.mean(dtype=np.float64), np.float32)  # one size, one compilation
    padded[: absmax.size] = absmax
    codes, nested, offset = (np.asarray(x) for x in jax.jit(nf4.quantize_absmax)(padded))
    assert (
        abs(float(offset) - padded.mean(dtype=np.float64))
        <= 2 * ABSMAX_BLOCK_SIZE * np.finfo(np.float32).eps * padded.max()
    )
    centred = padded - offset
    for i, largest in enumerate(nested):
        block = centred[i * ABSMAX_BLOCK_SIZE : (i + 1) * ABSMAX_BLOCK_SIZE]
        assert largest == np.abs(block).max()
        scaled = (block / (largest if largest > 0 else np.float32(1))).astype(np.float64)
        distance = np.abs(DYNAMIC_MAP.astype(np.float64)[None, :] - scaled[:, None])
        np.testing.assert_array_equal(codes[i * ABSMAX_BLOCK_SIZE :][: block.size], distance.argmin(axis=1))
        assert distance.min(axis=1).max() <= DYNAMIC_HALF_GAP
