"""Cluster files of `ray up` as it would judge them, and what it does not check. Needs no cluster."""

import os
import re
import tomllib

import pytest
import yaml

os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # importing Ray warns otherwise

from jsonschema import ValidationError
from ray.autoscaler._private.util import prepare_config, validate_config

from lbstudy import __version__
from tests.clusters import PIN, ROOT, pinned_versions

FILES = {"aws": "cluster.yaml", "onprem": "clusters/onprem.yaml"}
WHEEL = f"lbstudy-{__version__}-py3-none-any.whl"
COMMANDS = ("setup_commands", "head_setup_commands", "head_start_ray_commands", "worker_start_ray_commands")


def read(place):
    return yaml.safe_load((ROOT / FILES[place]).read_text())


@pytest.fixture(params=FILES)
def cluster(request):
    return read(request.param)


@pytest.fixture
def aws():
    return read("aws")


@pytest.fixture
def onprem():
    return read("onprem")


def validate(config):
    """What `ray up` does before it talks to anyone."""
    validate_config(prepare_config(config))


def ray_starts(config, role):
    return [command for command in config[f"{role}_start_ray_commands"] if "ray start" in command]


def workers(config):
    return {k: v for k, v in config["available_node_types"].items() if k != config["head_node_type"]}


def test_ray_accepts_it(cluster):
    validate(cluster)


def test_ray_refuses_a_typo_at_top_level(cluster):
    cluster["idle_timeout_minuets"] = cluster.pop("idle_timeout_minutes")
    with pytest.raises(ValidationError, match="idle_timeout_minuets"):
        validate(cluster)


def test_ray_refuses_a_typo_in_a_node_type(aws):
    aws["available_node_types"]["gpu"]["min_worker"] = 0
    with pytest.raises(ValidationError, match="min_worker"):
        validate(aws)


@pytest.mark.parametrize("key", COMMANDS)
def test_commands_are_lists_of_strings(cluster, key):
    assert isinstance(cluster.get(key, []), list)
    assert all(isinstance(command, str) and command.strip() for command in cluster.get(key, []))


def test_pins_are_those_of_pyproject(cluster):
    found = dict(match.groups() for key in COMMANDS for c in cluster.get(key, []) for match in PIN.finditer(c))
    assert found == pinned_versions()  # every one, and no other


def test_python_is_one_that_the_project_supports(cluster):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert re.findall(r"--python (3\.\d+)", " ".join(cluster["setup_commands"])) == ["3.11"]
    assert project["requires-python"].startswith(">=3.11")


def test_nodes_install_the_wheel_of_this_version(cluster):
    assert cluster["file_mounts"] == {"~/lbstudy-wheel": "dist"}  # where `uv build` leaves it
    (install,) = (command for command in cluster["setup_commands"] if "pip install" in command)
    assert f'"lbstudy[run] @ file://$HOME/lbstudy-wheel/{WHEEL}"' in install


def test_dashboard_is_on_loopback(cluster):
    (start,) = ray_starts(cluster, "head")
    assert re.findall(r"--dashboard-host[= ](\S+)", start) == ["127.0.0.1"]


@pytest.mark.parametrize("role", ["head", "worker"])
def test_authentication_is_decided_in_every_ray_start(cluster, role):
    (start,) = ray_starts(cluster, role)
    assert re.findall(r"RAY_AUTH_MODE=(\w+) ray start", start) == ["disabled"]


def test_head_knows_the_autoscaler_and_trains_nothing(cluster):
    (start,) = ray_starts(cluster, "head")
    assert "--autoscaling-config=~/ray_bootstrap_config.yaml" in start
    assert "--num-gpus=0" in start
    if "head_node_type" in cluster:
        assert cluster["available_node_types"][cluster["head_node_type"]]["resources"] == {"CPU": 0}
    else:
        assert "--num-cpus=0" in start


def test_only_the_head_talks_to_aws(aws):
    assert "InstanceMarketOptions" not in aws["available_node_types"][aws["head_node_type"]]["node_config"]
    assert any("boto3" in command for command in aws["head_setup_commands"])
    assert not any("boto3" in command for command in aws["setup_commands"])


def test_workers_are_spot_gpus_from_none_upwards(aws):
    assert workers(aws)
    for node_type in workers(aws).values():
        assert node_type["min_workers"] == 0
        assert 0 < node_type["max_workers"] <= aws["max_workers"]
        assert node_type["resources"]["GPU"] >= 1
        assert node_type["node_config"]["InstanceMarketOptions"]["MarketType"] == "spot"


def test_nodes_are_terminated_and_not_kept(aws):
    assert aws["provider"]["cache_stopped_nodes"] is False


def test_every_value_to_fill_in_is_marked(aws):
    text = (ROOT / "cluster.yaml").read_text()
    values = len(re.findall(r"(?:ami|fs)-FILL-IN", text.replace("fs-FILL-IN...", "")))
    assert values == len(aws["available_node_types"]) + 1  # an image each, and the shared storage


def test_own_machines_need_three_values_and_no_root(onprem):
    text = (ROOT / "clusters/onprem.yaml").read_text()
    lines = [line for line in text.splitlines() if "FILL-IN" in line]
    assert [line.split(":")[0].strip() for line in lines] == ["head_ip", "worker_ips", "ssh_user"]
    assert "sudo" not in text


def test_all_own_machines_come_up(onprem):
    """What `ray up` accepts without, and then waits for ever (tried with three hosts)."""
    onprem["provider"] |= {"head_ip": "head", "worker_ips": ["one", "two", "three"]}
    prepared = prepare_config(onprem)
    (node_type,) = prepared["available_node_types"].values()
    assert (node_type["min_workers"], node_type["max_workers"]) == (3, 3)
    assert onprem["auth"]["ssh_private_key"]
    (start,) = ray_starts(onprem, "head")
    assert "RAY_enable_autoscaler_v2=0" in start
