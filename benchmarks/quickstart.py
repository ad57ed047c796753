"""The quickstart as a user runs it, measured from outside: minutes, memory, held-out loss. `python -m benchmarks.quickstart`."""

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.machine import write_result

ROOT = Path(__file__).parents[1]


def main() -> None:
    """Run train.py in a process of its own and write `results/quickstart.json`. The model should be in the cache already."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "train.py",
            "--config",
            "configs/quickstart.yaml",
            f"training.output_dir={folder}/run",
        ]
        start = time.perf_counter()
        log = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
        seconds = time.perf_counter() - start
        run = Path(folder) / "run"
        records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        merged = json.loads((run / "run.json").read_text())["starts"][-1]["merged"]
        samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    held_out = [record["eval_loss"] for record in records if "eval_loss" in record]
    steps = [record for record in records if "loss" in record]
    result = {
        "what": "quickstart",
        "seconds": round(seconds, 1),
        "peak_memory_gib": round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20, 2),
        "steps": steps[-1]["step"],
        "tokens": steps[-1]["tokens"],
        "held_out_loss": held_out,
        "merged": merged,
        "samples": samples,
    }
    print(log)
    print(json.dumps(result, indent=2))
    print(write_result("quickstart", result))


if __name__ == "__main__":
    main()
