"""Data that several tests share."""

from __future__ import annotations

import json
import os
import signal
import tempfile
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from tests.recorded_errors import Recorder, listen
from tests.recording.sitecustomize import FOLDER

# A busy machine is no fault of the code.
settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-errors", action="store_true", help="note in reproduced_errors.json which test makes what")


def pytest_configure(config: pytest.Config) -> None:
    # Whom a shell starts in the background is deaf to Ctrl-C, and so is all that it starts.
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if hasattr(config, "workerinput"):
        # The session that started this worker of xdist compares.
        listen(Path(os.environ[FOLDER]))
        return
    folder = tempfile.TemporaryDirectory(prefix="dist_lm-errors-")
    config.add_cleanup(folder.cleanup)
    listen(Path(folder.name))
    config.pluginmanager.register(Recorder(Path(folder.name), write=config.getoption("--write-errors")))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of Ray come first: they take longest, and one of two workers does them all."""
    items.sort(key=lambda item: item.get_closest_marker("ray") is None)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """A worker takes whole files, and one of them all tests of Ray: two clusters are too much for two cores."""
    from xdist.scheduler import LoadScopeScheduling

    class Files(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return "ray" if file.startswith("tests/ray/") else file

    return Files(config, log)


@pytest.fixture(scope="session")
def topics_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python language reference, prepared: tokenizer/, pairs/train, pairs/heldout."""
    from dist_lm.data.prepare import PrepareOptions, prepare
    from dist_lm.data.tokenizer import train_tokenizer

    folder = tmp_path_factory.mktemp("topics")
    texts = [topics[name] for name in sorted(topics)]
    source = folder / "topics.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    train_tokenizer(texts, vocab_size=1000, out=folder / "tokenizer")
    prepare(
        PrepareOptions(
            inputs=[str(source)],
            out=folder / "pairs",
            tokenizer=folder / "tokenizer",
            seq_len=64,
            heldout_fraction=0.05,
            block_rows=64,
            shard_rows=1024,
            workers=1,
        )
    )
    return folder
