"""The one Ray head that tests share."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import ray

from tests.gloo_ranks import REPOSITORY
from tests.ray.hosts import Network, network

_HEAD = pytest.StashKey[ExitStack]()


@pytest.fixture(scope="session")
def head_net(pytestconfig: pytest.Config) -> Iterator[Network]:
    """One host with two CPUs and a token."""
    with ExitStack() as stack:
        made = stack.enter_context(network(1))
        pytestconfig.stash[_HEAD] = stack
        made.start_head(num_cpus=2)
        made.wait_for_nodes(1)
        yield made


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Function, nextitem: pytest.Function | None) -> Iterator[None]:
    """The head ends with the last test that shares it: at rest it takes a tenth of a core from all that follow."""
    yield
    if "head_net" in item.fixturenames and (nextitem is None or "head_net" not in nextitem.fixturenames):
        item.config.stash.get(_HEAD, ExitStack()).close()


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
