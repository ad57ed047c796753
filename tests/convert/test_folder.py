"""Good folders are read as they are; every bad one is refused with the reason."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from convert.files import folder as folder_module
from convert.files.folder import ModelFolder
from convert.files.shards import TensorSpec, write_index, write_json, write_shard
from qlora_jax.base.errors import InputError
from tests.helpers import tiny

A = np.arange(6, dtype=np.float32).reshape(2, 3)
B = np.arange(4, dtype=np.float16)
ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@pytest.fixture
def single(tmp_path: Path) -> Path:
    write_json(tmp_path / "config.json", {"model_type": "llama"})
    specs = [TensorSpec("b", "F16", (4,)), TensorSpec("a", "F32", (2, 3))]
    write_shard(tmp_path / "model.safetensors", specs, [B, A])
    return tmp_path


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    write_json(tmp_path / "config.json", {"model_type": "llama"})
    write_shard(tmp_path / ONE, [TensorSpec("a", "F32", (2, 3))], [A])
    write_shard(tmp_path / TWO, [TensorSpec("b", "F16", (4,))], [B])
    write_index(tmp_path, {"b": TWO, "a": ONE}, A.nbytes + B.nbytes)
    return tmp_path


def refusal(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        ModelFolder(path)
    return str(caught.value)


def raw_file(path: Path, header: Any, data: bytes = b"") -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def tensor(begin: int, end: int, shape: Any = (1,), dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape) if isinstance(shape, tuple) else shape, "data_offsets": [begin, end]}


def test_single_file(single: Path) -> None:
    model = ModelFolder(str(single))
    assert (model.path, model.config) == (single, {"model_type": "llama"})
    assert model.shards == ["model.safetensors"]
    assert model.names == ["b", "a"]
    assert model.specs("model.safetensors") == [TensorSpec("b", "F16", (4,)), TensorSpec("a", "F32", (2, 3))]
    assert model.spec("a").shape == (2, 3)
    assert model.metadata("model.safetensors") == {"format": "pt"}
    np.testing.assert_array_equal(model.read("a"), A)
    assert model.read_bytes("a") == A.tobytes()
    assert model.read_bytes("b") == B.tobytes()


def test_sharded(sharded: Path) -> None:
    model = ModelFolder(sharded)
    assert model.shards == [ONE, TWO]
    assert model.names == ["a", "b"]
    np.testing.assert_array_equal(model.read("b"), B)


def test_order_is_that_of_the_bytes_and_not_of_the_header(single: Path) -> None:
    raw_file(single / "model.safetensors", {"y": tensor(4, 8), "x": tensor(0, 4)}, b"\0" * 8)
    assert ModelFolder(single).names == ["x", "y"]
    assert set(safetensors.numpy.load_file(single / "model.safetensors")) == {"x", "y"}


def test_a_link_out_of_the_folder_is_followed(single: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    blob = tmp_path_factory.mktemp("blobs") / "1234"
    (single / "model.safetensors").rename(blob)
    (single / "model.safetensors").symlink_to(blob)
    assert ModelFolder(single).names == ["b", "a"]


def test_reads_a_real_model(smollm2_folder: Path) -> None:
    model = ModelFolder(smollm2_folder)
    assert model.config["model_type"] == "llama"
    assert model.spec("model.embed_tokens.weight") == TensorSpec("model.embed_tokens.weight", "BF16", (49152, 576))
    name = "model.layers.29.mlp.down_proj.weight"
    assert model.read(name).tobytes() == model.read_bytes(name)
    names = {p.name for p in model.companions()}
    assert {"tokenizer.json", "tokenizer_config.json", "generation_config.json"} <= names
    assert "config.json" not in names


def test_companions(single: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_module, "MAX_COMPANION_BYTES", 10)
    kept = ["LICENSE", "chat_template.jinja", "generation_config.json", "merges.txt", "tokenizer.model"]
    left = ["README.md", ".gitattributes", "x.bin", "x.pt", "other.safetensors", "x.safetensors.index.json", "m.gguf"]
    for name in kept + left:
        (single / name).write_bytes(b"0123456789")
    (single / "huge.txt").write_bytes(b"0123456789a")
    (single / "original").mkdir()
    assert ModelFolder(single).companions() == [single / name for name in kept]


def test_no_folder(tmp_path: Path) -> None:
    assert "no such folder" in refusal(tmp_path / "none")
    (tmp_path / "file").write_text("")
    assert "found:    a file" in refusal(tmp_path / "file")


def test_everything_is_reported_at_once(tmp_path: Path) -> None:
    message = refusal(tmp_path)
    assert "no config.json" in message
    assert "no weights: neither model.safetensors nor model.safetensors.index.json" in message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "config.json: not JSON"),
        ("[]", "config.json: a JSON list, not an object"),
        ("\udcff", "config.json: not UTF-8"),
    ],
)
def test_config_is_not_json(single: Path, text: str, message: str) -> None:
    (single / "config.json").write_bytes(text.encode(errors="surrogateescape"))
    assert message in refusal(single)


def test_a_missing_shard_does_not_hide_settings_and_shapes_that_would_be_refused_next(tmp_path: Path) -> None:
    tiny.write_model(tmp_path, shards=2)
    (tmp_path / ONE).unlink()
    config = tiny.hf_config()
    write_json(tmp_path / "config.json", config | {"hidden_act": "tanh", "sliding_window": 5})
    message = refusal(tmp_path)
    assert f"names {ONE}, which is missing" in message
    assert (
        "config.json: sliding_window is 5, not supported; hidden_act is 'tanh', supported: 'silu', 'swish'" in message
    )
    write_json(tmp_path / "config.json", config | {"intermediate_size": 192})
    message = refusal(tmp_path)
    assert f"names {ONE}, which is missing" in message
    shapes = {name: tensor.shape for name, tensor in tiny.random_tensors(config).items()}
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    wrong = [name for name, shard in index.items() if shard == TWO and ".mlp." in name]
    assert wrong
    told = [line for line in message.splitlines() if "the config says" in line]
    assert sorted(line.split(":")[0].strip() for line in told) == sorted(wrong)
    assert all(f": shape {shapes[name]}, the config says " in message for name in wrong)
    settings = {"quant_method": "bitsandbytes", "load_in_4bit": True}  # its linears have other shapes in the file
    write_json(tmp_path / "config.json", config | {"intermediate_size": 192, "quantization_config": settings})
    assert "the config says" not in refusal(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickles_are_refused(single: Path, name: str) -> None:
    (single / "model.safetensors").rename(single / name)
    message = refusal(single)
    assert f"only pickled weights ({name})" in message
    assert "unpickling can run any code" in message


def test_shards_without_an_index(sharded: Path) -> None:
    (sharded / "model.safetensors.index.json").unlink()
    assert f"neither model.safetensors nor model.safetensors.index.json, only {ONE}, {TWO}" in refusal(sharded)


def test_missing_shard(sharded: Path) -> None:
    (sharded / TWO).unlink()
    assert f"names {TWO}, which is missing" in refusal(sharded)


@pytest.mark.parametrize(
    "shard", ["/etc/x.safetensors", "../x.safetensors", "a/../../x.safetensors", "C:\\x.safetensors", 5]
)
def test_shard_outside_the_folder(sharded: Path, shard: object) -> None:
    write_index(sharded, {"a": ONE, "b": shard}, 0)  # type: ignore[dict-item]
    message = refusal(sharded)
    assert f"names {str(shard)!r}, which is not a safetensors file inside the folder" in message


@pytest.mark.parametrize("index", [[], {}, {"weight_map": []}, {"weight_map": {}}])
def test_index_without_a_map(sharded: Path, index: object) -> None:
    write_json(sharded / "model.safetensors.index.json", index)
    assert "model.safetensors.index.json" in refusal(sharded)


def test_index_names_a_tensor_its_shard_lacks(sharded: Path) -> None:
    write_index(sharded, {"a": ONE, "b": TWO, "c": TWO}, 0)
    assert f"{TWO}: lacks c, which model.safetensors.index.json says it holds" in refusal(sharded)


def test_one_tensor_in_two_shards(sharded: Path) -> None:
    write_shard(sharded / TWO, [TensorSpec("a", "F32", (2, 3)), TensorSpec("b", "F16", (4,))], [A, B])
    assert f"{TWO}: holds a, as {ONE} does" in refusal(sharded)


@pytest.mark.parametrize("keep", [0, 5, 40, -1])
def test_truncated(single: Path, keep: int) -> None:
    path = single / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    assert "model.safetensors: truncated" in refusal(single)


def test_trailing_bytes(single: Path) -> None:
    with (single / "model.safetensors").open("ab") as file:
        file.write(b"x")
    assert "damaged: 1 bytes after the last tensor" in refusal(single)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"{", "its header is not JSON"),
        (b"\xff\xfe", "its header is not JSON"),
        (b"[" * 100_000, "its header is not JSON"),
        ([], "its header is not a table of tensors"),
        ({"__metadata__": 1}, "its header is not a table of tensors"),
        ({"x": 1}, "x has no dtype, shape and data_offsets"),
        ({"x": tensor(0, 4, shape="1")}, "x has no dtype, shape and data_offsets"),
        ({"x": tensor(0, 4, dtype="F4")}, "x has dtype F4, which cannot be read"),
        ({"x": tensor(0, 4, shape=(-1,))}, "x has shape [-1]"),
        ({"x": tensor(0, 4, shape=(1.0,))}, "x has shape [1.0]"),
        ({"x": tensor(-4, 0)}, "x has shape [1] at byte -4"),
        ({"x": tensor(0, 8)}, "x is F32[1], 4 bytes, but is given 8"),
        ({"x": tensor(0, 4, shape=(10**18,))}, "bytes, but is given 4"),
        ({"x": tensor(0, 4, shape=(10**30,))}, "x has shape [1000000000000000000000000000000] at byte 0"),
        ({"x": tensor(8, 12)}, "truncated: x ends at data byte 12, the file at 8"),
        ({"x": tensor(4, 8)}, "x leaves a gap before it"),
        ({"x": tensor(0, 4), "y": tensor(0, 4)}, "y overlaps the tensor before it"),
        ({"x": tensor(0, 4)}, "4 bytes after the last tensor"),
    ],
)
def test_damaged_header(single: Path, header: object, message: str) -> None:
    raw_file(single / "model.safetensors", header, b"\0" * 8)
    assert f"{message}" in refusal(single)
    with pytest.raises(Exception, match=r"header|dtype|invalid|Metadata|Header|numpy|F4"):
        safetensors.numpy.load_file(single / "model.safetensors")


def test_a_header_of_absurd_length_is_not_read(single: Path) -> None:
    with (single / "model.safetensors").open("wb") as file:
        file.write((200_000_000).to_bytes(8, "little"))
        file.truncate(300_000_000)  # a hole, not bytes
    assert "a header of 200000000 bytes; at most 100000000 are read" in refusal(single)


@pytest.mark.parametrize("length", [1, 7, 8, 15, 16, 17])
def test_a_tensor_longer_than_one_read(single: Path, monkeypatch: pytest.MonkeyPatch, length: int) -> None:
    """Into memory of its own, or into what is given; a file that was cut off meanwhile is named."""
    monkeypatch.setattr("convert.files.folder.READ", 8)
    data = np.arange(1, length + 1, dtype=np.uint8)
    safetensors.numpy.save_file({"x": data}, single / "model.safetensors")
    folder, given = ModelFolder(single), np.full(length + 3, 99, np.uint8)
    assert folder.read("x").tolist() == data.tolist()
    assert folder.read("x", given).ctypes.data == given.ctypes.data
    assert given.tolist() == [*data.tolist(), 99, 99, 99]
    with (single / "model.safetensors").open("r+b") as file:
        file.truncate((single / "model.safetensors").stat().st_size - 1)
    for into in (None, given):
        with pytest.raises(InputError, match=r"model.safetensors\s.*cut off at x while it was read"):
            folder.read("x", into)


@pytest.mark.parametrize(
    ("quantization", "method"), [({"quant_method": "gptq"}, "gptq"), ({"bits": 4}, "unnamed"), ("x", "unnamed")]
)
def test_quantized_folder(single: Path, quantization: object, method: str) -> None:
    write_json(single / "config.json", {"model_type": "llama", "quantization_config": quantization})
    message = refusal(single)
    assert f"already quantized ({method})" in message
    assert "give the unquantized model" in message
