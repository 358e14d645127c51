"""The start-up check: on a real Ray, and what it says of each thing that can be wrong."""

import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from lbstudy.console import cli
from lbstudy.methods import models, sizes
from lbstudy.study.file import StudyError
from lbstudy.study.spec import Resources
from lbstudy.training import datasets
from lbstudy.tuning import doctor, groups, tuner
from lbstudy.tuning.nodes import NodeReport, code_digest, own_versions
from lbstudy.tuning.resources import this_machine
from tests.conftest import TINY_STUDY, tiny_study


@pytest.fixture
def joined(ray_session: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The session's Ray stays, whatever doctor and run do."""
    monkeypatch.setattr(tuner, "connect", lambda verbose=False: None)
    monkeypatch.setattr(tuner, "disconnect", lambda: None)


def report(**changes: object) -> NodeReport:
    return NodeReport(**{"host": "n1", "resources": {"CPU": 2.0}, "versions": own_versions(), **changes})  # type: ignore[arg-type]


def test_a_sound_machine(joined: None, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["lbstudy", "doctor", "digits", "--storage", str(tmp_path / "studies")])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    text = capsys.readouterr().out
    assert not exit_.value.code, text
    assert [line.split(":")[0].split()[1] for line in text.splitlines() if line[0] in "✓✗"] == [
        "versions", "clocks", "resources", "node", "resources", "storage",
    ]  # fmt: skip
    assert "✗" not in text
    assert not (tmp_path / "studies").exists()


def test_what_a_run_checks_passes_here(joined: None, tmp_path: Path):
    study = tiny_study()
    plan = tuner.plan(study, datasets.load_all(study), tuner.cluster_nodes())
    assert [finding.name for finding in doctor.before_a_run(plan, tmp_path)] == ["storage"]
    doctor.require(doctor.before_a_run(plan, tmp_path))


def test_impossible_resources_are_answered_before_ray_starts(tmp_path: Path):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    command = [sys.executable, "-m", "lbstudy", "run", "digits", "--storage", str(tmp_path / "new" / "studies")]
    for kind, wanted in (("cpus", "9999 CPU"), ("gpus", "1 CPU and 9999 GPU")):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        set_ = ["--set", f"resources.{kind}_per_worker=9999"]
        ran = subprocess.run([*command, *set_], env=environment, capture_output=True, text=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert ran.returncode == 2
        assert ran.stderr.startswith(f"error: resources: a worker needs {wanted}, but the most that a node has is ")
        assert len(ran.stderr.splitlines()) == 1
        # of the processor, not of a clock that a busy machine makes run ahead; most of it is the import of torch
        assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 10
    assert not list(tmp_path.iterdir())


def test_a_private_ray_counts_what_was_checked_against(ray_session: None):
    (node,) = tuner.cluster_nodes()
    assert {kind: node.get(kind, 0.0) for kind in ("CPU", "GPU")} == this_machine()


def test_findings_stop_a_run_all_at_once():
    bad = [
        doctor.Finding("a", False, "is bad"),
        doctor.Finding("b", True, "is good"),
        doctor.Finding("c", False, "too"),
    ]
    with pytest.raises(StudyError, match=r"^a: is bad\nc: too$"):
        doctor.require(bad)
    doctor.require(bad[1:2])


def test_versions_that_differ_are_named_with_their_node():
    assert doctor.check_versions([report(), report(host="n2")]).ok
    finding = doctor.check_versions([report(), report(host="n2", versions={**own_versions(), "Python": "3.9.1"})])
    assert not finding.ok
    assert "n2 has Python 3.9.1" in finding.sentence
    silent = doctor.check_versions([report(host="n3", versions={}, error="no answer within 60 s")])
    assert not silent.ok
    assert "n3: no answer within 60 s" in silent.sentence


def test_other_code_of_the_same_version_is_named():
    finding = doctor.check_versions([report(), report(host="n2", versions=own_versions() | {"lbstudy's code": "abc"})])
    assert not finding.ok
    assert "n2 has lbstudy's code abc" in finding.sentence


def test_the_digest_of_a_package_is_of_its_modules(tmp_path: Path):
    (tmp_path / "a.py").write_text("x = 1")
    (tmp_path / "notes.txt").write_text("1")
    before = code_digest(tmp_path)
    (tmp_path / "notes.txt").write_text("2")
    assert code_digest(tmp_path) == before
    (tmp_path / "a.py").write_text("x = 2")
    assert code_digest(tmp_path) != before


def test_clocks():
    assert doctor.check_clocks([report(clock=1.5)]).ok
    finding = doctor.check_clocks([report(), report(host="n2", clock=-300.2)])
    assert (finding.ok, finding.sentence) == (False, "that of n2 is -300 s off")


def test_a_full_disk_is_named():
    finding = doctor.check_devices(report(disk=(10**9, 10**11)))
    assert (finding.ok, finding.sentence) == (False, "2 CPU, 0 GPU, but 1.0 GB free where Ray keeps its files")
    assert doctor.check_devices(report(disk=(10**10, 10**11))).sentence == "2 CPU, 0 GPU, 10.0 GB free"


JOBS = {
    "01000000": groups.Job(True, "job 01000000 (lbstudy run a.yaml)", "lbstudy run a.yaml"),
    "02000000": groups.Job(False, "job 02000000 (lbstudy run b.yaml)", "lbstudy run b.yaml"),
    "03000000": groups.Job(True, "job 03000000 (python c.py)", "python c.py"),
}
GROUPS = [groups.Group(f"g{job}", job, False, {"CPU": 2.0, "bundle_group_x": 1.0}) for job in JOBS]


def test_what_dead_jobs_hold_is_named():
    assert doctor.check_leaks(GROUPS[1:2], JOBS).ok
    finding = doctor.check_leaks(GROUPS[:2], JOBS)
    assert not finding.ok
    assert finding.sentence == (
        "2 CPU of job 01000000 (lbstudy run a.yaml); the next `lbstudy run` gives back what its own have left"
    )
    assert "remove_placement_group" in doctor.check_leaks(GROUPS[2:], JOBS).sentence


def test_a_run_gives_back_what_lbstudy_has_left_and_names_the_rest(monkeypatch: pytest.MonkeyPatch):
    said, removed = list[str](), list[groups.Group]()
    monkeypatch.setattr(doctor, "list_groups", lambda: GROUPS)
    monkeypatch.setattr(doctor, "list_jobs", lambda: JOBS)
    monkeypatch.setattr(doctor, "remove", removed.extend)
    doctor.clean_up(said.append)
    assert removed == GROUPS[:1]
    assert said[0] == "given back: 2 CPU of job 01000000 (lbstudy run a.yaml)"
    assert said[1].startswith("2 CPU of job 03000000 (python c.py); nothing gives them back but")


def test_groups_are_known_by_their_job(ray_session: None):
    """What Ray itself says of a group, and its id alone."""
    import ray
    from ray.util.placement_group import placement_group, placement_group_table

    made = placement_group([{"CPU": 1}, {"CPU": 10_000}])
    try:
        (found,) = [group for group in groups.list_groups() if group.id == made.id.hex()]
        told = placement_group_table(made)
        assert (told["placement_group_id"], told["state"]) == (found.id, "PENDING")
        assert found.job == ray.get_runtime_context().get_job_id() == groups.own_job()
        assert (found.waits, found.resources, found.orphan) == (True, {"CPU": 10_001.0}, False)
        jobs = groups.list_jobs()
        assert not jobs[found.job].dead
        assert groups.leaked([found], jobs) == []
        assert groups.holders(["CPU"], [found._replace(waits=False)], jobs, own="x") == [
            f"10001 CPU held by {jobs[found.job].words}"
        ]
    finally:
        groups.remove([found])
    assert found.id not in {group.id for group in groups.list_groups()}


def test_a_ray_that_was_started_on_this_machine_is_named_where_none_was_asked_for(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("ray._private.services.find_gcs_addresses", lambda: {"10.0.0.1:6379"})
    for file, address, found in (
        ("10.0.0.1:6379", None, "10.0.0.1:6379"),
        ("10.0.0.9:6379", None, None),  # of a Ray that is no more
        (None, None, None),
        ("10.0.0.1:6379", "auto", None),
    ):
        monkeypatch.setattr("ray._private.utils.read_ray_address", lambda file=file: file)
        monkeypatch.delenv("RAY_ADDRESS", raising=False)
        if address:
            monkeypatch.setenv("RAY_ADDRESS", address)
        assert doctor.ray_here() == found


def test_a_group_whose_actor_has_died_is_an_orphan(ray_session: None):
    import ray
    from ray.util.placement_group import placement_group

    @ray.remote(num_cpus=0)
    class Maker:
        def make(self) -> str:
            return str(placement_group([{"CPU": 10_000}]).id.hex())

    maker: Any = Maker.remote()  # type: ignore[attr-defined]
    made = ray.get(maker.make.remote())

    def find() -> groups.Group:
        return next(group for group in groups.list_groups() if group.id == made)

    assert not find().orphan
    ray.kill(maker)
    for _ in range(100):
        if find().orphan:
            break
        time.sleep(0.1)
    assert find().orphan
    groups.remove([find()])


def test_devices():
    assert doctor.check_devices(report()).sentence == "2 CPU, 0 GPU"
    gpus = {"CPU": 8.0, "GPU": 2.0}
    listed = ["GPU 0: NVIDIA H200 (UUID: GPU-1)", "GPU 1: NVIDIA H200 (UUID: GPU-2)"]
    assert doctor.check_devices(report(resources=gpus, gpus=listed)).sentence == "8 CPU, 2 GPU (NVIDIA H200)"
    assert doctor.check_devices(report(resources=gpus)).ok  # no nvidia-smi: nobody to ask
    lost = doctor.check_devices(report(resources=gpus, gpus=listed[:1]))
    assert not lost.ok
    assert "Ray counts 8 CPU, 2 GPU, but nvidia-smi lists 1 GPUs" in lost.sentence


def test_resources():
    nodes = [{"CPU": 4.0}, {"CPU": 3.0}]
    assert (
        doctor.check_resources(Resources(cpus_per_worker=2, gpus_per_worker=0), nodes).sentence
        == "room for 3 trials at a time"
    )
    assert not doctor.check_resources(Resources(cpus_per_worker=5, gpus_per_worker=0), nodes).ok


def test_storage(tmp_path: Path):
    fine = doctor.check_storage(tmp_path / "new" / "study", 1000)
    assert fine.ok
    assert not list(tmp_path.iterdir())
    full = doctor.check_storage(tmp_path, 10**18)
    assert not full.ok
    assert "but the study may need 1000000000.0 GB" in full.sentence
    (tmp_path / "file").touch()
    assert "cannot be written" in doctor.check_storage(tmp_path / "file" / "study", 0).sentence


def test_plan_of_the_disk_grows_with_the_study():
    study = tiny_study()
    dataset = datasets.load_all(study)
    planned = doctor.planned_bytes(study, dataset, lanes=2)
    assert 1e6 < planned < 1e7
    assert doctor.planned_bytes(tiny_study(model="resnet18"), dataset, lanes=2) > 100 * planned


def test_averaged_weights_are_in_the_plan_of_the_disk():
    study = tiny_study(published=[], cells=TINY_STUDY["cells"] | {"smoothing": ["none"]})
    averaged = tiny_study(
        published=[], cells=TINY_STUDY["cells"] | {"smoothing": ["ema"]}, fixed={"ema_decay": 0.9}
    )  # fmt: skip
    dataset = datasets.load_all(study)
    model = sizes.model_bytes(models.check("lenet5", (1, 32, 32), 10), 4)
    more = doctor.planned_bytes(averaged, dataset, lanes=3) - doctor.planned_bytes(study, dataset, lanes=3)
    assert more == 2 * 3 * 2 * model  # two checkpoints a lane, each with the averages and the model that has them
