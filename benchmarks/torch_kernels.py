"""bitsandbytes' side of `benchmarks.kernels`: the same operations on the same shape, in a process of its own. Needs a CUDA GPU.

    python -m benchmarks.torch_kernels ROWS COLUMNS

Prints one JSON object, milliseconds by operation. Events around many calls on rotating buffers, so that neither launches nor caches count.
"""

import json
import statistics
import sys
from collections.abc import Callable
from typing import Any

import bitsandbytes
import bitsandbytes.functional
import torch

from benchmarks.kernels import BUFFERS, CALLS, REPEATS, TOKENS


def milliseconds(run: Callable[[int], Any]) -> float:
    """Median time of `run(i)`, i over the buffers."""
    times = []
    for _ in range(REPEATS + 1):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for i in range(CALLS * BUFFERS):
            run(i % BUFFERS)
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / (CALLS * BUFFERS))
    return statistics.median(times[1:])


def main() -> None:
    """Measure and print."""
    rows, columns = map(int, sys.argv[1:])
    library = bitsandbytes.functional
    weights = [torch.randn(rows, columns, dtype=torch.bfloat16, device="cuda") * 0.02 for _ in range(BUFFERS)]
    options = {"quant_type": "nf4", "compress_statistics": True}
    packed = [library.quantize_4bit(weight, **options) for weight in weights]
    result = {
        "dequantize": milliseconds(lambda i: library.dequantize_4bit(*packed[i])),
        "quantize": milliseconds(lambda i: library.quantize_4bit(weights[i], **options)),
    }
    for tokens in TOKENS:
        x = torch.randn(tokens, columns, dtype=torch.bfloat16, device="cuda")
        result[f"bf16 matmul {tokens}"] = milliseconds(lambda i, x=x: x @ weights[i].t())
        result[f"matmul {tokens}"] = milliseconds(
            lambda i, x=x: bitsandbytes.matmul_4bit(x, packed[i][0].t(), quant_state=packed[i][1])
        )
    print(json.dumps(result))


if __name__ == "__main__":
    main()
