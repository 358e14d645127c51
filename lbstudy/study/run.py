"""One training run as typed values: all that `train()` needs to know, and nothing else.

A `RunSpec` is plain data (JSON in, JSON out). Each trial's record holds its own, so anyone can repeat the run
without the study around it. This module imports neither torch nor ray.
"""

from __future__ import annotations

from difflib import get_close_matches
from math import ceil, cos, pi
from typing import Any, Literal, NamedTuple, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

DATASETS = ("digits", "cifar10", "cifar100", "mnist", "fashion_mnist", "image_folder", "synthetic")

TrainOn = Literal["split", "all"]
Residency = Literal["auto", "device", "host"]
DecayOf = Literal["all", "weights"]

Number = bool | int | float
"""Value of a hyper-parameter: a number, or a switch."""


class Spec(BaseModel):
    """Base of every typed value in a study file: immutable, and a key it does not know is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class DatasetSpec(Spec):
    """Which images, how many of them validate, and how training images are augmented."""

    name: str = Field(
        description="or a function of your own, module:function",
        json_schema_extra={"anyOf": [{"enum": list(DATASETS)}, {"pattern": "^[^:]+:[^:]+$"}]},
    )
    root: str | None = Field(None, description="folder of the files; default: the user's cache folder")
    index: str | None = Field(
        None, description="a CSV or Parquet file with columns path, label and part (train, test), instead of a tree"
    )
    validation_size: int | float = Field(
        0.1, gt=0, description="samples taken from the training set, or a fraction below 1; stratified"
    )
    augment: tuple[Literal["crop", "random_resized_crop", "flip", "color_jitter", "cutout"], ...] = Field(
        (),
        description="crop: pad 4 and crop at random; random_resized_crop: a part at random, brought to the size of the "
        "network's images; flip: horizontally; color_jitter: brightness, contrast, saturation; cutout: erase a "
        "16-pixel square",
    )
    jitter: float = Field(0.4, gt=0, le=1, description="color_jitter: factors are up to so much from 1")
    crop_size: int | None = Field(
        None, gt=0, description="the network's images, pixels square: the centre, or random_resized_crop's result"
    )
    drop_last: bool = Field(False, description="leave out an epoch's last, shorter mini-batch")
    download: bool = Field(False, description="let torchvision download the files when they are missing")
    image_size: int | None = Field(None, gt=0, description="image_folder: bring every image to this many pixels square")
    image_fit: Literal["stretch", "crop"] = Field(
        "stretch", description="image_folder, to a square: stretch; or crop: by the short side, then the centre"
    )
    residency: Residency = Field(
        "auto", description="where the images lie while training: on the device, in the host's memory; by their size"
    )
    samples: int = Field(2048, gt=1, description="synthetic: number of training samples")

    def validation_samples(self, training_images: int) -> int:
        """How many of so many training images validate, whether or not they leave any."""
        size = self.validation_size
        return round(size * training_images) if size < 1 else int(size)

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in DATASETS and ":" not in name:
            meant = get_close_matches(name, DATASETS, n=1)
            hint = f"; did you mean {meant[0]!r}?" if meant else ""
            known = ", ".join(map(repr, DATASETS))
            raise ValueError(f"input should be {known} or a function as module:function; got {name!r}{hint}")
        return name

    @field_validator("augment")
    @classmethod
    def _one_crop(cls, augment: tuple[str, ...]) -> tuple[str, ...]:
        if {"crop", "random_resized_crop"} <= set(augment):
            raise ValueError("input should have one of `crop` and `random_resized_crop`, and not both")
        return augment

    @model_validator(mode="after")
    def _index_of_files(self) -> DatasetSpec:
        if self.index is not None and self.name != "image_folder":
            raise ValueError(f"index is for image_folder; got {self.name}")
        return self

    @property
    def has_files(self) -> bool:
        """Whether there is something to look for: the digits come with scikit-learn, and synthetic images are drawn."""
        return self.name not in ("digits", "synthetic")

    @property
    def function(self) -> str | None:
        """The name of the user's function that gives the images, if one does."""
        return self.name if ":" in self.name else None


class Extent(NamedTuple):
    """How long a run over a known number of training samples is."""

    steps: int  # optimizer steps, of the whole run
    steps_per_epoch: int  # of an epoch as its budget counts them, and so its milestones and its warm-up
    steps_per_pass: int  # over the training samples
    images_per_pass: int
    batch_size: int

    @property
    def epochs(self) -> int:
        """Passes over the training samples, each of which ends in an evaluation; the last may be cut short."""
        return ceil(self.steps / self.steps_per_pass)

    def images(self, steps: int | None = None) -> int:
        """Training samples seen in so many steps from the beginning, by default in all."""
        passes, rest = divmod(self.steps if steps is None else steps, self.steps_per_pass)
        return passes * self.images_per_pass + min(rest * self.batch_size, self.images_per_pass)


class Budget(Spec):
    """How long every trial of the study may train: in epochs, or in optimizer steps.

    With `updates_of` the epochs are those of that batch size: a run of another one makes as many updates, and sees more
    or fewer images.
    """

    epochs: int | None = Field(None, gt=0)
    steps: int | None = Field(None, gt=0)
    updates_of: int | None = Field(
        None, gt=0, description="with epochs: as many updates as this batch size makes in them, whatever the batch size"
    )

    @model_validator(mode="after")
    def _one_unit(self) -> Budget:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("give either `epochs` or `steps`, and not both")
        if self.updates_of is not None and self.epochs is None:
            raise ValueError("`updates_of` goes with `epochs`")
        return self

    @property
    def in_words(self) -> str:
        """How long that is."""
        if self.updates_of:
            return f"as many updates as batch {self.updates_of} makes in {self.epochs} epochs"
        return f"{self.epochs} epochs" if self.epochs else f"{self.steps} steps"

    def unit(self, steps_per_epoch: int) -> int:
        """Optimizer steps of what milestones count: an epoch, or a step. Here and below `steps_per_epoch` is that of
        `Extent`."""
        return steps_per_epoch if self.steps is None else 1

    def total_steps(self, steps_per_epoch: int) -> int:
        """Optimizer steps of a whole run."""
        return self.steps if self.steps is not None else self.epochs * steps_per_epoch  # type: ignore[operator]

    def pace(self, batch_size: int) -> float:
        """Passes over the training samples in an epoch as the budget counts them, but for what rounding a pass to whole
        mini-batches makes of it."""
        return batch_size / (self.updates_of or batch_size)

    def extent(self, samples: int, batch_size: int, drop_last: bool = False) -> Extent:
        """How long a run over so many training samples is, in mini-batches of this size."""
        of_pass = steps_per_pass(samples, batch_size, drop_last)
        of_epoch = steps_per_pass(samples, self.updates_of or batch_size, drop_last)
        images = min(samples, of_pass * batch_size)
        return Extent(self.total_steps(of_epoch), of_epoch, of_pass, images, batch_size)


def steps_per_pass(samples: int, batch_size: int, drop_last: bool = False) -> int:
    """Mini-batches of so many samples; the last one is shorter unless it is left out."""
    whole = samples // batch_size
    return whole if drop_last and whole else ceil(samples / batch_size)


def milestones_passed(milestones: list[int], step: int, unit: int) -> int:
    """How many milestones, in units of so many steps and counted from 1, have come at step `step`, counted from 0."""
    return sum(step // unit + 1 >= milestone for milestone in milestones)


def check_milestones(name: str, milestones: list[int]) -> None:
    """Raises ValueError unless these are positive and increasing."""
    if sorted(set(milestones)) != milestones or any(m < 1 for m in milestones):
        raise ValueError(f"`{name}` must be positive and increasing, but got {milestones}")


class Schedule(Spec):
    """The learning rate's course, as a factor of the tuned rate. Times are in the budget's unit.

    multi_step: the rate is multiplied by `factor` from each milestone on; epochs (or steps) count from 1, so
    milestone 71 means that epoch 71 is the first with the new rate. cosine: half a cosine to zero over the
    budget (Loshchilov & Hutter 2017, eq. 5). linear: a line from 1 to `end_factor` over the first share `decay` of the
    budget, level from there (Shallue et al. 2019, section 3.3). warmup_stable_decay: level, then a line down to
    `end_factor` over the last share `decay` (Zhai et al. 2022). warmup: linear from zero over the first `warmup` epochs
    (or steps).
    """

    name: Literal["constant", "multi_step", "cosine", "linear", "warmup_stable_decay"] = "constant"
    milestones: list[int] = Field([], description="multi_step: epochs (or steps), counted from 1")
    factor: float = Field(0.1, gt=0)
    warmup: float = Field(0.0, ge=0)
    decay: float | None = Field(
        None, gt=0, le=1, description="linear, warmup_stable_decay: share of the budget that the decay takes"
    )
    end_factor: float | None = Field(
        None, ge=0, lt=1, description="linear, warmup_stable_decay: of the rate at the end; default: 0"
    )

    @model_validator(mode="after")
    def _numbers_belong_to_their_schedules(self) -> Schedule:
        if (self.name == "multi_step") != bool(self.milestones):
            raise ValueError("`milestones` are needed by `multi_step`, and only there")
        check_milestones("milestones", self.milestones)
        if (self.decay is not None) != (self.name in ("linear", "warmup_stable_decay")):
            raise ValueError("`decay` is needed by `linear` and `warmup_stable_decay`, and only there")
        if self.end_factor is not None and self.decay is None:
            raise ValueError("`end_factor` is for `linear` and `warmup_stable_decay` only")
        return self

    def rate_factor(self, step: int, budget: Budget, steps_per_epoch: int) -> float:
        """Factor of the learning rate at optimizer step `step`, counted from 0."""
        unit = budget.unit(steps_per_epoch)
        factor = 1.0
        if self.name == "multi_step":
            factor = self.factor ** milestones_passed(self.milestones, step, unit)
        elif self.name == "cosine":
            factor = 0.5 * (1 + cos(pi * step / budget.total_steps(steps_per_epoch)))
        elif self.decay is not None:
            done, end = step / budget.total_steps(steps_per_epoch), self.end_factor or 0.0
            begin = 0.0 if self.name == "linear" else 1 - self.decay
            factor = 1 - (1 - end) * min(max((done - begin) / self.decay, 0.0), 1.0)
        warmup_steps = self.warmup * unit
        return factor * min(1.0, (step + 1) / warmup_steps) if warmup_steps else factor


class GhostBatchNorm(Spec):
    """Statistics of ghost batches of `ghost` samples (Hoffer et al. 2017)."""

    ghost: int = Field(gt=1)


BatchNormSpec = Literal["sync"] | GhostBatchNorm


class ModelSpec(Spec):
    """Which network, and the keyword arguments that it is built with. A study file may write the name alone."""

    model_config = ConfigDict(extra="allow")

    name: str

    @model_validator(mode="before")
    @classmethod
    def _name_alone(cls, value: object) -> object:
        return {"name": value} if isinstance(value, str) else value

    @model_serializer(mode="wrap")
    def _as_written(self, default: SerializerFunctionWrapHandler) -> str | dict[str, Any]:
        return default(self) if self.settings else self.name

    @property
    def settings(self) -> dict[str, Any]:
        """The keyword arguments."""
        return self.model_extra or {}

    def __str__(self) -> str:
        return self.name + (f" ({', '.join(f'{k}: {v}' for k, v in self.settings.items())})" if self.settings else "")


TargetMetric = Literal["val_accuracy", "val_loss", "train_loss"]


class Target(Spec):
    """What a run is to reach: one value of one metric."""

    model_config = ConfigDict(allow_inf_nan=False)

    val_accuracy: float | None = Field(None, gt=0, le=1, description="of the validation split, a fraction")
    val_loss: float | None = Field(None, gt=0, description="of the validation split")
    train_loss: float | None = Field(None, gt=0, description="of all training images as they are, not augmented")

    @model_validator(mode="after")
    def _one_metric(self) -> Target:
        if sum(value is not None for _, value in self) != 1:
            raise ValueError("give one of `val_accuracy`, `val_loss` and `train_loss`, and not several")
        return self

    @property
    def metric(self) -> TargetMetric:
        """What is measured."""
        return next(name for name in get_args(TargetMetric) if getattr(self, name) is not None)

    @property
    def value(self) -> float:
        """What it has to come to: at least that of an accuracy, at most that of a loss."""
        return float(getattr(self, self.metric))

    @property
    def measured(self) -> str:
        """The metric as an epoch's report calls it; its `train_loss` is the loss as it is optimised."""
        return "clean_train_loss" if self.metric == "train_loss" else self.metric

    @property
    def is_accuracy(self) -> bool:
        """Whether larger is better."""
        return self.metric == "val_accuracy"

    def is_met(self, value: float) -> bool:
        """Whether a value of the metric meets it; NaN does not."""
        return value >= self.value if self.is_accuracy else value <= self.value

    def shortfall(self, nearest: float | None) -> float:
        """How far a value that does not meet it is away, relatively: in (0, 1], and 1 where there is none."""
        if nearest is None:
            return 1.0
        return 1 - nearest / self.value if self.is_accuracy else 1 - self.value / nearest

    def __str__(self) -> str:
        words = {"val_accuracy": "validation accuracy", "val_loss": "validation loss", "train_loss": "training loss"}
        return f"{words[self.metric]} {self.value:.3g}"


class RunSpec(Spec):
    """One training run.

    What the methods' own numbers and settings may be, the methods say (`lbstudy.methods`): here they are plain values.
    """

    model: ModelSpec
    dataset: DatasetSpec
    batch_size: int = Field(gt=0, description="samples in the global mini-batch")
    optimizer: str
    smoothing: str = Field("none", description="one, or several joined by `+`")
    hyper: dict[str, Number] = Field(description="hyper-parameters: the numbers of the run and of its methods")
    settings: dict[str, dict[str, Any]] = Field({}, description="what else a method can be told, by its name")
    weight_decay_of: DecayOf = Field("all", description="weights: weight decay leaves out norms and biases")
    budget: Budget
    schedule: Schedule = Schedule()
    batch_norm: BatchNormSpec = "sync"
    precision: Literal["fp32", "bf16", "fp64"] = "fp32"
    micro_batch_size: int | None = Field(None, gt=0, description="samples per forward pass; changes rounding only")
    compile: bool = False
    seed: int = Field(0, ge=0, description="initial weights, order, augmentation, and what the methods draw")
    split_seed: int = Field(0, ge=0, description="which training samples validate")
    train_on: TrainOn = Field("split", description="the training split, or all: the samples that validate as well")
    evaluate: Literal["validation", "all"] = Field(
        "validation", description="after each epoch; all: also the training images as they are, and the test set"
    )
    evaluate_every: int | None = Field(None, gt=0, description="steps between evaluations within epochs")
    target: Target | None = Field(None, description="what the run is to reach; its reports say how near it has come")
    until_target: bool = Field(False, description="the run ends when it has reached its target")

    @model_validator(mode="before")
    @classmethod
    def _methods_settings(cls, value: object) -> object:
        """A key of its own that is no field holds a method's settings, or is one of its numbers, as in old records."""
        if not isinstance(value, dict):
            return value
        known = {name: entry for name, entry in value.items() if name in cls.model_fields}
        settings, hyper = dict(known.get("settings", {})), dict(known.get("hyper", {}))
        for name, entry in value.items():
            if name not in known:
                (settings if isinstance(entry, dict) else hyper)[name] = entry
        given = {name: number for name, number in hyper.items() if number is not None}
        return known | {"settings": settings, "hyper": given}

    def extent(self, samples: int) -> Extent:
        """How long it is, over so many training samples."""
        return self.budget.extent(samples, self.batch_size, self.dataset.drop_last)

    @property
    def ghost(self) -> int | None:
        """Samples of a ghost batch of the model's batch norm; None where the whole mini-batch counts as one."""
        return self.batch_norm.ghost if isinstance(self.batch_norm, GhostBatchNorm) else None
