"""What a checkpoint costs a run: steps while one is written, beside steps alone; and what resuming adds to a start.

    python -m benchmarks.checkpoint 70b --batch 1 --seq 4096 --weights host --optimizer host --folder DIR
    python -m benchmarks.checkpoint 70b --batch 1 --seq 4096 --weights host --optimizer host --optim paged_adamw_8bit --folder DIR

The model and its places are those of `benchmarks.step`. `share_back_to_back` is the time that steps lose while one save follows the other,
as a share of the steps alone: the most that saving can cost. `share` is the same where a save is made every 15 minutes, the default.
`resume_s` is what a run does more than a fresh one: every byte's checksum, reading, and bringing the arrays to their places.
"""

import argparse
import json
import shutil
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.machine import describe
from benchmarks.step import Case, add_case_arguments
from qlora_jax.training.checkpoint import Checkpoints, checkpoint_bytes
from qlora_jax.training.metrics import peak_device_gib, peak_host_gib

SAVE_SECONDS = 15 * 60


def timed_steps(case: Case, number: int) -> list[float]:
    """Seconds of each of so many steps."""
    return [case.step()[0] for _ in range(number)]


def save_while_training(case: Case, checkpoints: Checkpoints, step: int) -> tuple[float, float, list[float]]:
    """Save once, and take steps until it is written: (seconds in the call, seconds until it is written, seconds of the steps)."""
    start = time.perf_counter()
    arrays = {"adapters": case.adapters, "moments": case.optimizer.moments}
    checkpoints.save(step, arrays, {})
    called = time.perf_counter() - start
    seconds = []
    while not checkpoints.idle():
        seconds.append(case.step()[0])
    written = time.perf_counter() - start
    checkpoints.wait()
    return called, written, seconds


def resume(case: Case, checkpoints: Checkpoints) -> tuple[float, float]:
    """(seconds to check every byte, seconds to bring the arrays back)."""
    start = time.perf_counter()
    found = checkpoints.newest(print)
    checked = time.perf_counter() - start
    found.restore({"adapters": case.adapters, "moments": case.optimizer.moments})
    return checked, time.perf_counter() - start - checked


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Steps alone, saves with steps beside them, resuming."""
    case = Case(options)
    timed_steps(case, 2)  # the first compiles
    alone = statistics.median(timed_steps(case, options.steps))
    folder = options.folder / "checkpoints"
    shutil.rmtree(folder, ignore_errors=True)
    checkpoints = Checkpoints(folder, 1)
    saves = [save_while_training(case, checkpoints, step) for step in range(1, options.saves + 1)]
    nbytes = checkpoint_bytes({"adapters": case.adapters, "moments": case.optimizer.moments})
    checked, restored = resume(case, checkpoints)
    shutil.rmtree(folder)
    steps = [len(seconds) for *_, seconds in saves]
    lost = [called + sum(seconds) - alone * len(seconds) for called, _, seconds in saves]
    return {
        "what": "checkpoint",
        **{
            name: getattr(options, name)
            for name in ("model", "batch", "accumulate", "seq", "optim", "weights", "optimizer")
        },
        "gb": round(nbytes / 1e9, 3),
        "step_s": round(alone, 4),
        "save_call_s": [round(called, 3) for called, *_ in saves],
        "written_s": [round(written, 2) for _, written, _ in saves],
        "steps_meanwhile": steps,
        "lost_s": [round(seconds, 3) for seconds in lost],
        "share_back_to_back": round(sum(lost) / max(alone * sum(steps), alone), 4),
        "share": round(statistics.median(lost) / SAVE_SECONDS, 6),
        "checksums_s": round(checked, 2),
        "resume_s": round(checked + restored, 2),
        "peak_device_gib": peak_device_gib(),
        "peak_host_gib": peak_host_gib(),
    }


def main() -> None:
    """Parse, measure, print one JSON line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.checkpoint", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add_case_arguments(parser)
    parser.add_argument("--steps", type=int, default=4, help="timed steps without a save")
    parser.add_argument("--saves", type=int, default=3, help="the first allocates the host's buffers")
    parser.add_argument("--folder", type=Path, required=True, help="on the disk that is to be measured")
    parser.add_argument("--machine", action="store_true", help="print the machine's description first")
    options = parser.parse_args()
    if options.machine:
        print(json.dumps(describe()))
    print(json.dumps(measure(options)), flush=True)


if __name__ == "__main__":
    sys.exit(main())
