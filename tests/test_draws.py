"""Draws in hand: one joint draw of latent variables and modalities, with names, for xarray and ArviZ."""

import sys
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
import xarray
from pyro import distributions as dist
from pyro.nn import PyroSample
from scipy import sparse
from scipy.stats import multinomial, nbinom

from pyromosaic import ContrastiveVI, DiagVI, ModalitySpec, Mosaic, MultiVI, ScModal, simulate
from pyromosaic.likelihoods import NB
from pyromosaic.models import drawing
from pyromosaic.tasks import joint

QUIET = {"progress_bar": False, "accelerator": "cpu"}
LINKS = pd.DataFrame({"rna": [f"rna_{i}" for i in range(6)], "adt": [f"adt_{i}" for i in range(6)]})
pytestmark = pytest.mark.filterwarnings("ignore:the guidance graph has few links")


@pytest.fixture(scope="module")
def data():
    return simulate(120, {"rna": 30, "atac": 200, "adt": 6}, treated=0.5, seed=3)[0]


@pytest.fixture(scope="module")
def model(data):
    model = MultiVI(Mosaic.from_mudata(data, batch_key="batch"), n_latent=3)
    model.train(30, **QUIET)
    return model


def some(model, n=20):
    return list(model.mosaic.obs_names[:: len(model.mosaic.obs_names) // n][:n])


def test_draws_have_names(model):
    cells, features = some(model), {"rna": ["rna_3", "rna_1"]}
    drawn = model.get_draws(["adt", "rna"], cells, features=features, n_samples=4)
    assert {name: drawn[name].dims for name in drawn} == {
        "z": ("draw", "cell", "z_dim"),
        "adt": ("draw", "cell", "adt_feature"),
        "rna": ("draw", "cell", "rna_feature"),
    }
    assert dict(drawn.sizes) == {"draw": 4, "cell": 20, "z_dim": 3, "adt_feature": 6, "rna_feature": 2}
    assert drawn["cell"].to_numpy().tolist() == cells and drawn["z_dim"].to_numpy().tolist() == ["z_0", "z_1", "z_2"]
    whole = model.get_draws(["adt", "rna"], cells, n_samples=4)
    np.testing.assert_array_equal(whole["rna"].sel(rna_feature=features["rna"]), drawn["rna"])
    assert list(model.get_draws(cells=cells, n_samples=2)) == ["z"]


@pytest.mark.parametrize("modality", ["rna", "atac", "adt"])
def test_expected_draws_are_those_of_the_estimate(model, modality):
    drawn = model.get_draws(modality, n_samples=7, seed=2)[modality]
    found = model.get_imputed_values(modality, n_samples=7, quantiles=(0.5,), seed=2)
    np.testing.assert_allclose(drawn.mean("draw"), found.mean, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(drawn.std("draw", ddof=1), found.sd, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(drawn.quantile(0.5, "draw"), found.quantiles[0.5], rtol=1e-4, atol=1e-6)
    kind = model.get_draws(modality, kind="predicted", n_samples=3, seed=2)[modality]
    np.testing.assert_array_equal(kind, model.posterior_predictive_sample(modality, n_samples=3, seed=2))


def test_a_draw_belongs_together(model):
    """Expected values of both modalities are functions of the z of the same draw: the decoders give them again."""
    cells = some(model)
    drawn = model.get_draws(["rna", "adt"], cells, n_samples=400)
    z, total = drawn["z"].to_numpy(), np.log(drawn["rna"].to_numpy() + 1e-3)
    other = np.log(drawn["adt"].to_numpy() + 1e-3)

    def explained(target, by):
        """Share of the variance over draws that a linear function of z explains, cell by cell."""
        shares = []
        for c in range(target.shape[1]):
            x = np.column_stack([np.ones(len(by)), by[:, c]])
            y = target[:, c]
            left = y - x @ np.linalg.lstsq(x, y, rcond=None)[0]
            shares.append(1 - left.var(0).sum() / y.var(0).sum())
        return np.mean(shares)

    for target in (total, other):
        assert explained(target, z) > 3 * explained(target, z[np.random.default_rng(0).permutation(400)]) + 0.05


def test_draws_of_z_are_the_posterior(model):
    q = model.get_latent_posterior()
    drawn = model.get_draws(n_samples=400)["z"].to_numpy()
    error = (drawn.mean(0) - q.mean.to_numpy()) / (q.sd.to_numpy() / 20)
    assert abs(error.mean()) < 0.2 and 0.8 < error.std() < 1.2
    np.testing.assert_allclose(np.median(drawn.std(0) / q.sd.to_numpy()), 1, rtol=0.02)
    np.testing.assert_array_equal(q.mean, model.get_latent_representation())
    alone = model.get_latent_posterior(modality="adt")
    assert alone.mean.index.equals(model.get_latent_representation(modality="adt").index)
    np.testing.assert_array_equal(alone.mean, model.get_latent_representation(modality="adt"))


def test_portions_batches_and_what_is_seen(model, monkeypatch):
    cells = some(model)
    whole = model.get_draws("rna", cells, n_samples=100)
    monkeypatch.setattr(joint, "ENTRIES", 1)
    parts = model.get_draws("rna", cells, n_samples=100)  # cell by cell, with other noise
    difference = (whole["rna"].mean("draw") - parts["rna"].mean("draw")) / whole["rna"].std("draw") * 50**0.5
    assert 0.5 < float(difference.std()) < 1.5
    monkeypatch.undo()
    both = model.mosaic.obs_names[model.mosaic.presence[["rna", "adt"]].all(axis=1)][:10]
    one = model.get_draws("adt", both, encode="rna", n_samples=3)["adt"]
    np.testing.assert_allclose(
        one.mean("draw"), model.get_imputed_values("adt", both, encode="rna", n_samples=3).mean, rtol=1e-4
    )
    there = model.get_draws("adt", both, batch="batch1", n_samples=3)["adt"]
    np.testing.assert_allclose(
        there.mean("draw"), model.get_imputed_values("adt", both, batch="batch1", n_samples=3).mean, rtol=1e-4
    )
    later = model.register(model.mosaic)
    assert model.get_draws("adt", data=later, n_samples=2).sizes["cell"] == 120


def test_sparse_measurements(model):
    dense = model.posterior_predictive_sample("atac", n_samples=3, seed=1)
    drawn = model.posterior_predictive_sample("atac", n_samples=3, seed=1, form="sparse")
    assert all(sparse.issparse(matrix) and matrix.format == "csr" for matrix in drawn)
    np.testing.assert_array_equal(np.stack([matrix.toarray() for matrix in drawn]), dense)
    few = model.posterior_predictive_sample("atac", ["cell3", "cell0"], features=["atac_5"], form="sparse")
    assert few[0].shape == (2, 1)


@pytest.mark.parametrize("name", ["ContrastiveVI", "DiagVI", "ScModal", "private"])
def test_every_model_gives_draws(name, data):
    mosaic = Mosaic.from_mudata(data, {"rna": "nb", "adt": "nb_mixture"}, batch_key="batch")
    if name == "ContrastiveVI":
        model = ContrastiveVI(mosaic.with_cohorts("condition", background="control"), n_latent=3, n_salient=2)
    elif name == "private":
        model = MultiVI(mosaic, n_latent=3, n_private={"rna": 2})
    else:
        model = {"DiagVI": DiagVI, "ScModal": ScModal}[name](mosaic, LINKS, linkage=None, n_latent=3)
    drawn = model.get_draws(["rna", "adt"], n_samples=5)
    np.testing.assert_allclose(
        model.get_draws("rna", n_samples=5)["rna"].mean("draw"),
        model.get_imputed_values("rna", n_samples=5).mean,
        rtol=1e-3,
        atol=1e-6,
    )
    expected = {"ContrastiveVI": {"s"}, "private": {"z_rna"}}.get(name, set())
    assert {"z", "rna", "adt"} | expected <= set(drawn)
    assert all(np.isfinite(drawn[variable]).all() for variable in drawn)
    q = model.get_latent_posterior()
    assert (q.sd > 0).all(axis=None) or name == "ScModal"
    if name == "ContrastiveVI":
        control = model.mosaic.groups == 0
        assert (drawn["s"][:, control] == 0).all() and (drawn["s"][:, ~control] != 0).all()
        s = model.get_latent_posterior(site="s")
        np.testing.assert_allclose(s.mean, model.get_latent_representation(), rtol=1e-5, atol=1e-6)
        assert (s.sd[control] == 0).all(axis=None) and (s.sd[~control] > 0).all(axis=None)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"modalities": "protein"}, KeyError, "there is no modality 'protein'"),
        ({"modalities": ["rna"], "kind": "mean"}, ValueError, "kind must be 'denoised', 'expected' or 'predicted'"),
        ({"modalities": ["rna"], "features": {"adt": ["adt_0"]}}, ValueError, "features of modality 'adt' have no eff"),
        ({"modalities": ["rna"], "features": {"rna": ["x"]}}, ValueError, "feature 'x' is not in modality 'rna'"),
        ({"n_samples": 0}, ValueError, "n_samples must be a whole number from 1"),
        ({"encode": "protein"}, KeyError, "there is no modality 'protein'"),
        ({"cells": ["nobody"]}, ValueError, "cell 'nobody' is not in the mosaic"),
        ({"modalities": ["rna"], "batch": "elsewhere"}, ValueError, "modality 'rna' has no batch 'elsewhere'"),
    ],
)
def test_what_is_refused(model, given, error, message):
    with pytest.raises(error, match=message):
        model.get_draws(**given)


def test_refused_names_sites_and_modalities(model, data):
    with pytest.raises(ValueError, match="the guide has no variable 's' of cells; it has z"):
        model.get_latent_posterior(site="s")
    without = model.mosaic.obs_names[~model.mosaic.modalities["adt"].present]
    with pytest.raises(ValueError, match="none of the given cells has modality 'adt'"):
        model.get_latent_posterior(without, modality="adt")
    odd = MultiVI(Mosaic.from_anndata({"cell": data["rna"].copy()}, {"cell": "nb"}), n_latent=3)
    with pytest.raises(ValueError, match="modality 'cell' has the name of a dimension of draws"):
        odd.get_draws("cell")


def test_xarray_is_named_if_it_is_missing(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "xarray", None)
    with pytest.raises(ModuleNotFoundError, match=r"need xarray, .* run pip install 'pyromosaic\[draws\]'"):
        model.get_draws(n_samples=1)


# ArviZ


def groups_of(tree):
    return (
        set(tree.groups())
        if hasattr(tree, "posterior") and callable(tree.groups)
        else {g.strip("/") for g in tree.groups}
    )


@pytest.mark.parametrize("installed", [True, False])
def test_inference_data(model, monkeypatch, installed):
    if installed:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pytest.importorskip("arviz")
    else:
        monkeypatch.setitem(sys.modules, "arviz", None)
    cells = some(model)
    tree = model.to_inference_data(cells=cells, features={"atac": ["atac_1"]}, n_samples=6)
    assert groups_of(tree) - {""} == {"posterior", "posterior_predictive", "log_likelihood", "observed_data"}
    posterior, predicted, seen = (tree[group] for group in ("posterior", "posterior_predictive", "observed_data"))
    assert set(posterior.data_vars) == {"z", "rna_mean", "atac_mean", "adt_mean"}
    assert posterior["z"].dims == ("chain", "draw", "cell", "z_dim") and posterior["z"].shape[0] == 1
    assert predicted["atac"].dims == ("chain", "draw", "cell", "atac_feature")
    assert set(predicted.data_vars) == set(seen.data_vars) == {"rna", "atac", "adt"}
    for name in ("rna", "adt"):
        has = model.mosaic.presence.loc[cells, name].to_numpy()
        assert np.isnan(seen[name].to_numpy()[~has]).all()
        measured = model.mosaic.modalities[name].read(model.mosaic.find(np.array(cells)[has]))
        measured = measured.toarray() if sparse.issparse(measured) else measured
        np.testing.assert_array_equal(seen[name].to_numpy()[has], measured)
    assert predicted["rna"].dtype == np.int64 and seen["rna"].dtype.kind == "f"
    measured = model.mosaic.obs_names[model.mosaic.presence["rna"]]
    assert model.to_inference_data("rna", measured, n_samples=2)["observed_data"]["rna"].dtype == np.int64
    if not installed:
        assert isinstance(tree, xarray.DataTree)


class Uncertain(NB):
    """Dispersions with a prior, and so with a posterior."""

    def __init__(self, schema):
        super().__init__(schema)
        self.log_theta = PyroSample(dist.Normal(torch.zeros(schema.n_features), 0.3).to_event(1))


THETA = "modalities.rna.likelihood.log_theta"


def test_global_variables_and_log_likelihoods_are_of_the_same_draw(data, monkeypatch):
    """Also cell by cell: the log-likelihood is that of the expected count and the dispersion of its draw."""
    specs = {"rna": ModalitySpec(Uncertain, batch_key="batch"), "atac": "bernoulli"}
    model = MultiVI(Mosaic.from_mudata(data, specs, batch_key="batch"), n_latent=3)
    cells = some(model, 12)
    for entries in (joint.ENTRIES, 1):
        monkeypatch.setattr(joint, "ENTRIES", entries)
        tree = model.to_inference_data(cells=cells, features={"rna": ["rna_4", "rna_2"]}, n_samples=5)
        posterior, found, seen = (tree[group] for group in ("posterior", "log_likelihood", "observed_data"))
        theta = np.exp(posterior[THETA])
        assert theta.dims == ("chain", "draw", f"{THETA}_dim_0") and theta.shape == (1, 5, 30)
        assert float(theta.std("draw").min()) > 0
        theta, mean, counts = theta.to_numpy()[0][:, None, [4, 2]], posterior["rna_mean"].to_numpy()[0], seen["rna"]
        expected = nbinom.logpmf(counts.to_numpy(), theta, theta / (theta + mean))
        has = model.mosaic.presence.loc[cells, "rna"].to_numpy()
        assert found["rna"].dims == ("chain", "draw", "cell", "rna_feature")
        np.testing.assert_allclose(found["rna"].to_numpy()[0][:, has], expected[:, has], rtol=2e-3, atol=2e-4)
        assert np.isnan(found["rna"].to_numpy()[0][:, ~has]).all() and has.any() and not has.all()
        p, open_ = posterior["atac_mean"].to_numpy()[0], seen["atac"].to_numpy() > 0
        has = model.mosaic.presence.loc[cells, "atac"].to_numpy()
        np.testing.assert_allclose(
            found["atac"].to_numpy()[0][:, has], np.log(np.where(open_, p, 1 - p))[:, has], rtol=1e-3, atol=1e-5
        )


def test_embeddings_of_features_are_drawn_once_for_all_cells(data, monkeypatch):
    mosaic = Mosaic.from_mudata(data, {"rna": "nb", "adt": "nb_mixture"}, batch_key="batch")
    model = DiagVI(mosaic, LINKS, linkage=None, n_latent=3)
    monkeypatch.setattr(joint, "ENTRIES", 1)  # cell by cell
    tree = model.to_inference_data("adt", some(model, 4), n_samples=3)
    v = tree["posterior"]["v"]
    assert v.dims == ("chain", "draw", "v_dim_0", "v_dim_1") and v.shape == (1, 3, 36, 3)
    assert float(v.std("draw").min()) > 0
    assert set(model.get_draws(n_samples=2)) == {"z", "v"}


def test_log_likelihoods_of_a_multinomial_add_up(data):
    model = MultiVI(Mosaic.from_mudata(data, {"rna": "multinomial"}), n_latent=3)
    whole = model.to_inference_data(cells=list(model.mosaic.obs_names[:4]), n_samples=2)
    counts, mean = whole["observed_data"]["rna"].to_numpy(), whole["posterior"]["rna_mean"].to_numpy()[0]
    expected = multinomial.logpmf(
        counts, counts.sum(-1), mean.astype(float) / mean.astype(float).sum(-1, keepdims=True)
    )
    np.testing.assert_allclose(whole["log_likelihood"]["rna"].sum("rna_feature")[0], expected, rtol=1e-3)


def test_parts_of_one_run(model):
    """With both kinds, predicted measurements are draws around the expected ones of the same draw."""
    tree = drawing.Drawing._drawn(
        model, ["rna"], some(model), ("expected", "predicted"), None, None, None, 200, None, 0
    )
    expected, predicted = tree["expected"]["rna"], tree["predicted"]["rna"]
    assert abs(float((predicted - expected).mean() / expected.mean())) < 0.05
    within, mixed = (
        float(((predicted - expected) ** 2).mean()),
        float(((predicted - expected.roll(draw=1)) ** 2).mean()),
    )
    assert within < mixed
