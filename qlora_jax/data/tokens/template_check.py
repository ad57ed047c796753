"""Whether a chat template and a tokenizer go together: one BOS, and a turn that ends in a token that stops generation."""

import dataclasses
from collections.abc import Callable

import tokenizers

from qlora_jax.base.errors import InputError
from qlora_jax.data.chat.jinja import syntax_problem
from qlora_jax.data.chat.templates import ChatTemplate
from qlora_jax.data.rows.formats import Layout
from qlora_jax.data.rows.row import RawRow, RowError
from qlora_jax.data.tokens.tokenization import Recipe, tokenize

PROBE = {"messages": [{"role": "user", "content": "Hello there."}, {"role": "assistant", "content": "Well met."}]}


def check_template(recipe: Recipe, template: ChatTemplate, log: Callable[[str], object]) -> None:
    """Tokenize a small conversation and look at its ends. What may be meant is told to `log`.

    Raises:
        InputError: it is not a template, or a conversation starts with BOS twice.
    """
    where = f"chat template ({template.name})"
    if problem := syntax_problem(template.text):
        raise InputError(where, found=problem, fix="mend it, or choose another with data.chat_template")
    if recipe.by_transformers:
        log(
            f"{where}: transformers renders it differently than qlora_jax would, so it renders every row, which takes longer"
        )
    recipe = dataclasses.replace(recipe, layout=Layout("chat"), loss_on="assistant", max_seq_length=2**20)
    try:
        (example,) = tokenize([RawRow("a probe", PROBE)], recipe)
    except RowError:
        return  # a template for other conversations than this: the rows will tell
    plain = tokenizers.Tokenizer.from_str(recipe.tokenizer)
    ids = example.input_ids.tolist()
    bos = recipe.special_tokens.get("bos_token")
    bos_id = None if bos is None else plain.token_to_id(bos)
    if bos_id is not None and ids[:2] == [bos_id, bos_id]:
        fix = "take one of them out of the template, or choose another with data.chat_template"
        raise InputError(where, found=f"a conversation that starts with {bos} twice", expected="one", fix=fix)
    if bos_id is not None and bos_id in recipe.start_ids and ids[0] != bos_id:
        log(
            f"{where}: conversations start without {bos}, though plain texts do; generation from this template will match"
        )
    last = int(example.loss_mask.nonzero()[0][-1])
    if plain.id_to_token(ids[last]) not in recipe.end_tokens:
        text = plain.decode(ids[last : last + 1], skip_special_tokens=False)
        log(
            f"{where}: the assistant's turn ends with {text!r} and no end token, so the model does not learn to stop there"
        )
