"""The examples of configs/ for models whose shapes are public: each is planned, and says of itself what the plan says."""

import json
import re
from pathlib import Path

import pytest

from qlora_jax.__main__ import main
from tests.helpers.children import REPOSITORY

SHAPES = json.loads((REPOSITORY / "tests/planning/shapes.json").read_text())
"""The `config.json` of each example's model, but for keys that say nothing of a plan."""


@pytest.mark.parametrize("name", SHAPES)
def test_what_an_example_takes(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    example = REPOSITORY / "configs" / f"{name}.yaml"
    (tmp_path / "config.json").write_text(json.dumps(SHAPES[name]))
    (tmp_path / "rows.jsonl").write_text('{"messages": [{"role": "user", "content": "a"}]}\n')
    memory = ["--gpu-memory", "24GiB", "--host-memory", "64GiB", "--disk-space", "300GiB"]
    settings = [f"model.name_or_path={tmp_path}", f"data.path={tmp_path / 'rows.jsonl'}"]
    assert main(["plan", "--config", str(example), *memory, *settings]) in (0, None)
    told = capsys.readouterr().out
    device, host = re.search(r"^  total +([\d.]+) +([\d.]+) *$", told, re.MULTILINE).groups()
    seconds = re.search(r"predicted: ([\d.]+) s a step .*RTX 4090", told)[1]
    comment = " ".join(line[2:] for line in example.read_text().splitlines() if line.startswith("# "))
    assert f": {device} GiB of the GPU, {host} GiB of the host, {seconds} s a step." in comment
