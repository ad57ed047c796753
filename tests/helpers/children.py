"""Python in processes of its own, as tests start it."""

import os
import re
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]


def environment(**changes: str) -> dict[str, str]:
    """This process's own with `changes`, and the repository found first; what the parent finds packages through, the child does too."""
    search = os.pathsep.join(filter(None, (str(REPOSITORY), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "PYTHONPATH": search, **changes}


def held_open(path: object) -> str:
    """A path by its name: a run writes into some folders that it holds open by way of `/proc`."""
    if match := re.match(r"/proc/self/fd/\d+", text := str(path)):
        return str(Path(match[0]).readlink()) + text.removeprefix(match[0])
    return text
