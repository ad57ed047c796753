"""Every setting, once: typed, validated, under the names users know from BitsAndBytesConfig, LoraConfig and TrainingArguments.

A YAML file and `section.key=value` overrides meet in one frozen `Config`; whatever is wrong with them is gathered and raised once.
"""

import difflib
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pydantic
import yaml

from qlora_jax.base.errors import InputError
from qlora_jax.base.reading import is_unicode, parse_yaml, read_text, shown
from qlora_jax.base.units import parse_bytes
from qlora_jax.config.data import DataSettings
from qlora_jax.config.section import Section, UserPath, UserText

MAX_SETTINGS_BYTES = 2**20
MAX_PATTERN = 1000
"""Characters of an entry of `lora.target_modules`."""
Where = Literal["auto", "device", "host"]
Tracker = Literal["tensorboard", "wandb"]


class ModelSettings(Section):
    """The base model."""

    name_or_path: UserText
    """A Hugging Face hub id, or a folder with `config.json`, safetensors and a tokenizer; unquantized, or in bitsandbytes' 4 bits."""
    dtype: Literal["bfloat16"] = "bfloat16"
    """The dtype a weight is cast to before it is quantized, and rounded to when it is dequantized."""
    requantize: bool = False
    """Allow a model that an adapter was merged into after quantization to be quantized again, which undoes most of that adapter's update;
    refused otherwise, see `convert.jobs.requantize`."""


class QuantizationSettings(Section):
    """As in BitsAndBytesConfig: `bnb_4bit_quant_type`, `bnb_4bit_use_double_quant`. A model in 4 bits already brings its own."""

    quant_type: Literal["nf4", "fp4"] = "nf4"
    double_quant: bool = True


class LoraSettings(Section):
    """Adapter settings; names and meaning as in peft's LoraConfig."""

    r: pydantic.PositiveInt = 64
    lora_alpha: float = pydantic.Field(default=16.0, gt=0)
    lora_dropout: float = pydantic.Field(default=0.05, ge=0, lt=1)
    target_modules: str | tuple[str, ...] | None = "all-linear"
    """`all-linear`; a list of linears' names; a regular expression that a linear's whole path matches; or null for PEFT's own choice."""
    use_rslora: bool = False
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of adapters and their gradients between steps. bfloat16, peft's `autocast_adapter_dtype=False`, takes half the memory and traffic;
    the update is computed in float32 and rounded, so that steps under 1/256 of a value are lost. Micro-batches are summed in float32."""
    init_from: UserPath | None = None
    """An adapter's folder, ours or a plain one of PEFT's, to train further. r, lora_alpha, target_modules, use_rslora and the
    quantization it was trained on then come from it."""

    @property
    def scaling(self) -> float:
        """The factor on B·A: alpha / r, or alpha / sqrt(r) with rsLoRA."""
        return self.lora_alpha / (self.r**0.5 if self.use_rslora else self.r)

    def targets(self, linears: Iterable[str]) -> tuple[str, ...]:
        """The linears of a decoder layer that carry an adapter, in the layer's own order.

        Args:
            linears: the names of all that it has. What `target_modules` says besides `all-linear` and names is resolved against the
                model before: see `convert.adapters.targets`.
        """
        if self.target_modules == "all-linear":
            return tuple(linears)
        names = self.target_modules if isinstance(self.target_modules, tuple) else ()
        if not names:
            raise ValueError(f"target_modules {self.target_modules!r} is not resolved")
        return tuple(name for name in linears if name in names)

    @pydantic.field_validator("target_modules", mode="before")
    @classmethod
    def _all_linear_or_names(cls, value: Any) -> Any:
        names = [value] if isinstance(value, str) else value
        if value is None or (isinstance(names, list | tuple) and names and all(_is_name(name) for name in names)):
            return value
        raise ValueError("expected all-linear, a list of linears' names such as q_proj, a regular expression, or null")


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= MAX_PATTERN and is_unicode(value)


class TrainingSettings(Section):
    """The run; names and meaning as in transformers' TrainingArguments."""

    output_dir: UserPath
    per_device_train_batch_size: pydantic.PositiveInt = 1
    per_device_eval_batch_size: pydantic.PositiveInt = 4
    gradient_accumulation_steps: pydantic.PositiveInt = 16
    learning_rate: float = pydantic.Field(default=2e-4, gt=0)
    lr_scheduler_type: Literal["constant", "constant_with_warmup", "linear", "cosine"] = "constant"
    warmup_ratio: float = pydantic.Field(default=0.0, ge=0, le=1)
    max_steps: int = pydantic.Field(default=-1, ge=-1)
    """Optimizer steps; -1 means `num_train_epochs` decides."""
    num_train_epochs: float = pydantic.Field(default=1.0, gt=0)
    max_grad_norm: float = pydantic.Field(default=0.3, ge=0)
    """Clip the gradient's global norm to this; 0 means never."""
    weight_decay: float = pydantic.Field(default=0.0, ge=0)
    adam_beta1: float = pydantic.Field(default=0.9, ge=0, lt=1)
    adam_beta2: float = pydantic.Field(default=0.999, ge=0, lt=1)
    adam_epsilon: float = pydantic.Field(default=1e-8, gt=0)
    optim: Literal["adamw", "paged_adamw_32bit", "paged_adamw_8bit"] = "paged_adamw_32bit"
    logging_steps: pydantic.PositiveInt = 1
    eval_steps: int = pydantic.Field(default=0, ge=0)
    """Evaluate every so many steps; 0 means before the first and after the last step only."""
    group_by_length: bool = False
    """Make steps of rows of about the same length, so that less of a batch is padding; the order is a little less random."""
    neftune_noise_alpha: float = pydantic.Field(default=0.0, ge=0)
    """NEFTune: uniform noise within ± this / sqrt(T·D) on the embedded tokens while training; 0 means none, 5 to 15 are usual."""
    seed: int = pydantic.Field(default=0, ge=0)
    full_determinism: bool = False
    """On a GPU, use only kernels whose sums have a fixed order: the same bits in every run, wherever things live, for about 8 % of
    the speed. A CPU's results always have the same bits."""
    save_steps: int = pydantic.Field(default=500, ge=0)
    """Save a checkpoint every so many steps; 0 means by time only."""
    save_interval_minutes: float = pydantic.Field(default=15.0, ge=0)
    """And whenever so long has gone by since the last; 0 means by steps only. With both at 0 only a stopped run saves."""
    save_total_limit: pydantic.PositiveInt = 2
    """Checkpoints to keep, the newest; one more exists while it is being written."""
    resume: Literal["auto", "never"] = "auto"
    """`auto` continues the run in `output_dir` from its newest checkpoint, if there is one."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """A step whose loss or gradient is not finite changes nothing: the run stops there, or goes on without it."""
    load_best_model_at_end: bool = False
    """`adapter/` is then the adapter with the lowest evaluation loss, which `best/` holds, not the last one."""
    early_stopping_patience: int = pydantic.Field(default=0, ge=0)
    """Stop when so many evaluations in a row were no better than the best; 0 means never."""
    early_stopping_threshold: float = pydantic.Field(default=0.0, ge=0)
    """An evaluation is better if its loss is lower by more than this."""
    report_to: tuple[Tracker, ...] = ()
    """Where metrics go besides metrics.jsonl: tensorboard, wandb, or both."""
    run_name: str | None = None
    """The run's name in Weights & Biases; by default that of `output_dir`."""
    export_merged: bool = False
    merge_base: Literal["auto", "original", "dequantized"] = "auto"
    """Weights that `export_merged` adds the adapter to: `auto` is the original ones, or the dequantized ones where the model is in 4 bits
    and has no others; see `python -m convert.merge --help`."""
    gradient_checkpointing: Literal["auto", "full", "none"] = "auto"
    """`full` runs each layer again in the backward walk (but the last, if its intermediates find room where others work), `none` keeps them
    instead; `auto`: the plan decides how many layers do."""
    compute_dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    sample_prompt: str | tuple[str, ...] | None = None
    """A prompt, or a list of them, answered before and after training and every `eval_steps`, so that the change can be read."""
    sample_max_new_tokens: pydantic.PositiveInt = 64
    overwrite_output_dir: bool = False
    """Allow a run to replace the finished run in `output_dir`."""

    @property
    def sample_prompts(self) -> tuple[str, ...]:
        """`sample_prompt` as a list."""
        given = self.sample_prompt or ()
        return (given,) if isinstance(given, str) else given

    @pydantic.field_validator("report_to", mode="before")
    @classmethod
    def _one_or_none(cls, value: Any) -> Any:
        return () if value in ("none", None) else (value,) if isinstance(value, str) else value

    @pydantic.field_validator("max_steps")
    @classmethod
    def _not_zero(cls, value: int) -> int:
        if value == 0:
            raise ValueError("0 steps train nothing; use -1 to let num_train_epochs decide")
        return value


class MemorySettings(Section):
    """Where things live; the plan decides what is `auto`. `host` is pinned memory that the device reads while it computes."""

    device_memory: Literal["auto"] | str = "auto"
    """The GPU's memory that this process may take, e.g. 24GiB: all that is free by default, less to play a smaller card."""
    base_weights: Literal["auto", "device", "host", "disk"] = "auto"
    """`disk` reads each layer anew whenever it is needed, a few ahead: for a base model bigger than the host's memory."""
    resident_layers: Literal["auto"] | pydantic.NonNegativeInt = "auto"
    """How many layers stay on the device, spread evenly among those that are streamed, where `base_weights` is not `device`."""
    kept_layers: Literal["auto"] | pydantic.NonNegativeInt = "auto"
    """How many layers, the last ones, keep their intermediates where `gradient_checkpointing` is `auto`. A continued run keeps as many."""
    activations: Where = "auto"
    """The layer inputs kept for the backward walk."""
    adapters: Where = "auto"
    """The adapters and their gradients; on the host they visit the device with their layer."""
    optimizer: Where = "auto"
    """AdamW's moments."""

    @pydantic.field_validator("device_memory")
    @classmethod
    def _a_size(cls, value: str) -> str:
        if value != "auto":
            parse_bytes(value)
        return value


class Config(Section):
    """A whole run. `load_config` reads one; `to_yaml` writes the resolved one back."""

    model: ModelSettings
    quantization: QuantizationSettings = QuantizationSettings()
    lora: LoraSettings = LoraSettings()
    data: DataSettings
    training: TrainingSettings
    memory: MemorySettings = MemorySettings()

    def to_yaml(self) -> str:
        """The resolved settings; `load_config` reads the text back to an equal `Config`."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


KIND = re.compile(r"(literal|constrained-\w+|tuple|list|function-\w+)\b|(str|int|float|bool)$")
"""What pydantic adds to a setting's name where it may be one of several kinds."""

NOT_YET = {
    "lora": {"use_dora", "rank_pattern", "alpha_pattern", "modules_to_save"},
}
"""Settings of the design that no code serves yet: refused by name, never ignored."""


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, apply `section.key=value` overrides and validate.

    Raises:
        InputError: the file is missing or not YAML, or any setting is unknown, missing or of the wrong type (all at once).
    """
    expected, fix = "a YAML file of settings", "see configs/ for examples"
    text = read_text(path, at_most=MAX_SETTINGS_BYTES, expected=expected, fix=fix)
    settings = parse_yaml(text, path, fix="mend the file; see configs/quickstart.yaml")
    if not isinstance(settings, dict):
        raise InputError(
            path, found=f"a {type(settings).__name__}", expected="sections such as `model:` and `training:`"
        )
    for override in overrides:
        _apply(settings, override)
    for text in filter(lambda text: not is_unicode(text) or "\0" in text, _texts(settings)):
        raise InputError(path, found=f"{shown(text)}, which has halves of characters or zero bytes", expected="text")
    try:
        return Config.model_validate(settings)
    except pydantic.ValidationError as error:
        raise InputError(path, found="settings that cannot be used\n" + "\n".join(_explain(error))) from None


def _texts(value: Any) -> Iterator[str]:
    """Every text in the settings, keys too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list):
        for inner in itertools.chain(value, value.values()) if isinstance(value, Mapping) else value:
            yield from _texts(inner)


def _apply(settings: dict[str, Any], override: str) -> None:
    name, equals, value = override.partition("=")
    section, dot, key = name.partition(".")
    if not (equals and dot and key):
        raise InputError(
            override, found="an override without `section.key=value`", expected="e.g. training.max_steps=20"
        )
    group = settings.setdefault(section, {})
    if not isinstance(group, dict):
        raise InputError(
            override, found=f"`{section}` is not a section", expected=f"one of {', '.join(Config.model_fields)}"
        )
    try:
        group[key] = parse_yaml(value, override)
    except InputError:
        fix = "quote it, e.g. key='\"text\"'"
        raise InputError(override, found=f"{value!r} is not a YAML value", fix=fix) from None


def _explain(error: pydantic.ValidationError) -> list[str]:
    """A line for each setting: its name, what is wrong, what was found. Of a setting that may be several things, what each would be."""
    problems: dict[str, list[str]] = {}
    found: dict[str, str] = {}
    for one in error.errors():
        location = [str(part) for part in one["loc"] if not (isinstance(part, str) and KIND.match(part))]
        name = ".".join(location)
        problems.setdefault(name, []).append(_problem(one, location))
        is_section = isinstance(one["input"], dict) and one["type"] == "value_error"
        if one["type"] not in ("extra_forbidden", "missing") and not is_section:
            found[name] = f", found {shown(one['input'])}"
    return [
        f"    {name}: {' or '.join(dict.fromkeys(messages))}{found.get(name, '')}"
        for name, messages in problems.items()
    ]


def _problem(error: Any, location: list[str]) -> str:
    if error["type"] == "extra_forbidden":
        is_known = location[-1] in NOT_YET.get(location[0], ())
        return "not available in this version" if is_known else f"unknown setting{_nearest(location)}"
    if error["type"] == "missing":
        return "missing, and it has no default"
    message = error["msg"].removeprefix("Value error, ")
    return f"{message[:1].lower()}{message[1:]}"


def _nearest(location: list[str]) -> str:
    """`; did you mean ...?` for an unknown key, looking in its own section first, then everywhere."""
    known = {key: section for section, field in Config.model_fields.items() for key in _keys(field.annotation)}
    own = _keys(Config.model_fields[location[0]].annotation) if len(location) > 1 else []
    known |= dict.fromkeys(own, location[0])  # some keys are in several sections
    candidates = own if len(location) > 1 else list(Config.model_fields)
    close = difflib.get_close_matches(location[-1], candidates, n=1) or difflib.get_close_matches(
        location[-1], known, n=1
    )
    if not close:
        return f"; known here: {', '.join(candidates)}"
    section = f"{known[close[0]]}." if close[0] in known else ""
    return f"; did you mean {section}{close[0]}?"


def _keys(section: Any) -> list[str]:
    return list(section.model_fields)
