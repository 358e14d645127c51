"""A user's own code: the files that a study's `code` names, read whole, with their checksums.

Beside the study file the entries are files and folders; in a study's folder lies a copy, which is what the study ran
with. Nothing is imported here: `lbstudy.methods.user_code` does that, from the bytes that this module has read.
"""

from __future__ import annotations

import hashlib
import importlib.machinery
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath

from lbstudy import storage
from lbstudy.storage import StoragePath
from lbstudy.study.file import KeyProblems, Problem, StudyFile, show

FOLDER = "code"
CHECKSUMS = "code.json"
"""In a study's folder: the copy of the code, and its checksums."""

PACKAGE = Path(__file__).parents[1]
MOST_BYTES = 32_000_000
"""Code goes to every worker whole; what is larger is data, which `dataset.root` points at."""


@dataclass(frozen=True)
class Code:
    """Files of a user's own, and where they come from. Empty for a study that has none."""

    files: Mapping[str, bytes] = field(default_factory=dict)  # by path below the folder that they are imported from
    origins: Mapping[str, str] = field(default_factory=dict)  # of each entry, by the first part of these paths

    def __bool__(self) -> bool:
        return bool(self.files)

    @property
    def names(self) -> list[str]:
        """Of the entries: files and folders."""
        return sorted({path.partition("/")[0] for path in self.files})

    @cached_property
    def checksums(self) -> dict[str, str]:
        """SHA-256 of each file."""
        return {path: hashlib.sha256(content).hexdigest() for path, content in sorted(self.files.items())}

    @cached_property
    def digest(self) -> str:
        """SHA-256 of all names and checksums."""
        return hashlib.sha256(json.dumps(self.checksums).encode()).hexdigest()


def read_code(file: StudyFile) -> Code:
    """The code that a study file names: beside the file, or in a study's folder its copy.

    Raises:
        KeyProblems: an entry is missing, cannot be imported under its name, or would hide another module; or the copy
            is not what was written.
    """
    entries = file.content.get("code", [])
    if not isinstance(entries, list) or not all(isinstance(entry, str) for entry in entries):
        wanted = "input should be a list of files and folders beside the study file, such as [mine.py]"
        raise KeyProblems(Problem(("code",), f"{wanted}; got {show(entries)}"))
    folder = file.path.parent
    recorded = storage.read(folder / CHECKSUMS) if entries else None
    code = _beside(folder, entries) if recorded is None else _copied(folder, recorded)
    if recorded is not None and sorted(PurePosixPath(entry).name for entry in entries) != code.names:
        raise KeyProblems(Problem(("code",), f"this study ran with {', '.join(code.names)}; got {show(entries)}"))
    if (size := sum(map(len, code.files.values()))) > MOST_BYTES:
        reason = f"holds {size / 1e6:.0f} MB, but at most {MOST_BYTES / 1e6:.0f} go to every worker"
        raise KeyProblems(Problem(("code",), f"{reason}; data belongs where `dataset.root` points"))
    return code


def _beside(folder: StoragePath, entries: list[str]) -> Code:
    files: dict[str, bytes] = {}
    origins: dict[str, str] = {}
    problems = []
    for place, entry in enumerate(entries):
        path = folder / entry
        name = PurePosixPath(entry).name
        if reason := _unfit(name, path, origins):
            problems.append(Problem(("code", place), f"{entry}: {reason}"))
            continue
        origins[name] = str(path)
        try:
            found = dict(_walk(path, name))
        except OSError as error:
            problems.append(Problem(("code", place), f"{entry}: cannot be read: {error.strerror or error}"))
            continue
        if not found:
            problems.append(Problem(("code", place), f"{entry}: the folder holds no file"))
        files |= found
    if problems:
        raise KeyProblems(*problems)
    return Code(files, origins)


def _unfit(name: str, path: StoragePath, taken: Mapping[str, str]) -> str | None:
    """Why an entry cannot be part of the code, or None if it can."""
    if name in ("", ".."):
        return "names no file or folder"
    if not path.exists():
        return f"there is no such file or folder in {path.parent}"
    if name in taken:
        return f"its name is taken by {taken[name]}"
    module, _, ending = name.partition(".")
    if path.is_file() and ending != "py":
        return None  # data that a module reads
    if not module.isidentifier() or (path.is_dir() and ending):
        return "cannot be imported, for the name of a module is letters, digits and _, and does not begin with a digit"
    if module in {entry.partition(".")[0] for entry in taken}:
        return f"another entry is the module {module} as well"
    if module in sys.stdlib_module_names:
        return f"would hide Python's own module {module}; choose another name"
    if (where := _installed(module)) is not None:
        return f"would hide the installed module {module} ({where}); choose another name"
    return None


def _installed(module: str) -> str | None:
    """Where a module of this name is installed, or None. Folders that are searched for another reason do not count: the
    present one, for `python -m`, would hold the very file that is asked for."""
    if module == PACKAGE.name:
        return str(PACKAGE)
    searched = [folder for folder in sys.path if Path(folder).name in ("site-packages", "dist-packages")]
    spec = importlib.machinery.PathFinder.find_spec(module, searched)
    if spec is None:
        return None
    return spec.origin or ", ".join(spec.submodule_search_locations or ())


def _walk(path: StoragePath, name: str) -> Iterator[tuple[str, bytes]]:
    """The files at and below a path, but for hidden ones and what Python has compiled."""
    if path.is_file():
        yield name, path.read_bytes()
        return
    inside: list[StoragePath] = list(path.iterdir())
    for below in sorted(inside, key=lambda entry: entry.name):
        if not below.name.startswith(".") and below.name != "__pycache__" and not below.name.endswith(".pyc"):
            yield from _walk(below, f"{name}/{below.name}")


def _copied(folder: StoragePath, recorded: bytes) -> Code:
    """The copy in a study's folder."""
    try:
        checksums = json.loads(recorded)
        paths = [PurePosixPath(path) for path in checksums]
        if any(path.is_absolute() or ".." in path.parts for path in paths):
            raise ValueError("a path outside")
    except (ValueError, TypeError) as error:
        raise KeyProblems(Problem(("code",), f"{folder / CHECKSUMS} is damaged: {error}")) from error
    files, problems = {}, []
    for path, checksum in checksums.items():
        where = folder / FOLDER / path
        content = storage.read(where)
        if content is None:
            problems.append(f"{where} is missing")
        elif hashlib.sha256(content).hexdigest() != checksum:
            problems.append(f"{where} is not what this study ran with, whose sha256 is {checksum}")
        else:
            files[path] = content
    if problems:
        raise KeyProblems(Problem(("code",), "; ".join(problems)))
    code = Code(files)
    return Code(files, {name: str(folder / FOLDER / name) for name in code.names})
