"""The memory of a task does not grow with the input."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from dist_lm.data.tokenizer import Tokenizer


def test_four_times_the_text_takes_no_more_memory(tokenizer: Tokenizer, tmp_path: Path) -> None:
    words = [sys.executable, "-m", "tests.data.preparation.peak_memory", str(tmp_path), str(tokenizer.path)]
    done = subprocess.run([*words, "1", "3", "12"], capture_output=True, text=True, timeout=300, check=True)
    _, once, four_times = map(int, done.stdout.split())
    # Held in memory, four times the text took 1.8 times as much.
    assert four_times < 1.4 * once


def test_a_text_that_is_repeated_eight_times_as_often_takes_no_more_memory(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    words = [sys.executable, "-m", "tests.data.preparation.peak_memory", str(tmp_path), str(tokenizer.path)]
    done = subprocess.run([*words, "1", "-2500", "-20000"], capture_output=True, text=True, timeout=300, check=True)
    _, once, eight_times = map(int, done.stdout.split())
    # The list of splits grows, 1.07 times in all; with the copies in memory it was 6.6 times as much.
    assert eight_times < 1.2 * once
