"""Terms of log-probabilities of counts, with their derivatives."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from pyro.distributions import Gamma
from pyro.distributions.util import broadcast_shape
from torch import Tensor
from torch.nn.functional import logsigmoid
from torch.overrides import handle_torch_function, has_torch_function

LARGEST_RATE = 1e9  # Poisson samplers overflow 32-bit integers above about 4e9
BLOCK = 2**18  # entries evaluated together on the CPU


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


def _log_count(count: Tensor, means: list[Tensor], theta: Tensor, at: "_Entries | _Everywhere") -> Tensor:
    """Negative binomial log-probability of counts under each mean, along a first dimension."""
    means, shared = [at(mu) for mu in means], _shared(theta, count, at)
    theta = at(theta)
    stacked = means[0].unsqueeze(0) if len(means) == 1 else torch.stack(torch.broadcast_tensors(*means))
    log_prob: Tensor = _apply(_LogCount.apply, count, aligned(stacked, count, theta), theta, *shared)
    return log_prob


def aligned(stacked: Tensor, *others: Tensor) -> Tensor:
    """Parameters stacked along a first dimension, in a shape that broadcasts with others without it."""
    n_missing = max(x.dim() for x in others) + 1 - stacked.dim()
    return stacked.reshape(len(stacked), *[1] * max(0, n_missing), *stacked.shape[1:])


def _shared(theta: Tensor, count: Tensor, at: "_Entries | _Everywhere") -> tuple[Tensor | None, Tensor | None]:
    """Table of what depends on theta and a small count, and the column of each entry; None if thetas are not shared."""
    if theta.numel() >= count.numel():
        return None, None
    return _table(theta.detach()).to(theta.dtype), at.position(theta)


def _apply(function: Callable[..., Any], *inputs: Any) -> Any:
    """Call a function of plain tensors, even if other objects replace them, e.g. when Pyro traces dependencies."""
    return handle_torch_function(function, inputs, *inputs) if has_torch_function(inputs) else function(*inputs)


def in_blocks(
    evaluate: Callable[..., tuple[Tensor, ...]], stacked: Tensor, inputs: list[Tensor], n_results: int, n_each: int = 1
) -> Tensor:
    """Results of a function of entries, evaluated on the CPU in blocks that stay in its cache.

    Parameters
    ----------
    evaluate
        Function from blocks of `stacked` and of the inputs to at least `n_results` results.
    stacked
        Several values for each entry along a first dimension, as results have.
    inputs
        Tensors that broadcast with `stacked` without this dimension.
    n_results
        Number of results to keep.
    n_each
        Numbers that are evaluated for each value of `stacked`.
    """
    n, shape = len(stacked), broadcast_shape(stacked.shape[1:], *(x.shape for x in inputs))
    width = shape[-1] if len(shape) > 1 else 1
    inputs = [x.expand(shape).reshape(-1, width) for x in inputs]
    stacked = stacked.expand(n, *shape).reshape(n, -1, width)
    results = stacked.new_empty(n_results, *stacked.shape)
    on_cpu = stacked.device.type == "cpu"
    n_rows = max(1, BLOCK // max(1, n * n_each * width) if on_cpu else stacked.shape[1])
    for to, *block in zip(*(x.split(n_rows, dim=-2) for x in (results, stacked, *inputs)), strict=True):
        for part, result in zip(to, evaluate(*block), strict=False):
            part.copy_(result)
    return results.reshape(n_results, n, *shape)


class _LogCount(torch.autograd.Function):
    """Negative binomial log-probabilities of counts under one or several means, with their derivatives."""

    @staticmethod
    def forward(
        ctx: Any, count: Tensor, means: Tensor, theta: Tensor, table: Tensor | None, position: Tensor | None
    ) -> Tensor:
        n_results = 3 if any(ctx.needs_input_grad) else 1  # the log-probability, with or without its two derivatives
        if table is None or position is None:
            results = in_blocks(_of_any, means, [count, theta], n_results)
        else:
            results = in_blocks(partial(_of_small, table), means, [count, theta, position], n_results)
            _replace_large(table, results, means, count, theta, position)
        log_prob, *slopes = results
        ctx.save_for_backward(count, means, theta, *slopes)
        return log_prob

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        count, mu, theta, by_mu, by_theta = ctx.saved_tensors
        if torch.is_grad_enabled():  # second derivatives are needed
            excess = (mu - count) / (mu + theta)
            by_mu = -theta * excess / mu
            by_theta = torch.digamma(count + theta) - torch.digamma(theta) - torch.log1p(mu / theta) + excess
        if not any(gradient.stride()):  # the same for all, that of a sum: multiply last
            of_theta = by_theta.sum_to_size(theta.shape) * gradient.as_strided((), ())
        else:
            of_theta = (gradient * by_theta).sum_to_size(theta.shape)
        return None, (gradient * by_mu).sum_to_size(mu.shape), of_theta, None, None


def log_prob_and_slopes(
    mu: Tensor, count: Tensor, theta: Tensor, table: Tensor | None = None, column: Tensor | None = None
) -> tuple[Tensor, ...]:
    """Negative binomial log-probability of counts, with its derivatives with respect to mean and theta.

    Parameters
    ----------
    mu
        Means, with one more dimension before those of the counts.
    count, theta
        Equal shapes.
    table, column
        From `_shared`, the column for each entry.
    """
    if table is None or column is None:
        return _of_any(mu, count, theta)
    results = _of_small(table, mu, count, theta, column)
    _replace_large(table, results, mu, count, theta, column)
    return results


def _above_zero(mu: Tensor) -> Tensor:
    """Keeps count / mu finite where a mean has underflowed to zero."""
    return mu + torch.finfo(mu.dtype).tiny ** 0.4


def _of_any(mu: Tensor, count: Tensor, theta: Tensor) -> tuple[Tensor, ...]:
    best, slope = (x.to(count.dtype) for x in _best_by_lgamma(count.double(), theta.double()))
    return _less_lost(count, _above_zero(mu), theta, best, slope)


def _of_small(table: Tensor, mu: Tensor, count: Tensor, theta: Tensor, column: Tensor) -> tuple[Tensor, ...]:
    """Right for small counts; see `_table`."""
    place = torch.add(column, count.int().clamp_(0, SMALL_COUNT), alpha=table.shape[-1]).reshape(-1)
    coefficient, slope = (values.reshape(-1).index_select(0, place).reshape(count.shape) for values in table)
    mu = _above_zero(mu)
    log_ratio = (mu / theta).log1p_()
    log_prob = torch.addcmul(coefficient, count, mu.log()).addcmul_(count + theta, log_ratio, value=-1)
    excess = (count - mu).div_(mu + theta)
    return log_prob, (theta / mu).mul_(excess), (slope - log_ratio).sub_(excess)


def _replace_large(
    table: Tensor, results: Sequence[Tensor] | Tensor, mu: Tensor, count: Tensor, theta: Tensor, column: Tensor
) -> None:
    """Replace the results of large counts."""
    shape = results[0].shape[1:]
    count, mu = count.expand(shape), mu.expand(-1, *shape)
    large = _search(count > SMALL_COUNT)
    if len(large) == 0:
        return
    x, t, column = (torch.take(values.expand(shape), large) for values in (count, theta, column))
    of_theta = table[:, -1].index_select(1, column)
    mu = _above_zero(mu.reshape(len(mu), -1).index_select(1, large))
    for result, values in zip(results, _less_lost(x, mu, t, *_best_of_large(x, t, *of_theta)), strict=False):
        flat = result.view(len(mu), -1)
        flat.index_copy_(1, large, values.where(x > SMALL_COUNT, flat.index_select(1, large)))


def _less_lost(count: Tensor, mu: Tensor, theta: Tensor, best: Tensor, slope: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probability of a count given the mean, with its derivatives with respect to mean and theta.

    It is the log-probability under the best-fitting mean, the count itself, minus the loss under the given mean. Terms
    of large counts would cancel; only their difference is computed.
    """
    least = torch.finfo(mu.dtype).eps - 1
    scale = (count + theta).reciprocal_()
    excess = (mu - count).mul_(scale)
    ratio = (mu + theta).mul_(scale)  # 1 + excess
    slip = (excess * theta).div_(mu).neg_()  # 1 + slip is count / mu * ratio
    log_ratio = torch.log1p(excess.clamp_min(least))
    log_prob = torch.addcmul(best, count, slip.clamp_min(least).log1p_(), value=-1)
    log_prob = log_prob.addcmul_(theta, log_ratio, value=-1)
    return log_prob, slip.div_(ratio), torch.addcdiv(slope, excess, ratio).sub_(log_ratio)


def _best_of_large(count: Tensor, theta: Tensor, best: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability of large counts that equal their means, and its derivative with respect to theta.

    `best` and `slope` are the parts that depend only on theta.
    """
    inverse, total = count.reciprocal(), (count + theta).reciprocal_()
    of_count = (inverse * total).log_().mul_(0.5).add_(_stirling(total)).sub_(_stirling(inverse))
    return best + of_count, slope + _stirling_slope(total)


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
    """Parts of the log-probability, and of its derivative with respect to theta, that do not depend on the mean.

    For each value of theta, a row for each small count: the part of the log-probability is what is left without
    ``x log(mu) - (x + theta) log(1 + mu / theta)``. Sums over k below a count of ``log((theta + k) / (k + 1) / theta)``
    replace lgamma. The last row is the part of `_best_of_large`, by Stirling's series.
    """
    theta = theta.double().reshape(-1)
    k = torch.arange(SMALL_COUNT, dtype=theta.dtype, device=theta.device).unsqueeze(-1)
    total = theta + k
    small = torch.log(total / ((k + 1) * theta)).cumsum(0)
    of_large = torch.xlogy(theta, theta) - theta - torch.lgamma(theta)
    zero = torch.zeros_like(theta)[None]
    slope_of_large = torch.log(theta) - torch.digamma(theta)
    rows = [zero, small, of_large[None]], [zero, total.reciprocal_().cumsum(0), slope_of_large[None]]
    return torch.stack([torch.cat(part) for part in rows])


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
        return torch.arange(parameter.numel(), dtype=torch.int32, device=parameter.device).reshape(parameter.shape)

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


def _log_poisson(count: Tensor, mu: Tensor) -> Tensor:
    """Poisson log-probability of counts: under the best-fitting mean, minus the loss from using another mean."""
    limits = torch.finfo(mu.dtype)
    exact = count.double()
    best = (torch.xlogy(exact, exact) - exact - torch.lgamma(exact + 1)).to(mu.dtype)
    ratio = (mu + limits.tiny**0.4) / count.clamp_min(1)
    excess = ratio - 1
    near = excess.abs() < 0.5  # where the logarithm of the ratio would cancel with the excess
    log_ratio = torch.where(near, torch.log1p(excess.clamp(-0.5, 0.5)), ratio.log())
    return torch.where(count == 0, -mu, best - count * (excess - log_ratio))


def _variance(mu: Tensor, theta: Tensor) -> Tensor:
    """Negative binomial variance."""
    return mu + mu**2 / theta


def _gamma_poisson(mu: Tensor, theta: Tensor) -> Tensor:
    """Draw negative binomial counts."""
    rate = Gamma(theta, 1.0).sample() * (mu / theta)
    return torch.poisson(rate.clamp(max=LARGEST_RATE))
