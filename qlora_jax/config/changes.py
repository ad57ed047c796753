"""Which settings may change between a run and its continuation."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from qlora_jax.base.errors import InputError

FREE = {
    "memory": None,
    "model": {"name_or_path", "requantize"},
    "lora": {"init_from"},
    "data": {"path", "name", "split", "streaming", "num_proc", "preview_rows"},
    "training": {
        "output_dir", "logging_steps", "save_steps", "save_interval_minutes", "save_total_limit", "resume", "on_nonfinite",
        "load_best_model_at_end", "report_to", "run_name", "export_merged", "merge_base", "sample_prompt",
        "sample_max_new_tokens", "overwrite_output_dir",
    },
}  # fmt: skip
"""By section, settings that no later step's numbers depend on; None means all. Names of model and data are free because what they
name is compared itself."""

FROM_HERE_ON = {
    "data": {"eval_path", "eval_split"},
    "training": {
        "max_steps", "num_train_epochs", "learning_rate", "lr_scheduler_type", "warmup_ratio", "max_grad_norm", "weight_decay",
        "eval_steps", "per_device_eval_batch_size", "early_stopping_patience", "early_stopping_threshold", "full_determinism",
        "gradient_checkpointing",
    },
}  # fmt: skip
"""Settings that a run may change on its way; from there on it is not the run that it would have been. All others may not change: the
arrays that were saved, or the order of the data, depend on them."""

Settings = Mapping[str, Mapping[str, Any]]


def check_changes(path: Path, before: Settings, now: Settings) -> list[str]:
    """Compare the settings of a checkpoint with those of the run that is to go on from it.

    Returns:
        a line for each setting that was changed and may be.

    Raises:
        InputError: settings were changed that may not be (all named).
    """
    notes, refused = [], []
    for section, key, old, new in _differences(before, now):
        line = f"{section}.{key}: {old!r} → {new!r}"
        if _is_in(FREE, section, key):
            notes.append(line)
        elif _is_in(FROM_HERE_ON, section, key):
            notes.append(f"{line}, from here on")
        else:
            refused.append(line)
    if refused:
        raise InputError(
            path,
            found="a run with other settings\n    " + "\n    ".join(refused),
            expected="changes of length, learning rate, evaluation, logging, saving, memory.* and export only",
            fix="give the old values back, or start another run: another training.output_dir",
        )
    return notes


def work_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """A line for each part of the plan that is not as it was and may change the last bits, such as how many layers are run again."""
    return [
        f"plan: {key}: {before[key]} → {now[key]}, so the last bits may differ"
        for key in now
        if before.get(key, now[key]) != now[key]
    ]


def check_identity(path: Path, before: Mapping[str, str], now: Mapping[str, str]) -> None:
    """Compare what the base model and the data are made of.

    Raises:
        InputError: one is not what it was.
    """
    changed = [name for name in now if before.get(name) != now[name]]
    if changed:
        raise InputError(
            path,
            found=f"a run whose {' and '.join(changed)} had other contents than now",
            expected="the same base model, rows and tokenizer",
            fix="give the old ones back, or start another run: another training.output_dir",
        )


def _differences(before: Settings, now: Settings) -> Iterator[tuple[str, str, Any, Any]]:
    for section, settings in now.items():
        old = before.get(section, {})
        for key in sorted(
            settings.keys() & old.keys()
        ):  # what an older version did not know has the value that it had then
            if settings[key] != old[key]:
                yield section, key, old[key], settings[key]


def _is_in(table: Mapping[str, set[str] | None], section: str, key: str) -> bool:
    keys = table.get(section, set())
    return keys is None or key in keys
