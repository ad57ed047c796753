"""The 4-bit operations against bitsandbytes' and against plain bfloat16 matmuls, on one large matrix. `python -m benchmarks.kernels`.

Each figure is the time of one operation inside a jitted function that does it on `BUFFERS` buffers, none of them twice, called `CALLS`
times before the device is waited for: neither dispatch nor caches count. Writes `results/kernels-DEVICE.json`. bitsandbytes' side runs
first, in its own process (`benchmarks.torch_kernels`), and is left out where it is not installed.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

REPEATS = 7
CALLS = 10
BUFFERS = 6
TOKENS = (1, 2, 4, 16, 2048)


def milliseconds(run: Callable[..., Any], *buffers: Sequence[Any]) -> float:
    """Median time of `run(*arguments)`, the arguments taken from each of `buffers` in turn."""
    import jax

    compiled = jax.jit(lambda *lists: [run(*arguments) for arguments in zip(*lists, strict=True)])
    jax.block_until_ready(compiled(*buffers))
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        for _ in range(CALLS):
            results = compiled(*buffers)
        jax.block_until_ready(results)
        times.append((time.perf_counter() - start) / (CALLS * BUFFERS))
        del results
    return 1e3 * statistics.median(times)


def measure(rows: int, columns: int) -> dict[str, float]:
    """Milliseconds by operation: ours, the plain twins', and XLA's bfloat16 matmul."""
    import jax
    import jax.numpy as jnp

    from qlora_jax.ops import dispatch, nf4

    def random(shape: tuple[int, ...], seed: int) -> jax.Array:
        return 0.02 * jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)

    dense = [jax.block_until_ready(jax.jit(random, static_argnums=0)((rows, columns), i)) for i in range(BUFFERS)]
    packed = [dispatch.quantize(weight) for weight in dense]
    result = {
        "quantize": milliseconds(dispatch.quantize, dense),
        "dequantize": milliseconds(dispatch.dequantize, packed),
        "dequantize twin": milliseconds(nf4.dequantize, packed),
    }
    if rows * columns <= 2**26 or jax.default_backend() == "gpu":
        result["quantize twin"] = milliseconds(nf4.quantize, dense)
    for tokens in TOKENS:
        xs = [random((tokens, columns), 100 + i) for i in range(BUFFERS)]
        result[f"bf16 matmul {tokens}"] = milliseconds(lambda x, w: jnp.einsum("ti,oi->to", x, w), xs, dense)
        result[f"matmul {tokens}"] = milliseconds(dispatch.matmul, xs, packed)
        result[f"dequantize + matmul {tokens}"] = milliseconds(
            lambda x, w: jnp.einsum("ti,oi->to", x, dispatch.dequantize(w)), xs, packed
        )
    return result


def table(ours: dict[str, float], theirs: dict[str, float]) -> str:
    """Both sides, and ours over bitsandbytes' and over the bfloat16 matmul of the same tokens (the faster library's)."""
    lines = [f"{'operation':26}{'ours, ms':>10}{'theirs, ms':>12}{'speed-up':>10}{'of bf16':>9}"]
    for name, value in ours.items():
        other = theirs.get(name)
        tokens = name.rpartition(" ")[2]
        plain = [side[f"bf16 matmul {tokens}"] for side in (ours, theirs) if f"bf16 matmul {tokens}" in side]
        lines.append(
            f"{name:26}{value:10.4f}"
            + (f"{other:12.4f}{other / value:9.2f}x" if other else " " * 22)
            + (f"{value / min(plain):8.2f}x" if plain else "")
        )
    return "\n".join(lines)


def main() -> None:
    """Measure both sides, write the result and print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--rows", type=int, default=28672)
    parser.add_argument("--columns", type=int, default=8192)
    options = parser.parse_args()
    shape = [str(options.rows), str(options.columns)]
    peer = subprocess.run(
        [sys.executable, "-m", "benchmarks.torch_kernels", *shape], capture_output=True, text=True, check=False
    )
    theirs = json.loads(peer.stdout.splitlines()[-1]) if peer.returncode == 0 else {}
    if not theirs:
        print(f"bitsandbytes' side did not run: {(peer.stderr.strip() or 'no message').splitlines()[-1]}")

    from benchmarks.machine import write_result
    from qlora_jax.runtime.machine import device_kind

    ours = measure(options.rows, options.columns)
    name = f"kernels-{device_kind().split()[-1].lower()}"
    result = {
        "what": "kernels",
        "rows": options.rows,
        "columns": options.columns,
        "ms": ours,
        "bitsandbytes_ms": theirs,
    }
    print(write_result(name, result))
    print(table(ours, theirs))


if __name__ == "__main__":
    main()
