"""Merging rounds once, touches nothing else, and gives peft's bits."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from convert import merge as merge_module
from convert.adapters.adapter import WEIGHTS_FILE, Adapter, load_adapter, save_adapter
from convert.adapters.config import CONFIG_FILE
from convert.files import bitsandbytes
from convert.files.folder import ModelFolder
from convert.files.names import ADAPTER_PARTS
from convert.files.shards import INDEX_NAME, TensorSpec, write_index, write_json, write_shard
from convert.load import load_weights, read_config
from convert.merge import Base, main, merge
from convert.quantize import quantize
from qlora_jax.base.errors import EXIT_BAD_INPUT, InputError
from qlora_jax.config import LoraSettings, QuantizationSettings
from qlora_jax.engine.engine import Engine
from qlora_jax.model.architecture import Architecture
from qlora_jax.ops import nf4
from tests.helpers import tiny
from tests.helpers.tiny import LINEAR_NAMES, NAMES

BF16_EPSILON = 2.0**-8
"""Half the distance between neighbours in bfloat16 at 1.0: the relative error of one rounding."""
FLOAT32_PRODUCT = 4 * 2.0**-24
"""Relative error of a float32 sum of r = 4 products, before the one rounding to bfloat16."""
EXACT_GRID = 2.0**-10
"""A and B in multiples of this, below 1, and a scaling that is a power of two: products are multiples of 2^-20 and sums of four of them
need 22 bits, so float32 holds B·A exactly in whatever order a library adds."""
ALL = LoraSettings(r=4, lora_alpha=16.0)
QV = LoraSettings(r=4, lora_alpha=16.0, target_modules=["q_proj", "v_proj"], use_rslora=True)
INPUT_IDS = np.random.default_rng(0).integers(0, 256, (2, 24)).astype(np.int32)
BASES = ("original", "dequantized")


def make_adapter(
    folder: Path,
    model: Path,
    lora: LoraSettings = ALL,
    *,
    double_quant: bool = True,
    named: str | None = None,
    grid: float | None = None,
) -> Path:
    """An adapter with A and B random, large enough to change most weights; with `grid`, rounded to multiples of it."""
    config = read_config(ModelFolder(model))
    rng = np.random.default_rng(7)

    def pair(rows: int, columns: int) -> dict[str, Any]:
        lora_a = rng.standard_normal((lora.r, columns)) * columns**-0.5
        lora_b = rng.standard_normal((rows, lora.r)) * 0.05
        if grid is not None:
            lora_a, lora_b = np.round(lora_a / grid) * grid, np.round(lora_b / grid) * grid
        return {"lora_a": jnp.asarray(lora_a, jnp.float32), "lora_b": jnp.asarray(lora_b, jnp.float32)}

    shapes = config.linear_shapes()
    layers = range(config.num_hidden_layers)
    adapters = [{name: {"adapter": pair(*shapes[name])} for name in lora.targets(shapes)} for _ in layers]
    save_adapter(
        folder,
        adapters,
        lora,
        QuantizationSettings(double_quant=double_quant),
        named or str(model),
        architecture=config,
    )
    return folder


def run_merge(model: Path, adapter: Path, out: Path, base: Base) -> Adapter:
    folder = ModelFolder(model)
    loaded = load_adapter(adapter, read_config(folder))
    merge(folder, loaded, out, base)
    return loaded


def dequantized(weight: np.ndarray, double_quant: bool = True) -> np.ndarray:
    return np.asarray(nf4.dequantize(nf4.quantize(jnp.asarray(weight), double_quant)))


def base_weight(folder: ModelFolder, name: str, base: str, double_quant: bool = True) -> np.ndarray:
    """A linear's weight before the adapter: bfloat16, and for `dequantized` through four bits and back."""
    weight = folder.read(name).astype(ml_dtypes.bfloat16)
    return weight if base == "original" else dequantized(weight, double_quant)


def read_all(folder: Path) -> dict[str, np.ndarray]:
    model = ModelFolder(folder)
    return {name: model.read(name) for name in model.names}


def bits(array: np.ndarray) -> np.ndarray:
    return array.view(np.uint16)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three shards, dealt so that no layer is in one of them, and an output matrix of its own."""
    folder = tiny.write_model(tmp_path_factory.mktemp("base") / "model", shards=3, tie_word_embeddings=False)
    (folder / "LICENSE").write_text("do as you like")
    (folder / "README.md").write_text("about the base, not about the merged model")
    return folder


@pytest.fixture(scope="module")
def adapter(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(tmp_path_factory.mktemp("adapter") / "adapter", model)


@pytest.fixture(scope="module")
def merged(model: Path, adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The merged folder of either base; not to be written to."""
    outs = {base: tmp_path_factory.mktemp("merged") / base for base in BASES}
    for base, out in outs.items():
        run_merge(model, adapter, out, base)
    return outs


# The numbers


@pytest.mark.parametrize("base", BASES)
def test_one_rounding_of_the_exact_sum(model: Path, adapter: Path, merged: dict[str, Path], base: Base) -> None:
    folder = ModelFolder(model)
    loaded = load_adapter(adapter, read_config(folder))
    results = read_all(merged[base])
    changed = 0
    for (layer, name), pair in loaded.pairs.items():
        lora_a, lora_b = pair.lora_a, pair.lora_b
        tensor = NAMES.linear(layer, name)
        weight = base_weight(folder, tensor, base)
        delta = pair.scaling * (lora_b.astype(np.float64) @ lora_a.astype(np.float64))
        exact = weight.astype(np.float64) + delta
        magnitudes = pair.scaling * (np.abs(lora_b).astype(np.float64) @ np.abs(lora_a)) + np.abs(exact)
        error = np.abs(results[tensor].astype(np.float64) - exact)
        assert (error <= BF16_EPSILON * np.abs(exact) + FLOAT32_PRODUCT * magnitudes).all()
        changed += int((bits(results[tensor]) != bits(weight)).sum())
    assert changed > 50_000, "the adapter must change most of the 82 thousand weights"


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("lora", [ALL, QV], ids=["all-linear", "q and v, rslora"])
def test_pefts_bits(tmp_path: Path, model: Path, base: Base, lora: LoraSettings) -> None:
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    adapter = make_adapter(tmp_path / "adapter", model, lora, grid=EXACT_GRID)
    run_merge(model, adapter, tmp_path / "ours", base)
    start = model if base == "original" else write_dequantized(tmp_path / "start", model)
    wrapped = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(start, dtype=torch.bfloat16), adapter)
    theirs = wrapped.merge_and_unload().state_dict()
    ours = read_all(tmp_path / "ours")
    assert theirs.keys() == ours.keys()
    for name, tensor in theirs.items():
        np.testing.assert_array_equal(bits(ours[name]), tensor.view(torch.uint16).numpy(), err_msg=name)


def write_dequantized(out: Path, model: Path) -> Path:
    """The base with every linear through four bits and back, as a folder that transformers loads."""
    folder = ModelFolder(model)
    out.mkdir()
    tensors = {
        name: base_weight(folder, name, "dequantized") if NAMES.parse_linear(name) else folder.read(name)
        for name in folder.names
    }
    write_shard(
        out / "model.safetensors", [TensorSpec(n, "BF16", t.shape) for n, t in tensors.items()], tensors.values()
    )
    write_json(out / "config.json", folder.config)
    return out


def test_the_two_bases_differ(merged: dict[str, Path]) -> None:
    original, through_four_bits = read_all(merged["original"]), read_all(merged["dequantized"])
    for name, tensor in original.items():
        same = np.array_equal(bits(tensor), bits(through_four_bits[name]))
        assert same == (NAMES.parse_linear(name) is None), name


def test_logits_of_base_and_adapter(model: Path, adapter: Path, merged: dict[str, Path]) -> None:
    """Float32 compute on both sides, so what differs is one bfloat16 rounding of each merged weight.

    Rounding moves a weight by at most BF16_EPSILON of itself, independently of its neighbours, and so each linear's output by at most
    that share in the Euclidean norm of the products; 2 layers of 4 linears in a row and the residual stream add up to less than their sum.
    """
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    folder = ModelFolder(model)
    config = read_config(folder)
    loaded = load_adapter(adapter, config)
    layers = range(config.num_hidden_layers)
    adapters = [
        {
            name: {"adapter": {part: jnp.asarray(getattr(pair, part)) for part in ADAPTER_PARTS}}
            for (at, name), pair in loaded.pairs.items()
            if at == layer
        }
        for layer in layers
    ]
    weights = load_weights(folder, config, QuantizationSettings(), "device")
    ours = np.asarray(trained_logits(config, ALL, weights, adapters))
    without = np.asarray(trained_logits(config, None, weights, [{} for _ in layers]))
    reference = AutoModelForCausalLM.from_pretrained(merged["dequantized"], dtype=torch.float32)
    with torch.no_grad():
        theirs = reference(torch.from_numpy(INPUT_IDS.astype(np.int64))).logits.numpy()
    tolerance = 8 * BF16_EPSILON  # 3 %
    assert np.linalg.norm(ours - theirs) <= tolerance * np.linalg.norm(theirs)
    assert np.linalg.norm(without - theirs) > 10 * tolerance * np.linalg.norm(theirs)


def trained_logits(config: Architecture, lora: LoraSettings | None, weights: Any, adapters: Any) -> Any:
    engine = Engine(config, lora, QuantizationSettings(), compute_dtype=jnp.float32)
    return engine.logits(weights, adapters, INPUT_IDS)


@pytest.mark.parametrize(("dtype", "stored"), [(np.float16, "F16"), (np.float32, "F32")])
@pytest.mark.parametrize("base", BASES)
def test_other_dtypes(tmp_path: Path, base: Base, dtype: Any, stored: str) -> None:
    """Linears are cast to bfloat16 first, as they were for training; what has no adapter keeps its bytes and its dtype."""
    model = tiny.write_model(tmp_path / "model", dtype=dtype, torch_dtype=np.dtype(dtype).name)
    loaded = run_merge(model, make_adapter(tmp_path / "adapter", model, QV), tmp_path / "out", base)
    folder, result = ModelFolder(model), ModelFolder(tmp_path / "out")
    assert result.config["torch_dtype"] == "bfloat16"
    for name in folder.names:
        linear = NAMES.parse_linear(name)
        if linear in loaded.pairs or (linear and base == "dequantized"):
            assert result.spec(name).dtype == "BF16"
            expected = base_weight(folder, name, base)
            if linear in loaded.pairs:
                expected = merge_module.merged_weight(expected, loaded.pairs[linear])
            np.testing.assert_array_equal(bits(result.read(name)), bits(expected), err_msg=name)
        else:
            assert result.spec(name).dtype == stored
            assert result.read_bytes(name) == folder.read_bytes(name)


@pytest.mark.parametrize("double_quant", [True, False])
def test_the_adapters_own_quantization_is_used(tmp_path: Path, tiny_folder: Path, double_quant: bool) -> None:
    adapter = make_adapter(tmp_path / "adapter", tiny_folder, QV, double_quant=double_quant)
    run_merge(tiny_folder, adapter, tmp_path / "out", "dequantized")
    base, result = ModelFolder(tiny_folder), ModelFolder(tmp_path / "out")
    name = NAMES.linear(0, "up_proj")  # without an adapter: the base, dequantized
    np.testing.assert_array_equal(bits(result.read(name)), bits(base_weight(base, name, "dequantized", double_quant)))
    assert (bits(result.read(name)) != bits(base_weight(base, name, "dequantized", not double_quant))).any()


@pytest.mark.parametrize("base", BASES)
def test_an_adapter_on_q_and_v_only(tmp_path: Path, tiny_folder: Path, base: Base) -> None:
    run_merge(tiny_folder, make_adapter(tmp_path / "adapter", tiny_folder, QV), tmp_path / "out", base)
    before, after = ModelFolder(tiny_folder), ModelFolder(tmp_path / "out")
    assert after.names == before.names
    for name in before.names:
        linear = NAMES.parse_linear(name)
        changes = linear is not None and (base == "dequantized" or linear[1] in QV.target_modules)
        assert (after.read_bytes(name) != before.read_bytes(name)) == changes, name


# The folder


@pytest.mark.parametrize("base", BASES)
def test_everything_else_is_kept(model: Path, merged: dict[str, Path], base: Base) -> None:
    before, after = ModelFolder(model), ModelFolder(merged[base])
    assert after.shards == before.shards
    assert len(after.shards) == 3
    for shard in before.shards:
        assert after.specs(shard) == before.specs(shard)  # names, dtypes, shapes and their order
        assert after.metadata(shard) == {"format": "pt"}
    untouched = [name for name in before.names if NAMES.parse_linear(name) is None]
    assert len(untouched) == 7  # embedding, head, final norm, two norms in each of two layers
    for name in untouched:
        assert after.read_bytes(name) == before.read_bytes(name)
    read_config(after)


def test_the_index_is_valid(merged: dict[str, Path]) -> None:
    out = merged["dequantized"]
    index = json.loads((out / INDEX_NAME).read_text())
    shards = {path.name: safetensors.numpy.load_file(path) for path in sorted(out.glob("*.safetensors"))}
    assert index["weight_map"] == {name: shard for shard, tensors in shards.items() for name in tensors}
    sizes = [tensor.nbytes for tensors in shards.values() for tensor in tensors.values()]
    assert index["metadata"]["total_size"] == sum(sizes)


def test_companions_come_along(model: Path, merged: dict[str, Path]) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json", "LICENSE"):
        assert (merged["original"] / name).read_bytes() == (model / name).read_bytes()
    assert not (merged["original"] / "README.md").exists()
    assert not list(merged["original"].parent.glob(".*")), "nothing half-made is left"


@pytest.mark.parametrize("key", ["torch_dtype", "dtype"])
def test_the_config_says_bfloat16_and_no_more(tmp_path: Path, key: str) -> None:
    model = tiny.write_model(tmp_path / "model", dtype=np.float16)
    config = {name: value for name, value in tiny.hf_config().items() if name != "torch_dtype"}
    write_json(model / "config.json", {**config, key: "float16", "quantization_config": None})
    run_merge(model, make_adapter(tmp_path / "adapter", model), tmp_path / "out", "original")
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {**config, key: "bfloat16"}


def test_transformers_loads_the_folder(merged: dict[str, Path]) -> None:
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for out in merged.values():
        reference, report = AutoModelForCausalLM.from_pretrained(out, dtype="auto", output_loading_info=True)
        assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert reference.dtype == torch.bfloat16
        assert AutoTokenizer.from_pretrained(out)("abc")["input_ids"] == tiny.make_tokenizer()("abc")["input_ids"]


# What may go wrong


def test_what_is_there_is_not_overwritten(tmp_path: Path, model: Path, adapter: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("precious")
    with pytest.raises(InputError, match="something there already"):
        run_merge(model, adapter, out, "original")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "mine"]
    assert (out / "mine").read_text() == "precious"


def test_a_failure_in_the_middle_is_in_nobodys_way(
    tmp_path: Path, model: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0
    real = merge_module.merged_weight

    def failing(*args: Any) -> np.ndarray:
        nonlocal calls
        calls += 1
        if calls == 9:
            raise OSError(28, "No space left on device")
        return real(*args)

    monkeypatch.setattr(merge_module, "merged_weight", failing)
    with pytest.raises(InputError, match="No space left"):
        run_merge(model, adapter, tmp_path / "out", "original")
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    run_merge(model, adapter, tmp_path / "out", "original")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_progress_counts_every_byte(tmp_path: Path, model: Path, adapter: Path) -> None:
    folder = ModelFolder(model)
    advanced: list[int] = []
    merge(folder, load_adapter(adapter, read_config(folder)), tmp_path / "out", "original", advance=advanced.append)
    assert len(advanced) == len(folder.names)
    assert sum(advanced) == sum(folder.spec(name).nbytes for name in folder.names)


# A base in 4 bits

FP4 = QuantizationSettings(quant_type="fp4", double_quant=False)


@pytest.fixture(scope="module")
def in_4_bits(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base in what `adapter` was trained on; not to be written to."""
    out = tmp_path_factory.mktemp("4bit") / "model"
    quantize(ModelFolder(model), out, QuantizationSettings())
    return out


def test_a_base_in_4_bits_is_the_dequantized_base(
    tmp_path: Path, in_4_bits: Path, adapter: Path, merged: dict[str, Path]
) -> None:
    """To the byte of every file: order, shards, index and config included."""
    run_merge(in_4_bits, adapter, tmp_path / "out", "dequantized")
    assert_same_folder(tmp_path / "out", merged["dequantized"])
    advanced: list[int] = []
    folder = ModelFolder(in_4_bits)
    merge(
        folder, load_adapter(adapter, read_config(folder)), tmp_path / "again", "dequantized", advance=advanced.append
    )
    result = ModelFolder(tmp_path / "again")
    assert advanced == [spec.nbytes for shard in result.shards for spec in result.specs(shard)]


def test_companions_in_a_shard_of_their_own(
    tmp_path: Path, in_4_bits: Path, adapter: Path, merged: dict[str, Path]
) -> None:
    """As transformers cuts: anywhere. A shard of which nothing is left is not written."""
    folder = ModelFolder(in_4_bits)
    dealt = tmp_path / "dealt"
    dealt.mkdir()
    weight_map = {}
    for number, companions in enumerate((True, False), 1):
        shard = f"model-0000{number}-of-00002.safetensors"
        chosen = [name for name in folder.names if (bitsandbytes.companion_of(name) is not None) == companions]
        write_shard(dealt / shard, [folder.spec(name) for name in chosen], map(folder.read_bytes, chosen))
        weight_map |= dict.fromkeys(chosen, shard)
    write_index(dealt, weight_map, 0)
    write_json(dealt / "config.json", folder.config)
    run_merge(dealt, adapter, tmp_path / "out", "dequantized")
    assert ModelFolder(tmp_path / "out").shards == ["model-00002-of-00002.safetensors"]
    found, expected = read_all(tmp_path / "out"), read_all(merged["dequantized"])
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_array_equal(bits(found[name]), bits(tensor))


def test_a_float16_base_is_rounded_to_bfloat16_once(tmp_path: Path) -> None:
    """bitsandbytes rounds what was float16 to float16, and the adapter was trained on that."""
    source = tiny.write_model(tmp_path / "model", num_hidden_layers=1, dtype=np.float16)
    folder, kind = ModelFolder(source), QuantizationSettings()
    data: dict[str, tuple[TensorSpec, Any]] = {}
    for name in folder.names:
        if NAMES.parse_linear(name) is None:
            data[name] = (folder.spec(name), folder.read(name))
        else:
            parts = bitsandbytes.tensors(name, nf4.quantize(jnp.asarray(folder.read(name))))
            specs = bitsandbytes.specs(name, folder.spec(name).shape, kind)
            data |= {spec.name: (spec, part) for spec, part in zip(specs, parts, strict=True)}
    specs, tensors = zip(*data.values(), strict=True)
    write_shard(source / "model.safetensors", specs, tensors)
    write_json(source / "config.json", {**folder.config, "quantization_config": bitsandbytes.quantization_config(kind)})
    loaded = run_merge(source, make_adapter(tmp_path / "adapter", source, QV), tmp_path / "out", "dequantized")
    base, results = ModelFolder(source), read_all(tmp_path / "out")
    for layer, name in [(0, name) for name in LINEAR_NAMES]:
        tensor = NAMES.linear(layer, name)
        expected = np.asarray(nf4.dequantize(bitsandbytes.read(base, tensor)))
        assert expected.dtype == np.float16
        if (layer, name) in loaded.pairs:
            pair = loaded.pairs[layer, name]
            expected = expected.astype(np.float32) + pair.lora_b @ pair.lora_a * np.float32(pair.scaling)
        np.testing.assert_array_equal(bits(results[tensor]), bits(expected.astype(ml_dtypes.bfloat16)))


def test_the_original_weights_are_not_in_4_bits(
    tmp_path: Path, in_4_bits: Path, adapter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--adapter", str(adapter), "--out", str(tmp_path / "out"), "--model", str(in_4_bits)]
    assert main([*arguments, "--base", "original"]) == EXIT_BAD_INPUT
    error = capsys.readouterr().err
    assert "its original weights are not here" in error
    assert "give the unquantized model" in error and "--base dequantized" in error
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_of_another_kind_is_refused(tmp_path: Path, model: Path, adapter: Path) -> None:
    quantize(ModelFolder(model), tmp_path / "fp4", FP4)
    with pytest.raises(InputError) as caught:
        run_merge(tmp_path / "fp4", adapter, tmp_path / "out", "dequantized")
    assert caught.value.where == str(adapter)
    assert caught.value.found.startswith('quant_type "nf4", double_quant true, but')
    assert 'quant_type "fp4", double_quant false' in caught.value.expected
    assert [path.name for path in tmp_path.iterdir()] == ["fp4"]


def test_an_adapter_of_an_unknown_kind_is_taken(tmp_path: Path, model: Path, adapter: Path) -> None:
    """peft records nothing; the folder says what is to be said."""
    quantize(ModelFolder(model), tmp_path / "fp4", FP4)
    unrecorded = shutil.copytree(adapter, tmp_path / "adapter")
    tensors = safetensors.numpy.load_file(adapter / WEIGHTS_FILE)
    safetensors.numpy.save_file(tensors, unrecorded / WEIGHTS_FILE, {"format": "pt"})
    loaded = run_merge(tmp_path / "fp4", unrecorded, tmp_path / "out", "dequantized")
    name = NAMES.linear(1, "o_proj")
    weight = nf4.quantize(jnp.asarray(ModelFolder(model).read(name)), FP4.double_quant, FP4.quant_type)
    expected = merge_module.merged_weight(np.asarray(nf4.dequantize(weight)), loaded.pairs[1, "o_proj"])
    np.testing.assert_array_equal(bits(ModelFolder(tmp_path / "out").read(name)), bits(expected))


# The command


def assert_same_folder(one: Path, two: Path) -> None:
    files = sorted(path.name for path in one.iterdir())
    assert files == sorted(path.name for path in two.iterdir())
    for name in files:
        assert (one / name).read_bytes() == (two / name).read_bytes(), name


def test_command_takes_the_model_from_the_adapter(tmp_path: Path, adapter: Path, merged: dict[str, Path]) -> None:
    assert main(["--adapter", str(adapter), "--out", str(tmp_path / "deep" / "out")]) == 0
    assert_same_folder(tmp_path / "deep" / "out", merged["original"])


def test_command_with_model_and_base(
    tmp_path: Path, model: Path, merged: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = make_adapter(tmp_path / "adapter", model, named="/nowhere/to/be/found")
    arguments = ["--adapter", str(adapter), "--out", str(tmp_path / "out"), "--base", "dequantized"]
    assert main([*arguments, "--model", str(model)]) == 0
    assert_same_folder(tmp_path / "out", merged["dequantized"])
    captured = capsys.readouterr()
    assert "merged 14 adapted linears into the dequantized base" in captured.err
    assert captured.out == ""


def no_base_model(adapter: Path) -> None:
    settings = json.loads((adapter / CONFIG_FILE).read_text())
    (adapter / CONFIG_FILE).write_text(json.dumps({**settings, "base_model_name_or_path": None}))


def other_model(adapter: Path) -> None:
    shallow = tiny.write_model(adapter.parent / "shallow", num_hidden_layers=1)
    settings = json.loads((adapter / CONFIG_FILE).read_text())
    (adapter / CONFIG_FILE).write_text(json.dumps({**settings, "base_model_name_or_path": str(shallow)}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (no_base_model, "say which with --model"),
        (other_model, "layer 1 of q_proj: the model has 1 layers"),
        (lambda adapter: (adapter / CONFIG_FILE).unlink(), f"no {CONFIG_FILE}"),
        (lambda adapter: adapter.with_name("out").mkdir(), "something there already"),
    ],
)
def test_command_refuses(
    tmp_path: Path,
    tiny_folder: Path,
    capsys: pytest.CaptureFixture[str],
    damage: Callable[[Path], object],
    message: str,
) -> None:
    adapter = make_adapter(tmp_path / "adapter", tiny_folder)
    damage(adapter)
    before = set(tmp_path.rglob("*"))
    assert main(["--adapter", str(adapter), "--out", str(tmp_path / "out")]) == EXIT_BAD_INPUT
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("error: ") == 1
    assert message in error
    assert set(tmp_path.rglob("*")) == before


def test_help_explains_both_bases(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert "--base {auto,original,dequantized}" in text
    assert "`--base original` adds the adapter to the weights as they were before quantization" in text
    assert "It is the default (`auto`) wherever those" in text
    assert "quantizing it again undoes most" in text
