"""One tokenizer for all preparations."""

from __future__ import annotations

import pytest

from dist_lm.data.tokenizer import Tokenizer, train_tokenizer
from tests.data.preparation.preparing import TEXTS


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return train_tokenizer(TEXTS, vocab_size=800, out=tmp_path_factory.mktemp("preparation") / "tokenizer")
