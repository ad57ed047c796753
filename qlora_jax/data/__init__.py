"""From rows as people have them to batches of token ids and labels; everything here is numpy on the host.

sources    where rows come from: files, folders, the hub
formats    what a row may look like, and the three things every row becomes
templates  which chat template writes a chat;  chat  what the assistant wrote in it
limits     the tokens and lengths that a model can take
tokenization, workers   rows → token ids and masks, on all cores;  store  kept on the disk
packing, order, batches   which rows make a step, as a function of its number
"""

from qlora_jax.data.batching.batches import IGNORED_LABEL, Batch, Batches, Mix, eval_batches, length_bucket
from qlora_jax.data.chat.conversation import Rendered, Renderer
from qlora_jax.data.chat.templates import ChatTemplate, choose_template, save_template
from qlora_jax.data.rows.formats import Chat, Completion, Layout, Text, detect_format
from qlora_jax.data.rows.row import RawRow, Row, RowError
from qlora_jax.data.rows.sources import Source, open_source
from qlora_jax.data.tokens.gate import Report
from qlora_jax.data.tokens.limits import NO_LIMITS, ModelLimits, check_rows, padding_id
from qlora_jax.data.tokens.recipe import Recipe, make_recipe
from qlora_jax.data.tokens.selection import Selection
from qlora_jax.data.tokens.store import Kept, TokenStore
from qlora_jax.data.tokens.template_check import check_template, end_ids
from qlora_jax.data.tokens.tokenization import Example, tokenize
from qlora_jax.data.tokens.workers import tokenize_all, tokenize_few

__all__ = [
    "IGNORED_LABEL",
    "NO_LIMITS",
    "Batch",
    "Batches",
    "Chat",
    "ChatTemplate",
    "Completion",
    "Example",
    "Kept",
    "Layout",
    "Mix",
    "ModelLimits",
    "RawRow",
    "Recipe",
    "Rendered",
    "Renderer",
    "Report",
    "Row",
    "RowError",
    "Selection",
    "Source",
    "Text",
    "TokenStore",
    "check_rows",
    "check_template",
    "choose_template",
    "detect_format",
    "end_ids",
    "eval_batches",
    "length_bucket",
    "make_recipe",
    "open_source",
    "padding_id",
    "save_template",
    "tokenize",
    "tokenize_all",
    "tokenize_few",
]
