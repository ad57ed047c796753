"""Placements from shapes alone."""

import pytest

from qlora_jax.config import MemorySettings, QuantizationSettings
from qlora_jax.llama import LlamaConfig
from qlora_jax.plan import Placements, choose_placements, layer_bytes

LLAMA2_70B = LlamaConfig(32000, 8192, 28672, 80, 64, 8, 128, 1e-5, 10000.0, False)
NORM_BYTES = 2 * 8192 * 2
OFFSET_BYTES = 7 * 4
GIB = 2**30


def test_a_70b_layer_is_441_mb() -> None:
    weights = sum(rows * columns for rows, columns in LLAMA2_70B.linear_shapes().values())
    assert weights == 855_638_016
    expected = weights // 2 + weights // 64 + weights // (64 * 256) * 4 + NORM_BYTES + OFFSET_BYTES
    assert layer_bytes(LLAMA2_70B, QuantizationSettings()) == expected
    assert round(expected / 1e6) == 441
    single = weights // 2 + weights // 64 * 4 + NORM_BYTES
    assert layer_bytes(LLAMA2_70B, QuantizationSettings(double_quant=False)) == single


@pytest.mark.parametrize(
    ("weight_bytes", "device_bytes", "expected"),
    [
        (35 * GIB, 23 * GIB, "host"),
        (4 * GIB, 23 * GIB, "device"),
        (35 * GIB, 140 * GIB, "device"),
        (35 * GIB, None, "device"),
    ],
)
def test_weights_stay_on_the_device_if_they_leave_it_room(
    weight_bytes: int, device_bytes: int | None, expected: str
) -> None:
    assert choose_placements(MemorySettings(), "adamw", weight_bytes, device_bytes).base_weights == expected


def test_a_paged_optimizer_lives_on_the_host_and_what_is_asked_for_is_done() -> None:
    assert choose_placements(MemorySettings(), "paged_adamw_32bit", 1, GIB) == Placements("device", "device", "host")
    assert choose_placements(MemorySettings(), "adamw", 1, GIB) == Placements("device", "device", "device")
    asked = MemorySettings(base_weights="host", activations="host", optimizer="device")
    assert choose_placements(asked, "paged_adamw_32bit", 1, GIB) == Placements("host", "host", "device")
