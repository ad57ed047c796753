"""Bytes of a run, from shapes alone.

A step is two walks over L layers and an update (see `engine.py`). On the device there are at any time: what lives there; a ring of slots
for streamed layers; and the workspace of the one compiled function at work. So the peak is a sum, taken at the three moments where it
can be largest: the turn of the walk (all layer inputs, no gradients), its end (all gradients, no inputs), and the update.

The workspace comes from the compiled functions' own memory analysis where there is a backend to compile for; `workspace` below estimates
it elsewhere. Its coefficients are fitted to that analysis for an H100 (`benchmarks.workspace`: Llama-2 7B and 70B, 512 to 8192 tokens),
which they meet within a tenth, or 0.1 GiB.
"""

import dataclasses
import functools
import math
from typing import Any, Literal

import jax.numpy as jnp

from qlora_jax.config import LoraSettings, QuantizationSettings, TrainingSettings
from qlora_jax.engine import programs
from qlora_jax.engine.optimizer import abstract_moments
from qlora_jax.model.architecture import Architecture
from qlora_jax.model.attention import Attention
from qlora_jax.model.decoder import MLP_TOKENS, DecoderLayer
from qlora_jax.model.loss import LOGIT_BYTES
from qlora_jax.runtime.placement import READ_AHEAD, SLOTS, LayerPlace, Tree, Where, nbytes, spread

PROCESS_BYTES = {True: 6 * 2**30, False: 0.7 * 2**30}
"""Host memory of a run that holds nothing on the host: Python and JAX, and on a GPU CUDA's libraries (H200: 4.6 to 5.9 GiB)."""


@dataclasses.dataclass(frozen=True)
class Job:
    """What is to be trained: everything about a run that its memory and time depend on, but for where things live."""

    config: Architecture
    lora: LoraSettings
    quantization: QuantizationSettings
    optim: str
    rows: int
    """Of a micro-batch."""
    length: int
    """Tokens of the longest row, with its padding."""
    micro_batches: int
    """Of an optimizer step."""
    dtype: str = "bfloat16"
    """Of hidden states and matrix products."""
    attention: Attention = "cudnn"
    on_gpu: bool = True
    eval_rows: int = 0
    """Of an evaluation's micro-batch, as long as the longest; 0 for none."""
    packed: bool = False
    """Whether rows hold several examples, kept apart by a mask."""
    extra_bytes: tuple[int, ...] = ()
    """For each layer, bytes that its linears which are not in 4 bits take beyond those in which they would be; empty if all are."""

    @property
    def tokens(self) -> int:
        """Of a micro-batch."""
        return self.rows * self.length

    @functools.cached_property
    def _layer(self) -> tuple[Any, Any]:
        return programs.describe(DecoderLayer, self.config, self.lora, self.quantization, self.attention)[1:]

    @property
    def adapter(self) -> Tree:
        """Shapes of one layer's adapter."""
        return self._layer[0]

    @functools.cached_property
    def moments(self) -> Tree:
        """Shapes of one layer's AdamW moments."""
        return abstract_moments(TrainingSettings(output_dir="unused", optim=self.optim), self.adapter)

    @functools.cached_property
    def adapter_bytes(self) -> int:
        """One layer's adapter; its gradient takes the same."""
        return nbytes(self.adapter)

    @functools.cached_property
    def layer_bytes(self) -> int:
        """One layer's frozen weights, on average: 441 MB for Llama-2-70B."""
        return nbytes(self._layer[1]) + math.ceil(sum(self.extra_bytes) / self.config.num_hidden_layers)

    @property
    def slot_bytes(self) -> int:
        """The largest layer's frozen weights."""
        return nbytes(self._layer[1]) + max(self.extra_bytes, default=0)

    @functools.cached_property
    def moments_bytes(self) -> int:
        """One layer's AdamW moments."""
        return nbytes(self.moments)

    @property
    def vocabulary_bytes(self) -> int:
        """Embedding and head, bfloat16; one array if they are tied."""
        matrix = self.config.vocab_size * self.config.hidden_size * 2
        return matrix * (1 if self.config.tie_word_embeddings else 2)

    @property
    def hidden_bytes(self) -> int:
        """The hidden states of one micro-batch, [B, T, D]."""
        return self.tokens * self.config.hidden_size * jnp.dtype(self.dtype).itemsize

    @property
    def kept_bytes(self) -> int:
        """What one layer keeps so as not to be run again, for one micro-batch; see `llama.KEPT`."""
        config, itemsize = self.config, jnp.dtype(self.dtype).itemsize
        heads, kv_heads = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
        width = 2 * heads + 2 * kv_heads + config.hidden_size + 2 * config.intermediate_size
        adapters = len(self.lora.targets(config.linears)) * self.lora.r
        softmax: float = 4 * config.num_attention_heads  # float32, a row's log of the sum
        if self.attention == "xla":
            softmax *= 3.25 * self.length  # the scores, three times, and a mask
        return int(self.tokens * (itemsize * (width + adapters) + softmax))

    @property
    def layer_weights(self) -> int:
        """Weights of one layer's linears."""
        return sum(rows * columns for rows, columns in self.config.linear_shapes().values())

    @property
    def flop(self) -> int:
        """Of one step's matrix products with the base weights, recomputation included: 6 a weight (head included) and token."""
        head = self.config.vocab_size * self.config.hidden_size
        return 6 * (self.layer_weights * self.config.num_hidden_layers + head) * self.tokens * self.micro_batches


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where everything lives, and how a layer works."""

    resident: int
    """Layers whose frozen weights stay on the device; the others are streamed."""
    streamed_from: Literal["host", "disk"] = "host"
    activations: Where = "device"
    adapters: Where = "device"
    optimizer: Where = "device"
    keep: int = 0
    """Layers that keep their intermediates, and are not run again."""
    share_dense: bool = True
    mlp_tokens: int = MLP_TOKENS
    slots: int = SLOTS

    def places(self, depth: int) -> list[LayerPlace]:
        """Of each layer's frozen weights, resident ones spread evenly among the streamed."""
        return [self.streamed_from if place == "host" else place for place in spread(self.resident, depth)]


@dataclasses.dataclass(frozen=True)
class Workspace:
    """Bytes that the compiled functions take for themselves while they run, besides arguments and results."""

    forward: int
    backward: int
    head: int
    kept_forward: int = 0
    kept_backward: int = 0


def workspace(job: Job, layout: Layout) -> Workspace:
    """An estimate, for where nothing can be compiled; see the module's docstring."""
    config, itemsize = job.config, jnp.dtype(job.dtype).itemsize
    hidden, mlp, tokens = config.hidden_size, config.intermediate_size, job.tokens
    bytes_of = {name: itemsize * rows * columns for name, (rows, columns) in config.linear_shapes().items()}
    dense, mlp_dense = (
        [*bytes_of.values()],
        [bytes_of[linear.name] for linear in (*config.mlp_inputs, config.mlp_output)],
    )
    chunk = min(tokens, layout.mlp_tokens)
    hoisted = sum(mlp_dense) if chunk < tokens else max(dense)
    scores = 0
    if job.attention == "xla":
        scores = 4 * job.rows * config.num_attention_heads * job.length**2  # float32 [B, H, T, T]
    inputs = 2 if chunk < tokens else 1  # arrays of [N, D]
    forward = hoisted + itemsize * (tokens * inputs * hidden + chunk * 2 * mlp) + 2 * scores
    dropped = 0.6 * itemsize * (4 * hidden * tokens + (2 * hidden + mlp) * chunk) if job.lora.lora_dropout else 0
    shared = dropped + (sum(dense) if layout.share_dense else max(dense))
    inner = 4.75 if chunk < tokens else 2.9  # arrays of [N, F]
    attention = shared + itemsize * tokens * 7.5 * hidden
    if layout.share_dense or chunk == tokens:
        backward = attention + itemsize * chunk * inner * mlp
    else:
        backward = max(attention, hoisted + itemsize * (chunk * inner * mlp + tokens * 3 * hidden))
    return Workspace(
        int(forward),
        int(backward + 3 * scores),
        int(1.5 * min(LOGIT_BYTES, 4 * tokens * config.vocab_size)),
        int(max(dense) + itemsize * tokens * mlp + 2 * scores),
        int(max(dense) + itemsize * tokens * (2 * hidden + 2 * mlp) + 3 * scores),
    )


@dataclasses.dataclass(frozen=True)
class Item:
    """A line of the plan: what, and the bytes it takes of the device at its peak and of the host."""

    name: str
    device: int
    host: int


def items(job: Job, layout: Layout, work: Workspace) -> list[Item]:
    """What takes memory. The device's bytes are those of the moment where their sum is largest."""
    moment = max(_moments(job, layout, work), key=lambda lines: sum(line.device for line in lines))
    return [*_always(job, layout), *moment, Item("the process", 0, int(PROCESS_BYTES[job.on_gpu]))]


def _placed(name: str, where: Where, depth: int, a_layer: int, *, present: int) -> Item:
    """Something of every layer, there for `present` of them; from the host three visit the device: at work, coming, leaving."""
    if where == "host":
        return Item(name, min(present, 3) * a_layer, depth * a_layer)
    return Item(name, present * a_layer, 0)


def _always(job: Job, layout: Layout) -> list[Item]:
    """What is there from the first step to the last."""
    depth = job.config.num_hidden_layers
    streamed = depth - layout.resident
    on_device = layout.resident * job.layer_bytes + (layout.slots if streamed else 0) * job.slot_bytes
    on_host = streamed if layout.streamed_from == "host" else min(streamed, READ_AHEAD + 2)
    at_rest = 0 if layout.optimizer == "host" else depth  # from the host they visit in the update only
    return [
        Item("embedding and head", job.vocabulary_bytes, 0),
        Item("base weights", on_device, on_host * job.layer_bytes),
        _placed("adapters", layout.adapters, depth, job.adapter_bytes, present=depth),
        _placed("moments", layout.optimizer, depth, job.moments_bytes, present=at_rest),
    ]


def _moments(job: Job, layout: Layout, work: Workspace) -> list[list[Item]]:
    """What is there besides: at the turn of the walk; when the layers that kept their intermediates are done; at its end; in the update;
    and in an evaluation."""
    depth, keep, adapter = job.config.num_hidden_layers, layout.keep, job.adapter_bytes
    inputs, kept = job.hidden_bytes * job.micro_batches, job.kept_bytes * job.micro_batches
    turn = (work.kept_forward, work.kept_backward) if keep else (work.forward, work.backward)

    def moment(inputs_of: int, kept_of: int, gradients_of: int, workspace: int) -> list[Item]:
        return [
            _placed("layer inputs", layout.activations, depth, inputs, present=inputs_of),
            Item("kept intermediates", kept_of * kept, 0),
            _placed("gradients", layout.adapters, depth, adapter, present=gradients_of),
            Item("hidden states", 2 * inputs, 0),
            Item("workspace", workspace, 0),
        ]

    visiting = 3 * (2 * adapter * (layout.adapters == "host") + job.moments_bytes * (layout.optimizer == "host"))
    update = 3 * adapter + (8 * adapter if job.optim.endswith("8bit") else 0)
    return [
        moment(depth, keep, 1, max(*turn, work.head)),
        moment(depth - keep, 0, keep + 1, work.backward if keep < depth else 0),
        moment(1, keep == depth, depth, work.backward if keep < depth else work.kept_backward),
        [
            _placed("layer inputs", layout.activations, depth, inputs, present=0),
            _placed("gradients", layout.adapters, depth, adapter, present=depth),
            Item("hidden states", inputs, 0),  # of the next step, which has begun
            Item("workspace", visiting + update, 0),
        ],
        _evaluation(job, layout),
    ]


def _evaluation(job: Job, layout: Layout) -> list[Item]:
    """A walk forwards with rows of its own, which keeps nothing. Always an estimate: it is not compiled beforehand."""
    if not job.eval_rows:
        return []
    rows = dataclasses.replace(job, rows=job.eval_rows, micro_batches=1)
    work = workspace(rows, dataclasses.replace(layout, keep=0))
    depth = job.config.num_hidden_layers
    return [
        _placed("layer inputs", layout.activations, depth, job.hidden_bytes * job.micro_batches, present=0),
        _placed("gradients", layout.adapters, depth, job.adapter_bytes, present=0),
        # Those of the next training step too, which has begun.
        Item("hidden states", 2 * rows.hidden_bytes + job.hidden_bytes * job.micro_batches, 0),
        Item("workspace", max(work.forward, work.head), 0),
    ]


def total(lines: list[Item]) -> tuple[int, int]:
    """(device bytes, host bytes)."""
    return sum(line.device for line in lines), sum(line.host for line in lines)
