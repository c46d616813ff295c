"""Chromatin accessibility: whether a region is open in a cell."""

import torch
from pyro.distributions import constraints
from torch import Tensor
from torch.nn.functional import logsigmoid
from torch.types import _size

from pyromosaic.distributions.counts import _EVERYWHERE, Lookup, _CountDistribution


class AccessibilityBernoulli(_CountDistribution):
    r"""Whether a region of chromatin is observed as open in a cell.

    .. math:: P(x > 0) = \sigma(\text{logits})\,\sigma(\text{region\_logits})\,\sigma(\text{cell\_logits})

    The probability is the decoded accessibility times a region factor (width, bias) and a cell factor (sequencing
    depth), as in PeakVI (Ashuach et al. 2022) and MultiVI (Ashuach et al. 2023). It is computed in log space.

    ``log_prob`` accepts fragment counts as well as zeros and ones: every positive count means open. Samples are 0 or 1.

    Parameters
    ----------
    logits
        Log-odds of the decoded accessibility, cells by regions.
    region_logits
        Log-odds of the region factor; broadcasts with ``logits``, usually one per region, and is never expanded.
    cell_logits
        Log-odds of the cell factor; broadcasts with ``logits``, usually of shape (cells, 1), and is never expanded.
    validate_args
        Check parameters and values; Pyro's global setting by default.

    Raises
    ------
    ValueError
        If validation is on and a parameter is not a number.

    Examples
    --------
    >>> import torch
    >>> zero = torch.zeros(())
    >>> region = AccessibilityBernoulli(logits=zero, region_logits=zero, cell_logits=zero)
    >>> region.mean
    tensor(0.1250)
    >>> region.log_prob(torch.tensor([0, 1, 2])).exp()
    tensor([0.8750, 0.1250, 0.1250])
    """

    arg_constraints = {
        "logits": constraints.real,
        "region_logits": constraints.real,
        "cell_logits": constraints.real,
    }

    def __init__(
        self, logits: Tensor, region_logits: Tensor, cell_logits: Tensor, validate_args: bool | None = None
    ) -> None:
        parameters = {"logits": logits, "region_logits": region_logits, "cell_logits": cell_logits}
        super().__init__(parameters, validate_args)

    @property
    def mean(self) -> Tensor:
        """Probability that the region is open."""
        of_all = self.region_logits.sigmoid() * self.cell_logits.sigmoid()
        return (self.logits.sigmoid() * of_all).expand(self.batch_shape)

    @property
    def variance(self) -> Tensor:
        """Variance of the binary outcome, ``mean * (1 - mean)``."""
        log_open = self._log_open()
        return (log_open.exp() * -log_open.expm1()).expand(self.batch_shape)

    def sample(self, sample_shape: _size = ()) -> Tensor:
        """Draw 1 for open and 0 for closed."""
        with torch.no_grad():
            return torch.bernoulli(self.mean.expand(self._extended_shape(sample_shape)))

    def _log_open(self, at: Lookup = _EVERYWHERE) -> Tensor:
        return logsigmoid(at(self.logits)) + (logsigmoid(at(self.region_logits)) + logsigmoid(at(self.cell_logits)))

    def _log_prob_zero(self, at: Lookup) -> Tensor:
        return _log_complement(self._log_open(at))

    def _log_prob_at(self, count: Tensor, at: Lookup) -> Tensor:
        log_open = self._log_open(at)
        return torch.where(count == 0, _log_complement(log_open), log_open)


def _log_complement(log_probability: Tensor) -> Tensor:
    """Logarithm of ``1 - p``."""
    probability = torch.exp(log_probability)
    complement = torch.log1p(-probability.clamp(max=0.9))
    sure = probability > 0.9  # few entries, where 1 - p loses precision
    rest = -torch.expm1(log_probability.masked_select(sure).clamp(max=-torch.finfo(log_probability.dtype).tiny))
    return complement.masked_scatter(sure, torch.log(rest))
