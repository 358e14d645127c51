"""Changes that are made in threads: in their order, all of them, and none after one that has failed."""

import threading
import time
from functools import partial
from pathlib import Path

import pytest

from lbstudy.records import writes
from lbstudy.records.folder import StudyFolder
from lbstudy.records.writes import ThreadedWrites, Writes, writes_for
from tests.conftest import tiny_study
from tests.records.test_folder import record


def test_changes_to_a_trial_keep_their_order_and_those_to_several_go_side_by_side():
    made, many, together = [], ThreadedWrites(), threading.Barrier(8, timeout=30)
    for step in range(3):
        for trial in range(8):
            many.do(str(trial), lambda trial=trial, step=step: (together.wait(), made.append((trial, step))))
    many.wait()
    assert sorted(made) == [(trial, step) for trial in range(8) for step in range(3)]
    assert [[s for t, s in made if t == trial] for trial in range(8)] == [[0, 1, 2]] * 8


def test_what_follows_a_change_that_failed_is_not_made_and_the_driver_is_told():
    made, many, go = [], ThreadedWrites(), threading.Event()

    def fail() -> None:
        go.wait(30)
        raise OSError("no answer")

    many.do("a", partial(made.append, 1))
    many.do("a", fail)
    many.do("a", partial(made.append, 2))
    go.set()
    for ask in (many.wait, partial(many.wait, "a"), partial(many.do, "b", partial(made.append, 3))):
        with pytest.raises(OSError, match="no answer"):
            ask()
    time.sleep(0.1)
    assert made == [1]


def test_who_is_far_ahead_waits(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(writes, "AHEAD", 3)
    many, go = ThreadedWrites(), threading.Event()
    for _ in range(3):
        many.do("a", partial(go.wait, 30))
    one_more = threading.Thread(target=many.do, args=("b", go.is_set))
    one_more.start()
    one_more.join(0.2)
    assert one_more.is_alive()
    go.set()
    one_more.join(30)
    assert not one_more.is_alive()
    many.wait()


def test_who_reads_a_trial_sees_what_was_written_and_what_is_said_of_it_is_safe(tmp_path: Path):
    folder = StudyFolder(StudyFolder.create(tmp_path / "s", tiny_study()).path, ThreadedWrites())
    trial, said, slowly = record(), [], threading.Event()
    folder.after(trial, partial(slowly.wait, 0.3))
    folder.write_trial(trial)
    series = folder.series(trial)
    for epoch in (1, 2, 3):
        series.add({"epoch": epoch})
    folder.write_state(trial, "checkpoint", 3, b"state")
    folder.after(trial, lambda: said.append(StudyFolder(folder.path).read_state(trial, "checkpoint")))
    trial.status = "failed"  # what was written is what it was then
    assert not (folder.trial_folder(trial) / "trial.json").exists()
    assert [entry["epoch"] for entry in folder.epochs(trial)] == [1, 2, 3]
    assert said == [(3, b"state")]
    assert folder.trials() == [record()]
    folder.drop_state(trial, "checkpoint")
    assert folder.read_state(trial, "checkpoint") is None


def test_a_file_system_takes_changes_at_once(tmp_path: Path):
    assert type(writes_for(tmp_path)) is Writes
