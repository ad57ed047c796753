"""Tools and their calls in every writing become what transformers renders of Hugging Face's own; what does not fit is named."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from qlora_jax.data import Layout, Renderer, Row, RowError

trl = pytest.importorskip("trl")
TEMPLATES = Path(trl.__file__).parent / "chat_templates"
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}

ARGUMENTS = {"city": "Orléans", "days": 3}
TEXT = json.dumps(ARGUMENTS, ensure_ascii=False)
SCHEMA = {
    "name": "weather",
    "description": "Tells the weather.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string", "description": "Where"}, "days": {"type": "integer", "description": "How long"}},
        "required": ["city"],
    },
}  # fmt: skip
TOOL = {"type": "function", "function": SCHEMA}
ASKED, ANSWERED = {"role": "user", "content": "Weather?"}, {"role": "assistant", "content": "Sunny."}
RESULT = {"role": "tool", "name": "weather", "content": "sun"}


def call(arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "weather", "arguments": arguments}}


def calling(**fields: Any) -> list[dict[str, Any]]:
    return [ASKED, {"role": "assistant", **fields}, RESULT, ANSWERED]


BARE = {"name": "weather", "arguments": ARGUMENTS}
SHAREGPT = [
    {"from": "human", "value": "Weather?"},
    {"from": "observation", "value": "sun", "name": "weather"},
    {"from": "gpt", "value": "Sunny."},
]
WRITINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "hugging face": ("chat", {"messages": calling(tool_calls=[call(ARGUMENTS)]), "tools": [TOOL]}),
    "openai": ("chat", {"messages": calling(content=None, tool_calls=[call(TEXT)]), "tools": [TOOL]}),
    "openai before": (
        "chat",
        {
            "messages": [
                ASKED,
                {"role": "assistant", "content": None, "function_call": {"name": "weather", "arguments": TEXT}},
                RESULT | {"role": "function"},
                ANSWERED,
            ],
            "functions": [SCHEMA],
        },
    ),
    "bare": ("chat", {"messages": calling(tool_calls=[BARE]), "tools": [SCHEMA]}),
    "flat": ("chat", {"messages": calling(tool_calls=[{"type": "function", **BARE}]), "tools": [{"type": "function", **SCHEMA}]}),
    "as texts": ("chat", {"messages": calling(tool_calls=json.dumps([call(ARGUMENTS)])), "tools": json.dumps([TOOL])}),
    "texts in lists": ("chat", {"messages": calling(tool_calls=[json.dumps(call(TEXT))]), "tools": [json.dumps(SCHEMA)]}),
    "sharegpt": (
        "sharegpt",
        {
            "conversations": [SHAREGPT[0], {"from": "function_call", "value": json.dumps(BARE)}, *SHAREGPT[1:]],
            "tools": json.dumps([SCHEMA]),
        },
    ),
    "sharegpt, a list": (
        "sharegpt",
        {"conversations": [SHAREGPT[0], {"from": "function_call", "value": json.dumps([BARE])}, *SHAREGPT[1:]], "tools": [SCHEMA]},
    ),
    "prompt and completion": (
        "prompt_completion",
        {"prompt": [ASKED], "completion": calling(tool_calls=[call(TEXT)])[1:], "tools": TOOL},
    ),
}  # fmt: skip


def written(template: str, format: str, fields: dict[str, Any]) -> str:
    chat = Layout(format).read(Row("f:1", fields))
    return Renderer(template, SPECIAL, ["</s>"]).render(chat, "all", "f:1")[-1].text


@pytest.mark.parametrize(
    "name", ["llama3_1", "qwen2_5", "qwen3", "gptoss", "glm4moe", "qwen3_5_think", "gemma4_v2", "nemotron_3_nano"]
)
def test_every_writing_is_what_transformers_writes_of_its_own(name: str) -> None:
    """Templates that write arguments as JSON, one by one, or in a language of their own."""
    path = TEMPLATES / f"{name}.jinja"
    if not path.is_file():
        pytest.skip("another version of TRL")
    template = path.read_text(encoding="utf-8")
    own = calling(tool_calls=[call(ARGUMENTS)])
    (expected,), _ = render_jinja_template([own], tools=[TOOL], chat_template=template, **SPECIAL)
    assert "weather" in expected and "city" in expected
    for writing, (format, fields) in WRITINGS.items():
        assert written(template, format, fields) == expected, writing


LOOP = "{% for m in messages %}{{ m.role + ':' }}{% for c in m.tool_calls or [] %}?{% endfor %}{{ m.content }}|{% endfor %}"
FORMS = {
    "joined": ("{{ c.function.name + c.function.arguments }}", "weather" + TEXT),
    "written as it is": ("{{ c.function.name }}({{ c.function.arguments }})", f"weather({TEXT})"),
    "as JSON": ("{{ c.function.name }}({{ c.function.arguments | tojson }})", f"weather({TEXT})"),
    "either": (
        "{% set a = c.function.arguments %}{{ c.function.name }}{{ a if a is string else a | tojson }}",
        "weather" + TEXT,
    ),
    "bare": ("{{ c.name }}({{ c.arguments | tojson }})", f"weather({TEXT})"),
    "bare, joined": ("{{ c['name'] + c['arguments'] }}", "weather" + TEXT),
    "one by one": ("{{ c.function.name }}{% for k, v in c.function.arguments.items() %} {{ k }}={{ v }}{% endfor %}",
        "weather city=Orléans days=3",
    ),
    "whole": ("{{ c | tojson }}", json.dumps(call(ARGUMENTS), ensure_ascii=False)),
}  # fmt: skip


@pytest.mark.parametrize("kind", FORMS)
def test_a_template_gets_the_form_that_it_knows(kind: str) -> None:
    form, expected = FORMS[kind]
    for format, fields in WRITINGS.values():
        fields = {name: value for name, value in fields.items() if name not in ("tools", "functions")}
        assert (
            written(LOOP.replace("?", form), format, fields)
            == f"user:Weather?|assistant:{expected}|tool:sun|assistant:Sunny.|"
        )


def test_a_template_that_needs_content_gets_an_empty_one() -> None:
    template = "{% for m in messages %}{{ m.role + ':' + m.content }}{{ (m.tool_calls | tojson) if m.tool_calls }}|{% endfor %}"
    text = written(template, *WRITINGS["hugging face"][:1], {"messages": calling(tool_calls=[call(ARGUMENTS)])})
    assert text.startswith("user:Weather?|assistant:[{")


@pytest.mark.parametrize(
    ("form", "found"),
    [
        ("", "messages[1] calls a tool, which the chat template leaves out"),
        ("{{ c.function.name }}", "messages[1] calls a tool with 'city', which the chat template leaves out"),
        ("{{ c.function.arguments }}", "messages[1] calls a tool with 'weather', which the chat template leaves out"),
    ],
)
def test_calls_that_a_template_does_not_write_whole_are_named(form: str, found: str) -> None:
    with pytest.raises(RowError) as error:
        written(LOOP.replace("?", form), "chat", {"messages": calling(tool_calls=[call(ARGUMENTS)])})
    assert error.value.found == found


@pytest.mark.parametrize(
    ("fields", "found"),
    [
        ({"tool_calls": [call("{city: Paris}")]}, "the arguments of `messages[1].tool_calls` are no JSON object: {city: Paris}"),
        ({"tool_calls": [call("[1]")]}, "are no JSON object: [1]"),
        ({"tool_calls": [{"type": "function"}]}, "`messages[1].tool_calls` names no function"),
        ({"tool_calls": [call({}), {"id": 3}]}, "`messages[1].tool_calls[1]` names no function"),
        ({"tool_calls": "look()"}, "`messages[1].tool_calls` is a string without a call"),
        ({"function_call": {"arguments": "{}"}}, "`messages[1].function_call` names no function"),
        ({"tool_calls": [{"type": "retrieval", "name": "a"}]}, "names no function"),
    ],
)  # fmt: skip
def test_calls_that_are_none(fields: dict[str, Any], found: str) -> None:
    with pytest.raises(RowError) as error:
        Layout("chat").read(Row("f:1", {"messages": calling(**fields)}))
    assert found in error.value.found and error.value.fix
    with pytest.raises(RowError, match=r"conversations.1.` is a string without a call"):
        said = [SHAREGPT[0], {"from": "function_call", "value": "look()"}, *SHAREGPT[1:]]
        Layout("sharegpt").read(Row("f:1", {"conversations": said}))


@pytest.mark.parametrize("arguments", [None, "", "{}", {}])
def test_calls_without_arguments(arguments: Any) -> None:
    template = LOOP.replace("?", "{{ c.function.name }}{{ c.function.arguments | tojson }}")
    text = written(template, "chat", {"messages": calling(tool_calls=[call(arguments)])})
    assert "assistant:weather{}|" in text


def test_tools_that_are_none() -> None:
    for tools, found in (
        (["?"], "`tools[0]` is a string"),
        ([{"a": 1}], "`tools[0]` names no function"),
        (3, "`tools` is a number"),
    ):
        with pytest.raises(RowError) as error:
            Layout("chat").read(Row("f:1", {"messages": [ASKED, ANSWERED], "tools": tools}))
        assert found in error.value.found
    bare = "{% for t in tools or [] %}{{ t.name }}{{ t.parameters | tojson }}{% endfor %}{% for m in messages %}{{ m.content }}{% endfor %}"
    for tools in (
        [TOOL],
        [SCHEMA],
        json.dumps([TOOL]),
        [TOOL["function"] | {"parameters": json.dumps(SCHEMA["parameters"])}],
    ):
        assert written(bare, "chat", {"messages": [ASKED, ANSWERED], "tools": tools}).startswith(
            'weather{"type": "object"'
        )
