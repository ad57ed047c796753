"""What every group of settings is."""

from typing import Any

import pydantic

MAX_WHOLE = 2**32 - 1
"""Of a whole number. YAML's have no end: a larger one is a slip of the hand, and fits no array's shape, no seed and no float."""


class Section(pydantic.BaseModel, frozen=True, extra="forbid", allow_inf_nan=False):
    """A group of settings: immutable, and without room for a misspelt one."""

    @pydantic.field_validator("*")
    @classmethod
    def _numbers_have_an_end(cls, value: Any) -> Any:
        if isinstance(value, int) and value > MAX_WHOLE:
            raise ValueError(f"expected at most {MAX_WHOLE}")
        return value
