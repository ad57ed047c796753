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

import collections
import dataclasses
import functools
import itertools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from qlora_jax.config import LoraSettings, QuantizationSettings
from qlora_jax.data import Batch
from qlora_jax.engine import programs
from qlora_jax.engine.layer_program import Context, LayerProgram, Packing, init_adapter
from qlora_jax.engine.objectives import CrossEntropy, Objective
from qlora_jax.engine.state import Adapters, Gradients, Observer, Weights, ignore
from qlora_jax.model.architecture import Architecture
from qlora_jax.model.attention import Attention, Cache
from qlora_jax.model.decoder import MLP_TOKENS
from qlora_jax.model.vocabulary import Embedding, Head
from qlora_jax.runtime.placement import LayerInputs, Placement, Tree, Where, one_device, visits


@dataclasses.dataclass(frozen=True)
class _MicroBatch:
    """What a micro-batch brings to every layer, all on the device."""

    input_ids: jax.Array  # [B, T] int32
    labels: jax.Array  # [B, T] int32
    packing: Packing | None
    number: jax.Array


@dataclasses.dataclass(frozen=True)
class Started:
    """A step that has begun: its batch is on the device and embedded, or on the way. See `Engine.start`."""

    micro_batches: list[_MicroBatch]
    hidden: list[jax.Array]  # [B, T, D] of each
    num_tokens: int
    key: jax.Array | None


class Engine:
    """Compiled functions of one model shape: loss, gradients and decoding over weights that live anywhere.

    Args:
        config: the model's shape.
        lora: the adapters, or None for the base model alone.
        quantization: how the weights were quantized.
        compute_dtype: of hidden states and matmuls.
        attention: jax's implementation, see `attention.default_attention`.
        activations: where kept layer inputs live.
        adapters: where adapters and their gradients live; on the host they visit with their layer.
        keep: how many layers, the last ones, keep their intermediates on the device instead of being run again.
        neftune_noise_alpha: training adds noise of this strength to the embedded tokens, see `vocabulary.add_noise`; 0 for none.
        share_dense: in the backward walk, dequantize each weight once for the recomputed forward and for dX; a layer's dense matrices
            (1.7 GB at 70B) then exist together while the layer is at work. Otherwise it is done twice, a matrix at a time.
        mlp_tokens: tokens the MLP works on at a time.
        placement: the devices; by default the first alone.
    """

    def __init__(
        self,
        config: Architecture,
        lora: LoraSettings | None,
        quantization: QuantizationSettings,
        *,
        compute_dtype: jax.typing.DTypeLike,
        attention: Attention = "xla",
        activations: Where = "device",
        adapters: Where = "device",
        keep: int = 0,
        neftune_noise_alpha: float = 0.0,
        share_dense: bool = True,
        mlp_tokens: int = MLP_TOKENS,
        placement: Placement | None = None,
    ) -> None:
        self.placement = placement or one_device()
        self.config, self.lora = config, lora
        self.activations, self.adapters, self.keep = activations, adapters, keep
        self._noise_alpha = (
            self.placement.put(np.float32(neftune_noise_alpha * config.noise_scale), "device")
            if neftune_noise_alpha
            else None
        )
        self.compute_dtype = jnp.dtype(compute_dtype)
        self.adapter_dtype = lora.dtype if lora else "float32"
        self._layer_settings = (config, lora, quantization, attention)
        options = {"share_dense": share_dense, "mlp_tokens": mlp_tokens}
        self.programs = {
            (kind, saves): LayerProgram.of(*self._layer_settings, kind=kind, saves=saves, **options)
            for kind in dict.fromkeys(config.kinds)
            for saves in (False, True)
        }
        """The compiled functions of layers, by their kind and by whether they save activations."""
        self.objective: Objective = CrossEntropy(config)
        self._embedding_def, _, self.abstract_embedding = programs.describe(Embedding, config)
        self._head_def, _, self.abstract_head = programs.describe(Head, config)
        self._numbers = [self.placement.put(np.int32(i), "device") for i in range(config.num_hidden_layers)]

    @property
    def abstract_adapter(self) -> Tree:
        """Shapes of one layer's adapter."""
        return self.program(0, saves=False).abstract_adapter

    @property
    def abstract_layer(self) -> Tree:
        """Shapes of one layer's frozen weights."""
        return self.program(0, saves=False).abstract_frozen

    @property
    def draws(self) -> bool:
        """Whether a training step draws anything, for which it wants a key."""
        return self._noise_alpha is not None or (self.lora is not None and self.lora.lora_dropout > 0)

    def init_adapters(self, seed: int) -> Adapters:
        """Fresh adapters: A uniform, B zero, reproducible from the seed."""
        keys = jax.random.split(jax.random.key(seed), self.config.num_hidden_layers)
        return [
            jax.block_until_ready(self.placement.put(init_adapter(self._layer_settings, key), self.adapters))
            for key in keys
        ]

    def start(self, weights: Weights, batch: Batch, key: jax.Array | None) -> Started:
        """Begin an optimizer step: what of it needs no adapters. The device may still be busy with the step before.

        `key` draws the dropout masks, which depend on layer and micro-batch but not on where anything lives, and NEFTune's noise, which
        depends on the micro-batch. It may be None if nothing is drawn, see `draws`.
        """
        assert key is not None or not self.draws
        micro_batches = self._micro_batches(batch)
        return Started(
            micro_batches, [self._embed(weights, each, key) for each in micro_batches], batch.num_tokens, key
        )

    def value_and_grad(
        self, weights: Weights, adapters: Adapters, batch: Batch, key: jax.Array | None, observe: Observer = ignore
    ) -> tuple[jax.Array, Gradients]:
        """`start`, and the rest of the step's loss and gradient."""
        return self.go_on(weights, adapters, self.start(weights, batch, key), observe)

    def go_on(
        self, weights: Weights, adapters: Adapters, started: Started, observe: Observer = ignore
    ) -> tuple[jax.Array, Gradients]:
        """The loss of one optimizer step and its gradient with respect to the adapters. `started` is spent.

        The loss is the sum over supervised tokens of all micro-batches, divided by their number.
        `observe` is shown every value on the way; see nonfinite.py.

        Returns:
            (loss, float32 scalar; gradients)
        """
        micro_batches, hidden, key = started.micro_batches, started.hidden, started.key
        observe("the embedding", hidden)
        if self.lora is None or self.lora.lora_dropout == 0:
            key = None  # nothing to draw, and the compiled forward then serves evaluation too
        depth = len(weights.layers)
        pace = weights.layers.pace
        walk = _walk(weights, adapters, [*range(depth), *reversed(range(depth))])
        inputs, saved = LayerInputs(self.activations, pace, self.placement), {}
        for layer, frozen, adapter in itertools.islice(walk, depth):
            inputs.push(tuple(hidden))  # a copy: the list goes on
            program = self._program(layer)
            for m, each in enumerate(micro_batches):
                hidden[m], ready, saved[layer, m] = program.forward(
                    adapter, frozen, hidden[m], self._context(key, layer, each)
                )
            pace.dispatched(ready)
            observe(f"layer {layer}", hidden)
            del frozen, adapter
        losses, hidden_grads = self._head(weights, micro_batches, hidden, started.num_tokens)
        observe("the head and the loss", (losses, hidden_grads))
        hidden.clear()
        grads = Gradients([None] * depth, [None] * depth)
        for layer, frozen, adapter in walk:
            grad = programs.zeros_like(self.placement.sharding("device"))(adapter) if len(micro_batches) > 1 else None
            input_grad = layer > 0 or observe is not ignore  # below the first layer nothing wants its input's gradient
            program = self._program(layer)
            for m, (h, each) in enumerate(zip(inputs.pop(), micro_batches, strict=True)):
                grad, hidden_grads[m], ready = program.backward(
                    adapter, frozen, grads=grad, h=h, dh=hidden_grads[m], saved=saved.pop((layer, m)),
                    context=self._context(key, layer, each), input_grad=input_grad,
                )  # fmt: skip
                del h
            pace.dispatched(ready)
            observe(f"the gradient of layer {layer}", (hidden_grads, grad))
            grad, grads.square_sums[layer] = programs.finish(grad, self.adapter_dtype)
            grads.layers[layer] = self.placement.put(grad, self.adapters)
            del frozen, adapter, grad
        return programs.total(losses), grads

    def _program(self, layer: int) -> LayerProgram:
        """The program of a layer in training: the last `keep` layers save their activations, the others recompute them."""
        return self.program(layer, saves=layer >= self.config.num_hidden_layers - self.keep)

    def program(self, layer: int, *, saves: bool) -> LayerProgram:
        """Return a layer's compiled functions: those that save activations for the backward pass, or those that recompute them."""
        return self.programs[self.config.kinds[layer], saves]

    def _context(self, key: jax.Array | None, layer: int, micro_batch: _MicroBatch) -> Context:
        return Context(key, self._numbers[layer], micro_batch.number, micro_batch.packing)

    def loss(self, weights: Weights, adapters: Adapters, batches: Sequence[Batch]) -> float:
        """Mean loss over the supervised tokens of `batches`, without dropout. Weights cross the bus once a batch."""
        sums = [self._batch_loss(weights, adapters, batch) for batch in batches]
        total, count = np.sum(jax.device_get(sums), axis=0)
        return float(total / count)

    def logits(self, weights: Weights, adapters: Adapters, input_ids: np.ndarray) -> jax.Array:
        """input_ids [B, T] → logits [B, T, V] float32; for comparisons, where V is affordable."""
        return programs.logits(
            self._head_def, weights.head, self._hidden(weights, adapters, self.placement.put(input_ids, "device"), None)
        )

    def new_cache(self, batch_size: int, length: int) -> list[Cache]:
        """An empty key-value cache for `length` tokens, one entry a layer."""
        shape = (batch_size, length, self.config.num_key_value_heads, self.config.head_dim)
        empty = functools.partial(np.zeros, shape, self.compute_dtype)
        return [
            (self.placement.put(empty(), "device"), self.placement.put(empty(), "device"))
            for _ in range(self.config.num_hidden_layers)
        ]

    def decode(
        self, weights: Weights, adapters: Adapters, input_ids: np.ndarray, start: int, cache: list[Cache]
    ) -> tuple[jax.Array, list[Cache]]:
        """One step of generation: input_ids [B, T] at positions start … start + T - 1.

        Returns:
            (logits of the last position [B, V] float32; the cache with T more tokens, the old one being spent)
        """
        h = programs.embed(
            self._embedding_def, weights.embedding, self.placement.put(input_ids, "device"), self.compute_dtype
        )
        positions = self.placement.put(
            np.broadcast_to(np.arange(start, start + input_ids.shape[1], dtype=np.int32), input_ids.shape), "device"
        )
        for layer, frozen, adapter in _walk(weights, adapters, range(len(weights.layers))):
            h, cache[layer], ready = self.program(layer, saves=False).decode(
                adapter, frozen, h, positions, cache[layer]
            )
            weights.layers.pace.dispatched(ready)
            del frozen, adapter
        return programs.logits(self._head_def, weights.head, h[:, -1]), cache

    def _batch_loss(self, weights: Weights, adapters: Adapters, batch: Batch) -> tuple[jax.Array, jax.Array]:
        one, *more = self._micro_batches(batch)
        assert not more, "evaluation batches have one micro-batch"
        h = self._hidden(weights, adapters, one.input_ids, one.packing)
        return self.objective.evaluate(weights.head, h, one.labels)

    def hidden_states(
        self, weights: Weights, adapters: Adapters, input_ids: jax.Array, packing: Packing | None = None
    ) -> Iterator[jax.Array]:
        """input_ids [B, T] on the device → the embedding's output [B, T, D], then each layer's, without dropout or noise."""
        h = programs.embed(self._embedding_def, weights.embedding, input_ids, self.compute_dtype)
        yield h
        for layer, frozen, adapter in _walk(weights, adapters, range(len(weights.layers))):
            h, ready = self.forward_layer(layer, frozen, adapter, h, packing)
            weights.layers.pace.dispatched(ready)
            del frozen, adapter
            yield h

    def forward_layer(
        self, layer: int, frozen: Tree, adapter: Tree, h: jax.Array, packing: Packing | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """One layer on h [B, T, D], without dropout → (its output, a scalar that becomes ready with it)."""
        context = Context(None, self._numbers[layer], self._number(0), packing)
        h, ready, _ = self.program(layer, saves=False).forward(adapter, frozen, h, context)
        return h, ready

    def _hidden(self, weights: Weights, adapters: Adapters, input_ids: jax.Array, packing: Packing | None) -> jax.Array:
        """The last layer's output [B, T, D]."""
        (h,) = collections.deque(self.hidden_states(weights, adapters, input_ids, packing), maxlen=1)
        return h

    def _embed(self, weights: Weights, micro_batch: _MicroBatch, key: jax.Array | None) -> jax.Array:
        noise = None if self._noise_alpha is None else (self._noise_alpha, key, micro_batch.number)
        return programs.embed(self._embedding_def, weights.embedding, micro_batch.input_ids, self.compute_dtype, noise)

    def _head(
        self, weights: Weights, micro_batches: Sequence[_MicroBatch], hidden: Sequence[jax.Array], num_tokens: int
    ) -> tuple[list[jax.Array], list[jax.Array]]:
        """Each micro-batch's share of the loss, and its gradient with respect to the last layer's output."""
        token_weight = self.placement.put(np.float32(1 / max(num_tokens, 1)), "device")
        head = [
            self.objective.head(weights.head, h, each.labels, token_weight)
            for h, each in zip(hidden, micro_batches, strict=True)
        ]
        return [loss for loss, _ in head], [dh for _, dh in head]

    def _micro_batches(self, batch: Batch) -> list[_MicroBatch]:
        """Each micro-batch's arrays, on the device."""
        packing = () if batch.segment_ids is None else (batch.positions, batch.segment_ids)
        arrays = zip(batch.input_ids, batch.labels, *packing, strict=True)
        moved = self.placement.put(
            list(arrays), "device"
        )  # in one call: each takes a part of a millisecond before the step begins
        return [
            _MicroBatch(ids, labels, tuple(packed) or None, self._number(m))
            for m, (ids, labels, *packed) in enumerate(moved)
        ]

    def _number(self, index: int) -> jax.Array:
        """A small integer on the device; they are kept, so that a step sends none."""
        while len(self._numbers) <= index:
            self._numbers.append(self.placement.put(np.int32(len(self._numbers)), "device"))
        return self._numbers[index]


def _walk(weights: Weights, adapters: Adapters, order: Sequence[int]) -> Iterator[tuple[int, Tree, Tree]]:
    """(layer, frozen, adapter) along `order`, on the device.

    Not `zip`, which holds on to the last items while it asks for the next.
    """
    layers, visiting = (
        weights.layers.walk(order),
        visits(adapters.__getitem__, order, weights.layers.pace, weights.layers.placement),
    )
    while (following := next(layers, None)) is not None:
        layer, frozen = following
        following = None
        adapter = next(visiting)
        yield layer, frozen, adapter
        del frozen, adapter
