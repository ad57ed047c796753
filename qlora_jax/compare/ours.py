"""Our side: the engine, the optimizer and the schedules that train, with everything seen on the way kept."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from qlora_jax.compare.side import Side, Tensors, read_tensors
from qlora_jax.config import TrainingSettings
from qlora_jax.data import Batch
from qlora_jax.engine.engine import Adapters, Engine, Weights
from qlora_jax.engine.optimizer import AdamW
from qlora_jax.ops import nf4
from qlora_jax.runtime.placement import LayerPlace, LayerStore, Tree, one_device

PARTS = ("lora_a", "lora_b")


def linear_key(layer: int, name: str) -> str:
    """What a linear goes by in a comparison: `0.q_proj`."""
    return f"{layer}.{name}"


def adapter_tensors(adapters: Adapters) -> Tensors:
    """The engine's trees as arrays of numpy's own, by `LAYER.LINEAR.PART`."""
    return {
        f"{linear_key(layer, name)}.{part}": np.array(tree[name]["adapter"][part])
        for layer, tree in enumerate(adapters)
        for name in tree
        for part in PARTS
    }


def copy_adapters(adapters: Adapters) -> Adapters:
    """New arrays: the optimizer spends those it is given."""
    return [one_device().put(jax.tree.map(np.array, layer), "device") for layer in adapters]


def linears(weights: Weights) -> Iterator[tuple[str, nf4.QuantizedTensor]]:
    """Every 4-bit weight, layer by layer."""
    for layer, tree in weights.layers.walk(range(len(weights.layers))):
        for name, weight in _in_4_bits(tree).items():
            yield linear_key(layer, name), weight
        weights.layers.pace.dispatched(jnp.ravel(jax.tree.leaves(tree)[0])[0])


def _in_4_bits(layer: Tree) -> dict[str, nf4.QuantizedTensor]:
    """A layer's linears that are in 4 bits, by name."""
    weights = {name: module.get("weight") for name, module in layer.items()}
    return {name: weight for name, weight in weights.items() if isinstance(weight, nf4.QuantizedTensor)}


def read_quantized(folder: Path, key: str, like: nf4.QuantizedTensor, dtype: str) -> nf4.QuantizedTensor:
    """A linear as the reference quantized it, to be dequantized to `dtype`; shape and type are those of our own, `like`."""
    tensors = read_tensors(folder / f"weights-{key}.safetensors")
    offset = tensors["nested_offset"].reshape(()) if "nested_offset" in tensors else None
    return nf4.QuantizedTensor(
        tensors["codes"], tensors["absmax"], tensors.get("nested_absmax"), offset, like.shape, like.quant_type, dtype
    )


def with_reference_bytes(weights: Weights, folder: Path, dtype: str, where: LayerPlace) -> Weights:
    """Our model with the reference's codes and scales in the place of our own.

    Args:
        folder: of a reference run with the stage `weights`.
        dtype: what the reference dequantizes to in its computation.
    """

    def layers() -> Iterator[Tree]:
        for layer, tree in weights.layers.walk(range(len(weights.layers))):
            yield tree | {
                name: tree[name] | {"weight": read_quantized(folder, linear_key(layer, name), weight, dtype)}
                for name, weight in _in_4_bits(tree).items()
            }
            weights.layers.pace.dispatched(jnp.ravel(jax.tree.leaves(tree)[0])[0])

    return Weights(weights.embedding, LayerStore(layers(), where), weights.head)


@contextlib.contextmanager
def exact_matmuls(engine: Engine) -> Iterator[None]:
    """float32 products in float32: a GPU would round their factors to TF32. bfloat16 is left as it trains."""
    with jax.default_matmul_precision("highest" if engine.compute_dtype == jnp.float32 else None):
        yield


def forward(engine: Engine, weights: Weights, adapters: Adapters, batch: Batch) -> Side:
    """Hidden states, logits and loss of one batch."""
    with exact_matmuls(engine):
        states = engine.hidden_states(weights, adapters, one_device().put(batch.input_ids[0], "device"))
        hidden = [np.asarray(h, np.float32) for h in states]
        logits = np.asarray(engine.logits(weights, adapters, batch.input_ids[0]))
        return Side(engine.loss(weights, adapters, [batch]), hidden, logits)


def gradients(engine: Engine, weights: Weights, adapters: Adapters, batch: Batch) -> Tensors:
    """Of one batch's loss."""
    with exact_matmuls(engine):
        _, grads = engine.value_and_grad(weights, adapters, batch, one_device().put(jax.random.key(0), "device"))
    return adapter_tensors(grads.layers)


def train(
    engine: Engine,
    weights: Weights,
    adapters: Adapters,
    batches: Sequence[Batch],
    *,
    settings: TrainingSettings,
    learning_rates: Sequence[float],
    advance: Callable[[], object] = lambda: None,
) -> tuple[list[float], Adapters]:
    """One optimizer step a batch: (the loss before each, the adapters after the last); those given are kept."""
    adapters, losses = copy_adapters(adapters), []
    optimizer, key = AdamW(settings, adapters, "device"), one_device().put(jax.random.key(settings.seed), "device")
    with exact_matmuls(engine):
        for batch, rate in zip(batches, learning_rates, strict=True):
            loss, grads = engine.value_and_grad(weights, adapters, batch, key)
            adapters, _ = optimizer.update(adapters, grads, rate)
            losses.append(float(loss))
            advance()
    return losses, adapters


def evaluate(engine: Engine, weights: Weights, adapters: Adapters, batches: Sequence[Batch]) -> float:
    """Mean loss over all supervised tokens."""
    with exact_matmuls(engine):
        return engine.loss(weights, adapters, batches)
