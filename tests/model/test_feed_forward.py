"""SwiGLU between its three linears: the same numbers, gradients included, as the linears one by one."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qlora_jax.config import QuantizationSettings
from qlora_jax.model import mlp as module
from qlora_jax.model.linear import LoRA, NF4Linear
from qlora_jax.model.mlp import feed_forward

TOKENS, SIZE, INNER, RANK = 24, 64, 192, 4
F32_EPS = float(np.finfo(np.float32).eps)
KEYS = jax.random.key(5), jax.random.key(6)


def random(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32))


def make_linears(dropout: float, share_dense: bool, without: int | None = None) -> list[NF4Linear]:
    """gate, up and down, of unlike ranks and scalings and with B's that are not zero."""
    linears = []
    for i, (rows, columns) in enumerate([(INNER, SIZE), (INNER, SIZE), (SIZE, INNER)]):
        adapter = None if i == without else LoRA(columns, rows, RANK + i, 0.5 + i, dropout, nnx.Rngs(i))
        if adapter is not None:
            adapter.lora_b[...] = 0.1 * random(10 + i, rows, RANK + i)
        linears.append(NF4Linear(columns, rows, adapter, QuantizationSettings(), nnx.Rngs(i), share_dense=share_dense))
    return linears


def outcome(apply: Any, linears: list[NF4Linear], keys: Any, first: int) -> list[np.ndarray]:
    """The output and the gradients of x, the residual and every adapter."""
    graph, adapters, frozen = nnx.split(linears, nnx.LoRAParam, ...)
    matrices = [None] * len(linears)

    @jax.jit
    def run(x: jax.Array, residual: jax.Array, adapters: Any, dy: jax.Array) -> Any:
        def forward(*varied: Any) -> jax.Array:
            merged = nnx.merge(graph, varied[2], frozen)
            return apply(merged, *varied[:2], keys, first=first, matrices=matrices)

        out, pull = jax.vjp(forward, x, residual, adapters)
        return out, pull(dy)

    arguments = random(1, TOKENS, SIZE), random(2, TOKENS, SIZE), adapters, random(3, TOKENS, SIZE)
    return [np.asarray(leaf) for leaf in jax.tree.leaves(run(*arguments))]


def one_by_one(linears: Any, x: Any, residual: Any, keys: Any, *, first: int, matrices: Any) -> jax.Array:
    return module._one_by_one(linears, x, residual, keys, activation=module.SILU, first=first, matrices=matrices)


def assert_alike(found: list[np.ndarray], expected: list[np.ndarray]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert np.abs(other).max() > 0
        np.testing.assert_allclose(one, other, rtol=0, atol=INNER * F32_EPS * np.abs(other).max())


@pytest.mark.parametrize("share_dense", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_equals_the_linears_one_by_one(dropout: float, share_dense: bool) -> None:
    linears = make_linears(dropout, share_dense)
    found, expected = (outcome(apply, linears, KEYS, 7) for apply in (feed_forward, one_by_one))
    assert len(found) == 9
    assert_alike(found, expected)
    if dropout:
        undropped = outcome(feed_forward, linears, (None, None), 7)
        assert not np.allclose(undropped[0], found[0])


def test_one_by_one_is_the_formula() -> None:
    linears = make_linears(0.0, False)

    def formula(linears: Any, x: Any, residual: Any, *unused: Any, **options: Any) -> jax.Array:
        def times(linear: NF4Linear, x: jax.Array) -> jax.Array:
            lora_a, lora_b = linear.adapter.pair()
            return x @ linear.dense().astype(x.dtype).T + linear.adapter.scaling * (x @ lora_a.T) @ lora_b.T

        gate, up, down = (functools.partial(times, linear) for linear in linears)
        return residual + down(jax.nn.silu(gate(x)) * up(x))

    assert_alike(*(outcome(apply, linears, (None, None), 0) for apply in (one_by_one, formula)))


@pytest.mark.parametrize("without", [0, 1, 2])
def test_a_linear_without_an_adapter(without: int) -> None:
    """The others' still learn, and it gives what one whose B is zero would."""
    bare, zero = make_linears(0.25, False, without), make_linears(0.25, False)
    zero[without].adapter.lora_b[...] *= 0
    found, expected = (outcome(feed_forward, linears, KEYS, 0) for linears in (bare, zero))
    assert len(found) == len(expected) - 2
    assert_alike(found[:3], expected[:3])


def test_nothing_of_the_inner_size_is_kept_but_the_products() -> None:
    graph, adapters, frozen = nnx.split(make_linears(0.0, False), nnx.LoRAParam, ...)
    x = random(1, TOKENS, SIZE)
    _, pull = jax.vjp(lambda adapters: feed_forward(nnx.merge(graph, adapters, frozen), x, x), adapters)
    kept = [leaf for leaf in jax.tree.leaves(pull) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    assert sorted(leaf.size for leaf in kept if leaf.ndim > 1)[-2:] == [TOKENS * INNER] * 2
    assert sum(leaf.size == TOKENS * INNER for leaf in kept) == 2
