"""What a checkpoint says of its run beside its arrays, checked: `about.json`, and the files of lines that are saved along.

Checksums tell damage from what was written. Whether it was a run of ours that wrote it they do not tell: a file may be somebody's own, with
sums that agree. So every value is of its type here, before anything is made of it.
"""

import contextlib
import json
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

import pydantic

from qlora_jax.base.errors import InputError
from qlora_jax.base.reading import reading, shown
from qlora_jax.training.progress import Progress

Count = Annotated[int, pydantic.Field(ge=0, lt=2**63)]
FIX = "restore one from a copy, or start again: training.resume=never training.overwrite_output_dir=true"
WANTED = ("config", "identity", "progress", "position")
"""What a run needs to go on; a checkpoint of arrays alone has none of it."""


class _Work(pydantic.BaseModel, extra="allow", strict=True):
    keep: Count | Literal["auto"] = "auto"


class _About(pydantic.BaseModel, extra="allow", strict=True):
    """`about.json`. Parts that are missing are missed by `check_complete`."""

    format: Count
    step: Count
    arrays: dict[str, Annotated[int, pydantic.Field(gt=0, lt=2**31)]]
    config: dict[str, dict[str, Any]] = {}
    identity: dict[str, str] = {}
    position: dict[str, Count] = {}
    work: _Work = _Work()
    progress: dict[str, Any] = {}


class _Progress(pydantic.BaseModel, extra="forbid", strict=True):
    """`Progress`, with its numbers within bounds."""

    step: Count
    tokens: Count
    losses: list[float]
    norms: list[float]
    window_steps: Count
    window_tokens: Count
    window_seconds: Annotated[float, pydantic.Field(ge=0, allow_inf_nan=False)]
    recent: list[float]
    skipped: Count
    evaluated: Annotated[int, pydantic.Field(ge=-1, lt=2**63)]
    best_loss: float | None
    best_step: Count | None
    evaluations_since_best: Count


class _Record(pydantic.BaseModel, extra="allow", strict=True):
    """A line of `metrics.jsonl`."""

    step: Count
    loss: float | None = None
    eval_loss: float | None = None


class _Sample(pydantic.BaseModel, extra="allow", strict=True):
    """A line of `samples.jsonl`."""

    step: Count
    prompt: str
    answer: str


LINES: Mapping[str, type[pydantic.BaseModel]] = {"metrics.jsonl": _Record, "samples.jsonl": _Sample}
"""Files of lines that are saved along, and what a line is."""


def check_about(about: object, step: int, where: object) -> dict[str, Any]:
    """`about.json`'s object, if it is one of a checkpoint after `step` steps.

    Raises:
        InputError: it is not; the message names the first value that is not of its type.
    """
    with _explained(where):
        _About.model_validate(about)
    if about["step"] != step:
        raise InputError(where, found=f"step {about['step']}, in the checkpoint of step {step}")
    return about


def check_lines(name: str, data: bytes, where: object) -> None:
    """Check a file of lines, `metrics.jsonl` or `samples.jsonl`.

    Raises:
        InputError: a line is not what the file holds.
    """
    for number, line in enumerate(data.splitlines(), 1):
        with reading(f"{where}:{number}", "not JSON", fix=FIX):
            value = json.loads(line.decode())
        with _explained(f"{where}:{number}", FIX):
            LINES[name].model_validate(value)


def check_complete(about: Mapping[str, Any], where: object) -> None:
    """Check that a run can go on from this.

    Raises:
        InputError: something that a run needs is missing, or its progress is not what we write.
    """
    if missing := [name for name in WANTED if not about.get(name)]:
        found = f"a checkpoint without {', '.join(missing)}"
        raise InputError(where, found=found, expected="one that a run of ours wrote", fix=FIX)
    with _explained(where, FIX):
        progress = _Progress.model_validate(vars(Progress()) | about["progress"])
    if progress.step != about["step"]:
        found = f"progress of step {progress.step}, in the checkpoint of step {about['step']}"
        raise InputError(where, found=found, fix=FIX)


@contextlib.contextmanager
def _explained(where: object, fix: str = "") -> Iterator[None]:
    """A block whose ValidationError becomes an InputError of one line."""
    try:
        yield
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "it"
        found = f"{place} is {shown(first['input'])}: {first['msg']}"
        raise InputError(where, found=found, fix=fix) from None
