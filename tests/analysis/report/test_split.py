"""What the page says about the parts of a gap, from constructed runs whose parts are known."""

from math import nan
from pathlib import Path

import numpy as np
import pytest

from lbstudy.analysis import load
from lbstudy.analysis.figures.split import draw_split, split_info
from lbstudy.analysis.figures.style import NothingToDraw
from lbstudy.analysis.report import conditions, page, split
from lbstudy.analysis.tables import targets
from lbstudy.analysis.tables.split import list_splits
from lbstudy.records.folder import StudyFolder
from lbstudy.study.spec import Cell, StudySpec
from tests.analysis.tables.test_split import STUDY, split_study
from tests.confirmed_runs import PARAMS, Curve, add_run

UPDATES, NOISE = {"sgd": 0.05, "kfac": 0.02}, 0.015
"""What the parts cost without smoothing. Mixup repairs four fifths of the noise, and none of the updates."""

IMAGES = {"same_epochs": 1.35e6, "same_updates": 2.16e7, "fewer_updates": 84375.0}


def accuracy(cell: Cell) -> float:
    value, budget = 0.7, cell.values["budget"]
    if cell.batch_size == 128:
        value -= NOISE * (0.2 if cell.smoothing == "mixup" else 1)
    if budget == "fewer_updates" or (cell.batch_size == 128 and budget == "same_epochs"):
        value -= UPDATES[cell.optimizer]
    return value


def make(path: Path, study: StudySpec = STUDY, seeds: int = 5, sd: float = 0.001, **lost: float) -> StudyFolder:
    """A folder with confirmed runs of these accuracies; `lost`: cell with `_` for `-` -> accuracy of its last run."""
    folder, random = StudyFolder.create(path, study), np.random.default_rng(0)
    for cell in study.list_cells():
        key = {"factors": dict(cell.factors), "params": PARAMS}
        add_run(folder, cell.name, [{"val_accuracy": accuracy(cell), "val_loss": 0.3, "train_loss": 0.3}], **key)
        for repeat in range(seeds):
            end = accuracy(cell) + random.normal(0, sd)
            last = lost.get(cell.name.replace("-", "_"), end) if repeat == seeds - 1 else end
            curve: Curve = [
                {"test_accuracy": last, "val_accuracy": end, "val_loss": 0.5, "clean_train_loss": 1 / epoch,
                 "clean_train_accuracy": end, "train_loss": 1 / epoch, "images": IMAGES[str(cell.values["budget"])]}
                for epoch in (1, 2)
            ]  # fmt: skip
            status = "diverged" if last != last else "completed"
            add_run(folder, cell.name, curve, repeat, status, 0, run={"train_on": "split"}, device="cpu", **key)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> StudyFolder:
    return make(tmp_path_factory.mktemp("split") / "s")


def verdicts(folder: StudyFolder) -> dict[tuple[str, str], str]:
    found = split.answers(folder.study(), load.confirmed(folder))
    return {(entry.question, entry.split): entry.verdict for entry in found}


def test_every_part_is_judged_in_both_ways_and_rightly(folder: StudyFolder):
    more, fewer = "batch 128 with as many updates as batch 32", "batch 32 with no more updates than batch 128"
    expected = {}
    for way in (more, fewer):
        for optimizer in ("SGD", "K-FAC"):
            expected[f"Does Mixup repair the missing noise of {optimizer}?", way] = "yes"
            expected[f"Does Mixup repair the missing updates of {optimizer}?", way] = "cannot tell"
        for smoothed in ("without smoothing", "with Mixup"):
            expected[f"Does K-FAC lose less for want of updates than SGD, {smoothed}?", way] = "yes"
    assert verdicts(folder) == expected


def test_sentences_have_the_numbers_of_the_parts(folder: StudyFolder):
    confirmed = load.confirmed(folder)
    sgd, kfac = split.gap_sentences(STUDY, confirmed)
    own = next(s for s in list_splits(STUDY, confirmed) if s.between.name == "sgd-b128-none-same_updates")
    noise = own.cost("less_noise")
    assert sgd.startswith("SGD without smoothing, batch 32 against 128: of the gap of 6.")
    numbers = f"{100 * noise.value:.2f} points [{100 * noise.low:.2f}, {100 * noise.high:.2f}] (n = 5)"
    assert f"and less noise in the gradient {numbers}" in sgd
    assert sgd.endswith("Between the two is batch 128 with as many updates as batch 32, at 16 times the images.")
    own = next(s for s in list_splits(STUDY, confirmed) if s.between.name == "kfac-b128-none-same_updates")
    updates = own.cost("few_updates")
    numbers = f"{100 * updates.value:.2f} points [{100 * updates.low:.2f}, {100 * updates.high:.2f}]"
    assert f"few updates make {numbers} and" in kfac
    answer = next(a for a in split.answers(STUDY, confirmed) if a.question.startswith("Does K-FAC lose"))
    assert answer.answer.startswith(f"Without smoothing, few updates cost K-FAC {numbers} and SGD")
    assert " points [2." in answer.answer
    assert answer.answer.endswith(" less (n = 5).")


def test_a_cost_that_is_higher_with_smoothing_is_said_so(tmp_path: Path):
    study = split_study(["same_epochs", "fewer_updates"])
    folder = make(tmp_path / "s", study)
    assert {way for _, way in verdicts(folder)} == {"batch 32 with no more updates than batch 128"}
    confirmed = load.confirmed(folder)
    worse = confirmed["cell"].eq("sgd-b32-mixup-fewer_updates")
    confirmed.loc[worse, "test_accuracy"] -= 0.05
    found = {entry.question: entry for entry in split.answers(study, confirmed)}
    answer = found["Does Mixup repair the missing updates of SGD?"]
    assert answer.verdict == "no"
    assert " points [4." in answer.answer
    assert answer.answer.endswith(" more (n = 5).")
    # the noise costs less for it; but now what is left of it is a gain
    assert found["Does Mixup repair the missing noise of SGD?"].verdict == "yes"


def test_what_costs_nothing_is_not_repaired(tmp_path: Path):
    folder = make(tmp_path / "s")
    confirmed = load.confirmed(folder)
    confirmed.loc[confirmed["cell"].eq("sgd-b128-none-same_updates"), "test_accuracy"] += NOISE  # as good as batch 32
    confirmed.loc[confirmed["cell"].eq("sgd-b128-mixup-same_updates"), "test_accuracy"] += 0.1
    found = split.answers(STUDY, confirmed)
    answer = next(a for a in found if a.question == "Does Mixup repair the missing noise of SGD?")
    assert answer.verdict == "cannot tell"
    assert "(not to be told from nothing) without smoothing" in answer.answer


@pytest.mark.parametrize("accuracy", [nan, 0.1])
def test_runs_that_diverged_or_hardly_learnt_decide_nothing(accuracy: float, tmp_path: Path):
    found = verdicts(make(tmp_path / "s", sgd_b128_none_same_updates=accuracy))
    about = {key: verdict for key, verdict in found.items() if "SGD" in key[0] and "with Mixup" not in key[0]}
    assert len(about) == 2 * 3
    assert {verdict for (_, way), verdict in about.items() if way.startswith("batch 128")} == {"cannot tell"}
    assert (
        found[("Does Mixup repair the missing noise of K-FAC?", "batch 128 with as many updates as batch 32")] == "yes"
    )


def test_one_seed_tells_nothing_and_has_no_interval(tmp_path: Path):
    folder = make(tmp_path / "s", seeds=1)
    assert set(verdicts(folder).values()) == {"cannot tell"}
    sentences = split.gap_sentences(STUDY, load.confirmed(folder))
    assert all("(one seed: no interval)" in sentence and "[" not in sentence for sentence in sentences)


def test_without_confirmed_runs_there_is_no_sentence_and_nothing_is_drawn(tmp_path: Path):
    confirmed = load.confirmed(make(tmp_path / "s", seeds=0))
    assert split.gap_sentences(STUDY, confirmed) == []
    assert {entry.verdict for entry in split.answers(STUDY, confirmed)} == {"cannot tell"}
    assert "No repeat was completed by all of sgd-b32-none-same_epochs" in split.answers(STUDY, confirmed)[0].answer
    with pytest.raises(NothingToDraw):
        split_info(STUDY, confirmed)


def test_bars_stand_on_one_another_up_to_the_gap(folder: StudyFolder):
    info = split_info(STUDY, load.confirmed(folder))
    assert len(info.bars) == 2 * 2 * 2 * 3
    assert len(info.seeds) == 5 * len(info.bars)
    for _, bars in info.bars.groupby(["optimizer", "smoothing", "budget"]):
        top = (bars["bottom"] + bars["value"]).tolist()
        assert bars["bar"].tolist() == ["few_updates", "less_noise", "gap"]
        assert bars["bottom"].tolist() == [0, top[0], 0]
        assert top[1] == pytest.approx(top[2], abs=1e-9)
    figure = draw_split(info)
    assert len(figure.axes) == 4
    assert [text.get_text() for text in figure.axes[-1].get_xticklabels()] == ["SGD", "K-FAC"]


def test_the_page_says_each_thing_once_and_about_the_studys_own_budget(folder: StudyFolder):
    report = page.collect(folder)
    questions = {question.name: question for question in report.questions}
    found = {name: [finding.sentence for finding in question.findings] for name, question in questions.items()}
    for sentences in ([sentence for sentence, _ in report.lead], *found.values()):
        assert len(set(sentences)) == len(sentences)
        assert not any("budget" in sentence for sentence in sentences)
    assert questions["generalisation"].verdict == "supported"
    assert len(found["generalisation"]) == 4  # two for each optimizer, and none of same_updates
    assert len(found["split"]) == 2 + 8 + 1
    assert found["split"][2].startswith(
        "Does Mixup repair the missing noise of SGD? Yes (by batch 128 with as many updates as batch 32): Under SGD"
    )
    assert found["split"][-1].endswith("4 of 12 cannot be told.")
    selected = report.lead[-1][0]
    assert selected.startswith("At batch 128 tuning did best with Mixup under K-FAC: validation accuracy 67.70 %")
    shown = {table.name: table.table for table in report.tables}
    assert len(shown["split"]) == 8
    assert list(shown["split-answers"]) == ["question", "split", "verdict", "answer"]
    assert len(shown["gap"]) == 4
    drawn = {picture.name: picture.svg is not None for picture in report.pictures}
    assert drawn["split"]
    assert not any(there for name, there in drawn.items() if name.endswith(("same_updates", "fewer_updates")))
    assert any("which its split tells apart" in caveat for caveat in report.caveats)
    assert "The gap, split" in page.render(report)


def test_steps_are_to_the_targets_of_the_gap(folder: StudyFolder):
    table = targets.targets_table(STUDY, load.confirmed(folder), load.confirmed_epochs(folder))
    assert set(table["budget"]) == {"same_epochs", "same_updates", "fewer_updates"}
    assert table.groupby("metric")["target"].nunique().tolist() == [1, 1]


def test_what_was_fixed_says_every_budget(folder: StudyFolder):
    fixed = conditions.describe_fixed(STUDY, load.confirmed(folder), {}, {})
    assert fixed["factors"] == "budget: same_epochs, same_updates, fewer_updates"
    assert "as many updates as batch 32 makes in 4 epochs" in fixed["budget"]
