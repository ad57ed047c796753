"""Matmuls of a few tokens with a 4-bit weight: x·Wᵀ without ever writing the dense matrix.

A step of generation reads every weight once for one token, so it costs what reading costs, and 4 bits are a quarter of bfloat16's
traffic if they are decoded in registers. Two kernels:

`few`, for up to four tokens. A program owns some rows of W and walks along them a word a thread, multiplying the eight levels of a word
with x as it goes. The block's scale is multiplied in once a word, in float32: nothing is rounded to the weight's dtype on the way, so
the result is nearer the exact product with the 4-bit weight than the twin's.

`some`, for up to sixteen. A program decodes a tile of W to the weight's dtype, position by position of a word, and leaves the products
to the tensor cores: eight small matmuls over the columns that share a position.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from qlora_jax.ops.nf4 import BLOCK_SIZE, CODEBOOKS, QuantizedTensor
from qlora_jax.ops.pallas import triton

MAX_TOKENS, MAX_FEW_TOKENS = 16, 4
FEW_WARPS, FEW_ROWS = 1, 8
SOME_WARPS, SOME_ROWS, SOME_WORDS = 4, 64, 64


def supported(x: jax.Array, weight: QuantizedTensor) -> bool:
    """Whether a kernel serves the product of x [tokens, in] with this weight: few rows, and blocks that do not straddle the weight's."""
    few_enough = x.shape[0] <= (MAX_TOKENS if x.dtype == weight.dtype else MAX_FEW_TOKENS)
    return few_enough and len(weight.shape) == 2 and weight.shape[1] % BLOCK_SIZE == 0


def matmul(x: jax.Array, weight: QuantizedTensor) -> jax.Array:
    """x [tokens, in] → x·Wᵀ [tokens, out] in x's dtype, for what is `supported`."""
    return few(x, weight) if x.shape[0] <= MAX_FEW_TOKENS else some(x, weight)


def few(
    x: jax.Array, weight: QuantizedTensor, *, warps: int = FEW_WARPS, rows: int = FEW_ROWS, interpret: bool = False
) -> jax.Array:
    """x [tokens <= 4, in] → x·Wᵀ [tokens, out] in x's dtype, summed in float32."""
    out_features = weight.shape[0]
    words = jax.lax.bitcast_convert_type(weight.codes.reshape(-1, 4), jnp.int32)
    return triton.call(
        functools.partial(_few, rows=rows, threads=triton.LANES * warps, interpret=interpret),
        (-(-out_features // rows),),
        jax.ShapeDtypeStruct((x.shape[0], out_features), x.dtype),
        (
            _few_inputs(x),
            words,
            jnp.asarray(CODEBOOKS[weight.quant_type]),
            triton.Scales.of(weight),
        ),
        name="nf4_matmul_few",
        num_warps=warps,
        interpret=interpret,
    )


def _few_inputs(x: jax.Array) -> jax.Array:
    """x [tokens, in] as `_few` reads it: bfloat16 as [4, tokens, in / 8] int32, two positions of a word each, half the loads and the
    registers; other dtypes as [8, tokens, in / 8] float32."""
    if x.dtype != jnp.bfloat16:
        return _by_position(x.astype(jnp.float32))
    pairs = jnp.moveaxis(_by_position(x).reshape(triton.WORD_WEIGHTS // 2, 2, x.shape[0], -1), 1, -1)
    return jax.lax.bitcast_convert_type(pairs, jnp.int32)


def _values(inputs: list[jax.Array]) -> list[jax.Array]:
    """The eight float32 values in what a thread loaded of `_few_inputs`."""
    if inputs[0].dtype == jnp.float32:
        return inputs
    halves = [
        half for pair in inputs for half in (pair << 16, pair & ~0xFFFF)
    ]  # the first of a pair is in the low half
    return [jax.lax.bitcast_convert_type(half, jnp.float32) for half in halves]


def _by_position(x: jax.Array) -> jax.Array:
    """x [tokens, in] → [8, tokens, in / 8]: side by side what meets the same position of consecutive words."""
    return x.reshape(x.shape[0], -1, triton.WORD_WEIGHTS).transpose(2, 0, 1)


def _few(
    x: Any, words: Any, codebook: Any, scales: triton.Scales, out: Any, *, rows: int, threads: int, interpret: bool
) -> None:
    loads, tokens, in_words = x.shape
    lane = jnp.arange(threads, dtype=jnp.int32) & (triton.LANES - 1)
    table = plt.load(codebook.at[lane & 15])
    tile = _Tile(pl.program_id(0) * rows, out.shape[1] - 1, rows, threads, in_words)

    def fetch(step: jax.Array, stored: list[jax.Array]) -> Any:
        """What a step works on: its words, a row each; x; and its scales, ready to be decoded."""
        column, inside = tile.columns(step)
        codes = [plt.load(words.at[number * in_words + column]) for number in tile.row_numbers]
        other = None if inside is None else 0
        inputs = [[plt.load(x.at[i, n, column], mask=inside, other=other) for i in range(loads)] for n in range(tokens)]
        parts = [triton.look_up_scales(scales, *pair) for pair in zip(tile.blocks(step), stored, strict=True)]
        return codes, inputs, parts

    def stored_of(step: jax.Array) -> list[jax.Array]:
        return [triton.stored_scales(scales, blocks) for blocks in tile.blocks(step)]

    def advance(step: jax.Array, carry: Any) -> Any:
        (codes, inputs, parts), stored, sums = carry
        coming = fetch(step + 1, stored), stored_of(step + 2)  # on their way while this step computes
        decoded = [triton.decode_scales(scales, each, interpret=interpret) for each in parts]
        values = [_values(each) for each in inputs]
        new = []
        for row in range(rows):
            scale = triton.from_lane(decoded[row // 8], row % 8 * 4 + (lane >> 3), interpret=interpret)
            levels = [triton.look_up(codes[row], table, i, interpret=interpret) for i in range(triton.WORD_WEIGHTS)]
            for token in range(tokens):
                product = sum(level * value for level, value in zip(levels, values[token], strict=True))
                new.append(sums[row * tokens + token] + product * scale)
        return *coming, new

    zeros = [jnp.zeros((threads,), jnp.float32) for _ in range(rows * tokens)]
    first = fetch(0, stored_of(0)), stored_of(1), zeros
    *_, sums = jax.lax.fori_loop(0, -(-in_words // threads), advance, first)
    for row in range(rows):
        for token in range(tokens):
            out[token, tile.row_numbers[row]] = jnp.sum(sums[row * tokens + token]).astype(out.dtype)


class _Tile:
    """Which words and blocks a program of `_few` works on: `rows` rows from `first` on, and of these a word a thread at each step."""

    def __init__(self, first: jax.Array, last: int, rows: int, threads: int, in_words: int) -> None:
        self.first, self.last, self.rows, self.in_words = first, last, rows, in_words
        self.thread = jnp.arange(threads, dtype=jnp.int32)
        # Rows past the end are computed as copies of the last one.
        self.row_numbers = [jnp.minimum(first + row, last) for row in range(rows)]

    def columns(self, step: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """The words' places in a row, and which of them there are; None if all."""
        column = step * self.thread.size + self.thread
        inside = None if self.in_words % self.thread.size == 0 else column < self.in_words
        return jnp.minimum(column, self.in_words - 1), inside

    def blocks(self, step: jax.Array) -> list[jax.Array]:
        """The blocks whose scales each thread decodes for its warp, whose words lie in 4 blocks a row: in 8 rows, one a lane."""
        lane, row_blocks = self.thread & 31, self.in_words >> 3
        column = jnp.minimum((step * self.thread.size + (self.thread & ~31) >> 3) + (lane & 3), row_blocks - 1)
        return [
            jnp.minimum(self.first + row + (lane >> 2), self.last) * row_blocks + column
            for row in range(0, self.rows, 8)
        ]


def some(
    x: jax.Array,
    weight: QuantizedTensor,
    *,
    warps: int = SOME_WARPS,
    rows: int = SOME_ROWS,
    tile_words: int = SOME_WORDS,
    interpret: bool = False,
) -> jax.Array:
    """x [tokens <= 16, in] of W's dtype → x·Wᵀ [tokens, out], summed in float32; W is rounded to its dtype, as the twin does."""
    out_features = weight.shape[0]
    words = jax.lax.bitcast_convert_type(weight.codes.reshape(-1, 4), jnp.int32)
    # Columns that share a position of a word side by side, and as many tokens as a tensor core takes.
    padded = jnp.pad(x, ((0, MAX_TOKENS - x.shape[0]), (0, 0)))
    inputs = _by_position(padded)
    product = triton.call(
        functools.partial(_some, rows=rows, tile_words=tile_words, interpret=interpret),
        (-(-out_features // rows),),
        jax.ShapeDtypeStruct((MAX_TOKENS, out_features), x.dtype),
        (inputs, words, jnp.asarray(CODEBOOKS[weight.quant_type]), triton.Scales.of(weight)),
        name="nf4_matmul_some",
        num_warps=warps,
        interpret=interpret,
    )
    return product[: x.shape[0]]


def _some(
    inputs: Any,
    words: Any,
    codebook: Any,
    scales: triton.Scales,
    out: Any,
    *,
    rows: int,
    tile_words: int,
    interpret: bool,
) -> None:
    out_features, in_words = out.shape[1], inputs.shape[2]
    tokens = jnp.arange(MAX_TOKENS, dtype=jnp.int32)[:, None]
    first = pl.program_id(0) * rows
    # Rows past the end are computed as copies of the last one, and not written.
    row = jnp.minimum(first + jnp.arange(rows, dtype=jnp.int32), out_features - 1)[:, None]
    whole = in_words % tile_words == 0

    def step(number: jax.Array, total: jax.Array) -> jax.Array:
        column = number * tile_words + jnp.arange(tile_words, dtype=jnp.int32)[None, :]
        inside = None if whole else column < in_words
        column = column if whole else jnp.minimum(column, in_words - 1)
        index = row * in_words + column
        codes = plt.load(words.at[index])
        scale = triton.block_scales(scales, index >> 3, interpret=interpret)
        for position, shift in enumerate(triton.NIBBLE_SHIFTS):
            levels = plt.load(codebook.at[codes >> shift & 15])
            x = plt.load(inputs.at[position, tokens, column], mask=inside, other=None if whole else 0)
            tile = (levels * scale).astype(x.dtype)
            total += jax.lax.dot_general(x, tile, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
        return total

    total = jax.lax.fori_loop(0, -(-in_words // tile_words), step, jnp.zeros((MAX_TOKENS, rows), jnp.float32))
    column = first + jnp.arange(rows, dtype=jnp.int32)[None, :]
    plt.store(
        out.at[tokens, column],
        total.astype(out.dtype),
        mask=None if out_features % rows == 0 else column < out_features,
    )
