"""Several studies side by side: the tables of each, and what it says about the claims, with a column for the study.

Rows of one cell stand together, in the order of the studies. Each study is judged by itself, with targets of its own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import pandas as pd

from lbstudy.analysis import load
from lbstudy.analysis.figures import style
from lbstudy.analysis.figures.compared import compared_info, draw_compared
from lbstudy.analysis.minima import results
from lbstudy.analysis.report import claims, evidence
from lbstudy.analysis.tables import best as tables
from lbstudy.analysis.tables import gaps, health, targets
from lbstudy.analysis.tables import minima as minima_table
from lbstudy.records.folder import StudyFolder
from lbstudy.storage import StoragePath, locate, real_path
from lbstudy.study.file import StudyError, writing
from lbstudy.study.spec import StudySpec

Kind = Literal["best", "gap", "targets", "claims"]

APART = {"name", "source", "labels", "resources", "code", "cells", "published"}
"""Keys of a study in which two may differ without another question being asked; cells are compared by themselves."""

LISTED = 6
"""Cells and values that are named."""


class Compared(NamedTuple):
    """One of the studies."""

    name: str  # its own, or its folder's address where two have the same
    folder: StudyFolder
    study: StudySpec


def open_all(places: Sequence[str]) -> list[Compared]:
    """The studies in these folders.

    Raises:
        StudyError: fewer than two, one folder twice, or a folder that holds no study.
    """
    if len(places) < 2:
        raise StudyError("compare: two studies or more, each by its folder; got " + (", ".join(places) or "none"))
    folders = [load.Snapshot(StudyFolder.open(place)) for place in places]
    addresses = [str(real_path(folder.path)) for folder in folders]
    if twice := [place for place, count in Counter(addresses).items() if count > 1]:
        raise StudyError(f"compare: {twice[0]} is given twice; a study does not differ from itself")
    studies = [folder.study() for folder in folders]
    names = Counter(study.name for study in studies)
    return [
        Compared(study.name if names[study.name] == 1 else str(folder.path), folder, study)
        for folder, study in zip(folders, studies, strict=True)
    ]


def compare(studies: Sequence[Compared], kind: Kind) -> pd.DataFrame:
    """The table of this kind of each study, rows of one cell (or claim) together, with a column `study` first."""
    found = []
    for name, folder, study in studies:
        table = TABLES[kind](folder, study)
        table.insert(0, "study", name)
        found.append(table)
    together = pd.concat([table for table in found if len(table)] or found[:1], ignore_index=True)
    keys = [key for key in KEYS[kind] if key in together]
    if keys:
        together = together.iloc[together.groupby(keys, sort=False, dropna=False).ngroup().argsort(kind="stable")]
    return together.reset_index(drop=True)


def require_figure(where: str) -> None:
    """Whether a figure can be written into this file.

    Raises:
        StudyError: the file is of no kind that can be written, or its folder is missing.
    """
    path = locate(where)
    if path.name.rpartition(".")[2] not in get_args(style.Format):
        raise StudyError(f"{where}: a figure ends in {', '.join(f'.{kind}' for kind in get_args(style.Format))}")
    if isinstance(path, Path) and not path.parent.is_dir():
        raise StudyError(f"{where}: there is no folder {path.parent}")


def write_figure(studies: Sequence[Compared], where: str) -> StoragePath:
    """Draw the test accuracies of the studies into a file; returns its path.

    Raises:
        StudyError: the file is of no kind that can be written, or there is nothing to draw.
    """
    require_figure(where)
    path = locate(where)
    try:
        found = [(name, study, load.confirmed(folder)) for name, folder, study in studies]
        with writing(where):
            style.write(draw_compared(compared_info(found)), path)
    except style.NothingToDraw as nothing:
        raise StudyError(f"{where}: {nothing}") from nothing
    return path


def _gap(folder: StudyFolder, study: StudySpec) -> pd.DataFrame:
    return gaps.gap_table(study, load.confirmed(folder))


def _targets(folder: StudyFolder, study: StudySpec) -> pd.DataFrame:
    return targets.targets_table(study, load.confirmed(folder), load.confirmed_epochs(folder))


def _claims(folder: StudyFolder, study: StudySpec) -> pd.DataFrame:
    """A row per claim: its verdict, and what it rests on."""
    rows = [
        {
            "claim": claim.claim,
            "verdict": claim.verdict,
            "because": " ".join(comparison.sentence for comparison in claim.comparisons),
        }
        for claim in judge(folder)
    ]
    return pd.DataFrame(rows, columns=["claim", "verdict", "because"])


def judge(folder: StudyFolder) -> list[claims.Claim]:
    """What a study says about each claim."""
    folder = load.Snapshot.of(folder)
    study, confirmed, epochs = folder.study(), load.confirmed(folder), load.confirmed_epochs(folder)
    gap_table = gaps.gap_table(study, confirmed)
    measured = results.sharpness(folder), results.landscape(folder, "line")
    minima = minima_table.runs(confirmed, *measured)
    found = [evidence.sought(part, confirmed, epochs) for part in study.compared()]
    return list(evidence.judge(found, confirmed, gap_table, minima))


TABLES: dict[Kind, Callable[[StudyFolder, StudySpec], pd.DataFrame]] = {
    "best": lambda folder, study: tables.best_configs(folder),
    "gap": _gap,
    "targets": _targets,
    "claims": _claims,
}

_CELL = ["optimizer", "batch_size", "smoothing"]
KEYS: dict[Kind, list[str]] = {
    "best": _CELL,
    "gap": ["optimizer", "large_batch", "smoothing"],
    "targets": [*_CELL, "metric"],
    "claims": ["claim"],
}
"""Columns whose values bring rows together."""


def remarks(studies: Sequence[Compared]) -> Iterator[str]:
    """What a reader must know before comparing: what the studies differ in, and cells that not all of them have."""
    same = [name for name, count in Counter(study.name for *_, study in studies).items() if count > 1]
    for name in same:
        yield f"{name} is the name of more than one study: they go by their folders"
    settings = [_settings(study.model_dump(mode="json", by_alias=True, exclude=APART)) for *_, study in studies]
    differing = []
    for key in dict.fromkeys(chain.from_iterable(settings)):
        values = list(dict.fromkeys(str(entry.get(key, "-")) for entry in settings))
        if len(values) > 1:
            short = ", ".join(values)
            differing.append(f"{key} ({short})" if len(short) <= 40 else key)
    if differing:
        yield f"the studies differ in {_listed(differing)}"
    cells = {name: {cell.name for cell in study.list_cells()} for name, _, study in studies}
    everywhere = set.intersection(*cells.values())
    if not everywhere:
        yield "no cell is in all of the studies"
        return
    for name, _, study in studies:
        if own := [cell.name for cell in study.list_cells() if cell.name not in everywhere]:
            yield f"{name} has cells that others have not: {_listed(own)}"


def missing(studies: Sequence[Compared]) -> Iterator[str]:
    """What is not there yet of each study, or damaged."""
    for name, folder, study in studies:
        trials = load.trials(folder)
        confirmed = load.confirmed(folder)
        damaged = load.list_damaged(trials, confirmed, load.confirmed_epochs(folder))
        for sentence in health.list_missing(study, trials, confirmed) + damaged:
            yield f"{name}: {sentence}"


def _settings(content: dict[str, Any], above: str = "") -> dict[str, Any]:
    """Nested settings by dotted keys."""
    found: dict[str, Any] = {}
    for key, value in content.items():
        if isinstance(value, dict):
            found |= _settings(value, f"{above}{key}.")
        else:
            found[above + key] = value
    return found


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more
