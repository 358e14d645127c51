"""Benchmarks run; whether their numbers are good nobody can say here."""

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import _measuring as measuring
from benchmarks import run


@pytest.mark.slow
@pytest.mark.parametrize("name", run.names())
def test_smoke(name: str):
    outcome = run.run(name, ["--smoke"])
    assert outcome.problem == ""
    assert outcome.said


@pytest.mark.slow
def test_a_gpu_is_measured_without_ray():
    without = "import sys; sys.modules['ray'] = None; from benchmarks import gpu"
    subprocess.run([sys.executable, "-c", without], check=True)


def test_results_become_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Of three made-up benchmarks: one that prints results, one that prints otherwise, and one that fails."""
    show = "from benchmarks._measuring import show\n"
    (tmp_path / "good.py").write_text(
        show
        + "import sys\nassert '--data' not in sys.argv\nprint('heading')\nshow('a', 1234.5, 'ms', 'b')\nshow('c', 0.5, 's')\n"
    )
    (tmp_path / "own.py").write_text("import sys\n# takes \"--data\"\nprint('so', sys.argv[1:])\n")
    (tmp_path / "bad.py").write_text(show + "show('d', 1.0, 's')\nraise SystemExit('not today')\n")
    (tmp_path / "_shared.py").write_text("raise SystemExit('no benchmark')\n")
    monkeypatch.setattr(run, "FOLDER", tmp_path)
    arguments = ["--smoke", "--data", str(tmp_path), "-o", str(tmp_path / "table.md"), "--", "--threads", "1"]
    monkeypatch.setattr(sys, "argv", ["run.py", *arguments])
    assert run.main() == 1
    first, *lines = (tmp_path / "table.md").read_text().splitlines()
    assert first.startswith(measuring.machine())
    assert "the numbers say nothing" in first
    assert [line for line in lines if line.startswith("| ")] == [
        "| benchmark | what | value | unit | compared with |",
        "| bad | d | 1 | s | |",
        "| good | a | 1,234 | ms | b |",
        "| good | c | 0.5 | s | |",
    ]
    assert "bad: exit code 1: not today" in lines
    assert f"    so ['--smoke', '--data', '{tmp_path}', '--threads', '1']" in lines
    assert "heading" in capsys.readouterr().out


def test_a_folder_that_is_missing_is_said_before_anything_runs(monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr(sys, "argv", ["run.py", "--data", "nosuch", "keskar"])
    with pytest.raises(SystemExit):
        run.main()
    assert "--data nosuch: there is no such folder" in capsys.readouterr().err


def test_unknown_benchmarks_are_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(sys, "argv", ["run.py", "kafc"])
    with pytest.raises(SystemExit):
        run.main()
    assert "no benchmark kafc; there are batch_norm," in capsys.readouterr().err


def test_contestants_take_turns():
    order: list[str] = []
    found = measuring.take_turns({name: lambda name=name: order.append(name) or len(order) for name in "ab"}, rounds=2)
    assert order == ["b", "a", "a", "b", "b", "a"]
    assert found == {"a": [3, 6], "b": [4, 5]}
    assert measuring.ratio([2.0, 6.0, 1.0], [1.0, 2.0, 1.0]) == 2.0
