"""Adapters that PEFT itself makes, of every kind that merges: PEFT's targets, PEFT's bits; and what is not such a kind."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from convert.adapters.adapter import WEIGHTS_FILE, as_adapters, load_adapter
from convert.adapters.config import CONFIG_FILE
from convert.files.folder import ModelFolder
from convert.jobs.check import check_merge
from convert.load import read_config
from convert.merge import merge
from qlora_jax.__main__ import main as command
from qlora_jax.base.errors import EXIT_BAD_INPUT, InputError
from tests.helpers import tiny
from tests.helpers.peft_files import merged, peft_adapter, pefts_merge
from tests.helpers.tiny import NAMES

FLIPPED = 5e-4
"""DoRA: the share of weights that come out one bfloat16 apart. Both sides are float32 and round once, but add the squares of a row in
another order: a value errs by up to about four ulps of 2^-23, and rounds otherwise if it is that near to the middle between two
bfloat16, which are 2^-7 apart: 2 · 4 · 2^-23 / 2^-7 = 1.2e-4 of them; four times that for the luck of 12,000 weights."""
QV = ["q_proj", "v_proj"]
KINDS: dict[str, dict[str, Any]] = {
    "list": {"target_modules": QV},
    "whole paths": {"target_modules": ["model.layers.1.mlp.up_proj", "layers.0.self_attn.k_proj"]},
    "regex": {"target_modules": r".*\.layers\.[01]\.(self_attn\.[qk]|mlp\.up)_proj"},
    "all-linear": {"target_modules": "all-linear"},
    "rslora": {"target_modules": QV, "use_rslora": True},
    "rank pattern": {"target_modules": "all-linear", "rank_pattern": {r"layers\.1\..*": 3, "q_proj": 2}},
    "alpha pattern": {
        "target_modules": QV,
        "alpha_pattern": {"1.self_attn.v_proj": 32, "proj": 2, "self_attn.q_proj": 64},
    },
    "layers": {"target_modules": QV, "layers_to_transform": [1]},
    "one layer": {"target_modules": QV, "layers_to_transform": 0, "layers_pattern": "layers"},
    "excluded": {"target_modules": "all-linear", "exclude_modules": r".*0\.mlp.*"},
    "whole head": {"target_modules": QV, "modules_to_save": ["lm_head", "embed_tokens"]},
    "whole norms": {"target_modules": QV, "modules_to_save": ["norm"]},
    "whole mlp": {"target_modules": "all-linear", "modules_to_save": ["mlp"]},
    "dora": {"target_modules": "all-linear", "use_dora": True, "rank_pattern": {"q_proj": 2}},
    "dora, rslora": {"target_modules": QV, "use_dora": True, "use_rslora": True},
    "head": {"target_modules": [*QV, "lm_head"], "rank_pattern": {"lm_head": 2}},
    "embedding": {"target_modules": ["embed_tokens", "o_proj"], "alpha_pattern": {"embed_tokens": 8}},
    "head and embedding": {"target_modules": r"lm_head|.*(embed_tokens|k_proj)"},
    "head, dora": {"target_modules": ["lm_head", "k_proj"], "use_dora": True},
    "layers, and whole paths": {
        "target_modules": [*QV, "lm_head", "embed_tokens", "model.layers.0.mlp.up_proj"],
        "layers_to_transform": [1],
    },
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_model(tmp_path_factory.mktemp("base") / "model", shards=2, tie_word_embeddings=False)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_pefts_bits(tmp_path: Path, model: Path, kind: str) -> None:
    settings = KINDS[kind]
    adapter = peft_adapter(tmp_path / "adapter", model, **settings)
    # PEFT writes the names that `all-linear` came to (and sorts patterns by key): put the short form back.
    stored = json.loads((adapter / CONFIG_FILE).read_text())
    (adapter / CONFIG_FILE).write_text(json.dumps({**stored, "target_modules": settings["target_modules"]}))
    ours, theirs = merged(model, adapter, tmp_path / "out"), pefts_merge(model, adapter)
    assert ours.keys() == theirs.keys()
    differing = 0
    for name, tensor in theirs.items():
        apart = np.abs(ours[name].view(np.int16).astype(int) - tensor.view(np.int16).astype(int))
        assert apart.max() <= (1 if settings.get("use_dora") else 0), name
        differing += int((apart > 0).sum())
    loaded = load_adapter(adapter, read_config(ModelFolder(model)))
    changed = {name for name in ours if not np.array_equal(ours[name], ModelFolder(model).read(name))}
    assert changed == {NAMES.target(*key) for key in loaded.targets} | set(loaded.saved)
    assert differing <= FLIPPED * sum(ours[name].size for name in changed)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_adapters_in_sixteen_bits(tmp_path: Path, model: Path, dtype: str) -> None:
    adapter = peft_adapter(tmp_path / "adapter", model, dtype, target_modules=QV, modules_to_save=["lm_head"])
    stored = safetensors.numpy.load_file(adapter / WEIGHTS_FILE)
    assert {tensor.dtype.name for tensor in stored.values()} == {dtype}
    ours, theirs = merged(model, adapter, tmp_path / "out"), pefts_merge(model, adapter)
    for name, tensor in theirs.items():
        np.testing.assert_array_equal(ours[name].view(np.uint16), tensor.view(np.uint16), err_msg=name)


@pytest.mark.filterwarnings("ignore")
def test_a_tied_head_saved_with_its_embedding(tmp_path: Path, tiny_folder: Path) -> None:
    settings = {"target_modules": QV, "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}
    adapter = peft_adapter(tmp_path / "adapter", tiny_folder, **settings)
    ours, theirs = merged(tiny_folder, adapter, tmp_path / "out"), pefts_merge(tiny_folder, adapter)
    assert ours.keys() == theirs.keys() - {NAMES.lm_head}
    for name, tensor in ours.items():
        np.testing.assert_array_equal(tensor.view(np.uint16), theirs[name].view(np.uint16), err_msg=name)


def refusal(adapter: Path, model: Path) -> str:
    with pytest.raises(InputError) as caught:
        load_adapter(adapter, read_config(ModelFolder(model)))
    return str(caught.value)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("saved", [["lm_head"], ["embed_tokens"], ["lm_head", "embed_tokens"]], ids=" ".join)
def test_a_head_that_would_come_untied_is_refused(tmp_path: Path, tiny_folder: Path, saved: list[str]) -> None:
    """PEFT's merge has a head apart from the embedding then, which a model with tie_word_embeddings cannot be."""
    message = refusal(peft_adapter(tmp_path, tiny_folder, target_modules=QV, modules_to_save=saved), tiny_folder)
    assert "tie_word_embeddings" in message


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("targets", [["lm_head"], ["embed_tokens"]], ids=" ".join)
def test_an_adapted_head_that_is_the_embedding_is_refused(
    tmp_path: Path, tiny_folder: Path, targets: list[str]
) -> None:
    adapter = peft_adapter(tmp_path, tiny_folder, target_modules=[*QV, *targets])
    assert f"{targets[0]} is adapted, but the model's head is its embedding" in refusal(adapter, tiny_folder)


@pytest.mark.filterwarnings("ignore")
def test_dora_on_an_embedding_is_refused(tmp_path: Path, model: Path) -> None:
    adapter = peft_adapter(tmp_path, model, target_modules=["embed_tokens"], use_dora=True)
    assert "embed_tokens is adapted with DoRA" in refusal(adapter, model)


@pytest.mark.filterwarnings("ignore")
def test_the_stored_copy_of_a_base_is_what_is_merged_into(tmp_path: Path, model: Path) -> None:
    """PEFT loads it into the base's place; here it is another head than the base has."""
    adapter = peft_adapter(tmp_path / "adapter", model, target_modules=["q_proj", "lm_head"])
    tensors = safetensors.numpy.load_file(adapter / WEIGHTS_FILE)
    key = NAMES.stored_base(NAMES.lm_head)
    tensors[key] = np.ascontiguousarray(tensors[key][::-1])
    safetensors.numpy.save_file(tensors, adapter / WEIGHTS_FILE, {"format": "pt"})
    ours, theirs = merged(model, adapter, tmp_path / "out"), pefts_merge(model, adapter)
    for name, tensor in theirs.items():
        np.testing.assert_array_equal(ours[name].view(np.uint16), tensor.view(np.uint16), err_msg=name)


@pytest.mark.filterwarnings("ignore")
def test_a_head_is_never_in_4_bits(tmp_path: Path, model: Path) -> None:
    """Merged into the dequantized base, the head's adapter adds to the head as it is; the check sees it all."""
    adapter = peft_adapter(tmp_path / "adapter", model, target_modules=["q_proj", "lm_head", "embed_tokens"])
    folder = ModelFolder(model)
    loaded = load_adapter(adapter, read_config(folder))
    merge(folder, loaded, tmp_path / "out", "dequantized")
    check_merge(folder, loaded, tmp_path / "out", "dequantized")
    ours, theirs = ModelFolder(tmp_path / "out"), pefts_merge(model, adapter)
    for name in (NAMES.lm_head, NAMES.embedding):
        np.testing.assert_array_equal(ours.read(name).view(np.uint16), theirs[name].view(np.uint16))
    for name in (NAMES.lm_head, NAMES.embedding):  # another one is noticed
        damaged = tmp_path / name
        shutil.copytree(tmp_path / "out", damaged)
        where, header = ours._where[name], ours._headers[ours._where[name]]
        with (damaged / where).open("r+b") as file:
            file.seek(header.data_start + header.entries[name].begin)
            file.write(folder.read_bytes(name))
        with pytest.raises(InputError, match="differs from base"):
            check_merge(folder, loaded, damaged, "dequantized")


def without(*names_: str) -> Callable[[dict[str, np.ndarray]], object]:
    return lambda tensors: [tensors.pop(name) for name in names_]


@pytest.mark.filterwarnings("ignore")
def test_everything_that_is_missing_or_too_much_is_said_at_once(tmp_path: Path, model: Path) -> None:
    settings = {"target_modules": QV, "use_dora": True, "modules_to_save": ["lm_head"], "layers_to_transform": [1]}
    adapter = peft_adapter(tmp_path, model, **settings)
    tensors = safetensors.numpy.load_file(adapter / WEIGHTS_FILE)
    lost = [NAMES.magnitude(1, "q_proj"), NAMES.adapter(1, "v_proj", "lora_b"), NAMES.saved(NAMES.lm_head)]
    for name in lost:
        del tensors[name]
    tensors[NAMES.adapter(0, "q_proj", "lora_a")] = np.zeros((4, 64), np.float32)
    tensors[NAMES.adapter(7, "q_proj", "lora_a")] = np.zeros((4, 64), np.float32)
    tensors[NAMES.saved(NAMES.final_norm)] = np.ones(64, np.float32)
    tensors[NAMES.adapter(1, "q_proj", "lora_a")][0, 0] = np.inf
    safetensors.numpy.save_file(tensors, adapter / WEIGHTS_FILE)
    message = refusal(adapter, model)
    for name in lost:
        assert f"{name} is missing" in message
    assert f"{NAMES.adapter(0, 'q_proj', 'lora_a')}: target_modules does not name this linear" in message
    assert "layer 7 of q_proj: the model has 2 layers" in message
    assert f"unknown tensor {NAMES.saved(NAMES.final_norm)}" in message
    assert f"{NAMES.adapter(1, 'q_proj', 'lora_a')} holds values that are not finite" in message
    assert f"give the model this adapter was trained on, {str(model)!r}" in message
    with pytest.raises(
        InputError, match=r"the adapter names this model as its base .* so one of the two was replaced since"
    ):
        load_adapter(adapter, read_config(ModelFolder(model)), ModelFolder(model))


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"target_modules": "(", "rank_pattern": {"[": 1}}, "'(' is not a regular expression"),
        ({"target_modules": ".*q_proj", "layers_to_transform": [0]}, "which PEFT refuses"),
        (
            {"alora_invocation_tokens": [1], "use_qalora": True},
            "alora_invocation_tokens is [1], which changes only the tokens after its invocation",
        ),
        ({"target_modules": ["c_attn"]}, "target_modules match no linear of this model"),
    ],
)
def test_settings_that_cannot_be_applied(tmp_path: Path, model: Path, changes: dict[str, Any], found: str) -> None:
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": QV}
    (tmp_path / CONFIG_FILE).write_text(json.dumps({**settings, **changes}))
    safetensors.numpy.save_file({"stranger": np.zeros(1, np.float32)}, tmp_path / WEIGHTS_FILE)
    assert found in refusal(tmp_path, model)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("dora", "DoRA (use_dora); rank_pattern or alpha_pattern"),
        ("whole head", "modules_to_save (model.embed_tokens.weight, lm_head.weight)"),
        ("layers", "linears adapted in some layers only"),
        ("head and embedding", "LoRA on embed_tokens and lm_head"),
    ],
)
def test_kinds_that_only_merge(tmp_path: Path, model: Path, kind: str, reason: str) -> None:
    config = read_config(ModelFolder(model))
    adapter = load_adapter(peft_adapter(tmp_path, model, **KINDS[kind]), config)
    with pytest.raises(InputError) as caught:
        as_adapters(adapter, config)
    assert reason in caught.value.found
    assert "convert.merge" in caught.value.fix


@pytest.mark.filterwarnings("ignore")
def test_generate_refuses_them(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = peft_adapter(tmp_path, model, **KINDS["dora"])
    arguments = ["generate", "--model", str(model), "--adapter", str(adapter), "--prompt", "abc"]
    assert command(arguments) == EXIT_BAD_INPUT
    assert "which can be merged but not run or trained here" in capsys.readouterr().err
