"""A program: runs of `train.py` in children, each killed (`kill -9`) in a phase that is named; run by `test_phases.py`.

    python -m tests.helpers.phases OUT PHASE,PHASE,... --config FILE [section.key=value ...]

The phases are gone through in one folder, one child each; a last child comes to its end. Each writes a line: phase, exit status.
"""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.backends.backend_agg
import matplotlib.figure  # noqa: F401
import transformers.models.auto.tokenization_auto
import transformers.models.llama.configuration_llama  # noqa: F401
from orbax.checkpoint import v1  # noqa: F401
from transformers import PreTrainedTokenizerFast  # noqa: F401

from convert import merge
from convert.jobs import job
from qlora_jax.base import files
from qlora_jax.commands import execute, prepare, train
from qlora_jax.training import checkpoint
from qlora_jax.training.trainer import Trainer

STEP = 3
"""The step after which a run that is killed in a step, a checkpoint or an evaluation is killed."""


def die(*_: Any, **__: Any) -> None:
    """As power does, or the machine's owner."""
    os.kill(os.getpid(), signal.SIGKILL)


def before(owner: Any, name: str, here: Callable[..., object]) -> None:
    """Die when `owner.name` is called with arguments of which `here` is true."""
    real = getattr(owner, name)

    def function(*args: Any, **kwargs: Any) -> Any:
        if here(*args):
            die()
        return real(*args, **kwargs)

    setattr(owner, name, function)


def in_the_midst_of_best() -> None:
    """An evaluation's new best/ has its name, and the old one is not removed yet."""
    real = execute.save

    def function(folder: Path, *args: Any) -> None:
        if folder.name == "best" and folder.exists():
            files._remove = lambda path: die() if path.exists() else None
        real(folder, *args)

    execute.save = function


PHASES: dict[str, Callable[[], object]] = {
    "planning": lambda: before(prepare, "plan_run", lambda *args: True),
    "quantizing": lambda: before(job, "replace_folder", lambda folder, out: out.name != "merged"),
    "step": lambda: before(Trainer, "_begun", lambda self, step: step == STEP),
    "checkpoint": lambda: before(
        checkpoint, "write_json", lambda path, _: path.name == checkpoint.CHECKSUMS and f"step-{STEP + 1}." in str(path)
    ),
    "best": lambda: before(execute, "save", lambda folder, *args: folder.name == "best" and folder.exists()),
    "best replaced": in_the_midst_of_best,
    "best restored": lambda: before(files, "replace_folder", lambda folder, out: out.name == "best" and out.exists()),
    "adapter": lambda: before(files, "replace_folder", lambda folder, out: out.name == "adapter"),
    "merge": lambda: before(job, "replace_folder", lambda folder, out: out.name == "merged"),
    "end": lambda: before(execute, "finish", lambda *args: True),
    "nowhere": lambda: None,
}


def main(out: str, phases: str, *arguments: str) -> None:
    """Go through the phases."""
    for phase in (*filter(None, phases.split(",")), "nowhere"):
        if (pid := os.fork()) == 0:
            os.dup2(os.open(f"{out}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
            sys.stdout = open(os.devnull, "w")  # noqa: PTH123, SIM115
            merge.check_merge = lambda *args: ()  # takes seconds, and changes nothing
            PHASES[phase]()
            os._exit(train.main([*arguments, f"training.output_dir={out}"]))
        print(f"{phase}: {os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
