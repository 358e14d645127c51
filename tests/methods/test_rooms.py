"""One method, one file: what a built-in method is called stands there, and hardly anywhere else."""

import ast
import re
from pathlib import Path

import pytest

import lbstudy.analysis
from lbstudy.methods import models, optimizers, smoothing

PACKAGE = Path(lbstudy.__file__ or "").parent
ANALYSIS = Path(lbstudy.analysis.__file__ or "").resolve().parent

MAY_NAME = {
    "analysis/report/claims/steps.py": {"kfac", "sgd"},  # the sources' claim is about these
    "analysis/report/evidence.py": {"sgd"},  # the table that belongs to a claim
    "analysis/report/split.py": {"sgd"},  # what the others are compared with
    "analysis/minima/compute.py": {"noise"},  # this and the next: the gradient's noise, which is no smoothing
    "analysis/minima/results.py": {"noise"},
    "lbstudy/console/results.py": {"noise"},
    "analysis/tables/targets.py": {"sgd"},  # what the claims compare K-FAC with
    "analysis/tables/health.py": {"kfac", "sgd"},  # whether K-FAC could have been SGD
    "analysis/figures/mixup.py": {"mixup"},  # its own figures
    "lbstudy/console/plan.py": {"noise"},  # the command
    "lbstudy/console/cli.py": {"noise"},  # the gradient's noise
    "lbstudy/study/old.py": {"adamw", "kfac", "lars", "mixup", "noise", "sgd"},  # of studies of older versions
}
"""Files that may name methods, and which. The studies that are shipped and the documentation may name all."""

ORDINARY = {"ema", "noise", "sam"}
"""Names that are words too: only whole strings count for them."""


def names() -> list[str]:
    found = {*optimizers.names(), *smoothing.names(), *models.names()} - {smoothing.NONE}
    return sorted(found)


def files() -> list[tuple[str, Path]]:
    roots = [("lbstudy", PACKAGE), ("analysis", ANALYSIS)]
    found = [(f"{name}/{path.relative_to(root)}", path) for name, root in roots for path in sorted(root.rglob("*.py"))]
    return [(name, path) for name, path in found if not name.startswith("lbstudy/analysis/")]


def strings(path: Path) -> list[str]:
    """The strings of a file that are no docstrings; of f-strings the parts."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    documentation = {
        id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    constants = [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and id(node) not in documentation]
    return [node.value for node in constants if isinstance(node.value, str)]


def named_in(path: Path) -> set[str]:
    found = set()
    for text in strings(path):
        words = {text} | (set(re.findall(r"[a-z0-9_]+", text)) - ORDINARY)
        found |= {name for name in names() if name in words}
    return found


def own_file(name: str, method: str) -> bool:
    room = re.match(r"lbstudy/methods/(optimizers|smoothing|models)/(\w+)", name)
    return room is not None and room[2] == method


def test_names_of_methods_stand_in_their_own_files():
    elsewhere = {
        file: strangers
        for file, path in files()
        if (strangers := {n for n in named_in(path) if not own_file(file, n)} - MAY_NAME.get(file, set()))
    }
    assert elsewhere == {}


@pytest.mark.parametrize("file", MAY_NAME)
def test_exceptions_are_still_needed(file: str):
    paths = dict(files())
    assert MAY_NAME[file] <= named_in(paths[file])


def test_no_module_imports_a_method_but_its_own_room():
    """A method is found by its name, so that a new one is one new file."""
    importing = {}
    for file, path in files():
        modules = {
            node.module or ""
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, ast.ImportFrom)
        }
        for module in modules:
            parts = module.split(".")
            of_a_method = parts[:2] == ["lbstudy", "methods"] and len(parts) > 3 and parts[3] in names()
            if of_a_method and not own_file(file, parts[3]):
                importing[file] = module
    assert importing == {}
