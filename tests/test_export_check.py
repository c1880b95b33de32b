"""An exported folder that a stranger could not use is refused before it gets its name."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from dist_lm.errors import DataError
from dist_lm.export import _check, _logits
from tests.predictors.small_models import save_model

pytestmark = pytest.mark.fast


def test_where_the_weights_begin_in_their_file_does_not_count(topics_data: Path, tmp_path: Path) -> None:
    folder = save_model("BertForSequenceClassification", topics_data / "tokenizer", tmp_path / "model")
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    reference = _logits(model, folder)
    file = folder / "model.safetensors"
    weights = load_file(file)
    for added in range(0, 64, 8):
        save_file(weights, file, {"format": "pt", "title": "x" * added})
        assert _check(folder, model, reference, tolerance=0.0) == 0.0


def test_a_folder_that_does_not_hold_the_model_is_refused(topics_data: Path, tmp_path: Path) -> None:
    folder = save_model("BertForSequenceClassification", topics_data / "tokenizer", tmp_path / "model")
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    reference = _logits(model, folder)
    assert _check(folder, model, reference, tolerance=1e-5) == 0.0
    file = folder / "model.safetensors"
    weights = load_file(file)
    save_file({**weights, "classifier.bias": weights["classifier.bias"] + 1}, file, {"format": "pt"})
    with pytest.raises(DataError, match=r"the exported folder computes other logits \(largest difference 1\)"):
        _check(folder, model, reference, tolerance=1e-5)
    del weights["classifier.bias"]
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(DataError, match=r"other parameter names than a fresh model: \['classifier.bias'\]"):
        _check(folder, model, reference, tolerance=1e-5)
