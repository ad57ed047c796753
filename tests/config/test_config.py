"""One file, overrides and defaults meet in one validated config; whatever is wrong is said once, and where."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

from qlora_jax.base.errors import InputError
from qlora_jax.config import NOT_YET, Config, LoraSettings, load_config
from qlora_jax.config.section import MAX_WHOLE
from tests.helpers.tiny import LINEAR_NAMES

REPOSITORY = Path(__file__).parents[2]
MINIMAL: dict[str, Any] = {
    "model": {"name_or_path": "some/model"},
    "data": {"path": "rows.jsonl"},
    "training": {"output_dir": "runs/x"},
}


def write(path: Path, changes: dict[str, Any] | None = None) -> Path:
    """MINIMAL with the sections of `changes` laid over it, as YAML."""
    settings = {section: dict(values) for section, values in MINIMAL.items()}
    for section, values in (changes or {}).items():
        settings[section] = {**settings.get(section, {}), **values} if isinstance(values, dict) else values
    path.write_text(yaml.safe_dump(settings))
    return path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write(tmp_path / "run.yaml")


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(InputError) as caught:
        load_config(path, overrides)
    return str(caught.value)


def refused(tmp_path: Path, **changes: Any) -> str:
    return refusal(write(tmp_path / "changed.yaml", changes))


def test_file_overrides_and_defaults_meet(tmp_path: Path) -> None:
    path = write(tmp_path / "run.yaml", {"lora": {"r": 8, "lora_alpha": 32}, "training": {"seed": 3}})
    config = load_config(path, ["lora.r=4", "training.output_dir=elsewhere", "memory.optimizer=host"])
    assert (config.lora.r, config.lora.lora_alpha) == (4, 32.0)
    assert (config.training.seed, config.training.output_dir) == (3, Path("elsewhere"))
    assert config.memory.optimizer == "host"
    untouched = LoraSettings()
    assert (config.lora.lora_dropout, config.lora.target_modules) == (untouched.lora_dropout, "all-linear")


def test_the_papers_defaults(file: Path) -> None:
    config = load_config(file)
    training = config.training
    assert (config.quantization.quant_type, config.quantization.double_quant) == ("nf4", True)
    assert (config.lora.r, config.lora.lora_alpha, config.lora.lora_dropout) == (64, 16.0, 0.05)
    assert (training.learning_rate, training.lr_scheduler_type, training.max_grad_norm) == (2e-4, "constant", 0.3)
    assert training.per_device_train_batch_size * training.gradient_accumulation_steps == 16


def test_overrides_are_yaml_values(file: Path) -> None:
    overrides = [
        "training.export_merged=true",
        "lora.target_modules=[v_proj, q_proj]",
        "data.eval_path=null",
        "training.sample_prompt='what = this?'",
        "training.learning_rate=1e-4",
    ]
    config = load_config(file, overrides)
    assert config.training.export_merged is True
    assert list(config.lora.target_modules) == ["v_proj", "q_proj"]
    assert config.data.eval_path is None
    assert config.training.sample_prompt == "what = this?"
    assert config.training.learning_rate == 1e-4


def test_the_last_override_wins(file: Path) -> None:
    assert load_config(file, ["lora.r=4", "lora.r=5"]).lora.r == 5


def test_an_override_can_open_a_section_the_file_lacks(file: Path) -> None:
    assert "quantization" not in yaml.safe_load(file.read_text())
    assert load_config(file, ["quantization.double_quant=false"]).quantization.double_quant is False


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "1.0e-4", "0.0001"])
def test_an_exponent_without_a_point_is_a_number(file: Path, text: str) -> None:
    """YAML 1.1 reads `1e-4` as a string."""
    file.write_text(file.read_text() + f"lora: {{lora_alpha: {text}}}\n")
    assert load_config(file).lora.lora_alpha == 1e-4


def test_targets_are_in_the_layers_order() -> None:
    assert LoraSettings(target_modules=["down_proj", "v_proj", "q_proj"]).targets(LINEAR_NAMES) == (
        "q_proj",
        "v_proj",
        "down_proj",
    )
    assert LoraSettings(target_modules=["v_proj", "v_proj"]).targets(LINEAR_NAMES) == ("v_proj",)
    assert LoraSettings().targets(LINEAR_NAMES) == LINEAR_NAMES


def test_scaling() -> None:
    assert LoraSettings(r=16, lora_alpha=32).scaling == 2.0
    assert LoraSettings(r=16, lora_alpha=32, use_rslora=True).scaling == 8.0


def test_settings_are_immutable(file: Path) -> None:
    config = load_config(file)
    with pytest.raises(ValueError, match="frozen"):
        config.lora.r = 3  # type: ignore[misc]


def test_round_trip(tmp_path: Path) -> None:
    changes = {
        "model": {"name_or_path": "1234"},  # must not come back as a number
        "lora": {"r": 8, "target_modules": ["q_proj", "v_proj"], "use_rslora": True, "lora_dropout": 0.1},
        "data": {"eval_path": "held out.jsonl", "max_seq_length": 64},
        "training": {"learning_rate": 1e-5, "adam_epsilon": 1e-8, "sample_prompt": 'Why?\n— "so": no # yes'},
        "memory": {"base_weights": "host"},
    }
    config = load_config(write(tmp_path / "one.yaml", changes))
    again = tmp_path / "two.yaml"
    again.write_text(config.to_yaml(), encoding="utf-8")
    assert load_config(again) == config
    assert load_config(again).to_yaml() == config.to_yaml()
    assert set(yaml.safe_load(config.to_yaml())) == set(Config.model_fields)


@pytest.mark.parametrize(
    ("section", "key", "nearest"),
    [
        ("lora", "rank", "known here: r, lora_alpha"),
        ("lora", "lora_alhpa", "did you mean lora.lora_alpha?"),
        ("training", "learning_rat", "did you mean training.learning_rate?"),
        ("training", "max_seq_length", "did you mean data.max_seq_length?"),  # known, but in another section
        ("lora", "learning_rate", "did you mean training.learning_rate?"),
        ("memory", "activation", "did you mean memory.activations?"),
    ],
)
def test_an_unknown_setting_names_the_nearest(tmp_path: Path, section: str, key: str, nearest: str) -> None:
    message = refused(tmp_path, **{section: {key: 1}})
    assert f"{section}.{key}: unknown setting" in message
    assert nearest in message
    assert str(tmp_path / "changed.yaml") in message


def test_a_misspelt_section(tmp_path: Path) -> None:
    message = refused(tmp_path, trainig={"max_steps": 3})
    assert "trainig: unknown setting; did you mean training?" in message


def test_a_setting_outside_its_section(tmp_path: Path) -> None:
    message = refused(tmp_path, learning_rate=1)
    assert "learning_rate: unknown setting; did you mean training.learning_rate?" in message


def test_an_unknown_setting_in_an_override(file: Path) -> None:
    assert "lora.rr: unknown setting" in refusal(file, "lora.rr=3")
    assert "lorra: unknown setting; did you mean lora?" in refusal(file, "lorra.r=3")


@pytest.mark.parametrize(
    ("section", "key"), [(section, key) for section, keys in NOT_YET.items() for key in sorted(keys)]
)
def test_what_is_not_there_yet_is_refused_by_name(tmp_path: Path, section: str, key: str) -> None:
    assert f"{section}.{key}: not available in this version" in refused(tmp_path, **{section: {key: 1}})


def test_not_yet_does_not_hide_what_is_there() -> None:
    for section, keys in NOT_YET.items():
        assert not keys & Config.model_fields[section].annotation.model_fields.keys()


@pytest.mark.parametrize(
    ("section", "key", "value", "found"),
    [
        ("lora", "r", "many", "'many'"),
        ("lora", "r", 0, "0"),
        ("lora", "r", 2.5, "2.5"),
        ("lora", "lora_dropout", 1.0, "1.0"),
        ("lora", "lora_alpha", -1, "-1"),
        ("lora", "lora_alpha", float("inf"), "inf"),
        ("lora", "target_modules", [], "[]"),
        ("training", "learning_rate", 0, "0"),
        ("training", "learning_rate", "fast", "'fast'"),
        ("training", "learning_rate", float("nan"), "nan"),
        ("training", "learning_rate", float("inf"), "inf"),
        ("training", "max_steps", 0, "0"),
        ("training", "lr_scheduler_type", "cosin", "'cosin'"),
        ("training", "export_merged", "perhaps", "'perhaps'"),
        ("training", "output_dir", None, "None"),
        ("data", "packing", "perhaps", "'perhaps'"),
        ("data", "eval_fraction", 1, "1"),
        ("data", "loss_on", "user", "'user'"),
        ("quantization", "quant_type", "int8", "'int8'"),
        ("memory", "base_weights", "tape", "'tape'"),
        ("model", "name_or_path", 7, "7"),
    ],
)
def test_a_wrong_value_names_setting_and_value(tmp_path: Path, section: str, key: str, value: Any, found: str) -> None:
    message = refused(tmp_path, **{section: {key: value}})
    assert f"\n    {section}.{key}: " in message
    assert f"found {found}" in message


@pytest.mark.parametrize(
    ("section", "values", "line"),
    [
        ("data", {"format": "alpacca"}, "data.format: input should be 'auto', 'text', 'alpaca', "),
        ("memory", {"resident_layers": -1}, "memory.resident_layers: input should be 'auto' or input should be greater than"),
        ("data", {"weight": -1}, "data.weight: weights are for those that data.sources lists; one source alone has none, found -1"),
        ("data", {"sources": [{"path": "a"}]}, "data: name one source with data.path, or list several in data.sources"),
    ],
)  # fmt: skip
def test_one_line_for_each_setting(tmp_path: Path, section: str, values: dict[str, Any], line: str) -> None:
    """Whatever kinds of value it may have; and without the whole section where it is about several settings."""
    message = refused(tmp_path, **{section: values})
    problems = [problem for problem in message.splitlines() if problem.startswith("    ")]
    assert len(problems) == 1 and problems[0].startswith(f"    {line}")
    assert "{" not in problems[0] and "constrained" not in problems[0] and "literal" not in problems[0]


@pytest.mark.parametrize("value", [[], ["q_proj", 1], {"q_proj": 1}, 7, ""], ids=str)
def test_targets_that_are_no_names(tmp_path: Path, value: Any) -> None:
    """Which names there are is the model's to say, when it is opened."""
    message = refused(tmp_path, lora={"target_modules": value})
    problems = [line for line in message.splitlines() if line.startswith("    ")]
    assert len(problems) == 1 and problems[0].startswith("    lora.target_modules: expected all-linear, a list of")


def test_missing_settings(tmp_path: Path) -> None:
    path = tmp_path / "empty.yaml"
    path.write_text("lora: {r: 4}\ntraining: {seed: 1}\n")
    message = refusal(path)
    for name in ("model", "data", "training.output_dir"):
        assert f"\n    {name}: missing, and it has no default" in message


def test_a_section_that_is_not_one(tmp_path: Path) -> None:
    assert "\n    lora: " in refused(tmp_path, lora=[1, 2])
    path = write(tmp_path / "run.yaml", {"lora": 3})
    assert "`lora` is not a section" in refusal(path, "lora.r=4")


def test_everything_wrong_is_said_at_once(tmp_path: Path) -> None:
    message = refused(
        tmp_path,
        lora={"r": 0, "use_dora": True, "lora_alhpa": 1},
        training={"seed": -1},
        data={"splt": "x"},
        moddel={},
    )
    problems = [line for line in message.splitlines() if line.startswith("    ")]
    names = sorted(line.split(":")[0].strip() for line in problems)
    assert names == ["data.splt", "lora.lora_alhpa", "lora.r", "lora.use_dora", "moddel", "training.seed"]


@pytest.mark.parametrize("override", ["max_steps=3", "training.max_steps", "training.=3", "=", ""])
def test_an_override_must_have_section_key_and_value(file: Path, override: str) -> None:
    message = refusal(file, override)
    assert message.startswith(override)
    assert "section.key=value" in message


def test_an_override_that_is_not_yaml(file: Path) -> None:
    assert "'[q_proj' is not a YAML value" in refusal(file, "lora.target_modules=[q_proj")


@pytest.mark.parametrize("content", [b"model: [", b"a: b: c", b"\xff\xfe\xff"])
def test_not_yaml(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)
    message = refusal(path)
    assert message.startswith(str(path))
    assert "not YAML" in message or "not UTF-8" in message


@pytest.mark.parametrize(("content", "found"), [("", "NoneType"), ("- a\n- b\n", "list"), ("word\n", "str")])
def test_not_sections(tmp_path: Path, content: str, found: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(content)
    assert f"found:    a {found}" in refusal(path)


def test_no_such_file(tmp_path: Path) -> None:
    assert f"{tmp_path / 'nope.yaml'}\n  found:    no such file" in refusal(tmp_path / "nope.yaml")
    assert "found:    a folder" in refusal(tmp_path)


CONFIGS = sorted((REPOSITORY / "configs").rglob("*.yaml"))


def test_there_are_configs() -> None:
    assert CONFIGS


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_repositorys_configs_load(path: Path) -> None:
    config = load_config(path)
    for data in (config.data.path, config.data.eval_path):
        if data is not None and data.startswith("configs/"):
            assert (REPOSITORY / data).is_file()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"path": None}, "name one source with data.path, or list several in data.sources"),
        ({"sources": [{"path": "b.jsonl"}]}, "name one source with data.path, or list several"),
        ({"path": None, "sources": [{"path": "a", "weight": 1}, {"path": "b"}]}, "every source a weight, or none"),
        ({"path": None, "sources": [{"path": "a"}], "split": "x"}, "give each its own split"),
        ({"eval_path": "e.jsonl", "eval_fraction": 0.1}, "give one"),
        ({"path": None, "sources": [{"path": "a"}], "eval_split": "test"}, "a split of data.eval_path or data.path"),
        ({"path": None, "sources": [{"path": "a", "wieght": 1}]}, "data.sources.0.wieght: unknown setting"),
        ({"path": None, "sources": [{"path": "a", "weight": 0}]}, "data.sources.0.weight: input should be greater than 0"),
    ],
)  # fmt: skip
def test_sources_are_named_in_one_way(tmp_path: Path, data: dict[str, Any], message: str) -> None:
    assert message in refused(tmp_path, data=data)


def test_sources_and_what_is_held_out(tmp_path: Path) -> None:
    one = load_config(write(tmp_path / "one.yaml", {"data": {"eval_split": "test", "fields": {"text": "body"}}})).data
    assert [(source.path, source.split) for source in one.all_sources] == [("rows.jsonl", "train")]
    assert (one.eval_source.path, one.eval_source.split, one.eval_source.fields) == (
        "rows.jsonl",
        "test",
        {"text": "body"},
    )
    changes = {"data": {"path": None, "sources": [{"path": "a", "weight": 2}, {"path": "b", "weight": 1}]}}
    several = load_config(write(tmp_path / "two.yaml", changes)).data
    assert [source.path for source in several.all_sources] == ["a", "b"]
    assert several.eval_source is None


@pytest.mark.parametrize(
    "setting",
    ["lora.r", "lora.lora_alpha", "training.seed", "training.learning_rate", "training.max_steps", "data.max_seq_length",
        "memory.resident_layers"],
)  # fmt: skip
@pytest.mark.parametrize(
    "value", ["9" * 400, "9" * 5000, "1.0e+400", ".nan"], ids=["400 digits", "5000 digits", "1e400", "NaN"]
)
def test_numbers_have_an_end(file: Path, setting: str, value: str) -> None:
    """A larger one would be a traceback wherever it becomes a float, a shape or a seed."""
    error = refusal(file, f"{setting}={value}")
    assert setting in error and len(error) < 5000


def test_the_largest_whole_number(file: Path) -> None:
    assert load_config(file, [f"training.seed={MAX_WHOLE}"]).training.seed == MAX_WHOLE
    assert f"training.seed: expected at most {MAX_WHOLE}" in refusal(file, f"training.seed={MAX_WHOLE + 1}")
    (section := file.with_name("wrong.yaml")).write_text(f"lora: {{r: {'9' * 5000}}}")
    assert "not YAML" in refusal(section)
    assert "expected a size such as 24GiB" in refusal(file, f"memory.device_memory='{'9' * 400}'")


# Whatever a text of settings is, there is one message

BOMB = "a: &a [l, l, l, l, l, l, l, l, l]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in pairwise("abcdefghi")
)
MERGED = "a: &a {x: 1}\n" + "".join(
    f"{name}: &{name} {{<<: [{', '.join([f'*{before}'] * 9)}]}}\n" for before, name in pairwise("abcdefghi")
)


@pytest.mark.parametrize("text", [
    "a: !!bool x", "a: !!int ''", "a: !!float x", "a: !!timestamp x", "a: !!omap x", "a: !!set {[1]: 2}", "a: !!python/name:os.system",
    "? [1]\n: 2", "a: &a [*a]", BOMB, MERGED, f"training: {{seed: 1{':59' * 300_000}}}", "a: 0x" + "f" * 20_000, "[" * 5000,
], ids=lambda text: text[:20])  # fmt: skip
def test_a_text_that_a_constructor_cannot_make_values_of(tmp_path: Path, text: str) -> None:
    (tmp_path / "bad.yaml").write_text(text)
    assert "not YAML" in refusal(tmp_path / "bad.yaml")


@pytest.mark.parametrize("override", ["data.path=!!bool x", "data.path=[", "data.path=!!int ''"])
def test_an_override_that_no_constructor_can_make(file: Path, override: str) -> None:
    assert "is not a YAML value" in refusal(file, override)


@pytest.mark.parametrize("override", [
    r'data.path="\ud800"', r'training.sample_prompt=["a\ud800"]', r'data.fields={"\ud800": x}', r'model.name_or_path="a\0b"',
    'training.output_dir=""', "training.output_dir=~nobody-at-all/x", "training.run_name=\udcff",
])  # fmt: skip
def test_texts_that_are_none(file: Path, override: str) -> None:
    assert "found" in refusal(file, override)


def test_home_folders_are_replaced(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    names = (
        "model.name_or_path",
        "data.path",
        "data.eval_path",
        "data.chat_template",
        "training.output_dir",
        "lora.init_from",
    )
    config = load_config(file, [f"{name}=~/x" for name in names])
    values = [getattr(getattr(config, section), key) for section, key in (name.split(".") for name in names)]
    assert list(map(str, values)) == ["/home/someone/x"] * len(names)


def test_a_value_of_any_size_is_shown_in_short(file: Path) -> None:
    assert len(refusal(file, f"data.path={[[['a' * 500] * 10] * 10]}")) < 5000
