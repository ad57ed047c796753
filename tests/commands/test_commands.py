"""The console script: every command has its help, `init` writes what `load_config` reads, and the public API is imported late."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import qlora_jax
from qlora_jax.__main__ import COMMANDS, main
from qlora_jax.base.errors import EXIT_BAD_INPUT
from qlora_jax.commands import init
from qlora_jax.config import Config, load_config
from tests.helpers.children import REPOSITORY, environment

EXAMPLES = sorted(path.stem for path in (REPOSITORY / "configs").glob("*.yaml"))
NO_USE = {("data", "weight")}
"""Settings that a section has from a more general one, and refuses."""


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main([name, "--help"], prog="qlora-jax")
    assert left.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: qlora-jax {name} [-h]")
    assert len(text.splitlines()) > 5


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [(["--help"], 0, "qlora-jax COMMAND --help"), (["--version"], 0, qlora_jax.__version__), (["trian"], 2, "trian"), ([], 2, "COMMAND")],
)  # fmt: skip
def test_what_is_no_command(arguments: list[str], status: int, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(arguments, prog="qlora-jax")
    assert left.value.code == status
    assert said in "".join(capsys.readouterr())


def test_help_imports_no_jax() -> None:
    code = (
        "import sys, qlora_jax\nfrom qlora_jax.__main__ import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    )
    code += "assert 'jax' not in sys.modules and 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], env=environment(), check=True, capture_output=True, timeout=60)


def test_the_public_api() -> None:
    for name in qlora_jax.__all__:
        value = getattr(qlora_jax, name)
        home = qlora_jax._HOMES.get(name)
        assert home is None or value is getattr(importlib.import_module(home), name)
    assert set(qlora_jax.__all__) <= set(dir(qlora_jax))
    modules = {path.stem for path in Path(qlora_jax.__file__).parent.iterdir()}
    assert not modules & set(qlora_jax.__all__), "a module that is imported takes the name's place"
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = qlora_jax.nothing


@pytest.mark.parametrize("example", EXAMPLES)
def test_init_writes_the_example_and_its_defaults(
    example: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From another folder, where the example's own data is found too; with every `#` taken away the file still says the same."""
    expected = load_config(REPOSITORY / "configs" / f"{example}.yaml", ["lora.r=3"])
    monkeypatch.chdir(tmp_path)
    assert main(["init", "--out", "my.yaml", "--example", example, "lora.r=3"]) == 0
    text = Path("my.yaml").read_text()
    assert all(len(line) <= 100 or not line.lstrip().startswith("# ") for line in text.splitlines())
    found = load_config("my.yaml")
    for key in ("path", "eval_path"):
        place = getattr(found.data, key)
        if place is not None and getattr(expected.data, key).startswith("configs/"):
            assert Path(place).is_absolute() and Path(place).is_file()
            found = found.model_copy(update={"data": found.data.model_copy(update={key: getattr(expected.data, key)})})
    assert found == expected
    Path("all.yaml").write_text(re.sub("^  #(?! )", "  ", text, flags=re.MULTILINE))
    settings = yaml.safe_load(Path("all.yaml").read_text())
    known = {(name, key) for name, field in Config.model_fields.items() for key in field.annotation.model_fields}
    assert {(name, key) for name, section in settings.items() for key in section} == known - NO_USE
    assert load_config("all.yaml").model_dump() == load_config("my.yaml").model_dump()


def test_what_is_written_of_a_setting() -> None:
    text = init.commented(load_config(REPOSITORY / "configs" / "quickstart.yaml"), "first\n\nlast")
    assert text.startswith("# first\n#\n# last\n\n# The base model.\nmodel:\n")
    assert "\n  #dtype: float32  # float32 | bfloat16\n" in text
    assert "\n  lora_dropout: 0.0  # >= 0, < 1\n" in text
    assert "\n  #kept_layers: auto  # auto | >= 0\n" in text
    assert "\n  # A file (JSONL," in text, "the documentation of a more general section's setting"


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (["--out", "there.yaml"], "something there already"),
        (["--out", "broken"], "something there already"),
        (["--out", "no/folder.yaml"], "no folder no"),
        (["--out", "new.yaml", "--example", "../configs/quickstart"], "'../configs/quickstart'"),
        (["--out", "new.yaml", "lora.rank=3"], "lora.rank"),
    ],
)
def test_init_overwrites_nothing(
    arguments: list[str],
    found: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("there.yaml").write_text("mine")
    Path("broken").symlink_to("nowhere")
    before = sorted(tmp_path.iterdir())
    assert main(["init", *arguments]) == EXIT_BAD_INPUT
    assert found in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before and Path("there.yaml").read_text() == "mine"
