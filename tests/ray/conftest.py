"""The one Ray head that tests share."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from tests.gloo_ranks import REPOSITORY
from tests.ray.hosts import Network, network


@pytest.fixture(scope="session")
def head_net() -> Iterator[Network]:
    """One host with two CPUs and a token."""
    with network(1) as made:
        made.start_head(num_cpus=2)
        made.wait_for_nodes(1)
        yield made


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    """Ray in this process, with two CPUs; its head has no dashboard."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def clean_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a user submits from: this project's code and nothing else; each test adds its recipes."""
    folder = tmp_path_factory.mktemp("clean") / "tree"
    for name in ("dist_lm", "launch", "ds_configs"):
        shutil.copytree(REPOSITORY / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder
