"""A claim, the comparisons that it is made of, and what decides one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

import pandas as pd

from lbstudy.analysis.report.sentences import count, in_points
from lbstudy.analysis.tables import published
from lbstudy.analysis.tables.best import accuracy_by_repeat, count_statuses, failed_runs, winners
from lbstudy.study.spec import StudySpec

Verdict = Literal["supported", "contradicted", "cannot tell"]


class Comparison(NamedTuple):
    """What one pair of cells says about a claim, or another thing that a study found."""

    verdict: Verdict | None  # None: no claim is at stake
    sentence: str
    need: str = ""  # what it would take to tell, in a sentence
    of: tuple[str, ...] = ()  # the combinations of further factors that it is about, in words; none: all


class Claim(NamedTuple):
    """A claim of the sources, and what this study says about it."""

    name: str
    claim: str
    rule: str
    comparisons: list[Comparison]
    elsewhere: str  # what others found, and how to read the words
    table: str  # the table that holds the numbers

    @property
    def verdict(self) -> Verdict:
        """What all comparisons say; where they differ, or one cannot tell, neither can they together."""
        return agreed(self.comparisons) or "cannot tell"


def agreed(comparisons: Iterable[Comparison]) -> Verdict | None:
    """The verdict of all comparisons that have one, open where they differ; None where no claim is at stake."""
    found = {comparison.verdict for comparison in comparisons if comparison.verdict}
    if len(found) > 1:
        return "cannot tell"
    return found.pop() if found else None


def decide(low: float, high: float, threshold: float, above: Verdict) -> Verdict:
    """The verdict of an interval: `above` where it lies above the threshold, the opposite below it."""
    below: Verdict = "contradicted" if above == "supported" else "supported"
    if low > threshold:
        return above
    return below if high < threshold else "cannot tell"  # so it is where they are NaN, for lack of seeds


def judged(verdict: Verdict, sentence: str, need: str) -> Comparison:
    """A comparison that says what it would take where it cannot tell."""
    return Comparison(verdict, sentence, need if verdict == "cannot tell" else "")


def together(claims: Sequence[tuple[StudySpec, Claim]]) -> Claim:
    """What all variants of a study say about a claim, each of which says it about itself; all must agree. What several
    say in the same words stands once."""
    said: dict[tuple[Comparison, ...], list[str]] = {}
    for part, claim in claims:
        said.setdefault(tuple(claim.comparisons), []).append(part.in_words)
    if len(said) == 1:
        return claims[0][1]
    found = [c._replace(of=tuple(words)) for comparisons, words in said.items() for c in comparisons]
    return claims[0][1]._replace(comparisons=found)


def led(variant: StudySpec, sentence: str) -> str:
    """A sentence about a variant, led by the values of the further factors that its cells share."""
    words = variant.in_words
    return f"With {words}: {sentence}" if words else sentence


def lost(confirmed: pd.DataFrame, cells: Iterable[str]) -> str:
    """A warning where runs of these cells diverged or hardly learnt: a mean of such and others is neither's."""
    found, runs = [], winners(confirmed)
    for cell in cells:
        diverged, failed = count_statuses(runs, cell)["diverged"], failed_runs(accuracy_by_repeat(runs, cell))
        found += [f"{diverged} of {cell} diverged"] * bool(diverged) + [f"{failed} of {cell} hardly learnt"] * bool(
            failed
        )
    return f" This decides nothing, since confirmed runs failed: {', '.join(found)}." if found else ""


def outdone(confirmed: pd.DataFrame, cells: Iterable[str]) -> list[Comparison]:
    """A sentence for each of these cells whose published configuration did better than the one that was chosen."""
    found = []
    for cell in cells:
        if leads := published.outdone(confirmed, cell):
            last, stopped = leads
            at_best = f"; where validation was best, {in_points(stopped)} more" if stopped.n == last.n else ""
            found.append(
                Comparison(
                    None,
                    f"Tuning has not found {cell}’s best: a published configuration, which it did not choose, reached "
                    f"{in_points(last, ' points')} more test accuracy after the last epoch ({count(last.n)}){at_best}.",
                )
            )
    return found
