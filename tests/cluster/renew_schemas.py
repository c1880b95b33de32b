"""Makes the tables in dist_lm/cluster/schemas/ anew that come from packages.  Run by hand:

    pip download --no-deps google-api-python-client kubernetes && unzip '*.whl' -d FOLDER
    python tests/cluster/renew_schemas.py FOLDER

kuberay.json, kustomize.json, ray_launcher.json and skypilot.json are written by hand: no package that
can be imported holds them.  Each file names its source.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from pathlib import Path
from typing import Any

import botocore
import botocore.session

SCHEMAS = Path(__file__).resolve().parent.parent.parent / "dist_lm" / "cluster" / "schemas"
Types = dict[str, dict[str, str]]
KUBERNETES_ROOTS = ("PodTemplateSpec", "Service", "PersistentVolumeClaim", "ConfigMap", "Secret", "ServiceAccount")
QUANTITIES = ("limits", "requests", "capacity", "allocatedResources", "overhead")
_VERSION = r"V\d+(?:alpha\d+|beta\d+)?"


def aws_types() -> Types:
    """The input of EC2's RunInstances, as the installed botocore has it."""
    types: Types = {}
    simple = {"integer": "integer", "long": "integer", "double": "number", "float": "number", "boolean": "boolean"}

    def kind(shape: Any) -> str:
        if shape.type_name == "structure":
            visit(shape)
            return str(shape.name)
        if shape.type_name == "list":
            return f"[{kind(shape.member)}]"
        if shape.type_name == "string" and shape.enum:
            return "|".join(["=", *shape.enum])
        return simple.get(shape.type_name, "string")

    def visit(shape: Any) -> None:
        if shape.name not in types:
            types[shape.name] = {}
            for name, member in shape.members.items():
                required = "!" if name in shape.required_members else ""
                types[shape.name][name + required] = kind(member)

    model = botocore.session.get_session().get_service_model("ec2")
    visit(model.operation_model("RunInstances").input_shape)
    request = types["RunInstancesRequest"]
    # Ray gives the counts; instance types have a rule of their own (ray_launcher.py).
    del request["MinCount!"], request["MaxCount!"]
    types["InstanceTypes"] = dict.fromkeys(sorted(request["InstanceType"].split("|")[1:]), "")
    request["InstanceType"] = "string"
    return types


def gcp_types(document: dict[str, Any]) -> Types:
    """Compute Engine's Instance, without what only the server writes."""
    types: Types = {}

    def kind(field: dict[str, Any], name: str) -> str:
        if "$ref" in field:
            visit(field["$ref"], document["schemas"][field["$ref"]])
            return str(field["$ref"])
        if field["type"] == "array":
            return f"[{kind(field['items'], name)}]"
        if "properties" in field:
            visit(name, field)
            return name
        if field["type"] == "object":
            return "{" + kind(field["additionalProperties"], name) + "}" if "additionalProperties" in field else "any"
        if field.get("format") in ("int64", "uint64"):
            return "integer-or-string"
        return "|".join(["=", *field["enum"]]) if "enum" in field else str(field["type"])

    def visit(name: str, schema: dict[str, Any]) -> None:
        if name not in types:
            types[name] = {}
            for key, field in schema.get("properties", {}).items():
                if "Output Only" not in field.get("description", "") or key == "kind":
                    types[name][key] = kind(field, f"{name}.{key}")

    visit("Instance", document["schemas"]["Instance"])
    return types


def kubernetes_types(models: Path) -> tuple[Types, list[Path]]:
    """Pods and what these manifests have beside them; and the files that said so."""
    types: Types = {}
    files: list[Path] = []
    by_class = {
        match[1]: path
        for path in models.glob("*.py")
        if (match := re.search(r"^class (\w+)\(", path.read_text(), re.M))
    }
    simple = {"str": "string", "datetime": "string", "int": "integer", "float": "number", "bool": "boolean"}

    def kind(written: str) -> str:
        if match := re.fullmatch(r"list\[(.*)\]", written, re.I):
            return f"[{kind(match[1])}]"
        if match := re.fullmatch(r"dict[(\[]str, (.*)[)\]]", written, re.I):
            return "{" + kind(match[1]) + "}"
        if written in by_class:
            visit(written)
            return re.sub(f"^{_VERSION}", "", written)
        return simple.get(written, "any")

    def table(text: str, name: str) -> dict[str, str]:
        block = re.search(rf"{name}: ClassVar.*?= \{{(.*?)\n    \}}", text, re.S)
        assert block is not None
        return dict(re.findall(r"['\"](\w+)['\"]:\s*['\"]([^'\"]+)['\"]", block[1]))

    def visit(name: str) -> None:
        short = re.sub(f"^{_VERSION}", "", name)
        if short in types:
            return
        fields = types[short] = {}
        text = by_class[name].read_text()
        files.append(by_class[name])
        spelt = table(text, "attribute_map")
        for attribute, written in table(text, "openapi_types").items():
            key = spelt[attribute]
            found = re.search(rf"^    {attribute}: (.*)$", text, re.M)
            required = "!" if found and not found[1].startswith("Optional") else ""
            if key == "sizeLimit":
                fields[key] = "quantity"
            elif key != "status":
                fields[key + required] = "{quantity}" if key in QUANTITIES else kind(written)

    for root in (*KUBERNETES_ROOTS, "NetworkPolicy", "Namespace", "EnvVar"):
        visit(f"V1{root}")
    return types, sorted(files)


def write(name: str, source: str, content: bytes, types: Types) -> None:
    head = json.dumps({"source": source, "sha256": hashlib.sha256(content).hexdigest()})
    lines = ",\n".join(f'"{key}": {json.dumps(fields)}' for key, fields in sorted(types.items()))
    (SCHEMAS / name).write_text(f'{{\n"source": {head},\n"types": {{\n{lines}\n}}\n}}\n')


def main(unpacked: Path) -> None:
    models = sorted((Path(botocore.__file__).parent / "data" / "ec2").glob("*/service-2.json*"))[-1]
    said = f"RunInstances of ec2 {models.parent.name} in botocore {botocore.__version__} (Apache-2.0)"
    write("aws.json", said, models.read_bytes(), aws_types())
    discovery = unpacked / "googleapiclient" / "discovery_cache" / "documents" / "compute.v1.json"
    document = json.loads(discovery.read_text())
    said = f"compute.v1.json, revision {document['revision']}, of google-api-python-client (Apache-2.0)"
    write("gcp.json", said, discovery.read_bytes(), gcp_types(document))
    types, files = kubernetes_types(unpacked / "kubernetes" / "client" / "models")
    version = next(unpacked.glob("kubernetes-*.dist-info")).name.split("-")[1].removesuffix(".dist")
    said = f"kubernetes {version}, client/models (Apache-2.0); the hash is of the files used, by name"
    write("kubernetes.json", said, b"".join(path.read_bytes() for path in files), types)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
