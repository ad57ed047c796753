"""The frozen linear and its adapter: the same numbers as the dense formula, and nothing dense kept for the backward pass."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qlora_jax.config import LoraSettings, QuantizationSettings
from qlora_jax.model.decoder import DecoderLayer
from qlora_jax.model.families import read_architecture
from qlora_jax.model.linear import FrozenParam, LoRA, NF4Linear, project
from qlora_jax.ops import nf4
from qlora_jax.ops.dropout import Dropout
from tests.helpers import tiny
from tests.helpers.linears import frozen_matmul, linear_of, make_lora, term
from tests.helpers.tiny import LINEAR_NAMES

IN, OUT, TOKENS, RANK = 256, 192, 8, 4
F32_EPS = float(np.finfo(np.float32).eps)
BF16_ROUNDING = 2.0**-8  # half a step of an 8-bit significand, relative
SIGMAS = 5  # of chance, in tests that draw


def random(seed: int, *shape: int, dtype: Any = jnp.float32) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32).astype(dtype))


@pytest.fixture(scope="module", params=[False, True], ids=["single", "double"])
def weight(request: pytest.FixtureRequest) -> nf4.QuantizedTensor:
    return nf4.quantize(0.05 * random(0, OUT, IN, dtype=jnp.bfloat16), request.param)


def dense(weight: nf4.QuantizedTensor) -> np.ndarray:
    return np.asarray(nf4.dequantize(weight), np.float64)


def assert_is_product(found: jax.Array, left: jax.Array, right: np.ndarray) -> None:
    """found = left @ right, up to the rounding of K float32 sums and of found's dtype: a bound for every element."""
    left = np.asarray(left, np.float64)
    exact = left @ right
    sum_rounding = right.shape[0] * F32_EPS * (np.abs(left) @ np.abs(right))
    output_rounding = (0 if found.dtype == jnp.float32 else BF16_ROUNDING) * np.abs(exact)
    assert (np.abs(np.asarray(found, np.float64) - exact) <= sum_rounding + output_rounding).all()


def paths(tree: Any) -> set[str]:
    """Paths of a tree's parameters, a quantized tensor counting as one."""
    leaves = jax.tree.leaves_with_path(tree, is_leaf=lambda x: isinstance(x, nf4.QuantizedTensor))
    return {jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in leaves}


# --------------------------------------------------------------------------------------------------------- frozen_matmul


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jitted"])
def test_value_and_dx_equal_the_dense_matmul(weight: nf4.QuantizedTensor, dtype: Any, jitted: bool) -> None:
    def value_and_dx(x: jax.Array, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
        y, vjp = jax.vjp(lambda x: frozen_matmul(x, weight), x)
        return y, *vjp(dy)

    x, dy = random(1, 2, TOKENS, IN, dtype=dtype), random(2, 2, TOKENS, OUT, dtype=dtype)
    y, dx = (jax.jit(value_and_dx) if jitted else value_and_dx)(x, dy)
    assert (y.shape, y.dtype) == ((2, TOKENS, OUT), dtype)
    assert (dx.shape, dx.dtype) == (x.shape, dtype)
    assert_is_product(y, x, dense(weight).T)
    assert_is_product(dx, dy, dense(weight))


def test_only_codes_and_scales_are_kept_for_the_backward_pass(weight: nf4.QuantizedTensor) -> None:
    x = random(1, TOKENS, IN, dtype=jnp.bfloat16)
    _, vjp = jax.vjp(lambda x: frozen_matmul(x, weight), x)
    kept = sorted((leaf.dtype.name, leaf.size) for leaf in jax.tree.leaves(vjp))
    assert kept == sorted((leaf.dtype.name, leaf.size) for leaf in jax.tree.leaves(weight))
    assert ("uint8", OUT * IN // 2) in kept


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_no_dense_matrix_is_kept_with_an_adapter(dropout: float) -> None:
    x, key = random(1, TOKENS, IN, dtype=jnp.bfloat16), jax.random.key(0)
    graph, adapter, frozen = nnx.split(make_linear(dropout=dropout), nnx.LoRAParam, ...)

    def floats_kept(run: Any) -> list[int]:
        _, vjp = jax.vjp(run, adapter, x)
        return [leaf.size for leaf in jax.tree.leaves(vjp) if jnp.issubdtype(leaf.dtype, jnp.floating)]

    def dense_run(adapter: Any, x: jax.Array) -> jax.Array:
        linear = nnx.merge(graph, adapter, frozen)
        return jnp.einsum("...i,oi->...o", x, nf4.dequantize(linear.weight.get_value())) + term(linear.adapter, x, key)

    assert max(floats_kept(lambda adapter, x: nnx.merge(graph, adapter, frozen)(x, key))) <= TOKENS * IN
    assert max(floats_kept(dense_run)) == OUT * IN  # so the measure sees a dense matrix where there is one


def test_sharing_changes_no_bit(weight: nf4.QuantizedTensor) -> None:
    def value_and_dx(share_dense: bool) -> tuple[jax.Array, jax.Array]:
        y, vjp = jax.vjp(lambda x: frozen_matmul(x, weight, share_dense), random(1, TOKENS, IN))
        return y, *vjp(random(2, TOKENS, OUT))

    for shared, not_shared in zip(value_and_dx(True), value_and_dx(False), strict=True):
        np.testing.assert_array_equal(shared, not_shared)


def test_a_shared_dense_matrix_is_what_is_kept(weight: nf4.QuantizedTensor) -> None:
    _, vjp = jax.vjp(lambda x: frozen_matmul(x, weight, True), random(1, TOKENS, IN))
    assert [(leaf.dtype, leaf.shape) for leaf in jax.tree.leaves(vjp)] == [(jnp.bfloat16, (OUT, IN))]


def test_no_gradient_reaches_the_weight(weight: nf4.QuantizedTensor) -> None:
    x = random(1, TOKENS, IN)
    y, vjp = jax.vjp(frozen_matmul, x, weight)
    dx, dweight = vjp(jnp.ones_like(y))
    assert np.asarray(dx).any()
    for leaf in jax.tree.leaves(dweight):
        assert leaf.dtype == jax.dtypes.float0 or not np.asarray(leaf).any()


@pytest.mark.parametrize("share", [False, True])
def test_a_plain_matrix_does_as_well(weight: nf4.QuantizedTensor, share: bool) -> None:
    """The dequantized matrix in the weight's place: the same bits, forward and back, and no gradient either."""
    x, matrix = random(1, TOKENS, IN), nf4.dequantize(weight)
    (found, pull), (expected, push) = (jax.vjp(lambda x, w: frozen_matmul(x, w, share), x, w) for w in (matrix, weight))
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(pull(found)[0], push(expected)[0])
    assert not np.asarray(pull(found)[1], np.float32).any()


# ------------------------------------------------------------------------------------------------------------------ LoRA


def make_linear(rank: int | None = RANK, dropout: float = 0.0, scaling: float = 2.0) -> NF4Linear:
    adapter = None if rank is None else LoRA(IN, OUT, rank, scaling, dropout, nnx.Rngs(1))
    return NF4Linear(IN, OUT, adapter, QuantizationSettings(), rngs=nnx.Rngs(0))


def test_start_values() -> None:
    """kaiming_uniform with a = √5 is uniform in ±1/√in; B is zero."""
    lora = LoRA(IN, OUT, 64, 1.0, 0.0, nnx.Rngs(0))
    a, b, bound = np.asarray(lora.lora_a[...]), np.asarray(lora.lora_b[...]), IN**-0.5
    assert (a.shape, a.dtype, b.shape, b.dtype) == ((64, IN), np.float32, (OUT, 64), np.float32)
    assert not b.any()
    assert np.abs(a).max() <= bound
    assert min(a.max(), -a.min()) > bound * (1 - 20 / a.size)  # missed with a chance of exp(-10)
    deviation = bound / 3**0.5  # of a uniform value; of its square: bound² √(4/45)
    assert abs(a.mean()) < SIGMAS * deviation / a.size**0.5
    assert abs((a**2).mean() - bound**2 / 3) < SIGMAS * bound**2 * (4 / 45) ** 0.5 / a.size**0.5


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_fresh_adapter_changes_nothing(dtype: Any) -> None:
    x = random(1, 2, TOKENS, IN, dtype=dtype)
    with_adapter, without = make_linear(dropout=0.5), make_linear(rank=None)
    without.weight = with_adapter.weight
    for key in (None, jax.random.key(0)):
        np.testing.assert_array_equal(with_adapter(x, key), without(x))


@pytest.mark.parametrize(("rslora", "scaling"), [(False, 16 / 4), (True, 16 / 2)])
def test_value_is_the_formula(rslora: bool, scaling: float) -> None:
    settings = LoraSettings(r=RANK, lora_alpha=16, use_rslora=rslora)
    assert settings.scaling == scaling
    x, a, b = (random(seed, *shape) for seed, shape in enumerate([(2, TOKENS, IN), (RANK, IN), (OUT, RANK)]))
    found = term(make_lora(a, b, settings.scaling), x)
    x, a, b = (np.asarray(array, np.float64) for array in (x, a, b))
    exact = scaling * (x @ a.T) @ b.T
    rounding = (IN + RANK + 2) * F32_EPS * scaling * (np.abs(x) @ np.abs(a).T) @ np.abs(b).T
    assert (np.abs(np.asarray(found) - exact) <= rounding).all()


def test_adapter_is_multiplied_in_the_inputs_dtype() -> None:
    lora = make_lora(random(0, RANK, IN), random(1, OUT, RANK))
    assert term(lora, random(2, TOKENS, IN, dtype=jnp.bfloat16)).dtype == jnp.bfloat16
    assert lora.lora_a[...].dtype == lora.lora_b[...].dtype == jnp.float32


# --------------------------------------------------------------------------------------------------------------- dropout

DROPOUT = 0.25


def test_dropout_drops_or_scales_each_input() -> None:
    """With A and B the identity, what the adapter sees comes out: zeros, and inputs over 1 - p, whose mean is the input's."""
    lora = make_lora(np.eye(64), np.eye(64), dropout=DROPOUT)
    x = 1 + random(0, 512, 64) ** 2  # nowhere zero
    seen = np.asarray(term(lora, x, jax.random.key(0)))
    dropped = seen == 0
    np.testing.assert_array_equal(seen, np.where(dropped, 0, np.asarray(x / (1 - DROPOUT))))
    deviation = (DROPOUT * (1 - DROPOUT) / dropped.size) ** 0.5
    assert abs(dropped.mean() - DROPOUT) < SIGMAS * deviation
    assert dropped.any(axis=0).all()  # drawn anew for every token and every feature
    assert dropped.any(axis=1).all()


def test_dropout_is_off_without_a_key_or_a_rate() -> None:
    x = random(0, TOKENS, 64)
    np.testing.assert_array_equal(term(make_lora(np.eye(64), np.eye(64), dropout=DROPOUT), x), x)
    np.testing.assert_array_equal(term(make_lora(np.eye(64), np.eye(64), dropout=0.0), x, jax.random.key(0)), x)


@pytest.mark.parametrize(
    ("rate", "drawn"), [(0.1, 26 / 2**8), (0.05, 13 / 2**8), (0.01, 655 / 2**16), (0.999, 65470 / 2**16)]
)
def test_dropout_draws_few_bits_and_divides_by_the_rate_it_draws(rate: float, drawn: float) -> None:
    x = jnp.ones((256, 1000))
    dropout = Dropout.of(rate)
    seen = np.asarray(dropout(x, dropout.draw(x.shape, jax.random.key(0), 0)))
    kept = seen != 0
    np.testing.assert_array_equal(seen[kept], np.float32(1) / np.float32(1 - drawn))
    assert abs(kept.mean() - (1 - drawn)) < SIGMAS * (drawn * (1 - drawn) / kept.size) ** 0.5


@pytest.mark.parametrize("rate", [1e-9, 1e-4, 0.003, 0.1, 1 / 3, 0.5, 0.9, 1 - 1e-6])
def test_a_drawn_rate_is_near_the_one_asked_for(rate: float) -> None:
    dropout = Dropout.of(rate)
    assert 0 < dropout.threshold < 2**dropout.bits
    assert 1 - dropout.share == pytest.approx(rate, rel=0.02, abs=2**-32)


def test_dropout_of_a_later_chunk_is_part_of_the_whole_ones() -> None:
    dropout, key = Dropout.of(DROPOUT), jax.random.key(0)
    whole = dropout.draw((TOKENS, IN), key, 0)
    np.testing.assert_array_equal(dropout.draw((TOKENS - 3, IN), key, 3), whole[3:])


def test_dropout_is_reproducible_by_key() -> None:
    lora, x = make_lora(random(0, RANK, IN), random(1, OUT, RANK), dropout=DROPOUT), random(2, TOKENS, IN)
    first, again, other = (np.asarray(term(lora, x, jax.random.key(seed))) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).mean() > 0.9


def test_dropout_touches_the_adapters_input_only() -> None:
    linear, key = make_linear(dropout=DROPOUT), jax.random.key(0)
    linear.adapter.lora_b[...] = random(1, OUT, RANK)
    x = random(2, TOKENS, IN)
    expected = frozen_matmul(x, linear.weight.get_value()) + term(linear.adapter, x, key)
    np.testing.assert_array_equal(linear(x, key), expected)
    assert not np.array_equal(linear(x, key), linear(x, None))


# --------------------------------------------------------------------------------------------------- linears of one input


def test_linears_of_one_input_give_what_each_gives_alone() -> None:
    """Values and all gradients, one of them without an adapter and ranks unlike."""
    linears = [make_linear(rank, scaling=scaling) for rank, scaling in ((RANK, 2.0), (None, 1.0), (2 * RANK, 0.5))]
    for seed, linear in enumerate(linears):
        if linear.adapter is not None:
            linear.adapter.lora_b[...] = random(seed, *linear.adapter.lora_b.shape)
    graph, adapters, frozen = nnx.split(linears, nnx.LoRAParam, ...)
    x, dys = random(3, TOKENS, IN), [random(4 + i, TOKENS, OUT) for i in range(3)]

    def outcome(apply: Any) -> tuple[Any, Any]:
        ys, vjp = jax.vjp(lambda x, adapters: apply(nnx.merge(graph, adapters, frozen), x), x, adapters)
        return ys, vjp(dys)

    found = outcome(project)
    expected = outcome(lambda linears, x: [linear(x) for linear in linears])
    scale = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(expected))
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=IN * F32_EPS * scale)


def test_linears_of_one_input_share_a_dropout_mask() -> None:
    eye = make_lora(np.eye(64), np.eye(64), dropout=DROPOUT)
    x = 1 + random(0, 512, 64) ** 2
    first, second = project([linear_of(jnp.zeros((64, 64)), eye)] * 2, x, jax.random.key(0))
    assert (np.asarray(first) == 0).any()
    np.testing.assert_array_equal(first, second)


# ----------------------------------------------------------------------------------------------------------------- trees


def test_split_separates_exactly_the_adapter() -> None:
    _, trained, frozen = nnx.split(make_linear(), nnx.LoRAParam, ...)
    assert paths(nnx.to_pure_dict(trained)) == {"adapter.lora_a", "adapter.lora_b"}
    assert paths(nnx.to_pure_dict(frozen)) == {"weight"}
    assert isinstance(make_linear().weight, FrozenParam)


@pytest.mark.parametrize("targets", ["all-linear", ["v_proj", "q_proj"], ["down_proj"]], ids=str)
def test_split_of_a_decoder_layer(targets: Any) -> None:
    config, lora = read_architecture(tiny.hf_config()), LoraSettings(r=RANK, target_modules=targets)
    layer = nnx.eval_shape(lambda: DecoderLayer(config, lora, QuantizationSettings(), "xla", nnx.Rngs(0)))
    _, trained, frozen = nnx.split(layer, nnx.LoRAParam, ...)
    names = LINEAR_NAMES if targets == "all-linear" else targets
    assert paths(nnx.to_pure_dict(trained)) == {f"{n}.adapter.lora_{x}" for n in names for x in "ab"}
    norms = ("input_layernorm", "post_attention_layernorm")
    assert paths(nnx.to_pure_dict(frozen)) == {f"{name}.weight" for name in (*LINEAR_NAMES, *norms)}
