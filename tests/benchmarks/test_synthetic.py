"""The random model that speed is measured on is a model like any other."""

import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import step, synthetic
from convert.files.folder import ModelFolder
from convert.load import read_config
from convert.model import open_model
from qlora_jax.base.errors import InputError
from tests.helpers import tiny


def test_a_synthetic_folder_is_a_model_in_4_bits(tmp_path: Path) -> None:
    settings = {**synthetic.hf_config("7b", 2), **tiny.hf_config(tie_word_embeddings=False)}
    written: list[int] = []
    synthetic.write(tmp_path / "model", settings, written.append)
    folder = ModelFolder(tmp_path / "model")
    assert folder.is_4bit
    config = read_config(folder)  # every tensor is there, in the shape that config.json says
    assert len(written) == config.num_hidden_layers + 1
    assert abs(sum(written) - synthetic.expected_bytes(config)) < 0.02 * sum(written)
    assert open_model(str(tmp_path / "model")).tokenizer.eos_token_id == settings["eos_token_id"]
    with pytest.raises(InputError, match="already"):
        synthetic.write(tmp_path / "model", settings)


@pytest.mark.parametrize("name", ["70b", "llama2-70b"])
def test_a_shape_by_either_of_its_names(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(synthetic, "write", lambda out, settings, advance: asked.append(settings))
    monkeypatch.setattr(sys, "argv", ["synthetic", "--shape", name, "--layers", "3", "--out", str(tmp_path / "model")])
    synthetic.main()
    assert [(each["hidden_size"], each["num_hidden_layers"]) for each in asked] == [(8192, 3)]
    assert step.llama(f"{name}:3").hidden_size == 8192
