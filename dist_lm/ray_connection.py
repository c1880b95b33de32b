"""The way into a Ray cluster.

Enters: RAY_ADDRESS, or the cluster on this machine.  Leaves: a process that has joined it.
Promises: where nobody answers, it is told within seconds.
"""

from __future__ import annotations

import os
import socket

from dist_lm.errors import EnvironmentFault

CONNECT_S = 5.0


def join() -> bool:
    """Join the cluster, unless this process has.  False where its head has no dashboard.

    Raises EnvironmentFault where the cluster cannot be joined.
    """
    import ray
    from ray._private.services import canonicalize_bootstrap_address

    if ray.is_initialized():
        return True
    # Inside a job RAY_ADDRESS names the cluster; elsewhere the cluster on this machine is meant.
    address = os.environ.get("RAY_ADDRESS", "auto")
    try:
        # Ray waits for minutes for a cluster of this machine whose network is gone.
        expect_answer(canonicalize_bootstrap_address(address) if address == "auto" else address, "RAY_ADDRESS")
        context = ray.init(address=address, log_to_driver=True)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise EnvironmentFault(
            f"the Ray cluster `{address}` cannot be joined",
            why=str(error).splitlines()[0],
            do="Start one (docs/cluster.md), set RAY_ADDRESS, or do without Ray.",
        ) from error
    return bool(context.address_info["webui_url"])


def expect_answer(address: str, said_at: str) -> None:
    """Raise EnvironmentFault where nobody listens: Ray itself would wait for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_S).close()
    except OSError as error:
        raise EnvironmentFault(
            f"nobody answers at {address}",
            where=said_at,
            why=str(error),
            do="Check that the head runs and that its port can be reached from here.",
        ) from error
