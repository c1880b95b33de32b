"""The section of a task that somebody else wrote.

Enters: YAML values.  Leaves: frozen settings.  Promises: nothing is imported here; tasks/registry.py
does it where the task is built.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from dist_lm.config_section import Section


class CustomTask(Section):
    name: Literal["custom"]
    implementation: Annotated[str, Field(alias="class")]
    """`module:Class`, a subclass of dist_lm.tasks.base.Task; every rank imports it."""
    options: dict[str, Any] = {}
    """The task's own settings; part of what the run is, like those of other tasks."""
