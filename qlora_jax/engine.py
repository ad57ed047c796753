"""The two walks over the layers: how a model bigger than the device is trained on it.

A decoder layer is a pure function of its frozen weights, its adapter and the hidden states. It is compiled once and called for every
layer, so compile time does not grow with depth. A step is two walks:

    forward    for layer 0 … L-1:  keep the layer's inputs;  h ← layer(weights[l], adapters[l], h)
    head       the loss, and dh while the logits are at hand, in chunks over tokens
    backward   for layer L-1 … 0:  run the layer again from its kept inputs, and take from that d_adapters[l] and the dh below

Nothing of a layer outlives its turn but its inputs ([B, T, D] in the compute dtype) and its adapter's gradient. In particular no
dequantized weight does: it exists inside the compiled layer only, shared there by the recomputed forward and dX (`share_dense`).

Where a layer's weights live is not the engine's business. It asks a `LayerStore` to walk 0 … L-1, L-1 … 0, and each layer is on the
device when its turn comes: because it lives there, or because its copy was started a layer ago. The same compiled functions see the
same values in the same order, so both give the same bits, as far as the device's own kernels do (on a GPU cuDNN's attention gradient
adds in any order; `training.full_determinism` excludes such kernels).

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
from qlora_jax.llama import Attention, Cache, DecoderLayer, Embedding, Head, LlamaConfig, add_noise
from qlora_jax.loss import chunked_loss, chunked_loss_and_grad
from qlora_jax.placement import LayerInputs, LayerStore, Tree, Where, put, sharding

Adapters = list[
    Tree
]  # one tree a layer: {"q_proj": {"adapter": {"lora_a": [R, in], "lora_b": [out, R]}}, ...}, float32, on the device

Packing = tuple[jax.Array, jax.Array]  # positions and segment_ids of packed rows, each [B, T] int32
Noise = tuple[jax.Array, jax.Array, jax.Array]  # alpha, the step's key, the micro-batch's number


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
        neftune_noise_alpha: training adds noise of this strength to the embedded tokens, see `llama.add_noise`; 0 for none.
        share_dense: in the backward walk, dequantize each weight once for the recomputed forward and for dX; a layer's dense matrices
            (1.7 GB at 70B) then exist together while the layer is at work. Otherwise it is done twice, a matrix at a time.
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
        neftune_noise_alpha: float = 0.0,
        share_dense: bool = True,
    ) -> None:
        self.config, self.lora, self.activations = config, lora, activations
        self._noise_alpha = put(np.float32(neftune_noise_alpha), "device") if neftune_noise_alpha else None
        self.compute_dtype = jnp.dtype(compute_dtype)
        self._layer_settings = (config, lora, quantization, attention)
        self._layer_def, self.abstract_adapter, self.abstract_layer = _describe(
            DecoderLayer, *self._layer_settings, share_dense=share_dense
        )
        self._embedding_def, _, self.abstract_embedding = _describe(Embedding, config)
        self._head_def, _, self.abstract_head = _describe(Head, config)
        self._numbers = [put(np.int32(i), "device") for i in range(config.num_hidden_layers)]

    def init_adapters(self, seed: int) -> Adapters:
        """Fresh adapters: A uniform, B zero, reproducible from the seed."""
        keys = jax.random.split(jax.random.key(seed), self.config.num_hidden_layers)
        return [put(_init_adapter(self._layer_settings, key), "device") for key in keys]

    def value_and_grad(
        self, weights: Weights, adapters: Adapters, batch: Batch, key: jax.Array
    ) -> tuple[jax.Array, Adapters]:
        """The loss of one optimizer step and its gradient with respect to the adapters.

        The loss is the sum over supervised tokens of all micro-batches, divided by their number. `key` draws the dropout masks, which
        depend on layer and micro-batch but not on where anything lives, and NEFTune's noise, which depends on the micro-batch.

        Returns:
            (loss, float32 scalar; gradients, shaped as `adapters`)
        """
        micro_batches = _micro_batches(batch)
        alpha = self._noise_alpha
        noises = [None if alpha is None else (alpha, key, self._number(m)) for m in range(len(micro_batches))]
        if self.lora is None or self.lora.lora_dropout == 0:
            key = None  # nothing to draw, and the compiled forward then serves evaluation too
        token_weight = put(np.float32(1 / max(batch.num_tokens, 1)), "device")
        depth = len(weights.layers)
        walk = weights.layers.walk([*range(depth), *reversed(range(depth))])
        hidden = [
            _embed(self._embedding_def, weights.embedding, input_ids, self.compute_dtype, noise)
            for (input_ids, _, _), noise in zip(micro_batches, noises, strict=True)
        ]
        kept = LayerInputs(self.activations)
        for _ in range(depth):
            layer, frozen = next(walk)
            kept.push(tuple(hidden))  # a copy: the list goes on
            for m, h in enumerate(hidden):
                packing = micro_batches[m][2]
                hidden[m], token = _forward(
                    self._layer_def, adapters[layer], frozen, h, key, self._numbers[layer], self._number(m), packing
                )
            weights.layers.used(token)
            del frozen, h
        head = [
            _loss_and_grad(self._head_def, weights.head, h, labels, token_weight)
            for h, (_, labels, _) in zip(hidden, micro_batches, strict=True)
        ]
        losses, hidden_grads = [loss for loss, _ in head], [dh for _, dh in head]
        del hidden, head
        grads: Adapters = [None] * depth
        for layer, frozen in walk:
            grads[layer] = _zeros_like()(adapters[layer])
            for m, h in enumerate(kept.pop()):
                grads[layer], hidden_grads[m], token = _backward(
                    self._layer_def,
                    adapters[layer],
                    frozen,
                    grads[layer],
                    h,
                    hidden_grads[m],
                    key,
                    self._numbers[layer],
                    self._number(m),
                    micro_batches[m][2],
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
        return _logits(self._head_def, weights.head, self._hidden(weights, adapters, put(input_ids, "device"), None))

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
        h = _embed(self._embedding_def, weights.embedding, put(input_ids, "device"), self.compute_dtype)
        positions = put(
            np.broadcast_to(np.arange(start, start + input_ids.shape[1], dtype=np.int32), input_ids.shape), "device"
        )
        for layer, frozen in weights.layers.walk(range(len(weights.layers))):
            h, cache[layer], token = _decode(self._layer_def, adapters[layer], frozen, h, positions, cache[layer])
            weights.layers.used(token)
            del frozen
        return _logits(self._head_def, weights.head, h[:, -1]), cache

    def _batch_loss(self, weights: Weights, adapters: Adapters, batch: Batch) -> tuple[jax.Array, jax.Array]:
        (input_ids, labels, packing), *more = _micro_batches(batch)
        assert not more, "evaluation batches have one micro-batch"
        return _loss(self._head_def, weights.head, self._hidden(weights, adapters, input_ids, packing), labels)

    def _hidden(self, weights: Weights, adapters: Adapters, input_ids: jax.Array, packing: Packing | None) -> jax.Array:
        """input_ids [B, T] → the last layer's output [B, T, D], without dropout or noise."""
        h = _embed(self._embedding_def, weights.embedding, input_ids, self.compute_dtype)
        for layer, frozen in weights.layers.walk(range(len(weights.layers))):
            h, token = _forward(
                self._layer_def, adapters[layer], frozen, h, None, self._numbers[layer], self._number(0), packing
            )
            weights.layers.used(token)
            del frozen
        return h

    def _number(self, index: int) -> jax.Array:
        """A small integer on the device; they are kept, so that a step sends none."""
        while len(self._numbers) <= index:
            self._numbers.append(put(np.int32(len(self._numbers)), "device"))
        return self._numbers[index]


class Definition:
    """A module's graph definition, as a static argument of the compiled functions.

    Compared by identity, one for each set of settings: hashing the graph itself would cost a millisecond a call.
    """

    def __init__(self, graphdef: nnx.GraphDef) -> None:
        self._graphdef = graphdef

    def merge(self, *trees: Tree) -> Any:
        """The module over these parameters."""
        return nnx.merge(self._graphdef, *trees)


# The compiled functions. Definitions are static arguments, so that engines of one shape share what was compiled.


@functools.partial(jax.jit, static_argnames="layer_settings")
def _init_adapter(layer_settings: tuple[Any, ...], key: jax.Array) -> Tree:
    layer = DecoderLayer(
        *layer_settings, nnx.Rngs(key)
    )  # its random frozen weights are not returned, so never computed
    return nnx.to_pure_dict(nnx.split(layer, nnx.LoRAParam, ...)[1])


@functools.partial(jax.jit, static_argnames=("embedding_def", "dtype"))
def _embed(
    embedding_def: Definition, embedding: Tree, input_ids: jax.Array, dtype: jnp.dtype, noise: Noise | None = None
) -> jax.Array:
    h = embedding_def.merge(embedding)(input_ids, dtype)
    return h if noise is None else add_noise(h, *noise)


def _run(
    layer_def: Definition,
    adapter: Tree,
    frozen: Tree,
    h: jax.Array,
    key: jax.Array | None,
    layer: jax.Array,
    micro_batch: jax.Array,
    packing: Packing | None,
) -> jax.Array:
    """One layer on h [B, T, D] of one micro-batch; the dropout key is the step's, folded with both numbers."""
    if key is not None:
        key = jax.random.fold_in(jax.random.fold_in(key, layer), micro_batch)
    if packing is None:
        packing = jnp.broadcast_to(jnp.arange(h.shape[1])[None], h.shape[:2]), None
    positions, segment_ids = packing
    return layer_def.merge(adapter, frozen)(h, positions, key, segment_ids)


@functools.partial(jax.jit, static_argnames="layer_def")
def _forward(layer_def: Definition, *args: Any) -> tuple[jax.Array, jax.Array]:
    h = _run(layer_def, *args)
    return h, _token(h)


@functools.partial(jax.jit, static_argnames="layer_def", donate_argnames=("grads", "dh"))
def _backward(
    layer_def: Definition, adapter: Tree, frozen: Tree, grads: Tree, h: jax.Array, dh: jax.Array, *rest: Any
) -> tuple[Tree, jax.Array, jax.Array]:
    """Run the layer again from its kept inputs and pull dh through it; the adapter's gradient is added to `grads`."""
    _, vjp = jax.vjp(lambda adapter, h: _run(layer_def, adapter, frozen, h, *rest), adapter, h)
    new_grads, dh = vjp(dh)
    return jax.tree.map(jnp.add, grads, new_grads), dh, _token(dh)


@functools.partial(jax.jit, static_argnames="head_def")
def _loss_and_grad(head_def: Definition, head: Tree, *args: jax.Array) -> tuple[jax.Array, jax.Array]:
    return chunked_loss_and_grad(head_def.merge(head), *args)


@functools.partial(jax.jit, static_argnames="head_def")
def _loss(head_def: Definition, head: Tree, *args: jax.Array) -> tuple[jax.Array, jax.Array]:
    return chunked_loss(head_def.merge(head), *args)


@functools.partial(jax.jit, static_argnames="head_def")
def _logits(head_def: Definition, head: Tree, h: jax.Array) -> jax.Array:
    return head_def.merge(head)(h)


@functools.partial(jax.jit, static_argnames="layer_def", donate_argnames="cache")
def _decode(
    layer_def: Definition, adapter: Tree, frozen: Tree, h: jax.Array, positions: jax.Array, cache: Cache
) -> tuple[jax.Array, Cache, jax.Array]:
    h, cache = layer_def.merge(adapter, frozen).decode(h, positions, cache)
    return h, cache, _token(h)


@functools.cache
def _zeros_like() -> Callable[[Tree], Tree]:
    # Placed by name: zeros depend on no input, and would come without the mesh, which is another type to the functions above.
    return jax.jit(lambda tree: jax.tree.map(jnp.zeros_like, tree), out_shardings=sharding("device"))


def default_compute_dtype() -> jnp.dtype:
    """bfloat16 on a GPU; float32 on a CPU, where bfloat16 is slower."""
    return jnp.dtype(jnp.bfloat16 if jax.default_backend() == "gpu" else jnp.float32)


def default_attention(compute_dtype: jax.typing.DTypeLike, head_dim: int) -> Attention:
    """cuDNN's fused attention where it can be used: on a GPU, in 16 bits, for head sizes that every generation serves; XLA's elsewhere."""
    fits = jnp.dtype(compute_dtype).itemsize == 2 and head_dim % 8 == 0 and head_dim <= 128
    return "cudnn" if jax.default_backend() == "gpu" and fits else "xla"


@functools.cache
def _describe(module: type[nnx.Module], *settings: Any, **options: Any) -> tuple[Definition, Tree, Tree]:
    """(definition, shapes of the trained parameters, shapes of the frozen ones) of a module, without allocating it."""
    described = nnx.eval_shape(lambda: module(*settings, nnx.Rngs(0), **options))
    graphdef, trained, frozen = nnx.split(described, nnx.LoRAParam, ...)
    return Definition(graphdef), nnx.to_pure_dict(trained), nnx.to_pure_dict(frozen)


def _micro_batches(batch: Batch) -> list[tuple[jax.Array, jax.Array, Packing | None]]:
    """(input_ids [B, T], labels [B, T], packing) of each micro-batch, on the device."""
    packing = () if batch.segment_ids is None else (batch.positions, batch.segment_ids)
    return [
        (put(ids, "device"), put(labels, "device"), tuple(put(array, "device") for array in packed) or None)
        for ids, labels, *packed in zip(batch.input_ids, batch.labels, *packing, strict=True)
    ]


def _token(x: jax.Array) -> jax.Array:
    """A scalar that is there when x is; unlike x it is never donated, so one can wait for it."""
    return jnp.ravel(x)[0]


@jax.jit
def _total(losses: list[jax.Array]) -> jax.Array:
    return functools.reduce(jnp.add, losses)
