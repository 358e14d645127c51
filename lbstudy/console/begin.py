"""What `lbstudy init` writes: a study to begin with, its schema for editors, and the files of a place to run it."""

from __future__ import annotations

import shutil
from enum import StrEnum
from pathlib import Path

from lbstudy.study.file import StudyError, writing
from lbstudy.study.load import PACKAGE

FIRST_STUDY = "my_study.yaml"
SCHEMA = "study.schema.json"


class Place(StrEnum):
    """Where studies run, apart from this machine."""

    aws = "aws"
    onprem = "onprem"
    slurm = "slurm"
    kubernetes = "kubernetes"


KUBERNETES = ("Containerfile", "rayjob.yaml", "raycluster.yaml", "storage.yaml")
FILES = {
    Place.aws: ["cluster.yaml"],
    Place.onprem: ["clusters/onprem.yaml"],
    Place.slurm: ["clusters/slurm.sh"],
    Place.kubernetes: [f"clusters/kubernetes/{name}" for name in KUBERNETES],
}
"""The files of each place, in this package where it is installed, or else in the source tree."""


def begin(folder: Path, place: Place | None) -> list[Path]:
    """Write a study to begin with into a folder, and the files of a place; returns their paths.

    Raises:
        StudyError: one of them is there already, and nothing is written; or the folder cannot be written.
    """
    sources = {FIRST_STUDY: Path(__file__).with_name("first_study.yaml"), SCHEMA: _shipped(f"search_spaces/{SCHEMA}")}
    sources |= {name: _shipped(name) for name in (FILES[place] if place else [])}
    with writing(folder):
        if there := [str(folder / name) for name in sources if (folder / name).exists()]:
            raise StudyError(f"{', '.join(there)}: already there, and not overwritten; choose another folder")
        for name, source in sources.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, folder / name)
    return [folder / name for name in sources]


def _shipped(name: str) -> Path:
    return next(path for root in (PACKAGE, PACKAGE.parent) if (path := root / name).is_file())
