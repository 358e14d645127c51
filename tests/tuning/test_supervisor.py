"""What is said and done about lanes that do not come up and nodes that come and go, without Ray."""

from types import SimpleNamespace
from typing import Any

import pytest

from lbstudy.study.file import StudyError
from lbstudy.study.spec import Resources
from lbstudy.tuning import groups, nodes, supervisor
from lbstudy.tuning.groups import Group, Job
from lbstudy.tuning.nodes import NodeReport, own_versions
from lbstudy.tuning.recorder import BROKEN
from lbstudy.tuning.supervisor import LOOK_SECONDS, Supervisor

OWN, OTHER = "02000000", "01000000"


class World:
    """A cluster, a clock and a queue that a test moves."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, most: int = 10, **resources: Any):
        self.now, self.said = 1000.0, list[str]()
        self.nodes: dict[str, int] = {"a": 2}  # CPUs
        self.answers: dict[str, NodeReport] = {}
        self.groups: list[Group] = []
        self.jobs = {OTHER: Job(False, "job 01000000 (lbstudy run first.yaml)", "lbstudy run first.yaml")}
        monkeypatch.setattr(supervisor, "time", SimpleNamespace(monotonic=lambda: self.now))
        monkeypatch.setattr(nodes, "alive", lambda: [{"NodeID": n} for n in self.nodes])
        monkeypatch.setattr(nodes, "name", lambda node: f"host-{node['NodeID']}")
        monkeypatch.setattr(nodes, "ask", lambda node, imports=False: node["NodeID"])
        monkeypatch.setattr(nodes, "read", lambda question: self.answers.get(question))
        monkeypatch.setattr(groups, "remove", lambda found: None)
        monkeypatch.setattr(groups, "own_job", lambda: OWN)
        monkeypatch.setattr(groups, "list_groups", lambda: self.groups)
        monkeypatch.setattr(groups, "list_jobs", lambda: self.jobs)
        self.rests: list[float] = []
        self.queue: Any = SimpleNamespace(lanes=0, rest=self.rests.append)
        self.supervisor = Supervisor(
            Resources(gpus_per_worker=0, **resources), most, self.queue, self._cluster, self.said.append
        )

    def _cluster(self, avoid: Any) -> list[dict[str, float]]:
        return [{"CPU": float(cpus)} for node, cpus in self.nodes.items() if node not in avoid]

    def pass_(self, seconds: float) -> None:
        end = self.now + seconds
        while self.now < end:
            self.now += LOOK_SECONDS
            self.supervisor.on_step_end(0, [])

    def tell(self, trial: str = "t", **result: Any) -> None:
        self.supervisor.on_trial_result(0, [], SimpleNamespace(trial_id=trial), result)
        if result.get("lane"):
            self.supervisor.on_trial_complete(0, [], SimpleNamespace(trial_id=trial))

    def breaks(self, cause: str = "ModuleNotFoundError: No module named 'torch'") -> None:
        self.tell(outcome="failed", lane=BROKEN, report={"error": f"{cause}\nmore"})


def answer(node: str, **changes: Any) -> NodeReport:
    return NodeReport(**{"host": f"host-{node}", "resources": {}, "versions": own_versions(), **changes})


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    return World(monkeypatch)


def test_lanes_follow_the_nodes(world: World):
    assert world.queue.lanes == 2
    world.nodes["b"] = 3
    world.pass_(10)
    assert (world.queue.lanes, world.supervisor.avoided()) == (2, ["b"])  # until it has answered
    world.answers["b"] = answer("b")
    world.pass_(10)
    assert (world.queue.lanes, world.supervisor.avoided()) == (5, [])
    del world.nodes["a"]
    world.pass_(10)
    assert world.queue.lanes == 3
    assert world.said == ["5 lanes instead of 2: host-b has joined", "3 lanes instead of 5: host-a has gone"]


def test_no_more_lanes_than_there_is_work_for_or_the_study_allows(monkeypatch: pytest.MonkeyPatch):
    assert World(monkeypatch, most=1).queue.lanes == 1
    world = World(monkeypatch, lanes=1)
    world.nodes["b"], world.answers["b"] = 3, answer("b")
    world.pass_(10)
    assert (world.queue.lanes, world.said) == (1, [])


def test_a_node_that_joins_without_a_package_is_left_out(world: World):
    world.nodes["b"] = 2
    world.answers["b"] = answer("b", versions={}, error="ModuleNotFoundError: No module named 'torch'")
    world.pass_(10)
    assert (world.queue.lanes, world.supervisor.avoided()) == (2, ["b"])
    assert world.said == ["host-b is left out: ModuleNotFoundError: No module named 'torch'"]
    world.nodes["c"], world.answers["c"] = 2, answer("c", versions=own_versions() | {"lbstudy's code": "other"})
    world.pass_(10)
    assert world.said[1:] == ["host-c is left out: has lbstudy's code other"]


def test_who_holds_the_resources_is_told_and_the_wait_ends(world: World):
    world.groups = [Group("1", OTHER, False, {"CPU": 2.0}), Group("2", OWN, True, {"CPU": 1.0})]
    world.pass_(25)
    assert world.said == []
    world.pass_(600)
    (line,) = {line.partition("; for")[0] for line in world.said}
    assert line == "1 lane waits for 1 CPU: 2 CPU held by job 01000000 (lbstudy run first.yaml)"
    assert world.said[0].endswith("; for up to 59 min more (resources.wait_minutes)")
    assert len(world.said) == 1
    with pytest.raises(
        StudyError, match=r"given up after 60 min \(resources.wait_minutes\): 1 lane waits for 1 CPU: 2"
    ):
        world.pass_(3600)


STARTING = "the lanes are starting: their processes come up and import torch"


def test_lanes_that_start_are_told_every_ten_minutes_and_given_up_in_the_end(world: World):
    """They wait for nothing that could be named, and nothing breaks: their processes do not come."""
    world.pass_(60)
    assert world.said == []
    world.pass_(10)
    assert world.said == [STARTING]
    world.pass_(600)
    assert world.said == [STARTING] * 2
    began = world.now
    with pytest.raises(StudyError, match="^given up: no lane has come up within 75 min$"):
        world.pass_(3 * 3600)
    assert world.now - began < 3600 + 3 * 300


def test_a_node_that_joins_and_never_answers_keeps_no_study_whose_groups_break(world: World):
    world.answers = {"a": answer("a"), "b": answer("b", error=nodes.SILENT)}
    world.nodes["b"] = 2

    def go_on() -> None:
        for _ in range(1000):
            world.breaks("n1 cannot reach n2")
            world.pass_(10)

    with pytest.raises(StudyError, match="^given up: no lane has come up within 75 min: n1 cannot reach n2$"):
        go_on()
    assert "host-b has joined, but gives no answer within 60 s; asked again" in world.said


def test_a_lane_that_waits_ends_no_study_while_another_is_at_work(world: World):
    world.groups = [Group("1", OTHER, False, {"CPU": 1.0}), Group("2", OWN, True, {"CPU": 1.0})]
    world.tell(nodes=["host-a"])
    world.pass_(2 * 3600)
    assert set(world.said) == {"1 lane waits for 1 CPU: 1 CPU held by job 01000000 (lbstudy run first.yaml)"}


def test_what_a_lane_that_has_ended_had_asked_for_is_given_back(world: World, monkeypatch: pytest.MonkeyPatch):
    removed = set[str]()
    monkeypatch.setattr(groups, "remove", lambda found: removed.update(group.id for group in found))
    mine, live, other = Group("1", OWN, True, {}, True), Group("2", OWN, False, {}), Group("3", OTHER, True, {}, True)
    world.groups = [mine, live, other]
    world.pass_(10)
    assert removed == {"1"}


def test_a_dead_holder_is_called_dead(world: World):
    world.jobs[OTHER] = world.jobs[OTHER]._replace(dead=True)
    world.groups = [Group("1", OTHER, False, {"CPU": 2.0}), Group("2", OWN, True, {"CPU": 1.0})]
    world.pass_(60)
    assert "2 CPU left by the dead job 01000000" in world.said[0]


def test_the_last_node_goes_and_none_comes(world: World):
    world.tell(nodes=["host-a"])
    del world.nodes["a"]
    world.supervisor.on_trial_complete(0, [], SimpleNamespace(trial_id="t"))
    world.pass_(60)
    assert world.said[0] == "0 lanes instead of 2: host-a has gone"
    assert world.said[1].startswith("the study waits for nodes: none that is there has room for a trial; for up to")
    with pytest.raises(StudyError, match="given up after 60 min"):
        world.pass_(3600)


def test_a_node_that_cannot_hold_workers_any_more_is_found_and_left_out(world: World):
    world.nodes["b"], world.answers["b"] = 2, answer("b")
    world.pass_(10)
    world.answers |= {"a": answer("a", error="ModuleNotFoundError: No module named 'torch'")}
    slow, world.answers = world.answers, {}
    world.breaks()
    world.pass_(10)
    assert (world.queue.lanes, world.supervisor.avoided()) == (4, [])  # until it is known which
    world.answers = slow
    world.pass_(10)
    assert (world.queue.lanes, world.supervisor.avoided()) == (2, ["a"])
    assert world.said[1:] == [
        "a worker group has not come up: ModuleNotFoundError: No module named 'torch'",
        "2 lanes instead of 4: host-a is left out: ModuleNotFoundError: No module named 'torch'",
    ]
    world.pass_(1000)  # and the study goes on


def test_a_node_that_is_too_busy_to_answer_is_not_left_out(world: World):
    world.answers["a"] = world.answers["b"] = answer("x", error=nodes.SILENT)
    world.nodes["b"] = 1
    world.breaks()
    world.pass_(60)
    assert (world.queue.lanes, world.supervisor.avoided(), len(world.rests)) == (2, ["b"], 1)
    world.answers["b"] = answer("b")
    world.pass_(10)
    assert (world.queue.lanes, world.supervisor.avoided()) == (3, [])


def test_the_only_node_left_cannot_hold_workers(world: World):
    world.answers["a"] = answer("a", error="ModuleNotFoundError: No module named 'torch'")
    world.breaks()
    with pytest.raises(StudyError, match="^no node that is left can hold a worker: host-a: ModuleNotFoundError"):
        world.pass_(10)


def test_what_nobody_can_explain_is_tried_a_few_times(world: World):
    world.answers["a"] = answer("a")
    for _ in range(5):
        world.breaks("n1 cannot reach n2")
        world.pass_(10)
    world.breaks("n1 cannot reach n2")
    with pytest.raises(StudyError, match="^no worker group comes up, after 6 tries: n1 cannot reach n2$"):
        world.pass_(10)


def test_a_group_that_comes_up_makes_up_for_those_that_did_not(world: World):
    world.answers["a"] = answer("a")
    for _ in range(20):
        world.breaks("n1 cannot reach n2")
        world.pass_(10)
        world.tell("u", nodes=["host-a"])
        world.supervisor.on_trial_complete(0, [], SimpleNamespace(trial_id="u"))
    assert world.said == ["a worker group has not come up: n1 cannot reach n2"]


@pytest.mark.parametrize(
    ("command", "short"),
    [
        ("/home/me/lbstudy/bin/python -m lbstudy run mine.yaml", "lbstudy run mine.yaml"),
        (
            "/home/me/lbstudy/bin/python3.11 /home/me/lbstudy/bin/lbstudy run /data/mine.yaml",
            "lbstudy run /data/mine.yaml",
        ),
        ("lbstudy run mine.yaml", "lbstudy run mine.yaml"),
        ("python3 /opt/train.py --fast", "train.py --fast"),
    ],
)
def test_a_job_is_named_by_what_it_does(command: str, short: str):
    assert groups.in_short(command) == short
