"""What single keys of a study file cannot tell: contradictions between them, found before any work begins.

Each check reads some sections of the file and runs only where these are sound, so that one mistake is told once.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence

from lbstudy.study.file import Keys, Problem, nearest, show
from lbstudy.study.space import Condition
from lbstudy.study.spec import StudySpec

Check = Callable[[StudySpec], Iterator[Problem]]
Checks = Sequence[tuple[Check, Collection[str]]]
"""Checks, each with the sections of the file that it reads."""


def contradictions(study: StudySpec, broken: Collection[str] = (), further: Checks = ()) -> Iterator[Problem]:
    """What is wrong between the parts of a study, but for the checks that read a broken section."""
    for check, sections in (*CHECKS, *further):
        if not set(sections) & set(broken):
            yield from check(study)


def never_apply(study: StudySpec) -> Iterator[Problem]:
    """Conditions that no cell meets: a slip, unless someone has narrowed the cells of a finished file."""
    for index, condition in enumerate(study.cells.exclude):
        if reason := _meets_no_cell(condition, study):
            yield Problem(("cells", "exclude", index), f"leaves nothing out: {reason}")
    for name, entries in study.search.items():
        left = study.all_cells()  # what the entries above leave over, for the first that matches counts
        for index, entry in enumerate(entries):
            matched = [cell for cell in left if entry.when.matches(cell.optimizer, cell.batch_size, cell.smoothing)]
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
    length = study.budget.epochs or study.budget.steps or 0
    unit = "epochs" if study.budget.epochs else "steps"
    milestones = {"schedule.milestones": study.schedule.milestones}
    for method, settings in study.fixed.settings.items():
        milestones |= {f"fixed.{method}.{k}": v for k, v in settings.items() if k.endswith("milestones")}
    for key, values in milestones.items():
        if late := [milestone for milestone in values if milestone > length]:
            yield f"{key}: {show(late)} lie beyond the budget of {length} {unit}"
    pruner = study.tuning.pruner
    if pruner != "none" and study.budget.epochs and pruner.grace_period >= study.budget.epochs:
        yield f"tuning.pruner: prunes nothing, for grace_period {pruner.grace_period} is no less than {length} epochs"


def _meets_no_cell(condition: Condition, study: StudySpec) -> str | None:
    """Why no cell meets a condition, or None if one does."""
    if any(condition.matches(cell.optimizer, cell.batch_size, cell.smoothing) for cell in study.all_cells()):
        return None
    smoothings = [part for smoothing in study.cells.smoothing for part in (smoothing, *smoothing.split("+"))]
    present: dict[str, Sequence[str | int]] = {
        "optimizer": study.cells.optimizer,
        "batch_size": study.cells.batch_size,
        "smoothing": smoothings,
    }
    for key, values in present.items():
        asked = getattr(condition, key)
        if asked and not set(asked) & set(values):
            names = list(dict.fromkeys(map(str, values)))
            wrong = " or ".join(map(str, asked))
            if key == "batch_size":
                closest = min(study.cells.batch_size, key=lambda size: abs(size - asked[0]))
                return f"no cell has batch_size {wrong}; the nearest is {closest}"
            return f"no cell has {key} {wrong}; the cells have {', '.join(names)}"
    return "no cell has all of this at once"


def _no_cells(study: StudySpec) -> Iterator[Problem]:
    if not study.list_cells():
        yield Problem(("cells", "exclude"), "leaves no cell at all")


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


def _published(study: StudySpec) -> Iterator[Problem]:
    cells = study.all_cells()
    for index, entry in enumerate(study.published):
        keys: Keys = ("published", index)
        if entry.cell not in cells:
            yield Problem(
                keys, f"{entry.cell.name} is no cell of this study{nearest(entry.cell.name, [c.name for c in cells])}"
            )
            continue
        ranges = study.ranges(entry.cell)
        for name, value in entry.params.items():
            if name not in ranges:
                hint = nearest(name, ranges)
                yield Problem((*keys, "params", name), f"is not tuned in cell {entry.cell.name}{hint}")
            elif not ranges[name].contains(value):
                yield Problem(
                    (*keys, "params", name), f"{value:g} lies outside the search range {ranges[name]} of its cell"
                )


def _rate_rule(study: StudySpec) -> Iterator[Problem]:
    rule = study.tuning.learning_rate_rule
    if rule is None:
        return
    keys: Keys = ("tuning", "learning_rate_rule", "from")
    sizes = sorted({cell.batch_size for cell in study.list_cells()})
    if rule.reference not in sizes:
        yield Problem(keys, f"no cell has batch size {rule.reference}; the cells have {', '.join(map(str, sizes))}")
    elif not any("learning_rate" in study.ranges(c) for c in study.list_cells() if c.batch_size > rule.reference):
        yield Problem(keys, f"no cell with a batch size above {rule.reference} tunes its learning rate")


def _room_for_published(study: StudySpec) -> Iterator[Problem]:
    for cell in study.list_cells():
        count, trials = len(study.published_params(cell)), study.tuning.trials
        if count > trials:
            reason = f"must be at least {count}, the published configurations of cell {cell.name}; got {trials}"
            yield Problem(("tuning", "trials"), reason)


CHECKS: Checks = (
    (_no_cells, ("cells",)),
    (_workers, ("cells", "resources")),
    (_warmup, ("schedule", "budget")),
    (_published, ("cells", "search", "published")),
    (_rate_rule, ("cells", "search", "tuning")),
    (_room_for_published, ("cells", "published", "tuning")),
)
