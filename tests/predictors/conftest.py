"""Models for predictions, each made once a module."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.predictors.small_models import save_model


@pytest.fixture(scope="module")
def models(topics_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    root = tmp_path_factory.mktemp("models")

    def model(class_name: str, **changes: Any) -> Path:
        folder = root / f"{class_name}-{abs(hash(str(changes)))}"
        return folder if folder.exists() else save_model(class_name, topics_data / "tokenizer", folder, **changes)

    return model
