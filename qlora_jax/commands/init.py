"""`qlora-jax init`: write a commented file of all settings, from an example."""

import argparse
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from qlora_jax.base.console import make_console
from qlora_jax.base.errors import InputError
from qlora_jax.base.files import replacing
from qlora_jax.config import Config, load_config
from qlora_jax.config.section import Section

DATA_FOLDER = "configs/data/"
"""How the examples name the data that comes with them: from the repository's root."""
WIDTH = 100
BOUNDS = {"exclusiveMinimum": ">", "minimum": ">=", "exclusiveMaximum": "<", "maximum": "<="}
KINDS = {"string": "a text", "array": "a list", "null": "null"}
"""JSON Schema's words, and those for people."""

HEADER = """\
Settings of a run; start it with: qlora-jax train --config {out}
All there are stand here, in their sections. Those with a `#` before their name have their default; remove it to change one.
What a run would take, and what it would learn: qlora-jax plan, qlora-jax data"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help="the new file; must not exist")
    names = ", ".join(path.stem for path in sorted(examples().glob("*.yaml")))
    parser.add_argument(
        "--example", default="quickstart", metavar="NAME", help=f"what to start from: {names}; default: quickstart"
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that replace the example's")


def run(options: argparse.Namespace) -> None:
    """Write the file.

    Raises:
        InputError: it exists, its folder does not, or there is no such example.
    """
    if options.out.exists() or options.out.is_symlink():
        raise InputError(options.out, found="something there already", fix="name a new file, or remove this one")
    if not options.out.parent.is_dir():
        raise InputError(options.out, found=f"no folder {options.out.parent}", fix="make it first, or name another")
    path = examples() / f"{options.example}.yaml"
    if path not in examples().glob("*.yaml"):
        names = ", ".join(sorted(each.stem for each in examples().glob("*.yaml")))
        raise InputError("--example", found=repr(options.example), expected=f"one of {names}")
    config = _with_its_data(load_config(path, options.overrides))
    lines = path.read_text(encoding="utf-8").splitlines()
    about = " ".join(line.removeprefix("#").strip() for line in lines if line.startswith("#"))
    text = commented(config, "\n".join([about, "", HEADER.format(out=options.out)]))
    with replacing(options.out) as file:
        file.write(text.encode())
    make_console().print(f"{options.out}: all settings, from the example {options.example}")


def examples() -> Path:
    """Return the folder of examples: within the package where it is installed, beside it in a checkout."""
    package = Path(__file__).parent.parent
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def _with_its_data(config: Config) -> Config:
    """Return the settings with the example's own data by its whole path, which holds in any working folder."""
    update = {}
    for key in ("path", "eval_path"):
        value = getattr(config.data, key)
        if value is not None and value.startswith(DATA_FOLDER):
            update[key] = str(examples() / "data" / value.removeprefix(DATA_FOLDER))
    return config.model_copy(update={"data": config.data.model_copy(update=update)})


def commented(config: Config, header: str) -> str:
    """Return all settings as YAML, each under its documentation.

    Those that were given by name are set; the others stand with their default behind a `#`. `load_config` reads the text back to an
    equal `Config`.
    """
    lines = [
        line for part in header.split("\n") for line in (textwrap.wrap(part, WIDTH - 2, break_on_hyphens=False) or [""])
    ]
    text = [f"# {line}".rstrip() for line in lines]
    for name in Config.model_fields:
        section: Section = getattr(config, name)
        text += ["", *_comment(type(section).__doc__ or "", ""), f"{name}:", *_section(section)]
    return "\n".join(text) + "\n"


def _section(section: Section) -> Iterator[str]:
    """Yield a section's lines. One setting at least is set: a section of comments alone would be none."""
    schema = type(section).model_json_schema()["properties"]
    known = {
        key: about for key, about in schema.items() if about.get("type") != "null"
    }  # which this kind of section has no use for
    given = section.model_fields_set & known.keys() or {next(iter(known))}
    values = section.model_dump(mode="json")
    for key, about in known.items():
        yield from _comment(_documentation(type(section), key), "  ")
        choices = _choices(about)
        yield f"  {'' if key in given else '#'}{key}: {_as_yaml(values[key])}{choices and f'  # {choices}'}"


def _documentation(section: type[Section], key: str) -> str:
    """Return what is written under a setting, or under the one it replaces of a more general section."""
    homes = [kind for kind in section.__mro__ if issubclass(kind, Section)]
    return next(
        (text for kind in homes if key in kind.model_fields and (text := kind.model_fields[key].description)), ""
    )


def _as_yaml(value: Any) -> str:
    """Return a setting's value on one line of YAML."""
    return yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True).removesuffix("...\n").strip()


def _comment(text: str, indent: str) -> list[str]:
    """Return a documentation string as lines of comment."""
    lines = textwrap.wrap(" ".join(text.split()), WIDTH - 2 - len(indent), break_on_hyphens=False)
    return [f"{indent}# {line}" for line in lines]


def _choices(about: dict[str, Any]) -> str:
    """Return what a setting may be, where that is a range or one of some names: `auto | device | host`, `> 0`."""
    kinds = about.get("anyOf", [about])
    choices = []
    for kind in kinds:
        names = kind.get("enum") or ([kind["const"]] if "const" in kind else [])
        limits = [f"{sign} {kind[bound]:g}" for bound, sign in BOUNDS.items() if bound in kind]
        words = [] if names or limits or len(kinds) == 1 else [KINDS.get(kind.get("type"), "")]
        choices += [str(name) for name in names] + [", ".join(limits)] * bool(limits) + words
    choices = [choice for choice in choices if choice]
    return " | ".join(choices) if choices != ["a text", "null"] else ""
