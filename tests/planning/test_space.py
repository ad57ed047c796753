"""What a run takes of the disk: predicted from shapes against real files, and refused with numbers where there is no room."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import pytest

from convert.adapters.adapter import load_adapter
from convert.cache import entry_of
from convert.files.derived import SPARE_BYTES
from convert.files.folder import ModelFolder
from convert.files.sizes import NAME_BYTES as TENSOR_BYTES
from convert.files.sizes import companion_bytes, merged_bytes, quantized_bytes, tensors_for, tensors_of
from convert.load import read_config
from convert.merge import merge
from convert.quantize import quantize
from qlora_jax.__main__ import main
from qlora_jax.base.errors import EXIT_BAD_INPUT, InputError
from qlora_jax.commands.plan import make_job
from qlora_jax.commands.space import FILE_BYTES_A_TOKEN, TOKEN_BYTES, space_of, with_guessed_tokens
from qlora_jax.config import Config, QuantizationSettings, load_config
from qlora_jax.planning import disk as space_module
from qlora_jax.planning.disk import NAME_BYTES, RECORD_BYTES, SMALL_BYTES, STATE_BYTES, Need, Space, bytes_in
from tests.convert.test_merge import make_adapter
from tests.helpers import tiny
from tests.helpers.runs import records, train_main, write_place
from tests.helpers.tiny import NAMES, shape_of

LLAMA2_70B = shape_of(32000, 8192, 28672, 80, 64, 8, 128, 1e-5)
GIB = 2**30


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_place(tmp_path_factory.mktemp("place") / "place", max_steps=4)


def predicted(place: Path, out: Path, *overrides: str) -> Space:
    """As `train.py` predicts it."""
    config = load_config(place / "run.yaml", [f"training.output_dir={out}", *overrides])
    folder = ModelFolder(config.model.name_or_path)
    job = make_job(config, read_config(folder), 64, on_gpu=False)
    return space_of(config, job, config.training.max_steps, folder, str(folder.path))


def need(space: Space, word: str) -> Need:
    (found,) = (need for need in space.needs if need.name.startswith(word))
    return found


def of_70b(tmp_path: Path, free: int | None = None, **training: Any) -> Space:
    settings = {"output_dir": tmp_path / "run", "optim": "paged_adamw_32bit", **training}
    config = Config(model={"name_or_path": "none"}, data={"path": "none"}, lora={"r": 64}, training=settings)
    return Space(config, make_job(config, LLAMA2_70B, 512, on_gpu=True), 1000, 140 * GIB, free=free)


# Against what is real


@pytest.mark.parametrize(
    "settings",
    [
        ["training.optim=paged_adamw_32bit"],
        ["training.optim=paged_adamw_8bit"],
        ["training.optim=paged_adamw_8bit", "lora.dtype=bfloat16", "lora.target_modules=[q_proj,down_proj]"],
    ],
    ids=["32 bits", "8 bits", "8 bits, adapters in bfloat16"],
)
def test_checkpoints_as_large_as_predicted(place: Path, tmp_path: Path, settings: list[str]) -> None:
    """The arrays' bytes are known exactly, so the prediction may be over by the room for everything else, and by nothing more."""
    settings = [*settings, "lora.r=64", f"data.eval_path={place / 'eval.jsonl'}", "training.eval_steps=1",
        "training.sample_prompt=hello", "training.sample_max_new_tokens=4"]  # fmt: skip
    before = predicted(place, tmp_path, *settings)
    assert train_main(place, tmp_path, *settings) == 0
    (path,) = (tmp_path / "checkpoints").glob("step-*")
    about = json.loads((path / "about.json").read_text())
    growing = (path / "metrics.jsonl").stat().st_size + (path / "samples.jsonl").stat().st_size
    arrays = 2 * (before.job.adapter_bytes + before.job.moments_bytes)
    names = len(about["arrays"])
    assert names == len(jax.tree.leaves((before.job.adapter, before.job.moments)))
    own = bytes_in(path) - bytes_in(path / "best")
    rest = own - arrays - growing
    assert 0 < rest <= STATE_BYTES + NAME_BYTES * names, "what is not arrays has the room that is kept for it"
    assert growing <= before.checkpoint_bytes - arrays - STATE_BYTES - NAME_BYTES * names
    assert 0 <= before.checkpoint_bytes - own < STATE_BYTES + NAME_BYTES * names + 40 * RECORD_BYTES
    assert max(len(json.dumps(record)) for record in records(tmp_path)) < RECORD_BYTES
    header = SPARE_BYTES
    adapter = need(before, "adapter").nbytes
    assert adapter <= bytes_in(tmp_path / "adapter") <= adapter + header
    assert bytes_in(path / "best") == bytes_in(tmp_path / "best"), (
        "counted for each checkpoint, though a link takes nothing"
    )
    assert need(before, "checkpoints").nbytes == 3 * (before.checkpoint_bytes + adapter)
    assert need(before, "best").nbytes == 2 * adapter and (tmp_path / "best").is_dir()
    small = sum(file.stat().st_size for file in tmp_path.iterdir() if file.is_file())
    assert small <= need(before, "metrics").nbytes
    assert small < SMALL_BYTES


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("double_quant", [True, False])
def test_quantized_and_merged_folders_as_large_as_predicted(tmp_path: Path, shards: int, double_quant: bool) -> None:
    folder = ModelFolder(tiny.write_model(tmp_path / "model", shards=shards, tie_word_embeddings=False))
    config, kinds = read_config(folder), QuantizationSettings(double_quant=double_quant)
    quantize(folder, tmp_path / "nf4", kinds)
    adapter = load_adapter(make_adapter(tmp_path / "adapter", folder.path), config)
    merge(folder, adapter, tmp_path / "merged", "dequantized")
    targets = sorted({name for _, name in adapter.targets})
    made = {
        "nf4": (quantized_bytes(tensors_of(folder), NAMES, kinds), 6 * len(folder.names)),
        "merged": (merged_bytes(tensors_of(folder), NAMES, targets, "dequantized"), len(folder.names)),
    }
    for name, (size, most_tensors) in made.items():
        size += companion_bytes(folder)
        assert size - SPARE_BYTES - TENSOR_BYTES * most_tensors <= bytes_in(tmp_path / name) <= size
    assert quantized_bytes(tensors_for(config), NAMES, kinds) == quantized_bytes(tensors_of(folder), NAMES, kinds)
    assert merged_bytes(tensors_for(config), NAMES, targets, "original") == merged_bytes(
        tensors_of(folder), NAMES, targets, "original"
    )
    again = ModelFolder(tmp_path / "nf4")
    assert merged_bytes(tensors_of(again), NAMES, targets, "dequantized") == made["merged"][0], (
        "of the weights as they were"
    )


def test_a_merge_keeps_the_dtype_of_what_it_does_not_change(tmp_path: Path) -> None:
    folder = ModelFolder(tiny.write_model(tmp_path / "model", dtype="float32"))
    linears = sum(spec.nbytes for spec in tensors_of(folder) if "_proj" in spec.name)
    whole = merged_bytes(tensors_of(folder), NAMES, ["q_proj"], "original")
    changed = merged_bytes(tensors_of(folder), NAMES, ["q_proj"], "dequantized")
    q_proj = sum(spec.nbytes for spec in tensors_of(folder) if "q_proj" in spec.name)
    assert whole - changed == (linears - q_proj) // 2


def test_the_default_base_decides_what_a_merge_takes(tmp_path: Path) -> None:
    """The original weights where they are at hand: what the adapter does not touch keeps its 4 bytes a weight."""
    place = write_place(tmp_path / "place", max_steps=1, dtype="float32")
    quantize(ModelFolder(place / "model"), tmp_path / "4bit", QuantizationSettings())

    def merged(*overrides: str) -> int:
        asked = ["training.export_merged=true", 'lora.target_modules=["q_proj"]', *overrides]
        return need(predicted(place, tmp_path / "run", *asked), "merged").nbytes

    assert merged() == merged("training.merge_base=original") > merged("training.merge_base=dequantized")
    in_4_bits = f"model.name_or_path={tmp_path / '4bit'}"
    assert merged(in_4_bits) == merged(in_4_bits, "training.merge_base=dequantized")


def test_the_sizes_of_a_70b_run(tmp_path: Path) -> None:
    """9.9 GB a checkpoint of 828 M parameters, 5 GB with moments in 8 bits."""
    assert of_70b(tmp_path).checkpoint_bytes == pytest.approx(12 * 828_375_040, rel=1e-3)
    in_8_bits = of_70b(tmp_path, optim="paged_adamw_8bit").checkpoint_bytes
    assert in_8_bits == pytest.approx((4 + 2 * (1 + 4 / 256)) * 828_375_040, rel=1e-3)
    assert need(of_70b(tmp_path), "adapter").nbytes == 4 * 828_375_040


def test_tokens_at_a_guess(place: Path, tmp_path: Path) -> None:
    """Real text may be anything; the guess is a number of bytes for each of the files'."""
    found = need(with_guessed_tokens(predicted(place, tmp_path)), "tokens")
    assert found.nbytes == TOKEN_BYTES * (place / "train.jsonl").stat().st_size // FILE_BYTES_A_TOKEN


# What counts


def test_what_is_there_counts(place: Path, tmp_path: Path) -> None:
    """Checkpoints of a run that goes on are not written again, and those of a run that is overwritten make room."""
    before = predicted(place, tmp_path)
    assert (missing := need(before, "checkpoints").missing) == 3 * before.checkpoint_bytes
    assert train_main(place, tmp_path) == 0
    after = predicted(place, tmp_path)
    written = bytes_in(tmp_path / "checkpoints")
    assert written > 0 and need(after, "checkpoints").missing == missing - written
    assert need(after, "quantized").missing == 0, "the run has kept it"


def test_the_kept_checkpoints_and_one_more(tmp_path: Path) -> None:
    for kept in (1, 2, 5):
        space = of_70b(tmp_path, save_total_limit=kept)
        assert need(space, "checkpoints").nbytes == (kept + 1) * space.checkpoint_bytes


def test_the_merged_model_only_if_asked_for(tmp_path: Path) -> None:
    assert not [need for need in of_70b(tmp_path).needs if "merged" in need.name]
    assert need(of_70b(tmp_path, export_merged=True), "merged").nbytes == 140 * GIB


def test_disks_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = Need("quantized", tmp_path / "cache" / "model", 40 * GIB, required=False)
    one = dataclasses.replace(of_70b(tmp_path, 50 * GIB), others=(cache,))
    assert len(one.disks) == 1 and not one.disks[0].has_room(cache)
    assert one.beside(tmp_path / "cache") == one.disks[0].required
    one.check()  # it is done without
    monkeypatch.setattr(space_module, "_device", lambda path: int("cache" in path.parts))
    first, second = one.disks
    assert (first.path, second.path) == (tmp_path / "run", tmp_path / "cache")
    assert (second.needs, second.required, second.has_room(cache)) == ((cache,), 0, True)
    assert one.beside(tmp_path / "cache") == 0
    needed = dataclasses.replace(cache, required=True, nbytes=60 * GIB)
    with pytest.raises(InputError, match="QLORA_JAX_CACHE") as caught:
        dataclasses.replace(one, others=(needed,)).check()
    assert caught.value.where == str(tmp_path / "cache") and "output_dir" not in caught.value.fix


# Refused


@pytest.mark.parametrize(
    ("gib", "training", "remedies"),
    [
        (29, {"save_total_limit": 3}, ["save_total_limit=1", "optim=paged_adamw_8bit", "lora.r=32"]),
        (140, {"export_merged": True}, ["export_merged=false"]),
        (4, {}, ["lora.r=8"]),
        (0.5, {}, []),
    ],
)
def test_refused_with_what_would_make_it_fit(
    tmp_path: Path, gib: float, training: dict[str, Any], remedies: list[str]
) -> None:
    space = of_70b(tmp_path, int(gib * GIB), **training)
    with pytest.raises(InputError) as caught:
        space.check()
    fix = caught.value.fix
    assert f"({gib:.2f} GiB) free on this disk" in caught.value.found
    assert "checkpoints: " in caught.value.expected and "adapter: " in caught.value.expected
    assert fix.startswith("make room for ") and "training.output_dir on another disk" in fix
    assert [part.partition("set ")[2].partition(".")[2] if "training" in part else part.partition("set ")[2]
        for part in fix.split("; or ") if part.startswith("set ")] == remedies  # fmt: skip
    for part in fix.split("; or "):
        if part.startswith("set "):
            name, _, value = part.removeprefix("set ").partition("=")
            value = {"false": False}.get(value, int(value) if value.isdigit() else value)
            changed = space._with(name, value)
            assert changed.fits
            changed.check()


def test_no_room_is_refused_before_anything_is_touched(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not only before training: what overwriting would remove is still there."""
    assert train_main(place, tmp_path) == 0
    kept = sorted((tmp_path / "checkpoints").rglob("*"))
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
        assert train_main(place, tmp_path, "training.overwrite_output_dir=true", "lora.r=16") == EXIT_BAD_INPUT
    error = capsys.readouterr().err
    assert "1,000 bytes (0.00 GiB) free on this disk" in error and "checkpoints: 2 kept, one being written" in error
    assert "Traceback" not in error
    assert sorted((tmp_path / "checkpoints").rglob("*")) == kept


def test_a_cache_without_room_beside_the_run_is_left_out(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("QLORA_JAX_CACHE", str(tmp_path / "cache"))
    space, usage = predicted(place, tmp_path / "out"), shutil.disk_usage(tmp_path)
    folder = ModelFolder(place / "model")
    entry = entry_of(folder, str(folder.path), QuantizationSettings())
    (disk,), cache = space.disks, need(space, "quantized")
    assert cache.path == entry and cache.missing > 0
    for free, kept in ((disk.required + cache.missing - 1, False), (disk.required + cache.missing, True)):
        with monkeypatch.context() as patch:
            patch.setattr(shutil, "disk_usage", lambda path, free=free: usage._replace(free=free))
            assert train_main(place, tmp_path / "out", "training.overwrite_output_dir=true") == 0
        printed = " ".join(capsys.readouterr().out.split())
        assert ("no room" in printed, "quantizing in memory, for this run only" in printed) == (not kept, not kept)
        assert entry.exists() == kept
        shutil.rmtree(tmp_path / "out")


def test_a_run_that_reads_layers_from_the_cache_needs_it(place: Path, tmp_path: Path) -> None:
    space = dataclasses.replace(predicted(place, tmp_path, "memory.base_weights=disk"), others=())
    cache = need(predicted(place, tmp_path, "memory.base_weights=disk"), "quantized")
    assert cache.required and not need(predicted(place, tmp_path), "quantized").required
    (disk,) = space.disks
    whole = dataclasses.replace(space, others=(dataclasses.replace(cache, there=0),), free=disk.required)
    with pytest.raises(InputError, match="quantized model"):
        whole.check()
    assert "QLORA_JAX_CACHE" in " ".join(whole._remedies(whole.disks[0]))


# The command


def test_the_plan_says_it(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["plan", "--config", str(place / "run.yaml"), f"training.output_dir={tmp_path}"]
    sizes = ["--gpu-memory", "24GiB", "--host-memory", "64GiB"]
    assert main([*command, *sizes, "--disk-space", "10GiB", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["disk"]
    space = with_guessed_tokens(predicted(place, tmp_path))
    assert found["checkpoint_bytes"] == space.checkpoint_bytes
    assert [need["nbytes"] for need in found["needs"]] == [need.nbytes for need in space.needs]
    assert {disk["free_bytes"] for disk in found["disks"]} == {10 * GIB}
    assert main([*command, *sizes]) == 0
    printed = capsys.readouterr().out
    assert "checkpoints: 2 kept, one being written" in printed and "tokens, guessed" in printed
    assert main([*command, *sizes, "--disk-space", "1MiB", "--json"]) == EXIT_BAD_INPUT
    captured = capsys.readouterr()
    assert "1,048,576 bytes (0.00 GiB) free on this disk" in captured.err and not captured.out
    assert main([*command, "--disk-space", "much"]) == EXIT_BAD_INPUT
    assert "--disk-space" in capsys.readouterr().err


def test_a_run_writes_it_down(place: Path, tmp_path: Path) -> None:
    assert train_main(place, tmp_path) == 0
    (start,) = json.loads((tmp_path / "run.json").read_text())["starts"]
    assert start["plan"]["disk"]["checkpoint_bytes"] == predicted(place, tmp_path).checkpoint_bytes
