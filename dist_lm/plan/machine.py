"""The machine that a plan is for.

Enters: the name of an accelerator or `cpu`, a number of ranks.  Leaves: a Machine.
Promises: of CPU ranks, what this very machine has and what a process takes before it has a model is
measured, not assumed.
"""

from __future__ import annotations

import os

from dist_lm.accelerators import CPU, accelerator
from dist_lm.plan.baseline import process_bytes
from dist_lm.plan.plan import CONTEXT_GIB, GIB, Machine
from dist_lm.plan.traffic import Topology

_CPU_GB_S = 2.0
"""gloo between processes of one host."""


def machine_of(name: str, ranks: int, precision: str) -> Machine:
    """Raises ConfigError where the name is unknown or the device lacks the precision."""
    if name == CPU:
        topology = Topology(ranks, ranks, _CPU_GB_S, _CPU_GB_S)
        return Machine(ranks, None, _host_memory_gib() / ranks, process_bytes() / GIB, 0.0, topology)
    device = accelerator(name)
    topology = Topology(ranks, device.per_node, device.node_gb_s, device.network_gb_s)
    return Machine(ranks, device, device.memory_gib, CONTEXT_GIB, device.peak_flops(precision), topology)


def _host_memory_gib() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
