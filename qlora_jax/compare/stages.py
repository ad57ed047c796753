"""The differences between two sides, stage by stage, each beside its bound."""

import collections
import dataclasses
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from qlora_jax.compare import bounds
from qlora_jax.compare.ours import read_quantized
from qlora_jax.compare.side import Side, Tensors, read_tensors
from qlora_jax.model.architecture import Architecture
from qlora_jax.ops import dispatch, nf4


@dataclasses.dataclass(frozen=True)
class Check:
    """One number of a comparison. Without a bound it is shown and not judged."""

    stage: str
    name: str
    value: float
    bound: float | None = None

    @property
    def holds(self) -> bool:
        """Whether the value is a number and within its bound."""
        return self.bound is None or self.value <= self.bound  # false for nan


@dataclasses.dataclass
class Comparison:
    """Everything that was found; `checks` are what the verdict is of."""

    checks: list[Check] = dataclasses.field(default_factory=list)
    by_layer: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    """Relative differences of the hidden states, the embedding's output first: ours and theirs, and both and the truth."""
    by_tensor: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    """Each adapter tensor's gradient: cosine and norm, ours over theirs."""
    losses: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    """Of each optimizer step."""
    about: dict[str, Any] = dataclasses.field(default_factory=dict)

    def add(self, stage: str, name: str, value: float, bound: float | None = None) -> None:
        """One more number."""
        self.checks.append(Check(stage, name, float(value), None if bound is None else float(bound)))

    @property
    def exceeded(self) -> list[Check]:
        """The checks that do not hold."""
        return [check for check in self.checks if not check.holds]


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    """‖found - expected‖ / ‖expected‖, in float64; 0 if both are zero."""
    difference, size = norm(np.subtract(found, expected, dtype=np.float64)), norm(expected)
    return difference / size if size else math.inf if difference else 0.0


def by_token(found: np.ndarray, expected: np.ndarray) -> float:
    """The same for each token's vector [..., D], and of that the root mean square: some tokens are a thousand times as large as others."""
    sizes = np.linalg.norm(expected.astype(np.float64), axis=-1)
    apart = np.linalg.norm(np.subtract(found, expected, dtype=np.float64), axis=-1)
    return float(np.sqrt(np.mean((apart / np.where(sizes > 0, sizes, 1)) ** 2)))


def norm(values: np.ndarray) -> float:
    """L2, in float64."""
    return float(np.linalg.norm(np.ravel(values).astype(np.float64)))


def flat(tensors: Tensors, like: Tensors) -> np.ndarray:
    """All of them end to end, in the order of `like`."""
    return np.concatenate([np.ravel(tensors[key]) for key in like])


def compare_weights(
    to: Comparison, linears: Iterable[tuple[str, nf4.QuantizedTensor]], folder: Path, device: str
) -> float:
    """Codes, scales and dequantized values of every linear; the weights' relative difference, as ours dequantize."""
    counts: collections.Counter[str] = collections.Counter()
    furthest, apart, size = 0, 0.0, 0.0
    for key, ours in linears:
        theirs = read_tensors(folder / f"weights-{key}.safetensors")
        values, same_bytes = (np.asarray(nf4_values(w)) for w in (ours, read_quantized(folder, key, ours, "bfloat16")))
        expected = theirs["values"].view(values.dtype)
        counts["codes"] += differing_codes(ours.codes, theirs["codes"])
        counts["weights"] += expected.size
        counts["dequantized"] += int((same_bytes.view(np.int16) != theirs["values"]).sum())
        others = values.view(np.int16) != theirs["values"]
        counts["values"] += int(others.sum())
        apart += norm(values[others].astype(np.float32) - expected[others].astype(np.float32)) ** 2
        size += float(np.linalg.norm(expected.astype(np.float32))) ** 2
        scales = np.asarray(ours.absmax)
        counts["absmax"] += int((scales != theirs["absmax"]).sum())
        counts["blocks"] += scales.size
        if ours.nested_absmax is not None:
            furthest = max(furthest, int(np.abs(scales.astype(int) - theirs["absmax"]).max()))
    codes, scales, values = (
        counts[part] / counts[whole]
        for part, whole in (("codes", "weights"), ("absmax", "blocks"), ("values", "weights"))
    )
    to.add("quantization", "4-bit codes that differ, share", codes, bounds.FLIPPED_CODES[device])
    to.add("quantization", "scales that differ, share", scales, bounds.FLIPPED_SCALES[device])
    to.add("quantization", "furthest 8-bit scale, codes apart", furthest, bounds.BYTES_ONE_APART)
    to.add("dequantization", "weights that differ, same bytes", counts["dequantized"], 0)
    to.add("dequantization", "weights that differ, own bytes, share", values)
    to.add("dequantization", "relative difference, own bytes", math.sqrt(apart / size))
    return math.sqrt(apart / size)


@jax.jit
def nf4_values(weight: nf4.QuantizedTensor) -> jax.Array:
    """Dequantized to bfloat16."""
    return dispatch.dequantize(weight, "bfloat16")


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Over the last axis, in float64."""
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def differing_codes(ours: Any, theirs: np.ndarray) -> int:
    """How many 4-bit codes differ, of two packed arrays."""
    changed = np.asarray(ours) ^ theirs
    changed = changed[changed != 0]
    return int((changed >> 4 != 0).sum() + (changed & 15 != 0).sum())


def compare_forward(to: Comparison, ours: Side, theirs: Side, config: Architecture, truth: Side | None) -> None:
    """Hidden states, logits, what they mean for the next token, and the loss."""
    layers = range(len(theirs.hidden))
    to.by_layer["ours and theirs"] = [by_token(ours.hidden[i], theirs.hidden[i]) for i in layers]
    if truth is None:
        limits = [bounds.arithmetic(config, i) for i in layers]
    else:
        for name, side in (("ours and float32", ours), ("theirs and float32", theirs)):
            to.by_layer[name] = [by_token(side.hidden[i], truth.hidden[i]) for i in layers]
        limits = [bounds.NO_WORSE * value for value in to.by_layer["theirs and float32"]]
    found = to.by_layer["ours and theirs" if truth is None else "ours and float32"]
    worst = max(layers, key=lambda i: found[i] / limits[i] if limits[i] else math.inf * found[i] if found[i] else 0.0)
    of = "" if truth is None else ", from float32"
    to.add(
        "hidden states",
        f"relative difference{of}, layer {worst}, which is nearest its bound",
        found[worst],
        limits[worst],
    )
    to.add("hidden states", f"relative difference{of}, last layer", found[-1], limits[-1])
    compare_logits(to, ours, theirs, config, truth)


def compare_logits(to: Comparison, ours: Side, theirs: Side, config: Architecture, truth: Side | None) -> None:
    """Logits, Kullback-Leibler divergence, the likeliest token, the loss."""
    difference = np.abs(ours.logits - theirs.logits)
    largest = float(np.abs(theirs.logits).max())
    rms = norm(theirs.logits) / math.sqrt(theirs.logits.size)
    to.add("logits", "largest difference", difference.max())
    to.add("logits", "mean difference", difference.mean())
    to.add("logits", "largest difference / largest logit", difference.max() / largest)
    limit = bounds.arithmetic(config, config.num_hidden_layers)
    if truth is None:
        to.add("logits", "relative difference", relative(ours.logits, theirs.logits), limit)
    else:
        to.add("logits", "relative difference", relative(ours.logits, theirs.logits))
        own = relative(theirs.logits, truth.logits)
        limit = bounds.NO_WORSE * own
        to.add("logits", "relative difference from float32, theirs", own)
        to.add("logits", "relative difference from float32, ours", relative(ours.logits, truth.logits), limit)
    compare_next_tokens(to, ours, theirs, truth, bounds.divergence(limit, rms))
    beside = theirs if truth is None else truth
    to.add("loss", "ours", ours.loss)
    to.add("loss", "theirs", theirs.loss)
    of = "" if truth is None else " from float32"
    to.add("loss", f"difference{of}", abs(ours.loss - beside.loss), bounds.loss(limit, rms, beside.loss))


def compare_next_tokens(to: Comparison, ours: Side, theirs: Side, truth: Side | None, limit: float) -> None:
    """What the logits say comes next; `limit` is of the divergence in float32."""
    top_ours, top_theirs = ours.logits.argmax(-1), theirs.logits.argmax(-1)
    of = "Kullback-Leibler divergence, mean, nats"
    if truth is None:
        to.add("next token", of, divergence(ours, theirs), limit)
    else:
        own = divergence(theirs, truth)
        to.add("next token", of, divergence(ours, theirs))
        to.add("next token", f"{of}, theirs from float32", own)
        to.add("next token", f"{of}, ours from float32", divergence(ours, truth), bounds.NO_WORSE**2 * own)
    to.add("next token", "likeliest token is another, share", (top_ours != top_theirs).mean())
    best, chosen = (np.take_along_axis(theirs.logits, top[..., None], -1) for top in (top_theirs, top_ours))
    to.add("next token", "largest lead that was lost", (best - chosen).max())


def divergence(side: Side, beside: Side) -> float:
    """Mean over the tokens of KL(beside ‖ side)."""
    q, p = log_softmax(side.logits), log_softmax(beside.logits)
    return abs(float((np.exp(p) * (p - q)).sum(-1).mean()))


def compare_gradients(to: Comparison, ours: Side, theirs: Side, config: Architecture, truth: Side | None) -> None:
    """Every adapter tensor's gradient, and all together."""
    for key, expected in theirs.gradients.items():
        found = ours.gradients[key]
        product = float(np.vdot(found.astype(np.float64), expected.astype(np.float64)))
        sizes = norm(found), norm(expected)
        both = sizes[0] * sizes[1]
        to.by_tensor.append(
            {
                "tensor": key,
                "cosine": product / both if both else float(sizes == (0.0, 0.0)),
                "norm": sizes[0] / sizes[1] if sizes[1] else 1.0 if not sizes[0] else math.inf,
                "difference": relative(found, expected),
            }
        )
    to.add("gradients", "smallest cosine of a tensor's, from 1", max(1 - row["cosine"] for row in to.by_tensor))
    to.add("gradients", "largest difference of a tensor's norm", max(abs(row["norm"] - 1) for row in to.by_tensor))
    order = theirs.gradients
    together = [flat(side.gradients, order) for side in (ours, theirs)]
    judge(
        to,
        "gradients",
        "relative difference, all tensors",
        together,
        truth and flat(truth.gradients, order),
        bounds.backward(config),
    )


def compare_training(
    to: Comparison, ours: Side, theirs: Side, start: Tensors, config: Architecture, truth: Side | None
) -> None:
    """The losses on the way, and by how much the adapter changed."""
    to.losses = {"ours": ours.losses, "theirs": theirs.losses} | ({"float32": truth.losses} if truth else {})
    apart = [abs(a - b) / abs(b) for a, b in zip(ours.losses, theirs.losses, strict=True)]
    to.add("training", f"largest relative difference of {len(apart)} losses", max(apart))
    changes = [flat(side.trained, start) - flat(start, start) for side in (ours, theirs)]
    cosine = np.vdot(*changes) / (norm(changes[0]) * norm(changes[1]))
    to.add("training", "cosine of the adapter's changes, from 1", 1 - cosine)
    limit = bounds.after_steps(bounds.backward(config))
    change = truth and flat(truth.trained, start) - flat(start, start)
    judge(to, "training", "relative difference of the adapter's changes", changes, change, limit)


def judge(
    to: Comparison, stage: str, name: str, sides: list[np.ndarray], truth: np.ndarray | None, limit: float
) -> None:
    """[ours, theirs]: in float32 against each other and the bound, in bfloat16 ours from the truth against theirs."""
    ours, theirs = sides
    if truth is None:
        to.add(stage, name, relative(ours, theirs), limit)
        return
    own = relative(theirs, truth)
    to.add(stage, name, relative(ours, theirs))
    to.add(stage, f"{name}, theirs from float32", own)
    to.add(stage, f"{name}, ours from float32", relative(ours, truth), bounds.NO_WORSE * own)


def compare_own_bytes(
    to: Comparison, ours: Side, theirs: Side, config: Architecture, delta: float, limit: float
) -> None:
    """The whole road, each side on the bytes it quantized to itself; `limit` is what arithmetic alone may come to."""
    bound = bounds.own_bytes(config, delta) + limit
    to.add("own bytes", "logits, relative difference", relative(ours.logits, theirs.logits), bound)
    to.add("own bytes", "loss, relative difference", abs(ours.loss - theirs.loss) / abs(theirs.loss))
