"""Throughput that others published at several numbers of GPUs, beside what the model of traffic.py says.

Enters: nothing.  Leaves: a Comparison a point.
Promises: a prediction knows the model's shape, the micro-batch and one measured point, that of the fewest
GPUs of its series; the points of FITTED decided LATENCY_S, the others did not.

Sources: MosaicML llm-foundry, scripts/train/benchmarking/README.md (H100 80GB BF16; FSDP; MFU is of
989 TFLOP/s); PyTorch torchtitan, benchmarks/llama3_h100_202412_torchtitan.md (FSDP2 with compile).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from dist_lm.accelerators import accelerator
from dist_lm.plan.traffic import LATENCY_S, Topology, Traffic

_BF16_BYTES = 2


@dataclass(frozen=True)
class Series:
    """One model in one setting, on more and more GPUs, one micro-step a step."""

    name: str
    parameters: float
    layers: int
    """Each is gathered alone, as are the embeddings."""
    gathers_again: bool
    """Layers are gathered for the backward pass again: FULL_SHARD, or ZeRO-3."""
    rates: dict[int, float]
    """Number of GPUs: tokens a second and GPU."""
    tokens_a_step: int
    fitted: bool


def _mpt(name: str, parameters: float, layers: int, rows: int, rates: dict[int, float], kind: str = "") -> Series:
    return Series(f"MPT {name}", parameters, layers, "whole" not in kind, rates, rows * 2048, "fitted" in kind)


SERIES = (
    _mpt("1B", 1315950592, 24, 12, {128: 44123, 256: 42555, 512: 39837}, "fitted, whole"),
    _mpt("3B", 2651837440, 32, 8, {128: 23422, 256: 22772, 512: 21664}, "fitted, whole"),
    _mpt("7B", 6658859008, 32, 6, {128: 10475, 256: 10119, 512: 9670}, "fitted"),
    _mpt("13B", 12853954560, 40, 16, {128: 5080, 256: 4989, 512: 4952}, "fitted"),
    _mpt("30B", 29975214080, 48, 8, {128: 2199, 256: 2148, 512: 2115}, "fitted"),
    _mpt("70B", 64862437376, 80, 8, {128: 1058, 256: 1035, 512: 1007}, "fitted"),
    _mpt("1B, 20 rows", 1315950592, 24, 20, {16: 46037, 32: 45130, 64: 44402}),
    _mpt("7B, one host", 6658859008, 32, 6, {8: 10643, 128: 10475}),
    _mpt("13B, 2 rows", 12853954560, 40, 2, {8: 4792, 16: 4767, 32: 4811, 64: 4800}),
    Series(
        "Llama 3 8B, torchtitan",
        parameters=8.03e9,
        layers=32,
        gathers_again=True,
        rates={8: 6667, 128: 6514},
        tokens_a_step=2 * 8192,
        fitted=False,
    ),
)


@dataclass(frozen=True)
class Comparison:
    """Tokens a second of one GPU as a share of those at the fewest GPUs of the series."""

    series: str
    fewest: int
    gpus: int
    published: float
    predicted: float
    fitted: bool

    @property
    def error(self) -> float:
        return self.predicted / self.published - 1


def comparisons(latency_s: float = LATENCY_S) -> list[Comparison]:
    """Every point but the first of each series."""
    return [comparison for series in SERIES for comparison in _of(series, latency_s)]


def root_mean_square(found: list[Comparison]) -> float:
    return float((sum(each.error**2 for each in found) / len(found)) ** 0.5)


def _of(series: Series, latency_s: float) -> Iterator[Comparison]:
    fewest = min(series.rates)
    compute_s = _compute_s(series, fewest, latency_s)
    for gpus, rate in sorted(series.rates.items()):
        if gpus != fewest:
            step_s = compute_s + _communication_s(series, gpus, compute_s, latency_s)
            predicted = series.tokens_a_step / step_s / series.rates[fewest]
            yield Comparison(series.name, fewest, gpus, rate / series.rates[fewest], predicted, series.fitted)


def _compute_s(series: Series, gpus: int, latency_s: float) -> float:
    """Such that the step takes at `gpus` what was published: communication depends on what it hides behind."""
    step_s = compute_s = series.tokens_a_step / series.rates[gpus]
    for _ in range(50):
        compute_s = step_s - _communication_s(series, gpus, compute_s, latency_s)
    return compute_s


def _communication_s(series: Series, gpus: int, compute_s: float, latency_s: float) -> float:
    device = accelerator("h100")
    topology = Topology(gpus, device.per_node, device.node_gb_s, device.network_gb_s)
    passes = 3 if series.gathers_again else 2
    sent = passes * series.parameters * _BF16_BYTES * (gpus - 1) / gpus
    return Traffic(sent, passes * (series.layers + 1), sent).seconds(topology, compute_s, latency_s=latency_s)
