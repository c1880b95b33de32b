"""How DeepSpeed is driven: which parts of a step it does, and which the engine does.

Enters: resolved DeepSpeed settings.  Leaves: an optimizer that ZeRO can take apart, and the settings of
what DeepSpeed shall not do a second time.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch

from dist_lm import deepspeed_keys as keys
from dist_lm.config import OptimSection
from dist_lm.errors import ConfigError

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_DEEPSPEEDS_OWN = (
    "communication_data_type",
    "prescale_gradients",
    "gradient_predivide_factor",
    "disable_allgather",
)
"""Settings about the reduction that only DeepSpeed's own has."""
_DEEPSPEEDS_OWN_IN_ZERO = ("round_robin_gradients", "reduce_scatter", "use_multi_rank_bucket_allreduce")

_DEEPSPEEDS_OWN_AT_STAGE_3 = (
    "leaf_module",
    "mics_shard_size",
    "stage3_module_granularity_threshold",
    "stage3_use_all_reduce_for_fetch_params",
    "zero_hpz_partition_size",
    "zero_quantized_nontrainable_weights",
    "zero_quantized_weights",
)
"""Settings about the gathering that only DeepSpeed's own hooks know."""


def reduces_itself(settings: Mapping[str, Any]) -> bool:
    """Whether dist_lm/gradients.py reduces gradients: stages 1 and 2 in fp32 or bf16, on the ranks' device.

    fp16 needs DeepSpeed's loss scale, offload its copies to the host; and who sets a key about the
    reduction gets DeepSpeed's.
    """
    zero = settings.get("zero_optimization", {})
    fp16 = settings.get("fp16", {}).get("enabled", False)
    compiled = settings.get("compile", {}).get("deepcompile", False)
    asked = any(name in settings for name in _DEEPSPEEDS_OWN) or any(name in zero for name in _DEEPSPEEDS_OWN_IN_ZERO)
    return zero.get("stage", 0) in (1, 2) and not (fp16 or offloads(settings) or compiled or asked)


def hand_over_reduction(settings: dict[str, Any]) -> torch.dtype | None:
    """Switch off what DeepSpeed would do with gradients; the type in which micro-batches are summed, if set.

    Norm, clipping and the search for infinities are the engine's; without the type DeepSpeed has the
    same optimizer for stages 1 and 2.
    """
    settings["zero_optimization"]["compute_grad_norm"] = False
    settings.setdefault("bf16", {})["check_grad_overflow"] = False
    types = settings.get("data_types", {})
    return _DTYPES.get(types.pop("grad_accum_dtype", None))


def require_precision(settings: Mapping[str, Any]) -> None:
    """Raises ConfigError where this rank's device does not compute in the type that is asked for."""
    from deepspeed.accelerator import get_accelerator

    device = get_accelerator()
    for name, others, has in (
        ("fp16", "bf16 or fp32", device.is_fp16_supported),
        ("bf16", "fp16 or fp32", device.is_bf16_supported),
    ):
        if settings.get(name, {}).get("enabled") and not has():
            what = f"{device.device_name()} of this machine has no {name}"
            raise ConfigError(what, where="precision", do=f"Write precision={others}.")


def gathers_once(settings: Mapping[str, Any], num_parameters: int) -> bool:
    """Whether dist_lm/whole_weights.py gathers the weights of stage 3: where all of them may be whole at one time.

    Weights that lie elsewhere between steps need DeepSpeed's hooks; and who sets a key about how weights
    are gathered gets DeepSpeed's way.
    """
    zero = settings.get("zero_optimization", {})
    compiled = settings.get("compile", {}).get("deepcompile", False)
    asked = any(name in zero for name in _DEEPSPEEDS_OWN_AT_STAGE_3)
    live = int(zero.get("stage3_max_live_parameters", keys.MOST_LIVE))
    return (
        zero.get("stage", 0) == 3
        and num_parameters <= live
        and not (compiled or asked or keys.offloads(zero, "offload_param"))
    )


def hand_over_gathering(settings: dict[str, Any]) -> None:
    """All weights are gathered together: none is kept whole between steps, and gathered by itself after each."""
    settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0


def spare_host_work() -> None:
    """Switch off what DeepSpeed's Python does at each call for nobody.

    Ranges for a profiler around every function of ZeRO; and, on a CPU, a `numactl` started at each
    reduction of stage 3 to count devices, where a variable of DeepSpeed's launcher does not.
    """
    import deepspeed.utils.nvtx

    deepspeed.utils.nvtx.enable_nvtx = False
    os.environ.setdefault("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", "1"))
    import_without_compiler()


def import_without_compiler() -> None:
    """Import DeepSpeed's Muon, whose class it looks for in each engine, and leave its functions as they are.

    To decorate them with torch.compile takes torch's inductor, a second of every start, and no optimizer
    here calls them.
    """
    from deepspeed.runtime import compiler

    decorated = compiler.compile
    compiler.compile = lambda: lambda function: function
    try:
        import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
    finally:
        compiler.compile = decorated


def overlaps(settings: Mapping[str, Any]) -> bool:
    """Whether gradients are reduced beside the backward pass; DeepSpeed's default at stage 3 is ours at 1 and 2."""
    asked = settings.get("zero_optimization", {}).get("overlap_comm")
    return asked is None or bool(asked)


def offloads(settings: Mapping[str, Any]) -> bool:
    return keys.offloads(settings.get("zero_optimization", {}), "offload_optimizer")


def is_plain(settings: Mapping[str, Any]) -> bool:
    """Stage 0 in fp32: DeepSpeed uses the optimizer as it is, without a wrapper."""
    low_precision = any(settings.get(name, {}).get("enabled") for name in ("bf16", "fp16"))
    return settings.get("zero_optimization", {}).get("stage", 0) == 0 and not low_precision


def build_optimizer(
    optim: OptimSection, parameter_groups: list[dict[str, Any]], settings: dict[str, Any]
) -> torch.optim.Optimizer:
    """Optimizers that treat each element alone: ZeRO hands them pieces of flattened parameters.

    `settings` says afterwards that DeepSpeed is to take the one that is returned.
    """
    adaptive: dict[str, Any] = {"lr": optim.lr, "betas": optim.betas, "eps": optim.eps}
    if optim.name == "adamw" and keys.deepspeeds_adam(settings):
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(parameter_groups, **adaptive)  # type: ignore[no-any-return]
    # On the host, too, torch's own are as fast as DeepSpeed's, and need no compiler.
    settings["zero_force_ds_cpu_optimizer"] = False
    if optim.name == "sgd":
        return torch.optim.SGD(parameter_groups, lr=optim.lr, momentum=optim.momentum)
    if optim.name == "nadam":
        return torch.optim.NAdam(parameter_groups, **adaptive, decoupled_weight_decay=True)
    return torch.optim.AdamW(parameter_groups, **adaptive, fused=True)
