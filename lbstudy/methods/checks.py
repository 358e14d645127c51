"""What the methods have to say about a study: names, numbers, settings and combinations, before any work begins."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from math import isfinite
from typing import Any

from pydantic.fields import FieldInfo

from lbstudy.methods import configure, models, optimizers, smoothing, user_code
from lbstudy.methods.declaration import MethodError, attribute
from lbstudy.parallel.batch_norm import has_batch_norm
from lbstudy.storage import StoragePath
from lbstudy.study import checks, load
from lbstudy.study.checks import Checks
from lbstudy.study.code import read_code
from lbstudy.study.factors import of_cells
from lbstudy.study.file import KeyProblems, Keys, Problem, StudyFile, nearest
from lbstudy.study.run import GhostBatchNorm
from lbstudy.study.spec import Cell, StudySpec


def check_study(file: StudyFile, written_by_hand: bool = False) -> StudySpec:
    """The study that a file describes, with its methods' defaults.

    Args:
        file: the file, read.
        written_by_hand: conditions that no cell meets are errors too, unless the command line changes the cells.

    Raises:
        StudyError: all problems found, one a line, each with file, line, key and what is allowed.
    """
    try:
        user_code.activate(read_code(file))
    except KeyProblems as error:
        raise file.error(error.problems) from error
    sound: dict[str, list[str]] = {kind: [] for kind in FINDERS}
    problems: list[Problem] = []
    traces: set[str] = set()
    for kind, keys, name in _named(file.content):
        try:
            FINDERS[kind](name)
            sound[kind].append(name)
        except MethodError as error:
            trace = user_code.traceback_of(error)
            if not trace or trace not in traces:  # a module that cannot be imported is told once, not for each method
                problems.append(Problem(keys, user_code.told(error)))
            traces.add(trace)
    study_class = configure.study_class(tuple(sound["optimizer"]), tuple(sound["smoothing"]))
    further = () if problems else CHECKS
    study = load.check_study(file, written_by_hand, study_class, further, problems)
    methods = {
        name: method
        for cell in study.list_cells()
        for name, method in configure.methods_of(cell.optimizer, cell.smoothing).items()
    }
    return study.model_copy(update={"labels": {n: m.label for n, m in methods.items()} | study.labels})


def load_study(path: StoragePath, overrides: Mapping[str, Any] | None = None) -> StudySpec:
    """Read and check a study file; see `check_study`."""
    return check_study(StudyFile(path, overrides))


def notices(study: StudySpec) -> Iterator[str]:
    """What is allowed, but may surprise: what the study itself tells, and what has no effect."""
    yield from checks.notices(study)
    known = {}
    for cell in study.list_cells():
        methods = configure.methods_of(cell.optimizer, cell.smoothing)
        known[cell] = {"weight_decay_of", *methods, *configure.numbers_of(cell.optimizer, cell.smoothing)}
    for key in study.factors:
        section, _, name = key.partition(".")
        idle = [cell.name for cell, names in known.items() if name.split(".")[0] not in names]
        if section == "fixed" and idle:
            others = f" and {len(idle) - 1} more cells" * (len(idle) > 1)
            reason = f"has no effect in {idle[0]}{others}, which differ by chance alone; cells.exclude leaves them out"
            yield f"cells.{key}: {reason}"
    for name in sorted(study.fixed.model_fields_set):
        if not any(name in names for names in known.values()):
            yield f"fixed.{name}: has no effect, for no cell has such a method"


FINDERS: dict[str, Callable[[str], Any]] = {
    "optimizer": optimizers.get,
    "smoothing": smoothing.parts_of,
    "model": models.find,
    "dataset": lambda name: attribute("dataset", name) if ":" in name else None,
}


def _named(content: dict[str, Any]) -> Iterator[tuple[str, Keys, str]]:
    """The methods and functions that a study names: kind, the keys where it stands, name."""
    for kind, key in (("model", "model"), ("model", "model.name"), ("dataset", "dataset"), ("dataset", "dataset.name")):
        for keys, value in _values(content, key):
            name = value.get("name") if isinstance(value, dict) else value
            if isinstance(name, str):
                yield kind, keys, name
    cells = content.get("cells")
    for kind in ("optimizer", "smoothing"):
        names = cells.get(kind) if isinstance(cells, dict) else None
        for place, name in enumerate(names if isinstance(names, list) else []):
            if isinstance(name, str):
                yield kind, ("cells", kind, place), name


def _values(content: dict[str, Any], key: str) -> Iterator[tuple[Keys, Any]]:
    """What stands at a dotted key of a study file, or else as its values among the factors of the cells."""
    factors = of_cells(content.get("cells"))
    if isinstance(values := factors.get(key), list | dict):
        for place, value in values.items() if isinstance(values, dict) else enumerate(values):
            yield ("cells", key, place), value
    elif "." not in key:
        yield (key,), content.get(key)


def _ranges(study: StudySpec) -> Iterator[Problem]:
    """Names and bounds of what is searched."""
    course = configure.schedule_numbers(study)
    known = [(cell, course | numbers) for cell, numbers in _sound_cells(study)]
    names = dict.fromkeys([*(name for _, numbers in known for name in numbers), *type(study.fixed).model_fields])
    for name, entries in study.search.items():
        if name not in names:
            yield Problem(("search", name), f"not a hyper-parameter{nearest(name, names)}")
            continue
        for index, entry in enumerate(entries):
            tuned = [numbers for cell, numbers in known if study.ranges(cell).get(name) is entry]
            fields = [numbers[name] for numbers in tuned if name in numbers]
            wrong = ((value, configure.value_problem(field, value)) for field in fields for value in entry.bounds)
            if found := next(((value, reason) for value, reason in wrong if reason), None):
                yield Problem(("search", name, index), f"{found[0]:g} is not allowed: {found[1]}")


def _fixed_values(study: StudySpec) -> Iterator[Problem]:
    for name, value in study.fixed.numbers.items():
        if not isfinite(value):
            yield Problem(("fixed", name), f"input should be a finite number; got {value}")


def _sound_cells(study: StudySpec) -> Iterator[tuple[Cell, dict[str, FieldInfo]]]:
    """Cells whose methods go together, with their numbers."""
    for cell in study.list_cells():
        with suppress(MethodError):
            yield cell, configure.numbers_of(cell.optimizer, cell.smoothing)


def _combinations(study: StudySpec) -> Iterator[Problem]:
    """Cells whose methods cannot go together, and what a cell's methods need or do not know."""
    misspelt = [nearest(name, type(study.fixed).model_fields) for name in study.search]
    for cell in study.list_cells():
        try:
            known = configure.numbers_of(cell.optimizer, cell.smoothing)
        except MethodError as error:
            yield Problem(("cells",), f"cell {cell.name}: {error}")
            continue
        tuned = study.ranges(cell)
        for name in tuned:
            if name not in known and name in type(study.fixed).model_fields:
                yield Problem(("search", name), f"has no effect in cell {cell.name}; restrict it with `when`")
        for name, field in known.items():
            if name in tuned or name in study.fixed.numbers or any(f"`{name}`" in hint for hint in misspelt):
                continue
            if field.is_required():
                yield Problem(("search", name), f"cell {cell.name} needs it, in `search` or in `fixed`")


def _batch_norm(study: StudySpec) -> Iterator[Problem]:
    """`batch_norm_problems`, for models that can be built without knowing the images."""
    try:
        network = models.build(study.model.name, (3, 64, 64), 10, None, study.model.settings)
    except MethodError:  # of a user's own, for other images: it is looked at once these are there
        return
    yield from batch_norm_problems(study, has_batch_norm(network))


def batch_norm_problems(study: StudySpec, with_batch_norm: bool) -> Iterator[Problem]:
    """Parts of the mini-batch that would change what batch norm means, and ghosts larger than it."""
    for name, settings in study.fixed.settings.items():
        ghost = settings.get("ghost")
        sizes = [cell.batch_size for cell in study.list_cells() if name in smoothing.split(cell.smoothing)]
        if ghost is None or not sizes:
            continue
        if ghost > min(sizes):
            yield Problem(("fixed", name, "ghost"), _too_large(ghost, sizes))
        if with_batch_norm and (problem := _torn(study, f"fixed.{name}.ghost", ghost)):
            yield Problem(("batch_norm",), problem)
    if not with_batch_norm:
        return
    micro = study.resources.micro_batch_size
    if micro is not None and (problem := _torn(study, "micro_batch_size", micro)):
        yield Problem(("batch_norm",), problem)
    sizes = [cell.batch_size for cell in study.list_cells()]
    if isinstance(study.batch_norm, GhostBatchNorm) and study.batch_norm.ghost > min(sizes, default=1):
        yield Problem(("batch_norm", "ghost"), _too_large(study.batch_norm.ghost, sizes))


def _too_large(ghost: int, sizes: list[int]) -> str:
    return f"must be no more than the smallest batch size it is for, {min(sizes)}; got {ghost}"


def _torn(study: StudySpec, key: str, samples: int) -> str | None:
    """Why a pass over so many samples cannot give the statistics that `batch_norm` promises, or None if it can.

    A forward pass over a part of the mini-batch sees only that part; batch norm over more than the part would silently
    change its meaning, so it is refused.
    """
    if not isinstance(study.batch_norm, GhostBatchNorm):
        return (
            f"`{key}` = {samples} splits the mini-batch, but batch_norm `sync` of {study.model} needs all of it "
            f"in one forward pass; use `batch_norm: {{ghost: N}}` with {key} a multiple of N"
        )
    if samples % study.batch_norm.ghost:
        return f"`{key}` = {samples} must be a multiple of batch_norm.ghost = {study.batch_norm.ghost}"
    return None


CHECKS: Checks = (
    (_ranges, ("cells", "search", "fixed")),
    (_fixed_values, ("fixed",)),
    (_combinations, ("cells", "search", "fixed")),
    (_batch_norm, ("cells", "model", "batch_norm", "resources", "fixed")),
)
