"""A step's functions are compiled once: what was compiled ahead of it is what it calls."""

import logging
import re

import jax
import numpy as np
import pytest

from benchmarks.step import random_weights
from qlora_jax.config import LoraSettings, QuantizationSettings, TrainingSettings
from qlora_jax.data import Batch
from qlora_jax.engine import optimizer
from qlora_jax.engine.compiled_memory import Ahead, StepShapes
from qlora_jax.engine.optimizer import AdamW
from qlora_jax.planning.estimate import Job, Layout
from qlora_jax.planning.search import keeps, make_engine
from tests.helpers.tiny import shape_of


@pytest.mark.parametrize(("micro_batches", "dropout"), [(1, 0.0), (2, 0.1)])
def test_a_step_compiles_none_of_its_large_functions(
    caplog: pytest.LogCaptureFixture, micro_batches: int, dropout: float
) -> None:
    """With layers of both kinds, also the first one; after a start that has compiled them while the weights were loaded."""
    config = shape_of(264, 64, 128, 3, 4, 2, 16, 1e-5 * (1 + micro_batches))  # compiled by no other test
    lora = LoraSettings(r=4, lora_dropout=dropout)
    job = Job(config, lora, QuantizationSettings(), "paged_adamw_8bit", 2, 32, micro_batches, "float32", "xla")
    layout = Layout(3, keep=1)
    settings = TrainingSettings(output_dir="unused", optim=job.optim, weight_decay=0.01 * micro_batches)
    engine = make_engine(job, layout)
    shapes = StepShapes(engine, job.rows, job.length, micro_batches=micro_batches)
    update = optimizer.lowered(settings, shapes.adapter, shapes.gradients, shapes.array(dtype=np.float32))
    Ahead(shapes, keeps(job, layout), update).wait()
    weights, adapters = random_weights(engine, ["device"] * 3, 3, 3), engine.init_adapters(0)
    ids = np.ones((micro_batches, 2, 32), np.int32)
    batch = Batch(ids, ids, num_tokens=ids.size, num_input_tokens=ids.size)
    key = jax.device_put(jax.random.key(0), engine._numbers[0].sharding) if dropout else None
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        rule = AdamW(settings, adapters, "device")
        loss, grads = engine.value_and_grad(weights, adapters, batch, key)
        rule.update(adapters, grads, 1e-3, loss=loss)
    compiled = re.findall(r"Compiling (?:jit\()?(\w+)", caplog.text)
    assert not set(compiled) & {
        "forward", "backward", "backward_first", "forward_keeping", "backward_kept", "backward_kept_first", "loss_and_grad",
        "finish", "_update", "_init",
    }  # fmt: skip
    assert "embed" in compiled, "or this shows nothing"
