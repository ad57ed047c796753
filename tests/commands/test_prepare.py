"""Models that transformers would train otherwise: refused before anything is written, or said."""

from pathlib import Path
from typing import Any

import pytest

from qlora_jax.__main__ import main
from qlora_jax.base.errors import InputError
from qlora_jax.commands.prepare import check_training
from qlora_jax.model.families import read_architecture
from tests.helpers.families import CASES, case
from tests.helpers.runs import train_main, write_place

DYNAMIC = {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "max_position_embeddings": 48}


class Model:
    """As much of a model as is looked at."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.config, self.folder = read_architecture(config), self
        self.path = Path("model")


class Said(list[str]):
    """A console that keeps what is printed."""

    def print(self, line: str) -> None:
        self.append(line)


@pytest.mark.parametrize(
    ("config", "found"),
    [
        (case("qwen2", attention_dropout=0.1), "attention_dropout is 0.1, not supported in training"),
        (
            case("starcoder2", residual_dropout=0.1, embedding_dropout=0.2),
            "residual_dropout is 0.1 and embedding_dropout is 0.2",
        ),
        (case("phi3", attention_dropout=0.3, resid_pdrop=0.1), "attention_dropout is 0.3 and resid_pdrop is 0.1"),
    ],
)
def test_dropouts_are_refused(config: dict[str, Any], found: str) -> None:
    with pytest.raises(InputError, match=found):
        check_training(Model(config), 64, Said())  # type: ignore[arg-type]


def test_a_family_s_default_dropouts_are_left_out_and_said() -> None:
    said = Said()
    check_training(Model(case("seed_oss")), 64, said)  # type: ignore[arg-type]
    assert said == [
        "attention_dropout is 0.1 and residual_dropout is 0.1 in model/config.json: left out; lora.lora_dropout regularizes the adapter"
    ]
    said = Said()
    check_training(Model(CASES["seed_oss"]), 64, said)  # type: ignore[arg-type]
    assert not said


def test_rows_beyond_what_dynamic_rope_leaves_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = write_place(tmp_path / "place", max_steps=1, **DYNAMIC)
    assert train_main(place, tmp_path / "out") == 2
    said = capsys.readouterr()
    assert "data.max_seq_length" in said.out + said.err and "at most 48" in said.out + said.err
    assert not (tmp_path / "out").exists()
    model = str(place / "model")
    assert main(["generate", "--model", model, "--max-new-tokens", "60", "--prompt", "hi"]) == 2
    assert "scaled by length beyond 48" in capsys.readouterr().err
