"""Training here is training in PyTorch: the same adapter, batches and settings give the same losses, and adapters change sides."""

import argparse
from pathlib import Path
from typing import Any

import pytest

from benchmarks.parity import CURVE_BOUND, Parity, relative
from qlora_jax.compare import ours
from tests.helpers import tiny

STEPS = 6
ARITHMETIC = 1e-5
"""Relative, of a loss on the same bytes: float32 sums in another order, through two layers and AdamW's division, six times."""


@pytest.fixture(scope="module")
def parity(tmp_path_factory: pytest.TempPathFactory) -> tuple[Parity, dict[str, Any]]:
    """The committed benchmark on a tiny model: both sides trained, both adapters evaluated on both sides."""
    for library in ("torch", "bitsandbytes", "peft"):
        pytest.importorskip(library)
    work = tmp_path_factory.mktemp("parity")
    folder = tiny.write_model(work / "model", tie_word_embeddings=False)
    options = argparse.Namespace(model=str(folder), dtype="float32", steps=STEPS, rows=2, max_seq_length=96)
    made = Parity(options, Path(work))
    return made, made.run()


def test_the_loss_curves_are_the_same(parity: tuple[Parity, dict[str, Any]]) -> None:
    _, result = parity
    assert all(len(losses) == STEPS for losses in result["losses"].values())
    assert result["losses"]["ours"][-1] < result["losses"]["ours"][0]
    assert result["largest_relative_difference_of_a_step"] < CURVE_BOUND["float32"]
    assert result["the_same_on_bitsandbytes_bytes"] < ARITHMETIC
    assert result["holds"]


def test_adapters_change_sides(parity: tuple[Parity, dict[str, Any]]) -> None:
    """Each side's adapter, read by the other, is as good there; and both are better than the one they began with."""
    _, result = parity
    before, *after = (result["held_out_loss"][name] for name in ("before", "our adapter", "their adapter"))
    assert relative(before["ours"], before["theirs"]) < CURVE_BOUND["float32"]
    for sides in after:
        assert relative(sides["ours"], sides["theirs"]) < CURVE_BOUND["float32"]
        assert sides["ours"] < before["ours"]
    gained = before["ours"] - after[0]["ours"]
    assert abs(after[0]["ours"] - after[0]["theirs"]) < 0.01 * gained  # so an adapter that was not applied would show


@pytest.mark.parametrize(
    "change", [{"adam_beta1": 0.5}, {"max_grad_norm": 0.01, "adam_epsilon": 1e-3}, {"weight_decay": 20.0}], ids=str
)
def test_another_setting_gives_another_curve(parity: tuple[Parity, dict[str, Any]], change: dict[str, float]) -> None:
    """What the test above would miss is less than any of these."""
    made, result = parity
    engine, weights, start = made.prepare()
    shared = ours.with_reference_bytes(weights, made.work / "theirs", "float32", "device")
    settings = made.config.training.model_copy(update=change)
    losses, _ = ours.train(engine, shared, start, made.batches, settings=settings, learning_rates=made.rates)
    assert max(map(relative, losses, result["losses"]["theirs"])) > 10 * ARITHMETIC
