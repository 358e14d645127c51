"""The page: of whole, interrupted and broken studies, with hostile names, and on a machine without torch and Ray."""

import html.parser
import json
import re
import subprocess
import sys
import tomllib
from dataclasses import replace
from math import nan
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import pytest
from jinja2 import UndefinedError
from markupsafe import Markup

from lbstudy.analysis import load
from lbstudy.analysis.figures import all as figures
from lbstudy.analysis.report import conditions, evidence, sentences
from lbstudy.analysis.report import page as report
from lbstudy.analysis.report.claims import Comparison
from lbstudy.analysis.report.page import Picture
from lbstudy.analysis.report.questions import Question
from lbstudy.analysis.tables import best as tables
from lbstudy.records import provenance
from lbstudy.records.folder import StudyFolder
from lbstudy.study.file import StudyError
from lbstudy.study.spec import StudySpec
from tests.confirmed_runs import PARAMS, add_run, confirmed_study, study_of
from tests.records.test_folder import record

ROOT = Path(__file__).parents[3]
CELLS = study_of(["sgd", "kfac"], [32, 128], ["none", "mixup"])
ACCURACIES = {
    "sgd-b32-none": [0.90, 0.91, 0.92], "sgd-b128-none": [0.799, 0.81, 0.821], "sgd-b32-mixup": [0.90, 0.91, 0.92],
    "sgd-b128-mixup": [0.86, 0.87, 0.89], "kfac-b32-none": [0.90, 0.92, 0.91], "kfac-b128-none": [0.85, 0.86, 0.88],
    "kfac-b32-mixup": [0.90, 0.90, 0.93], "kfac-b128-mixup": [0.88, 0.9, 0.91],
}  # fmt: skip
NO_IMAGES = {"name": "cifar10", "root": "/nowhere", "validation_size": 0.2}
"""A data set that this machine does not have: figures without images are enough here."""


class Page(html.parser.HTMLParser):
    """A page's tags, ids, links and text, and whether its tags are balanced."""

    VOID = {"meta", "br", "link", "img", "input", "hr"}

    def __init__(self, text: str):
        super().__init__()
        self.markup = text
        self.ids: list[str] = []
        self.links: list[str] = []
        self.tags: set[str] = set()
        self.open: list[str] = []
        self.words: list[str] = []
        self.sources: list[str] = []
        self.feed(text)
        assert self.open == []
        self.text = " ".join(" ".join(self.words).replace(report.NO_BREAK, " ").split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if tag == "a" and name == "href":
                self.links.append(value or "")
            if name in ("src", "href", "xlink:href", "action", "data", "srcset"):
                self.sources.append(value or "")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def page_of(folder: StudyFolder, found: report.Report | None = None) -> Page:
    """The written page: well formed, one file, and every link in it leads somewhere."""
    path = report.write(folder, report=found)
    assert path == folder.path / "report.html"
    page = Page(path.read_text(encoding="utf-8"))
    assert len(page.ids) == len(set(page.ids))
    assert {link.removeprefix("#") for link in page.links} <= set(page.ids)
    assert all(source.startswith(("#", "data:")) for source in page.sources)
    return page


def whole_study(path: Path, study: StudySpec = CELLS, seeds: int = 3) -> StudyFolder:
    """A study with all runs confirmed."""
    folder = confirmed_study(path, study, {})
    for cell, values in ACCURACIES.items():
        if cell in {c.name for c in study.list_cells()}:
            for repeat, accuracy in enumerate(values[:seeds]):
                speed = 4 if cell.startswith("kfac") else 1
                curve = [
                    {"test_accuracy": accuracy, "val_accuracy": accuracy - 0.5 / (speed * epoch), "val_loss": 0.5,
                     "clean_train_loss": 1 / (speed * epoch), "clean_train_accuracy": accuracy}
                    for epoch in range(1, 13)
                ]  # fmt: skip
                add_run(folder, cell, curve, repeat, trial=0, run={"train_on": "split"}, device="cpu")
    return folder


def test_a_whole_study(tmp_path: Path):
    page = page_of(whole_study(tmp_path / "s"))
    assert "SGD without smoothing lost 10.00 points of test accuracy" in page.text
    assert "Mixup closed 63 % [" in page.text
    for claim in ("steps", "generalisation", "smoothing", "minima"):
        assert f"claim-{claim}" in page.ids
    assert {
        "best",
        "gap",
        "targets",
        "targets-half",
        "targets-sgd",
        "health",
        "sharpness",
        "figure-learning_curves",
    } <= set(page.ids)
    assert "svg" in page.tags
    assert f"lbstudy table {tmp_path}/s gap" in page.text
    assert "Fixed hyper" not in page.text
    assert (tmp_path / "s" / "report.html").stat().st_size < 3e6
    first_screen = page.markup[: page.markup.index('<section id="questions">')]
    assert 'id="figure-accuracy"' in first_screen
    assert "<title>K-FAC, batch 128, Mixup: 89.67 % [" in first_screen  # what pointing at a mean shows
    assert 'id="figure-gap"' in page.markup[page.markup.index('id="claim-generalisation"') :].partition("</article>")[0]
    assert "figure-landscape_surface" not in page.ids
    assert "data digits; augmentation: crop" in page.text.replace("\n", " ")  # what was fixed


def without_figures(patch: pytest.MonkeyPatch) -> None:
    """They take seconds."""
    nothing = figures.Drawing("learning_curves", "Accuracy & loss", None, "not <here>", "learning_curves")
    patch.setattr(figures, "draw_all", lambda folder, **at_most: [nothing])


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without figures."""
    without_figures(monkeypatch)


class Whole(NamedTuple):
    """A whole study and its page, without figures, for tests that only look."""

    study: StudySpec
    found: report.Report
    page: Page


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    with pytest.MonkeyPatch.context() as patch:
        without_figures(patch)
        folder = whole_study(tmp_path_factory.mktemp("whole") / "s")
        found = report.collect(folder)
        return Whole(folder.study(), found, page_of(folder, found))


def test_the_verdicts_of_a_whole_study(whole: Whole):
    found = {claim.name: claim.verdict for claim in whole.found.questions}
    assert found["steps"] == "supported"
    assert found["generalisation"] == "supported"
    assert found["minima"] == "cannot tell"


def test_the_first_screen_has_verdicts_with_signs_and_three_sentences_at_most(whole: Whole):
    text = whole.page.markup
    first_screen = text[text.index("<body>") : text.index('<section id="questions">')]
    strip = re.search(r'<ul class="strip">(.*?)</ul>', first_screen, re.DOTALL)
    assert strip
    signs = {"supported": "✓", "contradicted": "✗", "cannot tell": "?"}
    judged = [question for question in whole.found.questions if question.verdict]
    assert len(judged) == strip[1].count("<li>") == 4
    for question in judged:
        card = re.search(rf'<a class="([^"]*)" href="#claim-{question.name}">(.*?)</a>', strip[1], re.DOTALL)
        assert card
        assert card[1] == question.verdict
        assert signs[card[1]] in card[2]
        assert question.title in card[2]
    assert first_screen.count(">table</a></p>") in (1, 2, 3)
    assert "SGD and K-FAC; batch 32 and 128; no smoothing and Mixup" in first_screen
    assert "8 trials, 24 confirmed runs" in first_screen


def test_rules_tables_and_conditions_are_folded_away(whole: Whole):
    text = whole.page.markup
    folded = "".join(re.findall(r"<details(?: id=\S+)?>(.*?)</details>", text, re.DOTALL))
    for question in whole.found.questions:
        assert str(report.prose(question.rule)) in folded
    assert '<div id="best">' in folded
    assert "<dt>model</dt>" in folded
    assert '<div id="best">' not in re.sub(r"<details.*?</details>", "", text, flags=re.DOTALL)


def test_an_open_claim_says_what_it_would_take(quick: None, tmp_path: Path):
    folder = whole_study(tmp_path / "s")
    runs = {"sgd-b128-none": [0.92, 0.87, 0.93]}  # a gap of 0.3 points, and 2.5 either way
    for cell, values in runs.items():
        for repeat, value in enumerate(values):
            add_run(folder, cell, [{"test_accuracy": value}], repeat, trial=0, run={"train_on": "split"})
    found = {question.name: question for question in report.collect(folder).questions}
    (sgd, kfac, *beside) = found["generalisation"].findings
    assert "More seeds would hardly decide it" in sgd.need
    assert kfac.verdict == "supported"
    assert kfac.need == ""
    assert [finding.verdict for finding in beside] == [None, None]
    assert beside[1].sentence.startswith("From batch 32 to 128, K-FAC with Mixup")
    assert found["smoothing"].findings[0].need.startswith("First the gap without smoothing must be told from zero.")
    assert "More seeds would hardly decide it" in page_of(folder).text


def test_best_values_are_drawn_in_their_ranges(whole: Whole):
    (best, *_), study = whole.found.tables, whole.study
    cell = study.list_cells()[0]
    place = best.places[0, "learning_rate"]
    searched = study.ranges(cell)["learning_rate"]
    assert place.position == pytest.approx(searched.position(PARAMS["learning_rate"]))
    assert place.edge == (searched.edge(PARAMS["learning_rate"]) is not None)
    drawn = re.findall(r'class="range(?: edge)?".*?M([\d.]+) 0V10', whole.page.markup)
    assert len(drawn) == len(best.places)
    assert float(drawn[0]) == pytest.approx(1 + 60 * place.position, abs=0.06)


def test_health_is_a_line_of_marks(whole: Whole):
    marks = {mark.check: mark for mark in whole.found.health}
    assert (marks["budget"].verdict, marks["budget"].cells, marks["budget"].of) == ("warning", 8, 8)
    assert marks["divergence"].verdict == "ok"
    assert "! budget 8 of 8" in whole.page.text


def test_a_page_leaves_out_figures_that_make_it_too_large_and_keeps_those_of_the_questions(monkeypatch):
    monkeypatch.setattr(report, "MOST_BYTES", 100)
    pictures = [Picture(name, name, name, Markup("x" * size) if size else None, "" if size else "nothing")
                for name, size in (("a", 60), ("b", 0), ("c", 50), ("d", 40))]  # fmt: skip
    found = report._that_fit(pictures, {"c"})
    assert [picture.name for picture in found] == ["a", "b", "c", "d"]
    assert [bool(picture.svg) for picture in found] == [False, False, True, True]
    assert "too large" in found[0].reason
    assert found[1].reason == "nothing"


def test_another_question_is_one_entry(whole: Whole):
    drawing = Picture("odd", "odd", "An odd figure", Markup('<svg role="img"></svg>'), "")
    asked = Question(
        "odd", "Is it odd?", [Comparison(None, "It is <odd>.")], "By `counting`.", ["none", "odd"], ["best", "nowhere"]
    )
    found = whole.found
    text = report.render(replace(found, questions=[*found.questions, asked], pictures=[drawing]))
    article = text[text.index('<article id="claim-odd" class="question plain">') :]
    assert "It is &lt;odd&gt;." in article
    assert 'id="figure-odd"' in article
    assert text.count('id="figure-odd"') == 1
    assert '<a href="#best">best configurations</a>.' in article
    assert 'href="#claim-odd"' not in text  # no verdict, no place in the strip


def test_each_command_prints_the_numbers_beside_it(quick: None, tmp_path: Path, monkeypatch, capsys):
    import shlex

    from lbstudy.console import cli

    shown = {table.name: table for table in report.collect(whole_study(tmp_path / "a study's")).tables}
    for name, column in {
        "best": "test_accuracy",
        "gap": "closed",
        "targets": "steps",
        "targets-half": "steps",
        "targets-sgd": "steps",
    }.items():
        monkeypatch.setattr(sys, "argv", [*shlex.split(shown[name].command), "--format", "csv"])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        assert not exit_.value.code
        printed = tables.for_reading(pd.read_csv(pd.io.common.StringIO(capsys.readouterr().out)), digits=3)
        if name != "best":  # its interval goes by another name there
            assert list(printed[column]) == list(shown[name].table[column])
        else:
            assert [cell.split(" ")[0] for cell in shown[name].table[column]] == list(printed[column])


def broken(kind: str, path: Path) -> tuple[StudyFolder, list[str]]:
    """A study that lacks something, and what its page must say about it."""
    if kind == "empty":
        return StudyFolder.create(path, CELLS), [
            "Nothing yet: no trial has completed", "0 of 32 trials have ended", "No minimum has been measured",
        ]  # fmt: skip
    if kind == "interrupted":
        folder = whole_study(path)
        add_run(folder, "kfac-b128-mixup", [{"val_accuracy": 0.5, "val_loss": 1}], 1, status="running", params=PARAMS)
        add_run(folder, "sgd-b128-mixup", [{"test_accuracy": 0.5}], 2, status="running", trial=0)
        return folder, ["8 of 32 trials have ended", "sgd-b128-mixup: of its confirmed runs 1 not ended"]
    if kind == "partly failed":
        folder = whole_study(path)
        add_run(folder, "sgd-b128-none", [{"test_accuracy": 0.5}], 1, status="failed", trial=0, error="<b>boom</b>")
        (folder.trial_folder(folder.trials()[0]) / "trial.json").write_text("{}")
        return folder, ["sgd-b128-none: of its confirmed runs 1 failed", "Damaged, and left out: "]
    if kind == "one cell":
        study = study_of(["sgd"], [32], ["none"])
        return whole_study(path, study), ["One batch size", "The study has one batch size.", "no K-FAC", "No smoothing"]
    if kind == "without K-FAC":
        study = study_of(["sgd"], [32, 128], ["none", "mixup"])
        return whole_study(path, study), ["The study has no K-FAC.", "SGD without smoothing lost 10.00 points"]
    if kind == "without plain cells":
        study = study_of(["sgd", "kfac"], [32, 128], ["mixup"])
        return whole_study(path, study), ["The study has no cell without smoothing", "At batch 128 with Mixup, K-FAC"]
    if kind == "one seed":
        return whole_study(path, seeds=1), ["One seed a cell", "with one seed, which has no interval"]
    if kind == "nothing confirmed":
        return confirmed_study(path, CELLS, {}), [
            "Nothing has been confirmed", "its test accuracy is not known", "validation accuracy 90.00 %",
        ]  # fmt: skip
    folder = whole_study(path)
    for number in range(4):
        add_run(folder, "kfac-b128-none", [{"val_accuracy": 0.1, "val_loss": nan}], number, status="diverged")
    return folder, [
        "kfac-b128-none has no result: of 4 trials none completed, 0 were pruned and 4 diverged",
        "there is no result",
    ]


BROKEN = ["empty", "interrupted", "partly failed", "one cell", "without K-FAC", "without plain cells", "one seed",
          "nothing confirmed", "a cell diverged"]  # fmt: skip


@pytest.mark.parametrize("kind", BROKEN)
def test_a_study_that_lacks_something_says_so(kind: str, quick: None, tmp_path: Path):
    folder, words = broken(kind, tmp_path / "s")
    page = page_of(folder)
    assert "Accuracy & loss: not <here>." in page.text
    for part in words:
        assert part in page.text
    assert not re.search(r"\bnan\b|\bNone\b(?!\.)|<NA>", page.text)
    if kind in ("empty", "one seed", "nothing confirmed"):
        assert {question.verdict for question in report.collect(folder).questions} - {None} == {"cannot tell"}


@pytest.mark.slow
@pytest.mark.parametrize("kind", BROKEN)
def test_the_figures_of_a_study_that_lacks_something(kind: str, tmp_path: Path):
    pictures = report.collect(broken(kind, tmp_path / "s")[0]).pictures
    assert all((picture.svg is None) == bool(picture.reason) for picture in pictures)
    if kind == "empty":
        assert {picture.reason for picture in pictures if picture.name.startswith("learning")} != {""}


HOSTILE = "<script>alert(1)</script> & \"both\" 'quotes' $x_1$ \\textbf{50 %} {{ 7 * 7 }} {% raw %}"


def test_hostile_text_is_shown_as_it_is(quick: None, tmp_path: Path):
    study = study_of(["sgd"], [32, 128], ["none"], source=HOSTILE, dataset={**NO_IMAGES, "root": f"/data/{HOSTILE}"})
    folder = whole_study(tmp_path / "<b>it's</b> $here$", study)
    path = folder.path / "environment.json"
    environment = json.loads(path.read_text())
    environment |= {"command": ["lbstudy", HOSTILE], "commit": HOSTILE, "packages": {HOSTILE: HOSTILE}}
    environment["machine"]["host"] = HOSTILE
    path.write_text(json.dumps(environment))
    page = page_of(folder)
    text = (folder.path / "report.html").read_text(encoding="utf-8")
    assert text.count("<script>") == 1  # the page's own
    assert "<b>it" not in text
    assert page.text.count(" ".join(HOSTILE.split())) == 5  # source, root, version, commit, host
    assert "<b>it's</b> $here$" in page.text.replace("'\"'\"'", "'")


def test_versions_of_earlier_drivers_are_named(quick: None, tmp_path: Path):
    folder = whole_study(tmp_path / "s")
    before = folder.environment()
    before["packages"]["torch"] = "1.13.1"
    (folder.path / "environment.json").write_text(json.dumps(provenance.following(before)))
    assert "torch 1.13.1" in page_of(folder).text


@pytest.mark.parametrize("content", ["", "[]", "{", '{"packages": {}}'])
def test_a_study_whose_environment_is_not_known(content: str, quick: None, tmp_path: Path):
    folder = confirmed_study(tmp_path / "s", study_of(["sgd"], [32], ["none"]), {})
    (folder.path / "environment.json").write_text(content)
    assert "learning rate" in page_of(folder).text


def test_caveats_say_what_a_reader_must_know(tmp_path: Path):
    folder = whole_study(tmp_path / "s")
    add_run(folder, "sgd-b32-none", [{"test_accuracy": 0.9}], 3, trial=0, run={"train_on": "all"}, device="cuda")
    confirmed = load.confirmed(folder)
    frame = pd.DataFrame({"resolvable": [0.01, 0.025, nan, 2.5]})
    words = " ".join(conditions.list_caveats(CELLS, load.trials(folder), confirmed, frame, [0, 2, 1]))
    for part in (
        "In 2 of 3 cells another completed trial came within one standard error",
        "4 times fewer steps than batch 32",
        "1.00 points",
        "2.50 in the least steady one that can show any",
        "trained on the validation",
        "cpu, cuda",
    ):
        assert part in words


def test_a_gap_that_no_accuracies_can_have_is_not_called_the_smallest_to_be_seen():
    row = {"optimizer": "K-FAC", "smoothing": "Mixup", "small_batch": 32, "large_batch": 128, "n": 2,
           "gap": 0.2, "gap_low": -0.5, "gap_high": 0.9,
           "gap_at_best_epoch": 0.1, "gap_at_best_epoch_low": nan, "gap_at_best_epoch_high": nan}  # fmt: skip
    assert sentences.gap_sentence(row | {"resolvable": 0.05}) == (
        "From batch 32 to 128, K-FAC with Mixup lost 20.00 points of test accuracy [−50.00, 90.00] (n = 2), which cannot "
        "be told from nothing: a gap of 5.00 points would be found four times in five."
    )
    assert "no gap would be found four times in five" in sentences.gap_sentence(row | {"resolvable": 2.5})
    nonsense = sentences.gap_sentence(row | {"gap_low": -1.8, "gap_high": 2.2, "resolvable": 2.5})
    assert nonsense.endswith("lost 20.00 points of test accuracy (n = 2), with an interval that holds any gap.")


def test_columns_are_set_by_what_they_hold():
    table = pd.DataFrame({
        "a": ["0.1 [-0.2, 0.3]", "-"], "b": ["inf", "1e-05"], "c": ["1 of 5 diverged", "-"], "d": ["x" * 40, "-"],
    })  # fmt: skip
    shown = evidence.Shown("n", "t", table, "", "")
    assert [shown.kind(column) for column in table] == ["number", "number", "word", "long"]


def test_lines_do_not_break_inside_an_interval():
    nobreak = report.NO_BREAK
    assert report.unbroken("closed 62 % [41, 80] of it (n = 5), batch 32") == (
        f"closed 62{nobreak}% [41,{nobreak}80] of it (n{nobreak}={nobreak}5), batch{nobreak}32"
    )


def test_commands_in_prose_are_code_and_the_rest_is_escaped():
    assert report.prose("<b> & `lbstudy run <x>` goes") == "&lt;b&gt; &amp; <code>lbstudy run &lt;x&gt;</code> goes"


def test_a_folder_that_cannot_be_written(quick: None, tmp_path: Path):
    folder = confirmed_study(tmp_path / "s", study_of(["sgd"], [32], ["none"]), {})
    (folder.path / "report.html").mkdir()
    with pytest.raises(StudyError, match=r"report\.html: cannot be written"):
        report.write(folder)


def test_the_template_knows_all_that_it_shows():
    with pytest.raises(UndefinedError):
        report.render(object())  # type: ignore[arg-type]


WITHOUT = """
import sys
blocked = set({blocked!r})
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in blocked:
            raise ImportError(f"{{name}} is not here")
sys.meta_path.insert(0, Blocker())
from lbstudy.console import cli
for arguments in {commands!r}:
    sys.argv = ["lbstudy", *arguments]
    try:
        cli.main()
    except SystemExit as end:
        assert not end.code, (arguments, end.code)
assert not blocked & set(sys.modules)
"""


def dependency_names(requirements: list[str]) -> set[str]:
    return {re.split(r"[\[=<>]", requirement)[0] for requirement in requirements}


def test_looking_at_studies_needs_none_of_what_running_them_needs(tmp_path: Path):
    """With every dependency of the extra `run` blocked, such as torch, Ray and Optuna."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    absent = dependency_names(project["optional-dependencies"]["run"])
    assert {"torch", "ray", "optuna", "torchvision"} <= absent
    blocked = [{"scikit-learn": "sklearn"}.get(name, name) for name in sorted(absent - {"pillow"})]  # matplotlib's own
    path = str(whole_study(tmp_path / "s", study_of(["sgd"], [32, 128], ["none"])).path)
    commands = [["report", path], ["best", path], ["status", path], ["figures", path], ["export", path],
                ["init", f"{tmp_path}/new"],
                *(["table", path, kind] for kind in ("gap", "targets", "health", "sharpness", "correlations"))]  # fmt: skip
    script = WITHOUT.format(blocked=blocked, commands=commands)
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{path}/report.html\n")
    assert "figure-learning_curves" in Page((tmp_path / "s" / "report.html").read_text(encoding="utf-8")).ids


def test_a_study_whose_confirmation_has_just_begun_has_a_page(tmp_path: Path):
    folder = confirmed_study(tmp_path / "s", study_of(["sgd"], [32, 128], ["none"]), {})
    folder.confirmation.write_trial(
        record(cell="sgd-b32-none", number=0, status="running", trial=0, repeat=0, metrics={})
    )
    assert report.in_short(report.collect(folder))
