"""Model criticism, against exact posteriors, exact likelihoods and data that do not fit."""

from dataclasses import replace

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from numpy.testing import assert_allclose
from scipy import stats
from torch import nn

from pyromosaic import (
    ContrastiveVI,
    DiagVI,
    ModalitySpec,
    Mosaic,
    MultiVI,
    ScModal,
    checks,
    hide,
    metrics,
    plot,
    simulate,
)
from pyromosaic.data.matrix import Matrix

pytestmark = [
    pytest.mark.filterwarnings("ignore:the shared latent space carries only"),  # of models that are hardly trained
    pytest.mark.filterwarnings("ignore:the guidance graph has few links"),
]

# A model whose posterior is known: x ~ Normal(W z + b, sigma), z ~ Normal(0, I), W with orthogonal columns

N, P, D = 400, 8, 2


class Linear(nn.Module):
    """Decoder W z + b."""

    def __init__(self, weight, bias):
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)

    def forward(self, z, view):
        return {"loc": z @ self.weight.T + self.bias}


class Exact(nn.Module):
    """Encoder with the exact posterior, its scale multiplied and its mean shifted."""

    def __init__(self, decoder, sigma, stretch=1.0, shift=0.0):
        super().__init__()
        self.decoder, self.sigma, self.stretch, self.shift = decoder, sigma, stretch, shift

    def forward(self, view):
        weight = self.decoder.weight.detach()
        precision = 1 + weight.square().sum(0) / self.sigma**2
        residual = view.dense_counts() - self.decoder.bias.detach()
        scale = precision.rsqrt().expand(len(residual), -1)
        return residual @ weight / self.sigma**2 / precision + self.shift * scale, self.stretch * scale


def linear_gaussian(stretch=1.0, shift=0.0, sigma=0.7):
    rng = np.random.default_rng(0)
    weight = np.linalg.qr(rng.normal(size=(P, D)))[0] * [1.5, 0.8]
    bias = rng.normal(size=P)
    x = rng.normal(size=(N, D)) @ weight.T + bias + sigma * rng.normal(size=(N, P))
    mosaic = Mosaic.from_anndata({"x": anndata.AnnData(x.astype(np.float32))}, {"x": ModalitySpec("normal")})
    model = MultiVI(mosaic, n_latent=D, prior="normal")
    decoder = Linear(torch.tensor(weight, dtype=torch.float32), torch.tensor(bias, dtype=torch.float32))
    model.model.modalities["x"].decoder = decoder
    model.guide.modalities["x"].encoder = Exact(decoder, sigma, stretch, shift)
    model.model.modalities["x"].likelihood.log_sigma.data.fill_(np.log(sigma))
    covariance = weight @ weight.T + sigma**2 * np.eye(P)
    return model, stats.multivariate_normal(bias, covariance).logpdf(x)


def test_exact_posteriors_have_uniform_ranks():
    ranks = checks.simulation_based_calibration(linear_gaussian()[0], n_steps=0)
    assert ranks.below.shape == (N, D) and ranks.n_samples == 99
    assert ranks.test()["p_value"].min() > 0.01
    assert_allclose(ranks.coverage()["randomised"], [0.5, 0.9], atol=0.04)
    for of in ("mean", "effect"):
        found = checks.simulation_based_calibration(linear_gaussian()[0], of=of, n_steps=0)
        assert found.below.dropna().shape == (N if of == "mean" else N // 2, P)
        assert found.test()["p_value"].min() > 0.01 / P


@pytest.mark.parametrize(("stretch", "shift"), [(0.6, 0.0), (1.7, 0.0), (1.0, 0.5)])
def test_wrong_posteriors_are_found_out(stretch, shift):
    ranks = checks.simulation_based_calibration(linear_gaussian(stretch, shift)[0], n_steps=0)
    assert ranks.test()["p_value"].max() < 1e-4
    counts = np.histogram(ranks.uniform(), 10, (0, 1))[0]
    ends, middle = (counts[0] + counts[-1]) / 2, counts[4:6].mean()
    if shift:
        # The posterior lies above the truth: the true value is among the lowest.
        assert counts[0] > 2 * counts[-1]
    else:
        assert ends > 2 * middle if stretch < 1 else ends < middle / 2
        expected = [2 * stats.norm.cdf(stretch * stats.norm.ppf((1 + level) / 2)) - 1 for level in (0.5, 0.9)]
        assert_allclose(ranks.coverage()["interval"], expected, atol=0.05)


def test_a_fitted_guide_is_calibrated_and_the_model_is_left_alone():
    model = linear_gaussian()[0]
    network = MultiVI(model.mosaic, n_latent=D, dropout=0.0, prior="normal")
    network.model.modalities["x"].decoder = model.model.modalities["x"].decoder
    network.model.modalities["x"].likelihood.log_sigma.data.fill_(np.log(0.7))
    before = {k: v.clone() for k, v in (network.model.state_dict() | network.guide.state_dict()).items()}
    as_it_is = checks.simulation_based_calibration(network, n_steps=0, n_samples=49)
    fitted = checks.simulation_based_calibration(network, n_steps=300, n_samples=49)
    errors = [np.abs(r.coverage()["randomised"].to_numpy() - [0.5, 0.9]).max() for r in (as_it_is, fitted)]
    assert errors[1] < 0.06 < errors[0]
    after = network.model.state_dict() | network.guide.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_held_out_likelihood_is_the_exact_one():
    for stretch, tolerance in ((1.0, 2e-3), (1.3, 0.1)):
        model, exact = linear_gaussian(stretch)
        found = checks.held_out_log_likelihood(model, np.arange(100), n_samples=100)
        assert_allclose(found["log_likelihood"], exact[:100], atol=tolerance * 3)
        assert abs((found["log_likelihood"] - exact[:100]).mean()) < tolerance / 5
        assert (found["elbo"] <= found["log_likelihood"] + 1e-6).all()
    # With the right posterior every draw says the same; a wrong one loses its divergence from the right one.
    assert found["n_effective"].max() < 100
    loss = D * (1.3**2 / 2 - 0.5 - np.log(1.3))
    assert_allclose((exact[:100] - found["elbo"]).mean(), loss, rtol=0.15)
    model, exact = linear_gaussian()
    assert_allclose(checks.held_out_log_likelihood(model, n_samples=1)["log_likelihood"], exact, atol=1e-3)


def test_ranks_of_counts_are_randomised():
    rng = np.random.default_rng(0)
    truth, draws = rng.poisson(0.3, (4000, 1)), rng.poisson(0.3, (49, 4000, 1))
    columns = pd.MultiIndex.from_tuples([("rna", "gene")], names=["variable", "name"])
    below, equal = (pd.DataFrame(n.sum(0), columns=columns) for n in (draws < truth, draws == truth))
    ranks = checks.Ranks(below, equal, 49)
    assert ranks.test().loc[("rna", "gene"), "p_value"] > 0.01
    table = ranks.coverage((0.5, 0.9))
    assert_allclose(table["randomised"], [0.5, 0.9], atol=0.03)
    assert (table["interval"] > [0.75, 0.95]).all()
    # The closed interval is that of quantiles among the draws.
    ends = [np.quantile(draws, q, axis=0, method=m) for q, m in ((0.05, "inverted_cdf"), (0.95, "higher"))]
    assert abs(metrics.interval_coverage(truth, *ends) - table["interval"].iloc[1]) < 0.01
    halves = pd.Series(np.where(np.arange(4000) < 1000, "a", "b"), name="half")
    by = ranks.coverage((0.9,), by=halves)
    assert list(by["n"]) == [1000, 3000] and by.index.names == ["variable", "half", "level"]
    with pytest.raises(ValueError, match="levels must be a list with values each a number between 0 and 1"):
        ranks.coverage((90,))


# Predictive checks


@pytest.fixture(scope="module")
def counts():
    """RNA and antibodies, half of the cells with both."""
    mdata, _ = simulate(
        500, {"rna": 60, "adt": 8}, patterns={"rna": 0.2, "adt": 0.2, "rna+adt": 0.6}, links={"adt": 1.0}, seed=1
    )
    mosaic = Mosaic.from_mudata(mdata, batch_key="batch")
    model = MultiVI(mosaic, n_latent=4, n_hidden=32)
    model.train(60, progress_bar=False)
    return mdata, model


def test_data_of_the_model_itself_pass(counts):
    """Against the prior, p-values of such data are uniform."""
    _, model = counts
    overall, each = [], []
    for seed in range(6):
        drawn, latent = checks.prior_sample(model, seed=seed)
        assert latent["z"].shape == (500, 4)
        check = checks.predictive_check(model, data=drawn, prior=True, n_samples=49, seed=100 + seed)
        overall.append(check.overall["p_value"])
        each.append(check.table["p_value"])
    overall, each = pd.concat(overall), pd.concat(each)
    assert stats.kstest(overall, "uniform").pvalue > 1e-3 and 0.35 < overall.mean() < 0.65
    # Values of a statistic depend on each other; the mean of p-values is 0.5 all the same.
    by = each.groupby(level="statistic")
    assert by.mean().between(0.35, 0.65).all()
    assert (by.agg(lambda p: (p <= 0.1).mean()) < 0.22).all()


def test_p_values_of_a_right_posterior_are_nearer_the_middle():
    model = linear_gaussian()[0]
    check = checks.predictive_check(model, n_samples=99)
    assert list(check.overall.loc["x"].index) == ["mean", "variance"]
    assert (check.overall["outside"] <= 0.125).all() and (check.overall["p_value"] > 0.05).all()
    wrong = checks.predictive_check(linear_gaussian(shift=2.0)[0], n_samples=99)
    assert wrong.overall.loc[("x", "mean"), "p_value"] == 0.01


def changed(model, name, change):
    """Data drawn from the model, one modality of which is changed; sizes stay as they are."""
    drawn, _ = checks.prior_sample(model, seed=3)
    modality = drawn.modalities[name]
    x = modality.matrix[np.arange(len(modality.matrix.source))]
    own = replace(modality, matrix=Matrix(change(np.random.default_rng(0), x).astype(np.float32)))
    return replace(drawn, modalities=drawn.modalities | {name: own})


@pytest.mark.parametrize(
    ("name", "change", "statistics"),
    [
        ("rna", lambda rng, x: rng.poisson(np.broadcast_to(x.mean(0), x.shape)), ["variance", "zeros", "correlation"]),
        ("rna", lambda rng, x: x * (rng.random(x.shape) > 0.3) / 0.7 // 1, ["zeros", "variance"]),
        ("rna", lambda rng, x: rng.poisson(x * rng.gamma(1.0, 1.0, x.shape)), ["variance"]),
        ("adt", lambda rng, x: x[:, ::-1], ["mean", "background"]),
        ("adt", lambda rng, x: np.take_along_axis(x, rng.random(x.shape).argsort(0), 0), ["correlation"]),
        ("adt", lambda rng, x: 2 * x, ["mean", "size"]),
    ],
    ids=["Poisson", "dropout", "overdispersed", "swapped", "shuffled", "deeper"],
)
def test_data_that_do_not_fit_are_caught(counts, name, change, statistics):
    _, model = counts
    check = checks.predictive_check(model, data=changed(model, name, change), prior=True, n_samples=49)
    for statistic in statistics:
        where = f"rna ~ {name}" if statistic == "correlation" and name == "rna" else name
        where = "rna ~ adt" if statistic == "correlation" else where
        assert check.overall.loc[(where, statistic), "p_value"] == 0.02, statistic


def test_statistics_are_those_of_the_data(counts):
    mdata, model = counts
    links = pd.DataFrame({"rna": ["rna_3", "rna_5", "nothing"], "adt": ["adt_2", "adt_0", "adt_1"]})
    check = checks.predictive_check(model, n_samples=5, links=links)
    x, y = (mdata[name].to_df() for name in ("rna", "adt"))
    observed = check.table["observed"].sort_index()
    for found, expected in (
        (observed["rna", "mean"][x.columns], x.mean()),
        (observed["rna", "variance"][x.columns], x.var()),
        (observed["adt", "zeros"][y.columns], (y == 0).mean()),
        (observed["adt", "size"][["5%", "50%", "95%"]], y.sum(axis=1).quantile([0.05, 0.5, 0.95])),
    ):
        assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
    both = x.index.intersection(y.index)
    a, b = np.log1p(x.loc[both]), np.log1p(y.loc[both])
    expected = [
        np.corrcoef(a["rna_3"], b["adt_2"])[0, 1],
        np.corrcoef(a["rna_5"], b["adt_0"])[0, 1],
        np.corrcoef(np.log1p(x.loc[both].sum(axis=1)), np.log1p(y.loc[both].sum(axis=1)))[0, 1],
    ]
    found = observed["rna ~ adt", "correlation"]
    found = found[["rna_3 ~ adt_2", "rna_5 ~ adt_0", "size"]]
    assert_allclose(found, expected, atol=1e-5)
    table = check.table
    assert (table["lower"] <= table["upper"]).all() and table["p_value"].between(1 / 6, 1).all()
    with pytest.raises(ValueError, match="no pair in links has both features"):
        checks.predictive_check(model, links=links[2:])


# Intervals of what was held out


def test_imputed_counts_of_the_model_itself_are_covered(counts):
    """Antibodies drawn from the model for cells without them: the model knows how uncertain it is."""
    _, model = counts
    cells = model.mosaic.obs_names[~model.mosaic.presence["adt"]]
    truths = model.posterior_predictive_sample("adt", list(cells), n_samples=10, seed=5)
    found = []  # a draw of the weights is common to all cells, so one truth says little
    for seed, truth in enumerate(truths):
        truth = pd.DataFrame(truth, cells, model.schema["adt"].features)
        found.append(checks.imputation_ranks(model, "adt", truth, n_samples=49, seed=seed).coverage()["randomised"])
    assert_allclose(np.mean(found, axis=0), [0.5, 0.9], atol=0.04)
    sizes = model.posterior_predictive_sample("adt", list(cells), n_samples=40).sum(-1)
    model.model.modalities["adt"].size.residual.fill_(1e-6)
    assert (
        sizes.std(0).mean()
        > 1.05 * model.posterior_predictive_sample("adt", list(cells), n_samples=40).sum(-1).std(0).mean()
    )


def test_expected_counts_are_the_mean_of_draws(counts):
    _, model = counts
    model.model.modalities["rna"].size.residual.fill_(0.5)
    cells = list(model.mosaic.obs_names[~model.mosaic.presence["rna"]][:40])
    mean = model.posterior_predictive_sample("rna", cells, n_samples=300).mean(0)
    expected = model.get_imputed_values("rna", cells, n_samples=100).mean.to_numpy()
    assert_allclose(mean.sum(), expected.sum(), rtol=0.02)


# Every model


def made(name):
    sizes = {"rna": 12, "adt": 8}
    patterns = ["rna", "adt"] if name in ("DiagVI", "ScModal") else None
    treated = 0.5 if name == "ContrastiveVI" else 0.0
    mdata, truth = simulate(160, sizes, patterns=patterns, links={"adt": 1.0}, treated=treated)
    mosaic = Mosaic.from_mudata(mdata, batch_key="batch")
    if name == "MultiVI":
        return MultiVI(mosaic, n_latent=3, n_private=1, library="latent", n_hidden=16, left_out=0.0)
    if name == "ContrastiveVI":
        return ContrastiveVI(mosaic.with_cohorts("condition", background="control"), n_latent=3, n_salient=2)
    links = truth.links.rename(columns={"gene": "rna", "feature": "adt"})[["rna", "adt"]]
    return {"DiagVI": DiagVI, "ScModal": ScModal}[name](mosaic, links, n_latent=3, n_private=1, linkage=None)


@pytest.mark.parametrize("name", ["MultiVI", "ContrastiveVI", "DiagVI", "ScModal"])
def test_every_model_can_be_checked(name):
    model = made(name)
    model.train(1, progress_bar=False)
    for prior in (False, True):
        check = checks.predictive_check(model, n_samples=3, prior=prior)
        assert set(check.overall.loc["adt"].index) == {"mean", "variance", "zeros", "size", "background"}
        assert np.isfinite(check.table.to_numpy()).all()
        paired = name in ("MultiVI", "ContrastiveVI")
        assert (("rna ~ adt", "correlation") in check.overall.index) == paired
    ranks = checks.simulation_based_calibration(model, n_samples=3, n_steps=2)
    variables = set(ranks.below.columns.unique(0))
    expected = {
        "MultiVI": {"z", "z_rna", "z_adt", "rna_library"},
        "ContrastiveVI": {"z", "s"},
        "DiagVI": {"z", "z_rna", "z_adt"},
        "ScModal": {"z", "z_rna", "z_adt"},
    }
    assert variables == expected[name]
    if name == "ContrastiveVI":  # controls have no salient variable
        assert (ranks.below["s"].notna().all(axis=1) == (model.mosaic.groups > 0)).all()
    means = checks.simulation_based_calibration(model, of="mean", n_samples=2, n_steps=0)
    assert means.below["rna"].shape[1] == 12
    drawn, latent = checks.prior_sample(model, seed=1)
    again, _ = checks.prior_sample(model, seed=1)
    cells = np.flatnonzero(drawn.presence["rna"])
    assert torch.equal(drawn.modalities["rna"].tensor(cells), again.modalities["rna"].tensor(cells))
    assert (drawn.presence == model._data(None).presence).all().all()
    table = checks.held_out_log_likelihood(model, n_samples=4, data=drawn)
    assert np.isfinite(table.to_numpy()).all() and len(table) == drawn.n_cells
    weights = [m.weight for m in model.guide.modules() if hasattr(m, "warms_up")]
    assert any(weights)  # penalties are back


def test_a_likelihood_without_weights_and_scales_is_the_sum_of_its_parts():
    """The joint density of DiagVI's sites, whatever its weights are."""
    model = made("DiagVI")
    found = checks.held_out_log_likelihood(model, n_samples=20)
    mdata = model.mosaic
    other = DiagVI(
        mdata, model.graph, n_latent=3, n_private=1, linkage=None, likelihood_weight=0.1, shared_kl=5.0, private_kl=9.0
    )
    other.model.load_state_dict(model.model.state_dict())
    other.guide.load_state_dict(model.guide.state_dict())
    pd.testing.assert_frame_equal(checks.held_out_log_likelihood(other, n_samples=20), found, rtol=1e-4)


def test_points_have_no_posterior_to_check():
    mdata, truth = simulate(120, {"rna": 40, "adt": 6}, patterns=["rna", "adt"], links={"adt": 1.0})
    model = ScModal(Mosaic.from_mudata(mdata), linkage=None, deterministic=True, n_private=0)
    with pytest.raises(ValueError, match="has a point estimate of 'z'"):
        checks.held_out_log_likelihood(model, n_samples=2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: checks.predictive_check(m, n_samples=0), "n_samples must be a whole number from 1"),
        (lambda m: checks.held_out_log_likelihood(m, n_samples=0), "n_samples must be a whole number from 1"),
        (lambda m: checks.simulation_based_calibration(m, of="size"), "of must be 'latent', 'mean' or 'effect'"),
        (lambda m: checks.predictive_check(m, [0]), "in 1 of the cells"),
    ],
)
def test_refusals(counts, call, message):
    with pytest.raises(ValueError, match=message):
        call(counts[1])


def test_hidden_measurements_are_found_by_their_names():
    mdata, _ = simulate(120, {"rna": 40, "adt": 6}, patterns=["rna+adt"])
    mdata, truth = hide(mdata, {"adt": 15})
    model = MultiVI(Mosaic.from_mudata(mdata), n_latent=3, n_hidden=16)
    ranks = checks.imputation_ranks(model, "adt", truth["adt"], n_samples=19)
    assert list(ranks.below.index) == list(truth["adt"].obs_names)
    total = ranks.below + ranks.equal
    assert (total <= 19).all().all() and ranks.uniform().to_numpy().max() < 1


def test_the_report_holds_what_its_checks_say():
    """Posteriors that are right pass, and those that are too narrow do not; cells are drawn if there are many."""
    for stretch, share in ((1.0, 0.9), (0.6, 0.676)):
        model = linear_gaussian(stretch)[0]
        report = checks.calibration_report(model)
        table = report.table
        assert table.index.names == ["question", "variable", "cells"] and set(table) == {"inside_50", "inside_90", "n"}
        assert_allclose(table.loc[("latent", "z", "x"), "inside_90"], share, atol=0.05)
        assert table.loc[("latent", "z", "x"), "n"] == N * D and table.loc[("mean", "x", "all"), "n"] == N * P
        assert table.loc[("effect", "x", "all"), "n"] == N // 2 * P
        asked = checks.simulation_based_calibration(model, n_steps=0)
        assert_allclose(table.loc[("latent", "z", "x"), "inside_50"], asked.coverage([0.5])["randomised"].item())
        check = checks.predictive_check(model)
        assert table.loc[("data", "x", "mean"), "inside_90"] == 1 - check.overall.loc[("x", "mean"), "outside"]
    few = checks.calibration_report(model, n_cells=50, n_samples=9)
    assert few.table.loc[("latent", "z", "x"), "n"] == 50 * D and len(few.latent.below) == 50


@pytest.mark.parametrize("name", ["ContrastiveVI", "DiagVI", "ScModal"])
def test_every_model_has_a_report(name):
    model = made(name)
    model.train(1, progress_bar=False)
    report = checks.calibration_report(model, n_cells=40, n_samples=3)
    assert {"latent", "mean", "effect", "data"} == set(report.table.index.unique("question"))
    assert report.table.drop(columns="inside_50").notna().all(axis=None)
    figure = plot.calibration_report(report)
    assert len(figure.axes) == 3 and len(figure.axes[0].get_yticklabels()) == len(report.table)
