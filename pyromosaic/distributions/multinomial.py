"""Counts with a given total."""

import copy

import torch
from pyro.distributions import TorchDistribution, constraints
from pyro.distributions.util import broadcast_shape
from torch import Tensor
from torch.types import _size


class Multinomial(TorchDistribution):
    """Counts of a cell's features given their total; each count is an element of the batch.

    The features of a cell are dependent, but they are in ``batch_shape`` like those of the other likelihoods, so that
    they can be in a plate. ``log_prob`` of a count is its part of the log-probability of the cell, ``log N! - sum_g log
    x_g! + sum_g x_g log share_g``, where ``log N!`` is divided in proportion to the counts. It is 0 for a count of 0,
    and its sum over the last dimension is the log-probability of the multinomial.

    Parameters
    ----------
    total_count
        Total of each cell, for moments and samples; shape (..., cells, 1).
    logits
        Logarithms of the proportions, up to a constant per cell; shape (..., cells, features).
    validate_args
        Check parameters and values; Pyro's global setting by default.

    Examples
    --------
    >>> import torch
    >>> cell = Multinomial(torch.tensor([[4.0]]), torch.tensor([[0.0, 0.0]]))
    >>> cell.log_prob(torch.tensor([[2.0, 2.0]])).sum().exp()
    tensor(0.3750)
    """

    arg_constraints = {"total_count": constraints.nonnegative, "logits": constraints.real}
    support = constraints.nonnegative_integer

    def __init__(self, total_count: Tensor, logits: Tensor, validate_args: bool | None = None) -> None:
        self.total_count, self.logits = total_count, logits
        super().__init__(torch.Size(broadcast_shape(total_count.shape, logits.shape)), validate_args=validate_args)

    def expand(self, batch_shape: _size, _instance: TorchDistribution | None = None) -> "Multinomial":
        """Return the same distribution with a larger ``batch_shape``; parameters are shared, not copied."""
        new = copy.copy(self)
        new._batch_shape = torch.Size(batch_shape)
        return new

    @property
    def mean(self) -> Tensor:
        """Expected counts."""
        return (self.total_count * self.logits.softmax(-1)).expand(self.batch_shape)

    @property
    def variance(self) -> Tensor:
        """Variance of each count."""
        return self.mean * (1 - self.logits.softmax(-1))

    def log_prob(self, value: Tensor) -> Tensor:
        """Part of each count in the log-probability; the sum over the last dimension is that of the cell."""
        x = value.to_dense() if value.is_sparse else value
        if self._validate_args and not self.support.check(x).all():
            raise ValueError("Multinomial accepts non-negative integers.")
        total = x.sum(-1, keepdim=True)
        ways = x / total.clamp_min(1) * torch.lgamma(total + 1) - torch.lgamma(x + 1)
        return ways + x * self.logits.log_softmax(-1)

    def sample(self, sample_shape: _size = ()) -> Tensor:
        """Draw counts that add up to the (rounded) total of each cell."""
        with torch.no_grad():
            shape = self._extended_shape(sample_shape)
            shares = self.logits.softmax(-1).expand(shape).reshape(-1, shape[-1])
            totals = self.total_count.expand(*shape[:-1], 1).reshape(-1, 1).round()
            n = max(1, int(totals.max()))
            drawn = torch.multinomial(shares, n, replacement=True)
            counted = (torch.arange(n, device=drawn.device) < totals).to(shares.dtype)
            return torch.zeros_like(shares).scatter_add(-1, drawn, counted).reshape(shape)
