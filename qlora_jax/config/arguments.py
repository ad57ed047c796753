"""Kinds of command-line arguments, for argparse's `type`: what is wrong with one is said as usage errors are, with exit status 2."""

import argparse
import math
from collections.abc import Callable
from pathlib import Path

from qlora_jax.base.reading import is_unicode, shown, user_path
from qlora_jax.config.section import MAX_WHOLE


def path_argument(text: str) -> Path:
    """A path, with `~` replaced.

    Raises:
        ArgumentTypeError: it is empty, or no name of a file.
    """
    try:
        return user_path(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def text_argument(text: str) -> str:
    """A text.

    Raises:
        ArgumentTypeError: it is not UTF-8.
    """
    if not is_unicode(text):
        raise argparse.ArgumentTypeError(f"{text[:200]!a} is not UTF-8")
    return text


def whole_argument(least: int, most: int = MAX_WHOLE) -> Callable[[str], int]:
    """A kind of whole numbers, from `least` to `most`."""

    def whole(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = None
        if value is None or not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{shown(text)} is not a whole number from {least} to {most}")
        return value

    return whole


def number_argument(least: float, *, above: bool = False) -> Callable[[str], float]:
    """A kind of finite numbers, from `least` on; `above`: greater than it."""

    def number(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value) or value < least or (above and value == least):
            expected = f"a number {'above' if above else 'from'} {least:g}{'' if above else ' on'}"
            raise argparse.ArgumentTypeError(f"{shown(text)} is not {expected}")
        return value

    return number
