"""Factors of the cells beside optimizer, batch size and smoothing: any key of the study, by its dotted name.

`cells: {model: [lenet5, vgg9], fixed.weight_decay: [0, 5e-4]}` makes the model and the weight decay factors. A value
that is a mapping, a list or null has a name: `budget: {short: {epochs: 5}, long: {epochs: 10}}`. A cell holds the plain
value or the name; `StudySpec.variant` is the study as such a cell sees it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

Value = str | int | float | bool
"""What a cell holds of a factor: a plain value, or the name of a named one."""

Factors = tuple[tuple[str, Value], ...]
"""Key and value of each further factor of a cell."""

OWN = ("optimizer", "batch_size", "smoothing")
"""The factors that every study has."""

CELLS_KEYS = (*OWN, "exclude")

UNNAMED = ("model", "dataset", "dataset.name")
"""Factors whose values say by themselves what they are."""

UNSAID = (("budget", "same_epochs"),)
"""Values that go without saying: a study's own budget, beside those that split its gaps (`split`)."""


def of_cells(cells: Any) -> dict[str, Any]:
    """The further factors in the section `cells` of a study file, as they are written there."""
    return {key: values for key, values in cells.items() if key not in CELLS_KEYS} if isinstance(cells, Mapping) else {}


def named(values: Any) -> dict[Value, Any]:
    """What a cell holds -> what stands at the key, of a list of plain values or a mapping of named ones."""
    return dict(values) if isinstance(values, Mapping) else {value: value for value in values}


def with_value(content: Mapping[str, Any], key: str, value: Any) -> dict[str, Any]:
    """A study file's content with the value at a dotted key."""
    first, _, rest = key.partition(".")
    below = content.get(first)
    return {**content, first: with_value(below if isinstance(below, Mapping) else {}, rest, value) if rest else value}


def without(content: Mapping[str, Any], key: str) -> dict[str, Any]:
    """A study file's content with nothing at a dotted key."""
    first, _, rest = key.partition(".")
    if rest and isinstance(below := content.get(first), Mapping):
        return {**content, first: without(below, rest)}
    return {name: value for name, value in content.items() if name != first or rest}


def filled(content: Any) -> Any:
    """A study file's content with each factor's first value at its key, so that the key need not be there as well."""
    if isinstance(content, Mapping):
        for key, values in of_cells(content.get("cells")).items():
            if isinstance(values, list | tuple | Mapping) and values:
                first = next(iter(values.values() if isinstance(values, Mapping) else values))
                content = with_value(content, key, first)
    return content


def labels(keys: Iterable[str]) -> dict[str, str]:
    """A short name for each key: its last part, or as many as tell it from the others; without a last `name`."""
    parts = {key: key.removesuffix(".name").split(".") for key in keys}

    def ends(key: str, count: int) -> tuple[str, ...]:
        return tuple(parts[key][-count:])

    found = {}
    for key in parts:
        for count in range(1, len(parts[key]) + 1):
            if all(ends(other, count) != ends(key, count) for other in parts if other != key):
                break
        found[key] = ".".join(ends(key, count))
    return found


def value_text(value: Value) -> str:
    """A value as it stands in names and tables."""
    if isinstance(value, bool):
        return str(value).lower()
    short = f"{value:g}" if isinstance(value, float) else str(value)
    return short if not isinstance(value, float) or float(short) == value else repr(value)


def short(name: str) -> str:
    """A name as folders have it: of `module:name` what comes after the colon."""
    return name.rpartition(":")[2]


def suffix(factors: Factors) -> str:
    """What names of cells and files end with: `-vgg9-weight_decay=0.0005`, empty without further factors."""
    ends = labels(key for key, _ in factors)
    parts = [short(value) if isinstance(value, str) else f"{ends[key]}={value_text(value)}" for key, value in factors]
    return "".join(f"-{part}" for part in parts)


def in_words(factors: Factors) -> str:
    """`vgg9 and weight decay 0.0005`; empty without further factors, and where their values go without saying."""
    ends = labels(key for key, _ in factors)
    parts = [
        value_text(value) if key in UNNAMED else f"{ends[key].replace('_', ' ').replace('.', ' ')} {value_text(value)}"
        for key, value in factors
        if (key, value) not in UNSAID
    ]
    return " and ".join(filter(None, [", ".join(parts[:-1]), *parts[-1:]]))
