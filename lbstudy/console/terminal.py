"""Tables on a terminal: however narrow it is, no number is cut."""

from __future__ import annotations

import sys
from collections.abc import Collection
from typing import TYPE_CHECKING, Literal

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    import pandas as pd

ROW_NAMES = ("cell", "optimizer", "batch_size", "smoothing", "small_batch", "large_batch", "measure", "metric", "check")
"""Columns that tell rows apart."""

SENTENCE = 24
"""Characters that a line of a sentence has at least; what is shorter is not broken."""

GUTTER = 2

AT_A_TERMINAL = sys.stdout is not None and sys.stdout.isatty()  # None: closed, as by `>&-`

out = Console(width=None if AT_A_TERMINAL else 200, markup=False, emoji=False)  # [x] and :x: in names are text


def print_table(frame: pd.DataFrame, title: str, names: Collection[str] = ()) -> None:
    """A frame of text: words to the left, numbers to the right.

    Sentences are broken into lines. Columns that find no room beside the others come in a further block below, which
    begins with the names of the rows again. `names`: columns that tell rows apart beside ROW_NAMES.
    """
    from lbstudy.analysis.tables.best import holds_numbers

    for number, widths in enumerate(fit_columns(frame, out.width, names)):
        if number:
            out.print()
        table = Table(title=None if number else title, title_justify="left", box=None, pad_edge=False, highlight=False)
        for name, width in widths.items():
            justify: Literal["left", "right"] = "right" if holds_numbers(frame[name]) else "left"
            table.add_column(name.replace("_", " "), justify=justify, width=width)
        for row in frame[list(widths)].itertuples(index=False):
            table.add_row(*row)
        wide = max(out.width, _total(widths))  # a console wider than the terminal cuts no text either
        Console(width=wide, markup=False, emoji=False).print(table)


def fit_columns(frame: pd.DataFrame, room: int, names: Collection[str] = ()) -> list[dict[str, int]]:
    """Blocks of columns with their widths, each block no wider than the room unless a single column is too wide."""
    columns = list(map(str, frame))
    longest = {name: max([len(name), *frame[name].str.len()]) for name in columns}
    least = {name: _least_width(frame, name) for name in columns}
    names = [name for name in columns if name in {*ROW_NAMES, *names}]
    blocks: list[dict[str, int]] = [{name: least[name] for name in names}]
    for name in (name for name in columns if name not in names):
        if blocks[-1].keys() - set(names) and _total(blocks[-1]) + GUTTER + least[name] > room:
            blocks.append({name: least[name] for name in names})
        blocks[-1][name] = least[name]
    for block in blocks:
        for name in block:  # what room is left lets headers and sentences out
            block[name] = max(block[name], min(longest[name], block[name] + room - _total(block)))
    return blocks


def _least_width(frame: pd.DataFrame, name: str) -> int:
    """Of its longest text, or of what a sentence needs, and of the longest word in its header."""
    from lbstudy.analysis.tables.best import holds_numbers

    text = int(frame[name].str.len().max())
    word = int(frame[name].str.split().explode().str.len().max())
    return max(*map(len, name.split("_")), text if holds_numbers(frame[name]) else max(word, min(text, SENTENCE)))


def _total(block: dict[str, int]) -> int:
    return sum(block.values()) + GUTTER * (len(block) - 1)
