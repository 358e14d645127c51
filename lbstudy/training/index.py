"""Image files that a table lists: a CSV or Parquet file with the columns `path`, `label` and `part`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from lbstudy.training.decoding import TreeError
from lbstudy.training.trees import PARTS, SUFFIXES, Tree, check_classes

COLUMNS = ["path", "label", "part"]


def list_indexed(root: Path, index: str) -> Tree:
    """List the images that an index names, and no others; in the order of its rows.

    Args:
        root: the folder that the paths of the images begin at.
        index: the table's path, from there or absolute. Labels are names of classes, in alphabetical order, or by size
            where all are digits; `part` is train or test.

    Raises:
        TreeError: it is no such table, an image is not there, or the two parts have other classes; a sentence.
        OSError: it cannot be read.
    """
    file = root / os.path.expanduser(index)
    paths, labels, parts = _columns(file)
    classes = _in_order(labels)
    numbers = {label: number for number, label in enumerate(classes)}
    used: dict[str, list[tuple[Path, int]]] = {part: [] for part in PARTS}
    rows: dict[str, int] = {}
    for row, (path, label, part) in enumerate(zip(paths, labels, parts, strict=True), 1):
        if wrong := _wrong(root, path, label, part):
            raise TreeError(f"{file}, row {row} below the header: {wrong}")
        if (first := rows.setdefault(os.path.normpath(path), row)) != row:
            raise TreeError(f"{file}, row {row} below the header: {path!r} is in row {first} already")
        used[part].append((root / path, numbers[label]))
    tree = Tree(root, tuple(classes), used["train"], used["test"], {})
    check_classes(tree, str(file))
    return tree


def _wrong(root: Path, path: str, label: str, part: str) -> str:
    """What is wrong with a row; empty if nothing is."""
    if part not in PARTS:
        return f"part should be {' or '.join(PARTS)}; got {part!r}"
    if not label or label != label.strip():
        return f"label should be a name without space around it; got {label!r}"
    if not path or os.path.isabs(path) or ".." in Path(path).parts:
        return f"path should begin at {root} and stay below it; got {path!r}"
    if Path(path).suffix.lower() not in SUFFIXES:
        return f"path should end in one of {', '.join(sorted(SUFFIXES))}; got {path!r}"
    return "" if os.path.isfile(root / path) else f"{root / path} is not there, no file, or out of reach"


def _in_order(labels: Sequence[str]) -> list[str]:
    """The classes."""
    if all(label.isascii() and label.isdigit() for label in labels):
        return sorted(set(labels), key=lambda label: (len(label.lstrip("0")), label.lstrip("0"), label))
    return sorted(set(labels))


def _columns(file: Path) -> list[list[str]]:
    """The columns, as text."""
    import pyarrow as pa
    from pyarrow import csv, parquet

    if not os.path.isfile(file):
        raise TreeError(f"{file} is not there, no file, or out of reach")
    with file.open("rb") as source:
        try:
            if source.read(4) == b"PAR1":
                _check(file, parquet.ParquetFile(source).schema_arrow.names)
                table = parquet.read_table(source, columns=COLUMNS)
            else:
                source.seek(0)
                text = csv.ConvertOptions(column_types=dict.fromkeys(COLUMNS, pa.string()), strings_can_be_null=False)
                table = csv.read_csv(source, None, csv.ParseOptions(newlines_in_values=True), text)
                _check(file, table.column_names)
            columns = [table.column(name).cast(pa.string()).to_pylist() for name in COLUMNS]
        except (pa.ArrowException, UnicodeError, OSError) as error:  # OSError: pages that are damaged
            reason = " ".join(str(error).split())
            raise TreeError(
                f"{file} is no CSV table, in UTF-8 and with commas, and no Parquet file: {reason}"
            ) from error
    return [[value or "" for value in column] for column in columns]


def _check(file: Path, names: Sequence[str]) -> None:
    if any(names.count(name) != 1 for name in COLUMNS):
        found = ", ".join(map(repr, names)) or "none"
        raise TreeError(f"{file} needs the columns {', '.join(COLUMNS)}, each once; got {found}")
