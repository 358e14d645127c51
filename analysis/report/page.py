"""The report of a study: one page that holds its answer, the evidence, what was fixed, and what is missing.

`collect` gathers everything the page shows from the study's folder, `render` makes the page of it (`report.html.j2`,
which escapes all text), `write` leaves it in the folder. The page is one file: figures are inside it, and nothing is
loaded from elsewhere. Neither torch nor ray is needed.

It is for a reader with a minute, who sees the verdicts, the accuracies and some sentences; with five, who goes through
the questions (`questions`); and with an hour, who opens the tables (`evidence`), the figures and the conditions.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import jinja2
from markupsafe import Markup, escape

from lbstudy import storage
from lbstudy.analysis import load
from lbstudy.analysis.figures import all as figures
from lbstudy.analysis.figures import style
from lbstudy.analysis.minima import results
from lbstudy.analysis.report import conditions, evidence, sentences
from lbstudy.analysis.report.evidence import Mark, Shown, for_page
from lbstudy.analysis.report.questions import Question, lead, up_to_which_batch, why_it_loses
from lbstudy.analysis.tables import best as tables
from lbstudy.analysis.tables import cost, critical, gaps, health, published, targets
from lbstudy.analysis.tables import minima as minima_table
from lbstudy.records.folder import StudyFolder
from lbstudy.records.provenance import utc_now
from lbstudy.storage import StoragePath
from lbstudy.study.file import writing

NO_BREAK = "\u00a0"

PAGE = "report.html"
"""Name of the page in the study's folder."""

HEADLINE = "accuracy"
"""The figure of the first screen."""

MOST_VARIANTS = 2
"""Of each figure, so many are on the page at most, one for each combination of further factors."""

MOST_ROWS = 4
"""Of figures that show all combinations, so many are on the page at most."""

MOST_BYTES = 2_600_000
"""Of all figures together: a page stays below 3 MB."""

LEFT_OUT = {"landscape_surface"}
"""Figures that the page has not: a surface that cannot be turned says less than its contours, which are there."""


class Picture(NamedTuple):
    """A figure as the page shows it, or why there is none."""

    name: str
    kind: str  # its name without that of its variant
    description: str
    svg: Markup | None
    reason: str


@dataclass(frozen=True)
class Report:
    """Everything that the page shows."""

    study: str
    source: str
    made: str  # when, UTC
    compared: str
    cost: str
    lead: list[tuple[str, str]]  # sentence, and the table that holds its numbers
    questions: list[Question]
    missing: list[str]
    health: list[Mark]
    tables: list[Shown]
    pictures: list[Picture]
    command: str
    figures_command: str
    fixed: dict[str, str]
    caveats: list[str]

    def headline(self) -> list[Picture]:
        """The figure of the first screen, if it could be drawn."""
        return self.drawn([HEADLINE])

    def drawn(self, kinds: Sequence[str]) -> list[Picture]:
        """The first of these kinds of figures that could be drawn, of each combination of further factors."""
        found = [[p for p in self.pictures if p.kind == kind and p.svg] for kind in kinds]
        return next(filter(None, found), [])

    def placed(self) -> dict[str, list[Picture]]:
        """The figures of each question, by its name; one that several ask for is beside the first of them."""
        taken, places = {HEADLINE}, dict[str, list[Picture]]()
        for question in self.questions:
            places[question.name] = self.drawn([kind for kind in question.figures if kind not in taken])
            taken |= {picture.kind for picture in places[question.name]}
        return places

    def shared(self, question: Question) -> list[Picture]:
        """The figures that show a question and stand beside another one."""
        return [] if self.placed()[question.name] else self.drawn(question.figures)

    def others(self) -> list[Picture]:
        """The figures that stand nowhere else."""
        kinds = {p.kind for pictures in self.placed().values() for p in pictures} | {HEADLINE}
        return [picture for picture in self.pictures if picture.svg and picture.kind not in kinds]

    def table(self, name: str) -> Shown | None:
        """The table of this name, if the page has it."""
        return next((table for table in self.tables if table.name == name), None)


def collect(folder: StudyFolder) -> Report:
    """Gather what the page shows.

    Raises:
        StudyError: the folder holds no study.
    """
    folder = load.Snapshot.of(folder)
    study, trials = folder.study(), load.trials(folder)
    confirmed, epochs = load.confirmed(folder), load.confirmed_epochs(folder)
    gap_table, configs = gaps.gap_table(study, confirmed), tables.best_configs(folder)
    sought = [evidence.sought(part, confirmed, epochs) for part in study.compared()]
    sharpness, lines = results.sharpness(folder), results.landscape(folder, "line")
    minima = minima_table.runs(confirmed, sharpness, lines)
    measured = minima_table.minima_table(study, minima)
    measured = measured[measured["n"] > 0]
    findings = health.health_table(folder)
    rivals = [len(tables.as_good(folder, cell).iloc[1:]) for cell in study.list_cells()]
    critical_table = critical.critical_table(study, confirmed, epochs, critical.Tuning(trials, load.epochs(folder)))
    splits = any(part.splits for part in study.variants())
    rows = slice(0 if confirmed.empty else None)  # "What is missing" says so once; these tables would in every row

    def command(verb: str, *arguments: str) -> str:
        return shlex.join(["lbstudy", verb, str(folder.path), *arguments])

    judged = evidence.judge(sought, confirmed, gap_table, minima)
    questions = [
        Question.of(judged.generalisation, "gap", "learning_curves"),
        Question.of(judged.smoothing, "gap_closed"),
        Question.of(judged.steps, "steps_to_target"),
        Question.of(judged.minima, "sharpness_accuracy", "landscape_widths"),
        up_to_which_batch(study, critical_table[rows]),
        *([why_it_loses(study, confirmed)] if splits else []),
    ]
    return Report(
        study=study.name,
        source=study.source,
        made=utc_now()[:16].replace("T", " ") + " UTC",
        compared=conditions.describe_compared(study),
        cost=conditions.describe_cost(cost.standing(folder).spent),
        lead=lead(study, gap_table, configs),
        questions=questions,
        missing=health.list_missing(study, trials, confirmed)
        + health.list_absent(study)
        + load.list_damaged(trials, confirmed, epochs)
        + [sentences.capitalise(part) + "." for part in minima_table.list_left_out(minima, sharpness, lines)],
        health=evidence.health_marks(findings),
        tables=[
            Shown(
                "best", "Best configurations", for_page(tables.lean(configs)), evidence.BEST, command("best"),
                evidence.places(folder, configs),
            ),
            Shown(
                "published", "Published configurations, trained again", for_page(published.published_table(folder)),
                evidence.PUBLISHED, command("table", "published"),
            ),
            Shown("gap", "Small against large batch", for_page(gap_table[rows]), evidence.GAP, command("table", "gap")),
            *(evidence.split_tables(study, confirmed, command) if splits else []),
            Shown(
                "targets", f"Time to {study.tuning.goal or 'what the smallest plain batch delivers'}",
                for_page(targets.targets_table(study, confirmed, epochs)[rows]),
                (evidence.TARGETS_TUNED if study.tuning.goal else evidence.TARGETS).format(targets.resolution(study)),
                command("table", "targets"),
            ),
            Shown(
                "critical", "Critical batch sizes", for_page(critical_table[rows]), evidence.CRITICAL,
                command("table", "critical"),
            ),
            *evidence.times_to_sgd(sought, confirmed, epochs, command),
            Shown(
                "sharpness", "Minima", for_page(measured), f"{minima_table.WHICH_SIDE} {evidence.MINIMA}",
                command("table", "sharpness"),
            ),
            Shown(
                "correlations", "Sharpness and test accuracy", for_page(minima_table.correlations(measured)),
                evidence.CORRELATIONS, command("table", "correlations"),
            ),
            Shown("health", "Health", evidence.health_matrix(findings), evidence.HEALTH, command("table", "health")),
            Shown(
                "warnings", "Warnings", for_page(findings[findings["verdict"] == "warning"].drop(columns="verdict")),
                "What a warning says, in full.", command("table", "health"),
            ),
        ],
        pictures=_that_fit(list(_draw(folder)), {HEADLINE, *(kind for q in questions for kind in q.figures)}),
        command=command("report"),
        figures_command=command("figures"),
        fixed=conditions.describe_fixed(study, confirmed, folder.environment(), folder.confirmation.environment()),
        caveats=conditions.list_caveats(study, trials, confirmed, gap_table, rivals),
    )  # fmt: skip


def _draw(folder: StudyFolder) -> Iterator[Picture]:
    for drawing in figures.draw_all(folder, at_most=MOST_VARIANTS, rows=MOST_ROWS):
        if drawing.kind in LEFT_OUT:
            continue
        svg = None
        if drawing.figure is not None:  # matplotlib escapes the text it draws
            svg = Markup(style.embeddable_svg(drawing.figure, re.sub(r"[+=.]", "-", drawing.name), drawing.description))
        yield Picture(drawing.name, drawing.kind, drawing.description, svg, drawing.reason)


def _that_fit(pictures: list[Picture], first: set[str]) -> list[Picture]:
    """The pictures in their order, those that would make the page too large without their figure. Of the kinds `first`
    all that fit are there before any other is."""
    room, kept = MOST_BYTES, set[str]()
    for picture in sorted(pictures, key=lambda picture: picture.kind not in first):
        if picture.svg and len(picture.svg) <= room:
            room -= len(picture.svg)
            kept.add(picture.name)
    full = "left to `lbstudy figures`, since the page would be too large"
    return [p if not p.svg or p.name in kept else p._replace(svg=None, reason=full) for p in pictures]


class Live(NamedTuple):
    """What a page says while its study runs."""

    at_work: bool  # whether a driver is
    sentences: list[str]  # how the study stands
    every: int  # seconds until the page is written again
    made: str  # ISO 8601, UTC


def render(report: Report, live: Live | None = None) -> str:
    """The page. All text in it is escaped; only the figures are taken as they are."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["prose"] = prose
    return environment.get_template("report.html.j2").render(report=report, live=live)


def prose(text: str) -> Markup:
    """A sentence as HTML: escaped, its lines not broken where they must not be, and `commands` as code."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(unbroken(text)))))


def unbroken(text: str) -> str:
    """With no-break spaces where a line must not end: in intervals, before units, and in n = 5."""
    together = r"\[[^\[\]]*\d, [^\[\]]*\]|(?<=\bn) = (?=\d)|(?<=\d) (?=%)|(?<=batch) (?=\d)"
    return re.sub(together, lambda found: found[0].replace(" ", NO_BREAK), text)


def in_short(report: Report) -> list[str]:
    """What a study found, in lines for a terminal: its leading sentences, and the verdict of each claim."""
    found = [sentence for sentence, _ in report.lead]
    return found + [f"{question.verdict}: {question.title}" for question in report.questions if question.verdict]


def write(folder: StudyFolder, live: Live | None = None, report: Report | None = None) -> StoragePath:
    """Write the page into the study's folder, in one step; returns its path.

    Args:
        folder: the study's folder.
        live: how the study stands, where it runs.
        report: what `collect` has gathered; it is gathered where there is none.

    Raises:
        StudyError: the folder holds no study, or cannot be written.
    """
    page = folder.path / PAGE
    content = render(report or collect(folder), live).encode()
    with writing(page):
        storage.write(page, content)
    return page
