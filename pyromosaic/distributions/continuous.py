"""Likelihoods of measurements that are not counts."""

import torch
from pyro.distributions import Gamma, LogNormal, Normal, TorchDistribution, TransformedDistribution, constraints
from torch import Tensor
from torch.distributions import Transform
from torch.nn.functional import logsigmoid
from torch.types import _size


class _Expm1Transform(Transform):
    """The map ``y = exp(x) - 1``, the inverse of log1p."""

    domain = constraints.real
    codomain = constraints.greater_than(-1.0)
    bijective = True
    sign = +1

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Expm1Transform)

    def _call(self, x: Tensor) -> Tensor:
        return torch.expm1(x)

    def _inverse(self, y: Tensor) -> Tensor:
        return torch.log1p(y)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Log-derivative of the map."""
        return x


class Log1pNormal(TransformedDistribution):
    r"""Measurements whose log1p is normal.

    .. math:: \log(1 + x) \sim \operatorname{Normal}(\text{loc}, \text{scale})

    It is meant for non-negative intensities; the support starts at -1, where log1p is defined.

    Parameters
    ----------
    loc
        Mean of ``log(1 + x)``.
    scale
        Standard deviation of ``log(1 + x)``, positive; broadcasts with ``loc``.
    validate_args
        Check parameters and values; Pyro's global setting by default.

    Raises
    ------
    ValueError
        If validation is on and a parameter is outside its range.

    Examples
    --------
    >>> import torch
    >>> intensity = Log1pNormal(torch.tensor(0.0), torch.tensor(1.0))
    >>> intensity.mean
    tensor(0.6487)
    >>> intensity.log_prob(torch.tensor(0.0))
    tensor(-0.9189)
    """

    arg_constraints = {"loc": constraints.real, "scale": constraints.positive}
    has_rsample = True

    def __init__(self, loc: Tensor, scale: Tensor, validate_args: bool | None = None) -> None:
        super().__init__(Normal(loc, scale, validate_args=validate_args), _Expm1Transform(), validate_args)

    def expand(self, batch_shape: _size, _instance: TorchDistribution | None = None) -> "Log1pNormal":
        """Return the same distribution with a larger ``batch_shape``."""
        return super().expand(batch_shape, _instance=self._get_checked_instance(Log1pNormal, _instance))

    @property
    def loc(self) -> Tensor:
        """Mean of ``log(1 + x)``."""
        return self.base_dist.loc

    @property
    def scale(self) -> Tensor:
        """Standard deviation of ``log(1 + x)``."""
        return self.base_dist.scale

    @property
    def mean(self) -> Tensor:
        """Mean ``exp(loc + scale**2 / 2) - 1``."""
        return torch.expm1(self.loc + self.scale**2 / 2)

    @property
    def variance(self) -> Tensor:
        """Variance of the LogNormal ``1 + x``."""
        return torch.expm1(self.scale**2) * torch.exp(2 * self.loc + self.scale**2)


class _ZeroInflated(TorchDistribution):
    """Exactly zero with probability ``sigmoid(gate_logits)``, else a draw from a positive distribution."""

    arg_constraints = {"gate_logits": constraints.real}
    support = constraints.nonnegative

    def __init__(self, positive: TorchDistribution, gate_logits: Tensor, validate_args: bool | None) -> None:
        batch_shape = torch.broadcast_shapes(positive.batch_shape, gate_logits.shape)
        self.positive = positive.expand(batch_shape)
        self.gate_logits = gate_logits.expand(batch_shape)
        super().__init__(batch_shape, validate_args=validate_args)

    def expand(self, batch_shape: _size, _instance: TorchDistribution | None = None) -> "_ZeroInflated":
        """Return the same distribution with a larger ``batch_shape``."""
        new = self._get_checked_instance(type(self), _instance)
        _ZeroInflated.__init__(new, self.positive.expand(batch_shape), self.gate_logits, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-probability of a zero and log-density of a positive value."""
        if self._validate_args:
            self._validate_sample(value)
        is_zero = value == 0
        density = self.positive.log_prob(torch.where(is_zero, 1.0, value))  # any positive number keeps gradients finite
        return torch.where(is_zero, logsigmoid(self.gate_logits), logsigmoid(-self.gate_logits) + density)

    def sample(self, sample_shape: _size = ()) -> Tensor:
        """Draw positive values and replace some by zeros."""
        with torch.no_grad():
            present = torch.bernoulli(torch.sigmoid(-self.gate_logits).expand(self._extended_shape(sample_shape)))
            return present * self.positive.sample(sample_shape)

    @property
    def mean(self) -> Tensor:
        """Mean over zeros and positive values."""
        return torch.sigmoid(-self.gate_logits) * self.positive.mean

    @property
    def variance(self) -> Tensor:
        """Variance over zeros and positive values."""
        between = torch.sigmoid(self.gate_logits) * self.positive.mean**2
        return torch.sigmoid(-self.gate_logits) * (self.positive.variance + between)


class ZeroInflatedLogNormal(_ZeroInflated):
    r"""Zero with probability :math:`\operatorname{sigmoid}(\text{gate\_logits})`, else LogNormal.

    It is a likelihood for non-negative measurements with exact zeros. ``log_prob`` is a log-probability at zero and a
    log-density elsewhere.

    Parameters
    ----------
    loc
        Mean of ``log(x)`` for positive ``x``.
    scale
        Standard deviation of ``log(x)`` for positive ``x``, positive.
    gate_logits
        Log-odds of a zero; all three broadcast.
    validate_args
        Check parameters and values; Pyro's global setting by default.

    Raises
    ------
    ValueError
        If validation is on and a parameter is outside its range.

    Examples
    --------
    >>> import torch
    >>> zero = torch.tensor(0.0)
    >>> intensity = ZeroInflatedLogNormal(loc=zero, scale=torch.tensor(1.0), gate_logits=zero)
    >>> intensity.log_prob(torch.tensor([0.0, 1.0]))
    tensor([-0.6931, -1.6121])
    """

    def __init__(self, loc: Tensor, scale: Tensor, gate_logits: Tensor, validate_args: bool | None = None) -> None:
        super().__init__(LogNormal(loc, scale, validate_args=validate_args), gate_logits, validate_args)


class ZeroInflatedGamma(_ZeroInflated):
    r"""Zero with probability :math:`\operatorname{sigmoid}(\text{gate\_logits})`, else Gamma.

    It is a likelihood for non-negative measurements with exact zeros. ``log_prob`` is a log-probability at zero and a
    log-density elsewhere.

    Parameters
    ----------
    concentration
        Shape of the Gamma, positive.
    rate
        Rate of the Gamma (one over its scale), positive; positive values have mean ``concentration / rate``.
    gate_logits
        Log-odds of a zero; all three broadcast.
    validate_args
        Check parameters and values; Pyro's global setting by default.

    Raises
    ------
    ValueError
        If validation is on and a parameter is outside its range.

    Examples
    --------
    >>> import torch
    >>> one = torch.tensor(1.0)
    >>> intensity = ZeroInflatedGamma(concentration=2 * one, rate=one, gate_logits=0 * one)
    >>> intensity.mean
    tensor(1.)
    >>> intensity.log_prob(torch.tensor([0.0, 1.0]))
    tensor([-0.6931, -1.6931])
    """

    def __init__(
        self, concentration: Tensor, rate: Tensor, gate_logits: Tensor, validate_args: bool | None = None
    ) -> None:
        super().__init__(Gamma(concentration, rate, validate_args=validate_args), gate_logits, validate_args)
