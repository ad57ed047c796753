"""The shape of the code: imports point down, nothing grows without bound, torch stays out, and the linters agree."""

import ast
import graphlib
import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent
PACKAGES = ("qlora_jax", "convert")
RULE = "base < config, runtime < ops, data < model < engine < convert, training, compare < planning < commands < train, benchmarks"
"""A file imports from its own room and from rooms of lower rows."""
ROW = {room: row for row, rooms in enumerate(RULE.split(" < ")) for room in rooms.split(", ")}
PYTORCH_S_SIDE = "qlora_jax.compare.reference"
"""A program, run in a process of its own: the one file with torch in it, which therefore nothing imports."""
MAX_FILE_LINES, MAX_BODY_LINES, MAX_POSITIONAL = 350, 50, 5
TORCH_OR_NEEDS_IT = {"torch", "torchvision", "peft", "bitsandbytes", "accelerate", "trl", "triton", "unsloth"}
POOR_OPENINGS = {"As", "Before", "By", "For", "From", "How", "In", "Of", "Over", "What", "Where"}
POORLY_OPENED = 187
"""Docstrings that begin so: there may only become fewer."""
SKIPPED_FOLDERS = {"__pycache__", "runs", "build", "node_modules", "venv"}
REGISTRY = re.compile(  # brackets keep the pattern from finding itself
    r"pypi\.|pythonhosted\.|download\.pytorch\.|npmjs\.|anaconda\.|conda\.io|crates\.io|rubygems\.|golang\.org"
    r"|\.pkg\.dev|jfrog\.|[a]rtifactory|[d]evpi|jax[-]releases|index[-_]url|find[-]links",
    re.IGNORECASE,
)

SOURCES = sorted(path for package in PACKAGES for path in (REPOSITORY / package).rglob("*.py"))
SOURCES.append(REPOSITORY / "train.py")
every_source = pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(REPOSITORY)))


def module_name(path: Path) -> str:
    parts = path.relative_to(REPOSITORY).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path) for path in SOURCES}


def imports_of(tree: ast.AST, package: str = "") -> Iterator[str]:
    """Every module imported anywhere in the tree, inside functions too, absolute; `from a import b` may be a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.rsplit(".", node.level - 1)[0] if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names if f"{module}.{alias.name}" in MODULES)


def imports_in(path: Path) -> set[str]:
    name = module_name(path)
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    return set(imports_of(ast.parse(path.read_text(encoding="utf-8")), package))


def room(module: str) -> str:
    """`qlora_jax.data.rows` -> `data`; `convert.merge` -> `convert`; the package itself and its door -> ``."""
    first, *rest = module.split(".")
    if first != "qlora_jax":
        return first
    return rest[0] if rest and rest[0] != "__main__" else ""


def test_the_reader_of_imports_sees_all_kinds() -> None:
    text = "import a.b\nfrom c import d\ndef f():\n    import e\n    from .ops import nf4\n    from .data import rows\n"
    found = set(imports_of(ast.parse(text), "qlora_jax"))
    assert found == {"a.b", "c", "e", "qlora_jax.ops", "qlora_jax.ops.nf4", "qlora_jax.data", "qlora_jax.data.rows"}


def test_every_module_is_in_a_room() -> None:
    assert {room(module) for module in MODULES} - {""} == ROW.keys() - {"benchmarks"}


@every_source
def test_imports_point_down(path: Path) -> None:
    here = room(module_name(path))
    ours = {
        module for module in imports_in(path) if module.partition(".")[0] in {*PACKAGES, "train", "tests", "benchmarks"}
    }
    assert not {module for module in ours if module.partition(".")[0] == "tests"}
    upwards = {module for module in ours if here and room(module) not in ("", here) and ROW[room(module)] >= ROW[here]}
    assert not upwards, f"{here} imports what is not below it: {sorted(upwards)}"


def test_no_cycles() -> None:
    graph = {module_name(path): (imports_in(path) & MODULES) - {module_name(path)} for path in SOURCES}
    for name, imported in graph.items():  # a package's __init__ imports its modules, which import from each other
        graph[name] = {module for module in imported if not name.startswith(f"{module}.")}
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError


@every_source
def test_no_torch(path: Path) -> None:
    assert PYTORCH_S_SIDE not in imports_in(path)
    if module_name(path) == PYTORCH_S_SIDE:
        return
    assert not {module.partition(".")[0] for module in imports_in(path)} & TORCH_OR_NEEDS_IT


@every_source
def test_files_are_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_FILE_LINES


def body_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines from the first statement to the last, without the docstring."""
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    return function.end_lineno - body[0].lineno + 1 if body else 0


def test_body_lines() -> None:
    text = 'def f(\n    a,\n):\n    """One\n    two."""\n    x = (\n        a\n    )\n    # why\n    return x\n'
    text += 'def g():\n    """Only."""\n'
    function, empty = ast.parse(text).body
    assert (body_lines(function), body_lines(empty)) == (5, 0)


@every_source
def test_functions_are_short(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    long = {node.name: body_lines(node) for node in functions if body_lines(node) > MAX_BODY_LINES}
    assert not long


def public(node: ast.AST, prefix: str = "") -> Iterator[tuple[str, ast.FunctionDef | ast.ClassDef]]:
    """Public functions, classes and their public methods, by dotted name."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.ClassDef) and not child.name.startswith("_"):
            yield prefix + child.name, child
            if isinstance(child, ast.ClassDef):
                yield from public(child, f"{prefix}{child.name}.")


@every_source
def test_what_is_public_is_documented(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree)
    bare = [name for name, node in public(tree) if not ast.get_docstring(node)]
    assert not bare


@pytest.mark.parametrize("arguments", [["check"], ["format", "--check"]], ids=" ".join)
def test_ruff(arguments: list[str]) -> None:
    if importlib.util.find_spec("ruff") is None:
        pytest.skip("ruff is not installed")
    command = [sys.executable, "-m", "ruff", *arguments, "--no-cache", "."]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=60)
    assert result.returncode == 0, result.stdout + result.stderr


@every_source
def test_what_belongs_together_is_a_record(path: Path) -> None:
    """Nobody counts to six in a call of the engine, the planner or the trainer, and nowhere but in the mathematics to seven."""
    here = room(module_name(path))
    most = MAX_POSITIONAL if here in ("engine", "planning", "training") else MAX_POSITIONAL + 1
    if here in ("ops", "model"):
        return
    functions = [
        node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.FunctionDef)
    ]
    long = {node.name for node in functions if len([a for a in node.args.args if a.arg != "self"]) > most}
    assert not long - {"__init__"}


def text_files(folder: Path) -> Iterator[tuple[Path, str]]:
    """The repository's own text files, without what tools and runs leave there."""
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            hidden = path.name.startswith(".") and path.name not in (".ci", ".github")
            if not (hidden or path.name in SKIPPED_FOLDERS or path.name.endswith(".egg-info")):
                yield from text_files(path)
        elif path.is_file() and b"\0" not in (data := path.read_bytes()):
            yield path, data.decode("utf-8", errors="replace")


def test_no_registry_is_named() -> None:
    """Where packages come from is the user's business: an address in here would be wrong for many and bypass their settings."""
    assert REGISTRY.search("--extra-index-" + "url https://py" + "pi.org/simple")
    files = dict(text_files(REPOSITORY))
    assert {REPOSITORY / "pyproject.toml", REPOSITORY / "train.py", Path(__file__)} <= files.keys()
    named = {
        f"{path.relative_to(REPOSITORY)}:{number}": line
        for path, text in files.items()
        for number, line in enumerate(text.splitlines(), 1)
        if REGISTRY.search(line)
    }
    assert not named


def test_docstrings_begin_with_a_noun_or_a_verb() -> None:
    """`Of a message.` says nothing where it is read alone, as in an editor."""
    first = [
        (ast.get_docstring(node) or "").partition(" ")[0]
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
    ]
    assert len([word for word in first if word.rstrip(",:") in POOR_OPENINGS]) <= POORLY_OPENED
