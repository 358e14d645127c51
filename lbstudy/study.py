"""The study file: what is compared, what is tuned, and with what budget.

`load_study` turns YAML into a `StudySpec` or raises `StudyError`, which names file, line, key and what is
allowed, for all problems at once. A cell is one optimizer x batch size x smoothing; every cell is tuned with the
same number of trials. This module imports neither torch nor ray.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from io import StringIO
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError

from lbstudy.randomness import derive_seed
from lbstudy.runspec import (
    USED_BY_SMOOTHING,
    BatchNormSpec,
    Budget,
    DatasetSpec,
    Hyperparameters,
    KfacSpec,
    MixupSpec,
    ModelName,
    NoiseSpec,
    OptimizerName,
    RunSpec,
    Schedule,
    SmoothingName,
    Spec,
    batch_norm_problem,
    is_used,
)
from lbstudy.space import Condition, Range

SHIPPED_STUDIES = [Path(__file__).parent / "search_spaces", Path(__file__).parent.parent / "search_spaces"]
"""Where the shipped study files lie: in the installed package, or in the source tree."""


class StudyError(Exception):
    """A study that cannot be run as it stands. The message is meant for the person who wrote it."""


@dataclass(frozen=True)
class Cell:
    """One optimizer x batch size x smoothing."""

    optimizer: OptimizerName
    batch_size: int
    smoothing: SmoothingName

    @property
    def name(self) -> str:
        """Name of the cell in folders, tables and on the console."""
        return f"{self.optimizer}-b{self.batch_size}-{self.smoothing}"


class CellsSpec(Spec):
    """The cells: the product of three lists, less the combinations left out."""

    optimizer: list[OptimizerName] = Field(min_length=1)
    batch_size: list[int] = Field(min_length=1)
    smoothing: list[SmoothingName] = Field(min_length=1)
    exclude: list[Condition] = Field([], description="combinations to leave out")

    @field_validator("optimizer", "batch_size", "smoothing")
    @classmethod
    def _no_repeats(cls, values: list[Any]) -> list[Any]:
        if len(set(values)) != len(values):
            raise ValueError(f"each value once, but got {values}")
        return values

    @field_validator("batch_size")
    @classmethod
    def _positive(cls, values: list[int]) -> list[int]:
        if min(values) < 1:
            raise ValueError(f"batch sizes must be positive, but got {min(values)}")
        return values


class Fixed(Hyperparameters):
    """Hyper-parameters that are not tuned, and the settings of the smoothing methods and of K-FAC."""

    nesterov: bool = False
    mixup: MixupSpec = MixupSpec()
    noise: NoiseSpec = NoiseSpec()
    kfac: KfacSpec = KfacSpec()


class Published(Spec):
    """A configuration from the literature; it is tried first in its cell."""

    optimizer: OptimizerName
    batch_size: int
    smoothing: SmoothingName
    params: dict[str, float] = Field(min_length=1)

    @property
    def cell(self) -> Cell:
        """The cell it belongs to."""
        return Cell(self.optimizer, self.batch_size, self.smoothing)


class Asha(Spec):
    """Asynchronous successive halving (Li et al. 2020). Rungs lie at grace_period * reduction_factor^k epochs."""

    name: Literal["asha"] = "asha"
    grace_period: int = Field(1, gt=0, description="epochs that every trial gets")
    reduction_factor: float = Field(3, gt=1, description="one trial in this many passes a rung")


class Tuning(Spec):
    """How each cell is tuned. All cells get the same number of trials."""

    trials: int = Field(gt=0, description="trials per cell")
    sampler: Literal["tpe", "random", "qmc", "gp"] = "tpe"
    startup_trials: int = Field(4, ge=0, description="random trials before tpe and gp begin to model")
    pruner: Asha | Literal["none"] = "none"
    metric: Literal["val_accuracy", "val_loss"] = "val_accuracy"
    direction: Literal["maximize", "minimize"] = "maximize"

    @model_validator(mode="after")
    def _direction_fits(self) -> Tuning:
        right = "maximize" if self.metric == "val_accuracy" else "minimize"
        if self.direction != right:
            raise ValueError(f"`direction` of metric {self.metric} must be {right}, but got {self.direction}")
        return self

    def rungs(self, epochs: int) -> list[int]:
        """Epochs at which the pruner may end a trial of `epochs` epochs."""
        if self.pruner == "none":
            return []
        rungs: list[int] = []
        rung: float = self.pruner.grace_period
        while rung < epochs:
            rungs.append(int(-(-rung // 1)))  # a result counts for a rung from the first whole epoch at or past it
            rung *= self.pruner.reduction_factor
        return rungs


class Resources(Spec):
    """What one trial occupies, how it uses it, and what happens when something breaks. Changes no result."""

    workers: int = Field(1, gt=0, description="data-parallel workers of a trial")
    cpus_per_worker: float = Field(1, gt=0)
    gpus_per_worker: Annotated[float, Field(ge=0)] | Literal["auto"] = Field(
        "auto", description="fractions let several trials share a GPU; auto: one where the cluster has any, else none"
    )
    micro_batch_size: int | None = Field(None, gt=0, description="samples per forward pass, to save memory")
    compile: bool = Field(False, description="torch.compile the model")
    checkpoint_minutes: float = Field(
        5, ge=0, description="a running trial's state is saved this often; 0: every epoch"
    )
    keep_best: int = Field(1, ge=0, description="final models kept per cell")
    timeout_minutes: float = Field(60, gt=0, description="a trial that reports no epoch for so long has failed")
    max_failures: int = Field(3, ge=0, description="times that a failed trial is tried again")


class StudySpec(Spec):
    """A whole study."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)
    source: str = Field("", description="citation of what the study follows")
    model: ModelName
    dataset: DatasetSpec
    budget: Budget
    schedule: Schedule = Schedule()
    fixed: Fixed = Fixed()
    cells: CellsSpec
    search: dict[str, list[Range]] = Field(min_length=1)
    published: list[Published] = []
    tuning: Tuning
    resources: Resources = Resources()
    batch_norm: BatchNormSpec = "sync"
    precision: Literal["fp32", "bf16", "fp64"] = "fp32"
    seed: int = Field(0, ge=0)

    @field_validator("search", mode="before")
    @classmethod
    def _one_range_is_a_list_of_one(cls, search: object) -> object:
        if isinstance(search, dict):
            return {name: [entry] if isinstance(entry, Mapping) else entry for name, entry in search.items()}
        return search

    def all_cells(self) -> list[Cell]:
        """The full product, in the order of the lists."""
        lists = self.cells
        return [Cell(*parts) for parts in product(lists.optimizer, lists.batch_size, lists.smoothing)]

    def list_cells(self) -> list[Cell]:
        """The cells of the study."""
        return [cell for cell in self.all_cells() if not self._left_out(cell)]

    def left_out(self) -> list[Cell]:
        """The cells of the product that `cells.exclude` leaves out."""
        return [cell for cell in self.all_cells() if self._left_out(cell)]

    def _left_out(self, cell: Cell) -> bool:
        return any(c.matches(cell.optimizer, cell.batch_size, cell.smoothing) for c in self.cells.exclude)

    def ranges(self, cell: Cell) -> dict[str, Range]:
        """What is tuned in a cell, in the order of the tables. The first entry whose condition holds counts."""
        found = {
            name: next((r for r in entries if r.when.matches(cell.optimizer, cell.batch_size, cell.smoothing)), None)
            for name, entries in self.search.items()
        }
        return {name: found[name] for name in Hyperparameters.names() if found.get(name)}  # type: ignore[misc]

    def published_params(self, cell: Cell) -> list[dict[str, float]]:
        """The published configurations of a cell."""
        return [entry.params for entry in self.published if entry.cell == cell]

    def steps_per_epoch(self, cell: Cell, samples: int) -> int:
        """Optimizer steps that an epoch of `samples` training samples takes in a cell."""
        whole = samples // cell.batch_size
        return whole if self.dataset.drop_last and whole else -(-samples // cell.batch_size)

    def trial_seed(self, cell: Cell, number: int) -> int:
        """The seed of a cell's trial; another one for each."""
        return derive_seed(self.seed, "trial", cell.name, number)

    def run_spec(self, cell: Cell, params: Mapping[str, float], seed: int) -> RunSpec:
        """The training run of a cell with these tuned values."""
        fixed = {name: getattr(self.fixed, name) for name in Hyperparameters.names()}
        used = {
            name: value
            for name, value in {**fixed, **params}.items()
            if value is not None and is_used(name, cell.optimizer, cell.smoothing)
        }
        return RunSpec(
            model=self.model,
            dataset=self.dataset,
            batch_size=cell.batch_size,
            optimizer=cell.optimizer,
            smoothing=cell.smoothing,
            hyper=Hyperparameters.model_validate(used),
            nesterov=self.fixed.nesterov,
            mixup=self.fixed.mixup,
            noise=self.fixed.noise,
            kfac=self.fixed.kfac,
            budget=self.budget,
            schedule=self.schedule,
            batch_norm=self.batch_norm,
            precision=self.precision,
            micro_batch_size=self.resources.micro_batch_size,
            compile=self.resources.compile,
            seed=seed,
            split_seed=self.seed,
        )

    def to_yaml(self) -> str:
        """The study as the text of a study file."""
        stream = StringIO()
        YAML(typ="safe", pure=True).dump(self.model_dump(mode="json", by_alias=True, exclude_none=True), stream)
        return stream.getvalue()


def find_study(file: str) -> Path:
    """The path of a study file: as given, or that of a study's folder, or else a shipped study by its name."""
    path = Path(file)
    if (path / "study.yaml").is_file():
        return path / "study.yaml"
    if path.is_file():
        return path
    name = path.name if path.suffix else f"{path.name}.yaml"
    for folder in SHIPPED_STUDIES:
        if path.parent == Path() and (folder / name).is_file():
            return folder / name
    shipped = sorted({p.name for folder in SHIPPED_STUDIES for p in folder.glob("*.yaml")})
    raise StudyError(f"{file}: no such study file; the shipped studies are {', '.join(shipped)}")


def load_study(path: Path, overrides: Mapping[str, Any] | None = None) -> StudySpec:
    """Read and check a study file.

    Args:
        path: the YAML file.
        overrides: values that replace those of the file, by dotted key (`tuning.trials`).

    Raises:
        StudyError: all problems found, one a line, each with file, line, key and what is allowed.
    """
    raw = read_yaml(path)
    if not isinstance(raw, dict):
        raise StudyError(f"{path}: a study file is a mapping of keys, but this is {type(raw).__name__}")
    for key, value in (overrides or {}).items():
        _override(raw, key, value)
    try:
        study = StudySpec.model_validate(raw)
    except ValidationError as error:
        problems = [(tuple(e["loc"]), _explain(e)) for e in error.errors()]
    else:
        problems = list(_problems(study))
        if not problems:
            return study
    first_of_each_key = dict(reversed(problems))
    lines = [_located(path, raw, loc, message) for loc, message in reversed(first_of_each_key.items())]
    raise StudyError("\n".join(dict.fromkeys(lines)))


def read_yaml(path: Path) -> Any:
    """Parse YAML 1.2, where 1e-3 is a number; duplicate keys are errors. Values keep their line numbers."""
    try:
        return YAML(typ="rt", pure=True).load(path.read_text(encoding="utf-8"))
    except MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise StudyError(f"{path}{line}: not valid YAML: {error.problem}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise StudyError(f"{path}: cannot be read: {error}") from error


def parse_override(text: str) -> tuple[str, Any]:
    """`KEY=VALUE` of --set: a dotted key and a YAML value."""
    key, separator, value = text.partition("=")
    if not separator or not key.strip():
        raise StudyError(f"--set {text}: must be KEY=VALUE, such as --set tuning.sampler=random")
    try:
        return key.strip(), YAML(typ="safe", pure=True).load(value)
    except MarkedYAMLError as error:
        raise StudyError(f"--set {text}: the value is not valid YAML: {error.problem}") from error


def _override(raw: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    node: Any = raw
    for depth, part in enumerate(parents):
        if not isinstance(node.get(part, {}), dict):
            raise StudyError(f"--set {key}: `{'.'.join(parents[: depth + 1])}` is not a mapping, but {node[part]!r}")
        node = node.setdefault(part, {})
    node[last] = value


def _problems(study: StudySpec) -> Iterator[tuple[tuple[Any, ...], str]]:
    """What single keys cannot tell: contradictions between the parts of a study."""
    if not study.list_cells():
        yield ("cells", "exclude"), "leaves no cell at all"
    for name, entries in study.search.items():
        if name not in Hyperparameters.names():
            yield ("search", name), f"not a hyper-parameter{_nearest(name, Hyperparameters.names())}"
            continue
        for index, entry in enumerate(entries):
            low, high = entry.bounds
            for value in (low, high):
                try:
                    Hyperparameters.model_validate({name: value})
                except ValidationError as error:
                    yield ("search", name, index), f"{value:g} is not allowed: {error.errors()[0]['msg'].lower()}"
                    break
    for cell in study.list_cells():
        for name in study.ranges(cell):
            if not is_used(name, cell.optimizer, cell.smoothing):
                yield ("search", name), f"has no effect in cell {cell.name}; restrict it with `when`"
        for name in ("learning_rate", *(n for n, m in USED_BY_SMOOTHING.items() if m in cell.smoothing.split("+"))):
            if name not in study.ranges(cell) and getattr(study.fixed, name) is None:
                yield ("search", name), f"cell {cell.name} needs it, in `search` or in `fixed`"
    uses_noise = any("noise" in cell.smoothing for cell in study.list_cells())
    conflict = batch_norm_problem(
        study.model, study.batch_norm, study.resources.micro_batch_size, study.fixed.noise if uses_noise else None
    )
    if conflict:
        yield ("batch_norm",), conflict
    yield from _published_problems(study)


def _published_problems(study: StudySpec) -> Iterator[tuple[tuple[Any, ...], str]]:
    for index, entry in enumerate(study.published):
        where: tuple[Any, ...] = ("published", index)
        if entry.cell not in study.all_cells():
            yield where, f"{entry.cell.name} is no cell of this study"
            continue
        ranges = study.ranges(entry.cell)
        for name, value in entry.params.items():
            if name not in ranges:
                yield (*where, "params", name), f"is not tuned in cell {entry.cell.name}"
            elif not ranges[name].contains(value):
                yield (*where, "params", name), f"{value:g} lies outside the search range {ranges[name]}"


def _explain(error: Mapping[str, Any]) -> str:
    key = str(error["loc"][-1]) if error["loc"] else ""
    if error["type"] == "extra_forbidden":
        return f"unknown key{_nearest(key, _known_keys())}"
    if error["type"] == "missing":
        return "is required, but missing"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "string_pattern_mismatch":
        message = "only letters, digits, '.', '_' and '-', and a letter or digit first"
    message = message[0].lower() + message[1:]
    value = error["input"]
    plain = isinstance(value, str | int | float | bool) or value is None
    return f"{message}; got {value!r}" if plain and "got " not in message else message


def _known_keys() -> list[str]:
    def specs(base: type[Spec]) -> Iterator[type[Spec]]:
        for spec in base.__subclasses__():
            yield spec
            yield from specs(spec)

    return sorted({field.alias or name for spec in specs(Spec) for name, field in spec.model_fields.items()})


def _nearest(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean `{close[0]}`?" if close else f"; known are {', '.join(known)}" if len(known) < 12 else ""


def _located(path: Path, raw: Any, loc: tuple[Any, ...], message: str) -> str:
    """`file:line: key.path: message`. Parts of `loc` that are pydantic's own (union members) are skipped."""
    node, line, keys = raw, None, []
    for part in loc:
        inside = (isinstance(node, dict) and part in node) or (isinstance(node, list) and isinstance(part, int))
        if inside and (not isinstance(node, list) or part < len(node)):
            position = getattr(node, "lc", None)
            with suppress(AttributeError, KeyError, TypeError):  # an overriding value has no line of its own
                line = position.key(part)[0] if isinstance(node, dict) else position.item(part)[0]  # type: ignore[union-attr]
            node = node[part]
            keys.append(str(part))
        elif part == loc[-1] and isinstance(node, dict):
            keys.append(str(part))
    where = f"{path}:{line + 1}" if line is not None else str(path)
    return f"{where}: {'.'.join(keys) or 'study'}: {message}"
