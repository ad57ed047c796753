"""GGUF files of every architecture and tensor type, against transformers' own reader and gguf-py."""

import json
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
import pytest
import transformers
from tokenizers import Regex, normalizers, pre_tokenizers

from convert.files.folder import ModelFolder
from convert.gguf import tensors
from convert.gguf.reader import write_model_folder
from convert.gguf.tensors import READ_TYPES
from qlora_jax.base.errors import InputError
from qlora_jax.model.families import read_architecture
from tests.helpers import gguf_files
from tests.helpers.gguf_files import BPE_TOKENS, HEAD_DIM, SETTINGS, bpe, write_architecture

TEXTS = [
    "",
    "abc ab  a   c 12 123",
    " abc\n\nab\n",
    "e\u0301 é it's Don'T",
    "<turn>abc<turn> <|endoftext|> <think>x",
    "▁a \x00 🙂 你",
    "   a",
]
LAST = len(BPE_TOKENS)
QUANTIZED = sorted(READ_TYPES - {"F32"})


@pytest.fixture(scope="module", params=list(SETTINGS))
def files(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `m.gguf`, of several types, and `out`, which it became."""
    folder = tmp_path_factory.mktemp(request.param)
    write_architecture(folder / "m.gguf", request.param, ("Q4_K", "Q6_K", "Q5_0", "Q8_0", "F16", "BF16", "Q3_K"))
    write_model_folder(folder / "m.gguf", folder / "out")
    return folder


def test_tensors_equal_the_reference(files: Path) -> None:
    """bfloat16 of what transformers reads in float32: after what is subtracted from norms and the order of rows."""
    torch = pytest.importorskip("torch")
    reference = transformers.AutoModelForCausalLM.from_pretrained(files, gguf_file="m.gguf", dtype=torch.float32)
    theirs = {name: tensor for name, tensor in reference.state_dict().items() if name != "lm_head.weight"}
    model = ModelFolder(files / "out")
    assert set(model.names) == set(theirs)
    for name, tensor in theirs.items():
        bits = tensor.to(torch.bfloat16).view(torch.int16).numpy()
        assert model.read(name).tobytes() == bits.tobytes(), name
    ours = transformers.AutoModelForCausalLM.from_pretrained(files / "out", dtype=torch.float32)
    assert type(ours) is type(reference)


def test_config_equals_the_reference(files: Path) -> None:
    ours = transformers.AutoConfig.from_pretrained(files / "out").to_dict()
    theirs = transformers.AutoConfig.from_pretrained(files, gguf_file="m.gguf").to_dict()
    differing = {key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key)}
    known = {"architectures", "dtype", "rms_norm_eps", "_name_or_path", "_model_name_or_path", "unk_token_id"}
    known |= {"query_pre_attn_scalar", "head_dim"}  # the reference keeps its class's 256, and has no head_dim in qwen2
    assert differing <= known
    config = json.loads((files / "out" / "config.json").read_text())
    assert ours["model_type"] == config["model_type"]
    assert read_architecture(config).head_dim == HEAD_DIM
    if "gemma" in config["model_type"]:
        assert config["query_pre_attn_scalar"] == HEAD_DIM


@pytest.mark.parametrize("text", TEXTS)
def test_tokens_equal_the_reference(files: Path, text: str) -> None:
    ours = transformers.AutoTokenizer.from_pretrained(files / "out")
    theirs = transformers.AutoTokenizer.from_pretrained(files, gguf_file="m.gguf")
    composed = ours.backend_tokenizer.normalizer if "qwen" in files.name else None
    given = composed.normalize_str(text) if composed is not None else text
    assert ours(text).input_ids == theirs(given).input_ids
    assert ours.decode(ours(text).input_ids, skip_special_tokens=True) == theirs.decode(
        theirs(given).input_ids, skip_special_tokens=True
    )
    for name in ("bos_token_id", "eos_token_id", "unk_token_id", "pad_token_id"):
        if (expected := getattr(theirs, name)) is not None:  # else a class's default
            assert getattr(ours, name) == expected


@pytest.mark.parametrize("kind", QUANTIZED)
def test_types_equal_the_library(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In pieces of three rows."""
    monkeypatch.setattr(tensors, "PIECE_VALUES", 3 * gguf_files.HIDDEN + 1)
    write_architecture(tmp_path / "m.gguf", "qwen2", (kind,))
    write_model_folder(tmp_path / "m.gguf", tmp_path / "out")
    model = ModelFolder(tmp_path / "out")
    theirs = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    for ours, name in (("mlp.down_proj", "ffn_down"), ("self_attn.k_proj", "attn_k")):
        tensor = theirs[f"blk.1.{name}.weight"]
        assert tensor.tensor_type.name == kind
        expected = gguf.dequantize(tensor.data, tensor.tensor_type).astype(ml_dtypes.bfloat16)
        assert np.isfinite(expected.astype(np.float32)).all()
        assert model.read(f"model.layers.1.{ours}.weight").tobytes() == expected.tobytes()


def converted(tmp_path: Path, architecture: str, **more: Any) -> dict[str, Any]:
    write_architecture(tmp_path / "m.gguf", architecture, **more)
    write_model_folder(tmp_path / "m.gguf", tmp_path / "out")
    return ModelFolder(tmp_path / "out").config


def llama3_divisors(factor: float, theta: float) -> np.ndarray:
    """llama.cpp's: one a frequency, by its length of wave."""
    divisors = []
    for i in range(HEAD_DIM // 2):
        wave = 2 * np.pi * theta ** (2 * i / HEAD_DIM)
        smooth = (8192 / wave - 1) / (4 - 1)
        inner = 1 / ((1 - smooth) / factor + smooth)
        divisors.append(1.0 if wave < 8192 / 4 else factor if wave > 8192 else inner)
    return np.array(divisors, np.float32)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama_3s_rope(tmp_path: Path, factor: float) -> None:
    divisors = {"rope_freqs.weight": llama3_divisors(factor, 5e5)}
    config = converted(tmp_path, "llama", values=divisors)
    assert config["rope_scaling"] == {
        **{"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        "original_max_position_embeddings": 8192,
    }
    plain = 5e5 ** (-np.arange(HEAD_DIM // 2) / (HEAD_DIM // 2))
    frequencies = read_architecture(config).kinds[0].rope.frequencies  # type: ignore[union-attr]
    np.testing.assert_allclose(frequencies, plain / divisors["rope_freqs.weight"], rtol=1e-6)


def test_scaled_ropes(tmp_path: Path) -> None:
    linear = {"rope__scaling__type": "linear", "rope__scaling__factor": 8.0}
    (tmp_path / "a").mkdir()
    config = converted(tmp_path / "a", "gemma3", **linear, rope__freq_base_swa=2e4)
    assert config["rope_scaling"] == {"rope_type": "linear", "factor": 8.0}
    assert config["rope_local_base_freq"] == 2e4
    (tmp_path / "b").mkdir()
    yarn = {"rope__scaling__type": "yarn", "rope__scaling__factor": 4.0, "rope__scaling__original_context_length": 32}
    config = converted(tmp_path / "b", "qwen3", **yarn)
    assert config["rope_scaling"] == {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}


def test_windows(tmp_path: Path) -> None:
    config = converted(tmp_path, "gemma3", attention__sliding_window_pattern=[False, True])
    assert config["layer_types"] == ["full_attention", "sliding_attention"]
    assert [kind.window for kind in read_architecture(config).kinds] == [None, 8]


def test_biases(tmp_path: Path) -> None:
    shapes = {
        f"blk.{i}.{name}.bias": gguf_files.WEIGHTS[name][:1]
        for i in range(2)
        for name in ("attn_q", "attn_k", "attn_v", "attn_output")
    }
    assert converted(tmp_path, "llama", tensors=shapes)["attention_bias"] is True
    theirs = {t.name: t.data for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors}["blk.1.attn_q.bias"]
    expected = theirs.reshape(2, 64, 2).swapaxes(1, 2).reshape(-1).astype(ml_dtypes.bfloat16)
    assert ModelFolder(tmp_path / "out").read("model.layers.1.self_attn.q_proj.bias").tobytes() == expected.tobytes()


def test_llama_3s_tokenizer(tmp_path: Path) -> None:
    """A piece that is a token is taken whole, though merges do not lead to it: the departure from transformers' reader."""
    converted(tmp_path, "llama", tokenizer=bpe("llama-bpe", bos_token_id=LAST - 2, add_bos_token=True))
    ours = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    assert ours.convert_ids_to_tokens(ours("whole").input_ids)[1:] == ["whole"]
    for text in TEXTS:
        assert ours(text).input_ids == theirs(text).input_ids
        assert ours(text).input_ids[:1] == [LAST - 2]


def test_qwens_text_is_composed(tmp_path: Path) -> None:
    converted(tmp_path, "qwen2")
    ours = transformers.AutoTokenizer.from_pretrained(tmp_path / "out").backend_tokenizer
    assert ours.normalizer.normalize_str("e\u0301") == normalizers.NFC().normalize_str("e\u0301") == "é"
    expected = pre_tokenizers.Split(Regex(transformers.models.qwen2.tokenization_qwen2.PRETOKENIZE_REGEX), "isolated")
    for text in TEXTS:
        pieces = [
            piece
            for piece, _ in pre_tokenizers.Sequence(
                [expected, pre_tokenizers.ByteLevel(False, use_regex=False)]
            ).pre_tokenize_str(text)
        ]
        assert [piece for piece, _ in ours.pre_tokenizer.pre_tokenize_str(text)] == pieces


@pytest.mark.parametrize(
    ("architecture", "change", "message"),
    [
        ("qwen3", {"attention__sliding_window": 8}, "qwen3.attention.sliding_window = 8"),
        ("gemma3", {"attention__sliding_window": None}, "no setting attention.sliding_window"),
        ("gemma3", {"attention__sliding_window_pattern": [True]}, "pattern of 1 layers"),
        ("gemma2", {"final_logit_softcapping": -1.0}, "expected a positive number"),
        ("llama", {"values": {"rope_freqs.weight": np.ones(3, np.float32)}}, "divisors of 3 frequencies"),
        ("llama", {"values": {"rope_freqs.weight": np.arange(1, 65, dtype=np.float32)}}, "up to 64"),
        ("llama", {"rope__scaling__type": "longrope", "rope__scaling__factor": 2.0}, "'longrope'"),
        ("llama", {"tensors": {"blk.0.attn_q.bias": (256,)}}, "missing: blk.0.attn_k.bias"),
        ("llama", {"rope__scaling__factor": 2.0}, "without rope.scaling.type"),
        ("gemma3", {"tokenizer": gguf_files.spm(scores=None)}, "no tokenizer.ggml.scores"),
        ("gemma3", {"tokenizer": gguf_files.spm(scores=[0.0])}, "1 tokenizer.ggml.scores"),
        ("gemma3", {"tokenizer": gguf_files.spm(tokens=["a"] * 277)}, "tokens that are there twice"),
        ("qwen2", {"tokenizer": bpe("qwen2", bos_token_id=3, add_bos_token=True)}, "'$' cannot be put before a text"),
        ("qwen2", {"tokenizer": bpe("viking")}, "'viking'"),
    ],
)
def test_refused(tmp_path: Path, architecture: str, change: dict[str, Any], message: str) -> None:
    write_architecture(tmp_path / "m.gguf", architecture, **change)
    with pytest.raises(InputError) as caught:
        write_model_folder(tmp_path / "m.gguf", tmp_path / "out")
    assert message in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]


def test_types_that_are_not_read(tmp_path: Path) -> None:
    write_architecture(tmp_path / "m.gguf", "qwen2", ("TQ2_0",))
    with pytest.raises(InputError, match="tensors of type TQ2_0"):
        write_model_folder(tmp_path / "m.gguf", tmp_path / "out")


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_damaged_files_end_in_one_error(tmp_path: Path, architecture: str) -> None:
    """Or in a model, where what was changed is a number that nothing can tell to be wrong."""
    divisors = {"rope_freqs.weight": llama3_divisors(8.0, 5e5)} if architecture == "llama" else {}
    write_architecture(tmp_path / "m.gguf", architecture, ("Q8_0",), values=divisors)
    whole = (tmp_path / "m.gguf").read_bytes()
    rng = np.random.default_rng(0)
    refused = 0
    for number in range(40):
        damaged = bytearray(whole)
        for place in rng.integers(24, 12_000 if number % 2 else 1_000, 1 + number % 3):
            damaged[place] = rng.integers(256)
        (tmp_path / "m.gguf").write_bytes(damaged)
        try:
            write_model_folder(tmp_path / "m.gguf", tmp_path / f"out{number}")
        except InputError:
            refused += 1
    assert refused > 10
