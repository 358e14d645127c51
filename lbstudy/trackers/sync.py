"""Brings a tracker up to date with a study's records, once or again and again."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager

from lbstudy.records.folder import StudyFolder
from lbstudy.records.lock import DriverLock, is_held
from lbstudy.records.trial import FINISHED, TrialRecord
from lbstudy.study.file import StudyError
from lbstudy.study.spec import TrackerName
from lbstudy.trackers import Held, Tracker, open_tracker
from lbstudy.trackers.trial import CONFIRMED, TUNING, Key, identity, tracked, trackers_folder

NOTHING = Held(0, ended=False)


class Sync:
    """What a tracker has of a study, and what it lacks.

    Args:
        folder: the study's folder.
        tracker: asked once what it has; again after an error.
    """

    def __init__(self, folder: StudyFolder, tracker: Tracker):
        self._folders, self._tracker = {TUNING: folder, CONFIRMED: folder.confirmation}, tracker
        self._study, self._identity = folder.study().name, identity(folder)
        self._held: dict[Key, Held] | None = None
        self.told = 0  # trials of which there was something new, so far

    def once(self) -> None:
        """Tell the tracker what is new in the records.

        Raises:
            Exception: what the tracker's library raises; the next call goes on.
        """
        if self._held is None:
            self._held = self._tracker.held()
        try:
            for kind, folder in self._folders.items():
                self._tell(kind, folder, self._held)
        except Exception:
            self._held = None  # what has reached the tracker, it knows best
            raise

    def _tell(self, kind: str, folder: StudyFolder, held: dict[Key, Held]) -> None:
        over = {(cell, number) for (of, cell, number), state in held.items() if of == kind and state.ended}

        def bring_up(record: TrialRecord) -> bool:
            if self._tracker.at_end and record.status not in FINISHED:
                return False
            trial = tracked(self._study, self._identity, kind, record, folder.epochs(record))
            before = held.get(trial.key, NOTHING)
            if trial.key in held and not trial.has_ended and len(trial.points) <= before.epochs:
                return False
            self._tracker.write(trial, before.epochs)
            held[trial.key] = Held(max(before.epochs, len(trial.points)), trial.has_ended)
            return True

        with ThreadPoolExecutor(self._tracker.writers) as pool:
            for told in pool.map(bring_up, folder.scan(but=over)[0]):
                self.told += told


@contextmanager
def opened(folder: StudyFolder, name: TrackerName) -> Iterator[tuple[Sync, Tracker]]:
    """The tracker of a study, which nobody else tells of it meanwhile.

    Raises:
        StudyError: somebody else is at it.
    """
    where = trackers_folder(folder) / name
    with ExitStack() as held:
        try:
            held.enter_context(DriverLock(where, notice=lambda message: None))
        except StudyError as error:
            if not is_held(where):
                raise
            raise StudyError(
                f"{folder.path}: {name} is being brought up to date already, by the study's driver or by another "
                "`lbstudy track`"
            ) from error
        tracker = open_tracker(name, folder)
        yield Sync(folder, tracker), tracker
