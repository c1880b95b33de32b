"""A class of the user's own, by its name.

Enters: `module:Class`, as a configuration or a command line names it.  Leaves: the class.
Promises: every process of a run finds the same class, since each imports it by its name; what cannot
be imported, or is no class of that sort, ends in a ConfigError.
"""

from __future__ import annotations

import importlib
import inspect
from typing import TypeVar

from dist_lm.errors import ConfigError

T = TypeVar("T")


def named_class(reference: str, base: type[T], *, where: str) -> type[T]:
    """The class, which is a `base`.  `where`: the key or flag that names it."""
    module, _, name = reference.partition(":")
    if not (module and name):
        raise ConfigError(f"`{reference}` names no class", where=where, do="Write module:Class.")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"class `{reference}` cannot be imported",
            where=where,
            why=f"{type(error).__name__}: {error}",
            do="Put the folder of its module on PYTHONPATH, on every machine of the run.",
        ) from error
    if not (isinstance(found, type) and issubclass(found, base)) or inspect.isabstract(found):
        raise ConfigError(
            f"`{reference}` is no {base.__name__}",
            where=where,
            do=f"Derive it from {base.__module__}.{base.__name__} and define its abstract methods.",
        )
    return found
