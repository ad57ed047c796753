"""The GPU kernels: their indexing, in Pallas' interpreter; their PTX, for every card; and where there is a GPU, themselves."""

import dataclasses
import functools
import os
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.ops import blockwise, dispatch, nf4, self_test, twins
from qlora_jax.ops.nf4 import QuantizedTensor
from qlora_jax.ops.operands import Adam, Gated, Rotation
from qlora_jax.ops.pallas import adam, dequantization, low_rank, narrow_matmul, norm, quantization, triton
from tests.helpers.linears import frozen_matmul

BF16_ROUNDING = 2.0**-8  # half a step of an 8-bit significand, relative
F32_EPS = float(np.finfo(np.float32).eps)
ARCHITECTURES = ("80", "86", "89", "90", "120")  # A100, RTX 3090, RTX 4090, H100, RTX 5090

FORMATS = [("nf4", True), ("nf4", False), ("fp4", True), ("fp4", False)]
every_format = pytest.mark.parametrize(("quant_type", "double_quant"), FORMATS)
interpreted = pytest.mark.skipif(jax.default_backend() == "gpu", reason="the interpreter is for machines without a GPU")
needs_gpu = pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU")


class Draws:
    """Random arrays. numpy's, which has no function to compile for every shape."""

    def __init__(self, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)

    def normal(self, *shape: int, dtype: Any = jnp.bfloat16, scale: float = 1.0) -> jax.Array:
        return jnp.asarray((scale * self.rng.standard_normal(shape, np.float32)).astype(dtype))

    def bits(self, *shape: int) -> jax.Array:
        return jnp.asarray(self.rng.integers(0, 256, shape, np.uint8))


def random_weight(rows: int, columns: int, dtype: Any = jnp.bfloat16, seed: int = 0) -> jax.Array:
    weight = 0.02 * np.random.default_rng(seed).standard_normal((rows, columns), np.float32)
    weight[0, :64], weight[-1, -1] = 0, 3e4
    return jnp.asarray(weight.astype(dtype))


def bits(x: Any) -> np.ndarray:
    return np.ascontiguousarray(np.asarray(x)).reshape(-1).view(np.uint8)


def assert_same(found: QuantizedTensor, expected: QuantizedTensor) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(bits(ours), bits(theirs))


def assert_product(y: jax.Array, x: jax.Array, weight: QuantizedTensor, weight_rounding: float) -> None:
    """y = x·Wᵀ up to the rounding of W to its dtype (if it is rounded), of the sums in float32, and of y to its own dtype."""
    dense, x = np.asarray(nf4.dequantize(weight, jnp.float32), np.float64), np.asarray(x, np.float64)
    exact, magnitudes = x @ dense.T, np.abs(x) @ np.abs(dense).T
    y_rounding = BF16_ROUNDING if y.dtype == jnp.bfloat16 else 0
    bound = (weight_rounding + dense.shape[1] * F32_EPS) * magnitudes
    bound += y_rounding * (np.abs(exact) + bound)
    assert (np.abs(np.asarray(y, np.float64) - exact) <= bound).all()


# ----------------------------------------------------------------------------------------------------- interpreted kernels


@interpreted
@every_format
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("shape", [(8, 64), (72, 192), (3, 640)], ids=str)  # some that do not fill a program
def test_dequantize_equals_the_twin(shape: tuple[int, int], dtype: Any, quant_type: Any, double_quant: bool) -> None:
    weight = nf4.quantize(random_weight(*shape, dtype), double_quant, quant_type)
    assert dequantization.supported(weight, weight.dtype)
    found = dequantization.dequantize(weight, weight.dtype, warps=1, chunks=2, interpret=True)
    assert (found.shape, found.dtype) == (shape, dtype)
    np.testing.assert_array_equal(bits(found), bits(nf4.dequantize(weight)))


@interpreted
@every_format
@pytest.mark.parametrize("shape", [(8, 64), (72, 192), (257, 64)], ids=str)
def test_quantize_equals_the_twin(shape: tuple[int, int], quant_type: Any, double_quant: bool) -> None:
    weight = random_weight(*shape)
    assert quantization.supported(weight)
    found = quantization.quantize(weight, double_quant, quant_type, blocks=16, interpret=True)
    assert_same(found, nf4.quantize(weight, double_quant, quant_type))


few_products = pytest.mark.parametrize(
    ("shape", "tokens", "format", "dtype"),
    [
        ((8, 256), 1, FORMATS[0], jnp.float32),
        ((21, 576), 1, FORMATS[0], jnp.bfloat16),
        ((21, 576), 3, FORMATS[1], jnp.float32),
        ((9, 64), 2, FORMATS[2], jnp.bfloat16),
    ],
    ids=str,
)


@interpreted
@few_products
def test_matmul_of_few_tokens(shape: tuple[int, int], tokens: int, format: tuple[Any, bool], dtype: Any) -> None:
    quant_type, double_quant = format
    weight = nf4.quantize(random_weight(*shape), double_quant, quant_type)
    x = Draws(1).normal(tokens, shape[1], dtype=dtype)
    y = narrow_matmul.few(x, weight, warps=1, rows=4, interpret=True)
    assert (y.shape, y.dtype) == ((tokens, shape[0]), dtype)
    assert_product(y, x, weight, weight_rounding=0)


@interpreted
@few_products
def test_matmul_of_some_tokens(shape: tuple[int, int], tokens: int, format: tuple[Any, bool], dtype: Any) -> None:
    quant_type, double_quant = format
    dtype = jnp.float16 if dtype == jnp.float32 else dtype
    weight = nf4.quantize(random_weight(*shape, dtype), double_quant, quant_type)
    x = Draws(1).normal(5 * tokens, shape[1], dtype=weight.dtype, scale=0.5)  # the products have to be float16s
    y = narrow_matmul.some(x, weight, rows=16, tile_words=16, interpret=True)
    assert (y.shape, y.dtype) == ((5 * tokens, shape[0]), x.dtype)
    assert_product(y, x, weight, weight_rounding=BF16_ROUNDING)


SMALL_TILES = low_rank.Tiling(32, 64, 1, interpret=True)
LOW_RANK_CASES = [  # tokens, features, rank, transposed, bases, masked
    (48, 64, 16, False, 1, False),
    (130, 192, 48, True, 2, False),
    (64, 96, 192, False, 3, True),
    (33, 256, 64, True, 1, True),
]


def low_rank_case(
    tokens: int, features: int, rank: int, transposed: bool, bases: int, masked: bool
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of `low_rank_add`; u has 16 columns more than count."""
    draws = Draws()
    summands = [draws.normal(tokens, features) for _ in range(bases)]
    u = draws.normal(tokens, 16 + rank)
    v = draws.normal(features, rank) if transposed else draws.normal(rank, features)
    drawn = draws.bits(tokens, features) if masked else None
    options = {"factor": 0.7, "first": 16, "transposed": transposed, "drawn": drawn, "threshold": 100}
    return (summands, u, v), options


def assert_low_rank_sum(found: jax.Array, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
    """Rounded once, from sums in float32."""
    summands, u, v = (jax.tree.map(lambda x: np.asarray(x, np.float64), each) for each in arguments)
    v = v.T if options["transposed"] else v
    u = u[:, options["first"] : options["first"] + v.shape[0]]
    kept = 1 if options["drawn"] is None else np.asarray(options["drawn"]) >= options["threshold"]
    exact = sum(summands) + options["factor"] * kept * (u @ v)
    magnitudes = sum(np.abs(each) for each in summands) + options["factor"] * np.abs(u) @ np.abs(v)
    bound = (v.shape[0] + len(summands) + 2) * F32_EPS * magnitudes
    bound += BF16_ROUNDING * (np.abs(exact) + bound)
    assert (np.abs(np.asarray(found, np.float64) - exact) <= bound).all()


@interpreted
@pytest.mark.parametrize("case", LOW_RANK_CASES, ids=str)
def test_low_rank_add_interpreted(case: tuple[Any, ...]) -> None:
    arguments, options = low_rank_case(*case)
    assert low_rank.supported(*arguments)
    found = low_rank.add(*arguments, **options, tiling=SMALL_TILES)
    assert (found.shape, found.dtype) == (arguments[0][0].shape, jnp.bfloat16)
    assert_low_rank_sum(found, arguments, options)


@pytest.mark.parametrize("case", LOW_RANK_CASES, ids=str)
def test_the_twin_of_low_rank_add(case: tuple[Any, ...]) -> None:
    """In float32, where what it rounds on the way does not count."""
    (summands, u, v), options = low_rank_case(*case)
    summands, u, v = jax.tree.map(lambda x: x.astype(jnp.float32), (summands, u, v))
    assert not low_rank.supported(summands, u, v)
    with jax.default_matmul_precision("highest"):
        assert_low_rank_sum(twins.plain_low_rank_add(summands, u, v, **options), (summands, u, v), options)


ROTATED_CASES = [(48, 3, 32, 16), (70, 4, 64, 48)]  # tokens, heads, head dim, rank


def rotated_case(
    tokens: int, heads: int, head_dim: int, rank: int, dtype: Any = jnp.bfloat16
) -> tuple[tuple[Any, ...], Rotation, dict[str, Any]]:
    """Arguments of `low_rank_add` and angles."""
    (summands, u, v), options = low_rank_case(tokens, heads * head_dim, rank, True, 1, False)
    angles = jax.random.uniform(jax.random.key(9), (tokens, head_dim // 2), jnp.float32, -3, 3)
    rotation = Rotation(jnp.cos(angles), jnp.sin(angles))
    return jax.tree.map(lambda x: x.astype(dtype), (summands, u, v)), rotation, options


def assert_rotated_sum(found: jax.Array, arguments: tuple[Any, ...], rotation: Rotation, rank: int) -> None:
    """Against float64: both halves' sums have float32's error of their product, rotated they are rounded once more."""
    (base,), u, v = (jax.tree.map(lambda x: np.asarray(x, np.float64), each) for each in arguments)
    u = u[:, 16 : 16 + rank]
    exact, size = base + 0.7 * u @ v.T, np.abs(base) + 0.7 * np.abs(u) @ np.abs(v.T)
    cos, sin = (np.asarray(each, np.float64) for each in rotation)
    (left, right), (left_size, right_size) = (
        np.split(each.reshape(len(u), -1, 2 * cos.shape[1]), 2, axis=-1) for each in (exact, size)
    )
    cos, sin = cos[:, None], sin[:, None]
    turned = np.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1).reshape(exact.shape)
    error = (rank + 6) * F32_EPS * np.concatenate([left_size + right_size] * 2, axis=-1).reshape(exact.shape)
    if found.dtype == jnp.bfloat16:
        error += BF16_ROUNDING * (np.abs(turned) + error)
    assert (np.abs(np.asarray(found, np.float64) - turned) <= error).all()


@interpreted
@pytest.mark.parametrize("case", ROTATED_CASES, ids=str)
@pytest.mark.parametrize("along_rows", [False, True])
def test_rotated_sum_interpreted(case: tuple[int, ...], along_rows: bool) -> None:
    arguments, rotation, options = rotated_case(*case)
    assert low_rank.rotates(rotation, transposed=True)
    tiling = dataclasses.replace(SMALL_TILES, columns=128, along_rows=along_rows)
    found = low_rank.add(*arguments, **options, rotation=rotation, tiling=tiling)
    assert_rotated_sum(found, arguments, rotation, case[-1])


@pytest.mark.parametrize("case", ROTATED_CASES, ids=str)
def test_the_twin_of_the_rotated_sum(case: tuple[int, ...]) -> None:
    arguments, rotation, options = rotated_case(*case, dtype=jnp.float32)
    with jax.default_matmul_precision("highest"):
        assert_rotated_sum(
            dispatch.low_rank_add(*arguments, **options, rotation=rotation), arguments, rotation, case[-1]
        )


def test_which_rotations_are_left_to_the_twin() -> None:
    def rotates(half: int, transposed: bool = True) -> bool:
        return low_rank.rotates(Rotation(jnp.zeros((4, half)), jnp.zeros((4, half))), transposed)

    assert rotates(32)
    assert not any((rotates(48), rotates(8), rotates(32, transposed=False)))


GATED_CASES = [(48, 64, 16, False), (70, 192, 48, True)]  # tokens, features, rank, masked
THRESHOLD = 100


def gated_case(
    tokens: int, features: int, rank: int, masked: bool, dtype: Any = jnp.bfloat16
) -> tuple[Gated, list[jax.Array], jax.Array | None]:
    """Two sums of ordinary size; a gradient and the factors of what is added to it; what dropout drew."""
    draws = Draws()
    gate, up, dy = (draws.normal(tokens, features, dtype=dtype) for _ in range(3))
    u, du = (draws.normal(tokens, columns, dtype=dtype) for columns in (2 * rank, rank))
    gate_v, up_v, dv = (draws.normal(features, rank, dtype=dtype, scale=rank**-0.5) for _ in range(3))
    drawn = draws.bits(tokens, features) if masked else None
    return Gated(gate, up, u, gate_v, up_v, (2.0, 0.5), (0, rank)), [dy, du, dv.T], drawn


def run_gated(gated: Gated, back: list[jax.Array], drawn: jax.Array | None, module: Any, **options: Any) -> Any:
    masked = {} if drawn is None else {"drawn": drawn, "threshold": THRESHOLD}
    return [module.swiglu(gated, **options), *module.swiglu_backward(gated, *back, factor=0.7, **masked, **options)]


def assert_swiglu(found: list[jax.Array], gated: Gated, back: list[jax.Array], drawn: jax.Array | None) -> None:
    """y twice, dgate, dup against float64. Their slopes in gate and up are at most 1.1 times the other factors; a sum has the error of
    its product in float32."""
    base, up, u, gate_v, up_v, dy, du, dv = (np.asarray(x, np.float64) for x in (*gated[:5], *back))
    rank = gate_v.shape[1]
    terms = [
        u[:, first : first + rank] @ v.T * factor
        for first, v, factor in zip(gated.firsts, (gate_v, up_v), gated.factors, strict=True)
    ]
    gate, up = base + terms[0], up + terms[1]
    dy = dy + 0.7 * (1 if drawn is None else np.asarray(drawn) >= THRESHOLD) * (du @ dv)
    opening = 1 / (1 + np.exp(-gate))
    inner = gate * opening * up
    exact = inner, inner, dy * up * opening * (1 + gate * (1 - opening)), dy * gate * opening
    sizes = 1 + np.abs(gate), 1 + np.abs(up), 1 + np.abs(dy)
    absolute = (
        (rank + 8) * F32_EPS * 10 * sizes[0] * sizes[1] * sizes[2]
    )  # 10: a product's terms to its sum, at this rank
    for value, expected in zip(found, exact, strict=True):
        rounding = BF16_ROUNDING if value.dtype == jnp.bfloat16 else 0
        assert (np.abs(np.asarray(value, np.float64) - expected) <= absolute + rounding * np.abs(expected)).all()


@interpreted
@pytest.mark.parametrize("case", GATED_CASES, ids=str)
def test_swiglu_interpreted(case: tuple[Any, ...]) -> None:
    case = gated_case(*case)
    found = run_gated(*case, low_rank, tiling=SMALL_TILES)
    assert {each.dtype for each in found} == {jnp.dtype(jnp.bfloat16)}
    assert_swiglu(found, *case)


@pytest.mark.parametrize("case", GATED_CASES, ids=str)
def test_the_twin_of_swiglu(case: tuple[Any, ...]) -> None:
    case = gated_case(*case, dtype=jnp.float32)
    with jax.default_matmul_precision("highest"):
        assert_swiglu(run_gated(*case, dispatch), *case)


def kernel_calls(jaxpr: Any) -> Iterator[Any]:
    """The equations that run a kernel, also within functions that are jitted by themselves."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call":
            yield equation
        elif equation.primitive.name in ("jit", "pjit"):
            yield from kernel_calls(equation.params["jaxpr"].jaxpr)


def assert_read_before_it_is_written(run: Any, *arguments: Any) -> int:
    """Whatever kernel `run` is: no array is read once the output in its place is written. The interpreter keeps both, and would not tell.

    Returns how many outputs are in place.
    """
    (call,) = kernel_calls(jax.make_jaxpr(run)(*arguments).jaxpr)
    kernel, inputs = call.params["jaxpr"], len(call.invars)
    pairs = dict(call.params["input_output_aliases"])
    written: set[int] = set()
    for equation in kernel.eqns:
        place = next((i for i, ref in enumerate(kernel.invars) if equation.invars and ref is equation.invars[0]), None)
        if equation.primitive.name in ("swap", "masked_swap"):
            written.add(place)
        elif equation.primitive.name in ("get", "masked_load"):
            assert inputs + pairs.get(place, -1 - inputs) not in written, (
                f"input {place} is read after it was written over"
            )
    assert {inputs + output for output in pairs.values()} <= written, "or this sees nothing"
    return len(pairs)


def test_what_is_written_in_place_was_read_before() -> None:
    (summands, u, v), options = low_rank_case(64, 128, 64, True, 2, True)
    add = functools.partial(low_rank.add, **options, tiling=SMALL_TILES)
    assert assert_read_before_it_is_written(add, summands, u, v) == 1
    arguments, rotation, options = rotated_case(64, 4, 32, 64)
    one_head = dataclasses.replace(SMALL_TILES, columns=32)  # of several, each has its own place
    turned = functools.partial(low_rank.add, **options, rotation=rotation, tiling=one_head)
    assert assert_read_before_it_is_written(turned, *arguments) == 1
    gated, back, _ = gated_case(64, 128, 64, False)
    for run, outputs in (
        (lambda: low_rank.swiglu(gated, spent=True, tiling=SMALL_TILES), 1),
        (lambda: low_rank.swiglu_backward(gated, *back, tiling=SMALL_TILES), 1),
        (lambda: low_rank.swiglu_backward(gated, *back, spent=True, tiling=SMALL_TILES), 3),
        (lambda: adam.update(*adam_case((4, 256)), interpret=False), 5),
    ):
        assert assert_read_before_it_is_written(run) == outputs


ADAM = Adam(0.9, 0.99, 1e-8, 0.1)


def adam_case(shape: tuple[int, ...], dtype: Any = jnp.float32) -> tuple[Any, ...]:
    """Arguments of `adam.update`: a parameter, its gradient, moments, one block of which is zero, and the third step's numbers."""
    draws = Draws()
    param, grad, moment = (draws.normal(*shape, dtype=jnp.float32) for _ in range(3))
    moment = moment.reshape(-1).at[:256].set(0).reshape(shape)
    grad = grad.reshape(-1).at[:256].set(0).reshape(shape)
    moments = [blockwise.quantize(each, signed=signed) for each, signed in ((moment, True), (moment**2, False))]
    numbers = jnp.asarray([0.5, 1e-2, 1 - ADAM.beta1**3, 1 - ADAM.beta2**3, 1], jnp.float32)
    return param.astype(dtype), grad.astype(dtype), *moments, numbers, ADAM


def assert_adam(found: tuple[Any, ...], case: tuple[Any, ...]) -> None:
    """Against float64, from the moments as they are in 8 bits: the parameter, each block's largest moment, and codes that are the nearest
    or no further from it than float32 is from exact."""
    old, grad, *moments = (np.asarray(each, np.float64) for each in (*case[:2], *map(blockwise.dequantize, case[2:4])))
    factor, rate, mu_share, nu_share, _ = np.asarray(case[4], np.float64)
    mu = ADAM.beta1 * moments[0] + (1 - ADAM.beta1) * grad * factor
    nu = ADAM.beta2 * moments[1] + (1 - ADAM.beta2) * (grad * factor) ** 2
    step = mu / mu_share / (np.sqrt(nu / nu_share) + ADAM.epsilon) + ADAM.weight_decay * old
    size = np.abs(old) + rate * (np.abs(mu) + np.abs(moments[0]) + np.abs(grad)) / mu_share / (
        np.sqrt(nu / nu_share) + ADAM.epsilon
    )
    rounding = BF16_ROUNDING if found[0].dtype == jnp.bfloat16 else 0
    assert (found[0].shape, found[0].dtype) == (case[0].shape, case[0].dtype)
    exact = old - rate * step
    assert (np.abs(np.asarray(found[0], np.float64) - exact) <= 16 * F32_EPS * size + rounding * np.abs(exact)).all()
    for packed, moment, size in (
        (found[1], mu, np.abs(moments[0]) + np.abs(grad)),
        (found[2], nu, moments[1] + grad**2),
    ):
        blocks, sizes = (each.reshape(-1, 256) for each in (moment, size))
        error = 16 * F32_EPS * sizes.max(1)
        assert (np.abs(np.asarray(packed.absmax, np.float64) - np.abs(blocks).max(1)) <= error).all()
        largest = np.where(packed.absmax > 0, packed.absmax, 1).astype(np.float64)[:, None]
        values = blockwise.tables(signed=packed.signed)[0].astype(np.float64)
        gap = np.abs(values[np.asarray(packed.codes).reshape(blocks.shape)] - blocks / largest)
        best = np.abs(values[None, None] - (blocks / largest)[..., None]).min(-1)
        assert (gap <= best + 2 * error[:, None] / largest + 2 * F32_EPS).all()
        assert packed.codes.dtype == jnp.uint8


ADAM_CASES = [((4, 256), jnp.float32), ((3, 256), jnp.bfloat16), ((64, 48), jnp.float32)]


@interpreted
@pytest.mark.parametrize(("shape", "dtype"), ADAM_CASES, ids=str)
def test_adamw_8bit_interpreted(shape: tuple[int, int], dtype: Any) -> None:
    case = adam_case(shape, dtype)
    assert adam.supported(case[0], case[2])
    assert_adam(adam.update(*case, interpret=True), case)


def assert_not_made(update: Any, param: jax.Array, grad: jax.Array, *rest: Any) -> None:
    """With a gradient that is no number: everything is as it was."""
    *moments, numbers = rest
    found = update(param, grad.at[1].set(jnp.nan), *moments, numbers.at[4].set(0).at[0].set(jnp.nan))
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves([param, *moments]), strict=True):
        np.testing.assert_array_equal(bits(one), bits(other))


@interpreted
def test_an_adamw_8bit_step_that_is_not_made() -> None:
    *arrays, constants = adam_case((4, 256))
    assert_not_made(lambda *each: adam.update(*each, constants, interpret=True), *arrays)


def test_what_adamw_8bit_leaves_to_optax() -> None:
    ragged = jnp.zeros((3, 100))
    assert not adam.supported(ragged, blockwise.quantize(ragged, signed=True))
    assert not adam.supported(jnp.zeros((4, 256)), jnp.zeros((4, 256)))


def test_what_low_rank_add_leaves_to_its_twin() -> None:
    def case(tokens: int = 64, features: int = 64, rank: int = 16, dtype: Any = jnp.bfloat16) -> bool:
        base, u, v = (jnp.zeros(shape, dtype) for shape in ((tokens, features), (tokens, rank), (rank, features)))
        return low_rank.supported([base], u, v)

    assert case()
    assert not any((case(tokens=8), case(features=72), case(rank=24), case(dtype=jnp.float32)))


NORM_CASES = [(1, 64), (9, 96), (6, 1024), (2, 5120)]  # tokens, features; most fill no program
NORM_EPS = 1e-5


def norm_case(tokens: int, features: int, dtype: Any = jnp.bfloat16) -> list[jax.Array]:
    """x, one row of which is small beside the root of eps, a weight, dnormed and dskip."""
    draws = Draws()
    x, dnormed, dskip = (draws.normal(tokens, features, dtype=jnp.float32, scale=3) for _ in range(3))
    weight = 1 + draws.normal(features, dtype=jnp.float32, scale=0.3)
    return [each.astype(dtype) for each in (x.at[-1].multiply(1e-3), weight, dnormed, dskip)]


def assert_norm(normed: jax.Array, dx: jax.Array, case: list[jax.Array]) -> None:
    """Against float64: a norm is rounded twice, its gradient once with what is added, both from sums in float32."""
    x, weight, dnormed, dskip = (np.asarray(each, np.float64) for each in case)
    inverse = 1 / np.sqrt((x**2).mean(-1, keepdims=True) + NORM_EPS)
    grad = dnormed * weight
    slope = (grad * x * inverse).mean(-1, keepdims=True)
    exact = x * inverse * weight, dskip + inverse * (grad - x * inverse * slope)
    size = (np.abs(grad * x) * inverse).mean(-1, keepdims=True)
    noise = (x.shape[1] + 8) * F32_EPS
    sums = noise * np.abs(exact[0]), noise * (np.abs(dskip) + inverse * (np.abs(grad) + np.abs(x) * inverse * size))
    for found, expected, bound, roundings in zip((normed, dx), exact, sums, (2.01, 1), strict=True):
        assert (found.shape, found.dtype) == (case[0].shape, case[0].dtype)
        rounding = {"float32": 0, "float16": BF16_ROUNDING / 8, "bfloat16": BF16_ROUNDING}[found.dtype.name]
        smallest = (
            float(jnp.finfo(found.dtype).smallest_subnormal) / 2
        )  # below the normal numbers a rounding is not relative
        allowed = bound + roundings * (rounding * (np.abs(expected) + bound) + smallest)
        assert (np.abs(np.asarray(found, np.float64) - expected) <= allowed).all()


@interpreted
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("case", NORM_CASES, ids=str)
def test_rms_norm_interpreted(case: tuple[int, int], dtype: Any) -> None:
    arrays = norm_case(*case, dtype)
    assert norm.supported(*arrays[:2])
    normed = norm.forward(*arrays[:2], NORM_EPS, interpret=True)
    assert_norm(normed, norm.backward(*arrays, NORM_EPS, interpret=True), arrays)


@pytest.mark.parametrize("case", NORM_CASES, ids=str)
def test_the_twin_of_rms_norm(case: tuple[int, int]) -> None:
    arrays = norm_case(*case, jnp.float32)
    assert_norm(dispatch.rms_norm(*arrays[:2], NORM_EPS), dispatch.rms_norm_backward(*arrays, NORM_EPS), arrays)


def small_integers(tokens: int, features: int) -> tuple[jax.Array, jax.Array]:
    """x whose sum of squares is exact in any order, and a weight."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.integers(-9, 10, (tokens, features)), jnp.bfloat16)
    return x, jnp.asarray(1 + 0.3 * rng.standard_normal(features), jnp.bfloat16)


@interpreted
def test_rms_norm_rounds_where_the_twin_does() -> None:
    x, weight = small_integers(5, 512)
    found, expected = norm.forward(x, weight, NORM_EPS, interpret=True), twins.plain_rms_norm(x, weight, NORM_EPS)
    np.testing.assert_array_equal(bits(found), bits(expected))
    once = twins.plain_rms_norm(x.astype(jnp.float32), weight, NORM_EPS).astype(jnp.bfloat16)
    assert (found != once).any()  # so the rounding between norm and weight shows


def test_what_rms_norm_leaves_to_its_twin() -> None:
    def case(features: int = 64, dtype: Any = jnp.bfloat16, weight: Any = jnp.bfloat16) -> bool:
        return norm.supported(jnp.zeros((2, features), dtype), jnp.zeros((features,), weight))

    assert case()
    assert case(features=norm.LONGEST)
    assert not any(
        (case(features=68), case(features=2 * norm.LONGEST), case(dtype=jnp.float32), case(weight=jnp.float32))
    )


# ------------------------------------------------------------------------------------------------------------- the choice


def test_a_cpu_uses_the_twins() -> None:
    dispatch.available.cache_clear()
    expected = jax.default_backend() == "gpu"
    assert dispatch.available() is expected


TRIED = {
    (dequantization, "dequantize"): dispatch.dequantize,
    (low_rank, "add"): dispatch.low_rank_add,
    (low_rank, "swiglu"): dispatch.swiglu,
    (low_rank, "swiglu_backward"): dispatch.swiglu_backward,
    (norm, "forward"): dispatch.rms_norm,
    (norm, "backward"): dispatch.rms_norm_backward,
    (adam, "update"): functools.partial(adam.update, interpret=True),
}
"""What the trial at a start calls, and what gives the same where there is no GPU."""


@interpreted
def test_the_trial_finds_the_kernel_that_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    for (module, name), twin in TRIED.items():
        monkeypatch.setattr(module, name, twin)
    agree = self_test.agree
    monkeypatch.setattr(
        self_test, "agree", lambda *arguments: agree(*arguments)
    )  # another function each time, or it is not traced again
    assert self_test.find_problem() == ""
    for (module, name), twin in TRIED.items():
        with monkeypatch.context() as wrong:
            wrong.setattr(self_test, "agree", lambda *arguments: agree(*arguments))
            wrong.setattr(module, name, functools.partial(doubled, twin))
            assert self_test.find_problem() == "their results differ from XLA's", name


def doubled(function: Any, *arguments: Any, **options: Any) -> Any:
    return jax.tree.map(lambda x: 2 * x, function(*arguments, **options))


@pytest.fixture
def a_gpu_without_the_backend(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if jax.default_backend() == "gpu":
        pytest.skip("this GPU has the backend")
    dispatch.available.cache_clear()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    yield
    monkeypatch.undo()
    dispatch.available.cache_clear()


@pytest.mark.usefixtures("a_gpu_without_the_backend")
def test_losing_the_backend_costs_one_warning() -> None:
    """Pallas does not compile here, as it would not on a GPU that its backend does not serve."""
    weight, x = random_weight(16, 64), jnp.ones((2, 64))
    with pytest.warns(UserWarning, match="4-bit kernels do not work") as caught:
        packed = jax.jit(dispatch.quantize)(weight)  # asked for while tracing
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same(packed, nf4.quantize(weight))
        np.testing.assert_array_equal(bits(dispatch.dequantize(packed)), bits(nf4.dequantize(packed)))
        assert_product(dispatch.matmul(x, packed), x, packed, weight_rounding=BF16_ROUNDING)


def test_what_the_kernels_do_not_serve() -> None:
    ragged = nf4.quantize(jnp.ones((3, 5), jnp.bfloat16))
    assert not dequantization.supported(ragged, "bfloat16")
    assert not dequantization.supported(nf4.quantize(random_weight(8, 64)), "float32")
    assert not quantization.supported(jnp.ones((3, 5), jnp.bfloat16))
    assert not quantization.supported(jnp.ones((8, 64), jnp.float32))
    straddling = nf4.quantize(random_weight(4, 96))
    assert not narrow_matmul.supported(jnp.ones((1, 96), jnp.bfloat16), straddling)
    weight = nf4.quantize(random_weight(8, 64))
    assert narrow_matmul.supported(jnp.ones((16, 64), jnp.bfloat16), weight)
    assert not narrow_matmul.supported(jnp.ones((17, 64), jnp.bfloat16), weight)
    assert not narrow_matmul.supported(
        jnp.ones((16, 64), jnp.float32), weight
    )  # would have to be rounded for the tensor cores


# --------------------------------------------------------------------------------------------------- lowering and assembly


def lowered(run: Any, *arguments: Any) -> str:
    """What `run` becomes for an NVIDIA GPU, on a machine that need not have one."""
    traced = lambda: jax.jit(run).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()  # noqa: E731
    if jax.__version_info__ < (0, 11) or jax.default_backend() == "gpu":
        return traced()
    from jax.sharding import AbstractDevice, AbstractMesh

    gpu = AbstractDevice("NVIDIA A100-SXM4-40GB", None, platform="gpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=gpu)):
        return traced()


@every_format
def test_every_kernel_is_accepted_by_the_backend(quant_type: Any, double_quant: bool) -> None:
    dense = jax.ShapeDtypeStruct((256, 1024), jnp.bfloat16)
    weight = jax.eval_shape(lambda w: nf4.quantize(w, double_quant, quant_type), dense)
    x = {tokens: jax.ShapeDtypeStruct((tokens, 1024), jnp.bfloat16) for tokens in (1, 16)}
    cases = {
        "dequantize": (lambda w: dequantization.dequantize(w, "bfloat16"), weight),
        "quantize": (lambda w: quantization.quantize(w, double_quant, quant_type), dense),
        "few": (narrow_matmul.matmul, x[1], weight),
        "some": (narrow_matmul.matmul, x[16], weight),
    }
    for name, case in cases.items():
        assert "triton" in lowered(*case), name


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_adamw_8bit_is_accepted_by_the_backend(dtype: Any) -> None:
    *arrays, constants = adam_case((64, 1024), dtype)
    assert "triton" in lowered(lambda *each: adam.update(*each, constants), *arrays)


@pytest.mark.parametrize("features", [576, 4096, 5120])
def test_rms_norm_is_accepted_by_the_backend(features: int) -> None:
    x, weight = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((257, features), (features,)))
    assert "triton" in lowered(lambda *each: norm.forward(*each, NORM_EPS), x, weight)
    assert "triton" in lowered(lambda *each: norm.backward(*each, NORM_EPS), x, weight, x, x)


ASM = {
    "look_up": (triton.LOOK_UP.format(shift=12), "=&f,r,f"),
    "round_pair bf16": (triton.ROUND_PAIR.format(first=4, second=0, pair="bf16x2"), "=&r,r,f,f"),
    "round_pair f16": (triton.ROUND_PAIR.format(first=4, second=0, pair="f16x2"), "=&r,r,f,f"),
    "from_lane": (triton.FROM_LANE, "=f,f,r"),
    "scale": (triton.SCALE, "=f,f,f,f"),
    "inverse": (triton.INVERSE, "=f,f"),
    "divide": (triton.DIVIDE, "=f,f,f"),
    "pack_pair nf4": (quantization.pack_pair_asm("nf4"), "=&r,r,f"),
    "pack_pair fp4": (quantization.pack_pair_asm("fp4"), "=&r,r,f"),
}


def ptx_of(text: str, constraints: str, architecture: str) -> str:
    """A kernel around a piece of inline assembly: operands from memory, result to memory."""
    kinds = [constraint[-1] for constraint in constraints.split(",")]
    operands = [f"%{kind}{i}" for i, kind in enumerate(kinds)]
    body = re.sub(r"\$(\d)", lambda match: operands[int(match[1])], text)
    loads = [f"ld.global.b32 {name}, [%p + {4 * i}];" for i, name in enumerate(operands) if i]
    return "\n".join(
        [
            ".version 8.7" if int(architecture) >= 100 else ".version 7.8",
            f".target sm_{architecture}",
            ".address_size 64",
            ".visible .entry run(.param .u64 where) {",
            f".reg .b64 %p; .reg .b32 %r<{len(kinds)}>; .reg .f32 %f<{len(kinds)}>;",
            "ld.param.u64 %p, [where];",
            *loads,
            body,
            f"st.global.b32 [%p], {operands[0]};",
            "ret; }",
        ]
    )


def assemble(ptx: str, architecture: str, folder: Path) -> None:
    source = folder / f"kernel-{architecture}.ptx"
    source.write_text(ptx)
    command = ["ptxas", f"-arch=sm_{architecture}", str(source), "-o", str(folder / "kernel.cubin")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr + result.stdout


@pytest.mark.skipif(shutil.which("ptxas") is None, reason="ptxas is not installed")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", ASM)
def test_assembly_for_every_card(name: str, architecture: str, tmp_path: Path) -> None:
    assemble(ptx_of(*ASM[name], architecture), architecture, tmp_path)


# ---------------------------------------------------------------------------------------------------------- with a GPU


@needs_gpu
@every_format
@pytest.mark.parametrize("shape", [(64, 64), (576, 1536), (1376, 4096), (257, 704)], ids=str)
def test_kernels_on_the_gpu(shape: tuple[int, int], quant_type: Any, double_quant: bool) -> None:
    assert dispatch.available()
    dense = random_weight(*shape)
    packed = jax.jit(dispatch.quantize, static_argnums=(1, 2))(dense, double_quant, quant_type)
    on_cpu = jax.device_put(dense, jax.local_devices(backend="cpu")[0])
    expected = nf4.quantize(on_cpu, double_quant, quant_type)
    np.testing.assert_array_equal(packed.codes, expected.codes)
    if not double_quant:  # else the scales' mean, a sum in another order, may be another float
        np.testing.assert_array_equal(bits(packed.absmax), bits(expected.absmax))
    for dtype in ("bfloat16", "float16"):
        found = jax.jit(dispatch.dequantize, static_argnums=1)(packed, dtype)
        np.testing.assert_array_equal(bits(found), bits(jax.jit(nf4.dequantize, static_argnums=1)(packed, dtype)))
    for tokens in (1, 2, 4, 7, 16):
        x = jax.random.normal(jax.random.key(tokens), (tokens, shape[1]), jnp.bfloat16)
        y = jax.jit(dispatch.matmul)(x, packed)
        assert_product(y, x, packed, weight_rounding=BF16_ROUNDING)


@needs_gpu
@pytest.mark.parametrize(
    "case", [*LOW_RANK_CASES, (8192, 4096, 192, False, 3, True), (4096, 11008, 64, True, 1, False)], ids=str
)
def test_low_rank_add_on_the_gpu(case: tuple[Any, ...]) -> None:
    arguments, options = low_rank_case(*case)
    assert_low_rank_sum(jax.jit(functools.partial(dispatch.low_rank_add, **options))(*arguments), arguments, options)


@needs_gpu
@pytest.mark.parametrize("case", [*ROTATED_CASES, (8192, 32, 128, 64), (4096, 8, 64, 64)], ids=str)
def test_rotated_sum_on_the_gpu(case: tuple[int, ...]) -> None:
    arguments, rotation, options = rotated_case(*case)
    found = jax.jit(lambda *all: dispatch.low_rank_add(*all[:3], **options, rotation=all[3]))(*arguments, rotation)
    assert_rotated_sum(found, arguments, rotation, case[-1])


@needs_gpu
@pytest.mark.parametrize("case", [*GATED_CASES, (4096, 11008, 64, False), (4096, 11008, 64, True)], ids=str)
def test_swiglu_on_the_gpu(case: tuple[Any, ...]) -> None:
    gated, back, drawn = gated_case(*case)
    static = gated[5:]
    run = jax.jit(lambda arrays, back, drawn: run_gated(Gated(*arrays, *static), back, drawn, dispatch))
    assert_swiglu(run(gated[:5], back, drawn), gated, back, drawn)


@needs_gpu
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("case", [*NORM_CASES, (8192, 4096), (1000, 8192), (100, 11008), (4099, 576)], ids=str)
def test_rms_norm_on_the_gpu(case: tuple[int, int], dtype: Any) -> None:
    assert dispatch.available()
    arrays = norm_case(*case, dtype)
    run = jax.jit(
        lambda *arrays: (dispatch.rms_norm(*arrays[:2], NORM_EPS), dispatch.rms_norm_backward(*arrays, NORM_EPS))
    )
    assert "triton" in run.lower(*arrays).as_text()
    assert_norm(*run(*arrays), arrays)


@needs_gpu
@pytest.mark.parametrize(
    ("shape", "dtype"), [*ADAM_CASES, ((64, 4096), jnp.float32), ((11008, 16), jnp.bfloat16)], ids=str
)
def test_adamw_8bit_on_the_gpu(shape: tuple[int, int], dtype: Any) -> None:
    *arrays, constants = case = adam_case(shape, dtype)
    assert dispatch.updates_8bit(case[0], case[2])
    run = jax.jit(lambda *each: dispatch.adamw_8bit(*each, constants))
    assert_adam(run(*arrays), case)
    assert_not_made(run, *arrays)


@needs_gpu
def test_rms_norm_rounds_where_the_twin_does_on_the_gpu() -> None:
    x, weight = small_integers(100, 4096)
    with jax.disable_jit():  # compiled as one, XLA leaves out the rounding in the middle
        expected = twins.plain_rms_norm(x, weight, NORM_EPS)
    np.testing.assert_array_equal(bits(dispatch.rms_norm(x, weight, NORM_EPS)), bits(expected))


@needs_gpu
def test_peak_memory_is_one_dense_matrix_or_all() -> None:
    """Backward through a recomputed chain of linears: with shared matrices all of them exist at the turn, without only one.

    On a CPU XLA finds both dequantizations equal and shares them unasked; the kernels' calls it leaves alone.
    """
    depth, size, tokens = 8, 1024, 32
    keys = jax.random.split(jax.random.key(0), depth)
    weights = [nf4.quantize(size**-0.5 * jax.random.normal(key, (size, size), jnp.bfloat16)) for key in keys]

    def backward(weights: list[nf4.QuantizedTensor], x: jax.Array, dy: jax.Array, share_dense: bool) -> jax.Array:
        def chain(x: jax.Array) -> jax.Array:
            for weight in weights:
                x = jnp.tanh(frozen_matmul(x, weight, share_dense))
            return x

        return jax.vjp(chain, x)[1](dy)[0]

    x = jnp.ones((tokens, size), jnp.bfloat16)
    compiled = {
        share: jax.jit(backward, static_argnums=3).lower(weights, x, x, share).compile() for share in (True, False)
    }
    peak = {share: function.memory_analysis().temp_size_in_bytes for share, function in compiled.items()}
    dense = 2 * size * size  # bytes in bfloat16
    assert peak[True] >= depth * dense
    assert (
        peak[False] <= 5 * dense
    )  # one, as it is made: bytes' levels in float32, twice as wide, and their scaled product
    np.testing.assert_array_equal(compiled[True](weights, x, x), compiled[False](weights, x, x))


RUN_THEM_ALL = """
import jax, jax.numpy as jnp
from qlora_jax.ops import dispatch
from qlora_jax.ops.operands import Gated, Rotation
weight = dispatch.quantize(jnp.ones((256, 1024), jnp.bfloat16))
jax.block_until_ready([dispatch.matmul(jnp.ones((n, 1024), jnp.bfloat16), weight) for n in (1, 16, 32)])
x = jnp.ones((128, 128), jnp.bfloat16)
jax.block_until_ready(dispatch.low_rank_add([x], x[:, :64], x[:64]))
gated = Gated(x, x, x, x[:, :64], x[:, :64], (1.0, 1.0), (0, 64))
jax.block_until_ready([dispatch.swiglu(gated), dispatch.swiglu_backward(gated, x, x, x)])
turn = Rotation(jnp.ones((128, 32)), jnp.ones((128, 32)))
jax.block_until_ready(dispatch.low_rank_add([x], x, x, transposed=True, rotation=turn))
"""


@needs_gpu
@pytest.mark.skipif(shutil.which("ptxas") is None, reason="ptxas is not installed")
def test_ptx_for_every_card_on_the_gpu(tmp_path: Path) -> None:
    """The kernels as compiled for this card, retargeted: nothing in them is this card's own.

    But for `griddepcontrol`, with which the compiler lets a kernel start while the one before it ends, on cards that can.
    """
    environment = {
        **os.environ,
        "XLA_FLAGS": f"--xla_dump_to={tmp_path} --xla_dump_emitter_re=.*",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "PYTHONWARNINGS": "ignore",
    }
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", RUN_THEM_ALL], env=environment, check=True, cwd=Path(__file__).parents[2]
    )
    texts = {path.name: path.read_text() for path in tmp_path.rglob("*.ptx")}
    entries = {name: text for name, text in texts.items() if "shfl.sync.idx" in text or "mma.sync" in text}
    assert entries, sorted(texts)
    for text in entries.values():
        text = re.sub(r"(?m)^.*griddepcontrol.*$", "", text)
        for architecture in ARCHITECTURES:
            assemble(re.sub(r"\.target sm_\w+", f".target sm_{architecture}", text), architecture, tmp_path)


def test_words_are_little_endian() -> None:
    """Which nibble of a word is which weight: what every kernel stands on."""
    codes = np.arange(8, dtype=np.uint8)
    packed = (codes[::2] << 4 | codes[1::2]).view(np.int32)
    assert [int(packed[0]) >> shift & 15 for shift in triton.NIBBLE_SHIFTS] == codes.tolist()
