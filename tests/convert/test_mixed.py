"""Folders in bitsandbytes' 4 bits some of whose linears are in 16 or 8 bits: read as transformers reads them, each in its own format."""

import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from convert.adapters.adapter import load_adapter
from convert.files import int8
from convert.files.folder import ModelFolder
from convert.files.prequantized import extra_bytes, plain_linears
from convert.files.remarks import remarks
from convert.files.shards import PT_METADATA, TensorSpec, write_shard
from convert.jobs.check import check_merge
from convert.load import load_weights, read_config, read_layer
from convert.merge import merge
from convert.model import load_tokenizer
from qlora_jax.base.errors import InputError
from qlora_jax.config import LoraSettings, QuantizationSettings
from qlora_jax.data import Batch
from qlora_jax.engine.engine import Engine
from qlora_jax.ops.nf4 import QuantizedTensor
from qlora_jax.runtime.placement import Where, nbytes, one_device
from tests.helpers import tiny
from tests.helpers.peft_files import peft_adapter
from tests.helpers.tiny import NAMES

NF4 = QuantizationSettings()
IDS = np.random.default_rng(0).integers(0, 256, (1, 2, 24)).astype(np.int32)
DOWN, QUERIES, OUT = NAMES.linear(0, "down_proj"), NAMES.linear(1, "q_proj"), NAMES.linear(2, "o_proj")
TOLERANCE = 1e-5
"""Relative to the largest: float32 sums of 64 to 128 products, in another order."""


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_model(tmp_path_factory.mktemp("mixed") / "plain", num_hidden_layers=3)


@pytest.fixture(scope="module")
def mixed(plain: Path) -> Path:
    """As transformers saves it: layer 0's down_proj and layer 1's attention are not in 4 bits."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    skipped = ["lm_head", "model.layers.0.mlp.down_proj", "model.layers.1.self_attn"]
    how = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
        llm_int8_skip_modules=skipped,
    )
    model = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.bfloat16, quantization_config=how)
    out = plain.parent / "mixed"
    model.save_pretrained(out)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(plain / name, out / name)
    return out


@pytest.fixture(scope="module")
def in_8_bits(mixed: Path) -> Path:
    """The same with layer 2's o_proj in 8 bits, by bitsandbytes."""
    import torch
    from bitsandbytes import functional

    folder, out = ModelFolder(mixed), mixed.parent / "int8"
    weight = torch.from_numpy(ModelFolder(mixed.parent / "plain").read(OUT).astype(np.float32))
    codes, scales, _ = functional.int8_vectorwise_quant(weight.half())
    tensors = {name: folder.read(name) for name in folder.names if not name.startswith(OUT)}
    tensors[OUT], tensors[int8.scales_of(OUT)] = codes.numpy(), scales.numpy()
    tensors[f"{OUT}_format"] = np.zeros((), np.uint8)
    shutil.copytree(mixed, out)
    write(out, tensors)
    return out


def write(folder: Path, tensors: dict[str, np.ndarray]) -> None:
    kinds = {"bfloat16": "BF16", "float32": "F32", "uint8": "U8", "int8": "I8"}
    specs = [TensorSpec(name, kinds[values.dtype.name], values.shape) for name, values in tensors.items()]
    write_shard(folder / "model.safetensors", specs, iter(tensors.values()), PT_METADATA)


def engine_of(folder: ModelFolder, where: Where = "device", lora: LoraSettings | None = None, **options: Any) -> Any:
    config = read_config(folder)
    engine = Engine(config, lora, NF4, compute_dtype=jnp.float32, **options)
    return engine, load_weights(folder, config, NF4, where)


def test_logits_are_those_of_transformers(mixed: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(mixed, device_map="cpu").eval()
    with torch.no_grad():
        theirs = torch.nn.Module.float(model.dequantize())(torch.from_numpy(IDS[0]).long()).logits.numpy()
    engine, weights = engine_of(ModelFolder(mixed))
    ours = np.asarray(engine.logits(weights, [{}] * 3, IDS[0]))
    assert np.abs(ours - theirs).max() <= TOLERANCE * np.abs(theirs).max()


def test_each_linear_is_in_its_own_format(mixed: Path, plain: Path) -> None:
    folder = ModelFolder(mixed)
    attention = [NAMES.linear(1, name) for name in ("q_proj", "k_proj", "v_proj", "o_proj")]
    assert set(plain_linears(folder)) == {DOWN, *attention}
    tree = read_layer(folder, 0, NF4)
    assert isinstance(tree["up_proj"]["weight"], QuantizedTensor)
    np.testing.assert_array_equal(tree["down_proj"]["weight"], ModelFolder(plain).read(DOWN))
    sizes = [nbytes(read_layer(folder, layer, NF4)) for layer in range(3)]
    assert [size - sizes[2] for size in sizes] == extra_bytes(folder, NF4)
    (line,) = [line for line in remarks(folder, read_config(folder), load_tokenizer(mixed)) if "in 4 bits" in line]
    assert "5 linears are not in 4 bits" in line


def dense(folder: Path, out: Path) -> ModelFolder:
    """The same numbers, unquantized."""
    pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(folder, device_map="cpu").dequantize().save_pretrained(out)
    return ModelFolder(out)


@pytest.mark.parametrize("where", ["device", "host", "disk"])
def test_gradients_are_those_of_the_dense_weights(mixed: Path, tmp_path: Path, where: Where) -> None:
    """Layers of several structures are walked; some save their activations, some are run again."""
    lora = LoraSettings(r=2, lora_dropout=0.0)
    batch = Batch(IDS, IDS, IDS[:, :, 1:].size, IDS.size)
    found = []
    for folder, kind in ((ModelFolder(mixed), NF4), (dense(mixed, tmp_path / "dense"), None)):
        config = read_config(folder)
        engine = Engine(config, lora, NF4, compute_dtype=jnp.float32, keep=2)
        weights = load_weights(folder, config, kind, where if kind else "device")
        adapters = jax.tree.map(lambda leaf: one_device().put(np.full(leaf.shape, 0.01, np.float32), "device"),
                                engine.init_adapters(0))  # fmt: skip
        loss, grads = engine.value_and_grad(weights, adapters, batch, one_device().put(jax.random.key(0), "device"))
        found.append((float(loss), jax.tree.map(np.asarray, grads.layers)))
    (ours, our_grads), (theirs, their_grads) = found
    assert ours == pytest.approx(theirs, rel=TOLERANCE)
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(their_grads))
    for one, other in zip(jax.tree.leaves(our_grads), jax.tree.leaves(their_grads), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=10 * TOLERANCE * largest)


def test_8_bits_are_decoded_as_bitsandbytes_decodes_them(in_8_bits: Path) -> None:
    import torch
    from bitsandbytes import functional

    folder = ModelFolder(in_8_bits)
    weight = read_layer(folder, 2, NF4)["o_proj"]["weight"]
    codes, scales = (torch.from_numpy(folder.read(name)) for name in (OUT, int8.scales_of(OUT)))
    theirs = functional.int8_vectorwise_dequant(codes, scales).to(torch.bfloat16).view(torch.uint16).numpy()
    np.testing.assert_array_equal(weight.view(np.uint16), theirs)
    lines = "\n".join(remarks(folder, read_config(folder), load_tokenizer(in_8_bits)))
    assert "1 linears are in 8 bits" in lines


@pytest.mark.parametrize("damage", ["scales", "layout", "shape"])
def test_8_bits_that_are_damaged(in_8_bits: Path, tmp_path: Path, damage: str) -> None:
    folder = ModelFolder(in_8_bits)
    tensors = {name: folder.read(name) for name in folder.names}
    name, value = {
        "scales": (int8.scales_of(OUT), np.ones(7, np.float32)),
        "layout": (f"{OUT}_format", np.ones((), np.uint8)),
        "shape": (OUT, np.ones((64, 32), np.int8)),
    }[damage]
    shutil.copytree(in_8_bits, tmp_path / "bad")
    write(tmp_path / "bad", tensors | {name: value})
    with pytest.raises(InputError, match=name.replace(".", r"\.")):
        read_config(ModelFolder(tmp_path / "bad"))


def test_a_merge_adds_to_each_weight_as_it_is(in_8_bits: Path, plain: Path, tmp_path: Path) -> None:
    adapter = peft_adapter(tmp_path / "adapter", plain, target_modules=["q_proj", "o_proj"])
    folder = ModelFolder(in_8_bits)
    loaded = load_adapter(adapter, read_config(folder), folder)
    merge(folder, loaded, tmp_path / "out", "dequantized")
    check_merge(folder, loaded, tmp_path / "out", "dequantized")
    merged = ModelFolder(tmp_path / "out")
    assert not [name for name in merged.names if int8.is_companion(folder, name)] and not merged.is_4bit
    base = {QUERIES: folder.read(QUERIES), OUT: read_layer(folder, 2, NF4)["o_proj"]["weight"]}
    for name, weight in base.items():
        pair = loaded.pairs[NAMES.parse_target(name)]
        expected = weight.astype(np.float32) + pair.scaling * (pair.lora_b @ pair.lora_a)
        np.testing.assert_array_equal(merged.read(name), expected.astype(ml_dtypes.bfloat16))
    np.testing.assert_array_equal(merged.read(DOWN), folder.read(DOWN))
