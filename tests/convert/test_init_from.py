"""Training goes on from an adapter: its settings, its numbers, its loss; what it cannot go on from is refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import yaml

from convert.adapters.adapter import WEIGHTS_FILE, save_adapter
from convert.adapters.config import CONFIG_FILE
from convert.files.folder import ModelFolder
from convert.files.names import ADAPTER_PARTS
from convert.load import read_config
from qlora_jax.base.errors import EXIT_BAD_INPUT
from qlora_jax.commands import train
from qlora_jax.config import LoraSettings, QuantizationSettings
from tests.commands.test_train import records, train_main
from tests.convert.test_adapter import random_adapters
from tests.helpers import tiny
from tests.helpers.tiny import ARCHITECTURE, NAMES

LORA = {"r": 4, "lora_alpha": 8.0, "target_modules": ["q_proj", "up_proj"], "use_rslora": True}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, rows, `run.yaml` of 5 steps, and `first`, a finished run of it; not to be written to."""
    place = tmp_path_factory.mktemp("place")
    tiny.write_model(place / "model")
    tiny.write_chats(place / "train.jsonl", 32)
    tiny.write_chats(place / "eval.jsonl", 8, seed=1)
    settings = {
        "model": {"name_or_path": str(place / "model")},
        "quantization": {"double_quant": False},
        "lora": {"lora_dropout": 0.0},
        "data": {"path": str(place / "train.jsonl"), "eval_path": str(place / "eval.jsonl"), "max_seq_length": 64},
        "training": {
            "output_dir": str(place / "never-used"),
            "gradient_accumulation_steps": 4,
            "learning_rate": 1e-2,
            "max_steps": 5,
        },
    }
    (place / "run.yaml").write_text(yaml.safe_dump(settings))
    lora = [f"lora.{key}={json.dumps(value)}" for key, value in LORA.items()]
    assert train_main(place, place / "first", *lora) == 0
    del settings["quantization"]
    (place / "run.yaml").write_text(yaml.safe_dump(settings))
    return place


def held_out_losses(out: Path) -> list[float]:
    return [record["eval_loss"] for record in records(out) if "eval_loss" in record]


def test_it_starts_where_the_other_ended(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "second"
    assert train_main(place, out, f"lora.init_from={place / 'first' / 'adapter'}") == 0
    assert held_out_losses(out)[0] == held_out_losses(place / "first")[-1]  # float32 in the file: to the bit
    assert held_out_losses(out)[-1] < held_out_losses(out)[0]
    resolved = yaml.safe_load((out / "config.yaml").read_text())
    assert {key: resolved["lora"][key] for key in LORA} == LORA
    assert resolved["quantization"]["double_quant"] is False
    stored = json.loads((out / "adapter" / CONFIG_FILE).read_text())
    assert {key: stored[key] for key in LORA} == LORA
    again = tmp_path / "again"
    assert train.main(["--config", str(out / "config.yaml"), f"training.output_dir={again}"]) == 0
    assert (again / "adapter" / WEIGHTS_FILE).read_bytes() == (out / "adapter" / WEIGHTS_FILE).read_bytes()


@pytest.mark.filterwarnings("ignore")
def test_from_pefts_adapter(place: Path, tmp_path: Path) -> None:
    """A step at a learning rate of nearly nothing leaves PEFT's numbers as they were."""
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    config = peft.LoraConfig(r=2, lora_alpha=6, target_modules=["v_proj"], task_type="CAUSAL_LM")
    peft.get_peft_model(AutoModelForCausalLM.from_pretrained(place / "model"), config).save_pretrained(
        tmp_path / "theirs"
    )
    few = ["training.max_steps=1", "training.learning_rate=1e-30"]
    assert train_main(place, tmp_path / "out", f"lora.init_from={tmp_path / 'theirs'}", *few) == 0
    ours = safetensors.numpy.load_file(tmp_path / "out" / "adapter" / WEIGHTS_FILE)
    theirs = safetensors.numpy.load_file(tmp_path / "theirs" / WEIGHTS_FILE)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        np.testing.assert_allclose(ours[name], tensor, rtol=0, atol=1e-29)


def refused(capsys: pytest.CaptureFixture[str], place: Path, out: Path, *overrides: str) -> str:
    assert train_main(place, out, *overrides) == EXIT_BAD_INPUT
    assert not out.exists()
    return capsys.readouterr().err


def test_contradictions_are_refused_at_once(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["lora.r=8", "lora.lora_alpha=8", "lora.target_modules=all-linear", "quantization.double_quant=true"]
    message = refused(capsys, place, tmp_path / "out", f"lora.init_from={place / 'first' / 'adapter'}", *given)
    assert "lora.r is 8, the adapter's is 4" in message
    assert "lora.target_modules is 'all-linear', the adapter's is ('q_proj', 'up_proj')" in message
    assert "quantization.double_quant is True, the adapter's is False" in message
    assert "lora_alpha" not in message


def with_dora(settings: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
    settings["use_dora"] = True
    tensors |= {NAMES.magnitude(layer, "q_proj"): np.ones(64, np.float32) for layer in range(2)}


def with_ranks(settings: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
    settings["rank_pattern"] = {"layers.0.self_attn.q_proj": 2}
    lora_a, lora_b = (NAMES.adapter(0, "q_proj", part) for part in ADAPTER_PARTS)
    tensors[lora_a], tensors[lora_b] = tensors[lora_a][:2], tensors[lora_b][:, :2].copy()


def with_norms(settings: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
    settings["modules_to_save"] = ["model.norm"]
    tensors[NAMES.saved(NAMES.final_norm)] = np.ones(64, np.float32)


@pytest.mark.parametrize(
    ("change", "reason"),
    [(with_dora, "DoRA"), (with_ranks, "rank_pattern"), (with_norms, "modules_to_save (model.norm.weight)")],
)
def test_kinds_that_are_not_trained(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: Any, reason: str
) -> None:
    lora = LoraSettings(r=4, target_modules=["q_proj"])
    adapters = random_adapters(read_config(ModelFolder(place / "model")), lora)
    save_adapter(tmp_path / "adapter", adapters, lora, QuantizationSettings(), "some/model", architecture=ARCHITECTURE)
    settings = json.loads((tmp_path / "adapter" / CONFIG_FILE).read_text())
    tensors = safetensors.numpy.load_file(tmp_path / "adapter" / WEIGHTS_FILE)
    change(settings, tensors)
    (tmp_path / "adapter" / CONFIG_FILE).write_text(json.dumps(settings))
    safetensors.numpy.save_file(tensors, tmp_path / "adapter" / WEIGHTS_FILE)
    message = refused(capsys, place, tmp_path / "out", f"lora.init_from={tmp_path / 'adapter'}")
    assert f"an adapter with {reason}" in message
    assert "can be merged but not run or trained here" in message


def test_an_adapter_that_is_not_there(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(capsys, place, tmp_path / "out", f"lora.init_from={tmp_path / 'nowhere'}")
    assert str(tmp_path / "nowhere") in message
