"""The gap between batch sizes, split in two: what the factor `budget` of a study says that asks for it.

`cells: {budget: [same_epochs, same_updates, fewer_updates]}`, the first and one or both of the others, are

* same_epochs: the study's own budget, in epochs: the larger a batch size is, the fewer updates it makes;
* same_updates: as many updates as the smallest batch size makes in that budget, for the larger ones;
* fewer_updates: as many updates as the largest makes in it, for the smallest, which so is stopped early.

A budget in another batch size's updates counts that batch size's epochs, in the schedule and at the rungs too, so that
everything lies at the same share of it. At that batch size itself it is the same run as `same_epochs`, which is trained
once: there is no such cell. `analysis.tables.split` says what the parts of the gap are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from lbstudy.study.factors import UNSAID, Factors, Value
from lbstudy.study.file import Problem, nearest, show
from lbstudy.study.run import Budget

KEY = "budget"
"""The factor."""

SAME_EPOCHS, SAME_UPDATES, FEWER_UPDATES = NAMES = ("same_epochs", "same_updates", "fewer_updates")
"""What it may say."""

PARTS = (SAME_UPDATES, FEWER_UPDATES)
"""Budgets whose cells take a gap apart, and are compared with nothing else."""


def expanded(content: Any) -> Any:
    """A study file's content with the names written out as budgets, if `problems` finds nothing wrong with them.

    Names that stand over a budget or batch sizes that are wrong themselves are left out: one mistake is told once.
    """
    values = _values(content)
    if not _are_names(values) or any(problems(content)):
        return content
    cells, (epochs, sizes) = dict(content["cells"]), _basis(content)
    if epochs and sizes:
        meanings = _meanings(epochs, sizes)
        return {**content, "cells": {**cells, KEY: {name: meanings[name] for name in NAMES if name in values}}}
    del cells[KEY]
    return {**content, "cells": cells}


def problems(content: Any) -> Iterator[Problem]:
    """The first thing that is wrong with the names, or with the budgets that they are the names of."""
    values, where = _values(content), ("cells", KEY)
    named = list(values) if isinstance(values, Mapping) and {*PARTS} & {*values} else None
    names = list(values) if _are_names(values) else named
    if names is None:
        return
    own, sizes = content.get("budget"), _basis(content)[1]
    unknown = [name for name in names if name not in NAMES] if named is None else []
    if unknown:
        reason = f"unknown budget {unknown[0]!r}{nearest(unknown[0], NAMES)}"
        yield Problem((*where, names.index(unknown[0])), f"{reason}; one of your own is written `{{NAME: ...}}`")
    elif len(set(names)) < len(names):
        yield Problem(where, f"each value once, but got {show(values)}")
    elif SAME_EPOCHS not in names:
        yield Problem(where, f"the gap that is split is that of {SAME_EPOCHS}, which is missing; got {show(values)}")
    elif len(names) == 1:
        reason = f"is the study's own budget; beside it there must be {' or '.join(PARTS)}, or leave the factor out"
        yield Problem(where, f"{SAME_EPOCHS} {reason}; got {show(values)}")
    elif own is None and named is None:
        yield Problem(where, f"{SAME_EPOCHS} is the study's own budget, which is missing: `budget: {{epochs: N}}`")
    elif named is None and isinstance(own, Mapping) and "epochs" not in own and "steps" in own:
        reason = "with a budget in steps every batch size makes the same number of updates already; the split needs"
        yield Problem(where, f"{reason} `budget: {{epochs: N}}`, but got `budget: {show(own)}`")
    elif named is None and isinstance(own, Mapping) and "updates_of" in own:
        reason = "the study's own budget is in the updates of one batch size already; the split needs"
        yield Problem(where, f"{reason} `budget: {{epochs: N}}`, but got `budget: {show(own)}`")
    elif sizes and len(sizes) == 1:
        yield Problem(where, f"the split needs two batch sizes or more, but got cells.batch_size {show(sizes)}")
    elif named is not None and sizes:
        yield from _misnamed(values, sizes)


def _misnamed(values: Mapping[str, Any], sizes: Sequence[int]) -> Iterator[Problem]:
    """A budget that is not what its name says."""
    own = values[SAME_EPOCHS]
    if not isinstance(own, Mapping) or [*own] != ["epochs"]:
        yield Problem(("cells", KEY, SAME_EPOCHS), f"must be a budget in epochs, `{{epochs: N}}`; got {show(own)}")
        return
    meanings = _meanings(own["epochs"], sizes)
    for name in PARTS:
        if name in values and values[name] != meanings[name]:
            reason = f"the name stands for `{show(meanings[name])}`, the updates of batch size"
            written = f"`budget: {show(own)}` with `cells.budget: [{', '.join(n for n in NAMES if n in values)}]`"
            size = meanings[name]["updates_of"]
            yield Problem(("cells", KEY, name), f"{reason} {size}; got {show(values[name])}. In short: {written}")


def exists(name: Value, batch_size: int, sizes: Sequence[int]) -> bool:
    """Whether there is a cell of a batch size with this value of the factor: a run of its own, and of use.

    Args:
        name: the value.
        batch_size: of the cell.
        sizes: all batch sizes of the study.
    """
    if name == SAME_UPDATES:
        return batch_size > min(sizes)
    return name != FEWER_UPDATES or batch_size == min(sizes)


def part_of(factors: Factors) -> str | None:
    """Which part of a gap cells with these factors are for; None of those that are compared."""
    value = dict(factors).get(KEY)
    return str(value) if value in PARTS else None


def whole(factors: Factors) -> Factors:
    """The same factors with the study's own budget, in a study whose gaps are split."""
    return tuple((key, SAME_EPOCHS if key == KEY and value in PARTS else value) for key, value in factors)


def without_budget(factors: Factors) -> Factors:
    """The factors but for the study's own budget beside those that split its gaps."""
    return tuple(entry for entry in factors if entry not in UNSAID)


def _values(content: Any) -> Any:
    cells = content.get("cells") if isinstance(content, Mapping) else None
    return cells.get(KEY) if isinstance(cells, Mapping) else None


def _are_names(values: Any) -> bool:
    return isinstance(values, list) and bool(values) and all(isinstance(value, str) for value in values)


def _basis(content: Mapping[str, Any]) -> tuple[int | None, list[int] | None]:
    """The epochs of the study's own budget, and its batch sizes; None of what is wrong."""
    try:
        epochs = Budget.model_validate(content.get("budget")).epochs
    except ValidationError:
        epochs = None
    sizes = content["cells"].get("batch_size")
    sound = isinstance(sizes, list) and sizes and all(type(size) is int and size > 0 for size in sizes)
    return epochs, sizes if sound else None


def _meanings(epochs: int, sizes: Sequence[int]) -> dict[str, dict[str, int]]:
    """Name -> the budget that it stands for."""
    return {
        SAME_EPOCHS: {"epochs": epochs},
        SAME_UPDATES: {"epochs": epochs, "updates_of": min(sizes)},
        FEWER_UPDATES: {"epochs": epochs, "updates_of": max(sizes)},
    }
