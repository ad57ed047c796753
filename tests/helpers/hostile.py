"""Whole commands on hostile input, each in a process of its own, forked from one that has imported everything.

    python -m tests.helpers.hostile PLACE FIRST LAST

runs the inputs of these numbers in the place that `prepare` made, and prints a line of JSON for each that ended as none may: with a
traceback, an exit status but 0 and 2, after a minute of computing, or with a GiB of memory beyond what importing takes.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

from tests.helpers.mutations import (
    NASTY_PATHS,
    NASTY_YAML,
    changed_bytes,
    changed_gzip,
    changed_json,
    changed_npy,
    changed_safetensors,
    changed_template,
    changed_tokenizer,
    changed_yaml,
    copied,
    spoil_path,
)

SECONDS, CLOCK, MEMORY = 60, 300, 2**30
"""A command's limits: of the processor, of the clock on a busy machine, and bytes beyond those of importing."""
MAX_OUTPUT = 200_000
WORK = "work"
"""The folder, beside the place, that commands run in: always the same, for caches know files by their paths."""
Command = Sequence[str]
Change = Callable[[bytes, Random], bytes]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kind:
    """A kind of input: the file below the place that is changed, how, and the command that reads it."""

    file: str
    change: Change
    command: Command
    weight: int = 1
    """How often, relative to the others."""
    finish: Callable[[Path], None] = lambda place: None
    """Called with the place when the file is changed."""


DATA = ("qlora_jax", "data", "--config", "run.yaml")
PLAN = ("qlora_jax", "plan", "--config", "run.yaml", "--gpu-memory", "24GiB")
QUANTIZE = ("convert.quantize", "--model", "model", "--out", "out")
MERGE = ("convert.merge", "--model", "model", "--adapter", "adapter", "--out", "out", "--no-check")
GENERATE = ("qlora_jax", "generate", "--model", "model", "--prompt", "hi", "--max-new-tokens", "1")
TRAIN = ("train", "--config", "run.yaml", "training.max_steps=3", "training.resume=auto")


def of_rows(file: str) -> Command:
    """The command that reads rows from a file."""
    return ("qlora_jax", "data", "--config", "run.yaml", f"data.path={file}")


def sum_again(place: Path) -> None:
    """Make a checkpoint's checksums those of its files, as a forger does."""
    for folder in (place / "runs" / "checkpoints").glob("step-*"):
        files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "checksums.json"]
        sums = {
            path.relative_to(folder).as_posix(): [path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest()]
            for path in files
        }
        (folder / "checksums.json").write_text(json.dumps(sums))


STEP = "runs/checkpoints/step-2"
KINDS = {
    "settings": Kind(file="run.yaml", change=changed_yaml, command=DATA, weight=8),
    "plan": Kind(file="run.yaml", change=changed_yaml, command=PLAN, weight=4),
    "shape": Kind(file="model/config.json", change=changed_json, command=PLAN, weight=6),
    "config": Kind(file="model/config.json", change=changed_json, command=QUANTIZE, weight=3),
    "weights": Kind(file="model/model.safetensors", change=changed_safetensors, command=QUANTIZE, weight=4),
    "index": Kind(
        file="sharded/model.safetensors.index.json", change=changed_json, weight=2,
        command=("convert.quantize", "--model", "sharded", "--out", "out"),
    ),
    "4 bits": Kind(
        file="nf4/model.safetensors", change=changed_safetensors, weight=2,
        command=("qlora_jax", "generate", "--model", "nf4", "--prompt", "hi", "--max-new-tokens", "1"),
    ),
    "adapter's settings": Kind(file="adapter/adapter_config.json", change=changed_json, command=MERGE, weight=3),
    "adapter": Kind(file="adapter/adapter_model.safetensors", change=changed_safetensors, command=MERGE, weight=3),
    "tokenizer": Kind(file="model/tokenizer.json", change=changed_tokenizer, command=DATA, weight=8),
    "tokenizer's settings": Kind(file="model/tokenizer_config.json", change=changed_json, command=DATA, weight=4),
    "template": Kind(file="model/chat_template.jinja", change=changed_template, command=DATA, weight=6),
    "prompt's template": Kind(file="model/chat_template.jinja", change=changed_template, command=GENERATE, weight=3),
    "prompt's tokenizer": Kind(file="model/tokenizer.json", change=changed_tokenizer, command=GENERATE, weight=2),
    "JSON lines": Kind(file="rows.jsonl", change=changed_bytes, command=DATA, weight=4),
    "JSON": Kind(file="rows.json", change=changed_json, command=of_rows("rows.json"), weight=4),
    "CSV": Kind(file="rows.csv", change=changed_bytes, command=of_rows("rows.csv"), weight=2),
    "gzip": Kind(file="rows.jsonl.gz", change=changed_gzip, command=of_rows("rows.jsonl.gz"), weight=4),
    "Parquet": Kind(file="rows.parquet", change=changed_bytes, command=of_rows("rows.parquet"), weight=5),
    "saved dataset": Kind(file="saved/data-00000-of-00001.arrow", change=changed_bytes, command=of_rows("saved"), weight=2),
    "lengths": Kind(file="cache/tokenized/*/lengths.npy", change=changed_npy, command=DATA, weight=2),
    "ends": Kind(file="cache/tokenized/*/where_ends.npy", change=changed_npy, command=DATA, weight=2),
    "tokens": Kind(file="cache/tokenized/*/input_ids.bin", change=changed_bytes, command=DATA, weight=1),
    "report": Kind(file="cache/tokenized/*/report.json", change=changed_json, command=DATA, weight=2),
    "run.json": Kind(file="runs/run.json", change=changed_json, command=TRAIN),
    "about": Kind(file=f"{STEP}/about.json", change=changed_json, command=TRAIN, finish=sum_again),
    "metrics": Kind(file=f"{STEP}/metrics.jsonl", change=changed_bytes, command=TRAIN, finish=sum_again),
    "arrays": Kind(file=f"{STEP}/arrays/state/_METADATA", change=changed_json, command=TRAIN, finish=sum_again),
    "manifest": Kind(file=f"{STEP}/arrays/state/manifest.ocdbt", change=changed_bytes, command=TRAIN, finish=sum_again),
    "checksums": Kind(file=f"{STEP}/checksums.json", change=changed_json, command=TRAIN),
    "GGUF": Kind(file="model.gguf", change=changed_bytes, command=("gguf", "model.gguf", "out"), weight=4),
}  # fmt: skip
ORDERED = (
    [name for name, kind in KINDS.items() for _ in range(kind.weight)]
    + ["path"] * 8
    + ["argument"] * 10
    + ["override"] * 8
)
"""One round of kinds; two of them have no file of their own."""

ARGUMENTS = (
    "", "-1", "0", "1e400", "nan", "9"*5000, str(2**63), str(10**12), "a"*300, "~nobody/x", "\udcff", "dangling",
    "/dev/zero", "/dev/null", "loop", "fifo", "rows.jsonl", "model", ".", "/", "a/b/c/d/e/f", "é\n", "-", "--", "a=b",
    "model/config.json", "x"*5000, "24GiB",
)  # fmt: skip
OPTIONS: dict[str, tuple[Command, tuple[str, ...]]] = {
    "generate": (GENERATE, ("--model", "--adapter", "--prompt", "--max-new-tokens", "--temperature", "--seed")),
    "plan": (PLAN, ("--config", "--gpu-memory", "--host-memory", "--disk-space", "--gpu")),
    "data": (DATA, ("--config", "--rows")),
    "quantize": (QUANTIZE, ("--model", "--out", "--quant-type")),
    "merge": (MERGE, ("--model", "--adapter", "--out", "--base")),
}
SETTINGS = (
    "model.name_or_path", "data.path", "data.eval_path", "data.chat_template", "data.fields", "data.sources",
    "data.format", "data.max_seq_length", "data.eval_fraction", "data.max_rows", "data.split", "training.output_dir",
    "training.seed", "training.max_steps", "training.learning_rate", "training.sample_prompt", "lora.r",
    "lora.init_from", "memory.device_memory", "training.run_name",
)  # fmt: skip


def make(number: int, place: Path) -> tuple[str, Command]:
    """Spoil something of a fresh place; the input's name, and the command that is to meet it."""
    random = Random(f"hostile {number}")
    name = ORDERED[number % len(ORDERED)]
    if name == "path":
        kind = random.choice(list(KINDS.values()))
        path, how = _only(place, kind.file), random.choice(NASTY_PATHS)
        spoil_path(path, how)
        return f"path: {kind.file} is {how}", kind.command
    if name == "argument":
        command, options = random.choice(list(OPTIONS.values()))
        option, value = random.choice(options), random.choice(ARGUMENTS)
        changed = [*command, option, value] if option not in command else list(command)
        if option in command:
            changed[changed.index(option) + 1] = value
        return f"argument: {option} {value[:40]!a}", changed
    if name == "override":
        setting, value = random.choice(SETTINGS), random.choice(NASTY_YAML)
        command = random.choice((DATA, PLAN))
        return f"override: {setting}={value[:40]!a}", [*command, f"{setting}={value}"]
    kind = KINDS[name]
    path = _only(place, kind.file)
    path.write_bytes(kind.change(path.read_bytes(), random))
    kind.finish(place)
    return name, kind.command


def _only(place: Path, pattern: str) -> Path:
    (found,) = place.glob(pattern)
    return found


def run(command: Command) -> None:
    """Run a command in this process, and leave with its exit status."""
    import convert.merge
    import convert.quantize
    import qlora_jax.__main__
    from convert.gguf.reader import write_model_folder
    from qlora_jax.base.errors import exit_status
    from qlora_jax.commands import train

    mains: dict[str, Callable[[Sequence[str]], int]] = {
        "qlora_jax": qlora_jax.__main__.main,
        "train": train.main,
        "convert.quantize": convert.quantize.main,
        "convert.merge": convert.merge.main,
        "gguf": exit_status(lambda paths: write_model_folder(*paths)),
    }
    program, *arguments = command
    os._exit(_status(mains[program], arguments))


def _status(main: Callable[[Sequence[str]], int], arguments: Sequence[str]) -> int:
    try:
        status = main(arguments)
    except SystemExit as leaving:
        status = leaving.code if isinstance(leaving.code, int) else 1
    except BaseException:
        traceback.print_exc()
        status = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return status or 0


class ForkedChild:
    """In place of the process that `bounded.Child` starts: forked, because everything is imported here already."""

    def __init__(self, stderr: Any) -> None:
        (ours_in, self_out), (theirs_in, theirs_out) = os.pipe(), os.pipe()
        self.pid = os.fork()
        if not self.pid:
            os.dup2(theirs_in, 0)
            os.dup2(self_out, 1)
            os.dup2(stderr.fileno(), 2)
            os.closerange(3, 200)
            _serve()
        os.close(theirs_in)
        os.close(self_out)
        self.stdin, self.stdout, self.returncode = os.fdopen(theirs_out, "wb"), os.fdopen(ours_in, "rb"), None

    def kill(self) -> None:
        """As of a Popen."""
        if self.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)

    def wait(self) -> int:
        """As of a Popen."""
        if self.returncode is None:
            self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.returncode


def _serve() -> None:
    from qlora_jax.base import bounded

    try:
        sys.stdin = os.fdopen(0, "r")
        bounded.main()
    finally:
        os._exit(1)


def fork_children() -> None:
    """From now on `bounded.Child` forks, and foreign programs have little time: thousands of inputs are to be tried."""
    import convert.model
    from qlora_jax.base import bounded
    from qlora_jax.data.tokens import workers

    bounded.LIMITS, workers.ALONE = bounded.Limits(seconds=2), bounded.Limits(seconds=1)
    convert.model.TRYING_SECONDS = 2.0

    class Subprocess:
        PIPE = subprocess.PIPE

        @staticmethod
        def Popen(command: Command, *, stderr: Any, **options: Any) -> ForkedChild:  # noqa: N802
            return ForkedChild(stderr)

    bounded.subprocess = Subprocess


def try_one(number: int, place: Path, base: int) -> dict[str, Any] | None:
    """Run one input. What is wrong with how it ended, None if nothing is."""
    here = copied(place, place.with_name(WORK))
    os.mkfifo(here / "fifo")
    (here / "dangling").symlink_to(here / "nowhere")
    (here / "loop").symlink_to(here / "loop")
    os.chdir(here)
    name, command = make(number, here)
    started, pid = time.monotonic(), os.fork()
    if not pid:
        os.setpgid(0, 0)
        with open(here / "said", "wb") as said, open(os.devnull, "rb") as nothing:  # noqa: PTH123
            for source, target in ((nothing, 0), (said, 1), (said, 2)):
                os.dup2(source.fileno(), target)
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 5))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        run(command)
    usage, ended = _waited(pid, started)
    said = (here / "said").read_bytes()
    problems = [
        f"ended with {ended}" if ended not in (0, 2) else "",
        "a traceback" if b"Traceback" in said or b"panicked at" in said else "",
        f"{len(said)} bytes of output" if len(said) > MAX_OUTPUT else "",
        f"{usage.ru_maxrss / 2**20:.1f} GiB" if usage.ru_maxrss * 1024 - base > MEMORY else "",
        "said nothing" if ended == 2 and not said.strip() else "",
        "a zero status, and an error" if ended == 0 and b"error:" in said[:20] else "",
    ]
    os.chdir("/")
    shutil.rmtree(here, ignore_errors=True)
    if not any(problems):
        return None
    shown = said.decode(errors="replace")
    return {"number": number, "input": name, "command": list(command), "problems": [p for p in problems if p],
        "seconds": round(time.monotonic() - started, 1), "said": shown[-2500:]}  # fmt: skip


def _waited(pid: int, started: float) -> tuple[Any, object]:
    """A command's resources and exit status. One that takes too long by the clock is ended, with all its children."""
    while True:
        done, status, usage = os.wait4(pid, os.WNOHANG)
        if done:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
            return usage, os.waitstatus_to_exitcode(status)
        if time.monotonic() - started > CLOCK:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
            _, _, usage = os.wait4(pid, 0)
            return usage, f"no end after {CLOCK} s"
        time.sleep(0.01)


def main() -> None:
    """The program; see the module."""
    import datasets  # noqa: F401 - imported once, here
    import matplotlib.figure  # noqa: F401
    import pyarrow.parquet  # noqa: F401
    import transformers.utils.chat_template_utils  # noqa: F401
    from orbax.checkpoint import v1  # noqa: F401
    from transformers import AutoTokenizer  # noqa: F401

    from qlora_jax.commands import train  # noqa: F401

    place, first, last = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    os.environ["QLORA_JAX_CACHE"] = str(place.with_name(WORK) / "cache")
    fork_children()
    base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    for number in range(first, last):
        started = time.monotonic()
        if problem := try_one(number, place, base):
            print(json.dumps(problem), flush=True)
        print(
            f"{number}: {ORDERED[number % len(ORDERED)]}, {time.monotonic() - started:.1f} s",
            file=sys.stderr,
            flush=True,
        )
    print(json.dumps({"tried": last - first}), flush=True)


if __name__ == "__main__":
    main()
