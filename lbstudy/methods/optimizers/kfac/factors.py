"""The matrices of K-FAC: Kronecker factors of linear and convolutional layers, and their damped inverses.

For a linear layer with inputs a and gradients g = d l_n / d output of each sample's own loss, A = E[a a^T] and
G = E[g g^T] (Martens & Grosse 2015, section 3). For a convolution with T output positions the expectation over
samples is kept and the patches a_t are summed in A and averaged in G (Grosse & Martens 2016, theorem 1):
A = 1/N sum_n sum_t a_t a_t^T, G = 1/(N T) sum_n sum_t g_t g_t^T. With a bias, a carries a last coordinate 1.

All sums here are over samples, not yet divided by N, so that those of workers and passes add up.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LARGE = 2048
"""Factors of a higher order keep their Cholesky factor instead of an inverse, at a third of the cost."""

WIDE = 32
"""Convolutions of at least so many input channels share products between kernel columns too."""

CHUNK = {"cpu": 2**21, "cuda": 2**27}
"""Numbers of unfolded input held at a time, by device: about a cache, and half a gigabyte."""


def linear_input_sum(inputs: Tensor, bias: bool) -> Tensor:
    """sum_n a a^T of inputs N x D: D x D, or one more with a bias."""
    return _with_constant(inputs.mT @ inputs, inputs.sum(0), len(inputs)) if bias else inputs.mT @ inputs


def convolution_input_sum(images: Tensor, layer: nn.Conv2d) -> Tensor:
    """sum_n sum_t a_t a_t^T over the patches of images N x C x H x W.

    Patches are flattened like the layer's weight, C x kh x kw; with a bias there is one row and column more.
    """
    left, right, top, bottom = layer._reversed_padding_repeated_twice
    images = F.pad(images, (left, right, top, bottom))
    kernel, stride, dilation = layer.kernel_size, layer.stride, layer.dilation
    span = [(k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=True)]
    rows, columns = ((n - s) // step + 1 for n, s, step in zip(images.shape[2:], span, stride, strict=True))
    if not tuple(stride) == tuple(dilation) == (1, 1):
        products = _patch_products(images, layer, rows, columns)
    elif layer.in_channels < WIDE or columns < kernel[1] - 1:
        products = _shifted_products(images, kernel, rows)
    else:
        products = _wide_products(images, kernel, rows, columns)
    if layer.bias is None:
        return products
    total = images.sum(0)  # a patch entry, summed over positions, is a sum over a window of this
    step_down, step_right = stride
    sums = torch.stack(
        [
            total[:, i : i + rows * step_down : step_down, j : j + columns * step_right : step_right].sum((1, 2))
            for i in range(0, span[0], dilation[0])
            for j in range(0, span[1], dilation[1])
        ],
        dim=1,
    )
    return _with_constant(products, sums.flatten(), len(images) * rows * columns)


def _patch_products(images: Tensor, layer: nn.Conv2d, rows: int, columns: int) -> Tensor:
    """sum of a_t a_t^T for any stride and dilation, patch by patch; images are padded already."""
    order = layer.in_channels * layer.kernel_size[0] * layer.kernel_size[1]
    products = images.new_zeros(order, order)
    for part in images.split(max(1, CHUNK[images.device.type] // (order * rows * columns))):
        patches = F.unfold(part, layer.kernel_size, layer.dilation, 0, layer.stride)
        patches = patches.transpose(0, 1).reshape(order, -1)
        products.addmm_(patches, patches.mT)
    return products


def _shifted_products(images: Tensor, kernel: tuple[int, ...], rows: int) -> Tensor:
    """sum of a_t a_t^T for stride 1, where patches overlap: the same products of image rows serve many entries.

    An entry of the result joins kernel rows i and i + d. It is the sum over output rows t of products of image
    rows t + i and t + i + d, so each image row is multiplied once by itself and the kh - 1 rows below it, and the
    products are summed over windows. Of kh^2 pairs of kernel rows only kh distances cost arithmetic.
    """
    channels, height = images.shape[1:3]
    kernel_rows, kernel_columns = kernel
    width, columns = channels * kernel_columns, images.shape[3] - kernel_columns + 1
    products = images.new_zeros(height, width, kernel_rows * width)
    for part in images.split(max(1, CHUNK[images.device.type] // (height * width * columns))):
        unfolded = part.new_zeros(height + kernel_rows - 1, channels, kernel_columns, len(part), columns)
        unfolded[:height] = part.unfold(3, kernel_columns, 1).permute(2, 1, 4, 0, 3)
        unfolded = unfolded.view(height + kernel_rows - 1, width, len(part) * columns)
        step = unfolded.stride(0)
        below = unfolded.as_strided((height, kernel_rows * width, unfolded.shape[2]), (step, unfolded.stride(1), 1))
        products.baddbmm_(unfolded[:height], below.mT)
    result = images.new_empty(channels, kernel_rows, kernel_columns, channels, kernel_rows, kernel_columns)
    for i in range(kernel_rows):
        window = products[i : i + rows].sum(0).view(channels, kernel_columns, kernel_rows, channels, kernel_columns)
        for d in range(kernel_rows - i):
            block = window[:, :, d]
            result[:, i, :, :, i + d] = block
            result[:, i + d, :, :, i] = block.permute(2, 3, 0, 1)
    order = width * kernel_rows
    return result.view(order, order)


def _wide_products(images: Tensor, kernel: tuple[int, ...], rows: int, columns: int) -> Tensor:
    """As `_shifted_products`, with products shared between kernel columns as well as between kernel rows.

    An entry that joins kernel columns j and j + b is a sum over image columns j to j + columns - 1 of products at
    distance b. The columns common to all j are multiplied in one piece, the few at the edges one by one, so nothing
    is subtracted and the sum stays as accurate as the direct one.
    """
    channels, height, breadth = images.shape[1:]
    kernel_rows, kernel_columns = kernel
    pieces = {}  # of each distance b: ranges of image columns
    for b in range(1 - kernel_columns, kernel_columns):
        first, spare = max(0, -b), kernel_columns - 1 - abs(b)
        edges = [*range(first, first + spare), *range(first + columns, first + columns + spare)]
        pieces[b] = [(first + spare, first + columns), *((x, x + 1) for x in edges)]
    products = {
        (b, piece): images.new_zeros(height, channels, kernel_rows * channels) for b in pieces for piece in pieces[b]
    }
    for part in images.split(max(1, CHUNK[images.device.type] // (height * channels * breadth))):
        samples = len(part)
        lines = part.new_zeros(height + kernel_rows - 1, channels, breadth, samples)
        lines[:height] = part.permute(2, 1, 3, 0)
        lines = lines.view(height + kernel_rows - 1, channels, breadth * samples)
        for (b, (start, stop)), product in products.items():
            shape = (height, kernel_rows * channels, (stop - start) * samples)
            below = lines.as_strided(shape, lines.stride(), (start + b) * samples)
            product.baddbmm_(lines[:height, :, start * samples : stop * samples], below.mT)
    result = images.new_empty(channels, kernel_rows, kernel_columns, channels, kernel_rows, kernel_columns)
    for b in pieces:
        first, spare = max(0, -b), kernel_columns - 1 - abs(b)
        for j in range(first, first + spare + 1):
            total = sum(products[b, (start, stop)] for start, stop in pieces[b] if j <= start and stop <= j + columns)
            for i in range(kernel_rows):
                window = total[i : i + rows].sum(0).view(channels, kernel_rows, channels)  # type: ignore[index]
                for d in range(kernel_rows - i):
                    result[:, i, j, :, i + d, j + b] = window[:, d]
                    result[:, i + d, j + b, :, i, j] = window[:, d].mT
    order = channels * kernel_rows * kernel_columns
    return result.view(order, order)


def _with_constant(products: Tensor, sums: Tensor, count: int) -> Tensor:
    """Products of vectors that have one more coordinate, which is 1."""
    order = len(sums)
    result = products.new_empty(order + 1, order + 1)
    result[:order, :order] = products
    result[order, :order] = result[:order, order] = sums
    result[order, order] = count
    return result


def gradient_sum(gradients: Tensor) -> Tensor:
    """sum_n g g^T of gradients N x C, or 1/T sum_n sum_t g_t g_t^T of N x C x H x W with T = H W; C x C."""
    channels = gradients.shape[1]
    if gradients.ndim == 2:
        return gradients.mT @ gradients
    positions = gradients[0, 0].numel() if len(gradients) else 1
    products = gradients.new_zeros(channels, channels)
    for part in gradients.split(max(1, CHUNK[gradients.device.type] // (channels * positions))):
        columns = part.transpose(0, 1).reshape(channels, -1)
        products.addmm_(columns, columns.mT)
    return products.div_(positions)


def damping_parts(input_factor: Tensor, gradient_factor: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """The damping of A and of G: pi sqrt(damping) and sqrt(damping) / pi (Martens & Grosse 2015, section 6.3).

    pi = sqrt((tr A / dim A) / (tr G / dim G)); 1 where a factor is zero.
    """
    ratio = input_factor.diagonal().mean() / gradient_factor.diagonal().mean()
    pi = torch.where((ratio > 0) & ratio.isfinite(), ratio, torch.ones_like(ratio)).sqrt()
    return pi * damping**0.5, damping**0.5 / pi


def damped_choleskys(damped: Sequence[tuple[Tensor, Tensor]]) -> tuple[list[Tensor], list[int]]:
    """The lower Cholesky factors of each factor + damping I, and for which of them a fall-back was needed.

    Rounding can leave a matrix that is not positive definite. Then it is tried in float64, and with ten times
    the damping until it is. A factor that is not finite gives NaN: the run has diverged, and says so by its loss.
    The device is waited for once, however many there are.
    """
    found = [torch.linalg.cholesky_ex(_damped(factor, damping)) for factor, damping in damped]
    lower = [cholesky.L for cholesky in found]
    info = torch.stack([cholesky.info for cholesky in found]).tolist() if found else []
    failed = [place for place, problem in enumerate(info) if problem]
    for place in failed:
        lower[place] = _cholesky_after_all(*damped[place])
    return lower, failed


def _cholesky_after_all(factor: Tensor, damping: Tensor) -> Tensor:
    """Of a matrix that is not positive definite at first."""
    if not factor.isfinite().all():
        return torch.full_like(factor, torch.nan)
    wide, damping = factor.double(), damping.double()
    while True:
        lower, info = torch.linalg.cholesky_ex(_damped(wide, damping))
        if not info:
            return lower.to(factor.dtype)
        damping = 10 * damping


def _damped(factor: Tensor, damping: Tensor) -> Tensor:
    damped = factor.clone()
    damped.diagonal().add_(damping)
    return damped


def damped_inverses(damped: Sequence[tuple[Tensor, Tensor]]) -> tuple[list[Tensor], int]:
    """(factor + damping I)^-1 of each, above order LARGE the Cholesky factor itself; and how many needed a fall-back.

    A solve with the Cholesky factor takes as much arithmetic as a product with the inverse (2 n^2 per column), so
    the 2/3 n^3 from the one to the other pay only where small products are the slower for being solves.
    """
    results, failed = damped_choleskys(damped)
    without = {place for place in failed if results[place].isnan().any()}
    for place, lower in enumerate(results):
        if len(lower) <= LARGE and place not in without:
            results[place] = torch.cholesky_inverse(lower).contiguous()
    return results, len(failed)


def apply_inverse(inverse: Tensor, columns: Tensor) -> Tensor:
    """The inverse, as `damped_inverses` gave it, times a matrix."""
    return torch.cholesky_solve(columns, inverse) if len(inverse) > LARGE else inverse @ columns


def eigenbases(symmetric: Sequence[Tensor]) -> tuple[list[Tensor], int]:
    """The `eigenbasis` of each, and how many needed float64."""
    found = [eigenbasis(factor) for factor in symmetric]
    return [basis for basis, _ in found], sum(count for _, count in found)


def eigenbasis(factor: Tensor) -> tuple[Tensor, int]:
    """Eigenvectors (columns) and, as a last row, eigenvalues, n + 1 x n; and how often (0 or 1) float64 was needed."""
    if not factor.isfinite().all():
        return factor.new_full((len(factor) + 1, len(factor)), torch.nan), 1
    try:
        values, vectors = torch.linalg.eigh(factor)
        fallbacks = 0
    except torch.linalg.LinAlgError:
        values, vectors = (part.to(factor.dtype) for part in torch.linalg.eigh(factor.double()))
        fallbacks = 1
    return torch.cat([vectors, values.clamp(min=0)[None]]), fallbacks
