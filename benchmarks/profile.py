"""Where the milliseconds of a step go: one case of `benchmarks.step` under JAX's profiler, by kind of work and by kernel.

    python -m benchmarks.profile 7b:8 --batch 4 --seq 2048
    XLA_CLIENT_MEM_FRACTION=0.163 python -m benchmarks.profile 70b:8 --seq 4096 --weights host --top 40

Prints a table of the device's time in one step, and writes every kernel's to `--out FILE` as JSON.
"""

import argparse
import collections
import dataclasses
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax

from benchmarks.step import Case, add_case_arguments

STEPS = 2


@dataclasses.dataclass
class Kernel:
    """One kernel's part of a step."""

    name: str
    module: str
    operation: str
    scope: str
    line: str
    milliseconds: float = 0.0
    calls: int = 0


def kernels(trace: Path) -> Iterator[tuple[Kernel, float]]:
    """Every event on the device's lines of a trace, with its milliseconds."""
    (path,) = trace.rglob("*.xplane.pb")
    for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
        if not plane.name.startswith("/device:GPU"):
            continue
        for line in plane.lines:
            if not line.name.startswith("Stream"):
                continue
            for event in line.events:
                stats = {key: str(value) for key, value in event.stats}
                names = (stats.get(key, "") for key in ("hlo_module", "hlo_op", "tf_op"))
                yield Kernel(event.name, *names, line.name), event.duration_ns / 1e6


def profile(options: argparse.Namespace) -> list[Kernel]:
    """Run the case and sum its kernels, the longest first."""
    case = Case(options)
    for _ in range(2):
        case.step()
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(STEPS):
                case.step()
        total: dict[tuple[str, ...], Kernel] = collections.OrderedDict()
        for kernel, milliseconds in kernels(Path(folder)):
            key = (kernel.name, kernel.module, kernel.operation, kernel.line)
            entry = total.setdefault(key, kernel)
            entry.milliseconds += milliseconds / STEPS
            entry.calls += 1
    return sorted(total.values(), key=lambda kernel: -kernel.milliseconds)


def main() -> None:
    """Parse, profile, print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.profile", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add_case_arguments(parser)
    parser.add_argument("--top", type=int, default=30, help="kernels to print")
    parser.add_argument("--out", type=Path, help="a JSON file for all of them")
    options = parser.parse_args()
    found = profile(options)
    if options.out:
        options.out.write_text(json.dumps([dataclasses.asdict(kernel) for kernel in found]), encoding="utf-8")
    by_line: dict[str, float] = collections.Counter()
    for kernel in found:
        by_line[kernel.line] += kernel.milliseconds
    for line, milliseconds in sorted(by_line.items(), key=lambda pair: -pair[1]):
        print(f"{milliseconds:9.2f} ms  {line}")
    for kernel in found[: options.top]:
        print(
            f"{kernel.milliseconds:9.2f} ms {kernel.calls // STEPS:5} x  {kernel.module:18.18} {kernel.operation:30.30} {kernel.name[:60]}"
        )


if __name__ == "__main__":
    sys.exit(main())
