"""What ranks send each other in a step, and how long that takes.

Enters: bytes of the weights, ZeRO stage, topology.  Leaves: bytes and seconds.
Promises: volumes are those that wrapped collectives counted; seconds follow a stated model:

    seconds = max(0, wire / bandwidth - hidden) + calls x ranks x LATENCY_S

Ring collectives send (N - 1) / N of their volume a rank and direction.  LATENCY_S is fitted to the
scaling of llm-foundry's published table (128 to 512 H100, 1B to 70B parameters); published.py has the
points, those that were not fitted, and the errors.  Beyond some thousand GPUs the model knows nothing of
stragglers and slow links.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

LATENCY_S = 2.8e-6
"""A collective costs this for each rank."""
_HIDDEN_SHARE = 2 / 3
"""Of the compute time, the backward pass, behind which reductions can hide."""


@dataclass(frozen=True)
class Topology:
    """N ranks on hosts of `per_node`."""

    ranks: int
    per_node: int
    node_gb_s: float
    network_gb_s: float

    @property
    def gb_s(self) -> float:
        """Of a collective's rings.

        Between hosts there is a ring for each port of a host, and each carries its part of the bytes: what
        a host's ports carry together is what one device gets.
        """
        across = min(self.node_gb_s, self.network_gb_s * self.per_node)
        return self.node_gb_s if self.ranks <= self.per_node else across


@dataclass(frozen=True)
class Traffic:
    """Of one rank in one step."""

    wire_bytes: float
    """Sent."""
    calls: float
    """Of all ranks; one among a part of them counts that part."""
    hideable_bytes: float
    """Part that may go on while the backward pass computes."""

    def beside(self, wire_bytes: float, *, calls: float) -> Traffic:
        """With what nothing hides: the next product waits for it."""
        return replace(self, wire_bytes=self.wire_bytes + wire_bytes, calls=self.calls + calls)

    def seconds(self, topology: Topology, compute_s: float, *, latency_s: float = LATENCY_S) -> float:
        """Time that a step is longer for it."""
        if topology.ranks == 1:
            return 0.0
        rate = topology.gb_s * 1e9
        exposed = (self.wire_bytes - self.hideable_bytes) / rate
        hidden = max(0.0, self.hideable_bytes / rate - _HIDDEN_SHARE * compute_s)
        return exposed + hidden + self.calls * topology.ranks * latency_s


def traffic(weight_bytes: float, *, stage: int, ranks: int, micro_steps: int, gathers: int) -> Traffic:
    """Volumes in multiples of the weights' bytes: an all-reduce counts 2, a gather or a scatter 1.

    Stages 0 to 2 reduce once a step (engine.py coalesces the reductions of stage 2); stage 3 gathers
    for every pass and scatters for every micro-step, `gathers` modules each time.
    """
    ring = (ranks - 1) / ranks
    if stage == 0:
        return Traffic(2 * weight_bytes * ring, 2, 2 * weight_bytes * ring if micro_steps == 1 else 0.0)
    if stage in (1, 2):
        return Traffic(3 * weight_bytes * ring, 3, 2 * weight_bytes * ring if micro_steps == 1 else 0.0)
    whole = 3 * weight_bytes * micro_steps * ring
    return Traffic(whole, 3 * gathers * micro_steps, whole)
