"""What the kernels are written with: Pallas on its Triton backend, and a few lines of PTX that neither can express.

The heart is the look-up of a 4-bit code in its 16 levels. A gather from memory costs a load a weight, and a tree of selects four
operations; a warp's own shuffle does it in one: lane i of each half warp holds level i mod 16, and `shfl.sync.idx` fetches from the lane
that a code names. This wants one 32-bit word of codes a thread and all lanes awake, which is why every tensor of a kernel that
looks up has `32 · num_warps` elements and nothing else.

Everything here needs sm_80 or later: the last line of `ROUND_PAIR` came with it. Every function has an `interpret` form in plain jnp, with
which the kernels' indexing is tested where there is no GPU.

The backend is deprecated upstream. Nothing outside this package knows of it: `dispatch.py` chooses between each kernel and its
twin in `nf4.py`, so that without the backend a model trains as before, only slower. What would replace it: the same kernels through
`jax_triton.triton_call` (the PTX below as `tl.inline_asm_elementwise`), which keeps sm_80 to sm_89; Mosaic GPU serves sm_90 and up only.
"""

import functools
import types
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from qlora_jax.ops.nf4 import DYNAMIC_MAP, QuantizedTensor

LANES = 32
WORD_WEIGHTS = 8
"""Weights of a 32-bit word of codes. Weight 2i is byte i's high nibble, and bytes are little-endian."""
NIBBLE_SHIFTS = tuple(8 * (i // 2) + (4 if i % 2 == 0 else 0) for i in range(WORD_WEIGHTS))
"""How far weight i of a word lies from the word's low end, in bits."""

# `shfl.sync.idx` with the clamp value 0x100f works in half warps: the source is lane (own & 16) | (index & 15), so the code
# needs no masking, only shifting.
LOOK_UP = """{{
.reg .b32 i, v;
shr.u32 i, $1, {shift};
shfl.sync.idx.b32 v, $2, i, 0x100f, 0xffffffff;
mov.b32 $0, v;
}}"""

ROUND_PAIR = """{{
.reg .b32 i, j, u, v;
.reg .f32 f, g;
shr.u32 i, $1, {first};
shr.u32 j, $1, {second};
shfl.sync.idx.b32 u, $3, i, 0x100f, 0xffffffff;
shfl.sync.idx.b32 v, $3, j, 0x100f, 0xffffffff;
mov.b32 f, u;
mov.b32 g, v;
mul.rn.f32 f, f, $2;
mul.rn.f32 g, g, $2;
cvt.rn.{pair}.f32 $0, g, f;
}}"""

FROM_LANE = "shfl.sync.idx.b32 $0, $1, $2, 0x1f, 0xffffffff;"

SCALE = """{
.reg .f32 p;
mul.rn.f32 p, $1, $2;
add.rn.f32 $0, p, $3;
}"""  # two roundings, where a compiler would fuse them into one

INVERSE = "rcp.rn.f32 $0, $1;"  # a division in Pallas is approximate
DIVIDE = "div.rn.f32 $0, $1, $2;"

PAIRS = {"bfloat16": "bf16x2", "float16": "f16x2"}
"""dtype of a dequantized weight → PTX's name for two of them in a register."""


class Scales(NamedTuple):
    """A weight's scales, as arrays outside a kernel and as refs inside: the last three are None without double quantization."""

    absmax: Any
    dynamic_map: Any = None
    nested_absmax: Any = None
    nested_offset: Any = None  # [1]

    @classmethod
    def of(cls, weight: QuantizedTensor) -> Self:
        """Those of a weight, ready to be a kernel's arguments."""
        if weight.nested_absmax is None:
            return cls(weight.absmax)
        return cls(weight.absmax, jnp.asarray(DYNAMIC_MAP), weight.nested_absmax, weight.nested_offset.reshape(1))


def asm(text: str, constraints: str, dtype: Any, *args: jax.Array) -> jax.Array:
    """A piece of PTX applied to each element of `args`, arrays of one shape; the result has that shape and `dtype`."""
    result = jax.ShapeDtypeStruct(args[0].shape, dtype)
    [value] = plt.elementwise_inline_asm(text, args=args, constraints=constraints, pack=1, result_shape_dtypes=[result])
    return value


def look_up(words: jax.Array, table: jax.Array, position: int, *, interpret: bool) -> jax.Array:
    """Level of weight `position` of each word: words [n] int32, table [n] float32 with level i mod 16 at i → [n] float32."""
    shift = NIBBLE_SHIFTS[position]
    if interpret:
        return jnp.take(table[:16], words >> shift & 15, mode="clip")
    return asm(LOOK_UP.format(shift=shift), "=&f,r,f", jnp.float32, words, table)


def round_pair(
    words: jax.Array, scale: jax.Array, table: jax.Array, byte: int, dtype: str, *, interpret: bool
) -> jax.Array:
    """Weights 2·byte and 2·byte + 1 of each word, times its scale [n], rounded to `dtype` and packed, the first one low: [n] int32."""
    if interpret:
        pair = [look_up(words, table, 2 * byte + i, interpret=True) * scale for i in (0, 1)]
        return jax.lax.bitcast_convert_type(jnp.stack(pair, -1).astype(dtype), jnp.int32)
    first, second = NIBBLE_SHIFTS[2 * byte], NIBBLE_SHIFTS[2 * byte + 1]
    text = ROUND_PAIR.format(first=first, second=second, pair=PAIRS[dtype])
    return asm(text, "=&r,r,f,f", jnp.int32, words, scale, table)


def from_lane(values: jax.Array, lane: jax.Array, *, interpret: bool) -> jax.Array:
    """What lane `lane` [n] int32 of each thread's own warp holds of `values` [n] float32."""
    if interpret:
        warp = jnp.arange(values.shape[0], dtype=jnp.int32) & ~(LANES - 1)
        return jnp.take(values, warp + lane, mode="clip")
    return asm(FROM_LANE, "=f,f,r", jnp.float32, values, lane)


def scale_and_shift(value: jax.Array, factor: jax.Array, offset: jax.Array, *, interpret: bool) -> jax.Array:
    """value · factor + offset, each rounded; float32 [n]."""
    if interpret:
        return jnp.minimum(value * factor, np.finfo(np.float32).max) + offset
    return asm(SCALE, "=f,f,f,f", jnp.float32, value, factor, offset)


def inverse(x: jax.Array, *, interpret: bool) -> jax.Array:
    """1 / x for x > 0, correctly rounded."""
    return jnp.where(x > 0, 1 / x, 0) if interpret else asm(INVERSE, "=f,f", jnp.float32, x)


def divide(x: jax.Array, y: jax.Array, *, interpret: bool) -> jax.Array:
    """x / y, correctly rounded."""
    return x / y if interpret else asm(DIVIDE, "=f,f,f", jnp.float32, x, y)


def stored_scales(scales: Scales, blocks: jax.Array) -> jax.Array:
    """What is stored of the scales of the blocks numbered `blocks` [n] int32."""
    return plt.load(scales.absmax.at[blocks])


def look_up_scales(scales: Scales, blocks: jax.Array, stored: jax.Array) -> tuple[jax.Array, ...]:
    """From memory, what `decode_scales` needs."""
    if scales.nested_absmax is None:
        return (stored,)
    return plt.load(scales.dynamic_map.at[stored.astype(jnp.int32)]), plt.load(scales.nested_absmax.at[blocks >> 8])


def decode_scales(scales: Scales, parts: tuple[jax.Array, ...], *, interpret: bool) -> jax.Array:
    """The scales, float32 [n]."""
    if scales.nested_absmax is None:
        return parts[0]
    offset = jnp.broadcast_to(scales.nested_offset[0], parts[0].shape)
    return scale_and_shift(*parts, offset, interpret=interpret)


def block_scales(scales: Scales, blocks: jax.Array, *, interpret: bool) -> jax.Array:
    """Scales of the blocks numbered `blocks` [n] int32; float32 [n]."""
    parts = look_up_scales(scales, blocks, stored_scales(scales, blocks))
    return decode_scales(scales, parts, interpret=interpret)


def call(
    kernel: functools.partial[None],
    grid: tuple[int, ...],
    out_shape: Any,
    args: Sequence[jax.Array],
    *,
    name: str,
    num_warps: int,
    interpret: bool,
    in_place: Mapping[int, int] = types.MappingProxyType({}),
) -> Any:
    """Run `kernel(*input refs, *output refs)` over `grid`, every ref the whole array.

    `in_place`: the number of an input array → that of the output that takes its memory. XLA copies an input that is needed afterwards.
    """
    shapes, structure = jax.tree.flatten(out_shape)
    run = _compiled(
        kernel.func, tuple(kernel.keywords.items()), grid=grid, shapes=tuple(shapes), structure=structure,
        in_place=tuple(in_place.items()), name=name, num_warps=num_warps, interpret=interpret,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message=".*Pallas Triton backend is deprecated.*", category=DeprecationWarning
        )
        return run(*args)


@functools.lru_cache(maxsize=512)
def _compiled(
    function: Callable[..., None],
    keywords: tuple[tuple[str, Any], ...],
    *,
    grid: tuple[int, ...],
    shapes: tuple[jax.ShapeDtypeStruct, ...],
    structure: Any,
    in_place: tuple[tuple[int, int], ...],
    name: str,
    num_warps: int,
    interpret: bool,
) -> Callable[..., Any]:
    """Return the kernel as a jitted function, one for all uses that are alike.

    A program that uses it several times then traces and lowers it once; XLA inlines the calls. Lowering a kernel takes some 45 ms, and
    a layer's programs use them 85 times.
    """
    run = pl.pallas_call(
        functools.partial(function, **dict(keywords)),
        grid=grid,
        out_shape=jax.tree.unflatten(structure, shapes),
        compiler_params=plt.CompilerParams(num_warps=num_warps, num_stages=1),
        interpret=interpret,
        input_output_aliases=dict(in_place),
        name=name,
    )
    return jax.jit(run)
