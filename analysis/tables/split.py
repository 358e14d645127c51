"""The split of the gap: what the large batch loses for want of updates, and what for want of noise in the gradient.

With acc the test accuracy of the confirmed runs of each cell's best configuration, b the small batch and B the large
one, the gap acc(b) - acc(B) of runs over the same epochs is taken apart by a third cell, tuned for itself as these are:

* same_updates, B with as many updates as b: few updates = acc(B, as many updates) - acc(B), less noise =
  acc(b) - acc(B, as many updates). Hoffer et al. (NeurIPS 2017) trained so.
* fewer_updates, b stopped after as many updates as B: few updates = acc(b) - acc(b, stopped), less noise =
  acc(b, stopped) - acc(B). It is the cheaper one, and says what the noise is worth in a short training.

Either way the parts add up to the gap, over the repeats that all three cells completed; the two ways need not agree.
"""

from __future__ import annotations

from math import isnan
from typing import Any, Literal, NamedTuple

import pandas as pd

from lbstudy.analysis import stats
from lbstudy.analysis.tables.best import accuracy_by_repeat, winners, with_factors
from lbstudy.analysis.tables.gaps import absence
from lbstudy.study.file import StudyError
from lbstudy.study.spec import Cell, StudySpec
from lbstudy.study.split import FEWER_UPDATES, KEY, PARTS, SAME_EPOCHS, part_of

Part = Literal["few_updates", "less_noise"]
PARTS_OF_GAP: dict[Part, str] = {"few_updates": "few updates", "less_noise": "less noise"}
"""What a gap consists of, in words."""

ESTIMATES = ["gap", *PARTS_OF_GAP, *(f"{part}_repaired" for part in PARTS_OF_GAP)]

COLUMNS: dict[str, Any] = {
    "optimizer": object, "smoothing": object, "small_batch": "Int64", "large_batch": "Int64", "n": "Int64",
    "small_accuracy": float, "between_accuracy": float, "large_accuracy": float,
    **{f"{name}{end}": float for name in ESTIMATES for end in ("", "_low", "_high")},
    "repaired_n": "Int64", "images": "Int64", "between_images": "Int64", "note": object,
}  # fmt: skip


class Split(NamedTuple):
    """A gap between two cells, and the one between them that splits it."""

    small: Cell
    large: Cell
    between: Cell  # the large batch with more updates, or the small one with fewer
    accuracies: pd.DataFrame  # columns small, large and between; a row per repeat that all three completed

    @property
    def gap(self) -> stats.Mean:
        """Small minus large, paired by repeat."""
        return stats.paired_difference(self.accuracies["small"], self.accuracies["large"])

    def cost(self, part: Part) -> stats.Mean:
        """What a part costs in test accuracy, with its interval."""
        return stats.paired_difference(*self._ends(part))

    def lost(self, part: Part) -> pd.Series:
        """The same of each repeat; what rounding leaves of equal accuracies is nothing."""
        better, worse = self._ends(part)
        return (better - worse).round(12)

    def _ends(self, part: Part) -> tuple[pd.Series, pd.Series]:
        first = (part == "few_updates") == (part_of(self.between.factors) == FEWER_UPDATES)
        better, worse = ("small", "between") if first else ("between", "large")
        return self.accuracies[better], self.accuracies[worse]

    @property
    def cells(self) -> tuple[Cell, Cell, Cell]:
        """The three."""
        return self.small, self.between, self.large

    def beside(self, others: list[Split], **changes: str) -> Split | None:
        """Of other splits the one whose cells differ in an optimizer or a smoothing alone."""
        return next((other for other in others if other.between == self.between.but(**changes)), None)


def list_splits(study: StudySpec, confirmed: pd.DataFrame) -> list[Split]:
    """The splits that a study asks for, in the order of its cells.

    Args:
        study: the study.
        confirmed: `load.confirmed` of its folder.
    """
    found = []
    for between in study.list_cells():
        if part_of(between.factors):
            small, large = study.ends(between)
            of_cells = {"small": small, "large": large, "between": between}
            accuracies = {name: accuracy_by_repeat(confirmed, cell.name) for name, cell in of_cells.items()}
            found.append(Split(small, large, between, pd.DataFrame(accuracies).dropna()))
    return found


def saved(without: Split, having: Split, part: Part) -> stats.Mean:
    """By how much less a part costs in one split than in another, paired by repeat."""
    return stats.paired_difference(without.lost(part), having.lost(part))


def split_table(study: StudySpec, confirmed: pd.DataFrame) -> pd.DataFrame:
    """A row per split; all accuracies are fractions, and differences have 95 % intervals.

    Columns: `budget`, in which way the gap is split; `small_accuracy`, `between_accuracy` and `large_accuracy`, means
    over the `n` repeats that all three cells completed (alone, where they have none in common); `gap` and its parts
    `few_updates` and `less_noise`; `few_updates_repaired` and `less_noise_repaired`, by how much less the part costs
    with the row's smoothing than without, over `repaired_n` repeats; `images`, how many a run of the gap sees, and
    `between_images`, those of the run that splits it; `note`, what is missing and why.

    Raises:
        StudyError: the study asks for none.
    """
    if not any(part_of(cell.factors) for cell in study.list_cells()):
        raise StudyError(
            f"{study.name} does not split its gaps: it has no cells with another number of updates; "
            f"`cells.{KEY}: [{SAME_EPOCHS}, {PARTS[0]}]` asks for them, or {PARTS[1]}"
        )
    splits = list_splits(study, confirmed)
    rows = [_row(split, splits, confirmed) for split in splits]
    return pd.DataFrame(rows, columns=with_factors(COLUMNS, study)).astype(COLUMNS)


def _row(split: Split, splits: list[Split], confirmed: pd.DataFrame) -> dict[str, object]:
    row: dict[str, object] = {
        **split.between.values, "small_batch": split.small.batch_size, "large_batch": split.large.batch_size,
        "n": len(split.accuracies),
    }  # fmt: skip
    for name, cell in (("images", split.small), ("between_images", split.between)):
        seen = images(confirmed, cell)
        row[name] = None if isnan(seen) else round(seen)
    for name, cell in zip(("small", "between", "large"), split.cells, strict=True):
        own = split.accuracies[name]
        row[f"{name}_accuracy"] = (own if len(own) else accuracy_by_repeat(confirmed, cell.name)).mean()
    estimates = {"gap": split.gap} | {part: split.cost(part) for part in PARTS_OF_GAP}
    plain = split.beside(splits, smoothing="none")
    if plain and plain != split:
        repaired = {f"{part}_repaired": saved(plain, split, part) for part in PARTS_OF_GAP}
        row["repaired_n"] = repaired["few_updates_repaired"].n
        estimates |= repaired
    for name, estimate in estimates.items():
        row |= {name: estimate.value, f"{name}_low": estimate.low, f"{name}_high": estimate.high}
    accuracies = {cell.name: accuracy_by_repeat(confirmed, cell.name) for cell in split.cells}
    notes = dict.fromkeys(absence(cell, accuracies, confirmed) for cell in split.cells)
    if all(len(own) for own in accuracies.values()) and split.accuracies.empty:
        notes["its cells have no repeats in common"] = None
    row["note"] = "; ".join(note for note in notes if note)
    return row


def images(confirmed: pd.DataFrame, cell: Cell) -> float:
    """Training images that a run of a cell's best configuration has seen; NaN where none has completed."""
    runs = winners(confirmed[(confirmed["cell"] == cell.name) & (confirmed["status"] == "completed")])
    return float(runs["images"].mean())
