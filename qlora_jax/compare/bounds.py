"""How far apart the two sides may be, per dtype, and why. Everything is a relative L2 difference ‖ours - theirs‖ / ‖theirs‖ unless it says
otherwise; of hidden states each token's, and of those the root mean square.

float32. Both sides do the same operations and add in another order. A sum of n products in float32 is off by about u·√n of its size,
u = 2^-24, with rounding errors as a random walk. A layer has `SUMS` of them in a row and their errors add up as a random walk too, so after
l layers

    arithmetic(l) = MARGIN · u · √n · √(SUMS · (l + 1))            n: the longest sum of the model

`MARGIN` is for what a layer's own slope makes of an error below it. Back through the layers it is the same walk, twice as long; it starts
from the loss's gradient, where probabilities that nearly cancel are summed over the vocabulary, hence `BACKWARD_MARGIN`. (On a CPU
torch's is off by 4e-6 past the head, ours by 7e-8: `benchmarks.cross_entropy`. The last norm makes ten times that of it.) AdamW divides by
the gradient's size, so that elements whose sign is uncertain, a share ε of them where gradients are off by ε, move the other way by a full
step: a difference of about 2·√ε of the whole change.

bfloat16. How large the error is depends on the model; that it is no larger than PyTorch's does not. The reference runs again in float32 on
the same dequantized weights (`truth`), and our distance to it may be at most `NO_WORSE` times PyTorch's own.

Our own bytes. Where the two sides quantize to different bytes, weights differ by δ, relative (and in float32 by at least the rounding to
bfloat16, which ours go through on their way and the reference's do not); each of the 7·L linears passes that on, and it adds up
as a random walk: MARGIN · δ · √(7·L).
"""

import math

from qlora_jax.model.architecture import Architecture

UNIT = 2.0**-24
BFLOAT16_ROUNDING = 2.0**-9
SUMS = 8
"""Seven linears and attention."""
MARGIN = 4.0
BACKWARD_MARGIN = 16.0
NO_WORSE = 1.5
"""Errors of the same size by chance differ by a few per cent over a layer's thousands of elements, by more over a small tensor's."""
FLIPPED_CODES = {"cpu": 0.0, "cuda": 1e-4}
"""Share of 4-bit codes. bitsandbytes' CUDA kernel divides with less than full precision, and a weight on a boundary may go either way."""
FLIPPED_SCALES = {"cpu": 5e-3, "cuda": 1e-3}
"""Share of 8-bit scale codes. On a CPU bitsandbytes looks them up in a table that misses the nearest for one in a thousand; everywhere the
mean that is subtracted first is a sum in another order."""
BYTES_ONE_APART = 3
"""By how much such a scale's code may be off."""


def arithmetic(config: Architecture, depth: float) -> float:
    """float32, after `depth` layers."""
    longest = max(config.hidden_size, config.intermediate_size)
    return MARGIN * UNIT * math.sqrt(longest * SUMS * (depth + 1))


def backward(config: Architecture) -> float:
    """float32, of all gradients together."""
    return BACKWARD_MARGIN / MARGIN * arithmetic(config, 2 * config.num_hidden_layers)


def after_steps(gradient: float) -> float:
    """Of an adapter's change by AdamW, from the gradients' relative difference."""
    return 2 * math.sqrt(gradient)


def loss(logits: float, rms: float, size: float) -> float:
    """Absolute, nats: a token's loss changes by its target logit's error and the mean one; logits of size `rms` are off by `logits`.

    And the mean loss, of this `size`, is a float32 itself, as is the sum it comes from.
    """
    return 2 * logits * rms + SUMS * UNIT * size


def divergence(logits: float, rms: float) -> float:
    """Kullback-Leibler, nats: half the variance of the logits' errors, to second order."""
    return (logits * rms) ** 2 / 2


def own_bytes(config: Architecture, delta: float) -> float:
    """Of the logits, where weights differ by `delta`."""
    return MARGIN * delta * math.sqrt(len(config.linears) * config.num_hidden_layers)
