"""A head stored beside a tie flag: used, as transformers uses it, and carried into whatever is made of the model; and weights' dtypes."""

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from convert.adapters.adapter import WEIGHTS_FILE, load_adapter
from convert.files.folder import ModelFolder
from convert.files.head import is_tied
from convert.files.sizes import merged_bytes, tensors_of
from convert.load import load_weights, read_config, total_bytes
from convert.merge import merge_with_progress
from convert.quantize import quantize
from qlora_jax.base.console import make_console
from qlora_jax.base.errors import InputError
from qlora_jax.config import QuantizationSettings
from qlora_jax.runtime.placement import nbytes
from tests.convert.test_merge import make_adapter, run_merge
from tests.convert.test_peft_kinds import peft_adapter
from tests.helpers import tiny
from tests.helpers.tiny import NAMES
from tests.model.test_llama import LOGITS_RTOL, load_model, no_adapters, relative_difference, transformers_model

NF4 = QuantizationSettings()


def changed(folder: Path, change: Any) -> Path:
    """The folder with its tensors changed in place by `change(tensors)`."""
    path = folder / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    change(tensors)
    safetensors.numpy.save_file(tensors, path, {"format": "pt"})
    return folder


def with_head(folder: Path, kind: str) -> Path:
    """A tied tiny model with a head stored all the same."""

    def change(tensors: dict[str, np.ndarray]) -> None:
        head = tensors[NAMES.embedding].copy()
        if kind == "one element":
            head[-1, -1] += 1
        elif kind == "another":
            head = np.random.default_rng(3).standard_normal(head.shape).astype(head.dtype) / 8
        elif kind == "float32 copy":
            head = head.astype(np.float32)
        tensors[NAMES.lm_head] = head

    return changed(tiny.write_model(folder), change)


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tie_word_embeddings: true`, and another head; not to be written to."""
    return with_head(tmp_path_factory.mktemp("own") / "model", "another")


@pytest.mark.parametrize(
    ("kind", "tied"), [("copy", True), ("float32 copy", True), ("one element", False), ("another", False)]
)
def test_logits_are_transformers(tmp_path: Path, kind: str, tied: bool) -> None:
    torch = pytest.importorskip("torch")
    path = with_head(tmp_path / "model", kind)
    engine, weights = load_model(path)
    assert engine.config.tie_word_embeddings is tied is is_tied(ModelFolder(path))
    assert (weights.head["weight"] is weights.embedding["weight"]) is tied
    input_ids = np.random.default_rng(0).integers(0, 264, (2, 24)).astype(np.int32)
    with torch.no_grad():
        expected = transformers_model(path, weights)(torch.from_numpy(input_ids).long()).logits.numpy()
    assert relative_difference(engine.logits(weights, no_adapters(engine), input_ids), expected) < LOGITS_RTOL


def test_a_head_of_another_shape_is_refused(tmp_path: Path) -> None:
    def change(tensors: dict[str, np.ndarray]) -> None:
        tensors[NAMES.lm_head] = tensors[NAMES.embedding][:-8]

    with pytest.raises(InputError, match=r"lm_head.weight: shape \(256, 64\), the config says \(264, 64\)"):
        read_config(ModelFolder(changed(tiny.write_model(tmp_path / "model"), change)))


def test_every_byte_is_counted(own: Path) -> None:
    folder = ModelFolder(own)
    config, seen = read_config(folder), []
    weights = load_weights(folder, config, NF4, "device", seen.append)
    assert sum(seen) == total_bytes(config, NF4, "device")
    assert nbytes(weights.head["weight"]) == nbytes(weights.embedding)


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("base", ["original", "dequantized"])
def test_a_merge_carries_it_and_says_so(tmp_path: Path, own: Path, base: Any) -> None:
    """Its check, and transformers, see the head that was trained with."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    folder = ModelFolder(own)
    adapter = make_adapter(tmp_path / "adapter", own)
    out = tmp_path / "merged"
    merge_with_progress(folder, load_adapter(adapter, read_config(folder)), out, base, make_console())
    assert config_of(out)["tie_word_embeddings"] is False
    merged = ModelFolder(out)
    assert merged.read_bytes(NAMES.lm_head) == folder.read_bytes(NAMES.lm_head)
    model = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16)
    head = model.lm_head.weight.detach().float().numpy()
    np.testing.assert_array_equal(head, folder.read(NAMES.lm_head).astype(np.float32))
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)


def test_what_is_quantized_carries_it(tmp_path: Path, own: Path) -> None:
    quantize(ModelFolder(own), tmp_path / "4bit", NF4)
    folder = ModelFolder(tmp_path / "4bit")
    assert config_of(tmp_path / "4bit")["tie_word_embeddings"] is False
    assert read_config(folder) == read_config(ModelFolder(own))
    input_ids = np.random.default_rng(0).integers(0, 264, (1, 24)).astype(np.int32)
    logits = [
        np.asarray(engine.logits(weights, no_adapters(engine), input_ids))
        for engine, weights in map(load_model, (own, tmp_path / "4bit"))
    ]
    np.testing.assert_array_equal(*logits)


def test_a_flag_that_is_only_in_a_4_bit_folder(tmp_path: Path, own: Path) -> None:
    """As another program may write it: the flag left as it was."""
    quantize(ModelFolder(own), tmp_path / "4bit", NF4)
    config = config_of(tmp_path / "4bit") | {"tie_word_embeddings": True}
    (tmp_path / "4bit" / "config.json").write_text(json.dumps(config))
    assert not read_config(ModelFolder(tmp_path / "4bit")).tie_word_embeddings


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("replaced", [False, True])
def test_a_copy_of_the_embedding_stays_one(tmp_path: Path, replaced: bool) -> None:
    """An adapter that changes the embedding would leave the copy behind as another head."""
    model = with_head(tmp_path / "model", "copy")
    more: dict[str, Any] = {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True} if replaced else {}
    adapter = peft_adapter(tmp_path / "adapter", model, target_modules=["q_proj"], **more)
    stored = safetensors.numpy.load_file(adapter / WEIGHTS_FILE)
    kept = {name: tensor for name, tensor in stored.items() if NAMES.lm_head not in name}  # as some versions save it
    safetensors.numpy.save_file(kept, adapter / WEIGHTS_FILE, {"format": "pt"})
    run_merge(model, adapter, tmp_path / "merged", "original")
    merged = ModelFolder(tmp_path / "merged")
    assert (NAMES.lm_head in merged) is not replaced
    assert config_of(merged.path)["tie_word_embeddings"] is True and read_config(merged).tie_word_embeddings
    written = sum(path.stat().st_size for path in merged.path.glob("*.safetensors"))
    assert written <= merged_bytes(tensors_of(ModelFolder(model)), NAMES, ["q_proj"], "original")


# ----------------------------------------------------------------------------------------------------------------- dtypes

NORM, LINEAR = NAMES.norm(0, "input_layernorm"), NAMES.linear(1, "q_proj")


@pytest.mark.parametrize("name", [NORM, LINEAR, NAMES.embedding])
@pytest.mark.parametrize("dtype", [np.int64, np.uint8, np.int8, np.bool_, np.int32, np.uint16], ids=str)
def test_weights_of_integers_are_refused_by_name(tmp_path: Path, name: str, dtype: Any) -> None:
    def change(tensors: dict[str, np.ndarray]) -> None:
        tensors[name] = (tensors[name].astype(np.float32) * 10).astype(dtype)

    path = changed(tiny.write_model(tmp_path / "model"), change)
    with pytest.raises(InputError, match=rf"{name}: dtype \w+; weights are BF16, F16, F32, F64"):
        read_config(ModelFolder(path))


def test_weights_in_64_bits_are_rounded(tmp_path: Path) -> None:
    """As transformers does it, which loads a folder in the dtype that its config names."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    rng = np.random.default_rng(0)

    def change(tensors: dict[str, np.ndarray]) -> None:
        tensors[NAMES.embedding] = rng.standard_normal((264, 64))

    path = changed(tiny.write_model(tmp_path / "model"), change)
    _, weights = load_model(path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).model.embed_tokens.weight
    ours = np.asarray(weights.embedding["weight"])
    assert ours.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(ours.astype(np.float32), theirs.detach().float().numpy())


def test_8_bit_floats_are_refused_by_name(tmp_path: Path) -> None:
    path = tiny.write_model(tmp_path / "model") / "model.safetensors"
    text = path.read_bytes()
    length = int.from_bytes(text[:8], "little")
    header = json.loads(text[8 : 8 + length])
    header[NORM]["dtype"] = "F8_E4M3"
    changed_header = json.dumps(header).encode()
    path.write_bytes(len(changed_header).to_bytes(8, "little") + changed_header + text[8 + length :])
    with pytest.raises(InputError, match=rf"{NORM} has dtype F8_E4M3, which cannot be read; 8-bit floats"):
        ModelFolder(path.parent)
