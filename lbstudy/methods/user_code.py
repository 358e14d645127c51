"""Importing a user's own code, in the driver and in every worker: from a copy of its bytes, never from where it lay.

So a module finds beside it what the study's `code` names and nothing else, here as on a node that has none of the
files. A process has the code of one study at a time; that of the one before it is let go, its modules included.
"""

from __future__ import annotations

import importlib
import os
import sys
import tempfile
import traceback
from importlib.machinery import ModuleSpec
from pathlib import Path
from uuid import uuid4

import torch

from lbstudy.methods.declaration import MethodError, forget
from lbstudy.study.code import Code

OURS = tuple(str(Path(module.__path__[0])) for module in (sys.modules["lbstudy"], torch))
PYTHONS = str(Path(os.__file__).parent)

_active = Code()
_folder: Path | None = None


def active() -> Code:
    """The code that this process imports from; empty if there is none."""
    return _active


def activate(code: Code) -> None:
    """Import from this code from now on, and from no other."""
    global _active, _folder
    if code.digest != _active.digest:
        if _folder is not None:
            sys.path[:] = [path for path in sys.path if path != str(_folder)]
            for name in [name for name, module in list(sys.modules.items()) if _lies_in(module, _folder)]:
                del sys.modules[name]
        forget()
        _folder = _laid_down(code) if code else None
        if _folder is not None:
            sys.path.insert(0, str(_folder))
        importlib.invalidate_caches()
    _active = code


def traceback_of(error: BaseException) -> str:
    """The user's part of what led to an error, each line indented, with the files where the user has them; empty for an
    error that no code of the user's has raised."""
    while isinstance(error, MethodError) and error.__cause__ is not None:
        error = error.__cause__
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if _is_a_users(frame.filename)]
    if _folder is not None and any(_is_below(frame.filename, _folder) for frame in frames):
        frames = [frame for frame in frames if _is_below(frame.filename, _folder)]
    if isinstance(error, MethodError) or not (frames or isinstance(error, SyntaxError)):
        return ""
    text = "".join(traceback.format_list(frames) + traceback.format_exception_only(error))
    for name, origin in _active.origins.items():
        text = text.replace(f"{_folder}/{name}", origin)
    return "\n".join(f"  {line}" for line in text.splitlines())


def told(error: BaseException) -> str:
    """What an error says, with the user's traceback below it."""
    trace = traceback_of(error)
    return f"{error}\n{trace}" if trace else str(error)


def _is_a_users(file: str) -> bool:
    """Whether a file is neither ours nor torch's nor Python's."""
    of_python = file.startswith(("<", PYTHONS)) and "site-packages" not in file
    return not of_python and not file.startswith(OURS)


def _lies_in(module: object, folder: Path) -> bool:
    """Whether a module, or a package without a file of its own, comes from a folder."""
    spec = getattr(module, "__dict__", {}).get("__spec__")  # asked so, a module that loads others at need loads none
    if not isinstance(spec, ModuleSpec):
        return False
    places = [spec.origin, *(spec.submodule_search_locations or ())]
    return any(place is not None and _is_below(place, folder) for place in places)


def _is_below(file: str, folder: Path) -> bool:
    return file.startswith(f"{folder}{os.sep}")


def _laid_down(code: Code) -> Path:
    """A folder of this machine with the files of the code, shared by the processes of a user."""
    home = Path(tempfile.gettempdir()).resolve() / f"lbstudy-{os.getuid()}"
    home.mkdir(mode=0o700, exist_ok=True)
    if home.is_symlink() or home.stat().st_uid != os.getuid():  # nobody else's files are imported
        home = Path(tempfile.mkdtemp(prefix="lbstudy-"))
    folder = home / f"code-{code.digest[:32]}"
    if not _is_whole(folder, code):
        scratch = home / f"new-{uuid4().hex}"
        for path, content in code.files.items():
            (scratch / path).parent.mkdir(parents=True, exist_ok=True)
            (scratch / path).write_bytes(content)
        if folder.exists():
            folder.rename(home / f"old-{uuid4().hex}")
        try:
            scratch.rename(folder)
        except OSError:  # another process was faster
            return folder if _is_whole(folder, code) else scratch
    return folder


def _is_whole(folder: Path, code: Code) -> bool:
    """Whether a folder holds the files of the code as they are."""
    files = {path: folder / path for path in code.files}
    return all(file.is_file() and file.read_bytes() == code.files[path] for path, file in files.items())
