"""AdamW with moments that may live on the host, learning-rate schedules, and clipping by the global norm.

The update rule is optax's own (`scale_by_adam`, `add_decayed_weights`); what is added here is where its state lives. The
paged optimizer of the QLoRA article lets the driver move moments out of the GPU page by page when memory runs short. Here
they live on the host by decision, and visit layer by layer: layer l is updated while the moments of layer l + 1 are on
their way. Both places give the same bits.

`paged_adamw_8bit` keeps the moments in 8 bits between steps (`blockwise.py`): a quarter of the memory and of the traffic. Each visit they
are dequantized, updated in float32 and quantized again, as bitsandbytes does; tensors under 4,096 elements stay float32. On a GPU a
kernel does all of that to a tensor in one pass.

    g ← g · min(1, max_norm / (‖g‖₂ + 1e-6))          over all adapters, after accumulation (torch's clip_grad_norm_)
    m ← β₁m + (1-β₁)g;  v ← β₂v + (1-β₂)g²;  p ← p - lr · (m̂ / (√v̂ + ε) + decay · p)
"""

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from qlora_jax.config import TrainingSettings
from qlora_jax.engine.engine import Gradients
from qlora_jax.ops import blockwise, dispatch
from qlora_jax.ops.blockwise import BlockwiseTensor
from qlora_jax.ops.operands import Adam
from qlora_jax.runtime.placement import SLOTS, Pace, Placement, Tree, Where, one_device, visits

Schedule = Callable[[int], float]

MIN_8BIT_SIZE = 4096
"""As in bitsandbytes: moments of smaller tensors are kept in float32."""


def schedule(settings: TrainingSettings, total_steps: int) -> Schedule:
    """Step number from 0 → learning rate; the factors of transformers' `get_scheduler`.

    `constant` ignores the warm-up, as it does there; the warm-up takes ceil(total_steps · warmup_ratio) steps.
    """
    kind = settings.lr_scheduler_type
    warmup = 0 if kind == "constant" else math.ceil(total_steps * settings.warmup_ratio)

    def learning_rate(step: int) -> float:
        if step < warmup:
            return settings.learning_rate * step / max(1, warmup)
        remaining = max(0, total_steps - step) / max(1, total_steps - warmup)
        factors = {"linear": remaining, "cosine": 0.5 * (1 + math.cos(math.pi * (1 - remaining)))}
        return settings.learning_rate * factors.get(kind, 1.0)

    return learning_rate


class AdamW:
    """AdamW over a list of trees, one a layer. The moments are float32, or 8 bits, and live where `where` says."""

    def __init__(
        self, settings: TrainingSettings, params: list[Tree], where: Where, placement: Placement | None = None
    ) -> None:
        """Moments start at zero; `params` is only described, not kept."""
        self.placement = placement or one_device()
        self.where, self.max_norm = where, settings.max_grad_norm
        self._rule = _rule_of(settings)
        pace = Pace(SLOTS)
        self.moments = [
            jax.block_until_ready(self.placement.put(self._rule.init(layer), where))
            for layer in visits(params.__getitem__, range(len(params)), pace, self.placement)
        ]

    def global_norm(self, grads: Gradients) -> jax.Array:
        """Of all layers' gradients together, a float32 scalar; what `update` clips by. Not finite if anything in them is not."""
        return _global_norm(grads.square_sums)

    def update(
        self,
        params: list[Tree],
        grads: Gradients,
        learning_rate: float,
        norm: jax.Array | None = None,
        loss: jax.Array | None = None,
    ) -> tuple[list[Tree], jax.Array]:
        """One step. `params` and `grads` are spent: the lists are refilled and emptied. Params that live on the host return there.

        A step whose gradient, or loss, is not finite is not made: params and moments come out as they went in. The device sees to that,
        so that the update need not wait for the caller to look.

        Args:
            norm: the gradients' `global_norm`, if the caller has it already.

        Returns:
            (new params; the gradients' global norm before clipping, float32 scalar)
        """
        norm = self.global_norm(grads) if norm is None else norm
        factor, made = _clip_factor(norm, self.max_norm), _finite(norm, norm if loss is None else loss)
        rate = self.placement.put(np.float32(learning_rate), "device")
        pace = Pace(SLOTS)
        coming = visits(
            lambda i: (params[i], grads.layers[i], self.moments[i]), range(len(params)), pace, self.placement
        )
        homes: list[Where] = ["device" if self.placement.lives(layer, "device") else "host" for layer in params]
        for layer in range(len(params)):  # not `enumerate`, which holds on to the last item while it asks for the next
            here = next(coming)
            new, moments, token = self._rule.update(*here, _Scalars(factor, rate, made))
            pace.dispatched(token)
            params[layer], self.moments[layer] = (
                self.placement.put(new, homes[layer]),
                self.placement.put(moments, self.where),
            )
            grads.layers[layer] = None
            del here, new, moments
        return params, norm


class _Scalars(NamedTuple):
    """What a step's update of every layer has in common; scalars on the device."""

    factor: jax.Array  # the gradients are multiplied by it: clipping
    rate: jax.Array
    made: jax.Array  # whether the step is made; otherwise all stays as it is


class _Rule:
    """The compiled functions of AdamW for one layer: fresh moments, and a step. One for each set of numbers, see `_rule_of`."""

    def __init__(self, settings: TrainingSettings) -> None:
        self._rule, self._pack = _rule(settings), _packing(settings)
        self._adam = _numbers(settings)
        self.init = jax.jit(lambda layer: self._pack(self._rule.init(_float32(layer))))
        self.update = jax.jit(self._update, donate_argnames=("params", "moments"))

    def _update(self, params: Tree, grads: Tree, moments: Any, scalars: _Scalars) -> tuple[Tree, Any, jax.Array]:
        leaves, structure = jax.tree.flatten(params)
        adam, *rest = moments
        found = zip(leaves, *map(structure.flatten_up_to, (grads, adam.mu, adam.nu)), strict=True)
        by_kernel, others = {}, {}
        for i, leaf in enumerate(found):
            (by_kernel if dispatch.updates_8bit(leaf[0], leaf[2]) else others)[i] = leaf
        plain, plain_grads, mu, nu = ({i: leaf[part] for i, leaf in others.items()} for part in range(4))
        moments = adam._replace(mu=mu, nu=nu), *rest
        plain, (adam, *rest) = self._plain(plain, plain_grads, moments, scalars)
        shares = (1 - beta**adam.count for beta in (self._adam.beta1, self._adam.beta2))
        numbers = jnp.stack([scalars.factor, scalars.rate, *shares, scalars.made]).astype(jnp.float32)
        new = {i: dispatch.adamw_8bit(*leaf, numbers, self._adam) for i, leaf in by_kernel.items()}
        new |= {i: (param, adam.mu[i], adam.nu[i]) for i, param in plain.items()}
        params, mu, nu = (structure.unflatten(new[i][part] for i in range(len(leaves))) for part in range(3))
        return params, (adam._replace(mu=mu, nu=nu), *rest), jnp.ravel(jax.tree.leaves(params)[0])[0]

    def _plain(self, params: Tree, grads: Tree, moments: Any, scalars: _Scalars) -> tuple[Tree, Any]:
        """Return (new params, new moments), by XLA's operations."""
        grads = jax.tree.map(lambda g: g * scalars.factor, _float32(grads))
        steps, state = self._rule.update(grads, _unpack(moments), _float32(params))
        new = jax.tree.map(lambda p, step: (p - scalars.rate * step).astype(p.dtype), params, steps)
        return jax.tree.map(functools.partial(jnp.where, scalars.made), (new, self._pack(state)), (params, moments))


def _rule_of(settings: TrainingSettings) -> _Rule:
    """Return the compiled functions for these settings, the same each time: what was compiled ahead is what `AdamW` calls."""
    key = _numbers(settings), settings.optim.endswith("8bit")
    if key not in _RULES:
        _RULES[key] = _Rule(settings)
    return _RULES[key]


_RULES: dict[Any, _Rule] = {}


def _numbers(settings: TrainingSettings) -> Adam:
    return Adam(settings.adam_beta1, settings.adam_beta2, settings.adam_epsilon, settings.weight_decay)


def lowered(settings: TrainingSettings, adapter: Tree, grads: Tree, number: Any) -> Iterator[tuple[str, Any]]:
    """Yield the functions of an update, lowered for a layer's adapter and gradients as described, and `number`, a described scalar."""
    rule, device = _rule_of(settings), one_device().sharding("device")
    moments = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), abstract_moments(settings, adapter)
    )
    yield "moments", rule.init.lower(adapter)
    made = jax.ShapeDtypeStruct(number.shape, bool, sharding=device)
    yield "update", rule.update.lower(adapter, grads, moments, _Scalars(number, number, made))


def abstract_moments(settings: TrainingSettings, abstract_layer: Tree) -> Any:
    """What the moments of a layer of parameters look like, without allocating them."""
    return jax.eval_shape(lambda layer: _packing(settings)(_rule(settings).init(_float32(layer))), abstract_layer)


def _float32(tree: Tree) -> Tree:
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


def _rule(settings: TrainingSettings) -> optax.GradientTransformation:
    return optax.chain(
        optax.scale_by_adam(settings.adam_beta1, settings.adam_beta2, settings.adam_epsilon),
        optax.add_decayed_weights(settings.weight_decay),
    )


def _packing(settings: TrainingSettings) -> Callable[[Any], Any]:
    """From optax's state to the state with its moments as they are kept."""
    return _pack if settings.optim.endswith("8bit") else lambda state: state


def _pack(state: Any) -> Any:
    """Moments in 8 bits: m is signed, v is not."""
    adam, *rest = state
    mu = jax.tree.map(functools.partial(_to_8_bits, signed=True), adam.mu)
    nu = jax.tree.map(functools.partial(_to_8_bits, signed=False), adam.nu)
    return adam._replace(mu=mu, nu=nu), *rest


def _to_8_bits(moment: jax.Array, *, signed: bool) -> jax.Array | BlockwiseTensor:
    return moment if moment.size < MIN_8BIT_SIZE else blockwise.quantize(moment, signed=signed)


def _unpack(state: Any) -> Any:
    """The inverse of `_pack`, up to what 8 bits lose."""

    def unpack(moment: Any) -> Any:
        return blockwise.dequantize(moment) if isinstance(moment, BlockwiseTensor) else moment

    return jax.tree.map(unpack, state, is_leaf=lambda x: isinstance(x, BlockwiseTensor))


@jax.jit
def _global_norm(square_sums: list[jax.Array]) -> jax.Array:
    return jnp.sqrt(functools.reduce(jnp.add, square_sums))


@jax.jit
def _finite(norm: jax.Array, loss: jax.Array) -> jax.Array:
    return jnp.isfinite(norm) & jnp.isfinite(loss)


@functools.partial(jax.jit, static_argnames="max_norm")
def _clip_factor(norm: jax.Array, max_norm: float) -> jax.Array:
    return jnp.minimum(1.0, max_norm / (norm + 1e-6)) if max_norm > 0 else jnp.ones_like(norm)
