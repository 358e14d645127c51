"""Looks after a running study's lanes: how many there may be as nodes come and go, what those that are not up wait for,
and when it is time to give up.

It looks every LOOK_SECONDS, between the steps of Tune's loop, and asks only what Ray answers at once. Trials that end
because of their lane come back without being counted, see `Recorder`; that this has an end is decided here.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import lbstudy.tuning.rayenv  # noqa: F401  # isort: skip  # before ray

from ray import tune

from lbstudy.study.file import StudyError
from lbstudy.study.spec import Resources
from lbstudy.tuning import groups, nodes
from lbstudy.tuning.lane import START_SECONDS
from lbstudy.tuning.recorder import BROKEN
from lbstudy.tuning.resources import count_lanes
from lbstudy.tuning.search import TrialQueue

LOOK_SECONDS = 5.0
PATIENCE_SECONDS = 30.0
"""How long a lane may take to come up before it is a matter of words."""

REMIND_SECONDS = 600.0
REST_SECONDS = 5.0
"""What passes after a worker group has failed before the next is tried."""

TRIES = 3
"""Worker groups of a lane that may fail one after the other, when none comes up, before the study is given up."""


class Supervisor(tune.Callback):
    """Of one run of a study.

    Args:
        resources: of a trial.
        most: lanes that there is work for.
        queue: gets its number of lanes from here.
        cluster: the resources of the nodes of the cluster, but for those with these ids.
        notice: is told what a user should know.
    """

    def __init__(
        self,
        resources: Resources,
        most: int,
        queue: TrialQueue,
        cluster: Callable[[Sequence[str]], list[dict[str, float]]],
        notice: Callable[[str], None],
    ):
        self._resources, self._most, self._queue, self._cluster, self._notice = resources, most, queue, cluster, notice
        self._names = {node["NodeID"]: nodes.name(node) for node in nodes.alive()}
        self._asked: dict[str, nodes.Question] = {}
        self._new: set[str] = set()  # nodes that have joined and have not answered yet
        self._left_out: dict[str, str] = {}  # why, by Ray's id of the node
        self._begun: set[str] = set()  # trials at work, by Tune's id
        self._broken, self._cause = 0, ""
        self._looked = 0.0
        self._idle_since: float | None = time.monotonic()  # no trial is at work
        self._wait_since: float | None = None  # a lane waits for its resources
        self._said: dict[str, float] = {}  # when, by what it was about
        self._lanes = self._count()
        queue.lanes = max(1, self._lanes)

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles callbacks into a snapshot that nobody reads

    def avoided(self) -> list[str]:
        """The nodes that no lane may use, by Ray's ids."""
        return [*self._left_out, *self._new]

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """A trial has begun, has reported or has ended."""
        if "nodes" in result:
            self._begun.add(trial.trial_id)
            self._broken = 0
        elif result.get("lane") == BROKEN:
            self._broken += 1
            self._queue.rest(REST_SECONDS)
            self._cause = result["report"]["error"].splitlines()[0]
            self._say("broken", f"a worker group has not come up: {self._cause}", now=self._cause)
            for node in nodes.alive():
                if node["NodeID"] not in self._left_out:
                    self._asked.setdefault(node["NodeID"], nodes.ask(node, imports=True))

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial has ended."""
        self._begun.discard(trial.trial_id)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial has ended with its lane."""
        self._begun.discard(trial.trial_id)

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Look, now and then.

        Raises:
            StudyError: there is nothing to hope for.
        """
        now = time.monotonic()
        if now - self._looked < LOOK_SECONDS:
            return
        self._looked = now
        self._look_at_nodes()
        self._idle_since = None if self._begun else self._idle_since or now
        self._look_at_lanes(now)

    def _look_at_nodes(self) -> None:
        """Count the lanes anew; what joins is asked first whether it can hold workers."""
        there = {node["NodeID"]: node for node in nodes.alive()}
        joined = [id_ for id_ in there if id_ not in self._names]
        news = [f"{self._names.pop(id_)} has gone" for id_ in [*self._names] if id_ not in there]
        for id_ in joined:
            self._names[id_] = nodes.name(there[id_])
            self._new.add(id_)
            self._asked[id_] = nodes.ask(there[id_], imports=True)
        for id_, question in [*self._asked.items()]:
            if id_ not in there:
                del self._asked[id_]
            elif report := nodes.read(question):
                del self._asked[id_]
                if report.error == nodes.SILENT:  # busy, maybe: no reason to leave it out
                    if id_ in self._new:
                        self._asked[id_] = nodes.ask(there[id_], imports=True)
                        self._say("silent", f"{report.host} has joined, but gives {report.error}; asked again", now=id_)
                elif misfit := nodes.misfit(report):
                    self._left_out[id_], self._broken = misfit, 0
                    news.append(f"{report.host} is left out: {misfit}")
                elif id_ in self._new:
                    news.append(f"{report.host} has joined")
        self._new &= set(self._asked)
        self._left_out = {id_: why for id_, why in self._left_out.items() if id_ in there}
        before, self._lanes = self._lanes, self._count()
        self._queue.lanes = max(1, self._lanes)
        if self._lanes != before:
            self._notice(f"{self._lanes} lane{'s' * (self._lanes != 1)} instead of {before}: {'; '.join(news)}")
        elif any("left out" in word for word in news):
            self._notice("; ".join(word for word in news if "left out" in word))

    def _count(self) -> int:
        try:
            return min(self._most, count_lanes(self._resources, self._cluster(self.avoided())))
        except StudyError:  # not even one trial fits now
            return 0

    def _look_at_lanes(self, now: float) -> None:
        """Say what lanes wait for; and give up when no trial is at work and that has no prospect."""
        if self._broken >= TRIES * max(1, self._lanes) and not self._asked and not self._begun:
            raise StudyError(f"no worker group comes up, after {self._broken} tries: {self._cause}")
        if not self._lanes and self._left_out and not self._asked and not self._begun:
            why = "; ".join(f"{self._names[id_]}: {misfit}" for id_, misfit in self._left_out.items())
            raise StudyError(f"no node that is left can hold a worker: {why}")
        own, found = groups.own_job(), groups.list_groups()
        groups.remove([group for group in found if group.job == own and group.orphan])  # of lanes that have ended
        waiting = [group for group in found if group.waits and group.job == own and not group.orphan and group.is_for()]
        self._wait_since = (self._wait_since or now) if waiting or not self._lanes else None
        idle, bound = now - (self._idle_since or now), 60 * self._resources.wait_minutes
        if self._wait_since is None:
            if idle > bound + TRIES * START_SECONDS:  # whatever keeps them
                cause = f": {self._cause}" if self._cause else ""
                raise StudyError(f"given up: no lane has come up within {idle / 60:.0f} min{cause}")
            if idle > 2 * PATIENCE_SECONDS and not self._broken:
                self._say("starting", "the lanes are starting: their processes come up and import torch")
            return
        if now - self._wait_since > PATIENCE_SECONDS:
            words = self._wait_in_words(waiting, found, own)
            if idle > bound:
                raise StudyError(f"given up after {idle / 60:.0f} min (resources.wait_minutes): {words}")
            until = f"; for up to {(bound - idle) / 60:.0f} min more (resources.wait_minutes)" if idle else ""
            self._say("waiting", words + until, now=words)

    def _wait_in_words(self, waiting: Sequence[groups.Group], found: Sequence[groups.Group], own: str) -> str:
        """What lanes wait for, and who has it."""
        if not waiting:
            return "the study waits for nodes: none that is there has room for a trial"
        jobs = groups.list_jobs()
        kinds = [kind for kind in ("CPU", "GPU") if any(group.resources.get(kind) for group in waiting)]
        held = groups.holders(kinds, found, jobs, own) or ["nobody holds them in placement groups"]
        plural = "lanes wait" if len(waiting) != 1 else "lane waits"
        return f"{len(waiting)} {plural} for {groups.in_words(waiting[0].resources)}: {'; '.join(held)}"

    def _say(self, about: str, words: str, now: str = "") -> None:
        """Tell the user, unless the same was told a short while ago."""
        key = f"{about} {now}"
        if time.monotonic() - self._said.get(key, -REMIND_SECONDS) >= REMIND_SECONDS:
            self._said[key] = time.monotonic()
            self._notice(words)
