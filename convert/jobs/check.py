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
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from convert.adapters.adapter import Adapter
from convert.adapters.delta import Base, Pair, adapted, base_rows, dora_factor, merged_weight
from convert.files import pieces
from convert.files.ahead import in_order
from convert.files.folder import ModelFolder
from convert.jobs.check_layer import SideLayer, abstract_layer, apart, norm, xielu
from convert.load import read_config
from qlora_jax.base.errors import InputError
from qlora_jax.model.architecture import Architecture

NUM_TOKENS = 16
ROOM = 2.0
"""A right merge has the rounded model's bits, but for sums that another library or device adds in another order: they land on the other
side of a rounding for a few weights in a thousand, which changes the distance by far less than this."""
FLOAT32_NOISE = 1e-5
"""Of the norm of what is compared: float32 sums of thousands of products err by 4e-6 where a delta so small is lost to rounding whole."""
ADAPTED, ROUNDED, MERGED = 0, 1, 2
MODELS = 3


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
        self.names, self._layer = adapter.names, functools.cache(functools.partial(abstract_layer, config))

    def embed(self, token_ids: np.ndarray) -> np.ndarray:
        """token_ids [T] → [3, T, D] float32."""
        out, pair = np.empty((3, token_ids.size, self.config.hidden_size), np.float32), self._pair(self.names.embedding)
        for rows, values in self._plain_rows(self.names.embedding):
            inside = (token_ids >= rows.start) & (token_ids < rows.stop)
            if not inside.any():
                continue
            chosen = token_ids[inside] - rows.start
            weight = np.asarray(values())[chosen]
            out[:MERGED, inside] = weight
            out[MERGED, inside] = self._theirs(self.names.embedding, rows)[chosen]
            if pair is not None:
                part = dataclasses.replace(pair, lora_b=pair.lora_b[token_ids[inside]])
                weight = weight.astype(ml_dtypes.bfloat16)
                out[ADAPTED, inside] = adapted(weight, part)
                out[ROUNDED, inside] = merged_weight(weight, part)
        return out * np.float32(self.config.embed_scale)

    def layer(self, layer: int) -> SideLayer:
        """A decoder layer for h [3, T, D], whose linears read their weights when they are called."""
        config, names = self.config, self.names
        module = self._layer(config.kinds[layer])
        for name in names.norms:
            weight, *bias = (self._vectors(names.norm(layer, name, part)) for part in names.norm_parts)
            setattr(module, name, apart(norm(config, weight, *bias), MODELS))
        for name in names.qk_norms:
            setattr(module, name, norm(config, self._vectors(names.qk_norm(layer, name))))
        if names.activation:
            numbers = {name: self._vectors(names.act_fn(layer, name)) for name in names.activation}
            module.act_fn = apart(xielu(numbers), MODELS)
        module.linear = functools.partial(self._linear, layer)
        return module

    def head(self, h: jax.Array) -> np.ndarray:
        """h [3, T, D] → logits [3, T, V] float32."""
        config, names = self.config, self.names
        weight, *bias = (self._vectors(names.final_norm_part(part)) for part in names.norm_parts)
        x = np.asarray(norm(config, weight, *bias)(h))
        logits = np.asarray(self._product(names.embedding if config.tie_word_embeddings else names.lm_head, x))
        logits = logits * np.float32(config.logit_scale)
        cap = config.logit_softcap
        return logits if cap is None else np.float32(cap) * np.tanh(logits / np.float32(cap))

    def _linear(self, layer: int, name: str, x: jax.Array) -> jax.Array:
        """x [3, T, in], or the same as [3 · T, in] → float32, each row by its own model."""
        y = apart(functools.partial(self._product, self.names.linear(layer, name)), MODELS)(x)
        if name not in self.names.biased:
            return y
        bias = self._vectors(self.names.bias(layer, name))[:, None]
        return (y.reshape(MODELS, NUM_TOKENS, -1) + bias).reshape(y.shape)

    def _pair(self, tensor: str) -> Pair | None:
        return self.adapter.pairs.get(self.names.parse_target(tensor))

    def _product(self, tensor: str, x: jax.Array | np.ndarray) -> jax.Array:
        """x [3, T, in] → [3, T, out] float32 by a weight, with its adapter if it has one."""
        pair, stored = self._pair(tensor), self.adapter.saved.get(tensor)
        through_4_bits = self.base == "dequantized" and self.names.parse_linear(tensor) is not None and stored is None
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

    def _vectors(self, name: str) -> jax.Array:
        """Each model's own of a tensor that is no matrix: [3, ...] float32."""
        saved = self.adapter.saved
        ours = saved[name].astype(ml_dtypes.bfloat16) if name in saved else self.folder.read(name)
        return jnp.asarray(np.stack([ours, ours, self.merged.read(name)]).astype(np.float32))

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


def _columns(x: np.ndarray) -> np.ndarray:
    """[3, T, in] → [3, in, T], in memory too: W·xᵀ is several times as fast as x·Wᵀ where tokens are few."""
    return np.ascontiguousarray(x.swapaxes(1, 2))
