"""All kinds of data sets, by name."""

from __future__ import annotations

from dist_lm.data.kinds.base import Kind
from dist_lm.data.kinds.classification import Classification
from dist_lm.data.kinds.instruction import Instruction
from dist_lm.data.kinds.pairs import Pairs
from dist_lm.data.kinds.question_answering import QuestionAnswering
from dist_lm.data.kinds.seq2seq import Seq2Seq
from dist_lm.data.kinds.token_classification import TokenClassification
from dist_lm.data.kinds.tokens import Tokens
from dist_lm.errors import ConfigError

_ALL = (
    Pairs(),
    Tokens(),
    Classification(),
    TokenClassification(),
    QuestionAnswering(),
    Seq2Seq(),
    Instruction(),
)
KINDS: dict[str, Kind] = {kind.name: kind for kind in _ALL}


def kind_named(name: str) -> Kind:
    """Raises ConfigError where there is none of that name."""
    if name not in KINDS:
        raise ConfigError(f"kind `{name}` is unknown", where="--kind", do=f"Write one of {', '.join(KINDS)}.")
    return KINDS[name]
