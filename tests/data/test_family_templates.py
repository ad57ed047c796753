"""Chat templates of the families: what is learned is what TRL learns, with the token that ends a turn among it."""

import re
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from qlora_jax.config.data import DataSettings
from qlora_jax.data import ChatTemplate, Layout, end_ids, make_recipe
from tests.data.test_tokenization import all_of, chat, make_tokenizer, one, supervised
from tests.data.test_trl import ours, theirs

SPECIAL = re.compile(r"<\|[\w/]+\|>|<(?:start|end)_of_turn>|\[gMASK\]|<sop>|<\uff5c[^\uff5c]+\uff5c>|<bos>|<eos>")
THOUGHT = "<think>\nhm\n</think>\n\n"


# ------------------------------------------------------------------------------- templates of models, as TRL brings them along


def templates() -> Path:
    trl = pytest.importorskip("trl")
    folder = Path(trl.__file__).parent / "chat_templates"
    return folder if folder.is_dir() else pytest.skip("this TRL has no templates")


TEMPLATES = {
    "llama3": ("<|eot_id|>", ""),
    "gemma3": ("<end_of_turn>", ""),
    "phi3_5": ("<|end|>", ""),
    "qwen2_5": ("<|im_end|>", ""),
    "qwen3": ("<|im_end|>", ""),
    "cohere": ("<|END_OF_TURN_TOKEN|>", ""),
    "glm4moe": ("<|user|>", ""),
    "deepseek_r1_distill": ("<\uff5cend▁of▁sentence\uff5c>", "<\uff5cAssistant\uff5c>"),  # which TRL counts to the turn
}
"""The token that ends a turn, and what TRL learns before the turn."""
CHATS = [
    chat("Why is it blue?", "Rayleigh 😀."),
    chat("hi", "hello", "and red?", "Also."),
    chat("a", "b", "c", "d", "日本", "語"),
]


@pytest.mark.parametrize("name", TEMPLATES)
def test_what_is_learned_is_what_trl_learns(smollm2_folder: Path, name: str) -> None:
    """But white space that the template writes after the end of a turn, where the model stops, and headers of turns.

    Where a template rewrites earlier turns, TRL has a template of its own that does not; here each becomes a row, and the same is learned.
    """
    end, header = TEMPLATES[name]
    path, training = (templates() / f"{name}{suffix}.jinja" for suffix in ("", "_training"))
    if not path.exists() or not training.exists():
        pytest.skip("not in this TRL")
    text, theirs_text = path.read_text(encoding="utf-8"), training.read_text(encoding="utf-8")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(smollm2_folder)
    special = sorted({end, *SPECIAL.findall(text), *SPECIAL.findall(theirs_text)})
    tokenizer.add_special_tokens({"additional_special_tokens": special})

    def learned(ids: list[int], mask: list[bool]) -> list[str]:
        said = [tokenizer.decode([token]) for token, counts in zip(ids, mask, strict=True) if counts]
        return [piece for piece in said if piece.strip() and piece != header]

    found = ours(CHATS, tokenizer, text)
    expected = theirs(CHATS, tokenizer, theirs_text, assistant_only=True)
    for number, (row, (ids, mask)) in enumerate(zip(CHATS, expected, strict=True), start=1):
        rows = [example for example in found if example.where.partition(" ")[0] == f"f:{number}"]
        by_row = [learned(example.input_ids.tolist(), example.loss_mask.tolist()) for example in rows]
        assert [piece for pieces in by_row for piece in pieces] == learned(ids, mask)
        assert sum(pieces.count(end) for pieces in by_row) == len(row["messages"]) // 2
        if len(rows) == 1:
            assert rows[0].input_ids.tolist() == ids
        else:
            assert name == "qwen3"  # thoughts: an empty one in the last turn alone


# ------------------------------------------------------------------------------------- the same structures, in words of ours

GLM = (
    "<s>{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|assistant|>' }}"
    "{% if m.tool_calls %}{% for call in m.tool_calls %}{{ '\n' + call.function.name + '\n' + (call.function.arguments | string) }}"
    "{% endfor %}{% else %}{{ '\n' + m.content }}{% endif %}{% elif m.role == 'tool' %}{{ '<|observation|>\n' + m.content }}"
    "{% else %}{{ '<|' + m.role + '|>\n' + m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
"""No turn has an end: the next one's first token stops the model."""
PHI = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
"""An eos after the last turn alone."""
QWEN = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% set said = m.content.split('</think>')[-1].lstrip() if m.role == 'assistant' and loop.index0 < ns.last "
    "else m.content %}{{ '<|im_start|>' + m.role + '\n' + said + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""Thoughts before the last question are dropped."""
GEMMA = (
    "{{ bos_token }}{% set first = messages[0].content + '\n\n' if messages[0].role == 'system' else '' %}"
    "{% for m in (messages[1:] if first else messages) %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('turns must alternate') }}{% endif %}"
    "{{ '<|im_start|>' + ('model' if m.role == 'assistant' else m.role) + '\n' + (first if loop.first else '') + m.content | trim }}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>model\n' }}{% endif %}"
)
"""The system's words in the first user's turn, `model` for the assistant, a bos of its own."""
MISTRAL = (
    "{{ bos_token }}{% set system = messages[0].content + '\n\n' if messages[0].role == 'system' else '' %}"
    "{% for m in (messages[1:] if system else messages) %}{% if m.role == 'user' %}"
    "{{ '[INST] ' + (system if loop.last or loop.revindex == 2 and loop.nextitem.role != 'user' else '') + m.content + '[/INST]' }}"
    "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)
"""The system's words in the last user's turn."""
LLAMA = (
    "{{ bos_token }}{{ '<|im_start|>system\nToday: ' + strftime_now('%d %b %Y') + '\n' }}"
    "{% if messages[0].role == 'system' %}{{ messages[0].content }}{% set messages = messages[1:] %}{% endif %}{{ '<|im_end|>' }}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n\n' + m.content | trim }}"
    '{% if m.tool_calls %}{{ \'{"name": "\' + m.tool_calls[0].function.name + \'", "arguments": \' }}'
    "{{ m.tool_calls[0].function.arguments | tojson }}{{ '}<|eom|>' }}{% else %}{{ '<|im_end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n\n' }}{% endif %}"
)
"""A date, and another end after a call than after an answer."""


def tokenizer_of(template: str, *special: str) -> PreTrainedTokenizerFast:
    tokenizer = make_tokenizer(template)
    names = ["<|user|>", "<|assistant|>", "<|system|>", "<|observation|>", "<|eom|>", *special]
    tokenizer.add_special_tokens({"additional_special_tokens": names})
    return tokenizer


def stops(tokenizer: PreTrainedTokenizerFast) -> list[str]:
    template = ChatTemplate(tokenizer.chat_template, "test", is_own=True)
    found = end_ids(make_recipe(tokenizer, Layout("chat"), DataSettings(path="a probe"), template))
    return tokenizer.convert_ids_to_tokens(list(found))


CALLING = {
    "messages": [
        {"role": "user", "content": "Is it raining?"},
        {"role": "assistant", "content": "", "tool_calls": [
            {"id": "call00001", "type": "function", "function": {"name": "look", "arguments": {"at": "sky"}}}]},
        {"role": "tool", "content": "dry", "name": "look", "tool_call_id": "call00001"},
        {"role": "assistant", "content": "No."},
    ]
}  # fmt: skip


@pytest.mark.parametrize(
    ("template", "row", "learned", "stop"),
    {
        "glm": (GLM, chat("a", "b", "c", "d"), ["\nb<|user|>", "\nd<|user|>"], ["<|user|>", "<|observation|>"]),
        "phi": (PHI, chat("a", "b", "c", "d"), ["b<|im_end|>", "d<|im_end|>\n</s>"], ["</s>"]),
        "gemma": (GEMMA, chat("a", "b", "c", "d", system="s"), ["b<|im_end|>", "d<|im_end|>"], ["<|im_end|>"]),
        "llama": (
            LLAMA,
            chat("a", "b", "c", "d", system="s"),
            ["b<|im_end|>", "d<|im_end|>"],
            ["<|im_end|>", "<|eom|>"],
        ),
    }.values(),
    ids=["glm", "phi", "gemma", "llama"],
)
def test_every_turn_is_learned_with_its_end(
    template: str, row: dict[str, Any], learned: list[str], stop: list[str]
) -> None:
    tokenizer = tokenizer_of(template)
    assert supervised(one(row, tokenizer), tokenizer) == learned
    assert stops(tokenizer) == stop


def test_a_turn_without_an_end_of_its_own_is_given_the_next_one_s_beginning() -> None:
    """After a call, what stops the model is where the tool's answer begins."""
    tokenizer = tokenizer_of(GLM)
    assert supervised(one(CALLING, tokenizer), tokenizer) == ['\nlook\n{"at": "sky"}<|observation|>', "\nNo.<|user|>"]
    called = {"messages": CALLING["messages"][:2]}
    assert tokenizer.decode(one(called, tokenizer).input_ids).endswith('{"at": "sky"}<|observation|>')
    everything = one(chat("a", "b"), tokenizer, loss_on="all")
    assert tokenizer.decode(everything.input_ids).endswith("<|assistant|>\nb")  # as the template writes it
    without = tokenizer_of(GLM.replace("'<|' + m.role + '|>", "m.role + ':"))  # a user's turn begins as plain text
    assert supervised(one(chat("a", "b"), without), without) == ["\nb"]


def test_turns_that_are_rewritten_are_rows_of_their_own() -> None:
    tokenizer = tokenizer_of(QWEN)
    rows = all_of(chat("a", THOUGHT + "b", "c", THOUGHT + "d"), tokenizer)
    assert [supervised(row, tokenizer) for row in rows] == [[f"{THOUGHT}b<|im_end|>"], [f"{THOUGHT}d<|im_end|>"]]
    assert "hm" not in tokenizer.decode(rows[1].input_ids[~rows[1].loss_mask])
    tokenizer = tokenizer_of(MISTRAL)
    rows = all_of(chat("a", "b", "c", "d", system="s"), tokenizer)
    assert [supervised(row, tokenizer) for row in rows] == [[" b</s>"], [" d</s>"]]
    assert [tokenizer.decode(row.input_ids) for row in rows] == [
        "<s>[INST] s\n\na[/INST] b</s>",
        "<s>[INST] a[/INST] b</s>[INST] s\n\nc[/INST] d</s>",
    ]


def test_a_prompt_that_opens_a_thought() -> None:
    """Turns without thoughts are learned; a template that drops a row's thought is not followed."""
    opening = QWEN.replace("'<|im_start|>assistant\n' }}", "'<|im_start|>assistant\n<think>\n' }}")
    tokenizer = tokenizer_of(opening)
    assert supervised(one(chat("a", "b"), tokenizer), tokenizer) == ["b<|im_end|>"]
    assert supervised(one(chat("a", THOUGHT + "b"), tokenizer), tokenizer) == [f"{THOUGHT[8:]}b<|im_end|>"]
    dropping = tokenizer_of(opening.replace("and loop.index0 < ns.last ", ""))
    assert supervised(one(chat("a", "b"), dropping), dropping) == ["b<|im_end|>"]
    with pytest.raises(Exception, match=r"rewrites its own prompt: messages\[1\]"):
        one(chat("a", THOUGHT + "b"), dropping)
