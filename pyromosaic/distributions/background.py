"""Antibody counts whose background level is summed out."""

from functools import cache
from typing import Any

import numpy as np
import torch
from pyro.distributions import constraints
from torch import Tensor
from torch.types import _size

from pyromosaic.distributions.count_terms import (
    _apply,
    _Entries,
    _Everywhere,
    _gamma_poisson,
    _log_mixture,
    _shared,
    aligned,
    in_blocks,
    log_prob_and_slopes,
)
from pyromosaic.distributions.counts import _CountDistribution


@cache
def _gauss_hermite(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Nodes of quadrature over a standard normal, and the logarithms of their weights."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(n)
    return nodes, np.log(weights / weights.sum())


def _nodes(n: int, like: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
    """The same, along a dimension before those of a tensor; and the nodes to the powers 0 and 1, shape (2, n)."""
    nodes, log_weights = (torch.from_numpy(x).to(like) for x in _gauss_hermite(n))
    shape = -1, *[1] * like.dim()
    return (nodes.reshape(shape), log_weights.reshape(shape)), torch.stack([torch.ones_like(nodes), nodes])


def _peak(count: Tensor, loc: Tensor, scale: Tensor, theta: Tensor, n_steps: int = 5) -> tuple[Tensor, Tensor]:
    """Mode and width of a count's log background, in standard deviations of its prior, by Newton's method.

    The likelihood is log-concave in the log background. The start is the mode for a likelihood that is normal around
    the logarithm of the count; five steps are enough for counts up to a thousand times the background.
    """
    square, some = scale.square(), count + 0.5
    shift = square * (some.log() - loc) / (square + 1 / some + 1 / theta)  # of the log background
    offset, pull, stiffness = loc - theta.log(), square * count, square * (count + theta)
    curvature = torch.ones_like(shift)
    for step in range(n_steps + 1):
        share = torch.sigmoid(offset + shift)  # mu / (mu + theta)
        force = stiffness * share
        curvature = torch.addcmul(force, force, share, value=-1).add_(1)
        if step < n_steps:
            shift = shift + (pull - shift).sub_(force).div_(curvature).clamp_(-2.0, 2.0)
    return shift / scale.clamp_min(1e-12), curvature.rsqrt_()


class _LogMarginal(torch.autograd.Function):
    """Log-probabilities of negative binomial counts whose log mean is normal, with their derivatives.

    There are several centres of the log mean for each count, along the first dimension of `centre`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        count: Tensor,
        centre: Tensor,
        scale: Tensor,
        theta: Tensor,
        table: Tensor | None,
        position: Tensor | None,
        n_nodes: int,
    ) -> Tensor:
        n_results = 4 if any(ctx.needs_input_grad) else 1  # the log-probability, with or without its three derivatives

        def evaluate(c: Tensor, x: Tensor, s: Tensor, t: Tensor, *column: Tensor) -> tuple[Tensor, ...]:
            return _quadrature(x, c, s, t, n_nodes, n_results > 1, table, *column)

        inputs = [x for x in (count, scale, theta, position) if x is not None]
        log_prob, *slopes = in_blocks(evaluate, centre, inputs, n_results, n_nodes)
        ctx.save_for_backward(count, centre, scale, theta, *slopes)
        ctx.n_nodes = n_nodes
        return log_prob

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        count, *inputs = ctx.saved_tensors[:4]
        if torch.is_grad_enabled():  # second derivatives are needed
            centre, scale, theta = inputs
            log_prob = _plain_quadrature(count, centre, scale, theta, ctx.n_nodes)
            wanted = [x for x in inputs if x.requires_grad]
            found = iter(torch.autograd.grad(log_prob, wanted, gradient, create_graph=True))
            slopes = [next(found) if x.requires_grad else None for x in inputs]
        else:
            pairs = zip(inputs, ctx.saved_tensors[4:], strict=True)
            slopes = [(gradient * slope).sum_to_size(x.shape) for x, slope in pairs]
        return None, *slopes, None, None, None


def _quadrature(
    count: Tensor,
    centre: Tensor,
    scale: Tensor,
    theta: Tensor,
    n_nodes: int,
    slopes: bool,
    table: Tensor | None = None,
    column: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """The log-probability, and if wanted its derivatives with respect to centre, scale and theta.

    Nodes are relative to the mode, where the log-probability is computed without terms that cancel. From there, the log
    mean moves by ``d``. This changes ``log(mu + theta)`` by ``log1p(q * expm1(d))``, where q is the share of mu in the
    sum, or by ``d + log1p((1 - q) * expm1(-d))``. For large counts, the second does not cancel.
    """
    (node, log_weight), moments = _nodes(n_nodes, centre)
    mode, width = _peak(count, centre, scale, theta)
    log_mu = torch.addcmul(centre, scale, mode)
    mu, total, few = log_mu.exp(), count + theta, count < theta
    log_prob, by_mu, by_theta = log_prob_and_slopes(mu, count, theta, table, column)
    sign, pull = few.to(mu.dtype).mul_(2).sub_(1), torch.where(few, count, -theta)
    share, step = torch.sigmoid(sign * (log_mu - theta.log())), scale * width
    moved = ((sign * step) * node).expm1_().mul_(share)
    log_moved = moved.log1p()
    joint = torch.addcmul(log_weight, pull * step - mode * width, node)
    joint = joint.addcmul_((1 - width.square()).div_(2), node.square()).addcmul_(total, log_moved, value=-1)
    top = joint.amax(0)
    mass = joint.sub_(top).exp_()
    sums, mean_node = torch.mm(moments, mass.flatten(1)).reshape(2, *top.shape)  # over the nodes
    log_prob = log_prob.addcmul_(mode, mode, value=-0.5).add_(top).add_((sums * width).log_())
    if not slopes:
        return (log_prob,)
    mean_node = mean_node.div_(sums)
    mean_moved = log_moved.mul_(mass).sum(0).div_(sums)
    loss = (moved + share).div_(moved.add_(1)).mul_(mass)
    mean_loss, with_node = torch.mm(moments, loss.flatten(1)).reshape(2, *top.shape).div_(sums).mul_(sign * total)
    by_centre = pull - mean_loss
    by_scale = by_centre * mode + width * (pull * mean_node - with_node)
    by_theta = by_theta + (mu * by_mu - by_centre) / theta - mean_moved - torch.where(few, 0.0, step * mean_node)
    return log_prob, by_centre, by_scale, by_theta


def _plain_quadrature(count: Tensor, centre: Tensor, scale: Tensor, theta: Tensor, n_nodes: int) -> Tensor:
    """The same log-probability, with derivatives of any order for nodes that stay where they are."""
    with torch.no_grad():
        mode, width = _peak(count, centre, scale, theta)
    (node, log_weight), _ = _nodes(n_nodes, centre)
    level = mode + width * node
    away, total = centre - theta.log() + scale * level, count + theta
    joint = log_weight + 0.5 * (node.square() - level.square()) + count * away - total * torch.log1p(away.exp())
    coefficient = torch.lgamma(total) - torch.lgamma(theta) - torch.lgamma(count + 1)
    return coefficient + width.log() + joint.logsumexp(0)


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

    def _log_prob_zero(self, at: "_Entries | _Everywhere") -> Tensor:
        return self._log_prob_at(self.loc.new_zeros(()), at)

    def _log_prob_at(self, count: Tensor, at: "_Entries | _Everywhere") -> Tensor:
        """Log-probability of counts, with the background summed out."""
        loc, scale, theta = at(self.loc), at(self.scale), at(self.theta)
        centre = torch.stack(torch.broadcast_tensors(loc, loc + at(self.ratio).log()))  # background and foreground
        centre, shared = aligned(centre, count, scale, theta), _shared(self.theta, count, at)
        found = _apply(_LogMarginal.apply, count, centre, scale, theta, *shared, self.n_nodes)
        return _log_mixture(at(self.mixture_logits), found[0], found[1])
