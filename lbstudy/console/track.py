"""What `lbstudy track` does: trackers brought up to date with a study's records."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum

from lbstudy import trackers
from lbstudy.console.session import err
from lbstudy.records.folder import StudyFolder
from lbstudy.storage import StorageError
from lbstudy.study.file import StudyError
from lbstudy.study.spec import TrackerName
from lbstudy.trackers.sync import opened


class TrackerChoice(StrEnum):
    """The trackers that there are."""

    tensorboard = "tensorboard"
    mlflow = "mlflow"
    wandb = "wandb"


def track_study(folder: StudyFolder, to: Sequence[TrackerChoice] | None) -> None:
    """Tell trackers what they lack of a study.

    Args:
        folder: the study's folder.
        to: the trackers; those that the study names where there are none.

    Raises:
        StudyError: there are none, or one cannot be used, does not answer or refuses; what it was told stays.
    """
    names: list[TrackerName] = [choice.value for choice in to] if to else folder.study().resources.track
    if not names:
        raise StudyError(f"{folder.path}: this study names no tracker; choose one: --to tensorboard, mlflow or wandb")
    trackers.require(names)
    for name in dict.fromkeys(names):
        try:
            with err.status(f"telling {name}"), opened(folder, name) as (sync, tracker):
                sync.once()
        except (StudyError, StorageError):
            raise
        except Exception as error:  # whatever the tracker's library raises
            reason = " ".join(str(error).split())[:300]
            raise StudyError(f"{name}: {type(error).__name__}: {reason}; the same command goes on from here") from error
        print(f"{name}: {sync.told} trials told, the others were up to date: {tracker.place}")
