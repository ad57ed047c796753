"""AdamW against optax and torch, wherever its moments live; clipping and schedules against torch and transformers."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest

from qlora_jax.config import TrainingSettings
from qlora_jax.optimizer import AdamW, schedule
from qlora_jax.placement import Tree, put

ONE_ULP = 2.0**-23
"""Relative: our p - lr·(u + decay·p) and optax's p + (-lr)·(...) round alike, but XLA fuses them differently."""


def settings(**changes: Any) -> TrainingSettings:
    return TrainingSettings(**{"output_dir": Path("unused"), "learning_rate": 1e-2, "max_grad_norm": 0.0, **changes})


def random_layers(seed: int, scale: float = 1.0) -> list[Tree]:
    rng = np.random.default_rng(seed)
    shapes = {"a": (4, 6), "b": (6, 4)}
    return [
        {name: put((scale * rng.standard_normal(shape)).astype(np.float32), "device") for name, shape in shapes.items()}
        for _ in range(3)
    ]


def test_equal_to_optax_adamw_on_the_whole_tree() -> None:
    options = settings(weight_decay=0.1, adam_beta2=0.95)
    params = random_layers(0)
    reference = jax.tree.map(np.asarray, params)
    ours = AdamW(options, params, "host")
    rule = optax.adamw(1e-2, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.1)
    state = rule.init(reference)
    for step in range(5):
        grads = random_layers(step + 1)
        updates, state = rule.update(jax.tree.map(np.asarray, grads), state, reference)
        reference = optax.apply_updates(reference, updates)
        params, _ = ours.update(params, grads, 1e-2)
    for one, other in zip(jax.tree.leaves(params), jax.tree.leaves(reference), strict=True):
        np.testing.assert_allclose(one, other, rtol=8 * ONE_ULP, atol=8 * ONE_ULP * 1e-2)


def test_host_and_device_moments_give_the_same_bits() -> None:
    results = {}
    for where in ("device", "host"):
        params = random_layers(0)
        rule = AdamW(settings(max_grad_norm=0.3, weight_decay=0.01), params, where)
        for step in range(5):
            params, norm = rule.update(params, random_layers(step + 1), 1e-2)
        kinds = {leaf.sharding.memory_kind for leaf in jax.tree.leaves(rule.moments)}
        assert kinds == {"pinned_host" if where == "host" else "device"}
        results[where] = (jax.tree.map(np.asarray, params), jax.tree.map(np.asarray, rule.moments), float(norm))
    assert jax.tree.all(jax.tree.map(lambda a, b: np.array_equal(a, b), results["device"], results["host"]))


def test_against_torch_adamw_with_clipping() -> None:
    torch = pytest.importorskip("torch")
    options = settings(max_grad_norm=0.3, weight_decay=0.1)
    params = random_layers(0)
    theirs = [torch.nn.Parameter(torch.tensor(np.asarray(leaf))) for leaf in jax.tree.leaves(params)]
    reference = torch.optim.AdamW(theirs, lr=1e-2, weight_decay=0.1)
    ours = AdamW(options, params, "device")
    for step in range(10):
        grads = random_layers(step + 1, scale=0.1 if step % 2 else 0.001)  # clipped, and not
        for parameter, grad in zip(theirs, jax.tree.leaves(grads), strict=True):
            parameter.grad = torch.tensor(np.asarray(grad))
        expected = torch.nn.utils.clip_grad_norm_(theirs, 0.3)
        reference.step()
        params, norm = ours.update(params, grads, 1e-2)
        assert float(norm) == pytest.approx(float(expected), rel=4 * ONE_ULP)
    for one, other in zip(jax.tree.leaves(params), theirs, strict=True):
        # each of ten steps rounds p once on either side: at most an ulp of numbers below 4 apart
        np.testing.assert_allclose(one, other.detach().numpy(), rtol=0, atol=10 * 2 * ONE_ULP)


def test_no_clipping_when_max_grad_norm_is_zero() -> None:
    runs = []
    for max_norm in (0.0, 1e9):
        params = random_layers(0)
        runs.append(AdamW(settings(max_grad_norm=max_norm), params, "device").update(params, random_layers(1), 1e-2)[0])
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), *runs))


@pytest.mark.parametrize("kind", ["constant", "constant_with_warmup", "linear", "cosine"])
@pytest.mark.parametrize(("total", "ratio"), [(50, 0.0), (50, 0.1), (7, 0.25), (1, 0.5)])
def test_schedules_equal_transformers(kind: str, total: int, ratio: float) -> None:
    torch = pytest.importorskip("torch")
    from transformers import get_scheduler

    options = settings(lr_scheduler_type=kind, warmup_ratio=ratio, learning_rate=2e-4)
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=2e-4)
    theirs = get_scheduler(kind, optimizer, num_warmup_steps=int(np.ceil(total * ratio)), num_training_steps=total)
    ours = schedule(options, total)
    for step in range(total):
        assert ours(step) == pytest.approx(theirs.get_last_lr()[0], rel=1e-12, abs=1e-18)
        optimizer.step()
        theirs.step()


def test_constant_ignores_the_warmup() -> None:
    assert schedule(settings(lr_scheduler_type="constant", warmup_ratio=0.5), 10)(0) == 1e-2
    assert schedule(settings(lr_scheduler_type="constant_with_warmup", warmup_ratio=0.5), 10)(0) == 0
