"""Tensors in pieces are the tensors; and the memory that a conversion takes does not grow with them."""

import tracemalloc
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from convert import names, pieces
from convert.ahead import made_ahead
from convert.delta import base_rows
from convert.folder import ModelFolder
from convert.quantize import quantize
from qlora_jax import nf4
from qlora_jax.config import QuantizationSettings
from tests import tiny
from tests.test_quantize import KINDS, RAGGED


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: f"{kind.quant_type}{'-double' * kind.double_quant}")
@pytest.mark.parametrize("piece", [64, 64 * 41, 10**6])
def test_through_4_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: QuantizationSettings, piece: int
) -> None:
    model = tiny.write_model(tmp_path / "model", num_hidden_layers=1, **RAGGED)
    path = model / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    name = names.linear(0, "up_proj")
    tensors[name][:8] = 0
    tensors[name][8:16] *= ml_dtypes.bfloat16(1e-38)  # blocks that need more than float32's normal numbers
    tensors[name][-1] *= ml_dtypes.bfloat16(1e37)
    safetensors.numpy.save_file(tensors, path, {"format": "pt"})
    folder = ModelFolder(model)
    monkeypatch.setattr(pieces, "PIECE", piece)
    for linear in ("q_proj", "up_proj", "down_proj"):
        name = names.linear(0, linear)
        quantized = pieces.quantized(folder, name, kind)
        expected = np.asarray(nf4.dequantize(quantized))
        roads: list[Any] = [pieces.dequantized(quantized), pieces.through_4_bits(folder, name, kind)]
        for road in roads:
            parts = list(road)
            assert [row for rows, _ in parts for row in range(rows.start, rows.stop)] == list(range(len(expected)))
            found = np.concatenate([values for _, values in parts])
            np.testing.assert_array_equal(found.view(np.uint16), expected.view(np.uint16), err_msg=name)


def test_made_ahead() -> None:
    with made_ahead(iter(range(100))) as ahead:
        assert list(ahead) == list(range(100))


def test_an_error_comes_where_its_item_would() -> None:
    def items() -> Any:
        yield 1
        raise OSError("gone")

    taken = []
    with pytest.raises(OSError, match="gone"), made_ahead(items()) as ahead:
        taken.extend(ahead)
    assert taken == [1]


def test_what_is_not_taken_is_not_waited_for() -> None:
    made = []
    with made_ahead(made.append(i) or i for i in range(10**6)) as ahead:
        assert next(ahead) == 0
    assert len(made) <= 5


def test_memory_does_not_hold_a_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """numpy's share, which would be twice a float32 tensor if one were read and cast whole: codes and scales of one, and of one ahead."""
    model = tiny.write_model(
        tmp_path / "model", dtype=np.float32, hidden_size=512, intermediate_size=2048, num_hidden_layers=1
    )
    folder, kind = ModelFolder(model), QuantizationSettings()
    largest = max(folder.spec(name).nbytes for name in folder.names) // 2
    monkeypatch.setattr(pieces, "PIECE", 2**14)
    quantize(folder, tmp_path / "warm", kind)  # compiled
    tracemalloc.start()
    quantize(folder, tmp_path / "out", kind)
    quantized = tracemalloc.get_traced_memory()[1]
    tracemalloc.reset_peak()
    name = names.linear(0, "up_proj")
    for _, weight in base_rows(folder, name, folder.spec(name).shape, kind, "dequantized"):
        del weight
    through = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert quantized < largest
    assert through < largest
