"""What a study has cost and what is left, from constructed records; and what is told while it runs."""

from math import isnan
from pathlib import Path

import pytest

from lbstudy.analysis.report import conditions
from lbstudy.analysis.tables import cost
from lbstudy.records.folder import StudyFolder
from lbstudy.records.lock import DriverLock
from lbstudy.records.trial import TrialRecord
from lbstudy.study.spec import Resources
from tests.conftest import TINY_STUDY, tiny_study
from tests.records.test_folder import record

SAMPLES = 1149
RUN = {"dataset": {"name": "digits"}, "train_on": "split", "budget": {"epochs": 4}}


def run(batch_size: int = 32, epochs: int = 4, **changes: object) -> TrialRecord:
    steps = -(-SAMPLES // batch_size) * epochs
    values = {"batch_size": batch_size, "cell": f"sgd-b{batch_size}-none", "run": RUN, "status": "completed",
              "metrics": {"epoch": epochs, "step": steps, "val_accuracy": 0.5, "val_loss": 1.0}}  # fmt: skip
    return record(**{**values, **changes})


def test_images_are_those_of_the_records_and_of_older_ones_whole_mini_batches():
    """A last mini-batch of 125 images is none of 1,024."""
    told = run(1024, 4, metrics={"epoch": 4, "step": 8, "images": 4 * SAMPLES})
    assert cost.images_seen([told, run(1024, 4), run(32, status="running", metrics={})]) == 4 * SAMPLES + 4 * 2048


def test_how_long_a_run_is():
    steps = run(1024, 2, metrics={"epoch": 2, "step": 4}, run=RUN | {"budget": {"steps": 7}})
    assert cost.whole_epochs(steps) == 3.5
    assert cost.whole_epochs(run()) == 4
    same_updates = run(1024, 2, metrics={"epoch": 2, "step": 4}, run=RUN | {"budget": {"epochs": 4, "updates_of": 32}})
    assert isnan(cost.whole_epochs(same_updates))  # how many updates that is, a record does not say


def test_a_device_is_a_core_or_a_part_of_a_gpu():
    runs = [
        run(seconds=10.0, device="2 x cpu"),
        run(seconds=20.0, device="4 x NVIDIA H100"),
        run(seconds=1.0, device=""),
    ]
    runs.append(run(seconds=5.0, device="cpu"))
    shared = Resources(cpus_per_worker=3, gpus_per_worker=0.25)
    assert cost.device_seconds(runs, shared) == {"CPU": 75.0, "NVIDIA H100": 20.0}


def test_what_is_left_is_what_the_trials_of_a_cell_have_taken():
    study = tiny_study(cells=TINY_STUDY["cells"] | {"smoothing": ["none"]}, tuning={"trials": 4})
    assert cost.seconds_left(study, [run(32, status="running")]) is None
    trials = [
        run(32, seconds=10.0), run(32, number=1, seconds=20.0, status="pruned"),
        run(32, number=2, seconds=4.0, status="running"), run(32, number=3, seconds=99.0, status="running"),
    ]  # fmt: skip
    assert cost.seconds_left(study, trials) == pytest.approx((15 - 4) + 0 + 4 * 15)  # of batch 128 nothing has ended
    trials.append(run(128, seconds=100.0))
    assert cost.seconds_left(study, trials) == pytest.approx((15 - 4) + 3 * 100)


def test_a_running_study_is_told(tmp_path: Path):
    folder = StudyFolder.create(tmp_path / "s", tiny_study())
    folder.write_trial(run(seconds=40.0, device="1 x cpu"))
    begun = run(number=1, status="running", metrics={}, device="1 x cpu")
    folder.write_trial(begun)
    for epoch in (1, 2):
        entry = {
            "epoch": epoch,
            "step": 36 * epoch,
            "val_accuracy": 0.25 * epoch,
            "seconds": 2.0,
            "images_per_second": 600.0,
        }
        folder.append_epoch(begun, entry)
    left = cost.sentences(cost.standing(folder))
    assert left[-1] == "no driver is at work"
    assert not any(sentence.startswith(("running", "speed")) for sentence in left)
    with DriverLock(folder.path, print):
        now = cost.standing(folder)
    assert (now.ended, now.wanted, now.complete) == (1, 16, False)
    assert now.spent.seconds == 44.0
    assert now.left == pytest.approx(36 + 14 * 40)
    assert cost.sentences(now) == [
        "running: sgd-b32-none trial 1, epoch 2 of 4, val_accuracy 0.5000",
        "speed: 600 images/s and 30 epochs a minute, 1 at work",
        "left: 15 of 16 trials, 0:09:56 of training if they take what the others have: about 0:09:56 with 1 at a time",
        "so far: 2 trials, 0.0122 CPU hours, 6.91 thousand images seen",
    ]


def test_what_was_lost_is_told(tmp_path: Path):
    folder = StudyFolder.create(tmp_path / "s", tiny_study())
    move = {"at": "", "gone": ["n1"], "epochs": 3, "seconds": 70.0}
    folder.write_trial(run(seconds=40.0, device="2 x cpu", lost=1800.0, moves=[move], nodes=["n1", "n2"]))
    moved = run(number=1, status="running", metrics={}, moves=[move, move], nodes=["n1", "n2"], lost=1800.0)
    folder.write_trial(moved)
    folder.write_trial(run(number=2, status="running", metrics={}))
    with DriverLock(folder.path, print):
        now = cost.standing(folder)
    assert now.spent.lost == {"CPU": 3600.0}  # of a trial that has not reported a device, nobody knows
    told = cost.sentences(now)
    assert told[:2] == [
        "running: sgd-b32-none trial 1, in its first epoch on n2, moved 2 times: 6 epochs and 0:02:20 lost",
        "running: sgd-b32-none trial 2, waits for its workers to come up",
    ]
    assert told[-1] == (
        "lost: 1 CPU hours more, trained again after interruptions, and trials were moved 3 times from a node that went"
    )
    assert " seen. Lost: 1 CPU hours more," in conditions.describe_cost(now.spent)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0, "0 s"), (9.94, "9.9 s"), (9.96, "10 s"), (59.4, "59 s"), (59.6, "0:01:00"), (3723, "1:02:03")],
)
def test_durations(seconds: float, text: str):
    assert cost.duration(seconds) == text
