"""`convert.quantize`: what a run would quantize on the way in, written down once; whole or not at all."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from convert.files import bitsandbytes, pieces
from convert.files.folder import ModelFolder
from convert.files.shards import INDEX_NAME, write_json
from convert.load import load_weights, read_config
from convert.quantize import main, quantize
from qlora_jax.base.errors import EXIT_BAD_INPUT, InputError
from qlora_jax.config import QuantizationSettings
from qlora_jax.ops import nf4
from tests.helpers import tiny
from tests.helpers.tiny import NAMES

KINDS = [
    QuantizationSettings(quant_type=quant_type, double_quant=double_quant)
    for quant_type in nf4.CODEBOOKS
    for double_quant in (True, False)
]
RAGGED = {"hidden_size": 40, "intermediate_size": 101}
"""No linear of this model fills its last block; the MLP's have an odd side."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three shards, dealt so that no layer is in one of them, an output matrix of its own, ragged blocks; not to be written to."""
    place = tmp_path_factory.mktemp("base")
    folder = tiny.write_model(place / "model", shards=3, tie_word_embeddings=False, **RAGGED)
    (folder / "LICENSE").write_text("do as you like")
    (folder / "README.md").write_text("about the base")
    return folder


@pytest.fixture(scope="module")
def quantized(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In NF4 with double quantization; not to be written to."""
    out = tmp_path_factory.mktemp("quantized") / "out"
    quantize(ModelFolder(model), out, QuantizationSettings())
    return out


def assert_same_weights(one: Path, other: Path, kind: QuantizationSettings) -> None:
    """The engine's trees, to the bit and to the static fields."""
    weights = []
    for path in (one, other):
        folder = ModelFolder(path)
        config = read_config(folder)
        loaded = load_weights(folder, config, kind, "device")
        layers = [layer for _, layer in loaded.layers.walk(range(config.num_hidden_layers))]
        weights.append((loaded.embedding, layers, loaded.head))
    assert jax.tree.structure(weights[0]) == jax.tree.structure(weights[1])
    for found, expected in zip(*map(jax.tree.leaves, weights), strict=True):
        assert (found.dtype, found.shape, found.sharding) == (expected.dtype, expected.shape, expected.sharding)
        assert np.asarray(found).tobytes() == np.asarray(expected).tobytes()


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: f"{kind.quant_type}{'-double' * kind.double_quant}")
def test_the_folder_is_what_loading_quantizes_to(tmp_path: Path, model: Path, kind: QuantizationSettings) -> None:
    quantize(ModelFolder(model), tmp_path / "out", kind)
    assert_same_weights(tmp_path / "out", model, kind)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_other_dtypes_are_cast_first(tmp_path: Path, dtype: Any) -> None:
    source = tiny.write_model(tmp_path / "model", dtype=dtype, torch_dtype=np.dtype(dtype).name, **RAGGED)
    quantize(ModelFolder(source), tmp_path / "out", QuantizationSettings())
    assert_same_weights(tmp_path / "out", source, QuantizationSettings())
    folder = ModelFolder(tmp_path / "out")
    assert folder.config["torch_dtype"] == "bfloat16"
    kept = [folder.spec(n) for n in folder.names if n.endswith("norm.weight") or "embed" in n]
    assert {spec.dtype for spec in kept} == {"BF16"}
    states = {bitsandbytes.read_state(folder, name).dtype for name in folder.names if NAMES.parse_linear(name)}
    assert states == {"bfloat16"}


def test_shards_and_index_follow_the_models(model: Path, quantized: Path) -> None:
    before, after = ModelFolder(model), ModelFolder(quantized)
    assert after.shards == before.shards
    for shard in before.shards:
        order = [spec.name for spec in after.specs(shard) if bitsandbytes.companion_of(spec.name) is None]
        assert order == [spec.name for spec in before.specs(shard)]
        homes = {bitsandbytes.companion_of(spec.name) or spec.name for spec in after.specs(shard)}
        assert homes == set(order), "companions are with their weights"
        assert after.metadata(shard) == {"format": "pt"}
    index = json.loads((quantized / INDEX_NAME).read_text())
    assert index["weight_map"] == {spec.name: shard for shard in after.shards for spec in after.specs(shard)}
    sizes = [tensor.nbytes for s in after.shards for tensor in safetensors.numpy.load_file(quantized / s).values()]
    assert index["metadata"]["total_size"] == sum(sizes)


def test_the_rest_comes_along(model: Path, quantized: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json", "LICENSE"):
        assert (quantized / name).read_bytes() == (model / name).read_bytes()
    assert not (quantized / "README.md").exists()
    config = json.loads((quantized / "config.json").read_text())
    block = config.pop("quantization_config")
    assert config == json.loads((model / "config.json").read_text())
    assert (block["quant_method"], block["load_in_4bit"], block["bnb_4bit_quant_type"]) == ("bitsandbytes", True, "nf4")
    assert [path.name for path in quantized.parent.iterdir()] == [quantized.name], "nothing half-made is left"


def test_what_no_model_reads_is_left_out(tmp_path: Path) -> None:
    source = tiny.write_model(tmp_path / "model", num_hidden_layers=1)
    tensors = safetensors.numpy.load_file(source / "model.safetensors")
    frequencies = "model.layers.0.self_attn.rotary_emb.inv_freq"
    tensors |= {frequencies: np.ones(8, np.float32), NAMES.lm_head: tensors[NAMES.embedding]}
    safetensors.numpy.save_file(tensors, source / "model.safetensors", {"format": "pt"})
    quantize(ModelFolder(source), tmp_path / "out", QuantizationSettings())
    found = ModelFolder(tmp_path / "out")
    read_config(found)
    assert frequencies not in found
    assert found.read_bytes(NAMES.lm_head) == tensors[NAMES.embedding].tobytes()


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: f"{kind.quant_type}{'-double' * kind.double_quant}")
def test_pieces_make_no_difference(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, kind: QuantizationSettings
) -> None:
    quantize(ModelFolder(model), tmp_path / "whole", kind)
    monkeypatch.setattr(pieces, "PIECE", 2 * nf4.BLOCK_SIZE)
    quantize(ModelFolder(model), tmp_path / "out", kind)
    assert_same_folder(tmp_path / "out", tmp_path / "whole")


def test_progress_counts_every_byte(tmp_path: Path, model: Path) -> None:
    folder, advanced = ModelFolder(model), []
    quantize(folder, tmp_path / "out", QuantizationSettings(), advanced.append)
    assert advanced == [spec.nbytes for shard in folder.shards for spec in folder.specs(shard)]


# What may go wrong


def test_what_is_there_is_not_overwritten(tmp_path: Path, model: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("precious")
    with pytest.raises(InputError, match="something there already"):
        quantize(ModelFolder(model), tmp_path / "out", QuantizationSettings())
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "mine"]


def test_what_an_interrupted_run_left_is_in_nobodys_way(tmp_path: Path, model: Path, quantized: Path) -> None:
    (tmp_path / ".out.partial" / "folder").mkdir(parents=True)
    (tmp_path / ".out.partial" / "folder" / "model-00009-of-00009.safetensors").write_text("half")
    (tmp_path / ".out.partial" / ".job.json.123.tmp").write_text("ha")
    quantize(ModelFolder(model), tmp_path / "out", QuantizationSettings())
    assert_same_folder(tmp_path / "out", quantized)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_anothers_files_where_it_would_be_filled_are_left_alone(tmp_path: Path, model: Path) -> None:
    foreign = tmp_path / ".out.partial"
    foreign.mkdir()
    (foreign / "mine").write_text("precious")
    with pytest.raises(InputError, match="mine, which no conversion wrote"):
        quantize(ModelFolder(model), tmp_path / "out", QuantizationSettings())
    assert [path.name for path in tmp_path.rglob("*")] == [".out.partial", "mine"]


@pytest.mark.parametrize("keys", [("torch_dtype",), ("dtype",), ("dtype", "torch_dtype")])
def test_every_key_of_the_dtype_says_bfloat16(tmp_path: Path, keys: tuple[str, ...]) -> None:
    folder = tiny.write_model(tmp_path / "half", dtype=np.float16)
    config = {key: value for key, value in tiny.hf_config().items() if key != "torch_dtype"}
    write_json(folder / "config.json", config | dict.fromkeys(keys, "float16"))
    quantize(ModelFolder(folder), tmp_path / "out", QuantizationSettings())
    found = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {key: found.get(key) for key in ("dtype", "torch_dtype") if key in found} == dict.fromkeys(keys, "bfloat16")


# The command


def assert_same_folder(one: Path, two: Path) -> None:
    files = sorted(path.name for path in one.iterdir())
    assert files == sorted(path.name for path in two.iterdir())
    for name in files:
        assert (one / name).read_bytes() == (two / name).read_bytes(), name


def test_command(tmp_path: Path, model: Path, quantized: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", str(model), "--out", str(tmp_path / "deep" / "out")]) == 0
    assert_same_folder(tmp_path / "deep" / "out", quantized)
    captured = capsys.readouterr()
    assert captured.err == f"0.1 MiB became 0.1 MiB in nf4: {tmp_path / 'deep' / 'out'}\n"
    assert captured.out == ""


def test_command_with_another_kind(tmp_path: Path, model: Path) -> None:
    kind = ["--quant-type", "fp4", "--no-double-quant"]
    assert main(["--model", str(model), "--out", str(tmp_path / "out"), *kind]) == 0
    assert_same_weights(tmp_path / "out", model, QuantizationSettings(quant_type="fp4", double_quant=False))


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float32])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", NAMES.embedding])
def test_what_is_not_finite_is_found_in_any_piece(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, dtype: Any
) -> None:
    model = tiny.write_model(tmp_path / "model", dtype=dtype)
    tensors = safetensors.numpy.load_file(model / "model.safetensors")
    tensors[name][100, 5] = np.inf if dtype is ml_dtypes.bfloat16 else 3.4e38  # which rounds to infinity
    safetensors.numpy.save_file(tensors, model / "model.safetensors", {"format": "pt"})
    monkeypatch.setattr(pieces, "PIECE", nf4.BLOCK_SIZE)
    with pytest.raises(InputError, match=r"the first at \(100, 5\)") as caught:
        quantize(ModelFolder(model), tmp_path / "out", QuantizationSettings())
    assert caught.value.where == f"{model}: {name}"
    assert [path.name for path in tmp_path.iterdir()] == ["model"], "there is nothing to continue"


def not_finite(model: Path) -> None:
    tensors = safetensors.numpy.load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = ml_dtypes.bfloat16(np.nan)
    safetensors.numpy.save_file(tensors, model / "model.safetensors", {"format": "pt"})


def in_4_bits(model: Path) -> None:
    quantize(ModelFolder(model), model.with_name("4bit"), QuantizationSettings())
    for path in model.with_name("4bit").iterdir():
        path.replace(model / path.name)
    model.with_name("4bit").rmdir()


def another_family(model: Path) -> None:
    write_json(model / "config.json", tiny.hf_config(model_type="mamba"))


@pytest.mark.parametrize(
    ("damage", "parts"),
    [
        (in_4_bits, ["a model that is in 4 bits already", "give the unquantized model"]),
        (not_finite, ["model.layers.1.mlp.up_proj.weight", "the first at (3, 5)"]),
        (another_family, ["model_type is 'mamba'"]),
        (lambda model: model.with_name("out").write_text("a file"), ["out", "something there already"]),
        (lambda model: (model / "model.safetensors").unlink(), ["no weights"]),
    ],
)
def test_command_refuses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[Path], object], parts: list[str]
) -> None:
    model = tiny.write_model(tmp_path / "model")
    damage(model)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert main(["--model", str(model), "--out", str(tmp_path / "out")]) == EXIT_BAD_INPUT
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("error: ") == 1
    for part in parts:
        assert part in error
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_place_that_cannot_be_made(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("precious")
    assert main(["--model", str(model), "--out", str(tmp_path / "file" / "out")]) == EXIT_BAD_INPUT
    assert f"error: {tmp_path / 'file' / 'out'}\n  found:    cannot be made" in capsys.readouterr().err


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert "--quant-type {nf4,fp4}" in text and "--no-double-quant" in text
    assert "transformers with bitsandbytes" in text
