"""What README and docs/ say is so: commands run, options and settings exist, files and modules are there, links lead somewhere.

A command with placeholders (`--config FILE`, `[--rows N]`) is run in its shortest form on a tiny model, its options looked up in the
command's help. One without is run as it stands, or its reason not to stands in `NOT_RUN`.
"""

import ast
import importlib.util
import json
import re
import runpy
import shlex
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from convert import cache, merge, quantize
from qlora_jax.__main__ import COMMANDS, main
from qlora_jax.commands import train
from qlora_jax.config import Config
from qlora_jax.model.family_rows import FAMILIES
from qlora_jax.model.unsupported import WRAPPERS
from tests.helpers import tiny
from tests.helpers.children import REPOSITORY
from tests.helpers.runs import write_place
from tests.test_architecture import RULE

PAGES = {
    path.relative_to(REPOSITORY).as_posix(): path.read_text(encoding="utf-8")
    for path in [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
}
WIDTH = 100
MAX_README_LINES = 150

PROGRAMS = ("python", "pip", "pre-commit", "ruff", "mypy", "qlora-jax")
NOT_RUN = {
    "pip install": "installs; .ci/run runs the README's",
    "pre-commit install": "installs",
    "python -m pytest": "runs this",
    "python -m build": "takes a network; .ci/wheel builds one",
    "ruff": "run by test_architecture.py",
    "mypy": "run by .ci/run",
    "python -m benchmarks.": "takes minutes, or a GPU; its options are looked up",
    "python -m qlora_jax compare": "takes torch and a minute; run by test_compare.py",
    "python train.py --config configs/quickstart.yaml": "takes the hub and minutes; run by .ci/wheel",
}
"""Beginnings of commands, and why they are not run here."""

MAINS = {
    "python train.py": train.main,
    **{f"python -m convert.{module.__name__.rpartition('.')[2]}": module.main for module in (cache, merge, quantize)},
    **{f"python -m qlora_jax {name}": lambda arguments, name=name: main([name, *arguments]) for name in COMMANDS},
    "python -m qlora_jax": main,  # after its commands
    **{f"qlora-jax {name}": lambda arguments, name=name: main([name, *arguments]) for name in COMMANDS},
}
LLAMA_2_70B = {
    "vocab_size": 32000, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
    "num_key_value_heads": 8, "max_position_embeddings": 4096, "tie_word_embeddings": False,
}  # fmt: skip


def blocks(text: str) -> Iterator[tuple[str, str]]:
    """(language, text) of every block of code, fenced or indented by four."""
    for match in re.finditer(r"^```(\w*)\n(.*?)^```|((?:^    [^\n]*\n|^\n(?=    ))+)", text, re.MULTILINE | re.DOTALL):
        yield ("", re.sub("^    ", "", match[3], flags=re.MULTILINE).lstrip("\n")) if match[3] else (match[1], match[2])


def commands_of(text: str) -> Iterator[str]:
    """Every command of a page, on one line: of its blocks, and in the text's own code."""
    for _, block in blocks(text):
        lines = re.sub(r"\n +(?=[\[-])", " ", block).splitlines()
        for line in lines:
            for part in re.sub(" #.*", "", line.removeprefix("$ ")).split(" && "):
                if part.split(" ")[0] in PROGRAMS:
                    yield " ".join(part.split())
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    yield from (" ".join(code.split()) for code in re.findall(r"`((?:python3?|qlora-jax) [^`]+)`", prose))


COMMANDS_WRITTEN = sorted({command for text in PAGES.values() for command in commands_of(text)})


def main_of(command: str) -> str | None:
    """The beginning of a command that names its program."""
    return next((name for name in MAINS if command == name or command.startswith(f"{name} ")), None)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, rows and settings, and a run's folder."""
    place = write_place(tmp_path_factory.mktemp("docs"), max_steps=1)
    arguments = [f"training.output_dir={place / 'run'}", "training.export_merged=true"]
    assert train.main(["--config", str(place / "run.yaml"), *arguments]) == 0
    return place


def test_there_are_commands() -> None:
    assert len(COMMANDS_WRITTEN) > 20
    assert {main_of(command) for command in COMMANDS_WRITTEN} >= {"python train.py", "python -m qlora_jax data"}


@pytest.mark.parametrize("command", COMMANDS_WRITTEN)
def test_command(
    command: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name = main_of(command)
    is_synopsis = re.search(r"\[|\b[A-Z]{3,}", command) is not None
    if name is not None:
        check_options(command, help_of(name, capsys))
    elif command.startswith("python -m benchmarks."):
        module = shlex.split(command)[2]
        assert importlib.util.find_spec(module) is not None
        check_options(command, (REPOSITORY / f"{module.replace('.', '/')}.py").read_text() + "--help")
    reason = next((why for start, why in NOT_RUN.items() if command.startswith(start)), None)
    if reason is not None:
        return
    assert name is not None, "run it, or say why not in NOT_RUN"
    if "llama2-70b" in command:
        pytest.skip("run by test_the_plan_of_70b")
    if command == name and name != "python -m convert.cache":  # named, not shown
        return
    short = re.sub(r" \[[^\]]*\]", "", command.removeprefix(name)) if is_synopsis else command.removeprefix(name)
    values = {"ID_OR_DIR": place / "model", "TEXT": "abc", "SIZE": "24GiB", "NAME": "quickstart"}
    values["FILE"] = tmp_path / "my.yaml" if "--out" in short else place / "run.yaml"
    words = shlex.split(short)
    for number, word in enumerate(words):
        folder = tmp_path / "new" if words[number - 1] == "--out" else place / "run" / "adapter"
        words[number] = str(folder if word == "DIR" else values.get(word, word))
    monkeypatch.chdir(tmp_path)
    more = [f"training.output_dir={tmp_path / 'run'}"] if name == "python train.py" else []
    assert MAINS[name]([*words, *more]) == 0


def help_of(name: str, capsys: pytest.CaptureFixture[str]) -> str:
    """What the command answers to `--help`."""
    with pytest.raises(SystemExit):
        MAINS[name](["--help"])
    return capsys.readouterr().out


def check_options(command: str, text: str) -> None:
    """Every option of a command is in its help, or in its source."""
    options = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", command))
    assert not {option for option in options if not re.search(rf"{option}(?![\w-])", text)}


def test_the_plan_of_70b(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What docs/design.md prints, to the figure; its shape is public, its folder asks for an agreement."""
    (block,) = [text for _, text in blocks(PAGES["docs/design.md"]) if text.startswith("$ python -m qlora_jax plan")]
    command, _, expected = block.partition("\n")
    (tmp_path / "config.json").write_text(json.dumps(tiny.hf_config(**LLAMA_2_70B)))
    arguments = shlex.split(command.removeprefix("$ python -m qlora_jax"))
    arguments[arguments.index("--config") + 1] = str(REPOSITORY / "configs" / "llama2-70b.yaml")
    assert main([*arguments, f"model.name_or_path={tmp_path}", f"training.output_dir={tmp_path / 'run'}"]) == 0
    found = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert found == [line.rstrip() for line in expected.splitlines() if line.strip()]


@pytest.mark.parametrize("page", PAGES)
def test_python_is_python(page: str) -> None:
    for language, text in blocks(PAGES[page]):
        if language == "python":
            names = {node.module for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom)}
            ours = {name for name in names if name and name.partition(".")[0] in ("qlora_jax", "convert")}
            assert all(importlib.util.find_spec(name) for name in ours)


def test_the_quickstart_from_python(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a tiny model; the README's ten lines are the script's own."""
    settings = {
        "model.name_or_path": place / "model", "data.path": place / "train.jsonl", "data.eval_path": place / "eval.jsonl",
        "training.output_dir": tmp_path / "run", "training.max_steps": 1, "training.export_merged": "false",
        "training.sample_prompt": "null", "training.gradient_checkpointing": "auto", "training.gradient_accumulation_steps": 2,
        "data.max_seq_length": 64, "lora.r": 8,  # the shapes of `place`, whose compilations are kept
    }  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["docs/quickstart.py", *(f"{key}={value}" for key, value in settings.items())])
    monkeypatch.chdir(REPOSITORY)
    runpy.run_path("docs/quickstart.py", run_name="__main__")
    assert re.search(
        r"held-out loss: \d+\.\d{3} before, \d+\.\d{3} after; adapter: .*/run/adapter", capsys.readouterr().out
    )
    script = (REPOSITORY / "docs" / "quickstart.py").read_text()
    (code,) = [text for language, text in blocks(PAGES["README.md"]) if language == "python" and "load_config" in text]
    assert all(line.partition("(")[0] in script for line in code.splitlines())


@pytest.mark.filterwarnings("ignore")
def test_the_adapter_and_the_merged_folder_are_used_as_the_readme_says(place: Path) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("peft")
    (code,) = [text for language, text in blocks(PAGES["README.md"]) if language == "python" and "peft" in text]
    code = code.replace("HuggingFaceTB/SmolLM2-135M-Instruct", str(place / "model")).replace(
        "runs/quickstart", str(place / "run")
    )
    names: dict[str, object] = {}
    exec(code, names)
    assert {"model", "merged"} <= names.keys()


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    folder = (REPOSITORY / page).parent
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", PAGES[page])
    assert not [link for link in links if "://" not in link and not (folder / link).exists()]
    assert page != "README.md" or {f"docs/{path.name}" for path in (REPOSITORY / "docs").glob("*.md")} <= set(links)


@pytest.mark.parametrize("page", PAGES)
def test_files_are_there(page: str) -> None:
    """Python files and tests named in the text, from the repository's root or the package's."""
    named = set(re.findall(r"`([\w./]+\.py)`", PAGES[page]))
    roots = (REPOSITORY, REPOSITORY / "qlora_jax")
    assert not {name for name in named if not any((root / name).is_file() for root in roots)}


def test_the_modules_of_the_design() -> None:
    """The tree of docs/design.md has every module, in its room, and no other; and the rule of the rooms as the test of it has it."""
    (tree,) = [text for _, text in blocks(PAGES["docs/design.md"]) if text.startswith("qlora_jax/\n")]
    named, package, room = set(), "", ""
    for line in tree.splitlines():
        if match := re.match(r"( *)([\w/]+)/ ", line):
            package, room = (package, f"{match[2]}/") if match[1] else (f"{match[2]}/", "")
        elif line.startswith("qlora_jax/"):
            package, room = "qlora_jax/", ""
        named |= {f"{package}{room}{name}" for name in re.findall(r"\b\w+\.py\b", line.removeprefix("train.py"))}
    modules = {
        path.relative_to(REPOSITORY).as_posix()
        for folder in ("qlora_jax", "convert")
        for path in (REPOSITORY / folder).rglob("*.py")
    }
    assert {name for name in named if "benchmarks" not in name} == {name for name in modules if "/__" not in name}
    assert RULE in PAGES["docs/design.md"]


def test_the_families_of_models() -> None:
    """The table of docs/models.md has every family, and no other."""
    rows = [line.split("|")[1] for line in PAGES["docs/models.md"].splitlines() if line.startswith("| `")]
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert named == FAMILIES.keys() | WRAPPERS.keys()


@pytest.mark.parametrize("page", PAGES)
def test_settings_exist(page: str) -> None:
    """`section.key` in the text's code, and the sections written as YAML."""
    sections = {name: field.annotation.model_fields for name, field in Config.model_fields.items()}
    named = re.findall(rf"(?<![\w./-])({'|'.join(sections)})\.(\w+)(?![\w(]|\.py)", PAGES[page])
    suffixes = {"py", "md", "json", "jsonl", "yaml"}
    assert not {f"{section}.{key}" for section, key in named if key not in sections[section] and key not in suffixes}
    for section, keys in re.findall(rf"\b({'|'.join(sections)}): +({{[^{{}}]*}})", PAGES[page]):
        assert yaml.safe_load(re.sub(r"\|\w+", "", keys)).keys() <= sections[section].keys()


@pytest.mark.parametrize("page", PAGES)
def test_prose_is_narrow(page: str) -> None:
    text = re.sub(r"^```.*?^```", "", PAGES[page], flags=re.MULTILINE | re.DOTALL)
    prose = [line for line in text.splitlines() if not line.startswith(("|", "    "))]
    assert not [line for line in prose if len(line) > WIDTH and not line.startswith("([`")]


def test_the_readme_is_short_and_begins_with_what_to_do() -> None:
    lines = PAGES["README.md"].splitlines()
    assert len(lines) <= MAX_README_LINES
    assert any(line.startswith("pip install -e . && python train.py") for line in lines[:40])


def test_versions() -> None:
    """pyproject.toml's classifiers are the Pythons the README names, and the changelog has this version."""
    import qlora_jax

    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    assert project["dynamic"] == ["version"] and project["requires-python"] == ">=3.11"
    assert f"## [{qlora_jax.__version__}]" in (REPOSITORY / "CHANGELOG.md").read_text()
