"""From JSONL rows to batches of token ids and labels; everything here is numpy on the host."""

from qlora_jax.data.batches import IGNORED_LABEL, Batch, Batches, eval_batches, length_bucket
from qlora_jax.data.chat import Rendered, render_chat
from qlora_jax.data.formats import Format, check_rows, detect_format
from qlora_jax.data.rows import Row, read_rows
from qlora_jax.data.tokenization import Example, Tokenized, tokenize

__all__ = [
    "IGNORED_LABEL",
    "Batch",
    "Batches",
    "Example",
    "Format",
    "Rendered",
    "Row",
    "Tokenized",
    "check_rows",
    "detect_format",
    "eval_batches",
    "length_bucket",
    "read_rows",
    "render_chat",
    "tokenize",
]
