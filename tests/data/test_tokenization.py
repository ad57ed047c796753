"""Which tokens count in the loss, read back as text, for several kinds of chat template, and against transformers."""

import json
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from qlora_jax.base.errors import InputError
from qlora_jax.config.data import DataSettings
from qlora_jax.data import (
    Chat,
    ChatTemplate,
    Example,
    Layout,
    RawRow,
    Recipe,
    Renderer,
    RowError,
    detect_format,
    make_recipe,
    tokenize,
)
from qlora_jax.data.tokens.tokenization import RowTokenizer

SPECIAL = ("<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|header|>", "<|/header|>", "<|eot|>")
JOINS = [("h", "i"), ("Ċ", "Ċ"), ("Ġ", "hi"), (":", "Ċ")]

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# transformers drops a newline that follows a block's end, hence the line break as an expression.
CHATML_MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}"
    "{{ '\\n' }}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token }}[INST] {{ m.content | trim }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content | trim }} {{ eos_token }}"
    "{% else %}{{ raise_exception('no system turns') }}{% endif %}{% endfor %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|header|>{{ m.role }}<|/header|>\n\n{{ m.content | trim }}<|eot|>"
    "{% endfor %}{% if add_generation_prompt %}<|header|>assistant<|/header|>\n\n{% endif %}"
)
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and not loop.last %}"
    "{{ m.content.split('</think>')[-1] }}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PLAIN = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def make_tokenizer(
    template: str | None = None,
    joins: Iterable[tuple[str, str]] = JOINS,
    bos: bool = False,
    eos: str | None = "</s>",
    trim_offsets: bool = True,
) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with a few merges; many on the hub trim their offsets, so this one does."""
    vocab = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    for left, right in joins:
        vocab[left + right] = len(vocab)
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=list(joins)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(SPECIAL))
    post = [processors.ByteLevel(trim_offsets=trim_offsets)]
    if bos:
        ids = [("<s>", backend.token_to_id("<s>"))]
        post.append(processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=ids))
    backend.post_processor = processors.Sequence(post)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token=eos, pad_token=eos)
    tokenizer.chat_template = template
    return tokenizer


def chat(*contents: str, system: str | None = None) -> dict:
    roles = ["user", "assistant"] * len(contents)
    messages = [{"role": role, "content": text} for role, text in zip(roles, contents, strict=False)]
    return {"messages": [{"role": "system", "content": system}] * (system is not None) + messages}


def recipe(row: dict, tokenizer: PreTrainedTokenizerBase, max_seq_length: int = 1000, **settings: Any) -> Recipe:
    data = DataSettings(path="f", max_seq_length=max_seq_length, **settings)
    template = ChatTemplate(tokenizer.chat_template, "test", is_own=True) if tokenizer.chat_template else None
    layout = Layout(detect_format([RawRow("f:1", row).parse()]), data.fields)
    return make_recipe(tokenizer, layout, data, template)


def all_of(row: dict, tokenizer: PreTrainedTokenizerBase, max_seq_length: int = 1000, **settings: Any) -> list[Example]:
    return tokenize([RawRow("f:1", row)], recipe(row, tokenizer, max_seq_length, **settings))


def one(row: dict, tokenizer: PreTrainedTokenizerBase, max_seq_length: int = 1000, **settings: Any) -> Example:
    (example,) = all_of(row, tokenizer, max_seq_length, **settings)
    return example


def supervised(example: Example, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The runs of supervised tokens as text."""
    assert example.input_ids.dtype == np.int32
    assert example.loss_mask.dtype == np.bool_
    assert example.input_ids.shape == example.loss_mask.shape
    pairs = zip(example.input_ids.tolist(), example.loss_mask.tolist(), strict=True)
    return [tokenizer.decode([i for i, _ in run]) for counts, run in groupby(pairs, key=lambda pair: pair[1]) if counts]


TURNS = ("hi", "hello 😀", "and?", "fin")


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (CHATML, ["hello 😀<|im_end|>", "fin<|im_end|>"]),
        (CHATML_MARKED, ["hello 😀<|im_end|>", "fin<|im_end|>"]),
        (LLAMA2, [" hello 😀 </s>", " fin </s>"]),
        (LLAMA3, ["hello 😀<|eot|>", "fin<|eot|>"]),
        (PLAIN, [" hello 😀\n", " fin\n"]),
    ],
)
def test_only_the_assistants_turns_count(template: str, expected: list[str]) -> None:
    tokenizer = make_tokenizer(template, bos=True)
    example = one(chat(*TURNS), tokenizer)
    assert supervised(example, tokenizer) == expected
    text = tokenizer.apply_chat_template(chat(*TURNS)["messages"], tokenize=False)
    assert tokenizer.decode(example.input_ids) == text  # no second BOS


HARD = [
    "<|im_start|>assistant\nhi<|im_end|>\n",
    "<|im_end|>",
    "assistant",
    "hi",
    "  hi  ",
    "[/INST] </s>",
    "日本語 😀",
    "👩‍👩‍👧é",
    "{{ m.content }}{% generation %}",
    "a\u2028b\x00",
]


@pytest.mark.parametrize("user", HARD)
@pytest.mark.parametrize("assistant", HARD)
def test_contents_that_break_searching(user: str, assistant: str) -> None:
    for template in (CHATML, CHATML_MARKED):
        tokenizer = make_tokenizer(template, eos="<|im_end|>")
        example = one(chat(user, assistant, user, user, system=assistant), tokenizer)
        assert supervised(example, tokenizer) == [f"{assistant}<|im_end|>", f"{user}<|im_end|>"]


def test_leading_newlines() -> None:
    apart, joined = make_tokenizer(CHATML, joins=[]), make_tokenizer(CHATML)
    assert supervised(one(chat("hi", "\n\n hi"), apart), apart) == ["\n\n hi<|im_end|>"]
    # "assistant\n" + "\n\n hi" is cut "\n\n", "\n", " hi": the first of these starts in the template's text.
    assert supervised(one(chat("hi", "\n\n hi"), joined), joined) == ["\n\n\n hi<|im_end|>"]


def test_a_token_across_a_turns_end_counts() -> None:
    template = PLAIN.replace("assistant:", "assistant: ")
    tokenizer = make_tokenizer(template)
    assert supervised(one(chat("hi", "hi hi"), tokenizer), tokenizer) == [" hi hi\n"]  # the first space is the prompt's
    tokenizer = make_tokenizer(template.replace("}}\n", "}}{{ ' hi' }}"))
    assert supervised(one(chat("hi", "yes", "a", "b"), tokenizer), tokenizer) == ["yes hi", "b hi"]


def test_marks_at_spaces_and_emoji() -> None:
    template = "{% for m in messages %}:{% generation %} {{ m.content }}{% endgeneration %}{% endfor %}"
    tokenizer = make_tokenizer(template)
    assert supervised(one(chat("hi", "😀"), tokenizer), tokenizer) == [" hi", " 😀"]


def any_text(parts: list[str]) -> bool:
    return not "".join(parts).isspace()


PARTS = [*"hi :\n😀é", *SPECIAL, "assistant\n"]
# No merges of whitespace and untrimmed offsets: there both agree on what a token at a span's edge means.
ORACLE_TOKENIZER = make_tokenizer(CHATML, joins=[("h", "i")], trim_offsets=False)


@settings(max_examples=60, deadline=None)
@given(contents=st.lists(st.lists(st.sampled_from(PARTS), min_size=1).filter(any_text), min_size=2))
def test_unmarked_equals_marked_through_transformers(contents: list[list[str]]) -> None:
    messages = chat(*["".join(parts) for parts in contents])["messages"]
    ours = one({"messages": messages}, ORACLE_TOKENIZER, max_seq_length=10_000)
    theirs = ORACLE_TOKENIZER.apply_chat_template(
        messages, chat_template=CHATML_MARKED, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    assert ours.input_ids.tolist() == theirs["input_ids"]
    assert ours.loss_mask.tolist() == [bool(counts) for counts in theirs["assistant_masks"]]


def test_the_tokenizer_itself_is_left_alone() -> None:
    tokenizer = make_tokenizer(CHATML, bos=True)
    before = tokenizer.backend_tokenizer.to_str()
    one(chat("hi", "hi"), tokenizer)
    assert tokenizer.backend_tokenizer.to_str() == before


def test_a_turn_that_the_template_rewrites_is_a_row_of_its_own() -> None:
    tokenizer = make_tokenizer(THINKING)
    thought = "<think>so</think>hi"
    assert supervised(one(chat("hi", thought), tokenizer), tokenizer) == [f"{thought}<|im_end|>"]
    assert len(supervised(one(chat("hi", "hi", "hi", thought), tokenizer), tokenizer)) == 2
    rows = all_of(chat("a", thought, "b", "plain", "c", thought, "d", "end"), tokenizer)
    assert [supervised(row, tokenizer) for row in rows] == [
        [f"{thought}<|im_end|>"],
        [f"{thought}<|im_end|>"],
        ["plain<|im_end|>", "end<|im_end|>"],
    ]
    # Each as the model sees it when it is to write that turn: nothing after it, earlier thoughts gone.
    texts = [tokenizer.decode(row.input_ids) for row in rows]
    assert [text.count("</think>") for text in texts] == [1, 1, 0]
    assert texts[1].endswith(f"c<|im_end|>\n<|im_start|>assistant\n{thought}<|im_end|>\n")
    assert supervised(one(chat("a", thought, "b", "end"), tokenizer, loss_on="last_assistant"), tokenizer) == [
        "end<|im_end|>"
    ]


@pytest.mark.parametrize("template", [CHATML, CHATML_MARKED])
def test_what_is_learned_can_be_chosen(template: str) -> None:
    tokenizer = make_tokenizer(template)
    for loss_on, expected in (
        ("auto", ["b<|im_end|>", "d<|im_end|>"]),
        ("assistant", ["b<|im_end|>", "d<|im_end|>"]),
        ("last_assistant", ["d<|im_end|>"]),
        ("completion", ["d<|im_end|>"]),
    ):
        assert supervised(one(chat("a", "b", "c", "d"), tokenizer, loss_on=loss_on), tokenizer) == expected
    everything = one(chat("a", "b"), tokenizer, loss_on="all")
    assert everything.loss_mask.tolist() == [False] + [True] * (len(everything.input_ids) - 1)
    messages = chat("a", "b", "c", "d", "e", "f")["messages"]
    split = {"prompt": messages[:3], "completion": messages[3:]}
    assert supervised(one(split, tokenizer), tokenizer) == ["d<|im_end|>", "f<|im_end|>"]
    assert supervised(one({"prompt": "a", "completion": "b"}, tokenizer, loss_on="all"), tokenizer) == ["b</s>"]
    with pytest.raises(InputError, match=r"data.loss_on\n.*assistant for rows of format text"):
        one({"text": "a"}, tokenizer, loss_on="assistant")


def test_templates_and_rows_that_do_not_go_together() -> None:
    with pytest.raises(InputError, match=r"f:1\n.*rewrites its own prompt: messages\[1\]"):
        one(chat("hi", "hi"), make_tokenizer(CHATML.replace("assistant\n", "assistant\nplan:")))
    with pytest.raises(InputError, match=r"f:1\n.*cannot render: TemplateError: no system turns"):
        one(chat("hi", "hi", system="be"), make_tokenizer(LLAMA2))
    with pytest.raises(InputError, match=r"f:1\n.*cannot render: TemplateError: none"):
        one(chat("hi", "hi"), make_tokenizer("{% generation %}{{ raise_exception('none') }}{% endgeneration %}"))
    first = {"messages": [{"role": "assistant", "content": "hi"}]}
    with pytest.raises(InputError, match=r"f:1\n.*the assistant alone speaks"):
        one(first, make_tokenizer(CHATML))
    tokenizer = make_tokenizer(CHATML_MARKED)
    assert supervised(one(first, tokenizer), tokenizer) == ["hi<|im_end|>"]
    more = {"messages": first["messages"] + chat("a", "b")["messages"]}
    assert supervised(one(more, tokenizer), tokenizer) == ["hi<|im_end|>", "b<|im_end|>"]
    tokenizer = make_tokenizer(CHATML)  # where the first turn starts nobody can say, so it is read but not learned
    assert supervised(one(more, tokenizer), tokenizer) == ["b<|im_end|>"]


def test_fields_of_a_message_reach_the_template_unless_null() -> None:
    tokenizer = make_tokenizer(CHATML.replace("{{ m.role }}", "{{ m.name if m.name is defined else m.role }}"))
    messages = [{"role": "user", "content": "hi", "name": "Ann"}, {"role": "assistant", "content": "hi", "name": None}]
    (rendered,) = Renderer(tokenizer.chat_template, {}, SPECIAL).render(Chat(messages), "assistant", "f:1")
    assert "<|im_start|>Ann\n" in rendered.text
    assert supervised(one({"messages": messages}, tokenizer), tokenizer) == ["hi<|im_end|>"]


@pytest.mark.parametrize("bos", [True, False])
def test_prompt_and_completion(bos: bool) -> None:
    tokenizer = make_tokenizer(bos=bos)
    example = one({"prompt": "hi 😀:", "completion": " hi\n"}, tokenizer)
    assert tokenizer.decode(example.input_ids) == "<s>" * bos + "hi 😀: hi\n</s>"
    assert supervised(example, tokenizer) == [" hi\n</s>"]
    # The prompt's last space and the completion's first word are one token: it is learned.
    assert supervised(one({"prompt": "a ", "completion": "hi"}, tokenizer), tokenizer) == [" hi</s>"]
    spelled = one({"prompt": "<s>a", "completion": "hi</s>"}, tokenizer)
    assert tokenizer.decode(spelled.input_ids) == "<s>ahi</s>"
    assert supervised(spelled, tokenizer) == ["hi</s>"]


def test_text_counts_from_the_first_token_that_can_be_predicted() -> None:
    with_bos, without = make_tokenizer(bos=True), make_tokenizer()
    assert supervised(one({"text": "hi\n"}, with_bos), with_bos) == ["hi\n</s>"]
    assert supervised(one({"text": "hi\n"}, without), without) == ["\n</s>"]


def test_no_eos() -> None:
    tokenizer = make_tokenizer(CHATML, eos=None)
    for fields in ({"text": "hi"}, {"prompt": "a", "completion": "b"}):
        with pytest.raises(InputError, match="without an EOS token"):
            one(fields, tokenizer)
    assert supervised(one(chat("hi", "hi"), tokenizer), tokenizer) == ["hi<|im_end|>"]


def test_truncation_is_counted_and_must_leave_something() -> None:
    tokenizer = make_tokenizer(bos=True)
    rows = [RawRow(f"f:{i}", {"prompt": "a" * 3, "completion": "b" * n}) for i, n in enumerate((1, 4, 5, 9))]

    def of_length(length: int, **settings: Any) -> Recipe:
        return recipe(rows[0].content, tokenizer, length, **settings)

    assert RowTokenizer(of_length(9))(rows).num_truncated == 2  # of 6, 9, 10 and 14 tokens: BOS, 3, n, EOS
    examples = tokenize(rows, of_length(9))
    assert [len(example.input_ids) for example in examples] == [6, 9, 9, 9]
    assert supervised(examples[3], tokenizer) == ["bbbbb"]
    assert [example.where for example in examples] == ["f:0", "f:1", "f:2", "f:3"]
    with pytest.raises(RowError, match=r"f:0\n.*6 tokens, and none of the first 4 (?s:.*)above 4,"):
        tokenize(rows, of_length(4))
    assert supervised(tokenize(rows, of_length(5))[0], tokenizer) == ["b"]
    with pytest.raises(RowError, match=r"f:2\n.*10 tokens\n.*at most 9") as error:
        tokenize(rows, of_length(9, too_long="skip"))
    assert error.value.kind == "too long"


def test_rows_together_are_as_alone() -> None:
    """Masks are found for many rows at once; no row's spans reach into another's."""
    tokenizer = make_tokenizer(CHATML)
    rows = [RawRow(f"f:{i}", chat(*HARD[i % 5 :], "x")) for i in range(12)] + [RawRow("f:12", chat("a", "b"))]
    together = tokenize(rows, recipe(rows[0].content, tokenizer))
    for row, example in zip(rows, together, strict=True):
        (alone,) = tokenize([row], recipe(row.content, tokenizer))
        assert np.array_equal(alone.input_ids, example.input_ids)
        assert np.array_equal(alone.loss_mask, example.loss_mask)


def test_nothing_to_learn() -> None:
    with pytest.raises(InputError, match=r"f:1\n.*none of which follows another"):
        one({"text": "</s>"}, make_tokenizer())  # one token, and nothing before it to predict it from
    with pytest.raises(InputError, match=r"f:1\n.*none of which"):
        one(chat("hi", "hi"), make_tokenizer("hi{% generation %}{% endgeneration %}"))


def test_bad_rows_are_gathered_in_order_and_the_others_are_there() -> None:
    rows = [
        RawRow("f:1", {"text": "hi"}),
        RawRow("f:2", {"texts": "hi"}),
        RawRow("f:3", b"{"),
        RawRow("f:4", {"text": "yo"}),
    ]
    tokens = RowTokenizer(recipe(rows[0].content, make_tokenizer()))(rows)
    assert [(error.where, error.kind) for error in tokens.problems] == [("f:2", "fields"), ("f:3", "unreadable")]
    assert (tokens.wheres, tokens.num_read) == (["f:1", "f:4"], 4)
    assert len(tokens.input_ids) == tokens.lengths.sum() == len(tokens.loss_mask)


TOOL = {"type": "function", "function": {"name": "look", "parameters": {}}}
CALLED = [{"type": "function", "function": {"name": "look", "arguments": {"where": "out"}}}]


def test_calls_and_tools_that_the_template_leaves_out() -> None:
    """An empty turn would be learned in the call's place."""
    asked, answered = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    calls = {"messages": [asked, {"role": "assistant", "content": None, "tool_calls": CALLED}, asked, answered]}
    has_tools = {"messages": [asked, answered], "tools": [TOOL]}
    for loss_on in ("assistant", "all"):
        with pytest.raises(
            RowError, match=r"f:1\n.*messages\[1\] calls a tool, which the chat template leaves out"
        ) as error:
            one(calls, make_tokenizer(CHATML), loss_on=loss_on)
        assert error.value.kind == "template"
        with pytest.raises(
            RowError, match=r"`tools`, which the chat template leaves out\n(?s:.*)data.fields={tools: none}"
        ):
            one(has_tools, make_tokenizer(CHATML), loss_on=loss_on)
    tokenizer = make_tokenizer(CHATML)
    assert supervised(one(has_tools, tokenizer, fields={"tools": "none"}), tokenizer) == ["b<|im_end|>"]
    writes_calls = make_tokenizer(
        CHATML.replace("m.content }}", "m.content + (m.tool_calls | tojson if m.tool_calls else '') }}")
    )
    learned = supervised(one(calls, writes_calls), writes_calls)
    assert "look" in learned[0] and learned[1] == "b<|im_end|>"
    writes_tools = make_tokenizer("{% if tools %}{{ tools | tojson }}{% endif %}" + CHATML)
    assert supervised(one(has_tools, writes_tools), writes_tools) == ["b<|im_end|>"]


def test_a_role_that_the_template_leaves_out() -> None:
    silent = "{% for m in messages %}{% if m.role in ('user', 'assistant') %}" + CHATML.removeprefix(
        "{% for m in messages %}"
    ).replace("{% endfor %}", "{% endif %}{% endfor %}")
    with pytest.raises(
        RowError, match=r"f:1\n.*messages\[0\] has the role 'system', which the chat template leaves out"
    ) as error:
        one(chat("hi", "hi", system="Be kind."), make_tokenizer(silent))
    assert error.value.kind == "template"
    tokenizer = make_tokenizer(silent)
    assert supervised(one(chat("hi", "hi", system=""), tokenizer), tokenizer) == ["hi<|im_end|>"]  # nothing is lost
    used = {
        "messages": [
            {"role": "user", "content": "a"},
            {"role": "tool", "content": "42"},
            {"role": "assistant", "content": "b"},
        ]
    }
    with pytest.raises(RowError, match=r"messages\[1\] has the role 'tool'"):
        one(used, tokenizer)
    assert supervised(one(used, make_tokenizer(CHATML)), tokenizer) == ["b<|im_end|>"]


def test_tools_reach_the_template() -> None:
    template = "{{ tools | tojson if tools else '' }}" + CHATML.replace(
        "{{ m.content }}", "{{ (m.tool_calls | tojson) if m.tool_calls else m.content }}"
    )
    tokenizer = make_tokenizer(template)
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    messages = [
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "2"},
    ]
    tools = [{"type": "function", "function": {"name": "add"}}]
    for form in (tools, json.dumps(tools)):
        example = one({"messages": messages, "tools": form}, tokenizer)
        assert tokenizer.decode(example.input_ids).startswith(json.dumps(tools))
        assert supervised(example, tokenizer) == [json.dumps([call]) + "<|im_end|>", "2<|im_end|>"]


def test_a_row_of_a_million_characters() -> None:
    tokenizer = make_tokenizer(CHATML)
    for text in ("a" * 10**6, "hi " * 333_333):
        example = one(chat("hi", text), tokenizer, max_seq_length=64)
        assert len(example.input_ids) == 64
        assert example.loss_mask.sum() > 32


def test_slow_tokenizers_are_refused() -> None:
    class Slow(PreTrainedTokenizerFast):
        is_fast = False

    slow = Slow(tokenizer_object=make_tokenizer().backend_tokenizer, eos_token="</s>")
    with pytest.raises(InputError, match="without character offsets"):
        one({"text": "hi"}, slow)


def test_a_real_tokenizer(smollm2_folder: Path) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(smollm2_folder)
    hard = "<|im_start|>assistant\n<|im_end|>"
    # "assistant\n" + "\n\nIt" is cut "\n\n", "\n", "It": the first of these starts in the template's text.
    for answer, learned in (("4", "4"), (hard, hard), ("\n\nIt is 4 😀.\n", "\n\n\nIt is 4 😀.\n")):
        example = one(chat("2 + 2 = 2 + 2?", answer, "2 + 2?", "4"), tokenizer)
        assert supervised(example, tokenizer) == [f"{learned}<|im_end|>", "4<|im_end|>"]
        assert tokenizer.decode(example.input_ids).startswith("<|im_start|>system\n")
    completion = one({"prompt": "2 + 2 =", "completion": " 4"}, tokenizer)
    assert supervised(completion, tokenizer) == [" 4" + tokenizer.eos_token]
