"""Damaged files of others, by the hundred, to every reader: it works, or one clean error; never a crash, a hang, or memory without end."""

import json
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from convert.adapters.adapter import load_adapter
from convert.files.folder import ModelFolder
from convert.load import read_config
from convert.model import MAX_UNUSED, open_tokenizer
from qlora_jax.base.errors import InputError
from qlora_jax.model.architecture import Architecture
from qlora_jax.runtime.placement import one_device
from qlora_jax.training.checkpoint import Checkpoints
from tests.helpers.children import environment
from tests.helpers.sound import write_sound

FUZZ = r"""
import contextlib, copy, faulthandler, json, os, random, resource, shutil, signal, struct, sys, tempfile
from pathlib import Path

faulthandler.enable()
times, place = int(sys.argv[1]), Path(sys.argv[2])
results = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # what the libraries print is for no one

import numpy as np
import transformers
from convert.adapters.adapter import load_adapter, plain_settings
from convert.files.bitsandbytes import read_state
from convert.files.folder import ModelFolder
from convert.load import read_config
from convert.model import open_model, open_shape
from convert.files.identity import model_identity
from convert.files.prequantized import settle
from qlora_jax.training.checkpoint import DamagedError, open_checkpoint
from qlora_jax.config import QuantizationSettings
from qlora_jax.data.corpus import tokenize_rows
from qlora_jax.data.rows.row import RawRow
from qlora_jax.base.errors import InputError
from tests.helpers.mutations import changed_bytes, changed_json, changed_safetensors

def read_model(folder):
    model = ModelFolder(folder)
    shape = read_config(model)
    if model.is_4bit:
        settle(model, QuantizationSettings(), where="here", fix="")
    for name in model.names:
        model.read_bytes(name)
    model_identity(model)

def read_adapter(folder):
    adapter = load_adapter(folder, shape)
    for key in adapter.pairs:
        adapter.pairs[key]
    plain_settings(adapter, shape)

def read_tokenizer(folder):
    model = open_model(str(folder), log=lambda line: None)
    tokenize_rows([RawRow("f:1", {"text": "a b"}), RawRow("f:2", {"text": "<|im_start|>"})], model.tokenizer, 64)
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        tokenize_rows([RawRow("f:1", {"messages": turns})], model.tokenizer, 64)

def read_checkpoint(folder):
    open_checkpoint(folder)

READERS = {
    "safetensors": ("plain", "model.safetensors", changed_safetensors, read_model),
    "4 bits": ("nf4", "model.safetensors", changed_safetensors, read_model),
    "config": ("plain", "config.json", changed_json, read_model),
    "4-bit config": ("nf4", "config.json", changed_json, read_model),
    "index": ("sharded", "model.safetensors.index.json", changed_json, read_model),
    "adapter config": ("adapter", "adapter_config.json", changed_json, read_adapter),
    "adapter": ("adapter", "adapter_model.safetensors", changed_safetensors, read_adapter),
    "tokenizer": ("plain", "tokenizer.json", changed_json, read_tokenizer),
    "tokenizer config": ("plain", "tokenizer_config.json", changed_json, read_tokenizer),
    "generation config": ("plain", "generation_config.json", changed_json, read_tokenizer),
    "checkpoint": ("step-1", "checksums.json", changed_json, read_checkpoint),
    "about": ("step-1", "about.json", changed_json, read_checkpoint),
}
SLOW = {"tokenizer", "tokenizer config", "generation config"}
shape = read_config(ModelFolder(place / "plain"))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, used + 2**30))
for reader, (folder, name, change, read) in READERS.items():
    work = Path(tempfile.mkdtemp(dir=place)) / folder
    shutil.copytree(place / folder, work)
    original = (work / name).read_bytes()
    read(work)
    outcomes = {"read": 0, "refused": 0}
    for number in range(times // 4 if reader in SLOW else times):
        (work / name).write_bytes(change(original, random.Random(f"{reader} {number}")))
        print(f"{reader}, case {number}", file=sys.stderr, flush=True)
        signal.alarm(60)
        try:
            read(work)
            outcomes["read"] += 1
        except (InputError, DamagedError) as error:
            outcomes["refused"] += 1
            if len(str(error)) > 20_000:
                raise AssertionError(f"an error of {len(str(error))} characters") from None
        signal.alarm(0)
    print(json.dumps([reader, outcomes]), file=results, flush=True)
"""
"""In a process of its own: what crashes, hangs for a minute or takes a GiB of memory ends it."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Something sound of each kind."""
    place = tmp_path_factory.mktemp("place")
    write_sound(place, "plain")
    checkpoints = Checkpoints(place, 1)
    checkpoints.save(1, {"adapters": [one_device().put({"a": np.zeros(3, np.float32)}, "device")]}, {})
    checkpoints.wait()
    return place


@pytest.mark.parametrize("times", [60, pytest.param(2000, marks=pytest.mark.slow)])
def test_damaged_files(place: Path, times: int) -> None:
    command = [sys.executable, "-c", FUZZ, str(times), str(place)]
    done = subprocess.run(
        command, env=environment(JAX_PLATFORMS="cpu", HF_HUB_OFFLINE="1"), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    outcomes = dict(map(json.loads, done.stdout.splitlines()))
    assert len(outcomes) == 12
    refused = {reader: found["refused"] for reader, found in outcomes.items()}
    assert all(count > 0 for reader, count in refused.items() if reader != "generation config"), (
        "or nothing was damaged"
    )
    assert refused["checkpoint"] + refused["about"] > times, "a checkpoint knows every byte"


# Numbers without end: what JSON can write, and no float, array or machine can hold

HUGE = [10**400, 10**4299, -(10**400), float("inf"), "1e400"]
NUMBERS = {
    "config.json": ["vocab_size", "hidden_size", "num_hidden_layers", "head_dim", "rms_norm_eps", "rope_theta"],
    "adapter_config.json": ["r", "lora_alpha"],
}


def damage(path: Path, *keys: Any, value: Any) -> Path:
    """Put a value into a JSON file; `1e400` as it stands, which `json` reads as infinity."""
    settings = json.loads(path.read_text())
    inner = settings
    for key in keys[:-1]:
        inner = inner.setdefault(key, {}) if isinstance(key, str) else inner[key]
    inner[keys[-1]] = value
    path.write_text(json.dumps(settings).replace('"1e400"', "1e400"))
    return path


@pytest.mark.parametrize("value", HUGE, ids=["400 digits", "4300 digits", "below nothing", "infinity", "1e400"])
@pytest.mark.parametrize(("file", "key"), [(file, key) for file, keys in NUMBERS.items() for key in keys])
def test_a_number_without_end(place: Path, tmp_path: Path, file: str, key: str, value: Any) -> None:
    folder = shutil.copytree(place / ("plain" if file == "config.json" else "adapter"), tmp_path / "folder")
    damage(folder / file, key, value=value)
    with pytest.raises(InputError) as caught:
        read_config(ModelFolder(folder)) if file == "config.json" else load_adapter(folder, shape_of(place))
    assert key in str(caught.value) and len(str(caught.value)) < 5000


@pytest.mark.parametrize(("pattern", "value"), [("rank_pattern", 10**400), ("rank_pattern", 2**27 + 1),
    ("alpha_pattern", 10**400), ("alpha_pattern", 1e31), ("layers_to_transform", 10**400)])  # fmt: skip
def test_an_adapters_pattern_without_end(place: Path, tmp_path: Path, pattern: str, value: Any) -> None:
    folder = shutil.copytree(place / "adapter", tmp_path / "adapter")
    damage(folder / "adapter_config.json", pattern, value=value if "layers" in pattern else {"q_proj": value})
    with pytest.raises(InputError, match=pattern if "layers" not in pattern else "match no linear"):
        load_adapter(folder, shape_of(place))


@pytest.mark.parametrize(
    "shape", [[10**4000] * 2, [2**62] * 1000, [2**63], [0] * 65], ids=["digits", "many", "64 bits", "dimensions"]
)
def test_a_shape_without_end(place: Path, tmp_path: Path, shape: list[int]) -> None:
    """Their product has more digits than Python would print, or takes for ever."""
    folder = shutil.copytree(place / "plain", tmp_path / "folder")
    data = (folder / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    header["model.norm.weight"]["shape"] = shape
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
    with pytest.raises(InputError, match=r"damaged: model\.norm\.weight has shape"):
        ModelFolder(folder)


def test_an_index_with_numbers_without_end(place: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(place / "sharded", tmp_path / "folder")
    index = folder / "model.safetensors.index.json"
    damage(index, "metadata", "total_size", value=10**4299)
    read_config(ModelFolder(folder))  # nobody believes it
    damage(index, "weight_map", "model.norm.weight", value=10**4299)
    with pytest.raises(InputError, match="not a safetensors file inside the folder"):
        ModelFolder(folder)


@pytest.mark.parametrize(
    "value", [2**31, 2**32 - 1, MAX_UNUSED + 1000, 10**400], ids=["31 bits", "32 bits", "a few", "digits"]
)
def test_a_tokens_number_without_end(place: Path, tmp_path: Path, value: int) -> None:
    """The tokenizer's library makes room for every number below it, as soon as the tokenizer is copied or written: 16 GiB."""
    folder = shutil.copytree(place / "plain", tmp_path / "folder")
    token = next(iter(json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]))
    damage(folder / "tokenizer.json", "model", "vocab", token, value=value)
    with pytest.raises(InputError, match="a tokenizer that cannot be loaded") as caught:
        open_tokenizer(str(folder))
    if value < 2**32:
        assert f"its token {token!r} is number {value}" in str(caught.value)


def test_tokens_may_leave_some_numbers_out(place: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(place / "plain", tmp_path / "folder")
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    damage(folder / "tokenizer.json", "model", "vocab", next(iter(vocabulary)), value=len(vocabulary) + 1000)
    assert open_tokenizer(str(folder)).eos_token_id == 257


@pytest.mark.parametrize("key", ["id", "decoder"])
def test_an_added_tokens_number_without_end(place: Path, tmp_path: Path, key: str) -> None:
    """The library gives them the next numbers, whatever the files say; or refuses them."""
    folder = shutil.copytree(place / "plain", tmp_path / "folder")
    if key == "id":
        damage(folder / "tokenizer.json", "added_tokens", -1, "id", value=2**32 - 1)
    else:
        damage(folder / "tokenizer_config.json", "added_tokens_decoder", str(2**40), value={"content": "<new>"})
    try:
        assert max(open_tokenizer(str(folder)).get_vocab().values()) < 300
    except InputError as error:
        assert "a tokenizer that cannot be loaded" in str(error)


def test_a_tokenizers_own_code_is_not_run(place: Path, tmp_path: Path) -> None:
    """And nobody is told to trust it."""
    folder = shutil.copytree(place / "plain", tmp_path / "folder")
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Own: pass\n")
    damage(folder / "tokenizer_config.json", "auto_map", value={"AutoTokenizer": ["own.Own", None]})
    damage(folder / "tokenizer_config.json", "tokenizer_class", value="Own")
    with pytest.raises(InputError, match="no code of a model's is run") as caught:
        open_tokenizer(str(folder))
    assert "trust_remote_code" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


def shape_of(place: Path) -> Architecture:
    return read_config(ModelFolder(place / "plain"))
