"""The mean loss of a model as a function of its parameters: value, gradient and Hessian-vector products.

Mean cross-entropy in evaluation mode (batch norm with its running statistics) over fixed samples, without
augmentation. Parameters are one flat float64 vector, which is what SciPy's Lanczos and L-BFGS-B work on. The network
computes in its own precision; sums over samples and batches are float64. The model itself is never touched: all is
done on a copy.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse.linalg import LinearOperator
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from lbstudy.parallel.device import exact_kernels
from lbstudy.parallel.randomness import stream
from lbstudy.training.data import ImageData, Images

Vector = NDArray[np.float64]
Included = Literal["all", "weights"]

KEPT_GRAPHS = 1 << 30  # bytes of activations kept from one Hessian-vector product to the next


class Objective:
    """Mean cross-entropy over N fixed samples as a function of n parameters.

    Args:
        model: the network; copied.
        inputs: normalised images, N x C x H x W, in the precision and on the device of the model.
        labels: N.
        include: `all` parameters, or only the `weights` of layers, without biases and norm parameters (which are the
            parameters with one dimension). The others stay what they are.
        batch_size: samples of a forward pass; changes memory and time, the result only by rounding.
    """

    def __init__(
        self, model: nn.Module, inputs: Tensor, labels: Tensor, *, include: Included = "all", batch_size: int = 250
    ):
        self._model = copy.deepcopy(model).eval().requires_grad_(False)
        self._inputs, self._labels, self._batch_size = inputs, labels, batch_size
        self._parameters = {n: p for n, p in self._model.named_parameters() if include == "all" or p.ndim > 1}
        self._flat = torch.cat([p.flatten() for p in self._parameters.values()])
        self._graphs: dict[int, tuple[Tensor, Tensor]] = {}
        self._kept = 0

    @classmethod
    def of_sample(
        cls, model: nn.Module, data: ImageData, images: Images, samples: int, seed: int, **options: object
    ) -> Objective:
        """The objective over `samples` of the images (all, if there are no more), drawn at random by seed.

        The order is random too, so that consecutive samples are mini-batches.
        """
        chosen = stream(seed, "sharpness", "samples").permutation(len(images))[:samples]
        index = torch.from_numpy(chosen).to(images.labels.device)
        dtype = next(model.parameters()).dtype
        return cls(model, data.plain(images, index, dtype), images.labels[index], **options)  # type: ignore[arg-type]

    def __len__(self) -> int:
        return len(self._labels)

    @property
    def x(self) -> Vector:
        """The model's parameters, n."""
        return self._flat.cpu().numpy().astype(np.float64)

    def mini_batches(self, size: int) -> list[Objective]:
        """The objectives over consecutive mini-batches; samples left over are left out, unless all are too few."""
        parts = []
        for start in range(0, max(len(self) - size, 0) + 1, size):
            part = copy.copy(self)
            part._inputs, part._labels = self._inputs[start : start + size], self._labels[start : start + size]
            part._graphs, part._kept = {}, 0
            parts.append(part)
        return parts

    @torch.no_grad()
    def value(self, x: Vector) -> float:
        """The loss at parameters x."""
        flat = self._to_flat(x)
        with exact_kernels():
            return sum(float(self._loss(flat, part)) for part in self._batches()) / len(self)

    def value_and_gradient(self, x: Vector) -> tuple[float, Vector]:
        """The loss at parameters x and its gradient, n."""
        flat = self._to_flat(x).requires_grad_()
        value, gradient = 0.0, torch.zeros_like(flat, dtype=torch.float64)
        with exact_kernels():
            for part in self._batches():
                loss = self._loss(flat, part)
                gradient += torch.autograd.grad(loss, flat)[0]
                value += float(loss.detach())
        return value / len(self), gradient.cpu().numpy() / len(self)

    def hessian_product(self, v: Vector) -> Vector:
        """H v at the model's own parameters, by differentiating g . v (Pearlmutter 1994); v and the result have n."""
        direction = self._to_flat(v)
        product = torch.zeros_like(direction, dtype=torch.float64)
        with exact_kernels():  # ten bits of mantissa are too few for curvature
            for flat, gradient in self._gradient_graphs():
                product += torch.autograd.grad(gradient, flat, direction, retain_graph=True)[0]
        return product.cpu().numpy() / len(self)

    def hessian(self) -> LinearOperator:
        """The Hessian at the model's own parameters, n x n, as a symmetric operator."""
        size = len(self._flat)
        return LinearOperator((size, size), self.hessian_product, self.hessian_product, dtype=np.float64)

    def free(self) -> None:
        """Forget the graphs kept for Hessian-vector products."""
        self._graphs.clear()
        self._kept = 0

    def _gradient_graphs(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Per batch: the parameters, and the gradient of the summed loss as their differentiable function.

        Making a gradient's graph takes as long as differentiating it once more, so graphs are kept while they fit.
        """
        for part in self._batches():
            if part.start in self._graphs:
                yield self._graphs[part.start]
                continue
            size = 0

            def count(saved: Tensor) -> Tensor:
                nonlocal size
                size += saved.nbytes  # the hook lives no longer than this turn of the loop
                return saved

            flat = self._flat.clone().requires_grad_()
            with torch.autograd.graph.saved_tensors_hooks(count, lambda saved: saved):
                gradient = torch.autograd.grad(self._loss(flat, part), flat, create_graph=True)[0]
            if self._kept + size <= KEPT_GRAPHS:
                self._graphs[part.start] = (flat, gradient)
                self._kept += size
            yield flat, gradient

    def _loss(self, flat: Tensor, part: slice) -> Tensor:
        """Summed loss of some samples, float64."""
        pieces = flat.split([p.numel() for p in self._parameters.values()])
        parameters = {n: piece.view_as(p) for (n, p), piece in zip(self._parameters.items(), pieces, strict=True)}
        logits = functional_call(self._model, parameters, (self._inputs[part],))
        return F.cross_entropy(logits, self._labels[part], reduction="none").double().sum()

    def _batches(self) -> Iterator[slice]:
        for start in range(0, len(self), self._batch_size):
            yield slice(start, min(start + self._batch_size, len(self)))

    def _to_flat(self, vector: Vector) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(vector).reshape(-1)).to(self._flat.device, self._flat.dtype)
