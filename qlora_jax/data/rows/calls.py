"""Tools and their calls, as OpenAI, Hugging Face and ShareGPT write them, in one form; and the form that a chat template knows.

The one form is Hugging Face's: a tool is `{"type": "function", "function": {"name", "description", "parameters"}}`, a call is
`{"type": "function", "function": {"name", "arguments"}}`. Templates differ in what they read of a call: some write its arguments with
`tojson` and need an object, some join them to a text and need JSON, some know a call without `type` and `function` around it.
"""

import json
from collections.abc import Callable
from itertools import product
from typing import Any

from qlora_jax.data.rows.row import Row, RowError

Object = dict[str, Any]
CALL = '{"tool_calls": [{"type": "function", "function": {"name": "...", "arguments": {...}}}]}'
TOOL = '[{"type": "function", "function": {"name": "...", "description": "...", "parameters": {...}}}], or that as a string'
FIX = "mend the row, or drop it"


def read_tools(row: Row, name: str, value: Any) -> list[Object] | None:
    """A row's tools: a list, that list as JSON, or one tool; each with `type` and `function` around it or without.

    Raises:
        RowError: it is something else.
    """
    tools = read_json(value) if isinstance(value, str) and value else value
    if not tools:
        if isinstance(value, str) and value.strip() not in ("", "null", "[]", "{}"):
            raise RowError(row.where, "fields", found=f"`{name}` is a string without JSON", expected=TOOL, fix=FIX)
        return None
    tools = [tools] if isinstance(tools, dict) else tools
    if not isinstance(tools, list):
        raise RowError(row.where, "fields", found=f"`{name}` is {kind_of(tools)}", expected=TOOL, fix=FIX)
    return [_tool(row, f"{name}[{number}]", tool) for number, tool in enumerate(tools)]


def _tool(row: Row, name: str, value: Any) -> Object:
    tool = _wrapped(read_json(value) if isinstance(value, str) else value)
    function = None if tool is None else tool.get("function")
    if tool is None or not (isinstance(function, dict) and _is_name(function.get("name"))):
        found = f"`{name}` is {kind_of(value)}" if tool is None else f"`{name}` names no function: {_shown(value)}"
        raise RowError(row.where, "fields", found=found, expected=TOOL, fix=FIX)
    if isinstance(parameters := function.get("parameters"), str):
        function = function | {"parameters": read_json(parameters) or {}}
    return tool | {"function": function}


def read_calls(row: Row, name: str, value: Any) -> list[Object]:
    """Calls of tools: a list, one call, or either as JSON; arguments are an object, or a text with one, and stay what they are.

    Raises:
        RowError: it is something else, a call names no function, or its arguments are no object.
    """
    calls = read_json(value) if isinstance(value, str) else value
    calls = [calls] if isinstance(calls, dict) else calls
    if not (isinstance(calls, list) and calls):
        found = f"`{name}` is {kind_of(value)} without a call"
        raise RowError(row.where, "fields", found=found, expected=CALL, fix=FIX)
    return [_call(row, f"{name}[{number}]" if len(calls) > 1 else name, call) for number, call in enumerate(calls)]


def _call(row: Row, name: str, value: Any) -> Object:
    call = _wrapped(read_json(value) if isinstance(value, str) else value)
    function = None if call is None else call.get("function")
    if call is None or not (isinstance(function, dict) and _is_name(function.get("name"))):
        found = f"`{name}` names no function: {_shown(value)}"
        raise RowError(row.where, "fields", found=found, expected=CALL, fix=FIX)
    if "arguments" not in function and isinstance(function.get("parameters"), dict | str):  # as Llama 3 writes it
        function = {"arguments" if key == "parameters" else key: inner for key, inner in function.items()}
    if function.get("arguments") in (None, ""):
        function = function | {"arguments": {}}
    if not isinstance(as_object(function["arguments"]), dict):
        found = f"the arguments of `{name}` are no JSON object: {_shown(function['arguments'])}"
        raise RowError(row.where, "fields", found=found, expected=CALL, fix=FIX)
    return call | {"function": function}


def _wrapped(value: Any) -> Object | None:
    """A tool or a call with `type` and `function` around it."""
    if not isinstance(value, dict):
        return None
    if isinstance(value.get("function"), dict):
        return value if "type" in value else {"type": "function", **value}
    if value.get("type", "function") != "function":
        return value
    outside = {key: value[key] for key in ("id",) if key in value}
    inside = {key: inner for key, inner in value.items() if key not in ("id", "type")}
    return outside | {"type": "function", "function": inside}


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def as_object(arguments: Any) -> Any:
    """Arguments as an object; None where they are none."""
    value = read_json(arguments) if isinstance(arguments, str) else arguments
    return value if isinstance(value, dict) else None


def as_text(arguments: Any) -> str:
    """Arguments as JSON: as they were written, if they were."""
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


Form = Callable[[Object], Object]


def _with(arguments: Callable[[Any], Any], *, bare: bool) -> Form:
    def form(call: Object) -> Object:
        function = call["function"] | {"arguments": arguments(call["function"]["arguments"])}
        return {**({"id": call["id"]} if "id" in call else {}), **function} if bare else call | {"function": function}

    return form


CALL_FORMS: tuple[Form, ...] = (
    _with(as_object, bare=False),
    _with(as_text, bare=False),
    _with(as_object, bare=True),
    _with(as_text, bare=True),
)
"""What a template may know of a call; the first that it writes whole is taken."""
TOOL_FORMS: tuple[Form, ...] = (lambda tool: tool, lambda tool: tool["function"])

PROBED_CALL: Object = {
    "id": "zqxprobe1",
    "type": "function",
    "function": {"name": "zqxname", "arguments": {"zqxkey": "zqxvalue"}},
}
PROBED_TOOL: Object = {
    "type": "function",
    "function": {
        "name": "zqxname",
        "description": "zqxsaid",
        "parameters": {"type": "object", "properties": {"zqxkey": {"type": "string", "description": "zqxvalue"}}},
    },
}
PROBED_CHATS: tuple[list[Object], ...] = (
    [{"role": "user", "content": "a"}, {"role": "assistant"}],
    [
        {"role": "user", "content": "a"},
        {"role": "assistant"},
        {"role": "tool", "content": "b", "name": "zqxtool", "tool_call_id": "zqxprobe1"},
        {"role": "assistant", "content": "c"},
    ],
)

Write = Callable[[list[Object], list[Object] | None], str | None]


def call_form(write: Write) -> Form:
    """The form of a call that a template writes with its name, and with its arguments as JSON or one by one.

    Args:
        write: the template: (messages, tools) to a text, or None where it cannot.
    """
    for form, content in product(CALL_FORMS, ({}, {"content": ""})):
        calling = content | {"tool_calls": [form(PROBED_CALL)]}
        for chat, tools in product(PROBED_CHATS, (None, [PROBED_TOOL])):
            text = write([message if "content" in message else message | calling for message in chat], tools)
            if text is not None and _is_whole(text):
                return form
    return CALL_FORMS[0]


def _is_whole(text: str) -> bool:
    """Neither left out, nor written as Python would, nor as JSON within JSON."""
    return all(word in text for word in ("zqxname", "zqxkey", "zqxvalue")) and not any(
        wrong in text for wrong in ("'zqxkey'", '\\"zqxkey')
    )


def tool_form(write: Write) -> Form:
    """The form of a tool that a template writes with its name and its parameters."""
    asked = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    for form in TOOL_FORMS:
        for messages in (asked, asked[:1]):
            text = write(messages, [form(PROBED_TOOL)])
            if text is not None and "zqxname" in text and "zqxkey" in text:
                return form
    return TOOL_FORMS[0]


def words_of(call: Object) -> list[str]:
    """What a text in which a call is written has in it: the function's name, and the arguments' where JSON writes them as they are."""
    function = call.get("function", call)
    arguments = as_object(function["arguments"]) or {}
    return [function["name"], *(key for key in arguments if json.dumps(key, ensure_ascii=False) == f'"{key}"')]


def read_json(value: Any) -> Any:
    """What a string holds as JSON; None where it holds none."""
    try:
        return json.loads(value)
    except (TypeError, ValueError, RecursionError):
        return None


KINDS = {
    type(None): "null",
    str: "a string",
    bool: "true or false",
    int: "a number",
    float: "a number",
    dict: "an object",
}


def kind_of(value: object) -> str:
    """What a value is, in a message: `null`, `a list`."""
    return KINDS.get(type(value), f"a {type(value).__name__}")


def _shown(value: Any) -> str:
    return str(value)[:60]
