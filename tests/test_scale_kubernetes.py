"""models/scale/kubernetes: every manifest against the schema, against the others, and against what it starts."""

import json
import os
import re
import shutil
import subprocess
import sys

import kubernetes_validate
import pytest
import yaml

from course.core import runtime
from course.core.catalogue import ROOT
from course.core.errors import InputError
from tests.support import KUBERNETES, changed, documents

FOLDER = ROOT / "models" / "scale" / "kubernetes"
MANIFESTS = sorted(path for path in FOLDER.glob("*.yaml") if path.stem != "kustomization")


def manifest(kind):
    """The one manifest of that kind."""
    (found,) = (document for path in MANIFESTS for document in documents(path) if document["kind"] == kind)
    return found


def pod():
    return manifest("Job")["spec"]["template"]


def worker():
    (only,) = pod()["spec"]["containers"]
    return only


def environment(container, index):
    """The container's variables as the kubelet fills them in: `$(NAME)` is a variable that stands before it."""
    found = {}
    for variable in container["env"]:
        if "value" in variable:
            value = re.sub(r"\$\((\w+)\)", lambda name: found.get(name[1], name[0]), variable["value"])
        else:
            path = variable["valueFrom"]["fieldRef"]["fieldPath"]
            assert path == "metadata.annotations['batch.kubernetes.io/job-completion-index']"
            value = str(index)
        found[variable["name"]] = value
    return found


@pytest.mark.parametrize("version", KUBERNETES)
@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem)
def test_manifests_are_valid(path, version):
    for document in documents(path):
        assert kubernetes_validate.validate(document, version, strict=True) == version


def test_a_wrong_manifest_is_refused():
    job = manifest("Job")
    for path, value in (
        (("spec", "completionsMode"), "Indexed"),  # unknown field
        (("spec", "completions"), "4"),  # wrong type
        (("spec", "podFailurePolicy", "rules", 0, "onExitCodes", "values"), 2),
        (("spec", "template", "spec", "containers", 0, "env", 0, "value"), {}),
    ):
        with pytest.raises(kubernetes_validate.ValidationError):
            kubernetes_validate.validate(changed(job, *path, value=value), KUBERNETES[-1], strict=True)


def test_the_manifests_fit_together():
    labels, spec = pod()["metadata"]["labels"], pod()["spec"]
    service, policy, claim = (manifest(kind) for kind in ("Service", "NetworkPolicy", "PersistentVolumeClaim"))
    assert spec["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["clusterIP"] == "None" and service["spec"]["publishNotReadyAddresses"] is True
    for selector in (
        service["spec"]["selector"],
        policy["spec"]["podSelector"]["matchLabels"],
        policy["spec"]["ingress"][0]["from"][0]["podSelector"]["matchLabels"],
        policy["spec"]["egress"][0]["to"][0]["podSelector"]["matchLabels"],
        *(constraint["labelSelector"]["matchLabels"] for constraint in spec["topologySpreadConstraints"]),
    ):
        assert selector and selector.items() <= labels.items()
    ports = {port["name"]: port["containerPort"] for port in worker()["ports"]}
    assert [ports[port["targetPort"]] == port["port"] for port in service["spec"]["ports"]] == [True]
    volumes = {volume["name"]: volume for volume in spec["volumes"]}
    assert {mount["name"] for mount in worker()["volumeMounts"]} == volumes.keys()
    assert volumes["runs"]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]  # the workers are on several nodes


def test_a_worker_that_dies_is_replaced_and_one_that_is_told_wrongly_is_not():
    spec = manifest("Job")["spec"]
    assert pod()["spec"]["restartPolicy"] == "Never"  # what a podFailurePolicy asks for
    assert spec["completionMode"] == "Indexed" and spec["completions"] == spec["parallelism"]
    assert spec["backoffLimit"] >= 3 * spec["completions"]  # a death is one of all
    told, drained = spec["podFailurePolicy"]["rules"]
    assert (told["action"], told["onExitCodes"]["containerName"]) == ("FailJob", worker()["name"])
    ended = subprocess.run(  # its own command line, with a flag that there is not
        [sys.executable, "-m", *worker()["args"], "--no-such-flag"], cwd=ROOT, capture_output=True, timeout=60
    )
    assert told["onExitCodes"] | {"values": [ended.returncode]} == told["onExitCodes"]
    assert drained == {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}


def test_tf_config_is_what_each_worker_reads(monkeypatch):
    job, name = manifest("Job"), manifest("Job")["metadata"]["name"]
    count, subdomain = job["spec"]["completions"], pod()["spec"]["subdomain"]
    (port,) = (port["containerPort"] for port in worker()["ports"])
    for index in range(count):
        text = environment(worker(), index)["TF_CONFIG"]
        assert json.loads(text)["cluster"] == {"worker": [f"{name}-{i}.{subdomain}:{port}" for i in range(count)]}
        monkeypatch.setenv("TF_CONFIG", text)
        assert runtime.cluster_task("multiworker") == ("worker", index)
    monkeypatch.setenv("TF_CONFIG", environment(changed(worker(), "env", value=worker()["env"][1:]), 0)["TF_CONFIG"])
    with pytest.raises(InputError, match="TF_CONFIG cannot be read"):  # the index must stand before it
        runtime.cluster_task("multiworker")


def test_the_command_is_one_that_the_unit_takes():
    """All flags are the unit's; with them, and no TF_CONFIG, it stops in one line."""
    mounted = {mount["mountPath"] for mount in worker()["volumeMounts"]}
    flags = dict(word.removeprefix("--").split("=") for word in worker()["args"][1:])
    assert flags["runs"] in mounted
    assert environment(worker(), 0)["COURSE_DATA"].startswith(f"{flags['runs']}/")
    ended = subprocess.run(
        [sys.executable, "-m", *worker()["args"], "--help"], cwd=ROOT, capture_output=True, text=True, timeout=60,
        env=os.environ | {"COLUMNS": "200"},
    )  # fmt: skip
    assert ended.returncode == 0 and all(f"--{flag}" in ended.stdout for flag in flags)


def test_the_image_has_what_it_runs():
    lines = (FOLDER / "Dockerfile").read_text().splitlines()
    copied = [line.split()[1].rstrip("/") for line in lines if line.startswith("COPY")]
    reaching = (FOLDER / "Dockerfile.dockerignore").read_text().splitlines()
    assert copied and all((ROOT / source).exists() and f"!{source}" in reaching for source in copied)
    assert {worker()["args"][0].split(".")[0], "models", "requirements.lock"} <= set(copied)
    (user,) = (line.split()[1] for line in lines if line.startswith("USER"))
    security = pod()["spec"]["securityContext"]
    assert user == f"{security['runAsUser']}:{security['runAsGroup']}" and security["runAsNonRoot"]
    locked = re.search(r"^tensorflow==(.+)$", (ROOT / "requirements.lock").read_text(), re.MULTILINE)[1]
    assert f'"tensorflow[and-cuda]=={locked}"' in "\n".join(lines)


def test_kustomization():
    (kustomization,) = documents(FOLDER / "kustomization.yaml")
    assert {FOLDER / resource for resource in kustomization["resources"]} == set(MANIFESTS)
    (image,) = kustomization["images"]
    assert worker()["image"].split(":")[0] == image["name"]


@pytest.mark.skipif(not shutil.which("kubectl"), reason="kubectl is not installed")
def test_kustomize_builds_it():
    built = subprocess.run(["kubectl", "kustomize", FOLDER], capture_output=True, text=True, timeout=60)
    assert built.returncode == 0, built.stderr
    made = list(yaml.safe_load_all(built.stdout))
    assert len(made) == len(MANIFESTS)
    for document in made:
        kubernetes_validate.validate(document, KUBERNETES[-1], strict=True)
