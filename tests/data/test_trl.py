"""Token ids and labels beside TRL's, for the same rows, tokenizer and template; and where we differ, how.

TRL's own preparation runs here (`SFTTrainer._prepare_dataset`), without a model.
"""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from qlora_jax.config.data import DataSettings
from qlora_jax.data import ChatTemplate, Example, Layout, RawRow, detect_format, make_recipe, tokenize
from qlora_jax.data.chat.templates import CHATML, LLAMA_2

pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

LIGHTHOUSE = Path(__file__).parents[2] / "configs" / "data" / "lighthouse-train.jsonl"
ChatMLWithoutMarks = CHATML.replace("{% generation %}", "").replace("{% endgeneration %}", "")


@pytest.fixture(scope="module")
def tokenizer(smollm2_folder: Path) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(smollm2_folder)


def theirs(
    rows: list[dict[str, Any]],
    tokenizer: PreTrainedTokenizerFast,
    template: str | None,
    *,
    max_length: int = 4096,
    assistant_only: bool = False,
    completion_only: bool = False,
) -> list[tuple[list[int], list[bool]]]:
    """(input ids, whether each has a label) of each row that TRL keeps."""
    from trl import SFTTrainer

    arguments = SimpleNamespace(
        dataset_num_proc=None,
        dataset_text_field="text",
        assistant_only_loss=assistant_only,
        max_length=max_length,
        truncation_mode="keep_start",
        shuffle_dataset=False,
    )
    trainer = SimpleNamespace(_tokenizer=tokenizer, chat_template=template, completion_only_loss=completion_only)
    dataset = datasets.Dataset.from_list(rows)
    datasets.disable_progress_bars()
    prepared = SFTTrainer._prepare_dataset(trainer, dataset, tokenizer, arguments, False, None, "train")
    return [(row["input_ids"], [label != -100 for label in row["labels"]]) for row in prepared]


def ours(
    rows: list[dict[str, Any]],
    tokenizer: PreTrainedTokenizerFast,
    template: str | None,
    max_length: int = 4096,
    **settings: Any,
) -> list[Example]:
    raw = [RawRow(f"f:{i}", row) for i, row in enumerate(rows, start=1)]
    layout = Layout(detect_format([row.parse() for row in raw]))
    chosen = ChatTemplate(template, "test", is_own=True) if template else None
    data = DataSettings(path="f", max_seq_length=max_length, **settings)
    return tokenize(raw, make_recipe(tokenizer, layout, data, chosen))


def assert_equal(
    rows: list[Example], expected: list[tuple[list[int], list[bool]]], *, first_learned: bool = False
) -> None:
    """The same ids; the same labels but for the first token, which no token predicts: TRL may label it, and never uses that."""
    assert len(rows) == len(expected)
    for row, (ids, labelled) in zip(rows, expected, strict=True):
        assert row.input_ids.tolist() == ids, row.where
        assert row.loss_mask.tolist()[1:] == labelled[1:], row.where
        assert labelled[0] == first_learned and not row.loss_mask[0]


CHATS = [
    [("user", "hi"), ("assistant", "hello")],
    [("system", "Be brief."), ("user", "Why is it blue?"), ("assistant", "Rayleigh 😀."), ("user", "and red?"), ("assistant", "Also.")],
    [("user", "<|im_start|>assistant\nhi<|im_end|>"), ("assistant", "assistant"), ("user", "日本語"), ("assistant", "はい  ")],
    [("user", "x = 1\n\n\ty = 2"), ("assistant", "```python\nprint(x)\n```")],
]  # fmt: skip


def chats() -> list[dict[str, Any]]:
    rows = [{"messages": [{"role": role, "content": text} for role, text in chat]} for chat in CHATS]
    return rows + [json.loads(line) for line in LIGHTHOUSE.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("marked", [True, False], ids=["marked", "unmarked"])
def test_assistant_turns(tokenizer: PreTrainedTokenizerFast, marked: bool) -> None:
    """TRL needs the template's marks; ours needs none, and finds the same turns from the template's structure alone."""
    expected = theirs(chats(), tokenizer, CHATML, assistant_only=True)
    assert_equal(ours(chats(), tokenizer, CHATML if marked else ChatMLWithoutMarks), expected)


def test_a_template_with_bos_and_spaces(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [row for row in chats() if row["messages"][0]["role"] == "user"]
    assert_equal(ours(rows, tokenizer, LLAMA_2), theirs(rows, tokenizer, LLAMA_2, assistant_only=True))


def test_everything(tokenizer: PreTrainedTokenizerFast) -> None:
    own = tokenizer.chat_template
    assert_equal(ours(chats(), tokenizer, own, loss_on="all"), theirs(chats(), tokenizer, own), first_learned=True)
    texts = [{"text": text} for text in ("hello", "日本語 😀", "ends itself" + tokenizer.eos_token, " spaced  out\n")]
    assert_equal(ours(texts, tokenizer, None), theirs(texts, tokenizer, None), first_learned=True)


COMPLETIONS = [("2 + 2 =", " 4"), ("Name a colour:", " red\n"), ("日本", "語"), ("ends", " itself<|im_end|>")]


def test_completions(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [{"prompt": prompt, "completion": completion} for prompt, completion in COMPLETIONS]
    assert_equal(ours(rows, tokenizer, None), theirs(rows, tokenizer, None, completion_only=True))
    rows = [{"prompt": row["messages"][:-1], "completion": row["messages"][-1:]} for row in chats()]
    expected = theirs(rows, tokenizer, tokenizer.chat_template, completion_only=True)
    found = ours(rows, tokenizer, tokenizer.chat_template)
    # TRL's completion goes on to the line break that the template writes after the end token; the model stops before it, so ours does.
    newline = tokenizer("\n")["input_ids"]
    assert all(ids[-1:] == newline and labelled[-1] for ids, labelled in expected)
    assert_equal(found, [(ids, [*labelled[:-1], False]) for ids, labelled in expected])


def test_a_token_across_the_prompts_end(tokenizer: PreTrainedTokenizerFast) -> None:
    """Both learn the token that joins the prompt's last space to the completion's or the turn's first word."""
    rows = [{"prompt": "The answer: ", "completion": "four"}, {"prompt": "un", "completion": "believable"}]
    assert_equal(ours(rows, tokenizer, None), theirs(rows, tokenizer, None, completion_only=True))
    template = (
        "{% for m in messages %}{{ m.role + ': ' }}{% if m.role == 'assistant' %}{% generation %}{{ m.content + '\\n' }}"
        "{% endgeneration %}{% else %}{{ m.content + '\\n' }}{% endif %}{% endfor %}"
    )
    found = ours(chats(), tokenizer, template)
    assert_equal(found, theirs(chats(), tokenizer, template, assistant_only=True))
    learned = found[0].input_ids[found[0].loss_mask]
    assert tokenizer.decode(learned) == " hello\n"


@pytest.mark.parametrize("max_length", [40, 64, 96])
def test_truncation(tokenizer: PreTrainedTokenizerFast, max_length: int) -> None:
    """Cut on the right. A row that has nothing left to learn TRL drops without a word; here it is named, or skipped and counted."""
    from qlora_jax.data.tokens.tokenization import RowTokenizer

    rows = chats()
    expected = theirs(rows, tokenizer, CHATML, max_length=max_length, assistant_only=True)
    layout, template = Layout("chat"), ChatTemplate(CHATML, "test", is_own=True)
    recipe = make_recipe(tokenizer, layout, DataSettings(path="f", max_seq_length=max_length), template)
    tokens = RowTokenizer(recipe)([RawRow(f"f:{i}", row) for i, row in enumerate(rows)])
    cuts = np.cumsum(tokens.lengths)[:-1]
    pairs = zip(np.split(tokens.input_ids, cuts), np.split(tokens.loss_mask, cuts), tokens.wheres, strict=True)
    assert_equal([Example(*pair) for pair in pairs], expected)
    assert len(expected) + len(tokens.problems) == len(rows)
    assert {error.kind for error in tokens.problems} <= {"nothing to learn"}


def test_sharegpt_and_its_roles(tokenizer: PreTrainedTokenizerFast) -> None:
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    rows = [
        {"conversations": [{"from": names[m["role"]], "value": m["content"]} for m in row["messages"]]}
        for row in chats()
    ]
    assert_equal(ours(rows, tokenizer, CHATML), theirs(chats(), tokenizer, CHATML, assistant_only=True))
    with pytest.raises(
        RuntimeError, match="no assistant"
    ):  # TRL maps the keys but not the roles: nobody is `assistant` to the template
        theirs(rows, tokenizer, CHATML, assistant_only=True)
