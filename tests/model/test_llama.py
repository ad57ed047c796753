"""The model against transformers on the same weights, and the config keys it reads, checks, or may overlook."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import transformers

from convert.files.folder import ModelFolder
from convert.load import load_weights, read_config
from qlora_jax.base.errors import InputError
from qlora_jax.config import QuantizationSettings
from qlora_jax.engine.engine import Engine, Weights
from qlora_jax.model.architecture import Rope
from qlora_jax.model.attention import rotate
from qlora_jax.model.families import plain_frequencies, read_architecture
from qlora_jax.model.norms import RMSNorm
from qlora_jax.ops import nf4
from tests.helpers import tiny
from tests.helpers.tiny import LINEAR_NAMES

F32_EPS = float(np.finfo(np.float32).eps)
BF16_ROUNDING = 2.0**-8  # half a step of an 8-bit significand, relative
LOGITS_RTOL = 1e-4  # of the largest logit; float32 sums in another order through every layer


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jitted"])
def test_a_norm_and_what_goes_past_it(dtype: Any, jitted: bool) -> None:
    """The same function and the same gradient as without a backward pass of its own."""
    rng = np.random.default_rng(0)
    norm = RMSNorm(64, 1e-5)
    norm.weight[...] = jnp.asarray(1 + 0.1 * rng.standard_normal(64), jnp.bfloat16)
    x, *grads = (jnp.asarray(rng.standard_normal((2, 5, 64)), dtype) for _ in range(3))

    def run(both: Any) -> Any:
        outputs, pull = jax.vjp(both, x)
        return *outputs, *pull(tuple(grads))

    found, expected = (
        (jax.jit(run, static_argnums=0) if jitted else run)(both) for both in (norm.and_skip, lambda x: (norm(x), x))
    )
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_norm_keeps_what_it_was_given() -> None:
    norm, x = RMSNorm(64, 1e-5), jnp.ones((2, 5, 64), jnp.bfloat16)

    def kept(function: Any) -> int:
        return sum(leaf.size for leaf in jax.tree.leaves(jax.vjp(function, x)[1]))

    assert kept(norm.and_skip) == x.size + 64  # and its weight
    assert kept(norm) > kept(norm.and_skip)


def load_model(path: Path) -> tuple[Engine, Weights]:
    """A folder's base model, in float32 on NF4 weights."""
    folder = ModelFolder(path)
    config, quantization = read_config(folder), QuantizationSettings()
    return Engine(config, None, quantization, compute_dtype=jnp.float32), load_weights(
        folder, config, quantization, "device"
    )


def no_adapters(engine: Engine) -> list[dict[str, Any]]:
    return [{} for _ in range(engine.config.num_hidden_layers)]


def transformers_model(path: Path, weights: Weights) -> Any:
    """The folder in transformers, in float32, with each linear of a decoder layer holding `weights`' dequantized values."""
    torch = pytest.importorskip("torch")
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    dequantize = jax.jit(nf4.dequantize)
    for index, layer in weights.layers.walk(range(len(weights.layers))):
        for name in LINEAR_NAMES:
            part = model.model.layers[index].self_attn if name in LINEAR_NAMES[:4] else model.model.layers[index].mlp
            parameter = getattr(part, name).weight
            values = torch.from_numpy(np.array(dequantize(layer[name]["weight"]), np.float32))
            assert values.shape == parameter.shape
            assert not torch.equal(values, parameter)  # quantization shows
            parameter.data = values
    return model


def relative_difference(found: Any, expected: Any) -> float:
    return float(np.abs(np.asarray(found) - expected).max() / np.abs(expected).max())


# ---------------------------------------------------------------------------------------------------------------- logits

NEW_STYLE = {"rope_theta": 700.0, "rope_type": "default"}
VARIANTS = {
    "grouped heads, tied": {},
    "one kv head, untied": {"num_key_value_heads": 1, "tie_word_embeddings": False},
    "as many kv heads": {"num_key_value_heads": 4},
    "kv heads left out": {"num_key_value_heads": None},
    "rms_norm_eps": {"rms_norm_eps": 0.3},
    "rope_theta": {"rope_theta": 100.0},
    "rope_parameters": {"rope_parameters": NEW_STYLE, "rope_theta": ...},
    "rope_parameters beside rope_theta": {"rope_parameters": NEW_STYLE},
    "rope_scaling that does not scale": {"rope_scaling": {"rope_type": "default", "rope_theta": 700.0}},
    "wide heads, untied": {"head_dim": 32, "tie_word_embeddings": False},
    "narrow heads": {"head_dim": 8},
    "keys left out": {"rms_norm_eps": ..., "rope_theta": ..., "tie_word_embeddings": ..., "num_key_value_heads": ...},
}


def write_variant(folder: Path, changes: dict[str, Any]) -> Path:
    """A tiny model with config keys changed, or left out where the change is `...`."""
    kept = {key: value for key, value in changes.items() if value is not ...}
    left_out = {"num_key_value_heads": 4, "tie_word_embeddings": False}  # what their absence means
    tiny.write_model(folder, **{**kept, **{key: left_out[key] for key in changes.keys() & left_out if key not in kept}})
    config = json.loads((folder / "config.json").read_text())
    for key in changes.keys() - kept.keys():
        del config[key]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
def test_logits_equal_transformers(tmp_path: Path, changes: dict[str, Any]) -> None:
    torch = pytest.importorskip("torch")
    path = write_variant(tmp_path / "model", changes)
    engine, weights = load_model(path)
    input_ids = np.random.default_rng(0).integers(0, engine.config.vocab_size, (2, 24)).astype(np.int32)
    with torch.no_grad():
        expected = transformers_model(path, weights)(torch.from_numpy(input_ids).long()).logits.numpy()
    found = engine.logits(weights, no_adapters(engine), input_ids)
    assert (found.shape, found.dtype) == ((2, 24, engine.config.vocab_size), jnp.float32)
    assert relative_difference(found, expected) < LOGITS_RTOL


def test_logits_without_quantization_equal_transformers(tiny_folder: Path) -> None:
    """The linears' own bfloat16 matrices in the place of 4-bit weights; gradients too reach the adapters only."""
    torch = pytest.importorskip("torch")
    folder = ModelFolder(tiny_folder)
    engine, _ = load_model(tiny_folder)
    weights = load_weights(folder, engine.config, None, "device")
    input_ids = np.random.default_rng(0).integers(0, engine.config.vocab_size, (2, 24)).astype(np.int32)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = theirs(torch.from_numpy(input_ids).long()).logits.numpy()
    assert relative_difference(engine.logits(weights, no_adapters(engine), input_ids), expected) < LOGITS_RTOL


@pytest.mark.parametrize("name", ["rms_norm_eps", "rope_theta", "rope_parameters"])
def test_logits_would_show_an_overlooked_key(tiny_folder: Path, name: str) -> None:
    """The variants above change the logits by far more than the tolerance: an engine that ignored the key would fail there."""
    engine, weights = load_model(tiny_folder)
    config = read_architecture(tiny.hf_config(**{k: v for k, v in VARIANTS[name].items() if v is not ...}))
    other = Engine(config, None, QuantizationSettings(), compute_dtype=jnp.float32)
    input_ids = np.random.default_rng(0).integers(0, engine.config.vocab_size, (2, 24)).astype(np.int32)
    found, expected = (np.asarray(e.logits(weights, no_adapters(e), input_ids)) for e in (other, engine))
    assert relative_difference(found, expected) > 10 * LOGITS_RTOL


def test_logits_of_a_real_model_equal_transformers(smollm2_folder: Path) -> None:
    torch = pytest.importorskip("torch")
    engine, weights = load_model(smollm2_folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2_folder)
    text = "Gravity is a force by which a planet or other body draws objects toward its center. The"
    input_ids = np.array([tokenizer(text)["input_ids"]], np.int32)
    assert 16 <= input_ids.size <= 24
    with torch.no_grad():
        expected = transformers_model(smollm2_folder, weights)(torch.from_numpy(input_ids).long()).logits.numpy()
    found = np.asarray(engine.logits(weights, no_adapters(engine), input_ids))
    assert relative_difference(found, expected) < LOGITS_RTOL
    np.testing.assert_array_equal(found.argmax(-1), expected.argmax(-1))
    log_probabilities = expected[0] - np.log(np.exp(expected[0]).sum(-1, keepdims=True))
    a_language_model_s, a_guess_s = 6.0, np.log(engine.config.vocab_size)  # nats a token
    assert -log_probabilities[np.arange(input_ids.size - 1), input_ids[0, 1:]].mean() < a_language_model_s < a_guess_s


# ---------------------------------------------------------------------------------------------------------------- config

# Every key of transformers' LlamaConfig is in one of these three.
READ = {
    "vocab_size": 100,
    "hidden_size": 128,
    "intermediate_size": 100,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "rms_norm_eps": 1e-3,
    "rope_theta": 123.0,
    "rope_parameters": {"rope_theta": 123.0, "rope_type": "default"},
    "rope_scaling": {"type": "linear", "factor": 2.0},
    "tie_word_embeddings": False,
    "attention_bias": True,
    "mlp_bias": True,
    "attention_dropout": 0.1,
}
REFUSED = {
    "model_type": ["mixtral", "a new one", None],
    "hidden_act": ["gelu", "relu"],
    "is_causal": [False],
    "sliding_window": [256],
    "a_new_key": [2, True, "yes", [1]],
    "layer_types": [["full_attention", "sliding_attention"]],
    "partial_rotary_factor": [0.5],
}
HARMLESS = {
    # Who saved it, how, and under which name.
    *("_name_or_path", "architectures", "transformers_version", "dtype", "torch_dtype"),
    # Training and initialisation elsewhere; ours has its own settings.
    *("initializer_range", "id2label", "label2id", "problem_type"),
    # How transformers' forward and generate behave, and what they return.
    *("use_cache", "return_dict", "output_attentions", "output_hidden_states", "chunk_size_feed_forward", "is_encoder_decoder"),
    # Token ids that the tokenizer and generation_config.json settle.
    *("bos_token_id", "eos_token_id", "pad_token_id"),
    # How older versions of transformers cut the products up.
    "pretraining_tp",
    # A length to warn about; without rope scaling it changes no value.
    "max_position_embeddings",
}  # fmt: skip


def test_every_key_of_transformers_is_read_checked_or_harmless() -> None:
    keys = set(transformers.LlamaConfig().to_dict())
    assert keys - (READ.keys() | REFUSED.keys() | HARMLESS) == set()
    assert not HARMLESS & (READ.keys() | REFUSED.keys())


@pytest.mark.parametrize("key", READ)
def test_read_keys_matter(key: str) -> None:
    config = tiny.hf_config()
    changed = read_architecture({**config, key: READ[key]})
    assert changed != read_architecture(config)
    if hasattr(changed, key):
        assert getattr(changed, key) == READ[key]


@pytest.mark.parametrize("key", sorted(HARMLESS))
def test_harmless_keys_do_not_matter(key: str) -> None:
    assert read_architecture(tiny.hf_config(**{key: 7})) == read_architecture(tiny.hf_config())


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in REFUSED.items() for value in values])
def test_unsupported_values_are_refused_by_name(key: str, value: Any) -> None:
    with pytest.raises(InputError) as error:
        read_architecture(tiny.hf_config(**{key: value}), "here/config.json")
    assert error.value.where == "here/config.json"
    assert error.value.found.startswith(f"{key} is {value!r}")
    assert ";" not in error.value.found  # that one alone


NEUTRAL = {
    "as older copies have it": {"pretraining_tp": 2},
    "nulls": {"pretraining_tp": None, "attention_dropout": None, "rope_scaling": None, "sliding_window": None},
    "another name": {"hidden_act": "swish"},
    "default rope": {"rope_scaling": {"type": "default"}},
    "default parameters": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0}},
    "scaled by one": {"rope_scaling": {"type": "linear", "factor": 1.0}},
    "llama3, by one": {
        "rope_scaling": {
            "rope_type": "llama3", "factor": 1.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 512,
        }
    },
    "a wide window": {"sliding_window": 512},
    "a window not used": {"sliding_window": 4, "use_sliding_window": False},
    "full attention": {"layer_types": ["full_attention"] * 2},
    "all of a head rotated": {"partial_rotary_factor": 1.0},
    "the head's size": {"head_dim": 16},
    "only in training": {"attention_dropout": 0.5},
    "a quantization of nothing": {
        "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": False, "load_in_8bit": False}
    },
}  # fmt: skip


@pytest.mark.parametrize("changes", NEUTRAL.values(), ids=NEUTRAL.keys())
def test_keys_without_effect_are_not_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    """Nor have they one in transformers: equal logits, bit for bit."""
    torch = pytest.importorskip("torch")
    folder = tiny.write_model(tmp_path / "model")
    plain = ModelFolder(folder).config
    ours, ids = read_config(ModelFolder(folder)), torch.arange(3, 60)[None]
    logits = []
    for config in (plain, {**plain, **changes}):
        (folder / "config.json").write_text(json.dumps(config))
        with torch.no_grad():
            logits.append(transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits)
    torch.testing.assert_close(*logits, rtol=0, atol=0)
    dropout = changes.get("attention_dropout") or 0.0
    assert read_config(ModelFolder(folder)) == dataclasses.replace(ours, attention_dropout=dropout)


def test_advice_on_keys_that_transformers_ignores() -> None:
    with pytest.raises(InputError, match="as transformers runs it, remove sliding_window and logit_softcapping from"):
        read_architecture(tiny.hf_config(sliding_window=4, logit_softcapping=30.0))
    with pytest.raises(InputError) as caught:
        read_architecture(tiny.hf_config(sliding_window=4, hidden_act="relu"))
    assert caught.value.fix == "use another base model"


def test_all_problems_are_named_at_once() -> None:
    config = tiny.hf_config(**{key: values[0] for key, values in REFUSED.items()})
    del config["vocab_size"], config["hidden_size"]
    with pytest.raises(InputError) as error:
        read_architecture(config)
    assert {problem.split()[0] for problem in error.value.found.split("; ")} == {*REFUSED, "vocab_size", "hidden_size"}


@pytest.mark.parametrize(
    "key", ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
)
def test_missing_keys_are_named(key: str) -> None:
    config = tiny.hf_config()
    del config[key]
    with pytest.raises(InputError) as error:
        read_architecture(config)
    assert error.value.found == f"{key} is missing"


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"num_hidden_layers": 2**31}, "num_hidden_layers is 2147483648, expected a whole number from 1 to 10000"),
        ({"hidden_size": "64"}, "hidden_size is '64', expected a whole number"),
        ({"vocab_size": True}, "vocab_size is True, expected a whole number"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0, expected a whole number"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is no multiple of num_key_value_heads 3"),
        ({"hidden_size": 66}, "hidden_size 66 is no multiple of num_attention_heads 4, and there is no head_dim"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan, expected a positive number"),
        ({"rope_parameters": {"rope_theta": []}, "rope_theta": "x"}, "rope_theta is 'x', expected a positive number"),
        ({"rope_scaling": [1]}, "rope_scaling is [1], expected an object with a rope_type"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no', expected true or false"),
    ],
)
def test_what_is_no_such_number(changes: dict[str, Any], found: str) -> None:
    with pytest.raises(InputError, match=re.escape(found)):
        read_architecture(tiny.hf_config(**changes))


def test_defaults_are_those_of_transformers() -> None:
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    required = {name: tiny.hf_config()[name] for name in names}
    expected = transformers.LlamaConfig(**required).to_dict()
    config = read_architecture(required)
    assert config == read_architecture(expected)
    for name in ("num_key_value_heads", "head_dim", "tie_word_embeddings"):
        assert getattr(config, name) == expected[name]
    assert config.norms.eps == expected["rms_norm_eps"]
    assert config.kinds[0].rope == rope_of(expected["rope_parameters"]["rope_theta"], config.head_dim)


def test_shapes_of_the_linears() -> None:
    config = read_architecture(tiny.hf_config(head_dim=24))
    q, kv, hidden, mlp = 4 * 24, 2 * 24, 64, 128
    expected = [(q, hidden), (kv, hidden), (kv, hidden), (hidden, q), (mlp, hidden), (mlp, hidden), (hidden, mlp)]
    assert list(config.linear_shapes().items()) == list(zip(LINEAR_NAMES, expected, strict=True))


# ------------------------------------------------------------------------------------------------------------------ RoPE


def rope_of(theta: float, features: int) -> Rope:
    return Rope(frequencies=plain_frequencies(theta, features))


def slow_rotate(x: np.ndarray, positions: list[int], theta: float) -> np.ndarray:
    """Pairs (i, i + P/2) as complex numbers times exp(j · position · theta^(-2i/P)), in float64. x [B, T, heads, P]."""
    half = x.shape[-1] // 2
    pairs = x[..., :half].astype(np.float64) + 1j * x[..., half:].astype(np.float64)
    angles = np.array(positions)[:, None, None] * theta ** (-np.arange(half) / half)
    turned = pairs * np.exp(1j * angles)
    return np.concatenate([turned.real, turned.imag], axis=-1)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float32])
@pytest.mark.parametrize("theta", [1e4, 5e5])
def test_rope_equals_a_float64_oracle(dtype: Any, theta: float) -> None:
    positions, head_dim = [0, 1, 255, 256, 257, 4095], 64
    x = np.random.default_rng(0).standard_normal((2, len(positions), 3, head_dim)).astype(dtype)
    found = rotate(jnp.asarray(x), jnp.tile(jnp.array(positions), (2, 1)), rope_of(theta, x.shape[-1]))
    assert found.dtype == dtype
    exact = slow_rotate(x, positions, theta)

    exponents = np.arange(head_dim // 2) / (head_dim // 2)
    angles = np.array(positions)[:, None, None] * theta**-exponents
    # Relative errors of a frequency: of its exponent, times log theta; of the power; of the product with the position.
    angle_rounding = angles * (exponents * np.log(theta) + 4) * F32_EPS
    length = np.hypot(*np.split(x.astype(np.float64), 2, axis=-1))
    allowed = np.tile(length * (angle_rounding + 4 * F32_EPS), 2)
    allowed += (0 if dtype is np.float32 else BF16_ROUNDING) * (np.abs(exact) + allowed)
    assert (np.abs(np.asarray(found, np.float64) - exact) <= allowed).all()


def test_rope_tells_neighbouring_positions_apart_in_bfloat16() -> None:
    """Positions 256 and 257 are one number in bfloat16; the angles are not computed in it."""
    assert jnp.bfloat16(256) == jnp.bfloat16(257)
    x = np.zeros((1, 2, 1, 64), ml_dtypes.bfloat16)
    x[..., :32] = 1  # so that the first half comes out as cosines
    at_256, at_257 = np.asarray(rotate(jnp.asarray(x), jnp.array([[256, 257]]), rope_of(1e4, x.shape[-1])), np.float64)[
        0, :, 0
    ]
    assert abs(at_256[0] - np.cos(256)) <= BF16_ROUNDING  # the fastest pair turns by a radian a position
    assert abs(at_257[0] - np.cos(257)) <= BF16_ROUNDING
    assert abs(np.cos(256) - np.cos(257)) > 0.8


def test_rope_makes_scores_depend_on_distance_only() -> None:
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.standard_normal((1, 1, 1, 64)), jnp.float32) for _ in range(2))

    def score(q_position: int, k_position: int) -> float:
        turned_q, turned_k = (
            rotate(each, jnp.array([[at]]), rope_of(1e4, q.shape[-1]))
            for each, at in ((q, q_position), (k, k_position))
        )
        return float(jnp.sum(turned_q * turned_k))

    near = 100 * 4 * F32_EPS * float(jnp.linalg.norm(q) * jnp.linalg.norm(k))  # angles up to 100
    assert abs(score(7, 3) - score(100, 96)) <= near
    assert abs(score(7, 3) - score(7, 4)) > 10 * near
