"""What a study leaves on disk; the only code that reads and writes it. docs/study-folder.md shows what lies where.

A trial is its cell and number. Its record (`trial.json`) and its checkpoint are replaced in one step and carry a
checksum; its series (`epochs.jsonl`) grows by a line per epoch, and a line cut short by a crash does not count. So a
driver that dies between any two operations leaves a readable study. This module imports neither torch nor ray.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from itertools import compress
from typing import Any, Literal

from pydantic_core import from_json

from lbstudy import storage
from lbstudy.records.checksum import Damaged, checked, state_header, with_checksum
from lbstudy.records.code import differences, write_code
from lbstudy.records.provenance import environment, following, other_versions
from lbstudy.records.trial import TrialRecord
from lbstudy.records.writes import Change, Writes, writes_for
from lbstudy.storage import StoragePath
from lbstudy.study.code import Code
from lbstudy.study.file import StudyError, writing
from lbstudy.study.load import read_study
from lbstudy.study.run import Target
from lbstudy.study.spec import StudySpec

NO_CODE = Code()
LOCK = "driver.lock"
CONFIRMATION = "confirm"
DATA = "data.json"
DataFact = Literal["classes", "training images"]
TARGET = "target"
CHANGEABLE = {"published", "resources", "labels"}
"""Keys of a study that may change once trials exist."""


class Series:
    """A trial's metrics by epoch, as the one who writes them sees them."""

    def __init__(self, lines: storage.Appender, change: Callable[[Change], None]):
        self._lines, self._change = lines, change

    def add(self, report: dict[str, Any]) -> None:
        """Add an epoch's metrics."""
        self._change(partial(self._lines.append, json.dumps(report).encode() + b"\n"))


class StudyFolder:
    """A study's folder, on a file system or in an object store.

    Args:
        path: the folder.
        writes: makes the changes to its trials; default: at once.
    """

    def __init__(self, path: StoragePath, writes: Writes | None = None):
        self.path = path
        self._writes = writes or Writes()

    def for_driver(self) -> StudyFolder:
        """The folder as the driver of many lanes writes to it: in an object store it does not wait for each change."""
        return StudyFolder(self.path, writes_for(self.path))

    def settle(self) -> None:
        """Wait until all changes have been made.

        Raises:
            OSError: one has failed.
        """
        self._writes.wait()

    def after(self, record: TrialRecord, call: Change) -> None:
        """Call something when all changes to a trial until now have been made."""
        self._change(record, call)

    def _change(self, record: TrialRecord, change: Change) -> None:
        self._writes.do(_key(record), change)

    @classmethod
    def check(cls, path: StoragePath, study: StudySpec, code: Code = NO_CODE) -> None:
        """Make sure that a study can begin, or go on, with this code in this folder; leaves nothing behind.

        Raises:
            StudyError: the folder holds something else, or a study of which `study` is no extension, or cannot be
                written.
        """
        with writing(path):
            if (path / "study.yaml").is_file():
                cls(path).require_extension(study, code)
            elif path.exists() and any(entry.name != LOCK for entry in path.iterdir()):
                raise StudyError(f"{path} is not empty and holds no study; choose another --storage or --name")
            storage.require_writable(path)

    @classmethod
    def create(cls, path: StoragePath, study: StudySpec, code: Code = NO_CODE) -> StudyFolder:
        """Begin a study in a new or empty folder, or take up the one that lies there. Its code is copied there.

        Raises:
            StudyError: the folder cannot be used, or holds a study that differs in more than `study` may extend.
        """
        cls.check(path, study, code)
        folder = cls(path)
        with writing(path):
            path.mkdir(parents=True, exist_ok=True)
            study = folder.with_found_target(study)
            storage.write(path / "study.yaml", _with_copy(study, code).to_yaml().encode())
            if code:
                write_code(path, code)
            storage.write(path / "environment.json", json.dumps(following(folder.environment()), indent=2).encode())
        return folder

    @classmethod
    def open(cls, where: str | StoragePath) -> StudyFolder:
        """An existing study.

        Args:
            where: its folder, or the address of its folder in an object store (`s3://bucket/studies/mine`).

        Raises:
            StudyError: the folder holds no study.
            StorageError: the object store does not answer or refuses.
        """
        path = storage.locate(where)
        if not (path / "study.yaml").is_file():
            raise StudyError(f"{path}: no study here; a study's folder holds a study.yaml")
        if path.name == CONFIRMATION and (path.parent / "study.yaml").is_file():
            raise StudyError(f"{path}: these are the confirmed runs of a study; its folder is {path.parent}")
        return cls(path)

    def study(self) -> StudySpec:
        """The study as it was resolved when it began, or was last extended."""
        return read_study(self.path / "study.yaml")

    def environment(self) -> dict[str, Any]:
        """How the last driver began, as `provenance.environment` tells it; empty where nothing sound says so."""
        try:
            found = json.loads((self.path / "environment.json").read_bytes())
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def other_versions(self) -> list[str]:
        """With which versions the last driver here began, or that of the confirmed runs, where this process has others:
        a line for each. They are told and not refused: what they change of results, nobody knows."""
        now = environment()
        found = [*other_versions(self.environment(), now), *other_versions(self.confirmation.environment(), now)]
        return list(dict.fromkeys(found))

    def require_extension(self, study: StudySpec, code: Code = NO_CODE) -> None:
        """Make sure that `study` is the one that lies here, or more of it: more trials or cells, other resources.

        Raises:
            StudyError: with a diff of the two, or of the checksums of their code.
        """
        old, study = self.study(), _with_copy(self.with_found_target(study), code)
        if code and (changed := differences(self.path, code)):
            raise StudyError(
                f"{self.path} holds a study that ran with other code. Choose another --name, or take back:\n"
                + "\n".join(changed)
            )
        shrunk = set(old.list_cells()) - set(study.list_cells()) or study.tuning.trials < old.tuning.trials
        one_each = {cell.factors: cell for cell in old.list_cells()}.values()
        if not shrunk and all(_essence(old.variant(cell)) == _essence(study.variant(cell)) for cell in one_each):
            return
        asked = study.model_copy(update={key: getattr(old, key) for key in CHANGEABLE})
        texts = (old.to_yaml().splitlines(), asked.to_yaml().splitlines())  # what may differ is not to take back
        diff = list(difflib.unified_diff(*texts, lineterm="", n=0))[2:]
        raise StudyError(
            f"{self.path} holds another study; it may get more trials, more cells and other resources, and nothing "
            "else. Choose another --name, or take back:\n" + "\n".join(line for line in diff if line[0] in "+-")
        )

    def require_same_data(self, found: Mapping[str, dict[str, Any]]) -> bool:
        """Make sure that data are those that the study has run on.

        Args:
            found: by dataset, what it is known again by (`datasets.identities`).

        Returns:
            Whether the study has kept what its data are known by; older ones have not.

        Raises:
            StudyError: says what differs.
        """
        kept = self._data_kept()
        changed = [
            f"{name}: {kept[key].get(name)} then, {value} now"
            for key, facts in found.items()
            if key in kept
            for name, value in facts.items()
            if kept[key].get(name) != value
        ]
        if changed:
            raise StudyError(
                f"{self.path} holds a study of other data. Point --data at those, or choose another --name:\n"
                + "\n".join(changed)
            )
        return bool(kept)

    def keep_data(self, found: Mapping[str, dict[str, Any]]) -> None:
        """Keep what the data are known again by; those of cells that were there before have been found equal."""
        storage.write(self.path / DATA, json.dumps(self._data_kept() | dict(found), indent=2).encode())

    def of_data(self, fact: DataFact) -> int | None:
        """A number that its data are known by; None where no driver has said it, or its cells differ in it."""
        found = {entry.get(fact) for entry in self._data_kept().values()}
        return found.pop() if len(found) == 1 else None

    def _data_kept(self) -> dict[str, dict[str, Any]]:
        """What the study's data are known again by, as far as it has been kept."""
        try:
            return dict(json.loads(storage.read(self.path / DATA) or b"{}"))
        except ValueError:  # damaged: known again from now on
            return {}

    @property
    def journal(self) -> StoragePath:
        """Optuna's journal of all cells."""
        return self.path / "optuna.journal"

    @property
    def confirmation(self) -> StudyFolder:
        """The folder of the study's confirmed runs, which may not exist: laid out like a study's."""
        return StudyFolder(self.path / CONFIRMATION)

    @property
    def target(self) -> StudyFolder:
        """The folder of the study of the plain small-batch cell that gives a study its target `auto`, if it has one."""
        return StudyFolder(self.path / TARGET)

    def fix_target(self, study: StudySpec, accuracy: float, code: Code = NO_CODE) -> None:
        """Write down the target that was found for a study that asked for one; it keeps it from then on."""
        settled = study.aimed_at(Target(val_accuracy=accuracy))
        storage.write(self.path / "study.yaml", _with_copy(settled, code).to_yaml().encode())

    def with_found_target(self, study: StudySpec) -> StudySpec:
        """The study, with the target that was found for it if it asks for one and there is one."""
        if study.tuning.target != "auto" or not (self.target.path / "study.yaml").is_file():
            return study
        return study.aimed_at(self.study().tuning.target)

    def write_trial(self, record: TrialRecord) -> None:
        """Write or replace a trial's record in one step."""
        folder, content = self.trial_folder(record), with_checksum(json.dumps(record.write()).encode())

        def write() -> None:
            folder.mkdir(parents=True, exist_ok=True)
            storage.write(folder / "trial.json", content)

        self._change(record, write)

    def append_epoch(self, record: TrialRecord, report: dict[str, Any]) -> None:
        """Add an epoch's metrics to a trial's series."""
        self.series(record).add(report)

    def series(self, record: TrialRecord) -> Series:
        """A trial's series, for the driver, who adds to it epoch after epoch."""
        return Series(storage.Appender(self._epochs_file(record)), partial(self._change, record))

    def drop_epochs(self, record: TrialRecord) -> None:
        """Remove a trial's series, if there is one."""
        self._change(record, partial(self._epochs_file(record).unlink, missing_ok=True))

    def keep_epochs(self, record: TrialRecord, count: int) -> None:
        """Cut a trial's series to its first epochs, for the rest will be redone."""
        series = self.epochs(record)
        if not self.trial_folder(record).exists():
            return
        content = "".join(json.dumps(entry) + "\n" for entry in series[:count]).encode()
        self._change(record, partial(storage.write, self._epochs_file(record), content))

    def write_state(self, record: TrialRecord, name: str, epoch: int, state: bytes) -> None:
        """Keep a trial's state after an epoch: its latest `checkpoint`, or a model.

        Models are the final one (`model`) and, of a confirmed run, the `best` one on the validation split and those on
        its way (`epoch-0010`, see `model_name`).
        """
        path = self.trial_folder(record) / f"{name}.pt"
        self._change(record, lambda: storage.write(path, state_header(epoch, state) + state))

    def read_state(self, record: TrialRecord, name: str) -> tuple[int, bytes] | None:
        """A trial's state and its epoch, or None if there is none.

        Raises:
            Damaged: it is not what was written.
        """
        self._writes.wait(_key(record))
        path = self.trial_folder(record) / f"{name}.pt"
        content = storage.read(path)
        if content is None:
            return None
        header, _, state = content.partition(b"\n")
        epoch = header.partition(b" ")[2]
        if not epoch.isdigit() or state_header(int(epoch), state) != header + b"\n":
            raise Damaged(str(path))
        return int(epoch), state

    def models_on_the_way(self, record: TrialRecord) -> list[str]:
        """The names of the models that a confirmed run has kept on its way, in their order (`epoch-0010`, ...)."""
        return sorted(path.name.removesuffix(".pt") for path in self.trial_folder(record).glob("epoch-*.pt"))

    def with_state(self, cell: str, name: str) -> set[int]:
        """The numbers of a cell's trials that have a state of this name."""
        paths = (self.path / f"trials/{cell}").glob(f"*/{name}.pt")
        return {_number(path.parent.name) for path in paths} - {-1}

    def drop_state(self, record: TrialRecord, name: str, behind: TrialRecord | None = None) -> None:
        """Remove a trial's state.

        Args:
            record: the trial.
            name: of the state.
            behind: another trial, whose changes until now are made before.
        """
        path = self.trial_folder(record) / f"{name}.pt"
        self._change(behind or record, partial(path.unlink, missing_ok=True))

    def scan(self, but: Container[tuple[str, int]] = ()) -> tuple[list[TrialRecord], list[StoragePath]]:
        """All trials by cell and number, and the records that cannot be trusted, copies in other folders among them.

        Args:
            but: cells and numbers of trials that are not asked for; their records are not read.
        """
        found = list(self.each(but))
        return [f for f in found if isinstance(f, TrialRecord)], [f for f in found if not isinstance(f, TrialRecord)]

    def each(self, but: Container[tuple[str, int]] = ()) -> Iterator[TrialRecord | StoragePath]:
        """What `scan` finds, one by one: a trial, or the path of a record that cannot be trusted."""
        self._writes.wait()
        found: list[StoragePath] = sorted((self.path / "trials").glob("*/*/trial.json"))
        places = [(path.parent.parent.name, path.parent.name) for path in found]
        if but:
            kept = [(cell, _number(name)) not in but for cell, name in places]
            found, places = list(compress(found, kept)), list(compress(places, kept))
        for path, place, content in zip(found, places, storage.read_all(found), strict=True):
            try:
                record = TrialRecord.read(_parsed(checked(content)))
                if place != (record.cell, f"{record.number:04d}"):
                    raise Damaged("a copy")
                yield record
            except (Damaged, ValueError, TypeError):
                yield path

    def trials(self) -> list[TrialRecord]:
        """All trials with a sound record, by cell and number."""
        return self.scan()[0]

    def epochs(self, record: TrialRecord) -> list[dict[str, Any]]:
        """A trial's metrics, an entry per epoch; what follows a damaged line does not count."""
        self._writes.wait(_key(record))
        lines = (storage.read(self._epochs_file(record)) or b"").splitlines(keepends=True)
        with suppress(ValueError):  # all at once, as long as all are sound
            entries = from_json(b"[" + b",".join(lines) + b"]")
            if _sound(entries) == len(lines) and (not lines or lines[-1].endswith(b"\n")):
                return list(entries)
        entries = []
        for line in lines:
            try:
                entry = json.loads(line) if line.endswith(b"\n") else None
            except ValueError:
                entry = None
            entries.append(entry)
        return list(entries[: _sound(entries)])

    def _epochs_file(self, record: TrialRecord) -> StoragePath:
        return self.path / f"trials/{_key(record)}/epochs.jsonl"

    def trial_folder(self, record: TrialRecord) -> StoragePath:
        """Where a trial's files lie."""
        return self.path / f"trials/{_key(record)}"


def model_name(epoch: int) -> str:
    """The name of the model that a confirmed run keeps after this epoch."""
    return f"epoch-{epoch:04d}"


def set_aside(path: StoragePath) -> StoragePath:
    """Rename a damaged file, so that it can be looked at but is not read again; returns its new path."""
    aside = path.with_name(path.name + ".damaged")
    path.replace(aside)  # type: ignore[arg-type]  # of the same kind
    return aside


def _key(record: TrialRecord) -> str:
    """What tells a trial from all others of its study."""
    return f"{record.cell}/{record.number:04d}"


def _parsed(content: bytes) -> Any:
    """What JSON holds. The fast parser refuses halves of characters, which names of files in an error may have."""
    try:
        return from_json(content)
    except ValueError:
        return json.loads(content)


def _sound(entries: Sequence[Any]) -> int:
    """So many entries of a series, from its beginning, are epochs in their order."""
    for count, entry in enumerate(entries):
        if not isinstance(entry, dict) or entry.get("epoch") != count + 1:
            return count
    return len(entries)


def _number(name: str) -> int:
    """Of a trial, from the name of its folder; -1 where that is none."""
    return int(name) if name.isdecimal() else -1


def _with_copy(study: StudySpec, code: Code) -> StudySpec:
    """The study, which finds its code in the copy."""
    return study.model_copy(update={"code": code.names}) if code else study


def _essence(study: StudySpec) -> dict[str, Any]:
    """What of a study must not change once trials exist."""
    dump = study.model_dump(mode="json", by_alias=True, exclude_none=True, exclude=CHANGEABLE | {"cells"})
    for section, key in (
        ("tuning", "trials"),
        *(("dataset", name) for name in ("root", "index", "download", "residency")),
    ):
        dump[section].pop(key, None)
    return dump
