"""The tables of the page, each with what its columns mean and the command that prints it, and the line about health."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import isnan
from typing import Literal, NamedTuple

import pandas as pd

from lbstudy.analysis.load import of_variant
from lbstudy.analysis.report import claims, split
from lbstudy.analysis.report.claims import Claim
from lbstudy.analysis.tables import best as tables
from lbstudy.analysis.tables import split as split_table
from lbstudy.analysis.tables import targets
from lbstudy.records.folder import StudyFolder
from lbstudy.study.spec import Cell, StudySpec


class Place(NamedTuple):
    """Where a best value lies in its range."""

    position: float  # from 0, the low end, to 1, in the range's own scale
    edge: bool  # so near to an end that a better value may lie outside
    range: str  # in words


@dataclass(frozen=True)
class Shown:
    """A table as the page shows it."""

    name: str  # also of its anchor
    title: str
    table: pd.DataFrame  # of text
    caption: str
    command: str
    places: Mapping[tuple[int, str], Place] = field(default_factory=dict)  # by row and column: drawn beside the value

    def kind(self, column: str) -> Literal["number", "long", "word"]:
        """How a column is set: numbers to the right, long text in lines."""
        if tables.holds_numbers(self.table[column]):
            return "number"
        return "long" if self.table[column].str.len().max() > 32 else "word"


def for_page(table: pd.DataFrame) -> pd.DataFrame:
    """A table as text, without the columns that are empty."""
    shown = tables.for_reading(table, digits=3)
    return shown.loc[:, (shown != "-").any()]


def places(folder: StudyFolder, configs: pd.DataFrame) -> dict[tuple[int, str], Place]:
    """Where the best values lie in their ranges, by row and column of `tables.best_configs`."""
    study, found = folder.study(), {}
    for row, (cell, values) in enumerate(zip(study.list_cells(), configs.to_dict("records"), strict=True)):
        at_end = tables.edges(folder, cell)
        for name, searched in study.ranges(cell).items():
            if not isnan(value := float(values[name])):
                found[row, name] = Place(searched.position(value), name in at_end, str(searched))
    return found


class Mark(NamedTuple):
    """What a check of the health of a study has found, over all cells."""

    check: str
    verdict: str  # the worst one
    cells: int  # that have it
    of: int


def health_marks(findings: pd.DataFrame) -> list[Mark]:
    """A mark for each check of `health.health_table`."""
    marks = []
    for check, found in findings.groupby("check", sort=False)["verdict"]:
        worst = next(verdict for verdict in ("warning", "cannot tell", "ok") if found.eq(verdict).any())
        marks.append(Mark(str(check), worst, int(found.eq(worst).sum()), len(found)))
    return marks


def health_matrix(findings: pd.DataFrame) -> pd.DataFrame:
    """`health.health_table` with a row per cell and a column per check; a check that a cell has not had is a dash."""
    marks = findings.assign(verdict=findings["verdict"].replace({"cannot tell": "?"}))
    order = {name: list(dict.fromkeys(findings[name])) for name in ("cell", "check")}
    matrix = marks.pivot(index="cell", columns="check", values="verdict").reindex(order["cell"], columns=order["check"])
    return matrix.fillna("-").reset_index().rename_axis(columns=None).astype(object)


class Sought(NamedTuple):
    """The targets that K-FAC and SGD are compared by, in a variant of the study."""

    study: StudySpec
    rivals: tuple[Cell, Cell] | None
    halfway: list[targets.Target]
    end: list[targets.Target]
    times: dict[targets.Target, pd.DataFrame]


def sought(part: StudySpec, confirmed: pd.DataFrame, epochs: pd.DataFrame) -> Sought:
    """The targets of a variant that are known, and when its runs reached them."""
    goals = claims.goals(part, confirmed, epochs)
    halfway, end = ([goal for goal in goals if goal.stage == stage] for stage in ("half", "end"))
    times = {goal: targets.winners_times(confirmed, epochs, goal) for goal in goals}
    return Sought(part, claims.rivals(part), halfway, end, times)


class Judged(NamedTuple):
    """The claims of the sources, each judged over all variants of a study."""

    steps: Claim
    generalisation: Claim
    smoothing: Claim
    minima: Claim


def judge(found: Sequence[Sought], confirmed: pd.DataFrame, gap_table: pd.DataFrame, minima: pd.DataFrame) -> Judged:
    """What a study says about each claim.

    Args:
        found: `sought` of each variant that is compared.
        confirmed: `load.confirmed` of its folder.
        gap_table: `gaps.gap_table`.
        minima: `tables.minima.runs`.
    """

    def about(claim: Callable[[Sought], Claim]) -> Claim:
        return claims.together([(one.study, claim(one)) for one in found])

    return Judged(
        about(lambda one: claims.fewer_steps(one.study, confirmed, one.times)),
        about(lambda one: claims.generalises_worse(one.study, confirmed, of_variant(gap_table, one.study))),
        about(lambda one: claims.more_than_halves(one.study, confirmed, of_variant(gap_table, one.study))),
        about(lambda one: claims.wider_minima(one.study, of_variant(minima, one.study))),
    )


def times_to_sgd(
    found: list[Sought], confirmed: pd.DataFrame, epochs: pd.DataFrame, command: Callable[..., str]
) -> Iterator[Shown]:
    """Tables of the times to where plain SGD is halfway, and ends, unless the table of targets shows that already."""
    for name, what, has in (("targets-half", "where", "is halfway"), ("targets-sgd", "what", "delivers")):
        shown, sizes, options = [], [], list[str]()
        for part, rivals, halfway, end, _ in found:
            goals = halfway if name == "targets-half" else end
            if rivals and goals and (name == "targets-half" or rivals[1] != targets.baseline(part)):
                shown.append(targets.targets_table(part, confirmed, epochs, goals))
                sizes.append(str(rivals[1].batch_size))
                options = [option for goal in goals for option in goal.options]
        if shown:  # one command makes the table of one variant only
            made_by = command("table", "targets", *options) if len(found) == 1 else command("report")
            title = f"Time to {what} plain SGD {has} at batch {' or '.join(dict.fromkeys(sizes))}"
            yield Shown(name, title, for_page(pd.concat(shown, ignore_index=True)), TARGETS_SGD, made_by)


def split_tables(study: StudySpec, confirmed: pd.DataFrame, command: Callable[..., str]) -> Iterator[Shown]:
    """The parts of the gaps, and what they say."""
    rows = slice(0 if confirmed.empty else None)
    parts = for_page(split_table.split_table(study, confirmed)[rows])
    yield Shown("split", "The gap, split", parts, SPLIT, command("table", "split"))
    found = pd.DataFrame(split.answers(study, confirmed), columns=split.Answer._fields)[rows]
    yield Shown("split-answers", "What is repaired", for_page(found), ANSWERS, command("report"))


BEST = (
    "Each cell's best completed trial, chosen by validation; then the test accuracy of the same configuration trained "
    "again with fresh seeds (n runs, 95 % interval of the mean, which equal runs do not have), after the last epoch, "
    "and after the one of each run that was best by validation. Accuracies are fractions. A tick is the best value in "
    "the range that was searched; edge: it lies within 5 % of an end that is not known to be level (no trial in the "
    "middle half is known to be as good within one standard error), so that a better value may lie outside."
)
PUBLISHED = (
    "Configurations from the literature, trained with the seeds of the best ones (lbstudy confirm --published); what "
    "the literature leaves open is the sampler's. Tuning adds: test accuracy of the cell's best configuration minus "
    "this one's, paired by seed. Brackets hold 95 % intervals; accuracies are fractions."
)
GAP = (
    "Gap: test accuracy at the small batch minus that at the large batch after the last epoch, paired by seed; at best "
    "epoch: with each run read where its validation was best. Closed: the share of the gap "
    "without smoothing that the smoothed large batch wins back from the plain small batch. Narrowed: the same, both "
    "batch sizes smoothed. Resolvable: the smallest true gap that so many seeds show four times in five. Gap to "
    "none: what the smoothed large batch is below the plain small one. "
    "Brackets hold 95 % intervals; accuracies and shares are fractions."
)
SPLIT = (
    "Few updates: what the large batch loses because it makes fewer updates in the same epochs; less noise: what it "
    "loses because its gradient is the mean of more samples. Budget same_updates: between the two is the large batch "
    "with as many updates as the small one; fewer_updates: the small batch, stopped after as many as the large one "
    "makes. Each cell is tuned for itself. Repaired: by how much less a part costs with the smoothing than without. "
    "Images: those that a run of the gap sees; between images: those of the run between. Brackets hold 95 % intervals, "
    "paired by seed; accuracies and differences are fractions."
)
ANSWERS = (
    "Yes where the 95 % interval of the difference lies above zero, and so does what is to be repaired; no where it "
    "lies below; cannot tell where it holds zero, with one seed, and where runs of the cells failed."
)
TARGETS = (
    "Median over the confirmed runs until they first meet the target, known to {}. A run that never does has "
    "taken infinitely long (∞). The targets are what the worst run of the plain small-batch cell ends with."
)
CRITICAL = (
    "Steps to the same targets, fitted by S(B) = S_min (1 + B_crit / B) (McCandlish et al. 2018); runs that never got "
    "there count as later than they ended. Perfect until: the batch at which steps exceed perfect scaling from the "
    "smallest one by 20 % (Zhang et al. 2024). Brackets hold 95 % intervals over seeds; tuned: from the best tuning "
    "trials, and 95 % of those resamples of each cell's trials that give one. ∞: not within the batch sizes studied."
)
TARGETS_TUNED = (
    "Median over the confirmed runs until they first meet the target that every configuration was tuned for, known to "
    "{}; they go on past it. A run that never does has taken infinitely long (∞)."
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
