"""What is sent to Kubernetes and SkyPilot has only fields that they know, of the right types.

The published schemas are used where they are at hand: PIT_JAX_JOBSET_CRD names the JobSet controller's CustomResource-
Definition (config/components/crd/bases/jobset.x-k8s.io_jobsets.yaml of its repository, or one of its releases), and
SkyPilot's comes with the package. The schema below holds the fields that launch/jobset.yaml uses, as that of JobSet
v1alpha2 has them.
"""

from __future__ import annotations

import os
import pathlib
import re
from typing import Any

import jsonschema
import pytest
import yaml

from .tools import FLAGS, LAUNCH, Tools, line

ANY_STRINGS = {"type": "object", "additionalProperties": {"type": "string"}}
NUMBER = {"type": "integer", "minimum": 0}
STRINGS = {"type": "array", "items": {"type": "string"}, "minItems": 1}
DNS_LABEL = r"^[a-z]([-a-z0-9]*[a-z0-9])?$"


def _closed(required: str, **properties: Any) -> dict[str, Any]:
    """Return the schema of an object that has these fields alone."""
    return {"type": "object", "additionalProperties": False, "required": required.split(), "properties": properties}


def _list(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items, "minItems": 1}


CONTAINER = _closed(
    "name image command args resources",
    name={"type": "string", "pattern": DNS_LABEL},
    image={"type": "string", "minLength": 1},
    command=STRINGS,
    args=STRINGS,
    securityContext=_closed("", privileged={"type": "boolean"}),
    resources=_closed("limits", limits={"type": "object", "additionalProperties": {"type": ["string", "integer"]}}),
)
POD = _closed(
    "restartPolicy containers nodeSelector",
    restartPolicy={"const": "Never"},  # podFailurePolicy allows no other
    terminationGracePeriodSeconds=NUMBER,
    hostNetwork={"type": "boolean"},
    dnsPolicy={"enum": ["ClusterFirst", "ClusterFirstWithHostNet", "Default", "None"]},
    nodeSelector=ANY_STRINGS,
    containers=_list(CONTAINER),
)
EXIT_CODES = _closed(
    "containerName operator values",
    containerName={"type": "string"},
    operator={"enum": ["In", "NotIn"]},
    values={"type": "array", "items": {"type": "integer", "minimum": 1, "maximum": 255}, "uniqueItems": True},
)
FAIL = {"enum": ["FailJob", "FailIndex", "Ignore", "Count"]}
JOB = _closed(
    "parallelism completions completionMode backoffLimit template",
    parallelism=NUMBER,
    completions=NUMBER,
    completionMode={"enum": ["Indexed", "NonIndexed"]},
    backoffLimit=NUMBER,
    podFailurePolicy=_closed("rules", rules=_list(_closed("action", action=FAIL, onExitCodes=EXIT_CODES))),
    template=_closed("spec", spec=POD),
)
ACTIONS = ["FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts", "RestartJob"]
RULE = _closed(
    "action name",
    name={"type": "string", "pattern": r"^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$"},
    action={"enum": ACTIONS},
    onJobFailureReasons={"type": "array", "items": {"enum": ["BackoffLimitExceeded", "PodFailurePolicy"]}},
)
JOBSET = _closed(
    "apiVersion kind metadata spec",
    apiVersion={"const": "jobset.x-k8s.io/v1alpha2"},
    kind={"const": "JobSet"},
    metadata=_closed(
        "name", name={"type": "string", "pattern": DNS_LABEL}, labels=ANY_STRINGS, annotations=ANY_STRINGS
    ),
    spec=_closed(
        "replicatedJobs",
        ttlSecondsAfterFinished=NUMBER,
        failurePolicy=_closed("", maxRestarts=NUMBER, rules=_list(RULE)),
        replicatedJobs=_list(
            _closed(
                "name template",
                name={"type": "string", "pattern": DNS_LABEL},
                replicas=NUMBER,
                template=_closed("spec", spec=JOB),
            )
        ),
    ),
)


def _strict(schema: Any) -> Any:
    """Return a structural schema of Kubernetes in which fields it does not know, which it would drop, are errors."""
    if isinstance(schema, list):
        return [_strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    made = {name: _strict(part) for name, part in schema.items()}
    if made.pop("x-kubernetes-int-or-string", False):
        made.pop("type", None)
    if isinstance(made.get("properties"), dict) and not made.get("x-kubernetes-preserve-unknown-fields"):
        made.setdefault("additionalProperties", False)
    return made


def _schemas() -> dict[str, dict[str, Any]]:
    found = {"fields in use": JOBSET}
    path = os.environ.get("PIT_JAX_JOBSET_CRD")
    if path:
        definition = yaml.safe_load(pathlib.Path(path).read_text())
        (version,) = [one for one in definition["spec"]["versions"] if one["name"] == "v1alpha2"]
        published = _strict(version["schema"]["openAPIV3Schema"])
        published["properties"]["metadata"] = {"type": "object"}  # checked by the API server itself
        found["published"] = published
    return found


@pytest.fixture
def tools(tmp_path: pathlib.Path) -> Tools:
    return Tools.install(tmp_path / "fakes")


def _manifest(tools: Tools, *settings: str) -> dict[str, Any]:
    base = ("--name=pit", "--image=image:tag", "--poll=0")
    done = tools.run("jobset.sh", "demo", "gs://bucket/run", *base, *settings, *FLAGS)
    assert done.returncode == 0, done.stderr
    return yaml.safe_load((tools.folder / "manifest.yaml").read_text())


@pytest.mark.parametrize("name", _schemas())
@pytest.mark.parametrize("more", [(), ("--spot", "--queue=q", "--slices=2", "--namespace=team")], ids=["plain", "more"])
def test_jobset_is_valid(tools: Tools, name: str, more: tuple[str, ...]) -> None:
    schema = _schemas()[name]
    manifest = _manifest(tools, "--topology=v5p:4x4x4", *more)
    jsonschema.validate(manifest, schema)
    manifest["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["restartPolice"] = "Never"
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(manifest, schema)


@pytest.mark.parametrize(
    ("topology", "more", "accelerator", "hosts", "chips"),
    [
        ("v5p:4x4x4", (), "tpu-v5p-slice", 16, 4),
        ("v5e:16x16", (), "tpu-v5-lite-podslice", 64, 4),
        ("v5e:2x4", ("--chips=8",), "tpu-v5-lite-podslice", 1, 8),
        ("v6e:1x1", (), "tpu-v6e-slice", 1, 1),
        ("v4:2x2x4", (), "tpu-v4-podslice", 4, 4),
        ("tpu7x:4x4x4", (), "tpu7x", 16, 4),
    ],
)
def test_jobset_of_a_topology(
    tools: Tools, topology: str, more: tuple[str, ...], accelerator: str, hosts: int, chips: int
) -> None:
    manifest = _manifest(tools, f"--topology={topology}", "--slices=3", "--spot", *more)
    (slices,) = manifest["spec"]["replicatedJobs"]
    job = slices["template"]["spec"]
    pod = job["template"]["spec"]
    assert slices["replicas"] == 3
    assert job["parallelism"] == job["completions"] == hosts
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": accelerator,
        "cloud.google.com/gke-tpu-topology": topology.partition(":")[2],
        "cloud.google.com/gke-spot": "true",
    }
    (container,) = pod["containers"]
    assert container["resources"]["limits"] == {"google.com/tpu": chips}
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"]["containerName"] == container["name"]
    assert rule["onExitCodes"]["values"] == sorted(rule["onExitCodes"]["values"])
    assert [word.replace("$$", "$") for word in container["args"]] == line("gs://bucket/run", *FLAGS)


def test_nothing_is_left_to_fill_in(tools: Tools) -> None:
    _manifest(tools, "--topology=v5p:4x4x4")
    template = set(re.findall(r"\$\{[A-Z]+\}", (LAUNCH / "jobset.yaml").read_text()))
    assert len(template) == 11
    assert not any(place in (tools.folder / "manifest.yaml").read_text() for place in template)


SKY_TASK = _closed(
    "name resources envs setup run",
    name={"type": "string"},
    num_nodes={"type": "integer"},
    resources=_closed(
        "accelerators job_recovery",
        accelerators={"type": "string"},
        disk_size={"type": "integer"},
        job_recovery=_closed(
            "",
            max_restarts_on_errors=NUMBER,
            recover_on_exit_codes={"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 255}},
        ),
    ),
    envs={
        "type": "object",
        "patternProperties": {"^[a-zA-Z_][a-zA-Z0-9_]*$": {"type": ["string", "null"]}},
        "additionalProperties": False,
    },
    setup={"type": "string"},
    run={"type": "string"},
)


def test_skypilot_task_is_valid() -> None:
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    jsonschema.validate(task, SKY_TASK)
    assert task["resources"]["job_recovery"] == {"max_restarts_on_errors": 0, "recover_on_exit_codes": [75, 143]}


def test_skypilot_task_is_valid_for_skypilot() -> None:
    schemas = pytest.importorskip("sky.utils.schemas", reason="skypilot is not installed")
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    jsonschema.validate(task, schemas.get_task_schema())
    jsonschema.validate(task["resources"], schemas.get_resources_schema())
