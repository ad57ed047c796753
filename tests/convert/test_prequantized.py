"""A folder in 4 bits is used only if everything in it is as it must be: every damage is named, and as many as there are at once."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from convert.files import bitsandbytes
from convert.files.folder import ModelFolder
from convert.files.prequantized import settle
from convert.files.shards import NUMPY_DTYPES, TensorSpec, write_json, write_shard
from convert.load import load_weights, read_config
from convert.quantize import quantize
from qlora_jax.base.errors import InputError
from qlora_jax.config import QuantizationSettings
from qlora_jax.ops import nf4
from tests.helpers import tiny

UP = "model.layers.0.mlp.up_proj.weight"  # [128, 64]: 4096 bytes of codes, 128 scales
STATE = f"{UP}.quant_state.bitsandbytes__nf4"

Tensors = dict[str, np.ndarray]
Settings = dict[str, Any]
Damage = Callable[[Tensors, Settings], object]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One layer, an output matrix of its own; not to be written to."""
    place = tmp_path_factory.mktemp("plain")
    return tiny.write_model(place / "model", num_hidden_layers=1, tie_word_embeddings=False)


@pytest.fixture(scope="module")
def nested(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That model in NF4 with double quantization; not to be written to."""
    out = tmp_path_factory.mktemp("nested") / "model"
    quantize(ModelFolder(plain), out, QuantizationSettings())
    return out


@pytest.fixture(scope="module")
def single(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In FP4 without double quantization; not to be written to."""
    out = tmp_path_factory.mktemp("single") / "model"
    quantize(ModelFolder(plain), out, QuantizationSettings(quant_type="fp4", double_quant=False))
    return out


def damaged(source: Path, out: Path, damage: Damage) -> Path:
    """A copy of a 4-bit folder with its tensors or its config changed."""
    folder = ModelFolder(source)
    tensors, config = {name: folder.read(name) for name in folder.names}, json.loads(json.dumps(folder.config))
    damage(tensors, config)
    out.mkdir()
    dtypes = {dtype: name for name, dtype in NUMPY_DTYPES.items()}
    specs = [TensorSpec(name, dtypes[tensor.dtype], tensor.shape) for name, tensor in tensors.items()]
    write_shard(out / "model.safetensors", specs, tensors.values())
    write_json(out / "config.json", config)
    return out


def state(**changes: Any) -> Damage:
    """Keys of up_proj's state changed, or left out where the change is `...`."""

    def damage(tensors: Tensors, config: Settings) -> None:
        values = {**json.loads(tensors[STATE].tobytes()), **changes}
        text = json.dumps({key: value for key, value in values.items() if value is not ...})
        tensors[STATE] = np.frombuffer(text.encode(), np.uint8)

    return damage


def text(data: bytes) -> Damage:
    return replaced(STATE, np.frombuffer(data, np.uint8))


def replaced(name: str, tensor: np.ndarray) -> Damage:
    return lambda tensors, config: tensors.update({name: tensor})


def without(*gone: str) -> Damage:
    return lambda tensors, config: [tensors.pop(name) for name in gone]


def changed(name: str, index: int, value: float) -> Damage:
    def damage(tensors: Tensors, config: Settings) -> None:
        tensors[name] = tensors[name].copy()
        tensors[name][index] = value

    return damage


def block(**changes: Any) -> Damage:
    return lambda tensors, config: config["quantization_config"].update(changes)


def no_companions(tensors: Tensors, config: Settings) -> None:
    for name in [name for name in tensors if bitsandbytes.companion_of(name)]:
        del tensors[name]


def another_type(tensors: Tensors, config: Settings) -> None:
    state(quant_type="fp4")(tensors, config)
    tensors[STATE.replace("nf4", "fp4")] = tensors.pop(STATE)
    tensors[f"{UP}.quant_map"] = nf4.FP4_CODEBOOK


def renamed_state(suffix: str) -> Damage:
    return lambda tensors, config: tensors.update({STATE.replace("nf4", suffix): tensors.pop(STATE)})


def two_states(tensors: Tensors, config: Settings) -> None:
    tensors[STATE.replace("nf4", "fp4")] = tensors[STATE]


def several(tensors: Tensors, config: Settings) -> None:
    state(blocksize=128)(tensors, config)
    del tensors["model.layers.0.self_attn.q_proj.weight.absmax"]
    del tensors["model.norm.weight"]


BAD = {
    "no config block": (
        lambda tensors, config: config.pop("quantization_config"),
        ["7 weights in 4 or 8 bits (model.layers.0.", "and 2 more), but config.json has no quantization_config"],
    ),
    "no companions": (no_companions, ["config.json says 4 bits, but the weights are not"]),
    "the head": (
        replaced("lm_head.weight.absmax", np.zeros(1, np.uint8)),
        ["lm_head.weight: in 4 bits; only the linears of decoder layers can be"],
    ),
    "an unknown layer": (
        replaced("model.layers.7.mlp.up_proj.weight.absmax", np.zeros(1, np.uint8)),
        ["model.layers.7.mlp.up_proj.weight: in 4 bits; only the linears of decoder layers can be"],
    ),
    "two types": (
        another_type,
        ["linears of several kinds: fp4 with double quantization, nf4 with double quantization"],
    ),
    "another type in the config": (
        block(bnb_4bit_quant_type="fp4"),
        ["config.json: bnb_4bit_quant_type is 'fp4', but the linears are nf4 with double quantization"],
    ),
    "another nesting in the config": (
        block(bnb_4bit_use_double_quant=False),
        ["bnb_4bit_use_double_quant is False, but the linears are nf4 with double quantization"],
    ),
    "an unknown type": (renamed_state("int4"), ["bitsandbytes__int4: 4-bit type 'int4', known: nf4, fp4"]),
    "two states": (two_states, [f"{UP}: two states ({STATE.replace('nf4', 'fp4')}, {STATE})"]),
    "no weight": (without(UP), [f"missing: {UP}"]),
    "no state": (without(STATE), [f"missing: {UP}.quant_state.bitsandbytes__nf4 (or fp4)"]),
    "no absmax": (without(f"{UP}.absmax"), [f"missing: {UP}.absmax"]),
    "no maps": (
        without(f"{UP}.quant_map", f"{UP}.nested_quant_map"),
        [f"missing: {UP}.quant_map", f"missing: {UP}.nested_quant_map"],
    ),
    "no nested absmax": (without(f"{UP}.nested_absmax"), [f"missing: {UP}.nested_absmax"]),
    "nested tensors of a state that is not": (
        state(nested_blocksize=..., nested_dtype=..., nested_offset=...),
        [f"{UP}.nested_absmax: its quant_state does not call for it", f"{UP}.absmax: U8[128], expected F32[128]"],
    ),
    "short absmax": (replaced(f"{UP}.absmax", np.zeros(127, np.uint8)), [f"{UP}.absmax: U8[127], expected U8[128]"]),
    "absmax of another dtype": (
        replaced(f"{UP}.absmax", np.zeros(128, np.float32)),
        [f"{UP}.absmax: F32[128], expected U8[128]"],
    ),
    "long nested absmax": (
        replaced(f"{UP}.nested_absmax", np.ones(2, np.float32)),
        [f"{UP}.nested_absmax: F32[2], expected F32[1]"],
    ),
    "short codes": (
        replaced(UP, np.zeros((4095, 1), np.uint8)),
        [f"{UP}: U8[4095, 1], expected U8[4096, 1], or its bytes as another dtype"],
    ),
    "codes lying down": (replaced(UP, np.zeros((1, 4096), np.uint8)), [f"{UP}: U8[1, 4096], expected U8[4096, 1]"]),
    "a scalar for codes": (replaced(UP, np.zeros((), np.uint8)), [f"{UP}: U8[], expected U8[4096, 1]"]),
    "an unquantized weight with companions": (
        replaced(UP, np.zeros((128, 64), ml_dtypes.bfloat16)),
        [f"{UP}: BF16[128, 64], expected U8[4096, 1]"],
    ),
    "another codebook": (changed(f"{UP}.quant_map", 3, -0.4), [f"{UP}.quant_map: other values than bitsandbytes'"]),
    "a codebook that is not finite": (changed(f"{UP}.quant_map", 3, np.nan), [f"{UP}.quant_map: other values"]),
    "another nested map": (changed(f"{UP}.nested_quant_map", 3, -0.9), [f"{UP}.nested_quant_map: other values"]),
    "a state that is not JSON": (text(b"{"), [f"{STATE}: Invalid JSON"]),
    "a state that is not text": (text(b"\xff\xfe"), [f"{STATE}: Invalid JSON"]),
    "a state that is deep": (text(b"[" * 4000), [f"{STATE}: Invalid JSON"]),
    "a state that is a list": (text(b"[1]"), [f"{STATE}: Input should be an object"]),
    "a state that is long": (text(b" " * 5000), [f"{STATE}: U8[5000], expected U8 of at most 4096 bytes"]),
    "a state of another dtype": (replaced(STATE, np.zeros(4, np.int32)), [f"{STATE}: I32[4], expected U8"]),
    "block size": (state(blocksize=128), [f"{STATE}: blocksize is 128: Input should be 64"]),
    "nested block size": (state(nested_blocksize=128), ["nested_blocksize is 128: Input should be 256"]),
    "nested dtype": (state(nested_dtype="float16"), ["nested_dtype is 'float16': Input should be 'float32'"]),
    "half nested": (state(nested_blocksize=...), ["expected all of nested_blocksize, nested_dtype and nested_offset"]),
    "offset not a number": (state(nested_offset="0.1"), ["nested_offset is '0.1': Input should be a valid number"]),
    "offset not finite": (state(nested_offset=float("nan")), ["nested_offset is nan: Input should be a finite number"]),
    "offset infinite": (state(nested_offset=1e300), ["nested_offset is 1e+300: Input should be less than"]),
    "dtype": (state(dtype="float8_e4m3fn"), ["dtype is 'float8_e4m3fn': Input should be 'bfloat16', 'float16' or"]),
    "no dtype": (state(dtype=...), [f"{STATE}: dtype is missing"]),
    "a type that is not its name's": (state(quant_type="fp4"), [f"{STATE}: quant_type is 'fp4'"]),
    "an unknown type in the state": (state(quant_type="int4"), ["quant_type is 'int4': Input should be 'nf4' or"]),
    "an unknown key": (state(zero_point=3), ["zero_point is 3: Extra inputs are not permitted"]),
    "no shape": (state(shape=None), ["shape is None: Input should be a valid"]),
    "a shape of other things": (state(shape=[128, "64"]), ["shape.1 is '64': Input should be a valid integer"]),
    "another shape": (
        state(shape=[64, 128]),
        [f"{UP}: its quant_state says shape (64, 128), the config says (128, 64)"],
    ),
    "several at once": (
        several,
        [
            "blocksize is 128",
            "missing: model.layers.0.self_attn.q_proj.weight.absmax",
            "missing: model.norm.weight",
        ],
    ),
}


@pytest.mark.parametrize(("damage", "parts"), BAD.values(), ids=BAD.keys())
def test_a_bad_folder(nested: Path, tmp_path: Path, damage: Damage, parts: list[str]) -> None:
    folder = ModelFolder(damaged(nested, tmp_path / "bad", damage))
    with pytest.raises(InputError) as caught:
        read_config(folder)
    assert caught.value.where == str(tmp_path / "bad")
    assert "give the unquantized one" in caught.value.fix
    for part in parts:
        assert part in caught.value.found


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"quant_method": "gptq"}, "already quantized (gptq)"),
        ({"quant_method": "awq", "load_in_4bit": True}, "already quantized (awq)"),
        ({"load_in_8bit": True, "load_in_4bit": False}, "already quantized (bitsandbytes, load_in_8bit)"),
        ({"load_in_8bit": True}, "(bitsandbytes, load_in_4bit and load_in_8bit)"),
        ({"load_in_4bit": False}, "(bitsandbytes, without load_in_4bit)"),
    ],
)
def test_other_quantizations(nested: Path, tmp_path: Path, changes: dict[str, Any], part: str) -> None:
    path = damaged(nested, tmp_path / "other", block(**changes))
    with pytest.raises(InputError) as caught:
        ModelFolder(path)
    assert part in caught.value.found
    assert "give the unquantized model, which is quantized on the way in" in caught.value.found


def test_an_old_config_without_quant_method(nested: Path, tmp_path: Path) -> None:
    def older(tensors: Tensors, config: Settings) -> None:
        config["quantization_config"] = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}

    read_config(ModelFolder(damaged(nested, tmp_path / "old", older)))


def test_a_map_that_is_an_ulp_off(nested: Path, tmp_path: Path) -> None:
    near = float(np.nextafter(nf4.DYNAMIC_MAP[9], np.float32(1)))
    folder = ModelFolder(damaged(nested, tmp_path / "near", changed(f"{UP}.nested_quant_map", 9, near)))
    read_config(folder)


@pytest.mark.parametrize(("kind", "part", "value"), [("nested", "nested_absmax", np.inf), ("single", "absmax", np.nan)])
def test_scales_that_are_not_finite(
    request: pytest.FixtureRequest, tmp_path: Path, kind: str, part: str, value: float
) -> None:
    """Found when they are read: without double quantization they are too many to be read twice."""
    source = request.getfixturevalue(kind)
    folder = ModelFolder(damaged(source, tmp_path / "bad", changed(f"{UP}.{part}", 0, value)))
    config = read_config(folder)
    with pytest.raises(InputError) as caught:
        load_weights(folder, config, QuantizationSettings(), "device")
    assert caught.value.where == f"{folder.path}: {UP}.{part}"


def test_other_storage_is_the_same_bytes(nested: Path, tmp_path: Path) -> None:
    """`bnb_4bit_quant_storage`, without torch."""

    def stored(tensors: Tensors, config: Settings) -> None:
        tensors[UP] = tensors[UP].reshape(-1).view(ml_dtypes.bfloat16).reshape(-1, 1)

    folders = ModelFolder(nested), ModelFolder(damaged(nested, tmp_path / "stored", stored))
    assert folders[1].spec(UP) == TensorSpec(UP, "BF16", (2048, 1))
    read_config(folders[1])
    one, other = (bitsandbytes.read(folder, UP) for folder in folders)
    np.testing.assert_array_equal(one.codes, other.codes)


FP4 = QuantizationSettings(quant_type="fp4", double_quant=False)


@pytest.mark.parametrize(
    "asked",
    [QuantizationSettings(), FP4, QuantizationSettings(double_quant=False), QuantizationSettings(quant_type="fp4")],
)
def test_a_folders_own_kind_wins_over_defaults(plain: Path, single: Path, asked: QuantizationSettings) -> None:
    assert settle(ModelFolder(single), asked, where="here", fix="") == FP4
    assert settle(ModelFolder(plain), asked, where="here", fix="") == asked


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        (QuantizationSettings(quant_type="nf4"), 'quant_type "nf4", but'),
        (QuantizationSettings(quant_type="fp4", double_quant=True), 'quant_type "fp4", double_quant true, but'),
    ],
)
def test_what_was_asked_for_by_name_must_agree(single: Path, asked: QuantizationSettings, found: str) -> None:
    with pytest.raises(InputError) as caught:
        settle(ModelFolder(single), asked, where="here", fix="do that")
    assert (caught.value.where, caught.value.fix) == ("here", "do that")
    assert caught.value.found.startswith(found)
    assert caught.value.expected == 'what that folder is in: quant_type "fp4", double_quant false'
