"""What quantizing a merged folder would undo is counted, travels with it, and is refused; other folders are left alone."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from convert import merge
from convert import quantize as quantize_command
from convert.adapters.adapter import load_adapter
from convert.adapters.delta import resolve_base
from convert.files import levels
from convert.files.folder import ModelFolder
from convert.files.shards import TensorSpec, write_json, write_shard
from convert.jobs.check import check_merge
from convert.jobs.requantize import KEY, check_requantize, read_note
from convert.load import read_config
from convert.model import open_model
from convert.quantize import quantize
from qlora_jax.__main__ import main
from qlora_jax.base.console import make_console
from qlora_jax.base.errors import EXIT_BAD_INPUT, InputError
from qlora_jax.commands.prepare import settle_base
from qlora_jax.config import LoraSettings, QuantizationSettings, load_config
from qlora_jax.ops import nf4
from tests.convert.test_merge import make_adapter, run_merge
from tests.helpers import tiny
from tests.helpers.runs import train_main, write_place
from tests.helpers.tiny import NAMES

SMALL = LoraSettings(r=4, lora_alpha=0.25)
"""An update of about a tenth of the levels' distances."""
SIZES = {"hidden_size": 128, "intermediate_size": 256}
"""Enough weights for a sample."""
KINDS = [
    QuantizationSettings(quant_type=kind, double_quant=double) for kind in nf4.CODEBOOKS for double in (True, False)
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_model(tmp_path_factory.mktemp("base") / "model", **SIZES)


@pytest.fixture(scope="module")
def adapter(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(tmp_path_factory.mktemp("adapter") / "adapter", model, SMALL)


@pytest.fixture(scope="module")
def merged(model: Path, adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The merged folder of either base; not to be written to."""
    outs = {base: tmp_path_factory.mktemp("merged") / base for base in ("original", "dequantized")}
    for base, out in outs.items():
        run_merge(model, adapter, out, base)
    return outs


@pytest.fixture
def unmarked(tmp_path: Path, merged: dict[str, Path]) -> Path:
    """The dequantized base's, without its note."""
    return without_note(shutil.copytree(merged["dequantized"], tmp_path / "unmarked"))


def without_note(folder: Path) -> Path:
    config = json.loads((folder / "config.json").read_text())
    write_json(folder / "config.json", {key: value for key, value in config.items() if key != KEY})
    return folder


def refusal(folder: Path, quantization: QuantizationSettings = KINDS[0]) -> str | None:
    try:
        check_requantize(
            ModelFolder(folder), quantization, accepted=False, accept="--requantize", log=lambda line: None
        )
    except InputError as error:
        return str(error)
    return None


def rewrite(folder: Path, change: Callable[[str, np.ndarray], np.ndarray], dtype: str = "BF16") -> Path:
    """The folder with its linears changed."""
    model = ModelFolder(folder)
    tensors = {}
    for name in model.names:
        value = model.read(name)
        tensors[name] = change(name, value) if NAMES.parse_linear(name) else value
    specs = [TensorSpec(name, dtype if NAMES.parse_linear(name) else "BF16", x.shape) for name, x in tensors.items()]
    write_shard(folder / "model.safetensors", specs, tensors.values())
    return folder


# ------------------------------------------------------------------------------------------------------------------ counted


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_the_note_counts_what_bitsandbytes_own_codes_say(
    model: Path, adapter: Path, merged: dict[str, Path], kind: QuantizationSettings
) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    import torch

    def through(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Codes, one a byte, and values, both as bitsandbytes has them."""
        tensor = torch.from_numpy(weight.astype(np.float32))
        codes, state = functional.quantize_4bit(
            tensor, quant_type=kind.quant_type, compress_statistics=kind.double_quant
        )
        values = functional.dequantize_4bit(codes, state).numpy()
        packed = codes.numpy().reshape(-1)
        return np.stack([packed >> 4, packed & 15], 1).reshape(-1), values.reshape(-1)

    base, after = ModelFolder(model), ModelFolder(merged["dequantized"])
    changed, size, kept, squares = 0, 0, 0.0, 0.0
    for name in filter(NAMES.parse_linear, base.names):
        before = np.asarray(nf4.dequantize(nf4.quantize(jnp.asarray(base.read(name)))))
        (old, old_values), (new, new_values) = through(before), through(after.read(name))
        update = (after.read(name).astype(np.float64) - before.astype(np.float64)).reshape(-1)
        level = nf4.CODEBOOKS[kind.quant_type]
        changed, size = changed + int((level[old] != level[new]).sum()), size + old.size
        kept, squares = kept + float(((new_values - old_values) * update).sum()), squares + float((update**2).sum())
    note = read_note(after)
    left = note.requantized[kind.quant_type]
    assert (left.changed, note.codes) == (changed, size)
    assert left.share_in(kind) == pytest.approx(
        kept / squares, abs=0.01
    )  # bitsandbytes' CPU rounds some scales otherwise
    assert (note.merged_into, note.quantization) == ("dequantized", QuantizationSettings())


def test_a_small_update_is_lost_and_a_large_one_is_not(tmp_path: Path, model: Path, merged: dict[str, Path]) -> None:
    small = read_note(ModelFolder(merged["dequantized"]))
    run_merge(model, make_adapter(tmp_path / "adapter", model), tmp_path / "large", "dequantized")
    large = read_note(ModelFolder(tmp_path / "large"))
    assert small.requantized["nf4"].share < 0.2
    assert large.requantized["nf4"].share > 0.9


def test_only_adapted_linears_count(tmp_path: Path, model: Path) -> None:
    two = LoraSettings(r=4, lora_alpha=0.25, target_modules=["q_proj", "v_proj"])
    run_merge(model, make_adapter(tmp_path / "adapter", model, two), tmp_path / "out", "dequantized")
    shapes = read_config(ModelFolder(model)).linear_shapes()
    assert read_note(ModelFolder(tmp_path / "out")).codes == 2 * sum(
        np.prod(shapes[name]) for name in two.targets(shapes)
    )


def test_an_adapter_that_changes_nothing_leaves_no_note(tmp_path: Path, model: Path) -> None:
    run_merge(
        model, make_adapter(tmp_path / "adapter", model, SMALL, grid=10.0), tmp_path / "out", "dequantized"
    )  # rounded to zeros
    assert KEY not in ModelFolder(tmp_path / "out").config
    assert refusal(tmp_path / "out") is None, "the weights are on the levels: nothing is lost"


def test_a_base_in_4_bits_has_the_same_note(
    tmp_path: Path, model: Path, adapter: Path, merged: dict[str, Path]
) -> None:
    quantize(ModelFolder(model), tmp_path / "4bit", QuantizationSettings())
    run_merge(tmp_path / "4bit", adapter, tmp_path / "out", "dequantized")
    assert read_note(ModelFolder(tmp_path / "out")) == read_note(ModelFolder(merged["dequantized"]))


def test_a_merge_with_its_note_passes_its_check(model: Path, adapter: Path, merged: dict[str, Path]) -> None:
    folder = ModelFolder(model)
    check_merge(folder, load_adapter(adapter, read_config(folder)), merged["dequantized"], "dequantized")


# ------------------------------------------------------------------------------------------------------------------ travels


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_it_outlives_transformers_save_pretrained(tmp_path: Path, merged: dict[str, Path], dtype: str) -> None:
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(merged["dequantized"], dtype=getattr(torch, dtype))
    loaded.save_pretrained(tmp_path / "saved", max_shard_size="300KB")
    assert len(ModelFolder(tmp_path / "saved").shards) > 1
    assert read_note(ModelFolder(tmp_path / "saved")) == read_note(ModelFolder(merged["dequantized"])) is not None


def test_it_is_not_believed_of_other_weights(unmarked: Path, merged: dict[str, Path]) -> None:
    shutil.copy(merged["dequantized"] / "config.json", unmarked)
    rng = np.random.default_rng(0)
    rewrite(unmarked, lambda name, x: (x + 0.1 * rng.standard_normal(x.shape)).astype(ml_dtypes.bfloat16))
    assert read_note(ModelFolder(unmarked)) is None
    assert refusal(unmarked) is None


@pytest.mark.parametrize("entry", [5, [], {}, {"merged_into": "dequantized"}, None])
def test_a_damaged_note_is_no_note_and_the_weights_tell(unmarked: Path, entry: Any) -> None:
    config = json.loads((unmarked / "config.json").read_text())
    write_json(unmarked / "config.json", {**config, KEY: entry})
    assert "near the levels of nf4" in refusal(unmarked)


# --------------------------------------------------------------------------------------------------------- told by the weights


@pytest.mark.parametrize(("quant_type", "dtype"), [("nf4", "BF16"), ("nf4", "F16"), ("fp4", "F32")])
def test_a_folder_that_lost_its_note_is_recognized(
    tmp_path: Path, model: Path, quant_type: nf4.QuantType, dtype: str
) -> None:
    """W = D + dW, merged by any program, stored in any dtype."""
    rng = np.random.default_rng(1)
    folder = shutil.copytree(model, tmp_path / "foreign")
    to = {"BF16": ml_dtypes.bfloat16, "F32": np.float32, "F16": np.float16}[dtype]

    def merge_small(name: str, weight: np.ndarray) -> np.ndarray:
        base = np.asarray(nf4.dequantize(nf4.quantize(jnp.asarray(weight), True, quant_type)), np.float32)
        return (base + 0.02 * weight.std() * rng.standard_normal(weight.shape)).astype(to)

    rewrite(folder, merge_small, dtype)
    message = refusal(folder, QuantizationSettings(quant_type=quant_type))
    assert f"near the levels of {quant_type}" in message
    share = float(message.split(", and ")[1].split("%")[0])
    assert share < 30


def test_the_sample_says_what_the_note_says(merged: dict[str, Path]) -> None:
    folder = ModelFolder(merged["dequantized"])
    note, seen = read_note(folder), levels.look(folder)
    changed, size, share = seen.left("nf4")
    assert changed / size == pytest.approx(note.requantized["nf4"].changed / note.codes, abs=0.02)
    assert share == pytest.approx(note.requantized["nf4"].share, abs=0.1)


def ternary(name: str, weight: np.ndarray) -> np.ndarray:
    return (np.sign(weight) * (np.abs(weight) > 0.05) * np.float32(0.0731)).astype(ml_dtypes.bfloat16)


def blocks_of_32(name: str, weight: np.ndarray) -> np.ndarray:
    """As GGUF's Q4_0 and back."""
    gguf = pytest.importorskip("gguf")
    kind = gguf.GGMLQuantizationType.Q4_0
    packed = gguf.quants.quantize(weight.astype(np.float32), kind)
    return gguf.quants.dequantize(packed, kind).astype(ml_dtypes.bfloat16)


def dequantized(quant_type: nf4.QuantType, dtype: Any) -> Callable[[str, np.ndarray], np.ndarray]:
    def change(name: str, weight: np.ndarray) -> np.ndarray:
        values = nf4.dequantize(nf4.quantize(jnp.asarray(weight), True, quant_type), dtype)
        return np.asarray(values).astype(ml_dtypes.bfloat16)

    return change


@pytest.mark.parametrize(
    "change",
    [
        lambda name, weight: weight,
        lambda name, weight: np.zeros_like(weight),
        ternary,
        blocks_of_32,
        dequantized("nf4", jnp.bfloat16),
        dequantized("fp4", jnp.bfloat16),
        dequantized("nf4", jnp.float16),
        dequantized("nf4", jnp.float32),
    ],
    ids=["random", "zeros", "ternary", "Q4_0", "nf4", "fp4", "nf4 by way of float16", "nf4 by way of float32"],
)
def test_weights_that_lose_nothing_are_let_through(
    tmp_path: Path, model: Path, change: Callable[[str, np.ndarray], np.ndarray]
) -> None:
    folder = rewrite(shutil.copytree(model, tmp_path / "folder"), change)
    assert [refusal(folder, kind) for kind in KINDS] == [None] * len(KINDS)


def test_the_original_base_is_let_through(merged: dict[str, Path]) -> None:
    assert KEY not in ModelFolder(merged["original"]).config
    assert [refusal(merged["original"], kind) for kind in KINDS] == [None] * len(KINDS)


# ------------------------------------------------------------------------------------------------------------------ refused


def commands(folder: Path, tmp_path: Path, adapter: Path) -> dict[str, Callable[..., int]]:
    """Every command that puts a model into 4 bits; each takes what accepts it."""
    place = write_place(tmp_path / "place", max_steps=1)
    run, out, again = tmp_path / "run", tmp_path / "out", make_adapter(tmp_path / "again", folder, SMALL)
    return {
        "train": lambda *more: train_main(place, run, f"model.name_or_path={folder}", *more),
        "quantize": lambda *more: quantize_command.main(["--model", str(folder), "--out", str(out), *more]),
        "merge": lambda *more: merge.main(["--adapter", str(again), "--out", str(out), "--base", "dequantized", *more]),
        "generate": lambda *more: main(
            ["generate", "--model", str(folder), "--quantize", "nf4", "--prompt", "a", "--max-new-tokens", "2", *more]
        ),
    }


@pytest.mark.parametrize("command", ["train", "quantize", "merge", "generate"])
@pytest.mark.parametrize("marked", [True, False])
def test_every_command_refuses_unless_told(
    tmp_path: Path,
    merged: dict[str, Path],
    unmarked: Path,
    adapter: Path,
    command: str,
    marked: bool,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = merged["dequantized"] if marked else unmarked
    run = commands(folder, tmp_path, adapter)[command]
    assert run() == EXIT_BAD_INPUT
    error = capsys.readouterr().err
    assert error.startswith(f"error: {folder}\n")
    assert "of its update would survive" in error and " codes" in error and "--base original" in error
    accept = "model.requantize=true" if command == "train" else "--requantize"
    assert accept in error
    assert not (tmp_path / "run").exists() and not (tmp_path / "out").exists()
    if marked and command != "train":
        assert run(accept) == 0
        captured = capsys.readouterr()
        assert "of its update would survive; accepted" in captured.out + captured.err


def test_training_can_be_told_too(merged: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = write_place(tmp_path / "place", max_steps=1)
    asked = [f"model.name_or_path={merged['dequantized']}", "model.requantize=true"]
    config = load_config(place / "run.yaml", asked)
    settled = settle_base(config, open_model(config.model.name_or_path), make_console())
    assert settled.training.merge_base == "original"
    assert "of its update would survive; accepted" in capsys.readouterr().out


def test_compare_refuses_too(merged: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("peft")
    arguments = ["compare", "--model", str(merged["dequantized"]), "--out", str(tmp_path / "report")]
    assert main(arguments) == EXIT_BAD_INPUT
    assert "--requantize" in capsys.readouterr().err
    assert not (tmp_path / "report").exists()


def test_what_the_base_is_by_default(
    model: Path, tmp_path: Path, adapter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quantize(ModelFolder(model), tmp_path / "4bit", QuantizationSettings())
    for base, name in ((model, "original"), (tmp_path / "4bit", "dequantized")):
        out = tmp_path / name
        assert merge.main(["--adapter", str(adapter), "--model", str(base), "--out", str(out)]) == 0
        assert f"into the {name} base" in (said := capsys.readouterr().err)
        assert ("quantized again it would keep" in said) == (name == "dequantized")
    assert resolve_base("auto", None) == "original"
