"""Chunked cross-entropy: the value and gradient of the plain formula, without its [tokens, vocabulary] array."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qlora_jax.data import IGNORED_LABEL
from qlora_jax.model import loss
from qlora_jax.model.families import read_architecture
from qlora_jax.model.loss import chunked_loss, chunked_loss_and_grad, cross_entropy, shift
from qlora_jax.model.vocabulary import Head
from tests.helpers import tiny

B, T, D, V = 2, 13, 16, 50
F32_EPS = float(np.finfo(np.float32).eps)
ROW_BYTES = 4 * V
UNCHUNKED = 10**9
# LOGIT_BYTES and the cut it makes of 26 tokens: (chunks, tokens in each). 7 and 3 do not divide 26.
CUTS = [(7 * ROW_BYTES, (4, 7)), (3 * ROW_BYTES, (9, 3)), (ROW_BYTES, (26, 1))]
WEIGHT = 1 / 37


@pytest.fixture(scope="module")
def head() -> Head:
    head = Head(read_architecture(tiny.hf_config(vocab_size=V, hidden_size=D)), nnx.Rngs(0))
    rng = np.random.default_rng(0)
    head.norm.weight[...] = jnp.asarray(1 + 0.1 * rng.standard_normal(D), jnp.bfloat16)
    head.weight[...] = jnp.asarray(rng.standard_normal((V, D)), jnp.bfloat16)
    return head


@pytest.fixture(scope="module")
def h() -> jax.Array:
    return jnp.asarray(np.random.default_rng(1).standard_normal((B, T, D)), jnp.float32)


@pytest.fixture(scope="module")
def labels() -> jax.Array:
    """A prompt and some scattered tokens are ignored; first and last label of the vocabulary occur."""
    labels = np.random.default_rng(2).integers(0, V, (B, T)).astype(np.int32)
    labels[0, :4] = labels[1, 7] = labels[1, -1] = IGNORED_LABEL
    labels[0, 5], labels[0, 6] = 0, V - 1
    return jnp.asarray(labels)


def slow_loss(head: Head, h: jax.Array, labels: jax.Array) -> tuple[float, int, float]:
    """(sum of losses, their number, a bound on the float32 rounding of the sum), in float64 and with loops."""
    norm, weight = (np.asarray(p[...], np.float64) for p in (head.norm.weight, head.weight))
    total, count, rounding = 0.0, 0, 0.0
    for row, row_labels in zip(np.asarray(h, np.float64), np.asarray(labels), strict=True):
        for t in range(len(row_labels) - 1):
            if row_labels[t + 1] == IGNORED_LABEL:
                continue
            x = row[t] / np.sqrt((row[t] ** 2).mean() + 1e-5) * norm
            logits = weight @ x
            total += np.log(np.exp(logits).sum()) - logits[row_labels[t + 1]]
            count += 1
            # Two logits of D products, each with a norm's few roundings; one sum of V; one sum over the tokens.
            rounding += (
                2 * (D + 4) * F32_EPS * (np.abs(weight) @ np.abs(x)).max()
                + (V + B * T) * F32_EPS * np.abs(logits).max()
            )
    return total, count, rounding


def plain(head: Head, h: jax.Array, labels: jax.Array) -> jax.Array:
    """The formula as one would first write it."""
    log_probabilities = jax.nn.log_softmax(head(h[:, :-1]), axis=-1)
    targets = labels[:, 1:]
    one_hot = jax.nn.one_hot(targets, log_probabilities.shape[-1], dtype=jnp.float32)  # all zero for an ignored label
    return -jnp.sum(one_hot * log_probabilities)


def test_shift_aligns_each_token_with_the_next() -> None:
    shifted = shift(jnp.array([[1, 2, 3], [4, IGNORED_LABEL, 6]]))
    assert shifted.tolist() == [[2, 3, IGNORED_LABEL], [IGNORED_LABEL, 6, IGNORED_LABEL]]


def test_value_equals_a_float64_oracle(head: Head, h: jax.Array, labels: jax.Array) -> None:
    total, count, rounding = slow_loss(head, h, labels)
    assert count == (labels[:, 1:] != IGNORED_LABEL).sum() == 19
    assert rounding < 1e-3 * total  # or the bound would bind nothing
    found, number = cross_entropy(head, h.reshape(-1, D), shift(labels).reshape(-1))
    assert number == count
    assert abs(float(found) - total) <= rounding


def test_value_and_gradient_equal_torch(head: Head, h: jax.Array, labels: jax.Array) -> None:
    torch = pytest.importorskip("torch")
    targets = shift(labels).reshape(-1)
    _, _, rounding = slow_loss(head, h, labels)
    logits = head(h.reshape(-1, D))
    dlogits = jax.grad(lambda x: cross_entropy(lambda _: x, h.reshape(-1, D), targets)[0])(logits)

    their_logits = torch.tensor(np.array(logits), requires_grad=True)
    theirs = torch.nn.functional.cross_entropy(their_logits, torch.tensor(np.array(targets)).long(), reduction="sum")
    theirs.backward()
    assert abs(float(cross_entropy(head, h.reshape(-1, D), targets)[0]) - theirs.item()) <= rounding
    np.testing.assert_allclose(
        dlogits, their_logits.grad.numpy(), rtol=0, atol=4 * F32_EPS * float(jnp.abs(logits).max())
    )


@pytest.mark.parametrize(("logit_bytes", "cut"), [*CUTS, (UNCHUNKED, (1, 26))])
def test_chunks_change_neither_loss_nor_gradient(
    monkeypatch: pytest.MonkeyPatch, head: Head, h: jax.Array, labels: jax.Array, logit_bytes: int, cut: tuple[int, int]
) -> None:
    monkeypatch.setattr(loss, "LOGIT_BYTES", logit_bytes)
    assert loss._chunks(head, h, labels)[1].shape == cut
    total, count, rounding = slow_loss(head, h, labels)

    @jax.jit
    def two_roads(h: jax.Array) -> tuple[Any, Any, Any, Any]:
        return (
            cross_entropy(head, h.reshape(-1, D), shift(labels).reshape(-1)),
            chunked_loss(head, h, labels),
            chunked_loss_and_grad(head, h, labels, jnp.float32(WEIGHT)),
            jax.value_and_grad(lambda h: WEIGHT * plain(head, h, labels))(h),
        )

    (whole, whole_number), (found, number), (value, dh), (expected, expected_dh) = two_roads(h)
    assert number == whole_number == count
    assert abs(float(found) - float(whole)) <= rounding
    assert abs(float(found) - total) <= rounding
    assert abs(float(value) - float(expected)) <= WEIGHT * rounding

    assert (dh.shape, dh.dtype) == (h.shape, h.dtype)
    # Each dh is a sum over V of terms no larger than the weights, through a norm whose 1 / rms is near 1.
    gradient_rounding = (V + D) * F32_EPS * WEIGHT * float(jnp.abs(head.weight[...]).max())
    assert gradient_rounding < 1e-3 * float(jnp.abs(expected_dh).max())
    np.testing.assert_allclose(dh, expected_dh, rtol=0, atol=gradient_rounding)
    uncounted = np.asarray(shift(labels) == IGNORED_LABEL)
    assert not np.asarray(dh)[uncounted].any()
    assert np.asarray(dh)[~uncounted].any(axis=-1).all()


def test_gradient_has_the_hidden_states_dtype(head: Head, h: jax.Array, labels: jax.Array) -> None:
    run = jax.eval_shape(lambda h: chunked_loss_and_grad(head, h, labels, jnp.float32(WEIGHT)), h.astype(jnp.bfloat16))
    assert [x.dtype for x in run] == [jnp.float32, jnp.bfloat16]


@pytest.mark.parametrize("logit_bytes", [7 * ROW_BYTES, UNCHUNKED])
def test_a_micro_batch_without_supervised_tokens_is_zero(
    monkeypatch: pytest.MonkeyPatch, head: Head, h: jax.Array, logit_bytes: int
) -> None:
    monkeypatch.setattr(loss, "LOGIT_BYTES", logit_bytes)
    ignored = jnp.full((B, T), IGNORED_LABEL)
    only_first = ignored.at[:, 0].set(3)  # the first token is predicted from nothing
    run = jax.jit(
        lambda labels: (chunked_loss(head, h, labels), chunked_loss_and_grad(head, h, labels, jnp.float32(1)))
    )
    for labels in (ignored, only_first):
        (total, count), (value, dh) = run(labels)
        assert (total, count, value) == (0, 0, 0)
        np.testing.assert_array_equal(dh, np.zeros_like(dh))


# --------------------------------------------------------------------------------------------------------------- memory


def equations_in(jaxpr: Any) -> Iterator[Any]:
    """At any depth."""
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            for inner in value if isinstance(value, list | tuple) else [value]:
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from equations_in(inner)


def shapes_in(jaxpr: Any) -> Iterator[jax.ShapeDtypeStruct]:
    """What every equation puts out, at any depth."""
    for equation in equations_in(jaxpr):
        for variable in equation.outvars:
            yield variable.aval


def test_no_scatter_stands_between_the_gradient_of_the_logits_and_its_rounding(
    head: Head, h: jax.Array, labels: jax.Array
) -> None:
    def operations(run: Callable[..., Any], *args: Any) -> set[str]:
        return {equation.primitive.name for equation in equations_in(jax.make_jaxpr(run)(*args))}

    found = operations(lambda h: chunked_loss_and_grad(head, h, labels, jnp.float32(WEIGHT)), h)
    assert "dot_general" in found
    assert not {name for name in found if "scatter" in name}
    picked = operations(
        jax.grad(lambda x: jnp.take_along_axis(x, jnp.zeros((3, 1), int), axis=1).sum()), jnp.ones((3, 5))
    )
    assert "scatter-add" in picked  # as it would show


def test_no_array_of_all_tokens_and_the_vocabulary_exists() -> None:
    """On a Llama-3-sized vocabulary, described and never allocated: a chunk of logits is the largest array of float32."""
    batch, length, vocabulary = 2, 4096, 128_256
    config = read_architecture(tiny.hf_config(vocab_size=vocabulary, hidden_size=256))
    graph, weights = nnx.split(nnx.eval_shape(lambda: Head(config, nnx.Rngs(0))))
    h = jax.ShapeDtypeStruct((batch, length, 256), jnp.bfloat16)
    labels = jax.ShapeDtypeStruct((batch, length), jnp.int32)

    def largest(run: Callable[..., Any]) -> int:
        jaxpr = jax.make_jaxpr(lambda weights, *args: run(nnx.merge(graph, weights), *args))(weights, h, labels)
        return max(math.prod(x.shape) * x.dtype.itemsize for x in shapes_in(jaxpr) if x.dtype == jnp.float32)

    one_row = 4 * vocabulary  # a chunk is rounded up to whole tokens
    weight = jnp.float32(1)
    assert largest(lambda head, *args: chunked_loss_and_grad(head, *args, weight)) <= loss.LOGIT_BYTES + one_row
    assert largest(chunked_loss) <= loss.LOGIT_BYTES + one_row
    all_logits = batch * (length - 1) * one_row
    assert largest(plain) == all_logits > 30 * loss.LOGIT_BYTES  # so the measure sees them where they are
