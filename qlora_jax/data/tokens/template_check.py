"""Whether a chat template and a tokenizer go together: one BOS, and a turn that ends in a token that stops generation."""

import dataclasses
from collections.abc import Callable, Sequence

import tokenizers

from qlora_jax.base import bounded
from qlora_jax.base.bounded import ProgramError, explained
from qlora_jax.base.errors import InputError
from qlora_jax.base.reading import reading
from qlora_jax.data.chat.jinja import syntax_problem
from qlora_jax.data.chat.templates import ChatTemplate
from qlora_jax.data.rows.formats import Layout
from qlora_jax.data.rows.row import RawRow, RowError
from qlora_jax.data.tokens.limits import EXPECTED, RESIZE, describe_missing, without_row
from qlora_jax.data.tokens.recipe import Recipe
from qlora_jax.data.tokens.tokenization import Example, tokenize

PROBE = {"messages": [{"role": "user", "content": "Hello there."}, {"role": "assistant", "content": "Well met."}]}
CALL = {
    "messages": [
        {"role": "user", "content": "Is it raining?"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [
                {"id": "call00001", "type": "function", "function": {"name": "look", "arguments": {"at": "sky"}}}
            ],
        },
    ]
}
"""A call of a tool; some templates end it with another token than an answer, and some ask for an id of nine characters."""
TOOL = {
    "type": "function",
    "function": {
        "name": "look",
        "description": "Look.",
        "parameters": {"type": "object", "properties": {"at": {"type": "string"}}, "required": ["at"]},
    },
}


def check_template(recipe: Recipe, template: ChatTemplate, log: Callable[[str], object]) -> None:
    """Tokenize a small conversation and look at its ends. What may be meant is told to `log`.

    Raises:
        InputError: it is not a template, a conversation starts with BOS twice, or the model has no row for a token that it writes.
    """
    where = f"chat template ({template.name})"
    fix = "mend it, or choose another with data.chat_template"
    try:
        lines = bounded.companion().ask(_looked_at, recipe, (template.text, template.tool_use), where)
    except ProgramError as error:
        raise explained(error, where, "it cannot write a small conversation", fix) from None
    for line in lines:
        log(line)


def _looked_at(recipe: Recipe, texts: tuple[str, str | None], where: str) -> list[str]:
    """What may be meant, a line each. Raises InputError for what cannot."""
    said: list[str] = []
    log = said.append
    for text in texts:
        if text is not None and (problem := syntax_problem(text)):
            raise InputError(where, found=problem, fix="mend it, or choose another with data.chat_template")
    if recipe.by_transformers:
        log(
            f"{where}: transformers renders it differently than qlora_jax would, so it renders every row, which takes longer"
        )
    vocab_size = recipe.vocab_size
    recipe = dataclasses.replace(
        recipe, layout=Layout("chat"), loss_on="assistant", max_seq_length=2**20, vocab_size=None
    )
    try:
        (example,) = tokenize([RawRow("a probe", PROBE)], recipe)
    except RowError:
        return said  # a template for other conversations than this: the rows will tell
    plain = tokenizers.Tokenizer.from_str(recipe.tokenizer)
    ids = example.input_ids.tolist()
    if (missing := without_row(ids, vocab_size)) is not None:
        found = describe_missing(missing, plain.id_to_token(missing), vocab_size)
        raise InputError(
            where, found=found, expected=EXPECTED, fix=f"{RESIZE}, or choose another template with data.chat_template"
        )
    bos = recipe.special_tokens.get("bos_token")
    bos_id = None if bos is None else plain.token_to_id(bos)
    if bos_id is not None and ids[:2] == [bos_id, bos_id]:
        fix = "take one of them out of the template, or choose another with data.chat_template"
        raise InputError(where, found=f"a conversation that starts with {bos} twice", expected="one", fix=fix)
    if bos_id is not None and bos_id in recipe.start_ids and ids[0] != bos_id:
        log(
            f"{where}: conversations start without {bos}, though plain texts do; generation from this template will match"
        )
    with reading(where, "the end of a turn cannot be decoded"):
        ends = _end(example, plain, recipe.end_tokens) is not None
        last = int(example.loss_mask.nonzero()[0][-1])
        text = plain.decode(ids[last : last + 1], skip_special_tokens=False)
    if not ends:
        log(
            f"{where}: the assistant's turn ends with {text!r} and no end token, so the model does not learn to stop there"
        )
    return said


def end_ids(recipe: Recipe) -> tuple[int, ...]:
    """The tokens that end the assistant's turn at the end of a conversation, as its template writes them: of an answer, and of a call.

    Empty where turns end in plain text, which no single token stops at, or the template cannot write such conversations.

    Raises:
        InputError: the template or the tokenizer takes too long, or too much memory.
    """
    try:
        return bounded.companion().ask(_end_ids, recipe)
    except ProgramError as error:
        fix = "mend it, or choose another with data.chat_template"
        raise explained(error, "the chat template", "it cannot write a small conversation", fix) from None


def _end_ids(recipe: Recipe) -> tuple[int, ...]:
    recipe = dataclasses.replace(
        recipe, layout=Layout("chat"), loss_on="last_assistant", max_seq_length=2**20, vocab_size=None
    )
    plain, found = tokenizers.Tokenizer.from_str(recipe.tokenizer), []
    for probe in (PROBE, CALL, CALL | {"tools": [TOOL]}):
        try:
            example = tokenize([RawRow("a probe", probe)], recipe)[-1]
        except RowError:  # not a template for such conversations
            continue
        found.append(_end(example, plain, recipe.end_tokens))
    return tuple(dict.fromkeys(token for token in found if token is not None))


def _end(example: Example, plain: tokenizers.Tokenizer, end_tokens: Sequence[str]) -> int | None:
    """The token that ends the last supervised turn, if it is one that is never plain text; white space may follow it."""
    for token in reversed(example.input_ids[example.loss_mask].tolist()):
        if plain.id_to_token(token) in end_tokens:
            return token
        if plain.decode([token], skip_special_tokens=False).strip():
            return None
    return None
