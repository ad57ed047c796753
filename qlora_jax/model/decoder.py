"""The decoder layer as a Flax module: one for all families, driven by the facts of an `Architecture`.

Axes, here and in every einsum: B batch, T time, S cached time, D hidden, H query heads, K kv heads, P head dim, F mlp,
V vocab, R rank, L layers.
"""

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from qlora_jax.config import LoraSettings, QuantizationSettings
from qlora_jax.model.architecture import Architecture, Kind
from qlora_jax.model.attention import Attention, Cache, attend, attend_cached, rotate_heads, rotation
from qlora_jax.model.linear import LoRA, NF4Linear, project
from qlora_jax.model.lora_matmul import LORA_X
from qlora_jax.model.mlp import GATED_PRODUCTS, Activation, Xielu, feed_forward
from qlora_jax.model.norms import make_norm
from qlora_jax.ops.operands import Rotation

MLP_TOKENS = 8192
"""Tokens the MLP works on at a time, by default: at 70B, 0.5 GB for each of its [N, F] arrays in bfloat16."""

KEPT = jax.checkpoint_policies.save_only_these_names(*GATED_PRODUCTS, LORA_X)
"""What a layer that is not run again keeps of its projections and of its MLP, besides their inputs and attention's own."""


def default_compute_dtype() -> jnp.dtype:
    """bfloat16 on a GPU; float32 on a CPU, where bfloat16 is slower."""
    return jnp.dtype(jnp.bfloat16 if jax.default_backend() == "gpu" else jnp.float32)


class DecoderLayer(nnx.Module):
    """Attention and MLP, each on a normed input and added to it. The linears are NF4; those in `lora.targets` carry an adapter.

    Which norms, linears and positions a layer has is the architecture's and its kind's business: see `architecture`.
    """

    def __init__(
        self,
        config: Architecture,
        lora: LoraSettings | None,
        quantization: QuantizationSettings,
        attention: Attention,
        rngs: nnx.Rngs,
        *,
        kind: Kind | None = None,
        share_dense: bool = False,
        mlp_tokens: int = MLP_TOKENS,
        keep: bool = False,
    ) -> None:
        """A layer of random weights.

        Args:
            kind: by default that of the first layer.
            share_dense: see `linear.project`.
            mlp_tokens: the MLP works on at most so many tokens at a time, each chunk run again in the backward pass: [N, F] never exists.
            keep: differentiated, keep only what is cheap to keep for what it costs to compute: queries, keys, values, what attention gives,
                the outputs that enter the activation and the adapters' [N, R]. All else, elementwise, is computed again. Otherwise jax
                decides, which is for a layer that is run again within the same compiled function.
        """
        self.config, self.kind, self.attention = config, kind or config.kinds[0], attention
        self.share_dense, self.mlp_tokens, self.keep = share_dense, mlp_tokens, keep
        for name in config.norms.names:
            setattr(self, name, make_norm(config.hidden_size, config.norms))
        for name, shape in config.qk_norm_shapes().items():
            setattr(self, name, make_norm(shape, config.norms, of_heads=True))
        if config.activation == "xielu":
            self.act_fn = Xielu()
        targets = () if lora is None else lora.targets(config.linears)
        for name, linear in config.linears.items():
            rows, columns = linear.shape
            adapter = None
            if name in targets:
                adapter = LoRA(columns, rows, lora.r, lora.scaling, lora.lora_dropout, rngs, lora.dtype)
            options = {"bias": linear.bias, "recomputed": not keep, "share_dense": share_dense}
            setattr(self, name, NF4Linear(columns, rows, adapter, quantization, rngs, **options))

    def __call__(
        self,
        h: jax.Array,
        positions: jax.Array,
        key: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
    ) -> jax.Array:
        """h [B, T, D] at `positions` [B, T] → [B, T, D], attending causally, and within segments only if `segment_ids` [B, T] are given.

        `key` turns the adapters' dropout on.
        """
        keys = self._dropout_keys(key)
        around = functools.partial(jax.checkpoint, policy=KEPT) if self.keep else lambda part: part

        def entered(h: jax.Array) -> tuple[jax.Array | None, ...]:
            x, h = self.normed(self.config.norms.before_attention, h)
            return *self._heads(x, positions, keys), h, x if self.config.parallel else None

        q, k, v, h, x = around(entered)(h)
        attended = attend(
            q, k, v, config=self.config, kind=self.kind, segment_ids=segment_ids, implementation=self.attention
        )
        h = self._joined(h, attended, keys)
        return around(lambda h, x: self._chunked_mlp(h, x, keys))(h, x)

    def decode(self, h: jax.Array, positions: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        """The same for generation: h [B, T, D] continues at positions[:, 0], after what `cache` holds; no dropout."""
        keys = self._dropout_keys(None)
        x, h = self.normed(self.config.norms.before_attention, h)
        q, k, v = self._heads(x, positions, keys)
        start = positions[0, 0]
        cache = tuple(
            jax.lax.dynamic_update_slice_in_dim(old, new, start, axis=1) for old, new in zip(cache, (k, v), strict=True)
        )
        h = self._joined(h, attend_cached(q, cache, positions, self.config, self.kind), keys)
        return self._chunked_mlp(h, x if self.config.parallel else None, keys), cache

    def normed(self, name: str | None, h: jax.Array) -> tuple[jax.Array, jax.Array]:
        """A norm of the layer on h [..., D] → (normed, h), see `RMSNorm.and_skip`; h itself where there is no norm."""
        return (h, h) if name is None else getattr(self, name).and_skip(h)

    def project(self, names: Sequence[str], x: jax.Array, key: jax.Array | None, **options: Any) -> list[jax.Array]:
        """The layer's linears of these names on their common input, see `linear.project`."""
        return project([getattr(self, name) for name in names], x, key, **options)

    @property
    def activation(self) -> Activation:
        """Return what stands between the MLP's linears."""
        numbers = self.act_fn if self.config.activation == "xielu" else None
        return Activation(self.config.activation, self.config.gated, numbers)

    def feed_forward(
        self,
        x: jax.Array,
        residual: jax.Array | None,
        keys: tuple[jax.Array | None, jax.Array | None],
        first: jax.Array | int,
        dense: Sequence[jax.Array] | None,
    ) -> jax.Array:
        """The MLP's linears and what stands between them, see `mlp.feed_forward`."""
        options = {"activation": self.activation, "first": first, "matrices": dense}
        return feed_forward(self._mlp_linears(), x, residual, keys, **options)

    def _heads(self, x: jax.Array, positions: jax.Array, keys: dict[str, jax.Array | None]) -> tuple[jax.Array, ...]:
        """x [B, T, D] → q [B, T, H, P], k and v [B, T, K, P], q and k normed and rotated."""
        config, rope = self.config, self.kind.rope
        angles = None if rope is None else rotation(jnp.broadcast_to(positions, x.shape[:2]), rope)
        names = [linear.name for linear in config.attention_inputs]
        at_once = rope is not None and config.rotates_whole_heads(rope)
        options = {"rotation": angles, "rotated": (True, True, False)} if at_once else {}
        projected = self.project(names, x, keys[names[0]], **options)
        if parts := config.attention_inputs[0].parts:
            projected = jnp.split(projected[0], list(itertools.accumulate(parts[:-1])), axis=-1)
        q, k, v = (y.reshape(*x.shape[:2], -1, config.head_dim) for y in projected)
        if not at_once:
            norms = (None, None) if config.qk_norm is None else config.qk_norm.names
            q, k = (self._placed(y, name, angles) for y, name in zip((q, k), norms, strict=True))
        return q, k, v

    def _placed(self, y: jax.Array, name: str | None, angles: Rotation | None) -> jax.Array:
        """Queries or keys [B, T, heads, P], normed where there is a norm, and rotated where there are positions."""
        qk_norm = self.config.qk_norm
        if qk_norm is not None and not qk_norm.after_rope:
            y = self._normed_heads(y, name)
        if angles is not None:
            y = rotate_heads(y, angles, self.kind.rope)
        return self._normed_heads(y, name) if qk_norm is not None and qk_norm.after_rope else y

    def _normed_heads(self, y: jax.Array, name: str) -> jax.Array:
        norm = getattr(self, name)
        return norm(y.reshape(*y.shape[:2], -1)).reshape(y.shape) if self.config.qk_norm.over == "width" else norm(y)

    def _joined(self, h: jax.Array, attended: jax.Array, keys: dict[str, jax.Array | None]) -> jax.Array:
        """What attention gives [B, T, H, P] through o_proj, normed where there is a norm, and added to h [B, T, D]."""
        name, norm = self.config.attention_output.name, self.config.norms.after_attention
        if norm is None:
            (h,) = self.project((name,), attended, keys[name], residual=h)
            return h
        (y,) = self.project((name,), attended, keys[name])
        return h + self.normed(norm, y)[0]

    def _chunked_mlp(self, h: jax.Array, x: jax.Array | None, keys: dict[str, jax.Array | None]) -> jax.Array:
        """`_mlp` on h [B, T, D], and on x of the same shape if it is given, in chunks of tokens if they are many."""
        tokens, given = h.shape[0] * h.shape[1], (h,) if x is None else (h, x)
        if tokens <= self.mlp_tokens:
            return self._mlp([each.reshape(tokens, -1) for each in given], keys).reshape(h.shape)
        number = -(-tokens // self.mlp_tokens)
        chunk = -(-tokens // number)
        rows = ((0, number * chunk - tokens), (0, 0))
        chunks = [jnp.pad(each.reshape(tokens, -1), rows).reshape(number, chunk, -1) for each in given]
        dense = [linear.dense() for linear in self._mlp_linears()] if self.share_dense else None
        part = jax.checkpoint(lambda i, given: self._mlp(given, keys, i * chunk, dense))
        out = jax.lax.map(lambda each: part(*each), (jnp.arange(number), chunks))
        return out.reshape(number * chunk, -1)[:tokens].reshape(h.shape)

    def _mlp(
        self,
        given: Sequence[jax.Array],
        keys: dict[str, jax.Array | None],
        first: jax.Array | int = 0,
        dense: Sequence[jax.Array] | None = None,
    ) -> jax.Array:
        """The MLP, added to the hidden states of some tokens [N, D].

        Args:
            given: the hidden states; and the MLP's input, if that is not their norm.
            first: the first token's number among the micro-batch's.
            dense: weights that were dequantized before.
        """
        norms = self.config.norms
        h, x = given if len(given) == 2 else self.normed(norms.before_mlp, given[0])[::-1]
        drawn_from = keys[self.config.mlp_inputs[0].name], keys[self.config.mlp_output.name]
        if norms.after_mlp is None:
            return self.feed_forward(x, h, drawn_from, first, dense)
        return h + self.normed(norms.after_mlp, self.feed_forward(x, None, drawn_from, first, dense))[0]

    def _mlp_linears(self) -> list[NF4Linear]:
        return [getattr(self, linear.name) for linear in (*self.config.mlp_inputs, self.config.mlp_output)]

    def _dropout_keys(self, key: jax.Array | None) -> dict[str, jax.Array | None]:
        """A dropout key for each input that linears have, under the name of the first of them."""
        inputs = self.config.dropout_inputs
        return {name: None if key is None else jax.random.fold_in(key, i) for i, name in enumerate(inputs)}
