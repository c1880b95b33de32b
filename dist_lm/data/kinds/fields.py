"""Checked fields of a record.

Enters: the fields as a source has them.  Leaves: texts, lists of texts, labels, numbers.
Promises: what does not fit raises Unusable with the field's name; a field without content raises Empty.
"""

from __future__ import annotations

import json
import math
from typing import Any

from dist_lm.data.kinds.base import Empty, Fields, Unusable

_FIELDS_SHOWN = 5
_CHARACTERS_SHOWN = 40


def field(fields: Fields, name: str) -> Any:
    """The field, whatever it holds; null counts as missing."""
    value = fields.get(name)
    if value is None:
        have = ", ".join(sorted(map(str, fields))[:_FIELDS_SHOWN])
        raise Unusable(f"no field '{name}' (there are: {have})")
    return value


def text(fields: Fields, name: str) -> str:
    """A text with something in it."""
    value = field(fields, name)
    if not isinstance(value, str):
        raise Unusable(f"field '{name}' is {type(value).__name__}, not text")
    if not value or value.isspace():
        raise Empty(f"field '{name}' is empty")
    return checked(value, name)


def checked(value: str, name: str) -> str:
    """The text, if it can be stored."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        # JSON can spell half of a surrogate pair, which is no character and cannot be stored.
        raise Unusable(f"field '{name}' holds half of a surrogate pair") from None
    return value


def label(fields: Fields, name: str) -> str:
    """The name of a class: a text, or a whole number."""
    return _label_name(field(fields, name), name)


def labels(fields: Fields, name: str) -> list[str]:
    """The names of the classes that hold, sorted, each once; a list, which may be empty."""
    value = field(fields, name)
    if not isinstance(value, list):
        raise Unusable(f"field '{name}' must be a list of labels, not {_shown(value)}")
    return sorted({_label_name(item, name) for item in value})


def number(fields: Fields, name: str) -> float:
    """A finite number; a text that spells one counts, as CSV knows nothing else."""
    value = field(fields, name)
    try:
        result = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        result = math.nan
    if not math.isfinite(result):
        raise Unusable(f"field '{name}' must be a finite number, not {_shown(value)}")
    return result


def _label_name(value: Any, name: str) -> str:
    if isinstance(value, str) and value:
        return checked(value, name)
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        raise Unusable(
            f"field '{name}' is the number {value}, and a class has a name or a whole number "
            "(for regression: --option labels=number)"
        )
    raise Unusable(f"field '{name}' must be a text or a whole number, not {_shown(value)}")


def _shown(value: Any) -> str:
    return json.dumps(value, default=repr)[:_CHARACTERS_SHOWN]
