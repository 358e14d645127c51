"""From a study's cell and tuned values to a run: which numbers and settings its methods have."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from pydantic import TypeAdapter, ValidationError, create_model
from pydantic.fields import FieldInfo

from lbstudy.methods import optimizers, smoothing
from lbstudy.methods.declaration import Declaration, MethodError, RunNumbers, remembered
from lbstudy.study.file import nearest
from lbstudy.study.run import Number, RunSpec, Schedule
from lbstudy.study.spec import Cell, Fixed, StudySpec

SCHEDULE = "schedule."
"""What names of tuned numbers begin with that are the schedule's."""


def methods_of(optimizer: str, smoothings: str) -> dict[str, Declaration]:
    """The methods of a cell, by their names.

    Raises:
        MethodError: one is not there, or they cannot be combined.
    """
    return {optimizer: optimizers.get(optimizer), **smoothing.declarations(smoothings)}


def numbers_of(optimizer: str, smoothings: str) -> dict[str, FieldInfo]:
    """The hyper-parameters of a cell: those of every run, and those of its methods.

    Raises:
        MethodError: as `methods_of`; or two of its methods use one name for two things.
    """
    found = dict(RunNumbers.model_fields)
    owners = dict.fromkeys(found, "every run")
    for name, method in methods_of(optimizer, smoothings).items():
        for number, field in method.numbers.model_fields.items():
            if number in owners:
                raise MethodError(f"{owners[number]} and {name} cannot be combined: each has a number `{number}`")
            found[number], owners[number] = field, name
    return found


def run_spec(study: StudySpec, cell: Cell, params: Mapping[str, float], seed: int) -> RunSpec:
    """The training run of a cell with these tuned values."""
    study = study.variant(cell)
    course = {name.removeprefix(SCHEDULE): value for name, value in params.items() if name.startswith(SCHEDULE)}
    given: dict[str, Any] = {**study.fixed.numbers, **params}
    hyper = {}
    for name, field in numbers_of(cell.optimizer, cell.smoothing).items():
        value = given.get(name, None if field.is_required() else field.default)
        if value is not None:
            hyper[name] = value
    settings = {
        name: method.settings.model_validate(study.fixed.settings.get(name, {})).model_dump(mode="json")
        for name, method in methods_of(cell.optimizer, cell.smoothing).items()
    }
    return RunSpec(
        model=study.model,
        dataset=study.dataset,
        batch_size=cell.batch_size,
        optimizer=cell.optimizer,
        smoothing=cell.smoothing,
        hyper=hyper,
        settings={name: values for name, values in settings.items() if values},
        weight_decay_of=study.fixed.weight_decay_of,
        budget=study.budget,
        schedule=Schedule.model_validate(study.schedule.model_dump() | course),
        batch_norm=study.batch_norm,
        precision=study.precision,
        micro_batch_size=study.resources.micro_batch_size,
        compile=study.resources.compile,
        seed=seed,
        split_seed=study.seed,
        evaluate_every=study.evaluate_every,
        target=study.tuning.goal,
        until_target=study.tuning.goal is not None,
    )


def require(run: RunSpec) -> None:
    """Make sure that a run's numbers and settings are those of its methods.

    Raises:
        MethodError: one is unknown, missing or not allowed.
    """
    known = numbers_of(run.optimizer, run.smoothing)
    for name, value in run.hyper.items():
        if name not in known:
            raise MethodError(f"`{name}` is no number of {run.optimizer} with {run.smoothing}{nearest(name, known)}")
        if problem := value_problem(known[name], value):
            raise MethodError(f"`{name}` = {value:g} is not allowed: {problem}")
    for name, field in known.items():
        if field.is_required() and name not in run.hyper:
            raise MethodError(f"`{name}` is missing")
    methods = methods_of(run.optimizer, run.smoothing)
    for name, settings in run.settings.items():
        if name not in methods:
            raise MethodError(f"settings of {name}, but the run's methods are {', '.join(methods)}")
        try:
            methods[name].settings.model_validate(settings)
        except ValidationError as error:
            raise MethodError(f"settings of {name}: {error}") from error


def value_problem(field: FieldInfo, value: Number) -> str | None:
    """Why a hyper-parameter cannot have this value, or None if it can."""
    try:
        TypeAdapter(field.rebuild_annotation()).validate_python(value)
    except ValidationError as error:
        return error.errors()[0]["msg"].lower()
    return None


@remembered
def study_class(optimizer_names: tuple[str, ...], smoothing_names: tuple[str, ...]) -> type[StudySpec]:
    """`StudySpec` whose `fixed` knows the numbers and settings of these methods, and those of all built-in ones, for a
    study may be narrowed to fewer methods than its `fixed` is for.

    A number that is not given has its default where all these methods agree on it; settings have theirs.
    """
    used: dict[str, Declaration] = {}
    for name in optimizer_names:
        used |= methods_of(name, smoothing.NONE)
    for name in smoothing_names:
        used |= smoothing.declarations(name)
    others: dict[str, Declaration] = {name: optimizers.get(name) for name in optimizers.names()}
    others |= {name: part for name in smoothing.names() for name, part in smoothing.declarations(name).items()}
    methods = others | used
    fields: dict[str, Any] = {}
    every_run = Declaration(label="", source="", numbers=RunNumbers)
    for name, field in _all_numbers([every_run, *methods.values()]):
        defaults = {m.numbers.model_fields[name].default for m in used.values() if name in m.numbers.model_fields}
        known = len(defaults) == 1 and not field.is_required()
        fields.setdefault(name, (_optional(field), *defaults) if known else (_optional(field), None))
    for name, method in methods.items():
        if method.settings.model_fields or method.settings.model_config.get("extra") == "allow":
            default = method.settings() if name in used and method.settings.model_fields else None
            fields[name] = (method.settings | None, default)
    strict = create_model("Fixed", __base__=Fixed, __cls_kwargs__={"extra": "forbid"}, **fields)
    return create_model("StudySpec", __base__=StudySpec, fixed=(strict, strict()))


def full_study_class() -> type[StudySpec]:
    """`StudySpec` that knows the numbers and settings of all built-in methods, with their defaults."""
    return study_class(tuple(optimizers.names()), tuple(smoothing.names()))


def schedule_numbers(study: StudySpec) -> dict[str, FieldInfo]:
    """What of a study's schedule can be tuned: its warm-up, and the length and the end of its decay."""
    names = ("warmup",) if study.schedule.decay is None else ("warmup", "decay", "end_factor")
    return {f"{SCHEDULE}{name}": Schedule.model_fields[name] for name in names}


def _all_numbers(methods: Iterable[Declaration]) -> Iterator[tuple[str, FieldInfo]]:
    for method in methods:
        yield from method.numbers.model_fields.items()


def _optional(field: FieldInfo) -> Any:
    """A number's type and bounds, with None for one that is not given."""
    return field.rebuild_annotation() | None
