"""The Jinja environment that chat templates are written for, as transformers documents it.

Jinja's immutable sandbox, without line breaks after blocks and spaces before them; `break` and `continue`; a `tojson` that escapes
nothing, for HTML is not what is written; `raise_exception`, `strftime_now`; and `{% generation %}` around what the assistant wrote.
"""

import json
from datetime import datetime
from typing import Any, NoReturn, cast

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError
from jinja2.utils import Namespace

LOOP_ATTRIBUTES = {name for name in dir(LoopContext) if not name.startswith("_")}
DICT_ATTRIBUTES = set(dir(dict))


class Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, with a short way to what templates ask for all the time."""

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[Marks, "jinja2.ext.loopcontrols"])
        self.filters["tojson"] = _to_json
        self.globals |= {
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
            "dict": _MakeDict(),
            "namespace": _Namespace,
        }

    @property
    def marks(self) -> "Marks":
        """What `{% generation %}` remembers."""
        return cast(Marks, self.extensions[Marks.identifier])

    def getattr(self, obj: Any, attribute: str) -> Any:
        """`message.role` and `loop.first` without the sandbox's questions, whose answers are known: the first is an item, as a dict
        has no such attribute, the second harmless.
        """
        kind = type(obj)
        if kind is dict and attribute not in DICT_ATTRIBUTES:
            try:
                return obj[attribute]
            except KeyError:
                return self.undefined(obj=obj, name=attribute)
        if kind is LoopContext and attribute in LOOP_ATTRIBUTES:
            return getattr(obj, attribute)
        return super().getattr(obj, attribute)


class Marks(Extension):
    """`{% generation %}`: remembers where in the text that which it encloses comes to stand."""

    tags = {"generation"}  # noqa: RUF012 - jinja's own form

    def __init__(self, environment: jinja2.Environment) -> None:
        super().__init__(environment)
        self.begin()

    def begin(self) -> None:
        """A new text."""
        self.written: int = 0
        """Its characters so far; counted by whoever writes it."""
        self.spans: list[tuple[int, int]] = []

    def parse(self, parser: Parser) -> nodes.Node:
        """A call of `_mark` with what is enclosed."""
        line = next(parser.stream).lineno
        enclosed = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_mark"), [], [], enclosed).set_lineno(line)

    def _mark(self, caller: Macro) -> str:
        text = caller()
        self.spans.append((self.written, self.written + len(text)))
        return text


class _MakeDict:
    """`dict` in a template, without the type, by whose methods a template could change what it is given."""

    def __call__(self, *pairs: Any, **values: Any) -> dict[Any, Any]:
        return dict(*pairs, **values)

    def fromkeys(self, keys: Any, value: Any = None) -> dict[Any, Any]:
        return dict.fromkeys(keys, value)


class _Namespace(Namespace):
    """`namespace` in a template; names that begin with an underscore are Python's own."""

    def __init__(self, /, *pairs: Any, **values: Any) -> None:
        values = dict(*pairs, **values)
        for name in values:
            _check_name(name)
        super().__init__(values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace cannot have {name!r}: names with an underscore in front are Python's own")


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)  # the user's day, as transformers has it
