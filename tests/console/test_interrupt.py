"""Signals, without Ray: a process that has a child."""

import signal
import subprocess
import sys
import time

import psutil
import pytest

from lbstudy.console.session import again

PROGRAM = """
import subprocess, sys, time
from lbstudy.console.interrupt import Interrupted, interruptible
try:
    with interruptible():
        child = subprocess.Popen(["sleep", "600"], start_new_session=True)
        try:
            print(child.pid, flush=True)  # from here on a signal may come
            time.sleep(600)
        finally:
            print("tidying up", flush=True)
            time.sleep({tidying})
except Interrupted as interrupted:
    print(interrupted)
    sys.exit(interrupted.exit_code)
"""


@pytest.fixture(autouse=True)
def _as_at_a_terminal(handlers: None) -> None:
    """A suite that runs in the background may itself ignore signals, and its children begin with that."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def begin(tidying: float) -> tuple[subprocess.Popen[str], psutil.Process]:
    program = PROGRAM.format(tidying=tidying)
    process = subprocess.Popen([sys.executable, "-c", program], stdout=-1, stderr=-1, text=True)
    assert process.stdout is not None
    return process, psutil.Process(int(process.stdout.readline()))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_first_signal_ends_in_good_order(number: signal.Signals):
    process, child = begin(tidying=0)
    process.send_signal(number)
    assert process.communicate(timeout=20) == (f"tidying up\n{number.name}\n", "")
    assert process.returncode == 128 + number
    gone, _ = psutil.wait_procs([child], timeout=10)  # killed, but the kernel takes its time
    assert gone == [child]


def test_a_terminal_that_closes_may_say_so_twice():
    process, _ = begin(tidying=1)
    process.send_signal(signal.SIGHUP)
    assert process.stdout is not None
    assert process.stdout.readline() == "tidying up\n"
    process.send_signal(signal.SIGHUP)
    assert process.communicate(timeout=20) == ("SIGHUP\n", "")


def test_nohup_is_heeded():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # a child begins with it
    try:
        process, _ = begin(tidying=0)
    finally:
        signal.signal(signal.SIGHUP, before)
    process.send_signal(signal.SIGHUP)
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=20) == ("tidying up\nSIGTERM\n", "")


def test_second_signal_ends_at_once():
    process, child = begin(tidying=600)
    process.send_signal(signal.SIGINT)
    assert process.stdout is not None
    assert process.stdout.readline() == "tidying up\n"
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=20) == ("", "")
    assert time.monotonic() - began < 2
    assert process.returncode == 128 + signal.SIGINT
    gone, _ = psutil.wait_procs([child], timeout=10)  # killed, but the kernel takes its time
    assert gone == [child]


def test_handlers_are_as_before_where_no_signal_came():
    from lbstudy.console.interrupt import interruptible

    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with interruptible():
        assert signal.getsignal(signal.SIGTERM) != before[1]
    with pytest.raises(SystemExit), interruptible():
        raise SystemExit(2)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_what_the_process_had_before_goes_on():
    program = """
import signal, subprocess
from lbstudy.console.interrupt import Interrupted, interruptible
earlier = subprocess.Popen(["sleep", "600"])
try:
    with interruptible():
        later = subprocess.Popen(["sh", "-c", "sleep 600 & echo; sleep 600"], stdout=subprocess.PIPE)
        later.stdout.readline()
        signal.raise_signal(signal.SIGINT)
except Interrupted:
    print(later.wait(), earlier.poll())
    earlier.kill()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("-9 None\n", "")


def test_the_command_to_go_on_with_names_the_cluster(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert again("lbstudy run s", None) == "lbstudy run s"
    assert again("lbstudy run s", "auto") == "lbstudy run s --address auto"
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")  # as Ray does for a job
    assert again("lbstudy run s", None) == "lbstudy run s --address 10.0.0.1:6379"
