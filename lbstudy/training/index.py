"""Image files that a table lists: a CSV or Parquet file with the columns `path`, `label` and `part`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lbstudy.training.decoding import TreeError
from lbstudy.training.trees import PARTS, Tree, check_classes

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = ("path", "label", "part")


def list_indexed(root: Path, index: str) -> Tree:
    """List the images that an index names, and no others; in the order of its rows.

    Args:
        root: the folder that the paths of the images begin at.
        index: the table's path, from there or absolute. A path must stay below the root; labels are names of classes,
            in alphabetical order, or by size where all are whole numbers; `part` is train or test.

    Raises:
        TreeError: it is no such table, an image is not there, or the two parts have other classes; a sentence.
        OSError: it cannot be read.
    """
    file = root / index
    table = _table(file)
    whole = table["label"].str.isdecimal().all()
    labels = sorted(set(table["label"]), key=lambda label: (int(label) if whole else 0, label))
    numbers = {label: number for number, label in enumerate(labels)}
    used: dict[str, list[tuple[Path, int]]] = {part: [] for part in PARTS}
    for row, (path, label, part) in enumerate(zip(*(table[name] for name in COLUMNS), strict=True), 1):
        if not label or part not in PARTS or Path(path).is_absolute() or ".." in Path(path).parts:
            raise TreeError(
                f"{file}, row {row}: needs a path below {root}, a label, and train or test as its part; "
                f"got {path!r}, {label!r}, {part!r}"
            )
        image = root / path
        if not image.is_file():
            raise TreeError(f"{file}, row {row}: {image} is not there, or no file")
        used[part].append((image, numbers[label]))
    tree = Tree(root, tuple(labels), used["train"], used["test"], {})
    check_classes(tree, str(file))
    return tree


def _table(file: Path) -> pd.DataFrame:
    """The columns, as text."""
    import pandas as pd

    try:
        if file.suffix == ".parquet":
            table = pd.read_parquet(file)
        else:
            table = pd.read_csv(file, dtype=str, keep_default_na=False)
    except ValueError as error:  # pandas' and Arrow's errors of parsing are such
        raise TreeError(f"{file} cannot be parsed: {' '.join(str(error).split())}") from error
    if missing := [name for name in COLUMNS if name not in table]:
        found = ", ".join(map(str, table.columns)) or "none"
        raise TreeError(f"{file} needs the columns {', '.join(COLUMNS)}; {', '.join(missing)} is missing; got {found}")
    return table[list(COLUMNS)].fillna("").astype(str)
