"""Python in processes of its own, as tests start it."""

import os
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]


def environment(**changes: str) -> dict[str, str]:
    """This process's own with `changes`, and the repository found first; what the parent finds packages through, the child does too."""
    search = os.pathsep.join(filter(None, (str(REPOSITORY), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "PYTHONPATH": search, **changes}
