"""What is wrong with the further factors of a study's cells, and with what names them, in the words of its file.

`misuses` looks at the file before it becomes a study: keys, lists and single values. `misfits` looks at combinations
of values, which need the study. `blamed` says of a problem with a variant which factor brings it about.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from math import prod
from typing import Any

from pydantic import ValidationError

from lbstudy.study import split
from lbstudy.study.factors import CELLS_KEYS, OWN, filled, of_cells, short, with_value
from lbstudy.study.file import Keys, Problem, dotted, explain, nearest, paths, show, truths_as_numbers
from lbstudy.study.spec import StudySpec

MAX_CELLS = 1000
"""More than that is a slip: each is tuned with many trials."""

LONGEST_NAME = 200
"""Characters of a cell's name, which is that of a folder."""

SAME_IN_ALL = (
    "name", "source", "code", "cells", "search", "published", "tuning", "resources", "evaluate_every", "seed",
)  # fmt: skip
"""Sections that are no factors: what all cells must share to be compared."""

SAFE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")
"""Text that may be a part of a folder's name."""


def misuses(content: Mapping[str, Any], study_class: type[StudySpec]) -> Iterator[Problem]:
    """What is wrong with the further factors of a study file, and with keys elsewhere that name none of them.

    Args:
        content: of the file.
        study_class: knows the keys of a study.
    """
    further, own = of_cells(content.get("cells")), set[str]()
    for key, values in further.items():
        found = list(_wrong_factor(key, values, further, content, study_class))
        own |= {key} if not found else set()
        yield from found
    yield from _misnamed(content, further)
    if len(own) == len(further):
        yield from _too_many(content["cells"] if further or isinstance(content.get("cells"), Mapping) else {})
        for key, values in further.items():
            yield from _wrong_values(key, values, content, study_class)


def _wrong_factor(
    key: str, values: Any, further: Mapping[str, Any], content: Mapping[str, Any], study_class: type[StudySpec]
) -> Iterator[Problem]:
    """The first thing that is wrong with a factor, without its values' meaning."""
    where: Keys = ("cells", key)
    if key == split.KEY and (found := list(split.problems(content))):
        yield from found
        return
    known = {dotted(path) for path in paths(study_class) if path[0] not in SAME_IN_ALL}
    if key not in known:
        yield Problem(where, _unknown(key, known))
        return
    entries = values if isinstance(values, list) else list(values) if isinstance(values, Mapping) else None
    if entries is None:
        yield Problem(where, f"input should be a list of values, or a mapping of names to values; got {show(values)}")
        return
    meant = list(values.values()) if isinstance(values, Mapping) else entries
    inside = {name.split(".")[len(key.split("."))] for name in known if name.startswith(f"{key}.")}
    if isinstance(values, Mapping) and (nested := [name for name in values if name in inside]):
        yield Problem(where, f"the key of a factor is written in one: `{key}.{nested[0]}`, not `{nested[0]}` below it")
    elif len(entries) < 2:
        single = meant[0] if meant else "VALUE"
        reason = f"a factor needs at least two values; a single one belongs at the key itself, `{key}: {show(single)}`"
        yield Problem(where, f"{reason}; got {show(values)}")
    elif unnamed := [value for value in entries if not isinstance(value, str | int | float | bool)]:
        reason = f"a value that is no number, text or truth needs a name: `{key}: {{NAME: {show(unnamed[0])}, ...}}`"
        yield Problem(where, f"{reason}; got {show(values)}")
    elif any(value in meant[:place] for place, value in enumerate(meant)):
        yield Problem(where, f"each value once, but got {show(values)}")
    elif unsafe := [value for value in entries if isinstance(value, str) and not SAFE.fullmatch(short(value))]:
        reason = "stands in folder names and should be letters, digits, '.', '_', '+' and '-', a letter or digit first"
        named_so = "" if isinstance(values, Mapping) else f"; or name it: `{key}: {{NAME: {show(unsafe[0])}, ...}}`"
        yield Problem(where, f"{reason}{named_so}; got {show(unsafe[0])}")
    elif outer := [other for other in further if key.startswith(f"{other}.")]:
        yield Problem(where, f"is a part of another factor, `{outer[0]}`; make one of the two a factor")
    elif key.startswith("fixed.") and key.removeprefix("fixed.") in (content.get("search") or {}):
        tuned = f"search.{key.removeprefix('fixed.')}"
        yield Problem(where, f"is tuned as well, in `{tuned}`; it can be only one of the two")
    elif (fixed := _elsewhere(key, content)) and fixed[1] not in meant:
        said = f"{fixed[0]}: {show(fixed[1])}"
        yield Problem(where, f"the study says `{said}` too, none of the factor's values; leave one of the two out")


def _unknown(key: str, known: set[str]) -> str:
    if key.split(".")[0] in SAME_IN_ALL:
        return f"unknown key; `{key.split('.')[0]}` is the same in all cells, so that they can be compared"
    same = [name for name in known if name.rpartition(".")[2] == key]
    names = sorted(same) if len(same) == 1 else [*CELLS_KEYS, *sorted(known)]
    close = f"; did you mean `{same[0]}`?" if len(same) == 1 else nearest(key, names)
    return f"unknown key{close}" if close else f"unknown key; a factor is a key of the study, such as `{min(known)}`"


def _elsewhere(key: str, content: Mapping[str, Any]) -> tuple[str, Any] | None:
    """What the study says at a factor's key, or at a key above it that is no mapping."""
    node: Any = content
    said: list[str] = []
    for part in key.split("."):
        if not isinstance(node, Mapping):
            break
        if part not in node:
            return None
        node, said = node[part], [*said, part]
    return dotted(tuple(said)), node


def _too_many(cells: Mapping[str, Any]) -> Iterator[Problem]:
    lists = {key: values for key, values in cells.items() if key != "exclude" and isinstance(values, list | Mapping)}
    count = prod(map(len, lists.values()))
    if count > MAX_CELLS:
        product = " x ".join(f"{len(values)} {key}" for key, values in lists.items())
        yield Problem(("cells",), f"{product} = {count:,} cells; at most {MAX_CELLS:,} can be compared")


def _wrong_values(key: str, values: Any, content: Mapping[str, Any], study_class: type[StudySpec]) -> Iterator[Problem]:
    """Values that cannot stand at the key."""
    path = tuple(key.split("."))
    rest = {**content, "cells": {name: value for name, value in content["cells"].items() if name in CELLS_KEYS}}
    for place, value in values.items() if isinstance(values, Mapping) else enumerate(values):
        trial = with_value(rest, key, value)
        found = list(truths_as_numbers(trial, study_class))
        try:
            study_class.model_validate(trial)
        except ValidationError as error:
            found += explain(error, trial, study_class)
        for problem in found:
            if problem.keys[: len(path)] == path:
                below = dotted(problem.keys[len(path) :]) + ": " if len(problem.keys) > len(path) else ""
                yield Problem(("cells", key, place), below + problem.message)


def _misnamed(content: Mapping[str, Any], further: Mapping[str, Any]) -> Iterator[Problem]:
    """Keys of conditions and of published configurations that are no factors of the cells."""
    cells, search = content.get("cells"), content.get("search")
    entries: list[tuple[Keys, Any, Sequence[str]]] = []
    if isinstance(cells, Mapping) and isinstance(cells.get("exclude"), list):
        entries += [(("cells", "exclude", place), entry, ()) for place, entry in enumerate(cells["exclude"])]
    for name, ranges in search.items() if isinstance(search, Mapping) else ():
        for place, entry in enumerate(ranges if isinstance(ranges, list) else [ranges]):
            when = entry.get("when") if isinstance(entry, Mapping) else None
            entries.append((("search", name, place, "when"), when, ()))
    published = content.get("published")
    if isinstance(published, list):
        entries += [(("published", place), entry, ["params"]) for place, entry in enumerate(published)]
    for keys, entry, others in entries:
        known = [*OWN, *further, *others]
        for key in entry if isinstance(entry, Mapping) else ():
            if key not in known:
                yield Problem((*keys, key), f"unknown key{nearest(key, known)}")


def misfits(study: StudySpec) -> Iterator[Problem]:
    """Combinations of factors' values that make no study, and names that cells cannot have."""
    cells = study.list_cells()
    for cell in {cell.factors: cell for cell in reversed(cells)}.values():
        try:
            study.variant(cell)
        except ValidationError as error:
            content = study.model_dump(mode="json", by_alias=True, exclude_none=True)
            chosen = {key: {value: study.factors[key][value]} for key, value in cell.factors}
            content = filled(content | {"cells": {**content["cells"], **chosen}})
            for problem in explain(error, content, type(study)):
                yield blamed(problem, study, dict(cell.factors))
    names = [cell.name for cell in cells]
    if twice := next((name for name in names if names.count(name) > 1), None):
        yield Problem(("cells",), f"two cells would be called {twice}; give the values of a factor other names")
    if longest := max((name for name in names if len(name) > LONGEST_NAME), key=len, default=None):
        reason = f"a cell would be called {longest}, which is longer than {LONGEST_NAME} characters"
        yield Problem(("cells",), f"{reason}; name the values of a factor: `KEY: {{NAME: VALUE, ...}}`")


def blamed(problem: Problem, study: StudySpec, chosen: Mapping[str, Any]) -> Problem:
    """A problem of the variant with these values, at the factor that it is about, if there is one."""
    for key, value in chosen.items():
        path, keys = tuple(key.split(".")), problem.keys
        if keys[: len(path)] == path or path[: len(keys)] == keys:
            values: Any = study.cells.model_extra[key]  # type: ignore[index]
            place = value if isinstance(values, Mapping) else list(values).index(value)
            below = dotted(keys[len(path) :]) + ": " if len(keys) > len(path) else ""
            return Problem(("cells", key, place), below + problem.message)
    return problem


def said_once(found: Sequence[tuple[StudySpec, Sequence[Problem]]], study: StudySpec) -> Iterator[Problem]:
    """Problems of a study's variants, each once: at the factor that it is about, or with the values that bring it about
    where others do not.

    Args:
        found: each variant, and its problems.
        study: the study.
    """
    variants: dict[Problem, list[StudySpec]] = {}
    for part, problems in found:
        for problem in dict.fromkeys(problems):
            variants.setdefault(problem, []).append(part)
    for problem, parts in variants.items():
        if len(parts) == len(found):
            yield problem
            continue
        chosen = {key: next(iter(values)) for key, values in parts[0].factors.items()}
        at_factor = blamed(problem, study, chosen)
        words = [part.in_words or f"{split.KEY} {split.SAME_EPOCHS}" for part in parts]
        others = f"; {len(words) - 1} more like it" if len(words) > 1 else ""
        yield (
            at_factor if at_factor != problem else Problem(problem.keys, f"{problem.message} (with {words[0]}{others})")
        )
