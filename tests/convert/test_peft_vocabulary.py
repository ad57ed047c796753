"""What PEFT writes of an embedding and a head: its own merge, bit for bit, or a refusal that says what to do."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from convert.adapters.adapter import WEIGHTS_FILE, as_adapters, load_adapter
from convert.adapters.config import CONFIG_FILE
from convert.files.folder import ModelFolder
from convert.load import read_config
from convert.merge import merge
from qlora_jax.base.errors import InputError
from tests.helpers import tiny
from tests.helpers.peft_files import merged, peft_adapter, pefts_merge, reference, resized
from tests.helpers.tiny import NAMES

pytestmark = pytest.mark.filterwarnings("ignore")
ROWS, MORE_ROWS = 264, 272
QV = ["q_proj", "v_proj"]
BOTH = ["embed_tokens", "lm_head"]
WHOLE = {"save_embedding_layers": True}
APART: dict[str, dict[str, Any]] = {
    "whole": {"modules_to_save": BOTH},
    "whole, with what they were": {"modules_to_save": BOTH, "save": WHOLE},
    "embedding": {"modules_to_save": ["embed_tokens"], "save": WHOLE},
    "head": {"modules_to_save": ["lm_head"], "save": WHOLE},
    "neither, but stored": {"save": WHOLE},
    "adapted": {"target_modules": [*QV, *BOTH]},
    "adapted head": {"target_modules": [*QV, "lm_head"]},
    "tokens": {"trainable_token_indices": [5, 3, 9]},
    "tokens of both": {"trainable_token_indices": {"embed_tokens": [5, 3], "lm_head": [7, 8, 200]}},
    "tokens, and the head": {"trainable_token_indices": {"model.embed_tokens": [0, ROWS - 1]}, "modules_to_save": ["lm_head"]},
    "tokens, and the head adapted": {"trainable_token_indices": [5], "target_modules": [*QV, "lm_head"]},
    "tied where nothing is": {"trainable_token_indices": [5], "ensure_weight_tying": True},
    "velora": {"velora_config": {"num_groups": 4}},
    "mica": {"init_lora_weights": "mica"},
    "biases there are none of": {"bias": "all", "fan_in_fan_out": True},
}  # fmt: skip
"""Of a model with a head of its own."""
TIED: dict[str, dict[str, Any]] = {
    "whole": {"modules_to_save": BOTH, "ensure_weight_tying": True, "save": WHOLE},
    "embedding": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "neither, but stored": {"save": WHOLE},
    "tokens": {"trainable_token_indices": [5, 3, 9]},
    "tokens, by both names": {"trainable_token_indices": {"embed_tokens": [5, 3], "lm_head": [5, 3]}},
}
UNTIED: dict[str, dict[str, Any]] = {
    "whole": {"modules_to_save": BOTH, "save": WHOLE},
    "embedding": {"modules_to_save": ["embed_tokens"], "save": WHOLE},
    "head": {"modules_to_save": ["lm_head"]},
    "head adapted": {"target_modules": [*QV, "lm_head"]},
    "other tokens": {"trainable_token_indices": {"embed_tokens": [5, 3], "lm_head": [7, 8]}},
}
"""Of a model whose head is its embedding, which it no longer would be."""


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[bool, int], Path]:
    """By whether they are tied, and their rows."""
    folder = tmp_path_factory.mktemp("bases")
    made = {}
    for tied in (False, True):
        made[tied, ROWS] = tiny.write_model(folder / f"{tied}", tie_word_embeddings=tied)
        made[tied, MORE_ROWS] = resized(made[tied, ROWS], folder / f"{tied} resized", MORE_ROWS)
    return made


def assert_pefts_bits(tmp_path: Path, model: Path, adapter: Path, tied: bool, dtype: str = "bfloat16") -> None:
    ours, theirs = merged(model, adapter, tmp_path / "out"), pefts_merge(model, adapter, dtype)
    assert theirs.keys() - ours.keys() == ({NAMES.lm_head} if tied else set())
    for name, tensor in theirs.items():
        found = ours.get(name, ours[NAMES.embedding] if tied else None)
        np.testing.assert_array_equal(found.view(np.uint16), tensor.view(np.uint16), err_msg=name)


@pytest.mark.parametrize("rows", [ROWS, MORE_ROWS])
@pytest.mark.parametrize(("tied", "kind"), [(False, kind) for kind in APART] + [(True, kind) for kind in TIED])
def test_pefts_bits(tmp_path: Path, bases: dict[tuple[bool, int], Path], tied: bool, kind: str, rows: int) -> None:
    settings = {"target_modules": QV, **(TIED if tied else APART)[kind]}
    model = bases[tied, rows]
    adapter = peft_adapter(
        tmp_path / "adapter", model, named=bases[tied, ROWS], **settings
    )  # and PEFT sees what was resized
    if rows != ROWS and "target_modules" not in (TIED if tied else APART)[kind]:
        assert any(name.endswith((".weight", "_layer.weight")) and "lora" not in name for name in stored(adapter))
    assert_pefts_bits(
        tmp_path, model, adapter, tied, "float32" if kind == "mica" else "bfloat16"
    )  # it rounds its delta


def stored(adapter: Path) -> dict[str, np.ndarray]:
    return safetensors.numpy.load_file(adapter / WEIGHTS_FILE)


def refusal(adapter: Path, model: Path) -> str:
    with pytest.raises(InputError) as caught:
        load_adapter(adapter, read_config(ModelFolder(model)), ModelFolder(model))
    return str(caught.value)


@pytest.mark.parametrize("kind", UNTIED)
def test_a_head_that_came_untied_merges_into_an_untied_copy(
    tmp_path: Path, bases: dict[tuple[bool, int], Path], kind: str
) -> None:
    """Refused, and what the message says to do works: PEFT's bits."""
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    model = bases[True, ROWS]
    adapter = peft_adapter(tmp_path / "adapter", model, **{"target_modules": QV, **UNTIED[kind]})
    message = refusal(adapter, model)
    assert "tie_word_embeddings" in message and "merge it into a copy of the model whose head is its own" in message
    copy = AutoModelForCausalLM.from_pretrained(str(model), tie_word_embeddings=False, dtype=torch.bfloat16)
    copy.lm_head.weight.data = copy.get_input_embeddings().weight.data.clone()
    copy.save_pretrained(tmp_path / "copy")
    assert_pefts_bits(tmp_path, tmp_path / "copy", adapter, False)


def test_a_tied_adapter_on_the_embedding(tmp_path: Path, bases: dict[tuple[bool, int], Path]) -> None:
    """PEFT's model, not its merge: that adds the delta twice, once for each name of the one matrix."""
    torch = pytest.importorskip("torch")
    import peft

    model, ids = bases[True, ROWS], torch.arange(3, 40)[None]
    settings = {"target_modules": [*QV, "embed_tokens"], "ensure_weight_tying": True}
    adapter = peft_adapter(tmp_path / "adapter", model, base_dtype="float32", **settings)
    assert NAMES.adapter(None, "lm_head", "lora_a") in stored(adapter)
    merged(model, adapter, tmp_path / "out")
    with torch.no_grad():
        theirs = peft.PeftModel.from_pretrained(reference(model, "float32"), adapter)(ids).logits
        ours = reference(tmp_path / "out", "float32")(ids).logits
        base = reference(model, "float32")(ids).logits
    rounding = (ours - theirs).norm() / theirs.norm()
    assert rounding < 0.02 < 0.5 < (base - theirs).norm() / theirs.norm()
    apart = peft_adapter(tmp_path / "apart", model, **settings)
    assert "on a base in 16 bits PEFT trains head and embedding apart" in refusal(apart, model)


@pytest.mark.parametrize("kind", ["whole", "neither, but stored", "adapted", "tokens"])
def test_a_base_of_the_wrong_size(tmp_path: Path, bases: dict[tuple[bool, int], Path], kind: str) -> None:
    settings = {"target_modules": QV, **APART[kind]}
    if kind == "tokens":
        settings["trainable_token_indices"] = [5, MORE_ROWS - 1]
    adapter = peft_adapter(tmp_path, bases[False, MORE_ROWS], named=bases[False, ROWS], **settings)
    message = refusal(adapter, bases[False, ROWS])
    assert (
        f"an adapter whose vocabulary was resized before it was trained: its embedding or head has {MORE_ROWS} rows"
        in message
    )
    assert f"the model's {ROWS}" in message and f"resize_token_embeddings({MORE_ROWS})" in message
    assert "give the model this adapter was trained on" not in message


def test_what_is_stored_and_unchanged_is_the_bases(tmp_path: Path, bases: dict[tuple[bool, int], Path]) -> None:
    """An embedding stored in float32, as kbit training leaves it, is the base's: such an adapter is a plain one."""
    model = bases[False, MORE_ROWS]
    folder = ModelFolder(model)
    adapter = peft_adapter(tmp_path, model, named=bases[False, ROWS], target_modules=QV)
    assert stored(adapter)[NAMES.saved(NAMES.embedding)].dtype == np.float32
    config = read_config(folder)
    loaded = load_adapter(adapter, config, folder)
    assert not loaded.saved and as_adapters(loaded, config)[0].target_modules == ("q_proj", "v_proj")
    assert set(load_adapter(adapter, config).saved) == {NAMES.embedding, NAMES.lm_head}  # who knows, without the model
    tensors = stored(adapter)
    tensors[NAMES.saved(NAMES.lm_head)][-1, -1] += 1
    safetensors.numpy.save_file(tensors, adapter / WEIGHTS_FILE)
    assert set(load_adapter(adapter, config, folder).saved) == {NAMES.lm_head}


def test_copies_that_differ(tmp_path: Path, bases: dict[tuple[bool, int], Path]) -> None:
    model = bases[False, ROWS]
    adapter = peft_adapter(tmp_path, model, target_modules=QV, modules_to_save=BOTH, save=WHOLE)
    tensors = stored(adapter)
    tensors[NAMES.untrained_copy(NAMES.embedding)] += 1  # nothing uses it, in PEFT either
    safetensors.numpy.save_file(tensors, adapter / WEIGHTS_FILE)
    load_adapter(adapter, read_config(ModelFolder(model)))
    tensors[NAMES.trained_copy(NAMES.lm_head)][3, 2] += 1
    safetensors.numpy.save_file(tensors, adapter / WEIGHTS_FILE)
    message = refusal(adapter, model)
    key, copy = NAMES.saved(NAMES.lm_head), NAMES.trained_copy(NAMES.lm_head)
    assert f"{copy} is to hold what {key} holds, and its values are others" in message
    assert "which of them was trained cannot be told" in message


def test_a_tied_folder_that_stores_its_head_too(tmp_path: Path, bases: dict[tuple[bool, int], Path]) -> None:
    """Some tied checkpoints do: the copy changes with the embedding, or transformers would untie them."""
    model = tiny.write_model(tmp_path / "model")
    tensors = safetensors.numpy.load_file(model / "model.safetensors")
    tensors[NAMES.lm_head] = tensors[NAMES.embedding]
    safetensors.numpy.save_file(tensors, model / "model.safetensors", {"format": "pt"})
    adapter = peft_adapter(tmp_path / "adapter", bases[True, ROWS], target_modules=QV, trainable_token_indices=[5, 3])
    ours = merged(model, adapter, tmp_path / "out")
    np.testing.assert_array_equal(ours[NAMES.lm_head].view(np.uint16), ours[NAMES.embedding].view(np.uint16))
    assert not np.array_equal(ours[NAMES.embedding], tensors[NAMES.embedding])


def test_tokens_of_a_kind_that_only_merges(tmp_path: Path, bases: dict[tuple[bool, int], Path]) -> None:
    model = bases[False, ROWS]
    config = read_config(ModelFolder(model))
    adapter = load_adapter(peft_adapter(tmp_path, model, target_modules=QV, trainable_token_indices=[5]), config)
    with pytest.raises(InputError, match=r"trainable_token_indices .model.embed_tokens.weight"):
        as_adapters(adapter, config)


def test_tokens_in_4_bits(tmp_path: Path, bases: dict[tuple[bool, int], Path]) -> None:
    """Into the dequantized base too, whose embedding never was in 4 bits."""
    model = bases[False, ROWS]
    folder = ModelFolder(model)
    adapter = peft_adapter(tmp_path / "adapter", model, target_modules=QV, trainable_token_indices=[5, 3])
    merge(folder, load_adapter(adapter, read_config(folder), folder), tmp_path / "out", "dequantized")
    ours, theirs = ModelFolder(tmp_path / "out"), pefts_merge(model, adapter)
    for name in (NAMES.embedding, NAMES.lm_head):
        np.testing.assert_array_equal(ours.read(name).view(np.uint16), theirs[name].view(np.uint16))


def test_names_that_are_neither(tmp_path: Path, bases: dict[tuple[bool, int], Path]) -> None:
    model = bases[False, ROWS]
    adapter = peft_adapter(tmp_path, model, target_modules=QV)
    settings = json.loads((adapter / CONFIG_FILE).read_text())
    (adapter / CONFIG_FILE).write_text(json.dumps({**settings, "trainable_token_indices": {"wte": [1]}}))
    assert "trainable_token_indices names 'wte', neither embed_tokens nor lm_head" in refusal(adapter, model)
