"""The `data` settings: where rows come from, how they are read, what of them is learned."""

from typing import Literal, Self

import pydantic

from qlora_jax.config.section import Section

Format = Literal["text", "alpaca", "prompt_completion", "chat", "sharegpt", "openassistant"]
AutoFormat = Literal["auto", Format]
LossOn = Literal["auto", "assistant", "last_assistant", "completion", "all"]


class SourceSettings(Section):
    """One source of rows, where several are mixed."""

    path: str
    """A file (JSONL, JSON, CSV, TSV, Parquet, text), a folder of files, or the id of a dataset on the Hugging Face hub."""
    name: str | None = None
    """A hub dataset's configuration, where it has several."""
    split: str = "train"
    """A hub dataset's split, as `datasets` reads it: `train`, `train[:5%]`."""
    format: AutoFormat = "auto"
    fields: dict[str, str] = pydantic.Field(default_factory=dict)
    """The data's own names: {prompt: question, completion: answer}; for messages also {role: speaker, content: said}."""
    roles: dict[str, str] = pydantic.Field(default_factory=dict)
    """Roles as the data names them, to those of the template: {customer: user, agent: assistant}."""
    weight: float | None = pydantic.Field(default=None, gt=0)
    """The source's share of every epoch, relative to the others'. Without weights each row is seen once an epoch."""


class DataSettings(SourceSettings):
    """What to train on, and how it becomes tokens. One source is named here; several are listed in `sources`."""

    path: str | None = None
    weight: None = None
    sources: tuple[SourceSettings, ...] = ()
    eval_path: str | None = None
    """Held-out rows: another source, in the same format and split unless `eval_split` says otherwise."""
    eval_split: str | None = None
    """A split of `eval_path`, or of `path` where that is not given."""
    eval_fraction: float = pydantic.Field(default=0.0, ge=0, lt=1)
    """Hold this share of the training rows out, chosen by `training.seed`."""
    streaming: bool = False
    """Read a hub dataset as it arrives, without a copy of it on the disk: only its tokens are kept there."""
    max_rows: pydantic.PositiveInt | None = None
    """Read only so many rows of each source."""
    sample_by: Literal["line", "paragraph", "document"] = "line"
    """What a row of a text file is."""
    chat_template: str = "auto"
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
        return self.sources or (self._source(self.path, self.split),)

    @property
    def eval_source(self) -> SourceSettings | None:
        """The held-out rows' source, if they have one of their own."""
        if not (self.eval_path or self.eval_split):
            return None
        return self._source(self.eval_path or self.path, self.eval_split or self.split)

    def _source(self, path: str, split: str) -> SourceSettings:
        return SourceSettings(
            path=path, name=self.name, split=split, format=self.format, fields=self.fields, roles=self.roles
        )
