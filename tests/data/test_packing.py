"""Packed rows through the engine: the same loss and gradients as alone.

On a GPU too: `JAX_PLATFORMS=cuda python -m pytest tests/data/test_packing.py`.
"""

import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml

from convert.files.folder import ModelFolder
from convert.load import load_weights, read_config
from qlora_jax.commands import train
from qlora_jax.config import LoraSettings, QuantizationSettings
from qlora_jax.data import IGNORED_LABEL, Batch
from qlora_jax.data.chat.templates import CHATML
from qlora_jax.engine.engine import Adapters, Engine, Weights
from qlora_jax.model.attention import default_attention
from qlora_jax.model.vocabulary import add_noise
from qlora_jax.runtime.placement import one_device
from tests.helpers import tiny

LENGTH = 64
ROWS = [[20, 31, 13], [1, 40, 2, 7]]
"""Lengths of the rows packed into one; the second leaves padding."""
ALONE = {jnp.float32: 1e-5, jnp.bfloat16: 2e-2}
"""Relative, in the Euclidean norm, by compute dtype: the same sums in another order through two layers and back, and in bfloat16
(2⁻⁹ a rounding) some 25 roundings of the hidden states with other neighbours."""
CUDNN = jax.default_backend() == "gpu"


def make(folder: Path, dtype: jax.typing.DTypeLike, alpha: float = 0.0) -> tuple[Engine, Weights, Adapters]:
    """Adapters whose B is not zero, so that every gradient is alive."""
    model, quantization = ModelFolder(folder), QuantizationSettings()
    config = read_config(model)
    engine = Engine(
        config,
        LoraSettings(r=4, lora_dropout=0.0),
        quantization,
        compute_dtype=dtype,
        attention=default_attention(dtype, config.head_dim),
        neftune_noise_alpha=alpha,
    )
    rng = np.random.default_rng(1)
    adapters = jax.tree.map(
        lambda a: one_device().put(np.asarray(a) + 0.05 * rng.standard_normal(a.shape).astype(np.float32), "device"),
        engine.init_adapters(0),
    )
    return engine, load_weights(model, config, quantization, "device"), adapters


def make_rows() -> list[tuple[np.ndarray, np.ndarray]]:
    """(input ids, labels) of each row; the first token has no label, half of the others have none."""
    rng = np.random.default_rng(0)
    rows = []
    for length in (length for lengths in ROWS for length in lengths):
        ids = rng.integers(0, 256, length).astype(np.int32)
        labels = np.where(rng.random(length) < 0.5, ids, IGNORED_LABEL).astype(np.int32)
        labels[0] = IGNORED_LABEL
        rows.append((ids, labels))
    return rows


def batch_of(shape: tuple[int, int], layout: list[list[tuple[np.ndarray, np.ndarray]]]) -> Batch:
    """A batch whose line i holds the rows layout[i], one after another."""
    ids = np.zeros((len(layout), LENGTH), np.int32)
    labels = np.full_like(ids, IGNORED_LABEL)
    positions, segments = np.zeros_like(ids), np.zeros_like(ids)
    for line, rows in enumerate(layout):
        start = 0
        for segment, (row_ids, row_labels) in enumerate(rows, start=1):
            here = np.s_[line, start : start + len(row_ids)]
            ids[here], labels[here], segments[here] = row_ids, row_labels, segment
            positions[here] = np.arange(len(row_ids))
            start += len(row_ids)
    arrays = [array.reshape(*shape, LENGTH) for array in (ids, labels, positions, segments)]
    num_tokens = int((labels != IGNORED_LABEL).sum())
    return Batch(*arrays[:2], num_tokens, sum(map(sum, ROWS)), *arrays[2:])


def without_packing(batch: Batch) -> Batch:
    return dataclasses.replace(batch, positions=None, segment_ids=None)


def packed_and_alone() -> tuple[Batch, Batch]:
    rows = iter(make_rows())
    layout = [[next(rows) for _ in lengths] for lengths in ROWS]
    return batch_of((1, 2), layout), without_packing(batch_of((7, 1), [[row] for row in make_rows()]))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_packed_rows_have_the_loss_and_gradients_they_have_alone(tiny_folder: Path, dtype: jnp.dtype) -> None:
    if dtype == jnp.bfloat16 and not CUDNN:
        pytest.skip("in bfloat16 this is cuDNN's test: it needs a GPU")
    engine, weights, adapters = make(tiny_folder, dtype)
    step_key = one_device().put(jax.random.key(0), "device")
    packed, alone = packed_and_alone()
    with jax.default_matmul_precision("highest"):  # else a GPU rounds float32 factors
        results = [
            engine.value_and_grad(weights, adapters, batch, step_key)
            for batch in (packed, alone, without_packing(packed))
        ]
        losses = [engine.loss(weights, adapters, [batch]) for batch in (packed, without_packing(packed))]
    (loss, grads), (expected_loss, expected), (contaminated_loss, contaminated) = results
    assert float(loss) == pytest.approx(float(expected_loss), rel=ALONE[dtype])
    assert losses[0] == pytest.approx(float(expected_loss), rel=ALONE[dtype])
    assert abs(float(contaminated_loss) - float(expected_loss)) > 1e-3 < abs(losses[1] - float(expected_loss))
    leaves = [jax.tree.leaves(tree) for tree in (grads, contaminated, expected)]
    for found, wrong, leaf in zip(*leaves, strict=True):
        scale = float(jnp.linalg.norm(leaf))
        assert float(jnp.linalg.norm(found - leaf)) <= ALONE[dtype] * scale
        assert float(jnp.linalg.norm(wrong - leaf)) > 2 * ALONE[dtype] * scale


def test_a_token_sees_nothing_of_another_row(tiny_folder: Path) -> None:
    """Exactly: other rows' tokens, changed, change no bit of a row's loss."""
    engine, weights, adapters = make(tiny_folder, jnp.float32)
    packed, _ = packed_and_alone()
    first = packed.segment_ids == 1
    labels = np.where(first, packed.labels, IGNORED_LABEL)
    others = np.where(first, packed.input_ids, (packed.input_ids + 7) % 256)
    one = dataclasses.replace(packed, labels=labels)
    two = dataclasses.replace(one, input_ids=others)
    assert engine.loss(weights, adapters, [one]) == engine.loss(weights, adapters, [two])
    contaminated = [engine.loss(weights, adapters, [without_packing(batch)]) for batch in (one, two)]
    assert contaminated[0] == contaminated[1], "the first row sees nothing of those after it in any case"
    last = packed.segment_ids == 3
    one = dataclasses.replace(packed, labels=np.where(last, packed.labels, IGNORED_LABEL))
    two = dataclasses.replace(one, input_ids=np.where(last, one.input_ids, (one.input_ids + 7) % 256))
    assert engine.loss(weights, adapters, [one]) == engine.loss(weights, adapters, [two])
    contaminated = [engine.loss(weights, adapters, [without_packing(batch)]) for batch in (one, two)]
    assert contaminated[0] != contaminated[1]


def test_neftune_is_as_in_transformers(tiny_folder: Path) -> None:
    """Uniform within alpha / sqrt(T·D), drawn anew by step and micro-batch; never in evaluation; dropout's masks are not its bits."""
    alpha, shape = 5.0, (2, 48, 64)
    noise = functools.partial(
        jax.jit(add_noise), one_device().put(np.zeros(shape, np.float32), "device"), np.float32(alpha)
    )
    draws = [noise(jax.random.key(seed), np.int32(m)) for seed, m in ((0, 0), (0, 1), (1, 0), (0, 0))]
    bound = alpha / (48 * 64) ** 0.5
    for draw in draws:
        assert float(jnp.abs(draw).max()) <= bound
        assert float(jnp.abs(draw).max()) > 0.99 * bound
        # Of n uniform numbers the mean's deviation is bound / sqrt(3 n): five of these.
        assert abs(float(draw.mean())) < 5 * bound / (3 * draw.size) ** 0.5
        assert float(draw.std()) == pytest.approx(bound / 3**0.5, rel=0.05)
    assert not bool((draws[0] == draws[1]).any()) and not bool((draws[0] == draws[2]).any())
    assert bool((draws[0] == draws[3]).all())

    noisy, weights, adapters = make(tiny_folder, jnp.float32, alpha)
    plain, _, _ = make(tiny_folder, jnp.float32)
    packed, alone = packed_and_alone()
    keys = [one_device().put(jax.random.key(seed), "device") for seed in (0, 0, 1)]
    losses = [float(noisy.value_and_grad(weights, adapters, packed, key)[0]) for key in keys]
    clean = float(plain.value_and_grad(weights, adapters, packed, keys[0])[0])
    assert losses[0] == losses[1] != losses[2]
    assert clean not in losses
    assert noisy.loss(weights, adapters, [packed]) == plain.loss(weights, adapters, [packed])
    assert losses[0] != pytest.approx(float(noisy.value_and_grad(weights, adapters, alone, keys[0])[0]), rel=1e-5)


def test_neftunes_bound_against_transformers() -> None:
    torch = pytest.importorskip("torch")
    from transformers.integrations.neftune import neftune_post_forward_hook

    module = torch.nn.Embedding(3, 64)
    module.neftune_noise_alpha = 5.0
    theirs = neftune_post_forward_hook(module, None, torch.zeros(2, 48, 64)).abs().max().item()
    ours = float(jnp.abs(add_noise(jnp.zeros((2, 48, 64)), jnp.float32(5), jax.random.key(0), jnp.int32(0))).max())
    assert ours == pytest.approx(theirs, rel=0.01)  # both are the largest of 6144 uniform draws below the same bound


def test_a_run_with_packing_and_a_chosen_template(tiny_folder: Path, tmp_path: Path) -> None:
    """Through train.py: fewer steps than rows, and the template that the model lacks beside the adapter and the merged model."""
    rows = tiny.write_chats(tmp_path / "train.jsonl", 24)
    settings = {
        "model": {"name_or_path": str(tiny_folder)},
        "lora": {"r": 4},
        "data": {
            "path": str(rows),
            "max_seq_length": 128,
            "packing": True,
            "chat_template": "chatml",
            "eval_fraction": 0.2,
        },
        "training": {
            "output_dir": str(tmp_path / "out"),
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": 2,
            "neftune_noise_alpha": 5,
            "num_train_epochs": 2,
            "export_merged": True,
        },
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    assert train.main(["--config", str(tmp_path / "run.yaml")]) == 0
    lines = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    steps = [record for record in map(json.loads, lines) if "loss" in record]
    assert len(steps) < 19 * 2 / 2, "several of the 19 rows share a line"
    assert steps[-1]["epoch"] == 2
    assert all(np.isfinite(record["loss"]) for record in steps)
    for folder in ("adapter", "merged"):
        assert (tmp_path / "out" / folder / "chat_template.jinja").read_text() == CHATML
