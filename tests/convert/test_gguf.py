"""A GGUF file, converted, against transformers' own GGUF reader; and every GGUF file that is refused."""

import json
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
import pytest
import transformers
from tokenizers import pre_tokenizers

from convert.files.folder import ModelFolder
from convert.gguf.packages import SMOLLM2_ID, download_gguf
from convert.gguf.reader import write_model_folder
from convert.hub import cache_dir
from qlora_jax.base.errors import InputError

TEXTS = [
    "",
    "Hello, world! It's what we've tested: isn't it?",
    "In 2024, 12345 people paid $1,234.50 (or 7%).",
    "v1.2.3 and 0x7f, x2y2",
    "  leading, trailing and   inner spaces  ",
    "tabs\tand\nnew\n\n\nlines\r\n  indented\n",
    "naïve café, größer, ελληνικά, русский, 你好世界, こんにちは, عربى, עברית",
    "🙂👩‍👩‍👧‍👦🇫🇷 e\u0301 \u200b\u00a0\ufeff",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|><file_sep> <|im_start |>",
    "def f(x):\n    return x**2  # squared\n",
    "\x00\x01\x7f",
]
CHAT = [{"role": "user", "content": "What is gravity?"}]
ANSWER = "Gravity is a fundamental concept in physics that describes the curvature of spacetime"


@pytest.fixture(scope="module")
def smollm2_gguf() -> Path:
    """The GGUF file itself, for the comparison; kept in the cache, 98 MB."""
    folder = cache_dir() / "tests"
    folder.mkdir(parents=True, exist_ok=True)
    found = list(folder.glob("*mol*.gguf"))
    return found[0] if found else download_gguf(SMOLLM2_ID, folder, print)


@pytest.fixture(scope="module")
def converted(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Converted anew, so that it is today's code that is tested."""
    folder = tmp_path_factory.mktemp("converted") / "SmolLM2"
    write_model_folder(smollm2_gguf, folder)
    return folder


@pytest.fixture(scope="module")
def reference(smollm2_gguf: Path) -> dict[str, Any]:
    """The file as transformers reads it: `config`, and `tensors` in float32. Not from_pretrained, which takes 25 s."""
    torch = pytest.importorskip("torch")
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(num_hidden_layers=30))  # for its names
    return load_gguf_checkpoint(str(smollm2_gguf), return_tensors=True, model_to_load=model)


@pytest.fixture(scope="module")
def reference_tokenizer(smollm2_gguf: Path) -> Any:
    pytest.importorskip("torch")
    return transformers.AutoTokenizer.from_pretrained(smollm2_gguf.parent, gguf_file=smollm2_gguf.name)


@pytest.fixture(scope="module")
def tokenizer(converted: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(converted)


def test_files(converted: Path) -> None:
    model = ModelFolder(converted)
    assert model.shards == ["model.safetensors"]
    assert model.metadata("model.safetensors") == {"format": "pt"}
    assert {model.spec(name).dtype for name in model.names} == {"BF16"}
    assert [p.name for p in model.companions()] == [
        "chat_template.jinja",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert [p.name for p in converted.parent.iterdir()] == ["SmolLM2"]


def test_tensors_equal_the_reference(converted: Path, reference: dict[str, Any]) -> None:
    import torch

    model = ModelFolder(converted)
    theirs = reference["tensors"]
    assert set(model.names) == set(theirs)
    for name, tensor in theirs.items():
        bits = tensor.to(torch.bfloat16).view(torch.int16).numpy()
        assert model.spec(name).shape == tuple(tensor.shape)
        assert model.read_bytes(name) == bits.tobytes(), name


def test_config_equals_the_reference(converted: Path, reference: dict[str, Any]) -> None:
    ours = transformers.AutoConfig.from_pretrained(converted).to_dict()
    theirs = transformers.AutoConfig.for_model(**reference["config"]).to_dict()
    assert ours["architectures"] == ["LlamaForCausalLM"]
    assert ours["rms_norm_eps"] == 1e-5
    assert np.float32(theirs["rms_norm_eps"]) == np.float32(1e-5)
    assert ours["rope_parameters"] == {"rope_theta": 100_000, "rope_type": "default"}
    differing = {key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key)}
    assert differing <= {
        "architectures",
        "dtype",
        "rms_norm_eps",
        "_name_or_path",
        "_model_name_or_path",
        "unk_token_id",
    }
    on_disk = json.loads((converted / "config.json").read_text())
    assert (on_disk["rope_theta"], on_disk["torch_dtype"]) == (100_000, "bfloat16")


@pytest.mark.parametrize("text", TEXTS)
def test_tokens_equal_the_reference(tokenizer: Any, reference_tokenizer: Any, text: str) -> None:
    ids = tokenizer(text).input_ids
    assert ids == reference_tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(ids, skip_special_tokens=True) == reference_tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("text", ["a  12", "x\n\n7", "   3   4", "x² ²³ ½ Ⅷ ٣٤", *TEXTS])
def test_digits_are_cut_off_first(tokenizer: Any, reference_tokenizer: Any, text: str) -> None:
    """The departure from transformers' reader: two spaces before a digit are one token, as in the model's training."""
    cut = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)])
    backend = type(reference_tokenizer.backend_tokenizer).from_str(reference_tokenizer.backend_tokenizer.to_str())
    backend.pre_tokenizer = cut
    assert tokenizer(text).input_ids == backend.encode(text).ids


def test_two_spaces_before_digits(tokenizer: Any) -> None:
    assert tokenizer.tokenize("a  12") == ["a", "ĠĠ", "1", "2"]


def test_special_tokens(tokenizer: Any, reference_tokenizer: Any) -> None:
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id"):
        assert getattr(tokenizer, name) == getattr(reference_tokenizer, name)
    assert len(tokenizer) == len(reference_tokenizer) == 49152
    assert sorted(tokenizer.added_tokens_decoder) == sorted(reference_tokenizer.added_tokens_decoder)
    assert all(token.special for token in tokenizer.added_tokens_decoder.values())


@pytest.mark.parametrize("generation", [False, True])
def test_chat_template_equals_the_reference(tokenizer: Any, reference_tokenizer: Any, generation: bool) -> None:
    for chat in (CHAT, [{"role": "system", "content": "S"}, *CHAT, {"role": "assistant", "content": "G"}]):
        ours = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=generation)
        assert ours == reference_tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=generation)
        assert ours.startswith("<|im_start|>system\n")


def test_the_model_answers(converted: Path, tokenizer: Any) -> None:
    torch = pytest.importorskip("torch")
    model = transformers.AutoModelForCausalLM.from_pretrained(converted, dtype=torch.float32)
    inputs = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    out = model.generate(**inputs, max_new_tokens=18, do_sample=False)
    answer = tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert answer.startswith(ANSWER)


HIDDEN, HEADS, KV_HEADS, MLP = 8, 2, 1, 12
TOKENS = ["<s>", "</s>", "a", "b", "ab"]


def write_gguf(
    path: Path, *, architecture: str = "llama", drop: tuple[str, ...] = (), **extra: Any
) -> dict[str, np.ndarray]:
    """A one-layer model, untied; `extra` adds or replaces settings (`__` for a dot). Returns its tensors."""
    writer = gguf.GGUFWriter(path, architecture)
    settings = {f"{architecture}.{key}": value for key, value in TINY_SETTINGS.items()}
    settings |= {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm", "tokenizer.ggml.tokens": TOKENS}
    settings |= {"tokenizer.ggml.token_type": [3, 3, 1, 1, 1], "tokenizer.ggml.merges": ["a b"]}
    settings |= {key.replace("__", "."): value for key, value in extra.items() if key.partition("__")[1]}
    for key, value in settings.items():
        if key not in drop:
            add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
            add.get(type(value), writer.add_array)(key, value)
    rng = np.random.default_rng(0)
    shapes = {name: shape for name, shape in TINY_SHAPES.items() if name not in drop} | extra.get("tensors", {})
    tensors = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


TINY_SETTINGS = {
    "block_count": 1,
    "context_length": 32,
    "embedding_length": HIDDEN,
    "feed_forward_length": MLP,
    "attention.head_count": HEADS,
    "attention.head_count_kv": KV_HEADS,
    "attention.layer_norm_rms_epsilon": 1e-6,
}
TINY_SHAPES: dict[str, tuple[int, ...]] = {
    "token_embd.weight": (len(TOKENS), HIDDEN),
    "blk.0.attn_norm.weight": (HIDDEN,),
    "blk.0.attn_q.weight": (HIDDEN, HIDDEN),
    "blk.0.attn_k.weight": (HIDDEN // HEADS * KV_HEADS, HIDDEN),
    "blk.0.attn_v.weight": (HIDDEN // HEADS * KV_HEADS, HIDDEN),
    "blk.0.attn_output.weight": (HIDDEN, HIDDEN),
    "blk.0.ffn_norm.weight": (HIDDEN,),
    "blk.0.ffn_gate.weight": (MLP, HIDDEN),
    "blk.0.ffn_up.weight": (MLP, HIDDEN),
    "blk.0.ffn_down.weight": (HIDDEN, MLP),
    "output_norm.weight": (HIDDEN,),
    "output.weight": (len(TOKENS), HIDDEN),
}


def test_an_untied_model(tmp_path: Path) -> None:
    theirs = write_gguf(tmp_path / "m.gguf")
    write_model_folder(tmp_path / "m.gguf", tmp_path / "out")
    model = ModelFolder(tmp_path / "out")
    assert model.config["tie_word_embeddings"] is False
    assert (model.config["rope_theta"], model.config["rms_norm_eps"], model.config["head_dim"]) == (10000.0, 1e-6, 4)
    assert model.names[-1] == "lm_head.weight"
    expected = theirs["output.weight"].astype(ml_dtypes.bfloat16)
    assert model.read("lm_head.weight").tobytes() == expected.tobytes()
    # Two heads of four rows: llama.cpp keeps rotation pairs (0, 2), (1, 3) next to each other.
    q = theirs["blk.0.attn_q.weight"][[0, 2, 1, 3, 4, 6, 5, 7]].astype(ml_dtypes.bfloat16)
    assert model.read("model.layers.0.self_attn.q_proj.weight").tobytes() == q.tobytes()
    assert not (tmp_path / "out" / "chat_template.jinja").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architecture": "phi3"}, "architecture 'phi3'"),
        ({"llama__rope__scaling__type": "linear"}, "rope.scaling.type = 'linear', factor None"),
        ({"llama__rope__scaling__factor": 2.0}, "rope.scaling.factor = 2.0"),
        ({"llama__expert_count": 8}, "llama.expert_count = 8"),
        ({"split__count": 2}, "split.count = 2"),
        ({"llama__rope__dimension_count": 2}, "blk.0.attn_v.weight is [4, 8], expected [2, 8]"),
        ({"drop": ("llama.attention.layer_norm_rms_epsilon",)}, "no setting llama.attention.layer_norm_rms_epsilon"),
        ({"drop": ("blk.0.ffn_up.weight",)}, "missing: blk.0.ffn_up.weight"),
        ({"tensors": {"rope_freqs.weight": (2,)}}, "divisors of 2 frequencies"),
        ({"tensors": {"output_norm.weight": (4,)}}, "output_norm.weight is [4], expected [8]"),
        ({"tokenizer__ggml__model": "bert"}, "tokenizer.ggml.model = 'bert', expected 'gpt2' or 'llama'"),
        ({"tokenizer__ggml__pre": "chameleon"}, "tokenizer.ggml.pre = 'chameleon', expected one of"),
        ({"tokenizer__ggml__add_eos_token": True}, "tokenizer.ggml.add_eos_token = True, expected False"),
        ({"tokenizer__ggml__precompiled_charsmap": "x"}, "tokenizer.ggml.precompiled_charsmap is not supported"),
        ({"drop": ("tokenizer.ggml.merges",)}, "no tokenizer.ggml.merges"),
    ],
)
def test_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    write_gguf(tmp_path / "m.gguf", **change)
    with pytest.raises(InputError) as caught:
        write_model_folder(tmp_path / "m.gguf", tmp_path / "out")
    assert message in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]


@pytest.mark.parametrize("keep", [0, 3, 100, 700, -64])
def test_truncated(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "m.gguf"
    write_gguf(path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(InputError, match="not a whole GGUF file"):
        write_model_folder(path, tmp_path / "out")


def test_missing_file_and_existing_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        write_model_folder(tmp_path / "m.gguf", tmp_path / "out")
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match="already there"):
        write_model_folder(tmp_path / "m.gguf", tmp_path / "out")
