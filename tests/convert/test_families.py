"""Every family's files, adapters, merges and 4 bits, beside those of transformers, PEFT and bitsandbytes."""

import copy
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import safetensors.numpy

from convert.adapters.adapter import WEIGHTS_FILE, as_adapters, load_adapter, save_adapter
from convert.adapters.targets import resolve_targets
from convert.files import bitsandbytes
from convert.files.folder import ModelFolder
from convert.files.stated import names_of
from convert.jobs.check import NUM_TOKENS, check_merge
from convert.load import load_weights, read_config, read_layer
from convert.merge import merge
from convert.quantize import quantize
from qlora_jax.base.errors import InputError
from qlora_jax.config import LoraSettings, QuantizationSettings
from qlora_jax.ops import nf4
from tests.helpers.families import CASES, WRAPPERS, tiny_model
from tests.helpers.peft_files import GRID

NF4 = QuantizationSettings()
STRUCTURES = (
    "llama-bias", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "olmo2", "glm4", "cohere", "starcoder2", "hunyuan", "exaone4",
    "apertus", "ernie4_5", "nemotron",
)  # fmt: skip
"""One case of each set of tensors."""
CHECKED = ("gemma2", "phi3", "olmo2", "cohere", "starcoder2", "apertus")
"""Those whose merge proves itself as well, which compiles a layer: norms of each place and kind, fused linears, biases, numbers."""

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Makes a case's model, once: its folder in bfloat16.

    Matrices are multiples of 2^-7 and have a power of two of blocks: the scales' mean is exact then, however it is computed.
    """
    place, made = tmp_path_factory.mktemp("families"), {}

    def folder(case: str) -> Path:
        if case not in made:
            model = tiny_model({**CASES[case], **two_layers(case), "num_hidden_layers": 2, "intermediate_size": 128})
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.ndim == 2:
                        parameter.copy_(((parameter * 128).round() / 128).clamp(-1.5, 1.5))
            model.to(torch.bfloat16).save_pretrained(place / case)
            made[case] = place / case
        return made[case]

    return folder


def two_layers(case: str) -> dict[str, Any]:
    """Keys that list layers, for two of them."""
    return {key: value[:2] for key, value in CASES[case].items() if key in ("layer_types", "no_rope_layers")}


def theirs(folder: Path, **options: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **options)


@pytest.mark.parametrize("case", CASES)
def test_every_tensor_is_read(models: Any, case: str) -> None:
    """None is missing, none is unknown, each has its shape; and each number of a layer is in its tree."""
    folder = ModelFolder(models(case))
    config, names = read_config(folder), names_of(folder)
    tree = read_layer(folder, 1, None)
    numbers = sum(folder.read(name).size for name in folder.names if name.startswith("model.layers.1."))
    assert numbers == sum(leaf.size for module in tree.values() for leaf in module.values())
    assert list(config.linears) == [name for name in tree if name in config.linears]
    for name in config.linears:
        np.testing.assert_array_equal(tree[name]["weight"], folder.read(names.linear(1, name)))
    weights = load_weights(folder, config, NF4, "device")
    (_, placed), = weights.layers.walk([1])  # fmt: skip
    assert {name: set(module) for name, module in placed.items()} == {
        name: set(module) for name, module in tree.items()
    }


@pytest.mark.parametrize("case", STRUCTURES)
def test_norms_are_what_they_multiply_by(models: Any, case: str) -> None:
    """Of each norm module, its output for a row of ones and its mirror image tells the weight and the bias that it applies."""
    folder = ModelFolder(models(case))
    config, tree, model = read_config(folder), read_layer(folder, 0, None), theirs(folder.path)
    layer = model.model.layers[0]
    for name in config.norms.names:
        module, ours = getattr(layer, name), tree[name]
        assert str(ours["weight"].dtype) == ("float32" if config.norms.is_float32 else "bfloat16")
        x = torch.tensor([[1.0, -1.0] * (config.hidden_size // 2)])
        with torch.no_grad():
            up, down = (copy.deepcopy(module).float()(sign * x)[0].numpy() for sign in (1, -1))
        weight = (up - down) / 2 / x[0].numpy()
        np.testing.assert_allclose(
            ours["weight"].astype(np.float32), weight, rtol=1e-2 if config.norms.is_float32 else 1e-3
        )
        if "bias" in ours:
            np.testing.assert_allclose(ours["bias"].astype(np.float32), (up + down) / 2, atol=1e-5)


def pefts(folder: Path, out: Path, **settings: Any) -> Any:
    """PEFT's model with an adapter on a grid, saved to `out`."""
    config = peft.LoraConfig(r=4, lora_alpha=16, task_type="CAUSAL_LM", **settings)
    wrapped = on_a_grid(peft.get_peft_model(theirs(folder), config))
    wrapped.save_pretrained(out)
    return wrapped


def on_a_grid(wrapped: Any) -> Any:
    """The model with A and B random, in float32, and on a grid: sums of their products are exact in any order."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.copy_((torch.randn_like(parameter) * 0.1 / GRID).round() * GRID)
    return wrapped


@pytest.mark.parametrize("case", STRUCTURES)
def test_adapters_and_merges_are_pefts(models: Any, case: str, tmp_path: Path) -> None:
    """all-linear is the same set; what PEFT saves is read, and written again is the same file; merged, it is `merge_and_unload`'s bytes."""
    folder = ModelFolder(models(case))
    config = read_config(folder)
    wrapped = pefts(folder.path, tmp_path / "theirs", target_modules="all-linear")
    adapter = load_adapter(tmp_path / "theirs", config, folder)
    lora, adapters = as_adapters(adapter, config)
    assert lora.targets(config.linears) == tuple(config.linears)
    save_adapter(tmp_path / "ours", adapters, lora, NF4, str(folder.path), architecture=config)
    ours, other = (safetensors.numpy.load_file(tmp_path / name / WEIGHTS_FILE) for name in ("ours", "theirs"))
    assert ours.keys() == other.keys()
    for name, values in other.items():
        np.testing.assert_array_equal(ours[name], values)
    assert (
        peft.PeftModel.from_pretrained(theirs(folder.path), tmp_path / "ours").state_dict().keys()
        == wrapped.state_dict().keys()
    )

    merge(folder, adapter, tmp_path / "merged", "original")
    result, state = ModelFolder(tmp_path / "merged"), copy.deepcopy(wrapped).merge_and_unload().state_dict()
    if case in CHECKED:
        found = check_merge(folder, adapter, tmp_path / "merged", "original")
        assert found.logits == pytest.approx(found.rounding_alone, rel=1e-3)
        assert found.largest_logit == pytest.approx(largest_logit(wrapped.float(), config.vocab_size), rel=1e-4)
    for name in result.names:
        values = state[name].to(torch.bfloat16).view(torch.uint16).numpy()
        np.testing.assert_array_equal(result.read(name).view(np.uint16), values, name)


def largest_logit(model: Any, vocab_size: int) -> float:
    """Of the tokens that a merge is checked on, in float32."""
    token_ids = np.random.default_rng(0).integers(0, vocab_size, NUM_TOKENS)
    with torch.no_grad():
        return float(model(torch.from_numpy(token_ids)[None]).logits.abs().max())


@pytest.mark.parametrize("case", STRUCTURES)
def test_4_bits_are_those_of_bitsandbytes(models: Any, case: str, tmp_path: Path) -> None:
    """Each tensor of the folder, byte for byte; and it is read as the unquantized folder is, quantized on the way."""
    from transformers import BitsAndBytesConfig

    folder = ModelFolder(models(case))
    how = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    theirs(folder.path, quantization_config=how).save_pretrained(tmp_path / "theirs")
    quantize(folder, tmp_path / "ours", NF4)
    ours, other = (ModelFolder(tmp_path / name) for name in ("ours", "theirs"))
    assert set(ours.names) == set(other.names)
    for name in other.names:
        if bitsandbytes.STATE in name:
            assert json.loads(ours.read_bytes(name)) == json.loads(other.read_bytes(name))
        elif name.endswith(".absmax") and ours.read_bytes(name) != other.read_bytes(name):
            assert_nearer(folder, name.removesuffix(".absmax"), ours, other)
        else:
            assert ours.read_bytes(name) == other.read_bytes(name), name
    config = read_config(other)
    assert config == read_config(folder)
    both = [load_weights(source, config, NF4, "device") for source in (ours, folder)]
    one, two = ([tree for _, tree in weights.layers.walk([0, 1])] for weights in both)
    jax.tree.map(np.testing.assert_array_equal, one, two)


def assert_nearer(folder: ModelFolder, weight: str, ours: ModelFolder, theirs: ModelFolder) -> None:
    """Where codes of scales differ, ours are nearer: bitsandbytes' table for processors knows only some of the values between two codes."""
    scales = np.abs(folder.read(weight).astype(np.float32).reshape(-1, 64)).max(1)
    state = json.loads(ours.read_bytes(f"{weight}.{bitsandbytes.STATE}nf4"))
    nested = np.repeat(ours.read(f"{weight}.nested_absmax"), nf4.ABSMAX_BLOCK_SIZE)[: scales.size]
    scaled = (scales - np.float32(state["nested_offset"])) / nested
    one, two = (np.abs(nf4.DYNAMIC_MAP[source.read(f"{weight}.absmax")] - scaled) for source in (ours, theirs))
    assert (one <= two).all() and (one != two).mean() < 0.1, weight


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_trained_biases_are_refused(models: Any, tmp_path: Path, bias: str) -> None:
    folder = ModelFolder(models("qwen2"))
    pefts(folder.path, tmp_path / "theirs", target_modules=["q_proj"], bias=bias)
    with pytest.raises(InputError, match=f"bias is '{bias}'"):
        load_adapter(tmp_path / "theirs", read_config(folder), folder)


# lora.target_modules


def resolved(case: str, models: Any, target_modules: Any) -> tuple[str, ...]:
    config = read_config(ModelFolder(models(case)))
    return resolve_targets(LoraSettings(target_modules=target_modules), config).targets(config.linears)


def test_a_name_that_the_family_has_not(models: Any) -> None:
    with pytest.raises(InputError) as caught:
        resolved("phi3", models, ["q_proj", "o_proj"])
    assert "phi3 has qkv_proj, o_proj, gate_up_proj, down_proj; found q_proj" in str(caught.value)


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        (["down_proj", "qkv_proj"], ("qkv_proj", "down_proj")),
        (["self_attn.qkv_proj"], ("qkv_proj",)),
        (["model.layers.0.mlp.down_proj", "layers.1.mlp.down_proj"], ("down_proj",)),
        (r".*\.(o|down)_proj", ("o_proj", "down_proj")),
        ("all-linear", ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")),
    ],
    ids=str,
)
def test_targets_match_as_pefts_do(models: Any, tmp_path: Path, asked: Any, expected: tuple[str, ...]) -> None:
    assert resolved("phi3", models, asked) == expected
    wrapped = pefts(models("phi3"), tmp_path / "theirs", target_modules=copy.deepcopy(asked))
    assert {name.split(".")[-4] for name in wrapped.state_dict() if "lora_A" in name} == set(expected)


@pytest.mark.parametrize(
    "asked", ["q_proj", "(", ["layers.0.mlp.down_proj"], ["lm_head"], ["qkv_proj", "k_proj"]], ids=str
)
def test_targets_that_are_refused(models: Any, asked: Any) -> None:
    with pytest.raises(InputError):
        resolved("phi3", models, asked)


@pytest.mark.parametrize("case", [*STRUCTURES, "llama", "mistral", "gemma", "smollm3"])
def test_null_is_pefts_choice(models: Any, case: str) -> None:
    config = peft.LoraConfig(r=4, task_type="CAUSAL_LM")
    try:
        wrapped = peft.get_peft_model(theirs(models(case)), config)
    except ValueError:
        with pytest.raises(InputError, match="no default"):
            resolved(case, models, None)
        return
    assert {name.split(".")[-4] for name in wrapped.state_dict() if "lora_A" in name} == set(
        resolved(case, models, None)
    )


# Text models that are a part of a model of images and text


@pytest.fixture(scope="module", params=WRAPPERS)
def wrapper(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wrappers") / request.param
    tiny_model(WRAPPERS[request.param]).to(torch.bfloat16).save_pretrained(folder)
    return folder


def whole_model(folder: Path, **options: Any) -> Any:
    """As AutoModelForCausalLM gives it, where that knows the model: under the names of its files' owner."""
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.bfloat16, **options)


def test_a_part_of_a_model(wrapper: Path, tmp_path: Path) -> None:
    """Adapters under the names of PEFT's modules; merged, the text model is PEFT's and the rest what it was, byte for byte."""
    folder = ModelFolder(wrapper)
    config, names = read_config(folder), names_of(folder)
    linears = r"model\.language_model\.layers\..*_proj"
    wrapped = on_a_grid(peft.get_peft_model(whole_model(wrapper), peft.LoraConfig(r=4, target_modules=linears)))
    wrapped.save_pretrained(tmp_path / "theirs")
    adapter = load_adapter(tmp_path / "theirs", config, folder)
    lora, adapters = as_adapters(adapter, config)
    assert lora.targets(config.linears) == tuple(config.linears)
    save_adapter(tmp_path / "ours", adapters, lora, NF4, str(wrapper), architecture=config)
    assert as_adapters(load_adapter(tmp_path / "ours", config, folder), config)[0] == lora
    again = peft.PeftModel.from_pretrained(whole_model(wrapper), tmp_path / "ours").state_dict()
    assert again.keys() == wrapped.state_dict().keys()
    for name, values in wrapped.state_dict().items():
        assert torch.equal(again[name], values), name

    merge(folder, adapter, tmp_path / "merged", "original")
    result, state = ModelFolder(tmp_path / "merged"), wrapped.merge_and_unload().state_dict()
    assert set(result.names) == set(folder.names) and sum(map(names.is_beside, result.names)) > 5
    for name in result.names:
        if names.is_beside(name):
            assert result.read_bytes(name) == folder.read_bytes(name)
        else:
            values = state[names.in_modules(name)].to(torch.bfloat16).view(torch.uint16).numpy()
            np.testing.assert_array_equal(result.read(name).view(np.uint16), values, name)
    assert whole_model(tmp_path / "merged").state_dict().keys() == state.keys()


def test_a_part_in_4_bits(wrapper: Path, tmp_path: Path) -> None:
    """What is beside the text model stays as it is, and transformers reads the folder; one in which all of it is in 4 bits is read here."""
    from transformers import BitsAndBytesConfig

    folder = ModelFolder(wrapper)
    quantize(folder, tmp_path / "ours", NF4)
    ours = ModelFolder(tmp_path / "ours")
    assert read_config(ours) == read_config(folder)
    kinds = {name: type(module).__name__ for name, module in whole_model(tmp_path / "ours").named_modules()}
    assert {name.split(".")[1] for name, kind in kinds.items() if kind == "Linear4bit"} == {"language_model"}
    how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    whole_model(wrapper, quantization_config=how).save_pretrained(tmp_path / "theirs")
    theirs = ModelFolder(tmp_path / "theirs")
    assert read_config(theirs) == read_config(folder)
    assert len([name for name in theirs.names if "absmax" in name]) > len(
        [name for name in ours.names if "absmax" in name]
    )
    adapters = [{"q_proj": {"adapter": {part: np.zeros(shape, np.float32) for part, shape in
                (("lora_a", (2, 64)), ("lora_b", (read_config(folder).linears["q_proj"].shape[0], 2)))}}}] * 4  # fmt: skip
    lora = LoraSettings(r=2, target_modules=["q_proj"])
    save_adapter(tmp_path / "adapter", adapters, lora, NF4, str(wrapper), architecture=read_config(folder))
    merge(theirs, load_adapter(tmp_path / "adapter", read_config(theirs), theirs), tmp_path / "merged", "dequantized")
    merged = ModelFolder(tmp_path / "merged")
    assert set(merged.names) == set(folder.names)
    dequantized = whole_model(tmp_path / "theirs").dequantize().state_dict()
    for name in filter(names_of(folder).is_beside, merged.names):
        values = dequantized[f"model.{name.removeprefix('model.')}"].to(torch.bfloat16).view(torch.uint16).numpy()
        np.testing.assert_array_equal(merged.read(name).view(np.uint16), values, name)
