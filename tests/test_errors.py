"""Errors: at most eight lines, one exit code a class, and they survive the way between processes."""

from __future__ import annotations

import pickle

import pytest

from dist_lm import errors
from dist_lm.errors import (
    EXIT_CRASH,
    EXIT_DONE,
    MAX_MESSAGE_LINES,
    ConfigError,
    DataError,
    DistLMError,
    Diverged,
    EnvironmentFault,
    OutOfMemory,
    Stalled,
    StopRequested,
)

pytestmark = pytest.mark.fast

EXIT_CODES = {
    ConfigError: 2,
    DataError: 3,
    EnvironmentFault: 4,
    OutOfMemory: 5,
    Stalled: 6,
    Diverged: 7,
    StopRequested: 75,
}


def test_a_message_says_what_where_why_and_what_to_do_in_this_order() -> None:
    error = DataError("a shard is damaged", where="train-00003.tar", why="its hash differs", do="Prepare it again.")
    assert str(error).splitlines() == [
        "error[data] a shard is damaged   (train-00003.tar)",
        "  its hash differs",
        "  Prepare it again.",
    ]


def test_a_message_without_other_facts_is_one_line() -> None:
    assert str(ConfigError("there is no file x.yaml")) == "error[config] there is no file x.yaml"


@pytest.mark.parametrize("reasons", [5, 6, 7, 40])
def test_a_long_message_keeps_eight_lines_its_head_and_the_last_advice(reasons: int) -> None:
    why = "\n".join(f"reason {number}" for number in range(reasons))
    lines = str(ConfigError("many mistakes", why=why, do="First this.\nThen that.")).splitlines()
    assert len(lines) == MAX_MESSAGE_LINES == 8
    assert lines[0] == "error[config] many mistakes"
    assert lines[-1] == "  Then that."
    assert ("  ..." in lines) == (reasons > 5)


def test_every_error_class_has_its_own_documented_exit_code() -> None:
    classes = {
        value
        for value in vars(errors).values()
        if isinstance(value, type) and issubclass(value, DistLMError) and value is not DistLMError
    }
    assert {error: error.exit_code for error in classes} == EXIT_CODES
    assert len({*EXIT_CODES.values(), EXIT_DONE, EXIT_CRASH}) == len(EXIT_CODES) + 2
    assert len({error.kind for error in classes}) == len(classes)


def test_a_restart_helps_against_a_stall_and_against_no_mistake_of_a_person() -> None:
    assert Stalled.restart_helps
    assert not any(error.restart_helps for error in EXIT_CODES if error is not Stalled)


@pytest.mark.parametrize("error_class", list(EXIT_CODES), ids=lambda error_class: error_class.__name__)
def test_an_error_survives_pickling_with_all_its_facts(error_class: type[DistLMError]) -> None:
    error = error_class("what", where="where:3", why="why\nand why", do="do")
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is error_class
    assert str(copy) == str(error)
    assert (copy.what, copy.where, copy.why, copy.do) == ("what", "where:3", "why\nand why", "do")
