"""Adapters go to PEFT and come back: the same numbers in the file, the same function in the model, and refusals by name."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from convert.adapters.adapter import WEIGHTS_FILE, as_adapters, load_adapter, save_adapter
from convert.adapters.config import CONFIG_FILE
from convert.files.folder import ModelFolder
from convert.files.names import ADAPTER_PARTS
from convert.load import load_weights, read_bfloat16, read_config
from qlora_jax.base.errors import InputError
from qlora_jax.config import LoraSettings, QuantizationSettings
from qlora_jax.engine.engine import Adapters, Engine, Weights
from qlora_jax.model.architecture import Architecture
from qlora_jax.ops import nf4
from tests.helpers import tiny
from tests.helpers.tiny import ARCHITECTURE, LINEAR_NAMES, NAMES

FLOAT32_TWO_LAYERS = 1e-4
"""Relative to the largest logit: float32 sums of 64 to 128 products in another order, ~1e-6 each, through two layers and a norm."""
RANK, ALPHA = 4, 16.0
ALL = LoraSettings(r=RANK, lora_alpha=ALPHA, lora_dropout=0.1)
QUANTIZATION = QuantizationSettings()
INPUT_IDS = np.random.default_rng(0).integers(0, 256, (2, 24)).astype(np.int32)


@pytest.fixture(scope="module")
def folder(tiny_folder: Path) -> ModelFolder:
    return ModelFolder(tiny_folder)


@pytest.fixture(scope="module")
def config(folder: ModelFolder) -> Architecture:
    return read_config(folder)


@pytest.fixture(scope="module")
def weights(folder: ModelFolder, config: Architecture) -> Weights:
    return load_weights(folder, config, QUANTIZATION, "device")


def random_adapters(config: Architecture, lora: LoraSettings, seed: int = 0) -> Adapters:
    """A and B both random, so that the adapter is a good part of the output."""
    rng = np.random.default_rng(seed)

    def pair(out_features: int, in_features: int) -> dict[str, jax.Array]:
        lora_a = rng.standard_normal((lora.r, in_features)) * in_features**-0.5
        lora_b = rng.standard_normal((out_features, lora.r)) * 0.1
        return {"lora_a": jnp.asarray(lora_a, jnp.float32), "lora_b": jnp.asarray(lora_b, jnp.float32)}

    shapes = config.linear_shapes()
    return [
        {name: {"adapter": pair(*shapes[name])} for name in lora.targets(LINEAR_NAMES)}
        for _ in range(config.num_hidden_layers)
    ]


def our_logits(
    config: Architecture, weights: Weights, lora: LoraSettings | None, adapters: Sequence[Any]
) -> np.ndarray:
    engine = Engine(config, lora, QUANTIZATION, compute_dtype=jnp.float32)
    return np.asarray(engine.logits(weights, list(adapters), INPUT_IDS))


def assert_same_function(ours: np.ndarray, theirs: np.ndarray, base: np.ndarray) -> None:
    scale = np.abs(theirs).max()
    assert np.abs(ours - theirs).max() <= FLOAT32_TWO_LAYERS * scale
    assert np.abs(base - theirs).max() > 0.1 * scale, "the adapter must matter, or this test does not see it"


@pytest.fixture(scope="module")
def base_logits(config: Architecture, weights: Weights) -> np.ndarray:
    return our_logits(config, weights, None, [{}] * config.num_hidden_layers)


@pytest.fixture(scope="module")
def make_reference(folder: ModelFolder) -> Callable[[], Any]:
    """transformers' model in float32, holding our dequantized weights."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("peft")
    from transformers import LlamaConfig as HFConfig
    from transformers import LlamaForCausalLM

    def weight(name: str) -> Any:
        tensor = read_bfloat16(folder, name)
        if NAMES.parse_linear(name):
            tensor = np.asarray(nf4.dequantize(nf4.quantize(jnp.asarray(tensor), QUANTIZATION.double_quant)))
        return torch.from_numpy(tensor.astype(np.float32))

    state = {name: weight(name) for name in folder.names}

    def make() -> Any:
        model = LlamaForCausalLM(HFConfig(**folder.config)).to(torch.float32).eval()
        result = model.load_state_dict(state, strict=False)
        assert (result.missing_keys, result.unexpected_keys) == (["lm_head.weight"], [])  # tied
        model.tie_weights()
        return model

    return make


def their_logits(model: Any) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model(torch.from_numpy(INPUT_IDS.astype(np.int64))).logits.numpy()


def save(folder: Path, adapters: Adapters, lora: LoraSettings = ALL, quantization: Any = QUANTIZATION) -> Path:
    save_adapter(folder, adapters, lora, quantization, "some/model", architecture=ARCHITECTURE)
    return folder


@pytest.fixture
def saved(tmp_path: Path, config: Architecture) -> Path:
    return save(tmp_path / "adapter", random_adapters(config, ALL))


# Out


def test_the_file_is_as_peft_writes_it(saved: Path, config: Architecture) -> None:
    tensors = safetensors.numpy.load_file(saved / WEIGHTS_FILE)
    modules = {"q_proj": "self_attn.q_proj", "k_proj": "self_attn.k_proj", "v_proj": "self_attn.v_proj"}
    modules |= {"o_proj": "self_attn.o_proj", "gate_proj": "mlp.gate_proj", "up_proj": "mlp.up_proj"}
    modules |= {"down_proj": "mlp.down_proj"}
    expected = {}
    for layer in range(2):
        for name, (rows, columns) in config.linear_shapes().items():
            stem = f"base_model.model.model.layers.{layer}.{modules[name]}"
            expected |= {f"{stem}.lora_A.weight": (RANK, columns), f"{stem}.lora_B.weight": (rows, RANK)}
    assert {name: tensor.shape for name, tensor in tensors.items()} == expected
    assert {tensor.dtype for tensor in tensors.values()} == {np.dtype(np.float32)}
    with safetensors.safe_open(saved / WEIGHTS_FILE, framework="numpy") as file:
        assert file.metadata()["format"] == "pt"
    assert sorted(path.name for path in saved.iterdir()) == [CONFIG_FILE, WEIGHTS_FILE]


def test_peft_knows_every_field_of_the_config(saved: Path) -> None:
    peft = pytest.importorskip("peft")
    written = json.loads((saved / CONFIG_FILE).read_text())
    read = peft.LoraConfig(**{key: value for key, value in written.items() if key != "peft_type"})  # refuses strangers
    assert read.peft_type == written["peft_type"] == "LORA"
    assert {key: getattr(read, key) for key in written if key != "target_modules"} == {
        key: value for key, value in written.items() if key != "target_modules"
    }
    assert read.target_modules == set(LINEAR_NAMES)
    assert (read.r, read.lora_alpha, read.lora_dropout) == (RANK, ALPHA, 0.1)
    assert (read.task_type, read.inference_mode, read.base_model_name_or_path) == ("CAUSAL_LM", True, "some/model")


@pytest.mark.parametrize(
    "lora",
    [ALL, LoraSettings(r=RANK, lora_alpha=ALPHA, target_modules=["q_proj", "v_proj"], use_rslora=True)],
    ids=["all-linear", "q and v, rslora"],
)
def test_peft_computes_what_we_do(
    tmp_path: Path,
    config: Architecture,
    weights: Weights,
    base_logits: np.ndarray,
    make_reference: Callable[[], Any],
    lora: LoraSettings,
) -> None:
    import peft

    adapters = random_adapters(config, lora)
    model = peft.PeftModel.from_pretrained(make_reference(), save(tmp_path / "adapter", adapters, lora))
    assert_same_function(our_logits(config, weights, lora, adapters), their_logits(model), base_logits)


def test_a_folder_is_replaced_whole(saved: Path, config: Architecture) -> None:
    (saved / "stray").write_text("of another run")
    few = LoraSettings(r=2, target_modules=["q_proj"])
    adapters = random_adapters(config, few, seed=1)
    save(saved, adapters, few)
    assert sorted(path.name for path in saved.iterdir()) == [CONFIG_FILE, WEIGHTS_FILE]
    assert load_adapter(saved, config).pairs.keys() == {(0, "q_proj"), (1, "q_proj")}
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


def test_what_is_there_stays_if_writing_fails(saved: Path, config: Architecture) -> None:
    before = (saved / WEIGHTS_FILE).read_bytes()
    adapters = random_adapters(config, ALL, seed=1)
    del adapters[1]["down_proj"]
    with pytest.raises(KeyError):
        save(saved, adapters)
    assert (saved / WEIGHTS_FILE).read_bytes() == before
    assert load_adapter(saved, config).base_model == "some/model"


# And back


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("double_quant", [False, True])
def test_round_trip_bit_for_bit(tmp_path: Path, config: Architecture, use_rslora: bool, double_quant: bool) -> None:
    lora = LoraSettings(r=3, lora_alpha=5.0, target_modules=["v_proj", "up_proj"], use_rslora=use_rslora)
    quantization = QuantizationSettings(double_quant=double_quant)
    adapters = random_adapters(config, lora)
    adapter = load_adapter(save(tmp_path / "adapter", adapters, lora, quantization), config)
    assert {target.scaling for target in adapter.targets.values()} == {lora.scaling}
    assert (adapter.quantization, adapter.base_model) == (quantization, "some/model")
    assert list(adapter.pairs) == [(layer, name) for layer in range(2) for name in lora.targets(LINEAR_NAMES)]
    for (layer, name), pair in adapter.pairs.items():
        for part in ADAPTER_PARTS:
            loaded = getattr(pair, part)
            assert loaded.dtype == np.float32
            assert loaded.tobytes() == np.asarray(adapters[layer][name]["adapter"][part]).tobytes()


def test_as_adapters_is_what_the_engine_trained(saved: Path, config: Architecture) -> None:
    lora, adapters = as_adapters(load_adapter(saved, config), config)
    assert (lora.r, lora.scaling, lora.targets(LINEAR_NAMES)) == (ALL.r, ALL.scaling, LINEAR_NAMES)
    expected = random_adapters(config, ALL)
    assert jax.tree.structure(adapters) == jax.tree.structure(expected)
    for ours, theirs in zip(jax.tree.leaves(adapters), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(
    "settings",
    [{"target_modules": "all-linear"}, {"target_modules": ["q_proj", "v_proj"], "use_rslora": True}],
    ids=["all-linear", "q and v, rslora"],
)
def test_an_adapter_that_peft_wrote(
    tmp_path: Path,
    config: Architecture,
    weights: Weights,
    base_logits: np.ndarray,
    make_reference: Callable[[], Any],
    settings: dict[str, Any],
) -> None:
    import peft
    import torch

    lora_config = peft.LoraConfig(r=RANK, lora_alpha=int(ALPHA), task_type="CAUSAL_LM", **settings)
    model = peft.get_peft_model(make_reference(), lora_config).eval()
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path)
    adapter = load_adapter(tmp_path, config)
    expected = LINEAR_NAMES if settings["target_modules"] == "all-linear" else settings["target_modules"]
    assert {name for _, name in adapter.pairs} == set(expected)
    assert adapter.quantization == QuantizationSettings()  # peft's files do not say; ours is the default
    lora, adapters = as_adapters(adapter, config)
    assert_same_function(our_logits(config, weights, lora, adapters), their_logits(model), base_logits)


def test_an_adapter_in_sixteen_bits_is_widened(saved: Path, config: Architecture) -> None:
    tensors = safetensors.numpy.load_file(saved / WEIGHTS_FILE)
    halves = {name: tensor.astype(np.float16) for name, tensor in tensors.items()}
    safetensors.numpy.save_file(halves, saved / WEIGHTS_FILE)
    for (layer, name), pair in load_adapter(saved, config).pairs.items():
        assert pair.lora_a.dtype == np.float32
        np.testing.assert_array_equal(pair.lora_a, halves[NAMES.adapter(layer, name, "lora_a")].astype(np.float32))


# Refusals


def refusal(folder: Path, config: Architecture) -> str:
    with pytest.raises(InputError) as caught:
        load_adapter(folder, config)
    return str(caught.value)


def change_tensors(folder: Path, change: Callable[[dict[str, np.ndarray]], object]) -> None:
    tensors = safetensors.numpy.load_file(folder / WEIGHTS_FILE)
    change(tensors)
    safetensors.numpy.save_file(tensors, folder / WEIGHTS_FILE)


FIRST = NAMES.adapter(0, "q_proj", "lora_a")
LAST = NAMES.adapter(1, "down_proj", "lora_b")


@pytest.mark.parametrize("name", [CONFIG_FILE, WEIGHTS_FILE])
def test_a_missing_file(saved: Path, config: Architecture, name: str) -> None:
    (saved / name).unlink()
    message = refusal(saved, config)
    assert message.startswith(str(saved))
    assert f"no {name}" in message


def test_a_missing_folder(tmp_path: Path, config: Architecture) -> None:
    assert str(tmp_path / "nowhere") in refusal(tmp_path / "nowhere", config)


@pytest.mark.parametrize(("text", "found"), [("{", "not JSON"), ("[]", "a JSON list")])
def test_a_config_that_is_not_an_object(saved: Path, config: Architecture, text: str, found: str) -> None:
    (saved / CONFIG_FILE).write_text(text)
    message = refusal(saved, config)
    assert str(saved / CONFIG_FILE) in message
    assert found in message


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("peft_type", "IA3"),
        ("peft_type", None),
        ("modules_to_save", "lm_head"),
        ("rank_pattern", {"q_proj": 0}),
        ("alpha_pattern", ["q_proj"]),
        ("bias", "some"),
        ("use_rslora", "false"),
        ("lora_bias", True),
        ("layer_replication", [[0, 2]]),
        ("target_parameters", ["mlp.experts"]),
        ("trainable_token_indices", [1, 1]),
        ("trainable_token_indices", {"embed_tokens": [-1]}),
        ("init_lora_weights", "pissa"),
        ("a_setting_of_tomorrow", 1),
        ("layers_to_transform", ["0"]),
        ("target_modules", None),
        ("r", 0),
        ("r", "four"),
        ("r", True),
        ("lora_alpha", None),
        ("lora_alpha", float("nan")),
    ],
)
def test_a_kind_that_cannot_be_applied(saved: Path, config: Architecture, key: str, value: Any) -> None:
    settings = json.loads((saved / CONFIG_FILE).read_text())
    (saved / CONFIG_FILE).write_text(json.dumps({**settings, key: value}))
    message = refusal(saved, config)
    assert str(saved / CONFIG_FILE) in message
    assert f"{key} is {value!r}" in message


@pytest.mark.parametrize("key", ["modules_to_save", "rank_pattern", "layers_to_transform", "bias"])
def test_unused_kinds_may_be_absent_or_null(saved: Path, config: Architecture, key: str) -> None:
    settings = json.loads((saved / CONFIG_FILE).read_text())
    settings.pop(key, None)
    (saved / CONFIG_FILE).write_text(json.dumps(settings))
    assert load_adapter(saved, config)
    if key != "bias":
        (saved / CONFIG_FILE).write_text(json.dumps({**settings, key: None}))
        assert load_adapter(saved, config)


def test_a_wrong_shape(saved: Path, config: Architecture) -> None:
    change_tensors(saved, lambda tensors: tensors.update({FIRST: np.zeros((RANK, 3), np.float32)}))
    message = refusal(saved, config)
    assert f"{FIRST} is of shape (4, 3), expected (4, 64)" in message
    assert str(saved / WEIGHTS_FILE) in message


def test_another_rank_than_the_configs(saved: Path, config: Architecture) -> None:
    settings = json.loads((saved / CONFIG_FILE).read_text())
    (saved / CONFIG_FILE).write_text(json.dumps({**settings, "r": 8}))
    assert f"{FIRST} is of shape (4, 64), expected (8, 64)" in refusal(saved, config)


@pytest.mark.parametrize("name", [FIRST, LAST])
def test_half_a_pair(saved: Path, config: Architecture, name: str) -> None:
    change_tensors(saved, lambda tensors: tensors.pop(name))
    assert f"{name} is missing" in refusal(saved, config)


@pytest.mark.parametrize(
    "name",
    [
        "base_model.model.lm_head.lora_A.weight",
        "base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector",
        "base_model.model.model.layers.0.mlp.q_proj.lora_A.weight",
        "base_model.model.model.embed_tokens.lora_embedding_A",
    ],
)
def test_an_unknown_tensor(saved: Path, config: Architecture, name: str) -> None:
    change_tensors(saved, lambda tensors: tensors.update({name: np.zeros((1,), np.float32)}))
    assert f"unknown tensor {name}" in refusal(saved, config)


def test_a_layer_the_model_lacks(tmp_path: Path, saved: Path) -> None:
    shallow = read_config(ModelFolder(tiny.write_model(tmp_path / "shallow", num_hidden_layers=1)))
    assert "layer 1 of q_proj: the model has 1 layers" in refusal(saved, shallow)


def test_a_value_that_is_not_finite(saved: Path, config: Architecture) -> None:
    change_tensors(saved, lambda tensors: tensors[LAST].__setitem__((0, 0), np.nan))
    assert f"{LAST} holds values that are not finite" in refusal(saved, config)


def test_no_tensors(saved: Path, config: Architecture) -> None:
    safetensors.numpy.save_file({}, saved / WEIGHTS_FILE)
    assert "no adapter tensors" in refusal(saved, config)


def test_everything_wrong_is_said_at_once(saved: Path, config: Architecture) -> None:
    def change(tensors: dict[str, np.ndarray]) -> None:
        del tensors[FIRST]
        tensors[LAST] = np.zeros((2, 2), np.float32)
        tensors["stranger"] = np.zeros((1,), np.float32)

    change_tensors(saved, change)
    message = refusal(saved, config)
    for problem in (f"{FIRST} is missing", f"{LAST} is of shape (2, 2)", "unknown tensor stranger"):
        assert problem in message


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_truncated_file(saved: Path, config: Architecture, keep: int) -> None:
    data = (saved / WEIGHTS_FILE).read_bytes()
    (saved / WEIGHTS_FILE).write_bytes(data[:keep])
    message = refusal(saved, config)
    assert message.startswith(str(saved / WEIGHTS_FILE))
    assert "a damaged safetensors file" in message


@pytest.mark.parametrize("note", ["no JSON", '{"double_quant": "perhaps"}', '{"stranger": 1}'])
def test_a_damaged_note_about_quantization(saved: Path, config: Architecture, note: str) -> None:
    tensors = safetensors.numpy.load_file(saved / WEIGHTS_FILE)
    safetensors.numpy.save_file(tensors, saved / WEIGHTS_FILE, {"quantization": note})
    message = refusal(saved, config)
    assert message.startswith(str(saved / WEIGHTS_FILE))
    assert "quantization" in message


def test_layers_that_differ_cannot_be_run(saved: Path, config: Architecture) -> None:
    def change(tensors: dict[str, np.ndarray]) -> None:
        for part in ADAPTER_PARTS:
            del tensors[NAMES.adapter(1, "o_proj", part)]

    change_tensors(saved, change)
    assert f"{NAMES.adapter(1, 'o_proj', 'lora_b')} is missing" in refusal(saved, config)
    settings = json.loads((saved / CONFIG_FILE).read_text())
    excluded = {**settings, "exclude_modules": ["layers.1.self_attn.o_proj"]}
    (saved / CONFIG_FILE).write_text(json.dumps(excluded))
    adapter = load_adapter(saved, config)  # can be merged
    with pytest.raises(InputError, match="some layers only"):
        as_adapters(adapter, config)


def test_a_copy_of_the_folder_loads(saved: Path, tmp_path: Path, config: Architecture) -> None:
    copy = shutil.copytree(saved, tmp_path / "elsewhere")
    assert load_adapter(str(copy), config).pairs.keys() == load_adapter(saved, config).pairs.keys()
