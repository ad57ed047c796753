"""The published configs run whole on a card held to 24 GiB: checkpoints, `kill -9`, the same command again, evaluation, export.

    python -m benchmarks.headline 7b:paged_adamw_8bit:device 70b:paged_adamw_8bit:device --work DIR
    python -m benchmarks.headline 7b:adamw:host --merge --work DIR

A case is SHAPE:OPTIM:PLACE, the place being that of moments and adapters: `device`, `host`, or `auto`, the planner's choice. Each case
runs `configs/llama2-SHAPE.yaml` with its own settings on a model of random weights: once in one go, and once killed after a checkpoint
and continued. With `training.full_determinism`, as here, both leave the same adapter, byte for byte; it is also read back and compared
with the last checkpoint. `--merge` adds it to the base, dequantized and as it was, for as many layers as the disk holds.

Beside what was measured stands what the plan said: XLA's memory on the device, the host's (the process's own peak), the pinned pool (what
XLA took for it, as its log has it) and the disk. Every finished part is in the result's file at once.
"""

import argparse
import contextlib
import dataclasses
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors

from benchmarks import synthetic
from benchmarks.machine import RESULTS
from benchmarks.start import rows
from convert.adapters.adapter import WEIGHTS_FILE, load_adapter
from convert.files.names import ADAPTER_PARTS, Names
from convert.files.sizes import merged_bytes, tensors_for
from qlora_jax.base.units import GIB, parse_bytes
from qlora_jax.model.families import read_architecture

ROOT = Path(__file__).parents[1]
TRAIN = (sys.executable, "train.py")
STEPS, SAVE = 6, 2
DEVICE_MEMORY = "24GiB"
POOL = re.compile(r"Extending allocation by (\S+) bytes for (\S*host\S*?)\.\s*$")
"""What XLA's log says when its pool of pinned memory grows."""
POLL_SECONDS = 0.1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """What is run."""

    shape: str
    optim: str
    place: str
    layers: int | None = None
    """Fewer than the shape has; None for all."""

    @property
    def name(self) -> str:
        """The case in a word."""
        layers = "" if self.layers is None else f"-{self.layers}"
        return f"{self.shape}{layers}-{self.optim}-{self.place}"

    @property
    def settings(self) -> list[str]:
        """Settings of `train.py` that make the case of the published config."""
        places = [] if self.place == "auto" else [f"memory.{name}={self.place}" for name in ("optimizer", "adapters")]
        return [f"training.optim={self.optim}", *places]


@dataclasses.dataclass(kw_only=True)
class Watched:
    """A run as it was seen from outside."""

    status: int = 0
    seconds: float = 0.0
    first_step_s: float | None = None
    peak_host_gib: float = 0.0
    host_parts_gib: dict[str, float] = dataclasses.field(default_factory=dict)
    """What the host's peak, as far as it was seen, consisted of: anonymous memory, files' and shared."""
    peak_disk_gib: float = 0.0
    pool_gib: float | None = None
    log: list[str] = dataclasses.field(default_factory=list)


def watch(
    command: Sequence[str], out: Path, environment: dict[str, str], stop: Callable[[str], bool] = lambda line: False
) -> Watched:
    """Run a command until it ends, or is killed because `stop` said so of a line of its output.

    Args:
        out: the run's folder, whose size is watched.
    """
    seen, began, pool = Watched(), time.perf_counter(), 0
    with subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        errors="replace",
    ) as process:
        over = threading.Event()
        poller = threading.Thread(target=_poll, args=(seen, process.pid, out, over))
        poller.start()
        try:
            for line in process.stdout:
                if "bfc_allocator" in line:
                    pool += parse_bytes(found[1]) if (found := POOL.search(line)) else 0
                    continue
                seen.log.append(line)
                if seen.first_step_s is None and re.match(r"step [1-9]\d*/", line):
                    seen.first_step_s = round(time.perf_counter() - began, 2)
                if stop(line):
                    process.kill()
                    break
            process.stdout.read()
        finally:
            over.set()
            poller.join()
    seen.status, seen.seconds = process.wait(), round(time.perf_counter() - began, 2)
    seen.pool_gib = round(pool / GIB, 3) if pool else None
    return seen


def _poll(seen: Watched, pid: int, out: Path, over: threading.Event) -> None:
    while not over.wait(POLL_SECONDS):
        with contextlib.suppress(OSError, ValueError, IndexError):
            status = Path(f"/proc/{pid}/status").read_text()
            sizes = {name: round(int(kib) / 2**20, 3) for name, kib in re.findall(r"(VmHWM|Rss\w+):\s+(\d+)", status)}
            seen.peak_host_gib = max(seen.peak_host_gib, sizes.pop("VmHWM", 0))
            if sum(sizes.values()) > sum(seen.host_parts_gib.values()):
                seen.host_parts_gib = sizes
        seen.peak_disk_gib = max(seen.peak_disk_gib, round(size_of(out) / GIB, 3))


def size_of(folder: Path) -> int:
    """Bytes of all files below a folder, some of which may be on their way out."""
    total = 0
    for path, _, files in os.walk(folder):
        for name in files:
            with contextlib.suppress(OSError):
                total += Path(path, name).lstat().st_size
    return total


@dataclasses.dataclass(frozen=True, kw_only=True)
class Road:
    """The parts of a case, in one folder."""

    case: Case
    model: Path
    data: Path
    work: Path
    train: Sequence[str] = TRAIN
    config: Path | None = None
    settings: Sequence[str] = ()
    environment: dict[str, str] = dataclasses.field(default_factory=lambda: dict(os.environ))

    def command(self, out: Path) -> list[str]:
        """The command of a run that leaves `out`."""
        config = self.config or Path("configs") / f"llama2-{self.case.shape}.yaml"
        settings = [f"model.name_or_path={self.model}", f"data.path={self.data}", f"training.output_dir={out}"]
        settings += [f"training.max_steps={STEPS}", f"training.save_steps={SAVE}", "training.save_total_limit=1"]
        settings += ["training.logging_steps=1", "data.preview_rows=0", "training.full_determinism=true"]
        settings += ["data.eval_fraction=0.1", f"training.eval_steps={STEPS}"]
        return [*self.train, "--config", str(config), *settings, *self.case.settings, *self.settings]

    def run(self, out: Path, stop: Callable[[str], bool] = lambda line: False, *, ends: int = 0) -> Watched:
        """Run, to a given end.

        Raises:
            SystemExit: it ended otherwise; with the end of its log.
        """
        seen = watch(self.command(out), out, self.environment, stop)
        if seen.status != ends:
            raise SystemExit(f"{self.case.name}: status {seen.status}\n" + "".join(seen.log[-25:]))
        return seen

    def straight(self) -> dict[str, Any]:
        """Run in one go: seconds, peaks beside the plan's, and the adapter read back."""
        out = self.work / "straight"
        seen = self.run(out)
        return {**measured(seen, out), **read_back(out), "adapter_sha256": digest(out / "adapter" / WEIGHTS_FILE)}

    def killed(self) -> dict[str, Any]:
        """Run until a checkpoint is there and a step after it is logged; kill; run the same command again."""
        out = self.work / "killed"
        saved = out / "checkpoints" / f"step-{SAVE}"

        def stop(line: str) -> bool:
            if not line.startswith(f"step {SAVE + 1}/"):
                return False
            until = time.monotonic() + 120
            while not saved.exists() and time.monotonic() < until:  # it is written beside the steps
                time.sleep(0.05)
            return saved.exists()

        first = self.run(out, stop, ends=-9)
        again = self.run(out)
        continued = [line.strip() for line in again.log if line.startswith("continuing after step")]
        found = {"warm_first_step_s": first.first_step_s, "resumed_first_step_s": again.first_step_s}
        found |= {"continued": continued[-1] if continued else None, "resumed": measured(again, out)}
        return {**found, **read_back(out), "adapter_sha256": digest(out / "adapter" / WEIGHTS_FILE)}


def measured(seen: Watched, out: Path) -> dict[str, Any]:
    """Seconds and peaks of a finished run, each peak beside the plan's."""
    record = json.loads((out / "run.json").read_text(encoding="utf-8"))["starts"][-1]
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [each["step_s"] for each in metrics if "step_s" in each]
    plan, gib = record["plan"], {}
    gib["device"] = (
        max((each["peak_device_gib"] or 0 for each in metrics if "step_s" in each), default=0),
        "device_bytes",
    )
    gib["host"] = (seen.peak_host_gib, "host_bytes")
    gib["pinned pool"] = (seen.pool_gib, "pool_bytes")
    peaks = {
        name: {"gib": found, "plan_gib": round(plan[key] / GIB, 3)} for name, (found, key) in gib.items() if key in plan
    }
    disk = sum(need["nbytes"] for need in plan["disk"]["needs"] if str(out) in need["path"])
    peaks["disk"] = {"gib": seen.peak_disk_gib, "plan_gib": round(disk / GIB, 3)}
    return {
        "first_step_s": seen.first_step_s,
        "seconds": seen.seconds,
        "step_s": steps,
        "steps_per_s": round(1 / sorted(steps[1:])[len(steps[1:]) // 2], 3) if len(steps) > 1 else None,
        "eval_loss": [each["eval_loss"] for each in metrics if "eval_loss" in each],
        "losses": [each["loss"] for each in metrics if each.get("loss") is not None],
        "peaks": peaks,
        "host_parts_gib": seen.host_parts_gib,
        "items": plan["items"],
        "layout": plan["layout"],
        "predicted_step_s": plan.get("seconds_per_step"),
        "pool_limit_gib": round((plan.get("pool_limit_bytes") or 0) / GIB, 3),
        "phases": {name: round(seconds, 2) for name, seconds in record["seconds"].items()},
    }


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_back(out: Path) -> dict[str, Any]:
    """Read the exported adapter as anyone would, and compare each tensor with the last checkpoint's.

    Raises:
        SystemExit: one differs.
    """
    from orbax.checkpoint import v1 as ocp

    last = max((out / "checkpoints").glob("step-*"), key=lambda path: int(path.name.removeprefix("step-")))
    arrays = ocp.load((last / "arrays").absolute())
    record = json.loads((out / "run.json").read_text(encoding="utf-8"))["starts"][-1]
    config = read_architecture(
        json.loads((Path(record["config"]["model"]["name_or_path"]) / "config.json").read_text())
    )
    adapter = load_adapter(out / "adapter", config)  # every tensor is there, in its shape, and finite
    by_name = {key.partition(" ")[0]: np.asarray(value) for key, value in arrays.items() if key.startswith("adapters")}
    with safetensors.safe_open(out / "adapter" / WEIGHTS_FILE, framework="numpy") as file:
        for layer in range(config.num_hidden_layers):
            for name in adapter.names.paths:
                for part in ADAPTER_PARTS:
                    saved = by_name[f"adapters['{name}']['adapter']['{part}']"][layer]
                    if not np.array_equal(file.get_tensor(adapter.names.adapter(layer, name, part)), saved):
                        raise SystemExit(f"{out}: {name} {part} of layer {layer} is not the checkpoint's")
    return {"read_back": f"{len(adapter.targets)} linears equal to {last.name}'s"}


def merge(road: Road, layers: int) -> dict[str, Any]:
    """Merge the adapter into the base, dequantized; and into that folder, taken for an unquantized original."""
    found: dict[str, Any] = {"layers": layers}
    adapter, base = road.work / "straight" / "adapter", road.model
    for kind in ("dequantized", "original"):
        out = road.work / f"merged-{kind}"
        command = [sys.executable, "-m", "convert.merge", "--adapter", str(adapter), "--model", str(base)]
        seen = watch([*command, "--out", str(out), "--base", kind], out, road.environment)
        if seen.status:
            raise SystemExit(f"{road.case.name}: merge {kind}: status {seen.status}\n" + "".join(seen.log[-25:]))
        checked = [line.strip() for line in seen.log if line.startswith("checked")]
        found[kind] = {
            "seconds": seen.seconds,
            "gib": round(size_of(out) / GIB, 3),
            "peak_host_gib": seen.peak_host_gib,
        }
        found[kind]["checked"] = checked[-1] if checked else None
        base = out
    return found


def layers_that_fit(shape: str, free: int) -> int:
    """Layers of a shape of which two merged folders fit into so many bytes."""
    settings = synthetic.hf_config(shape, None)
    for layers in range(settings["num_hidden_layers"], 0, -1):
        config = read_architecture({**settings, "num_hidden_layers": layers})
        if 2 * merged_bytes(tensors_for(config), Names.of(config), list(config.linears), "dequantized") < 0.9 * free:
            return layers
    return 0


def walk(road: Road, *, keep: bool = False) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each part of a case as it is done. What a run leaves is removed when the next has been compared with it.

    Raises:
        SystemExit: the run that was killed and continued left another adapter.
    """
    straight = road.straight()
    yield "straight", straight
    shutil.rmtree(road.work / "straight" / "checkpoints")
    if not keep:
        shutil.rmtree(road.work / "straight")
    killed = road.killed()
    killed["same_bytes"] = killed["adapter_sha256"] == straight["adapter_sha256"]
    yield "killed", killed
    shutil.rmtree(road.work / "killed")
    if not killed["same_bytes"]:
        raise SystemExit(
            f"{road.case.name}: killed and continued, the adapter is another than that of the run in one go"
        )


def table(results: dict[str, Any]) -> str:
    """One line a case: what was measured / what the plan said."""
    lines = [
        "case | first step cold, warm, resumed (s) | steps/s (planned) | device | host | pinned pool | disk GiB (plan) | same bytes"
    ]
    for name, parts in results.items():
        straight, killed = parts.get("straight"), parts.get("killed", {})
        if straight is None:
            continue
        firsts = (straight["first_step_s"], killed.get("warm_first_step_s"), killed.get("resumed_first_step_s"))
        planned = 1 / straight["predicted_step_s"] if straight["predicted_step_s"] else float("nan")
        peaks = [f"{each['gib']} ({each['plan_gib']})" for each in straight["peaks"].values()]
        columns = [name, ", ".join(map(str, firsts)), f"{straight['steps_per_s']} ({planned:.3f})", *peaks]
        lines.append(" | ".join([*columns, str(killed.get("same_bytes"))]))
    return "\n".join(lines)


def parse_case(text: str) -> Case:
    """`70b:paged_adamw_8bit:auto`, or `70b/8:...` for its first eight layers."""
    shape, optim, place = text.split(":")
    shape, _, layers = shape.partition("/")
    return Case(shape=shape, optim=optim, place=place, layers=int(layers) if layers else None)


def main() -> None:
    """Walk the cases, and write `results/headline.json` after each part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="+", type=parse_case, metavar="SHAPE:OPTIM:PLACE")
    parser.add_argument(
        "--work", type=Path, required=True, metavar="DIR", help="for models and runs; models stay there"
    )
    parser.add_argument("--results", type=Path, default=RESULTS / "headline.json", metavar="FILE")
    parser.add_argument("--merge", action="store_true", help="merge the first case's adapter, too")
    parser.add_argument("--set", nargs="*", default=[], metavar="section.key=value", help="more settings of train.py's")
    options = parser.parse_args()
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "0", "TF_CPP_VMODULE": "bfc_allocator=1"}
    jax.config.update("jax_platforms", "cpu")  # of this process: the card is for those it starts
    results = json.loads(options.results.read_text()) if options.results.exists() else {}
    options.work.mkdir(parents=True, exist_ok=True)
    data = options.work / "rows.jsonl"
    rows(data, 256)
    for number, case in enumerate(options.cases):
        model = options.work / f"model-{case.shape}-{case.layers or 'all'}"
        if not (model / "model.safetensors.index.json").exists():
            began = time.perf_counter()
            synthetic.write(model, synthetic.hf_config(case.shape, case.layers), distinct=2)
            print(f"{model}: {size_of(model) / 1e9:.1f} GB in {time.perf_counter() - began:.1f} s", flush=True)
        work = options.work / case.name
        shutil.rmtree(work, ignore_errors=True)
        settings = [f"memory.device_memory={DEVICE_MEMORY}", *options.set]
        road = Road(case=case, model=model, data=data, work=work, settings=settings, environment=environment)
        merges = options.merge and number == 0
        parts = results[case.name] = {}
        try:
            for name, found in walk(road, keep=merges):
                parts[name] = found
                options.results.write_text(json.dumps(results, indent=1) + "\n")
                print(case.name, name, json.dumps({k: v for k, v in found.items() if k != "items"}), flush=True)
        except SystemExit as failure:
            parts["failed"] = str(failure)
            print(failure, flush=True)
            merges = False
        if merges:
            parts["merge"] = merge(road, case.layers or synthetic.hf_config(case.shape, None)["num_hidden_layers"])
            print(case.name, "merge", json.dumps(parts["merge"]), flush=True)
        options.results.write_text(json.dumps(results, indent=1) + "\n")
        shutil.rmtree(work, ignore_errors=True)
    print(table(results))


if __name__ == "__main__":
    sys.exit(main())
