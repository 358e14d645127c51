"""Reading a study file: YAML becomes a `StudySpec`, or a `StudyError`.

The error names file, line, key and what is allowed, for all problems at once.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from lbstudy.storage import ObjectPath, StoragePath, locate
from lbstudy.study.checks import Checks, contradictions, never_apply
from lbstudy.study.factor_checks import misfits, misuses
from lbstudy.study.factors import filled, of_cells
from lbstudy.study.file import Problem, StudyError, StudyFile, explain, nearest, truths_as_numbers
from lbstudy.study.spec import StudySpec
from lbstudy.study.split import expanded

PACKAGE = Path(__file__).parents[1]
SHIPPED_STUDIES = [PACKAGE / "search_spaces", PACKAGE.parent / "search_spaces"]
"""Where the shipped study files lie: in the installed package, or in the source tree."""


def find_study(file: str) -> StoragePath:
    """The path of a study file: as given, or that of a study's folder, or else a shipped study by its name."""
    path = locate(file)
    if (path / "study.yaml").is_file():
        return path / "study.yaml"
    if path.is_file():
        return path
    if isinstance(path, ObjectPath) or path.is_dir():
        raise StudyError(f"{file}: no study here; a study's folder holds a study.yaml")
    name = path.name if path.suffix else f"{path.name}.yaml"
    for folder in SHIPPED_STUDIES:
        if path.parent == Path() and (folder / name).is_file():
            return folder / name
    shipped = sorted({p.name for folder in SHIPPED_STUDIES for p in folder.glob("*.yaml")})
    hint = nearest(name, shipped, known_at_most=0)
    raise StudyError(f"{file}: no such study file{hint}; the shipped studies are {', '.join(shipped)}")


def read_study(path: StoragePath) -> StudySpec:
    """The study of a study's folder. Its methods are not asked: whoever looks at results needs none of them."""
    file = StudyFile(path)
    try:
        return StudySpec.model_validate(file.content)
    except ValidationError as error:
        raise file.error(explain(error, filled(expanded(file.content)), StudySpec)) from error


def check_study(
    file: StudyFile,
    written_by_hand: bool = False,
    study_class: type[StudySpec] = StudySpec,
    further: Checks = (),
    found: Iterable[Problem] = (),
) -> StudySpec:
    """The study that a file describes.

    Args:
        file: the file, read.
        written_by_hand: conditions that no cell meets are errors too, unless the command line changes the cells.
        study_class: knows what may be fixed.
        further: checks beside those of the study itself.
        found: problems that are known already.

    Raises:
        StudyError: all problems found, one a line, each with file, line, key and what is allowed.
    """
    problems = [*found, *truths_as_numbers(file.content, study_class)]
    broken = {str(problem.keys[0]) for problem in problems}
    content = expanded(file.content)
    wrong = list(misuses(content, study_class))
    if wrong:
        away = {str(problem.keys[0]) for problem in wrong}
        away |= {key.split(".")[0] for key in of_cells(content.get("cells"))} if "cells" in away else set()
        content = {name: value for name, value in content.items() if name not in away}
        content |= {name: value for name, value in STAND_INS.items() if name in away}
        problems, broken = problems + wrong, broken | away
    content = filled(content)
    try:
        study = study_class.model_validate(content)
    except ValidationError as error:
        problems += explain(error, content, study_class)
        broken |= {str(entry["loc"][0]) for entry in error.errors()}
        sound = {name: content[name] for name in StudySpec.model_fields if name in {*content} - broken}
        study = study_class.model_validate(STAND_INS | sound)
    misfitting = list(misfits(study))
    problems += misfitting or contradictions(study, broken, further)
    if written_by_hand and not misfitting and not file.changes("cells") and not {"cells", "search"} & broken:
        problems += never_apply(study)
    if problems:
        raise file.error(problems)
    return study


# For required sections that are broken, so that the sound ones can be checked; no check looks at these.
STAND_INS: dict[str, Any] = {
    "name": "broken",
    "model": "broken",
    "dataset": {"name": "digits"},
    "budget": {"epochs": 1},
    "cells": {"optimizer": ["broken"], "batch_size": [1], "smoothing": ["none"]},
    "search": {"learning_rate": [{"uniform": [1, 2]}]},
    "tuning": {"trials": 1},
}
