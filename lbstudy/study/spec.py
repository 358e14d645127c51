"""The study file: what is compared, what is tuned, and with what budget.

`load.py` reads it. A cell is one optimizer x batch size x smoothing, and x whatever else is a factor (`factors.py`);
every cell is tuned with equally many trials.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from io import StringIO
from itertools import product
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, SerializeAsAny, field_validator, model_validator
from ruamel.yaml import YAML

from lbstudy.parallel.randomness import derive_seed
from lbstudy.study import split
from lbstudy.study.factors import Factors, Value, filled, in_words, named, of_cells, short, suffix, without
from lbstudy.study.file import Keys, paths, show
from lbstudy.study.old import LABELS
from lbstudy.study.run import (
    BatchNormSpec,
    Budget,
    DatasetSpec,
    DecayOf,
    Extent,
    ModelSpec,
    Number,
    Schedule,
    Spec,
    Target,
    steps_per_pass,
)
from lbstudy.study.space import Condition, Range


@dataclass(frozen=True)
class Cell:
    """One optimizer x batch size x smoothing, and a value of each further factor of the study, in their order."""

    optimizer: str
    batch_size: int
    smoothing: str
    factors: Factors = ()

    @property
    def name(self) -> str:
        """Name of the cell in folders, tables and on the console: `sgd-b128-none-vgg9-weight_decay=0.0005`."""
        smoothing = "+".join(map(short, self.smoothing.split("+")))
        return f"{short(self.optimizer)}-b{self.batch_size}-{smoothing}{suffix(self.factors)}"

    @property
    def values(self) -> dict[str, Value]:
        """Its value of each factor, as tables show them."""
        own: dict[str, Value] = {
            "optimizer": self.optimizer,
            "batch_size": self.batch_size,
            "smoothing": self.smoothing,
        }
        return own | dict(self.factors)

    @property
    def methods(self) -> list[str]:
        """The names of its optimizer and of the parts of its smoothing."""
        return [self.optimizer, *self.smoothing.split("+")]

    def but(self, **changes: Any) -> Cell:
        """The cell with another optimizer, batch size or smoothing, all other factors equal."""
        return replace(self, **changes)


class CellsSpec(Spec):
    """The cells: the product of three lists and of the further factors, less the combinations left out.

    A further factor is any other key of the study, such as `model` or `fixed.weight_decay`: a list of plain values, or
    a mapping of names to values. `factor_checks` says what is wrong with one.
    """

    model_config = ConfigDict(extra="allow")

    optimizer: list[str] = Field(min_length=1)
    batch_size: list[int] = Field(min_length=1)
    smoothing: list[str] = Field(min_length=1)
    exclude: list[Condition] = Field([], description="combinations to leave out")

    @field_validator("optimizer", "batch_size", "smoothing")
    @classmethod
    def _no_repeats(cls, values: list[Any]) -> list[Any]:
        if len(set(values)) != len(values):
            raise ValueError(f"each value once, but got {show(values)}")
        return values

    @field_validator("batch_size")
    @classmethod
    def _positive(cls, values: list[int]) -> list[int]:
        if min(values) < 1:
            raise ValueError(f"batch sizes must be positive, but got {min(values)}")
        return values


class Fixed(Spec):
    """Hyper-parameters that are not tuned, and settings of the methods, each under its method's name.

    Which there are, the methods of a study say: `lbstudy.methods.configure.study_class` makes the class that knows.
    """

    model_config = ConfigDict(extra="allow")

    weight_decay_of: DecayOf = Field("all", description="weights: weight decay leaves out norms and biases")

    def _others(self) -> dict[str, Any]:
        return {name: value for name, value in self if name != "weight_decay_of" and value is not None}

    @property
    def numbers(self) -> dict[str, Number]:
        """The hyper-parameters."""
        return {name: value for name, value in self._others().items() if isinstance(value, bool | int | float)}

    @property
    def settings(self) -> dict[str, dict[str, Any]]:
        """The settings of methods, by method."""
        found = {}
        for name, value in self._others().items():
            if isinstance(value, Spec | dict):
                found[name] = value.model_dump(mode="json") if isinstance(value, Spec) else value
        return found


class Published(Spec):
    """A configuration from the literature; it is tried first in its cell, or in all cells that it may mean: further
    factors that it does not name may have any value."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Value]

    optimizer: str
    batch_size: int
    smoothing: str
    params: dict[str, float] = Field(min_length=1)

    @property
    def cell(self) -> Cell:
        """The cell that it names, with those further factors that it names."""
        return Cell(self.optimizer, self.batch_size, self.smoothing, tuple(self.__pydantic_extra__.items()))

    def matches(self, cell: Cell) -> bool:
        """Whether it is for a cell."""
        same = (self.optimizer, self.batch_size, self.smoothing) == (cell.optimizer, cell.batch_size, cell.smoothing)
        return same and self.__pydantic_extra__.items() <= dict(cell.factors).items()


class Asha(Spec):
    """Asynchronous successive halving (Li et al. 2020). Rungs lie at grace_period * reduction_factor^k epochs.

    A trial passes a rung if it is among the best 1 / reduction_factor of those that have reached it so far: it does not
    wait for the others. The first always passes, so that more do than that share, above all of few trials.
    """

    name: Literal["asha"] = "asha"
    grace_period: int = Field(1, gt=0, description="epochs that every trial gets")
    reduction_factor: float = Field(
        3, gt=1, description="a trial passes a rung if it is among the best 1/R of those that got there before it"
    )


class ScalingRule(Spec):
    """How the best learning rate of a small mini-batch is taken to larger ones."""

    reference: int = Field(alias="from", gt=0, description="batch size whose cells are tuned first")
    rule: Literal["linear", "sqrt"] = Field(description="linear: times B / from (Goyal et al. 2017); sqrt: its root")

    def factor(self, batch_size: int) -> float:
        """Of the learning rate at a batch size, against that at the reference."""
        ratio = batch_size / self.reference
        return ratio if self.rule == "linear" else ratio**0.5


Metric = Literal["val_accuracy", "val_loss", "steps_to_target", "epochs_to_target", "seconds_to_target"]


class Tuning(Spec):
    """How each cell is tuned. All cells get the same number of trials."""

    trials: int = Field(gt=0, description="trials per cell")
    sampler: Literal["tpe", "random", "qmc", "gp"] = "tpe"
    startup_trials: int = Field(4, ge=0, description="random trials before tpe and gp begin to model")
    pruner: Asha | Literal["none"] = "none"
    learning_rate_rule: ScalingRule | None = Field(
        None, description="first trial of every larger batch size: the best learning rate of batch `from`, scaled"
    )
    metric: Metric = Field("val_accuracy", description="after the last epoch, or the time until the target is met")
    direction: Literal["maximize", "minimize"] = Field("maximize", description="follows from the metric")
    target: Target | Literal["auto"] | None = Field(
        None, description="what *_to_target is about; auto: what the plain small batch reaches, which is tuned first"
    )

    @model_validator(mode="before")
    @classmethod
    def _direction_follows(cls, content: Any) -> Any:
        if not isinstance(content, dict) or "direction" in content or "metric" not in content:
            return content
        return content | {"direction": "maximize" if content["metric"] == "val_accuracy" else "minimize"}

    @model_validator(mode="after")
    def _direction_fits(self) -> Tuning:
        right = "maximize" if self.metric == "val_accuracy" else "minimize"
        if self.direction != right:
            raise ValueError(f"`direction` of metric {self.metric} must be {right}, but got {self.direction}")
        return self

    @property
    def goal(self) -> Target | None:
        """The target that trials are ended at; None where they are tuned for what their last epoch comes to, or where
        the target is not known yet."""
        return self.target if isinstance(self.target, Target) else None

    @property
    def in_words(self) -> str:
        """What trials are compared by."""
        if self.target is None:
            return f"{self.metric} after the last epoch"
        first = "what the plain small batch reaches, which is tuned for accuracy first"
        what = first if self.target == "auto" else str(self.target)
        return f"{self.metric.partition('_')[0]} to {what}"

    def verdicts(self, epochs: int, pace: float = 1) -> list[int]:
        """Epochs after which a trial of `epochs` epochs may be ended from outside: at rungs, and at any where it is
        tuned for a target, which another trial may have reached sooner."""
        return list(range(1, epochs)) if self.goal else self.rungs(epochs, pace)

    def rungs(self, epochs: int, pace: float = 1) -> list[int]:
        """Epochs, which are passes over the data, at which the pruner may end a trial of `epochs` of them; its own
        epochs are those of the budget, each of so many passes (`Budget.pace`)."""
        if self.pruner == "none":
            return []
        rungs: list[int] = []
        rung = self.pruner.grace_period * pace
        while rung < epochs:
            rungs.append(int(-(-rung // 1)))  # a result counts for a rung from the first whole epoch at or past it
            rung *= self.pruner.reduction_factor
        return list(dict.fromkeys(rungs))


TrackerName = Literal["tensorboard", "mlflow", "wandb"]


class Resources(Spec):
    """What one trial occupies, how, and what happens when something breaks. Changes results by rounding only."""

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
    lanes: int | None = Field(None, gt=0, description="trials at the same time, at most; default: as many as fit")
    wait_minutes: float = Field(
        60, ge=0, description="how long a study waits for machines, or for resources that others hold"
    )
    max_failures: int = Field(3, ge=0, description="times that a failed trial is tried again")
    track: list[TrackerName] = Field([], description="trackers that are told of the trials")


class StudySpec(Spec):
    """A whole study. What is a factor of its cells has the factor's first value at its own key; see `variant`."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)
    source: str = Field("", description="citation of what the study follows")
    code: list[str] = Field([], description="files and folders of your own, beside this file: modules of methods, data")
    model: ModelSpec
    dataset: DatasetSpec
    budget: Budget
    schedule: Schedule = Schedule()
    fixed: SerializeAsAny[Fixed] = Fixed()
    cells: CellsSpec
    search: dict[str, list[Range]] = Field(min_length=1)
    published: list[Published] = []
    tuning: Tuning
    resources: Resources = Resources()
    batch_norm: BatchNormSpec = "sync"
    precision: Literal["fp32", "bf16", "fp64"] = "fp32"
    evaluate_every: int | None = Field(
        None, gt=0, description="steps between evaluations within epochs; default: at the ends of epochs only"
    )
    seed: int = Field(0, ge=0)
    labels: dict[str, str] = Field({}, description="names of methods in tables and figures; theirs where left out")

    @model_validator(mode="before")
    @classmethod
    def _factors_fill_their_keys(cls, content: Any) -> Any:
        return filled(split.expanded(content))

    @field_validator("search", mode="before")
    @classmethod
    def _one_range_is_a_list_of_one(cls, search: object) -> object:
        if isinstance(search, dict):
            return {name: [entry] if isinstance(entry, Mapping) else entry for name, entry in search.items()}
        return search

    @property
    def factors(self) -> dict[str, dict[Value, Any]]:
        """The further factors by key, in the order of the keys of a study: what a cell holds -> what stands at the key.

        The order of the file does not count, so that the same factors make the same cells.
        """
        further = of_cells(self.cells.model_extra)
        return {key: named(further[key]) for key in sorted(further, key=_place)}

    def all_cells(self) -> list[Cell]:
        """The full product, in the order of the lists; the further factors change last. Of budgets that split a gap
        only those are there that make a run of its own (`split.exists`)."""
        lists, keys = self.cells, list(self.factors)
        cells = [
            Cell(*parts, tuple(zip(keys, values, strict=True)))
            for values in product(*self.factors.values())
            for parts in product(lists.optimizer, lists.batch_size, lists.smoothing)
        ]
        return [c for c in cells if split.exists(dict(c.factors).get(split.KEY, ""), c.batch_size, lists.batch_size)]

    def list_cells(self) -> list[Cell]:
        """The cells of the study."""
        return [cell for cell in self.all_cells() if not self._left_out(cell)]

    def left_out(self) -> list[Cell]:
        """The cells of the product that `cells.exclude` leaves out."""
        return [cell for cell in self.all_cells() if self._left_out(cell)]

    def _left_out(self, cell: Cell) -> bool:
        return any(condition.matches(cell) for condition in self.cells.exclude)

    def variant(self, cell: Cell) -> StudySpec:
        """The study as a cell sees it: with the cell's further factors at their keys, and only the cells that have
        them too, under their names. Without further factors that is the study itself.

        Raises:
            ValidationError: the values do not go together.
        """
        chosen = dict(cell.factors)
        if all(list(values) == [chosen[key]] for key, values in self.factors.items()):
            return self
        cells = self.cells.model_dump() | {key: {v: self.factors[key][v]} for key, v in chosen.items()}
        return type(self).model_validate(self.model_dump(by_alias=True, exclude_none=True) | {"cells": cells})

    def aimed_at(self, target: Target | Literal["auto"] | None) -> StudySpec:
        """The study, tuned for this target."""
        return self.model_copy(update={"tuning": self.tuning.model_copy(update={"target": target})})

    def variants(self) -> list[StudySpec]:
        """The variant of each combination of further factors that has cells. Cells of one variant differ in optimizer,
        batch size and smoothing alone, so that these are what is compared."""
        first = {cell.factors: cell for cell in reversed(self.list_cells())}
        return [self.variant(cell) for cell in reversed(first.values())] or [self]

    def compared(self) -> list[StudySpec]:
        """The variants but those that split the gaps of others: see `split`."""
        return [part for part in self.variants() if part.splits is None] or [self]

    def ends(self, cell: Cell) -> tuple[Cell, Cell]:
        """The small and the large batch of the gap that a cell splits."""
        own = cell.but(factors=split.whole(cell.factors))
        sizes = self.cells.batch_size
        if split.part_of(cell.factors) == split.SAME_UPDATES:
            return own.but(batch_size=min(sizes)), own
        return own, own.but(batch_size=max(sizes))

    def whole(self, part: StudySpec) -> StudySpec:
        """The variant whose gaps a variant of the study splits; any other variant is its own."""
        cell = part.list_cells()[0]
        return self.variant(cell.but(factors=split.whole(cell.factors))) if part.splits else part

    @property
    def splits(self) -> str | None:
        """Of a variant, which part of another one's gaps its cells are for (`split.PARTS`), if they are."""
        return next((split.part_of(cell.factors) for cell in self.list_cells()), None)

    @property
    def in_words(self) -> str:
        """Of a variant, the values of its further factors: `vgg9 and weight decay 0.0005`; else empty."""
        cells = self.list_cells()
        return in_words(cells[0].factors) if len({cell.factors for cell in cells}) == 1 else ""

    @property
    def methods(self) -> set[str]:
        """The names of all optimizers and smoothings in its cells, combined ones by their parts."""
        return {method for cell in self.list_cells() for method in cell.methods}

    def label(self, method: str) -> str:
        """What sentences and figures call an optimizer or a smoothing."""
        if method == "none":
            return "no smoothing"
        return " and ".join((self.labels.get(part) or LABELS.get(part) or short(part)) for part in method.split("+"))

    def ranges(self, cell: Cell) -> dict[str, Range]:
        """What is tuned in a cell, in the order of the tables. The first entry whose condition holds counts."""
        found = {
            name: next((r for r in entries if r.when.matches(cell)), None) for name, entries in self.search.items()
        }
        first = sorted(found, key=lambda name: name != "learning_rate")
        return {name: found[name] for name in first if found[name] is not None}  # type: ignore[misc]

    def tuned(self) -> list[str]:
        """What is tuned in any cell, in the order of the tables."""
        names = dict.fromkeys(name for cell in self.list_cells() for name in self.ranges(cell))
        return [name for name in sorted(self.search, key=lambda n: n != "learning_rate") if name in names]

    def published_params(self, cell: Cell) -> list[dict[str, float]]:
        """The published configurations of a cell."""
        return [entry.params for entry in self.published if entry.matches(cell)]

    def steps_per_epoch(self, cell: Cell, samples: int) -> int:
        """Optimizer steps that an epoch of `samples` training samples takes in a cell."""
        return steps_per_pass(samples, cell.batch_size, self.variant(cell).dataset.drop_last)

    def extent(self, cell: Cell, samples: int) -> Extent:
        """How long a run of a cell over so many training samples is."""
        part = self.variant(cell)
        return part.budget.extent(samples, cell.batch_size, part.dataset.drop_last)

    def rungs(self, cell: Cell, epochs: int) -> list[int]:
        """Epochs at which the pruner may end a trial of a cell, of so many epochs (`Tuning.rungs`)."""
        return self.tuning.rungs(epochs, self.variant(cell).budget.pace(cell.batch_size))

    def verdicts(self, cell: Cell, epochs: int) -> list[int]:
        """Epochs after which a trial of a cell, of so many epochs, may be ended from outside (`Tuning.verdicts`)."""
        return self.tuning.verdicts(epochs, self.variant(cell).budget.pace(cell.batch_size))

    def trial_seed(self, cell: Cell, number: int) -> int:
        """The seed of a cell's trial; another one for each."""
        return derive_seed(self.seed, "trial", cell.name, number)

    def to_yaml(self) -> str:
        """The study as the text of a study file; what is a factor stands there only."""
        content = self.model_dump(mode="json", by_alias=True, exclude_none=True)
        content["cells"] = self.cells.model_dump(mode="json")  # null may be a named value of a factor
        for key in self.factors:
            content = without(content, key)
        yaml, stream = YAML(typ="safe", pure=True), StringIO()
        # unsorted: the order of named values is that of the cells
        yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
        yaml.dump(content, stream)
        return stream.getvalue()


def _place(key: str) -> tuple[int, str]:
    """Where a key stands among all keys of a study; those that only methods know by their names, within `fixed`."""
    order, path = _order(), tuple(key.split("."))
    return order.get(path, order.get(path[:1], len(order))), key


@cache
def _order() -> dict[Keys, int]:
    """The place of each key among all keys of a study."""
    return {key: place for place, key in enumerate(paths(StudySpec))}
