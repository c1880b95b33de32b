"""What every section of a configuration is made of.

Enters: nothing.  Leaves: Section, the types that several sections use, and a way to refuse.
Promises: a broken rule names the dotted keys that it is about; config_files.py adds file and line.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field
from pydantic_core import PydanticCustomError

Share = Annotated[float, Field(ge=0.0, le=1.0)]
InnerShare = Annotated[float, Field(gt=0.0, lt=1.0)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Rule = tuple[str, tuple[str, ...]]
"""A broken rule in words, and the dotted keys that it is about."""


class Section(BaseModel):
    """One section of the YAML: frozen, unknown keys forbidden."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        populate_by_name=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
    )


def refuse(broken: list[Rule]) -> None:
    """Raise all broken rules at once."""
    if broken:
        text = "; ".join(words for words, _ in broken)
        raise PydanticCustomError("rules", "{text}", {"text": text, "rules": broken})
