"""Whole commands on hundreds of hostile inputs: each ends with status 0 or 2 and a message, soon, in little memory. See `hostile.py`."""

import gzip
import json
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import yaml

from qlora_jax.__main__ import main
from qlora_jax.commands import train
from tests.convert.test_gguf import write_gguf
from tests.helpers import tiny
from tests.helpers.children import environment
from tests.helpers.hostile import DATA, KINDS, ORDERED, TRAIN, WORK
from tests.helpers.sound import write_sound


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Something sound of each kind: models, an adapter, rows, a cache, and a run of two steps."""
    root = tmp_path_factory.mktemp("hostile")
    work = root / WORK
    write_sound(work, "model")
    write_rows(work)
    write_gguf(work / "model.gguf")
    settings = {
        "model": {"name_or_path": "model"},
        "lora": {"r": 2, "target_modules": ["q_proj"]},
        "data": {"path": "rows.jsonl", "max_seq_length": 64, "num_proc": 1, "preview_rows": 1},
        "training": {"output_dir": "runs", "gradient_accumulation_steps": 1, "max_steps": 3, "seed": 1},
    }
    (work / "run.yaml").write_text(yaml.safe_dump(settings))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(work)
        patch.setenv("QLORA_JAX_CACHE", str(work / "cache"))
        assert train.main([*TRAIN[1:], "training.max_steps=2"]) == 0
        assert main(DATA[1:]) == 0
    return work.rename(root / "sound")


def write_rows(work: Path) -> None:
    """Three rows in every form."""
    tiny.write_chats(work / "rows.jsonl", 3)
    lines = (work / "rows.jsonl").read_bytes()
    rows = [json.loads(line) for line in lines.splitlines()]
    (work / "rows.json").write_text(json.dumps(rows))
    (work / "rows.jsonl.gz").write_bytes(gzip.compress(lines, mtime=0))
    (work / "rows.csv").write_text('text\n"a, b"\nc d\n')
    table = datasets.Dataset.from_list(rows)
    table.to_parquet(work / "rows.parquet")
    table.save_to_disk(work / "saved")


def problems(place: Path, first: int, last: int) -> list[dict[str, object]]:
    """What ended as none may, of these inputs."""
    command = [sys.executable, "-m", "tests.helpers.hostile", str(place), str(first), str(last)]
    compiled = {
        "JAX_COMPILATION_CACHE_DIR": str(place.with_name("compiled")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    variables = environment(JAX_PLATFORMS="cpu", HF_HUB_OFFLINE="1", HF_HOME=str(place.with_name("hub")), **compiled)
    done = subprocess.run(command, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    *found, last_line = map(json.loads, done.stdout.splitlines())
    assert last_line == {"tried": last - first}
    return found


@pytest.mark.parametrize(("first", "last"), [(0, 300), pytest.param(300, 3600, marks=pytest.mark.slow)])
def test_every_input_ends_well(place: Path, first: int, last: int) -> None:
    assert problems(place, first, last) == []


def test_the_place_is_sound_and_every_kind_is_tried(place: Path) -> None:
    assert set(KINDS) <= set(ORDERED[:300])
    for kind in KINDS.values():
        assert len(list(place.glob(kind.file))) == 1, kind.file
