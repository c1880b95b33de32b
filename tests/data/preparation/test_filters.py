"""Which texts break which limit."""

from __future__ import annotations

import pytest

from dist_lm.data.preparation.filters import FILTERS, check_filters, text_fault, token_fault
from dist_lm.errors import ConfigError

pytestmark = pytest.mark.fast
PROSE = "It was the best of times, it was the worst of times."


@pytest.mark.parametrize(
    ("text", "limits", "fault"),
    [
        (PROSE, {}, None),
        (PROSE, {"min_characters": 52, "max_characters": 52}, None),
        (PROSE, {"min_characters": 53}, "min_characters"),
        (PROSE, {"max_characters": 51}, "max_characters"),
        (PROSE, {"min_letter_share": 0.7, "min_mean_word": 3, "max_mean_word": 5}, None),
        ("1 + 1 = 2", {"min_letter_share": 0.1}, "min_letter_share"),
        ("\u4f60\u597d", {"min_letter_share": 1.0}, None),
        ("a b c d", {"min_mean_word": 1.5}, "min_mean_word"),
        ("x" * 100, {"max_mean_word": 20}, "max_mean_word"),
        ("buy\n\nbuy \nbuy\nnow", {"max_repeated_line_share": 0.5}, None),
        ("buy\n\nbuy \nbuy\nnow", {"max_repeated_line_share": 0.4}, "max_repeated_line_share"),
        ("", {"max_repeated_line_share": 0.0, "min_letter_share": 0.0}, None),
    ],
)
def test_the_first_limit_that_a_text_breaks_is_named(text: str, limits: dict[str, float], fault: str | None) -> None:
    check_filters(limits)
    assert text_fault(text, limits) == fault


def test_tokens_of_a_document_have_limits_too() -> None:
    limits = {"min_document_tokens": 3.0, "max_document_tokens": 5.0}
    assert [token_fault(count, limits) for count in (2, 3, 5, 6)] == [
        "min_document_tokens",
        None,
        None,
        "max_document_tokens",
    ]


def test_every_limit_says_what_it_measures_and_others_are_unknown() -> None:
    assert all(FILTERS.values())
    with pytest.raises(ConfigError, match="filter `characters` is unknown"):
        check_filters({"characters": 1})
    with pytest.raises(ConfigError, match="no text can have min_characters=9 and at most 3"):
        check_filters({"min_characters": 9, "max_characters": 3})
