"""The two walks: against jax.grad through the whole model, and the same bits wherever things live."""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from convert.files.folder import ModelFolder
from convert.load import load_weights, read_config
from qlora_jax.config import LoraSettings, QuantizationSettings, TrainingSettings
from qlora_jax.data import Batch
from qlora_jax.engine import layer_program
from qlora_jax.engine.engine import Adapters, Engine, Gradients, Weights
from qlora_jax.engine.layer_program import Context
from qlora_jax.engine.optimizer import AdamW
from qlora_jax.model.decoder import DecoderLayer
from qlora_jax.model.loss import cross_entropy, shift
from qlora_jax.model.vocabulary import Embedding, Head
from qlora_jax.runtime import pinned, placement
from qlora_jax.runtime.placement import SLOTS, LayerStore, Where, one_device, spread
from tests.helpers import tiny

QUANTIZATION = QuantizationSettings()
LORA = LoraSettings(r=4, lora_dropout=0.1)
NO_DROPOUT = LoraSettings(r=4, lora_dropout=0.0)
FLOAT32_SUM = 1e-5
"""Relative: two orders of a few thousand float32 additions differ by about sqrt(n) half-ulps of 6e-8."""


@pytest.fixture(scope="module")
def deep_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_model(tmp_path_factory.mktemp("deep") / "model", num_hidden_layers=4, tie_word_embeddings=False)


def make(
    folder: Path,
    weights: Where = "device",
    activations: Where = "device",
    lora: LoraSettings = LORA,
    **options: Any,
) -> tuple[Engine, Weights]:
    model = ModelFolder(folder)
    config = read_config(model)
    engine = Engine(config, lora, QUANTIZATION, compute_dtype=jnp.float32, activations=activations, **options)
    return engine, load_weights(model, config, QUANTIZATION, weights)


def make_batch(micro_batches: int, rows: int, length: int = 24, seed: int = 0) -> Batch:
    """Random ids; half of the labels count, and the first row has fewer than the others."""
    rng = np.random.default_rng(seed)
    shape = (micro_batches * rows, length)
    ids = rng.integers(0, 256, shape).astype(np.int32)
    labels = np.where(rng.random(shape) < 0.5, ids, -100).astype(np.int32)
    labels[0, 4:] = -100
    shape = (micro_batches, rows, length)
    return Batch(ids.reshape(shape), labels.reshape(shape), int((labels[:, 1:] != -100).sum()), ids.size)


def moved(adapters: Adapters, seed: int = 1) -> Adapters:
    """Adapters whose B is not zero, so that every gradient is alive."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda a: one_device().put(np.asarray(a) + 0.05 * rng.standard_normal(a.shape).astype(np.float32), "device"),
        adapters,
    )


def key(seed: int) -> jax.Array:
    return one_device().put(jax.random.key(seed), "device")


def whole_model_loss(
    engine: Engine, weights: Weights, batch: Batch, dropout_key: jax.Array, adapters: Adapters
) -> jax.Array:
    """The plain formula: one function through all layers and micro-batches, no chunks, no recomputation. Both are scanned, to be compiled
    once."""
    config = engine.config
    make_layer = functools.partial(DecoderLayer, config, engine.lora, QUANTIZATION, "xla")
    layer_def = nnx.graphdef(nnx.eval_shape(lambda: make_layer(nnx.Rngs(0))))
    head = nnx.merge(nnx.graphdef(nnx.eval_shape(lambda: Head(config, nnx.Rngs(0)))), weights.head)
    embedding = nnx.merge(nnx.graphdef(nnx.eval_shape(lambda: Embedding(config, nnx.Rngs(0)))), weights.embedding)
    numbers = jnp.arange(config.num_hidden_layers)
    frozen = [layer for _, layer in weights.layers.walk(range(config.num_hidden_layers))]
    layers = (numbers, stacked(adapters), stacked(frozen))

    def loss(micro_batch: tuple[jax.Array, ...]) -> jax.Array:
        m, ids, labels = micro_batch
        positions = jnp.broadcast_to(jnp.arange(ids.shape[1])[None], ids.shape)

        def run(h: jax.Array, layer: tuple[Any, ...]) -> tuple[jax.Array, None]:
            i, adapter, frozen = layer
            layer_key = jax.random.fold_in(jax.random.fold_in(dropout_key, i), m)
            return nnx.merge(layer_def, adapter, frozen)(h, positions, layer_key), None

        h, _ = jax.lax.scan(run, embedding(ids, jnp.float32), layers)
        return cross_entropy(head, h.reshape(-1, h.shape[-1]), shift(labels).reshape(-1))[0]

    micro_batches = (jnp.arange(len(batch.labels)), jnp.asarray(batch.input_ids), jnp.asarray(batch.labels))
    return jax.lax.map(loss, micro_batches).sum() / batch.num_tokens


def stacked(trees: Sequence[Any]) -> Any:
    """One tree, with a first axis for its leaves."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_gradients_equal_jax_grad_through_the_whole_model(deep_folder: Path, micro_batches: int) -> None:
    engine, weights = make(deep_folder, weights="host", activations="host")
    adapters, batch = moved(engine.init_adapters(0)), make_batch(micro_batches, 2)
    loss, grads = engine.value_and_grad(weights, adapters, batch, key(7))
    oracle = functools.partial(whole_model_loss, engine, weights, batch, key(7))
    expected_loss, expected = jax.jit(jax.value_and_grad(oracle))(adapters)
    assert float(loss) == pytest.approx(float(expected_loss), rel=FLOAT32_SUM)
    for path, leaf in jax.tree_util.tree_leaves_with_path(expected):
        found = functools.reduce(
            lambda tree, step: tree[getattr(step, "idx", getattr(step, "key", None))], path, grads.layers
        )
        scale = float(jnp.abs(leaf).max())
        assert scale > 0, path
        assert float(jnp.abs(found - leaf).max()) <= FLOAT32_SUM * scale, path


def train(
    folder: Path,
    batches: list[Batch],
    *,
    weights: Where = "device",
    optimizer: Where = "device",
    slots: int = SLOTS,
    **places: Any,
) -> tuple[list[float], Adapters]:
    engine, base = make(folder, weights, **places)
    base.layers.pace.slots = slots
    adapters = engine.init_adapters(0)
    settings = TrainingSettings(output_dir=Path("unused"), learning_rate=1e-2, max_grad_norm=0.3)
    rule = AdamW(settings, adapters, optimizer)
    losses = []
    for step, batch in enumerate(batches):
        with jax.transfer_guard("allow" if step == 0 else "disallow"):  # compiling may move constants
            step_key = key(step) if step == 0 else KEYS[step]
            loss, grads = engine.value_and_grad(base, adapters, batch, step_key)
            assert all(one_device().lives(layer, engine.adapters) for layer in (*grads.layers, *adapters))
            adapters, _ = rule.update(adapters, grads, settings.learning_rate)
        losses.append(float(loss))
    return losses, adapters


KEYS = [key(step) for step in range(5)]


def test_the_same_bits_wherever_things_live(deep_folder: Path) -> None:
    """Five steps with dropout and two micro-batches, under the transfer guard."""
    batches = [make_batch(2, 2, seed=step) for step in range(5)]
    losses, adapters = train(deep_folder, batches)
    assert losses[-1] < losses[0]
    everything: dict[str, Any] = {"weights": "host", "activations": "host", "adapters": "host", "optimizer": "host"}
    for other in (*({name: "host"} for name in everything), everything, {**everything, "slots": 2}, {"slots": 5}):
        other_losses, other_adapters = train(deep_folder, batches, **other)
        assert other_losses == losses, other
        same = jax.tree.map(lambda a, b: bool((np.asarray(a) == np.asarray(b)).all()), adapters, other_adapters)
        assert all(jax.tree.leaves(same)), other


def test_adapters_in_16_bits(deep_folder: Path) -> None:
    """The same bits wherever they live, and within bfloat16's rounding of the float32 run: after one step of Adam, whose update is lr."""
    half = LoraSettings(r=4, lora_dropout=0.0, dtype="bfloat16")
    batches = [make_batch(2, 2, seed=step) for step in range(3)]
    losses, adapters = train(deep_folder, batches, lora=half)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(adapters)} == {"bfloat16"}
    again, elsewhere = train(deep_folder, batches, lora=half, weights="host", adapters="host", optimizer="host")
    assert again == losses
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((np.asarray(a) == np.asarray(b)).all()), adapters, elsewhere))
    full_losses, _ = train(deep_folder, batches, lora=NO_DROPOUT)
    assert losses == pytest.approx(full_losses, rel=2**-7)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("slots", [2, 3])
def test_no_more_streamed_layers_on_the_device_than_slots(deep_folder: Path, slots: int) -> None:
    engine, weights = make(deep_folder, "host", adapters="host", lora=NO_DROPOUT)
    weights.layers.pace.slots = slots
    codes = engine.abstract_layer["gate_proj"]["weight"].codes
    device, most = one_device().sharding("device"), 0
    put_before = placement.jax.device_put

    def counting(tree: Any, target: Any) -> Any:
        nonlocal most
        new = put_before(tree, target)
        mlp = [
            a for a in jax.live_arrays() if a.sharding == device and (a.shape, a.dtype) == (codes.shape, codes.dtype)
        ]
        most = max(most, len(mlp) // 3)  # gate_proj, up_proj and down_proj
        return new

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(placement.jax, "device_put", counting)
        engine.value_and_grad(weights, engine.init_adapters(0), make_batch(2, 2), key(0))
    assert (
        most == 2
    )  # Python's: one to be dispatched, one arriving. With three slots the device may hold one more, at work.


def assert_close(found: tuple[jax.Array, Gradients], expected: tuple[jax.Array, Gradients]) -> None:
    assert float(found[0]) == pytest.approx(float(expected[0]), rel=FLOAT32_SUM)
    for one, other in zip(jax.tree.leaves(found[1].layers), jax.tree.leaves(expected[1].layers), strict=True):
        assert float(jnp.abs(one - other).max()) <= FLOAT32_SUM * float(jnp.abs(other).max())


@pytest.mark.parametrize("keep", [1, 3, 4])
@pytest.mark.parametrize("weights", ["device", "host"])
def test_layers_that_keep_their_intermediates(deep_folder: Path, keep: int, weights: Where) -> None:
    """Without running a layer again: the same gradients, dropout included, and still nothing of a streamed layer kept."""
    engine, base = make(deep_folder, weights)
    adapters, batch = moved(engine.init_adapters(0)), make_batch(2, 2)
    expected = engine.value_and_grad(base, adapters, batch, key(0))
    keeping, base = make(deep_folder, weights, keep=keep)
    before = layer_program._backward_saved._cache_size()
    found = keeping.value_and_grad(base, adapters, batch, key(0))
    assert layer_program._backward_saved._cache_size() <= before + 1
    assert list(base.layers.fetched) == fetches(base.layers.places)
    assert_close(found, expected)


def test_what_a_layer_keeps(deep_folder: Path) -> None:
    """Attention's inputs and output, the residual stream after it, SwiGLU's two inputs, R a token for each adapter, those of one input
    together; nothing of a weight."""
    engine, weights = make(deep_folder, lora=NO_DROPOUT)
    (_, frozen), adapter = next(weights.layers.walk([0])), engine.init_adapters(0)[0]
    config, rows, length, rank = engine.config, 2, 24, LORA.r
    h = one_device().put(np.ones((rows, length, config.hidden_size), np.float32), "device")
    *_, saved = engine.program(0, saves=True).forward(
        adapter, frozen, h, Context(None, engine._numbers[0], engine._numbers[0], None)
    )
    elements = [
        array.size for array in saved.arrays if array.ndim and array.shape[-2:] not in ((length, length), (length, 1))
    ]
    elements.remove(
        rows * length
    )  # positions; the rest left out is XLA's attention, which keeps [T, T] where cuDNN's keeps [T]
    heads, kv_heads = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    a_token = [heads, kv_heads, kv_heads, heads, config.hidden_size, *[config.intermediate_size] * 2]
    a_token += [3 * rank, rank, 2 * rank, rank]
    elements.remove(config.head_dim // 2)  # rotary position embedding's frequencies
    assert sorted(elements) == sorted(rows * length * size for size in a_token)


def test_the_mlp_in_chunks(deep_folder: Path) -> None:
    """Chunks change neither the gradients nor the dropout masks, whichever way weights are dequantized; the last one is not full."""
    engine, weights = make(deep_folder)
    adapters, batch = moved(engine.init_adapters(0)), make_batch(2, 2)
    expected = engine.value_and_grad(weights, adapters, batch, key(0))
    # All 48 tokens in one chunk are the above, but for the weights.
    for mlp_tokens, share_dense in ((48, False), (17, True), (17, False), (10, True), (10, False)):
        chunked, _ = make(deep_folder, mlp_tokens=mlp_tokens, share_dense=share_dense)
        assert_close(chunked.value_and_grad(weights, adapters, batch, key(0)), expected)
    keeping, _ = make(deep_folder, mlp_tokens=17, keep=2)
    assert_close(keeping.value_and_grad(weights, adapters, batch, key(0)), expected)


def fetches(places: list[str]) -> list[int]:
    """Up and down again; the streamed layer nearest the turn waits there."""
    streamed = [i for i, place in enumerate(places) if place != "device"]
    return [*streamed, *reversed(streamed[:-1])]


def test_the_same_bits_from_disk_and_among_resident_layers(deep_folder: Path) -> None:
    engine, base = make(deep_folder, weights="device")
    layers = [jax.tree.map(np.asarray, layer) for _, layer in base.layers.walk(range(4))]
    adapters, batch = moved(engine.init_adapters(0)), make_batch(2, 2)
    expected = engine.value_and_grad(base, adapters, batch, key(0))
    for places in (spread(1, 4), spread(2, 4), ["disk"] * 4, ["disk", "device", "host", "disk"]):
        sources = [(lambda tree=tree: tree) if p == "disk" else tree for tree, p in zip(layers, places, strict=True)]
        weights = dataclasses.replace(base, layers=LayerStore(sources, places))
        found = engine.value_and_grad(weights, adapters, batch, key(0))
        assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), found, expected)), places
        assert list(weights.layers.fetched) == fetches(places)


def test_the_same_bits_from_memory_of_our_own(deep_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Host layers that are numpy's arrays, as on a GPU whose driver registers them: training and evaluation."""
    engine, base = make(deep_folder, weights="device")
    layers = [jax.tree.map(np.asarray, layer) for _, layer in base.layers.walk(range(4))]
    driver = SimpleNamespace(dma_map=lambda address, size: None, dma_unmap=lambda address: None)
    monkeypatch.setattr(pinned, "client", lambda: driver)
    adapters, batch, held_out = moved(engine.init_adapters(0)), make_batch(2, 2), [make_batch(1, 2, seed=1)]
    expected = engine.value_and_grad(base, adapters, batch, key(0)), engine.loss(base, adapters, held_out)
    for places in (["host"] * 4, spread(2, 4)):
        weights = dataclasses.replace(base, layers=LayerStore(layers, places))
        ours = [layer for layer, place in zip(weights.layers._layers, places, strict=True) if place == "host"]
        assert all(map(pinned.holds, jax.tree.leaves(ours)))
        draw = key(0)
        with jax.transfer_guard("disallow"):
            gradient = engine.value_and_grad(weights, adapters, batch, draw)
        found = gradient, engine.loss(weights, adapters, held_out)
        assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), found[0], expected[0])), places
        assert found[1] == expected[1]


def test_the_schedule_of_fetches(deep_folder: Path) -> None:
    engine, weights = make(deep_folder, weights="host", lora=NO_DROPOUT)
    engine.value_and_grad(weights, engine.init_adapters(0), make_batch(3, 2), key(0))
    assert list(weights.layers.fetched) == [0, 1, 2, 3, 2, 1, 0]  # whatever the number of micro-batches
    weights.layers.fetched.clear()
    engine.loss(weights, engine.init_adapters(0), [make_batch(1, 2)])
    assert list(weights.layers.fetched) == [0, 1, 2, 3]


def test_the_loss_does_not_depend_on_the_cut_into_micro_batches(deep_folder: Path) -> None:
    engine, weights = make(deep_folder, lora=NO_DROPOUT)
    adapters = moved(engine.init_adapters(0))
    whole = make_batch(1, 8)
    results = []
    for shape in ((1, 8), (2, 4), (4, 2)):
        ids, labels = (array.reshape(*shape, -1) for array in (whole.input_ids, whole.labels))
        results.append(engine.value_and_grad(weights, adapters, Batch(ids, labels, whole.num_tokens, ids.size), key(0)))
    for result in results[1:]:
        assert_close(result, results[0])


def test_dropout_is_drawn_anew_by_step_layer_and_micro_batch(deep_folder: Path) -> None:
    engine, weights = make(deep_folder, lora=LORA)
    adapters = moved(engine.init_adapters(0))
    same_rows = make_batch(1, 2)
    twice = Batch(
        *(np.concatenate([array, array]) for array in (same_rows.input_ids, same_rows.labels)),
        2 * same_rows.num_tokens,
        0,
    )
    losses = [
        float(engine.value_and_grad(weights, adapters, batch, key(seed))[0])
        for batch, seed in ((twice, 0), (twice, 0), (twice, 1))
    ]
    assert losses[0] == losses[1] != losses[2]
    alone = float(engine.value_and_grad(weights, adapters, same_rows, key(0))[0])
    assert losses[0] != pytest.approx(alone, rel=1e-4)  # the second micro-batch had masks of its own


def test_one_compilation_serves_every_layer(deep_folder: Path, tiny_folder: Path) -> None:
    """Compile time does not grow with depth: the layer functions are compiled once, for 2 layers as for 4."""
    functions = (layer_program._forward, layer_program._backward)
    for folder, depth in ((tiny_folder, 2), (deep_folder, 4)):
        engine, weights = make(folder, lora=NO_DROPOUT)
        assert len(weights.layers) == depth
        before = [function._cache_size() for function in functions]
        engine.value_and_grad(weights, engine.init_adapters(0), make_batch(2, 2, length=23), key(0))
        assert [function._cache_size() for function in functions] == [size + 1 for size in before]


def test_fresh_adapters_change_nothing_and_follow_their_seed(deep_folder: Path) -> None:
    engine, weights = make(deep_folder)
    ids = make_batch(1, 2).input_ids[0]
    first, same, other = (engine.init_adapters(seed) for seed in (0, 0, 1))
    lora_a = [adapters[1]["q_proj"]["adapter"]["lora_a"] for adapters in (first, same, other)]
    assert bool((lora_a[0] == lora_a[1]).all())
    assert not bool((lora_a[0] == lora_a[2]).any())
    # With B at zero A has no say: exactly, because both calls run the same compiled function.
    assert bool((engine.logits(weights, first, ids) == engine.logits(weights, other, ids)).all())
    bare = Engine(engine.config, None, QUANTIZATION, compute_dtype=jnp.float32).logits(weights, [{}] * 4, ids)
    assert float(jnp.abs(engine.logits(weights, first, ids) - bare).max()) <= FLOAT32_SUM * float(jnp.abs(bare).max())
