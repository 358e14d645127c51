"""The batch script for SLURM: by shellcheck; with stand-ins for Ray and SLURM, to see what it does when; and for real, on
a SLURM of its own, where there is one to start."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lbstudy.records.folder import StudyFolder
from tests.clusters import ROOT

SCRIPT = ROOT / "clusters/slurm.sh"
BIN = Path(sys.executable).parent


def script(tmp_path, **changes):
    """The script as somebody has filled it in."""
    text = SCRIPT.read_text().replace("source ~/lbstudy/bin/activate", f'export PATH="{BIN}:$PATH"')
    for directive, value in changes.items():
        text, count = re.subn(rf"^#SBATCH --{directive.replace('_', '-')}=.*$", value, text, flags=re.MULTILINE)
        assert count == 1, directive
    (tmp_path / "job.sh").write_text(text)
    return tmp_path / "job.sh"


def test_shellcheck_finds_nothing():
    done = subprocess.run([BIN / "shellcheck", SCRIPT], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_it_asks_for_a_signal_that_it_waits_for_and_may_be_requeued():
    directives = re.findall(r"^#SBATCH (--\S+)", SCRIPT.read_text(), re.MULTILINE)
    assert "--requeue" in directives
    assert "--open-mode=append" in directives
    (sent,) = (d for d in directives if d.startswith("--signal="))
    assert sent.startswith("--signal=B:USR1@")
    assert re.search(r"^trap '.*kill -TERM \$study' USR1$", SCRIPT.read_text(), re.MULTILINE)


STAND_INS = {
    # writes what a head writes last, and lasts
    "ray": 'echo "$RAY_AUTH_MODE ${#RAY_AUTH_TOKEN} $*" >>"$LOG"\n'
    'for a in "$@"; do case $a in --temp-dir=*) mkdir -p "${a#*=}"; echo 10.0.0.1:6379 >"${a#*=}/ray_current_cluster";; esac; done\n'
    'trap "echo ray ends >>$LOG; exit" TERM; while :; do sleep 0.1; done',
    "srun": 'echo "srun $*" >>"$LOG"; trap exit TERM; while :; do sleep 0.1; done',
    "scontrol": 'echo "scontrol $*" >>"$LOG"',
    "lbstudy": 'echo "lbstudy $* at $RAY_ADDRESS" >>"$LOG"; trap "exit 143" TERM; for i in $(seq $TENTHS); do sleep 0.1; done; exit $CODE',
}


def run_with_stand_ins(tmp_path, send=None, tenths=1, code=0, nodes=2):
    """Run it; returns its exit code and what was called, a line each."""
    bin = tmp_path / "bin"
    bin.mkdir()
    for name, body in STAND_INS.items():
        (bin / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (bin / name).chmod(0o755)
    job = script(tmp_path)
    job.write_text(job.read_text().replace(str(BIN), str(bin)).replace("/tmp/ray-", f"{tmp_path}/ray-"))
    log = tmp_path / "log"
    log.touch()
    slurm = {"JOB_ID": 7, "JOB_NODELIST": "n[1-2]", "JOB_NUM_NODES": nodes, "CPUS_PER_TASK": 4, "GPUS_ON_NODE": 1}
    environment = os.environ | {f"SLURM_{name}": str(value) for name, value in slurm.items()}
    environment |= {"LOG": str(log), "TENTHS": str(tenths), "CODE": str(code)}
    process = subprocess.Popen(["bash", job, "run", "mine", "--trials", "3"], env=environment, stdout=subprocess.PIPE)
    if send is not None:
        wait_for(lambda: "lbstudy" in log.read_text(), 60)
        time.sleep(0.3)  # until it has set its traps
        process.send_signal(send)
    process.communicate(timeout=120)
    return process.returncode, log.read_text().splitlines()


def wait_for(condition, seconds):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.1)


def test_a_study_that_ends_ends_the_job(tmp_path):
    code, calls = run_with_stand_ins(tmp_path)
    assert code == 0
    head, worker = (line for line in calls if line.startswith(("token 64 start --head", "srun")))
    assert "--num-cpus=4 --num-gpus=1" in head
    assert "--relative=1 --nodes=1 --ntasks=1" in worker
    assert "ray start --address=10.0.0.1:6379 --block --num-cpus=4" in worker
    assert "lbstudy run mine --trials 3 at 10.0.0.1:6379" in calls
    assert calls[-1] == "ray ends"
    assert not any("scontrol" in line for line in calls)


def test_one_node_needs_no_step(tmp_path):
    assert not any("srun" in line for line in run_with_stand_ins(tmp_path, nodes=1)[1])


@pytest.mark.parametrize("code", [1, 2])
def test_the_exit_code_is_the_study_s(tmp_path, code):
    found, calls = run_with_stand_ins(tmp_path, code=code)
    assert found == code
    assert not any("scontrol" in line for line in calls)


def test_near_the_time_limit_the_study_ends_in_order_and_the_job_is_queued_again(tmp_path):
    code, calls = run_with_stand_ins(tmp_path, send=signal.SIGUSR1, tenths=600)
    assert code == 143
    assert "scontrol requeue 7" in calls


def test_a_cancelled_job_leaves_the_study_to_the_signal_that_slurm_sends_it_too(tmp_path):
    code, calls = run_with_stand_ins(tmp_path, send=signal.SIGTERM, tenths=15)
    assert code == 0
    assert not any("scontrol" in line for line in calls)


SLURM_CONF = """
ClusterName=tiny
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
SlurmctldPort=17117
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MpiDefault=none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SlurmdParameters=config_overrides
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port=17118 CPUs=2
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port=17119 CPUs=2
PartitionName=p Nodes=n1,n2 Default=YES State=UP
"""


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """A SLURM of two nodes on this machine."""
    if missing := [name for name in ("munged", "slurmctld", "slurmd", "sbatch") if shutil.which(name) is None]:
        pytest.skip(f"not installed: {', '.join(missing)}")
    if os.getuid() != 0:
        pytest.skip("slurmd needs root")
    socket = Path("/run/munge/munge.socket.2")
    if not socket.exists():
        socket.parent.mkdir(exist_ok=True)
        shutil.chown(socket.parent, "munge")
        subprocess.run(["runuser", "-u", "munge", "--", "munged"], check=True)
        wait_for(socket.exists, 30)
    (tmp_path / "state").mkdir()
    (tmp_path / "slurm.conf").write_text(SLURM_CONF.format(host=os.uname().nodename.split(".")[0], folder=tmp_path))
    monkeypatch.setenv("SLURM_CONF", str(tmp_path / "slurm.conf"))
    daemons = [subprocess.Popen(["slurmctld", "-D"])]
    daemons += [subprocess.Popen(["slurmd", "-D", "-N", node]) for node in ("n1", "n2")]
    wait_for(lambda: call("sinfo", "-h", "-o", "%D %t") == "2 idle", 60)
    yield
    call("scancel", "-u", "root")
    wait_for(lambda: not call("squeue", "-h"), 120)
    for daemon in reversed(daemons):
        daemon.terminate()
        daemon.wait(30)


def call(*command):
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


@pytest.mark.slow
def test_a_study_over_several_jobs_with_a_time_limit_that_interrupts_the_first(slurm, tmp_path):
    """Some 15 minutes, most of them SLURM's own wait before it starts a job again."""
    job = script(
        tmp_path,
        cpus_per_task="#SBATCH --cpus-per-task=1",
        gpus_per_node="",
        time="#SBATCH --time=4",
        signal="#SBATCH --signal=B:USR1@60",
        output=f"#SBATCH --output={tmp_path}/job.log",
    )
    sets = ["cells.optimizer=[sgd]", "cells.smoothing=[none]", "budget.epochs=120", "resources.checkpoint_minutes=0.2"]
    sets += ["tuning.pruner=none", "tuning.trials=3"]
    sets = [word for key in sets for word in ("--set", key)]
    number = re.findall(r"\d+", call("sbatch", job, "run", "digits", "--name", "s", "--storage", tmp_path, *sets))[0]
    interrupted, state = False, ""
    until = time.monotonic() + 3000
    while state not in ("COMPLETED", "FAILED", "TIMEOUT", "NODE_FAIL"):
        shown = call("scontrol", "show", "job", number)
        state = re.findall(r"JobState=(\w+)", shown)[0]
        if not interrupted and "Restarts=1" in shown:
            interrupted = True
            records = StudyFolder.open(str(tmp_path / "s")).trials()
            assert not all(record.status == "completed" for record in records)
            call("scontrol", "update", f"JobId={number}", "TimeLimit=60", "StartTime=now")  # the second job is the last
        assert time.monotonic() < until, (tmp_path / "job.log").read_text()
        time.sleep(2)
    log = (tmp_path / "job.log").read_text()
    assert (state, interrupted) == ("COMPLETED", True), log
    assert "the time limit is near" in log
    assert "goes on after epoch" in log
    records = StudyFolder.open(str(tmp_path / "s")).trials()
    assert [record.status for record in records] == ["completed"] * 6
    assert [record.failures for record in records] == [0] * 6
