"""How fast a card is: measured where there is one, its published figures elsewhere."""

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qlora_jax.runtime.machine import device_kind
from qlora_jax.runtime.placement import one_device


@dataclasses.dataclass(frozen=True)
class Rates:
    """What a card does in a second."""

    name: str
    source: str
    """`measured`, or what the figures were taken from."""
    flop: float
    """Of large matrix products in bfloat16."""
    memory: float
    """Bytes moved in its memory, reading and writing counted."""
    bus: float
    """Bytes from pinned host memory."""
    disk: float = 2e9
    """Bytes read from the disk that layers are streamed from; assumed."""


SUSTAINED = (0.8, 0.9, 0.8)
"""Of the published figures, what large products, copies in memory and copies over the bus come to (H200: 0.80, 0.90, 0.80)."""

CARDS = {
    # TFLOP/s in bfloat16 without sparsity, summed in float32; GB/s of memory; GB/s of the bus
    "RTX 3090": (71, 936, 32),
    "RTX 4090": (165, 1008, 32),
    "RTX 5090": (209, 1792, 64),
    "RTX A6000": (155, 768, 32),
    "RTX 6000 Ada": (364, 960, 32),
    "L40S": (362, 864, 32),
    "A10G": (70, 600, 32),
    "A100": (312, 1935, 32),
    "H100": (989, 3350, 64),
    "H200": (989, 4800, 64),
}
"""From the makers' data sheets."""

DEFAULT_CARD = "RTX 4090"


def published(name: str = DEFAULT_CARD) -> Rates:
    """By the card's data sheet; an unknown one is taken for the default."""
    known = next((card for card in CARDS if card.lower() in name.lower()), DEFAULT_CARD)
    tera, memory, bus = (share * figure for share, figure in zip(SUSTAINED, CARDS[known], strict=True))
    return Rates(known, "its data sheet", tera * 1e12, memory * 1e9, bus * 1e9)


@functools.cache
def measured() -> Rates:
    """Of the first device, in about a second: a matrix product, a pass over its memory, a copy from pinned memory."""
    size, repeats = 8192, 8
    keys = jax.random.split(jax.random.key(0), 2)
    a, b = (one_device().put(jax.random.normal(key, (size, size), jnp.bfloat16), "device") for key in keys)
    product = jax.jit(lambda a, b: a @ b)
    flop = 2 * size**3 * repeats / _seconds(lambda: [product(a, b) for _ in range(repeats)])
    large = one_device().put(np.ones((2**27,), np.float32), "device")
    passes = jax.jit(lambda x: jax.lax.fori_loop(0, repeats, lambda _, x: -x, x))
    memory = 2 * large.nbytes * repeats / _seconds(lambda: passes(large))
    pinned = one_device().put(np.ones((2**27,), np.uint8), "host")
    bus = pinned.nbytes * 4 / _seconds(lambda: [one_device().put(pinned, "device") for _ in range(4)])
    return Rates(device_kind(), "measured", flop, memory, bus)


def _seconds(run: Callable[[], Any]) -> float:
    """The best of three, after one that compiles."""
    jax.block_until_ready(run())
    times = []
    for _ in range(3):
        start = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - start)
    return min(times)
