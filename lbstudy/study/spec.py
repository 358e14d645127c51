"""The study file: what is compared, what is tuned, and with what budget.

`load.py` reads it. A cell is one optimizer x batch size x smoothing; every cell is tuned with equally many trials.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from io import StringIO
from itertools import product
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, SerializeAsAny, field_validator, model_validator
from ruamel.yaml import YAML

from lbstudy.parallel.randomness import derive_seed
from lbstudy.study.file import show
from lbstudy.study.run import BatchNormSpec, Budget, DatasetSpec, DecayOf, ModelSpec, Schedule, Spec, Value
from lbstudy.study.space import Condition, Range


@dataclass(frozen=True)
class Cell:
    """One optimizer x batch size x smoothing."""

    optimizer: str
    batch_size: int
    smoothing: str

    @property
    def name(self) -> str:
        """Name of the cell in folders, tables and on the console."""
        return f"{self.optimizer}-b{self.batch_size}-{self.smoothing}"


class CellsSpec(Spec):
    """The cells: the product of three lists, less the combinations left out."""

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
    def numbers(self) -> dict[str, Value]:
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
    """A configuration from the literature; it is tried first in its cell."""

    optimizer: str
    batch_size: int
    smoothing: str
    params: dict[str, float] = Field(min_length=1)

    @property
    def cell(self) -> Cell:
        """The cell it belongs to."""
        return Cell(self.optimizer, self.batch_size, self.smoothing)


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
    max_failures: int = Field(3, ge=0, description="times that a failed trial is tried again")


class StudySpec(Spec):
    """A whole study."""

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
        first = sorted(found, key=lambda name: name != "learning_rate")
        return {name: found[name] for name in first if found[name] is not None}  # type: ignore[misc]

    def tuned(self) -> list[str]:
        """What is tuned in any cell, in the order of the tables."""
        names = dict.fromkeys(name for cell in self.list_cells() for name in self.ranges(cell))
        return [name for name in sorted(self.search, key=lambda n: n != "learning_rate") if name in names]

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

    def to_yaml(self) -> str:
        """The study as the text of a study file."""
        stream = StringIO()
        YAML(typ="safe", pure=True).dump(self.model_dump(mode="json", by_alias=True, exclude_none=True), stream)
        return stream.getvalue()
