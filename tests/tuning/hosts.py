"""Machines of one's own, in small: network namespaces with host names, `/etc/hosts` and a `/tmp/ray` of their own."""

import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from itertools import count
from pathlib import Path

import pytest

DEBIAN = "127.0.0.1 localhost\n127.0.1.1 {name}\n"
"""What Debian and Ubuntu write: the machine's own name is a loopback address."""


NETWORKS = count(os.getpid())  # the names of one that was closed may still be taken for a moment


class Hosts:
    """So many machines on one network, 10.77.N.1 and on; `close` takes everything away again."""

    def __init__(self, folder: Path, size: int = 2, hosts_file: str = DEBIAN):
        if os.geteuid() or not all(map(shutil.which, ("ip", "unshare", "nsenter"))):
            pytest.skip("network namespaces need root, and the commands ip, unshare and nsenter")
        self._net = next(NETWORKS) % 250 + 1
        self._bridge = f"lbb{self._net}"
        self.names = [f"lb{self._net}h{number + 1}" for number in range(size)]
        self.addresses = [f"10.77.{self._net}.{number + 1}" for number in range(size)]
        self._holders: list[subprocess.Popen[bytes]] = []
        self._nodes: dict[int, subprocess.Popen[bytes]] = {}
        self._folder = folder
        if subprocess.run(["ip", "link", "add", self._bridge, "type", "bridge"], capture_output=True).returncode:
            pytest.skip("network namespaces are not permitted here")
        _run("ip", "link", "set", self._bridge, "up")
        for name, address in zip(self.names, self.addresses, strict=True):
            end = f"v{name}"
            _run("ip", "netns", "add", name)
            _run("ip", "link", "add", end, "type", "veth", "peer", "name", "eth0", "netns", name)
            _run("ip", "link", "set", end, "master", self._bridge, "up")
            for command in ("link set lo up", f"addr add {address}/24 dev eth0", "link set eth0 up"):
                _run("ip", "-n", name, *command.split())
            hosts = folder / f"{name}.hosts"
            hosts.write_text(hosts_file.format(name=name))
            (folder / f"{name}.ray").mkdir()
            script = (
                f"hostname {name}; mount --bind {hosts} /etc/hosts; mkdir -p /tmp/ray; "
                f"mount --bind {folder / f'{name}.ray'} /tmp/ray; exec sleep infinity"
            )
            command = ["ip", "netns", "exec", name, "unshare", "--mount", "--uts", "sh", "-c", script]
            self._holders.append(subprocess.Popen(command))
        time.sleep(1)

    def start(self, host: int, *command: str, log: str, **environment: str) -> subprocess.Popen[bytes]:
        """Run a command on a machine."""
        within = ["nsenter", "-t", str(self._holders[host].pid), "-m", "-u", "-n", "--", *command]
        clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        variables = (
            clean
            | {"RAY_AUTH_MODE": "disabled", "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0", "RAY_raylet_start_wait_time_s": "120"}
            | environment
        )
        out = (self._folder / log).open("a")
        return subprocess.Popen(within, env=variables, stdout=out, stderr=out, start_new_session=True)

    def join(self, host: int, *options: str, **environment: str) -> None:
        """Start Ray on a machine: on the first the head, without CPUs. On a busy machine it may take several tries."""
        address = self.addresses[host]
        role = ["--head", "--port=6379", "--num-cpus=0", "--include-dashboard=true"] if not host else [
            f"--address={self.addresses[0]}:6379", "--num-cpus=1"
        ]  # fmt: skip
        ray = str(Path(sys.executable).parent / "ray")
        command = (ray, "start", "--block", f"--node-ip-address={address}", "--disable-usage-stats", *role, *options)
        for _ in range(3):
            log = f"ray{host}-{len([*self._folder.glob('ray*.log')])}.log"
            self._nodes[host] = self.start(host, *command, log=log, **environment)
            while self._nodes[host].poll() is None:
                if "will now block" in self.log(log):
                    return
                time.sleep(0.2)
        raise AssertionError(f"Ray does not start on machine {host}: {self.log(log)[-2000:]}")

    def cut(self, host: int) -> None:
        """End Ray on a machine as a power cut does."""
        node = self._nodes.pop(host)
        with suppress(ProcessLookupError):
            os.killpg(node.pid, signal.SIGKILL)
        node.wait()
        for process in _run("ip", "netns", "pids", self.names[host]).split():
            if int(process) != self._holders[host].pid:
                with suppress(ProcessLookupError):
                    os.kill(int(process), signal.SIGKILL)

    def part(self, one: int, other: int) -> None:
        """Let two machines reach each other no more."""
        _run("ip", "-n", self.names[one], "route", "add", "blackhole", self.addresses[other])

    def lbstudy(self, *arguments: str, log: str = "lbstudy.log", **environment: str) -> subprocess.Popen[bytes]:
        """Run lbstudy on the head, with the cluster."""
        address = f"{self.addresses[0]}:6379"
        return self.start(0, sys.executable, "-m", "lbstudy", *arguments, "--address", address, log=log, **environment)

    def log(self, name: str = "lbstudy.log") -> str:
        """What a command has written."""
        return (self._folder / name).read_text()

    def close(self) -> None:
        """End all processes and remove the machines."""
        for host in [*self._nodes]:
            self.cut(host)
        for name, holder in zip(self.names, self._holders, strict=True):
            for process in subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True).stdout.split():
                with suppress(ProcessLookupError):
                    os.kill(int(process), signal.SIGKILL)
            holder.wait()
            subprocess.run(["ip", "netns", "del", name])
        subprocess.run(["ip", "link", "del", self._bridge])


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
