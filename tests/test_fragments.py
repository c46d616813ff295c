"""Chromatin as fragments: cut sites are counted by two, whatever holds them, and every answer is in fragments."""

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from pyro import poutine
from scipy import sparse
from small import names, warned

from pyromosaic import ModalitySpec, Mosaic, MultiVI, checks
from pyromosaic.data import Schema, fragments, measured
from pyromosaic.distributions import NegativeBinomial, Poisson

RNG = np.random.default_rng(0)
KIND = np.arange(300) % 3
SIZE = RNG.lognormal(0, 0.3, (300, 1))
SHARES = RNG.dirichlet(np.full(40, 1.0), 3)[KIND]
FRAGMENTS = RNG.poisson(60 * SIZE * SHARES)
CUT_SITES = 2 * FRAGMENTS - RNG.binomial(FRAGMENTS, 0.1)
STORED = [np.array, sparse.csr_matrix, sparse.csc_matrix, sparse.coo_array]


def chromatin(x, store=sparse.csr_matrix):
    obs = pd.DataFrame({"kind": KIND[: len(x)].astype(str)}, names(len(x)))
    return anndata.AnnData(store(np.asarray(x, np.float32)), obs, pd.DataFrame(index=names(x.shape[1], "r")))


def mosaic_of(adata, likelihood="poisson", **spec):
    return Mosaic.from_anndata({"atac": adata}, {"atac": ModalitySpec(likelihood, **spec)})


@pytest.mark.parametrize("kind", ["u1", "i8", "f4", "f8"])
@pytest.mark.parametrize("store", STORED)
def test_a_fragment_has_two_cut_sites(store, kind):
    x = np.array([[0, 1, 2, 3], [4, 5, 254, 255]], kind)
    stored = store(x)
    found = fragments(stored)
    np.testing.assert_array_equal(found.toarray() if sparse.issparse(found) else found, np.ceil(x / 2.0))
    np.testing.assert_array_equal(stored.toarray() if sparse.issparse(stored) else stored, x)
    assert type(found) is type(stored) and found.dtype == stored.dtype
    table = pd.DataFrame(x, ["a", "b"])
    pd.testing.assert_frame_equal(fragments(table), pd.DataFrame(np.ceil(x / 2.0), ["a", "b"]).astype(kind))


@pytest.mark.parametrize("likelihood", ["poisson", "nb", "bernoulli", "multinomial"])
@pytest.mark.parametrize("store", [*STORED[:3], "backed"])
def test_registered_cut_sites_are_fragments(store, likelihood, tmp_path):
    expected = mosaic_of(chromatin(np.ceil(CUT_SITES / 2)), likelihood).modalities["atac"]
    adata = chromatin(CUT_SITES, sparse.csr_matrix if store == "backed" else store)
    if store == "backed":
        adata.write_h5ad(tmp_path / "cut.h5ad")
        adata = anndata.read_h5ad(tmp_path / "cut.h5ad", backed="r")
    modality = mosaic_of(adata, likelihood, cut_sites=True).modalities["atac"]
    cells = np.array([5, 3, 299])
    assert torch.equal(modality.tensor(cells).to_dense(), expected.tensor(cells).to_dense())
    np.testing.assert_array_equal(modality.library, expected.library)
    assert modality.schema.library == expected.schema.library and modality.dense == expected.dense
    if store != "backed":
        np.testing.assert_array_equal(adata.to_df().to_numpy(), CUT_SITES)


def test_values_that_are_no_counts_are_named_as_they_are():
    for wrong, said in ((2.5, "2.5 .*is not a whole number"), (-2, "-2.0 .*is negative"), (np.nan, "nan .*not a fin")):
        x = CUT_SITES.astype(np.float32)
        x[7, 3] = wrong
        with pytest.raises(ValueError, match=f"value {said}"):
            mosaic_of(chromatin(x, np.array), cut_sites=True)
    with pytest.raises(ValueError, match="cut_sites=True is for raw counts; likelihood 'normal' takes other values"):
        ModalitySpec("normal", cut_sites=True)
    with pytest.raises(ValueError, match="likelihood 'nb' with allow_non_integer=True takes other values"):
        ModalitySpec("nb", cut_sites=True, allow_non_integer=True)


def test_parity_is_said_and_changes_nothing():
    for likelihood in ("poisson", "nb", "multinomial"):
        mosaic, (said,) = warned(lambda likelihood=likelihood: mosaic_of(chromatin(CUT_SITES), likelihood))
        assert said.startswith("modality 'atac': 80% of the counts above 0 are even") and "cut_sites=True" in said
        np.testing.assert_array_equal(mosaic.modalities["atac"].tensor(np.arange(300)).to_dense(), CUT_SITES)
    few_even = chromatin(np.minimum(FRAGMENTS, 1 + FRAGMENTS % 3))
    (said,) = warned(lambda: mosaic_of(few_even, cut_sites=True))[1]
    assert "cut_sites=True, but only" in said and "% of the counts above 0 are even" in said
    large = np.random.default_rng(1).poisson(100, (300, 40))  # half of them even
    for call in (
        lambda: mosaic_of(chromatin(CUT_SITES), "bernoulli"),  # only open or not matters
        lambda: mosaic_of(chromatin(FRAGMENTS)),
        lambda: mosaic_of(chromatin(CUT_SITES), cut_sites=True),
        lambda: Mosaic.from_anndata({"rna": chromatin(large)}, {"rna": "nb"}),
    ):
        assert warned(call)[1] == []


@pytest.mark.parametrize(("likelihood", "distribution"), [("poisson", Poisson), ("nb", NegativeBinomial)])
def test_every_answer_is_in_fragments(likelihood, distribution, tmp_path):
    """The model of cut sites is that of the fragments, before and after training and saving."""
    models = []
    for x, spec in ((np.ceil(CUT_SITES / 2), {}), (CUT_SITES, {"cut_sites": True})):
        model = MultiVI(mosaic_of(chromatin(x), likelihood, **spec), n_latent=2, n_hidden=16)
        model.train(2, progress_bar=False)
        models.append(model)
    plain, cut = models
    pd.testing.assert_frame_equal(cut.get_imputed_values("atac").mean, plain.get_imputed_values("atac").mean)
    drawn = cut.posterior_predictive_sample("atac", n_samples=3)
    np.testing.assert_array_equal(drawn, plain.posterior_predictive_sample("atac", n_samples=3))
    assert abs(drawn.sum(-1).mean() / FRAGMENTS.sum(1).mean() - 1) < 0.05  # as many as there are fragments
    site = poutine.trace(cut.model).get_trace(measured(cut.mosaic, np.arange(9))).nodes["atac"]
    assert type(site["fn"]) is distribution and site["value"].max() == np.ceil(CUT_SITES[:9] / 2).max()
    truth = chromatin(CUT_SITES)[:20]
    ranks = checks.imputation_ranks(cut, "atac", truth, n_samples=9)
    expected = checks.imputation_ranks(plain, "atac", chromatin(np.ceil(CUT_SITES / 2))[:20], n_samples=9)
    pd.testing.assert_frame_equal(ranks.below, expected.below)

    cut.save(tmp_path / "model")
    loaded = MultiVI.load(tmp_path / "model")
    new = loaded.register({"atac": chromatin(CUT_SITES)[:50].copy()})  # a query is converted as well
    np.testing.assert_array_equal(new.modalities["atac"].tensor(np.arange(50)).to_dense(), np.ceil(CUT_SITES[:50] / 2))
    assert Schema.from_json(cut.schema.to_json()) == cut.schema


@pytest.mark.slow
@pytest.mark.parametrize("likelihood", ["poisson", "nb"])
def test_rates_are_recovered(likelihood):
    model = MultiVI(mosaic_of(chromatin(CUT_SITES), likelihood, cut_sites=True), n_latent=3, n_hidden=32)
    model.train(100, progress_bar=False)
    rates = model.get_normalized_expression("atac").to_numpy()
    assert np.abs(rates - SHARES).sum() / SHARES.sum() < 0.12
    raw = FRAGMENTS / FRAGMENTS.sum(1, keepdims=True)
    assert np.abs(raw - SHARES).sum() / SHARES.sum() > 0.3  # what counting alone gives


def test_fragments_start_at_the_mean_profile():
    model = MultiVI(mosaic_of(chromatin(CUT_SITES), cut_sites=True), n_latent=2, n_hidden=8)
    bias = model.model.modalities["atac"].decoder.heads["rate"].bias.softmax(0).detach()
    total = np.ceil(CUT_SITES / 2).sum(0) + 0.5
    np.testing.assert_allclose(bias, total / total.sum(), rtol=1e-4)


def test_linkage_and_latent_sizes_take_fragments():
    mosaic = mosaic_of(chromatin(CUT_SITES), cut_sites=True)
    model = MultiVI(mosaic, n_latent=2, n_hidden=8, library="latent")
    model.train(1, progress_bar=False)
    assert model.get_cell_factors()["atac"].notna().all()
    table = model.differential("kind", "0", "1", modality="atac", n_samples=100)
    assert len(table) == 40 and table["probability"].notna().all()
