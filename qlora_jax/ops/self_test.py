"""Every kernel on small arrays, beside what it should give: whether this card, driver and compiler do what they are asked.

One compiled function, which the compilation cache keeps: compiled one by one, the operations would take longer than a model's loading.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from qlora_jax.ops import blockwise, nf4
from qlora_jax.ops.operands import Adam, Gated, Rotation
from qlora_jax.ops.twins import plain_rotate, plain_sums, plain_swiglu

ROUNDING = 0.02
"""Relative: a few roundings to bfloat16, 2⁻⁹ each, where the twin rounds every step."""


def find_problem() -> str:
    """What is wrong with the kernels here; empty if nothing is."""
    weight = np.random.default_rng(0).standard_normal((64, 256), np.float32).astype(jnp.bfloat16)
    ones, thin = np.ones((128, 128), jnp.bfloat16), np.ones((128, 64), jnp.bfloat16)
    turned = Rotation(np.zeros((128, 32), np.float32), np.ones((128, 32), np.float32))
    try:
        same = jax.jit(agree)(weight, ones, thin, turned)
        return "" if bool(same) else "their results differ from XLA's"
    except Exception as error:  # whatever a missing backend, compiler or driver raises
        return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"


def agree(weight: jax.Array, ones: jax.Array, thin: jax.Array, turned: Rotation) -> jax.Array:
    """Whether what the kernels give is what it should be: dequantization bit for bit, sums up to rounding."""
    from qlora_jax.ops.pallas import adam, dequantization, low_rank, norm

    packed = nf4.quantize(weight)
    same = jnp.array_equal(dequantization.dequantize(packed, "bfloat16"), nf4.dequantize(packed))
    gated = Gated(ones, ones, thin, thin, thin, (0.02, 0.01), (0, 0))
    inner, pull = jax.vjp(plain_swiglu, *plain_sums(gated))
    trials = [
        (low_rank.add([ones], thin, thin.T), 65 * ones),
        (low_rank.add([ones], thin, thin, transposed=True, rotation=turned), plain_rotate(65 * ones, turned)),
        (low_rank.swiglu(gated, spent=True), inner),
        *zip(low_rank.swiglu_backward(gated, ones, 0 * thin, thin.T, spent=True), [inner, *pull(ones)], strict=True),
        (norm.forward(ones, ones[0], 0.0), ones),  # whose rms is 1
        (norm.backward(ones, ones[0], ones, ones, 0.0), ones),
        *zip(stepped(weight.astype(jnp.float32), adam.update), stepped(weight.astype(jnp.float32)), strict=True),
    ]
    close = [jnp.allclose(*(each.astype(jnp.float32) for each in pair), rtol=ROUNDING) for pair in trials]
    return jnp.logical_and(same, jnp.stack(close).all())


def stepped(grad: jax.Array, update: Callable[..., tuple[jax.Array, ...]] | None = None) -> list[jax.Array]:
    """A step of AdamW by a kernel, or by optax: the parameter, and both moments from 8 bits, far enough from 0 that one that fell to the
    other side of a threshold makes no difference."""
    moments = [blockwise.quantize(moment, signed=signed) for moment, signed in ((grad / 3, True), (grad**2, False))]
    if update is not None:
        numbers = jnp.asarray([1, 0.5, 1 - 0.9**2, 1 - 0.99**2, 1], jnp.float32)
        param, *moments = update(jnp.ones_like(grad), grad, *moments, numbers, Adam(0.9, 0.99, 1e-8, 0.1))
    else:
        rule = optax.chain(optax.scale_by_adam(0.9, 0.99, 1e-8), optax.add_decayed_weights(0.1))
        empty = rule.init(jnp.ones_like(grad))
        mu, nu = map(blockwise.dequantize, moments)
        state = (empty[0]._replace(count=jnp.asarray(1), mu=mu, nu=nu), *empty[1:])
        step, (state, _) = rule.update(grad, state, jnp.ones_like(grad))
        param = 1 - 0.5 * step
        moments = [
            blockwise.quantize(moment, signed=signed) for moment, signed in ((state.mu, True), (state.nu, False))
        ]
    return [2 + param, *(blockwise.dequantize(moment) + 8 * moment.absmax.max() for moment in moments)]
