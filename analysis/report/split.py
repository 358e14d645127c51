"""Why the large batch loses, in sentences: for want of updates, or for want of noise in the gradient?

The numbers are those of `tables.split`, at each optimizer's largest batch size. A question is answered where the 95 %
intervals that it is about lie on one side of zero; where they hold it, or a run of the cells failed, it cannot be told.
"""

from __future__ import annotations

from collections.abc import Callable
from math import isnan
from typing import Literal, NamedTuple

import pandas as pd

from lbstudy.analysis import stats
from lbstudy.analysis.report.claims import led, lost
from lbstudy.analysis.report.sentences import capitalise, count, points
from lbstudy.analysis.tables.split import PARTS_OF_GAP, Part, Split, images, list_splits, saved
from lbstudy.study.spec import StudySpec
from lbstudy.study.split import SAME_UPDATES, part_of, without_budget

Verdict = Literal["yes", "no", "cannot tell"]

MISSING: dict[Part, str] = {"few_updates": "the missing updates", "less_noise": "the missing noise"}
"""What a part of the gap is the price of."""


class Answer(NamedTuple):
    """A question about the parts of a gap, and what the study says."""

    question: str
    split: str  # in which way: between the ends of the gap lies this run
    verdict: Verdict
    answer: str


def gap_sentences(study: StudySpec, confirmed: pd.DataFrame) -> list[str]:
    """What each optimizer's gap without smoothing consists of, at its largest batch size: a sentence each, by the split
    with more updates where a study has both.

    Args:
        study: the study.
        confirmed: `load.confirmed` of its folder.
    """
    found: dict[object, str] = {}
    for split in _at_largest_batch(list_splits(study, confirmed)):
        key = (split.large.optimizer, without_budget(split.large.factors))
        first = key not in found or part_of(split.between.factors) == SAME_UPDATES
        if split.large.smoothing == "none" and len(split.accuracies) and first:
            found[key] = split_sentence(study, split, confirmed)
    return list(found.values())


def split_sentence(study: StudySpec, split: Split, confirmed: pd.DataFrame) -> str:
    """A gap, its parts, and what it took to tell them apart."""
    times = images(confirmed, split.between) / images(confirmed, split.large)
    cost = f", at {times:.3g} times the images" if times == times else ""
    who = f"{study.label(split.large.optimizer)} {_smoothed(study, split)}"
    return _led(study, split)(
        f"{who}, batch {split.small.batch_size} against {split.large.batch_size}: of the gap of {_points(split.gap)}, "
        f"few updates make {_told(split.cost('few_updates'))} and less noise in the gradient "
        f"{_told(split.cost('less_noise'))} ({count(split.gap.n)}). Between the two is {way(split)}{cost}."
        f"{lost(confirmed, [cell.name for cell in split.cells])}"
    )


def way(split: Split) -> str:
    """The run between the ends of the gap, in words."""
    small, large = split.small.batch_size, split.large.batch_size
    if part_of(split.between.factors) == SAME_UPDATES:
        return f"batch {large} with as many updates as batch {small}"
    return f"batch {small} with no more updates than batch {large}"


def answers(study: StudySpec, confirmed: pd.DataFrame) -> list[Answer]:
    """Whether smoothing repairs the missing updates or the missing noise, and whether another optimizer than SGD loses
    less for want of updates, in every way in which the study splits its gaps.

    Args:
        study: the study.
        confirmed: `load.confirmed` of its folder.
    """
    splits = list_splits(study, confirmed)
    found = []
    for split in _at_largest_batch(splits):
        plain, sgd = split.beside(splits, smoothing="none"), split.beside(splits, optimizer="sgd")
        if plain and plain != split:
            found += [_repairs(study, plain, split, part, confirmed) for part in PARTS_OF_GAP]
        if sgd and sgd != split:
            found.append(_loses_less(study, sgd, split, confirmed))
    return found


def _repairs(study: StudySpec, plain: Split, own: Split, part: Part, confirmed: pd.DataFrame) -> Answer:
    """Yes where the part costs something without the smoothing, and less with it; no where it costs more."""
    optimizer, label = study.label(own.large.optimizer), study.label(own.large.smoothing)
    cost, less = plain.cost(part), saved(plain, own, part)
    sentence = (
        f"Under {optimizer} {PARTS_OF_GAP[part]} cost {_told(cost)} without smoothing and {_points(own.cost(part))} "
        f"with {label}: {_less(less)}."
    )
    question = f"Does {label} repair {MISSING[part]} of {optimizer}?"
    verdict = "cannot tell" if less.low > 0 and not cost.low > 0 else _verdict(less)
    return _answer(study, question, verdict, sentence, [plain, own], confirmed)


def _loses_less(study: StudySpec, sgd: Split, own: Split, confirmed: pd.DataFrame) -> Answer:
    name, other, smoothed = study.label(own.large.optimizer), study.label("sgd"), _smoothed(study, own)
    less = saved(sgd, own, "few_updates")
    sentence = (
        f"{capitalise(smoothed)}, few updates cost {name} {_points(own.cost('few_updates'))} and {other} "
        f"{_points(sgd.cost('few_updates'))}: {_less(less)}."
    )
    question = f"Does {name} lose less for want of updates than {other}, {smoothed}?"
    return _answer(study, question, _verdict(less), sentence, [sgd, own], confirmed)


def _answer(
    study: StudySpec, question: str, verdict: Verdict, sentence: str, splits: list[Split], confirmed: pd.DataFrame
) -> Answer:
    say, in_which_way = _led(study, splits[0]), way(splits[0])
    if missing := [cell.name for split in splits if split.accuracies.empty for cell in split.cells]:
        names = ", ".join(dict.fromkeys(missing))
        return Answer(question, in_which_way, "cannot tell", say(f"No repeat was completed by all of {names}."))
    warning = lost(confirmed, dict.fromkeys(cell.name for split in splits for cell in split.cells))
    return Answer(question, in_which_way, "cannot tell" if warning else verdict, say(sentence + warning))


def _verdict(less: stats.Mean) -> Verdict:
    if less.low > 0:
        return "yes"
    return "no" if less.high < 0 else "cannot tell"  # so it is without an interval


def _at_largest_batch(splits: list[Split]) -> list[Split]:
    """Those between an optimizer's smallest and largest batch size."""
    largest: dict[str, int] = {}
    for split in splits:
        largest[split.large.optimizer] = max(split.large.batch_size, largest.get(split.large.optimizer, 0))
    return [split for split in splits if split.large.batch_size == largest[split.large.optimizer]]


def _smoothed(study: StudySpec, split: Split) -> str:
    return f"with {study.label(split.large.smoothing)}".replace("with no", "without")


def _led(study: StudySpec, split: Split) -> Callable[[str], str]:
    variant = study.variant(split.large)
    return lambda sentence: led(variant, sentence)


def _points(estimate: stats.Mean) -> str:
    interval = "" if isnan(estimate.low) else f" [{points(estimate.low)}, {points(estimate.high)}]"
    return f"{points(estimate.value)} points{interval}"


def _told(estimate: stats.Mean) -> str:
    """A cost, and whether it can be told from nothing."""
    unclear = not isnan(estimate.low) and not stats.excludes_zero(estimate)
    return _points(estimate) + (" (not to be told from nothing)" if unclear else "")


def _less(saved: stats.Mean) -> str:
    """By how much less, or more, in words."""
    if saved.value < 0:
        more = saved._replace(value=-saved.value, low=-saved.high, high=-saved.low)
        return f"{_points(more)} more ({count(saved.n)})"
    return f"{_points(saved)} less ({count(saved.n)})"
