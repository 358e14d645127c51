"""How sharp a minimum is: Keskar's measure, SAM's measures and the Hessian's spectrum of one model.

All say the same way round: large values, and large positive eigenvalues, mean SHARP (Keskar et al. 2017); the HPML
2019 slides have the two words swapped. None of the plain measures is invariant to a rescaling of the weights that
leaves the function as it is; the adaptive ones are invariant to one per weight.

The measures take any function of a vector; `measure` applies them to a network's loss, where only it needs torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from lbstudy.analysis.minima.hessian import Estimate, SpectralDensity, spectral_density, top_eigenvalues, trace
from lbstudy.analysis.minima.keskar import KeskarSharpness, ValueAndGradient, Vector, keskar, random_subspace
from lbstudy.analysis.rules import RULES, require_rule
from lbstudy.parallel.randomness import stream
from lbstudy.study.run import Spec

if TYPE_CHECKING:
    from torch import nn

    from lbstudy.analysis.minima.objective import Objective
    from lbstudy.training.data import ImageData, Images

Value = Callable[[Vector], float]


class SharpnessSpec(Spec):
    """How to measure; the same for every model that is compared.

    The defaults take about half a minute for LeNet-5 on one CPU core.
    """

    samples: int = Field(1000, gt=1, description="of the images, drawn at random by seed; all if there are no more")
    seed: int = Field(0, ge=0, description="of the samples, start vectors, probes and draws")
    include: Literal["all", "weights"] = Field(
        "all", description="parameters: all, or weights only, without biases and norm parameters"
    )
    batch_size: int = Field(250, gt=0, description="samples of a forward pass; changes memory and time only")
    eigenvalues: int = Field(5, gt=0, description="how many of the largest")
    trace_probes: int = Field(12, ge=8, description="Hutchinson's, beyond the span of the top eigenvectors")
    density_probes: int = Field(2, gt=0, description="start vectors of stochastic Lanczos quadrature")
    density_steps: int = Field(16, gt=1, description="Lanczos steps of each")
    epsilons: tuple[float, ...] = Field((1e-3, 5e-4), description="Keskar's box sizes")
    subspace: int = Field(100, gt=0, description="dimension p of Keskar's random subspaces")
    subspace_draws: int = Field(5, gt=1, description="random subspaces, the same for every model of an architecture")
    m: int = Field(128, gt=0, description="samples of a mini-batch of m-sharpness, for every model alike")
    rho: float = Field(0.05, gt=0, description="SAM's radius |delta|")
    adaptive_rho: float = Field(0.5, gt=0, description="ASAM's radius |delta / w|")
    ascent_steps: int = Field(4, gt=0, description="of the worst case by ascent")
    average_sigma: float = Field(0.01, gt=0, description="average case: standard deviation of a parameter's noise")
    average_adaptive_sigma: float = Field(0.1, gt=0, description="the same, relative to |w|")
    average_draws: int = Field(8, gt=1, description="average case: pairs of opposite perturbations")


@dataclass(frozen=True)
class Sharpness:
    """All measures of one model, as plain numbers: `as_json` and `from_json` for a file, `row` for a table."""

    loss: float  # mean over the samples
    gradient_norm: float  # far from 0: not at a minimum, and the plain measures see the slope too
    samples: int
    parameters: int
    eigenvalues: tuple[Estimate, ...]  # largest first; error: the residual norm
    trace: Estimate  # error: standard error over probes
    density: SpectralDensity
    keskar_full: tuple[float, ...]  # per epsilon, in percent; the largest that L-BFGS-B or a climb found
    keskar_subspace: tuple[Estimate, ...]  # mean over draws of the subspace; error: standard error over draws
    keskar_full_published: tuple[float, ...]  # as published: L-BFGS-B's alone; may stall at the solution
    keskar_subspace_published: tuple[Estimate, ...]
    sam_average: Estimate  # rise of the loss; error: standard error over draws
    sam_average_adaptive: Estimate
    sam_one_step: Estimate  # mean rise over mini-batches, may be negative; error: standard error over mini-batches
    sam_one_step_adaptive: Estimate
    sam_ascent: Estimate  # the largest rise met by the ascent, at least 0
    sam_ascent_adaptive: Estimate
    spec: SharpnessSpec

    def as_json(self) -> dict[str, Any]:
        """Plain JSON values; what is infinite or NaN stays so, which Python's `json` reads and writes."""
        plain = {field.name: getattr(self, field.name) for field in fields(self)}
        return (
            {"rule": RULES["sharpness"]}
            | plain
            | {"density": vars(self.density), "spec": self.spec.model_dump(mode="json")}
        )

    @classmethod
    def from_json(cls, plain: dict[str, Any]) -> Sharpness:
        """The inverse of `as_json`, also after a way through a file.

        Raises:
            OldRule: it was measured by an older rule.
            AttributeError, KeyError, TypeError, ValueError: it holds something else.
        """
        require_rule("sharpness", plain)
        values = {name: _from_lists(value) for name, value in plain.items() if name != "rule"}
        values |= {name: Estimate(*values[name]) for name in ("trace", *(n for n in values if n.startswith("sam_")))}
        for name in ("eigenvalues", "keskar_subspace", "keskar_subspace_published"):
            values[name] = tuple(Estimate(*pair) for pair in values[name])
        values["density"] = SpectralDensity(**{k: _from_lists(v) for k, v in plain["density"].items()})
        made = cls(**values | {"spec": SharpnessSpec.model_validate(plain["spec"])})
        if wrong := [name for name, value in made.row().items() if not isinstance(value, int | float)]:
            raise ValueError(f"{', '.join(wrong)}: no number")
        return made

    def row(self) -> dict[str, float]:
        """One number per name, for a table: estimates have a second one, `NAME_error`."""
        row: dict[str, float] = {name: getattr(self, name) for name in ("loss", "gradient_norm", "samples")}
        estimates = {f"eigenvalue_{rank}": value for rank, value in enumerate(self.eigenvalues, start=1)}
        estimates |= {
            f.name: getattr(self, f.name) for f in fields(self) if isinstance(getattr(self, f.name), Estimate)
        }
        for name in (f.name for f in fields(self) if f.name.startswith("keskar_")):
            for epsilon, value in zip(self.spec.epsilons, getattr(self, name), strict=True):
                column = f"{name}_{epsilon:g}"
                if isinstance(value, Estimate):
                    estimates[column] = value
                else:
                    row[column] = value
        for name, (value, error) in estimates.items():
            row |= {name: value, f"{name}_error": error}
        return row


def _from_lists(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def measure(model: nn.Module, data: ImageData, images: Images, spec: SharpnessSpec | None = None) -> Sharpness:
    """All measures of one model, which is left as it is. A function of its arguments: nothing is drawn elsewhere.

    Args:
        model: on the device of the images.
        data: gives the normalisation.
        images: to measure on, usually `data.train`; without augmentation.
        spec: what to do.

    Raises:
        ValueError: the loss is not finite, so the model has no sharpness; or fewer parameters than eigenvalues.
    """
    from lbstudy.analysis.minima.objective import Objective  # only here: reading results needs no torch

    spec = spec or SharpnessSpec()
    options = {"include": spec.include, "batch_size": spec.batch_size}
    objective = Objective.of_sample(model, data, images, spec.samples, spec.seed, **options)
    x = objective.x
    loss, gradient = objective.value_and_gradient(x)
    if not np.isfinite(loss):
        raise ValueError(f"the loss is {loss}: a model that has diverged has no sharpness")

    def draw(purpose: str) -> np.random.Generator:
        return stream(spec.seed, "sharpness", purpose)

    hessian = objective.hessian()
    eigenpairs = top_eigenvalues(hessian, spec.eigenvalues, draw("eigenvalues"))
    hessian_trace = trace(hessian, spec.trace_probes, draw("trace"), eigenpairs)
    density = spectral_density(hessian, spec.density_probes, spec.density_steps, draw("density"))
    objective.free()

    whole, subspaces = _keskar(objective, (loss, gradient), spec)
    losses = [part.value_and_gradient for part in objective.mini_batches(spec.m)]
    plain, adaptive = np.ones_like(x), np.abs(x)
    one_step, ascent = worst_rise(losses, x, spec.rho, plain, spec.ascent_steps, draw("ascent"))
    one_step_adaptive, ascent_adaptive = worst_rise(
        losses, x, spec.adaptive_rho, adaptive, spec.ascent_steps, draw("ascent")
    )
    return Sharpness(
        loss=loss,
        gradient_norm=float(np.linalg.norm(gradient)),
        samples=len(objective),
        parameters=len(x),
        eigenvalues=tuple(eigenpairs[0]),
        trace=hessian_trace,
        density=density,
        keskar_full=tuple(found.best for found in whole),
        keskar_subspace=tuple(_mean([found.best for found in draws]) for draws in subspaces),
        keskar_full_published=tuple(found.published for found in whole),
        keskar_subspace_published=tuple(_mean([found.published for found in draws]) for draws in subspaces),
        sam_average=average_rise(
            objective.value, x, spec.average_sigma * plain, spec.average_draws, draw("average")
        ),
        sam_average_adaptive=average_rise(
            objective.value, x, spec.average_adaptive_sigma * adaptive, spec.average_draws, draw("average")
        ),
        sam_one_step=one_step,
        sam_one_step_adaptive=one_step_adaptive,
        sam_ascent=ascent,
        sam_ascent_adaptive=ascent_adaptive,
        spec=spec,
    )  # fmt: skip


def _keskar(
    objective: Objective, at_x: tuple[float, Vector], spec: SharpnessSpec
) -> tuple[list[KeskarSharpness], list[list[KeskarSharpness]]]:
    """Keskar's measure per epsilon in the full space, and per epsilon and draw in random subspaces.

    In a subspace there is a climb only where L-BFGS-B finds no way off the solution: further draws tell more.
    """
    x = objective.x

    def measured(epsilon: float, index: int, subspace: NDArray[np.float32] | None, climbs: int) -> KeskarSharpness:
        starts = stream(spec.seed, "sharpness", "keskar", index)
        return keskar(objective.value_and_gradient, x, epsilon, starts, subspace, climbs, at_x)

    whole = [measured(epsilon, 0, None, 1) for epsilon in spec.epsilons]
    subspaces: list[list[KeskarSharpness]] = [[] for _ in spec.epsilons]
    for index in range(1, spec.subspace_draws + 1):
        directions = random_subspace(len(x), spec.subspace, stream(spec.seed, "sharpness", "subspace", index))
        for draws, epsilon in zip(subspaces, spec.epsilons, strict=True):
            found = measured(epsilon, index, directions, 0)
            draws.append(found if found.published > 0 else measured(epsilon, index, directions, 1))
    return whole, subspaces


def average_rise(loss: Value, x: Vector, sigma: Vector, draws: int, draw: np.random.Generator) -> Estimate:
    """E L(x + sigma z) - L(x) for standard normal z: the average case (Andriushchenko et al. 2023).

    Drawn in pairs +z, -z, in which the slope cancels: on a quadratic this is 1/2 sum sigma_i^2 H_ii. The error is the
    standard error over pairs.

    Args:
        loss: L.
        x: the solution, n.
        sigma: standard deviation of each parameter's noise, n; proportional to |x| for the adaptive form.
        draws: pairs, at least 2.
        draw: draws z.
    """
    at_x, rises = loss(x), []
    for _ in range(draws):
        delta = sigma * draw.standard_normal(len(x))
        rises.append((loss(x + delta) + loss(x - delta)) / 2 - at_x)
    return _mean(rises)


def worst_rise(
    losses: Sequence[ValueAndGradient], x: Vector, rho: float, scale: Vector, steps: int, draw: np.random.Generator
) -> tuple[Estimate, Estimate]:
    """max L_B(x + delta) - L_B(x) over |delta / scale| <= rho, mean over mini-batches B: m-sharpness.

    Of each mini-batch the loss is maximised by itself. One step is SAM's (Foret et al. 2021):
    delta = rho s^2 g / |s g|, the maximum of the linearised loss. It is reported as it is: where the loss bends down
    within rho it overshoots, and the rise is negative. More steps linearise the loss anew at x + delta, which climbs
    monotonically where the loss is convex; the largest rise of them all counts, and that of x itself, 0, which the ball
    holds. So the ascent's is a lower bound of the maximum, and never negative. Scale 1 is SAM, |x| the adaptive form
    (ASAM, Kwon et al. 2021).

    Args:
        losses: L_B and its gradient, of each mini-batch.
        x: the solution, n.
        rho: radius.
        scale: of each parameter, n; a parameter with scale 0 stays.
        steps: of the ascent, the first one included.
        draw: draws the first direction where the gradient is exactly zero.

    Returns:
        The rise after one step, and the largest of the ascent; errors are standard errors over mini-batches.
    """
    first, highest = [], []
    for loss in losses:
        at_x, gradient = loss(x)
        rises = []
        for _ in range(steps):
            scaled = scale * gradient
            if not scaled.any():
                scaled = scale * draw.standard_normal(len(x))
            value, gradient = loss(x + rho * scale * scaled / np.linalg.norm(scaled))
            rises.append(value - at_x if np.isfinite(value) else np.inf)
            if not np.isfinite(gradient).all():
                break
        first.append(rises[0])
        highest.append(max(0.0, *rises))
    return _mean(first), _mean(highest)


def _mean(values: Sequence[float]) -> Estimate:
    """Mean and standard error; a value that is not finite counts as infinite, and a single one has no error."""
    if not np.isfinite(values).all():
        return Estimate(np.inf, np.nan)
    error = np.std(values, ddof=1) / np.sqrt(len(values)) if len(values) > 1 else np.nan
    return Estimate(float(np.mean(values)), float(error))
