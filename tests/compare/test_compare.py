"""`python -m qlora_jax compare`: both sides agree on a tiny model, whatever is wrong is noticed where it is, and bad input is explained."""

import argparse
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from convert.files.folder import ModelFolder
from convert.model import BaseModel, open_model
from convert.quantize import quantize
from qlora_jax.__main__ import main
from qlora_jax.base.errors import EXIT_BAD_INPUT, InputError
from qlora_jax.commands import compare as command
from qlora_jax.compare import bounds, process, stages
from qlora_jax.compare.both import Ours, Reference, Steps, Subject, differences, run_theirs
from qlora_jax.compare.report import as_json
from qlora_jax.config import LoraSettings, QuantizationSettings, TrainingSettings
from qlora_jax.engine.engine import Weights
from qlora_jax.model.architecture import Kind, Rope
from qlora_jax.model.families import read_architecture
from qlora_jax.model.rope import plain_frequencies
from qlora_jax.runtime.placement import LayerStore
from tests.helpers import tiny

LIBRARIES = ("torch", "bitsandbytes", "peft")
STEPS = 3


# --------------------------------------------------------------------------------------- both sides, in each dtype


@dataclasses.dataclass(frozen=True)
class Case:
    """PyTorch's side done once; ours can then be right or wrong in many ways."""

    model: BaseModel
    lora: LoraSettings
    quantization: QuantizationSettings
    adapter: Path
    subject: Subject
    steps: Steps
    reference: Reference

    def ours(self) -> Ours:
        return command.ours_of(self.model, self.adapter, self.lora, self.quantization, self.reference.run.dtype)

    def differences(self, ours: Ours | None = None, steps: Steps | None = None) -> stages.Comparison:
        return differences(self.subject, ours or self.ours(), steps or self.steps, self.reference)


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    for library in LIBRARIES:
        pytest.importorskip(library)
    work = tmp_path_factory.mktemp("compare")
    model = open_model(str(tiny.write_model(work / "model", tie_word_embeddings=False)))
    lora, quantization = LoraSettings(r=4, lora_dropout=0.0), QuantizationSettings()
    adapter = command.make_adapter(work / "adapter", model, lora, quantization)
    options = argparse.Namespace(data=None, max_seq_length=32, rows=2, steps=STEPS)
    batches = command.make_batches(options, model)
    steps = Steps(batches, [2e-3] * STEPS, TrainingSettings(output_dir=work, weight_decay=0.1))
    subject = command.subject_of(model, adapter, lora, quantization)
    references = run_theirs(subject, steps, ("float32", "bfloat16"), device="cpu", work=work)
    return {
        name: Case(model, lora, quantization, adapter, subject, steps, reference)
        for name, reference in references.items()
    }


@pytest.fixture(params=["float32", "bfloat16"])
def case(request: pytest.FixtureRequest, cases: dict[str, Case]) -> Case:
    return cases[request.param]


def test_both_sides_agree(case: Case) -> None:
    found = case.differences()
    assert found.exceeded == []
    judged = {check.stage for check in found.checks if check.bound is not None}
    assert judged == {
        *("quantization", "dequantization", "hidden states", "logits", "next token", "loss", "gradients", "training"),
        "own bytes",
    }
    assert len(found.by_layer["ours and theirs"]) == 1 + case.model.config.num_hidden_layers
    assert {row["tensor"] for row in found.by_tensor} == case.subject.adapters.keys()
    assert all(len(losses) == STEPS for losses in found.losses.values())
    assert found.losses["ours"][-1] < found.losses["ours"][0] or found.losses["ours"] == pytest.approx(
        found.losses["theirs"], rel=1e-2
    )


def with_rope_theta(theta: float) -> Callable[[Case], dict[str, Any]]:
    """Our side with another rotation, of the same arrays."""

    def wrong(case: Case) -> dict[str, Any]:
        facts = case.model.config
        rope = Rope(frequencies=plain_frequencies(theta, facts.head_dim))
        config = dataclasses.replace(facts, kinds=(Kind(rope=rope),) * facts.num_hidden_layers)
        model = dataclasses.replace(case.model, config=config)
        return {"ours": dataclasses.replace(dataclasses.replace(case, model=model).ours(), weights=case.ours().weights)}

    return wrong


def with_lora(**changes: Any) -> Callable[[Case], dict[str, Any]]:
    def wrong(case: Case) -> dict[str, Any]:
        changed = dataclasses.replace(case, lora=case.lora.model_copy(update=changes))
        return {"ours": dataclasses.replace(changed.ours(), start=case.ours().start)}

    return wrong


def with_steps(**changes: Any) -> Callable[[Case], dict[str, Any]]:
    def wrong(case: Case) -> dict[str, Any]:
        settings = case.steps.settings.model_copy(update=changes)
        return {"steps": dataclasses.replace(case.steps, settings=settings)}

    return wrong


def with_a_code_changed(case: Case) -> dict[str, Any]:
    """One nibble of one linear."""

    def weights() -> Weights:
        made = case.ours().weights()
        layers = [jax.tree.map(np.array, layer) for _, layer in made.layers.walk(range(len(made.layers)))]
        layers[1]["o_proj"]["weight"].codes[7] ^= 1
        return Weights(made.embedding, LayerStore(layers, "device"), made.head)

    return {"ours": dataclasses.replace(case.ours(), weights=weights)}


def with_labels_shifted(case: Case) -> dict[str, Any]:
    first, *rest = case.steps.batches
    moved = dataclasses.replace(first, labels=np.roll(first.labels, 1, axis=-1))
    return {"steps": dataclasses.replace(case.steps, batches=[moved, *rest])}


WRONG = {
    "rope_theta": (with_rope_theta(9000.0), "hidden states"),
    "scaling": (with_lora(lora_alpha=18.0), "gradients"),
    "weight decay": (with_steps(weight_decay=30.0), "training"),
    "clipping": (with_steps(max_grad_norm=0.0, adam_epsilon=1e-2), "training"),
    "beta": (with_steps(adam_beta1=0.5), "training"),
    "a code": (with_a_code_changed, "quantization"),
    "labels": (with_labels_shifted, "gradients"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_noticed(cases: dict[str, Case], name: str) -> None:
    make, stage = WRONG[name]
    found = cases["float32"].differences(**make(cases["float32"]))
    assert stage in {check.stage for check in found.exceeded}


@pytest.mark.parametrize("name", ["scaling", "beta", "labels"])
def test_and_in_bfloat16(cases: dict[str, Case], name: str) -> None:
    make, stage = WRONG[name]
    found = cases["bfloat16"].differences(**make(cases["bfloat16"]))
    assert stage in {check.stage for check in found.exceeded}


def test_a_number_that_is_none_is_exceeded() -> None:
    found = stages.Comparison()
    found.add("logits", "difference", float("nan"), 1.0)
    found.add("logits", "difference", 1.0, 1.0)
    found.add("logits", "difference", float("nan"))
    assert len(found.exceeded) == 1
    text = json.dumps(as_json(found), allow_nan=False)
    assert [check["value"] for check in json.loads(text)["checks"]] == [None, 1.0, None]


def test_bounds_grow_with_depth_and_stay_far_below_what_matters() -> None:
    config = read_architecture(tiny.hf_config())
    deeper = [bounds.arithmetic(config, depth) for depth in range(80)]
    assert deeper == sorted(deeper)
    llama_70b = dataclasses.replace(config, hidden_size=8192, intermediate_size=28672)
    assert bounds.arithmetic(llama_70b, 80) < 2.0**-9  # one rounding to bfloat16


def test_by_token_weighs_every_token_alike() -> None:
    expected = np.array([[1000.0, 0.0], [1.0, 0.0], [0.0, 0.0]])
    found = expected + np.array([[0.0, 0.0], [0.0, 0.3], [0.0, 0.0]])
    assert stages.by_token(found, expected) == pytest.approx(0.3 / 3**0.5)
    assert stages.relative(found, expected) == pytest.approx(0.3 / 1000.0005, rel=1e-6)
    assert stages.relative(np.zeros(3), np.zeros(3)) == 0
    assert stages.relative(np.ones(3), np.zeros(3)) == np.inf


# ------------------------------------------------------------------------------------------------------- the command


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """On a folder in 4 bits, with an adapter and data of one's own."""
    for library in LIBRARIES:
        pytest.importorskip(library)
    quantize(ModelFolder(tiny.write_model(tmp_path / "plain")), tmp_path / "model", QuantizationSettings())
    model = open_model(str(tmp_path / "model"))
    lora = LoraSettings(r=2, lora_dropout=0.3, target_modules=("q_proj", "down_proj"))
    adapter = command.make_adapter(tmp_path / "adapter", model, lora, QuantizationSettings())
    data = tiny.write_chats(tmp_path / "rows.jsonl", 6)
    monkeypatch.chdir(tmp_path)
    arguments = ["compare", "--model", str(model.folder.path), "--adapter", str(adapter), "--data", str(data), "--json"]
    assert main([*arguments, "--steps", "2"]) == 0
    printed = json.loads(capsys.readouterr().out)
    folder = tmp_path / "runs" / "compare-1"
    assert printed == json.loads((folder / "report.json").read_text())
    assert sorted(path.name for path in folder.iterdir()) == ["layers.png", "losses.png", "report.json"]
    assert printed["holds"]
    assert printed["reference"]["versions"].keys() == {"torch", "transformers", "bitsandbytes", "peft"}
    assert {check["stage"] for check in printed["checks"]} >= {"quantization", "training"}
    assert "own bytes" not in {check["stage"] for check in printed["checks"]}  # they are the folder's
    assert len(printed["gradients_by_tensor"]) == 2 * 2 * 2


def test_exit_status_and_verdict_of_a_difference(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = stages.Comparison(about={"compute_dtype": "float32"}, by_layer={"ours and theirs": [0.0, 1e-6]})
    found.add("logits", "relative difference", 0.5, 1e-5)
    monkeypatch.setattr(command, "compare_model", lambda *arguments, **options: found)
    monkeypatch.setattr(process, "LIBRARIES", ())
    folder = tiny.write_model(tmp_path / "model")
    assert main(["compare", "--model", str(folder), "--out", str(tmp_path / "out")]) == command.EXIT_EXCEEDED == 1
    printed = capsys.readouterr().out
    assert "EXCEEDED" in printed
    assert "NOT the same numbers: 1 of 1 bounds exceeded (logits: relative difference)" in printed
    assert not json.loads((tmp_path / "out" / "report.json").read_text())["holds"]


# ---------------------------------------------------------------------------------------------------------- bad input


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["compare", *arguments]) == EXIT_BAD_INPUT
    said = capsys.readouterr()
    assert said.out == ""
    assert "Traceback" not in said.err
    return said.err


@pytest.fixture
def anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where nothing may be left behind; as if the reference were installed."""
    monkeypatch.setattr(process, "LIBRARIES", ())
    empty = tmp_path / "here"
    empty.mkdir()
    monkeypatch.chdir(empty)
    return empty


def test_libraries_that_are_missing(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "LIBRARIES", ("json", "not_a_torch", "not_bitsandbytes"))
    said = refused(capsys, "--model", "anything")
    assert "not installed: not_a_torch, not_bitsandbytes" in said
    assert "pip install 'qlora_jax[compare]'" in said


def test_numbers_all_at_once(capsys: pytest.CaptureFixture[str], anywhere: Path, tiny_folder: Path) -> None:
    bad = ["--rows", "0", "--steps", "-1", "--max-seq-length", "1", "--r", "0", "--learning-rate", "nan"]
    said = refused(capsys, "--model", str(tiny_folder), *bad)
    for option in bad[::2]:
        assert option in said
    assert list(anywhere.iterdir()) == []


@pytest.mark.parametrize("text", ["", "\n\n", '{"text": ""}\n'])
def test_no_tokens(capsys: pytest.CaptureFixture[str], anywhere: Path, tiny_folder: Path, text: str) -> None:
    (anywhere.parent / "rows.jsonl").write_text(text)
    said = refused(capsys, "--model", str(tiny_folder), "--data", str(anywhere.parent / "rows.jsonl"))
    assert "rows.jsonl" in said
    assert list(anywhere.iterdir()) == []


def test_an_adapter_that_does_not_fit(capsys: pytest.CaptureFixture[str], anywhere: Path, tiny_folder: Path) -> None:
    other = open_model(str(tiny.write_model(anywhere.parent / "other", hidden_size=32, head_dim=8)))
    adapter = command.make_adapter(anywhere.parent / "adapter", other, LoraSettings(r=2), QuantizationSettings())
    said = refused(capsys, "--model", str(tiny_folder), "--adapter", str(adapter))
    assert "tensors that do not fit the model" in said
    assert list(anywhere.iterdir()) == []


def test_a_folder_that_is_there(capsys: pytest.CaptureFixture[str], anywhere: Path, tiny_folder: Path) -> None:
    (anywhere / "out").mkdir()
    (anywhere / "out" / "report.json").write_text("mine")
    said = refused(capsys, "--model", str(tiny_folder), "--out", "out")
    assert "something there already" in said
    assert (anywhere / "out" / "report.json").read_text() == "mine"


def test_a_disk_that_is_full(
    capsys: pytest.CaptureFixture[str], anywhere: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(command.shutil, "disk_usage", lambda path: usage)
    assert "GiB free on its disk" in refused(capsys, "--model", str(tiny_folder), "--out", "out")
    assert list(anywhere.iterdir()) == []


def test_a_quantization_that_is_not_the_folder_s(
    capsys: pytest.CaptureFixture[str], anywhere: Path, tiny_folder: Path
) -> None:
    folder = anywhere.parent / "model"
    quantize(ModelFolder(tiny_folder), folder, QuantizationSettings())
    said = refused(capsys, "--model", str(folder), "--quant-type", "fp4")
    assert "--quant-type" in said
    assert list(anywhere.iterdir()) == []


def test_a_model_that_the_reference_cannot_load(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny_folder: Path
) -> None:
    """transformers says why; nothing of the report is left behind."""
    for library in LIBRARIES:
        pytest.importorskip(library)
    folder = tiny.write_model(tmp_path / "model", pad_token_id=100000)
    said = refused(capsys, "--model", str(folder), "--out", str(tmp_path / "out"), "--steps", "0")
    assert "the reference cannot load it" in said
    assert "Padding_idx must be within num_embeddings" in said
    assert not (tmp_path / "out").exists()


def test_what_stops_pytorch_s_side_is_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "LIBRARIES", ())
    monkeypatch.setattr(process, "PROGRAM", "qlora_jax.no_such_program")
    run = process.Run(tmp_path / "out", tmp_path, "float32", "cpu", tmp_path / "tokens.npz", [], {})
    with pytest.raises(RuntimeError, match="no_such_program") as error:
        process.run_reference([run], tmp_path / "job.json")
    assert not isinstance(error.value, InputError)
