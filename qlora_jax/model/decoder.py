"""Llama as Flax modules: embedding, decoder layer, head. One family, one file, driven by the checkpoint's own config keys.

Axes, here and in every einsum: B batch, T time, S cached time, D hidden, H query heads, K kv heads, P head dim, F mlp,
V vocab, R rank, L layers.
"""

import functools
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from qlora_jax.config import LoraSettings, QuantizationSettings
from qlora_jax.model.architecture import Architecture
from qlora_jax.model.linear import FrozenParam, LoRA, NF4Linear, project
from qlora_jax.model.lora_matmul import LORA_X
from qlora_jax.model.mlp import GATED_PRODUCTS, feed_forward
from qlora_jax.model.norms import RMSNorm
from qlora_jax.ops.operands import Rotation
from qlora_jax.ops.twins import plain_rotate

Attention = Literal["xla", "cudnn"]
NOISE = 2**31 - 1

MLP_TOKENS = 8192
"""Tokens the MLP works on at a time, by default: at 70B, 0.5 GB for each of its [N, F] arrays in bfloat16."""

KEPT = jax.checkpoint_policies.save_only_these_names(*GATED_PRODUCTS, LORA_X)
"""What a layer that is not run again keeps of its projections and of its MLP, besides their inputs and attention's own."""

Cache = tuple[jax.Array, jax.Array]  # keys and values seen so far, each [B, S, K, P]


def rotation(positions: jax.Array, head_dim: int, theta: float) -> Rotation:
    """Rotary position embedding's angles at `positions` [B, T], in float32: bfloat16 could not tell position 257 from 256."""
    half = head_dim // 2
    frequencies = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions.reshape(-1, 1).astype(jnp.float32) * frequencies[None, :]
    return Rotation(jnp.cos(angles), jnp.sin(angles))


def rotate(x: jax.Array, positions: jax.Array, theta: float) -> jax.Array:
    """x [B, T, heads, P] rotated to `positions` [B, T]; pairs are (i, i + P/2), Hugging Face's order."""
    angles = rotation(positions, x.shape[-1], theta)
    return plain_rotate(x.reshape(positions.size, -1), angles).reshape(x.shape)


def default_compute_dtype() -> jnp.dtype:
    """bfloat16 on a GPU; float32 on a CPU, where bfloat16 is slower."""
    return jnp.dtype(jnp.bfloat16 if jax.default_backend() == "gpu" else jnp.float32)


def default_attention(compute_dtype: jax.typing.DTypeLike, head_dim: int, *, on_gpu: bool | None = None) -> Attention:
    """cuDNN's fused attention where it can be used: on a GPU, in 16 bits, for head sizes that every generation serves; XLA's elsewhere.

    `on_gpu`: of a run that is only planned; by default JAX's backend, which is then started, is asked.
    """
    fits = jnp.dtype(compute_dtype).itemsize == 2 and head_dim % 8 == 0 and head_dim <= 128
    on_gpu = jax.default_backend() == "gpu" if on_gpu is None else on_gpu
    return "cudnn" if on_gpu and fits else "xla"


class DecoderLayer(nnx.Module):
    """Attention and MLP, each on a normed input and added to it. All seven linears are NF4; those in `lora.targets` carry an adapter."""

    def __init__(
        self,
        config: Architecture,
        lora: LoraSettings | None,
        quantization: QuantizationSettings,
        attention: Attention,
        rngs: nnx.Rngs,
        *,
        share_dense: bool = False,
        mlp_tokens: int = MLP_TOKENS,
        keep: bool = False,
    ) -> None:
        """A layer of random weights.

        Args:
            share_dense: see `linear.project`.
            mlp_tokens: the MLP works on at most so many tokens at a time, each chunk run again in the backward pass: [N, F] never exists.
            keep: differentiated, keep only what is cheap to keep for what it costs to compute: queries, keys, values, what attention gives,
                the two outputs that enter SwiGLU and the adapters' [N, R]. All else, elementwise, is computed again. Otherwise jax
                decides, which is for a layer that is run again within the same compiled function.
        """
        self.config, self.attention = config, attention
        self.share_dense, self.mlp_tokens, self.keep = share_dense, mlp_tokens, keep
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        for name, (rows, columns) in config.linear_shapes().items():
            adapter = None
            if lora is not None and name in lora.targets:
                adapter = LoRA(columns, rows, lora.r, lora.scaling, lora.lora_dropout, rngs, lora.dtype)
            linear = NF4Linear(columns, rows, adapter, quantization, rngs, recomputed=not keep, share_dense=share_dense)
            setattr(self, name, linear)

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

        def heads(h: jax.Array) -> tuple[jax.Array, ...]:
            x, h = self.normed("input_layernorm", h)
            return *self._heads(x, positions, keys), h

        q, k, v, h = around(heads)(h)
        mask = None
        if segment_ids is not None:  # packed rows: no token sees another row's
            mask = segment_ids[:, None, :, None] == segment_ids[:, None, None, :]  # [B, 1, T, S]
        attended = jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=True, implementation=self.attention)
        h = self._joined(h, attended, keys)
        return around(lambda h: self._chunked_mlp(h, keys))(h)

    def decode(self, h: jax.Array, positions: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        """The same for generation: h [B, T, D] continues at positions[:, 0], after what `cache` holds; no dropout."""
        keys = self._dropout_keys(None)
        x, h = self.normed("input_layernorm", h)
        q, k, v = self._heads(x, positions, keys)
        start = positions[0, 0]
        cache = tuple(
            jax.lax.dynamic_update_slice_in_dim(old, new, start, axis=1) for old, new in zip(cache, (k, v), strict=True)
        )
        slots = jnp.arange(cache[0].shape[1])
        mask = slots[None, None, None, :] <= positions[:, None, :, None]  # [B, 1, T, S]
        attended = jax.nn.dot_product_attention(q, *cache, mask=mask, implementation="xla")
        return self._chunked_mlp(self._joined(h, attended, keys), keys), cache

    def normed(self, name: str, h: jax.Array) -> tuple[jax.Array, jax.Array]:
        """A norm of the layer on h [..., D] → (normed, h), see `RMSNorm.and_skip`."""
        return getattr(self, name).and_skip(h)

    def project(self, names: Sequence[str], x: jax.Array, key: jax.Array | None, **options: Any) -> list[jax.Array]:
        """The layer's linears of these names on their common input, see `linear.project`."""
        return project([getattr(self, name) for name in names], x, key, **options)

    def feed_forward(
        self,
        x: jax.Array,
        residual: jax.Array,
        keys: tuple[jax.Array | None, jax.Array | None],
        first: jax.Array | int,
        dense: Sequence[jax.Array] | None,
    ) -> jax.Array:
        """The layer's last three linears, see `mlp.feed_forward`."""
        linears = [getattr(self, name) for name in self.config.mlp_linears]
        return feed_forward(linears, x, residual, keys, first=first, matrices=dense)

    def _heads(self, x: jax.Array, positions: jax.Array, keys: dict[str, jax.Array | None]) -> tuple[jax.Array, ...]:
        """x [B, T, D] → q [B, T, H, P], k and v [B, T, K, P], q and k rotated."""
        config = self.config
        angles = rotation(jnp.broadcast_to(positions, x.shape[:2]), config.head_dim, config.rope_theta)
        options = {"rotation": angles, "rotated": (True, True, False)}
        names = config.attention_inputs
        projected = self.project(names, x, keys[names[0]], **options)
        return tuple(y.reshape(*x.shape[:2], -1, config.head_dim) for y in projected)

    def _joined(self, h: jax.Array, attended: jax.Array, keys: dict[str, jax.Array | None]) -> jax.Array:
        """What attention gives [B, T, H, P] through o_proj and added to h [B, T, D]."""
        name = self.config.attention_output
        (h,) = self.project((name,), attended, keys[name], residual=h)
        return h

    def _chunked_mlp(self, h: jax.Array, keys: dict[str, jax.Array | None]) -> jax.Array:
        """`_mlp` on h [B, T, D], in chunks of tokens if they are many."""
        tokens = h.shape[0] * h.shape[1]
        if tokens <= self.mlp_tokens:
            return self._mlp(h.reshape(tokens, -1), keys).reshape(h.shape)
        number = -(-tokens // self.mlp_tokens)
        chunk = -(-tokens // number)
        chunks = jnp.pad(h.reshape(tokens, -1), ((0, number * chunk - tokens), (0, 0))).reshape(number, chunk, -1)
        dense = [getattr(self, name).dense() for name in self.config.mlp_linears] if self.share_dense else None
        part = jax.checkpoint(lambda i, x: self._mlp(x, keys, i * chunk, dense))
        out = jax.lax.map(lambda each: part(*each), (jnp.arange(number), chunks))
        return out.reshape(number * chunk, -1)[:tokens].reshape(h.shape)

    def _mlp(
        self,
        h: jax.Array,
        keys: dict[str, jax.Array | None],
        first: jax.Array | int = 0,
        dense: Sequence[jax.Array] | None = None,
    ) -> jax.Array:
        """h [N, D], the micro-batch's tokens from `first` on → h + SwiGLU(norm(h)); `dense`: weights that were dequantized before."""
        first_linear, *_, last_linear = self.config.mlp_linears
        drawn_from = keys[first_linear], keys[last_linear]
        return self.feed_forward(*self.normed("post_attention_layernorm", h), drawn_from, first, dense)

    def _dropout_keys(self, key: jax.Array | None) -> dict[str, jax.Array | None]:
        """A dropout key for each input that linears have, under the name of the first of them."""
        inputs = self.config.dropout_inputs
        return {name: None if key is None else jax.random.fold_in(key, i) for i, name in enumerate(inputs)}


class Embedding(nnx.Module):
    """Token ids to vectors; `weight` [V, D] stays bfloat16."""

    def __init__(self, config: Architecture, rngs: nnx.Rngs) -> None:
        self.weight = FrozenParam(
            0.02 * jax.random.normal(rngs.params(), (config.vocab_size, config.hidden_size), jnp.bfloat16)
        )

    def __call__(self, input_ids: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
        """input_ids [B, T] → h [B, T, D] in `dtype`."""
        return jnp.take(self.weight[...], input_ids, axis=0, mode="clip").astype(dtype)


def add_noise(h: jax.Array, alpha: jax.Array, key: jax.Array, micro_batch: jax.Array) -> jax.Array:
    """NEFTune (Jain et al., 2023) as transformers has it: uniform noise within ± alpha / sqrt(T·D) on h [B, T, D], padding counted in T.

    The step's `key` is folded with a number that no layer has, so that no dropout mask is drawn from the same bits.
    """
    key = jax.random.fold_in(jax.random.fold_in(key, NOISE), micro_batch)
    bound = alpha / (h.shape[1] * h.shape[2]) ** 0.5
    return h + (bound * jax.random.uniform(key, h.shape, jnp.float32, -1, 1)).astype(h.dtype)


class Head(nnx.Module):
    """Final norm and projection to the vocabulary; `weight` [V, D] is the embedding's own array when the two are tied."""

    def __init__(self, config: Architecture, rngs: nnx.Rngs) -> None:
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.weight = FrozenParam(
            0.02 * jax.random.normal(rngs.params(), (config.vocab_size, config.hidden_size), jnp.bfloat16)
        )

    def __call__(self, h: jax.Array) -> jax.Array:
        """h [..., D] → logits [..., V] float32."""
        x = self.norm(h)
        return _project(x, self.weight[...].astype(x.dtype))


@jax.custom_vjp
def _project(x: jax.Array, weight: jax.Array) -> jax.Array:
    """x [..., D] on weight [V, D] → [..., V] float32. The gradient is rounded to x's dtype before it meets the weight again, as where
    torch's autocast makes logits: a product of float32 numbers costs twice the time."""
    return jnp.einsum("...d,vd->...v", x, weight, preferred_element_type=jnp.float32)


_project.defvjp(
    lambda x, weight: (_project(x, weight), weight),
    lambda weight, dy: (jnp.einsum("...v,vd->...d", dy.astype(weight.dtype), weight), None),
)
