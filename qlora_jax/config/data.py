"""The `data` settings: where rows come from, how they are read, what of them is learned."""

from pathlib import Path
from typing import Literal, Self

import pydantic

from qlora_jax.config.section import Section, UserText

Format = Literal["text", "alpaca", "prompt_completion", "chat", "sharegpt", "openassistant"]
AutoFormat = Literal["auto", Format]
LossOn = Literal["auto", "assistant", "last_assistant", "completion", "all"]

MAX_ROW_BYTES = 2**22
"""Bytes of a row, unless data.max_row_bytes says otherwise: some million tokens."""


class SourceSettings(Section):
    """One source of rows, where several are mixed."""

    path: UserText
    """A file (JSONL, JSON, CSV, TSV, Parquet, text), a folder of files, or the id of a dataset on the Hugging Face hub."""
    name: str | None = None
    """The configuration of a hub dataset, or of a local copy of one, where it has several."""
    split: str = "train"
    """A split, as `datasets` reads it: `train`, `train[:5%]`, `train+test`. A folder's splits are those that `datasets` finds by its
    README and its files' names; a file is `train`."""
    format: AutoFormat = "auto"
    fields: dict[str, str] = pydantic.Field(default_factory=dict)
    """The data's own names: {prompt: question, completion: answer}; for messages also {role: speaker, content: said}."""
    roles: dict[str, str] = pydantic.Field(default_factory=dict)
    """Roles as the data names them, to those of the template: {customer: user, agent: assistant}."""
    weight: float | None = pydantic.Field(default=None, gt=0)
    """The source's share of every epoch, relative to the others'. Without weights each row is seen once an epoch."""


class DataSettings(SourceSettings):
    """What to train on, and how it becomes tokens. One source is named here; several are listed in `sources`."""

    path: UserText | None = None  # type: ignore[assignment]
    weight: None = None
    sources: tuple[SourceSettings, ...] = ()
    """Several sources in place of `path`, each with settings of its own: [{path: a.jsonl, weight: 2}, {path: b.jsonl, weight: 1}]."""
    eval_path: UserText | None = None
    """Held-out rows: another source, in the same format and split unless `eval_split` says otherwise; all of it, if it is a file."""
    eval_split: str | None = None
    """A split of `eval_path`, or of `path` where that is not given."""
    eval_fraction: float = pydantic.Field(default=0.0, ge=0, lt=1)
    """Hold this share of the training rows out, chosen by `training.seed`."""
    streaming: bool = False
    """Read a hub dataset as it arrives, without a copy of it on the disk: only its tokens are kept there. Files are always read so."""
    max_rows: pydantic.PositiveInt | None = None
    """Read only so many rows of each source."""
    max_row_bytes: pydantic.PositiveInt = MAX_ROW_BYTES
    """Rows of more bytes are bad rows, and are not read whole: tokenizing one takes up to two hundred times its bytes."""
    sample_by: Literal["line", "paragraph", "document"] = "line"
    """What a row of a text file is."""
    chat_template: UserText = "auto"
    """`auto`: the model's own, or for one without: alpaca's for alpaca rows, Llama 2's otherwise. Or model, chatml, llama-2, alpaca,
    or a file with a Jinja template."""
    loss_on: LossOn = "auto"
    """Which tokens are learned. `auto`: the assistant's turns of a chat, a prompt's completion, all of a text."""
    max_seq_length: pydantic.PositiveInt = 512
    too_long: Literal["truncate", "skip", "stop"] = "truncate"
    """What to do with rows of more tokens: cut them on the right, leave them out, or refuse them."""
    bad_rows: Literal["stop", "skip"] = "stop"
    """What to do with rows that cannot be used: name them and stop, or count them and go on."""
    duplicates: Literal["keep", "skip", "stop"] = "keep"
    """What to do with a row that repeats an earlier one to the token. They are counted in any case."""
    packing: bool = False
    """Lay rows end to end into lines of max_seq_length tokens. No row sees another."""
    num_proc: pydantic.PositiveInt | None = None
    """Processes that tokenize; every core has one unless this says otherwise. It does not change the result."""
    preview_rows: int = pydantic.Field(default=1, ge=0)
    """Rows that are shown before training; 0 leaves the whole preview out."""

    @pydantic.field_validator("weight", mode="before")
    @classmethod
    def _no_weight(cls, value: object) -> None:
        if value is not None:
            raise ValueError("weights are for those that data.sources lists; one source alone has none")

    @pydantic.model_validator(mode="after")
    def _one_way_to_say_it(self) -> Self:
        if (self.path is None) == (not self.sources):
            raise ValueError("name one source with data.path, or list several in data.sources")
        alone = {"name", "split", "format", "fields", "roles"} & self.model_fields_set
        if self.sources and alone and (alone != {"format"} or self.format != "auto"):
            raise ValueError(f"data.sources is a list of sources: give each its own {', '.join(sorted(alone))}")
        if len({source.weight is None for source in self.sources}) > 1:
            raise ValueError("data.sources: give every source a weight, or none")
        if self.eval_fraction and (self.eval_path or self.eval_split):
            raise ValueError(
                "data.eval_fraction holds training rows out, and eval_path or eval_split names others: give one"
            )
        if self.eval_split and not (self.eval_path or self.path):
            raise ValueError("data.eval_split is a split of data.eval_path or data.path: give one")
        return self

    @property
    def all_sources(self) -> tuple[SourceSettings, ...]:
        """Every source to train on."""
        return self.sources or (self._source(self.path, self.split, self.name),)

    @property
    def eval_source(self) -> SourceSettings | None:
        """The held-out rows' source, if they have one of their own."""
        if not (self.eval_path or self.eval_split):
            return None
        if self.eval_path and Path(self.eval_path).is_file():  # which has neither splits nor configurations
            return self._source(self.eval_path, self.eval_split or "train", None)
        return self._source(self.eval_path or self.path, self.eval_split or self.split, self.name)

    def _source(self, path: str | None, split: str, name: str | None) -> SourceSettings:
        assert path is not None, "`_one_way_to_say_it` has seen to that"
        return SourceSettings(
            path=path, name=name, split=split, format=self.format, fields=self.fields, roles=self.roles
        )
