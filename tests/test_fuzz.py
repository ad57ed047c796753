"""Damaged files of others, by the hundred, to every reader: it works, or one clean error; never a crash, a hang, or memory without end."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from convert.adapter import save_adapter
from convert.folder import ModelFolder
from convert.load import read_config
from convert.quantize import quantize
from qlora_jax.checkpoint import Checkpoints
from qlora_jax.config import LoraSettings, QuantizationSettings
from qlora_jax.engine import Engine
from qlora_jax.placement import put
from tests import tiny

REPOSITORY = Path(__file__).parent.parent

FUZZ = r'''
import contextlib, copy, faulthandler, json, os, random, resource, shutil, signal, struct, sys, tempfile
from pathlib import Path

faulthandler.enable()
times, place = int(sys.argv[1]), Path(sys.argv[2])

import numpy as np
import transformers
from convert.adapter import load_adapter, plain_settings
from convert.bitsandbytes import read_state
from convert.folder import ModelFolder
from convert.load import read_config
from convert.model import open_model, open_shape
from convert.identity import model_identity
from convert.prequantized import settle
from qlora_jax.checkpoint import DamagedError, open_checkpoint
from qlora_jax.config import QuantizationSettings
from qlora_jax.corpus import tokenize_rows
from qlora_jax.data.rows import RawRow
from qlora_jax.errors import InputError

NASTY = [None, True, False, 0, -1, 1, 3, 2**31, 2**63, -2**63, 10**400, 1e308, float("nan"), float("inf"), 0.5, "", "\0", "\ud800",
    "../../../etc/passwd", "/etc/passwd", "a" * 100_000, "model.safetensors", "model.embed_tokens.weight",
    "F64", "I4", "(a+)+$", "(.|.)*Z", ".*.*.*.*.*.*.*Z", "[",
    [], {}, [0], [[]],
    [-1, 5], [0, 2**62], [2**40] * 4, [1] * 1000, {"": ""}, {"a": {"a": {"a": 1}}}]

def paths_of(value, at=()):
    yield at
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from paths_of(inner, (*at, key))

def changed_json(text, random):
    """One to three values replaced, removed, moved or nested deeply; or the text itself cut or spoiled."""
    value = json.loads(text)
    for _ in range(random.randint(1, 3)):
        at = random.choice(list(paths_of(value)))
        nasty = copy.deepcopy(random.choice(NASTY))
        if not at:
            if random.random() < 0.1:
                return json.dumps(nasty).encode("utf-8", "surrogatepass")
            continue
        parent = value
        for key in at[:-1]:
            parent = parent[key]
        action = random.random()
        if action < 0.7:
            parent[at[-1]] = nasty
        elif action < 0.85:
            del parent[at[-1]]
        elif isinstance(parent, dict):
            parent[str(random.choice(NASTY))[:50]] = nasty
        if not paths_of(value):
            break
    data = json.dumps(value).encode("utf-8", "surrogatepass")
    if random.random() < 0.1:
        depth = random.choice((50, 2000, 100_000))
        data = data[:-1] + b', "deep": ' + b'[' * depth + b']' * depth + b'}'
    return changed_bytes(data, random) if random.random() < 0.15 else data

def changed_bytes(data, random):
    data = bytearray(data)
    for _ in range(random.randint(1, 4)):
        at = random.randrange(len(data) + 1)
        action = random.randrange(5)
        if action == 0 and data:
            data[at % len(data)] ^= 1 << random.randrange(8)
        elif action == 1:
            del data[at:]
        elif action == 2:
            data[at:at] = random.randbytes(random.randint(1, 40))
        elif action == 3:
            del data[at:at + random.randint(1, 40)]
        elif data:
            data[at % len(data)] = random.choice(b"\0\xff{}[]\",:0-e")
    return bytes(data)

def changed_safetensors(data, random):
    """Mostly the header: as JSON, or its length."""
    (length,) = struct.unpack("<Q", data[:8])
    header, rest = data[8:8 + length], data[8 + length:]
    action = random.random()
    if action < 0.6:
        header = changed_json(header, random)
        return struct.pack("<Q", len(header)) + header + rest
    if action < 0.8:
        length = random.choice((0, 1, length - 1, length + 1, len(data), 2**31, 2**63, 2**64 - 1, 99_999_999))
        return struct.pack("<Q", length) + header + rest
    return changed_bytes(data[:200] if action < 0.85 else data, random)

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
    print(json.dumps([reader, outcomes]), flush=True)
'''
"""In a process of its own: what crashes, hangs for a minute or takes a GiB of memory ends it."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Something sound of each kind."""
    place = tmp_path_factory.mktemp("place")
    tiny.write_model(place / "plain", num_hidden_layers=1)
    tiny.write_model(place / "sharded", num_hidden_layers=1, shards=3)
    model = ModelFolder(place / "plain")
    quantize(model, place / "nf4", QuantizationSettings())
    lora = LoraSettings(r=2, target_modules=("q_proj",))
    engine = Engine(read_config(model), lora, QuantizationSettings(), compute_dtype="float32")
    save_adapter(place / "adapter", engine.init_adapters(0), lora, QuantizationSettings(), "base")
    checkpoints = Checkpoints(place, 1)
    checkpoints.save(1, {"adapters": [put({"a": np.zeros(3, np.float32)}, "device")]}, {})
    checkpoints.wait()
    return place


@pytest.mark.parametrize("times", [60, pytest.param(2000, marks=pytest.mark.slow)])
def test_damaged_files(place: Path, times: int) -> None:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", FUZZ, str(times), str(place)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    outcomes = dict(map(json.loads, done.stdout.splitlines()))
    assert len(outcomes) == 12
    refused = {reader: found["refused"] for reader, found in outcomes.items()}
    assert all(count > 0 for reader, count in refused.items() if reader != "generation config"), (
        "or nothing was damaged"
    )
    assert refused["checkpoint"] + refused["about"] > times, "a checkpoint knows every byte"
