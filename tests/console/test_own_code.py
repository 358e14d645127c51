"""A user's own code on the command line: what `plan` says of it, and that each mistake in it is one clear error, exit
code 2, before Ray starts."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lbstudy.console import cli
from lbstudy.methods import user_code
from lbstudy.records.folder import StudyFolder
from lbstudy.study.code import Code
from lbstudy.study.load import read_study
from lbstudy.training import fitting
from tests.own_code import MINE, STUDY

DATA = """\
import numpy as np


def data():
    images, labels = np.zeros((320, 3, 32, 32), np.uint8), np.arange(320) % 10
    return images, labels, images, labels
"""

# name -> (text of the good code, what stands there instead, parts of the one error, parts of its traceback)
BAD: dict[str, tuple[str, str, list[str], list[str]]] = {
    "raises at import": ("import torch\n", "import torch\n1 / 0\n", [":3: model: model mine:network: module mine cannot be imported: ZeroDivisionError"], ["mine.py\", line 2, in <module>", "1 / 0", "  ZeroDivisionError: division by zero"]),
    "syntax error": ("def network(", "def network)(", [":3: model: model mine:network: module mine cannot be imported: SyntaxError"], ["mine.py\", line 8"]),
    "needs what is not there": ("import torch\n", "import torch\nimport nowhere_to_be_found\n", [":3: model: model mine:network: module mine needs nowhere_to_be_found, which is not installed"], ["mine.py\", line 2, in <module>"]),
    "misspelt network": ("def network(", "def netwrok(", [":3: model: model mine:network: there is no attribute 'network' in mine; did you mean netwrok?"], []),
    "network without classes": ("shape, classes, width=4", "shape", [":3: model: mine:network must take (shape, classes) and settings by name after these, but takes (shape)"], []),
    "network without the setting": (", width=4):", "):\n    width = 4", [":3: model: mine:network has no setting `width`, but got 3; it takes none"], []),
    "network that raises": ("    channels,", "    raise ValueError('too deep')\n    channels,", [":3: model: mine:network cannot be built for images of 3x32x32 and 10 classes, width=3: too deep"], ["mine.py\", line 9, in network", "  ValueError: too deep"]),
    "no network": ("    return nn.Sequential(", "    return dict(", [":3: model: mine:network cannot be built for images of 3x32x32"], []),
    "outputs of the wrong shape": ("* width, classes)", "* width, 7)", [":3: model: mine:network gives outputs of shape (2, 7), but must give N x classes = (2, 10)"], []),
    "network for other images": ("nn.Conv2d(channels", "nn.Conv2d(1", [":3: model: mine:network does not work with images of 3x32x32: "], []),
    "optimizer without lr": ("parameters, lr, beta", "parameters, beta", [":6: cells.optimizer.0: optimizer mine:SignMomentum has no `lr` among its arguments (parameters, beta)"], []),
    "optimizer that ignores lr": ('-group["lr"]', "-0.1", [":6: cells.optimizer.0: mine:SignMomentum ignores `lr`: it changes the weights while every group's `lr` is 0"], []),
    "optimizer that leaves the weights": ("for group in self.param_groups", "for group in []", [":6: cells.optimizer.0: mine:SignMomentum leaves all weights as they are in 2 steps"], []),
    "optimizer that raises": ('self.state[parameter]\n', 'self.state[parameter]["x"]\n', [":6: cells.optimizer.0: mine:SignMomentum fails in a training step on 8 images: KeyError: 'x'"], ["mine.py\", line 24, in step", "  KeyError: 'x'"]),
    "no optimizer": ("class SignMomentum(torch.optim.Optimizer):", "class SignMomentum:", [":6: cells.optimizer.0: "], []),
    "no smoothing": ("class SoftLabels(Smoothing)", "class SoftLabels", [":6: cells.smoothing.1: smoothing mine:SoftLabels is SoftLabels, not a subclass of lbstudy.methods.smoothing.Smoothing"], []),
    "smoothing of another signature": ("(self, logits, labels, reduction)", "(self, logits)", [":6: cells.smoothing.1: smoothing mine:SoftLabels fails in a run of 2 steps on 8 images: TypeError: SoftLabels.cross_entropy() takes 2 positional"], []),
    "smoothing that raises": ("        return F.cross_entropy(logits, labels, ", "        return F.cross_entropy(logits, labels[1:], ", [":6: cells.smoothing.1: smoothing mine:SoftLabels fails in a run of 2 steps on 8 images: ValueError: Expected input batch_size"], ["mine.py\", line 35, in cross_entropy"]),
}  # fmt: skip


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with the study and its code; there is no Ray."""
    from lbstudy.tuning import tuner

    def no_ray(*arguments: object, **options: object) -> None:
        raise AssertionError("Ray was started")

    monkeypatch.setattr(tuner, "connect", no_ray)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "study.yaml").write_text(STUDY)
    (tmp_path / "mine.py").write_text(MINE)
    yield tmp_path
    user_code.activate(Code())


def lbstudy(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["lbstudy", *arguments])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    return int(exit_.value.code or 0)


def change(path: Path, old: str, new: str) -> None:
    assert path.read_text().count(old) == 1
    path.write_text(path.read_text().replace(old, new))


def test_the_study_and_its_code_are_as_short_as_promised():
    assert len(STUDY.splitlines()) <= 25
    assert len(MINE.splitlines()) <= 40


def test_plan_says_who_imports_the_code(monkeypatch, capsys):
    assert lbstudy(monkeypatch, "plan", "study.yaml") == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert "own: mine:network (width: 3) on synthetic" in printed.out
    assert "SignMomentum-b32-none" in printed.out
    checksum = Code({"mine.py": MINE.encode()}).checksums["mine.py"]
    assert f"code: mine.py (sha256 {checksum[:12]})\n" in printed.out
    assert (
        "imported by plan, doctor, run, all, confirm, landscape, sharpness, noise; by no other command" in printed.out
    )
    assert "beta 0.9" in printed.out  # a number of the user's optimizer


CASES = [("plan", case) for case in BAD]
CASES += [("run", case) for case in ("raises at import", "outputs of the wrong shape", "optimizer that ignores lr")]


@pytest.mark.parametrize(("command", "case"), CASES)
def test_a_mistake_is_one_error_before_ray_starts(command: str, case: str, place: Path, monkeypatch, capsys):
    old, new, parts, trace = BAD[case]
    change(place / "mine.py", old, new)
    assert lbstudy(monkeypatch, command, "study.yaml") == 2
    printed = capsys.readouterr().err
    lines = printed.splitlines()
    assert len([line for line in lines if line.startswith("error: ")]) == 1, printed
    assert lines[0].startswith("error: study.yaml:")
    for part in parts:
        assert part in lines[0], printed
    assert all(line.startswith("  ") for line in lines[1:]), printed
    for part in trace:
        assert printed.count(part) == 1, printed
    assert "lbstudy/" not in printed.replace(str(place), "")  # no line of ours
    assert "starting Ray" not in printed
    assert not (place / "studies").exists()


@pytest.mark.parametrize(
    ("old", "new", "part"),
    [
        ("np.uint8", "np.float32", "study.yaml:4: dataset.name: mine:data returns train_images as float32"),
        ("(320, 3, 32, 32)", "(320, 32, 32, 3)", "mine:data returns train_images of shape 320x32x32x3"),
        ("def data():", "def data(path):", "mine:data must take nothing, or `root`, but takes (path)"),
        ("    return images", "    raise OSError('no disk')\n    return images", "mine:data fails: OSError: no disk"),
        ("np.arange(320) % 10", "np.arange(320) % 10 / 1", "mine:data returns train_labels as float64"),
    ],
)  # fmt: skip
def test_wrong_data_is_one_error(old: str, new: str, part: str, place: Path, monkeypatch, capsys):
    (place / "mine.py").write_text(DATA + MINE)
    change(place / "study.yaml", "{name: synthetic, samples: 320}", '{name: "mine:data"}')
    assert lbstudy(monkeypatch, "plan", "study.yaml") == 0
    assert "288" not in capsys.readouterr().err
    change(place / "mine.py", old, new)
    assert lbstudy(monkeypatch, "plan", "study.yaml") == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("error: ")
    assert part in lines[0]
    assert not any(line.startswith("error: ") for line in lines[1:])


def test_missing_code_is_one_error(place: Path, monkeypatch, capsys):
    (place / "mine.py").unlink()
    assert lbstudy(monkeypatch, "run", "study.yaml") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: study.yaml:2: code.0: mine.py: there is no such file or folder in ")


def test_other_code_is_refused_with_the_checksums(place: Path, monkeypatch, capsys):
    from lbstudy.methods.checks import load_study

    study = load_study(place / "study.yaml")
    folder = StudyFolder.create(place / "studies" / "own", study, user_code.active())
    change(place / "mine.py", "label_smoothing=0.1", "label_smoothing=0.2")
    assert lbstudy(monkeypatch, "run", "study.yaml") == 2
    headline, *diff = capsys.readouterr().err.splitlines()
    assert "holds a study that ran with other code" in headline
    assert [line.split()[:4] for line in diff] == [
        ["error:", sign, "mine.py", "sha256"] for sign in "-+"
    ]  # fmt: skip
    (place / "mine.py").unlink()  # the study's folder needs it no more
    assert lbstudy(monkeypatch, "plan", str(folder.path)) == 0
    assert read_study(folder.path / "study.yaml").code == ["mine.py"]


def test_results_need_no_code(place: Path, monkeypatch, capsys):
    from lbstudy.methods.checks import load_study

    folder = StudyFolder.create(place / "studies" / "own", load_study(place / "study.yaml"), user_code.active())
    user_code.activate(Code())
    (folder.path / "code" / "mine.py").write_text("raise AssertionError('imported')")
    for command in ("status", "best"):
        assert lbstudy(monkeypatch, command, str(folder.path)) in (0, 1)
    assert not user_code.active()


def test_a_study_of_our_methods_is_not_tried(place: Path, monkeypatch, capsys):
    def tried(*arguments: object) -> None:
        raise AssertionError("tried")

    monkeypatch.setattr(fitting, "train", tried)
    monkeypatch.setattr(fitting, "_images", tried)
    sets = ["model=lenet5", "cells.optimizer=[sgd]", "cells.smoothing=[none]", "code=[]"]
    assert lbstudy(monkeypatch, "plan", "study.yaml", *(part for text in sets for part in ("--set", text))) == 0
