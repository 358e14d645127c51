"""clusters/onprem.yaml for real: three hosts in namespaces of their own, with sshd, and this machine as the laptop.

A host has a network, processes, a home and a /tmp of its own. What its set-up would fetch comes from uv's cache.
"""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from lbstudy.records.folder import StudyFolder
from tests.clusters import ROOT

BIN = Path(sys.executable).parent
HOSTS = {f"lbhost{number}": f"10.77.0.1{number}" for number in range(3)}
HOST = """
hostname {name}
mount --make-rprivate /
mkdir -p /mnt/uv /run/sshd
mount --bind {cache} /mnt/uv
mount --bind {folder}/hosts /etc/hosts
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs -o mode=755 tmpfs /run/sshd
cp {folder}/sshd_config {key} /run/sshd
mount --bind {folder}/home ~
mount --bind {folder}/tmp /tmp
exec /usr/sbin/sshd -D -e -f /run/sshd/sshd_config
"""
SSHD = """
HostKey /run/sshd/key
PidFile none
UsePAM no
StrictModes no
SetEnv UV_OFFLINE=1 UV_LINK_MODE=symlink UV_CACHE_DIR=/mnt/uv UV_PYTHON_PREFERENCE=only-system
"""


def sh(*command, **options):
    return subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True, **options).stdout


@pytest.fixture
def hosts(tmp_path):
    """The hosts, started: the process of each, by its name."""
    tools = ("ip", "unshare", "/usr/sbin/sshd", "ssh", "ssh-keygen", "rsync", "/usr/bin/python3.11")
    if missing := [tool for tool in tools if shutil.which(tool) is None]:
        pytest.skip(f"not installed: {', '.join(missing)}")
    if "UV" not in os.environ:
        pytest.skip("needs uv's own path, which `uv run pytest` tells")
    if subprocess.run(["unshare", "--net", "--mount", "--pid", "--fork", "true"], capture_output=True).returncode:
        pytest.skip("namespaces are not permitted here")
    sh("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / "key")
    started = {}
    try:
        sh("ip", "link", "add", "lbhosts", "type", "bridge")
        sh("ip", "address", "add", "10.77.0.1/24", "dev", "lbhosts")
        sh("ip", "link", "set", "lbhosts", "up")
        for name, address in HOSTS.items():
            started[name] = start_host(tmp_path, name, address)
        yield started
    finally:
        for name in started:
            cut(name)
            subprocess.run(["ip", "netns", "delete", name], check=False)
        subprocess.run(["ip", "link", "delete", "lbhosts"], check=False)


def start_host(tmp_path, name, address):
    """A host with a home that accepts the key, and uv."""
    folder = tmp_path / name
    for part in ("home/.ssh", "home/.local/bin", "tmp"):
        (folder / part).mkdir(parents=True, exist_ok=True)  # a home outlives a boot
    (folder / "tmp").chmod(0o1777)
    (folder / "home/.ssh/authorized_keys").write_text((tmp_path / "key.pub").read_text())
    (folder / "home/.bashrc").touch()
    shutil.copy(os.environ["UV"], folder / "home/.local/bin/uv")
    (folder / "sshd_config").write_text(SSHD)
    (folder / "hosts").write_text(f"127.0.0.1 localhost\n127.0.1.1 {name}\n")  # as Debian writes it
    subprocess.run(["ip", "link", "delete", f"v{name}"], capture_output=True, check=False)  # of the boot before
    sh("ip", "netns", "add", name)
    sh("ip", "link", "add", f"v{name}", "type", "veth", "peer", "name", "eth0", "netns", name)
    sh("ip", "link", "set", f"v{name}", "master", "lbhosts", "up")
    sh("ip", "-n", name, "address", "add", f"{address}/24", "dev", "eth0")
    for device in ("eth0", "lo"):
        sh("ip", "-n", name, "link", "set", device, "up")
    sh("ip", "-n", name, "route", "add", "default", "via", "10.77.0.1")
    script = HOST.format(name=name, folder=folder, key=tmp_path / "key", cache=sh("uv", "cache", "dir").strip())
    unshared = ["unshare", "--mount", "--uts", "--ipc", "--pid", "--fork", "--mount-proc"]
    with (folder / "sshd.log").open("w") as log:
        process = subprocess.Popen(["ip", "netns", "exec", name, *unshared, "bash", "-ec", script], stderr=log)
    wait_for(lambda: "listening" in (folder / "sshd.log").read_text(), 30)
    return process


def cut(name):
    """The power of a host."""
    for pid in sh("ip", "netns", "pids", name).split():
        subprocess.run(["kill", "-9", pid], capture_output=True, check=False)


def wait_for(condition, seconds):
    until = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < until
        time.sleep(2)
    return found


def fill_cache(home, dist, commands):
    """Run the set-up once where there is a network, so that uv's cache has all that the hosts will want of it."""
    shutil.copytree(dist, home / "lbstudy-wheel")
    (home / ".local/bin").mkdir(parents=True)
    (home / ".bashrc").touch()
    shutil.copy(os.environ["UV"], home / ".local/bin/uv")
    there = {"HOME": str(home), "UV_CACHE_DIR": sh("uv", "cache", "dir").strip(), "UV_LINK_MODE": "symlink"}
    for command in commands:
        sh("bash", "-c", command, env={**os.environ, **there, "UV_PYTHON_PREFERENCE": "only-system"})


@pytest.mark.slow
def test_up_a_study_with_a_host_cut_and_back_and_down(hosts, tmp_path):
    """Some ten minutes."""
    laptop = tmp_path / "laptop"
    laptop.mkdir()
    sh("uv", "build", "--wheel", "--quiet", "--out-dir", laptop / "dist", ROOT)
    head, *workers = HOSTS.values()
    text = (ROOT / "clusters/onprem.yaml").read_text()
    for value, filled in (("head_ip: FILL-IN", f"head_ip: {head}"), ("[FILL-IN, FILL-IN]", f"[{', '.join(workers)}]"),
                          ("ssh_user: FILL-IN", "ssh_user: root"), ("~/.ssh/id_ed25519", f"{tmp_path}/key")):  # fmt: skip
        assert text.count(value) == 1
        text = text.replace(value, filled)
    (laptop / "onprem.yaml").write_text(text)
    fill_cache(tmp_path / "filled", laptop / "dist", yaml.safe_load(text)["setup_commands"])

    def ray(*words):
        done = subprocess.run(
            [BIN / "ray", *words], cwd=laptop, capture_output=True, text=True, timeout=900, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def on_head(command):
        return ray("exec", "onprem.yaml", command)

    def records():
        shutil.rmtree(laptop / "studies", ignore_errors=True)
        ray("rsync-down", "onprem.yaml", "~/studies/", "studies/")
        return StudyFolder.open(str(laptop / "studies/digits")).trials()

    ray("up", "--yes", "onprem.yaml")
    wait_for(lambda: re.search(r"3 local.cluster.node", on_head("ray status")), 600)
    sets = ["cells.optimizer=[sgd]", "cells.smoothing=[none]", "tuning.pruner=none", "resources.cpus_per_worker=2"]
    options = " ".join(f"--set '{key}'" for key in [*sets, "resources.checkpoint_minutes=0"])
    job = "ray job submit --address http://127.0.0.1:8265 --no-wait --submission-id one -- "
    on_head(f"{job} lbstudy run digits --storage ~/studies --trials 3 --epochs 60 {options}")
    wait_for(lambda: "completed" in on_head("ray job logs --address http://127.0.0.1:8265 one"), 900)
    cut("lbhost2")
    hosts["lbhost2"].wait(30)
    sh("ip", "netns", "delete", "lbhost2")
    shutil.rmtree(tmp_path / "lbhost2/tmp")
    hosts["lbhost2"] = start_host(tmp_path, "lbhost2", HOSTS["lbhost2"])
    wait_for(lambda: "succeeded" in on_head("ray job status --address http://127.0.0.1:8265 one").lower(), 1800)
    assert [record.status for record in records()] == ["completed"] * 6
    ray("down", "--yes", "onprem.yaml")
