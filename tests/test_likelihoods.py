"""Where likelihoods start from data, and what is learnt from there in a few steps."""

import anndata
import numpy as np
import pytest
import torch

from pyromosaic import ModalitySpec, Mosaic, MultiVI
from pyromosaic.data import measured


def mosaic_of(likelihood, x, **spec):
    adata = anndata.AnnData(x.astype(np.float32))
    return Mosaic.from_anndata({"x": adata}, {"x": ModalitySpec(likelihood, **spec)})


def regions(n_cells=400):
    """Regions that are open in nearly all cells, in most, and in few."""
    share = np.concatenate([np.linspace(0.93, 1.0, 10), np.linspace(0.3, 0.9, 10), np.linspace(0.02, 0.12, 20)])
    return share, np.random.default_rng(0).random((n_cells, 40)) < share


def test_accessibility_starts_at_the_share_of_open_cells():
    share, x = regions()
    mosaic = mosaic_of("bernoulli", x)
    likelihood = MultiVI(mosaic, n_latent=2, n_hidden=8).model.modalities["x"].likelihood
    view = measured(mosaic, np.arange(400)).observed["x"]
    start = likelihood.start(view)["accessibility"].sigmoid()
    region, cell = likelihood.region_factor(), likelihood.depth(torch.zeros(1)).sigmoid()
    expected = np.minimum(x.mean(0), 1 - 0.5 / 400)
    np.testing.assert_allclose((start * region * cell).detach(), expected, rtol=1e-4)
    assert (region >= 0.5).all() and (region[20:38] == 0.5).all()
    torch.testing.assert_close(cell[0], region.max())


def test_rare_accessibility_starts_with_factors_of_one_half():
    x = np.random.default_rng(0).random((400, 40)) < 0.08
    mosaic = mosaic_of("bernoulli", x, empty_cells="keep")
    likelihood = MultiVI(mosaic, n_latent=2, n_hidden=8).model.modalities["x"].likelihood
    start = likelihood.start(measured(mosaic, np.arange(400)).observed["x"])["accessibility"]
    torch.testing.assert_close(start.sigmoid(), torch.tensor(4 * x.mean(0), dtype=torch.float32))
    assert (likelihood.region_factor() == 0.5).all()
    torch.testing.assert_close(likelihood.depth(torch.zeros(1)), torch.zeros(1), atol=1e-6, rtol=0)


def test_regions_that_nearly_all_cells_have_open_are_imputed_so():
    share, x = regions()
    model = MultiVI(mosaic_of("bernoulli", x), n_latent=2, n_hidden=32)
    model.train(30, progress_bar=False)
    imputed = model.get_imputed_values("x", n_samples=5).mean.mean().to_numpy()
    np.testing.assert_allclose(imputed[:20], x.mean(0)[:20], atol=0.06)
    np.testing.assert_allclose(imputed[20:], x.mean(0)[20:], atol=0.03)


def proteins(n_cells=400):
    """Proteins that were never seen, hardly ever, and in all cells."""
    rng = np.random.default_rng(1)
    mean = np.concatenate([[0, 0.01, 0.02, 0.04], np.linspace(2, 60, 12)])
    size = rng.lognormal(0, 0.3, (n_cells, 1))
    return rng.poisson(mean * size)


def test_background_of_a_protein_that_was_hardly_ever_seen_starts_at_its_mean():
    x = proteins()
    mosaic = mosaic_of("nb_mixture", x)
    likelihood = MultiVI(mosaic, n_latent=2, n_hidden=8).model.modalities["x"].likelihood
    view = measured(mosaic, np.arange(400)).observed["x"]
    likelihood.start(view)
    size = likelihood.cell_factor(view).sum().item()
    rate = (x[:, :4].sum(0) + 0.5) / size
    np.testing.assert_allclose(likelihood.background_loc[0, :4].detach().exp(), rate, rtol=1e-3)
    assert (likelihood.background_loc[0, 4:] >= np.log(np.expm1(0.1)) - 1e-6).all()


def test_proteins_that_were_hardly_ever_seen_are_imputed_so():
    x = proteins()
    model = MultiVI(mosaic_of("nb_mixture", x), n_latent=2, n_hidden=32)
    model.train(40, progress_bar=False)
    imputed = model.get_imputed_values("x", n_samples=5).mean.mean().to_numpy()
    assert imputed[:4] == pytest.approx(x[:, :4].mean(0), abs=0.015)
    assert imputed[4:] == pytest.approx(x[:, 4:].mean(0), rel=0.25)


def rare_in_one_batch(n_cells=400):
    """Proteins that one batch has hardly ever, and the other in all cells; others that both have."""
    rng = np.random.default_rng(2)
    batch = np.resize(["p", "q"], n_cells)
    mean = np.tile(np.concatenate([[4, 8, 20], np.linspace(2, 60, 9)]), (n_cells, 1))
    mean[batch == "q", :3] = [0.025, 0.03, 0.04]
    x = rng.poisson(mean * rng.lognormal(0, 0.3, (n_cells, 1)))
    adata = anndata.AnnData(x.astype(np.float32))
    adata.obs["batch"] = batch
    return x, batch == "q", adata


def rare_model(background):
    x, rare, adata = rare_in_one_batch()
    spec = ModalitySpec("nb_mixture", batch_key="batch", background=background)
    return x, rare, MultiVI(Mosaic.from_anndata({"x": adata}, {"x": spec}), n_latent=2, n_hidden=32)


@pytest.mark.parametrize("background", ["latent", "marginal"])
def test_a_background_starts_by_batch(background):
    x, rare, model = rare_model(background)
    view = measured(model.mosaic, np.arange(400)).observed["x"]
    likelihood = model.model.modalities["x"].likelihood
    start = likelihood.start(view)["loc"]
    rate = (x[rare, :3].sum(0) + 0.5) / likelihood.cell_factor(view)[rare].sum().item()
    np.testing.assert_allclose(likelihood.background_loc[1, :3].detach().exp(), rate, rtol=1e-3)
    assert (likelihood.background_loc[0] >= np.log(np.expm1(0.1)) - 1e-6).all()
    torch.testing.assert_close(start[:3], likelihood.background_loc[0, :3].detach())
    torch.testing.assert_close(start[3:], likelihood.background_loc[:, 3:].detach().mean(0))


@pytest.mark.slow
@pytest.mark.parametrize("background", ["latent", "marginal"])
def test_a_protein_that_is_rare_in_one_batch_is_imputed_so_there(background):
    x, rare, model = rare_model(background)
    # Cells drawn from the model say nothing about a latent background beyond its prior.
    model.train(200, progress_bar=False, sleep_steps=0 if background == "latent" else None)
    imputed = model.get_imputed_values("x", n_samples=5).mean.to_numpy()
    np.testing.assert_allclose(imputed[rare, :3].mean(0), x[rare, :3].mean(0), atol=0.04)
    np.testing.assert_allclose(imputed[~rare, :3].mean(0), x[~rare, :3].mean(0), rtol=0.25)
