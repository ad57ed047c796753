"""The headline run's small twin: the whole road on a tiny model, with a pool of pinned memory as tight as the plan makes it."""

import json
import sys
from pathlib import Path

import pytest
import yaml

from benchmarks import headline
from benchmarks.headline import Case, Road, walk
from tests.helpers import tiny
from tests.helpers.children import environment

LAYERS = 12
ADAPTER_BYTES = 4 * 8 * (4 * (64 + 64) + 2 * (64 + 32) - 2 * (64 + 64) + 3 * (64 + 128))
"""A layer's adapter, r = 8: q and o [64, 64], k and v [32, 64], gate, up and down [128, 64]."""


def road(place: Path, case: Case, pool: int) -> Road:
    tiny.write_model(place / "model", num_hidden_layers=LAYERS, tie_word_embeddings=False)
    texts = [json.dumps({"text": f"{number} is followed by {number + 1}"}) for number in range(64)]
    (place / "rows.jsonl").write_text("\n".join(texts) + "\n")
    training = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "output_dir": str(place / "unused")}
    settings = {"model": {"name_or_path": "unused"}, "lora": {"r": 8, "lora_dropout": 0.1}, "training": training}
    settings["data"] = {"path": "unused", "max_seq_length": 64}
    (place / "run.yaml").write_text(yaml.safe_dump(settings))
    return Road(
        case=case, model=place / "model", data=place / "rows.jsonl", work=place / "work", config=place / "run.yaml",
        train=(sys.executable, "-m", "tests.helpers.tight_pool", str(pool)), settings=(),
        environment=environment(JAX_PLATFORMS="cpu", QLORA_JAX_CACHE=str(place / "cache")),
    )  # fmt: skip


def test_the_whole_road(tmp_path: Path) -> None:
    """Checkpoints, a kill, the same command again, evaluation, and the adapter read back; four layers' room for what passes the pool.

    With all on the device a pool with room for a checkpoint would be three times as large.
    """
    case = Case(shape="tiny", optim="paged_adamw_8bit", place="device")
    parts = dict(walk(road(tmp_path, case, 4 * 3 * ADAPTER_BYTES)))
    assert parts["killed"]["same_bytes"]
    assert parts["killed"]["continued"].startswith(f"continuing after step {headline.SAVE}")
    assert parts["straight"]["losses"][headline.SAVE :] == parts["killed"]["resumed"]["losses"][headline.SAVE :]
    assert len(parts["straight"]["eval_loss"]) == 2
    assert parts["straight"]["peaks"]["disk"]["gib"] >= 0
    assert parts["straight"]["read_back"] == f"{7 * LAYERS} linears equal to step-{headline.STEPS}'s"


def test_a_pool_that_is_too_small_is_named(tmp_path: Path) -> None:
    """As the pinned pool, not as the device's memory; and nothing is left half-written."""
    made = road(tmp_path, Case(shape="tiny", optim="adamw", place="host"), 2 * LAYERS * ADAPTER_BYTES)
    with pytest.raises(SystemExit, match=r"(?s)status 2.*out of .*memory.*xla_gpu_host_bfc.*do:"):
        made.straight()
