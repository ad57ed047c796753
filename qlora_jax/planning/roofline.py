"""Seconds of a step, from shapes alone: a roofline. Matrix products take the card's rate, all else the bytes it moves."""

import dataclasses
import math

from qlora_jax.planning.estimate import Job, Layout
from qlora_jax.planning.hardware import Rates
from qlora_jax.runtime.placement import SLOTS

HEAD_FACTOR = 1.0
"""What the head takes over its three matrix products, which are faster than most."""
LAUNCH_SECONDS = 3e-6
"""Of one kernel, with what its inputs and outputs wait for."""
KERNELS = (45, 110)
"""Kernels of a layer, forwards and backwards."""
ELEMENTWISE = (25, 85)
"""Bytes that norms, activations, residuals and adapters move a layer, forwards and backwards (with recomputation), over those of one
[N, D] array: fitted to steps of 7B and 70B on an H100."""
KEPT_SHARE = 0.67
"""Of the latter, what is left to a layer that is not run again."""
TURN_SECONDS = 1.7e-3
"""For which the device waits at each streamed layer if there are only two slots: Python can start the copy of the next but one, some thirty
arrays, only when a layer is done, and must before it dispatches the next (H200)."""
FEW_TOKENS = 64
"""Tokens at which a matrix product with a large weight reaches half of its rate."""
ATTENTION_SHARE = 0.55
"""Of the matrix products' rate that cuDNN's attention reaches, half of its square being masked."""


@dataclasses.dataclass(frozen=True)
class Seconds:
    """Of one step."""

    forward: float
    head: float
    backward: float
    update: float
    bus_bytes: int
    """Both directions."""

    @property
    def total(self) -> float:
        """Of a step."""
        return self.forward + self.head + self.backward + self.update


def seconds(job: Job, layout: Layout, rates: Rates) -> Seconds:
    """A roofline of one step; a walk takes as long as its computing or as its copies, whichever is longer."""
    depth, micro = job.config.num_hidden_layers, job.micro_batches
    streamed = depth - layout.resident
    forward, again, kept = _layer_seconds(job, layout, rates)
    layers = streamed * job.layer_bytes
    adapters = depth * job.adapter_bytes * (layout.adapters == "host")
    inputs = depth * job.hidden_bytes * micro * (layout.activations == "host")
    moments = depth * job.moments_bytes * (layout.optimizer == "host")
    stream = layers / (rates.bus if layout.streamed_from == "host" else min(rates.bus, rates.disk))
    waits = streamed * TURN_SECONDS * (layout.slots < SLOTS)
    up = waits + max(micro * depth * forward, stream + adapters / rates.bus, inputs / rates.bus)
    computing = micro * ((depth - layout.keep) * again + layout.keep * kept)
    down = waits + max(computing, stream + (adapters + inputs) / rates.bus)
    head = micro * 6 * job.config.vocab_size * job.config.hidden_size * job.tokens / rates.flop * HEAD_FACTOR
    update = (moments + 2 * adapters) / rates.bus + 8 * depth * job.adapter_bytes / rates.memory
    update += depth * 30 * LAUNCH_SECONDS
    return Seconds(up, head, down, update, int(2 * layers + 6 * adapters + 2 * inputs + 2 * moments))


def _layer_seconds(job: Job, layout: Layout, rates: Rates) -> tuple[float, float, float]:
    """One layer on one micro-batch: forwards, backwards with running it again, backwards from what was kept."""
    chunk = min(job.tokens, layout.mlp_tokens)
    mlp = sum(math.prod(linear.shape) for linear in (*job.config.mlp_inputs, job.config.mlp_output))
    slower = 1 + FEW_TOKENS / job.tokens + mlp / job.layer_weights * (FEW_TOKENS / chunk - FEW_TOKENS / job.tokens)
    product = 2 * job.layer_weights * job.tokens / rates.flop * slower
    heads = job.config.num_attention_heads * job.config.head_dim
    windows = [min(kind.window or job.length, job.length) for kind in job.config.kinds]
    keys = sum(windows) / len(windows)
    attention = 2 * job.rows * job.length * keys * heads / (rates.flop * ATTENTION_SHARE)
    dequantize = 2.6 * job.layer_weights / rates.memory
    moved = [factor * job.hidden_bytes / rates.memory for factor in ELEMENTWISE]
    launches = [number * LAUNCH_SECONDS for number in KERNELS]
    forward = product + attention + dequantize + moved[0] + launches[0]
    rows, columns = job.config.mlp_output.shape
    product_again = product * (1 - rows * columns / job.layer_weights)  # nothing needs what down_proj gives
    again = product + product_again + 3.5 * attention + moved[1] + launches[1]
    again += dequantize * (1 if layout.share_dense else 2)
    kept = product + 2.5 * attention + KEPT_SHARE * moved[1] + launches[1] + dequantize
    return forward, again, kept
