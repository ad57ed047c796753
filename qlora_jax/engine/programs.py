"""The compiled functions of the engine beside a layer's and an objective's: an embedding, logits, gradients' ends.

Each takes the definition of its module as a static argument, so that engines of one shape share what was compiled, and plain trees for
the rest. Nothing here knows where arrays live or in which order layers come.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from qlora_jax.model.vocabulary import add_noise
from qlora_jax.runtime.placement import Tree

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


@functools.partial(jax.jit, static_argnames=("embedding_def", "dtype"))
def embed(
    embedding_def: Definition, embedding: Tree, input_ids: jax.Array, dtype: jnp.dtype, noise: Noise | None = None
) -> jax.Array:
    """input_ids [B, T] → h [B, T, D] in `dtype`, with NEFTune's noise if any."""
    h = embedding_def.merge(embedding)(input_ids, dtype)
    return h if noise is None else add_noise(h, *noise)


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
def logits(head_def: Definition, head: Tree, h: jax.Array) -> jax.Array:
    """h [..., D] → logits [..., V] float32."""
    return head_def.merge(head)(h)


@functools.cache
def zeros_like(sharding: jax.sharding.Sharding) -> Callable[[Tree], Tree]:
    """Return a function that makes float32 zeros of this sharding, shaped as the tree it is given."""
    # Placed by name: zeros depend on no input, and would come without the mesh, which is another type to the functions above.
    return jax.jit(lambda tree: jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), tree), out_shardings=sharding)


@functools.cache
def describe(module: type[nnx.Module], *settings: Any, **options: Any) -> tuple[Definition, Tree, Tree]:
    """(definition, shapes of the trained parameters, shapes of the frozen ones) of a module, without allocating it."""
    described = nnx.eval_shape(lambda: module(*settings, nnx.Rngs(0), **options))
    graphdef, trained, frozen = nnx.split(described, nnx.LoRAParam, ...)
    return Definition(graphdef), nnx.to_pure_dict(trained), nnx.to_pure_dict(frozen)


def ready_with(x: jax.Array) -> jax.Array:
    """A scalar that becomes ready with x. x may be donated later; this is not, so the host can block on it."""
    return jnp.ravel(x)[0]


@jax.jit
def total(losses: list[jax.Array]) -> jax.Array:
    """The sum, added up in order."""
    return functools.reduce(jnp.add, losses)
