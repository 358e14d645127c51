"""The manifests: pods, volume claims and metadata against Kubernetes' own schema; KubeRay's part against its fields, which
are listed by hand from the types of KubeRay 1.5, for no package brings its schema. Needs no cluster.
"""

import re
from copy import deepcopy

import kubernetes_validate
import pytest
import yaml

from lbstudy import __version__
from tests.clusters import PIN, ROOT, pinned_versions

FOLDER = ROOT / "clusters/kubernetes"
VERSION = kubernetes_validate.latest_version()

# field: type, or the fields of an object, or [those of each entry]; POD: a pod template
POD = object()
GROUP = {"rayStartParams": {str: str}, "template": POD}
CLUSTER = {
    "rayVersion": str,
    "headGroupSpec": GROUP | {"serviceType": str, "enableIngress": bool},
    "workerGroupSpecs": [GROUP | {"groupName": str, "replicas": int, "minReplicas": int, "maxReplicas": int,
                                  "numOfHosts": int, "idleTimeoutSeconds": int, "suspend": bool}],
    "enableInTreeAutoscaling": bool,
    "suspend": bool,
}  # fmt: skip
JOB = {
    "entrypoint": str,
    "runtimeEnvYAML": str,
    "submissionMode": str,
    "backoffLimit": int,
    "activeDeadlineSeconds": int,
    "shutdownAfterJobFinishes": bool,
    "ttlSecondsAfterFinished": int,
    "suspend": bool,
    "submitterPodTemplate": POD,
    "rayClusterSpec": CLUSTER,
}
KINDS = {"RayCluster": CLUSTER, "RayJob": JOB}


def read(name):
    return yaml.safe_load((FOLDER / name).read_text())


def check(value, fields):
    """Raise where a manifest has a field that KubeRay does not know, or of another type."""
    if fields is POD:
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x", **value.get("metadata", {})}, **value}
        kubernetes_validate.validate({**pod, "metadata": pod["metadata"]}, VERSION, strict=True)
    elif isinstance(fields, list):
        for entry in value:
            check(entry, fields[0])
    elif fields == {str: str}:
        assert all(type(key) is str and type(entry) is str for key, entry in value.items()), value
    elif isinstance(fields, dict):
        assert not set(value) - set(fields), sorted(set(value) - set(fields))
        for name, entry in value.items():
            check(entry, fields[name])
    else:
        assert type(value) is fields, (value, fields)


def check_manifest(manifest):
    assert manifest["apiVersion"] == "ray.io/v1"
    assert set(manifest) == {"apiVersion", "kind", "metadata", "spec"}
    assert set(manifest["metadata"]) in ({"name"}, {"generateName"})
    check(manifest["spec"], KINDS[manifest["kind"]])


def cluster_of(manifest):
    return manifest["spec"].get("rayClusterSpec", manifest["spec"])


def pods(cluster):
    return [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]


@pytest.fixture(params=["rayjob.yaml", "raycluster.yaml"])
def manifest(request):
    return read(request.param)


def test_manifests_have_only_what_kuberay_and_kubernetes_know(manifest):
    check_manifest(manifest)


@pytest.mark.parametrize("spoil", [
    lambda cluster: cluster["headGroupSpec"]["rayStartParams"].update({"num-cpus": 0}),
    lambda cluster: cluster["workerGroupSpecs"][0].update(replica=2),
    lambda cluster: cluster.update(workerGroupSpec=[]),
    lambda cluster: cluster["headGroupSpec"]["template"]["spec"]["containers"][0].update(volumeMount=[]),
    lambda cluster: cluster["headGroupSpec"]["template"]["spec"]["volumes"][1]["emptyDir"].update(medium=1),
])  # fmt: skip
def test_the_check_sees_what_is_wrong(manifest, spoil):
    spoiled = deepcopy(manifest)
    spoil(cluster_of(spoiled))
    with pytest.raises((AssertionError, kubernetes_validate.ValidationError)):
        check_manifest(spoiled)


def test_the_volume_claim_is_what_kubernetes_knows_and_the_heads_use():
    claim = read("storage.yaml")
    kubernetes_validate.validate(claim, VERSION, strict=True)
    for name in ("rayjob.yaml", "raycluster.yaml"):
        head, *workers = pods(cluster_of(read(name)))
        (studies,) = (v for v in head["template"]["spec"]["volumes"] if "persistentVolumeClaim" in v)
        assert studies["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
        assert not any("persistentVolumeClaim" in v for w in workers for v in w["template"]["spec"]["volumes"])


def test_both_describe_the_same_pods():
    job, cluster = (pods(cluster_of(read(name))) for name in ("rayjob.yaml", "raycluster.yaml"))
    job[0]["template"]["spec"].pop("restartPolicy")
    for group in (job[0], cluster[0]):
        group["rayStartParams"].pop("dashboard-host")
    assert job == cluster


def test_every_mount_has_its_volume_and_ray_its_shared_memory(manifest):
    for group in pods(cluster_of(manifest)):
        spec = group["template"]["spec"]
        (container,) = spec["containers"]
        mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        assert set(mounts) == {volume["name"] for volume in spec["volumes"]}
        assert mounts["shared-memory"] == "/dev/shm"


def test_head_trains_nothing_and_workers_say_what_they_have(manifest):
    head, *workers = pods(cluster_of(manifest))
    assert head["rayStartParams"]["num-cpus"] == head["rayStartParams"]["num-gpus"] == "0"
    for group in workers:
        (container,) = group["template"]["spec"]["containers"]
        assert {"cpu", "memory", "nvidia.com/gpu"} == set(container["resources"]["limits"])
        assert group["replicas"] == group["minReplicas"] == group["maxReplicas"]


def test_a_job_outlives_its_head():
    job = read("rayjob.yaml")["spec"]
    assert job["backoffLimit"] > 0
    assert job["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["restartPolicy"] == "Never"
    mount = job["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]["volumeMounts"][0]
    assert f"--storage {mount['mountPath']}" in job["entrypoint"]


def test_versions_are_those_of_this_release(manifest):
    containerfile = (FOLDER / "Containerfile").read_text()
    assert dict(PIN.findall(containerfile)) == pinned_versions()
    assert f"lbstudy-{__version__}-py3-none-any.whl" in containerfile
    assert cluster_of(manifest)["rayVersion"] == pinned_versions()["ray[default,train,tune]"]
    images = {group["template"]["spec"]["containers"][0]["image"] for group in pods(cluster_of(manifest))}
    assert images == {f"FILL-IN/lbstudy:{__version__}"}
    assert set(re.findall(r"/lbstudy:([\d.]+)", containerfile)) == {__version__}
