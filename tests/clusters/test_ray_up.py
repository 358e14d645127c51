"""cluster.yaml as `ray up` would judge it, and what Ray does not check. Needs no cloud."""

import os
import re
import tomllib
from pathlib import Path

import pytest
import yaml

os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # importing Ray warns otherwise

from jsonschema import ValidationError
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).parents[2]
COMMANDS = ("setup_commands", "head_setup_commands", "head_start_ray_commands", "worker_start_ray_commands")
PIN = re.compile(r"([\w.-]+(?:\[[\w,]+\])?)==([\w.+]+)")


@pytest.fixture
def cluster():
    return yaml.safe_load((ROOT / "cluster.yaml").read_text())


@pytest.fixture
def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def validate(config):
    """What `ray up` does before it talks to the cloud."""
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


def test_ray_refuses_a_typo_in_a_node_type(cluster):
    cluster["available_node_types"]["gpu"]["min_worker"] = 0
    with pytest.raises(ValidationError, match="min_worker"):
        validate(cluster)


@pytest.mark.parametrize("key", COMMANDS)
def test_commands_are_lists_of_strings(cluster, key):
    assert isinstance(cluster[key], list)
    assert all(isinstance(command, str) and command.strip() for command in cluster[key])


def test_pins_are_those_of_pyproject(cluster, project):
    listed = project["project"]["dependencies"] + project["tool"]["uv"]["constraint-dependencies"]
    for_tests = {re.split(r"[<>=\[]", line)[0] for line in project["dependency-groups"]["dev"] if isinstance(line, str)}
    pinned = {match[1]: match[2] for line in listed if (match := PIN.match(line)) and match[1] not in for_tests}
    found = dict(match.groups() for key in COMMANDS for c in cluster[key] for match in PIN.finditer(c))
    assert found == pinned  # every one, and no other


def test_python_is_one_that_the_project_supports(cluster, project):
    found = re.findall(r"--python (3\.\d+)", " ".join(cluster["setup_commands"]))
    assert found == ["3.11"]
    assert project["project"]["requires-python"].startswith(">=3.11")


def test_mounted_sources_exist(cluster):
    for source in cluster["file_mounts"].values():
        assert not Path(source).is_absolute()
        assert (ROOT / source).exists(), source


def test_mounts_hold_all_that_a_build_needs(cluster, project):
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    metadata = project["project"]
    needed = {"pyproject.toml", metadata["readme"], *metadata["license-files"]}
    needed |= {*wheel["packages"], *wheel["force-include"]}
    links = [path for path in (ROOT / "lbstudy").iterdir() if path.is_symlink()]
    needed |= {path.resolve().relative_to(ROOT).as_posix() for path in links}  # rsync copies links as links
    folder = "/home/ubuntu/lbstudy/"
    assert {f"{folder}{source}": source for source in needed} == cluster["file_mounts"]
    assert any("pip install" in c and "~/lbstudy " in c for c in cluster["setup_commands"])


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
    head = cluster["available_node_types"][cluster["head_node_type"]]
    assert head["resources"] == {"CPU": 0}
    assert "InstanceMarketOptions" not in head["node_config"]
    assert any("boto3" in command for command in cluster["head_setup_commands"])
    assert not any("boto3" in command for command in cluster["setup_commands"])


def test_workers_are_spot_gpus_from_none_upwards(cluster):
    assert workers(cluster)
    for node_type in workers(cluster).values():
        assert node_type["min_workers"] == 0
        assert 0 < node_type["max_workers"] <= cluster["max_workers"]
        assert node_type["resources"]["GPU"] >= 1
        assert node_type["node_config"]["InstanceMarketOptions"]["MarketType"] == "spot"


def test_nodes_are_terminated_and_not_kept(cluster):
    assert cluster["provider"]["cache_stopped_nodes"] is False


def test_every_value_to_fill_in_is_marked(cluster):
    text = (ROOT / "cluster.yaml").read_text()
    values = len(re.findall(r"(?:ami|fs)-FILL-IN", text.replace("fs-FILL-IN...", "")))
    assert values == len(cluster["available_node_types"]) + 1  # an image each, and the shared storage
