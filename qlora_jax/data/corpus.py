"""From settings to batches: finds sources, settles formats and template, tokenizes, holds rows out; for `train.py` and the preview."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from qlora_jax.base.console import progress_bar
from qlora_jax.base.errors import InputError
from qlora_jax.config import Config
from qlora_jax.config.data import DataSettings, Format, SourceSettings
from qlora_jax.data import (
    NO_LIMITS,
    Batch,
    Batches,
    ChatTemplate,
    Example,
    Kept,
    Layout,
    Mix,
    ModelLimits,
    RawRow,
    Recipe,
    Row,
    Selection,
    Source,
    TokenStore,
    check_template,
    choose_template,
    detect_format,
    eval_batches,
    make_recipe,
    open_source,
    padding_id,
    tokenize_all,
    tokenize_few,
)
from qlora_jax.data.rows.formats import SEEN_FOR_DETECTION
from qlora_jax.data.rows.row import RowError

LEARNED = {"text": "all", "prompt_completion": "completion"}
"""What `data.loss_on: auto` comes to where rows do not become chats."""
UNUSED_SHOWN = 20
"""Names of unused fields in a source's summary."""


@dataclass(frozen=True)
class Corpus:
    """Everything a run learns from and is measured on."""

    config: Config
    """The settings, with every format as the rows have it."""
    rows: Selection
    """To train on."""
    held_out: Selection | None
    template: ChatTemplate | None
    """What wrote the chats; None where there are none."""
    tokenizer: PreTrainedTokenizerBase
    limits: ModelLimits = NO_LIMITS

    def batches(self, *, packing: bool | None = None) -> Batches:
        """The training batches.

        Args:
            packing: in place of `data.packing`.
        """
        data, training = self.config.data, self.config.training
        weights = [source.weight for source in data.all_sources]
        return Batches(
            self.rows,
            micro_batch_size=training.per_device_train_batch_size,
            grad_accum_steps=training.gradient_accumulation_steps,
            seed=training.seed,
            pad_token_id=self.padding,
            max_seq_length=data.max_seq_length,
            num_epochs=training.num_train_epochs,
            max_steps=training.max_steps,
            packing=data.packing if packing is None else packing,
            group_by_length=training.group_by_length,
            mix=Mix(self.rows.sizes, [weight for weight in weights if weight is not None] or None),
        )

    def eval_batches(self) -> list[Batch]:
        """The held-out rows, each once; empty where there are none."""
        data, size = self.config.data, self.config.training.per_device_eval_batch_size
        if self.held_out is None:
            return []
        return eval_batches(self.held_out, size, self.padding, data.max_seq_length, packing=data.packing)

    def remarks(self) -> list[str]:
        """A line for each limit of the model's that rows, or packed lines, exceed."""
        lengths = np.concatenate([some.lengths for some in (self.rows, self.held_out) if some is not None])
        longest = int(lengths.max())
        return [
            f"{int((lengths > limit).sum()):,} of {len(lengths):,} rows are longer than the model's {limit:,} tokens ({name}), the longest "
            f"{longest:,}: what lies beyond them the model was not made for; data.max_seq_length={limit} cuts rows there"
            for name, limit in self.limits.lengths
            if longest > limit
        ]

    @property
    def padding(self) -> int:
        """The id of the token that fills lines up."""
        return padding_id(self.tokenizer, self.limits.vocab_size)


def load_corpus(
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    cache: Path,
    console: Console,
    limits: ModelLimits = NO_LIMITS,
) -> Corpus:
    """Read and tokenize everything, with a line about each source.

    Args:
        tokenizer: given the chat template that was chosen, if it has none of its own.
        cache: the folder where tokenized rows are kept for the next run.
        limits: of the model; rows with tokens that it has no row for cannot be used, longer ones than it has positions are remarked upon.

    Raises:
        InputError: a source, a setting or (unless they are to be skipped) rows that cannot be used.
    """
    data = config.data
    sources = [open_source(settings, data) for settings in data.all_sources]
    held_out_source = None if data.eval_source is None else open_source(data.eval_source, data)
    opened = [*sources, *([held_out_source] if held_out_source else [])]
    asked = [*data.all_sources, *([data.eval_source] if data.eval_source else [])]
    _check_settings_are_read(data, opened)
    for note in dict.fromkeys(note for source in opened for note in source.notes):
        console.print(note)
    layouts, chats = zip(
        *(
            _settle(source.name, source.rows(), settings, skips=data.bad_rows == "skip")
            for source, settings in zip(opened, asked, strict=True)
        ),
        strict=True,
    )
    for source, settings, layout, is_chat in zip(sources, data.all_sources, layouts, chats, strict=False):
        _check_names(source.name, settings, layout, is_chat)
    template = None
    if not any(chats) and data.chat_template not in ("auto", "model"):
        expected = "auto, for no source's rows are conversations: a template would write none of them"
        raise InputError("data.chat_template", found=data.chat_template, expected=expected, fix="take it out")
    if any(chats):
        formats = [layout.format for layout in layouts[: len(sources)]]
        template = choose_template(data.chat_template, tokenizer, formats, console.print)
        tokenizer.chat_template = template.text
    recipes = [make_recipe(tokenizer, layout, data, template, limits.vocab_size) for layout in layouts]
    if template:
        check_template(recipes[chats.index(True)], template, console.print)
    kept = Kept(cache, console.print)
    stores = [_tokenized(source, recipe, data, kept, console) for source, recipe in zip(opened, recipes, strict=True)]
    rows, held_out = Selection(stores[: len(sources)]), None
    if held_out_source:
        held_out = Selection(stores[len(sources) :])
    elif data.eval_fraction:
        rows, held_out = _hold_out(rows, data.eval_fraction, config.training.seed, console)
    if held_out is not None and (seen := int(np.isin(held_out.hashes, rows.hashes).sum())):
        console.print(f"{seen:,} of {len(held_out):,} held-out rows are training rows too, to the token")
    settled = config.model_copy(update={"data": _settled(data, layouts, chats, template)})
    corpus = Corpus(settled, rows, held_out, template, tokenizer, limits)
    for line in corpus.remarks():
        console.print(line)
    return corpus


def read_examples(
    path: Path | str, tokenizer: PreTrainedTokenizerBase, max_seq_length: int, vocab_size: int | None = None
) -> list[Example]:
    """All rows of one source as a run with default settings has them, in memory: for comparisons, which need no cache.

    Raises:
        InputError: the source or one of its rows cannot be used.
    """
    data = DataSettings(path=str(path), max_seq_length=max_seq_length)
    (settings,) = data.all_sources
    return tokenize_rows(list(open_source(settings, data).rows()), tokenizer, max_seq_length, str(path), vocab_size)


def tokenize_rows(
    rows: Sequence[RawRow],
    tokenizer: PreTrainedTokenizerBase,
    max_seq_length: int,
    name: str = "rows",
    vocab_size: int | None = None,
) -> list[Example]:
    """The same of rows that are here already."""
    data = DataSettings(path=name, max_seq_length=max_seq_length)
    (settings,) = data.all_sources
    layout, is_chat = _settle(name, rows, settings)
    template = choose_template(data.chat_template, tokenizer, [layout.format], print) if is_chat else None
    return tokenize_few(rows, make_recipe(tokenizer, layout, data, template, vocab_size))


def _check_settings_are_read(data: DataSettings, sources: Sequence[Source]) -> None:
    """Check that every setting that is for one sort of source has such a source."""
    if data.sample_by != "line" and not any(source.reads_sample_by for source in sources):
        expected = "line, for no source has text files (.txt)"
        fix = "take it out; the rows of other files are as they were written"
        raise InputError("data.sample_by", found=data.sample_by, expected=expected, fix=fix)


def _settle(
    name: str, first: Iterable[RawRow], settings: SourceSettings, *, skips: bool = False
) -> tuple[Layout, bool]:
    """How a source's rows are to be read, as its first ones say, and whether they become chats.

    Where rows that cannot be read are left out (`skips`), the first ones that can tell.
    """
    rows: list[Row] = []
    problem: RowError | None = None
    for raw in first if skips else islice(first, SEEN_FOR_DETECTION):
        try:
            rows.append(raw.parse())
        except RowError as error:
            problem = problem or error
        if len(rows) == SEEN_FOR_DETECTION:
            break
    if not rows:
        raise problem or InputError(
            name, found="no rows", expected="at least one", fix="check that the file was written completely"
        )
    format = settings.format
    if format == "auto":
        format = detect_format(rows, settings.fields, skips=skips)
    column = settings.fields.get("prompt", "prompt")
    prompt = next((row.fields[column] for row in rows if column in row.fields), None)
    is_chat = format not in ("text", "prompt_completion") or (
        format == "prompt_completion" and isinstance(prompt, list)
    )
    return Layout(format, settings.fields, settings.roles), is_chat


def _check_names(name: str, settings: SourceSettings, layout: Layout, is_chat: bool) -> None:
    """Check that every name that is mapped is one that such rows have a use for."""
    known = layout.known_fields
    if unknown := sorted(settings.fields.keys() - set(known)):
        where, expected = f"data.fields, for {name}", f"{layout.format}'s fields: {', '.join(known)}"
        raise InputError(where, found=", ".join(unknown), expected=expected, fix="take them out, or set data.format")
    if settings.roles and not (is_chat and layout.format != "alpaca"):
        fix = "take them out, or set data.format"
        raise InputError(f"data.roles, for {name}", found=f"roles for rows without ({layout.format})", fix=fix)


def _settled(
    data: DataSettings, layouts: Sequence[Layout], chats: Sequence[bool], template: ChatTemplate | None
) -> DataSettings:
    """The settings as they turned out, so that the resolved file says what was read, and how."""
    update: dict[str, object] = {"format": layouts[0].format}
    if data.sources:
        pairs = zip(data.sources, layouts, strict=False)
        sources = [source.model_copy(update={"format": layout.format}) for source, layout in pairs]
        update = {"sources": tuple(sources)}
    if template:
        update["chat_template"] = template.name
    learned = {"assistant" if chat else LEARNED[layout.format] for layout, chat in zip(layouts, chats, strict=True)}
    if data.loss_on == "auto" and len(learned) == 1:
        update["loss_on"] = learned.pop()
    return data.model_copy(update=update)


def _tokenized(source: Source, recipe: Recipe, data: DataSettings, kept: Kept, console: Console) -> TokenStore:
    store = kept.find(source, recipe, data)
    if store is None:
        with progress_bar(console) as progress:
            task = progress.add_task(f"tokenizing {source.name}", total=source.num_rows)
            chunks = tokenize_all(islice(source.rows(), data.max_rows), recipe, data.num_proc)
            store = kept.write(source, recipe, data, chunks, lambda done: progress.update(task, completed=done))
    console.print(summary(source.name, recipe.layout.format, store, data.max_seq_length))
    return store


def summary(name: str, format: Format, store: TokenStore, max_seq_length: int) -> str:
    """One line about a source; more where rows were left out."""
    report, tokens = store.report, int(store.lengths.sum())
    parts = [
        f"{name}: {len(store):,} rows ({format}), {tokens:,} tokens, {int(store.supervised.sum()) / tokens:.0%} supervised",
        f"{report.num_truncated:,} cut to {max_seq_length} tokens" if report.num_truncated else "",
        f"{report.num_split:,} turns as rows of their own, because the chat template rewrites them"
        if report.num_split
        else "",
        f"{report.num_duplicates:,} duplicates" if report.num_duplicates else "",
    ]
    skipped = [
        f"\n  skipped {count:,}: {kind}, first {report.first_skipped[kind]}" for kind, count in report.skipped.items()
    ]
    unused = f"\n  not used: {_fields(report.unused)}" if report.unused else ""
    return ", ".join(part for part in parts if part) + "".join(skipped) + unused


def _fields(unused: Counter[str]) -> str:
    """Names of fields with the number of rows that have them, the commonest first."""
    counted = sorted(unused.items(), key=lambda item: (-item[1], item[0]))
    shown = [f"{name} ({count:,} rows)" for name, count in counted[:UNUSED_SHOWN]]
    return ", ".join(shown) + (f" and {len(counted) - len(shown)} more" if len(counted) > len(shown) else "")


def _hold_out(rows: Selection, fraction: float, seed: int, console: Console) -> tuple[Selection, Selection]:
    if len(rows) < 2:
        raise InputError("data.eval_fraction", found=f"{fraction} of {len(rows)} row", expected="at least two rows")
    rows, held_out = rows.hold_out(fraction, seed)
    if not all(rows.sizes):
        found = f"{fraction}, which leaves a source without a row to train on"
        raise InputError("data.eval_fraction", found=found, fix="hold out less, or give data.eval_path")
    console.print(f"held out: {len(held_out):,} rows, {len(rows):,} to train on")
    return rows, held_out
