"""Chat templates rendered here beside transformers' own rendering: equal, or left to transformers, which the log says."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlora_jax.base import bounded
from qlora_jax.config.data import DataSettings
from qlora_jax.data import ChatTemplate, Layout, RawRow, check_template, make_recipe, tokenize
from qlora_jax.data.chat import sandbox, templates
from qlora_jax.data.chat.jinja import TRIED, JinjaTemplate, RenderError, agrees_with_transformers
from tests.data import test_tokenization as tokenization
from tests.data.test_tokenization import chat, make_tokenizer

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
CALL = [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]


EXTRAS = ({}, {"name": "Ann"}, {"thinking": "so"}, {"reasoning_content": "so"}, {"tool_calls": CALL}, {"n": 1.5})


@pytest.mark.parametrize("extra", EXTRAS)
@pytest.mark.parametrize("tools", [None, CALL], ids=["without", "with"])
def test_what_is_rendered_is_what_transformers_renders(extra: dict[str, Any], tools: Any) -> None:
    """With and without what it changes on the way: reasoning, calls of tools, values that are not strings."""
    template = "{% for m in messages %}{% generation %}{% for k in m | sort %}{{ k }}={{ m[k] }};{% endfor %}"
    template += "{% endgeneration %}{% endfor %}"
    template += "{{ tools | tojson }}{{ bos_token }}{{ add_generation_prompt }}{{ documents is none }}{{ dict(a=1) }}"
    tokenizer, ours = make_tokenizer(template), JinjaTemplate(template, TOKENS)
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "é😀", **extra}]
    options = {"tools": tools, "tokenize": False}
    for prompt in (False, True):
        expected = tokenizer.apply_chat_template(messages, add_generation_prompt=prompt, **options)
        assert ours.writer(messages, tools)(2, prompt) == expected
        expected = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=prompt, **options)
        assert ours.writer(messages, tools)(1, prompt) == expected
    text, spans = ours.render_marked(messages, tools)
    assert text == tokenizer.apply_chat_template(messages, **options)
    assert text[slice(*spans[0])] == "content=hi;role=user;"
    assert len(spans) == len(messages) and spans[0][1] == spans[1][0]


FEATURES = [
    "{% for m in messages %}{% if loop.first %}first{% elif loop.last %}last{% endif %}{{ loop.index }}{{ loop.index0 }}"
    "{{ loop.previtem.role }}{{ loop.nextitem.role }}{{ loop.length }}{{ loop.cycle('a', 'b') }}{{ m.role }}{% endfor %}",
    "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}{{ m.content }}{% break %}{% endfor %}",
    "  {% for m in messages %}\n  {% if true %}\n{{ m['content'] }}\n  {% endif %}\n{% endfor %}\n",
    "{{ messages | tojson }}{{ messages | tojson(indent=2, ensure_ascii=true, sort_keys=true) }}{{ '<&>' | tojson }}",
    "{{ messages | tojson(separators=(',', ':')) }}{{ messages[0] | items | list }}{{ messages[0].items() | list }}",
    "{{ messages[0].missing }}{{ messages[0].missing is defined }}{{ messages[0].get('role') }}{{ messages[0].keys() | list }}",
    "{{ messages[0].missing.deeper }}",
    "{{ messages[9].role }}",
    "{{ nothing.at_all }}",
    "{{ raise_exception('no: ' + messages[0].role) }}",
    "{{ strftime_now('%Y') }}{{ dict(a=1, b=2) | tojson }}{{ dict.fromkeys('ab', 1) | tojson }}{{ dict([('a', 1)]).a }}",
    "{% set ns = namespace(seen=0, self=1) %}{% for m in messages %}{% set ns.seen = ns.seen + 1 %}{% endfor %}{{ ns.seen }}{{ ns.self }}",
    "{% set x = messages[0] %}{{ x.role }}{{ x.role.upper() }}{{ '%s' | format(x.role) }}{{ '{}'.format(x.role) }}",
    "{% macro say(m) %}{{ m.role }}:{{ m.content | trim }}{% endmacro %}{% for m in messages %}{{ say(m) }}{% endfor %}",
    "{% for m in messages | selectattr('role', 'equalto', 'user') | map(attribute='content') %}{{ m }}{% endfor %}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update({'role': 'x'}) }}",
    "{{ messages[0].__class__ }}{{ ''.__class__.__mro__ }}{{ dict.__init__ }}",
    "{{ loop }}{{ ().__class__.__bases__[0].__subclasses__() }}",
    "{% set ns = namespace() %}{% set ns._x = 1 %}{{ ns }}",
    "{% generation %}{{ messages[0].content }}{% endgeneration %} {%- generation -%} b {%- endgeneration -%}",
    "{% for m in messages %}{{ m.role }}{% generation %}{{ m.content }}é😀{% endgeneration %}{% endfor %}",
    "{% if messages[0].role == 'user' %}{% generation %}{% endgeneration %}{% endif %}x",
    "{% if %}",
    "{{ messages | nofilter }}",
    "{{ bos_token }}{{ eos_token }}{{ unk_token }}{{ tools is none }}{{ documents is none }}{{ add_generation_prompt }}",
]


@pytest.mark.parametrize("template", FEATURES)
def test_what_templates_can_use(template: str) -> None:
    """Complaints included: those of the sandbox are told in other words, but there."""
    ours, theirs = (JinjaTemplate(template, TOKENS, by_transformers=way) for way in (False, True))
    for roles in TRIED:
        messages = [{"role": role, "content": f" {role} é\n"} for role in roles]
        for number in range(len(messages) + 1):
            for prompt in (False, True):
                assert written(ours, messages, number, prompt) == written(theirs, messages, number, prompt)
        if ours.is_marked:
            assert ours.render_marked(messages, None) == theirs.render_marked(messages, None)


def written(template: JinjaTemplate, messages: list[dict[str, Any]], number: int, prompt: bool) -> str:
    try:
        return template.writer(messages, None)(number, prompt)
    except RenderError as error:
        kind, _, words = str(error).partition(": ")
        return kind if kind == "SecurityError" else f"{kind}: {words}"


OURS = {
    "chatml": templates.CHATML,
    "llama-2": templates.LLAMA_2,
    "alpaca": templates.ALPACA,
    **{
        name: getattr(tokenization, name)
        for name in ("CHATML", "CHATML_MARKED", "LLAMA2", "LLAMA3", "THINKING", "PLAIN")
    },
}


@pytest.mark.parametrize("name", OURS)
def test_the_templates_here_agree(name: str) -> None:
    assert agrees_with_transformers(OURS[name], TOKENS)


def test_templates_of_models_agree() -> None:
    """Those that TRL brings along: Llama 3, Qwen, Gemma, Phi, DeepSeek, GPT-OSS and others, as they are and with marks."""
    trl = pytest.importorskip("trl")
    files = sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))
    assert len(files) > 20
    assert [file.name for file in files if not agrees_with_transformers(file.read_text(encoding="utf-8"), TOKENS)] == []


class InThisProcess:
    """What is patched here is not patched in a child."""

    def ask(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return function(*arguments)


@pytest.mark.parametrize("differs", ["tojson", "marks"])
def test_where_they_differ_transformers_renders_and_the_log_says_so(
    monkeypatch: pytest.MonkeyPatch, differs: str
) -> None:
    """As if a later transformers meant something else by one of them."""
    monkeypatch.setattr(bounded, "companion", InThisProcess)
    if differs == "tojson":
        monkeypatch.setattr(sandbox, "_to_json", lambda value: "different")
    else:
        monkeypatch.setattr(sandbox.Marks, "_mark", lambda self, caller: caller())
    template = tokenization.CHATML_MARKED.replace("{{ m.role }}", "{{ m.role | tojson }}")
    tokenizer = make_tokenizer(template)
    rows = [RawRow("f:1", chat("hi", "yes"))]
    chosen = ChatTemplate(template, "mine", is_own=True)
    recipe = make_recipe(tokenizer, Layout("chat"), DataSettings(path="f"), chosen)
    said: list[str] = []
    check_template(recipe, chosen, said.append)
    assert said == [
        "chat template (mine): transformers renders it differently than qlora_jax would, so it renders every row, which takes longer"
    ]
    (example,) = tokenize(rows, recipe)
    assert tokenizer.decode(example.input_ids) == tokenizer.apply_chat_template(
        chat("hi", "yes")["messages"], tokenize=False
    )
    assert tokenization.supervised(example, tokenizer) == ["yes<|im_end|>"]
    monkeypatch.undo()
    recipe = make_recipe(tokenizer, Layout("chat"), DataSettings(path="f"), chosen)
    check_template(recipe, chosen, said.append)
    assert len(said) == 1 and not recipe.by_transformers


def test_messages_are_not_the_templates_to_change() -> None:
    """The sandbox is the short way's too: what a template is given, it cannot change."""
    messages = chat("hi", "yes")["messages"]
    for template in (
        "{% set _ = messages.pop() %}",
        "{% set _ = messages[0].clear() %}",
        "{% set _ = dict.update(messages[0], {'role': 'x'}) %}",
        "{% set messages[0].role = 1 %}",
    ):
        with pytest.raises(RenderError):
            JinjaTemplate(template, TOKENS).writer(messages, None)(2, False)
    assert messages == chat("hi", "yes")["messages"]
