"""Controls among antibodies: recognised by name, set apart, and what they and empty droplets say of the background."""

import json

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy import sparse, stats
from small import names, warned

from pyromosaic import ModalitySpec, Mosaic, MultiVI, checks, pbmc_mosaic
from pyromosaic.data import Schema, control_roles, droplet_profile, separate_controls

ISOTYPES = """IgG1 IgG2a IgG2b_control_TotalSeqB Rat-IgG1-1 Rag-IgG2c mouse_IgG2a_kappa Isotype_MOPC.21 isotype-RTK4530
Hamster-IgG G0114F7_isotype Mouse-IgG1k IgG1k ADT_mouse-IgG2b-isotype-control""".split()
HASHTAGS = "HTO1 HTO_B hto-3 Hashtag1 hashtag_5-TotalSeqC B0251_anti-human_Hashtag_1 CMO301 sample1-HTO".split()
PROTEINS = """CD4 IgD IgM IgA IgE IgG-Fc IgG IgG4 anti-IgG HLA-DR CD16 TIGIT integrin_7 Ig_light_chain_kappa HTOP CMOX
photo Notch2 CD66a-c-e""".split()


def test_controls_are_known_by_their_names():
    roles = control_roles(pd.Index(ISOTYPES + HASHTAGS + PROTEINS))
    assert dict(roles) == {
        **dict.fromkeys(ISOTYPES, "isotype"),
        **dict.fromkeys(HASHTAGS, "hashtag"),
        **dict.fromkeys(PROTEINS, ""),
    }


def test_no_protein_of_real_panels_is_a_control(shared_data):
    assert not control_roles(pbmc_mosaic()["adt"].var_names).any()
    assert not control_roles(anndata.read_h5ad(shared_data / "pbmc_stim_adt.h5ad", backed="r").var_names).any()


RNG = np.random.default_rng(0)
N = 400
CAPTURE = RNG.lognormal(0, 0.5, N)
KIND = np.arange(N) % 2
NAMES = [*(f"CD{i}" for i in range(10)), "Rat-IgG1", "Rat-IgG2a", "Mouse-IgG1", "HTO1", "HTO2"]
AMBIENT = np.concatenate([np.linspace(2, 9, 10), [4, 5, 6]])
AMOUNT = np.where(np.arange(10) < 2, 60.0, np.where(np.arange(10) < 8, 80.0, 0) * (KIND == 0)[:, None])
RATE = CAPTURE[:, None] * (AMBIENT + np.hstack([AMOUNT, np.zeros((N, 3))]))
TAGS = CAPTURE[:, None] * np.where(RNG.integers(2, size=N)[:, None] == np.arange(2), 150, 3)
COUNTS = RNG.poisson(np.hstack([RATE, TAGS]) * RNG.gamma(30, 1 / 30, (N, 15)))
DROPLETS = pd.DataFrame(RNG.poisson(RNG.lognormal(-1, 0.5, (2000, 1)) * AMBIENT), columns=NAMES[:13])


def antibodies(store=np.array):
    obs = pd.DataFrame({"kind": KIND.astype(str)}, names(N))
    return anndata.AnnData(store(COUNTS.astype(np.float32)), obs, pd.DataFrame(index=NAMES))


def test_controls_are_said_once():
    mosaic, (said,) = warned(lambda: Mosaic.from_anndata({"adt": antibodies()}))
    assert said.startswith(
        "modality 'adt': Rat-IgG1, Rat-IgG2a, Mouse-IgG1 (isotype controls) and HTO1, HTO2 (hashtags) are modelled as"
    )
    assert len(mosaic.schema["adt"].features) == 15  # nothing is left out by itself
    for call in (
        lambda: Mosaic.from_anndata({"adt": antibodies()}, schema=mosaic.schema),
        lambda: Mosaic.from_anndata({"adt": separate_controls(antibodies())}),
        lambda: Mosaic.from_anndata({"x": antibodies()}, {"x": "nb"}),  # not antibodies
    ):
        assert warned(call)[1] == []


@pytest.mark.parametrize("layer", [None, "raw"])
@pytest.mark.parametrize("store", [np.array, sparse.csr_matrix, sparse.csc_matrix])
def test_controls_set_apart(store, layer):
    adata = antibodies(store)
    if layer is not None:
        adata.layers["raw"], adata.X = adata.X.copy(), store(np.ones_like(COUNTS, dtype=np.float32))
    before = adata.copy()
    apart = separate_controls(adata, layer)
    assert list(apart.var_names) == NAMES[:10] and not apart.is_view
    np.testing.assert_array_equal(apart.obsm["isotype_controls"], COUNTS[:, 10:13])
    np.testing.assert_array_equal(apart.obsm["hashtags"], COUNTS[:, 13:])
    assert list(apart.obsm["hashtags"]) == ["HTO1", "HTO2"]
    assert adata.shape == before.shape and "control_size" not in adata.obs
    expected = separate_controls(antibodies()).obs["control_size"]
    np.testing.assert_allclose(apart.obs["control_size"], expected, rtol=1e-6)


def test_sizes_are_posterior_means_of_the_model_of_controls():
    """Each is the mean of Gamma × Poisson by quadrature, with the parameters that maximise what they estimate."""
    apart = separate_controls(antibodies())
    controls, totals = COUNTS[:, 10:13].sum(1), COUNTS[:, :10].sum(1)
    sizes = apart.obs["control_size"].to_numpy()
    assert np.isclose(np.median(sizes), np.median(totals))
    # the prior mean is a power of the totals, by Poisson regression: its score equations hold
    x = np.stack([np.ones(N), np.log(totals + 1)])
    beta = np.zeros(2)
    for _ in range(50):
        mean = np.exp(beta @ x)
        beta += np.linalg.solve((x * mean) @ x.T, x @ (controls - mean)) if _ else [np.log(controls.mean()), 0]
    mean = np.exp(beta @ x)
    shape = (mean**2).sum() / ((controls - mean) ** 2 - controls).sum()
    grid = np.linspace(1e-3, 200, 40_000)
    for n in (0, 7, 100):
        weight = stats.gamma(shape, scale=mean[n] / shape).pdf(grid) * stats.poisson(grid).pmf(controls[n])
        posterior = (grid * weight).sum() / weight.sum()
        rate = sizes[n] / np.median(totals)
        others = mean * (controls + shape) / (mean + shape)
        assert np.isclose(rate, posterior / np.median(others), rtol=2e-3)


def test_sizes_from_controls_are_those_of_capture():
    apart = separate_controls(antibodies())
    log_size, log_total = np.log(apart.obs["control_size"]), np.log(COUNTS[:, :10].sum(1))
    gap = {name: abs(x[KIND == 0].mean() - x[KIND == 1].mean()) for name, x in (("s", log_size), ("t", log_total))}
    assert gap["t"] > 1 > 3 * gap["s"]  # half of the cells have much more protein, and were captured alike
    assert np.corrcoef(log_size, np.log(CAPTURE))[0, 1] > 0.85 > np.corrcoef(log_total, np.log(CAPTURE))[0, 1]


def test_what_cannot_be_set_apart():
    adata = antibodies()
    with pytest.raises(ValueError, match="none of the 10 antibodies are controls by their names"):
        separate_controls(adata[:, :10].copy())
    with pytest.raises(ValueError, match="all of the 5 antibodies are controls by their names"):
        separate_controls(adata[:, 10:].copy())
    only = separate_controls(adata[:, [*range(10), 13, 14]].copy())
    assert "control_size" not in only.obs and list(only.obsm) == ["hashtags"]


# Empty droplets


def test_profile_of_droplets():
    profile = droplet_profile(DROPLETS)
    share = np.exp([profile[name][0] for name in DROPLETS])
    np.testing.assert_allclose(share, AMBIENT / AMBIENT.sum(), rtol=0.05)
    assert max(spread for _, spread in profile.values()) < 0.3  # they are Poisson given their totals
    spread = np.random.default_rng(1).lognormal(0, 0.6, DROPLETS.shape)
    mixed = np.random.default_rng(2).poisson(20 * AMBIENT * spread)
    found = [s for _, s in droplet_profile(pd.DataFrame(mixed, columns=NAMES[:13])).values()]
    assert 0.4 < np.mean(found) < 0.8
    adata = anndata.AnnData(sparse.csr_matrix(DROPLETS.to_numpy(np.float32)), var=pd.DataFrame(index=NAMES[:13]))
    assert droplet_profile(adata) == profile == droplet_profile(profile)


def test_wrong_droplets_get_a_sentence():
    for wrong, said in (
        (DROPLETS.to_numpy(), "must be an AnnData or a table droplets × antibodies; found a ndarray"),
        (np.log1p(DROPLETS), "must hold raw counts; found other numbers"),
        (DROPLETS * 0, "hold no counts"),
    ):
        with pytest.raises(ValueError, match=said):
            ModalitySpec("nb_mixture", empty_droplets=wrong)
    with pytest.raises(ValueError, match="likelihood 'nb' has no background for empty_droplets to inform"):
        ModalitySpec("nb", empty_droplets=DROPLETS)
    spec = ModalitySpec("nb_mixture", empty_droplets=DROPLETS.drop(columns="CD3"))
    mosaic = Mosaic.from_anndata({"adt": separate_controls(antibodies())}, {"adt": spec})
    with pytest.raises(ValueError, match="the empty droplets lack the antibody 'CD3'"):
        MultiVI(mosaic)


def trained(n_epochs, **spec):
    mosaic = Mosaic.from_anndata({"adt": separate_controls(antibodies())}, {"adt": ModalitySpec("nb_mixture", **spec)})
    model = MultiVI(mosaic, n_latent=3, n_hidden=32)
    model.train(n_epochs, progress_bar=False)
    return model


@pytest.mark.parametrize("spec", [{}, {"background": "latent"}, {"batch_key": "kind"}])
def test_a_model_with_droplets_answers_and_is_kept(tmp_path, spec):
    model = trained(2, empty_droplets=DROPLETS, size_factor_key="control_size", **spec)
    schema = model.schema
    assert Schema.from_json(json.loads(json.dumps(schema.to_json()))) == schema
    background = model.get_protein_background_mean("adt")
    assert np.isfinite(background).all(axis=None)
    model.save(tmp_path / "model")
    loaded = MultiVI.load(tmp_path / "model", {"adt": separate_controls(antibodies())})
    pd.testing.assert_frame_equal(loaded.get_protein_background_mean("adt"), background)
    observed = [
        checks.predictive_check(model, n_samples=2, seed=seed).table.loc[("adt", "background"), "observed"]
        for seed in (1, 2)
    ]
    pd.testing.assert_series_equal(*observed)  # by the mean background of the posterior, not by a draw


@pytest.mark.slow
def test_droplets_say_the_background_of_proteins_that_all_cells_have():
    errors = {}
    for name, spec in (("without", {}), ("with", {"empty_droplets": DROPLETS})):
        model = trained(60, size_factor_key="control_size", **spec)
        level = np.log(model.get_protein_background_mean("adt")).mean().to_numpy() - np.log(AMBIENT[:10])
        errors[name] = np.abs(level[:2] - np.median(level[2:])).max()
    assert errors["without"] > 1  # no cell shows it
    assert errors["with"] < 0.5
