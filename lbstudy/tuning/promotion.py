"""No cell goes without a result because its trials were pruned against one that later diverged or failed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lbstudy.records.folder import StudyFolder
from lbstudy.records.trial import FINISHED, TrialRecord
from lbstudy.study.objective import sort_key
from lbstudy.study.spec import StudySpec


def promote(
    folder: StudyFolder, study: StudySpec, records: Sequence[TrialRecord], notice: Callable[[str], None]
) -> bool:
    """Of each cell whose trials have all ended and none completed, let the best pruned one go on to its end.

    ASHA ends a trial by what the others had reached by then. It cannot know that those will diverge, and so a cell may
    end without a trial that has had the whole budget. The one that got furthest, and among those the best, is marked
    as promoted and running: taken up, it is trained anew, to the same bits, and no longer pruned.

    Args:
        folder: the study's folder.
        study: the study.
        records: its trials, as the folder holds them.
        notice: is told of each.

    Returns:
        Whether there are any.
    """
    promoted = False
    for cell in study.list_cells():
        own = [record for record in records if record.cell == cell.name and record.number < study.tuning.trials]
        pruned = [record for record in own if record.status == "pruned" and record.epochs]
        ended = len(own) == study.tuning.trials and all(record.status in FINISHED for record in own)
        if not ended or not pruned or any(record.status == "completed" for record in own):
            continue
        best = min(pruned, key=lambda record: (-record.epochs, sort_key(study.tuning, record.metrics), record.number))
        notice(
            f"{cell.name}: of its {len(own)} trials none completed; trial {best.number}, pruned after epoch "
            f"{best.epochs}, is trained to its end"
        )
        best.status, best.promoted = "running", True
        folder.write_trial(best)
        promoted = True
    return promoted
