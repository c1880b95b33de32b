"""Which texts are worth keeping: length, and simple signs of text that nobody wrote to be read.

Enters: the user's limits.  Leaves: for a text, the name of the first limit that it breaks.
Promises: all limits are off unless given; what is dropped is counted by the name of the limit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from dist_lm.errors import ConfigError


def _letter_share(text: str) -> float:
    return sum(map(str.isalpha, text)) / max(len(text), 1)


def _mean_word(text: str) -> float:
    words = text.split()
    return sum(map(len, words)) / max(len(words), 1)


def _repeated_line_share(text: str) -> float:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return 1 - len(set(lines)) / len(lines) if lines else 0.0


_TEXT_MEASURES: dict[str, tuple[str, Callable[[str], float]]] = {
    "characters": ("length of the text", len),
    "letter_share": ("share of the characters that are letters, 0 to 1", _letter_share),
    "mean_word": ("mean number of characters of a word", _mean_word),
    "repeated_line_share": ("share of the lines that stood in the text before, 0 to 1", _repeated_line_share),
}
_TOKENS = "document_tokens"
FILTERS = {
    f"{bound}_{name}": words
    for name, words in {**{name: words for name, (words, _) in _TEXT_MEASURES.items()}, _TOKENS: "tokens"}.items()
    for bound in ("min", "max")
}
"""All limits, each with what it measures."""


def check_filters(limits: Mapping[str, float]) -> None:
    """ConfigError for an unknown limit, or two that no text can meet."""
    for name, value in limits.items():
        if name not in FILTERS:
            raise ConfigError(f"filter `{name}` is unknown", where="--filter", do=f"Known: {', '.join(FILTERS)}.")
        opposite = limits.get(name.replace("min_", "max_", 1), value)
        if name.startswith("min_") and value > opposite:
            raise ConfigError(f"no text can have {name}={value:g} and at most {opposite:g}", where="--filter")


def text_fault(text: str, limits: Mapping[str, float]) -> str | None:
    """The limit that the text breaks; None if it is fine."""
    for name, (_, measure) in _TEXT_MEASURES.items():
        if f"min_{name}" in limits or f"max_{name}" in limits:
            fault = _broken(name, measure(text), limits)
            if fault:
                return fault
    return None


def token_fault(num_tokens: int, limits: Mapping[str, float]) -> str | None:
    """The same for the number of tokens of a document."""
    return _broken(_TOKENS, num_tokens, limits)


def _broken(name: str, value: float, limits: Mapping[str, float]) -> str | None:
    if value < limits.get(f"min_{name}", value):
        return f"min_{name}"
    if value > limits.get(f"max_{name}", value):
        return f"max_{name}"
    return None
