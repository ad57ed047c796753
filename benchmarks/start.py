"""How long `train.py` takes from the command to its first step, on a synthetic model in 4 bits.

    python -m benchmarks.start --shape 7b --work DIR

Every run is a process of its own; in the first the compilation cache may be cold, in the others it is warm. `first_step_s` is counted from
outside, until the step's line is in the log; `phases` are the run's own. Settings at the end are train.py's: `memory.device_memory=6GiB`.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks import synthetic
from benchmarks.machine import RESULTS, write_result
from benchmarks.step import SHAPES, shape_name

ROOT = Path(__file__).parents[1]
SETTINGS = ("training.max_steps=4", "training.logging_steps=1", "data.preview_rows=0")


def rows(path: Path, number: int = 64, words: int = 60) -> None:
    """Texts of random words, longer than `configs/llama2-7b.yaml` cuts them."""
    rng = np.random.default_rng(0)
    texts = (" ".join(f"word{n:05d}" for n in rng.integers(100_000, size=words)) for _ in range(number))
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")


def start(model: Path, data: Path, out: Path, settings: list[str]) -> dict[str, Any]:
    """One run: seconds until its first step is logged, and until it ends."""
    command = [sys.executable, "train.py", "--config", "configs/llama2-7b.yaml", f"model.name_or_path={model}"]
    command += [f"data.path={data}", f"training.output_dir={out}", *SETTINGS, *settings]
    began, first = time.perf_counter(), None
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as run:
        log = []
        for line in run.stdout:
            log.append(line)
            if first is None and line.startswith("step 1/"):
                first = time.perf_counter() - began
    if run.returncode or first is None:
        raise SystemExit("".join(log[-20:]))
    record = json.loads((out / "run.json").read_text(encoding="utf-8"))["starts"][-1]
    return {
        "first_step_s": round(first, 2),
        "seconds": round(time.perf_counter() - began, 2),
        "phases": {name: round(seconds, 2) for name, seconds in record["seconds"].items()},
    }


def main() -> None:
    """Make the model, run, and write `results/start-DEVICE.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=shape_name, choices=sorted(SHAPES), default="7b", help="default: 7b")
    parser.add_argument("--layers", type=int, help="fewer than the shape has")
    parser.add_argument("--runs", type=int, default=3, help="default: 3")
    parser.add_argument(
        "--work", type=Path, metavar="DIR", help="where the model and the runs are made and removed again"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="default: benchmarks/results")
    parser.add_argument("settings", nargs="*", metavar="section.key=value", help="more settings of train.py's")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.work) as work:
        model, data = Path(work) / "model", Path(work) / "rows.jsonl"
        synthetic.write(model, synthetic.hf_config(options.shape, options.layers))
        rows(data)
        found = []
        for number in range(options.runs):
            found.append(start(model, data, Path(work) / f"run-{number}", options.settings))
            print(json.dumps(found[-1]), flush=True)
    shape = {"shape": options.shape, "layers": options.layers, "settings": options.settings}
    print(write_result(f"start-{jax.default_backend()}", {"what": "start", **shape, "runs": found}, options.results))


if __name__ == "__main__":
    main()
