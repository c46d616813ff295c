"""Correlations of features, densities of groups, backgrounds of proteins, and thresholded accessibility."""

import numpy as np
import pandas as pd
import pytest
from mudata import MuData
from scipy import stats
from scipy.special import logsumexp

from pyromosaic import ModalitySpec, Mosaic, MultiVI, ScModal, simulate
from pyromosaic.models import comparing

QUIET = {"progress_bar": False, "accelerator": "cpu"}


@pytest.fixture(scope="module")
def truth():
    return simulate(
        400,
        {"rna": 40, "atac": 60, "adt": 10},
        types=3,
        links={"adt": 1.0},
        patterns=["rna+atac", "rna+atac+adt"],
        seed=3,
    )


@pytest.fixture(scope="module")
def model(truth):
    model = MultiVI(Mosaic.from_mudata(truth[0], batch_key="batch"), n_latent=5)
    model.train(60, **QUIET)
    return model


# Correlations


def test_correlations_are_those_of_the_draws(model):
    features = {"rna": ["rna_3", "rna_1", "rna_7"], "adt": ["adt_0", "adt_2"]}
    found = model.get_feature_correlation_matrix(["rna", "adt"], features=features, n_samples=3, seed=5)
    assert found.index.tolist() == [("rna", f) for f in features["rna"]] + [("adt", f) for f in features["adt"]]
    expected = []
    for seed in (5, 6, 7):
        drawn = model.get_draws(["rna", "adt"], kind="denoised", features=features, n_samples=1, seed=seed)
        x = np.concatenate([drawn["rna"][0], drawn["adt"][0]], axis=1)
        expected.append(stats.spearmanr(x).statistic)
    np.testing.assert_allclose(found, np.mean(expected, axis=0), atol=1e-9)
    pearson = model.get_feature_correlation_matrix(
        "rna", features={"rna": ["rna_3", "rna_1"]}, method="pearson", seed=5
    )
    x = [
        np.corrcoef(np.log1p(1e4 * model.get_draws("rna", kind="denoised", n_samples=1, seed=s)["rna"][0, :, [3, 1]].T))
        for s in range(5, 15)
    ]
    np.testing.assert_allclose(pearson, np.mean(x, axis=0), atol=1e-6)
    assert (np.diag(found) > 1 - 1e-9).all() and np.allclose(found, found.T)


def test_linked_features_are_correlated(model, truth):
    links = truth[1].links
    links = links[links.iloc[:, -1] > 0] if "sign" in links else links
    found = model.get_feature_correlation_matrix(["rna", "adt"], n_samples=5)
    across = found.loc["rna", "adt"]
    linked = np.array(
        [across.loc[gene, protein] for gene, protein in zip(links["gene"], links["feature"], strict=True)]
    )
    assert len(linked) > 5
    assert abs(linked).mean() > abs(across.to_numpy()).mean() + 0.05


def test_denoised_draws_are_normalised_expression(model):
    drawn = model.get_draws(["rna", "adt"], kind="denoised", n_samples=100)
    np.testing.assert_allclose(drawn["rna"].sum("rna_feature"), 1, rtol=1e-4)
    for name in ("rna", "adt"):
        expected = model.get_normalized_expression(name, n_samples=100).to_numpy()
        correlation = np.corrcoef(np.log(drawn[name].mean("draw").to_numpy().ravel()), np.log(expected.ravel()))
        assert correlation[0, 1] > 0.98  # draws of the weights come on top
        np.testing.assert_allclose(drawn[name].mean(), expected.mean(), rtol=0.1)


def test_features_that_never_vary_and_refusals(model, monkeypatch):
    monkeypatch.setattr(comparing.Comparing, "_comparable", lambda self, name, values, method: 0 * values + 1)
    assert model.get_feature_correlation_matrix("adt", n_samples=1).isna().all(axis=None)
    with pytest.raises(ValueError, match="correlations need at least 3 cells"):
        model.get_feature_correlation_matrix("rna", ["cell0", "cell1"])
    with pytest.raises(ValueError, match="modalities must name at least one modality; found none"):
        model.get_feature_correlation_matrix([])


# Densities


def test_densities_are_means_of_posteriors_without_the_own_one(model):
    density = model.differential_abundance("celltype", ["cell5", "cell0"])
    q = model.get_latent_posterior()
    words = model.mosaic.words("celltype")
    for cell in ("cell5", "cell0"):
        for group in sorted(words.unique()):
            members = [c for c in q.mean.index[words == group] if c != cell]
            logs = stats.norm.logpdf(q.mean.loc[cell], q.mean.loc[members], q.sd.loc[members]).sum(1)
            np.testing.assert_allclose(density.loc[cell, group], logsumexp(logs) - np.log(len(members)), rtol=1e-6)


def test_cells_of_a_missing_type_are_found(truth):
    data = truth[0].copy()
    types = data.obs["celltype"].astype(str)
    condition = pd.Series(np.where(np.random.default_rng(0).random(len(types)) < 0.5, "a", "b"), types.index)
    condition[types == "type0"] = "a"  # b has none
    for part in data.mod.values():
        part.obs["condition"] = condition[part.obs_names]
    model = MultiVI(Mosaic.from_mudata(data), n_latent=5)
    model.train(60, **QUIET)
    density = model.differential_abundance("condition")
    ratio = (density["a"] - density["b"]).groupby(types[density.index]).median()
    share = pd.crosstab(types, condition[types.index], normalize="columns")
    assert ratio["type0"] > 3
    true = np.log(share["a"] / share["b"]).drop("type0")  # about -0.7: a third of a is of the type that b lacks
    assert (abs(ratio.drop("type0") - true) < 0.35).all()


def test_refusals_of_densities(truth, model):
    with pytest.raises(ValueError, match="no obs has a column 'nothing'"):
        model.differential_abundance("nothing")
    data = MuData({"rna": truth[0]["rna"].copy(), "adt": truth[0]["adt"].copy()})
    data["rna"].obs["group"] = ["one"] + ["many"] * (data["rna"].n_obs - 1)
    few = MultiVI(Mosaic.from_mudata(data), n_latent=3)
    with pytest.raises(ValueError, match="group 'one' of column 'group' must have at least 2 cells; found 1"):
        few.differential_abundance("group")
    links = pd.DataFrame({"rna": [f"rna_{i}" for i in range(6)], "adt": [f"adt_{i}" for i in range(6)]})
    point = ScModal(Mosaic.from_mudata(data), links, linkage=None, n_latent=3, n_private=0, deterministic=True)
    with pytest.raises(ValueError, match="the posterior of this model is a point, which has no density"):
        point.differential_abundance("celltype")


# Backgrounds


@pytest.mark.parametrize("background", ["latent", "marginal"])
def test_the_background_is_part_of_the_expected_count(truth, background):
    spec = ModalitySpec("nb_mixture", background=background)
    model = MultiVI(Mosaic.from_mudata(truth[0], {"rna": "nb", "adt": spec}), n_latent=5)
    model.train(20, **QUIET)
    size = model.schema["adt"].library
    found = model.get_protein_background_mean(n_samples=50)
    whole = model.get_imputed_values("adt", library=size, n_samples=200).mean
    assert (found > 0).all(axis=None) and found.shape == whole.shape
    assert (found <= 1.2 * whole).to_numpy().mean() > 0.9  # draws differ
    if background == "latent":
        median = model.get_protein_background_mean(n_samples=None)
        share = model.get_protein_foreground_probability()
        foreground = model.get_normalized_expression("adt")
        expected = model.get_imputed_values("adt", library=size, n_samples=None).mean
        np.testing.assert_allclose((1 - share) * median + foreground, expected, rtol=1e-3, atol=1e-5)
    few = model.get_protein_background_mean(cells=["cell3"], features=["adt_2"], n_samples=2)
    assert few.shape == (1, 1) and few.columns.tolist() == ["adt_2"]
    with pytest.raises(ValueError, match="modality 'rna' has no background; only the likelihood 'nb_mixture' has one"):
        model.get_protein_background_mean("rna")


def test_the_background_is_known_where_it_is_simulated():
    """Proteins with a known background: it is found within a factor of about two, and in their order."""
    rng = np.random.default_rng(0)
    data, _ = simulate(300, {"rna": 40, "adt": 6}, types=2, patterns=["rna+adt"], seed=1)
    levels = np.array([1.0, 2.0, 4.0, 8.0, 16.0, 32.0])
    on = (data["rna"].obs["celltype"] == "type0").to_numpy()[:, None] ^ (np.arange(6) % 2 == 0)
    data["adt"].X = rng.poisson(np.where(on, 10 * levels, levels)).astype(np.float32)
    model = MultiVI(Mosaic.from_mudata(data), n_latent=3)
    model.train(100, **QUIET)
    found = model.get_protein_background_mean().median()
    assert stats.spearmanr(found, levels).statistic > 0.9
    assert (abs(np.log2(found / levels)) < 1.3).all(), found


# Accessibility


def test_thresholded_accessibility_is_sparse(model):
    whole = model.get_accessibility_estimates()
    level = float(whole.stack().quantile(0.7))
    found = model.get_accessibility_estimates(threshold=level)
    assert all(isinstance(dtype, pd.SparseDtype) for dtype in found.dtypes)
    assert found.sparse.density == pytest.approx(0.3, abs=0.01)
    np.testing.assert_allclose(found.sparse.to_dense(), whole.where(whole >= level, 0.0), rtol=1e-6)
    assert found.sparse.to_coo().shape == whole.shape and found.index.equals(whole.index)
    both = model.get_accessibility_estimates(threshold=level, batch=["batch0", "batch1"], n_samples=3, cells=["cell4"])
    assert both.shape == (1, 60)
    with pytest.raises(ValueError, match="threshold must be a share from 0 to 1 or None; found 2.0"):
        model.get_accessibility_estimates(threshold=2.0)
