"""The whole road on a tiny model, through `train.main` as a user takes it; and every way to get it wrong."""

import contextlib
import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from convert.adapters.adapter import WEIGHTS_FILE, load_adapter
from convert.files.folder import ModelFolder
from convert.files.shards import write_json
from convert.load import read_config
from convert.merge import merge
from convert.quantize import quantize
from qlora_jax.base.errors import EXIT_BAD_INPUT
from qlora_jax.commands import execute, prepare, train
from qlora_jax.config import MemorySettings, QuantizationSettings, load_config
from qlora_jax.engine.engine import Engine
from qlora_jax.training import trainer
from qlora_jax.training.progress import Progress
from tests.helpers import tiny
from tests.helpers.runs import adapter_bytes, records, train_main, write_place
from tests.helpers.tiny import NAMES

REPOSITORY = Path(__file__).parents[2]
STEPS = 12
ANOTHER_ORDER = 1e-5
"""Relative, in the Euclidean norm: float32 sums (6e-8 each) over 8 rows of 32 tokens in another order, through two layers and back."""
CONTRACT = {"step", "loss", "learning_rate", "grad_norm", "tokens", "tokens_per_s", "step_s", "peak_device_gib"}


@pytest.fixture(scope="module", autouse=True)
def no_terminal() -> Iterator[None]:
    """Whatever the environment says about colours."""
    with pytest.MonkeyPatch.context() as environment:
        for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
            environment.delenv(name, raising=False)
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, rows to train on, rows held out, and `run.yaml`; not to be written to."""
    return write_place(tmp_path_factory.mktemp("place"), max_steps=STEPS)


def snapshot(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


NO_SAVES = ["training.save_steps=0", "training.save_interval_minutes=0"]

# The road


@pytest.fixture(scope="module")
def finished(place: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A whole run, and what it printed (not on a terminal)."""
    out = tmp_path_factory.mktemp("finished") / "runs" / "deep"
    sampling = ["training.sample_prompt=abcd", "training.sample_max_new_tokens=8"]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        status = train_main(
            place, out, f"data.eval_path={place / 'eval.jsonl'}", "training.export_merged=true", *sampling
        )
    assert status == 0
    return out, printed.getvalue()


def test_what_a_run_leaves(finished: tuple[Path, str]) -> None:
    out, _ = finished
    names = {"adapter", "config.yaml", "loss.png", "merged", "metrics.jsonl", "samples.jsonl", "run.json", ".lock"}
    assert {path.name for path in out.iterdir()} == names | {"checkpoints"}
    assert [path.name for path in (out / "checkpoints").iterdir()] == [f"step-{STEPS}"]


def test_metrics(finished: tuple[Path, str], place: Path) -> None:
    logged = records(finished[0])
    training = [record for record in logged if "loss" in record]
    assert [record["step"] for record in training] == list(range(1, STEPS + 1))
    for record in training:
        assert record.keys() >= CONTRACT
        finite = [value for value in record.values() if value is not None]
        assert all(math.isfinite(value) for value in finite)
        assert record["learning_rate"] == 1e-2
        assert record["grad_norm"] > 0 and record["tokens_per_s"] > 0 and record["step_s"] > 0
    rows = (place / "train.jsonl").read_text().splitlines()
    tokenizer = tiny.make_tokenizer()
    texts = [tokenizer.apply_chat_template(json.loads(row)["messages"], tokenize=False) for row in rows]
    lengths = {len(tokenizer(text)["input_ids"]) for text in texts}
    assert len(lengths) == 1, "all rows are alike, so any eight of them have as many tokens"
    assert [record["tokens"] for record in training] == [8 * step * max(lengths) for step in range(1, STEPS + 1)]
    assert training[-1]["epoch"] == STEPS * 8 / 64


def test_the_model_learns(finished: tuple[Path, str]) -> None:
    held_out = {record["step"]: record["eval_loss"] for record in records(finished[0]) if "eval_loss" in record}
    assert held_out.keys() == {0, STEPS}
    assert math.log(264) - 0.5 < held_out[0], "a random model is no better than chance"
    assert held_out[STEPS] < held_out[0] - 1.5


def test_loss_plot(finished: tuple[Path, str]) -> None:
    image = (finished[0] / "loss.png").read_bytes()
    assert image.startswith(b"\x89PNG\r\n\x1a\n")
    assert len(image) > 10_000


def test_the_resolved_config(finished: tuple[Path, str], place: Path) -> None:
    path = finished[0] / "config.yaml"
    text = path.read_text().replace(str(place), "").replace("resume: auto", "")
    text = text.replace("device_memory: auto", "")  # of a CPU there is nothing to settle
    assert "auto" not in re.findall(r"\w+", text)
    config = load_config(path)
    assert config.to_yaml() == path.read_text()
    assert config.training.output_dir == finished[0]
    assert (config.training.compute_dtype, config.training.gradient_checkpointing) == ("float32", "full")
    assert config.memory == MemorySettings(
        base_weights="device",
        resident_layers=2,
        kept_layers=0,
        activations="device",
        adapters="device",
        optimizer="device",
    )
    assert config.data.format == "chat"


def test_a_continued_run_keeps_as_many_layers(finished: tuple[Path, str], place: Path) -> None:
    config = load_config(
        finished[0] / "config.yaml", ["training.gradient_checkpointing=auto", "memory.kept_layers=auto"]
    )
    shape = read_config(ModelFolder(place / "model"))

    def kept(work: dict[str, int] | None) -> int:
        resumed = None if work is None else types.SimpleNamespace(about={"work": work})
        return prepare.plan_as_before(config, shape, 32, resumed).layout.keep

    assert [kept(None), kept({}), kept({"keep": 1}), kept({"keep": 2})] == [0, 0, 1, 2]


def test_the_resolved_config_gives_the_same_run(finished: tuple[Path, str], tmp_path: Path) -> None:
    overrides = [f"training.output_dir={tmp_path / 'out'}", "training.export_merged=false"]
    assert train.main(["--config", str(finished[0] / "config.yaml"), *overrides]) == 0
    assert adapter_bytes(tmp_path / "out") == adapter_bytes(finished[0])
    assert (tmp_path / "out" / "samples.jsonl").read_bytes() == (finished[0] / "samples.jsonl").read_bytes()


def test_samples(finished: tuple[Path, str]) -> None:
    samples = [json.loads(line) for line in (finished[0] / "samples.jsonl").read_text().splitlines()]
    assert [(sample["step"], sample["prompt"]) for sample in samples] == [(0, "abcd"), (STEPS, "abcd")]
    assert samples[0]["answer"] != samples[1]["answer"]
    assert "before: abcd" in finished[1] and "after: abcd" in finished[1]


def test_merged_is_what_the_merge_command_writes(finished: tuple[Path, str], place: Path, tmp_path: Path) -> None:
    folder = ModelFolder(place / "model")
    merge(folder, load_adapter(finished[0] / "adapter", read_config(folder)), tmp_path / "merged", "original")
    expected = {path.name: data for path, data in snapshot(tmp_path / "merged").items()}
    assert {path.name: data for path, data in snapshot(finished[0] / "merged").items()} == expected


def test_it_ends_with_the_merged_models_held_out_loss(finished: tuple[Path, str]) -> None:
    """Of a small model whose weights are the original ones, not those that went through 4 bits: near the adapter's, and not equal."""
    out, printed = finished
    start = json.loads((out / "run.json").read_text())["starts"][-1]
    last = [record["eval_loss"] for record in records(out) if "eval_loss" in record][-1]
    assert start["merged"]["base"] == start["config"]["training"]["merge_base"] == "original"
    assert start["merged"]["eval_loss"] == pytest.approx(last, rel=0.2)
    assert start["merged"]["eval_loss"] != last
    assert f"computed in float32: {start['merged']['eval_loss']:.4f}" in printed
    merging, held_out = "merged 14 adapted linears into the original base", "held-out loss of the merged model"
    assert 0 < printed.index(merging) < printed.index(held_out) < printed.index("after: abcd")


def test_plain_lines(finished: tuple[Path, str]) -> None:
    """Loss, learning rate, gradient norm, speed, memory, time left: one line a step where there is no terminal."""
    line = r"step (\d+)/12  loss \d+\.\d{4}  lr 1\.00e-02  grad \d+\.\d{3}  \d+ tok/s  \d+\.\d GiB  ETA (\d+):\d\d"
    lines = [re.fullmatch(line, text) for text in finished[1].splitlines() if re.match(r"step \d+/", text)]
    assert all(lines)
    assert [int(found[1]) for found in lines] == list(range(1, STEPS + 1))
    assert lines[-1][0].endswith("ETA 0:00")
    assert re.search(r"step 12: held-out loss \d\.\d{4}, perplexity \d+\.\d\d\n", finished[1])
    assert "\x1b" not in finished[1]


# Two roads to one number

DROPOUT = ["lora.lora_dropout=0.1", "lora.target_modules=[down_proj]", "training.max_steps=3"]
HOST = ["memory.base_weights=host", "memory.activations=host", "memory.optimizer=host"]
DISK = ["memory.base_weights=disk", "memory.activations=host"]
DEVICE = ["memory.base_weights=device", "memory.activations=device", "memory.optimizer=device"]


@pytest.fixture(scope="module")
def with_dropout(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dropout") / "out"
    assert train_main(place, out, *DROPOUT, *DEVICE) == 0
    return out


def test_one_seed_one_adapter(place: Path, with_dropout: Path, tmp_path: Path) -> None:
    assert train_main(place, tmp_path / "out", *DROPOUT, *DEVICE) == 0
    assert adapter_bytes(tmp_path / "out") == adapter_bytes(with_dropout)


@pytest.mark.parametrize(
    "host", [HOST, HOST[:1], HOST[1:2], DISK], ids=["everything", "weights", "activations", "disk"]
)
def test_where_things_live_changes_no_bit(place: Path, with_dropout: Path, tmp_path: Path, host: list[str]) -> None:
    assert train_main(place, tmp_path / "out", *DROPOUT, *DEVICE, *host) == 0
    assert adapter_bytes(tmp_path / "out") == adapter_bytes(with_dropout)
    losses = [[record["loss"] for record in records(out)] for out in (tmp_path / "out", with_dropout)]
    assert losses[0] == losses[1]


@pytest.fixture(scope="module")
def in_4_bits(place: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The model as `convert.quantize` writes it, by type; not to be written to."""
    folder = tmp_path_factory.mktemp("4bit")
    for quant_type in ("nf4", "fp4"):
        kind = QuantizationSettings(quant_type=quant_type, double_quant=quant_type == "nf4")
        quantize(ModelFolder(place / "model"), folder / quant_type, kind)
    return {path.name: path for path in folder.iterdir()}


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_a_model_in_4_bits_is_the_same_run(
    place: Path, in_4_bits: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], quant_type: str
) -> None:
    """As that of the unquantized model with the settings that the folder brings along, without being told them."""
    double_quant = str(quant_type == "nf4").lower()
    kind = [f"quantization.quant_type={quant_type}", f"quantization.double_quant={double_quant}"]
    short = ["training.max_steps=2", "training.export_merged=true", *HOST]
    assert train_main(place, tmp_path / "plain", *kind, "training.merge_base=dequantized", *short) == 0
    assert "in 4 bits already" not in capsys.readouterr().out
    name = f"model.name_or_path={in_4_bits[quant_type]}"
    assert train_main(place, tmp_path / "out", name, *short) == 0
    double = ", double quantization" if quant_type == "nf4" else ""
    printed = capsys.readouterr().out
    assert f"{in_4_bits[quant_type]} is in 4 bits already ({quant_type}{double}): used as it is\n" in printed
    assert f"2 layers in {quant_type.upper()}" in printed
    assert adapter_bytes(tmp_path / "out") == adapter_bytes(tmp_path / "plain")
    measured = [
        [(r["loss"], r["grad_norm"], r["tokens"]) for r in records(tmp_path / run) if "loss" in r]
        for run in ("plain", "out")
    ]
    assert measured[0] == measured[1]
    merged = [{p.name: data for p, data in snapshot(tmp_path / run / "merged").items()} for run in ("plain", "out")]
    assert merged[0] == merged[1]
    resolved = load_config(tmp_path / "out" / "config.yaml")
    assert resolved.training.merge_base == "dequantized", "by default, as there are no other weights"
    assert resolved.quantization.model_dump() == load_config(place / "run.yaml", kind).quantization.model_dump()
    again = [f"training.output_dir={tmp_path / 'again'}", "training.max_steps=1", "training.export_merged=false"]
    assert train.main(["--config", str(tmp_path / "out" / "config.yaml"), *again]) == 0, "its settings are the folder's"


def test_the_next_step_begins_before_this_one_is_waited_for(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its batch is made and sent once, with all there is to do for a device that is still busy; nothing is begun after the last."""
    calls: list[str] = []

    def noted(owner: Any, name: str) -> None:
        real = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *arguments: (calls.append(name), real(*arguments))[1])

    for owner, name in ((Engine, "start"), (Engine, "go_on"), (Progress, "add")):
        noted(owner, name)
    assert (
        train_main(place, tmp_path, "training.max_steps=3", "training.eval_steps=2", "training.export_merged=false")
        == 0
    )
    assert calls == ["start", "go_on", "start", "add", "go_on", "start", "add", "go_on", "add"]


def test_an_evaluation_is_not_training_time(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock of our own: a step takes 10 s, an evaluation 1000 s; evaluations fall between and inside logged windows."""
    now = 0.0

    def takes(seconds: float, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any) -> Any:
            nonlocal now
            now += seconds
            return function(*args)

        return timed

    clock = types.SimpleNamespace(perf_counter=lambda: now, monotonic=lambda: now)
    monkeypatch.setattr(trainer, "time", clock)
    monkeypatch.setattr(Engine, "go_on", takes(10, Engine.go_on))
    monkeypatch.setattr(Engine, "loss", takes(1000, Engine.loss))
    more = ["training.logging_steps=2", "training.eval_steps=1", "training.max_steps=5"]
    assert train_main(place, tmp_path / "out", f"data.eval_path={place / 'eval.jsonl'}", *more) == 0
    assert [record["step_s"] for record in records(tmp_path / "out") if "loss" in record] == [10, 10, 10]
    rates = [record["tokens_per_s"] for record in records(tmp_path / "out") if "loss" in record]
    assert rates == [rates[0]] * 3


def test_another_seed_on_a_terminal(
    place: Path,
    with_dropout: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Another seed, another adapter. And a live display does not mind what a model says, or that it is evaluated on the way."""
    monkeypatch.setattr(execute, "answer", lambda *args: "[/b] :fire: [red]")
    out = tmp_path / "[x]"
    for name, value in (("FORCE_COLOR", "1"), ("TERM", "xterm"), ("COLUMNS", "100")):
        monkeypatch.setenv(name, value)
    more = ["training.seed=1", "training.logging_steps=2", "training.eval_steps=2", "training.sample_prompt='[/i]?'"]
    assert train_main(place, out, *DROPOUT, *DEVICE, *more, f"data.eval_path={place / 'eval.jsonl'}") == 0
    printed = capsys.readouterr().out
    assert "\x1b[" in printed, "rich did not take this for a terminal"
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", printed)
    assert adapter_bytes(out) != adapter_bytes(with_dropout)
    assert [record["step"] for record in records(out) if "loss" in record] == [2, 3]
    assert [record["step"] for record in records(out) if "eval_loss" in record] == [0, 2, 3]
    assert re.search(r"step 3/3 .* loss \d\.\d{4}", shown)
    assert shown.count("held-out loss") == 3
    assert shown.count("│ [/b] :fire: [red]") == 2
    assert "after: [/i]?" in shown
    assert str(out / "adapter") in shown.replace("\n", "")


def test_the_seed_draws_the_adapters(place: Path, tmp_path: Path) -> None:
    """While B is zero A has no gradient, so after one step it is still what was drawn."""
    assert train_main(place, tmp_path / "out", "training.seed=5", "training.max_steps=1") == 0
    drawn, other = initial_tensors(place, 5), initial_tensors(place, 0)
    for name, tensor in safetensors.numpy.load_file(tmp_path / "out" / "adapter" / WEIGHTS_FILE).items():
        if "lora_A" in name:
            np.testing.assert_array_equal(tensor, drawn[name])
            assert not np.array_equal(tensor, other[name])
        else:
            assert tensor.any()


def test_however_the_batch_is_cut(place: Path, tmp_path: Path) -> None:
    """1x8, 2x4 and 4x2 rows are the same step, also if some rows have more to learn than others.

    A large epsilon keeps AdamW from dividing rounding errors by their own size.
    """
    words = [chr(97 + number) * (1 + number % 5) for number in range(24)]
    data = write_rows(tmp_path / "uneven.jsonl", *({"prompt": word, "completion": word.upper()} for word in words))
    smooth = ["training.adam_epsilon=1.0", "training.learning_rate=1.0", "training.max_steps=3", f"data.path={data}"]
    losses, adapters = [], []
    for rows in (1, 2, 4):
        out = tmp_path / str(rows)
        cut = [f"training.per_device_train_batch_size={rows}", f"training.gradient_accumulation_steps={8 // rows}"]
        assert train_main(place, out, *smooth, *cut) == 0
        losses.append(records(out)[0]["loss"])
        adapters.append(safetensors.numpy.load_file(out / "adapter" / WEIGHTS_FILE))
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-6)
    initial = initial_tensors(place)
    for name, tensor in adapters[0].items():
        moved = np.linalg.norm(tensor - initial[name])
        assert moved > 0
        last_digit = 2.0**-23 * np.linalg.norm(initial[name])  # counts where the start is large beside the move
        for other in adapters[1:]:
            assert np.linalg.norm(other[name] - tensor) <= ANOTHER_ORDER * moved + last_digit, name


def write_rows(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def initial_tensors(place: Path, seed: int = 0) -> dict[str, np.ndarray]:
    """The adapters a run of `run.yaml` starts from, under PEFT's names."""
    config = load_config(place / "run.yaml")
    shape = read_config(ModelFolder(place / "model"))
    engine = Engine(shape, config.lora, config.quantization, compute_dtype=jnp.float32)
    return {
        NAMES.adapter(layer, name, part): np.asarray(value)
        for layer, tree in enumerate(engine.init_adapters(seed))
        for name, linear in tree.items()
        for part, value in linear["adapter"].items()
    }


# Bad input


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The message of a command that must end with status 2 and one message on stderr."""
    capsys.readouterr()
    assert train.main(list(arguments)) == EXIT_BAD_INPUT
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("error: ") == 1
    assert "Traceback" not in error
    assert "\n  found:    " in error
    return error


def test_a_missing_config(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    error = refused(capsys, "--config", str(tmp_path / "nope.yaml"))
    assert f"error: {tmp_path / 'nope.yaml'}\n  found:    no such file" in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("training.learning_rat=1", ["run.yaml", "training.learning_rat", "did you mean training.learning_rate?"]),
        ("lora.use_dora=true", ["lora.use_dora: not available in this version"]),
        ("training.max_steps=many", ["training.max_steps", "found 'many'"]),
        ("max_steps=3", ["max_steps=3", "section.key=value"]),
        ("data.path=nowhere.jsonl", ["nowhere.jsonl"]),
        ("data.eval_path=nowhere.jsonl", ["nowhere.jsonl"]),
        ("data.max_seq_length=8", ["train.jsonl:1", "raise data.max_seq_length above"]),
        ("data.format=text", ["train.jsonl:1", "text"]),
        ("model.name_or_path=./nowhere", ["nowhere"]),
    ],
)
def test_a_bad_setting(
    capsys: pytest.CaptureFixture[str], place: Path, tmp_path: Path, override: str, parts: list[str]
) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    before = snapshot(tmp_path) | snapshot(place)
    error = refused(capsys, "--config", str(place / "run.yaml"), f"training.output_dir={tmp_path}", override)
    for part in parts:
        assert part in error
    assert snapshot(tmp_path) | snapshot(place) == before


@pytest.mark.parametrize(
    ("rows", "parts"),
    [
        (b"", ["rows.jsonl", "no rows"]),
        (b'{"text": "a"}\n{"txt": "b"}\n', ["rows.jsonl:2", "text"]),
        (b'{"question": "a"}\n', ["rows.jsonl:1", "question"]),
        (b'{"text": "a"}\n{"text": \n', ["rows.jsonl:2", "not JSON"]),
        (b'{"text": "a"}\n{"text": "\xff"}\n', ["rows.jsonl:2", "UTF-8"]),
        (b'{"prompt": "' + 100 * b"x" + b'", "completion": "y"}\n', ["rows.jsonl:1", "max_seq_length"]),
    ],
)
def test_bad_rows(
    capsys: pytest.CaptureFixture[str], place: Path, tmp_path: Path, rows: bytes, parts: list[str]
) -> None:
    (tmp_path / "rows.jsonl").write_bytes(rows)
    paths = [f"training.output_dir={tmp_path / 'out'}", f"data.path={tmp_path / 'rows.jsonl'}"]
    error = refused(capsys, "--config", str(place / "run.yaml"), *paths)
    for part in parts:
        assert part in error
    assert not snapshot(tmp_path / "out")


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (
            ["quantization.quant_type=nf4"],
            [
                'found:    quant_type "nf4", but',
                'expected: what that folder is in: quant_type "fp4", double_quant false',
            ],
        ),
        (["quantization.double_quant=true"], ["found:    double_quant true, but", "leave these settings out"]),
        (["training.export_merged=true", "training.merge_base=original"], ["original weights", "training.merge_base"]),
    ],
)
def test_what_a_model_in_4_bits_is_not(
    capsys: pytest.CaptureFixture[str],
    place: Path,
    in_4_bits: dict[str, Path],
    tmp_path: Path,
    overrides: list[str],
    parts: list[str],
) -> None:
    """Said before anything is trained or written."""
    paths = [f"training.output_dir={tmp_path / 'out'}", f"model.name_or_path={in_4_bits['fp4']}"]
    error = refused(capsys, "--config", str(place / "run.yaml"), *paths, *overrides)
    assert str(in_4_bits["fp4"]) in error
    for part in parts:
        assert part in error
    assert not (tmp_path / "out").exists()


def scale_gone(model: Path) -> None:
    quantize(ModelFolder(model), model.with_name("4bit"), QuantizationSettings())
    tensors = safetensors.numpy.load_file(model.with_name("4bit") / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight.absmax"]
    safetensors.numpy.save_file(tensors, model / "model.safetensors", {"format": "pt"})
    shutil.copyfile(model.with_name("4bit") / "config.json", model / "config.json")


def no_weights(model: Path) -> None:
    (model / "model.safetensors").unlink()


def only_pickles(model: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")


def truncated(model: Path) -> None:
    data = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(data[:-1])


def configured(**changes: Any) -> Callable[[Path], None]:
    return lambda model: write_json(model / "config.json", tiny.hf_config(**changes))


def no_tokenizer(model: Path) -> None:
    for path in model.glob("token*"):
        path.unlink()


def not_finite(model: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    tensors = safetensors.numpy.load_file(model / "model.safetensors")
    tensors[name][3, 5] = ml_dtypes.bfloat16(np.nan)
    safetensors.numpy.save_file(tensors, model / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "parts"),
    [
        (no_weights, ["no weights", "model.safetensors"]),
        (only_pickles, ["only pickled weights (pytorch_model.bin)"]),
        (truncated, ["model.safetensors: truncated"]),
        (lambda model: (model / "config.json").unlink(), ["no config.json"]),
        (
            configured(model_type="mixtral"),
            ["config.json", "model_type is 'mixtral'", "mixtures of experts are not supported"],
        ),
        (configured(is_causal=False, hidden_act="tanh"), ["is_causal is False", "hidden_act is 'tanh'"]),
        (configured(attention_bias=True), ["missing: model.layers.0.self_attn.q_proj.bias"]),
        (
            configured(rope_scaling={"rope_type": "llama3"}),
            ["rope_scaling: factor is missing", "high_freq_factor is missing"],
        ),
        (configured(num_hidden_layers=3), ["missing: model.layers.2.mlp.up_proj.weight"]),
        (no_tokenizer, ["model", "tokenizer"]),
        (not_finite, ["model.layers.1.mlp.up_proj.weight"]),
        (scale_gone, ["missing: model.layers.1.mlp.up_proj.weight.absmax", "give the unquantized one"]),
        (
            configured(quantization_config={"quant_method": "gptq"}),
            ["already quantized (gptq)", "quantized on the way in"],
        ),
    ],
)
def test_a_bad_model(
    capsys: pytest.CaptureFixture[str],
    place: Path,
    tmp_path: Path,
    damage: Callable[[Path], object],
    parts: list[str],
) -> None:
    model = shutil.copytree(place / "model", tmp_path / "model")
    damage(model)
    before = snapshot(model)
    paths = [f"model.name_or_path={model}", f"training.output_dir={tmp_path / 'out'}"]
    error = refused(capsys, "--config", str(place / "run.yaml"), *paths)
    assert str(model) in error
    for part in parts:
        assert part in error
    assert snapshot(model) == before
    assert not (tmp_path / "out" / "adapter").exists()


def test_a_loss_that_diverges(capsys: pytest.CaptureFixture[str], place: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    overrides = [f"training.output_dir={out}", "training.learning_rate=1e30"]
    error = refused(capsys, "--config", str(place / "run.yaml"), *overrides)
    assert re.search(r"error: training step [23]\n  found:    loss (nan|inf)", error)
    assert "lower training.learning_rate" in error
    assert records(out)[0]["step"] == 1  # what was good is kept, and is JSON
    assert not (out / "adapter").exists()


def test_a_finished_run_is_kept_unless_asked(
    capsys: pytest.CaptureFixture[str], place: Path, finished: tuple[Path, str], tmp_path: Path
) -> None:
    out = shutil.copytree(finished[0], tmp_path / "out")
    before = snapshot(out)
    error = refused(capsys, "--config", str(place / "run.yaml"), f"training.output_dir={out}")
    assert str(out) in error
    assert "training.overwrite_output_dir=true" in error
    assert snapshot(out) == before

    assert train_main(place, out, "training.overwrite_output_dir=true", "training.max_steps=1") == 0
    assert adapter_bytes(out) != before[out / "adapter" / WEIGHTS_FILE]
    assert not (out / "merged").exists(), "it belonged to the adapter that was replaced"
    assert [record["step"] for record in records(out)] == [1]
    assert (out / "metrics.before-1.jsonl").read_bytes() == before[out / "metrics.jsonl"]


def test_an_unfinished_runs_metrics_are_kept(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for number in (1, 2):
        (out / "metrics.jsonl").write_text(f"of run {number}")
        shutil.rmtree(out / "adapter", ignore_errors=True)
        assert train_main(place, out, "training.max_steps=1", *NO_SAVES) == 0
    kept = {path.name: path.read_text() for path in out.glob("metrics.before-*")}
    assert kept == {"metrics.before-1.jsonl": "of run 1", "metrics.before-2.jsonl": "of run 2"}


def test_an_output_dir_that_cannot_be_made(capsys: pytest.CaptureFixture[str], place: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    error = refused(capsys, "--config", str(place / "run.yaml"), f"training.output_dir={tmp_path / 'file' / 'out'}")
    assert str(tmp_path / "file" / "out") in error
    assert (tmp_path / "file").read_text() == "precious"


# As a process


def start(*arguments: str, cwd: Path, **environment: str) -> Callable[[], tuple[int, str, str]]:
    """Start Python; the result waits for its exit status, standard output and standard error."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", **environment}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, *arguments], cwd=cwd, env=environment, text=True, **pipes)

    def finish() -> tuple[int, str, str]:
        with process:
            try:
                out, err = process.communicate(timeout=180)
            except BaseException:
                process.kill()
                raise
        return process.returncode, out, err

    return finish


def test_exit_status(tmp_path: Path) -> None:
    script = str(REPOSITORY / "train.py")
    missing, helped = start(script, "--config", "nope.yaml", cwd=tmp_path), start(script, "--help", cwd=tmp_path)
    status, out, err = missing()
    assert (status, out) == (EXIT_BAD_INPUT, "")
    assert err.startswith("error: nope.yaml\n")
    status, out, err = helped()
    assert (status, err) == (0, "")
    assert "--config FILE" in out and "section.key=value" in out


WITHOUT_TORCH = """\
import importlib.machinery

find_spec = importlib.machinery.PathFinder.find_spec


def find_all_but_torch(name, path=None, target=None):
    return None if name.partition(".")[0] == "torch" else find_spec(name, path, target)


importlib.machinery.PathFinder.find_spec = find_all_but_torch
"""


def test_no_torch_at_run_time(place: Path, tmp_path: Path) -> None:
    """Hidden as if it were not installed. (A stub that raises would trip transformers, which imports torch if it finds one.)"""
    (tmp_path / "sitecustomize.py").write_text(WITHOUT_TORCH)
    hidden = {"PYTHONPATH": str(tmp_path)}
    _, _, err = start("-c", "import torch", cwd=tmp_path, **hidden)()
    assert "No module named 'torch'" in err
    # Of the shape of runs before, whose compilations are kept.
    overrides = [f"training.output_dir={tmp_path / 'out'}", "training.max_steps=1", "training.export_merged=true"]
    script = str(REPOSITORY / "train.py")
    status, _, err = start(script, "--config", str(place / "run.yaml"), *overrides, cwd=tmp_path, **hidden)()
    assert (status, err) == (0, "")
    assert (tmp_path / "out" / "adapter" / WEIGHTS_FILE).is_file()
    assert (tmp_path / "out" / "merged" / "config.json").is_file()
