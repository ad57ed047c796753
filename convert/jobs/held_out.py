"""Held-out loss of a model folder as it is, unquantized: of a merged model, whatever its size.

The layers are read from the disk once for some batches at a time, each while the one before computes: at most a few of them are on the
device, beside the batches' hidden states.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from convert.files.folder import ModelFolder
from convert.load import frozen_bytes, load_weights, read_config, total_bytes
from qlora_jax.base.console import progress_bar
from qlora_jax.base.files import describe_size
from qlora_jax.config import QuantizationSettings
from qlora_jax.data import Batch
from qlora_jax.engine.engine import Engine, Weights
from qlora_jax.model.architecture import Architecture
from qlora_jax.model.attention import default_attention
from qlora_jax.runtime import machine
from qlora_jax.runtime.machine import device_memory
from qlora_jax.runtime.placement import READ_AHEAD, SLOTS, one_device

HIDDEN_BYTES = 2**29
"""Hidden states held at a time."""
WORKSPACE_BYTES = 2**30
"""Left for a layer's own arrays and the head's."""


class NoRoomError(Exception):
    """The model cannot be evaluated in this machine's memory; the message says what is needed and what there is."""


def held_out_loss(
    folder: ModelFolder,
    batches: Sequence[Batch],
    compute_dtype: str,
    advance: Callable[[], object] = lambda: None,
) -> float:
    """Return the mean loss over the supervised tokens of `batches`, each of one micro-batch, in nats a token.

    Args:
        folder: an unquantized model.
        advance: called after each layer of each pass over them.

    Raises:
        NoRoomError: memory does not suffice.
        InputError: a weight is not finite.
    """
    config = read_config(folder)
    _check_room(config)
    try:
        weights = load_weights(folder, config, None, "disk")
        return mean_loss(config, weights, batches, compute_dtype, advance)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise NoRoomError("the device's memory ran out") from None


def show_held_out_loss(path: Path, batches: Sequence[Batch], compute_dtype: str, console: Console) -> float | None:
    """Print `held_out_loss` of a merged model's folder and return it; or print why it is left out, and return None."""
    folder = ModelFolder(path)
    passes = sum(1 for _ in _groups(batches, read_config(folder), compute_dtype))
    try:
        with progress_bar(console) as progress:
            total = passes * read_config(folder).num_hidden_layers
            task = progress.add_task("evaluating the merged model, layers", total=total)
            loss = held_out_loss(folder, batches, compute_dtype, lambda: progress.advance(task))
    except NoRoomError as error:
        console.print(f"held-out loss of the merged model: left out, {error}")
        return None
    computed = "" if compute_dtype == "bfloat16" else f", computed in {compute_dtype}"
    perplexity = math.exp(min(loss, 700))
    console.print(
        f"held-out loss of the merged model as it is, in bfloat16{computed}: {loss:.4f}, perplexity {perplexity:.2f}"
    )
    return loss


def mean_loss(
    config: Architecture,
    weights: Weights,
    batches: Sequence[Batch],
    compute_dtype: str,
    advance: Callable[[], object] = lambda: None,
) -> float:
    """The same of weights that are open already: layers in 4 bits or bfloat16, anywhere."""
    attention = default_attention(compute_dtype, config.head_dim)
    engine = Engine(config, None, QuantizationSettings(), compute_dtype=compute_dtype, attention=attention)
    sums = [_sums(engine, weights, group, advance) for group in _groups(batches, config, compute_dtype)]
    total, count = np.sum(np.concatenate(sums), axis=0)
    return float(total / count)


def _groups(batches: Iterable[Batch], config: Architecture, compute_dtype: str) -> Iterator[list[Batch]]:
    """Consecutive batches whose hidden states are no more than HIDDEN_BYTES together, at least one."""
    group: list[Batch] = []
    held = 0
    for batch in batches:
        nbytes = batch.input_ids.size * config.hidden_size * jnp.dtype(compute_dtype).itemsize
        if group and held + nbytes > HIDDEN_BYTES:
            yield group
            group, held = [], 0
        group, held = [*group, batch], held + nbytes
    if group:
        yield group


def _sums(engine: Engine, weights: Weights, batches: Sequence[Batch], advance: Callable[[], object]) -> np.ndarray:
    """(sum of losses, tokens) of each batch, [n, 2] float64; the layers are the outer loop."""
    embedded = (engine.hidden_states(weights, [], one_device().put(batch.input_ids[0], "device")) for batch in batches)
    hidden = [next(states) for states in embedded]
    packings = [
        None
        if batch.segment_ids is None or batch.positions is None
        else one_device().put((batch.positions[0], batch.segment_ids[0]), "device")
        for batch in batches
    ]
    for layer, frozen in weights.layers.walk(range(len(weights.layers))):
        for index, packing in enumerate(packings):
            hidden[index], ready = engine.forward_layer(layer, frozen, {}, hidden[index], packing)
        weights.layers.pace.dispatched(ready)
        del frozen
        advance()
    found = [
        engine.objective.evaluate(weights.head, h, one_device().put(batch.labels[0], "device"))
        for h, batch in zip(hidden, batches, strict=True)
    ]
    return np.asarray(jax.device_get(found), np.float64)


def _check_room(config: Architecture) -> None:
    """Raises NoRoomError: vocabulary, a few layers and what they work with are more than there is."""
    layers = (SLOTS + READ_AHEAD) * frozen_bytes(config, None)
    needed = total_bytes(config, None, "disk") + layers + HIDDEN_BYTES + WORKSPACE_BYTES
    stats = device_memory() or {}
    there = machine.available_host_bytes()
    if "bytes_limit" in stats:
        needed -= READ_AHEAD * frozen_bytes(config, None)  # these are on the host until their turn comes
        there = stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    if needed > there:
        raise NoRoomError(f"it takes {describe_size(needed)}, and there are {describe_size(max(there, 0))}")
