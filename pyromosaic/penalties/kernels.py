"""Gaussian kernels between cells: distance between two samples, similarity of two representations of one sample."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def squared_distances(x: Tensor) -> Tensor:
    """Squared Euclidean distances between the rows of (n, d), shape (n, n).

    Examples
    --------
    >>> import torch
    >>> squared_distances(torch.tensor([[0.0, 0.0], [3.0, 4.0]]))
    tensor([[ 0., 25.],
            [25.,  0.]])
    """
    return _distances(x) * (1 - torch.eye(len(x), dtype=x.dtype, device=x.device))


def _distances(x: Tensor) -> Tensor:
    """Squared distances by inner products, which leave a rounding error on the diagonal."""
    squares = x.square().sum(-1)
    return torch.addmm(squares.unsqueeze(-1) + squares, x, x.T, alpha=-2).clamp_min(0.0)


def discrepancy(x: Tensor, y: Tensor) -> Tensor:
    """Unbiased squared maximum mean discrepancy of two samples, (n, d) and (m, d), by Gaussian kernels of four widths.

    The squared widths are 1, 1/2, 1/4 and 1/8 of the mean squared distance in the pooled sample, through which no
    gradient flows.

    Parameters
    ----------
    x, y
        The two samples, shapes (n, d) and (m, d), each of at least two points.

    Returns
    -------
    Tensor
        A scalar, about 0 for samples from one distribution; it may be negative.

    Examples
    --------
    >>> import torch
    >>> x = torch.randn(200, 2, generator=torch.Generator().manual_seed(0))
    >>> bool(discrepancy(x[:100], x[100:]).abs() < 0.05), bool(discrepancy(x[:100], x[100:] + 3) > 0.5)
    (True, True)
    """
    pooled = torch.cat([x, y])
    distances = _distances(pooled)
    width = distances.detach().mean().clamp_min(1e-12)  # all representations may be equal
    kernel: Tensor = _FourKernels.apply(distances, width)
    n, m = len(x), len(y)
    within = torch.block_diag(x.new_ones(n, 1), y.new_ones(m, 1))
    (of_x, between), (_, of_y) = within.T @ kernel @ within / 4
    return (of_x - n) / (n * (n - 1)) + (of_y - m) / (m * (m - 1)) - 2 * between / (n * m)


class _FourKernels(torch.autograd.Function):
    """Sum of Gaussian kernels of four widths and its derivative with respect to the squared distances."""

    @staticmethod
    def forward(ctx: Any, distances: Tensor, width: Tensor) -> Tensor:
        kernel = torch.exp(distances / -width)
        total, slope = kernel.clone(), kernel.clone()
        for power in (2, 4, 8):
            kernel.square_()  # kernel with half the squared width
            total.add_(kernel)
            slope.add_(kernel, alpha=power)
        ctx.save_for_backward(slope.div_(-width))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (slope,) = ctx.saved_tensors
        return gradient * slope, None


def row_cosine(x: Tensor, z: Tensor, ceiling: float = 0.975) -> Tensor:
    """Mean cosine between the rows of two Gaussian kernels, each at most `ceiling` (scMODAL; Wang et al. 2025).

    The squared widths are the numbers of columns. In many standardised dimensions, all distances are about equal and
    every row is above the ceiling for any z. Therefore it prevents collapse, and does little else. See
    `kernel_alignment`.

    Parameters
    ----------
    x, z
        Two representations of the same cells, shapes (n, p) and (n, q).
    ceiling
        No gradient flows through rows with a larger cosine.

    Returns
    -------
    Tensor
        A scalar, from 0 to `ceiling`.

    Examples
    --------
    >>> x = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    >>> round(row_cosine(x, x).item(), 3)  # the ceiling
    0.975
    """
    a, b = (torch.exp(-squared_distances(values) / (2 * values.shape[-1])) for values in (x, z))
    return torch.nn.functional.cosine_similarity(a, b, dim=-1).clamp_max(ceiling).mean()


def kernel_alignment(x: Tensor, z: Tensor) -> Tensor:
    """Correlation of two Gaussian kernels over pairs of different cells, centred for every cell.

    The squared widths are the mean squared distance, through which no gradient flows. It is 0 on average for unrelated
    representations, and 1 for representations that are equal up to scale, rotation and shift; 0 with fewer than four
    cells.

    Parameters
    ----------
    x, z
        Two representations of the same cells, shapes (n, p) and (n, q).

    Returns
    -------
    Tensor
        A scalar, at most 1.

    References
    ----------
    Song et al., Feature selection via dependence maximization, JMLR 2012 (the unbiased estimate); Cortes et al.,
    Algorithms for learning kernels based on centered alignment, JMLR 2012.

    Examples
    --------
    >>> import torch
    >>> x = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    >>> round(kernel_alignment(x, 2 * x + 1).item(), 3)
    1.0
    """
    if len(x) < 4:
        return z.new_zeros(())
    return _correlation(_centred_pairs(x), _centred_pairs(z))


def dependence(x: Tensor, z: Tensor) -> Tensor:
    """Centred kernel alignment over all pairs of cells, including each cell with itself; never below 0.

    As `kernel_alignment`, but biased: for n cells, unrelated representations have a value of about 1 / n above 0. It is
    0 with fewer than three cells.

    Parameters
    ----------
    x, z
        Two representations of the same cells, shapes (n, p) and (n, q).

    Returns
    -------
    Tensor
        A scalar, from 0 to 1.

    References
    ----------
    Gretton et al., Measuring statistical dependence with Hilbert-Schmidt norms, 2005; Cortes et al., Algorithms for
    learning kernels based on centered alignment, JMLR 2012.

    Examples
    --------
    >>> import torch
    >>> x = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    >>> round(dependence(x, 2 * x + 1).item(), 3)
    1.0
    """
    if len(x) < 3:
        return x.new_zeros(())
    return _correlation(_centred(x), _centred(z))


def _correlation(a: Tensor, b: Tensor) -> Tensor:
    """Cosine of two centred kernels; 0 for a collapsed one."""
    return (a * b).sum() / (a.square().sum() * b.square().sum()).clamp_min(1e-24).sqrt()


def _centred(x: Tensor) -> Tensor:
    """Gaussian kernel between all rows, centred: rows and columns sum to zero."""
    distances = _distances(x)
    kernel = torch.exp(-distances / distances.detach().mean().clamp_min(1e-12))
    return kernel - kernel.mean(0) - kernel.mean(1, keepdim=True) + kernel.mean()


def _centred_pairs(x: Tensor) -> Tensor:
    """Gaussian kernel of pairs of different cells, diagonal and row sums zero (U-centring)."""
    n = len(x)
    distances = squared_distances(x)
    width = distances.detach().sum() / (n * (n - 1))
    others = 1 - torch.eye(n, dtype=x.dtype, device=x.device)
    kernel = torch.exp(-distances / width.clamp_min(1e-12)) * others
    rows = kernel.sum(-1) / (n - 2)
    return (kernel - rows - rows.unsqueeze(-1) + kernel.sum() / ((n - 1) * (n - 2))) * others
