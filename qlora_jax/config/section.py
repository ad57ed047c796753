"""What every group of settings is."""

from pathlib import Path
from typing import Annotated, Any

import pydantic

from qlora_jax.base.reading import user_path

MAX_WHOLE = 2**32 - 1
"""Of a whole number. YAML's have no end: a larger one is a slip of the hand, and fits no array's shape, no seed and no float."""


def _expanded(value: Any) -> Any:
    return str(user_path(value)) if isinstance(value, str | Path) else value


UserPath = Annotated[Path, pydantic.BeforeValidator(_expanded)]
"""A path, with `~` replaced by the home folder."""
UserText = Annotated[str, pydantic.BeforeValidator(lambda value: _expanded(value) if _is_home(value) else value)]
"""A path or another name: `~` is replaced where it begins with one."""


def _is_home(value: Any) -> bool:
    return isinstance(value, str) and value.startswith("~")


class Section(pydantic.BaseModel, frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True):
    """A group of settings: immutable, and without room for a misspelt one."""

    @pydantic.field_validator("*")
    @classmethod
    def _numbers_have_an_end(cls, value: Any) -> Any:
        if isinstance(value, int) and value > MAX_WHOLE:
            raise ValueError(f"expected at most {MAX_WHOLE}")
        return value
