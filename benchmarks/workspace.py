"""What a layer of a Llama shape takes while it is at work on an NVIDIA card, compiled on a machine that need not have one.

    pip install jax-cuda13-plugin jax-cuda13-pjrt nvidia-cuda-nvcc nvidia-cudnn-cu13       # in jax's version; --no-deps will do
    python -m benchmarks.workspace 7b --batch 4 --seq 2048
    python -m benchmarks.workspace 70b --seq 4096 --no-share-dense --top 20

XLA's GPU compiler needs a description of the card, not the card: this compiles for an H100 what `qlora_jax.engine.engine` would run
there, kernels and cuDNN's attention included, and prints the workspace that the planner would find, and with `--top` the largest arrays
that are there together at its peak. What is missing is autotuning: on a card XLA times its matrix products and may choose others, whose
own workspaces differ by some tens of MiB.
"""

import argparse
import contextlib
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

H100 = """
gpu_device_info {
  name: "NVIDIA H100 80GB HBM3" device_vendor: "NVIDIA Corporation"
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98 memory_bandwidth: 3352320000000 device_memory_size: 84942979072
  l2_cache_size: 52428800 device_address_bits: 64
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448 shared_memory_per_core: 233472
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0" dnn_version: "9.10.0"
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
"""A `GpuTargetConfigProto`: NVIDIA's figures for the card."""
CUDNN = 91000


def main() -> None:
    """Compile, print a JSON line, and the arrays if they are asked for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.workspace", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("model", metavar="SHAPE", help="as in benchmarks.step")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--seq", type=int, default=2048)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--mlp-tokens", type=int, default=8192)
    parser.add_argument("--keep", action="store_true", help="a layer that is not run again")
    parser.add_argument("--no-share-dense", dest="share_dense", action="store_false")
    parser.add_argument(
        "--top", type=int, default=0, metavar="N", help="the N largest arrays at the backward pass's peak"
    )
    options = parser.parse_args()
    os.environ["JAX_PLATFORMS"] = "cpu"
    with tempfile.TemporaryDirectory() as dump:
        flags = [f"--xla_gpu_cuda_data_dir={toolkit()}", f"--xla_dump_to={dump}", "--xla_dump_hlo_as_text"]
        os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *flags])
        print(json.dumps({**vars(options), "gib": workspaces(options)}))
        for name, mib in list(at_peak(Path(dump)))[: options.top]:
            print(f"{mib:9.1f} MiB  {name}")


def toolkit() -> Path:
    """Where pip has put NVIDIA's assembler, which is called by name, too."""
    import nvidia.cu13

    folder = Path(next(iter(nvidia.cu13.__path__)))
    os.environ["PATH"] = f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
    return folder


def workspaces(options: argparse.Namespace) -> dict[str, float]:
    """GiB that the compiled functions take for themselves."""
    from jax._src.cudnn import fused_attention_stablehlo as attention
    from jax.experimental import topologies

    from benchmarks.step import llama
    from qlora_jax.config import LoraSettings, QuantizationSettings
    from qlora_jax.engine.compiled_memory import temporary_bytes
    from qlora_jax.engine.engine import Engine
    from qlora_jax.ops import dispatch
    from qlora_jax.runtime import placement

    lora = LoraSettings(r=options.rank, lora_dropout=options.dropout)
    layout = {"share_dense": options.share_dense, "mlp_tokens": options.mlp_tokens}
    settings = llama(options.model), lora, QuantizationSettings()
    engine = Engine(*settings, compute_dtype="bfloat16", attention="cudnn", **layout)
    device = topologies.get_topology_desc("", "cuda", target_config=H100, topology="1x1x1").devices[0]
    attention.check_cudnn_version = lambda: CUDNN  # which ask a card
    attention.check_compute_capability = lambda *arguments: True
    dispatch.available = lambda: True
    placement.jax.devices = lambda *arguments: [device]
    placement.one_device.cache_clear()
    with for_the_card(placement.one_device().mesh.abstract_mesh):
        found = temporary_bytes(engine, options.batch, options.seq, packed=False, saves=(options.keep,))
    return {name: round(size / 2**30, 3) for name, size in found.items()}


@contextlib.contextmanager
def for_the_card(mesh: Any) -> Iterator[None]:
    """Within, what is lowered is lowered for a GPU, whatever there is."""
    import jax
    from jax._src.stages import Traced

    lower = Traced.lower
    Traced.lower = lambda self, **options: lower(self, **{**options, "lowering_platforms": ("cuda",)})
    try:
        with jax.sharding.use_abstract_mesh(mesh):
            yield
    finally:
        Traced.lower = lower


def at_peak(dump: Path) -> Iterator[tuple[str, float]]:
    """(array, MiB) of what is live at the peak of the backward pass, arguments among them, the largest first."""
    (report,) = dump.glob("*jit_backward*live-range.txt")
    _, _, peak = report.read_text(encoding="utf-8").partition("(peak):")
    for name, size in re.findall(r"^\s+(\S+): (\d+) bytes \(cum", peak, re.MULTILINE):
        yield name, int(size) / 2**20


if __name__ == "__main__":
    sys.exit(main())
