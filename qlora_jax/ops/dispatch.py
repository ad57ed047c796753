"""The 4-bit format at the hardware's speed: each operation as a GPU kernel where there is one, as its plain twin in `nf4.py` elsewhere.

This is the one place that chooses. A kernel is used on a GPU whose compiler takes it, after a small trial run has given the twin's bits;
otherwise one warning says what is lost, which is speed and nothing else. The kernels' modules are imported only then, so that a JAX
without the backend they are written for still imports this package.
"""

import concurrent.futures
import functools
import warnings
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from qlora_jax.ops import nf4
from qlora_jax.ops.blockwise import BlockwiseTensor
from qlora_jax.ops.nf4 import QuantizedTensor, QuantType
from qlora_jax.ops.operands import Adam, Gated, Rotation
from qlora_jax.ops.twins import dense_matmul, plain_low_rank_add, plain_rms_norm, plain_rotate, plain_sums, plain_swiglu
from qlora_jax.runtime.machine import device_kind

__all__ = [
    "adamw_8bit",
    "available",
    "dequantize",
    "low_rank_add",
    "matmul",
    "quantize",
    "rms_norm",
    "rms_norm_backward",
    "swiglu",
    "swiglu_backward",
    "updates_8bit",
]


def quantize(weight: jax.Array, double_quant: bool = True, quant_type: QuantType = "nf4") -> QuantizedTensor:
    """As `nf4.quantize`, with the same bytes (the mean of the scales, a sum in another order, may differ in its last bits)."""
    if available():
        from qlora_jax.ops.pallas import quantization as kernel

        if kernel.supported(weight):
            return kernel.quantize(weight, double_quant, quant_type)
    return nf4.quantize(weight, double_quant, quant_type)


def dequantize(weight: QuantizedTensor, dtype: jax.typing.DTypeLike | None = None) -> jax.Array:
    """As `nf4.dequantize`, bit for bit."""
    if available():
        from qlora_jax.ops.pallas import dequantization as kernel

        name = jnp.dtype(dtype or weight.dtype).name
        if kernel.supported(weight, name):
            return kernel.dequantize(weight, name)
    return nf4.dequantize(weight, dtype)


def matmul(x: jax.Array, weight: QuantizedTensor) -> jax.Array:
    """x [..., in] times the transpose of a 4-bit weight of shape (out, in): [..., out] in x's dtype.

    The weight is dequantized to its own dtype, as bitsandbytes does, and from there to x's dtype. For few tokens on a GPU it never exists:
    a kernel decodes and multiplies in one go, summing in float32 in another order.
    """
    if available():
        from qlora_jax.ops.pallas import narrow_matmul as kernel

        rows = x.reshape(-1, x.shape[-1])
        if kernel.supported(rows, weight):
            return kernel.matmul(rows, weight).reshape(*x.shape[:-1], -1)
    return dense_matmul(x, dequantize(weight))


def low_rank_add(
    bases: Sequence[jax.Array],
    u: jax.Array,
    v: jax.Array,
    *,
    factor: float = 1.0,
    first: int = 0,
    transposed: bool = False,
    drawn: jax.Array | None = None,
    threshold: int = 0,
    rotation: Rotation | None = None,
) -> jax.Array:
    """bases [tokens, features] each, u [tokens, R'], v [R, features] → Σ bases + factor · u[:, first : first + R]·v, as the bases.

    The kernel sums in float32 and rounds once, and writes where the first base was; the twin rounds the product, and every sum.

    Args:
        transposed: v is [features, R].
        drawn, threshold: [tokens, features] unsigned integers; where they are below the threshold nothing is added to the bases.
        rotation: the sum is rotated.
    """
    options = {"factor": factor, "first": first, "transposed": transposed, "drawn": drawn, "threshold": threshold}
    if available():
        from qlora_jax.ops.pallas import low_rank as kernel

        if kernel.supported(bases, u, v) and kernel.rotates(rotation, transposed):
            return kernel.add(bases, u, v, **options, rotation=rotation)
    total = plain_low_rank_add(bases, u, v, **options)
    return total if rotation is None else plain_rotate(total, rotation)


def swiglu(gated: Gated, *, spent: bool = False) -> jax.Array:
    """silu(gate) · up [tokens, features], the adapters' terms included. The kernel rounds once, the twin every step.

    `spent`: the two products are not needed afterwards, and the kernel may write where they were.
    """
    if available():
        from qlora_jax.ops.pallas import low_rank as kernel

        if _supported(gated):
            return kernel.swiglu(gated, spent=spent)
    return plain_swiglu(*plain_sums(gated), gated.activation)


def swiglu_backward(
    gated: Gated,
    dy: jax.Array,
    u: jax.Array,
    v: jax.Array,
    *,
    factor: float = 1.0,
    drawn: jax.Array | None = None,
    threshold: int = 0,
    spent: bool = False,
) -> list[jax.Array]:
    """From the gradient of what `swiglu` gives: that again, and the gradients of its two sums; [tokens, features] each.

    The gradient is a low-rank sum itself: dy [tokens, features] + factor · u·v, with u [tokens, R], v [R, features], and nothing added
    where what is drawn is below the threshold, see `low_rank_add`. `spent` as in `swiglu`.
    """
    options = {"factor": factor, "drawn": drawn, "threshold": threshold}
    if available():
        from qlora_jax.ops.pallas import low_rank as kernel

        if _supported(gated) and kernel.supported([dy], u, v):
            return kernel.swiglu_backward(gated, dy, u, v, **options, spent=spent)
    dy = plain_low_rank_add([dy], u, v, **options)
    inner, pull = jax.vjp(functools.partial(plain_swiglu, activation=gated.activation), *plain_sums(gated))
    return [inner, *pull(dy)]


def _supported(gated: Gated) -> bool:
    from qlora_jax.ops.pallas import low_rank as kernel

    is_known = gated.activation == "silu"
    return is_known and all(kernel.supported([base], gated.u, v.T) for base, v, *_ in gated.halves)


def updates_8bit(param: jax.Array, mu: Any) -> bool:
    """Whether `adamw_8bit` has a kernel for this parameter and first moment here."""
    if not available():
        return False
    from qlora_jax.ops.pallas import adam as kernel

    return kernel.supported(param, mu)


def adamw_8bit(
    param: jax.Array, grad: jax.Array, mu: BlockwiseTensor, nu: BlockwiseTensor, numbers: jax.Array, adam: Adam
) -> tuple[jax.Array, BlockwiseTensor, BlockwiseTensor]:
    """One step of AdamW where `updates_8bit` says so: the new parameter and its moments, written where the old ones were.

    Its twin is the rule in `optimizer.py`; here sums and products may be fused, and so round once where they round twice there.

    Args:
        numbers: [5] float32: what the gradient is multiplied by, the learning rate, 1 - beta1^t and 1 - beta2^t, and 1 if the step is to be
            made, 0 if all is to stay as it is, whatever the gradient.
    """
    from qlora_jax.ops.pallas import adam as kernel

    return kernel.update(param, grad, mu, nu, numbers, adam)


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """x [..., D] / rms(x) in float32, rounded to x's dtype, times `weight` [D]; a float32 weight multiplies before that rounding."""
    if available() and _is_early(x, weight):
        from qlora_jax.ops.pallas import norm as kernel

        rows, scale = x.reshape(-1, x.shape[-1]), weight.astype(x.dtype)
        if kernel.supported(rows, scale):
            return kernel.forward(rows, scale, eps).reshape(x.shape)
    return plain_rms_norm(x, weight, eps)


def rms_norm_backward(x: jax.Array, weight: jax.Array, dnormed: jax.Array, dskip: jax.Array, eps: float) -> jax.Array:
    """From the gradient of what `rms_norm` gives, that of x, plus `dskip`; all [..., D]. The kernel rounds once, the twin every step."""
    if available() and _is_early(x, weight):
        from qlora_jax.ops.pallas import norm as kernel

        rows, dnormed_rows, dskip_rows = (array.reshape(-1, x.shape[-1]) for array in (x, dnormed, dskip))
        if kernel.supported(rows, scale := weight.astype(x.dtype)):
            return kernel.backward(rows, scale, dnormed_rows, dskip_rows, eps).reshape(x.shape)
    _, pull = jax.vjp(lambda x: (plain_rms_norm(x, weight, eps), x), x)
    return pull((dnormed, dskip))[0]


def _is_early(x: jax.Array, weight: jax.Array) -> bool:
    """Whether a norm's weight multiplies what was rounded already, which is what the kernel does."""
    return weight.dtype != jnp.float32 or x.dtype == jnp.float32


@functools.cache
def available() -> bool:
    """Whether this process's GPU runs the kernels: tried once, on small arrays, and compared with what they should give."""
    if jax.default_backend() != "gpu":
        return False
    from qlora_jax.ops.self_test import find_problem

    with concurrent.futures.ThreadPoolExecutor(
        1
    ) as elsewhere:  # a thread of its own is not in the middle of tracing anything
        problem = elsewhere.submit(find_problem).result()
    if problem:
        warnings.warn(
            f"the 4-bit kernels do not work on {device_kind()} ({problem}): "
            "using XLA's operations instead, which give the same numbers more slowly",
            stacklevel=2,
        )
    return not problem
