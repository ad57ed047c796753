"""Many cases of `benchmarks.step`, one after the other, each in a process of its own.

    python -m benchmarks.suite 7b --out FILE
    python -m benchmarks.suite 7b 70b --out FILE --also 'unsloth=python unsloth_baseline.py 7b8 unsloth:4@2048'

Appends a JSON line a case to FILE, the machine's description first, and prints a table as it goes. `--also` runs another program
among them, on the same card in the same minutes, and takes the lines of JSON that it prints with a `step_s`. A case that fails, or that
takes longer than `--limit`, or whose loss does not fall, is a line with an `error`, and the others go on; the exit status is 1 then.
"""

import argparse
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SMALL = "7b:8 --batch 4 --seq 2048 --steps 5"
AGAIN = "--optim paged_adamw_8bit --keep 1"  # as `full` does it where the last layer's intermediates find room
LARGE = "70b --batch 1 --seq 4096 --steps 5"
RECIPE = "70b --batch 1 --seq 512 --accumulate 4 --steps 5 --optim paged_adamw_8bit"
CARD = "--gpu-memory 24GiB --auto auto --distinct 8"

SUITES = {
    "7b": {
        "7b:8, run again": f"{SMALL} {AGAIN}",
        "7b:8, inputs on the host": f"{SMALL} {AGAIN} --activations host",
        "7b:8, and matrices not shared": f"{SMALL} {AGAIN} --activations host --no-share-dense",
        "7b:8, none run again": f"{SMALL} --optim paged_adamw_8bit --keep",
        "7b:8, dropout 0.1": f"{SMALL} {AGAIN} --dropout 0.1",
        "7b:8, bfloat16 base": f"{SMALL} {AGAIN} --base bfloat16",
        "7b:8, 1 x 2048": f"7b:8 --batch 1 --seq 2048 --steps 5 {AGAIN}",
        "7b:8, 1 x 512": f"7b:8 --batch 1 --seq 512 --steps 5 {AGAIN}",
        "7b, run again": "7b --batch 4 --seq 2048 --auto full",
        "7b, as planned": "7b --batch 4 --seq 2048 --auto auto",
        "13b, as planned": "13b --batch 4 --seq 2048 --auto auto",
    },
    "70b": {
        "70b in 24 GiB": f"{LARGE} {CARD}",
        "70b resident": f"{LARGE} --weights device --keep 12",
        "70b 4 x 512 in 24 GiB": f"{RECIPE} {CARD}",
        "70b 4 x 512 resident": f"{RECIPE} --weights device --keep 34",
        "70b in 6.75 GiB": f"{LARGE} --gpu-memory 6.75GiB --auto auto --distinct 8",
        "70b 32768 in 20 GiB": "70b --batch 1 --seq 32768 --steps 1 --gpu-memory 20GiB --auto auto --distinct 8",
    },
    "tiny": {"135m:2, on a processor": "135m:2 --batch 1 --seq 32 --dtype float32 --steps 1"},
}
ENOUGH = 4
"""Losses that show whether steps learn: with these settings the fourth is lower than the first by far more than rounding."""
COLUMNS = ("step_s", "median_s", "tflops", "peak_device_gib", "process_device_gib", "peak_host_gib", "predicted_s")


def results(command: list[str], limit: float) -> Iterator[dict[str, Any]]:
    """The JSON lines with a `step_s` that a program prints; one with an `error` if it fails, is too slow or prints none."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False)
    except (subprocess.TimeoutExpired, OSError) as error:
        yield {"error": str(error)[:300]}
        return
    found = list(_measured(done.stdout))
    yield from found
    if done.returncode or not found:
        last = (done.stderr.strip() or done.stdout.strip() or "it printed nothing").splitlines()[-1]
        yield {"error": f"exit status {done.returncode}: {last[:300]}"}


def _measured(text: str) -> Iterator[dict[str, Any]]:
    """A line may begin with a word, as `RESULT {...}` does."""
    for line in text.splitlines():
        _, brace, rest = line.partition("{")
        try:
            value = json.loads(brace + rest)
        except ValueError:
            continue
        if isinstance(value, dict) and "step_s" in value:
            yield value


def not_learning(result: dict[str, Any]) -> dict[str, str]:
    """An error if the loss did not fall: a fast step that learns nothing is not a fast step. The first two may be alike, B being zero."""
    losses = result.get("losses", [])
    return {"error": f"the loss did not fall: {losses}"} if len(losses) >= ENOUGH and losses[-1] >= losses[0] else {}


def commands(suites: list[str], also: list[str]) -> Iterator[tuple[str, list[str]]]:
    """(name, command) of every case."""
    for suite in suites:
        for name, arguments in SUITES[suite].items():
            yield name, [sys.executable, "-m", "benchmarks.step", *shlex.split(arguments)]
    for each in also:
        name, _, command = each.partition("=")
        yield name, shlex.split(command)


def describe_machine() -> dict[str, Any]:
    """In a process of its own, which leaves the device."""
    code = "import json; from benchmarks.machine import describe; print(json.dumps(describe()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> int:
    """Run the cases; 1 if any of them failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.suite", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("suites", nargs="+", choices=SUITES, metavar="SUITE", help=f"any of {', '.join(SUITES)}")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="JSON lines are appended to it")
    parser.add_argument("--also", action="append", default=[], metavar="NAME=COMMAND", help="another program's case")
    parser.add_argument("--limit", type=float, default=200, metavar="SECONDS", help="for one case; default: 200")
    options = parser.parse_args()
    failed, started = False, time.perf_counter()
    print(f"{'':28}" + "".join(f"{column:>19}" for column in COLUMNS))
    with options.out.open("a", encoding="utf-8") as out:
        out.write(json.dumps(describe_machine()) + "\n")
        for name, command in commands(options.suites, options.also):
            for measured in results(command, options.limit):
                result = {**measured, **not_learning(measured)}
                failed |= "error" in result
                out.write(json.dumps({"case": name, **result}) + "\n")
                out.flush()
                cells = [result["error"]] if "error" in result else [f"{result.get(c) or '':>19}" for c in COLUMNS]
                print(f"{name:28}" + "".join(cells), flush=True)
    print(f"{time.perf_counter() - started:.0f} s")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
