"""Imports go down the layers of the map, and third-party libraries enter at their seams only."""

from __future__ import annotations

import ast
import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.fast
PACKAGE = Path(__file__).resolve().parent.parent / "dist_lm"

# From the bottom up; a module may import its own layer and those below.  A folder names its modules.
LAYERS: list[set[str]] = [
    {
        *("garbage", "errors", "ray_connection", "disk", "faults", "duration", "yaml_tree", "json_tree"),
        *("config", "config_data", "config_run", "config_ray", "config_section", "config_model"),
        *("config_pretraining", "config_fine_tuning", "config_custom", "named_class"),
        *("config_keys", "config_mistakes", "config_files", "recipes"),
    },
    {"ranks", "run_dir", "run_log", "stop", "ops", "lease", "watchdog", "attempt", "guard", "selection"},
    {
        "data",
        "schedule",
        "mesh",
        "model_sizes",
        "parameters",
        "activations",
        "lora",
        "deepspeed_config",
        "deepspeed_json",
        "deepspeed_keys",
    },
    {"accelerators", "model_flops"},
    {
        "sample_log",
        "engine",
        "driven",
        "gradients",
        "whole_weights",
        "compiled",
        "sequence_parallel",
        "checkpoint",
        "metrics",
        "tasks",
        "scores",
        "model",
        "run_model",
    },
    {
        *(
            "train",
            "assemble",
            "resume",
            "memory",
            "batches",
            "console",
            "header",
            "evaluate",
            "summary",
            "worker",
            "cluster",
            "demo",
            "status",
            "local_training",
        ),
        *("trained", "predictors", "predict", "judge", "export", "model_card"),
    },
    {"plan", "doctor", "report"},
    {"cli_corpus", "cli_data", "cli_model", "cli_runs", "cli_cluster", "cli_plan", "cli_setup"},
    {"cli"},
    {"__main__"},
]
SEAMS = {
    "ray": {
        "cluster/ray_train.py",
        "cluster/ray_worker.py",
        "cluster/ray_backend.py",
        "cluster/ray_recovery.py",
        "cluster/ray_spares.py",
        "cluster/ray_cluster.py",
        "cluster/ray_scale.py",
        "cluster/ray_options.py",
        "cluster/jobs.py",
        "cluster/ray_metrics.py",
        "cluster/job_package.py",
        "data/preparation/runners.py",
        "ray_connection.py",
    },
    "deepspeed": {
        *("engine.py", "driven.py", "whole_weights.py", "deepspeed_config.py"),
        *("cluster/preload.py", "sequence_parallel.py"),
    },
    "webdataset": {"data/shards.py"},
    "captum": {"predictors/attributions.py"},
}
LIGHT = [
    "cli.py",
    "cli_model.py",
    "cli_plan.py",
    "cli_setup.py",
    "doctor/doctor.py",
    "doctor/machine.py",
    "doctor/storage.py",
    "doctor/ray_side.py",
    "accelerators.py",
    "plan/goodput.py",
    "plan/states.py",
    "plan/traffic.py",
    "data/input_records.py",
    "cli_cluster.py",
    "cluster/manifests.py",
    "cluster/rank_process.py",
    "cluster/ray_launcher.py",
    "cluster/ray_options.py",
    "cluster/ray_cluster.py",
    "cluster/jobs.py",
    "cluster/ray_metrics.py",
    "cluster/job_package.py",
    "cluster/kubernetes.py",
    "cluster/kuberay.py",
    "cluster/kustomize.py",
    "cluster/typed_yaml.py",
    "cli_data.py",
    "cli_runs.py",
    "errors.py",
    "config.py",
    "config_section.py",
    "config_ray.py",
    "config_model.py",
    "config_pretraining.py",
    "config_fine_tuning.py",
    "config_custom.py",
    "named_class.py",
    "config_files.py",
    "config_keys.py",
    "config_mistakes.py",
    "yaml_tree.py",
    "json_tree.py",
    "deepspeed_config.py",
    "deepspeed_json.py",
    "deepspeed_keys.py",
    "schedule.py",
    "mesh.py",
    "run_dir.py",
    "run_log.py",
    "lease.py",
    "memory.py",
    "duration.py",
    "ops.py",
    "data/location.py",
    "data/order.py",
    "data/prepare.py",
    "data/preparation/map_task.py",
    "data/preparation/reduce_task.py",
    "data/preparation/runners.py",
    "data/sources/inputs.py",
    "data/sources/registry.py",
    "data/remote_file.py",
    "data/retry.py",
    "data/storage.py",
]
HEAVY = {"torch", "transformers", "deepspeed", "ray", "webdataset", "tensorboard", "fsspec", "aiohttp"}


def modules() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py")


def level(name: str) -> int:
    return next(number for number, layer in enumerate(LAYERS) if name in layer)


def own_name(path: Path) -> str:
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def imports(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down(path: Path) -> None:
    for name in imports(ast.parse(path.read_text())):
        parts = name.split(".")
        if parts[0] != "dist_lm" or len(parts) < 2 or parts[1] == "__version__":
            continue
        assert level(parts[1]) <= level(own_name(path)), f"{path.name} imports {name} of a higher layer"


@pytest.mark.parametrize("library", SEAMS)
def test_a_library_enters_at_its_seams(library: str) -> None:
    users = {
        str(path.relative_to(PACKAGE))
        for path in modules()
        if any(name.split(".")[0] == library for name in imports(ast.parse(path.read_text())))
    }
    assert users == SEAMS[library]


def test_programs_in_strings_import_at_the_same_seams() -> None:
    users = set()
    for path in modules():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                words = node.value.split()
                starts = {after for word, after in itertools.pairwise(words) if word in ("import", "from")}
                if {start.split(".")[0] for start in starts} & set(SEAMS):
                    users.add(str(path.relative_to(PACKAGE)))
    # The build of the op runs in a process of its own.
    assert users == {"ops.py"}


@pytest.mark.parametrize("name", LIGHT)
def test_light_modules_import_nothing_heavy_when_they_are_imported(name: str) -> None:
    tree = ast.parse((PACKAGE / name).read_text())
    top = ast.Module([node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)], [])
    assert not {imported.split(".")[0] for imported in imports(top)} & HEAVY
