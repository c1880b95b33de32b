"""Ray's `fake_multinode` provider of an autoscaler, with a folder for each node.

Enters: `folder` of the provider's section, where the nodes have theirs.  Leaves: Ray nodes on the head's host.
Promises: what one node unpacks of a job, another one does not take away: as they come, the nodes share the
head's folder, and a driver loses its working directory when a second node unpacks it there.
"""

from __future__ import annotations

import functools
import tempfile
from typing import Any
from unittest import mock

import ray
from ray.autoscaler._private.fake_multi_node.node_provider import FakeMultiNodeProvider


class OwnFolders(FakeMultiNodeProvider):
    """Nodes as `ray start --temp-dir` makes them."""

    def _create_node_with_resources_and_labels(self, *given: Any) -> None:
        folder = tempfile.mkdtemp(dir=self.provider_config["folder"])
        parameters = functools.partial(ray._private.parameter.RayParams, temp_dir=folder)
        with self.lock, mock.patch.object(ray._private.parameter, "RayParams", parameters):
            super()._create_node_with_resources_and_labels(*given)
