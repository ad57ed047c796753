"""AdamW against optax and torch, wherever its moments live; clipping and schedules against torch and transformers."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest

from qlora_jax.config import TrainingSettings
from qlora_jax.engine import optimizer, programs
from qlora_jax.engine.engine import Gradients
from qlora_jax.engine.optimizer import AdamW, schedule
from qlora_jax.ops import blockwise, dispatch
from qlora_jax.ops.blockwise import BlockwiseTensor
from qlora_jax.ops.pallas import adam
from qlora_jax.runtime.placement import Tree, one_device

ONE_ULP = 2.0**-23
"""Relative: our p - lr·(u + decay·p) and optax's p + (-lr)·(...) round alike, but XLA fuses them differently."""


TABLE_STEP = 2.0**-15  # of bitsandbytes' look-up table on a CPU, by which it finds 8-bit codes


def settings(**changes: Any) -> TrainingSettings:
    return TrainingSettings(**{"output_dir": Path("unused"), "learning_rate": 1e-2, "max_grad_norm": 0.0, **changes})


def random_layers(seed: int, scale: float = 1.0) -> list[Tree]:
    rng = np.random.default_rng(seed)
    shapes = {"a": (4, 6), "b": (6, 4)}
    return [
        {
            name: one_device().put((scale * rng.standard_normal(shape)).astype(np.float32), "device")
            for name, shape in shapes.items()
        }
        for _ in range(3)
    ]


def gradients(layers: list[Tree]) -> Gradients:
    return Gradients(layers, [programs.square_sum(layer) for layer in layers])


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
        params, _ = ours.update(params, gradients(grads), 1e-2)
    for one, other in zip(jax.tree.leaves(params), jax.tree.leaves(reference), strict=True):
        np.testing.assert_allclose(one, other, rtol=8 * ONE_ULP, atol=8 * ONE_ULP * 1e-2)


@pytest.mark.parametrize("optim", ["paged_adamw_32bit", "paged_adamw_8bit"])
def test_host_and_device_moments_give_the_same_bits(optim: str) -> None:
    results = {}
    for where in ("device", "host"):
        params = large_layers(0)
        rule = AdamW(settings(max_grad_norm=0.3, weight_decay=0.01, optim=optim), params, where)
        for step in range(5):
            params, norm = rule.update(params, gradients(large_layers(step + 1)), 1e-2)
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
        params, norm = ours.update(params, gradients(grads), 1e-2)
        assert float(norm) == pytest.approx(float(expected), rel=4 * ONE_ULP)
    for one, other in zip(jax.tree.leaves(params), theirs, strict=True):
        # each of ten steps rounds p once on either side: at most an ulp of numbers below 4 apart
        np.testing.assert_allclose(one, other.detach().numpy(), rtol=0, atol=10 * 2 * ONE_ULP)


def large_layers(seed: int) -> list[Tree]:
    """One tensor above the size from which moments take 8 bits, whose last block is not full, and one below it."""
    rng = np.random.default_rng(seed)
    values = {"a": rng.standard_normal((70, 80)), "b": rng.standard_normal((8, 8))}
    values["a"] *= np.exp(2 * rng.standard_normal((70, 1)))  # rows of different scales
    return [{name: one_device().put((0.01 * value).astype(np.float32), "device") for name, value in values.items()}]


@pytest.mark.parametrize("signed", [True, False])
def test_8_bit_maps_equal_bitsandbytes(signed: bool) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    expected = functional.create_dynamic_map(signed=signed, max_exponent_bits=7, total_bits=8).numpy()
    np.testing.assert_array_equal(blockwise._MAPS[signed].view(np.uint32), expected.view(np.uint32))


@pytest.mark.parametrize("signed", [True, False])
def test_8_bit_codes_are_exact_nearest(signed: bool) -> None:
    values = np.random.default_rng(0).standard_normal((3, 300)).astype(np.float32)
    values = values if signed else values**2
    packed = jax.jit(blockwise.quantize, static_argnames="signed")(values, signed=signed)
    blocks = [values.reshape(-1)[i : i + 256] for i in range(0, values.size, 256)]
    np.testing.assert_array_equal(packed.absmax, [np.abs(block).max() for block in blocks])
    table = blockwise._MAPS[signed].astype(np.float64)
    nearest = [np.abs(table[None] - (block / np.abs(block).max())[:, None]).argmin(1) for block in blocks]
    np.testing.assert_array_equal(packed.codes, np.concatenate(nearest))
    dequantized = np.asarray(blockwise.dequantize(packed))
    expected = np.concatenate(
        [table[codes].astype(np.float32) * np.abs(b).max() for codes, b in zip(nearest, blocks, strict=True)]
    )
    np.testing.assert_array_equal(dequantized, expected.reshape(values.shape))


def test_8_bit_adamw_equals_bitsandbytes() -> None:
    """But for what its CPU path's look-up table loses: it finds a value of the map at most a step of the table farther than the nearest."""
    torch = pytest.importorskip("torch")
    optim = pytest.importorskip("bitsandbytes.optim")
    params, rate, steps = large_layers(0), 1e-3, 8
    theirs = [torch.nn.Parameter(torch.tensor(np.asarray(leaf))) for leaf in jax.tree.leaves(params)]
    reference = optim.AdamW8bit(theirs, lr=rate, weight_decay=0.1)
    ours = AdamW(settings(optim="paged_adamw_8bit", weight_decay=0.1), params, "host")
    for step in range(steps):
        grads = large_layers(step + 1)
        for parameter, grad in zip(theirs, jax.tree.leaves(grads), strict=True):
            parameter.grad = torch.tensor(np.asarray(grad))
        reference.step()
        params, _ = ours.update(params, gradients(grads), rate)
        adam, state = ours.moments[0][0], reference.state[theirs[0]]
        assert isinstance(adam.mu["a"], BlockwiseTensor)
        assert not isinstance(adam.mu["b"], BlockwiseTensor)
        for moment, name in ((adam.mu["a"], "1"), (adam.nu["a"], "2")):
            table = blockwise._MAPS[moment.signed].astype(np.float64)
            allowance = (step + 1) * np.diff(table).max()  # one other neighbour a step
            np.testing.assert_allclose(moment.absmax, state[f"absmax{name}"].numpy(), rtol=allowance)
            apart = np.abs(table[np.asarray(moment.codes)] - table[state[f"state{name}"].numpy().reshape(-1)])
            assert np.median(apart) == 0
            assert apart.max() <= allowance + TABLE_STEP
    small = jax.tree.leaves(params)[1]
    np.testing.assert_allclose(small, theirs[1].detach().numpy(), rtol=0, atol=steps * 4 * ONE_ULP * 0.1)
    gap = np.abs(np.asarray(jax.tree.leaves(params)[0]) - theirs[0].detach().numpy())
    assert np.median(gap) <= 8 * ONE_ULP * 0.1
    assert gap.max() <= steps * rate  # less than the steps themselves are long


def test_tensors_that_a_kernel_updates(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, beside one that it leaves to optax: the same steps, up to a code that fell to the other side of a threshold."""
    options = settings(optim="paged_adamw_8bit", weight_decay=0.1, max_grad_norm=1.0)
    params = {by: wide_layers(0) for by in ("optax", "kernel")}
    optimizers = {}
    for by in params:
        monkeypatch.setattr(optimizer, "_RULES", {})  # or both would call what one of them compiled
        optimizers[by] = AdamW(options, params[by], "device")
    called: list[tuple[int, ...]] = []

    def update(*arguments: Any) -> Any:
        called.append(arguments[0].shape)
        return adam.update(*arguments, interpret=True)

    for step in range(4):
        grads = wide_layers(step + 1)
        for by, each in optimizers.items():
            with monkeypatch.context() as patched:
                if by == "kernel":
                    patched.setattr(dispatch, "updates_8bit", adam.supported)
                    patched.setattr(dispatch, "adamw_8bit", update)
                params[by], _ = each.update(params[by], gradients(grads), 1e-2)
                grads = wide_layers(step + 1)
    assert set(called) == {(32, 256)}
    states = [jax.tree.leaves(optimizers[by].moments) for by in ("kernel", "optax")]
    assert [(leaf.shape, leaf.dtype) for leaf in states[0]] == [(leaf.shape, leaf.dtype) for leaf in states[1]]
    for by in params:
        assert int(optimizers[by].moments[0][0].count) == 4
    for ours, theirs in zip(*map(jax.tree.leaves, (params["kernel"], params["optax"])), strict=True):
        apart = np.abs(np.asarray(ours) - np.asarray(theirs))
        assert np.median(apart) <= 8 * ONE_ULP
        assert (apart > 1e-5).mean() <= 1e-3  # each step has a code in ten thousand within an ulp of a threshold


@pytest.mark.parametrize("broken", ["gradient", "loss"])
@pytest.mark.parametrize("optim", ["paged_adamw_32bit", "paged_adamw_8bit"])
def test_a_step_that_is_not_finite_is_not_made(optim: str, broken: str) -> None:
    params = wide_layers(0)
    optimizer = AdamW(settings(optim=optim, weight_decay=0.1, max_grad_norm=1.0), params, "host")
    params, _ = optimizer.update(params, gradients(wide_layers(1)), 1e-2, loss=np.float32(2))
    before = [np.asarray(leaf).copy() for leaf in jax.tree.leaves((params, optimizer.moments))]
    grads, loss = wide_layers(2), np.float32(np.inf if broken == "loss" else 2)
    if broken == "gradient":
        grads[0]["b"] = grads[0]["b"].at[3, 4].set(np.nan)
    params, norm = optimizer.update(params, gradients(grads), 1e-2, loss=loss)
    assert np.isfinite(norm) == (broken == "loss")
    for one, other in zip(jax.tree.leaves((params, optimizer.moments)), before, strict=True):
        np.testing.assert_array_equal(np.asarray(one), other)
    params, _ = optimizer.update(params, gradients(wide_layers(3)), 1e-2, loss=np.float32(2))
    assert int(optimizer.moments[0][0].count) == 2
    assert any((np.asarray(leaf) != old).any() for leaf, old in zip(jax.tree.leaves(params), before, strict=False))


def wide_layers(seed: int) -> list[Tree]:
    """One tensor of whole blocks, one that is not, and one that is kept in float32."""
    rng = np.random.default_rng(seed)
    shapes = {"a": (32, 256), "b": (70, 80), "c": (8, 8)}
    return [
        {
            name: one_device().put(rng.standard_normal(shape).astype(np.float32), "device")
            for name, shape in shapes.items()
        }
    ]


def test_8_bit_moments_take_a_quarter() -> None:
    params = large_layers(0)
    sizes = {
        optim: sum(
            leaf.nbytes for leaf in jax.tree.leaves(AdamW(settings(optim=optim), params, "host").moments[0][0].mu["a"])
        )
        for optim in ("paged_adamw_32bit", "paged_adamw_8bit")
    }
    assert sizes["paged_adamw_8bit"] == 70 * 80 + 4 * 22
    assert sizes["paged_adamw_32bit"] == 4 * 70 * 80


def test_no_clipping_when_max_grad_norm_is_zero() -> None:
    runs = []
    for max_norm in (0.0, 1e9):
        params = random_layers(0)
        runs.append(
            AdamW(settings(max_grad_norm=max_norm), params, "device").update(params, gradients(random_layers(1)), 1e-2)[
                0
            ]
        )
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
