"""Scratch folders: gone in the end, whoever ends."""

import subprocess
import sys
from pathlib import Path

import pytest

from lbstudy import scratch

HOLD = "import time; from lbstudy.scratch import scratch_folder\nwith scratch_folder('test') as f: print(f, flush=True); time.sleep(600)"


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    return tmp_path


def test_a_folder_is_gone_in_the_end(temporary: Path):
    with scratch.scratch_folder("test") as folder:
        (folder / "file").write_text("")
        assert list(temporary.iterdir()) == [folder]
    assert not list(temporary.iterdir())


def test_what_a_killed_process_leaves_is_removed_by_the_next(temporary: Path):
    (temporary / "lbstudy-of-somebody").mkdir()  # not ours to judge
    process = subprocess.Popen([sys.executable, "-c", HOLD], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    left = Path(process.stdout.readline().strip())
    try:
        with scratch.scratch_folder("test"):
            assert left.is_dir()  # it is alive
    finally:
        process.kill()
        process.wait()
    assert left.is_dir()
    with scratch.scratch_folder("test"):
        assert not left.exists()
    assert [folder.name for folder in temporary.iterdir()] == ["lbstudy-of-somebody"]
