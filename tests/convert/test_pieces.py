"""Tensors in pieces are the tensors; and the memory that a conversion takes does not grow with them."""

import math
import time
import tracemalloc
import types
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from convert.adapters.delta import base_rows
from convert.files import pieces
from convert.files.ahead import in_order, made_ahead, num_threads
from convert.files.folder import ModelFolder
from convert.quantize import quantize
from qlora_jax.base.errors import InputError
from qlora_jax.config import QuantizationSettings
from qlora_jax.ops import dispatch, nf4
from qlora_jax.runtime import pinned
from qlora_jax.runtime.placement import one_device
from tests.convert.test_quantize import KINDS, RAGGED
from tests.helpers import tiny
from tests.helpers.tiny import NAMES


def through_4_bits(folder: ModelFolder, name: str, kind: QuantizationSettings) -> pieces.Rows:
    first, rows = pieces.through_4_bits(folder, name, kind)
    for task in first:
        task()
    return rows


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: f"{kind.quant_type}{'-double' * kind.double_quant}")
@pytest.mark.parametrize("piece", [64, 64 * 41, 10**6])
def test_through_4_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: QuantizationSettings, piece: int
) -> None:
    model = tiny.write_model(tmp_path / "model", num_hidden_layers=1, **RAGGED)
    path = model / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    name = NAMES.linear(0, "up_proj")
    tensors[name][:8] = 0
    tensors[name][8:16] *= ml_dtypes.bfloat16(1e-38)  # blocks that need more than float32's normal numbers
    tensors[name][-1] *= ml_dtypes.bfloat16(1e37)
    safetensors.numpy.save_file(tensors, path, {"format": "pt"})
    folder = ModelFolder(model)
    monkeypatch.setattr(pieces, "PIECE", piece)
    for linear in ("q_proj", "up_proj", "down_proj"):
        name = NAMES.linear(0, linear)
        quantized = pieces.quantized(folder, name, kind)
        expected = np.asarray(nf4.dequantize(quantized))
        roads: list[Any] = [pieces.dequantized(quantized), through_4_bits(folder, name, kind)]
        for road in roads:
            parts = [(rows, np.asarray(values())) for rows, values in road]
            assert [row for rows, _ in parts for row in range(rows.start, rows.stop)] == list(range(len(expected)))
            found = np.concatenate([values for _, values in parts])
            np.testing.assert_array_equal(found.view(np.uint16), expected.view(np.uint16), err_msg=name)


@pytest.mark.parametrize("kind", KINDS[:2], ids=lambda kind: f"{kind.quant_type}{'-double' * kind.double_quant}")
def test_whole_on_a_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: QuantizationSettings) -> None:
    """The road that is taken with a GPU, played by the CPU: the same bytes."""
    model = tiny.write_model(tmp_path / "model", num_hidden_layers=1, **RAGGED)
    folder = ModelFolder(model)
    monkeypatch.setattr(pieces, "PIECE", 64 * 3)
    all_names = [NAMES.linear(0, linear) for linear in ("q_proj", "up_proj", "down_proj")]

    def results() -> list[Any]:
        found = []
        for name in all_names:
            weight = pieces.quantized(folder, name, kind)
            roads = through_4_bits(folder, name, kind), pieces.dequantized(weight)
            found += [np.concatenate([values() for _, values in road]).view(np.uint16) for road in roads]
            found += [weight.codes, weight.absmax, *([weight.nested_absmax] if kind.double_quant else [])]
        return found

    expected = results()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(dispatch, "available", lambda: False)
    monkeypatch.setattr(pinned, "client", lambda: None)
    for ours, theirs in zip(results(), expected, strict=True):
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))
    for name in (NAMES.embedding, NAMES.final_norm):
        found, same = pieces.on_device(folder, name), pieces.read_bfloat16(folder, name)
        assert one_device().lives(found, "device")
        assert (found.dtype, found.shape, np.asarray(found).tobytes()) == (same.dtype, same.shape, same.tobytes())
    path = model / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    tensors[all_names[0]][-1, -1] = np.inf
    safetensors.numpy.save_file(tensors, path, {"format": "pt"})
    for read in (lambda folder, name: pieces.quantized(folder, name, kind), pieces.on_device):
        with pytest.raises(InputError, match=r"1 of 1600 values are NaN or infinite, the first at \(39, 39\)"):
            read(ModelFolder(model), all_names[0])


@pytest.mark.parametrize("shape", [(32000, 8192), (128256, 8192), (8192,), (16384, 53248)], ids=str)
def test_a_gpu_is_sent_few_parts(shape: tuple[int, ...]) -> None:
    """All of a tensor, one after the other, in as many parts as can be joined at once; whole pieces, whose blocks are whole."""
    folder = types.SimpleNamespace(spec=lambda name: types.SimpleNamespace(shape=shape))
    parts, size = list(pieces._parts(folder, "it")), math.prod(shape)
    assert [begin for begin, _ in parts] == list(range(0, size, parts[0][1]))
    assert {number for _, number in parts} == {parts[0][1]}
    assert parts[0][1] % pieces.PIECE == 0
    assert len(parts) <= pieces.MOST_PARTS
    assert parts[0][1] == pieces.PIECE or len(parts) > pieces.MOST_PARTS / 2


def test_in_order() -> None:
    """Results come in order whatever takes how long; an error where its item would; no more is begun than said."""
    begun: list[int] = []

    def task(number: int) -> Any:
        def run() -> int:
            begun.append(number)
            time.sleep(0.002 * (number % 3 == 0))
            if number == 30:
                raise OSError("gone")
            return number

        return run

    taken = []
    with pytest.raises(OSError, match="gone"):
        for item in in_order(map(task, range(1000))):
            taken.append(item)
            assert len(begun) <= len(taken) + num_threads() + 1
    assert taken == list(range(30))
    assert list(in_order([])) == []


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
    name = NAMES.linear(0, "up_proj")
    for weight in in_order(values for _, values in base_rows(folder, name, kind, "dequantized")):
        del weight
    through = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert quantized < largest
    assert through < largest
