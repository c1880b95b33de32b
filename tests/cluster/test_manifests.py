"""What `dist-lm cluster check` refuses, beside unknown keys (test_typos.py): rules and references."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import botocore.session
import pytest
import yaml
from botocore.validate import ParamValidator
from ray.autoscaler._private.util import prepare_config, validate_config
from typer.testing import CliRunner

from dist_lm.cli import app
from dist_lm.cluster.manifests import check_file
from dist_lm.cluster.typed_yaml import load_types
from dist_lm.errors import ConfigError
from tests.cluster.renew_schemas import aws_types

pytestmark = pytest.mark.fast
REPOSITORY = Path(__file__).resolve().parent.parent.parent
CLUSTER = REPOSITORY / "cluster"
JOB = CLUSTER / "kuberay" / "base" / "rayjob.yaml"
AWS, GCP, LOCAL = (CLUSTER / f"{name}.yaml" for name in ("aws", "gcp", "on_prem"))


@pytest.fixture(autouse=True)
def _from_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    # file_mounts count from the working directory.
    monkeypatch.chdir(REPOSITORY)


def problems(path: Path, old: str, new: str, tmp_path: Path) -> list[str]:
    """Of a copy of `path` in which `old` became `new`."""
    text = path.read_text()
    assert old in text
    changed = tmp_path / path.name
    changed.write_text(text.replace(old, new, 1))
    return [f"{problem.line}: {problem}" for problem in check_file(changed)]


@pytest.mark.parametrize("path", sorted(CLUSTER.rglob("*.yaml")), ids=lambda path: str(path.relative_to(CLUSTER)))
def test_every_shipped_file_passes(path: Path) -> None:
    assert check_file(path) == []


@pytest.mark.parametrize("name", ["aws", "gcp", "azure", "on_prem"])
def test_ray_itself_takes_the_launcher_files(name: str) -> None:
    config = prepare_config(yaml.safe_load((CLUSTER / f"{name}.yaml").read_text()))
    validate_config(config)
    types = config["available_node_types"]
    assert all(node_type["min_workers"] == 0 for node_type in types.values())


def botocore_says(node_config: dict[str, Any]) -> str:
    shape = botocore.session.get_session().get_service_model("ec2").operation_model("RunInstances").input_shape
    report = ParamValidator().validate({**node_config, "MinCount": 1, "MaxCount": 1}, shape)
    return str(report.generate_report())


def test_botocore_takes_the_nodes_of_aws_and_refuses_what_we_refuse(tmp_path: Path) -> None:
    for node_type in yaml.safe_load(AWS.read_text())["available_node_types"].values():
        assert botocore_says(node_type["node_config"]) == ""
    for old, new in [("MarketType:", "MarketTyp:"), ("VolumeSize: 200", "VolumeSize: big"), ("Ebs:", "EBS:")]:
        assert problems(AWS, old, new, tmp_path)
        changed = yaml.safe_load(AWS.read_text().replace(old, new))
        assert any(botocore_says(node["node_config"]) for node in changed["available_node_types"].values())


def test_the_stored_types_of_ec2_are_those_of_the_installed_botocore() -> None:
    # Where botocore is newer: python tests/cluster/renew_schemas.py
    assert load_types("aws") == aws_types()


@pytest.mark.parametrize(
    ("path", "old", "new", "told"),
    [
        (JOB, "backoffLimit: 3", "backoffLimit: -1", "`backoffLimit` must be at least 0"),
        (JOB, "shutdownAfterJobFinishes: true", "shutdownAfterJobFinishes: false", "`ttlSecondsAfterFinished` has no"),
        (
            JOB,
            "  rayClusterSpec:",
            "  suspend: true\n  clusterSelector: {}\n  rayClusterSpec:",
            "needs `ray.io/cluster`",
        ),
        (JOB, "SidecarMode", "SidecarMod", "did you mean SidecarMode?"),
        (JOB, "SidecarMode", "InteractiveMode", "`backoffLimit` does not go with InteractiveMode"),
        (
            JOB,
            "backoffLimit: 3",
            "submitterConfig: {backoffLimit: 1}",
            "SidecarMode does not go with `submitterConfig`",
        ),
        (JOB, "  entrypoint: dist-lm", "  jobId: dist-lm", "a RayJob needs `entrypoint`"),
        (JOB, "    env_vars:", "    env_vars: [", "`runtimeEnvYAML` is not YAML"),
        (JOB, "name: dist-lm\n", "name: Dist_LM\n", "cannot be the name"),
        (JOB, 'rayVersion: "2.60.0"', 'rayVersion: ""', "token authentication needs `rayVersion`"),
        (JOB, 'rayVersion: "2.60.0"', "rayVersion: 2.60", "put it in quotes"),
        (JOB, "enableInTreeAutoscaling: true", "enableInTreeAutoscaling: false", "`autoscalerOptions` has no effect"),
        (JOB, "maxReplicas: 2", "maxReplicas: 1", "`replicas` must lie between"),
        (JOB, 'num-cpus: "0"', 'num-cpu: "0"', "did you mean num-cpus?"),
        (
            JOB,
            "- name: shm\n                    mountPath",
            "- name: shn\n                    mountPath",
            "no volume `shn`",
        ),
        (JOB, "sizeLimit: 8Gi", "sizeLimit: [8]", "`sizeLimit` must be quantity"),
        (JOB, "- name: ray-worker", "- image: twice", "`image` is there twice"),
        (JOB, "ray.io/v1", "ray.io/v1alpha1", "is no kind that is checked; did you mean ray.io/v1 RayJob?"),
        (AWS, "head_node_type: head", "head_node_type: haed", "is no node type; did you mean head?"),
        (AWS, "p4d.24xlarge", "p4d.25xlarge", "EC2 has no instance type"),
        (AWS, "MarketType: spot", "MarketType: sport", "did you mean spot?"),
        (
            AWS,
            "max_workers: 16\n        resources",
            "max_workers: -1\n        resources",
            "min_workers 0 are more than",
        ),
        (AWS, "type: aws", "type: awz", "did you mean aws?"),
        (AWS, "--dashboard-host", "--dashbord-host", "did you mean dashboard-host?"),
        (AWS, '"~/dist_lm": "."', '"~/dist_lm": "there-is-none"', "there is no `there-is-none` here"),
        (AWS, "max_workers: 16", "max_workers: many", "max_workers: 'many' is not of type 'integer'"),
        (GCP, "provisioningModel: SPOT", "provisioningModel: SPOTS", "did you mean SPOT?"),
        (GCP, "machineType: n2", "machineTyp: n2", "node_config lacks `machineType`"),
        (LOCAL, "head_ip:", "available_node_types: {}\n    head_ip:", "is not a key of ProviderLocal"),
    ],
)
def test_a_mistake_is_told(path: Path, old: str, new: str, told: str, tmp_path: Path) -> None:
    assert told in "\n".join(problems(path, old, new, tmp_path))


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("containers/0/resources", "containers/1/resources", "there is no `1`"),
        ("/spec/rayClusterSpec/workerGroupSpecs/0/maxReplicas", "/spec/rayCluster/x", "did you mean rayClusterSpec?"),
        ("operator: Exists", "operater: Exists", "`operater` is not a key of Toleration; did you mean operator?"),
        ("value: 4", "value: four", "`maxReplicas` must be integer"),
        ("  value: 64Gi", "", "`replace` needs a value"),
    ],
)
def test_a_json_patch_is_applied_and_its_result_checked(old: str, new: str, told: str, tmp_path: Path) -> None:
    for folder in ("base", "gpu"):
        (tmp_path / folder).mkdir()
        for file in (CLUSTER / "kuberay" / folder).iterdir():
            (tmp_path / folder / file.name).write_text(file.read_text())
    kustomization = tmp_path / "gpu" / "kustomization.yaml"
    assert check_file(kustomization) == []
    patch = tmp_path / "gpu" / "gpu.yaml"
    assert old in patch.read_text()
    patch.write_text(patch.read_text().replace(old, new, 1))
    assert told in "\n".join(str(problem) for problem in check_file(kustomization))


def test_the_command_tells_file_and_line_and_ends_with_two(tmp_path: Path) -> None:
    bad = tmp_path / "bad.yaml"
    bad.write_text(AWS.read_text().replace("idle_timeout_minutes", "idle_timeout_minuts"))
    line = AWS.read_text().splitlines().index("idle_timeout_minutes: 10") + 1
    done = CliRunner().invoke(app, ["cluster", "check", str(AWS), str(bad)])
    assert f"ok: {AWS}" in done.output
    assert f"{bad}:{line}: `idle_timeout_minuts` is not a key of a cluster file; did you mean" in done.output
    assert isinstance(done.exception, ConfigError)
    assert done.exception.exit_code == 2


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "is empty"),
        ("a: [", "this is not YAML"),
        ("a: 1", "is no cluster file"),
        ("- 1", "is no cluster file"),
        ("\xff", "is not UTF-8 text"),
    ],
)
def test_what_is_no_cluster_file_is_refused(text: str, told: str, tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match=told):
        check_file(file)
    with pytest.raises(ConfigError, match="cannot read"):
        check_file(tmp_path / "none.yaml")
