"""What every group of settings is."""

import pydantic


class Section(pydantic.BaseModel, frozen=True, extra="forbid", allow_inf_nan=False):
    """A group of settings: immutable, and without room for a misspelt one."""
