"""What was given as a model or an adapter and is none: said in one sentence, with what takes it, by every command that takes one."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from convert.adapters.adapter import load_adapter
from convert.files.folder import ModelFolder
from convert.files.recognition import recognize
from convert.load import read_config
from convert.merge import main as merge
from convert.model import open_model, open_shape
from convert.quantize import main as quantize
from qlora_jax.__main__ import main as command
from qlora_jax.base.errors import EXIT_BAD_INPUT, InputError
from qlora_jax.model.families import read_architecture
from tests.helpers import tiny

SHAPE = read_architecture(tiny.hf_config())
PEFT = {
    "peft_type": "LORA",
    "base_model_name_or_path": "org/base",
    "r": 4,
    "lora_alpha": 8,
    "target_modules": ["q_proj"],
}
MLX = {
    "fine_tune_type": "lora",
    "num_layers": 16,
    "model": "org/base",
    "lora_parameters": {"rank": 8, "scale": 20.0, "dropout": 0.0},
}


def write(folder: Path, **files: object) -> Path:
    """Files by name: JSON of what is no bytes."""
    folder.mkdir(parents=True)
    for name, value in files.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(value if isinstance(value, bytes) else json.dumps(value).encode())
    return folder


def tensors(name: str = "model.layers.0.self_attn.q_proj.lora_a") -> bytes:
    return safetensors.numpy.save({name: np.zeros((64, 8), np.float32)})


OTHERS: dict[str, tuple[Callable[[Path], Path], str, str]] = {
    "mlx-lm's adapter": (
        lambda at: write(at / "a", **{"adapter_config.json": MLX, "adapters.safetensors": tensors()}),
        "an adapter of mlx-lm's: no peft_type, so not in PEFT's format",
        "python -m mlx_lm fuse --model org/base --adapter-path",
    ),
    "a run": (
        lambda at: write(at / "run", **{"run.json": {}, "adapter__adapter_config.json": PEFT, "merged__config.json": {}, "best__x": b""}),
        "the folder of a run of train.py",
        "run/adapter or its best adapter,",
    ),
    "a checkpoint": (
        lambda at: write(at / "run/checkpoints/step-12", **{"about.json": {}, "checksums.json": {}}),
        "a checkpoint of a run of train.py",
        "run/adapter",
    ),
    "all checkpoints": (
        lambda at: write(at / "run/checkpoints", **{"step-12__about.json": {}}),
        "a checkpoint of a run of train.py",
        "run/adapter",
    ),
    "a Trainer's folder": (
        lambda at: write(at / "a", **{"checkpoint-9__adapter_config.json": PEFT, "checkpoint-10__adapter_config.json": PEFT}),
        "a Trainer's output folder",
        "checkpoint-10",
    ),
    "the hub's cache": (
        lambda at: write(at / "models--org--name", **{"snapshots__abc__config.json": {}}), "the hub's cache of a model", "org/name"
    ),
    "a folder around it": (lambda at: write(at / "a", **{"inner__config.json": {}}), "a folder of other folders", "a/inner"),
    "rows": (lambda at: write(at / "a", **{"data__train-00000.parquet": b"PAR1"}), "a folder of rows", "data.path="),
    "a tokenizer": (lambda at: write(at / "a", **{"tokenizer.json": {}}), "a tokenizer alone", "config.json and safetensors too"),
    "onnx": (lambda at: write(at / "a", **{"model.onnx": b""}), "an ONNX model", "in safetensors"),
    "Meta's": (lambda at: write(at / "a", **{"params.json": {}, "consolidated.00.pth": b""}), "Meta's own format", "Hugging Face's"),
    "pickles": (lambda at: write(at / "a", **{"pytorch_model.bin": b""}), "never unpickled", "convert it to safetensors"),
    "a pickle": (lambda at: write(at / "a", **{"model.pt": b""}) / "model.pt", "never unpickled", "convert it to safetensors"),
    "an archive": (lambda at: write(at / "a", **{"model.zip": b""}) / "model.zip", "an archive", "unpack it"),
}  # fmt: skip
IDS = list(OTHERS)


def messages_of(path: Path) -> list[str]:
    """As a model, and as an adapter."""
    found = []
    for give in (
        lambda: open_model(str(path)),
        lambda: open_shape(str(path)),
        lambda: ModelFolder(path),
        lambda: load_adapter(path, SHAPE),
    ):
        with pytest.raises(InputError) as caught:
            give()
        found.append(str(caught.value))
    return found


@pytest.mark.parametrize(("make", "what", "do"), OTHERS.values(), ids=IDS)
def test_what_is_neither(tmp_path: Path, make: Callable[[Path], Path], what: str, do: str) -> None:
    for message in messages_of(make(tmp_path)):
        assert what in message and do in message
        assert message.count("\n") <= 3, "one sentence: where, found, expected, do"


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_file_of_a_model(tiny_folder: Path, name: str) -> None:
    for message in messages_of(tiny_folder / name):
        assert f"give the folder it is in, {tiny_folder}" in message


def test_an_adapter_given_as_the_model(tmp_path: Path) -> None:
    adapter = write(tmp_path / "adapter", **{"adapter_config.json": PEFT, "adapter_model.safetensors": tensors()})
    for path in (adapter, adapter / "adapter_model.safetensors"):
        with pytest.raises(InputError) as caught:
            open_model(str(path))
        assert "adapter" in caught.value.found and "not a model" in caught.value.found
    with pytest.raises(InputError) as caught:
        open_model(str(adapter))
    for way in ("'org/base'", "lora.init_from", "--adapter", f"python -m convert.merge --adapter {adapter} --out"):
        assert way in caught.value.fix


def test_a_model_given_as_the_adapter(tiny_folder: Path) -> None:
    with pytest.raises(InputError) as caught:
        load_adapter(tiny_folder, SHAPE)
    assert caught.value.found == "no adapter_config.json: a model (llama)"
    assert "model.name_or_path" in caught.value.fix and "--model" in caught.value.fix


def test_an_adapter_without_half_of_it(tmp_path: Path) -> None:
    settings = {"adapter_config.json": PEFT}
    cases = {
        "no adapter_model.safetensors": write(tmp_path / "a", **settings),
        "but adapter_model.bin, which is never unpickled": write(tmp_path / "b", **settings, **{"adapter_model.bin": b""}),
        "only adapter_0.pt": write(tmp_path / "c", **settings, **{"adapter_0.pt": b""}),
        "an adapter without its settings": write(tmp_path / "d", **{"adapter_model.safetensors": tensors()}),
        "no peft_type": write(tmp_path / "e", **{"adapter_config.json": {"rank": 3}, "adapter_model.safetensors": tensors()}),
    }  # fmt: skip
    for found, folder in cases.items():
        with pytest.raises(InputError) as caught:
            load_adapter(folder, SHAPE)
        assert found in caught.value.found and caught.value.fix


def test_a_hubs_id_as_the_adapter() -> None:
    with pytest.raises(InputError, match="hf download org/adapter"):
        load_adapter("org/adapter", SHAPE)


def test_a_model_that_mlx_quantized(tmp_path: Path) -> None:
    model = tiny.write_model(tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "quantization": {"group_size": 64, "bits": 4}}))
    with pytest.raises(InputError, match="a model that MLX quantized to 4 bits, not a model") as caught:
        read_config(ModelFolder(model))
    assert "python -m mlx_lm convert" in caught.value.fix


def test_weights_in_other_formats_are_named(tmp_path: Path) -> None:
    model = tiny.write_model(tmp_path / "model")
    (model / "model.safetensors").rename(model / "tf_model.h5")
    with pytest.raises(InputError, match=r"no weights: .*formats that are not read: tf_model\.h5"):
        ModelFolder(model)


@pytest.mark.filterwarnings("ignore")
def test_every_command(tmp_path: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = OTHERS["a run"][0](tmp_path)
    config = tmp_path / "config.yaml"
    config.write_text(
        json.dumps({"model": {"name_or_path": str(run)}, "data": {"path": "x"}, "training": {"output_dir": "out"}})
    )
    model, adapter, out = ["--model", str(tiny_folder)], ["--adapter", str(run)], ["--out", str(tmp_path / "out")]
    for main, arguments in (
        (quantize, ["--model", str(run), *out]),
        (merge, [*model, *adapter, *out]),
        (merge, [*adapter, *out]),
        (command, ["generate", "--model", str(run), "--prompt", "x"]),
        (command, ["generate", *model, *adapter, "--prompt", "x"]),
        (command, ["compare", *model, *adapter, *out]),
        (command, ["plan", "--config", str(config)]),
    ):
        assert main(arguments) == EXIT_BAD_INPUT
        assert "the folder of a run of train.py" in capsys.readouterr().err, arguments
    assert not (tmp_path / "out").exists()


def test_what_is_here_is_never_hurt_by_a_look(tmp_path: Path, tiny_folder: Path) -> None:
    """Whatever JSON files hold, a name cannot be read, or nothing is there."""
    for text in (
        b"{",
        b"[]",
        b"\xff",
        b'{"peft_type": []}',
        b'{"model_type": [1]}',
        b'{"quantization": {"group_size": {}, "bits": []}}',
    ):
        folder = write(
            tmp_path / text.hex(),
            **{"adapter_config.json": text, "config.json": text, "run.json": text, "adapter": b""},
        )
        recognize(folder)
        shutil.rmtree(folder)
    for path in (tmp_path / "nowhere", tmp_path / ("a" * 300), tmp_path / "a\0b", Path("/dev/null")):
        assert recognize(path) is None
    assert recognize(tiny_folder).is_model


def test_a_gguf_file(tmp_path: Path) -> None:
    """As a model it is converted, so that what is wrong with it is said of the file; as an adapter it is none."""
    folder = write(tmp_path / "a", **{"m.gguf": b"GGUF\3"})
    for path in (folder / "m.gguf", folder):
        for give in (open_model, open_shape):
            with pytest.raises(InputError, match="not a whole GGUF file"):
                give(str(path))
        for look in (ModelFolder, lambda at: load_adapter(at, SHAPE)):
            with pytest.raises(InputError, match="a GGUF file, llama") as caught:
                look(path)
            assert f"which is converted once: {folder / 'm.gguf'}" in caught.value.fix
