"""The two walks over the layers: how a model bigger than the device is trained on it.

A decoder layer is a pure function of its frozen weights, its adapter and the hidden states. It is compiled once and called for every
layer, so compile time does not grow with depth. A step is two walks:

    forward    for layer 0 … L-1:  keep the layer's inputs;  h ← layer(weights[l], adapters[l], h)
    head       the loss, and dh while the logits are at hand, in chunks over tokens
    backward   for layer L-1 … 0:  run the layer again from its kept inputs, and take from that d_adapters[l] and the dh below

Nothing of a layer outlives its turn but its inputs ([B, T, D] in the compute dtype) and its adapter's gradient. In particular no
dequantized weight does: it exists inside the compiled layer only, shared there by the recomputed forward and dX.

Where a layer's weights live is not the engine's business. It asks a `LayerStore` to walk 0 … L-1, L-1 … 0, and each layer is on the
device when its turn comes: because it lives there, or because its copy was started a layer ago. Both give the same bits.

With gradient accumulation the layers are the outer loop and the micro-batches the inner one. The weights then cross the bus twice a step
however many micro-batches it has; the price is that the inputs of all micro-batches are kept.

A Python loop rather than one jitted scan: dispatch runs ahead of the device and costs 0.4 % at 70B, while a scan over weights on the host
does not overlap their copies with compute at all (measured on an H200: 0.397 s against 0.224 s for 12 layers).
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from qlora_jax.config import LoraSettings, QuantizationSettings
from qlora_jax.data import Batch
from qlora_jax.llama import Attention, Cache, DecoderLayer, Embedding, Head, LlamaConfig
from qlora_jax.loss import chunked_loss, chunked_loss_and_grad
from qlora_jax.placement import LayerInputs, LayerStore, Tree, Where, put

Adapters = list[
    Tree
]  # one tree a layer: {"q_proj": {"adapter": {"lora_a": [R, in], "lora_b": [out, R]}}, ...}, float32, on the device


@dataclasses.dataclass(frozen=True)
class Weights:
    """The frozen base model: plain trees, as `Engine.abstract` describes them."""

    embedding: Tree
    layers: LayerStore
    head: Tree


class Engine:
    """Compiled functions of one model shape: loss, gradients and decoding over weights that live anywhere.

    Args:
        config: the model's shape.
        lora: the adapters, or None for the base model alone.
        quantization: how the weights were quantized.
        compute_dtype: of hidden states and matmuls.
        attention: jax's implementation, see `default_attention`.
        activations: where kept layer inputs live.
    """

    def __init__(
        self,
        config: LlamaConfig,
        lora: LoraSettings | None,
        quantization: QuantizationSettings,
        *,
        compute_dtype: jax.typing.DTypeLike,
        attention: Attention = "xla",
        activations: Where = "device",
    ) -> None:
        self.config, self.lora, self.activations = config, lora, activations
        self.compute_dtype = jnp.dtype(compute_dtype)
        self._make_layer = lambda rngs: DecoderLayer(config, lora, quantization, attention, rngs)
        self._layer_def, self.abstract_adapter, self.abstract_layer = _describe(self._make_layer)
        self._embedding_def, _, self.abstract_embedding = _describe(lambda rngs: Embedding(config, rngs))
        self._head_def, _, self.abstract_head = _describe(lambda rngs: Head(config, rngs))
        self._numbers = [put(np.int32(i), "device") for i in range(config.num_hidden_layers)]

    def init_adapters(self, seed: int) -> Adapters:
        """Fresh adapters: A uniform, B zero, reproducible from the seed."""
        make = jax.jit(lambda key: nnx.to_pure_dict(nnx.split(self._make_layer(nnx.Rngs(key)), nnx.LoRAParam, ...)[1]))
        keys = jax.random.split(jax.random.key(seed), self.config.num_hidden_layers)
        return [put(make(key), "device") for key in keys]

    def value_and_grad(
        self, weights: Weights, adapters: Adapters, batch: Batch, key: jax.Array
    ) -> tuple[jax.Array, Adapters]:
        """The loss of one optimizer step and its gradient with respect to the adapters.

        The loss is the sum over supervised tokens of all micro-batches, divided by their number. `key` draws the dropout masks, which
        depend on layer and micro-batch but not on where anything lives.

        Returns:
            (loss, float32 scalar; gradients, shaped as `adapters`)
        """
        micro_batches = _micro_batches(batch)
        token_weight = put(np.float32(1 / max(batch.num_tokens, 1)), "device")
        depth = len(weights.layers)
        walk = weights.layers.walk([*range(depth), *reversed(range(depth))])
        hidden = [self._embed(weights.embedding, input_ids) for input_ids, _ in micro_batches]
        kept = LayerInputs(self.activations)
        for _ in range(depth):
            layer, frozen = next(walk)
            kept.push(hidden)
            for m, h in enumerate(hidden):
                hidden[m], token = self._forward(adapters[layer], frozen, h, key, self._numbers[layer], self._number(m))
            weights.layers.used(token)
            del frozen, h
        head = [
            self._loss_and_grad(weights.head, h, labels, token_weight)
            for h, (_, labels) in zip(hidden, micro_batches, strict=True)
        ]
        losses, hidden_grads = [loss for loss, _ in head], [dh for _, dh in head]
        del hidden, head
        grads: Adapters = [None] * depth
        for layer, frozen in walk:
            grads[layer] = _zeros_like(adapters[layer])
            for m, h in enumerate(kept.pop()):
                grads[layer], hidden_grads[m], token = self._backward(
                    adapters[layer],
                    frozen,
                    grads[layer],
                    h,
                    hidden_grads[m],
                    key,
                    self._numbers[layer],
                    self._number(m),
                )
            weights.layers.used(token)
            del frozen, h
        return _total(losses), grads

    def loss(self, weights: Weights, adapters: Adapters, batches: Sequence[Batch]) -> float:
        """Mean loss over the supervised tokens of `batches`, without dropout. Weights cross the bus once a batch."""
        sums = [self._batch_loss(weights, adapters, batch) for batch in batches]
        total, count = np.sum(jax.device_get(sums), axis=0)
        return float(total / count)

    def logits(self, weights: Weights, adapters: Adapters, input_ids: np.ndarray) -> jax.Array:
        """input_ids [B, T] → logits [B, T, V] float32; for comparisons, where V is affordable."""
        return self._logits(weights.head, self._hidden(weights, adapters, put(input_ids, "device")))

    def new_cache(self, batch_size: int, length: int) -> list[Cache]:
        """An empty key-value cache for `length` tokens, one entry a layer."""
        shape = (batch_size, length, self.config.num_key_value_heads, self.config.head_dim)
        empty = functools.partial(np.zeros, shape, self.compute_dtype)
        return [(put(empty(), "device"), put(empty(), "device")) for _ in range(self.config.num_hidden_layers)]

    def decode(
        self, weights: Weights, adapters: Adapters, input_ids: np.ndarray, start: int, cache: list[Cache]
    ) -> tuple[jax.Array, list[Cache]]:
        """One step of generation: input_ids [B, T] at positions start … start + T - 1.

        Returns:
            (logits of the last position [B, V] float32; the cache with T more tokens, the old one being spent)
        """
        h = self._embed(weights.embedding, put(input_ids, "device"))
        positions = put(
            np.broadcast_to(np.arange(start, start + input_ids.shape[1], dtype=np.int32), input_ids.shape), "device"
        )
        for layer, frozen in weights.layers.walk(range(len(weights.layers))):
            h, cache[layer], token = self._decode(adapters[layer], frozen, h, positions, cache[layer])
            weights.layers.used(token)
            del frozen
        return self._logits(weights.head, h[:, -1]), cache

    def _batch_loss(self, weights: Weights, adapters: Adapters, batch: Batch) -> tuple[jax.Array, jax.Array]:
        (input_ids, labels), *more = _micro_batches(batch)
        assert not more, "evaluation batches have one micro-batch"
        return self._loss(weights.head, self._hidden(weights, adapters, input_ids), labels)

    def _hidden(self, weights: Weights, adapters: Adapters, input_ids: jax.Array) -> jax.Array:
        """input_ids [B, T] → the last layer's output [B, T, D], without dropout."""
        h = self._embed(weights.embedding, input_ids)
        for layer, frozen in weights.layers.walk(range(len(weights.layers))):
            h, token = self._forward(adapters[layer], frozen, h, None, self._numbers[layer], self._number(0))
            weights.layers.used(token)
            del frozen
        return h

    def _number(self, index: int) -> jax.Array:
        """A small integer on the device; they are kept, so that a step sends none."""
        while len(self._numbers) <= index:
            self._numbers.append(put(np.int32(len(self._numbers)), "device"))
        return self._numbers[index]

    def _layer(self, adapter: Tree, frozen: Tree) -> DecoderLayer:
        return nnx.merge(self._layer_def, adapter, frozen)

    def _run(
        self, adapter: Tree, frozen: Tree, h: jax.Array, key: jax.Array | None, layer: jax.Array, micro_batch: jax.Array
    ) -> jax.Array:
        """One layer on h [B, T, D] of the micro-batch; the dropout key is the step's, folded with both numbers."""
        if key is not None:
            key = jax.random.fold_in(jax.random.fold_in(key, layer), micro_batch)
        positions = jnp.broadcast_to(jnp.arange(h.shape[1])[None], h.shape[:2])
        return self._layer(adapter, frozen)(h, positions, key)

    @functools.cached_property
    def _embed(self) -> Callable[..., Any]:
        return jax.jit(
            lambda embedding, input_ids: nnx.merge(self._embedding_def, embedding)(input_ids, self.compute_dtype)
        )

    @functools.cached_property
    def _forward(self) -> Callable[..., Any]:
        def forward(*args: Any) -> tuple[jax.Array, jax.Array]:
            h = self._run(*args)
            return h, _token(h)

        return jax.jit(forward)

    @functools.cached_property
    def _backward(self) -> Callable[..., Any]:
        def backward(
            adapter: Tree, frozen: Tree, grads: Tree, h: jax.Array, dh: jax.Array, *rest: Any
        ) -> tuple[Tree, jax.Array, jax.Array]:
            _, vjp = jax.vjp(lambda adapter, h: self._run(adapter, frozen, h, *rest), adapter, h)
            new_grads, dh = vjp(dh)
            return jax.tree.map(jnp.add, grads, new_grads), dh, _token(dh)

        return jax.jit(backward, donate_argnames=("grads", "dh"))

    @functools.cached_property
    def _loss_and_grad(self) -> Callable[..., Any]:
        return jax.jit(lambda head, *args: chunked_loss_and_grad(nnx.merge(self._head_def, head), *args))

    @functools.cached_property
    def _loss(self) -> Callable[..., Any]:
        return jax.jit(lambda head, *args: chunked_loss(nnx.merge(self._head_def, head), *args))

    @functools.cached_property
    def _logits(self) -> Callable[..., Any]:
        return jax.jit(lambda head, h: nnx.merge(self._head_def, head)(h))

    @functools.cached_property
    def _decode(self) -> Callable[..., Any]:
        def decode(
            adapter: Tree, frozen: Tree, h: jax.Array, positions: jax.Array, cache: Cache
        ) -> tuple[jax.Array, Cache, jax.Array]:
            h, cache = self._layer(adapter, frozen).decode(h, positions, cache)
            return h, cache, _token(h)

        return jax.jit(decode, donate_argnames="cache")


def default_compute_dtype() -> jnp.dtype:
    """bfloat16 on a GPU; float32 on a CPU, where bfloat16 is slower."""
    return jnp.dtype(jnp.bfloat16 if jax.default_backend() == "gpu" else jnp.float32)


def default_attention(compute_dtype: jax.typing.DTypeLike, head_dim: int) -> Attention:
    """cuDNN's fused attention where it can be used: on a GPU, in 16 bits, for head sizes that every generation serves; XLA's elsewhere."""
    fits = jnp.dtype(compute_dtype).itemsize == 2 and head_dim % 8 == 0 and head_dim <= 128
    return "cudnn" if jax.default_backend() == "gpu" and fits else "xla"


def _describe(make: Callable[[nnx.Rngs], nnx.Module]) -> tuple[nnx.GraphDef, Tree, Tree]:
    """(graph definition, shapes of the trained parameters, shapes of the frozen ones) of a module, without allocating it."""
    graphdef, trained, frozen = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))), nnx.LoRAParam, ...)
    return graphdef, nnx.to_pure_dict(trained), nnx.to_pure_dict(frozen)


def _micro_batches(batch: Batch) -> list[tuple[jax.Array, jax.Array]]:
    """(input_ids [B, T], labels [B, T]) of each micro-batch, on the device."""
    return [
        (put(ids, "device"), put(labels, "device")) for ids, labels in zip(batch.input_ids, batch.labels, strict=True)
    ]


def _token(x: jax.Array) -> jax.Array:
    """A scalar that is there when x is; unlike x it is never donated, so one can wait for it."""
    return jnp.ravel(x)[0]


@jax.jit
def _zeros_like(tree: Tree) -> Tree:
    return jax.tree.map(jnp.zeros_like, tree)


@jax.jit
def _total(losses: list[jax.Array]) -> jax.Array:
    return functools.reduce(jnp.add, losses)
