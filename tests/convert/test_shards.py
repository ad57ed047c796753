"""The shard writer against the safetensors library."""

import gc
import json
import weakref
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from convert.files.shards import NUMPY_DTYPES, TensorSpec, write_index, write_json, write_shard


def random_tensor(spec: TensorSpec, seed: int) -> np.ndarray:
    raw = np.random.default_rng(seed).integers(0, 2 if spec.dtype == "BOOL" else 256, spec.nbytes, dtype=np.uint8)
    return raw.view(NUMPY_DTYPES[spec.dtype]).reshape(spec.shape)


SPECS = [
    TensorSpec("z.weight", "BF16", (3, 5)),
    TensorSpec("a.bytes", "U8", (7,)),
    TensorSpec("scalar", "F32", ()),
    TensorSpec("empty", "F16", (0, 4)),
    TensorSpec("größe", "I64", (2,)),
]


def test_safetensors_reads_what_was_written(tmp_path: Path) -> None:
    tensors = [random_tensor(spec, i) for i, spec in enumerate(SPECS)]
    write_shard(tmp_path / "x.safetensors", SPECS, [*tensors[:1], tensors[1].tobytes(), *tensors[2:]])
    with safetensors.safe_open(tmp_path / "x.safetensors", framework="numpy") as file:
        assert file.metadata() == {"format": "pt"}
        assert set(file.keys()) == {spec.name for spec in SPECS}
        for spec, tensor in zip(SPECS, tensors, strict=True):
            read = file.get_tensor(spec.name)
            assert (read.dtype, read.shape, read.tobytes()) == (tensor.dtype, tensor.shape, tensor.tobytes())


def test_order_and_alignment(tmp_path: Path) -> None:
    tensors = [random_tensor(spec, i) for i, spec in enumerate(SPECS)]
    write_shard(tmp_path / "x.safetensors", SPECS, tensors, metadata={})
    raw = (tmp_path / "x.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    assert length % 8 == 0
    assert list(json.loads(raw[8 : 8 + length])) == [spec.name for spec in SPECS]
    assert raw[8 + length :] == b"".join(tensor.tobytes() for tensor in tensors)


@pytest.mark.parametrize("dtype", NUMPY_DTYPES)
def test_dtype_names_are_safetensors_own(tmp_path: Path, dtype: str) -> None:
    spec = TensorSpec("x", dtype, (4,))
    write_shard(tmp_path / "x.safetensors", [spec], [random_tensor(spec, 0)])
    assert safetensors.numpy.load_file(tmp_path / "x.safetensors")["x"].dtype == NUMPY_DTYPES[dtype]


def test_transposed_tensor_is_written_row_major(tmp_path: Path) -> None:
    tensor = np.arange(6, dtype=np.float32).reshape(2, 3).T
    write_shard(tmp_path / "x.safetensors", [TensorSpec("x", "F32", (3, 2))], [tensor])
    np.testing.assert_array_equal(safetensors.numpy.load_file(tmp_path / "x.safetensors")["x"], tensor)


def test_one_tensor_at_a_time(tmp_path: Path) -> None:
    alive: list[weakref.ref[np.ndarray]] = []

    def make() -> np.ndarray:
        assert not [ref for ref in alive if ref() is not None]
        tensor = np.zeros(8, ml_dtypes.bfloat16)
        alive.append(weakref.ref(tensor))
        return tensor

    def tensors() -> Iterator[np.ndarray]:
        for _ in range(4):
            yield make()

    gc.disable()
    try:
        write_shard(tmp_path / "x.safetensors", [TensorSpec(f"x{i}", "BF16", (8,)) for i in range(4)], tensors())
    finally:
        gc.enable()
    assert len(alive) == 4


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ([np.zeros((2, 3), np.float32)], r"float32\[2, 3\], expected F32\[3, 2\]"),
        ([np.zeros((3, 2), np.float16)], r"float16\[3, 2\], expected F32\[3, 2\]"),
        ([b"short"], "5 bytes, expected 24"),
        ([], "0 tensors for 1 specs; x is missing"),
        ([bytes(24), b""], "more tensors than the 1 specs"),
    ],
)
def test_a_wrong_tensor_leaves_the_old_file_and_nothing_else(tmp_path: Path, tensors: list, message: str) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"old")
    with pytest.raises(ValueError, match=message):
        write_shard(path, [TensorSpec("x", "F32", (3, 2))], tensors)
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]
    assert path.read_bytes() == b"old"


def test_a_failing_source_leaves_nothing(tmp_path: Path) -> None:
    def tensors() -> Iterator[bytes]:
        yield bytes(4)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shard(tmp_path / "x.safetensors", [TensorSpec(n, "F32", (1,)) for n in "ab"], tensors())
    assert not list(tmp_path.iterdir())


def test_names_and_dtypes_are_checked(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="x: dtype 'bfloat16' is none of BOOL"):
        TensorSpec("x", "bfloat16", (1,))
    with pytest.raises(ValueError, match="tensor x appears twice"):
        write_shard(tmp_path / "x.safetensors", [TensorSpec("x", "U8", (1,))] * 2, [b"a", b"b"])


def test_index_and_json(tmp_path: Path) -> None:
    write_index(tmp_path, {"x": "model-00001-of-00001.safetensors"}, 12)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index == {"metadata": {"total_size": 12}, "weight_map": {"x": "model-00001-of-00001.safetensors"}}
    write_json(tmp_path / "o.json", {"ä": [1]})
    assert json.loads((tmp_path / "o.json").read_text(encoding="utf-8")) == {"ä": [1]}
    with pytest.raises(TypeError):
        write_json(tmp_path / "o.json", {"x": object()})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.safetensors.index.json", "o.json"]
