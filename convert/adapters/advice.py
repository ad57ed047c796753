"""What to do about an adapter whose tensors do not fit: one piece of advice for each kind of problem that there is."""

from collections.abc import Sequence
from pathlib import Path

from convert.adapters.config import AdapterConfig
from convert.adapters.tensors import Problem
from convert.files.folder import ModelFolder
from qlora_jax.base.errors import InputError, shown
from qlora_jax.model.architecture import Architecture

MAX_PROBLEMS = 20
_OTHER_FILE = "put the adapter_config.json that was saved with these tensors beside them: this one is another's, or was changed since"
_SIMPLE = {
    "empty": "fetch or save the adapter again: its file was written without tensors",
    "rank": _OTHER_FILE,
    "not a target": _OTHER_FILE,
    "named by state_dict": (
        "save it with PEFT's save_pretrained: these are names of a model's state_dict(), or another program's, which PEFT does not load "
        "either"
    ),
    "unknown": "save it with PEFT's save_pretrained: PEFT does not write these names for LoRA",
    "not gathered": (
        "save it again with its parameters gathered: DeepSpeed ZeRO-3 and FSDP leave empty or flat shards where save_pretrained is "
        "called without (PEFT warns of it)"
    ),
    "dtype": "save the adapter in a float dtype",
    "not finite": "use an earlier checkpoint of it: training went wrong before this one was saved",
    "copies": "save it again with PEFT: one of the two was changed since, and which of them was trained cannot be told",
    "tie lost": (
        "train it again on a base in float32, or on one whose head is its own: on a base in 16 bits PEFT trains head and embedding apart, "
        "so that no model with one matrix for both is what was trained"
    ),
    "token": "save it again with PEFT, which refuses the two together",
    "peft only": "let peft merge it (merge_and_unload, then save_pretrained) and give the merged folder as the model",
}
"""Advice that no other fact changes; the other kinds' is worked out below."""


def unfit(
    path: Path, problems: Sequence[Problem], settings: AdapterConfig, config: Architecture, model: ModelFolder | None
) -> InputError:
    """Of an adapter whose tensors do not fit the model or its own settings.

    Args:
        path: the adapter's safetensors file.
        problems: at least one.
        model: the folder that the adapter was to be applied to, where the caller has it.
    """
    kinds = {problem.kind: problem for problem in problems}
    texts = [problem.text for problem in problems]
    lines = texts[:MAX_PROBLEMS] + ([f"... and {len(texts) - MAX_PROBLEMS} more"] if len(texts) > MAX_PROBLEMS else [])
    headline = "tensors that do not fit the model or adapter_config.json"
    advice = []
    if kinds.keys() & {"shape", "too deep", "no target"}:
        advice.append(_other_model(settings, config, model, [p.number for p in problems if p.kind == "shape"]))
    elif "vocabulary" in kinds:
        headline, fix = _resized(problems, settings, config)
        advice.append(fix)
    if "missing" in kinds and not kinds.keys() & {
        "shape",
        "too deep",
        "no target",
        "not a target",
        "named by state_dict",
    }:
        advice.append(
            "fetch or save the adapter again: its file is not whole, or adapter_config.json is another adapter's"
        )
    if "tied" in kinds:
        advice.append(_untie(settings))
    advice += [text for kind, text in _SIMPLE.items() if kind in kinds]
    return InputError(path, found="\n    ".join([headline, *lines]), fix="; ".join(dict.fromkeys(advice)))


def _other_model(
    settings: AdapterConfig, config: Architecture, model: ModelFolder | None, sizes: Sequence[int | None]
) -> str:
    """Of an adapter for a model of another shape: which one that is, as far as can be told."""
    size = next((size for size in sizes if size), None)
    another = f"one with hidden_size {size}, not {config.hidden_size}" if size else "one of another shape"
    base = settings.base_model
    if base is None:
        return f"give the model this adapter was trained on, {another}; adapter_config.json does not say which"
    if model is not None and is_the_same(base, model):
        return (
            f"fetch the adapter and the model again: the adapter names this model as its base ({shown(base)}), but was trained on "
            f"{another}, so one of the two was replaced since"
        )
    return f"give the model this adapter was trained on, {shown(base)}"


def is_the_same(base_model: str, model: ModelFolder) -> bool:
    """Whether an adapter's `base_model_name_or_path` names this folder: by its path, or the hub's id that the folder is the copy of."""
    try:
        if Path(base_model).expanduser().resolve() == model.path.resolve():
            return True
    except (OSError, ValueError, RuntimeError):  # a name that is no path
        pass
    return (
        f"models--{base_model.replace('/', '--')}" in model.path.parts
        or model.config.get("_name_or_path") == base_model
    )


def _resized(problems: Sequence[Problem], settings: AdapterConfig, config: Architecture) -> tuple[str, str]:
    """Of an adapter that was trained after tokens were added to its base."""
    sizes = sorted({problem.number for problem in problems if problem.kind == "vocabulary" and problem.number})
    rows = " or ".join(map(str, sizes)) or "more"
    headline = (
        f"an adapter whose vocabulary was resized before it was trained: its embedding or head has {rows} rows, the model's "
        f"{config.vocab_size}"
    )
    number = sizes[-1] if sizes else "N"
    return headline, (
        "resize the base as it was resized for the training, and give the new folder as the model: "
        f"model = AutoModelForCausalLM.from_pretrained({shown(settings.base_model or 'BASE')}); model.resize_token_embeddings({number}); "
        "model.save_pretrained(DIR), and save the adapter's tokenizer, which has the new tokens, to DIR as well"
    )


def _untie(settings: AdapterConfig) -> str:
    return (
        "merge it into a copy of the model whose head is its own: model = AutoModelForCausalLM.from_pretrained("
        f"{shown(settings.base_model or 'BASE')}, tie_word_embeddings=False); model.lm_head.weight.data = "
        "model.get_input_embeddings().weight.data.clone(); model.save_pretrained(DIR), and the tokenizer too; or train it again with "
        "ensure_weight_tying"
    )
