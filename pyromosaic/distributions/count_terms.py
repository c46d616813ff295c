"""Terms of log-probabilities of counts, with their derivatives."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from pyro.distributions import Gamma
from pyro.distributions.util import broadcast_shape
from torch import Tensor
from torch.nn.functional import logsigmoid
from torch.overrides import handle_torch_function, has_torch_function

LARGEST_RATE = 1e9  # Poisson samplers overflow 32-bit integers above about 4e9
BLOCK = 2**16  # entries evaluated together on the CPU


SMALL_COUNT = 12  # above it, three terms of Stirling's series are exact to 1e-11


#: Maps a parameter to its values at given entries.
Lookup = Callable[[Tensor], Tensor]


def _flat_position(index: Tensor, shape: torch.Size) -> Tensor:
    """Row-major positions, in a tensor of this shape, of entries of a larger tensor to which it broadcasts."""
    position = index.new_zeros(index.shape[1])
    for along, size in zip(index[len(index) - len(shape) :], shape, strict=True):
        if size > 1:
            position = torch.add(along, position, alpha=size)
    return position


def _log_zero(mu: Tensor, theta: Tensor) -> Tensor:
    """Negative binomial log-probability of a zero."""
    return -theta * torch.log1p(mu * theta.reciprocal())


def _log_count(count: Tensor, means: list[Tensor], theta: Tensor, at: "_Entries | _Everywhere") -> tuple[Tensor, ...]:
    """Negative binomial log-probability of counts for each mean."""
    table = position = None
    if theta.numel() < count.numel():  # each parameter value is used by many entries
        table, position = _table(theta.detach()).to(count.dtype), at.position(theta)
    log_probs: tuple[Tensor, ...] = _apply(_LogCount.apply, count, at(theta), table, position, *map(at, means))
    return log_probs


def _apply(function: Callable[..., Any], *inputs: Tensor | None) -> Any:
    """Call a function of plain tensors, even if other objects replace them, e.g. when Pyro traces dependencies."""
    return handle_torch_function(function, inputs, *inputs) if has_torch_function(inputs) else function(*inputs)


class _LogCount(torch.autograd.Function):
    """Negative binomial log-probabilities of the same counts for several means, with their derivatives.

    Both are evaluated together, on the CPU in blocks that stay in its cache.
    """

    @staticmethod
    def forward(
        ctx: Any, count: Tensor, theta: Tensor, table: Tensor | None, position: Tensor | None, *means: Tensor
    ) -> tuple[Tensor, ...]:
        inputs = [x for x in (count, theta, *means, position) if x is not None]
        shape = broadcast_shape(*(x.shape for x in inputs))
        width = shape[-1] if len(shape) > 1 else 1
        inputs = [x.expand(shape).reshape(-1, width) for x in inputs]
        kinds = 3 if any(ctx.needs_input_grad) else 1  # the log-probability, with or without its two derivatives
        outputs = [torch.empty_like(inputs[0]) for _ in range(kinds * len(means))]
        n_rows = max(1, BLOCK // max(1, width)) if count.device.type == "cpu" else max(1, len(inputs[0]))
        for x, t, *block in zip(*(values.split(n_rows) for values in (*inputs, *outputs)), strict=True):
            best, slope = _best(x, t, table, block.pop(len(means)) if position is not None else None)
            for i, mu in enumerate(block[: len(means)]):
                results = _less_lost(x, mu, t, best, slope)[:kinds]
                for out, result in zip(block[len(means) + i :: len(means)], results, strict=True):
                    out.copy_(result)
        outputs = [out.reshape(shape) for out in outputs]
        ctx.save_for_backward(count, theta, *means, *outputs[len(means) :])
        return tuple(outputs[: len(means)])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        n = len(gradients)
        count, theta, *saved = ctx.saved_tensors
        means, by_mu, by_theta = saved[:n], saved[n : 2 * n], saved[2 * n :]
        if torch.is_grad_enabled():  # second derivatives are needed
            excess = [(mu - count) / (mu + theta) for mu in means]
            by_mu = [-theta * e / mu for e, mu in zip(excess, means, strict=True)]
            slope = torch.digamma(count + theta) - torch.digamma(theta)
            by_theta = [slope - torch.log1p(mu / theta) + e for e, mu in zip(excess, means, strict=True)]
        if n == 1 and not any(gradients[0].stride()):  # the same gradient for all, that of a sum: multiply last
            of_theta = by_theta[0].sum_to_size(theta.shape) * gradients[0].as_strided((), ())
        else:
            products = [g * d for g, d in zip(gradients, by_theta, strict=True)]
            of_theta = sum(products[1:], products[0]).sum_to_size(theta.shape)
        of_means = [(g * d).sum_to_size(mu.shape) for g, d, mu in zip(gradients, by_mu, means, strict=True)]
        return None, of_theta, None, None, *of_means


def _less_lost(count: Tensor, mu: Tensor, theta: Tensor, best: Tensor, slope: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probability of a count given the mean, with its derivatives with respect to mean and theta.

    It is the log-probability under the best-fitting mean, the count itself, minus the loss under the given mean. Terms
    of large counts would cancel; only their difference is computed.
    """
    limits = torch.finfo(mu.dtype)
    mu = mu + limits.tiny**0.4  # keeps count / mu**2 finite where a mean has underflowed to zero
    scale = (count + theta).reciprocal_()
    excess = (mu - count).mul_(scale)
    ratio = (mu + theta).mul_(scale)  # 1 + excess
    slip = (excess * theta).div_(mu).neg_()  # 1 + slip is count / mu * ratio
    log_ratio = torch.log1p(excess.clamp_min(limits.eps - 1))
    log_prob = torch.addcmul(best, count, slip.clamp_min(limits.eps - 1).log1p_(), value=-1)
    log_prob = log_prob.addcmul_(theta, log_ratio, value=-1)
    return log_prob, slip.div_(ratio), torch.addcdiv(slope, excess, ratio).sub_(log_ratio)


def _best(count: Tensor, theta: Tensor, table: Tensor | None, position: Tensor | None) -> tuple[Tensor, Tensor]:
    """Log-probability of counts that equal their means, and its derivative with respect to theta."""
    if table is None or position is None:
        best, slope = (x.to(count.dtype) for x in _best_by_lgamma(count.double(), theta.double()))
        return best, slope
    row = count.nan_to_num(0.0).clamp(0, SMALL_COUNT + 1)
    place = torch.add(position, row.long(), alpha=table.shape[-1]).reshape(-1)
    best, slope = (values.reshape(-1).index_select(0, place) for values in table)
    large = _search(count > SMALL_COUNT)
    count, theta = torch.take(count, large), torch.take(theta, large)
    inverse, total = count.reciprocal(), (count + theta).reciprocal_()
    of_large = (inverse * total).log_().mul_(0.5).add_(_stirling(total)).sub_(_stirling(inverse))
    for values, more in ((best, of_large), (slope, _stirling_slope(total))):
        values.index_add_(0, large, more.where(count > SMALL_COUNT, 0.0))
    return best.reshape(row.shape), slope.reshape(row.shape)


def _search(mask: Tensor) -> Tensor:
    """Row-major positions of true entries; of all entries if finding them would have to wait for the device."""
    if mask.device.type == "cpu":  # numpy takes a seventh of torch's time
        return torch.from_numpy(np.flatnonzero(mask.numpy()))
    return torch.arange(mask.numel(), device=mask.device)


def _best_by_lgamma(count: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
    total = count + theta
    coefficient = torch.lgamma(total) - torch.lgamma(theta) - torch.lgamma(count + 1)
    best = coefficient + torch.xlogy(count, count / total) - theta * torch.log1p(count / theta)
    return best, torch.digamma(total) - torch.digamma(theta) - torch.log1p(count / theta)


def _table(theta: Tensor) -> Tensor:
    """The value of `_best` for small counts; the last row is the part for large counts that depends only on theta.

    Sums over k below a count of ``log((theta + k) / (k + 1))`` replace lgamma; for larger counts, Stirling's series
    does.
    """
    theta = theta.double().reshape(-1)
    k = torch.arange(SMALL_COUNT, dtype=theta.dtype, device=theta.device).unsqueeze(-1)
    total = theta + k + 1
    of_small = torch.log((theta + k) / (k + 1)).cumsum(0) - (k + 1) * torch.log(total / (k + 1))
    best = of_small - theta * torch.log1p((k + 1) / theta)
    slope = (1 / (theta + k)).cumsum(0) - torch.log1p((k + 1) / theta)
    of_large = torch.xlogy(theta, theta) - theta - torch.lgamma(theta)
    zero = torch.zeros_like(theta)
    slope_of_large = torch.log(theta) - torch.digamma(theta)
    return torch.stack(
        [torch.cat([zero[None], best, of_large[None]]), torch.cat([zero[None], slope, slope_of_large[None]])]
    )


def _stirling(inverse: Tensor) -> Tensor:
    """Remainder of Stirling's formula for the log of x!, given 1 / x, for x above `SMALL_COUNT`."""
    square = inverse * inverse
    return inverse * (1 / 12 - square * (1 / 360 - square / 1260))


def _stirling_slope(inverse: Tensor) -> Tensor:
    """Derivative of this remainder and of ``-log(x) / 2`` with respect to x."""
    square = inverse * inverse
    return -0.5 * inverse - square * (1 / 12 - square * (1 / 120 - square / 252))


def _itself(parameter: Tensor) -> Tensor:
    return parameter


class _Everywhere:
    """Function from a parameter and a transform to its transformed values, in a shape that broadcasts."""

    def position(self, parameter: Tensor) -> Tensor:
        """Row-major positions of all entries of the parameter."""
        return torch.arange(parameter.numel(), device=parameter.device).reshape(parameter.shape)

    def __call__(self, parameter: Tensor, transform: Callable[[Tensor], Tensor] = _itself) -> Tensor:
        return transform(parameter)


_EVERYWHERE = _Everywhere()


class _Entries:
    """The same function at some entries of a tensor."""

    def __init__(self, index: Tensor, shape: torch.Size) -> None:
        self.index, self.shape = index, shape
        self.entry = _flat_position(index, shape)

    def position(self, parameter: Tensor) -> Tensor:
        """Row-major positions of these entries in the parameter."""
        return self.entry if parameter.shape == self.shape else _flat_position(self.index, parameter.shape)

    def __call__(self, parameter: Tensor, transform: Callable[[Tensor], Tensor] = _itself) -> Tensor:
        position = self.position(parameter)
        # Apply the transform to the smaller tensor.
        if parameter.numel() < len(position):
            return transform(parameter).reshape(-1).index_select(0, position)
        return transform(parameter.reshape(-1).index_select(0, position))


def _log_mixture(logits: Tensor, log_first: Tensor, log_second: Tensor) -> Tensor:
    """Log of ``w * exp(log_first) + (1 - w) * exp(log_second)``, ``w = sigmoid(logits)``, for log-probabilities."""
    log_prob: Tensor = _apply(_LogMixture.apply, logits, log_first, log_second)
    return log_prob


class _LogMixture(torch.autograd.Function):
    """Accurate for values far below zero, where logarithms are summed, and near it, where complements are."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, log_first: Tensor, log_second: Tensor) -> Tensor:
        ctx.save_for_backward(logits, log_first, log_second)
        log_prob = torch.logaddexp(logsigmoid(logits) + log_first, logsigmoid(-logits) + log_second)
        near = _search(log_prob > -0.1)
        if len(near):
            flat = log_prob.reshape(-1)
            x, *logs = (p.expand(log_prob.shape).reshape(-1)[near] for p in (logits, log_first, log_second))
            first, second = map(torch.expm1, logs)
            precise = torch.log1p(torch.sigmoid(x) * first + torch.sigmoid(-x) * second)
            log_prob = flat.index_copy(0, near, precise.where(flat[near] > -0.1, flat[near])).reshape(log_prob.shape)
        return log_prob

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        inputs = logits, log_first, log_second = ctx.saved_tensors
        first = torch.sigmoid(logits + log_first - log_second)  # share of the first component
        slopes = (first - torch.sigmoid(logits), first, 1 - first)
        return tuple((gradient * slope).sum_to_size(x.shape) for slope, x in zip(slopes, inputs, strict=True))


def _variance(mu: Tensor, theta: Tensor) -> Tensor:
    """Negative binomial variance."""
    return mu + mu**2 / theta


def _gamma_poisson(mu: Tensor, theta: Tensor) -> Tensor:
    """Draw negative binomial counts."""
    rate = Gamma(theta, 1.0).sample() * (mu / theta)
    return torch.poisson(rate.clamp(max=LARGEST_RATE))
