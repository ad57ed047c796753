"""What the machine has, found out before JAX starts its backend; and what XLA reads only once, then.

The size of XLA's share of the GPU and of its pool of pinned host memory are settled when the backend starts. So the plan is made from the
driver's own figures (NVML) and the kernel's, and `prepare` sets what follows from it.
"""

import ctypes
import dataclasses
import os
import re
from pathlib import Path

import jax

from qlora_jax.base.units import GIB

CONTEXT_BYTES = GIB * 3 // 4
"""What a process takes of a GPU beside XLA's pool: CUDA's context and the libraries' own; 0.65 GiB on an H200."""

PINNED_UNIT = GIB
"""XLA takes the limit of its pinned pool in whole GiB."""

HOST_REGISTER_SUPPORTED = 99
"""CUDA's number for that question about a device (`CU_DEVICE_ATTRIBUTE_HOST_REGISTER_SUPPORTED`)."""

CACHE_VARIABLE = "JAX_COMPILATION_CACHE_DIR"
POOL_VARIABLE = "XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB"
"""Names of the environment variables that XLA reads: where compiled functions are kept, and the limit of its pool of pinned memory."""


@dataclasses.dataclass(frozen=True)
class Gpu:
    """A GPU as the driver describes it."""

    name: str
    total_bytes: int
    free_bytes: int


class _Memory(ctypes.Structure):
    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


def find_gpu() -> Gpu | None:
    """The GPU that JAX will use, without starting it; None if there is none, or JAX was told to use another platform."""
    platforms = (jax.config.jax_platforms or os.environ.get("JAX_PLATFORMS") or "cuda").split(",")
    if platforms[0] not in ("cuda", "gpu"):
        return None
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    if nvml.nvmlInit_v2() != 0:
        return None
    try:
        return _describe(nvml)
    finally:
        nvml.nvmlShutdown()


def _describe(nvml: ctypes.CDLL) -> Gpu | None:
    handle, memory, name = ctypes.c_void_p(), _Memory(), ctypes.create_string_buffer(96)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip()
    if visible.isdigit():
        status = nvml.nvmlDeviceGetHandleByIndex_v2(int(visible), ctypes.byref(handle))
    else:  # by its UUID; an empty or negative entry hides every GPU, and finds none here
        status = nvml.nvmlDeviceGetHandleByUUID(visible.encode(), ctypes.byref(handle))
    if status or nvml.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory)):
        return None
    nvml.nvmlDeviceGetName(handle, name, len(name))
    return Gpu(name.value.decode(), memory.total, memory.free)


def registers_host_memory() -> bool:
    """Whether the driver says that the GPU JAX will use copies from host memory registered with it; without starting JAX."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    device, answer = ctypes.c_int(), ctypes.c_int()
    if cuda.cuInit(0) or cuda.cuDeviceGet(ctypes.byref(device), 0):
        return False
    status = cuda.cuDeviceGetAttribute(ctypes.byref(answer), HOST_REGISTER_SUPPORTED, device)
    return status == 0 and answer.value == 1


def available_host_bytes(root: Path = Path("/")) -> int:
    """Host memory that can be taken without swapping: what the kernel calls available, or less if a control group allows less."""
    text = (root / "proc/meminfo").read_text(encoding="utf-8")
    available = 1024 * int(re.search(r"MemAvailable:\s*(\d+)", text)[1])
    for limit_file, usage_file in (
        ("sys/fs/cgroup/memory.max", "sys/fs/cgroup/memory.current"),
        ("sys/fs/cgroup/memory/memory.limit_in_bytes", "sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        try:
            limit, usage = ((root / name).read_text(encoding="utf-8").strip() for name in (limit_file, usage_file))
        except OSError:
            continue
        if limit != "max":
            available = min(available, int(limit) - int(usage))
    return available


def usable_bytes(gpu: Gpu, asked: int | None) -> int:
    """Bytes that XLA may have of a card: of what is free now, or of `asked`, the memory of a smaller card, without CUDA's own."""
    return min(gpu.free_bytes, gpu.total_bytes if asked is None else asked) - CONTEXT_BYTES


def keep_compiled(cache: Path) -> None:
    """Keep compiled functions in a folder from run to run, unless `JAX_COMPILATION_CACHE_DIR` names another.

    All that took a tenth of a second; for a GPU all of them, since its compiler takes that long for the smallest.
    """
    if CACHE_VARIABLE not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(cache))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1 if find_gpu() is None else 0.0)


def prepare(gpu: Gpu | None, device_bytes: int | None, pinned_bytes: int, cache: Path) -> int | None:
    """Set what XLA reads at its start, where the user has not: before anything runs on the device.

    Args:
        gpu: the card, None without one.
        device_bytes: XLA's share of it.
        pinned_bytes: what the run has in XLA's pool of pinned memory at most. The pool grows by doubling what it has, up to its limit: a
            limit just above the need keeps it from taking much more than that.
        cache: where compiled functions are kept from run to run, unless `JAX_COMPILATION_CACHE_DIR` names another folder.

    Returns:
        the limit of the pinned pool, bytes; None without a GPU, or where the user's is not a number
    """
    keep_compiled(cache)
    if gpu is None:
        return None
    chosen = {
        "XLA_CLIENT_MEM_FRACTION",
        "XLA_PYTHON_CLIENT_MEM_FRACTION",
        "XLA_PYTHON_CLIENT_ALLOCATOR",
    } & os.environ.keys()
    if not chosen and device_bytes is not None:
        os.environ["XLA_CLIENT_MEM_FRACTION"] = f"{device_bytes / gpu.total_bytes:.4f}"
    os.environ.setdefault(POOL_VARIABLE, str(-(-pinned_bytes // PINNED_UNIT) + 1))
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # out of memory, XLA would print every block it has
    limit = os.environ[POOL_VARIABLE]
    return PINNED_UNIT * int(limit) if limit.isdigit() else None


def device_kind() -> str:
    """Return the name of the device that JAX uses, which starts its backend: `NVIDIA H200`, `cpu`."""
    return jax.devices()[0].device_kind


def device_memory() -> dict[str, int] | None:
    """Return XLA's account of the device's memory (`bytes_limit`, `peak_bytes_in_use`, ...); None where it keeps none, as on a CPU."""
    return jax.devices()[0].memory_stats()


def platform_version() -> str:
    """Return the version of XLA's platform: for a GPU, that of CUDA."""
    return jax.devices()[0].client.platform_version
