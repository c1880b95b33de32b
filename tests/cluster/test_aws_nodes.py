"""cluster/aws.yaml by Ray's own code for AWS, against moto: what it makes, and that it is all gone after.

The cloud is moto's; the file, its defaults, the bootstrap and the node provider are the shipped ones.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
import yaml
from moto import mock_aws

REPOSITORY = Path(__file__).resolve().parent.parent.parent


@pytest.fixture
def region(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    """An empty AWS account, with the managed policies that Ray attaches."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(REPOSITORY)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.delenv("AWS_PROFILE", raising=False)
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("0" * 64)
    # Ray waits for IAM to spread; moto's is there at once.
    monkeypatch.setattr("time.sleep", lambda _: None)
    with mock_aws(config={"iam": {"load_aws_managed_policies": True}}):
        yield yaml.safe_load((REPOSITORY / "cluster" / "aws.yaml").read_text())["provider"]["region"]


def bootstrapped(region: str) -> dict[str, Any]:
    """The file as `ray up` sees it after its first half: keys, networks, roles are made."""
    from ray.autoscaler._private.aws.config import bootstrap_aws
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(yaml.safe_load((REPOSITORY / "cluster" / "aws.yaml").read_text()))
    validate_config(config)
    image = boto3.client("ec2", region_name=region).describe_images()["Images"][0]["ImageId"]
    for node_type in config["available_node_types"].values():
        # Deep Learning AMIs are real images, which moto does not have.
        node_type["node_config"]["ImageId"] = image
    made: dict[str, Any] = bootstrap_aws(config)
    return made


def instances(region: str) -> list[dict[str, Any]]:
    found = boto3.client("ec2", region_name=region).describe_instances()["Reservations"]
    return [instance for reservation in found for instance in reservation["Instances"]]


def test_the_file_makes_spot_nodes_and_on_demand_nodes_and_ends_them(region: str) -> None:
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider

    config = bootstrapped(region)
    assert Path(config["auth"]["ssh_private_key"]).parent == Path(os.environ["HOME"]) / ".ssh"
    # The head may make nodes; the workers may not.
    assert "IamInstanceProfile" in config["head_node"]
    assert all("IamInstanceProfile" not in kind["node_config"] for kind in config["available_node_types"].values())
    provider = AWSNodeProvider(config["provider"], config["cluster_name"])
    made = {}
    for kind in ("gpu_spot", "gpu_on_demand", "head"):
        before = {instance["InstanceId"] for instance in instances(region)}
        tags = {"ray-node-kind": "worker", "ray-user-node-type": kind, "ray-cluster-name": config["cluster_name"]}
        provider.create_node(config["available_node_types"][kind]["node_config"], tags, 1)
        (made[kind],) = [one for one in instances(region) if one["InstanceId"] not in before]
    assert made["gpu_spot"]["InstanceLifecycle"] == "spot"
    assert "InstanceLifecycle" not in made["gpu_on_demand"]
    assert made["gpu_spot"]["InstanceType"] == made["gpu_on_demand"]["InstanceType"] == "p4d.24xlarge"
    # All of them reach each other, and the world reaches them by SSH only.
    (group,) = {one["SecurityGroups"][0]["GroupId"] for one in made.values()}
    rules = boto3.client("ec2", region_name=region).describe_security_groups(GroupIds=[group])["SecurityGroups"][0]
    open_ports = {rule["FromPort"] for rule in rules["IpPermissions"] if rule["IpRanges"]}
    assert open_ports == {22}
    alive = provider.non_terminated_nodes({"ray-node-kind": "worker"})
    assert set(alive) == {one["InstanceId"] for one in made.values()}
    provider.terminate_nodes(alive)
    assert provider.non_terminated_nodes({}) == []
    # Not merely stopped: `cache_stopped_nodes` is off.
    assert {one["State"]["Name"] for one in instances(region)} == {"terminated"}
