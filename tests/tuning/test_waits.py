"""The waits of docs/cluster.md against something that never answers, without Ray: what is said, and that they end."""

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.exceptions import GetTimeoutError

from lbstudy.console import session
from lbstudy.study.file import StudyError
from lbstudy.study.spec import Resources
from lbstudy.tuning import doctor, groups, lane, nodes, process_group, tuner
from lbstudy.tuning.lane import Lane, LaneBroken, LaneError, Start
from lbstudy.tuning.process_group import GroupError, Member, prove
from tests.console.every_command import lbstudy
from tests.test_network import deaf

STUDY = {
    "name": "s", "model": "lenet5", "dataset": {"name": "digits"}, "budget": {"epochs": 1},
    "cells": {"optimizer": ["sgd"], "batch_size": [128], "smoothing": ["none"]},
    "search": {"learning_rate": {"log_uniform": [0.01, 0.1]}}, "tuning": {"trials": 1, "pruner": "none"},
}  # fmt: skip

pytestmark = pytest.mark.usefixtures("no_shutdown")


class Clock:
    """In place of `time`."""

    def __init__(self) -> None:
        self.now, self.began = 1000.0, 1000.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        assert self.passed < 3600, "this waits for ever"

    @property
    def passed(self) -> float:
        return self.now - self.began


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Of all that waits here."""
    clock = Clock()
    for module in (lane, process_group, groups):
        monkeypatch.setattr(module, "time", clock)
    return clock


@pytest.fixture
def study(tmp_path: Path) -> list[str]:
    (tmp_path / "s.yaml").write_text(json.dumps(STUDY))
    return ["run", str(tmp_path / "s.yaml"), "--storage", str(tmp_path / "studies")]


def test_a_ray_that_does_not_start_is_tried_three_times(study: list[str], monkeypatch: pytest.MonkeyPatch, capsys):
    tries = []

    def fail(**options: object) -> None:
        tries.append(options)
        raise Exception("The last lines of a log\nno room for another process")

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("ray.init", fail)
    assert lbstudy(study) == 2
    assert capsys.readouterr().err.splitlines() == [
        "starting Ray ...",
        "error: Ray did not start on this machine: no room for another process",
    ]
    assert len(tries) == 3


def test_a_cluster_that_nobody_opens_for_is_one_error(study: list[str], monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr(tuner, "JOIN_SECONDS", 0.5)
    monkeypatch.setattr("ray.init", lambda **options: pytest.fail("Ray waits for minutes"))
    monkeypatch.setenv("RAY_ADDRESS", "to be restored")
    with deaf() as port:
        assert lbstudy([*study, "--address", f"127.0.0.1:{port}"]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert first == "joining the cluster ..."
    assert second.startswith("error: no Ray cluster answers at ")
    assert second.endswith(f":{port}: timed out")


@pytest.mark.parametrize(
    "real", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["a client that gives up", "Ray's own client"]
)
def test_what_opens_and_is_no_ray_is_given_up(real: bool, monkeypatch: pytest.MonkeyPatch):
    tries = []

    def give_up(address: str) -> None:
        tries.append(address)
        raise ray.exceptions.RpcError("Timed out while waiting for GCS to become available.")

    if not real:
        monkeypatch.setattr(tuner, "GcsClient", give_up)
    monkeypatch.setattr("ray.init", lambda **options: pytest.fail("Ray tries for a quarter of an hour"))
    began = time.monotonic()
    with socket.create_server(("", 0), backlog=64) as mute:
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{mute.getsockname()[1]}")
        with pytest.raises(StudyError, match=r"^no Ray cluster answers at [\d.]+:\d+: Timed out while waiting for GCS"):
            tuner.connect()
    assert time.monotonic() - began < 120
    assert len(tries) == (0 if real else 2)


def test_nodes_that_do_not_answer_stop_a_study_before_it_begins(monkeypatch: pytest.MonkeyPatch):
    clock = Clock()
    clock.time = lambda: 1e9 - clock.now  # type: ignore[attr-defined]  # a wall clock that is set back meanwhile
    node = {"NodeID": "1", "NodeManagerHostname": "n1", "NodeManagerAddress": "10.0.0.1", "Resources": {}}

    def wait(answers: list[Any], num_returns: int = 1, *, timeout: float) -> tuple[list[Any], list[Any]]:
        clock.sleep(timeout)
        return [], answers

    monkeypatch.setattr(nodes, "time", clock)
    monkeypatch.setattr(nodes, "alive", lambda: [node])
    monkeypatch.setattr(nodes, "ask", lambda node, imports: nodes.Question(node, object(), clock.time(), clock.now))
    monkeypatch.setattr(ray, "wait", wait)
    with pytest.raises(
        StudyError, match=r"^versions: every node needs .*, but n1 \(10.0.0.1\): no answer within 60 s$"
    ):
        doctor.require([doctor.check_versions(nodes.ask_nodes())])
    assert clock.passed == 60


class Silent:
    """A mailbox: each of its methods answers what a test says, the one before the clock has moved on by a second."""

    def __init__(self, clock: Clock, **answers: object):
        self._clock, self._answers = clock, answers
        self.called: list[str] = []

    def __getattr__(self, name: str) -> Any:
        def remote(*arguments: object) -> object:
            self.called.append(name)
            self._clock.sleep(1)
            return self._answers.get(name)

        return SimpleNamespace(remote=remote)


def lane_with(mailbox: object, thread: object, **state: object) -> Lane:
    """A lane whose worker group is what a test says."""
    made: Any = Lane.__new__(Lane)
    made._mailbox, made._thread, made._error = mailbox, thread, None
    made._up = made._lost = False
    made._nodes, made._workers, made._reports, made._asked = {}, 1, 0, 0.0
    made._job = lane.Job("key", {}, [])
    for name, value in state.items():
        setattr(made, name, value)
    return made


ALIVE = SimpleNamespace(is_alive=lambda: True)


@pytest.fixture
def answering(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Ray, which gives every answer at once, knows no nodes, and kills what it is told to."""
    killed = list[object]()
    monkeypatch.setattr(ray, "get", lambda answer, timeout=None: answer)
    monkeypatch.setattr(ray, "kill", killed.append)
    monkeypatch.setattr(ray, "nodes", list)
    monkeypatch.setattr(lane, "draining", set)
    monkeypatch.setattr(lane, "list_groups", list)
    return killed


def test_workers_that_do_not_come_up_break_their_lane_and_give_back_what_they_hold(
    clock: Clock, answering: list[object]
):
    started = Start(nodes=(("1", "n1"), ("2", "n2")), controller="controller")
    group = lane_with(Silent(clock, start=started), ALIVE)
    with pytest.raises(LaneBroken, match="^the workers on n1, n2 have not come up within 300 s$"):
        group.come_up()
    assert 300 < clock.passed < 305
    assert not group.is_alive()
    assert answering == ["controller"]


def test_workers_that_are_never_placed_break_their_lane_too(clock: Clock, answering: list[object]):
    with pytest.raises(LaneBroken, match="^the workers have not come up within 300 s$"):
        lane_with(Silent(clock, start=Start()), ALIVE).come_up()
    assert 300 < clock.passed < 305


def test_an_epoch_that_is_never_reported_fails_the_trial(clock: Clock, answering: list[object]):
    actor: Any = tuner.TrialActor.__new__(tuner.TrialActor)
    actor._lane, actor._begun = lane_with(Silent(clock, start=Start(up=True)), ALIVE), False
    actor._resources = Resources(timeout_minutes=0.5)
    assert actor.step() == {"nodes": []}
    clock.began = clock.now
    with pytest.raises(LaneError, match=r"^no report for 31 s; resources.timeout_minutes allows 0.5 min$"):
        actor.step()
    assert clock.passed <= 32
    assert not actor._lane.is_alive()  # the next trial gets another


@pytest.mark.parametrize("work", ["come_up", "next_report", "end"])
def test_a_mailbox_that_does_not_answer_fails_the_trial(work: str, clock: Clock, monkeypatch: pytest.MonkeyPatch):
    def get(answer: object, timeout: float | None = None) -> None:
        assert timeout is not None, "this may wait for ever"
        clock.sleep(timeout)
        raise GetTimeoutError

    monkeypatch.setattr(ray, "get", get)
    group = lane_with(Silent(clock), ALIVE, _up=work != "come_up")
    with pytest.raises(LaneError, match="^the lane's mailbox has not answered for 120 s$"):
        getattr(group, work)()
    assert clock.passed == 121
    assert not group.is_alive()


NODE = {"NodeID": "1", "Alive": True, "NodeManagerAddress": "10.0.0.1", "NodeManagerPort": 1}


@pytest.mark.parametrize(("dies", "gone"), [(3, ["n1"]), (60, [])])
def test_news_of_a_node_is_waited_for_for_five_seconds(
    dies: float, gone: list[str], clock: Clock, answering: list[object], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(ray, "nodes", lambda: [NODE | {"Alive": clock.passed < dies}])
    monkeypatch.setattr(lane.network, "unreachable", lambda doors, seconds: {})
    assert lane_with(None, ALIVE, _nodes={"1": "n1"}).gone() == gone
    assert clock.passed <= 6


def test_workers_that_do_not_end_with_their_lane_are_left_to_the_driver(
    answering: list[object], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(lane, "END_SECONDS", 0.2)
    for_ever = threading.Event()
    thread = threading.Thread(target=for_ever.wait, args=(600,), daemon=True)
    thread.start()
    mailbox, began = Silent(Clock()), time.monotonic()
    try:
        lane_with(mailbox, thread, _up=True).end()
        assert thread.is_alive()
        assert time.monotonic() - began < 30
        assert mailbox.called == ["put_job"]
    finally:
        for_ever.set()


class Workers:
    """Two on a node each, of which the second never answers one question."""

    ANSWERS: dict[str, object] = {"use_interface_of": "interface eth0", "unreachable": {}, "exchange": ""}

    def __init__(self, silent: str, clock: Clock, monkeypatch: pytest.MonkeyPatch):
        self._silent, self._clock, self.members = silent, clock, [self._member(1), self._member(2)]
        monkeypatch.setattr(ray, "wait", self._wait)
        monkeypatch.setattr(ray, "get", self._get)

    def _member(self, number: int) -> Member:
        def call(work: Callable[..., object], *arguments: object) -> tuple[str, int]:
            return work.__name__, number

        return Member(f"n{number}", str(number), f"10.0.0.{number}", call)

    def _answers(self, question: tuple[str, int]) -> bool:
        return question[0] != self._silent or (question[1] == 1 and self._silent != "free_port")

    def _wait(self, asked: Sequence[Any], *, timeout: float) -> tuple[list[Any], list[Any]]:
        done = [question for question in asked if self._answers(question)]
        self._clock.sleep(0 if done else timeout)
        return done[:1], []

    def _get(self, question: tuple[str, int]) -> object:
        assert self._answers(question), "this may wait for ever"
        self._clock.sleep(2)  # on a busy machine
        return self.ANSWERS.get(question[0], 1)


QUESTIONS = ["use_interface_of", "open_door", "unreachable", "close_door", "free_port", "exchange"]


@pytest.mark.parametrize("silent", QUESTIONS)
def test_a_worker_that_is_silent_while_the_process_group_forms_is_named(
    silent: str, clock: Clock, monkeypatch: pytest.MonkeyPatch
):
    of = r"n1 \(10.0.0.1\)" if silent == "free_port" else r"n2 \(10.0.0.2\)"  # the first worker chooses the port
    with pytest.raises(GroupError, match=rf"^no answer from {of} while the process group formed$"):
        prove(Workers(silent, clock, monkeypatch).members)
    assert clock.passed <= 62  # the last answer that came was on its way


def test_a_collective_operation_that_a_worker_does_not_join_has_an_end(monkeypatch: pytest.MonkeyPatch):
    """What torch is given; the trial's own bound is `test_an_epoch_that_is_never_reported...`."""
    from ray.train.torch import config

    given: list[object] = []
    monkeypatch.setattr(config, "_set_torch_distributed_env_vars", lambda: None)
    monkeypatch.setattr(config, "_setup_torch_process_group", lambda *arguments: given.extend(arguments))
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")
    process_group._form("gloo", 1, 2, "10.0.0.1", 4321)
    assert given == ["gloo", 1, 2, "env://", 30 * 60]


def test_workers_that_all_answer_form_a_group(clock: Clock, monkeypatch: pytest.MonkeyPatch):
    prove(Workers("nothing", clock, monkeypatch).members)


@pytest.mark.parametrize(("lanes", "seconds"), [(0, 2), (3, 2), (10**6, 10)])
def test_what_a_stopped_study_leaves_is_removed_until_nothing_comes_or_ten_seconds_have_passed(
    lanes: int, seconds: float, clock: Clock, monkeypatch: pytest.MonkeyPatch
):
    """Dying lanes ask for a group at every look."""
    asked, removed = iter(range(lanes)), list[str]()

    def look() -> list[groups.Group]:
        others = [groups.Group("other", "02000000", True, {})]
        return others + [groups.Group(str(n), "01000000", True, {}) for n in [next(asked, None)] if n is not None]

    monkeypatch.setattr(groups, "list_groups", look)
    monkeypatch.setattr(groups, "remove", lambda found: removed.extend(group.id for group in found))
    count = groups.sweep("01000000")
    assert seconds <= clock.passed <= seconds + 1
    assert removed == [str(n) for n in range(count)]
    assert count == lanes or seconds == 10


@pytest.mark.parametrize("gone", [False, True])
def test_a_study_that_is_stopped_says_so_and_joins_once_more_for_what_it_left(
    gone: bool, monkeypatch: pytest.MonkeyPatch, capsys
):
    done = list[str]()

    def connect(verbose: bool = False) -> None:
        done.append("join")
        if gone and len(done) > 1:
            raise StudyError("no Ray cluster answers")

    def work() -> None:
        raise KeyboardInterrupt

    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    monkeypatch.setattr(tuner, "connect", connect)
    monkeypatch.setattr(tuner, "own_job", lambda: "01000000")
    monkeypatch.setattr(tuner, "sweep", lambda job: done.append(f"sweep {job}"))
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray, "shutdown", lambda: done.append("leave"))
    with pytest.raises(KeyboardInterrupt):
        session.on_ray(work)
    assert done == ["join", "leave", "join", *([] if gone else ["sweep 01000000", "leave"])]
    assert capsys.readouterr().err.splitlines() == [
        "joining the cluster ...",
        "ending the trials at work; once more to leave at once",
    ]
    assert os.environ["RAY_ADDRESS"] == "10.0.0.1:6379"
