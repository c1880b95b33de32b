"""The rules of KubeRay that its types cannot say.

Enters: the `spec` of a RayJob or RayCluster.  Leaves: problems.
Promises: what KubeRay's CEL rules and its Go validation (ray-operator/controllers/ray/utils/
validation.go) refuse on the cluster is refused here; so is a setting that has no effect.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import yaml

from dist_lm.cluster.ray_options import RUNTIME_ENV_KEYS, VARIABLES, start_options
from dist_lm.cluster.typed_yaml import Problem, elements, get, is_near, items, line_of, suggestion, text_of

MAX_NAME = 47
"""Characters of a RayJob's or RayCluster's name that leave room for what KubeRay adds to it."""
_DNS_1035 = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?$")


def check_name(document: yaml.Node) -> Iterator[Problem]:
    name = get(document, "metadata", "name")
    if name is None:
        if get(document, "metadata", "generateName") is None:
            yield Problem(line_of(document), "metadata lacks `name`")
        return
    if len(text_of(name)) > MAX_NAME or not _DNS_1035.match(text_of(name)):
        do = f"at most {MAX_NAME} lower-case letters, digits and -, beginning with a letter"
        yield Problem(line_of(name), f"`{text_of(name)}` cannot be the name", do)


def _number(node: yaml.Node | None) -> float | None:
    try:
        return float(text_of(node))
    except ValueError:
        return None


def _is_true(node: yaml.Node | None) -> bool:
    return text_of(node).lower() == "true"


def check_job(spec: yaml.Node | None) -> Iterator[Problem]:
    """ValidateRayJobSpec, restated."""
    if spec is None:
        return
    here = line_of(spec)
    mode = text_of(get(spec, "submissionMode")) or "K8sJobMode"
    cluster, selector = get(spec, "rayClusterSpec"), get(spec, "clusterSelector")
    ends = _is_true(get(spec, "shutdownAfterJobFinishes"))
    if cluster is None and selector is None:
        yield Problem(here, "a RayJob needs `rayClusterSpec` or `clusterSelector`")
    if selector is not None and not text_of(get(selector, "ray.io/cluster")):
        yield Problem(line_of(selector), "`clusterSelector` needs `ray.io/cluster`")
    if _is_true(get(spec, "suspend")) and (not ends or selector is not None):
        yield Problem(here, "`suspend` needs `shutdownAfterJobFinishes: true` and a cluster of the job's own")
    for name, least in (("ttlSecondsAfterFinished", 0), ("backoffLimit", 0), ("activeDeadlineSeconds", 1)):
        number = _number(get(spec, name))
        if number is not None and number < least:
            yield Problem(here, f"`{name}` must be at least {least}")
    if (_number(get(spec, "ttlSecondsAfterFinished")) or 0) > 0 and not ends:
        yield Problem(here, "`ttlSecondsAfterFinished` has no effect without `shutdownAfterJobFinishes: true`")
    retries = (_number(get(spec, "backoffLimit")) or 0) > 0
    if retries and (mode == "InteractiveMode" or selector is not None):
        yield Problem(here, "`backoffLimit` does not go with InteractiveMode or `clusterSelector`")
    if mode == "SidecarMode":
        for name in ("submitterPodTemplate", "submitterConfig", "clusterSelector"):
            if get(spec, name) is not None:
                yield Problem(here, f"SidecarMode does not go with `{name}`")
        policy = get(cluster, "headGroupSpec", "template", "spec", "restartPolicy")
        if text_of(policy) not in ("", "Never"):
            yield Problem(here, "SidecarMode needs `restartPolicy: Never`, or none, in the head's pod")
    if mode != "InteractiveMode" and not text_of(get(spec, "entrypoint")):
        yield Problem(here, "a RayJob needs `entrypoint`")
    yield from _check_runtime_env(get(spec, "runtimeEnvYAML"))
    yield from _check_deletion(get(spec, "deletionStrategy"), ends)
    yield from check_cluster(cluster)


def _check_runtime_env(text: yaml.Node | None) -> Iterator[Problem]:
    if text is None:
        return
    # The text of a block begins on the line after its key.
    first = line_of(text) + (1 if getattr(text, "style", "") in ("|", ">") else 0)
    try:
        inner = yaml.compose(text_of(text), yaml.SafeLoader)
    except yaml.YAMLError as error:
        yield Problem(line_of(text), "`runtimeEnvYAML` is not YAML", str(error).splitlines()[0])
        return
    for key, value in items(inner):
        if key.value not in RUNTIME_ENV_KEYS:
            line = first + key.start_mark.line
            yield Problem(line, f"`{key.value}` is not a key of a runtime_env", suggestion(key.value, RUNTIME_ENV_KEYS))
        for variable, _ in items(value) if key.value == "env_vars" else ():
            yield from _check_variable(variable, first + variable.start_mark.line)


def _check_variable(node: yaml.ScalarNode, line: int) -> Iterator[Problem]:
    """Ray reads what it knows and is silent about the rest: a name near to one of ours is a typo."""
    if node.value not in VARIABLES and is_near(node.value, VARIABLES):
        yield Problem(line, f"`{node.value}` is near to a variable of Ray", suggestion(node.value, VARIABLES))


def _check_deletion(strategy: yaml.Node | None, ends: bool) -> Iterator[Problem]:
    """The CEL rules of DeletionStrategy and DeletionCondition."""
    if strategy is None:
        return
    old = [name for name in ("onSuccess", "onFailure") if get(strategy, name) is not None]
    rules = get(strategy, "deletionRules")
    if bool(old) == (rules is not None) or len(old) == 1:
        yield Problem(line_of(strategy), "`deletionStrategy` needs deletionRules, or both onSuccess and onFailure")
    if rules is not None and ends:
        yield Problem(line_of(strategy), "`deletionRules` do not go with `shutdownAfterJobFinishes`")
    for rule in elements(rules):
        condition = get(rule, "condition")
        if (get(condition, "jobStatus") is None) == (get(condition, "jobDeploymentStatus") is None):
            yield Problem(line_of(rule), "a condition needs one of jobStatus and jobDeploymentStatus")


def check_cluster(spec: yaml.Node | None) -> Iterator[Problem]:
    """ValidateRayClusterSpec, restated, for what these files use."""
    if spec is None:
        return
    scales = _is_true(get(spec, "enableInTreeAutoscaling"))
    if get(spec, "autoscalerOptions") is not None and not scales:
        yield Problem(line_of(spec), "`autoscalerOptions` has no effect without `enableInTreeAutoscaling: true`")
    if text_of(get(spec, "authOptions", "mode")) == "token" and not text_of(get(spec, "rayVersion")):
        yield Problem(line_of(spec), "token authentication needs `rayVersion`, 2.52.0 or newer")
    groups = [get(spec, "headGroupSpec"), *elements(get(spec, "workerGroupSpecs"))]
    names: set[str] = set()
    for group in groups:
        if group is None:
            continue
        yield from _check_group(group, scales)
        name = text_of(get(group, "groupName"))
        if name and name in names:
            yield Problem(line_of(group), f"two groups are named `{name}`")
        names.add(name)


def _check_group(group: yaml.Node, scales: bool) -> Iterator[Problem]:
    pod = get(group, "template", "spec")
    if not elements(get(pod, "containers")):
        yield Problem(line_of(group), "a group needs a container")
    if scales and text_of(get(pod, "restartPolicy")) not in ("", "Never"):
        yield Problem(line_of(group), "the autoscaler (v2) needs `restartPolicy: Never`, or none")
    params = get(group, "rayStartParams")
    for key, _ in items(params):
        if key.value not in start_options():
            do = suggestion(key.value, start_options())
            yield Problem(line_of(key), f"`ray start` has no option `--{key.value}`", do)
    if get(group, "resources") is not None:
        doubled = [
            key.value for key, _ in items(params) if key.value in ("num-cpus", "num-gpus", "memory", "resources")
        ]
        if doubled:
            yield Problem(line_of(group), f"`resources` and rayStartParams `{doubled[0]}` say the same")
    least, most, now = (_number(get(group, name)) for name in ("minReplicas", "maxReplicas", "replicas"))
    if least is not None and most is not None and not least <= (least if now is None else now) <= most:
        yield Problem(line_of(group), "`replicas` must lie between `minReplicas` and `maxReplicas`")
    yield from _check_volumes(pod)


def _check_volumes(pod: yaml.Node | None) -> Iterator[Problem]:
    volumes = [text_of(get(volume, "name")) for volume in elements(get(pod, "volumes"))]
    used = set()
    for container in [*elements(get(pod, "containers")), *elements(get(pod, "initContainers"))]:
        for mount in elements(get(container, "volumeMounts")):
            name = text_of(get(mount, "name"))
            used.add(name)
            if name not in volumes:
                yield Problem(line_of(mount), f"there is no volume `{name}`", suggestion(name, volumes))
    for volume in elements(get(pod, "volumes")):
        name = text_of(get(volume, "name"))
        sources = [key.value for key, _ in items(volume) if key.value != "name"]
        if len(sources) != 1:
            yield Problem(line_of(volume), f"volume `{name}` needs one source")
        if name not in used:
            yield Problem(line_of(volume), f"no container mounts volume `{name}`")
