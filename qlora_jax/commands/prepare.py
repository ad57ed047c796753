"""What a run is made of before anything is loaded: settings resolved once, model, rows, plan, and room on the disk."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console

from convert.adapters.adapter import Adapter, load_adapter, plain_settings
from convert.adapters.delta import resolve_base
from convert.adapters.targets import resolve_targets
from convert.cache import is_kept
from convert.files.identity import model_identity
from convert.files.prequantized import extra_bytes, settle
from convert.hub import cache_dir
from convert.jobs.requantize import check_requantize
from convert.merge import check_base
from convert.model import BaseModel, open_model
from convert.stops import Conversation, open_conversation
from qlora_jax.base.console import Phases
from qlora_jax.base.errors import InputError
from qlora_jax.commands.plan import plan_run, resolved, show
from qlora_jax.commands.space import show_space, space_of
from qlora_jax.config import Config, LoraSettings
from qlora_jax.config.changes import check_changes, check_identity, work_changes
from qlora_jax.data import Batch, Batches
from qlora_jax.data.corpus import Corpus, load_corpus
from qlora_jax.data.preview import preview
from qlora_jax.model.architecture import Architecture
from qlora_jax.planning.budget import Plan
from qlora_jax.planning.disk import Space
from qlora_jax.training.checkpoint import Checkpoint
from qlora_jax.training.output_dir import OutputDir
from qlora_jax.training.trainer import check_evaluation


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreparedRun:
    """A run that can be executed: its settings with every choice made, and what was opened and decided on the way."""

    config: Config
    """Resolved: nothing is `auto` any more."""
    asked: Config
    """The settings as they were before the plan, for advice where memory runs out."""
    model: BaseModel
    start: Adapter | None
    """The adapter that training begins with, if it is not a fresh one."""
    conversation: Conversation
    training: Batches
    held_out: Sequence[Batch]
    plan: Plan
    space: Space
    resumed: Checkpoint | None
    about: Mapping[str, Any]
    """What each checkpoint says of the run."""
    folder: OutputDir
    console: Console
    phases: Phases


def prepare(config: Config, folder: OutputDir, console: Console, phases: Phases) -> PreparedRun:
    """Open and decide everything that a run depends on, and print it. Nothing is written into its folder yet.

    Raises:
        InputError: something that was given cannot be used, or does not fit the machine.
    """
    folder.look()
    with phases.time("checking"):
        resumed = folder.newest(console.print)
    with phases.time("model"):
        model = open_model(config.model.name_or_path, log=console.print)
        check_training(model, config.data.max_seq_length, console)
        config, start = settle_adapter(config, model)
        config = settle_base(settle_quantization(config, model, console), model, console)
    with phases.time("data"):
        corpus = load_corpus(config, model.tokenizer, cache_dir() / "tokenized", console, model.limits)
        conversation = conversation_of(config, model, corpus)
        asked, training, held_out = corpus.config, corpus.batches(), corpus.eval_batches()
    preview(corpus, console, asked.data.preview_rows)
    check_evaluation(asked.training, held_out)
    folder.refuse_nothing_to_do(resumed, len(training))
    with phases.time("planning"):
        on_disk = is_kept(model.folder, model.name_or_path, asked.quantization)
        extra = extra_bytes(model.folder, asked.quantization)
        plan = plan_as_before(asked, model.config, training.longest, resumed, on_disk=on_disk, extra=extra)
    show(plan, console, len(training))
    config = resolved(asked, plan)
    space = space_of(config, plan.job, len(training), model.folder, model.name_or_path)
    show_space(space, console)
    space.check()
    about = about_run(config, model, training, plan)
    continued(resumed, folder, about, console)
    return PreparedRun(
        config=config, asked=asked, model=model, start=start, conversation=conversation, training=training, held_out=held_out,
        plan=plan, space=space, resumed=resumed, about=about, folder=folder, console=console, phases=phases,
    )  # fmt: skip


def about_run(config: Config, model: BaseModel, training: Batches, plan: Plan) -> dict[str, Any]:
    """What a checkpoint says of its run: the settings, and what tells base and data from others."""
    identity = {"base model": model_identity(model.folder), "data": training.fingerprint()}
    work = {name: getattr(plan.layout, name) for name in ("keep", "share_dense", "mlp_tokens")}
    return {"config": config.model_dump(mode="json"), "identity": identity, "work": work}


def plan_as_before(
    config: Config,
    shape: Architecture,
    length: int,
    resumed: Checkpoint | None,
    *,
    on_disk: bool = False,
    extra: Sequence[int] = (),
) -> Plan:
    """The plan, see `plan_run`.

    A continued run keeps the intermediates of as many layers as before, if it can, because that decides the last bits.
    """
    before = resumed.about.get("work", {}).get("keep") if resumed else None
    return plan_run(config, shape, length, on_disk=on_disk, kept_before=before, extra_bytes=extra)


def continued(resumed: Checkpoint | None, folder: OutputDir, about: Mapping[str, Any], console: Console) -> None:
    """Check that a run that is continued can go on, and say what is not as it was.

    Raises:
        InputError: it is another run: other settings, another base model, other data; or what it needs is gone.
    """
    if resumed is None:
        return
    check_identity(resumed.path, resumed.about["identity"], about["identity"])
    changed = check_changes(resumed.path, resumed.about["config"], about["config"])
    for line in changed + work_changes(resumed.about.get("work", {}), about["work"]):
        console.print(f"changed: {line}")
    if line := folder.check_best(resumed):
        console.print(line)


def conversation_of(config: Config, model: BaseModel, corpus: Corpus) -> Conversation:
    """How the sample prompts are put, and where the trained model's turns end.

    Raises:
        InputError: the model's generation config is damaged, or a sample prompt has a token that the model has no row for.
    """
    conversation = open_conversation(model.folder, model.tokenizer, model.config.vocab_size, template=corpus.template)
    for prompt in config.training.sample_prompts:
        conversation.prompt_ids(prompt, model.config.vocab_size)
    return conversation


def check_training(model: BaseModel, longest: int, console: Console) -> None:
    """Refuse a model that transformers would train otherwise: with dropout of its own, or with rows for which its facts do not hold.

    Raises:
        InputError: `config.json` has a dropout that is not left out for its whole family, or rows may be longer than it allows.
    """
    facts, where = model.config, model.folder.path / "config.json"
    dropouts = [
        (key, rate) for key, rate in (("attention_dropout", facts.attention_dropout), *facts.other_dropouts) if rate
    ]
    said = " and ".join(f"{key} is {rate}" for key, rate in dropouts)
    if dropouts and not facts.dropouts_are_left_out:
        raise InputError(
            where,
            found=f"{said}, not supported in training",
            expected="0.0",
            fix="set it to 0.0 there to train without; lora.lora_dropout regularizes the adapter",
        )
    if dropouts:
        console.print(f"{said} in {where}: left out; lora.lora_dropout regularizes the adapter")
    if facts.max_length is not None and longest > facts.max_length:
        raise InputError(
            "data.max_seq_length",
            found=f"{longest}, but {where} says how positions are embedded up to {facts.max_length}, and beyond otherwise",
            expected=f"at most {facts.max_length}",
            fix=f"set data.max_seq_length to {facts.max_length} or less",
        )


def settle_adapter(config: Config, model: BaseModel) -> tuple[Config, Adapter | None]:
    """The settings with those of the adapter that `lora.init_from` names, and that adapter, its tensors not read yet.

    Without one, `lora.target_modules` is resolved against the model.

    Raises:
        InputError: it cannot be used, or settings given by name contradict it (all at once).
    """
    if config.lora.init_from is None:
        return config.model_copy(update={"lora": resolve_targets(config.lora, model.config)}), None
    adapter = load_adapter(config.lora.init_from, model.config, model.folder)
    own = plain_settings(adapter, model.config)
    lora = {key: getattr(own, key) for key in ("r", "lora_alpha", "use_rslora", "target_modules")}
    quantization = {key: getattr(adapter.quantization, key) for key in adapter.quantization.model_fields_set}
    problems = [
        f"{section}.{key} is {getattr(asked, key)!r}, the adapter's is {value!r}"
        for section, asked, values in (("lora", config.lora, lora), ("quantization", config.quantization, quantization))
        for key, value in values.items()
        if key in asked.model_fields_set
        and (not _equal_targets(asked, own, model.config) if key == "target_modules" else getattr(asked, key) != value)
    ]
    if problems:
        raise InputError(
            config.lora.init_from,
            found="an adapter that the settings contradict: " + "; ".join(problems),
            fix="leave these settings out: they come from the adapter",
        )
    update = {
        "lora": config.lora.model_copy(update=lora),
        "quantization": config.quantization.model_copy(update=quantization),
    }
    return config.model_copy(update=update), adapter


def _equal_targets(one: LoraSettings, other: LoraSettings, config: Architecture) -> bool:
    """Whether settings adapt the same linears of a model."""
    return resolve_targets(one, config).targets(config.linears) == other.targets(config.linears)


def settle_quantization(config: Config, model: BaseModel, console: Console) -> Config:
    """The settings with the model folder's own quantization, where it is in 4 bits already."""
    if not model.folder.is_4bit:
        return config
    fix = "leave these settings out, or give the unquantized model"
    where = f"settings quantization.*, model {model.name_or_path}"
    quantization = settle(model.folder, config.quantization, where=where, fix=fix)
    if config.training.export_merged:
        # Now, not when the training is done.
        check_base(model.folder, resolve_base(config.training.merge_base, model.folder))
    double = ", double quantization" if quantization.double_quant else ""
    console.print(f"{model.folder.path} is in 4 bits already ({quantization.quant_type}{double}): used as it is")
    return config.model_copy(update={"quantization": quantization})


def settle_base(config: Config, model: BaseModel, console: Console) -> Config:
    """Return the settings with the base of `merged/` resolved, after a check that quantizing the model undoes nothing.

    Raises:
        InputError: the model was merged into a dequantized base, and `model.requantize` is not set.
    """
    accepted = config.model.requantize
    check_requantize(
        model.folder, config.quantization, accepted=accepted, accept="model.requantize=true", log=console.print
    )
    base = resolve_base(config.training.merge_base, model.folder)
    return config.model_copy(update={"training": config.training.model_copy(update={"merge_base": base})})
