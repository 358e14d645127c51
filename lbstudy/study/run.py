"""One training run as typed values: all that `train()` needs to know, and nothing else.

A `RunSpec` is plain data (JSON in, JSON out). Each trial's record holds its own, so anyone can repeat the run
without the study around it. This module imports neither torch nor ray.
"""

from __future__ import annotations

from math import ceil, cos, lcm, pi
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

OptimizerName = Literal["sgd", "lars", "adamw", "kfac"]
SmoothingName = Literal["none", "mixup", "noise", "mixup+noise"]
ModelName = Literal["lenet5", "vgg9", "resnet18"]
DatasetName = Literal["digits", "cifar10", "cifar100", "mnist", "fashion_mnist", "image_folder", "synthetic"]

TrainOn = Literal["split", "all"]

MODELS_WITH_BATCH_NORM: tuple[ModelName, ...] = ("vgg9", "resnet18")


class Spec(BaseModel):
    """Base of every typed value in a study file: immutable, and a key it does not know is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class DatasetSpec(Spec):
    """Which images, how many of them validate, and how training images are augmented."""

    name: DatasetName
    root: str | None = Field(None, description="folder of the files; default: the user's cache folder")
    validation_size: int | float = Field(
        0.1, gt=0, description="samples taken from the training set, or a fraction below 1; stratified"
    )
    augment: tuple[Literal["crop", "flip", "cutout"], ...] = Field(
        (), description="crop: pad 4 and crop at random; flip: horizontally; cutout: erase a 16-pixel square"
    )
    drop_last: bool = Field(False, description="leave out an epoch's last, shorter mini-batch")
    download: bool = Field(False, description="let torchvision download the files when they are missing")
    image_size: int | None = Field(
        None, gt=0, description="image_folder: resize every image to this many pixels square"
    )
    samples: int = Field(2048, gt=1, description="synthetic: number of training samples")


class Budget(Spec):
    """How long every trial of the study may train: in epochs, or in optimizer steps."""

    epochs: int | None = Field(None, gt=0)
    steps: int | None = Field(None, gt=0)

    @model_validator(mode="after")
    def _one_unit(self) -> Budget:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("give either `epochs` or `steps`, and not both")
        return self

    @property
    def in_words(self) -> str:
        """How long that is."""
        return f"{self.epochs} epochs" if self.epochs else f"{self.steps} steps"

    def unit(self, steps_per_epoch: int) -> int:
        """Optimizer steps of what milestones count: an epoch, or a step."""
        return steps_per_epoch if self.steps is None else 1

    def total_steps(self, steps_per_epoch: int) -> int:
        """Optimizer steps of a whole run."""
        return self.steps if self.steps is not None else self.epochs * steps_per_epoch  # type: ignore[operator]

    def total_epochs(self, steps_per_epoch: int) -> int:
        """Epochs of a whole run; with a budget in steps the last one may be cut short."""
        return self.epochs if self.epochs is not None else ceil(self.steps / steps_per_epoch)  # type: ignore[operator]


def milestones_passed(milestones: list[int], step: int, unit: int) -> int:
    """How many milestones, in units of so many steps and counted from 1, have come at step `step`, counted from 0."""
    return sum(step // unit + 1 >= milestone for milestone in milestones)


def _check_milestones(name: str, milestones: list[int]) -> None:
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
        _check_milestones("milestones", self.milestones)
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


class MixupSpec(Spec):
    """Mixup (Zhang et al. 2018) beyond its alpha: how many mixing coefficients are drawn."""

    per: Literal["mini_batch", "sample"] = "mini_batch"


class NoiseSpec(Spec):
    """Parameter noise (SmoothOut, Wen et al. 2018) beyond its magnitude."""

    distribution: Literal["uniform", "gaussian"] = "uniform"
    scale: Literal["none", "filter", "weight"] = Field(
        "none", description="none: SmoothOut; filter: relative to each filter (AdaSmoothOut); weight: to each weight"
    )
    copies: int = Field(1, gt=0, description="perturbed copies averaged per step; 1 is the stochastic version")
    schedule: Literal["constant", "annealed"] = Field("constant", description="annealed: (1 + step)^-0.275")
    denoise: bool = Field(True, description="false: noise is added with the update and stays (JSAI 2019, eq. 1)")
    batch_norm: bool = Field(False, description="perturb batch-norm parameters too")
    ghost: int | None = Field(
        None, gt=0, description="one draw per ghost batch of this many samples, not per mini-batch"
    )

    @model_validator(mode="after")
    def _noise_that_stays_is_one_draw(self) -> NoiseSpec:
        if not self.denoise and (self.copies > 1 or self.ghost is not None):
            raise ValueError("`denoise: false` adds one draw per step: `copies` must be 1 and `ghost` left out")
        return self


class KfacSpec(Spec):
    """K-FAC (Martens & Grosse 2015) beyond its numbers."""

    fisher: Literal["empirical", "monte_carlo"] = Field(
        "empirical", description="with the labels, or with one drawn from each prediction (a second backward pass)"
    )
    damping_form: Literal["pi", "eigen"] = Field(
        "pi", description="pi: split over both factors, Cholesky; eigen: exact, by eigenvectors, far slower for VGG9"
    )
    batch_norm: Literal["unitwise", "plain"] = Field(
        "unitwise", description="unitwise: a 2 x 2 Fisher block per channel; plain: the gradient as it is"
    )
    weight_decay: Literal["plain", "preconditioned"] = Field(
        "plain", description="plain: as in SGD; preconditioned: an L2 term of the loss, its gradient preconditioned"
    )
    interval_milestones: list[int] = Field([], description="epochs (or steps), from 1, that make both intervals longer")
    interval_factor: int | None = Field(None, gt=1, description="by which each of the milestones multiplies them")

    @model_validator(mode="after")
    def _milestones_have_a_factor(self) -> KfacSpec:
        _check_milestones("interval_milestones", self.interval_milestones)
        if bool(self.interval_milestones) != (self.interval_factor is not None):
            raise ValueError("`interval_milestones` and `interval_factor` need each other")
        return self

    def interval_growth(self, step: int, unit: int) -> int:
        """Factor of both intervals at optimizer step `step`, counted from 0; milestones count so many steps each."""
        return (self.interval_factor or 1) ** milestones_passed(self.interval_milestones, step, unit)


class LarsSpec(Spec):
    """LARS (You et al. 2017) beyond its numbers."""

    one_dimensional: Literal["plain", "trust"] = Field(
        "plain", description="rate of biases and batch norm; plain: the learning rate; trust: scaled like all (paper)"
    )


class GhostBatchNorm(Spec):
    """Statistics of ghost batches of `ghost` samples (Hoffer et al. 2017)."""

    ghost: int = Field(gt=1)


BatchNormSpec = Literal["sync"] | GhostBatchNorm


class Hyperparameters(Spec):
    """The numbers of a run that a study may tune. Absent ones (None) do not apply to the run."""

    learning_rate: Annotated[float, Field(gt=0)] | None = None
    mixup_alpha: Annotated[float, Field(gt=0)] | None = None
    noise_magnitude: Annotated[float, Field(gt=0)] | None = None
    momentum: float = Field(0.9, ge=0, lt=1)
    weight_decay: float = Field(0.0, ge=0)
    gradient_clip: Annotated[float, Field(gt=0)] | None = Field(None, description="largest global norm of the gradient")
    trust_coefficient: float = Field(1e-3, gt=0, description="lars: eta in You et al. 2017")
    damping: float = Field(3e-2, gt=0, description="kfac: added to the Fisher matrix")
    past_weight: float = Field(0.5, ge=0, lt=1, description="kfac: of the past in the averages of the statistics")
    factor_interval: int = Field(1, gt=0, description="kfac: steps between updates of the statistics")
    inverse_interval: int = Field(1, gt=0, description="kfac: steps between inversions, the dearer part")
    kl_clip: Annotated[float, Field(gt=0)] | None = Field(None, description="kfac: largest lr^2 <step, gradient>")

    @classmethod
    def names(cls) -> list[str]:
        """All hyper-parameters, in the order of the tables."""
        return list(cls.model_fields)


# Hyper-parameters that change nothing unless the run uses the optimizer or smoothing named here.
USED_BY_OPTIMIZER = {
    "momentum": ("sgd", "lars", "kfac"),
    "trust_coefficient": ("lars",),
    **dict.fromkeys(("damping", "past_weight", "factor_interval", "inverse_interval", "kl_clip"), ("kfac",)),
}
USED_BY_SMOOTHING = {"mixup_alpha": "mixup", "noise_magnitude": "noise"}


def is_used(parameter: str, optimizer: str, smoothing: str) -> bool:
    """Whether a hyper-parameter has an effect with this optimizer and smoothing."""
    if parameter in USED_BY_OPTIMIZER:
        return optimizer in USED_BY_OPTIMIZER[parameter]
    if parameter in USED_BY_SMOOTHING:
        return USED_BY_SMOOTHING[parameter] in smoothing.split("+")
    return True


class RunSpec(Spec):
    """One training run."""

    model: ModelName
    dataset: DatasetSpec
    batch_size: int = Field(gt=0, description="samples in the global mini-batch")
    optimizer: OptimizerName
    smoothing: SmoothingName = "none"
    hyper: Hyperparameters
    nesterov: bool = Field(False, description="sgd and kfac: Nesterov's momentum")
    mixup: MixupSpec = MixupSpec()
    noise: NoiseSpec = NoiseSpec()
    kfac: KfacSpec = KfacSpec()
    lars: LarsSpec = LarsSpec()
    budget: Budget
    schedule: Schedule = Schedule()
    batch_norm: BatchNormSpec = "sync"
    precision: Literal["fp32", "bf16", "fp64"] = "fp32"
    micro_batch_size: int | None = Field(None, gt=0, description="samples per forward pass; changes rounding only")
    compile: bool = False
    seed: int = Field(0, ge=0, description="initial weights, order, augmentation, Mixup, noise")
    split_seed: int = Field(0, ge=0, description="which training samples validate")
    train_on: TrainOn = Field("split", description="the training split, or all: the samples that validate as well")
    evaluate: Literal["validation", "all"] = Field(
        "validation", description="after each epoch; all: also the training images as they are, and the test set"
    )

    @model_validator(mode="after")
    def _consistent(self) -> RunSpec:
        if self.hyper.learning_rate is None:
            raise ValueError("`learning_rate` is missing")
        for parameter, method in USED_BY_SMOOTHING.items():
            if self.uses(method) and getattr(self.hyper, parameter) is None:
                raise ValueError(f"`{parameter}` is missing, and smoothing is {self.smoothing!r}")
        problem = batch_norm_problem(
            self.model, self.batch_norm, self.micro_batch_size, self.noise if self.uses("noise") else None
        )
        if problem:
            raise ValueError(problem)
        return self

    def uses(self, method: str) -> bool:
        """Whether the smoothing includes this method (`mixup`, `noise`)."""
        return method in self.smoothing.split("+")

    @property
    def ghost_samples(self) -> int | None:
        """Samples of a ghost batch of the model's batch norm; None where the whole mini-batch counts as one."""
        with_ghosts = isinstance(self.batch_norm, GhostBatchNorm) and self.model in MODELS_WITH_BATCH_NORM
        return self.batch_norm.ghost if with_ghosts else None  # type: ignore[union-attr]

    @property
    def slice_unit(self) -> int:
        """Workers' slices of a mini-batch begin at multiples of this, so that no ghost batch is torn apart."""
        noise_ghost = self.noise.ghost if self.uses("noise") else None
        return lcm(self.ghost_samples or 1, noise_ghost or 1)


def batch_norm_problem(
    model: ModelName, batch_norm: BatchNormSpec, micro_batch_size: int | None, noise: NoiseSpec | None
) -> str | None:
    """Why these settings cannot give the statistics that `batch_norm` promises, or None if they can.

    A forward pass over a part of the mini-batch sees only that part; batch norm over more than the part would
    silently change its meaning, so it is refused.
    """
    if model not in MODELS_WITH_BATCH_NORM:
        return None
    parts = {
        "micro_batch_size": micro_batch_size,
        "noise.ghost": noise.ghost if noise else None,
    }
    for key, samples in parts.items():
        if samples is None:
            continue
        if batch_norm == "sync":
            return (
                f"`{key}` = {samples} splits the mini-batch, but batch_norm `sync` of {model} needs all of it "
                f"in one forward pass; use `batch_norm: {{ghost: N}}` with {key} a multiple of N"
            )
        if samples % batch_norm.ghost:
            return f"`{key}` = {samples} must be a multiple of batch_norm.ghost = {batch_norm.ghost}"
    return None
