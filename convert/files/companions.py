"""What goes along with a model's weights: tokenizer, all its chat templates, generation config, licence; below the folder too.

Left behind are weights and pickles of whatever format, Python code (none of it is run here, and what is written computes what
transformers' own models compute), model cards, which describe another model, hidden files, files too large to be a companion, and folders
below that are artifacts of their own: another model, an adapter, a training's checkpoint, the same weights in another format.
"""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib")
OTHER_WEIGHT_SUFFIXES = (".safetensors", ".gguf", ".h5", ".msgpack", ".onnx", ".onnx_data", ".ot", ".tflite")
CODE_SUFFIXES = (".py", ".pyc", ".so")
MAX_COMPANION_BYTES = 100_000_000
MAX_COMPANIONS_BELOW = 1000
"""Files of folders below: more are no companions."""
OWN_ARTIFACT = frozenset({"config.json", "adapter_config.json", "trainer_state.json", "model_index.json", "run.json"})
"""A folder below that holds one of these is not part of this model."""
NOT_CARRIED = frozenset({"config.json", "adapter_config.json", "trainer_state.json"})
"""The first is written anew. With the second beside them, transformers would take the weights for an adapter's and load another base."""

TEMPLATES_FOLDER = "additional_chat_templates"
GENERATION_CONFIG = "generation_config.json"
CHAT_TEMPLATE = "chat_template.jinja"
TOKENIZER_CONFIG = "tokenizer_config.json"
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
TOKENIZER_FILES = frozenset(
    {
        TOKENIZER_CONFIG,
        CHAT_TEMPLATE,
        "chat_template.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "merges.txt",
    }
).union(VOCABULARIES)

Files = Mapping[str, Path | bytes]
"""Files to be, by their names relative to the folder, with `/`: copies of others, or these bytes."""


def companion_files(folder: Path, largest: int = MAX_COMPANION_BYTES) -> list[Path]:
    """A model folder's companions of at most `largest` bytes, sorted: first the folder's own, then those below."""
    here = [path for path in sorted(folder.iterdir()) if _is_companion(path, largest)]
    below = [path for sub in sorted(folder.iterdir()) if _is_carried_folder(sub) for path in _below(sub, largest)]
    return here + (below if len(below) <= MAX_COMPANIONS_BELOW else [])


def as_files(folder: Path) -> dict[str, Path | bytes]:
    """The same, by their names."""
    return {path.relative_to(folder).as_posix(): path for path in companion_files(folder)}


def left_behind(folder: Path) -> list[str]:
    """Names of files beside the weights that one might miss: code, an adapter, what is too large."""
    return [
        path.name
        for path in sorted(folder.iterdir())
        if path.is_file()
        and (
            path.name.endswith(CODE_SUFFIXES)
            or path.name == "adapter_config.json"
            or (
                not path.name.endswith((*PICKLE_SUFFIXES, *OTHER_WEIGHT_SUFFIXES))
                and path.stat().st_size > MAX_COMPANION_BYTES
            )
        )
    ]


def tokenizer_files(folder: Path) -> dict[str, Path | bytes]:
    """The files of a tokenizer that a folder brings along, its chat templates among them; empty if it brings none that is whole."""
    files = {name: path for name, path in as_files(folder).items() if is_tokenizer_s(name)} if folder.is_dir() else {}
    return files if TOKENIZER_CONFIG in files and any(name in files for name in VOCABULARIES) else {}


def is_tokenizer_s(name: str) -> bool:
    """Whether a companion is part of the tokenizer."""
    return name in TOKENIZER_FILES or name.startswith(f"{TEMPLATES_FOLDER}/")


def total_size(files: Files) -> int:
    """Bytes of all of them."""
    return sum(len(file) if isinstance(file, bytes) else file.stat().st_size for file in files.values())


def _below(folder: Path, largest: int) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        if _is_companion(path, largest):
            yield path
        elif _is_carried_folder(path):
            yield from _below(path, largest)


def _is_carried_folder(path: Path) -> bool:
    """Whether a folder below is part of the model. Links to folders are not followed: they may lead in a circle."""
    if path.is_symlink() or not path.is_dir() or path.name.startswith((".", "__")):
        return False
    names = [entry.name for entry in path.iterdir()] if os.access(path, os.R_OK | os.X_OK) else sorted(OWN_ARTIFACT)
    return not any(name in OWN_ARTIFACT or name.endswith((*PICKLE_SUFFIXES, *OTHER_WEIGHT_SUFFIXES)) for name in names)


def _is_companion(path: Path, largest: int) -> bool:
    name = path.name
    return path.is_file() and not (
        name.startswith((".", "README"))
        or name in NOT_CARRIED
        or name.endswith((*PICKLE_SUFFIXES, *OTHER_WEIGHT_SUFFIXES, *CODE_SUFFIXES, ".index.json"))
        or path.stat().st_size > largest
    )
