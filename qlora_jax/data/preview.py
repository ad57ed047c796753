"""What a run is about to learn from, to be read before it starts: rows, their supervised tokens, lengths, padding."""

import itertools

import numpy as np
from rich.console import Console
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from qlora_jax.data import Example
from qlora_jax.data.chat.codec import decode
from qlora_jax.data.corpus import Corpus

SUPERVISED_STYLE = "bold green"
BRACKETS = ("⟦", "⟧")
"""Around supervised tokens where there are no colours."""
MAX_TOKENS_SHOWN = 600
NUM_BINS = 10
BAR_WIDTH = 40


def preview(corpus: Corpus, console: Console, num_rows: int) -> None:
    """Show the first rows, then the lengths, the supervised share and the padding; nothing for 0 rows."""
    if not num_rows:
        return
    for row in range(min(num_rows, len(corpus.rows))):
        example = corpus.rows[row]
        console.print(
            f"{example.where}: {len(example.input_ids):,} tokens, {int(example.loss_mask.sum()):,} supervised"
        )
        console.print(
            decoded(example, corpus.tokenizer, in_colour=console.color_system is not None and not console.no_color)
        )
    console.print(histogram(corpus.rows.lengths))
    console.print(padding_line(corpus))


def decoded(example: Example, tokenizer: PreTrainedTokenizerBase, *, in_colour: bool) -> Text:
    """A row's text, special tokens and all, its supervised parts in colour or in ⟦ ⟧."""
    ids, mask = example.input_ids[:MAX_TOKENS_SHOWN], example.loss_mask[:MAX_TOKENS_SHOWN]
    runs = [(supervised, len(list(run))) for supervised, run in itertools.groupby(mask.tolist())]
    # From the start each time: a tokenizer may write a token differently at the start of a text.
    starts = [ids[:end].tolist() for end in itertools.accumulate(length for _, length in runs)]
    texts = decode(tokenizer, starts, skip_special_tokens=False, clean_up=False)
    text, shown = Text(), ""
    for (supervised, _), so_far in zip(runs, texts, strict=True):
        part, shown = so_far[len(shown) :], so_far
        if not supervised:
            text.append(part)
        elif in_colour:
            text.append(part, style=SUPERVISED_STYLE)
        else:
            text.append(part.join(BRACKETS))
    if len(example.input_ids) > len(ids):
        text.append(f" … and {len(example.input_ids) - len(ids):,} tokens more")
    return text


def histogram(lengths: np.ndarray) -> str:
    """How many rows have how many tokens, as bars, from the shortest on."""
    shortest = int(lengths.min())
    width = max(1, -(-(int(lengths.max()) - shortest + 1) // NUM_BINS))
    counts = np.bincount((lengths - shortest) // width)
    lines = [
        f"  {shortest + number * width:>7,} to {shortest + (number + 1) * width - 1:<7,} {count:>9,} "
        f"{'█' * round(BAR_WIDTH * count / counts.max())}"
        for number, count in enumerate(counts.tolist())
    ]
    middle, high = np.percentile(lengths, (50, 95))
    head = f"tokens a row: median {middle:,.0f}, 95 % have at most {high:,.0f}, the longest {lengths.max():,}"
    return "\n".join([head, *(line.rstrip() for line in lines)])


def padding_line(corpus: Corpus) -> str:
    """The supervised share, and what is padding in a batch, with packing and without."""
    supervised = corpus.rows.supervised.sum() / corpus.rows.lengths.sum()
    alone, packed = (corpus.batches(packing=packing).padding_share() for packing in (False, True))
    chosen = corpus.config.data.packing
    shares = [f"{alone:.1%} without packing", f"{packed:.1%} with packing"]
    shares[chosen] += " (chosen)"
    return f"{supervised:.0%} of all tokens are supervised; padding: {', '.join(shares)}"
