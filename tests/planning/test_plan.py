"""Plans from shapes alone: bytes against what was measured, the choice of places, refusals with numbers and a way out."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import jax
import pytest

from qlora_jax.__main__ import main
from qlora_jax.base.errors import InputError
from qlora_jax.base.units import GIB, parse_bytes
from qlora_jax.commands import plan as plan_module
from qlora_jax.commands.plan import memory_explained
from qlora_jax.config import LoraSettings, MemorySettings, QuantizationSettings, load_config
from qlora_jax.engine.layer_program import layer_bytes
from qlora_jax.model.architecture import Architecture
from qlora_jax.model.decoder import MLP_TOKENS
from qlora_jax.planning import remembered
from qlora_jax.planning.budget import PINNED_SLACK, Limits, Plan
from qlora_jax.planning.estimate import PROCESS_BYTES, Job, Layout, Workspace, items, total, workspace
from qlora_jax.planning.hardware import Rates, published
from qlora_jax.planning.roofline import seconds
from qlora_jax.planning.search import compiled_workspace, make_plan
from qlora_jax.planning.shortage import explain
from qlora_jax.runtime import machine
from qlora_jax.runtime.machine import CONTEXT_BYTES
from qlora_jax.runtime.placement import SLOTS
from tests.helpers import tiny
from tests.helpers.tiny import shape_of

LLAMA2_70B = shape_of(32000, 8192, 28672, 80, 64, 8, 128, 1e-5)
LLAMA2_7B = shape_of(32000, 4096, 11008, 32, 32, 32, 128, 1e-5)
SMALL_CARD = Limits(int(22.8 * GIB), 60 * GIB)
LARGE_CARD = Limits(130 * GIB, 100 * GIB)
H200 = published("NVIDIA H200")
NORM_BYTES = 2 * 8192 * 2
OFFSET_BYTES = 7 * 4


def job(config: Architecture, rows: int, length: int, micro_batches: int = 1, **changes: Any) -> Job:
    lora = LoraSettings(r=64, lora_dropout=0.0)
    options = {"optim": "paged_adamw_32bit", **changes}
    return Job(config, lora, QuantizationSettings(), rows=rows, length=length, micro_batches=micro_batches, **options)


def plan(
    job: Job, limits: Limits = SMALL_CARD, checkpointing: str = "auto", rates: Rates = H200, **memory: Any
) -> Plan:
    return make_plan(job, MemorySettings(**memory), checkpointing, limits, rates)


def test_a_70b_layer_is_441_mb() -> None:
    weights = sum(rows * columns for rows, columns in LLAMA2_70B.linear_shapes().values())
    assert weights == 855_638_016
    expected = weights // 2 + weights // 64 + weights // (64 * 256) * 4 + NORM_BYTES + OFFSET_BYTES
    assert layer_bytes(LLAMA2_70B, QuantizationSettings()) == expected == job(LLAMA2_70B, 1, 1).layer_bytes
    assert round(expected / 1e6) == 441
    single = weights // 2 + weights // 64 * 4 + NORM_BYTES
    assert layer_bytes(LLAMA2_70B, QuantizationSettings(double_quant=False)) == single


def test_the_sizes_of_a_70b_run() -> None:
    run = job(LLAMA2_70B, 1, 4096)
    assert run.adapter_bytes * 80 == 4 * 828_375_040
    assert 80 * run.moments_bytes == pytest.approx(8 * 828_375_040, rel=1e-6)
    in_8_bits = 80 * job(LLAMA2_70B, 1, 4096, optim="paged_adamw_8bit").moments_bytes
    assert in_8_bits == pytest.approx(2 * 828_375_040 * (1 + 4 / 256), rel=1e-4)
    assert run.vocabulary_bytes == 2 * 32000 * 8192 * 2
    assert run.hidden_bytes == 4096 * 8192 * 2


MEASURED = json.loads((Path(__file__).parent / "measured_steps.json").read_text(encoding="utf-8"))
"""Cases of `benchmarks.step`: settings, card, peak GiB, and seconds, but for builds slower than this one."""
PEAK_ERROR, TIME_ERROR = 0.05, 0.25


def as_parameter(case: dict[str, Any]) -> Any:
    """Peaks that the estimate is known to miss are cases too, and an error once it does not."""
    missed = case.get("known_error")
    return pytest.param(case, id=case["name"], marks=[pytest.mark.xfail(reason=missed, strict=True)] if missed else [])


@pytest.mark.parametrize("case", map(as_parameter, MEASURED))
def test_peak_and_seconds_as_measured(case: dict[str, Any]) -> None:
    config = {"7b": LLAMA2_7B, "70b": LLAMA2_70B}[case["shape"]]
    config = dataclasses.replace(config, num_hidden_layers=case["layers"])
    run = job(config, case["rows"], case["length"], case["micro_batches"], optim=case["optim"])
    layout = Layout(**case["layout"])
    peak, _ = total(items(run, layout, workspace(run, layout)))
    assert peak / GIB == pytest.approx(case["peak_gib"], rel=PEAK_ERROR)
    if "step_s" in case:
        assert seconds(run, layout, published(case["card"])).total == pytest.approx(case["step_s"], rel=TIME_ERROR)


def test_what_fits_stays_on_the_device_and_keeps_its_intermediates() -> None:
    found = plan(job(LLAMA2_7B, 4, 2048), LARGE_CARD)
    assert found.layout == Layout(32, keep=32)
    assert found.seconds.bus_bytes == 0


def test_70b_on_a_small_card_is_streamed_and_fits() -> None:
    for run in (job(LLAMA2_70B, 1, 4096), job(LLAMA2_70B, 1, 512, 4, optim="paged_adamw_8bit")):
        found = plan(run)
        assert found.layout.resident < 80
        assert found.device_bytes <= SMALL_CARD.device
        assert found.host_bytes <= SMALL_CARD.host
        resident = dataclasses.replace(found.layout, resident=80)
        assert found.seconds.total <= 1.1 * seconds(run, resident, H200).total  # bus and computing overlap


def test_what_is_kept_leaves_room_for_the_workspace_of_the_layers_that_are_run_again() -> None:
    """At the turn, in one block; and if every layer is kept there are none of those."""
    found = plan(job(LLAMA2_70B, 1, 4096), dataclasses.replace(SMALL_CARD, host=84 * GIB))
    assert 0 < found.layout.keep < 80
    at_the_turn = max(found.work.kept_forward, found.work.kept_backward)
    assert SMALL_CARD.device - found.device_bytes >= found.work.backward - at_the_turn > GIB
    every = plan(
        job(LLAMA2_7B, 4, 2048),
        Limits(int(30.35 * GIB), 100 * GIB),
        **dict.fromkeys(("activations", "adapters", "optimizer"), "device"),
    )
    assert every.layout.keep == 32
    bare = dataclasses.replace(every.layout, keep=31)
    assert not dataclasses.replace(every, layout=bare).fits, "or this shows nothing"


def test_the_last_layer_keeps_what_finds_room_where_the_others_work() -> None:
    """With `full`: not where it would raise the peak, as the intermediates of several micro-batches do."""
    run = job(LLAMA2_7B, 4, 2048)
    for micro_batches, kept in ((1, 1), (2, 0)):
        found = plan(dataclasses.replace(run, micro_batches=micro_batches), LARGE_CARD, checkpointing="full")
        assert found.layout.keep == kept
        bare, kept_one = (dataclasses.replace(found, layout=dataclasses.replace(found.layout, keep=n)) for n in (0, 1))
        assert (kept_one.device_bytes <= bare.device_bytes) == bool(kept)
        assert kept_one.seconds.total < bare.seconds.total
    chunked = plan(job(LLAMA2_70B, 1, 32768), Limits(SMALL_CARD.device, 120 * GIB), checkpointing="full")
    assert chunked.layout.keep == 0, "an MLP in chunks keeps nothing"


@pytest.mark.parametrize("gib", [6, 8])
def test_70b_on_a_very_small_card_moves_adapters_and_moments_too(gib: int) -> None:
    found = plan(job(LLAMA2_70B, 1, 4096), Limits(gib * GIB, 84 * GIB))
    assert (found.layout.adapters, found.layout.optimizer, found.layout.activations) == ("host",) * 3


def test_an_evaluation_has_to_fit_as_well() -> None:
    """Its rows are more at a time than training's, but keep nothing: it decides only where training leaves little to spare."""
    run, small = job(LLAMA2_70B, 1, 512), Limits(6 * GIB, 84 * GIB)
    assert plan(dataclasses.replace(run, eval_rows=4)).layout == plan(run).layout
    large = plan(dataclasses.replace(run, eval_rows=32), small)
    assert large.device_bytes <= small.device
    assert large.layout.resident < plan(run, small).layout.resident
    with pytest.raises(InputError) as caught:
        plan(dataclasses.replace(run, eval_rows=128), small)
    assert "training.per_device_eval_batch_size=1" in caught.value.fix


def test_long_rows_work_in_chunks() -> None:
    found = plan(job(LLAMA2_70B, 1, 32768), Limits(SMALL_CARD.device, 120 * GIB))
    assert found.layout.mlp_tokens <= MLP_TOKENS
    assert found.layout.keep == 0
    assert found.layout.activations == "host"


def test_what_was_asked_for_is_done() -> None:
    asked = {"base_weights": "host", "activations": "host", "adapters": "host", "optimizer": "host"}
    layout = plan(job(LLAMA2_7B, 1, 512), **asked, checkpointing="full").layout
    assert (layout.resident, layout.activations, layout.adapters, layout.optimizer, layout.keep) == (
        0,
        "host",
        "host",
        "host",
        1,
    )
    assert plan(job(LLAMA2_7B, 1, 512), resident_layers=5).layout.resident == 5
    assert plan(job(LLAMA2_7B, 1, 512), checkpointing="none").layout.keep == 32
    assert plan(job(LLAMA2_7B, 1, 512), kept_layers=7).layout.keep == 7
    assert plan(job(LLAMA2_7B, 1, 512), kept_layers=7, checkpointing="full").layout.keep == 1
    assert plan(job(LLAMA2_7B, 1, 512), base_weights="disk").layout.places(32) == ["disk"] * 32


def test_residents_are_spread_among_the_streamed() -> None:
    assert Layout(1, "disk").places(3) == ["disk", "disk", "device"]
    assert Layout(2).places(4) == ["host", "device", "host", "device"]


@pytest.mark.parametrize(
    ("run", "limits", "memory", "checkpointing", "remedy"),
    [
        (job(LLAMA2_70B, 1, 4096), SMALL_CARD, {"base_weights": "device"}, "auto", "memory.base_weights=auto"),
        (job(LLAMA2_70B, 1, 4096), Limits(SMALL_CARD.device, 30 * GIB), {}, "auto", "memory.base_weights=disk"),
        (job(LLAMA2_70B, 1, 2**17), SMALL_CARD, {}, "auto", "data.max_seq_length="),
        (job(LLAMA2_7B, 8, 4096), Limits(6 * GIB, 12 * GIB), {}, "auto", "training.per_device_train_batch_size="),
        (job(LLAMA2_7B, 4, 2048), SMALL_CARD, {}, "none", "training.gradient_checkpointing=auto"),
    ],
)
def test_what_does_not_fit_is_refused_with_a_setting_that_would(
    run: Job, limits: Limits, memory: dict[str, Any], checkpointing: str, remedy: str
) -> None:
    with pytest.raises(InputError, match="does not fit: at least") as caught:
        plan(run, limits, checkpointing, **memory)
    assert remedy in caught.value.fix


def test_the_remedy_works() -> None:
    run = job(LLAMA2_70B, 1, 2**17)
    with pytest.raises(InputError) as caught:
        plan(run)
    length = int(caught.value.fix.partition("data.max_seq_length=")[2].split(";")[0])
    assert plan(dataclasses.replace(run, length=length)).fits
    with pytest.raises(InputError):
        plan(dataclasses.replace(run, length=length + 32))


def test_a_card_too_small_for_one_layer_is_refused() -> None:
    with pytest.raises(InputError, match="does not fit"):
        plan(job(LLAMA2_70B, 1, 512), Limits(2 * GIB, 64 * GIB))


def test_the_compiled_workspace_decides() -> None:
    """What the compiler says replaces the estimate: with a workspace ten times as large, less stays on the device."""

    def large(job: Job, layout: Layout) -> Any:
        work = workspace(job, layout)
        return dataclasses.replace(work, backward=10 * work.backward, kept_backward=10 * work.kept_backward)

    run = job(LLAMA2_7B, 4, 2048)
    estimated = plan(run)
    compiled = make_plan(run, MemorySettings(), "auto", SMALL_CARD, H200, workspace_of=large)
    assert compiled.work == large(run, compiled.layout)
    assert compiled.fits
    assert compiled.layout.keep < estimated.layout.keep


@pytest.mark.parametrize("keep", [0, 1, 2])
def test_workspace_of_functions_compiled_here(keep: int) -> None:
    config = shape_of(264, 64, 128, 2, 4, 2, 16, 1e-5)
    run = Job(config, LoraSettings(r=4), QuantizationSettings(), "adamw", 2, 32, 1, "float32", "xla")
    work = compiled_workspace(run, Layout(2, keep=keep))
    assert (work.forward > 0, work.kept_forward > 0) == (keep < 2, keep > 0)
    assert (work.backward > work.forward) == (keep < 2)
    assert work.head > 0


def test_a_processor_keeps_everything_unless_asked() -> None:
    limits = Limits(None, 20 * GIB)
    found = make_plan(job(LLAMA2_7B, 1, 128), MemorySettings(), "auto", limits, None)
    assert found.layout == Layout(32)
    asked = MemorySettings(base_weights="host", resident_layers=3, optimizer="host")
    assert make_plan(job(LLAMA2_7B, 1, 128), asked, "none", limits, None).layout == Layout(3, optimizer="host", keep=32)
    with pytest.raises(InputError, match=r"GiB of the 20\.0 that are free"):
        make_plan(job(LLAMA2_70B, 1, 128), MemorySettings(), "auto", limits, None)


def test_registered_weights_need_no_room_in_the_pool() -> None:
    """But for that they take as much of the host."""
    streamed = plan(job(LLAMA2_7B, 1, 512), base_weights="host", resident_layers=5, adapters="host")
    weights = 27 * streamed.job.layer_bytes
    assert streamed.pool_bytes(registered=False) - streamed.pool_bytes(registered=True) == weights
    assert streamed.pool_bytes(registered=True) >= 32 * streamed.job.adapter_bytes
    checkpoint = 2 * 32 * (streamed.job.adapter_bytes + streamed.job.moments_bytes)
    assert streamed.host_bytes == streamed.pool_bytes(registered=False) + checkpoint + PROCESS_BYTES[True]
    from_disk = plan(job(LLAMA2_7B, 1, 512), base_weights="disk")
    assert from_disk.pool_bytes(registered=False) == from_disk.pool_bytes(registered=True) > 0


@pytest.mark.parametrize("on_disk", [True, False])
@pytest.mark.parametrize("registers", [True, False])
def test_the_pool_s_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on_disk: bool, registers: bool) -> None:
    """Without the weights only where it is sure that they will be registered."""
    config = load_config(write_config(tmp_path), ["memory.base_weights=host", "memory.adapters=host"])
    limits: list[int] = []
    monkeypatch.setattr(machine, "find_gpu", lambda: machine.Gpu("a card", 24 * GIB, 24 * GIB))
    monkeypatch.setattr(machine, "registers_host_memory", lambda: registers)
    monkeypatch.setattr(machine, "prepare", lambda gpu, device, pinned, cache: limits.append(pinned))
    monkeypatch.setattr(remembered, "rates", lambda folder: published())
    monkeypatch.setattr(remembered, "workspace", lambda folder, *job: workspace(*job))
    found = plan_module.plan_run(config, LLAMA2_7B, 512, 64 * GIB, on_disk=on_disk)
    assert found.layout.resident == 0
    assert limits == [int(PINNED_SLACK * found.pool_bytes(registered=on_disk and registers))]


def test_a_continued_run_is_planned_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With as many layers kept as before, or, where the compiled functions leave no room for that, as if nothing had been before; XLA's
    pool, whose limit is settled in between and once, has room for either."""
    config = load_config(write_config(tmp_path), ["memory.activations=host"])
    limits: list[int] = []
    monkeypatch.setattr(machine, "find_gpu", lambda: machine.Gpu("a card", 6 * GIB, 6 * GIB))
    monkeypatch.setattr(machine, "registers_host_memory", lambda: False)
    monkeypatch.setattr(machine, "prepare", lambda gpu, device, pinned, cache: limits.append(pinned))
    monkeypatch.setattr(remembered, "rates", lambda folder: published())
    monkeypatch.setattr(remembered, "workspace", lambda folder, *job: workspace(*job))

    def planned(kept: int | None) -> Plan:
        return plan_module.plan_run(config, LLAMA2_7B, 512, 64 * GIB, on_disk=True, kept_before=kept)

    fresh, before = planned(None), planned(3)
    assert before.layout.keep == 3 != fresh.layout.keep

    def too_much_for_three(job: Job, layout: Layout) -> Workspace:
        return Workspace(*[30 * GIB] * 5) if layout.keep == 3 else workspace(job, layout)

    monkeypatch.setattr(remembered, "workspace", lambda folder, *job: too_much_for_three(*job))
    assert planned(3).layout.keep == fresh.layout.keep
    pools = [plan.pool_bytes(registered=False) for plan in (fresh, before)]
    assert limits[0] >= int(PINNED_SLACK * pools[0])  # a smaller device was asked, too
    assert limits[1:] == [int(PINNED_SLACK * max(pools))] * 2
    assert pools[0] != pools[1]


ON_THE_DEVICE = "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 123 bytes.\nBFC dump\n..."
PINNED = "RESOURCE_EXHAUSTED: Out of host memory while trying to allocate 7.00MiB with allocator xla_gpu_host_bfc"


@pytest.mark.parametrize(
    ("error", "memory", "fix"),
    [
        (jax.errors.JaxRuntimeError(ON_THE_DEVICE), "the GPU's memory", r"set memory\.device_memory=[\d.]+GiB"),
        (jax.errors.JaxRuntimeError(PINNED), "pinned memory of the host", r"XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB=\d+"),
        (MemoryError(), "the host's memory", r"set \w+\.\w+="),
    ],
)
def test_out_of_memory_is_explained(tmp_path: Path, error: Exception, memory: str, fix: str) -> None:
    """Which memory it was, and a setting with which a plan for less of it fits."""
    found, settings = plan(job(LLAMA2_7B, 4, 2048)), MemorySettings()
    with pytest.raises(InputError) as caught, memory_explained(found, settings, "auto", tmp_path):
        raise error
    assert caught.value.found.startswith(f"out of {memory}")
    assert "dump" not in str(caught.value)
    assert re.search(fix, caught.value.fix)
    with pytest.raises(jax.errors.JaxRuntimeError), memory_explained(found, settings, "auto", tmp_path):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")


def test_the_device_memory_that_is_advised_was_tried(tmp_path: Path) -> None:
    run = job(LLAMA2_7B, 4, 2048)
    found = plan(run)
    (advice,) = explain(found, MemorySettings(), "auto", jax.errors.JaxRuntimeError(ON_THE_DEVICE)).remedies
    size = parse_bytes(re.search(r"device_memory=(\S+?),", advice)[1])
    again = make_plan(
        run, MemorySettings(), "auto", dataclasses.replace(found.limits, device=size - CONTEXT_BYTES), found.rates
    )
    assert again.fits and again.limits.device < found.limits.device


def write_config(folder: Path, **model: Any) -> Path:
    tiny.write_model(folder / "model", **model)
    (folder / "rows.jsonl").write_text('{"text": "a"}\n')
    path = folder / "config.yaml"
    training = f"{{output_dir: {folder / 'run'}, max_steps: 100}}"
    model, data = (f"{{{key}: {folder / name}}}" for key, name in (("name_or_path", "model"), ("path", "rows.jsonl")))
    path.write_text(f"model: {model}\ndata: {data}\ntraining: {training}\n")
    return path


def test_the_command_needs_no_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(tmp_path)
    (tmp_path / "model" / "model.safetensors").unlink()
    assert main(["plan", "--config", str(config), "--gpu-memory", "24GiB", "--host-memory", "64GiB"]) == 0
    printed = capsys.readouterr().out
    assert "base weights, 2 layers" in printed
    assert "100 steps in" in printed
    assert "RTX 4090: its data sheet" in printed
    assert not (tmp_path / "run").exists()


def test_the_command_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(tmp_path)
    command = ["plan", "--config", str(config), "--gpu-memory", "24GiB", "--gpu", "RTX 3090", "--json"]
    assert main([*command, "training.per_device_train_batch_size=3"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["layers"], found["rows"], found["card"]["name"]) == (2, 3, "RTX 3090")
    assert found["device_bytes"] == sum(item["device"] for item in found["items"])
    assert found["hours"] == pytest.approx(100 * found["seconds_per_step"] / 3600, abs=1e-3)


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="plans for a processor")
def test_the_command_on_this_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--config", str(write_config(tmp_path))]) == 0
    assert "memory" in capsys.readouterr().out


def test_bad_sizes_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = str(write_config(tmp_path))
    assert main(["plan", "--config", config, "--gpu-memory", "lots"]) == 2
    assert "--gpu-memory" in capsys.readouterr().err
    assert main(["plan", "--config", config, "memory.device_memory=lots"]) == 2
    assert "expected a size such as 24GiB" in capsys.readouterr().err
    assert main(["plan", "--config", config, "--gpu-memory", "1GiB", "data.max_seq_length=100000000"]) == 2
    assert "does not fit" in capsys.readouterr().err


def test_linears_that_are_not_in_4_bits_take_room() -> None:
    """On average for the layers that stay on the device, and the largest layer's for each slot of those that are streamed."""
    depth, extra = LLAMA2_7B.num_hidden_layers, (8 * 2**20, *[0] * (LLAMA2_7B.num_hidden_layers - 1))
    plain, mixed = job(LLAMA2_7B, 1, 512), job(LLAMA2_7B, 1, 512, extra_bytes=extra)
    for resident, expected in ((depth, 8 * 2**20), (0, SLOTS * 8 * 2**20)):
        layout = Layout(resident=resident)
        weights = [
            next(item for item in items(each, layout, workspace(each, layout)) if item.name == "base weights")
            for each in (plain, mixed)
        ]
        assert weights[1].device - weights[0].device == expected
