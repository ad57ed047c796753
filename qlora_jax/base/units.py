"""Sizes in bytes, as people write them."""

import re

GIB = 2**30

MAX_BYTES = 2**63 - 1
"""Of any memory or file."""


def parse_bytes(text: str) -> int:
    """`24GiB`, `24 GB`, `512MiB` or a plain number of bytes.

    Raises:
        ValueError: it is none of these.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]i?B|B)?\s*", text, re.IGNORECASE)
    if not match:
        raise ValueError("expected a size such as 24GiB")
    unit = (match[2] or "B").upper()
    power = "BKMGT".index(unit[0])
    size = float(match[1]) * (1024 if "I" in unit else 1000) ** power
    if size > MAX_BYTES:
        raise ValueError(f"expected a size such as 24GiB, at most {MAX_BYTES} bytes")
    return int(size)
