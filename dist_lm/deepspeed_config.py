"""A DeepSpeed JSON and a RunConfig -> the one dict that DeepSpeed sees.

Enters: a RunConfig and the file that its `deepspeed` names.  Leaves: settings for
deepspeed.initialize, and notes on what was decided.  Promises: every setting has one owner; a setting
with two different values is refused with both places; nothing called "auto" reaches DeepSpeed, which
would take it for "off" without a word.

    the JSON says         the YAML says       result
    nothing, or "auto"    anything            the YAML's value
    a value               the same value      that value
    a value               nothing             the JSON's value, for the whole run (`adopt`)
    a value               another value       ConfigError
"""

from __future__ import annotations

import copy
import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dist_lm import deepspeed_keys as keys
from dist_lm.config import RunConfig
from dist_lm.config_files import DEFAULT, LoadedConfig, load_config
from dist_lm.config_keys import flatten
from dist_lm.config_mistakes import Problem, raise_problems, translate
from dist_lm.deepspeed_json import (
    AUTO,
    as_tree,
    auto_paths,
    foreign_keys,
    nested,
    offload_problems,
    same,
    stray_autos,
    value_at,
    walk,
)
from dist_lm.deepspeed_keys import KeyPath
from dist_lm.errors import ConfigError
from dist_lm.json_tree import read_json_tree
from dist_lm.yaml_tree import Entry, Tree, find, merge, plain

NEVER = 10**9
"""Steps between two of DeepSpeed's own progress lines: dist_lm writes them."""
DEFAULT_STAGE = 1
_CUTOFF = 0.75
_UNIQUE = 'Keep one: remove it from the JSON, or write "auto" there.'
_ADVICE = "ds_configs/ has files that work; the YAML owns batch, optimizer, schedule and precision."


@dataclass(frozen=True)
class ResolvedDeepSpeed:
    """What DeepSpeed is told, and why."""

    settings: dict[str, Any]
    """For deepspeed.initialize; complete, without any "auto"."""
    notes: list[str]
    """What "auto" became and what was taken from the JSON, a line each."""
    config: RunConfig
    """The configuration with the values that the JSON decided."""


@dataclass(frozen=True)
class _Agreed:
    """The JSON and the YAML, once they agree."""

    tree: Tree
    config: RunConfig
    origins: dict[str, str]
    notes: list[str]

    def place(self, *path: str) -> str:
        """Where the JSON says `path`, or the YAML's place of the file."""
        *_, entry = [Entry(None, self.origins.get("deepspeed", DEFAULT)), *find(self.tree, path)]
        return entry.place

    def value(self, *path: str) -> Any:
        """The JSON's value; None where it says nothing or "auto"."""
        return value_at(self.tree, path)


def load_run(path: Path, overrides: Sequence[str] = ()) -> LoadedConfig:
    """The configuration of a YAML file and of the DeepSpeed file that it names, checked together."""
    return adopt(load_config(path, overrides))


def adopt(loaded: LoadedConfig) -> LoadedConfig:
    """The configuration with the values that only the DeepSpeed JSON gives; checks the JSON.

    Imports neither torch nor DeepSpeed.  Call it once after load_config, before anything reads the
    configuration.  Raises ConfigError.
    """
    agreed = _agree(loaded.config, loaded.origins)
    return LoadedConfig(agreed.config, agreed.origins)


def resolve(
    config: RunConfig,
    *,
    world_size: int,
    micro_rows: int,
    micro_steps: int,
    hidden_size: int | None = None,
    num_parameters: int | None = None,
    source_of: Mapping[str, str] | None = None,
) -> ResolvedDeepSpeed:
    """The settings of one run on `world_size` ranks.

    `micro_rows`, `micro_steps`: rows and number of the micro-batches of one step on one rank.
    `hidden_size`, `num_parameters`: of the model, for "auto" and for what follows from its size.
    `source_of`: LoadedConfig.origins.
    Raises ConfigError.
    """
    agreed = _agree(config, source_of if source_of is not None else _assumed_origins(config))
    notes = list(agreed.notes)
    problems = [*_sizes(agreed, world_size, micro_rows, micro_steps), *_accumulation(agreed)]
    settings = _complete(agreed, micro_rows, micro_steps, notes)
    problems += _formulas(agreed, settings, hidden_size, notes)
    if num_parameters is not None:
        _suit(settings["zero_optimization"], num_parameters)
    raise_problems(problems, str(config.deepspeed), do=_ADVICE)
    left = [".".join(path) for path in auto_paths(settings) if path not in keys.AUTO_IN_DEEPSPEED]
    assert not left, f"unresolved auto: {left}"
    return ResolvedDeepSpeed(settings, notes, agreed.config)


def check_with_deepspeed(settings: Mapping[str, Any], world_size: int, *, file: Path | None = None) -> None:
    """Let DeepSpeed parse resolved settings: it knows its nested keys and their types best.

    `file`: the JSON that they come from, for line numbers.  Imports deepspeed.  Raises ConfigError.
    """
    from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError

    values = copy.deepcopy(dict(settings))
    # DeepSpeed would compare this with the ranks of this process group, not with those of the run.
    batch = values.pop("train_batch_size", None)
    where = str(file or "")
    try:
        parsed = DeepSpeedConfig(values)
    except ValidationError as error:
        tree = read_json_tree(file) if file else {}
        raise_problems([*_deepspeed_mistakes(error, tree, where)], where, do=_ADVICE)
    except (DeepSpeedConfigError, AssertionError, TypeError, ValueError, KeyError) as error:
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError("DeepSpeed refuses its settings", where=where, why=why, do=_ADVICE) from error
    rows = parsed.train_micro_batch_size_per_gpu * parsed.gradient_accumulation_steps * world_size
    if batch is not None and batch != rows:
        why = f"micro-batch x accumulation x {world_size} ranks = {rows}"
        raise ConfigError(f"train_batch_size is {batch}", where=where, why=why, do="Leave it out.")


def _assumed_origins(config: RunConfig) -> dict[str, str]:
    """Without origins, what was set explicitly counts as explicit."""
    explicit = {".".join(path) for path, _ in walk(as_tree(config.model_dump(by_alias=True, exclude_unset=True)))}
    return {key: "the configuration" if key in explicit else DEFAULT for key in flatten(config)}


def _agree(config: RunConfig, origins: Mapping[str, str]) -> _Agreed:
    """Apply the table at the top of this module."""
    tree = read_json_tree(config.deepspeed, said_at=origins.get("deepspeed", "")) if config.deepspeed else {}
    problems = [*foreign_keys(tree), *stray_autos(tree)]
    current, sources, taken, notes = flatten(config), dict(origins), Tree(), []
    for path, owned in keys.OWNED_BY_YAML.items():
        written = value_at(tree, path)
        if written is None:
            continue
        if written is False and keys.SWITCHES.get(path, current["precision"]) != current["precision"]:
            continue
        place = list(find(tree, path))[-1].place
        wanted = owned.in_yaml_terms(written)
        source = sources.get(owned.key, DEFAULT)
        if isinstance(wanted, bool):
            problems.append(Problem(f"`{'.'.join(path)}` should not be true or false", place))
        elif not same(wanted, current[owned.key]):
            if source != DEFAULT and (owned.key != "zero" or current["zero"] != AUTO):
                problems.append(_set_twice(path, written, place, owned.key, current[owned.key], source))
                continue
            current[owned.key], sources[owned.key] = wanted, place
            taken = merge(taken, nested(owned.key, Entry(wanted, place)))
            notes.append(f"{owned.key} = {json.dumps(wanted)}   from {place}")
    try:
        values = merge(as_tree(config.model_dump(by_alias=True, exclude_unset=True)), taken)
        agreed = _Agreed(tree, RunConfig.model_validate(plain(values)), sources, notes)
        problems += offload_problems(tree, _stage(agreed.config), agreed.config.optim.name)
    except ValidationError as error:
        problems += translate(error, taken, str(config.deepspeed), set())
    raise_problems(problems, str(config.deepspeed), do=_ADVICE)
    return agreed


def _set_twice(path: KeyPath, written: Any, place: str, key: str, value: Any, source: str) -> Problem:
    why = f"{place}  {json.dumps(written)}\n{source}  {json.dumps(value, default=str)} ({key})"
    return Problem(f"`{'.'.join(path)}` is set twice", why=why, do=_UNIQUE)


def _stage(config: RunConfig) -> int:
    return DEFAULT_STAGE if config.zero == AUTO else int(config.zero)


def _sizes(agreed: _Agreed, world_size: int, micro_rows: int, micro_steps: int) -> Iterator[Problem]:
    """An accumulation count in the JSON must be the one that follows from batch and ranks."""
    written = agreed.value(*keys.DERIVED)
    if written is not None and not same(written, micro_steps):
        batch, origins = agreed.config.batch, agreed.origins
        why = (
            f"{agreed.place(*keys.DERIVED)}  {json.dumps(written)}\n"
            f"{origins.get('batch.global', DEFAULT)}  {batch.global_rows} rows (batch.global) on {world_size} ranks\n"
            f"{origins.get('batch.micro', DEFAULT)}  at most {batch.micro_rows} rows (batch.micro)\n"
            f"make {micro_steps} micro-steps of {micro_rows} rows"
        )
        yield Problem(f"`{keys.DERIVED[0]}` does not follow from the batch", why=why, do="Remove it from the JSON.")


def _accumulation(agreed: _Agreed) -> Iterator[Problem]:
    """DeepSpeed starts, and then fails or loses digits, with other pairs of types than these."""
    written = agreed.value("data_types", "grad_accum_dtype")
    config = agreed.config
    stage = _stage(config)
    allowed = {config.precision} if stage == 0 else {"fp32", config.precision}
    if written is not None and keys.data_type(written) not in allowed:
        source = agreed.origins.get("precision", DEFAULT)
        why = (
            f"{agreed.place('data_types', 'grad_accum_dtype')}  {json.dumps(written)}\n"
            f"{source}  {config.precision} (precision) at ZeRO stage {stage}"
        )
        yield Problem("gradients cannot be summed in that type", why=why, do=f"Write {' or '.join(sorted(allowed))}.")


def _complete(agreed: _Agreed, micro_rows: int, micro_steps: int, notes: list[str]) -> dict[str, Any]:
    """The JSON without its "auto"s, and what dist_lm owns."""
    config = agreed.config
    settings: dict[str, Any] = copy.deepcopy(plain(agreed.tree))
    for path in [*auto_paths(settings)]:
        if path not in keys.AUTO_IN_DEEPSPEED:
            _section(settings, path[:-1]).pop(path[-1])
    for name in ("train_batch_size", "optimizer"):
        # Left unset: DeepSpeed derives the one, and is handed the other.
        settings.pop(name, None)
    stage, low = _stage(config), config.precision != "fp32"
    settings |= {
        "train_micro_batch_size_per_gpu": micro_rows,
        "gradient_accumulation_steps": micro_steps,
        # Absent means 1.0 to DeepSpeed.
        "gradient_clipping": config.optim.clip,
        "steps_per_print": NEVER,
    }
    settings.setdefault("wall_clock_breakdown", False)
    # Its timer synchronises the device twice a micro-step.
    settings.setdefault("timers", {}).setdefault("throughput", {}).setdefault("enabled", False)
    settings.setdefault("bf16", {})["enabled"] = config.precision == "bf16"
    if config.precision == "fp16":
        settings.setdefault("fp16", {})["enabled"] = True
    settings.setdefault("zero_optimization", {})["stage"] = stage
    if config.optim.name != "adamw":
        # DeepSpeed's list of optimizers is short; any that treats each element alone is sound.
        settings["zero_allow_untested_optimizer"] = True
    if low and stage and micro_steps > 1:
        settings.setdefault("data_types", {}).setdefault("grad_accum_dtype", "fp32")
    if config.zero == AUTO:
        notes.append(f"zero = {stage}   default")
    return settings


def _formulas(
    agreed: _Agreed, settings: dict[str, Any], hidden_size: int | None, notes: list[str]
) -> Iterator[Problem]:
    """Fill in what "auto" stands for in settings that follow from the model's width."""
    asked = {path: entry for path, entry in walk(agreed.tree) if entry.value == AUTO and path in keys.FORMULAS}
    for path, entry in asked.items():
        name = ".".join(path)
        if hidden_size is None:
            notes.append(f"{name} = {keys.FORMULAS[path].words}   once the model is known")
            continue
        value = keys.FORMULAS[path].of_hidden_size(hidden_size)
        if value < 1:
            yield Problem(f"`{name}` would be {value}", entry.place, do="Write a value.")
        _section(settings, path[:-1])[path[-1]] = value
        notes.append(f"{name} = {value}   {keys.FORMULAS[path].words}, from {entry.place}")


def _suit(zero: dict[str, Any], num_parameters: int) -> None:
    """Fill in what DeepSpeed has one default for, whatever the size of the model."""
    if zero["stage"]:
        zero.setdefault("reduce_bucket_size", keys.default_bucket(zero["stage"], num_parameters))
    if zero["stage"] == 3:
        # Weights that are gathered once a step need no linear layer that gathers them again, in Python, for
        # its gradient.
        live = int(zero.get("stage3_max_live_parameters", keys.MOST_LIVE))
        if num_parameters <= live:
            zero.setdefault("memory_efficient_linear", False)


def _section(settings: dict[str, Any], path: KeyPath) -> dict[str, Any]:
    for name in path:
        settings = settings.setdefault(name, {})
    return settings


def _deepspeed_mistakes(error: ValidationError, tree: Tree, where: str) -> Iterator[Problem]:
    """Pydantic's errors inside DeepSpeed, with the lines of the keys that they are about."""
    for mistake in error.errors(include_url=False):
        name = str(mistake["loc"][-1]) if mistake["loc"] else ""
        place = next((entry.place for path, entry in walk(tree) if path[-1] == name), where)
        if not name:
            yield Problem(f"DeepSpeed refuses its {error.title}", place, mistake["msg"])
        elif mistake["type"] == "extra_forbidden":
            close = difflib.get_close_matches(name, _deepspeed_names(), n=1, cutoff=_CUTOFF)
            hint = f"did you mean `{close[0]}`?" if close else "Remove it."
            yield Problem(f"unknown DeepSpeed key `{name}`", place, do=hint)
        else:
            yield Problem(f"DeepSpeed refuses `{name}`", place, mistake["msg"])


def _deepspeed_names() -> list[str]:
    """Every name that some block of DeepSpeed's settings may have."""
    from deepspeed.runtime.config_utils import DeepSpeedConfigModel

    blocks = DeepSpeedConfigModel.__subclasses__()
    return sorted({info.alias or name for block in blocks for name, info in block.model_fields.items()})
