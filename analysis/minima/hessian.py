"""The spectrum of a Hessian known only by its products: top eigenvalues, trace and density, each with its error.

Large positive eigenvalues mean a SHARP minimum, small ones a flat one (Keskar et al. 2017); the HPML 2019 slides have
the two words swapped. Everything here takes any symmetric SciPy `LinearOperator` and needs no torch;
`lbstudy.analysis.minima.objective` makes one of a network.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import scipy  # its parts load when they are used: those who only read results need none of them
from numpy.typing import NDArray

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator

Vector = NDArray[np.float64]


class Estimate(NamedTuple):
    """A number and how far it may be off: which kind of error, says the function that returns it."""

    value: float
    error: float


def top_eigenvalues(
    operator: LinearOperator, count: int, draw: np.random.Generator, tolerance: float = 1e-3
) -> tuple[list[Estimate], Vector]:
    """The largest (most positive) eigenvalues by Lanczos with implicit restarts, and their eigenvectors.

    The error of (t, y) is the residual |H y - t y|: some eigenvalue of a symmetric H lies within it of t. The true
    error is far smaller, of the order residual^2 / gap, where the eigenvalue is well separated.

    Args:
        operator: symmetric, n x n.
        count: how many, fewer than n.
        draw: draws the start vector.
        tolerance: relative accuracy at which ARPACK stops.

    Returns:
        Estimates, largest first; eigenvectors, n x count, in the same order.

    Raises:
        ValueError: there are not so many eigenvalues.
    """
    if not 0 < count < operator.shape[0]:
        raise ValueError(f"{count} eigenvalues of {operator.shape[0]} parameters: must be from 1 to n - 1")
    values, vectors = scipy.sparse.linalg.eigsh(
        operator, count, which="LA", v0=draw.standard_normal(operator.shape[0]), tol=tolerance,
        ncv=min(operator.shape[0], max(2 * count + 1, 20)),
    )  # fmt: skip
    order = np.argsort(values)[::-1]
    values, vectors = values[order], vectors[:, order]
    residuals = [np.linalg.norm(operator @ y - t * y) for t, y in zip(values, vectors.T, strict=True)]
    return [Estimate(float(t), float(r)) for t, r in zip(values, residuals, strict=True)], vectors


def trace(
    operator: LinearOperator,
    probes: int,
    draw: np.random.Generator,
    eigenpairs: tuple[Sequence[Estimate], Vector] | None = None,
) -> Estimate:
    """The trace by Hutchinson's estimator with Rademacher vectors, and its standard error over the probes.

    Given the top eigenvalues t and eigenvectors Q, only the rest of the trace is estimated, with P = I - Q Q^T:
    tr H = sum t + E z^T P H P z (as in Hutch++, Meyer et al. 2021), for the few large eigenvalues cause most of the
    variance. Always runs all its probes: stopping when the estimate seems to settle stops by chance. Where n unit
    vectors cost no more than the probes, the trace is their exact sum.

    Args:
        operator: symmetric, n x n.
        probes: at least 2.
        draw: draws the probes.
        eigenpairs: what `top_eigenvalues` returned.

    Raises:
        ValueError: fewer than two probes have no standard error.
    """
    if probes < 2:
        raise ValueError(f"{probes} probes: a standard error takes at least 2")
    size = operator.shape[0]
    if probes >= size:
        return Estimate(float(sum(unit @ (operator @ unit) for unit in np.eye(size))), 0.0)
    known, basis = eigenpairs or ([], np.empty((size, 0)))
    samples = []
    for _ in range(probes):
        z = draw.choice([-1.0, 1.0], size=size)
        z -= basis @ (basis.T @ z)
        samples.append(z @ (operator @ z))
    value = sum(t.value for t in known) + np.mean(samples)
    return Estimate(float(value), float(np.std(samples, ddof=1) / np.sqrt(probes)))


@dataclass(frozen=True)
class SpectralDensity:
    """The density of the eigenvalues as a mixture of Gaussians; it integrates to 1 over the real line."""

    nodes: tuple[float, ...]  # Ritz values
    weights: tuple[float, ...]  # of each node; their sum is 1
    width: float  # standard deviation of the Gaussians

    def grid(self, points: int = 1024) -> Vector:
        """Eigenvalues from end to end of the density, equally spaced."""
        return np.linspace(min(self.nodes) - 5 * self.width, max(self.nodes) + 5 * self.width, points)

    def at(self, eigenvalues: Vector) -> Vector:
        """The density at these eigenvalues."""
        kernels = scipy.stats.norm.pdf(np.asarray(eigenvalues)[:, None], loc=np.array(self.nodes), scale=self.width)
        return kernels @ np.array(self.weights)

    def moment(self, order: int) -> float:
        """Mean of the eigenvalues' powers, before broadening: order 1 estimates tr H / n, order 2 tr H^2 / n."""
        return float(np.array(self.weights) @ np.array(self.nodes) ** order)


def spectral_density(
    operator: LinearOperator, probes: int, steps: int, draw: np.random.Generator, broadening: float = 0.01
) -> SpectralDensity:
    """The density of the eigenvalues by stochastic Lanczos quadrature (Golub & Meurant 1994; Ghorbani et al. 2019).

    Args:
        operator: symmetric, n x n.
        probes: Rademacher start vectors; the density is the mean over them.
        steps: Lanczos steps of each; moments up to 2 steps - 1 of each start vector's measure are exact.
        draw: draws the start vectors.
        broadening: standard deviation of the Gaussians, as a fraction of the distance of the extreme nodes.
    """
    nodes, weights = [], []
    for _ in range(probes):
        diagonal, off_diagonal = lanczos(operator, draw.choice([-1.0, 1.0], size=operator.shape[0]), steps)
        values, vectors = scipy.linalg.eigh_tridiagonal(diagonal, off_diagonal)
        nodes.extend(values.tolist())
        weights.extend((vectors[0] ** 2 / probes).tolist())
    spread = max(nodes) - min(nodes)
    width = broadening * (spread or max(abs(nodes[0]), 1e-12))  # all eigenvalues alike: any narrow peak will do
    return SpectralDensity(tuple(nodes), tuple(weights), width)


def lanczos(operator: LinearOperator, start: Vector, steps: int) -> tuple[Vector, Vector]:
    """Lanczos with full re-orthogonalisation: H in the Krylov basis of `start`, as diagonal and off-diagonal.

    Without re-orthogonalisation, converged eigenvalues come back as copies ("ghosts") and spoil the density. Takes
    fewer steps where the Krylov space is exhausted. Keeps steps x n numbers of 8 bytes.
    """
    steps = min(steps, len(start))
    basis = np.empty((steps, len(start)))
    diagonal, off_diagonal = [], []
    q = start / np.linalg.norm(start)
    for step in range(steps):
        basis[step] = q
        product = operator @ q
        diagonal.append(q @ product)
        size, rest, known = np.linalg.norm(product), product, basis[: step + 1]
        for _ in range(2):  # once leaves rounding errors behind, twice is enough (Parlett 1998)
            rest = rest - known.T @ (known @ rest)
        beta = np.linalg.norm(rest)
        if step + 1 == steps or beta <= 1e-10 * size:
            break
        off_diagonal.append(beta)
        q = rest / beta
    return np.array(diagonal), np.array(off_diagonal)
