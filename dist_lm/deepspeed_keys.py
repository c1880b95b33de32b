"""Who owns which DeepSpeed setting, and what some of them ask for.  Derived from DeepSpeed 0.19.

DeepSpeed ignores top-level keys that it does not know, and in some blocks any key: a typo trains
silently with a default.  So every key is listed here, and a test compares the lists with the keys
that the installed DeepSpeed reads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from dist_lm import ops

KeyPath = tuple[str, ...]

DEEPSPEED_OWNED = frozenset(
    {
        "activation_checkpointing",
        "aio",
        "bf16",
        "comms_logger",
        "communication_data_type",
        "compile",
        "data_types",
        "disable_allgather",
        "disable_python_gc",
        "dump_state",
        "flops_profiler",
        "fp16",
        "gradient_predivide_factor",
        "log_level",
        "memory_breakdown",
        "prescale_gradients",
        "timers",
        "torch_autocast",
        "wall_clock_breakdown",
        "zero_allow_untested_optimizer",
        "zero_force_ds_cpu_optimizer",
        "zero_optimization",
    }
)
"""Top-level keys that pass through (some of their parts are owned elsewhere, see below)."""

_OUR_ORDER = "dist_lm decides the order of the data (data.lanes, data.era)"
_OUR_LOGS = "dist_lm writes TensorBoard and metrics.jsonl into the run folder"
_OUR_CHECKPOINTS = "dist_lm writes its own checkpoints (run.save_every, run.keep)"
_OUR_DIVISION = "dist_lm divides gradients by the number of target tokens"
_WHOLE_MODELS = "in dist_lm every rank holds the whole model, or its ZeRO shard"
_REMOVED = "DeepSpeed has removed it"

REFUSED: dict[str, str] = {
    "scheduler": "dist_lm owns the learning rate schedule (optim.schedule)",
    "tensorboard": _OUR_LOGS,
    "wandb": _OUR_LOGS,
    "csv_monitor": _OUR_LOGS,
    "comet": _OUR_LOGS,
    "checkpoint": _OUR_CHECKPOINTS,
    "datastates_ckpt": _OUR_CHECKPOINTS,
    "data_efficiency": _OUR_ORDER,
    "dataloader_drop_last": _OUR_ORDER,
    "managed_gradient_accumulation": _OUR_DIVISION,
    "gradient_allreduce_op": _OUR_DIVISION,
    "autotuning": "dist_lm does not start DeepSpeed's autotuning",
    "vocabulary_size": "the tokenizer decides it (data.tokenizer)",
    "bfloat16": "DeepSpeed's name for it is bf16",
    "pipeline": _WHOLE_MODELS,
    "tensor_parallel": _WHOLE_MODELS,
    "expert_parallel": _WHOLE_MODELS,
    "use_data_before_expert_parallelism": _WHOLE_MODELS,
    "sequence_parallel_size": "the YAML says it, under the same name",
    "seq_parallel_communication_data_type": "parts of rows are sent in the type of `precision`",
    "hybrid_engine": "it is for generation inside the loop, which dist_lm does not do",
    "weight_quantization": "it is for inference",
    "amp": _REMOVED,
    "compression_training": _REMOVED,
    "curriculum_learning": _REMOVED,
    "eigenvalue": _REMOVED,
    "elasticity": _REMOVED,
    "graph_harvesting": _REMOVED,
    "nebula": _REMOVED,
    "progressive_layer_drop": _REMOVED,
    "quantize_training": _REMOVED,
    "sparse_attention": _REMOVED,
    "sparse_gradients": _REMOVED,
}
"""Top-level keys that DeepSpeed reads and a dist_lm run must not set, and why."""

_FP32_MASTERS = "bf16 in dist_lm keeps fp32 master weights and optimizer states"
_USE_OFFLOAD = "it is deprecated: write offload_optimizer or offload_param with a device"

REFUSED_IF_ON: dict[KeyPath, str] = {
    ("fp16", "auto_cast"): "dist_lm casts the model itself",
    ("torch_autocast", "enabled"): "precision is fp32, bf16 or fp16, and the YAML owns it",
    ("bf16", "bf16_master_weights_and_grads"): _FP32_MASTERS,
    ("bf16", "bf16_optimizer_states"): _FP32_MASTERS,
    ("zero_optimization", "cpu_offload"): _USE_OFFLOAD,
    ("zero_optimization", "cpu_offload_param"): _USE_OFFLOAD,
    ("zero_optimization", "cpu_offload_use_pin_memory"): _USE_OFFLOAD,
    ("zero_optimization", "zenflow"): "it applies gradients late, so a run could not be resumed exactly",
}
"""Nested keys that may be absent, false or "auto" only, and why."""

REFUSED_IF_OFF: dict[KeyPath, str] = {
    ("zero_optimization", "compute_grad_norm"): "dist_lm logs the gradient norm and stops when it diverges",
}
"""Nested keys that may be absent, true or "auto" only, and why."""

OBJECTS: frozenset[KeyPath] = frozenset(
    {
        ("activation_checkpointing",),
        ("aio",),
        ("bf16",),
        ("comms_logger",),
        ("compile",),
        ("data_types",),
        ("flops_profiler",),
        ("fp16",),
        ("optimizer",),
        ("optimizer", "params"),
        ("timers",),
        ("timers", "throughput"),
        ("torch_autocast",),
        ("zero_optimization",),
        ("zero_optimization", "offload_optimizer"),
        ("zero_optimization", "offload_param"),
    }
)
"""Keys whose value is an object."""

UNCHECKED: dict[KeyPath, frozenset[str]] = {
    ("activation_checkpointing",): frozenset(
        {
            "partition_activations",
            "number_checkpoints",
            "contiguous_memory_optimization",
            "synchronize_checkpoint_boundary",
            "profile",
            "cpu_checkpointing",
        }
    ),
    ("aio",): frozenset(
        {"block_size", "queue_depth", "intra_op_parallelism", "single_submit", "overlap_events", "use_gds"}
    ),
    ("data_types",): frozenset({"grad_accum_dtype", "param_dtype", "buffer_dtype", "keep_in_fp32_modules"}),
    ("flops_profiler",): frozenset(
        {
            "enabled",
            "recompute_fwd_factor",
            "profile_step",
            "module_depth",
            "top_modules",
            "detailed",
            "output_file",
        }
    ),
    ("optimizer",): frozenset({"type", "params"}),
    ("optimizer", "params"): frozenset({"lr", "betas", "eps", "weight_decay"}),
    ("timers",): frozenset({"throughput"}),
    ("torch_autocast",): frozenset({"enabled", "dtype", "lower_precision_safe_modules"}),
}
"""Blocks whose unknown keys DeepSpeed ignores, or would never see, with the keys that count."""


def _precision(name: str) -> Callable[[Any], Any]:
    """What `enabled` of the block `name` says about the precision."""
    return lambda enabled: {True: name, False: "fp32"}.get(enabled, enabled) if isinstance(enabled, bool) else enabled


def data_type(name: Any) -> Any:
    """A type's short name, of the several that DeepSpeed takes."""
    short = str(name).lower().removeprefix("torch.")
    return {"bfloat16": "bf16", "float32": "fp32", "float": "fp32", "float16": "fp16", "half": "fp16"}.get(short, short)


def _optimizer(name: Any) -> Any:
    # DeepSpeed's "Adam" decays weights as AdamW does unless told otherwise.
    lowered = str(name).lower()
    return "adamw" if lowered == "adam" else lowered if lowered in ("adamw", "nadam", "sgd") else name


def _as_it_is(value: Any) -> Any:
    return value


class Owned(NamedTuple):
    """A DeepSpeed setting whose owner is a key of the YAML."""

    key: str
    in_yaml_terms: Callable[[Any], Any] = _as_it_is


OWNED_BY_YAML: dict[KeyPath, Owned] = {
    ("train_batch_size",): Owned("batch.global"),
    ("train_micro_batch_size_per_gpu",): Owned("batch.micro"),
    ("gradient_clipping",): Owned("optim.clip"),
    ("steps_per_print",): Owned("run.log_every"),
    ("bf16", "enabled"): Owned("precision", _precision("bf16")),
    ("fp16", "enabled"): Owned("precision", _precision("fp16")),
    ("data_types", "param_dtype"): Owned("precision", data_type),
    ("zero_optimization", "stage"): Owned("zero"),
    ("optimizer", "type"): Owned("optim.name", _optimizer),
    ("optimizer", "params", "lr"): Owned("optim.lr"),
    ("optimizer", "params", "betas"): Owned("optim.betas"),
    ("optimizer", "params", "eps"): Owned("optim.eps"),
    ("optimizer", "params", "weight_decay"): Owned("optim.weight_decay"),
}
"""Settings with two possible homes: "auto", absent or equal in the JSON, else see deepspeed_config."""

SWITCHES: dict[KeyPath, str] = {("bf16", "enabled"): "bf16", ("fp16", "enabled"): "fp16"}
"""Settings that, when off, only say which precision it is not."""

DERIVED: KeyPath = ("gradient_accumulation_steps",)
"""Follows from batch.global, batch.micro and the number of ranks."""


class Formula(NamedTuple):
    """What "auto" stands for in a setting that DeepSpeed owns."""

    words: str
    of_hidden_size: Callable[[int], Any]


FORMULAS: dict[KeyPath, Formula] = {
    ("zero_optimization", "reduce_bucket_size"): Formula("hidden size squared", lambda h: h * h),
    ("zero_optimization", "allgather_bucket_size"): Formula("hidden size squared", lambda h: h * h),
    ("zero_optimization", "stage3_prefetch_bucket_size"): Formula(
        "0.9 x hidden size squared", lambda h: 9 * h * h // 10
    ),
    ("zero_optimization", "stage3_param_persistence_threshold"): Formula("10 x hidden size", lambda h: 10 * h),
}

SMALLEST_BUCKET, LARGEST_BUCKET = 1_000_000, 200_000_000
BUCKETS_OF_A_MODEL = 8
"""Elements of a reduction at stages 1 and 2, where the JSON does not say."""


def offloads(zero: Mapping[str, Any], part: str) -> bool:
    """Whether a block zero_optimization keeps its part, `offload_optimizer` or `offload_param`, off the device."""
    return bool(zero.get(part, {}).get("device", "none") != "none")


def deepspeeds_adam(settings: Mapping[str, Any]) -> bool:
    """Whether optimizer states on the host are of a kind that only DeepSpeed's own CPU Adam updates.

    A compiler builds it.  Those that lie on NVMe are; those of which a part stays on the device; and where
    the JSON asks for it.
    """
    place = settings.get("zero_optimization", {}).get("offload_optimizer", {})
    in_part = place.get("ratio", 1.0) < 1.0 or place.get("super_offload", False)
    asked = settings.get("zero_force_ds_cpu_optimizer", False)
    return place.get("device") == "nvme" or bool(place.get("device") == "cpu" and (in_part or asked))


def needed_ops(settings: Mapping[str, Any], *, cpu: bool) -> list[str]:
    """Ops that DeepSpeed loads with these settings, and compiles where they are missing."""
    zero = settings.get("zero_optimization", {})
    found = [ops.CPU_OP] if cpu else []
    if deepspeeds_adam(settings):
        found.append(ops.CPU_ADAM)
    if "nvme" in [zero.get(name, {}).get("device") for name in ("offload_optimizer", "offload_param")]:
        found.append(ops.ASYNC_IO)
    return found


def default_bucket(stage: int, num_parameters: int) -> int:
    """reduce_bucket_size where nobody sets it: some buckets are reduced while the backward pass fills the others.

    Stage 3 allocates its one bucket whole.
    """
    if stage == 3:
        return min(num_parameters, LARGEST_BUCKET)
    return min(max(num_parameters // BUCKETS_OF_A_MODEL, SMALLEST_BUCKET), LARGEST_BUCKET)


MOST_LIVE = 10**9
"""DeepSpeed's default of stage3_max_live_parameters."""

AUTO_IN_DEEPSPEED: frozenset[KeyPath] = frozenset({("data_types", "keep_in_fp32_modules")})
"""Settings in which "auto" has a meaning in DeepSpeed itself."""

AUTO_IS_ABSENT: frozenset[KeyPath] = frozenset({("data_types", "grad_accum_dtype")})
"""Settings that dist_lm chooses unless the JSON does."""
