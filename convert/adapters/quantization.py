"""What an adapter's base was quantized to when it was trained, as far as anything says, and what to do where nothing does.

Our adapters say so in their file's metadata. PEFT's say so in the README.md of older versions, or the base that they name is in 4 bits.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
import pydantic
from huggingface_hub.errors import HFValidationError

from convert.files.folder import ModelFolder
from qlora_jax.base.errors import InputError
from qlora_jax.config import QuantizationSettings

README, README_HEADING = "README.md", "The following `bitsandbytes` quantization config was used during training:"
MAX_README_BYTES = 10_000_000
UNSTATED = QuantizationSettings()
BITSANDBYTES_DEFAULT = QuantizationSettings(quant_type="fp4", double_quant=False)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stated:
    """What the base was quantized to, and who says so."""

    quantization: QuantizationSettings = UNSTATED
    source: str | None = None
    """None where nothing says anything."""
    beyond: str | None = None
    """What the base was in, where that is not 4 bits of bitsandbytes'."""


def stated_quantization(folder: Path, base_model: str | None, weights: Path, note: str | None) -> Stated:
    """Look for what an adapter's base was quantized to: in our note, in PEFT's README.md, in the named base's `config.json`.

    Args:
        weights: the file that the note was found in.
        note: our entry in its metadata, if it has one.

    Raises:
        InputError: the note cannot be used.
    """
    if note is not None:
        try:
            return Stated(quantization=QuantizationSettings.model_validate_json(note), source="its own file")
        except pydantic.ValidationError:
            raise InputError(
                weights,
                found=f"metadata 'quantization' that cannot be used: {note}",
                expected=f"settings such as {QuantizationSettings().model_dump_json()}",
                fix="fetch or save the adapter again",
            ) from None
    if settings := _readme_settings(folder / README):
        return _from_bitsandbytes(settings, f"its {README}")
    if base_model and (settings := _base_settings(base_model)):
        return _from_bitsandbytes(settings, f"the config.json of {base_model}")
    return Stated()


def _from_bitsandbytes(settings: Mapping[str, Any], source: str) -> Stated:
    """From the keys of BitsAndBytesConfig, with its defaults."""
    if not settings.get("load_in_4bit", settings.get("_load_in_4bit")):
        bits8 = settings.get("load_in_8bit", settings.get("_load_in_8bit"))
        return Stated(
            source=source, beyond="8 bits" if bits8 else str(settings.get("quant_method", "another quantization"))[:50]
        )
    quant_type, double = settings.get("bnb_4bit_quant_type", "fp4"), settings.get("bnb_4bit_use_double_quant", False)
    if quant_type not in ("nf4", "fp4") or not isinstance(double, bool):
        return Stated()
    return Stated(quantization=QuantizationSettings(quant_type=quant_type, double_quant=double), source=source)


def _readme_settings(path: Path) -> dict[str, Any]:
    """The settings that PEFT lists in the README.md of an adapter: the last list, if it wrote several."""
    try:
        if not path.is_file() or path.stat().st_size > MAX_README_BYTES:
            return {}
        _, found, text = path.read_text(encoding="utf-8", errors="replace").rpartition(README_HEADING)
    except OSError:
        return {}
    settings: dict[str, Any] = {}
    for line in text.strip().splitlines() if found else ():
        key, colon, value = line.removeprefix("- ").partition(":")
        if not line.startswith("- ") or not colon:
            break
        settings[key.strip()] = {"True": True, "False": False}.get(value.strip(), value.strip())
    return settings


def _base_settings(base_model: str) -> dict[str, Any]:
    """`quantization_config` of a base that is a folder here or in the hub's cache; nothing is downloaded."""
    try:
        path: Any = Path(base_model).expanduser() / "config.json"
        if not path.is_file():
            path = huggingface_hub.try_to_load_from_cache(base_model, "config.json")
        if not isinstance(path, str | Path) or Path(path).stat().st_size > MAX_README_BYTES:
            return {}
        settings = json.loads(Path(path).read_text(encoding="utf-8")).get("quantization_config")
    except (OSError, ValueError, RuntimeError, AttributeError, RecursionError, HFValidationError):
        return {}
    return settings if isinstance(settings, dict) else {}


def quantize_command(quantization: QuantizationSettings, model: str = "UNQUANTIZED_MODEL") -> str:
    """The command that makes a base in these 4 bits."""
    single = "" if quantization.double_quant else " --no-double-quant"
    return f"python -m convert.quantize --model {model} --out DIR --quant-type {quantization.quant_type}{single}"


def needed_base(quantization: QuantizationSettings) -> str:
    """What to do where an adapter was trained on other 4 bits than the model is in."""
    command = quantize_command(quantization)
    return f"give the unquantized model, or one in the adapter's 4 bits: `{command}`, and DIR as the model"


def in_words(quantization: QuantizationSettings) -> str:
    """`NF4 with double quantization`."""
    return f"{quantization.quant_type.upper()} with{'' if quantization.double_quant else 'out'} double quantization"


def base_remark(stated: Stated, folder: ModelFolder, name_or_path: str) -> str | None:
    """A remark on what an adapter is taken to have been trained on, unless its own file says so: what else it may be, and what to do then.

    Args:
        name_or_path: what the user calls the model in `folder`.
    """
    if stated.beyond is not None:
        return (
            f"{stated.source} says that the adapter was trained on a base in {stated.beyond}, which cannot be made here: the original "
            "weights are nearer to it than 4 bits are (--base original)"
        )
    if stated.source is not None:
        taken = "" if stated.source == "its own file" else f": taken for {in_words(stated.quantization)}"
        return f"{stated.source} says in what 4 bits the adapter was trained{taken}" if taken else None
    if folder.is_4bit:
        return "the adapter does not say in what it was trained: taken for the 4 bits that the model is in"
    return (
        f"the adapter does not say in what it was trained: taken for {in_words(UNSTATED)}. If its base was in bitsandbytes' default, "
        f"which is {in_words(BITSANDBYTES_DEFAULT)}, make such a base first, `{quantize_command(BITSANDBYTES_DEFAULT, name_or_path)}`, "
        "and give DIR as the model (NF4 without double quantization: --quant-type nf4 --no-double-quant); if it was not quantized, use "
        "--base original"
    )
