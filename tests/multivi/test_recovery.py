"""MultiVI recovers what data were simulated from."""

import anndata
import numpy as np
import pandas as pd
import pytest
from mosaics import QUIET

from pyromosaic import ModalitySpec, Mosaic, MultiVI, hide, metrics, pbmc_mosaic
from pyromosaic.data import simulate as simulate_mosaic


@pytest.mark.filterwarnings("ignore:.*times the cells' total counts")  # in units of their own
@pytest.mark.slow
@pytest.mark.parametrize("background", ["latent", "marginal"])
def test_parameters_of_the_story_are_recovered(background):
    """Four types; every region is open for sure in one of them, so that its factor can be told from its accessibility.

    Cells have all three modalities or one, and their sizes are known. With the background summed out, its standard
    deviation and theta are only known together, by the overdispersion of counts.
    """
    rng = np.random.default_rng(0)
    n, n_genes, n_regions, n_proteins = 1500, 60, 80, 16
    kind = rng.integers(4, size=n)

    def counts(mu, theta):
        return rng.poisson(mu * rng.gamma(theta, 1 / theta, mu.shape))

    rate, theta = np.exp(rng.normal(0, 1, (4, n_genes))), np.exp(rng.normal(1, 0.7, n_genes))
    size = 1500 * np.exp(rng.normal(0, 0.4, n))
    rna = counts(size[:, None] * (rate / rate.sum(1, keepdims=True))[kind], theta)

    logits = np.where(rng.random((4, n_regions)) < 0.6, 4.0, -4.0)
    logits[rng.integers(4, size=n_regions), np.arange(n_regions)] = 4.0
    region, cell = rng.uniform(0.3, 1, n_regions), rng.beta(8, 4, n)
    opened = rng.random((n, n_regions)) < cell[:, None] * region / (1 + np.exp(-logits[kind]))

    proteins = np.exp(rng.normal(0, 0.3, n))
    loc, theta_proteins = rng.normal(1.5, 0.5, n_proteins), np.exp(rng.normal(1.8, 0.5, n_proteins))
    mixing = rng.choice([0.1, 0.35, 0.65, 0.9], (4, n_proteins))
    factor = np.where(rng.random((n, n_proteins)) < mixing[kind], 1, 1 + np.exp(rng.normal(2.5, 0.3, n_proteins)))
    level = proteins[:, None] * np.exp(loc + 0.3 * rng.normal(size=(n, n_proteins)))

    story = {
        "rna": (rna, size),
        "atac": (opened, 1000 * cell),
        "adt": (counts(level * factor, theta_proteins), 100 * proteins),
    }
    pattern = rng.permutation(np.resize([7, 7, 7, 1, 2, 4], n))
    data = {}
    for i, (name, (x, sizes)) in enumerate(story.items()):
        has = np.flatnonzero(pattern >> i & 1)
        obs = pd.DataFrame({"size": sizes[has]}, index=[f"c{j}" for j in has])
        data[name] = anndata.AnnData(x[has].astype(np.float32), obs=obs)
    kinds = {"rna": {"likelihood": "nb"}, "atac": {"likelihood": "bernoulli"}}
    kinds["adt"] = {"likelihood": "nb_mixture", "background": background}
    specs = {name: ModalitySpec(size_factor_key="size", **kind) for name, kind in kinds.items()}
    mosaic = Mosaic.from_anndata(data, specs, match_cells=True)
    options = {"n_latent": 5, "n_hidden": 32, "dropout": 0.0, "left_out": 0.0, "mmd": 0.0, "jeffreys": 0.0}
    model = MultiVI(mosaic, **options)
    model.train(100, batch_size=128, learning_rate=6e-3, validation=0.0, **QUIET)

    def agreement(found, truth) -> float:
        return np.corrcoef(np.ravel(found), np.ravel(truth))[0, 1]

    likelihoods = {name: part.likelihood for name, part in model.model.modalities.items()}
    assert agreement(likelihoods["rna"].log_theta.detach(), np.log(theta)) > 0.9
    theta, scale = likelihoods["adt"].log_theta.exp().detach(), likelihoods["adt"].background_log_scale.exp().detach()
    if background == "latent":
        assert agreement(theta.log(), np.log(theta_proteins)) > 0.9
    dispersion = np.expm1(0.3**2) + np.exp(0.3**2) / theta_proteins
    assert agreement((scale.square().expm1() + scale.square().exp() / theta).log(), np.log(dispersion)) > 0.9
    assert agreement(model.get_region_factors(), region) > 0.9
    assert agreement(likelihoods["adt"].background_loc.detach(), loc) > 0.9
    truth = mixing[kind[mosaic.obs_names.str[1:].astype(int)]]
    found = 1 - model.get_protein_foreground_probability().to_numpy()
    for cells in (mosaic.presence["adt"], ~mosaic.presence["adt"]):
        assert agreement(found[cells], truth[cells]) > 0.9


def test_sizes_of_unmeasured_cells_are_those_of_measured_ones():
    """Latent dimensions that say nothing are noise in a draw, however well their tiny means seem to explain sizes."""
    mdata, truth = simulate_mosaic(600, {"rna": 60, "adt": 10}, seed=0)
    mosaic = Mosaic.from_mudata(mdata)
    model = MultiVI(mosaic)
    model.train(40, **QUIET)
    for name in ("rna", "adt"):
        cells = mosaic.obs_names[~mosaic.presence[name]]
        imputed = model.get_imputed_values(name, cells, n_samples=50).mean.to_numpy()
        assert 0.8 < imputed.sum() / truth.mean[name][mdata.obs_names.get_indexer(cells)].sum() < 1.25


@pytest.mark.filterwarnings("ignore:.*times the cells' total counts")  # in units of their own
@pytest.mark.slow
@pytest.mark.parametrize(
    ("n_cells", "features", "preset"),
    [(4000, (60, 80, 16), "calibrated"), (4000, (60, 80, 16), None), (3000, (500, 800, 100), None)],
)
def test_intervals_of_imputed_means_cover_the_truth(n_cells, features, preset):
    """Of cells in which the modality was not measured, at the median size: the intervals are not about sizes."""
    features = dict(zip(("rna", "atac", "adt"), features, strict=True))
    patterns = {"rna+atac+adt": 0.5, "rna": 0.17, "atac": 0.17, "adt": 0.16}
    mdata, truth = simulate_mosaic(n_cells, features, patterns=patterns, n_batches=1, seed=0)
    drawn = truth.parameters
    sizes = {
        "rna": drawn["rna"]["size"],
        "atac": drawn["atac"]["cell_factor"] * 1000,
        "adt": drawn["adt"]["size"] * 100,
    }
    for name, size in sizes.items():
        mdata[name].obs["size"] = size[mdata.obs_names.get_indexer(mdata[name].obs_names)]
    mosaic = Mosaic.from_mudata(mdata, size_factor_key="size")
    options = MultiVI.presets[preset].options if preset else {}
    model = MultiVI(mosaic, **options)
    model.train(40, **QUIET)
    covered = []
    for name, size in sizes.items():
        cells = mosaic.obs_names[~mosaic.presence[name]]
        rows, median = mdata.obs_names.get_indexer(cells), float(np.median(size))
        library = median if mosaic.modalities[name].spec.traits.sized else None
        found = model.get_imputed_values(name, cells, library=library, n_samples=100, quantiles=(0.05, 0.95))
        expected = truth.mean[name][rows] / size[rows, None] * median
        covered.append((found.quantiles[0.05].to_numpy() <= expected) & (expected <= found.quantiles[0.95].to_numpy()))
    # With few features, the penalties of the defaults make RNA that is imputed from them too sure.
    least, least_each = (0.85, 0.75) if preset or features["rna"] > 60 else (0.8, 0.65)
    assert least < np.concatenate([c.ravel() for c in covered]).mean() < 0.96
    assert all(least_each < c.mean() < 0.99 for c in covered)


@pytest.mark.slow
def test_pbmc_mosaic_integrates():
    """Sixty epochs on the packaged data already bring the modalities together and the types apart."""
    data, truth = hide(pbmc_mosaic(), {"adt": 200, "rna": 200}, seed=0)
    mosaic = Mosaic.from_mudata(data, batch_key="batch", label_key="celltype")
    model = MultiVI(mosaic)
    model.train(60, **QUIET)
    z, labels = model.get_latent_representation(), mosaic.labels()
    rna, adt = (mosaic.patterns == name for name in ("rna", "adt"))
    assert metrics.label_purity(z, labels) > 0.85
    assert metrics.label_transfer_accuracy(z[rna], labels[rna], z[adt], labels[adt], n_neighbors=15) > 0.8
    hidden = truth["rna"].X.toarray()
    imputed = model.get_imputed_values("rna", truth["rna"].obs_names, library=1.0, n_samples=5).mean
    assert metrics.imputation_spearman(hidden, imputed * hidden.sum(1, keepdims=True)) > 0.3
