"""Antibody counts whose background level is summed out."""

from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
import torch
from pyro.distributions import constraints
from torch import Tensor
from torch.types import _size

from pyromosaic.distributions.count_terms import (
    Lookup,
    _Entries,
    _Everywhere,
    _gamma_poisson,
    _log_count_at,
    _log_mixture,
    _log_zero,
)
from pyromosaic.distributions.counts import _CountDistribution


@cache
def _nodes(n: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Nodes and weights of Gauss-Hermite quadrature over a standard normal."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(n)
    return tuple(nodes.tolist()), tuple((weights / weights.sum()).tolist())


def _peak(count: Tensor, loc: Tensor, scale: Tensor, theta: Tensor, n_steps: int = 5) -> tuple[Tensor, Tensor]:
    """Mode and width of a count's log background, in standard deviations of its prior, by Newton's method.

    The likelihood is log-concave in the log background. The start is the mode for a likelihood that is normal around
    the logarithm of the count; five steps are enough for counts up to a thousand times the background.
    """
    around = torch.log(count + 0.5)
    u = scale * (around - loc) / (scale.square() + 1 / (count + 0.5) + 1 / theta)
    longest = 2 / scale.clamp_min(1e-3)
    curvature = torch.ones_like(u)
    for step in range(n_steps + 1):
        mu = torch.exp(loc + scale * u)
        curvature = 1 + scale.square() * theta * (count + theta) * mu / (mu + theta).square()
        if step < n_steps:
            slope = scale * theta * (count - mu) / (mu + theta) - u
            u = u + torch.maximum(torch.minimum(slope / curvature, longest), -longest)
    return u, curvature.rsqrt()


class MarginalNegativeBinomialMixture(_CountDistribution):
    r"""Protein counts that are either background or foreground, where the background level is random.

    The background level is log-normal, and the foreground is a multiple of it. With the probability :math:`\pi` of
    **background** and the negative binomial mass :math:`f`,

    .. math::

        P(x) = \int \bigl(\pi\,f(x; e^b, \theta) + (1 - \pi)\,f(x; r e^b, \theta)\bigr)\,\mathcal N(b; m, s)\,db

    It is `NegativeBinomialMixture` with the background of totalVI (Gayoso et al. 2021) summed out. The log-probability
    replaces the integral of each component by adaptive Gauss-Hermite quadrature (Liu and Pierce 1994), whose nodes lie
    around the background level that explains the count best. Draws, mean and variance are exact.

    Parameters
    ----------
    loc, scale
        Mean m and standard deviation s of the log background.
    ratio
        Mean of the foreground divided by that of the background, r; positive.
    theta
        Inverse dispersion of both components, positive; broadcasts with the others and is never expanded.
    mixture_logits
        Log-odds of background against foreground.
    n_nodes
        Number of nodes of the quadrature. With five, the log-probability of a count differs from the integral by less
        than 0.001 nats if s is at most 0.8, and by less than 0.003 if it is at most 1.5.
    validate_args
        Check parameters and values; Pyro's global setting by default.

    Raises
    ------
    ValueError
        If validation is on and a parameter is outside its range.

    Examples
    --------
    >>> import torch
    >>> protein = MarginalNegativeBinomialMixture(
    ...     loc=torch.tensor(5.0).log(),
    ...     scale=torch.tensor(0.4),
    ...     ratio=torch.tensor(20.0),
    ...     theta=torch.tensor(3.0),
    ...     mixture_logits=torch.tensor(0.0),
    ... )
    >>> protein.mu_background, protein.mean, protein.mixing_probability
    (tensor(5.4164), tensor(56.8726), tensor(0.5000))
    >>> protein.log_prob(torch.tensor([0.0, 100.0]))
    tensor([-3.4376, -5.9032])
    """

    arg_constraints = {
        "loc": constraints.real,
        "scale": constraints.nonnegative,
        "ratio": constraints.positive,
        "theta": constraints.positive,
        "mixture_logits": constraints.real,
    }

    def __init__(
        self,
        loc: Tensor,
        scale: Tensor,
        ratio: Tensor,
        theta: Tensor,
        mixture_logits: Tensor,
        n_nodes: int = 5,
        validate_args: bool | None = None,
    ) -> None:
        parameters = {"loc": loc, "scale": scale, "ratio": ratio, "theta": theta, "mixture_logits": mixture_logits}
        super().__init__(parameters, validate_args)
        self.n_nodes = n_nodes

    @property
    def mixing_probability(self) -> Tensor:
        """Probability of background, ``sigmoid(mixture_logits)``, of shape ``batch_shape``."""
        return torch.sigmoid(self.mixture_logits).expand(self.batch_shape)

    @property
    def mu_background(self) -> Tensor:
        """Expected count of the background component."""
        return torch.exp(self.loc + self.scale.square() / 2)

    @property
    def mu_foreground(self) -> Tensor:
        """Expected count of the foreground component."""
        return self.ratio * self.mu_background

    @property
    def mean(self) -> Tensor:
        """Mean over background levels and both components."""
        return self.mixing_probability * self.mu_background + torch.sigmoid(-self.mixture_logits) * self.mu_foreground

    @property
    def variance(self) -> Tensor:
        """Variance of counts, of background levels, and between the components."""
        background, foreground = self.mixing_probability, torch.sigmoid(-self.mixture_logits)
        square = background * self.mu_background**2 + foreground * self.mu_foreground**2
        of_levels = torch.expm1(self.scale.square())
        within = self.mean + square * ((1 + of_levels) / self.theta + of_levels)
        return within + background * foreground * (self.mu_foreground - self.mu_background) ** 2

    def sample(self, sample_shape: _size = ()) -> Tensor:
        """Draw the background level and the component, then the count."""
        shape = self._extended_shape(sample_shape)
        with torch.no_grad():
            background = torch.bernoulli(self.mixing_probability.expand(shape)).bool()
            noise = torch.randn(shape, dtype=self._dtype, device=background.device)
            level = torch.exp(self.loc + self.scale * noise)
            return _gamma_poisson(torch.where(background, level, self.ratio * level), self.theta.expand(shape))

    def _log_prob_zero(self, at: Lookup) -> Tensor:
        def zero(means: list[Tensor]) -> list[Tensor]:
            return [_log_zero(mu, at(self.theta)) for mu in means]

        return self._summed(self.loc.new_zeros(()), at, zero)

    def _log_prob_at(self, count: Tensor, at: "_Entries | _Everywhere") -> Tensor:
        return self._summed(count, at, lambda means: _log_count_at(count, means, self.theta, at))

    def _summed(self, count: Tensor, at: Lookup, log_probs: Callable[[list[Tensor]], Sequence[Tensor]]) -> Tensor:
        """Log-probability of counts, given their log-probabilities under means."""
        loc, scale, theta = at(self.loc), at(self.scale), at(self.theta)
        nodes, weights = _nodes(self.n_nodes)
        means, shares = [], []
        for centre in (loc, loc + at(self.ratio).log()):  # background and foreground
            with torch.no_grad():
                mode, width = _peak(count, centre, scale, theta)
                levels = [mode + width * node for node in nodes]  # in standard deviations
            means += [torch.exp(centre + scale * level) for level in levels]
            # prior and weight of each node, relative to the normal distribution that placed the nodes
            for level, node, weight in zip(levels, nodes, weights, strict=True):
                shares.append(width.log() + 0.5 * (node**2 - level.square()) + np.log(weight))
        parts = [p + share for p, share in zip(log_probs(means), shares, strict=True)]
        of_background, of_foreground = (
            torch.stack(torch.broadcast_tensors(*part)).logsumexp(0)
            for part in (parts[: self.n_nodes], parts[self.n_nodes :])
        )
        return _log_mixture(at(self.mixture_logits), of_background, of_foreground)
