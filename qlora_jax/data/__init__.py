"""From rows as people have them to batches of token ids and labels; everything here is numpy on the host.

sources    where rows come from: files, folders, the hub
formats    what a row may look like, and the three things every row becomes
templates  which chat template writes a chat;  chat  what the assistant wrote in it
tokenization, workers   rows → token ids and masks, on all cores;  store  kept on the disk
packing, order, batches   which rows make a step, as a function of its number
"""

from qlora_jax.data.batching.batches import IGNORED_LABEL, Batch, Batches, Mix, eval_batches, length_bucket
from qlora_jax.data.chat.conversation import Rendered, Renderer
from qlora_jax.data.chat.templates import ChatTemplate, choose_template, save_template
from qlora_jax.data.rows.formats import Chat, Completion, Layout, Text, detect_format
from qlora_jax.data.rows.row import RawRow, Row, RowError
from qlora_jax.data.rows.sources import Source, open_source
from qlora_jax.data.tokens.selection import Selection
from qlora_jax.data.tokens.store import Kept, Report, TokenStore
from qlora_jax.data.tokens.template_check import check_template
from qlora_jax.data.tokens.tokenization import Example, Recipe, make_recipe, tokenize
from qlora_jax.data.tokens.workers import tokenize_all

__all__ = [
    "IGNORED_LABEL",
    "Batch",
    "Batches",
    "Chat",
    "ChatTemplate",
    "Completion",
    "Example",
    "Kept",
    "Layout",
    "Mix",
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
    "check_template",
    "choose_template",
    "detect_format",
    "eval_batches",
    "length_bucket",
    "make_recipe",
    "open_source",
    "save_template",
    "tokenize",
    "tokenize_all",
]
