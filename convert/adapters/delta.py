"""What an adapter does to one weight: the float32 sum that a merge rounds to bfloat16.

LoRA    W + s·B·A
DoRA    m / ‖W + s·B·A‖ · (W + s·B·A)         norms of rows; m is the stored magnitude, one a row
"""

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from convert.files import bitsandbytes, pieces
from convert.files.ahead import in_order
from convert.files.folder import ModelFolder
from convert.files.stated import names_of
from qlora_jax.config import QuantizationSettings

Base = Literal["original", "dequantized"]
AskedBase = Literal["auto", "original", "dequantized"]


@dataclasses.dataclass(frozen=True)
class Pair:
    """One linear's adapter, float32: `lora_a` [r, in], `lora_b` [out, r], and with DoRA `magnitude` [out]."""

    lora_a: np.ndarray
    lora_b: np.ndarray
    scaling: float
    magnitude: np.ndarray | None = None

    def rows(self, rows: slice) -> "Pair":
        """The part that changes these rows of the weight."""
        magnitude = None if self.magnitude is None else self.magnitude[rows]
        return Pair(self.lora_a, self.lora_b[rows], self.scaling, magnitude)


def resolve_base(asked: AskedBase, folder: ModelFolder | None) -> Base:
    """Return the base that `auto` stands for: the original weights, or the dequantized ones of a folder that is in 4 bits.

    Args:
        folder: the base model's; None where it is not here, and is taken for an unquantized one.
    """
    if asked != "auto":
        return asked
    return "dequantized" if folder is not None and folder.is_4bit else "original"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenRows:
    """Rows of an embedding or head [vocabulary, hidden] that take the base's place: `indices` [n], `values` [n, hidden] float32."""

    indices: np.ndarray
    values: np.ndarray

    def into(self, rows: pieces.Rows) -> pieces.Rows:
        """The base's rows, those of the tokens replaced, in the dtype they come in."""
        return ((some, functools.partial(self._replaced, some, values)) for some, values in rows)

    def _replaced(self, some: slice, values: pieces.Values) -> np.ndarray | jax.Array:
        base = values()
        inside = (self.indices >= some.start) & (self.indices < some.stop)
        if not inside.any():
            return base
        replaced = np.array(base)
        replaced[self.indices[inside] - some.start] = self.values[inside].astype(replaced.dtype)
        return replaced


def adapted(weight: np.ndarray | jax.Array, pair: Pair) -> np.ndarray:
    """weight [out, in] of any float dtype → float32 [out, in], the adapter in it, not rounded."""
    total = np.asarray(weight).astype(np.float32)
    total += np.asarray(_scaled_product(pair.lora_b, pair.lora_a, np.float32(pair.scaling)))
    return total if pair.magnitude is None else total * dora_factor(total, pair.magnitude)


@jax.jit
def _scaled_product(lora_b: jax.Array, lora_a: jax.Array, scaling: jax.Array) -> jax.Array:
    """By XLA, because numpy's threads and XLA's, which both wait by spinning, take the cores from each other: 4 times slower on two."""
    return jnp.matmul(lora_b, lora_a, precision=jax.lax.Precision.HIGHEST) * scaling


def dora_factor(total: np.ndarray, magnitude: np.ndarray) -> np.ndarray:
    """[out, 1] float32: what DoRA multiplies the rows of W + s·B·A by."""
    return (magnitude / np.linalg.norm(total, axis=1))[:, None]


def merged_weight(weight: np.ndarray | jax.Array, pair: Pair) -> np.ndarray:
    """weight [out, in] of any float dtype → bfloat16 [out, in], rounded once."""
    if pair.magnitude is not None:
        return adapted(weight, pair).astype(ml_dtypes.bfloat16)
    return np.asarray(_rounded_sum(weight, pair.lora_b, pair.lora_a, np.float32(pair.scaling)))


@jax.jit
def _rounded_sum(weight: jax.Array, lora_b: jax.Array, lora_a: jax.Array, scaling: jax.Array) -> jax.Array:
    """`adapted`, rounded. The minimum changes no finite value, and keeps compilers from fusing product and sum into one rounding."""
    delta = jnp.minimum(_scaled_product(lora_b, lora_a, scaling), np.finfo(np.float32).max)
    return (weight.astype(jnp.float32) + delta).astype(jnp.bfloat16)


def base_rows(
    folder: ModelFolder,
    name: str,
    quantization: QuantizationSettings,
    base: Base,
    stored: np.ndarray | None = None,
    tokens: TokenRows | None = None,
) -> pieces.Rows:
    """A weight [out, in] before the adapter, some rows at a time: bfloat16; `dequantized`, a layer's linear: in what 4 bits round to.

    Args:
        stored: the values that take the base's place, if there are any.
        tokens: rows of an embedding or head that do, whatever the others are.
    """
    first, rows = base_passes(folder, name, quantization, base, stored, tokens)
    for _ in in_order(first):
        pass
    return rows


def base_passes(
    folder: ModelFolder,
    name: str,
    quantization: QuantizationSettings,
    base: Base,
    stored: np.ndarray | None = None,
    tokens: TokenRows | None = None,
) -> tuple[pieces.FirstPass, pieces.Rows]:
    """`base_rows`, the work that comes before any values left to the caller."""
    if tokens is not None:
        first, rows = base_passes(folder, name, quantization, base, stored)
        return first, tokens.into(rows)
    if stored is not None:
        some = pieces.row_slices(*stored.shape)
        copies = ((rows, functools.partial(np.ndarray.astype, stored[rows], ml_dtypes.bfloat16)) for rows in some)
        return iter(()), copies
    is_linear = names_of(folder).parse_linear(name) is not None
    if base == "dequantized" and (is_linear or bitsandbytes.is_packed(folder, name)):
        return pieces.through_4_bits(folder, name, quantization)
    return iter(()), pieces.bfloat16_rows(folder, name)
