"""The compiled functions of the engine: an embedding, a layer forwards and backwards, a head.

Each takes the definition of its module as a static argument, so that engines of one shape share what was compiled, and plain trees for
the rest. Nothing here knows where arrays live or in which order layers come.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from qlora_jax.model.decoder import Cache, DecoderLayer, add_noise
from qlora_jax.model.loss import chunked_loss, chunked_loss_and_grad
from qlora_jax.runtime.placement import Tree, sharding

Packing = tuple[jax.Array, jax.Array]  # positions and segment_ids of packed rows, each [B, T] int32
Noise = tuple[jax.Array, jax.Array, jax.Array]  # alpha, the step's key, the micro-batch's number


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
def init_adapter(layer_settings: tuple[Any, ...], key: jax.Array) -> Tree:
    """A layer's fresh adapters."""
    layer = DecoderLayer(
        *layer_settings, nnx.Rngs(key)
    )  # its random frozen weights are not returned, so never computed
    return nnx.to_pure_dict(nnx.split(layer, nnx.LoRAParam, ...)[1])


@functools.partial(jax.jit, static_argnames=("embedding_def", "dtype"))
def embed(
    embedding_def: Definition, embedding: Tree, input_ids: jax.Array, dtype: jnp.dtype, noise: Noise | None = None
) -> jax.Array:
    """input_ids [B, T] → h [B, T, D] in `dtype`, with NEFTune's noise if any."""
    h = embedding_def.merge(embedding)(input_ids, dtype)
    return h if noise is None else add_noise(h, *noise)


def run(
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
def forward(layer_def: Definition, *args: Any) -> tuple[jax.Array, jax.Array]:
    """A layer; the arguments of `run`. Returns (h, a token to wait for)."""
    h = run(layer_def, *args)
    return h, token(h)


@functools.partial(jax.jit, static_argnames=("layer_def", "to_input"), donate_argnames=("grads", "dh"))
def backward(
    layer_def: Definition,
    adapter: Tree,
    frozen: Tree,
    grads: Tree | None,
    h: jax.Array,
    dh: jax.Array,
    *rest: Any,
    to_input: bool = True,
) -> tuple[Tree, jax.Array | None, jax.Array]:
    """Run the layer again from its kept inputs and pull dh through it; the adapter's gradient is added to `grads`, if any.

    Returns:
        (grads, float32; the gradient of h, or None without `to_input`; a token to wait for)
    """
    _, vjp = jax.vjp(lambda adapter, h: run(layer_def, adapter, frozen, h, *rest), adapter, h)
    return _summed(grads, *vjp(dh), to_input)


def _summed(grads: Tree | None, more: Tree, dh: jax.Array, to_input: bool) -> tuple[Tree, jax.Array | None, jax.Array]:
    grads = jax.tree.map(lambda x: x.astype(jnp.float32), more) if grads is None else jax.tree.map(jnp.add, grads, more)
    return (grads, dh, token(dh)) if to_input else (grads, None, token(jax.tree.leaves(grads)[0]))


@functools.partial(jax.jit, static_argnames="layer_def")
def forward_keeping(
    layer_def: Definition, adapter: Tree, frozen: Tree, h: jax.Array, *rest: Any
) -> tuple[jax.Array, jax.Array, list[jax.Array]]:
    """A layer, and what its backward pass needs besides the arguments: for `backward_kept`, which then runs nothing again.

    The residuals of `jax.vjp` hold the arguments too, the frozen weights above all. These are not returned, so that nothing keeps a
    streamed layer on the device: `backward_kept` is given them anew.
    """
    out, vjp = jax.vjp(lambda adapter, h: run(layer_def, adapter, frozen, h, *rest), adapter, h)
    residuals, structure = jax.tree.flatten(vjp)
    arguments = jax.tree.leaves((adapter, frozen, h, rest))
    sources = [next((i for i, a in enumerate(arguments) if a is residual), None) for residual in residuals]
    _RESIDUALS[_signature(layer_def, h, rest)] = structure, sources
    return out, token(out), [r for r, source in zip(residuals, sources, strict=True) if source is None]


@functools.partial(jax.jit, static_argnames=("layer_def", "to_input"), donate_argnames=("grads", "dh"))
def backward_kept(
    layer_def: Definition,
    adapter: Tree,
    frozen: Tree,
    grads: Tree | None,
    h: jax.Array,
    dh: jax.Array,
    kept: list[jax.Array],
    *rest: Any,
    to_input: bool = True,
) -> tuple[Tree, jax.Array | None, jax.Array]:
    """As `backward`, from what `forward_keeping` kept."""
    structure, sources = _RESIDUALS[_signature(layer_def, h, rest)]
    arguments, others = jax.tree.leaves((adapter, frozen, h, rest)), iter(kept)
    residuals = [next(others) if source is None else arguments[source] for source in sources]
    return _summed(grads, *jax.tree.unflatten(structure, residuals)(dh), to_input)


def _first(function: Callable[..., Any]) -> Callable[..., Any]:
    """A backward function without `to_input`. dh is not written over, for want of anything to write."""
    first = functools.partial(function.__wrapped__, to_input=False)
    first.__name__ = f"{function.__name__}_first"  # in profiles
    return jax.jit(first, static_argnames="layer_def", donate_argnames="grads")


backward_first, backward_kept_first = map(_first, (backward, backward_kept))
"""The same for the first layer, below which nothing wants the gradient."""

_RESIDUALS: dict[Any, tuple[Any, list[int | None]]] = {}
"""By signature of a traced `forward_keeping`: how its residuals make up the backward function, and which of them are arguments."""


def _signature(layer_def: Definition, h: jax.Array, rest: tuple[Any, ...]) -> Any:
    return layer_def, h.shape, h.dtype, jax.tree.structure(rest)


@functools.partial(jax.jit, static_argnames="dtype", donate_argnames="grads")
def finish(grads: Tree, dtype: jax.typing.DTypeLike) -> tuple[Tree, jax.Array]:
    """A layer's summed gradient in the dtype it is kept in, and the square sum of that."""
    grads = jax.tree.map(lambda grad: grad.astype(dtype), grads)
    return grads, square_sum(grads)


@jax.jit
def square_sum(tree: Tree) -> jax.Array:
    """Of all values of a tree, float32 scalar."""
    return sum(jnp.sum(jnp.square(leaf.astype(jnp.float32))) for leaf in jax.tree.leaves(tree))


@functools.partial(jax.jit, static_argnames="head_def")
def loss_and_grad(head_def: Definition, head: Tree, *args: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The arguments of `chunked_loss_and_grad` after the head."""
    return chunked_loss_and_grad(head_def.merge(head), *args)


@functools.partial(jax.jit, static_argnames="head_def")
def loss(head_def: Definition, head: Tree, *args: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The arguments of `chunked_loss` after the head."""
    return chunked_loss(head_def.merge(head), *args)


@functools.partial(jax.jit, static_argnames="head_def")
def logits(head_def: Definition, head: Tree, h: jax.Array) -> jax.Array:
    """h [..., D] → logits [..., V] float32."""
    return head_def.merge(head)(h)


@functools.partial(jax.jit, static_argnames="layer_def", donate_argnames="cache")
def decode(
    layer_def: Definition, adapter: Tree, frozen: Tree, h: jax.Array, positions: jax.Array, cache: Cache
) -> tuple[jax.Array, Cache, jax.Array]:
    """A layer of generation, see `DecoderLayer.decode`; the cache is spent."""
    h, cache = layer_def.merge(adapter, frozen).decode(h, positions, cache)
    return h, cache, token(h)


@functools.cache
def zeros_like() -> Callable[[Tree], Tree]:
    """A function that makes float32 zeros on the device, shaped as the tree it is given."""
    # Placed by name: zeros depend on no input, and would come without the mesh, which is another type to the functions above.
    return jax.jit(
        lambda tree: jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), tree), out_shardings=sharding("device")
    )


@functools.cache
def describe(module: type[nnx.Module], *settings: Any, **options: Any) -> tuple[Definition, Tree, Tree]:
    """(definition, shapes of the trained parameters, shapes of the frozen ones) of a module, without allocating it."""
    described = nnx.eval_shape(lambda: module(*settings, nnx.Rngs(0), **options))
    graphdef, trained, frozen = nnx.split(described, nnx.LoRAParam, ...)
    return Definition(graphdef), nnx.to_pure_dict(trained), nnx.to_pure_dict(frozen)


def token(x: jax.Array) -> jax.Array:
    """A scalar that is there when x is; unlike x it is never donated, so one can wait for it."""
    return jnp.ravel(x)[0]


@jax.jit
def total(losses: list[jax.Array]) -> jax.Array:
    """The sum, added up in order."""
    return functools.reduce(jnp.add, losses)
