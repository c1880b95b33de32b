"""Accelerators by name: memory, peak rates and links.

Enters: a name, as a person or as a driver writes it.  Leaves: an Accelerator.
Promises: memory is what the driver reports as a whole; rates are the vendor's, dense, without sparsity.

Sources: NVIDIA's data sheets of the devices.  Links are what collectives reach in practice, a direction
and a device: NVLink at 0.8 of its nominal rate, between hosts one 400 Gb/s port a device where hosts
with that device are sold so, else what clouds offer.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from dist_lm.errors import ConfigError


@dataclass(frozen=True)
class Accelerator:
    """One device."""

    name: str
    memory_gib: float
    low_tflops: float
    """Peak of matrix products in bf16 or fp16 with fp32 sums; 0: it has neither."""
    fp32_tflops: float
    """Peak in fp32 proper: torch does not use TF32 unless told to."""
    node_gb_s: float
    """Between the devices of a host."""
    network_gb_s: float
    """Between hosts, a device."""
    bf16: bool = True
    per_node: int = 8

    def peak_flops(self, precision: str) -> float:
        """FLOP/s; raises ConfigError where the device lacks the precision."""
        if precision == "fp32":
            return self.fp32_tflops * 1e12
        if precision == "bf16" and not self.bf16:
            do = "Set precision to fp16, or take a newer device."
            raise ConfigError(f"{self.name} has no bf16", where="precision", do=do)
        return self.low_tflops * 1e12


ACCELERATORS = {
    device.name: device
    for device in (
        Accelerator("b200", 179.1, 2250.0, 75.0, 720.0, 45.0),
        Accelerator("h200", 140.4, 989.0, 67.0, 360.0, 45.0),
        Accelerator("h100", 79.6, 989.0, 67.0, 360.0, 45.0),
        Accelerator("a100", 80.0, 312.0, 19.5, 240.0, 23.0),
        Accelerator("a100-40gb", 40.0, 312.0, 19.5, 240.0, 23.0),
        Accelerator("l40s", 45.0, 362.0, 91.6, 20.0, 6.0),
        Accelerator("l4", 22.5, 121.0, 30.3, 12.0, 3.0),
        Accelerator("a10g", 22.5, 70.0, 31.2, 12.0, 3.0),
        Accelerator("v100", 32.0, 125.0, 15.7, 120.0, 3.0, bf16=False),
        Accelerator("t4", 15.0, 65.0, 8.1, 10.0, 2.0, bf16=False, per_node=4),
        Accelerator("rtx4090", 24.0, 165.0, 82.6, 20.0, 1.2),
    )
}
CPU = "cpu"


def accelerator(name: str) -> Accelerator:
    """Raises ConfigError where nobody knows the name."""
    if name not in ACCELERATORS:
        known = ", ".join([*ACCELERATORS, CPU])
        raise ConfigError(f"there is no accelerator `{name}`", where="--gpu", do=f"Write one of {known}.")
    return ACCELERATORS[name]


def known_as(device: str) -> Accelerator | None:
    """The accelerator that a driver calls `device`; None where it is another one, or a part of one.

    The PCIe cards of H100, H200 and V100 have lower peaks than the modules of that name.
    """
    words = set(re.findall(r"[a-z0-9.]+", device.lower()))
    if words & {"mig", "laptop", "ti", "super"} or (words & {"h100", "h200", "v100"} and words & {"pcie", "nvl"}):
        return None
    if {"a100", "40gb"} <= words:
        return ACCELERATORS["a100-40gb"]
    if {"rtx", "4090"} <= words:
        return ACCELERATORS["rtx4090"]
    return next((one for name, one in ACCELERATORS.items() if name in words), None)
