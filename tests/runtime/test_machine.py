"""What the machine is said to have, and what XLA is told before it starts."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from qlora_jax.base.units import GIB, parse_bytes
from qlora_jax.runtime import machine, pinned
from qlora_jax.runtime.machine import Gpu, device_kind, device_memory

CARD = Gpu("a card", 24 * GIB, 23 * GIB)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("24GiB", 24 * GIB),
        ("24 GB", 24 * 10**9),
        ("1.5GiB", 3 * GIB // 2),
        ("512MiB", 2**29),
        ("1024", 1024),
        ("7b", 7),
    ],
)
def test_sizes(text: str, expected: int) -> None:
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "lots", "24XB", "-1GiB", "GiB"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match="expected a size such as 24GiB"):
        parse_bytes(text)


def test_host_memory_is_what_kernel_and_control_group_allow(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 100 kB\nMemAvailable:    4000 kB\n")
    assert machine.available_host_bytes(tmp_path) == 4000 * 1024
    group = tmp_path / "sys/fs/cgroup"
    group.mkdir(parents=True)
    (group / "memory.max").write_text("max\n")
    (group / "memory.current").write_text("1000\n")
    assert machine.available_host_bytes(tmp_path) == 4000 * 1024
    (group / "memory.max").write_text("3000\n")
    assert machine.available_host_bytes(tmp_path) == 2000


def test_usable_memory_leaves_room_for_the_context() -> None:
    assert machine.usable_bytes(CARD, None) == CARD.free_bytes - machine.CONTEXT_BYTES
    assert machine.usable_bytes(CARD, 8 * GIB) == 8 * GIB - machine.CONTEXT_BYTES
    assert machine.usable_bytes(CARD, 80 * GIB) == CARD.free_bytes - machine.CONTEXT_BYTES  # no more than there is


@pytest.fixture
def clean(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    names = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB")
    for name in (*names, "TF_CPP_MIN_LOG_LEVEL", machine.CACHE_VARIABLE):
        monkeypatch.setenv(name, "")  # so that it is put back afterwards
        monkeypatch.delenv(name)
    kept = {
        name: getattr(jax.config, name)
        for name in ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    }
    monkeypatch.setattr(jax.config, "update", lambda name, value: kept.__setitem__(name, value))
    monkeypatch.kept = kept
    return monkeypatch


def test_xla_is_told_its_shares(clean: pytest.MonkeyPatch, tmp_path: Path) -> None:
    machine.prepare(CARD, 12 * GIB, 40 * GIB + 1, tmp_path)
    environment = machine.os.environ
    assert environment["XLA_CLIENT_MEM_FRACTION"] == "0.5000"
    assert environment["XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB"] == "42"
    assert clean.kept["jax_compilation_cache_dir"] == str(tmp_path)


def test_what_the_user_has_set_stays(clean: pytest.MonkeyPatch, tmp_path: Path) -> None:
    clean.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.3")  # with the other name set as well, JAX would refuse to start
    clean.setenv("XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB", "7")
    clean.setenv(machine.CACHE_VARIABLE, "elsewhere")
    machine.prepare(CARD, 12 * GIB, 40 * GIB, tmp_path)
    assert "XLA_CLIENT_MEM_FRACTION" not in machine.os.environ
    assert machine.os.environ["XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB"] == "7"
    assert clean.kept["jax_compilation_cache_dir"] != str(tmp_path)


def test_other_platforms_have_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax.config, "_value", None, raising=False)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert machine.find_gpu() is None


class Cuda:
    """The driver's library, answering `answer`, or failing at one call."""

    def __init__(self, answer: int, failing: str = "") -> None:
        self._answer, self._failing = answer, failing

    def cuInit(self, flags: int) -> int:  # noqa: N802
        return int(self._failing == "cuInit")

    def cuDeviceGet(self, device: Any, ordinal: int) -> int:  # noqa: N802
        return int(self._failing == "cuDeviceGet")

    def cuDeviceGetAttribute(self, answer: Any, attribute: int, device: Any) -> int:  # noqa: N802
        assert attribute == 99
        answer._obj.value = self._answer
        return int(self._failing == "cuDeviceGetAttribute")


@pytest.mark.parametrize(
    ("cuda", "expected"),
    [
        (Cuda(1), True),
        (Cuda(0), False),
        (Cuda(1, "cuInit"), False),
        (Cuda(1, "cuDeviceGet"), False),
        (Cuda(1, "cuDeviceGetAttribute"), False),
        (None, False),
    ],
)
def test_whether_memory_can_be_registered(monkeypatch: pytest.MonkeyPatch, cuda: Cuda | None, expected: bool) -> None:
    def library(name: str) -> Cuda:
        if cuda is None:
            raise OSError(name)
        return cuda

    monkeypatch.setattr(machine.ctypes, "CDLL", library)
    assert machine.registers_host_memory() is expected


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU")
def test_the_driver_registers_what_it_says_it_does() -> None:
    assert machine.registers_host_memory() == (pinned.pin([np.ones(3)]) is not None)


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU")
def test_the_driver_and_jax_speak_of_the_same_card() -> None:
    gpu = machine.find_gpu()
    assert gpu.name == device_kind()
    assert gpu.total_bytes >= device_memory()["bytes_limit"]
