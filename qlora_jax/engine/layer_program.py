"""One kind of decoder layer, compiled: forward, backward and a step of decoding.

A backward pass needs what the forward pass computed. A program either recomputes it from the layer's input, or has saved it: a forward
pass that saves returns a `Saved` beside its output, which the backward pass is given back. `Saved` carries the structure that
`jax.vjp` gave its arrays, so nothing is remembered between the two but what travels from one to the other.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from qlora_jax.config import QuantizationSettings
from qlora_jax.engine.programs import Definition, describe, ready_with
from qlora_jax.model.architecture import Architecture, Kind
from qlora_jax.model.attention import Cache
from qlora_jax.model.decoder import DecoderLayer
from qlora_jax.runtime.placement import Tree, nbytes

Packing = tuple[jax.Array, jax.Array]  # positions and segment_ids of packed rows, each [B, T] int32


class Context(NamedTuple):
    """What a layer is told besides its parameters and its input, all of it on the device.

    The dropout key is the step's, or None where nothing is drawn; the layer folds it with both numbers.
    """

    key: jax.Array | None
    layer: jax.Array  # int32 scalar
    micro_batch: jax.Array  # int32 scalar
    packing: Packing | None


@functools.partial(jax.tree_util.register_dataclass, data_fields=["arrays"], meta_fields=["structure", "sources"])
@dataclasses.dataclass(frozen=True, kw_only=True)
class Saved:
    """Activations that a layer's forward pass saved for its backward pass.

    The residuals of `jax.vjp` hold the layer's arguments too, the frozen weights above all. These are left out, so that no streamed
    layer stays on the device for their sake: the backward pass is given them anew.
    """

    arrays: list[jax.Array]
    structure: Any
    """The tree of the backward function whose leaves are the residuals."""
    sources: tuple[int | None, ...]
    """For each residual, which of the layer's arguments it is, or None for the next of `arrays`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerProgram:
    """The compiled functions of one kind of layer, and the shapes of its parameters.

    Programs of equal settings share what was compiled.
    """

    definition: Definition
    kind: Kind
    saves: bool
    """Whether `forward` saves activations for `backward`, which recomputes them otherwise."""
    abstract_adapter: Tree
    abstract_frozen: Tree

    @classmethod
    def of(cls, *settings: Any, kind: Kind, saves: bool, **options: Any) -> "LayerProgram":
        """The program of a `DecoderLayer` with these settings; `share_dense` has no part in one that saves."""
        options = {name: value for name, value in options.items() if not (saves and name == "share_dense")}
        definition, adapter, frozen = describe(DecoderLayer, *settings, kind=kind, keep=saves, **options)
        return cls(definition=definition, kind=kind, saves=saves, abstract_adapter=adapter, abstract_frozen=frozen)

    def forward(
        self, adapter: Tree, frozen: Tree, h: jax.Array, context: Context
    ) -> tuple[jax.Array, jax.Array, Saved | None]:
        """The layer on h [B, T, D].

        Returns:
            (h [B, T, D]; a scalar that becomes ready with it; activations for the backward pass, if the program saves them)
        """
        if self.saves:
            return _forward_saving(self.definition, adapter, frozen, h, context)
        return *_forward(self.definition, adapter, frozen, h, context), None

    def backward(
        self,
        adapter: Tree,
        frozen: Tree,
        *,
        grads: Tree | None,
        h: jax.Array,
        dh: jax.Array,
        saved: Saved | None,
        context: Context,
        input_grad: bool = True,
    ) -> tuple[Tree, jax.Array | None, jax.Array]:
        """Pull dh [B, T, D] through the layer, whose input was h. `grads` and dh are donated.

        Args:
            grads: the adapter's gradient so far, float32, which this one is added to; None for none.
            saved: what `forward` returned.
            input_grad: whether the gradient of h is wanted. Below the first layer nothing is; dh is then not donated, for want of
                an output to put in its place.

        Returns:
            (grads, float32; the gradient of h or None; a scalar that becomes ready with them)
        """
        if saved is None:
            function, more = (_backward if input_grad else _backward_first), {}
        else:
            function, more = (_backward_saved if input_grad else _backward_saved_first), {"saved": saved}
        return function(self.definition, adapter, frozen, grads=grads, h=h, dh=dh, context=context, **more)

    def decode(
        self, adapter: Tree, frozen: Tree, h: jax.Array, positions: jax.Array, cache: Cache
    ) -> tuple[jax.Array, Cache, jax.Array]:
        """A step of generation, see `DecoderLayer.decode`; the cache is donated. The last result becomes ready with the others."""
        return _decode(self.definition, adapter, frozen, h, positions=positions, cache=cache)

    def lowered(
        self,
        adapter: Tree,
        frozen: Tree,
        *,
        grads: Tree | None,
        h: jax.ShapeDtypeStruct,
        context: Context,
        first: bool = False,
    ) -> Iterator[tuple[str, jax.stages.Lowered]]:
        """Yield "forward" and "backward", each with its function lowered for these arguments, without running anything.

        Args:
            first: "backward_first" too, the backward function of a model's first layer.

        The others are trees of `jax.ShapeDtypeStruct` with shardings.
        """
        arguments = (self.definition, adapter, frozen)
        forward = (_forward_saving if self.saves else _forward).lower(*arguments, h, context)
        yield "forward", forward
        functions, more = (_backward, _backward_first), {}
        if self.saves:
            described = functools.partial(jax.ShapeDtypeStruct, sharding=h.sharding)
            saved = jax.tree.map(lambda x: described(x.shape, x.dtype), forward.out_info[2])
            functions, more = (_backward_saved, _backward_saved_first), {"saved": saved}
        for name, function in zip(("backward", "backward_first"), functions[: 1 + first], strict=False):
            yield name, function.lower(*arguments, grads=grads, h=h, dh=h, context=context, **more)


def layer_bytes(config: Architecture, quantization: QuantizationSettings) -> int:
    """Bytes of one decoder layer's frozen weights, from its shapes: 441 MB for Llama-2-70B."""
    return nbytes(describe(DecoderLayer, config, None, quantization, "xla")[2])


@functools.partial(jax.jit, static_argnames="layer_settings")
def init_adapter(layer_settings: tuple[Any, ...], key: jax.Array) -> Tree:
    """A layer's fresh adapters."""
    layer = DecoderLayer(
        *layer_settings, nnx.Rngs(key)
    )  # its random frozen weights are not returned, so never computed
    return nnx.to_pure_dict(nnx.split(layer, nnx.LoRAParam, ...)[1])


def _run(definition: Definition, adapter: Tree, frozen: Tree, h: jax.Array, context: Context) -> jax.Array:
    key, layer, micro_batch, packing = context
    if key is not None:
        key = jax.random.fold_in(jax.random.fold_in(key, layer), micro_batch)
    if packing is None:
        packing = jnp.broadcast_to(jnp.arange(h.shape[1])[None], h.shape[:2]), None
    positions, segment_ids = packing
    return definition.merge(adapter, frozen)(h, positions, key, segment_ids)


@functools.partial(jax.jit, static_argnames="definition")
def _forward(
    definition: Definition, adapter: Tree, frozen: Tree, h: jax.Array, context: Context
) -> tuple[jax.Array, jax.Array]:
    h = _run(definition, adapter, frozen, h, context)
    return h, ready_with(h)


@functools.partial(jax.jit, static_argnames="definition")
def _forward_saving(
    definition: Definition, adapter: Tree, frozen: Tree, h: jax.Array, context: Context
) -> tuple[jax.Array, jax.Array, Saved]:
    out, vjp = jax.vjp(lambda adapter, h: _run(definition, adapter, frozen, h, context), adapter, h)
    residuals, structure = jax.tree.flatten(vjp)
    arguments = jax.tree.leaves((adapter, frozen, h, context))
    sources = tuple(next((i for i, a in enumerate(arguments) if a is residual), None) for residual in residuals)
    arrays = [residual for residual, source in zip(residuals, sources, strict=True) if source is None]
    return out, ready_with(out), Saved(arrays=arrays, structure=structure, sources=sources)


def _layer_backward(
    definition: Definition,
    adapter: Tree,
    frozen: Tree,
    *,
    grads: Tree | None,
    h: jax.Array,
    dh: jax.Array,
    context: Context,
    input_grad: bool,
) -> tuple[Tree, jax.Array | None, jax.Array]:
    _, vjp = jax.vjp(lambda adapter, h: _run(definition, adapter, frozen, h, context), adapter, h)
    return _summed(grads, *vjp(dh), input_grad)


def _layer_backward_saved(
    definition: Definition,
    adapter: Tree,
    frozen: Tree,
    *,
    grads: Tree | None,
    h: jax.Array,
    dh: jax.Array,
    context: Context,
    saved: Saved,
    input_grad: bool,
) -> tuple[Tree, jax.Array | None, jax.Array]:
    arguments, others = jax.tree.leaves((adapter, frozen, h, context)), iter(saved.arrays)
    residuals = [next(others) if source is None else arguments[source] for source in saved.sources]
    return _summed(grads, *jax.tree.unflatten(saved.structure, residuals)(dh), input_grad)


def _summed(
    grads: Tree | None, more: Tree, dh: jax.Array, input_grad: bool
) -> tuple[Tree, jax.Array | None, jax.Array]:
    grads = jax.tree.map(lambda x: x.astype(jnp.float32), more) if grads is None else jax.tree.map(jnp.add, grads, more)
    return (grads, dh, ready_with(dh)) if input_grad else (grads, None, ready_with(jax.tree.leaves(grads)[0]))


def _compiled_backward(function: Callable[..., Any], name: str, *, input_grad: bool) -> Callable[..., Any]:
    """`function` under `name`, which profiles show. Without the input's gradient dh is not donated."""
    named = functools.partial(function, input_grad=input_grad)
    named.__name__ = name
    return jax.jit(named, static_argnames="definition", donate_argnames=("grads", "dh") if input_grad else ("grads",))


_backward = _compiled_backward(_layer_backward, "backward", input_grad=True)
_backward_first = _compiled_backward(_layer_backward, "backward_first", input_grad=False)
_backward_saved = _compiled_backward(_layer_backward_saved, "backward_saved", input_grad=True)
_backward_saved_first = _compiled_backward(_layer_backward_saved, "backward_saved_first", input_grad=False)


@functools.partial(jax.jit, static_argnames="definition", donate_argnames="cache")
def _decode(
    definition: Definition, adapter: Tree, frozen: Tree, h: jax.Array, *, positions: jax.Array, cache: Cache
) -> tuple[jax.Array, Cache, jax.Array]:
    h, cache = definition.merge(adapter, frozen).decode(h, positions, cache)
    return h, cache, ready_with(h)
