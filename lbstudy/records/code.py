"""The copy of a user's code in a study's folder: what the study ran with is part of its record."""

from __future__ import annotations

import json

from lbstudy import storage
from lbstudy.storage import StoragePath
from lbstudy.study.code import CHECKSUMS, FOLDER, Code


def write_code(folder: StoragePath, code: Code) -> None:
    """Lay a copy with its checksums into a study's folder; what lies there already is not written again."""
    for path, content in code.files.items():
        target = folder / FOLDER / path
        if storage.read(target) != content:
            target.parent.mkdir(parents=True, exist_ok=True)
            storage.write(target, content)
    checksums = json.dumps(code.checksums, indent=2).encode()
    if storage.read(folder / CHECKSUMS) != checksums:
        storage.write(folder / CHECKSUMS, checksums)


def differences(folder: StoragePath, code: Code) -> list[str]:
    """What other code than this a study ran with: lines of a diff of checksums, empty where it is the same.

    A driver that died before it had written the checksums has run nothing: then there is no difference.
    """
    recorded = storage.read(folder / CHECKSUMS)
    if recorded is None:
        return []
    old, new = json.loads(recorded), code.checksums
    lines = []
    for path in sorted({*old, *new}):
        if old.get(path) != new.get(path):
            lines += [f"- {path} sha256 {old[path]}"] if path in old else []
            lines += [f"+ {path} sha256 {new[path]}"] if path in new else []
    return lines
