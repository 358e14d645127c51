"""Who reaches whom, between processes of this machine."""

import os
import socket
from multiprocessing import get_context

import psutil
import pytest

from lbstudy.parallel import network

HERE = "127.0.0.1"


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


def test_two_processes_sum_a_tensor_and_one_alone_says_why_not():
    port = network.free_port()
    with get_context("spawn").Pool(2) as pool:
        calls = [pool.apply_async(network.exchange, (rank, 2, HERE, port, 60.0)) for rank in (0, 1)]
        assert [call.get(120) for call in calls] == ["", ""]
        alone = pool.apply(network.exchange, (0, 2, HERE, network.free_port(), 2.0))
    assert "2 clients" in alone or "imeout" in alone or "imed out" in alone
