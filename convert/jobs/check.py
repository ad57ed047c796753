"""A merge proves itself: a few tokens go through base + adapter and through the merged folder, and every layer's outputs are compared.

Three models walk side by side in float32, as the three rows of one batch:

    adapted   x·Wᵀ + s·(x·Aᵀ)·Bᵀ            base and adapter, as they are trained and run (DoRA: times m / ‖W + s·B·A‖)
    rounded   x·bf16(W + s·B·A)ᵀ            the same summed and rounded once: what the best of merges computes
    merged    x·W'ᵀ                         the folder that was written

The merged model cannot be nearer to the adapted one than rounding to bfloat16 allows, and how far that takes it is measured, layer by
layer, on the same tokens. It passes if it is no more than `ROOM` times as far. A bound from theory alone would have to be much wider:
where deltas are smaller than the spacing of bfloat16 the roundings of a row are not independent.

Each matrix is read when its turn comes, some rows at a time, so memory does not depend on the model.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx

from convert.adapters.adapter import Adapter
from convert.adapters.delta import Base, Pair, adapted, base_rows, dora_factor, merged_weight
from convert.files import names, pieces
from convert.files.ahead import in_order
from convert.files.folder import ModelFolder
from convert.load import read_config
from qlora_jax.base.errors import InputError
from qlora_jax.config import QuantizationSettings
from qlora_jax.model.architecture import Architecture
from qlora_jax.model.decoder import DecoderLayer, RMSNorm
from qlora_jax.model.linear import FrozenParam
from qlora_jax.ops import twins
from qlora_jax.ops.operands import Rotation

NUM_TOKENS = 16
ROOM = 2.0
"""A right merge has the rounded model's bits, but for sums that another library or device adds in another order: they land on the other
side of a rounding for a few weights in a thousand, which changes the distance by far less than this."""
FLOAT32_NOISE = 1e-5
"""Of the norm of what is compared: float32 sums of thousands of products err by 4e-6 where a delta so small is lost to rounding whole."""
ADAPTED, ROUNDED, MERGED = 0, 1, 2


@dataclasses.dataclass(frozen=True)
class Differences:
    """Largest absolute differences from base + adapter, and the norms' ratios by which a layer is judged; the head is the last layer."""

    logits: float
    largest_logit: float
    rounding_alone: float
    worst_layer: int
    worst_share: float

    def __str__(self) -> str:
        return (
            f"on {NUM_TOKENS} tokens the merged model's logits differ from those of base + adapter by at most {self.logits:.2g} "
            f"(rounding to bfloat16 alone: {self.rounding_alone:.2g}; largest logit: {self.largest_logit:.3g}), "
            f"and layer {self.worst_layer}'s outputs, the furthest, by {self.worst_share:.2%}"
        )


def check_merge(
    folder: ModelFolder,
    adapter: Adapter,
    written: Path,
    base: Base,
    advance: Callable[[], object] = lambda: None,
    out: Path | None = None,
) -> Differences:
    """Compare the merged folder `written` with base + adapter on `NUM_TOKENS` random tokens, in float32.

    Args:
        advance: called after each layer.
        out: what messages call the folder; by default `written`.

    Raises:
        InputError: a layer or the logits are further from base + adapter than rounding explains; or `written` is no model of this shape.
    """
    config, merged, out = read_config(folder), ModelFolder(written), out or written
    if read_config(merged) != config:
        raise InputError(out, found="a model of another shape", expected=f"that of {folder.path}")
    models = _Models(folder, adapter, merged, base, config)
    with jax.default_matmul_precision("highest"):
        return _compare(models, advance, out)


def _compare(models: "_Models", advance: Callable[[], object], out: Path) -> Differences:
    config = models.config
    token_ids = np.random.default_rng(0).integers(0, config.vocab_size, NUM_TOKENS)
    h = jnp.asarray(models.embed(token_ids))
    positions = jnp.broadcast_to(jnp.arange(NUM_TOKENS)[None], h.shape[:2])
    shares = []
    for layer in range(config.num_hidden_layers):
        h = models.layer(layer)(h, positions)
        shares.append(_share(h, f"layer {layer}", out))
        advance()
    logits = models.head(h)
    _share(logits, "the logits", out)
    distance = np.abs(logits - logits[ADAPTED]).max(axis=(1, 2))
    worst = int(np.argmax(shares))
    largest = float(np.abs(logits[ADAPTED]).max())
    return Differences(float(distance[MERGED]), largest, float(distance[ROUNDED]), worst, shares[worst])


def _share(outputs: jax.Array | np.ndarray, what: str, out: Path) -> float:
    """outputs [3, T, ...] → ‖merged - adapted‖ / ‖adapted‖, refused if rounding does not explain it."""
    outputs = np.asarray(outputs, np.float64)
    size = np.linalg.norm(outputs[ADAPTED])
    rounding, found = (np.linalg.norm(outputs[row] - outputs[ADAPTED]) / size for row in (ROUNDED, MERGED))
    if not found <= ROOM * rounding + FLOAT32_NOISE:  # not so for NaN either
        raise InputError(
            out,
            found=f"{what} of the merged model differs from base + adapter by {found:.3%}",
            expected=f"at most {ROOM:g} times {rounding:.3%}, which is what rounding the merged weights to bfloat16 explains",
            fix="do not use what was written (convert.merge removes it): merge again with this adapter and this base",
        )
    return float(found)


class _Models:
    """The three models, their weights still in the folders."""

    def __init__(
        self, folder: ModelFolder, adapter: Adapter, merged: ModelFolder, base: Base, config: Architecture
    ) -> None:
        self.folder, self.adapter, self.merged, self.base, self.config = folder, adapter, merged, base, config
        self._layer = _abstract_layer(config)

    def embed(self, token_ids: np.ndarray) -> np.ndarray:
        """token_ids [T] → [3, T, D] float32."""
        out, pair = np.empty((3, token_ids.size, self.config.hidden_size), np.float32), self._pair(names.EMBEDDING)
        for rows, values in self._plain_rows(names.EMBEDDING):
            inside = (token_ids >= rows.start) & (token_ids < rows.stop)
            if not inside.any():
                continue
            chosen = token_ids[inside] - rows.start
            weight = np.asarray(values())[chosen]
            out[:MERGED, inside] = weight
            out[MERGED, inside] = self._theirs(names.EMBEDDING, rows)[chosen]
            if pair is not None:
                part = dataclasses.replace(pair, lora_b=pair.lora_b[token_ids[inside]])
                weight = weight.astype(ml_dtypes.bfloat16)
                out[ADAPTED, inside] = adapted(weight, part)
                out[ROUNDED, inside] = merged_weight(weight, part)
        return out

    def layer(self, layer: int) -> DecoderLayer:
        """A decoder layer for h [3, T, D], whose linears read their weights when they are called."""
        module = self._layer
        for name in names.NORM_NAMES:
            setattr(module, name, functools.partial(_apart, self._norm(names.norm(layer, name))))
        module.linear = functools.partial(self._linear, layer)
        return module

    def head(self, h: jax.Array) -> np.ndarray:
        """h [3, T, D] → logits [3, T, V] float32."""
        x = np.asarray(self._norm(names.FINAL_NORM)(h))
        return np.asarray(self._product(names.EMBEDDING if self.config.tie_word_embeddings else names.LM_HEAD, x))

    def _linear(self, layer: int, name: str, x: jax.Array) -> jax.Array:
        """x [3, T, in], or the same as [3 · T, in] → float32, each row by its own model."""
        return _apart(functools.partial(self._product, names.linear(layer, name)), x)

    def _pair(self, tensor: str) -> Pair | None:
        return self.adapter.pairs.get(names.parse_target(tensor))

    def _product(self, tensor: str, x: jax.Array | np.ndarray) -> jax.Array:
        """x [3, T, in] → [3, T, out] float32 by a weight, with its adapter if it has one."""
        pair, stored = self._pair(tensor), self.adapter.saved.get(tensor)
        through_4_bits = self.base == "dequantized" and names.parse_linear(tensor) is not None and stored is None
        columns = _columns(np.asarray(x))
        y = np.empty((3, self.merged.spec(tensor).shape[0], NUM_TOKENS), np.float32)
        rows_of, down = self._plain_rows(tensor), None
        if pair is not None or through_4_bits:
            rows_of = base_rows(self.folder, tensor, self.adapter.quantization, self.base, stored)
        if pair is not None:
            down = np.float32(pair.scaling) * np.asarray(_times(pair.lora_a, columns[ADAPTED]))

        def some_rows(rows: slice, values: pieces.Values) -> None:
            weight = values()
            y[ADAPTED, rows] = _times(weight, columns[ADAPTED])
            if pair is not None:
                part = pair.rows(rows)
                y[ADAPTED, rows] += _times(part.lora_b, down)
                if part.magnitude is not None:
                    total = adapted(weight, dataclasses.replace(part, magnitude=None))
                    y[ADAPTED, rows] *= dora_factor(total, part.magnitude)
                weight = merged_weight(weight, part)
            y[ROUNDED, rows] = _times(weight, columns[ROUNDED])
            y[MERGED, rows] = _times(self._theirs(tensor, rows), columns[MERGED])

        for _ in in_order(functools.partial(some_rows, *some) for some in rows_of):
            pass
        return jnp.asarray(y.swapaxes(1, 2))

    def _norm(self, name: str) -> RMSNorm:
        """A norm for [3, T, D], with each model's own weight."""
        ours = (
            self.adapter.saved[name].astype(ml_dtypes.bfloat16)
            if name in self.adapter.saved
            else self.folder.read(name)
        )
        norm = nnx.eval_shape(lambda: RMSNorm(self.config.hidden_size, self.config.rms_norm_eps))
        weights = np.stack([ours, ours, self.merged.read(name)]).astype(np.float32)[:, None]
        norm.weight = FrozenParam(jnp.asarray(weights))
        return norm

    def _plain_rows(self, name: str) -> pieces.Rows:
        """A matrix without a delta: base + adapter's, in the dtype it has."""
        stored, tokens = self.adapter.saved.get(name), self.adapter.tokens.get(name)
        if stored is not None or tokens is not None:
            return base_rows(self.folder, name, self.adapter.quantization, "original", stored, tokens)
        some = pieces.row_slices(*self.folder.spec(name).shape)
        return ((rows, functools.partial(_rows, self.folder, name, rows)) for rows in some)

    def _theirs(self, name: str, rows: slice) -> np.ndarray:
        """The merged folder's rows of a matrix."""
        return _rows(self.merged, name, rows)


def _rows(folder: ModelFolder, name: str, rows: slice) -> np.ndarray:
    columns = folder.spec(name).shape[1]
    return folder.elements(name, rows.start * columns, (rows.stop - rows.start) * columns).reshape(-1, columns)


@jax.jit
def _times(weight: jax.Array, columns: jax.Array) -> jax.Array:
    """weight [out, in] of any float dtype, columns [in, T] → [out, T] float32. By XLA: see `delta`."""
    return jnp.matmul(weight.astype(jnp.float32), columns, precision=jax.lax.Precision.HIGHEST)


def _apart(part: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    """What a part of a layer makes of x [3, T, in]; of a layer that works on [3 · T, in] at once, in that form."""
    return part(x.reshape(3, NUM_TOKENS, -1)).reshape(*x.shape[:-1], -1)


def _columns(x: np.ndarray) -> np.ndarray:
    """[3, T, in] → [3, in, T], in memory too: W·xᵀ is several times as fast as x·Wᵀ where tokens are few."""
    return np.ascontiguousarray(x.swapaxes(1, 2))


class _Layer(DecoderLayer):
    """A decoder layer whose linears are `linear(name, x)`, and whose norms are any functions."""

    def normed(self, name: str, h: jax.Array) -> tuple[jax.Array, jax.Array]:
        """As a `DecoderLayer`."""
        return getattr(self, name)(h), h

    def project(
        self,
        names: Sequence[str],
        x: jax.Array,
        key: None,
        *,
        residual: jax.Array | None = None,
        rotation: Rotation | None = None,
        rotated: Sequence[bool] = (False,),
    ) -> list[jax.Array]:
        """As a `DecoderLayer`; its sharing is not for us."""
        if x.ndim == 4:  # heads side by side
            x = x.reshape(*x.shape[:2], -1)
        outputs = [self.linear(name, x) for name in names]
        if residual is not None:
            outputs[0] += residual
        if rotation is not None:
            outputs = [_turn(y, rotation) if turned else y for y, turned in zip(outputs, rotated, strict=True)]
        return outputs

    def feed_forward(self, x: jax.Array, residual: jax.Array, *unused: Any) -> jax.Array:
        """As a `DecoderLayer`."""
        inner = twins.plain_swiglu(*self.project(("gate_proj", "up_proj"), x, None))
        (out,) = self.project(("down_proj",), inner, None, residual=residual)
        return out


def _turn(y: jax.Array, rotation: Rotation) -> jax.Array:
    """y [3, T, heads · P], rotated."""
    return twins.plain_rotate(y.reshape(-1, y.shape[-1]), rotation).reshape(y.shape)


def _abstract_layer(config: Architecture) -> _Layer:
    """A decoder layer without weights."""
    return nnx.eval_shape(lambda: _Layer(config, None, QuantizationSettings(), "xla", nnx.Rngs(0)))
