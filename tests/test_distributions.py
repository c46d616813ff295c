"""Distributions against independent references: mpmath, scipy, finite differences, summation, quadrature, samples."""

import copy
from itertools import product

import mpmath
import numpy as np
import pyro
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import mutually_broadcastable_shapes
from pyro.infer import SVI, Predictive, Trace_ELBO
from scipy import integrate, stats
from scipy.special import expit, logsumexp
from torch.utils._python_dispatch import TorchDispatchMode

from pyromosaic.distributions import (
    AccessibilityBernoulli,
    Log1pNormal,
    MarginalNegativeBinomialMixture,
    NegativeBinomial,
    NegativeBinomialMixture,
    Normal,
    Poisson,
    ZeroInflatedGamma,
    ZeroInflatedLogNormal,
    ZeroInflatedNegativeBinomial,
    count_terms,
)

T = torch.Tensor


class Marginal(MarginalNegativeBinomialMixture):
    """With so many nodes that the quadrature is exact to rounding, in its derivatives too."""

    def __init__(self, loc: T, scale: T, ratio: T, theta: T, mixture_logits: T, validate_args: bool | None = None):
        super().__init__(loc, scale, ratio, theta, mixture_logits, n_nodes=17, validate_args=validate_args)


COUNTS = [
    NegativeBinomial,
    ZeroInflatedNegativeBinomial,
    NegativeBinomialMixture,
    Marginal,
    AccessibilityBernoulli,
    Poisson,
]
CONTINUOUS = [Log1pNormal, ZeroInflatedLogNormal, ZeroInflatedGamma]
ZERO_INFLATED = [ZeroInflatedLogNormal, ZeroInflatedGamma]
LOGITS = {"gate_logits", "mixture_logits", "logits", "region_logits", "cell_logits", "loc"}

properties = settings(max_examples=60, deadline=None, derandomize=True)


@pytest.fixture(autouse=True)
def _seed():
    pyro.set_rng_seed(0)
    pyro.clear_param_store()
    with pyro.validation_enabled(True):
        yield


def parameters(cls, *shapes, dtype=torch.float32, seed=0):
    """Ordinary parameters of a distribution, one shape each, the last repeated."""
    generator = torch.Generator().manual_seed(seed)
    names = list(cls.__init__.__annotations__)
    names = [name for name in names if name not in ("validate_args", "return")]
    shapes = list(shapes) + [shapes[-1]] * (len(names) - len(shapes))
    values = {}
    for name, shape in zip(names, shapes, strict=False):
        normal = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        values[name] = normal if name in LOGITS else normal.exp() * (3 if name.startswith("mu") else 1)
        if cls is Marginal and name == "scale":
            values[name] = 0.8 * normal.sigmoid()
    return values


def counts_like(shape, dtype=torch.float32, seed=0):
    """Counts of which most are zero."""
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.poisson(4.0, shape) * (rng.random(shape) < 0.3)).to(dtype)


def gradients(log_prob, values):
    weight = torch.linspace(0.5, 1.5, log_prob.numel(), dtype=log_prob.dtype).reshape(log_prob.shape)
    return torch.autograd.grad((weight * log_prob).sum(), list(values.values()))


def double(*values):
    return [torch.tensor(value, dtype=torch.float64) for value in values]


def require_grad(values):
    return {name: value.clone().requires_grad_() for name, value in values.items()}


# --- log_prob against mpmath --------------------------------------------------------------------------------------


def mp_nb(x, mu, theta):
    x, mu, theta = (mpmath.mpf(float(a)) for a in (x, mu, theta))
    coefficient = mpmath.loggamma(x + theta) - mpmath.loggamma(theta) - mpmath.loggamma(x + 1)
    return coefficient + theta * mpmath.log(theta / (theta + mu)) + (x * mpmath.log(mu / (theta + mu)) if x else 0)


def mp_sigmoid(logit):
    return 1 / (1 + mpmath.exp(-mpmath.mpf(float(logit))))


def mp_log_prob(cls, x, *args):
    """Log-probability with 80 digits, by the textbook formula."""
    if cls is NegativeBinomial:
        return mp_nb(x, *args)
    if cls is ZeroInflatedNegativeBinomial:
        mu, theta, gate = args
        return mpmath.log(mp_sigmoid(gate) * (x == 0) + mp_sigmoid(-gate) * mpmath.exp(mp_nb(x, mu, theta)))
    if cls is NegativeBinomialMixture:
        background, foreground, theta, mixture = args
        return mpmath.log(
            mp_sigmoid(mixture) * mpmath.exp(mp_nb(x, background, theta))
            + mp_sigmoid(-mixture) * mpmath.exp(mp_nb(x, foreground, theta))
        )
    if cls is Poisson:
        x, mu = mpmath.mpf(x), mpmath.mpf(args[0])
        return x * mpmath.log(mu) - mu - mpmath.loggamma(x + 1)
    is_open = mp_sigmoid(args[0]) * mp_sigmoid(args[1]) * mp_sigmoid(args[2])
    return mpmath.log(is_open) if x > 0 else mpmath.log(1 - is_open)


GRIDS = {
    NegativeBinomial: (
        [0, 1, 2, 7, 100, 10_000, 1_000_000],
        [1e-8, 1e-3, 0.3, 1, 50, 1e3, 1e6],
        [1e-4, 0.1, 1, 30, 1e3, 1e6],
    ),
    ZeroInflatedNegativeBinomial: (
        [0, 1, 100, 1_000_000],
        [1e-8, 0.3, 50, 1e6],
        [1e-4, 1, 30, 1e6],
        [-60, -8, -1, 0, 1, 8, 30],
    ),
    NegativeBinomialMixture: (
        [0, 1, 100, 1_000_000],
        [1e-8, 0.3, 1e3],
        [1e-8, 5, 1e6],
        [1e-4, 3, 1e6],
        [-60, -8, 0, 3, 60],
    ),
    AccessibilityBernoulli: (
        [0, 1, 5],
        [-80, -20, -3, 0, 1.5, 6, 20, 80],
        [-40, -3, 0, 4, 80],
        [-40, -3, 0, 4, 80],
    ),
    Poisson: ([0, 1, 2, 7, 100, 10_000, 1_000_000], [1e-8, 1e-3, 0.3, 1, 1.5, 50, 99, 101, 1e3, 1.01e4, 1e6]),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("cls", GRIDS)
def test_log_prob_and_gradients_over_extreme_values(cls, dtype):
    grid = torch.tensor(list(product(*GRIDS[cls])), dtype=dtype)
    value, *args = grid.unbind(1)
    args = [arg.clone().requires_grad_() for arg in args]
    log_prob = cls(*args).log_prob(value)
    with mpmath.workdps(80):
        expected = torch.tensor([float(mp_log_prob(cls, *row)) for row in grid.tolist()], dtype=torch.float64)
    tiny = torch.finfo(dtype).tiny  # a probability below it is zero in this precision
    torch.testing.assert_close(log_prob.double(), expected, rtol=1e-5 if dtype == torch.float32 else 1e-8, atol=tiny)
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(log_prob.sum(), args))


def test_negative_binomial_gradients_over_extreme_values():
    grid = torch.tensor(list(product(*GRIDS[NegativeBinomial])), dtype=torch.float64)
    value, mu, theta = grid.unbind(1)
    mu, theta = mu.requires_grad_(), theta.requires_grad_()
    grads = torch.autograd.grad(NegativeBinomial(mu, theta).log_prob(value).sum(), [mu, theta])
    expected = []
    with mpmath.workdps(80):
        for row in grid.tolist():
            x, m, t = map(mpmath.mpf, row)
            d_mu = x / m - (x + t) / (t + m)
            d_theta = mpmath.digamma(x + t) - mpmath.digamma(t) + mpmath.log(t / (t + m)) + 1 - (x + t) / (t + m)
            expected.append([float(d_mu), float(d_theta)])
    torch.testing.assert_close(torch.stack(grads, 1), torch.tensor(expected).double(), rtol=1e-6, atol=1e-9)


def test_agrees_with_scipy_and_torch():
    x = np.arange(200)
    for mu, theta in [(3.0, 0.7), (40.0, 12.0)]:
        ours = NegativeBinomial(*double(mu, theta)).log_prob(torch.tensor(x))
        np.testing.assert_allclose(ours, stats.nbinom(theta, theta / (theta + mu)).logpmf(x), rtol=1e-9)
        np.testing.assert_allclose(
            Poisson(*double(mu)).log_prob(torch.tensor(x)), stats.poisson(mu).logpmf(x), rtol=1e-9
        )
    values = parameters(ZeroInflatedNegativeBinomial, (6, 5), dtype=torch.float64)
    value = counts_like((6, 5)).double()
    theirs = pyro.distributions.ZeroInflatedNegativeBinomial(
        values["theta"], logits=values["mu"].log() - values["theta"].log(), gate_logits=values["gate_logits"]
    )
    torch.testing.assert_close(ZeroInflatedNegativeBinomial(**values).log_prob(value), theirs.log_prob(value))


# --- gradients ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("cls", COUNTS)
def test_gradcheck_counts(cls, sparse):
    values = require_grad(parameters(cls, (4, 5), (5,), (4, 1), dtype=torch.float64))
    value = counts_like((4, 5))
    value = value.to_sparse() if sparse else value
    assert torch.autograd.gradcheck(lambda *args: cls(*args).log_prob(value), list(values.values()))


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("theta", [(5,), (4, 5)])
@pytest.mark.parametrize("cls", COUNTS)
def test_first_and_second_derivatives_of_small_and_large_counts(cls, theta, sparse):
    values = parameters(cls, (4, 5), dtype=torch.float64)
    others = parameters(cls, theta, dtype=torch.float64, seed=1)
    values = require_grad({name: others[name] if name == "theta" else value for name, value in values.items()})
    value = 3 * counts_like((4, 5), torch.float64, seed=1)
    assert 0 < ((value > 0) & (value <= 12)).sum() < (value > 0).sum()
    value = value.to_sparse() if sparse else value
    check = {"func": lambda *args: cls(*args).log_prob(value), "inputs": list(values.values())}
    assert torch.autograd.gradcheck(**check)
    assert torch.autograd.gradgradcheck(**check)


@pytest.mark.parametrize("shape", [(40, 7), (3, 40, 7), (280,)])
@pytest.mark.parametrize("cls", [NegativeBinomial, NegativeBinomialMixture])
def test_evaluation_in_blocks_changes_nothing(cls, shape, monkeypatch):
    values = require_grad(parameters(cls, shape, shape[-1:]))
    value = 5 * counts_like(shape)
    whole = cls(**values).log_prob(value)
    expected = gradients(whole, values)
    monkeypatch.setattr(count_terms, "BLOCK", 50)
    blocks = cls(**values).log_prob(value)
    torch.testing.assert_close(blocks, whole, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradients(blocks, values), expected)


@pytest.mark.parametrize("cls", COUNTS)
def test_gradcheck_where_zeros_are_improbable(cls):
    """Large means and sure regions: zeros there take another numerical path."""
    values = parameters(cls, (3, 4), (4,), dtype=torch.float64)
    values = {name: value + (4 if cls is AccessibilityBernoulli else 0) for name, value in values.items()}
    values = {name: value + 60 if name.startswith("mu") else value for name, value in values.items()}
    values = require_grad({name: value + 2 if name == "theta" else value for name, value in values.items()})
    value = torch.zeros(3, 4)
    assert torch.autograd.gradcheck(lambda *args: cls(*args).log_prob(value), list(values.values()))


@pytest.mark.parametrize("cls", CONTINUOUS)
def test_gradcheck_continuous(cls):
    values = require_grad(parameters(cls, (3, 4), (4,), dtype=torch.float64))
    value = torch.tensor([[0.0, 0.3, 2.0, 0.0], [5.0, 0.0, 0.1, 1.0], [0.0, 0.0, 30.0, 0.7]]).double()
    assert torch.autograd.gradcheck(lambda *args: cls(*args).log_prob(value), list(values.values()))


@pytest.mark.parametrize("cls", [NegativeBinomial, ZeroInflatedNegativeBinomial, NegativeBinomialMixture, Poisson])
def test_mean_that_underflows_to_zero(cls):
    logits = torch.tensor([[0.0, -200.0], [-200.0, 0.0]], requires_grad=True)
    mu = 10 * torch.softmax(logits, -1)
    assert (mu == 0).any()
    others = {name: p for name, p in parameters(cls, (2,)).items() if not name.startswith("mu")}
    means = {name: mu for name in cls.arg_constraints if name.startswith("mu")}
    others = require_grad(others)
    log_prob = cls(**means, **others).log_prob(torch.tensor([[0.0, 0.0], [3.0, 4.0]]))
    assert log_prob.isfinite().all()
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(log_prob.sum(), [logits, *others.values()]))


def test_accessibility_beyond_single_precision():
    logits = torch.tensor([-1e4, -200.0, 200.0, 1e4], requires_grad=True)
    for value in (torch.zeros(4), torch.ones(4)):
        log_prob = AccessibilityBernoulli(logits, torch.tensor(300.0), torch.tensor(300.0)).log_prob(value)
        assert log_prob.isfinite().all()
        assert torch.autograd.grad(log_prob.sum(), logits)[0].isfinite().all()


# --- sparse values ------------------------------------------------------------------------------------------------


def dense_log_prob(cls, value, mu=None, theta=None, gate_logits=None, **others):
    """Formulas evaluated at every entry, in float64."""

    def nb(mean):
        shape = torch.lgamma(value + theta) - torch.lgamma(theta) - torch.lgamma(value + 1)
        return shape + theta * torch.log(theta / (theta + mean)) + value * torch.log(mean / (theta + mean))

    if cls is Poisson:
        return value * mu.log() - mu - torch.lgamma(value + 1)
    if cls is NegativeBinomial:
        return nb(mu)
    if cls is ZeroInflatedNegativeBinomial:
        gate = torch.sigmoid(gate_logits)
        return torch.log(gate * (value == 0) + (1 - gate) * nb(mu).exp())
    if cls is NegativeBinomialMixture:
        background = torch.sigmoid(others["mixture_logits"])
        components = nb(others["mu_background"]).exp(), nb(others["mu_foreground"]).exp()
        return torch.log(background * components[0] + (1 - background) * components[1])
    if cls is Marginal:  # a sum over levels, close together
        nodes = torch.linspace(-8, 8, 401, dtype=torch.float64).reshape(-1, 1, 1)
        level = torch.exp(others["loc"] + others["scale"] * nodes)
        background = torch.sigmoid(others["mixture_logits"])
        mixed = background * nb(level).exp() + (1 - background) * nb(others["ratio"] * level).exp()
        return torch.log((mixed * torch.exp(-(nodes**2) / 2) * 0.04 / np.sqrt(2 * np.pi)).sum(0))
    is_open = torch.stack(torch.broadcast_tensors(*others.values())).sigmoid().prod(0)
    return torch.where(value > 0, is_open, 1 - is_open).log()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shapes", [[(30, 40), (40,), (30, 1)], [(30, 40)], [(40,), (30, 1)], [(), (40,), (30, 40)]])
@pytest.mark.parametrize("cls", COUNTS)
def test_sparse_equals_strided_equals_dense_formula(cls, shapes, dtype):
    values = require_grad(parameters(cls, *shapes, dtype=dtype))
    value = counts_like((30, 40))
    strided = cls(**values).expand((30, 40)).log_prob(value)
    sparse = cls(**values).expand((30, 40)).log_prob(value.to_sparse())
    torch.testing.assert_close(sparse, strided, rtol=1e-6, atol=0)
    assert sparse.layout == torch.strided and sparse.dtype == dtype
    exact = require_grad({name: p.detach().double() for name, p in values.items()})
    dense = dense_log_prob(cls, value.double(), **exact)
    atol = 5e-7 if cls is Marginal and dtype == torch.float32 else 0.0  # it sums terms of either sign
    torch.testing.assert_close(sparse.double(), dense, rtol=1e-6, atol=atol)
    rtol = 1e-5 if dtype == torch.float32 else 1e-6  # sums of many terms of either sign
    for ours, same, expected in zip(
        gradients(sparse, values), gradients(strided, values), gradients(dense, exact), strict=True
    ):
        for gradient in (ours, same):
            torch.testing.assert_close(gradient.double(), expected, rtol=rtol, atol=rtol * float(expected.abs().max()))


class StaysSparse(TorchDispatchMode):
    """Refuse to make a sparse tensor dense."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert "to_dense" not in str(function)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("cls", COUNTS)
def test_sparse_value_is_never_made_dense(cls):
    values = require_grad(parameters(cls, (30, 40), (40,), (30, 1)))
    value = counts_like((30, 40)).to_sparse()
    with StaysSparse():
        cls(**values).log_prob(value).sum().backward()
        with pytest.raises(AssertionError):
            value.to_dense()


@pytest.mark.parametrize("cls", COUNTS)
def test_sparse_value_with_stored_zeros_duplicates_and_integers(cls):
    distribution = cls(**parameters(cls, (2, 3)))
    strided = torch.tensor([[0, 0, 5], [3, 0, 0]])
    index = torch.tensor([[0, 0, 1, 1, 0], [1, 2, 0, 0, 0]])
    sparse = torch.sparse_coo_tensor(index, torch.tensor([0, 5, 1, 2, 0]), (2, 3), check_invariants=True)
    torch.testing.assert_close(distribution.log_prob(sparse), distribution.log_prob(strided))
    empty = torch.zeros(2, 3).to_sparse()
    torch.testing.assert_close(distribution.log_prob(empty), distribution.log_prob(torch.zeros(2, 3)))


@pytest.mark.parametrize("cls", COUNTS)
def test_sparse_value_of_another_shape_is_refused(cls):
    distribution = cls(**parameters(cls, (2, 3)))
    with pytest.raises(ValueError, match="shape"):
        distribution.log_prob(torch.ones(3).to_sparse())


@pytest.mark.parametrize("cls", COUNTS)
def test_no_cells(cls):
    assert cls(**parameters(cls, (0, 3), (3,))).log_prob(torch.zeros(0, 3).to_sparse()).shape == (0, 3)


def test_missing_values_are_not_silently_zeros():
    distribution = NegativeBinomial(torch.ones(2), torch.ones(2), validate_args=False)
    assert distribution.log_prob(torch.tensor([torch.nan, 0.0])).isnan().tolist() == [True, False]


def test_accessibility_takes_fragment_counts():
    distribution = AccessibilityBernoulli(**parameters(AccessibilityBernoulli, (6, 5), (5,), (6, 1)))
    fragments = counts_like((6, 5))
    assert fragments.max() > 1
    torch.testing.assert_close(distribution.log_prob(fragments), distribution.log_prob((fragments > 0).float()))


# --- normalisation and moments ------------------------------------------------------------------------------------

means = st.floats(0.01, 20)
dispersions = st.floats(0.2, 50)
logit = st.floats(-12, 12)


def check_moments(distribution):
    x = torch.arange(8000.0, dtype=torch.float64)
    p = distribution.log_prob(x).exp()
    mean = (p * x).sum()
    assert float(p.sum()) == pytest.approx(1, abs=1e-9)
    torch.testing.assert_close(distribution.mean, mean, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(distribution.variance, (p * (x - mean) ** 2).sum(), rtol=1e-6, atol=1e-9)


@given(means, dispersions)
@properties
def test_negative_binomial_sums_to_one(mu, theta):
    check_moments(NegativeBinomial(*double(mu, theta)))


@given(means, dispersions, logit)
@properties
def test_zero_inflated_negative_binomial_sums_to_one(mu, theta, gate_logits):
    check_moments(ZeroInflatedNegativeBinomial(*double(mu, theta, gate_logits)))


@given(means, means, dispersions, logit)
@properties
def test_mixture_sums_to_one(mu_background, mu_foreground, theta, mixture_logits):
    mixture = NegativeBinomialMixture(*double(mu_background, mu_foreground, theta, mixture_logits))
    check_moments(mixture)
    assert float(mixture.mixing_probability) == pytest.approx(1 / (1 + np.exp(-mixture_logits)))


@given(st.floats(-3, 3), st.floats(0, 0.4), st.floats(0.01, 10), st.floats(0.5, 50), logit)
@properties
def test_marginal_mixture_sums_to_one(loc, scale, ratio, theta, mixture_logits):
    args = double(loc, scale, ratio, theta, mixture_logits)
    check_moments(MarginalNegativeBinomialMixture(*args, n_nodes=15))
    x = torch.arange(8000.0)
    assert float(MarginalNegativeBinomialMixture(*args).log_prob(x).exp().sum()) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize(("scale", "error"), [(0.3, 2e-4), (0.8, 1e-3), (1.5, 3e-3)])
def test_marginal_mixture_is_the_integral_over_the_background(scale, error):
    """Few counts against mpmath, many against a sum over a fine grid of levels, unlikely counts among them."""
    loc, ratio, logits = 3.0, 8.0, 0.5
    counts = torch.tensor([0, 1, 7, 20, 60, 300, 900, 5000, 50_000.0]).double()
    grid = np.linspace(loc - 25, loc + 25, 100_001)
    prior = stats.norm(loc, scale).logpdf(grid) + np.log(grid[1] - grid[0])
    for theta in (0.5, 9.0, 300.0):
        by_mean = [stats.nbinom(theta, theta / (theta + r * np.exp(grid))) for r in (1, ratio)]
        weights = np.log([expit(logits), expit(-logits)])
        expected = [logsumexp([w + d.logpmf(x) + prior for w, d in zip(weights, by_mean, strict=True)]) for x in counts]
        args = double(loc, scale, ratio, theta, logits)
        for n_nodes, tolerance in ((5, error), (31, 2e-6)):
            found = MarginalNegativeBinomialMixture(*args, n_nodes=n_nodes).log_prob(counts)
            np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance)
        single = MarginalNegativeBinomialMixture(*(arg.float() for arg in args)).log_prob(counts.float())
        np.testing.assert_allclose(single, expected, rtol=1e-5, atol=error)

    def mass(b, x):
        args = (mpmath.exp(b), ratio * mpmath.exp(b), 9.0, logits)
        return mpmath.exp(mp_log_prob(NegativeBinomialMixture, x, *args)) * mpmath.npdf(b, loc, scale)

    for x in (0, 60):
        exact = mpmath.log(mpmath.quad(lambda b, x=x: mass(b, x), np.linspace(loc - 8 * scale, loc + 8 * scale, 5)))
        found = MarginalNegativeBinomialMixture(*double(loc, scale, ratio, 9.0, logits), n_nodes=31)
        assert float(found.log_prob(torch.tensor(x).double())) == pytest.approx(float(exact), abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_marginal_mixture_stays_finite_at_extreme_values(dtype):
    grid = [[0, 1, 100, 1_000_000], [-18, 0, 7], [1e-4, 0.4, 3], [1e-3, 1, 30], [1e-4, 3, 1e6], [-60, 0, 60]]
    value, *args = torch.tensor(list(product(*grid)), dtype=dtype).unbind(1)
    args = [arg.clone().requires_grad_() for arg in args]
    log_prob = MarginalNegativeBinomialMixture(*args).log_prob(value)
    assert log_prob.isfinite().all() and (log_prob < 0.01).all()
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(log_prob.sum(), args))


def test_without_spread_of_the_background_it_is_the_mixture():
    values = parameters(NegativeBinomialMixture, (4, 5), dtype=torch.float64)
    level, ratio = values["mu_background"], values["mu_foreground"] / values["mu_background"]
    shape = {"theta": values["theta"], "mixture_logits": values["mixture_logits"]}
    marginal = MarginalNegativeBinomialMixture(level.log(), torch.zeros(()).double(), ratio, **shape)
    plain, value = NegativeBinomialMixture(**values), counts_like((4, 5))
    torch.testing.assert_close(marginal.log_prob(value), plain.log_prob(value))
    torch.testing.assert_close(marginal.mean, plain.mean)
    torch.testing.assert_close(marginal.variance, plain.variance)


@given(logit, logit, logit)
@properties
def test_accessibility_sums_to_one(logits, region_logits, cell_logits):
    region = AccessibilityBernoulli(*double(logits, region_logits, cell_logits))
    p = region.log_prob(torch.tensor([0.0, 1.0])).exp()
    torch.testing.assert_close(p.sum(), torch.tensor(1.0).double())
    torch.testing.assert_close(region.mean, p[1])
    torch.testing.assert_close(region.variance, p[0] * p[1])


def integral(distribution, moment):
    """Integral of ``moment(x)`` times the density over positive x, in ``u = log(x)``."""

    def integrand(u):
        x = torch.tensor(np.exp(u), dtype=torch.float64)
        return float(distribution.log_prob(x).exp()) * np.exp(u) * moment(np.exp(u))

    pieces = np.linspace(-60, 30, 19)
    return sum(integrate.quad(integrand, a, b, epsabs=1e-13)[0] for a, b in zip(pieces, pieces[1:], strict=False))


CONTINUOUS_EXAMPLES = [
    ZeroInflatedLogNormal(*double(0.5, 0.8, -0.7)),
    ZeroInflatedLogNormal(*double(-2.0, 0.3, 3.0)),
    ZeroInflatedGamma(*double(2.5, 0.4, 0.3)),
    ZeroInflatedGamma(*double(0.5, 3.0, -4.0)),
]


@pytest.mark.parametrize("distribution", CONTINUOUS_EXAMPLES, ids=str)
def test_zero_inflated_density_integrates_to_one_with_its_atom(distribution):
    atom = float(distribution.log_prob(torch.tensor(0.0).double()).exp())
    assert atom == pytest.approx(float(torch.sigmoid(distribution.gate_logits)))
    assert atom + integral(distribution, lambda x: 1) == pytest.approx(1, abs=1e-8)
    mean = integral(distribution, lambda x: x)
    assert float(distribution.mean) == pytest.approx(mean, rel=1e-7)
    variance = integral(distribution, lambda x: (x - mean) ** 2) + atom * mean**2
    assert float(distribution.variance) == pytest.approx(variance, rel=1e-6)


@pytest.mark.parametrize(("loc", "scale"), [(0.0, 1.0), (2.0, 0.3), (-1.0, 0.5)])
def test_log1p_normal_is_a_shifted_log_normal(loc, scale):
    distribution = Log1pNormal(*double(loc, scale))
    reference = stats.lognorm(s=scale, scale=np.exp(loc), loc=-1)
    x = np.array([-0.9, -0.2, 1e-6, 0.4, 3.0, 100.0])
    np.testing.assert_allclose(distribution.log_prob(torch.tensor(x)), reference.logpdf(x), rtol=1e-9)
    assert float(distribution.mean) == pytest.approx(reference.mean())
    assert float(distribution.variance) == pytest.approx(reference.var())
    one = Log1pNormal(torch.tensor(loc), torch.tensor(scale)).log_prob(torch.tensor(x[2:], dtype=torch.float32))
    np.testing.assert_allclose(one, reference.logpdf(x[2:]), rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("cls", ZERO_INFLATED)
def test_zero_inflated_densities_against_scipy(cls, dtype):
    first, second = ([-6, 0, 4], [0.1, 1, 5]) if cls is ZeroInflatedLogNormal else ([0.05, 1, 8], [1e-3, 1, 50])
    grid = torch.tensor(list(product([0, 1e-4, 0.7, 1e4], first, second, [-50, -1, 6])), dtype=dtype)
    x, a, b, gate = grid.double().numpy().T
    if cls is ZeroInflatedLogNormal:
        log_density = stats.lognorm(s=b, scale=np.exp(a)).logpdf(np.where(x > 0, x, 1))
    else:
        log_density = stats.gamma(a, scale=1 / b).logpdf(np.where(x > 0, x, 1))
    expected = np.where(x > 0, -np.logaddexp(0, gate) + log_density, -np.logaddexp(0, -gate))
    ours = cls(*grid[:, 1:].unbind(1)).log_prob(grid[:, 0])
    # a log-density may cross zero: the error is relative to its largest terms, of order ten
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5 if dtype == torch.float32 else 1e-9)


# --- samples ------------------------------------------------------------------------------------------------------

SAMPLED = [
    NegativeBinomial(torch.tensor(3.0), torch.tensor(0.8)),
    NegativeBinomial(torch.tensor(0.05), torch.tensor(20.0)),
    ZeroInflatedNegativeBinomial(torch.tensor(6.0), torch.tensor(2.0), torch.tensor(-0.5)),
    NegativeBinomialMixture(torch.tensor(1.0), torch.tensor(15.0), torch.tensor(4.0), torch.tensor(0.8)),
    MarginalNegativeBinomialMixture(*map(torch.tensor, (0.2, 0.4, 8.0, 4.0, 0.8))),
    AccessibilityBernoulli(torch.tensor(1.0), torch.tensor(2.0), torch.tensor(0.3)),
    Poisson(torch.tensor(1.7)),
    Log1pNormal(torch.tensor(0.3), torch.tensor(0.4)),
    ZeroInflatedLogNormal(torch.tensor(0.3), torch.tensor(0.4), torch.tensor(-1.0)),
    ZeroInflatedGamma(torch.tensor(2.0), torch.tensor(0.7), torch.tensor(0.5)),
]


@pytest.mark.parametrize("distribution", SAMPLED, ids=str)
def test_sample_moments(distribution):
    n = 200_000
    x = distribution.sample((n,)).double()
    mean, variance = float(distribution.mean), float(distribution.variance)
    assert abs(float(x.mean()) - mean) < 4 * np.sqrt(variance / n)
    squares = (x - mean) ** 2
    assert abs(float(squares.mean()) - variance) < 4 * float(squares.std()) / np.sqrt(n)
    assert bool(distribution.support.check(x).all())


@pytest.mark.parametrize("distribution", SAMPLED[:7], ids=str)
def test_sample_frequencies(distribution):
    n = 100_000
    observed = np.bincount(distribution.sample((n,)).int().numpy())
    expected = n * distribution.log_prob(torch.arange(float(len(observed)))).exp().double().numpy()
    if isinstance(distribution, AccessibilityBernoulli):
        assert len(observed) == 2
    cells = expected >= 10  # all other values together are the last cell
    observed = np.append(observed[cells], n - observed[cells].sum())
    expected = np.append(expected[cells], n - expected[cells].sum())
    large = expected > 1
    statistic = ((observed - expected)[large] ** 2 / expected[large]).sum()
    assert stats.chi2(large.sum() - 1).sf(statistic) > 1e-3


@pytest.mark.parametrize(("distribution", "positive"), [(SAMPLED[8], stats.lognorm(0.4, scale=np.exp(0.3)))])
def test_positive_samples_have_their_distribution(distribution, positive):
    x = distribution.sample((20_000,)).numpy()
    assert stats.kstest(x[x > 0], positive.cdf).pvalue > 1e-3


def test_samples_of_extreme_parameters_are_counts():
    mu, theta = torch.tensor(list(product([0.0, 1e-8, 1.0, 1e6, 1e30], [1e-4, 1.0, 1e6]))).unbind(1)
    x = NegativeBinomial(mu, theta).sample((500,))
    assert bool(((x >= 0) & (x == x.floor()) & x.isfinite()).all())
    assert bool((x[:, mu == 0] == 0).all())


def test_log1p_normal_is_reparametrised():
    loc = torch.zeros(3, requires_grad=True)
    distribution = Log1pNormal(loc, torch.ones(3))
    assert distribution.has_rsample
    x = distribution.rsample()
    (grad,) = torch.autograd.grad(x.sum(), loc)
    torch.testing.assert_close(grad, 1 + x.detach())


# --- limits -------------------------------------------------------------------------------------------------------

X = torch.arange(30.0)


def test_no_structural_zeros_is_negative_binomial():
    mu, theta = torch.tensor(4.0), torch.tensor(1.5)
    zinb = ZeroInflatedNegativeBinomial(mu, theta, torch.tensor(-1000.0))
    torch.testing.assert_close(zinb.log_prob(X), NegativeBinomial(mu, theta).log_prob(X))
    certain = ZeroInflatedNegativeBinomial(mu, theta, torch.tensor(1000.0)).log_prob(X)
    assert float(certain[0]) == 0 and bool((certain[1:] < -900).all())


@given(st.floats(0.1, 30))
@properties
def test_large_theta_is_poisson(mu):
    ours = NegativeBinomial(*double(mu, 1e8)).log_prob(X)
    np.testing.assert_allclose(ours, stats.poisson(mu).logpmf(X.numpy()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("mixture_logits", "mu"), [(1000.0, 2.0), (-1000.0, 9.0)])
def test_certain_component(mixture_logits, mu):
    theta = torch.tensor(3.0)
    mixture = NegativeBinomialMixture(torch.tensor(2.0), torch.tensor(9.0), theta, torch.tensor(mixture_logits))
    component = NegativeBinomial(torch.tensor(mu), theta)
    torch.testing.assert_close(mixture.log_prob(X), component.log_prob(X))
    torch.testing.assert_close(mixture.mean, component.mean)
    torch.testing.assert_close(mixture.variance, component.variance)


@given(st.floats(1e-3, 1e3), st.floats(1e-2, 1e2), logit)
@properties
def test_equal_components_are_one(mu, theta, mixture_logits):
    mu, theta, mixture_logits = torch.tensor(mu), torch.tensor(theta), torch.tensor(mixture_logits)
    mixture = NegativeBinomialMixture(mu, mu, theta, mixture_logits)
    torch.testing.assert_close(mixture.log_prob(X), NegativeBinomial(mu, theta).log_prob(X), rtol=1e-5, atol=0)


def test_mixture_of_nothing_and_counts_is_zero_inflated():
    mu, theta, gate = torch.tensor(5.0), torch.tensor(2.0), torch.tensor(0.4)
    mixture = NegativeBinomialMixture(torch.tensor(0.0), mu, theta, gate).log_prob(X)
    torch.testing.assert_close(mixture, ZeroInflatedNegativeBinomial(mu, theta, gate).log_prob(X))


def test_one_factor_is_bernoulli():
    logits = torch.linspace(-9, 9, 13)
    ours = AccessibilityBernoulli(logits, torch.tensor(1e3), torch.tensor(1e3))
    bernoulli = pyro.distributions.Bernoulli(logits=logits)
    for value in (torch.zeros(13), torch.ones(13)):
        torch.testing.assert_close(ours.log_prob(value), bernoulli.log_prob(value))


# --- shapes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", COUNTS + CONTINUOUS)
@given(shapes=mutually_broadcastable_shapes(num_shapes=4, max_dims=3, max_side=3), leading=st.integers(1, 3))
@properties
def test_broadcasting(cls, shapes, leading):
    values = parameters(cls, *shapes.input_shapes)
    batch_shape = torch.broadcast_shapes(*(value.shape for value in values.values()))
    distribution = cls(**values)
    assert distribution.batch_shape == distribution.mean.shape == distribution.variance.shape == batch_shape
    assert distribution.event_shape == ()
    x = distribution.sample((leading,))
    assert x.shape == (leading, *batch_shape) == distribution.shape((leading,))
    full = cls(**{name: value.expand(batch_shape) for name, value in values.items()})
    torch.testing.assert_close(distribution.log_prob(x), full.log_prob(x))
    torch.testing.assert_close(distribution.log_prob(x[0]), full.log_prob(x)[0])
    expanded = distribution.expand((leading, *batch_shape))
    assert expanded.batch_shape == expanded.mean.shape == expanded.variance.shape == (leading, *batch_shape)
    assert expanded.sample((2,)).shape == (2, leading, *batch_shape)
    torch.testing.assert_close(expanded.log_prob(x), full.log_prob(x))
    assert type(expanded) is cls
    summed = distribution.to_event(len(batch_shape))
    assert summed.event_shape == batch_shape
    torch.testing.assert_close(summed.log_prob(x), full.log_prob(x).reshape(leading, -1).sum(-1))


@pytest.mark.parametrize("cls", COUNTS)
def test_parameters_are_never_expanded(cls):
    distribution = cls(**parameters(cls, (7, 5), (5,), (7, 1)))
    shapes = [getattr(distribution, name).shape for name in cls.arg_constraints]
    expanded = distribution.expand((2, 7, 5))
    assert [getattr(expanded, name).shape for name in cls.arg_constraints] == shapes
    assert distribution.batch_shape == (7, 5)


@pytest.mark.parametrize("cls", COUNTS)
def test_impossible_expansions_are_refused(cls):
    distribution = cls(**parameters(cls, (2, 3)))
    for shape in [(3,), (1, 3), (2, 4)]:
        with pytest.raises(ValueError, match="expand|shape"):
            distribution.expand(shape)


@pytest.mark.parametrize("cls", COUNTS)
def test_to_event_with_sparse_values(cls):
    distribution = cls(**parameters(cls, (6, 5), (5,))).to_event(1)
    value = counts_like((6, 5))
    assert distribution.batch_shape == (6,) and distribution.event_shape == (5,)
    torch.testing.assert_close(distribution.log_prob(value.to_sparse()), distribution.log_prob(value))
    torch.testing.assert_close(distribution.log_prob(value), distribution.base_dist.log_prob(value).sum(-1))


@pytest.mark.parametrize("cls", COUNTS)
def test_mask_and_deepcopy(cls):
    distribution = cls(**parameters(cls, (6, 5), (5,)))
    value, mask = counts_like((6, 5)).to_sparse(), torch.rand(6, 5) < 0.5
    log_prob = distribution.log_prob(value)
    torch.testing.assert_close(distribution.mask(mask).log_prob(value), torch.where(mask, log_prob, torch.tensor(0.0)))
    torch.testing.assert_close(copy.deepcopy(distribution).log_prob(value), log_prob)


# --- constraints --------------------------------------------------------------------------------------------------

INVALID = [
    (NegativeBinomial, "mu", -1.0),
    (NegativeBinomial, "theta", 0.0),
    (ZeroInflatedNegativeBinomial, "mu", torch.nan),
    (ZeroInflatedNegativeBinomial, "theta", -1.0),
    (ZeroInflatedNegativeBinomial, "gate_logits", torch.nan),
    (NegativeBinomialMixture, "mu_background", -1.0),
    (NegativeBinomialMixture, "mu_foreground", -1.0),
    (NegativeBinomialMixture, "theta", 0.0),
    (NegativeBinomialMixture, "mixture_logits", torch.nan),
    (MarginalNegativeBinomialMixture, "loc", torch.nan),
    (MarginalNegativeBinomialMixture, "scale", -1.0),
    (MarginalNegativeBinomialMixture, "ratio", 0.0),
    (MarginalNegativeBinomialMixture, "theta", 0.0),
    (MarginalNegativeBinomialMixture, "mixture_logits", torch.nan),
    (AccessibilityBernoulli, "logits", torch.nan),
    (AccessibilityBernoulli, "region_logits", torch.nan),
    (AccessibilityBernoulli, "cell_logits", torch.nan),
    (Poisson, "mu", -1.0),
    (Log1pNormal, "scale", 0.0),
    (ZeroInflatedLogNormal, "loc", torch.nan),
    (ZeroInflatedLogNormal, "scale", -1.0),
    (ZeroInflatedLogNormal, "gate_logits", torch.nan),
    (ZeroInflatedGamma, "concentration", 0.0),
    (ZeroInflatedGamma, "rate", -1.0),
    (ZeroInflatedGamma, "gate_logits", torch.nan),
]


@pytest.mark.parametrize(("cls", "name", "value"), INVALID)
def test_invalid_parameters_are_refused(cls, name, value):
    values = parameters(cls, (2, 3))
    cls(**values)
    values[name][1, 2] = value
    with pytest.raises(ValueError, match=name):
        cls(**values)


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("wrong", [-1.0, 1.5, torch.nan])
@pytest.mark.parametrize("cls", COUNTS)
def test_values_that_are_not_counts_are_refused(cls, wrong, sparse):
    values = parameters(cls, (2, 3))
    value = torch.tensor([[0.0, 2.0, 0.0], [wrong, 1.0, 0.0]])
    value = value.to_sparse() if sparse else value
    with pytest.raises(ValueError, match="integer"):
        cls(**values).log_prob(value)
    cls(**values, validate_args=False).log_prob(value)


@pytest.mark.parametrize(
    ("cls", "wrong"), [(Log1pNormal, -1.5), (ZeroInflatedLogNormal, -0.1), (ZeroInflatedGamma, -1)]
)
def test_values_outside_the_support_are_refused(cls, wrong):
    with pytest.raises(ValueError, match="support"):
        cls(**parameters(cls, (2,))).log_prob(torch.tensor([1.0, wrong]))


def test_normal_is_pyros():
    assert Normal is pyro.distributions.Normal


# --- in Pyro programs ---------------------------------------------------------------------------------------------

N_CELLS, N_FEATURES = 8, 6


def model(cls, values, obs):
    values = {name: pyro.param(name, value) for name, value in values.items()}
    distribution = cls(**values)
    with pyro.plate("cells", 3 * N_CELLS, subsample=torch.arange(N_CELLS), dim=-2):
        with pyro.plate("features", N_FEATURES, dim=-1):
            return pyro.sample("x", distribution, obs=obs)


def model_of_rows(cls, values, obs):
    values = {name: pyro.param(name, value) for name, value in values.items()}
    with pyro.plate("cells", N_CELLS, dim=-1):
        return pyro.sample("x", cls(**values).expand((N_CELLS, N_FEATURES)).to_event(1), obs=obs)


@pytest.mark.parametrize("validate", [True, False])
@pytest.mark.parametrize("program", [model, model_of_rows])
@pytest.mark.parametrize("cls", COUNTS)
def test_sparse_observation_in_plates(cls, program, validate):
    values = parameters(cls, (N_CELLS, N_FEATURES), (N_FEATURES,), (N_CELLS, 1))
    value = counts_like((N_CELLS, N_FEATURES))
    results = []
    with pyro.validation_enabled(validate):
        for obs in (value, value.to_sparse()):
            pyro.clear_param_store()
            loss = Trace_ELBO().differentiable_loss(program, lambda *args: None, cls, values, obs)
            loss.backward()
            results.append([loss.detach(), *(p.grad for _, p in pyro.get_param_store().named_parameters())])
    scale = 3 if program is model else 1
    torch.testing.assert_close(results[0][0], -scale * cls(**values).log_prob(value).sum())
    assert len(results[0]) == 1 + len(values)
    for dense, sparse in zip(*results, strict=True):
        torch.testing.assert_close(sparse, dense, rtol=1e-6, atol=0)


@pytest.mark.parametrize("cls", COUNTS)
def test_trace_condition_and_predict(cls):
    values = parameters(cls, (N_FEATURES,))
    value = counts_like((N_CELLS, N_FEATURES)).to_sparse()
    conditioned = pyro.poutine.condition(model, data={"x": value})
    trace = pyro.poutine.trace(conditioned).get_trace(cls, values, None)
    assert trace.nodes["x"]["fn"].batch_shape == (N_CELLS, N_FEATURES)
    assert "x" in trace.format_shapes()
    expected = 3 * cls(**values).log_prob(value.to_dense()).sum()
    torch.testing.assert_close(trace.log_prob_sum(), expected)
    drawn = Predictive(model, guide=lambda *args: None, num_samples=4)(cls, values, None)["x"]
    assert drawn.shape == (4, N_CELLS, N_FEATURES)


def test_svi_recovers_parameters_from_sparse_counts():
    mu, theta = torch.tensor([0.3, 2.0, 8.0]), torch.tensor([1.0, 3.0, 5.0])
    value = NegativeBinomial(mu, theta).sample((4000,)).to_sparse()

    def program():
        log_mu, log_theta = pyro.param("log_mu", torch.zeros(3)), pyro.param("log_theta", torch.zeros(3))
        with pyro.plate("cells", 4000, dim=-2), pyro.plate("features", 3, dim=-1):
            pyro.sample("x", NegativeBinomial(log_mu.exp(), log_theta.exp()), obs=value)

    svi = SVI(program, lambda: None, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
    for _ in range(250):
        svi.step()
    torch.testing.assert_close(pyro.param("log_mu").exp(), value.to_dense().mean(0), rtol=1e-3, atol=1e-3)
    assert ((pyro.param("log_theta").exp() / theta).log().abs() < 0.3).all()
