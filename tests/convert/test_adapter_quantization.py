"""What an adapter's base was in: taken from whatever says so, and merged into that; where nothing does, what else it may have been."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from convert.adapters.adapter import load_adapter
from convert.adapters.quantization import README, Stated, base_remark, stated_quantization
from convert.files.folder import ModelFolder
from convert.load import read_config
from convert.merge import main, merge
from convert.quantize import quantize
from qlora_jax.base.errors import EXIT_BAD_INPUT, InputError
from qlora_jax.config import QuantizationSettings
from tests.helpers import tiny
from tests.helpers.peft_files import peft_adapter, reference

FP4 = QuantizationSettings(quant_type="fp4", double_quant=False)
NF4 = QuantizationSettings(quant_type="nf4", double_quant=True)
SINGLE = {
    "quant_method": "bitsandbytes",
    "_load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": False,
}


def readme(**settings: Any) -> str:
    """As PEFT wrote it until it came to see a model's config as a dict (0.21 does)."""
    lines = "\n".join(f"- {key}: {value}" for key, value in settings.items())
    return (
        "---\nlibrary_name: peft\n---\n## Training procedure\n\n"
        "The following `bitsandbytes` quantization config was used during training:\n"
        f"{lines}\n\n### Framework versions\n\n- PEFT 0.21.2\n"
    )


def stated(folder: Path, base: str | None = None, note: str | None = None) -> Stated:
    return stated_quantization(folder, base, folder / "adapter_model.safetensors", note)


def test_who_says_what(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text(json.dumps({"quantization_config": {"load_in_4bit": True}}))
    assert stated(tmp_path) == Stated()
    found = stated(tmp_path, str(base))
    assert (found.quantization, found.source) == (FP4, f"the config.json of {base}")
    (tmp_path / README).write_text(readme(**SINGLE))
    found = stated(tmp_path, str(base))
    assert (found.quantization, found.source) == (
        QuantizationSettings(quant_type="nf4", double_quant=False),
        "its README.md",
    )
    assert stated(tmp_path, str(base), NF4.model_dump_json()).quantization == NF4
    (tmp_path / README).write_text(readme(quant_method="bitsandbytes", load_in_8bit=True, load_in_4bit=False))
    assert stated(tmp_path).beyond == "8 bits"
    (tmp_path / README).write_text(readme(load_in_4bit=True, bnb_4bit_quant_type="int4"))
    assert stated(tmp_path) == Stated()


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"quantization_config": [1]}', '{"quantization_config": {"load_in_4bit": []}}']
)
def test_a_base_that_says_nothing(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    for name in (str(tmp_path), "no/such-model", "no such model", "a\0b", "~nobody/x", "/" * 5000):
        assert stated(tmp_path / "nowhere", name).quantization == QuantizationSettings()


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_trained_on_bitsandbytes_default(tmp_path: Path, tiny_folder: Path) -> None:
    """FP4 without double quantization: merged into that, our model is PEFT's; into NF4 it is another."""
    torch, bits = pytest.importorskip("torch"), pytest.importorskip("bitsandbytes")
    import peft

    model, ids = tiny_folder, torch.arange(3, 60)[None]
    adapter = peft_adapter(tmp_path / "adapter", model, target_modules=["q_proj", "v_proj", "up_proj"])
    base = reference(model, "float32")
    for name, weight in base.named_parameters():  # what such a base computes with
        if name.endswith("_proj.weight"):
            codes, state = bits.functional.quantize_4bit(
                weight.data.bfloat16(), quant_type="fp4", compress_statistics=False
            )
            weight.data = bits.functional.dequantize_4bit(codes, state).float()
    theirs = peft.PeftModel.from_pretrained(base, adapter)(ids).logits

    def distance(out: Path) -> float:
        with torch.no_grad():
            return float((reference(out, "float32")(ids).logits - theirs).norm() / theirs.norm())

    folder = ModelFolder(model)
    config = read_config(folder)
    untold = load_adapter(adapter, config, folder)
    merge(folder, untold, tmp_path / "nf4", "dequantized")
    remark = base_remark(untold.stated, folder, "org/base")
    command = "python -m convert.quantize --model org/base --out DIR --quant-type fp4 --no-double-quant"
    assert f"`{command}`" in remark and "FP4 without double quantization" in remark
    quantize(folder, tmp_path / "base", FP4)  # what the command makes
    merge(ModelFolder(tmp_path / "base"), untold, tmp_path / "fp4", "dequantized")
    (adapter / README).write_text(readme(load_in_4bit=True, bnb_4bit_quant_type="fp4", bnb_4bit_use_double_quant=False))
    told = load_adapter(adapter, config, folder)
    merge(folder, told, tmp_path / "told", "dequantized")
    assert "its README.md says" in base_remark(told.stated, folder, "org/base")
    assert max(distance(tmp_path / "fp4"), distance(tmp_path / "told")) < 0.01 < 0.05 < distance(tmp_path / "nf4")
    assert np.array_equal(
        *(ModelFolder(tmp_path / out).read("model.layers.0.mlp.up_proj.weight") for out in ("fp4", "told"))
    )


@pytest.mark.filterwarnings("ignore")
def test_a_base_in_other_4_bits(tmp_path: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = peft_adapter(tmp_path / "adapter", tiny_folder, target_modules=["q_proj"])
    (adapter / README).write_text(readme(load_in_4bit=True))
    quantize(ModelFolder(tiny_folder), tmp_path / "nf4", NF4)
    arguments = ["--adapter", str(adapter), "--model", str(tmp_path / "nf4"), "--out", str(tmp_path / "out")]
    assert main(arguments) == EXIT_BAD_INPUT
    message = capsys.readouterr().err
    assert "python -m convert.quantize" in message and "--quant-type fp4 --no-double-quant" in " ".join(message.split())
    assert "give the model that the adapter was trained on" not in message
    (adapter / README).unlink()
    assert main([*arguments, "--no-check"]) == 0
    assert "taken for the 4 bits that the model is in" in " ".join(capsys.readouterr().err.split())


def test_a_leftover_of_a_merge(tmp_path: Path, tiny_folder: Path) -> None:
    """bfloat16 weights, and a config.json that says 4 bits."""
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    config = tiny.hf_config(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="remove quantization_config from its"):
        read_config(ModelFolder(folder))
