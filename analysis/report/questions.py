"""The questions that the page answers one after the other, each with its figures beside its sentences.

A claim of the sources is a question with a verdict (`Question.of`). Any other is one more entry in the list that
`page.collect` makes: a name, a title, its sentences as `Comparison(None, sentence)`, the rule by which its numbers are
made, the figures (names in `figures.all`) and the tables (names in `evidence`) that show it. Whatever of these a study
lacks is left out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from math import isnan
from typing import NamedTuple

import pandas as pd

from lbstudy.analysis.load import of_variant
from lbstudy.analysis.report import evidence, split
from lbstudy.analysis.report.claims import Claim, Comparison, Verdict, agreed, at_largest_batch
from lbstudy.analysis.report.sentences import (
    closed_sentence,
    critical_sentence,
    gap_sentence,
    gaps_sentence,
    selected_sentence,
    worded,
)
from lbstudy.analysis.tables.targets import Target
from lbstudy.study.spec import StudySpec

MOST_OPTIMIZERS = 2
"""Of so many, the first ones, the first screen says what they lost; the questions say it of all."""


class Group(NamedTuple):
    """What is found under some combinations of further factors."""

    of: tuple[str, ...]  # the combinations, in words; none: all
    verdict: Verdict | None
    findings: list[Comparison]


class Question(NamedTuple):
    """A question, and what the study says about it."""

    name: str
    title: str
    findings: Sequence[Comparison]
    rule: str
    figures: Sequence[str] = ()  # their names, the best one first
    tables: Sequence[str] = ()  # the names of those that hold the numbers
    elsewhere: str = ""  # what others found, and how to read the words
    verdict: Verdict | None = None  # where a claim is at stake

    @classmethod
    def of(cls, claim: Claim, *figures: str) -> Question:
        """A claim, with the figures that show it."""
        return cls(
            claim.name, claim.claim, claim.comparisons, claim.rule, figures, [claim.table], claim.elsewhere,
            claim.verdict,
        )  # fmt: skip

    @property
    def groups(self) -> list[Group]:
        """The findings by the combinations of further factors that they are about."""
        parts = dict.fromkeys(finding.of for finding in self.findings)
        of_each = [(part, [finding for finding in self.findings if finding.of == part]) for part in parts]
        return [Group(part, agreed(findings), findings) for part, findings in of_each]

    @property
    def tally(self) -> str:
        """Under how many combinations of further factors the claim has which verdict; empty where all have the same."""
        counts = Counter(group.verdict for group in self.groups for _ in group.of if group.verdict)
        told = ", ".join(f"{verdict} in {count}" for verdict, count in counts.most_common())
        return f"{told} of {counts.total()} combinations" if len(counts) > 1 else ""


def up_to_which_batch(study: StudySpec, critical_table: pd.DataFrame) -> Question:
    """How far larger batches save steps.

    Args:
        study: the study.
        critical_table: `critical.critical_table`.
    """
    rows = [worded({str(k): v for k, v in row.items()}, study) for _, row in critical_table.iterrows()]
    sentences = [
        f"To {Target(row['metric'], row['target'])}: {critical_sentence(row)}"
        for row in rows
        if not isnan(row["target"])
    ]
    return Question(
        "critical",
        "Up to which batch size does a larger one save steps?",
        [Comparison(None, sentence) for sentence in sentences or ["No target is known, so there are no steps to it."]],
        evidence.CRITICAL,
        ["steps_to_target"],
        ["critical"],
    )


def why_it_loses(study: StudySpec, confirmed: pd.DataFrame) -> Question:
    """What few updates and less noise cost the large batch, and what repairs which; of a study that splits its gaps.

    Args:
        study: the study.
        confirmed: `load.confirmed` of its folder.
    """
    found = split.gap_sentences(study, confirmed)
    asked = split.answers(study, confirmed)
    decided = [answer for answer in asked if answer.verdict != "cannot tell"]
    found += [f"{a.question} {a.verdict.capitalize()} (by {a.split}): {a.answer}" for a in decided]
    if open_ := len(asked) - len(decided):
        found.append(f"What smoothing repairs, and which optimizer loses less: {open_} of {len(asked)} cannot be told.")
    return Question(
        "split",
        "Why does the large batch lose: few updates, or less noise in the gradient?",
        [Comparison(None, sentence) for sentence in found],
        f"{evidence.SPLIT} {evidence.ANSWERS}",
        ["split"],
        ["split", "split-answers"],
    )


def lead(study: StudySpec, gap_table: pd.DataFrame, configs: pd.DataFrame) -> list[tuple[str, str]]:
    """What a study found at its largest batch sizes, in two or three sentences, each with its table's name.

    Args:
        study: the study, with whatever further factors.
        gap_table: `gaps.gap_table`.
        configs: `tables.best_configs`.
    """
    rows = [row for row in at_largest_batch(gap_table) if not isnan(row["gap"])]
    sentences = []
    for optimizer in dict.fromkeys(row["optimizer"] for row in rows if row["smoothing"] == "none"):
        plain, *others = [
            worded(row, study) for row in rows if (row["optimizer"], row["smoothing"]) == (optimizer, "none")
        ]
        if others:
            sentences.append(gaps_sentence([plain, *others], study))
            continue
        smoothed = [row for row in rows if row["optimizer"] == optimizer and not isnan(row["closed"])]
        shares = [worded(row, study) for row in sorted(smoothed, key=lambda row: -row["closed"])]
        sentences.append(" ".join([gap_sentence(plain), *([closed_sentence(shares)] if shares else [])]))
    chosen = _best_variant(study, configs)
    selected = selected_sentence(study, of_variant(configs, chosen), chosen.in_words)
    return [(s, "gap") for s in sentences[:MOST_OPTIMIZERS]] + [(s, "best") for s in [selected] if s]


def _best_variant(study: StudySpec, configs: pd.DataFrame) -> StudySpec:
    """The variant whose best configuration, at the largest batch size, validation prefers; the first where none is."""
    metric, variants = study.tuning.metric, study.compared()
    largest = configs[configs["batch_size"].eq(configs["batch_size"].max())]
    sign = 1 if study.tuning.direction == "maximize" else -1
    scores = [(sign * of_variant(largest, part)[metric].astype(float)).max() for part in variants]
    return variants[pd.Series(scores, dtype=float).fillna(-float("inf")).argmax()]
