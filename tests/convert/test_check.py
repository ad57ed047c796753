"""A merge proves itself: right ones pass, however little or much they change; one wrong tensor fails."""

from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from convert.adapters.adapter import load_adapter
from convert.adapters.delta import Base, Pair, adapted
from convert.files.folder import ModelFolder
from convert.files.shards import TensorSpec, write_shard
from convert.jobs.check import Differences, check_merge
from convert.load import read_config
from convert.merge import main, merge
from convert.quantize import quantize
from qlora_jax.base.errors import EXIT_BAD_INPUT, EXIT_INTERRUPTED, InputError
from qlora_jax.config import QuantizationSettings
from tests.convert.test_merge import ALL, QV, make_adapter
from tests.helpers import tiny
from tests.helpers.tiny import LINEAR_NAMES, NAMES

BASES = ("original", "dequantized")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_model(tmp_path_factory.mktemp("base") / "model", tie_word_embeddings=False)


@pytest.fixture(scope="module")
def adapter(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(tmp_path_factory.mktemp("adapter") / "adapter", model, ALL)


def write_merge(model: Path, adapter: Path, out: Path, base: Base = "dequantized") -> Path:
    folder = ModelFolder(model)
    merge(folder, load_adapter(adapter, read_config(folder)), out, base)
    return out


def check(model: Path, adapter: Path, out: Path, base: Base = "dequantized") -> Differences:
    folder = ModelFolder(model)
    return check_merge(folder, load_adapter(adapter, read_config(folder)), out, base)


def replace(out: Path, name: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    """Write the merged folder again with one tensor changed."""
    folder = ModelFolder(out)
    tensors = {each: folder.read(each) for each in folder.names}
    tensors[name] = change(tensors[name].astype(np.float32)).astype(ml_dtypes.bfloat16)
    write_shard(
        out / "model.safetensors", [TensorSpec(n, "BF16", t.shape) for n, t in tensors.items()], tensors.values()
    )


@pytest.mark.parametrize("base", BASES)
def test_a_right_merge_is_as_far_as_rounding_takes_it(tmp_path: Path, model: Path, adapter: Path, base: Base) -> None:
    found = check(model, adapter, write_merge(model, adapter, tmp_path / "out", base), base)
    assert 0 < found.logits == pytest.approx(found.rounding_alone, rel=1e-3)
    assert found.worst_share < 8 * 2.0**-8  # 8 roundings in a row, of a relative 2^-8 at most each
    assert f"at most {found.logits:.2g}" in str(found)


@pytest.mark.parametrize("base", BASES)
def test_a_float32_base_whose_other_linears_are_copied(tmp_path: Path, base: Base) -> None:
    model = tiny.write_model(tmp_path / "model", dtype=np.float32)
    adapter = make_adapter(tmp_path / "adapter", model, QV)
    found = check(model, adapter, write_merge(model, adapter, tmp_path / "out", base), base)
    assert found.logits == pytest.approx(found.rounding_alone, rel=1e-3)


def test_a_base_in_4_bits(tmp_path: Path, model: Path, adapter: Path) -> None:
    quantize(ModelFolder(model), tmp_path / "in_4_bits", QuantizationSettings())
    out = write_merge(tmp_path / "in_4_bits", adapter, tmp_path / "out")
    assert check(tmp_path / "in_4_bits", adapter, out) == check(model, adapter, out)


def test_deltas_smaller_than_the_spacing_of_bfloat16_pass(tmp_path: Path, model: Path) -> None:
    """Rounding loses them whole, which is what a right merge does."""
    small = make_adapter(tmp_path / "adapter", model, ALL.model_copy(update={"lora_alpha": 0.01}))
    found = check(model, small, write_merge(model, small, tmp_path / "out", "original"), "original")
    assert found.worst_share < 1e-3


@pytest.mark.parametrize("key", [(0, "q_proj"), (1, "down_proj")], ids=str)
def test_one_delta_missing_fails(tmp_path: Path, model: Path, adapter: Path, key: tuple[int, str]) -> None:
    out, folder = write_merge(model, adapter, tmp_path / "out", "original"), ModelFolder(model)
    replace(out, NAMES.linear(*key), lambda merged: folder.read(NAMES.linear(*key)))
    with pytest.raises(InputError, match=f"layer {key[0]} of the merged model differs from base") as caught:
        check(model, adapter, out, "original")
    assert "do not use what was written" in caught.value.fix


@pytest.mark.parametrize("name", [NAMES.embedding, NAMES.lm_head, NAMES.final_norm, NAMES.norm(1, "input_layernorm")])
def test_a_tensor_without_a_delta_that_changed_fails(tmp_path: Path, model: Path, adapter: Path, name: str) -> None:
    out = write_merge(model, adapter, tmp_path / "out")
    replace(out, name, lambda tensor: tensor * 1.01 + 0.01)
    with pytest.raises(InputError, match="of the merged model differs"):
        check(model, adapter, out)


@pytest.mark.parametrize("base", BASES)
def test_the_other_base_fails(tmp_path: Path, model: Path, base: Base) -> None:
    adapter = make_adapter(tmp_path / "adapter", model, QV)
    out = write_merge(model, adapter, tmp_path / "out", base)
    with pytest.raises(InputError, match="layer 0 of the merged model differs"):
        check(model, adapter, out, BASES[1 - BASES.index(base)])


def test_another_scaling_fails(tmp_path: Path, model: Path, adapter: Path) -> None:
    more = make_adapter(tmp_path / "adapter", model, ALL.model_copy(update={"lora_alpha": ALL.lora_alpha * 1.1}))
    with pytest.raises(InputError, match="layer 0 of the merged model differs"):
        check(model, adapter, write_merge(model, more, tmp_path / "out"))


def test_a_value_that_is_not_a_number_fails(tmp_path: Path, model: Path, adapter: Path) -> None:
    out = write_merge(model, adapter, tmp_path / "out")
    replace(out, NAMES.linear(1, LINEAR_NAMES[0]), lambda tensor: np.full_like(tensor, np.nan))
    with pytest.raises(InputError, match="layer 1"):
        check(model, adapter, out)


def test_the_command_checks_unless_told_not_to(
    tmp_path: Path, model: Path, adapter: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["--adapter", str(adapter), "--model", str(model), "--out"]
    assert main([*arguments, str(tmp_path / "one")]) == 0
    assert "checked: on 16 tokens" in capsys.readouterr().err
    monkeypatch.setattr("convert.merge.merged_weight", lambda weight, pair: weight)
    assert main([*arguments, str(tmp_path / "two")]) == EXIT_BAD_INPUT
    error = capsys.readouterr().err
    assert f"error: {tmp_path / 'two'}\n  found:    layer 0 of the merged model differs from base + adapter" in error
    assert [path.name for path in tmp_path.iterdir() if "two" in path.name] == [], "what is wrong never looks finished"
    assert main([*arguments, str(tmp_path / "three"), "--no-check"]) == 0
    assert "checked" not in capsys.readouterr().err


def test_a_merge_that_is_killed_before_its_check_has_no_name_yet_and_is_checked_by_the_next_run(
    tmp_path: Path, model: Path, adapter: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["--adapter", str(adapter), "--model", str(model), "--out", str(tmp_path / "out")]
    with monkeypatch.context() as patch:
        patch.setattr("convert.merge.check_merge", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        assert main(arguments) == EXIT_INTERRUPTED
    assert not (tmp_path / "out").exists()
    assert "the same command continues" in capsys.readouterr().err
    assert main(arguments) == 0
    lines = capsys.readouterr().err
    assert "1 of 1 shards are written already" in lines
    assert "checked: on 16 tokens" in lines


def test_dora_scales_rows_to_the_magnitude() -> None:
    rng = np.random.default_rng(0)
    pair = Pair(
        rng.standard_normal((2, 8)).astype(np.float32), rng.standard_normal((6, 2)).astype(np.float32), 0.5,
        np.linspace(1, 2, 6, dtype=np.float32),
    )  # fmt: skip
    weight = rng.standard_normal((6, 8)).astype(np.float32)
    result = adapted(weight, pair)
    np.testing.assert_allclose(np.linalg.norm(result, axis=1), pair.magnitude, rtol=1e-6)
    total = weight + 0.5 * pair.lora_b @ pair.lora_a
    np.testing.assert_allclose(result / total, (result / total)[:, :1] * np.ones((1, 8)), rtol=1e-5)
    np.testing.assert_array_equal(adapted(weight[2:4], pair.rows(slice(2, 4))), result[2:4])
