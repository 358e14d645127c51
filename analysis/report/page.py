"""The report of a study: one page that holds its answer, the evidence, what was fixed, and what is missing.

`collect` gathers everything the page shows from the study's folder, `render` makes the page of it (`report.html.j2`,
which escapes all text), `write` leaves it in the folder. The page is one file: figures are inside it, and nothing is
loaded from elsewhere. Neither torch nor ray is needed.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import isnan
from pathlib import Path
from typing import Literal, NamedTuple

import jinja2
import pandas as pd
from markupsafe import Markup, escape

from lbstudy import storage
from lbstudy.analysis import load
from lbstudy.analysis.figures import all as figures
from lbstudy.analysis.figures import style
from lbstudy.analysis.load import of_variant
from lbstudy.analysis.minima import results
from lbstudy.analysis.report import claims, conditions, sentences
from lbstudy.analysis.tables import best as tables
from lbstudy.analysis.tables import critical, gaps, health, targets
from lbstudy.analysis.tables import minima as minima_table
from lbstudy.records.folder import StudyFolder
from lbstudy.records.provenance import utc_now
from lbstudy.storage import StoragePath
from lbstudy.study.file import StudyError
from lbstudy.study.spec import Cell, StudySpec

NO_BREAK = "\u00a0"

PAGE = "report.html"
"""Name of the page in the study's folder."""


MOST_VARIANTS = 6
"""Of each figure, so many are on the page at most, one for each combination of further factors."""


class Shown(NamedTuple):
    """A table as the page shows it."""

    name: str  # also of its anchor
    title: str
    table: pd.DataFrame  # of text
    caption: str
    command: str

    def kind(self, column: str) -> Literal["number", "long", "word"]:
        """How a column is set: numbers to the right, long text in lines."""
        if tables.holds_numbers(self.table[column]):
            return "number"
        return "long" if self.table[column].str.len().max() > 32 else "word"


class Picture(NamedTuple):
    """A figure as the page shows it, or why there is none."""

    name: str
    description: str
    svg: Markup | None
    reason: str


@dataclass(frozen=True)
class Report:
    """Everything that the page shows."""

    study: str
    source: str
    made: str  # when, UTC
    answer: list[tuple[str, str]]  # sentence, and the table that holds its numbers
    claims: list[claims.Claim]
    missing: list[str]
    tables: list[Shown]
    pictures: list[Picture]
    command: str
    figures_command: str
    fixed: dict[str, str]
    caveats: list[str]


def collect(folder: StudyFolder) -> Report:
    """Gather what the page shows.

    Raises:
        StudyError: the folder holds no study.
    """
    study, trials = folder.study(), load.trials(folder)
    confirmed, epochs = load.confirmed(folder, trials), load.confirmed_epochs(folder)
    gap_table, configs = gaps.gap_table(study, confirmed), tables.best_configs(folder)
    variants = study.variants()
    sought = [_sought(part, confirmed, epochs) for part in variants]
    steps = [(found.study, claims.fewer_steps(found.study, confirmed, found.times)) for found in sought]
    sharpness, lines = results.sharpness(folder, trials), results.landscape(folder, "line", trials)
    minima = minima_table.runs(confirmed, sharpness, lines)
    measured = minima_table.minima_table(study, minima)
    measured = measured[measured["n"] > 0]
    findings = health.health_table(folder)
    rows = slice(0 if confirmed.empty else None)  # "What is missing" says so once; these tables would in every row

    def command(verb: str, *arguments: str) -> str:
        return shlex.join(["lbstudy", verb, str(folder.path), *arguments])

    def about(judge: Callable[[StudySpec], claims.Claim]) -> claims.Claim:
        return claims.together([(part, judge(part)) for part in variants])

    return Report(
        study=study.name,
        source=study.source,
        made=utc_now()[:16].replace("T", " ") + " UTC",
        answer=[
            (claims.led(part, sentence), table)
            for part, claim in steps
            for sentence, table in claims.answer(part, of_variant(gap_table, part), claim, of_variant(configs, part))
        ],
        claims=[
            claims.together(steps),
            about(lambda part: claims.generalises_worse(part, confirmed, of_variant(gap_table, part))),
            about(lambda part: claims.more_than_halves(part, confirmed, of_variant(gap_table, part))),
            about(lambda part: claims.wider_minima(part, of_variant(minima, part))),
        ],
        missing=health.list_missing(study, trials, confirmed)
        + load.list_damaged(trials, confirmed, epochs)
        + [sentences.capitalise(part) + "." for part in minima_table.list_left_out(minima, sharpness, lines)],
        tables=[
            Shown("best", "Best configurations", _for_page(tables.lean(configs)), BEST, command("best")),
            Shown("gap", "Small against large batch", _for_page(gap_table[rows]), GAP, command("table", "gap")),
            Shown(
                "targets", "Time to what the smallest plain batch delivers",
                _for_page(targets.targets_table(study, confirmed, epochs)[rows]), TARGETS,
                command("table", "targets"),
            ),
            Shown(
                "critical", "Critical batch sizes",
                _for_page(
                    critical.critical_table(
                        study, confirmed, epochs, critical.Tuning(trials, load.epochs(folder))
                    )[rows]
                ),
                CRITICAL, command("table", "critical"),
            ),
            *_times_to_sgd(sought, confirmed, epochs, command),
            Shown(
                "sharpness", "Minima", _for_page(measured), f"{minima_table.WHICH_SIDE} {MINIMA}",
                command("table", "sharpness"),
            ),
            Shown(
                "correlations", "Sharpness and test accuracy", _for_page(minima_table.correlations(measured)),
                CORRELATIONS, command("table", "correlations"),
            ),
            Shown("health", "Health", health_matrix(findings), HEALTH, command("table", "health")),
            Shown(
                "warnings", "Warnings", _for_page(findings[findings["verdict"] == "warning"].drop(columns="verdict")),
                "What a warning says, in full.", command("table", "health"),
            ),
        ],
        pictures=list(_draw(folder)),
        command=command("report"),
        figures_command=command("figures"),
        fixed=conditions.describe_fixed(study, confirmed, folder.environment()),
        caveats=conditions.list_caveats(study, trials, confirmed, gap_table),
    )  # fmt: skip


class Sought(NamedTuple):
    """The targets that K-FAC and SGD are compared by, in a variant of the study."""

    study: StudySpec
    rivals: tuple[Cell, Cell] | None
    halfway: list[targets.Target]
    end: list[targets.Target]
    times: dict[targets.Target, pd.DataFrame]


def _sought(part: StudySpec, confirmed: pd.DataFrame, epochs: pd.DataFrame) -> Sought:
    rivals = claims.rivals(part)
    end = targets.choose_targets(part, confirmed, cell=rivals[1]) if rivals else []
    halfway = targets.halfway_targets(confirmed, epochs, rivals[1]) if rivals else []
    end, halfway = ([goal for goal in found if not isnan(goal.value)] for found in (end, halfway))
    times = {goal: targets.winners_times(confirmed, epochs, goal) for goal in [*halfway, *end]}
    return Sought(part, rivals, halfway, end, times)


def _times_to_sgd(
    sought: list[Sought], confirmed: pd.DataFrame, epochs: pd.DataFrame, command: Callable[..., str]
) -> Iterator[Shown]:
    """Tables of the times to where plain SGD is halfway, and ends, unless the table of targets shows that already."""
    for name, what, has in (("targets-half", "where", "is halfway"), ("targets-sgd", "what", "delivers")):
        shown, sizes, options = [], [], list[str]()
        for part, rivals, halfway, end, _ in sought:
            goals = halfway if name == "targets-half" else end
            if rivals and goals and (name == "targets-half" or rivals[1] != targets.baseline(part)):
                shown.append(targets.targets_table(part, confirmed, epochs, goals))
                sizes.append(str(rivals[1].batch_size))
                options = [option for goal in goals for option in goal.options]
        if shown:  # one command makes the table of one variant only
            made_by = command("table", "targets", *options) if len(sought) == 1 else command("report")
            title = f"Time to {what} plain SGD {has} at batch {' or '.join(dict.fromkeys(sizes))}"
            yield Shown(name, title, _for_page(pd.concat(shown, ignore_index=True)), TARGETS_SGD, made_by)


BEST = (
    "Each cell's best completed trial, chosen by validation; then the test accuracy of the same configuration trained "
    "again with fresh seeds (n runs, 95 % interval of the mean, which equal runs do not have). Accuracies are "
    "fractions. Edge: a best value within 5 % of an end of its range, so that a better one may lie outside."
)
GAP = (
    "Gap: test accuracy at the small batch minus that at the large batch, paired by seed. Closed: the share of the gap "
    "without smoothing that the smoothed large batch wins back from the plain small batch. Narrowed: the same, both "
    "batch sizes smoothed. Resolvable: the smallest true gap that so many seeds are likely to show (power 80 %). "
    "Brackets hold 95 % intervals; accuracies and shares are fractions."
)
TARGETS = (
    "Median over the confirmed runs until they first meet the target, known to one epoch. A run that never does has "
    "taken infinitely long (∞). The targets are what the worst run of the plain small-batch cell ends with."
)
CRITICAL = (
    "Steps to the same targets, fitted by S(B) = S_min (1 + B_crit / B) (McCandlish et al. 2018); runs that never got "
    "there count as later than they ended. Perfect until: the batch at which steps exceed perfect scaling from the "
    "smallest one by 20 % (Zhang et al. 2024). Brackets hold 95 % intervals over seeds; tuned: from the best tuning "
    "trials, and 95 % of the resamples of each cell's trials. ∞: not within the batch sizes studied."
)
TARGETS_SGD = (
    "The same, where the targets are what the worst run of that cell had at that time. Whether K-FAC needs fewer steps "
    "at a large batch is decided by those of halfway and of the end together: with a decayed learning rate the end "
    "says mostly which of the two ends lower."
)
MINIMA = "Means over the n seeds that were measured, and their standard deviations (sd)."
CORRELATIONS = (
    "Spearman’s rank correlation of each measure with test accuracy across cells, which differ in more than sharpness: "
    "it is no cause."
)
HEALTH = "Whether each cell's numbers can be trusted; ? where it cannot be told."


def health_matrix(findings: pd.DataFrame) -> pd.DataFrame:
    """`health.health_table` with a row per cell and a column per check; a check that a cell has not had is a dash."""
    marks = findings.assign(verdict=findings["verdict"].replace({"cannot tell": "?"}))
    order = {name: list(dict.fromkeys(findings[name])) for name in ("cell", "check")}
    matrix = marks.pivot(index="cell", columns="check", values="verdict").reindex(order["cell"], columns=order["check"])
    return matrix.fillna("-").reset_index().rename_axis(columns=None).astype(object)


def _for_page(table: pd.DataFrame) -> pd.DataFrame:
    """A table as text, without the columns that are empty."""
    shown = tables.for_reading(table, digits=3)
    return shown.loc[:, (shown != "-").any()]


def _draw(folder: StudyFolder) -> Iterator[Picture]:
    for drawing in figures.draw_all(folder, at_most=MOST_VARIANTS):
        svg = None
        if drawing.figure is not None:  # matplotlib escapes the text it draws
            svg = Markup(style.embeddable_svg(drawing.figure, re.sub(r"[+=.]", "-", drawing.name), drawing.description))
        yield Picture(drawing.name, drawing.description, svg, drawing.reason)


def render(report: Report) -> str:
    """The page. All text in it is escaped; only the figures are taken as they are."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["prose"] = prose
    return environment.get_template("report.html.j2").render(report=report)


def prose(text: str) -> Markup:
    """A sentence as HTML: escaped, its lines not broken where they must not be, and `commands` as code."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(unbroken(text)))))


def unbroken(text: str) -> str:
    """With no-break spaces where a line must not end: in intervals, before units, and in n = 5."""
    together = r"\[[^\[\]]*\d, [^\[\]]*\]|(?<=\bn) = (?=\d)|(?<=\d) (?=%)|(?<=batch) (?=\d)"
    return re.sub(together, lambda found: found[0].replace(" ", NO_BREAK), text)


def write(folder: StudyFolder) -> StoragePath:
    """Write the page into the study's folder; returns its path.

    Raises:
        StudyError: the folder holds no study, or cannot be written.
    """
    page = folder.path / PAGE
    content = render(collect(folder)).encode()
    try:
        storage.write(page, content)
    except OSError as error:
        raise StudyError(f"{page}: cannot be written: {error.strerror or error}") from error
    return page
