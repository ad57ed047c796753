"""The random model that speed is measured on is a model like any other."""

from pathlib import Path

import pytest

from benchmarks import synthetic
from convert.folder import ModelFolder
from convert.load import read_config
from convert.model import open_model
from qlora_jax.errors import InputError
from tests import tiny


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
