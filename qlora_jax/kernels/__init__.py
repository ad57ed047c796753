"""The 4-bit format at the hardware's speed: each operation as a GPU kernel where there is one, as its plain twin in `nf4.py` elsewhere.

This is the one place that chooses. A kernel is used on a GPU whose compiler takes it, after a small trial run has given the twin's bits;
otherwise one warning says what is lost, which is speed and nothing else. The kernels' modules are imported only then, so that a JAX
without the backend they are written for still imports this package.
"""

import concurrent.futures
import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np

from qlora_jax import nf4
from qlora_jax.nf4 import QuantizedTensor, QuantType

__all__ = ["available", "dense_matmul", "dequantize", "matmul", "quantize"]


def quantize(weight: jax.Array, double_quant: bool = True, quant_type: QuantType = "nf4") -> QuantizedTensor:
    """As `nf4.quantize`, with the same bytes (the mean of the scales, a sum in another order, may differ in its last bits)."""
    if available():
        from qlora_jax.kernels import quantization as kernel

        if kernel.supported(weight):
            return kernel.quantize(weight, double_quant, quant_type)
    return nf4.quantize(weight, double_quant, quant_type)


def dequantize(weight: QuantizedTensor, dtype: jax.typing.DTypeLike | None = None) -> jax.Array:
    """As `nf4.dequantize`, bit for bit."""
    if available():
        from qlora_jax.kernels import dequantization as kernel

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
        from qlora_jax.kernels import narrow_matmul as kernel

        rows = x.reshape(-1, x.shape[-1])
        if kernel.supported(rows, weight):
            return kernel.matmul(rows, weight).reshape(*x.shape[:-1], -1)
    return dense_matmul(x, dequantize(weight))


def dense_matmul(x: jax.Array, dense: jax.Array) -> jax.Array:
    """x [..., in] times the transpose of a dequantized weight [out, in]: [..., out] in x's dtype."""
    return jnp.einsum("...i,oi->...o", x, dense.astype(x.dtype))


@functools.cache
def available() -> bool:
    """Whether this process's GPU runs the kernels: tried once, on a small weight, and compared with the twin."""
    if jax.default_backend() != "gpu":
        return False
    with concurrent.futures.ThreadPoolExecutor(
        1
    ) as elsewhere:  # a thread of its own is not in the middle of tracing anything
        problem = elsewhere.submit(_try_out).result()
    if problem:
        warnings.warn(
            f"the 4-bit kernels do not work on {jax.devices()[0].device_kind} ({problem}): "
            "using XLA's operations instead, which give the same numbers more slowly",
            stacklevel=2,
        )
    return not problem


def _try_out() -> str:
    """What is wrong with the kernels here; empty if nothing is."""
    try:
        from qlora_jax.kernels import dequantization as kernel

        weight = nf4.quantize(jnp.asarray(np.random.default_rng(0).standard_normal((64, 256)), jnp.bfloat16))
        found, expected = kernel.dequantize(weight, "bfloat16"), nf4.dequantize(weight)
        return "" if np.array_equal(np.asarray(found), np.asarray(expected)) else "their results differ from XLA's"
    except Exception as error:  # whatever a missing backend, compiler or driver raises
        return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
