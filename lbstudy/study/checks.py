"""What single keys of a study file cannot tell: contradictions between them, found before any work begins.

Each check reads some sections of the file and runs only where these are sound, so that one mistake is told once.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import product
from typing import get_args

from lbstudy.study import split
from lbstudy.study.factor_checks import said_once
from lbstudy.study.factors import Value, value_text
from lbstudy.study.file import ALLOWED, Keys, Problem, nearest, show
from lbstudy.study.space import Condition
from lbstudy.study.spec import Metric, StudySpec

Check = Callable[[StudySpec], Iterator[Problem]]
Checks = Sequence[tuple[Check, Collection[str]]]
"""Checks, each with the sections of the file that it reads."""


def contradictions(study: StudySpec, broken: Collection[str] = (), further: Checks = ()) -> Iterator[Problem]:
    """What is wrong between the parts of a study, but for the checks that read a broken section."""
    sound = [check for check, sections in (*CHECKS, *further) if not set(sections) & set(broken)]
    for check in sound:
        if check in OF_ALL_CELLS:
            yield from check(study)
    variants = study.variants()
    for check in sound:
        if check not in OF_ALL_CELLS:
            yield from said_once([(part, list(check(part))) for part in variants], study)


def never_apply(study: StudySpec) -> Iterator[Problem]:
    """Conditions that no cell meets: a slip, unless someone has narrowed the cells of a finished file."""
    for index, condition in enumerate(study.cells.exclude):
        if reason := _meets_no_cell(condition, study):
            yield Problem(("cells", "exclude", index), f"leaves nothing out: {reason}")
    for name, entries in study.search.items():
        left = study.all_cells()  # what the entries above leave over, for the first that matches counts
        for index, entry in enumerate(entries):
            matched = [cell for cell in left if entry.when.matches(cell)]
            left = [cell for cell in left if cell not in matched]
            if matched:
                continue
            keys: Keys = ("search", name, index)
            if reason := _meets_no_cell(entry.when, study):
                yield Problem((*keys, "when"), f"never applies: {reason}")
            else:
                yield Problem(keys, "never applies: the entries above it cover all of its cells, and the first counts")


def notices(study: StudySpec) -> Iterator[str]:
    """What is allowed, since --epochs may shorten a study, but may surprise."""
    variants = study.variants()
    for problem in said_once([(part, list(_surprises(part))) for part in variants], study):
        yield f"{'.'.join(map(str, problem.keys))}: {problem.message}"


def _surprises(study: StudySpec) -> Iterator[Problem]:
    length = study.budget.epochs or study.budget.steps or 0
    unit = "epochs" if study.budget.epochs else "steps"
    milestones: dict[Keys, list[int]] = {("schedule", "milestones"): study.schedule.milestones}
    for method, settings in study.fixed.settings.items():
        milestones |= {("fixed", method, key): v for key, v in settings.items() if key.endswith("milestones")}
    for keys, values in milestones.items():
        if late := [milestone for milestone in values if milestone > length]:
            yield Problem(keys, f"{show(late)} lie beyond the budget of {length} {unit}")
    pruner = study.tuning.pruner
    if pruner != "none" and study.budget.epochs and pruner.grace_period >= study.budget.epochs:
        reason = f"prunes nothing, for grace_period {pruner.grace_period} is no less than {length} epochs"
        yield Problem(("tuning", "pruner"), reason)


def _meets_no_cell(condition: Condition, study: StudySpec) -> str | None:
    """Why no cell meets a condition, or None if one does."""
    if any(condition.matches(cell) for cell in study.all_cells()):
        return None
    smoothings = [part for smoothing in study.cells.smoothing for part in (smoothing, *smoothing.split("+"))]
    present: dict[str, Sequence[Value]] = {
        "optimizer": study.cells.optimizer,
        "batch_size": study.cells.batch_size,
        "smoothing": smoothings,
        **{key: list(values) for key, values in study.factors.items()},
    }
    asked_for = condition.model_dump()
    for key, values in present.items():
        asked = asked_for.get(key)
        if asked and not set(asked) & set(values):
            names = list(dict.fromkeys(map(value_text, values)))
            wrong = " or ".join(map(value_text, asked))
            if key == "batch_size":
                closest = min(study.cells.batch_size, key=lambda size: abs(size - asked[0]))
                return f"no cell has batch_size {wrong}; the nearest is {closest}"
            return f"no cell has {key} {wrong}; the cells have {', '.join(names)}"
    return "no cell has all of this at once"


def _no_cells(study: StudySpec) -> Iterator[Problem]:
    if not study.list_cells():
        yield Problem(("cells", "exclude"), "leaves no cell at all")


def _gaps_to_split(study: StudySpec) -> Iterator[Problem]:
    """Cells that split a gap whose ends are left out."""
    cells = study.list_cells()
    for cell in cells:
        if split.part_of(cell.factors):
            ends = [end for end in study.ends(cell) if end not in cells]
            if ends:
                names = " and ".join(end.name for end in ends)
                reason = f"leaves out {names}, an end of the gap that {cell.name} splits; leave that out too"
                yield Problem(("cells", "exclude"), f"{reason}, or shorten the lists of the cells")
                return


def _workers(study: StudySpec) -> Iterator[Problem]:
    smallest = min((cell.batch_size for cell in study.list_cells()), default=None)
    if smallest is not None and study.resources.workers > smallest:
        yield Problem(
            ("resources", "workers"),
            f"must be no more than the samples of the smallest mini-batch, {smallest}; got {study.resources.workers}",
        )


def _warmup(study: StudySpec) -> Iterator[Problem]:
    length = study.budget.epochs or study.budget.steps or 0
    if study.schedule.warmup > length:
        unit = "epochs" if study.budget.epochs else "steps"
        yield Problem(
            ("schedule", "warmup"),
            f"must be no longer than the budget of {length} {unit}; got {study.schedule.warmup:g}",
        )
    longest = max((entry.bounds[1] for entry in study.search.get("schedule.warmup", [])), default=0)
    if longest > length:
        yield Problem(("search", "schedule.warmup"), f"must be no longer than the budget of {length}; got {longest:g}")


def _published(study: StudySpec) -> Iterator[Problem]:
    cells = study.all_cells()
    for index, entry in enumerate(study.published):
        keys: Keys = ("published", index)
        meant = [cell for cell in cells if entry.matches(cell)]
        if not meant:
            known = [cell.name for cell in cells]
            yield Problem(keys, f"{entry.cell.name} is no cell of this study{nearest(entry.cell.name, known)}")
        for cell, (name, value) in product(meant, entry.params.items()):
            ranges = study.ranges(cell)
            if name not in ranges:
                hint = nearest(name, ranges)
                yield Problem((*keys, "params", name), f"is not tuned in cell {cell.name}{hint}")
            elif not ranges[name].contains(value):
                yield Problem(
                    (*keys, "params", name), f"{value:g} lies outside the search range {ranges[name]} of its cell"
                )


def _rate_rule(study: StudySpec) -> Iterator[Problem]:
    rule = study.tuning.learning_rate_rule
    if rule is None or study.splits:  # cells that split a gap take their rate from those of the gap
        return
    keys: Keys = ("tuning", "learning_rate_rule", "from")
    sizes = sorted({cell.batch_size for cell in study.list_cells()})
    if rule.reference not in sizes:
        yield Problem(keys, f"no cell has batch size {rule.reference}; the cells have {', '.join(map(str, sizes))}")
    elif not any("learning_rate" in study.ranges(c) for c in study.list_cells() if c.batch_size > rule.reference):
        yield Problem(keys, f"no cell with a batch size above {rule.reference} tunes its learning rate")


def _target(study: StudySpec) -> Iterator[Problem]:
    tuning, keys = study.tuning, ("tuning", "target")
    for_targets = [name for name in get_args(Metric) if name.endswith("_to_target")]
    if tuning.metric in for_targets and tuning.target is None:
        yield Problem(keys, f"is needed by metric {tuning.metric}; it should be {ALLOWED[keys]}")
    elif tuning.metric not in for_targets and tuning.target is not None:
        yield Problem(keys, f"is for the metrics {', '.join(for_targets)} only; got metric {tuning.metric}")


def _evaluations(study: StudySpec) -> Iterator[Problem]:
    every, steps = study.evaluate_every, study.budget.steps
    if every and steps and every > steps:
        yield Problem(("evaluate_every",), f"must be no more than the budget of {steps} steps; got {every}")


def _room_for_published(study: StudySpec) -> Iterator[Problem]:
    for cell in study.list_cells():
        count, trials = len(study.published_params(cell)), study.tuning.trials
        if count > trials:
            reason = f"must be at least {count}, the published configurations of cell {cell.name}; got {trials}"
            yield Problem(("tuning", "trials"), reason)


CHECKS: Checks = (
    (_no_cells, ("cells",)),
    (_gaps_to_split, ("cells",)),
    (_workers, ("cells", "resources")),
    (_warmup, ("schedule", "budget", "search")),
    (_published, ("cells", "search", "published")),
    (_rate_rule, ("cells", "search", "tuning")),
    (_target, ("tuning",)),
    (_evaluations, ("evaluate_every", "budget")),
    (_room_for_published, ("cells", "published", "tuning")),
)

OF_ALL_CELLS: tuple[Check, ...] = (_no_cells, _gaps_to_split, _published)
"""The checks that look at all cells at once; the others look at each variant of the study."""
