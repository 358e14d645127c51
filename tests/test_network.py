"""Who reaches whom, between processes of this machine."""

import os
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing import get_context

import psutil
import pytest

from lbstudy.parallel import network

HERE = "127.0.0.1"


@contextmanager
def deaf() -> Iterator[int]:
    """A port of this machine where connections neither open nor are refused, as behind many a firewall."""
    with ExitStack() as held:
        server = held.enter_context(socket.create_server(("", 0), backlog=0))
        port = int(server.getsockname()[1])
        for _ in range(64):
            client = held.enter_context(socket.socket())
            client.settimeout(0.3)
            try:
                client.connect((HERE, port))
            except TimeoutError:  # those that wait for it to be taken are as many as may
                yield port
                return
        pytest.skip("this system takes whatever comes")


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (network.GLOO, network.NCCL):
        monkeypatch.setenv(name, "to be restored")
        monkeypatch.delenv(name)


def test_the_interface_with_the_address_is_used(environment: None):
    loopback = next(name for name, found in psutil.net_if_addrs().items() if any(a.address == HERE for a in found))
    assert network.use_interface_of(HERE) == f"interface {loopback}"
    assert (os.environ[network.GLOO], os.environ[network.NCCL]) == (loopback, f"={loopback}")


def test_what_the_user_has_chosen_stays(environment: None):
    os.environ[network.GLOO] = "mine"
    assert network.use_interface_of(HERE) == "interface mine"
    assert os.environ[network.GLOO] == "mine"


def test_an_address_that_no_interface_has_changes_nothing(environment: None):
    assert network.use_interface_of("203.0.113.1") == "the interface that its own name resolves to"
    assert network.GLOO not in os.environ


def test_an_open_door_is_reached_and_a_closed_one_is_named():
    with socket.create_server((HERE, 0)) as unused:
        closed = unused.getsockname()[1]
    port = network.open_door()
    try:
        found = network.unreachable({"n1": (HERE, port), "n2": (HERE, closed)}, 5.0)
    finally:
        network.close_door()
    assert found == {"n2": "127.0.0.1: Connection refused"}
    assert network.unreachable({"n1": (HERE, port)}, 5.0).keys() == {"n1"}


def test_doors_that_do_not_open_are_given_up_all_at_once():
    with deaf() as port:
        began = time.monotonic()
        found = network.unreachable({f"n{number}": (HERE, port) for number in range(60)}, 1.0)
        assert time.monotonic() - began < 30
    assert found == {f"n{number}": "127.0.0.1: timed out" for number in range(60)}
    assert network.unreachable({}, 1.0) == {}


def test_two_processes_sum_a_tensor_and_one_alone_says_why_not():
    port = network.free_port()
    with get_context("spawn").Pool(2) as pool:
        calls = [pool.apply_async(network.exchange, (rank, 2, HERE, port, 60.0)) for rank in (0, 1)]
        assert [call.get(120) for call in calls] == ["", ""]
        alone = pool.apply(network.exchange, (0, 2, HERE, network.free_port(), 2.0))
    assert "2 clients" in alone or "imeout" in alone or "imed out" in alone
