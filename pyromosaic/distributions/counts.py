"""Likelihoods of counts that evaluate their expensive terms only for positive counts."""

import copy
from functools import reduce

import torch
from pyro.distributions import TorchDistribution, constraints
from pyro.distributions.util import broadcast_shape
from torch import Tensor
from torch.nn.functional import logsigmoid
from torch.types import _size

from pyromosaic.distributions.count_terms import (
    _EVERYWHERE,
    LARGEST_RATE,
    Lookup,
    _Entries,
    _Everywhere,
    _gamma_poisson,
    _log_count,
    _log_mixture,
    _log_poisson,
    _log_zero,
    _variance,
)


class _CountDistribution(TorchDistribution):
    """Counts that are mostly zero.

    A subclass defines the log-probability of a zero, which is cheap and dense, and that of given counts. For sparse
    counts, the latter is evaluated only at their entries. Parameters keep their shapes; only ``batch_shape`` is
    broadcast.
    """

    support = constraints.nonnegative_integer

    def __init__(self, parameters: dict[str, Tensor], validate_args: bool | None) -> None:
        self.__dict__.update(parameters)
        self._dtype = reduce(torch.promote_types, (parameter.dtype for parameter in parameters.values()))
        shape = broadcast_shape(*(parameter.shape for parameter in parameters.values()))
        super().__init__(torch.Size(shape), validate_args=validate_args)

    def _log_prob_zero(self, at: "_Entries | _Everywhere") -> Tensor:
        """Log-probability of a zero; ``at(parameter)`` is a parameter at the entries."""
        raise NotImplementedError

    def _log_prob_at(self, count: Tensor, at: "_Entries | _Everywhere") -> Tensor:
        """Log-probability of counts; ``at(parameter)`` is a parameter at the entries."""
        raise NotImplementedError

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-probability of counts.

        Parameters
        ----------
        value
            Counts: dense, with a shape that broadcasts with ``batch_shape``, or sparse, with the resulting shape. A
            sparse tensor is never made dense, and the expensive terms are evaluated only at its entries. Use one if
            most counts are zero.

        Returns
        -------
        Tensor
            Dense log-probabilities; gradients flow to the parameters.

        Raises
        ------
        ValueError
            If the shape does not fit, or, if validation is on, a value is not a non-negative integer.
        """
        if self._validate_args:
            self._validate_sample(value)
        shape = torch.Size(broadcast_shape(self.batch_shape, value.shape))
        if value.layout == torch.strided:
            return self._log_prob_at(value.to(self._dtype), _EVERYWHERE).expand(shape)
        if value.shape != shape:
            raise ValueError(f"A sparse value must have the shape {tuple(shape)}, not {tuple(value.shape)}.")
        value = value.to_sparse().coalesce()
        index, count = value.indices(), value.values()
        if not count.all():  # a sparse tensor may store zeros
            index, count = index[:, count != 0], count[count != 0]
        at = _Entries(index, shape)
        log_prob = self._log_prob_zero(_EVERYWHERE).expand(shape).reshape(-1)
        return log_prob.index_put((at.entry,), self._log_prob_at(count.to(self._dtype), at)).reshape(shape)

    def expand(self, batch_shape: _size, _instance: TorchDistribution | None = None) -> "_CountDistribution":
        """Return the same distribution with a larger ``batch_shape``; parameters are shared, not copied."""
        if broadcast_shape(self.batch_shape, batch_shape) != tuple(batch_shape):
            raise ValueError(f"A batch of shape {tuple(self.batch_shape)} does not expand to {tuple(batch_shape)}.")
        new = copy.copy(self)
        new._batch_shape = torch.Size(batch_shape)
        return new

    def _validate_sample(self, value: Tensor) -> None:
        stored = value if value.layout == torch.strided else value.to_sparse().coalesce().values()
        valid = self.support.check(stored)
        if not valid.all():
            raise ValueError(f"{type(self).__name__} accepts non-negative integers; found {stored[~valid][0].item()}.")


class NegativeBinomial(_CountDistribution):
    r"""Negative binomial counts with mean :math:`\mu` and inverse dispersion :math:`\theta`.

    .. math:: \operatorname{Var}(x) = \mu + \mu^2 / \theta

    It is a Poisson count whose rate has a Gamma distribution with mean :math:`\mu` and shape :math:`\theta`. This is
    the likelihood of gene expression in scVI (Lopez et al. 2018) and most later models.

    Parameters
    ----------
    mu
        Mean, zero or positive. Where a positive count is observed, a mean of zero is replaced by 6e-16 (1e-123 in
        float64).
    theta
        Inverse dispersion, positive; broadcasts with ``mu`` (often one per feature) and is never expanded.
    validate_args
        Check parameters and values; Pyro's global setting by default.

    Raises
    ------
    ValueError
        If validation is on and a parameter is outside its range.

    Examples
    --------
    >>> import torch
    >>> counts = NegativeBinomial(mu=torch.tensor([[1.0, 4.0], [2.0, 8.0]]), theta=torch.tensor([1.0, 2.0]))
    >>> counts.variance
    tensor([[ 2., 12.],
            [ 6., 40.]])
    >>> value = torch.tensor([[0.0, 3.0], [0.0, 0.0]])
    >>> counts.log_prob(value)
    tensor([[-0.6931, -2.0273],
            [-1.0986, -3.2189]])
    >>> bool((counts.log_prob(value.to_sparse()) == counts.log_prob(value)).all())
    True
    """

    arg_constraints = {"mu": constraints.nonnegative, "theta": constraints.positive}

    def __init__(self, mu: Tensor, theta: Tensor, validate_args: bool | None = None) -> None:
        super().__init__({"mu": mu, "theta": theta}, validate_args)

    @property
    def mean(self) -> Tensor:
        """Mean ``mu``."""
        return self.mu.expand(self.batch_shape)

    @property
    def variance(self) -> Tensor:
        """Variance ``mu + mu**2 / theta``."""
        return _variance(self.mu, self.theta).expand(self.batch_shape)

    def sample(self, sample_shape: _size = ()) -> Tensor:
        """Draw counts as Poisson draws with Gamma-distributed rates."""
        shape = self._extended_shape(sample_shape)
        with torch.no_grad():
            return _gamma_poisson(self.mu.expand(shape), self.theta.expand(shape))

    def _log_prob_zero(self, at: Lookup) -> Tensor:
        return _log_zero(at(self.mu), at(self.theta))

    def _log_prob_at(self, count: Tensor, at: "_Entries | _Everywhere") -> Tensor:
        return _log_count(count, [self.mu], self.theta, at)[0]


class Poisson(_CountDistribution):
    r"""Poisson counts with mean :math:`\mu`, which is also their variance.

    It is the likelihood of chromatin fragments in PoissonVI (Martens et al. 2024).

    Parameters
    ----------
    mu
        Mean, zero or positive. Where a positive count is observed, a mean of zero is replaced by 6e-16 (1e-123 in
        float64).
    validate_args
        Check parameters and values; Pyro's global setting by default.

    Raises
    ------
    ValueError
        If validation is on and a mean is negative.

    Examples
    --------
    >>> import torch
    >>> fragments = Poisson(mu=torch.tensor([0.5, 2.0]))
    >>> fragments.log_prob(torch.tensor([0.0, 3.0])).exp()
    tensor([0.6065, 0.1804])
    """

    arg_constraints = {"mu": constraints.nonnegative}

    def __init__(self, mu: Tensor, validate_args: bool | None = None) -> None:
        super().__init__({"mu": mu}, validate_args)

    @property
    def mean(self) -> Tensor:
        """Mean ``mu``."""
        return self.mu.expand(self.batch_shape)

    @property
    def variance(self) -> Tensor:
        """Variance ``mu``."""
        return self.mean

    def sample(self, sample_shape: _size = ()) -> Tensor:
        """Draw counts."""
        with torch.no_grad():
            return torch.poisson(self.mu.clamp(max=LARGEST_RATE).expand(self._extended_shape(sample_shape)))

    def _log_prob_zero(self, at: Lookup) -> Tensor:
        return -at(self.mu)

    def _log_prob_at(self, count: Tensor, at: "_Entries | _Everywhere") -> Tensor:
        return _log_poisson(count, at(self.mu))


class ZeroInflatedNegativeBinomial(_CountDistribution):
    r"""Negative binomial counts, some of which are replaced by structural zeros (dropout).

    With :math:`\pi = \operatorname{sigmoid}(\text{gate\_logits})` and the negative binomial mass :math:`f`,

    .. math:: P(x) = \pi\,[x = 0] + (1 - \pi)\,f(x; \mu, \theta)

    as in scVI (Lopez et al. 2018) and contrastiveVI (Weinberger et al. 2023). ``mu`` is the mean of the counts that
    are not structural zeros; :attr:`mean` is ``(1 - pi) * mu``.

    Parameters
    ----------
    mu
        Mean of the negative binomial part, zero or positive.
    theta
        Inverse dispersion, positive; broadcasts with ``mu`` and is never expanded.
    gate_logits
        Log-odds of a structural zero.
    validate_args
        Check parameters and values; Pyro's global setting by default.

    Raises
    ------
    ValueError
        If validation is on and a parameter is outside its range.

    Examples
    --------
    >>> import torch
    >>> counts = ZeroInflatedNegativeBinomial(torch.tensor(4.0), torch.tensor(2.0), gate_logits=torch.tensor(0.0))
    >>> counts.mean
    tensor(2.)
    >>> counts.log_prob(torch.tensor([0.0, 3.0])).exp()
    tensor([0.5556, 0.0658])
    """

    arg_constraints = {
        "mu": constraints.nonnegative,
        "theta": constraints.positive,
        "gate_logits": constraints.real,
    }

    def __init__(self, mu: Tensor, theta: Tensor, gate_logits: Tensor, validate_args: bool | None = None) -> None:
        super().__init__({"mu": mu, "theta": theta, "gate_logits": gate_logits}, validate_args)

    @property
    def mean(self) -> Tensor:
        """Mean over structural zeros and counts, ``(1 - pi) * mu``."""
        return (torch.sigmoid(-self.gate_logits) * self.mu).expand(self.batch_shape)

    @property
    def variance(self) -> Tensor:
        """Variance over structural zeros and counts."""
        gate = torch.sigmoid(self.gate_logits)
        within = _variance(self.mu, self.theta)
        return (torch.sigmoid(-self.gate_logits) * (within + gate * self.mu**2)).expand(self.batch_shape)

    def sample(self, sample_shape: _size = ()) -> Tensor:
        """Draw negative binomial counts and replace some by zeros."""
        shape = self._extended_shape(sample_shape)
        with torch.no_grad():
            counted = torch.bernoulli(torch.sigmoid(-self.gate_logits).expand(shape))
            return counted * _gamma_poisson(self.mu.expand(shape), self.theta.expand(shape))

    def _log_prob_zero(self, at: Lookup) -> Tensor:
        return self._zero(at(self.gate_logits), _log_zero(at(self.mu), at(self.theta)))

    def _log_prob_at(self, count: Tensor, at: "_Entries | _Everywhere") -> Tensor:
        gate, counted = at(self.gate_logits), _log_count(count, [self.mu], self.theta, at)[0]
        return torch.where(count == 0, self._zero(gate, counted), logsigmoid(-gate) + counted)

    @staticmethod
    def _zero(gate: Tensor, counted: Tensor) -> Tensor:
        return _log_mixture(gate, gate.new_zeros(()), counted)


class NegativeBinomialMixture(_CountDistribution):
    r"""Protein counts that are either background or foreground.

    With :math:`\pi = \operatorname{sigmoid}(\text{mixture\_logits})`, the probability of **background**, and the
    negative binomial mass :math:`f`,

    .. math:: P(x) = \pi\,f(x; \mu_b, \theta) + (1 - \pi)\,f(x; \mu_f, \theta)

    It is the antibody likelihood of totalVI (Gayoso et al. 2021) and MultiVI (Ashuach et al. 2023). The two means are
    not ordered here; a model makes the foreground larger, for example as the background times one plus a positive
    factor.

    Parameters
    ----------
    mu_background
        Mean of the background component, zero or positive.
    mu_foreground
        Mean of the foreground component, zero or positive.
    theta
        Inverse dispersion of both components, positive; broadcasts with the means and is never expanded.
    mixture_logits
        Log-odds of background against foreground.
    validate_args
        Check parameters and values; Pyro's global setting by default.

    Raises
    ------
    ValueError
        If validation is on and a parameter is outside its range.

    Examples
    --------
    >>> import torch
    >>> protein = NegativeBinomialMixture(
    ...     mu_background=torch.tensor(5.0),
    ...     mu_foreground=torch.tensor(105.0),
    ...     theta=torch.tensor(3.0),
    ...     mixture_logits=torch.tensor(0.0),
    ... )
    >>> protein.mean, protein.mixing_probability
    (tensor(55.), tensor(0.5000))
    """

    arg_constraints = {
        "mu_background": constraints.nonnegative,
        "mu_foreground": constraints.nonnegative,
        "theta": constraints.positive,
        "mixture_logits": constraints.real,
    }

    def __init__(
        self,
        mu_background: Tensor,
        mu_foreground: Tensor,
        theta: Tensor,
        mixture_logits: Tensor,
        validate_args: bool | None = None,
    ) -> None:
        parameters = {
            "mu_background": mu_background,
            "mu_foreground": mu_foreground,
            "theta": theta,
            "mixture_logits": mixture_logits,
        }
        super().__init__(parameters, validate_args)

    @property
    def mixing_probability(self) -> Tensor:
        """Probability of background, ``sigmoid(mixture_logits)``, of shape ``batch_shape``."""
        return torch.sigmoid(self.mixture_logits).expand(self.batch_shape)

    @property
    def mean(self) -> Tensor:
        """Mean over both components."""
        background, foreground = self.mixing_probability, torch.sigmoid(-self.mixture_logits)
        return background * self.mu_background + foreground * self.mu_foreground

    @property
    def variance(self) -> Tensor:
        """Variance within and between the components."""
        background, foreground = self.mixing_probability, torch.sigmoid(-self.mixture_logits)
        within = background * _variance(self.mu_background, self.theta)
        within = within + foreground * _variance(self.mu_foreground, self.theta)
        return within + background * foreground * (self.mu_foreground - self.mu_background) ** 2

    def sample(self, sample_shape: _size = ()) -> Tensor:
        """Draw the component, then the count."""
        shape = self._extended_shape(sample_shape)
        with torch.no_grad():
            background = torch.bernoulli(self.mixing_probability.expand(shape)).bool()
            mu = torch.where(background, self.mu_background, self.mu_foreground)
            return _gamma_poisson(mu, self.theta.expand(shape))

    def _log_prob_zero(self, at: Lookup) -> Tensor:
        theta = at(self.theta)
        background, foreground = (_log_zero(at(mu), theta) for mu in (self.mu_background, self.mu_foreground))
        return _log_mixture(at(self.mixture_logits), background, foreground)

    def _log_prob_at(self, count: Tensor, at: "_Entries | _Everywhere") -> Tensor:
        means = [self.mu_background, self.mu_foreground]
        background, foreground = _log_count(count, means, self.theta, at)
        return _log_mixture(at(self.mixture_logits), background, foreground)
