"""A whole comparison: both sides, from the same model, adapter and tokens, to the numbers."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax

from qlora_jax.compare import bounds, ours, stages
from qlora_jax.compare.process import Progress, Run, no_progress, run_reference, save_tokens
from qlora_jax.compare.side import Side, read_reference
from qlora_jax.compare.stages import Comparison
from qlora_jax.config import QuantizationSettings, TrainingSettings
from qlora_jax.data import Batch
from qlora_jax.engine.engine import Adapters, Engine, Weights
from qlora_jax.runtime.machine import device_kind


@dataclasses.dataclass(frozen=True)
class Subject:
    """What is compared."""

    model: Path
    """The folder that both sides read."""
    quantization: QuantizationSettings
    quantized_already: bool
    adapter: Path
    """The adapter that both sides start from, in PEFT's format."""
    linears: Mapping[str, str]
    """Our key of each linear → the module's path in transformers' model."""
    adapters: Mapping[str, str]
    """Our key of each adapter tensor → PEFT's name."""
    pad_token_id: int


@dataclasses.dataclass(frozen=True)
class Ours:
    """Our side, ready to run. `weights` and `start` are functions, called when PyTorch's side is done with the device."""

    engine: Callable[[], Engine]
    weights: Callable[[], Weights]
    start: Callable[[], Adapters]


@dataclasses.dataclass(frozen=True)
class Steps:
    """What is computed on, and how the adapter is trained."""

    batches: Sequence[Batch]
    """One an optimizer step, each of one micro-batch, and at least one; the first is also that of hidden states and gradients."""
    learning_rates: Sequence[float]
    """Of each step; none to take no step."""
    settings: TrainingSettings


@dataclasses.dataclass(frozen=True)
class Reference:
    """PyTorch's side, done."""

    run: Run
    theirs: Side
    truth: Side | None
    """In float32, where `theirs` is not."""


def compare(
    subject: Subject, our: Ours, steps: Steps, *, dtype: str, device: str, work: Path, progress: Progress = no_progress
) -> Comparison:
    """Run both sides and take the differences; `work` is an empty folder, for about 2.6 bytes a weight.

    Args:
        dtype: what both compute in: float32 or bfloat16.
        device: PyTorch's: cpu or cuda.

    Raises:
        InputError: PyTorch's side is not installed, or cannot load the model or the adapter.
    """
    reference = run_theirs(subject, steps, [dtype], device=device, work=work, progress=progress)[dtype]
    return differences(subject, our, steps, reference, progress)


def run_theirs(
    subject: Subject, steps: Steps, dtypes: Sequence[str], *, device: str, work: Path, progress: Progress = no_progress
) -> dict[str, Reference]:
    """PyTorch's side alone, in each dtype; arguments and errors as of `compare`."""
    save_tokens(work / "tokens.npz", steps.batches, [], subject.pad_token_id)
    stages = ["forward", "gradients", *(["train"] if steps.learning_rates else [])]
    run = Run(
        out=work / "truth",
        model=subject.model,
        dtype="float32",
        device=device,
        tokens=work / "tokens.npz",
        stages=stages,
        linears=subject.linears,
        adapters=subject.adapters,
        adapter=subject.adapter,
        quantization=None if subject.quantized_already else subject.quantization.model_dump(),
        dense=True,
        settings=steps.settings,
        learning_rates=steps.learning_rates,
    )
    runs = {
        dtype: dataclasses.replace(run, out=work / dtype, dtype=dtype, stages=["weights", *stages], dense=False)
        for dtype in dtypes
    }
    needed = any(dtype != "float32" for dtype in dtypes)
    run_reference([*runs.values(), *([run] if needed else [])], work / "job.json", progress)
    truth = read_reference(run.out, subject.adapters) if needed else None
    return {
        dtype: Reference(run, read_reference(run.out, subject.adapters), None if dtype == "float32" else truth)
        for dtype, run in runs.items()
    }


def differences(
    subject: Subject, our: Ours, steps: Steps, reference: Reference, progress: Progress = no_progress
) -> Comparison:
    """Our side, and what is different."""
    run, theirs, truth = reference.run, reference.theirs, reference.truth
    found = Comparison(about={"compute_dtype": run.dtype, "reference": theirs.about})
    engine, weights, start = our.engine(), our.weights(), our.start()
    found.about["ours"] = {"device": device_kind(), "jax": jax.__version__}
    delta = stages.compare_weights(found, ours.linears(weights), run.out, run.device)
    shared = ours.with_reference_bytes(weights, run.out, run.dtype, "device")
    side = ours.forward(engine, shared, start, steps.batches[0])
    stages.compare_forward(found, side, theirs, engine.config, truth)
    side.gradients = ours.gradients(engine, shared, start, steps.batches[0])
    stages.compare_gradients(found, side, theirs, engine.config, truth)
    if steps.learning_rates:
        done = iter(range(1, len(steps.learning_rates) + 1))
        side.losses, adapters = ours.train(
            engine, shared, start, steps.batches, settings=steps.settings, learning_rates=steps.learning_rates,
            advance=lambda: progress("training, ours", next(done), len(steps.learning_rates)),
        )  # fmt: skip
        side.trained = ours.adapter_tensors(adapters)
        stages.compare_training(found, side, theirs, ours.adapter_tensors(start), engine.config, truth)
    del shared
    if not subject.quantized_already:
        arithmetic = stages.relative(side.logits, theirs.logits)
        side = ours.forward(engine, weights, start, steps.batches[0])
        rounding = bounds.BFLOAT16_ROUNDING if run.dtype == "float32" else 0.0
        stages.compare_own_bytes(found, side, theirs, engine.config, max(delta, rounding), arithmetic)
    return found
