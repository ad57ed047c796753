"""What a model folder brings along travels into merged and quantized folders, byte for byte; weights, pickles and code do not."""

import json
from pathlib import Path

import pytest

from convert.files import companions as companions_module
from convert.files.companions import companion_files, left_behind, tokenizer_files
from convert.files.folder import ModelFolder
from convert.files.sizes import companion_bytes
from convert.hub import TOKENIZER_FILES, UNWANTED_FILES, WANTED_FILES
from convert.merge import merge
from convert.quantize import quantize
from qlora_jax.config import QuantizationSettings
from tests.convert.test_merge import make_adapter, run_merge
from tests.helpers import tiny

CARRIED = [
    "LICENSE",
    "NOTICE",
    "USE_POLICY.md",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
    "merges.txt",
    "preprocessor_config.json",
    "processor_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "additional_chat_templates/rag.jinja",
    "additional_chat_templates/tool_use.jinja",
    "licenses/third/MIT.txt",
]
LEFT = [
    ".gitattributes",
    "README.md",
    "adapter_config.json",
    "adapter_model.safetensors",
    "modeling_llama.py",
    "pytorch_model.bin",
    "training_args.bin",
    "optimizer.pt",
    "state.pkl",
    "model.gguf",
    "pytorch_model.bin.index.json",
    "checkpoint-10/trainer_state.json",
    "checkpoint-10/tokenizer.json",
    "original/consolidated.00.pth",
    "original/params.json",
    "onnx/model.onnx",
    "adapter/adapter_config.json",
    "other/config.json",
    ".cache/huggingface/x.json",
    "__pycache__/x.txt",
    "custom_generate/generate.py",
]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A tiny model with a few bytes under each of these names, but those that are its tokenizer."""
    folder = tiny.write_model(tmp_path / "model")
    for name in CARRIED + LEFT:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            path.write_bytes(b"{}" if path.suffix == ".json" else f"{name}\r\n\xff".encode("latin-1"))
    (folder / "vocab.json").unlink()  # a tokenizer's, which would be read
    (folder / "vocab.json").write_text("{}")
    (folder / "loop").symlink_to(folder)
    return folder


def names_of(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_what_is_carried_and_what_is_not(model: Path) -> None:
    folder = ModelFolder(model)
    assert [path.relative_to(model).as_posix() for path in folder.companions()] == CARRIED
    assert companion_bytes(folder) == sum((model / name).stat().st_size for name in CARRIED)
    assert left_behind(model) == ["adapter_config.json", "modeling_llama.py"]


@pytest.mark.parametrize("verb", ["quantize", "merge"])
def test_byte_for_byte(model: Path, tmp_path: Path, verb: str) -> None:
    config = json.loads((model / "config.json").read_text()) | {"auto_map": {"AutoModel": "modeling_llama.Model"}}
    (model / "config.json").write_text(json.dumps(config))
    out = tmp_path / "out"
    if verb == "quantize":
        quantize(ModelFolder(model), out, QuantizationSettings())
    else:
        run_merge(model, make_adapter(tmp_path / "adapter", model), out, "original")
    assert names_of(out) == {*CARRIED, "config.json", "model.safetensors"}
    for name in CARRIED:
        assert (out / name).read_bytes() == (model / name).read_bytes()
    written = json.loads((out / "config.json").read_text())
    assert "auto_map" not in written, "it names code that is not there"


def test_transformers_loads_what_was_merged_from_a_folder_with_an_adapter_in_it(model: Path, tmp_path: Path) -> None:
    """With that adapter's config beside them it would take the weights for the adapter's."""
    transformers = pytest.importorskip("transformers")
    (model / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "no/such", "peft_type": "LORA"}))
    run_merge(model, make_adapter(tmp_path / "adapter", model), tmp_path / "out", "original")
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.vocab_size == 264


def test_too_many_below_are_none(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(companions_module, "MAX_COMPANIONS_BELOW", 2)
    assert not any(path.parent != model for path in companion_files(model))


def test_a_tokenizer_that_is_not_whole_is_none(tmp_path: Path, tiny_folder: Path) -> None:
    assert "tokenizer.json" in tokenizer_files(tiny_folder)
    assert tokenizer_files(tmp_path / "none") == {}
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert tokenizer_files(tmp_path) == {}


def test_a_merge_s_companions_are_the_adapter_s_where_it_brings_some(tmp_path: Path, tiny_folder: Path) -> None:
    from convert.adapters.adapter import load_adapter
    from convert.load import read_config

    folder = ModelFolder(tiny_folder)
    adapter = make_adapter(tmp_path / "adapter", tiny_folder)
    (adapter / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}")
    merge(folder, load_adapter(adapter, read_config(folder)), tmp_path / "out", "original")
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == (adapter / "chat_template.jinja").read_text()
    for name in ("tokenizer.json", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tiny_folder / name).read_bytes()


def test_the_hub_is_asked_for_templates_below() -> None:
    """And for nothing else of any folder."""
    from huggingface_hub.utils import filter_repo_objects

    there = [
        *CARRIED,
        *LEFT,
        "model.safetensors",
        "config.json",
        "original/tokenizer.model",
        "x/y.json",
        "x/a",
        "x/y.jinja",
    ]
    for patterns, weights in ((WANTED_FILES, {"model.safetensors"}), (TOKENIZER_FILES, set())):
        found = set(filter_repo_objects(there, allow_patterns=patterns, ignore_patterns=UNWANTED_FILES))
        below = {"additional_chat_templates/rag.jinja", "additional_chat_templates/tool_use.jinja", "x/y.jinja"}
        assert {name for name in found if "/" in name} == below
        assert weights | {"config.json", "tokenizer.model", "chat_template.jinja", "LICENSE"} <= found
