"""Why the large batch loses, in sentences: for want of updates, or for want of noise in the gradient?

The numbers are those of `tables.split`, at each optimizer's largest batch size. A question is answered where the 95 %
intervals that it is about lie on one side of zero; where they hold it, or a run of the cells failed, it cannot be told.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import pandas as pd

from lbstudy.analysis import stats
from lbstudy.analysis.report.claims import led, lost
from lbstudy.analysis.report.sentences import count, points
from lbstudy.analysis.tables.split import PARTS_OF_GAP, Part, Split, images, list_splits, saved
from lbstudy.study.spec import StudySpec
from lbstudy.study.split import SAME_UPDATES, part_of, without_budget

MISSING: dict[Part, str] = {"few_updates": "the missing updates", "less_noise": "the missing noise"}
"""What a part of the gap is the price of."""


class Answer(NamedTuple):
    """A question about the parts of a gap, and what the study says."""

    question: str
    verdict: Literal["yes", "no", "cannot tell"]
    sentence: str


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
    more = part_of(split.between.factors) == SAME_UPDATES
    small, large = split.small.batch_size, split.large.batch_size
    parts = {part: split.cost(part) for part in PARTS_OF_GAP}
    n = split.gap.n
    unknown = "" if n > 1 else f" ({count(n)})"
    run = f"batch {large} with as many updates as batch {small}" if more else f"batch {small} stopped at as many"
    run += "" if more else f" updates as batch {large}"
    times = images(confirmed, split.between) / images(confirmed, split.large)
    cost = f", which sees {times:.3g} times the images" if times == times else ""
    return _led(study, split)(
        f"{_who(study, split)}, batch {small} against {large}: of the gap of {_points(split.gap)}, few updates make "
        f"{_told(parts['few_updates'])} and less noise in the gradient {_told(parts['less_noise'])}"
        f"{unknown or f' ({count(n)})'}; the cell between is {run}{cost}."
        f"{lost(confirmed, [cell.name for cell in split.cells])}"
    )


def answers(study: StudySpec, confirmed: pd.DataFrame) -> list[Answer]:
    """Whether smoothing repairs the missing updates or the missing noise, and whether another optimizer than SGD loses
    less of the first part, in every way in which the study splits its gaps.

    Args:
        study: the study.
        confirmed: `load.confirmed` of its folder.
    """
    splits = list_splits(study, confirmed)
    found = []
    for split in _at_largest_batch(splits):
        label = study.label(split.large.smoothing)
        plain = split.beside(splits, smoothing="none")
        if plain and plain != split:
            who = study.label(split.large.optimizer)
            found += [
                _repairs(f"Does {label} repair {MISSING[part]} of {who}?", study, plain, split, part, confirmed)
                for part in PARTS_OF_GAP
            ]
        sgd = split.beside(splits, optimizer="sgd")
        if sgd and sgd != split:
            found.append(_loses_less(study, sgd, split, confirmed))
    return found


def _repairs(question: str, study: StudySpec, plain: Split, own: Split, part: Part, confirmed: pd.DataFrame) -> Answer:
    """Yes where the part costs something without the smoothing, and less with it; no where it costs more."""
    cost, less = plain.cost(part), saved(plain, own, part)
    label = study.label(own.large.smoothing)
    sentence = (
        f"{_way(own)}, {PARTS_OF_GAP[part]} cost {_told(cost)} without smoothing and {_points(own.cost(part))} with "
        f"{label}: {_points(less)} less ({count(less.n)})."
    )
    verdict = _verdict(less) if less.low <= 0 or cost.low > 0 else "cannot tell"
    return _answer(study, question, verdict, sentence, [plain, own], confirmed)


def _loses_less(study: StudySpec, sgd: Split, own: Split, confirmed: pd.DataFrame) -> Answer:
    name, other = study.label(own.large.optimizer), study.label("sgd")
    smoothing = f"with {study.label(own.large.smoothing)}".replace("with no", "without")
    less = saved(sgd, own, "few_updates")
    sentence = (
        f"{_way(own)}, few updates cost {name} {_points(own.cost('few_updates'))} {smoothing} and {other} "
        f"{_points(sgd.cost('few_updates'))}: {_points(less)} less ({count(less.n)})."
    )
    question = f"Does {name} lose less to few updates than {other}, {smoothing}?"
    return _answer(study, question, _verdict(less), sentence, [sgd, own], confirmed)


def _answer(
    study: StudySpec, question: str, verdict: Literal["yes", "no", "cannot tell"], sentence: str, splits: list[Split],
    confirmed: pd.DataFrame,
) -> Answer:  # fmt: skip
    say = _led(study, splits[0])
    if missing := [cell.name for split in splits if split.accuracies.empty for cell in split.cells]:
        names = ", ".join(dict.fromkeys(missing))
        return Answer(question, "cannot tell", say(f"{_way(splits[0])}, no repeat of all of these completed: {names}."))
    warning = lost(confirmed, dict.fromkeys(cell.name for split in splits for cell in split.cells))
    return Answer(question, "cannot tell" if warning else verdict, say(sentence + warning))


def _verdict(less: stats.Mean) -> Literal["yes", "no", "cannot tell"]:
    if less.low > 0:
        return "yes"
    return "no" if less.high < 0 else "cannot tell"  # so it is without an interval


def _at_largest_batch(splits: list[Split]) -> list[Split]:
    """Those between an optimizer's smallest and largest batch size."""
    largest: dict[str, int] = {}
    for split in splits:
        largest[split.large.optimizer] = max(split.large.batch_size, largest.get(split.large.optimizer, 0))
    return [split for split in splits if split.large.batch_size == largest[split.large.optimizer]]


def _way(split: Split) -> str:
    """In which way a gap is split, to begin a sentence with."""
    if part_of(split.between.factors) == SAME_UPDATES:
        return f"By batch {split.large.batch_size} with as many updates as batch {split.small.batch_size}"
    return f"By batch {split.small.batch_size} with no more updates than batch {split.large.batch_size}"


def _who(study: StudySpec, split: Split) -> str:
    smoothing = f"with {study.label(split.large.smoothing)}".replace("with no", "without")
    return f"{study.label(split.large.optimizer)} {smoothing}"


def _led(study: StudySpec, split: Split) -> Callable[[str], str]:
    variant = study.variant(split.large)
    return lambda sentence: led(variant, sentence)


def _points(estimate: stats.Mean) -> str:
    interval = "" if estimate.low != estimate.low else f" [{points(estimate.low)}, {points(estimate.high)}]"
    return f"{points(estimate.value)} points{interval}"


def _told(estimate: stats.Mean) -> str:
    """A cost, and whether it can be told from nothing."""
    unclear = estimate.low == estimate.low and not stats.excludes_zero(estimate)
    return _points(estimate) + (" (not to be told from nothing)" if unclear else "")
