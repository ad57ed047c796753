"""4-bit folders of bitsandbytes: what they write we read byte for byte, what we write they read bit for bit; every bad one is refused."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from convert.files import bitsandbytes
from convert.files.folder import ModelFolder
from convert.files.shards import write_json, write_shard
from convert.load import load_weights, read_config
from convert.quantize import quantize
from qlora_jax.config import QuantizationSettings
from qlora_jax.engine.engine import Engine
from qlora_jax.ops import nf4
from tests.helpers import tiny
from tests.helpers.tiny import NAMES

BF16_ROUNDING = 2.0**-8  # half a step of an 8-bit significand, relative
LOGITS_RTOL = 1e-4  # of the largest logit; float32 sums in another order through every layer
INPUT_IDS = np.random.default_rng(0).integers(0, 256, (2, 24)).astype(np.int32)
KINDS = [
    QuantizationSettings(quant_type=quant_type, double_quant=double_quant)
    for quant_type in nf4.CODEBOOKS
    for double_quant in (True, False)
]
UP = "model.layers.0.mlp.up_proj.weight"  # [128, 64]: 4096 bytes of codes, 128 scales
STATE = f"{UP}.quant_state.bitsandbytes__nf4"

jitted_dequantize = jax.jit(nf4.dequantize)


def kind_name(kind: QuantizationSettings) -> str:
    return f"{kind.quant_type}{'-double' * kind.double_quant}"


every_kind = pytest.mark.parametrize("kind", KINDS, ids=kind_name)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One layer, an output matrix of its own; not to be written to."""
    place = tmp_path_factory.mktemp("plain")
    return tiny.write_model(place / "model", num_hidden_layers=1, tie_word_embeddings=False)


@pytest.fixture(scope="module")
def ours(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """That model in 4 bits of every kind, as we write it; not to be written to."""
    place = tmp_path_factory.mktemp("ours")
    for kind in KINDS:
        quantize(ModelFolder(plain), place / kind_name(kind), kind)
    return {kind_name(kind): place / kind_name(kind) for kind in KINDS}


def bits(array: Any) -> np.ndarray:
    """As integers, but for the sign of zero: FP4's second one is negative in bitsandbytes or not, by the processor it runs on."""
    array = np.asarray(array)
    return np.where(array == 0, 0, array.view(f"u{array.itemsize}"))


def linear_names(folder: ModelFolder) -> list[str]:
    found = [name for name in folder.names if NAMES.parse_linear(name)]
    assert len(found) % 7 == 0
    return found


# Against bitsandbytes


def load_theirs(folder: Path, **more: Any) -> Any:
    pytest.importorskip("torch")
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("accelerate")
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto", device_map="cpu", **more).eval()


def their_linears(model: Any) -> dict[str, Any]:
    import bitsandbytes as theirs

    return {f"{name}.weight": m for name, m in model.named_modules() if isinstance(m, theirs.nn.Linear4bit)}


def their_bits(linear: Any) -> np.ndarray:
    """What bitsandbytes dequantizes a linear's weight to, as integers."""
    import bitsandbytes as theirs

    return torch_bits(theirs.functional.dequantize_4bit(linear.weight.data, linear.weight.quant_state))


def torch_bits(values: Any) -> np.ndarray:
    """`bits` of a tensor."""
    import torch

    integers = values.view({2: torch.uint16, 4: torch.uint32}[values.itemsize]).numpy()
    return np.where((values == 0).numpy(), 0, integers)


def their_bytes(tensor: Any) -> bytes:
    import torch

    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def their_logits(model: Any) -> np.ndarray:
    """Of their model with its weights dequantized to their own dtype, in float32 from there on."""
    import torch

    with torch.no_grad():
        return torch.nn.Module.float(model.dequantize())(torch.from_numpy(INPUT_IDS).long()).logits.numpy()


def our_logits(folder: ModelFolder, kind: QuantizationSettings) -> np.ndarray:
    config = read_config(folder)
    engine = Engine(config, None, kind, compute_dtype=jnp.float32)
    return np.asarray(engine.logits(load_weights(folder, config, kind, "device"), [{}], INPUT_IDS))


THEIRS = {
    "nf4, nested": ({"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}, {}, {}),
    "nf4": ({"bnb_4bit_quant_type": "nf4"}, {}, {}),
    "fp4, nested, in shards": (
        {"bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": True},
        {},
        {"max_shard_size": "10KB"},
    ),
    "fp4": ({"bnb_4bit_quant_type": "fp4"}, {}, {}),
    "nf4, nested, stored as bfloat16, in shards": (
        {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_quant_storage": "bfloat16"},
        {},
        {"max_shard_size": "10KB"},
    ),
    "fp4, stored as float32": ({"bnb_4bit_quant_type": "fp4", "bnb_4bit_quant_storage": "float32"}, {}, {}),
    "nf4, nested, of float16": (
        {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
        {"dtype": np.float16, "torch_dtype": "float16"},
        {},
    ),
}


@pytest.mark.parametrize(("settings", "source", "saving"), THEIRS.values(), ids=THEIRS.keys())
def test_what_they_write_is_read_as_it_is(
    tmp_path: Path, settings: dict[str, Any], source: dict[str, Any], saving: dict[str, Any]
) -> None:
    """Codes, scales and offset are theirs byte for byte, and so are the values: nothing was quantized again."""
    pytest.importorskip("torch")
    from transformers import BitsAndBytesConfig

    model = tiny.write_model(tmp_path / "model", num_hidden_layers=1, tie_word_embeddings=False, **source)
    theirs = load_theirs(model, quantization_config=BitsAndBytesConfig(load_in_4bit=True, **settings))
    theirs.save_pretrained(tmp_path / "theirs", **saving)
    folder = ModelFolder(tmp_path / "theirs")
    assert (len(folder.shards) > 3) == bool(saving)
    read_config(folder)
    linears = their_linears(theirs)
    assert linears.keys() == set(linear_names(folder))
    for name, linear in linears.items():
        state, found = linear.weight.quant_state, bitsandbytes.read(folder, name)
        assert found.codes.tobytes() == their_bytes(linear.weight.data)
        assert found.absmax.tobytes() == their_bytes(state.absmax)
        assert (found.shape, found.quant_type) == (tuple(state.shape), settings["bnb_4bit_quant_type"])
        assert f"torch.{found.dtype}" == str(state.dtype)
        assert state.nested == settings.get("bnb_4bit_use_double_quant", False) == (found.nested_absmax is not None)
        if state.nested:
            assert found.nested_absmax.tobytes() == their_bytes(state.state2.absmax)
            assert found.nested_offset.tobytes() == their_bytes(state.offset.reshape(1))
        np.testing.assert_array_equal(bits(jitted_dequantize(found)), their_bits(linear))


def test_what_was_float16_runs_as_float16(tmp_path: Path) -> None:
    """Rounding its weights to bfloat16 as well would show."""
    pytest.importorskip("torch")
    from transformers import BitsAndBytesConfig

    model = tiny.write_model(tmp_path / "model", dtype=np.float16, torch_dtype="float16", num_hidden_layers=1)
    # What is not in 4 bits is cast to bfloat16 here; make that change nothing.
    tensors = safetensors.numpy.load_file(model / "model.safetensors")
    plain = {n: t.astype(ml_dtypes.bfloat16).astype(t.dtype) for n, t in tensors.items() if not NAMES.parse_linear(n)}
    safetensors.numpy.save_file({**tensors, **plain}, model / "model.safetensors", {"format": "pt"})
    theirs = load_theirs(model, quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"))
    theirs.save_pretrained(tmp_path / "theirs")
    found = our_logits(ModelFolder(tmp_path / "theirs"), QuantizationSettings(double_quant=False))
    expected = their_logits(load_theirs(tmp_path / "theirs"))
    assert np.abs(found - expected).max() <= LOGITS_RTOL * np.abs(expected).max()


@every_kind
def test_what_we_write_they_read(ours: dict[str, Path], kind: QuantizationSettings) -> None:
    """Every weight has the same bits, and the whole model gives the engine's logits.

    Up to float32 where transformers has dequantized it; up to a dozen roundings of weights and hidden states to bfloat16 as
    bitsandbytes runs it.
    """
    torch = pytest.importorskip("torch")
    reference = load_theirs(ours[kind_name(kind)])
    folder = ModelFolder(ours[kind_name(kind)])
    linears = their_linears(reference)
    assert linears.keys() == set(linear_names(folder))
    for name, linear in linears.items():
        np.testing.assert_array_equal(bits(jitted_dequantize(bitsandbytes.read(folder, name))), their_bits(linear))
    found = our_logits(folder, kind)
    with torch.no_grad():
        as_they_run_it = reference(torch.from_numpy(INPUT_IDS).long()).logits.float().numpy()
    expected = their_logits(load_theirs(ours[kind_name(kind)]))
    assert np.abs(found - expected).max() <= LOGITS_RTOL * np.abs(expected).max()
    assert np.linalg.norm(found - as_they_run_it) <= 12 * BF16_ROUNDING * np.linalg.norm(expected)


def test_our_config_is_theirs(plain: Path, ours: dict[str, Path], tmp_path: Path) -> None:
    """The block in `config.json`, and the state but for the spaces at its end."""
    pytest.importorskip("torch")
    from transformers import BitsAndBytesConfig

    settings = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": "bfloat16"}
    theirs = load_theirs(plain, quantization_config=BitsAndBytesConfig(load_in_4bit=True, **settings))
    theirs.save_pretrained(tmp_path / "theirs")
    folders = [ModelFolder(path) for path in (ours["nf4-double"], tmp_path / "theirs")]
    blocks = [folder.config["quantization_config"] for folder in folders]
    assert blocks[0] == blocks[1]
    assert [folder.config["dtype" if "dtype" in folder.config else "torch_dtype"] for folder in folders] == [
        "bfloat16"
    ] * 2
    assert set(folders[0].names) == set(folders[1].names)
    for name in folders[0].names:
        if bitsandbytes.STATE in name:
            mine, yours = (json.loads(folder.read_bytes(name)) for folder in folders)
            assert list(mine) == list(yours)
            assert mine.pop("nested_offset") == pytest.approx(yours.pop("nested_offset"), rel=1e-6)
            assert mine == yours
        elif "nested" not in name and "absmax" not in name:  # whose mean is a sum in another order
            assert folders[0].read_bytes(name) == folders[1].read_bytes(name)


def assert_read_into_what_is_given(folder: ModelFolder, expected: nf4.QuantizedTensor) -> None:
    """Every array is a view of what `room` made, and what is beside it stays."""
    made: list[np.ndarray] = []

    def room(sizes: Sequence[int]) -> list[np.ndarray]:
        made.extend(np.full(size + 8, 7, np.uint8) for size in sizes)
        return [array[:-8] for array in made]

    found = bitsandbytes.read(folder, UP, room)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    leaves = jax.tree.leaves(found)
    for leaf, other, array in zip(leaves, jax.tree.leaves(expected), made[: len(leaves)], strict=True):
        assert leaf.ctypes.data == array.ctypes.data and (array[-8:] == 7).all()
        assert (leaf.dtype, leaf.shape, leaf.tobytes()) == (other.dtype, other.shape, other.tobytes())


@pytest.mark.parametrize(("shape", "kind"), list(zip([(1, 1), (3, 5), (5, 26), (129, 256)], KINDS, strict=True)))
def test_ragged_shapes(tmp_path: Path, shape: tuple[int, int], kind: QuantizationSettings) -> None:
    """Written, read back and read by bitsandbytes, also where the last byte or block is not full."""
    weight = np.random.default_rng(1).standard_normal(shape).astype(ml_dtypes.bfloat16)
    quantized = nf4.quantize(jnp.asarray(weight), kind.double_quant, kind.quant_type)
    specs = bitsandbytes.specs(UP, shape, kind)
    assert sum(spec.nbytes for spec in specs) % 8 == 0
    write_shard(tmp_path / "model.safetensors", specs, bitsandbytes.tensors(UP, quantized))
    write_json(tmp_path / "config.json", {"quantization_config": bitsandbytes.quantization_config(kind)})
    found = bitsandbytes.read(ModelFolder(tmp_path), UP)
    assert jax.tree.structure(found) == jax.tree.structure(quantized)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(quantized), strict=True):
        assert (one.dtype, one.shape, one.tobytes()) == (other.dtype, other.shape, np.asarray(other).tobytes())
    assert_read_into_what_is_given(ModelFolder(tmp_path), found)

    torch = pytest.importorskip("torch")
    theirs = pytest.importorskip("bitsandbytes").functional
    import safetensors.torch

    tensors = safetensors.torch.load_file(tmp_path / "model.safetensors")
    codes = tensors.pop(UP)
    assert codes.shape == theirs.quantize_4bit(torch.zeros(shape, dtype=torch.bfloat16))[0].shape
    with torch.compiler.set_stance("force_eager"):  # odd rows are compiled otherwise, for seconds each
        values = theirs.dequantize_4bit(codes, theirs.QuantState.from_dict(tensors, torch.device("cpu")))
    if codes.shape[0] == 1:
        values = values.t()  # bitsandbytes takes one row of codes for a transposed weight
    np.testing.assert_array_equal(bits(nf4.dequantize(quantized)), torch_bits(values))


@pytest.mark.parametrize("offset", [0.0, 0.1, 1e-45, 3e38, -1.1754943e-38, 0.0001234567, np.pi])
def test_an_offset_keeps_its_bits(offset: float) -> None:
    """Through its decimal digits, in a state whose length was settled before they were known."""
    quantized = nf4.quantize(jnp.ones((4, 16)))
    quantized = quantized.replace(nested_offset=np.float32(offset))
    state = bitsandbytes.tensors(UP, quantized)[-1]
    assert state.shape == bitsandbytes.specs(UP, (4, 16), QuantizationSettings())[-1].shape
    assert np.float32(json.loads(state.tobytes())["nested_offset"]) == np.float32(offset)


def test_a_state_names_what_was_quantized() -> None:
    """`dtype` is what dequantizing rounds to; shorter names fit the length of the longest."""
    quantized = nf4.quantize(jnp.ones((4, 16), jnp.float16))
    assert json.loads(bitsandbytes.tensors(UP, quantized)[-1].tobytes())["dtype"] == "float16"


def test_the_library_reads_it_too(ours: dict[str, Path]) -> None:
    """safetensors' own reader accepts the file, and F32 tensors lie on multiples of four bytes."""
    path = ours["nf4-double"] / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    assert set(tensors) == set(ModelFolder(path.parent).names)
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    assert header.pop("__metadata__") == {"format": "pt"}
    assert not [n for n, entry in header.items() if entry["dtype"] == "F32" and entry["data_offsets"][0] % 4]
