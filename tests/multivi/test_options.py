"""Choices of MultiVI: fewer or other modalities, private variables, likelihoods."""

import copy
import warnings

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from mosaics import QUIET, small
from pyro import poutine

from pyromosaic import ModalitySpec, Mosaic, MultiVI
from pyromosaic.data import measured, to_predict
from pyromosaic.train import MosaicELBO

# Alone it is scVI, PeakVI, totalVI


@pytest.mark.parametrize(
    ("modalities", "sites"),
    [
        (["rna"], {"z": (60, 1, 4), "rna": (60, 30)}),
        (["atac"], {"z": (60, 1, 4), "atac": (60, 50)}),
        (["rna", "adt"], {"z": (60, 1, 4), "rna": (60, 30), "adt": (60, 8)}),
    ],
)
def test_fewer_modalities_are_the_same_program(data, modalities, sites):
    cells = data[modalities[0]].obs_names.intersection(data[modalities[-1]].obs_names)[:60]
    mosaic = Mosaic.from_anndata(
        {name: data[name][cells].copy() for name in modalities}, match_cells=True, batch_key="batch"
    )
    model = small(mosaic)
    trace = poutine.trace(model.model).get_trace(measured(mosaic, np.arange(60)))
    shapes = {
        name: tuple(site["fn"].batch_shape + site["fn"].event_shape)
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and not name.endswith(("cells", "features"))
    }
    assert shapes == sites
    elbo = MosaicELBO()
    elbo.loss(model.model, model.guide, measured(mosaic, np.arange(60)))
    assert {name for name in elbo.terms if not name.startswith("penalty/")} == set(sites)
    if len(modalities) == 1:
        assert all(elbo.terms[name] == 0 for name in elbo.terms if name.startswith("penalty/"))
    model.train(1, **QUIET)


def test_a_fourth_modality_of_another_kind(data):
    image = anndata.AnnData(
        np.random.default_rng(0).normal(size=(40, 6)).astype(np.float32),
        obs=pd.DataFrame(index=data["rna"].obs_names[:40]),
        var=pd.DataFrame(index=[f"feature{i}" for i in range(6)]),
    )
    mosaic = Mosaic.from_anndata(
        {**data.mod, "image": image},
        {"rna": "nb", "atac": "bernoulli", "adt": "nb_mixture", "image": "normal"},
        match_cells=True,
    )
    model = small(mosaic, fusion="product", adversary=1.0)
    model.train(2, **QUIET)
    assert np.isfinite(model.get_imputed_values("image", n_samples=2).mean).all().all()


def test_counts_of_fragments_are_binarised_by_the_likelihood(data):
    counts = data["atac"].copy()
    binary = counts.copy()
    binary.X = (counts.X > 0).astype(np.float32)
    assert counts.X.max() > 1
    cell_sizes = np.asarray(counts.X.sum(1)).ravel()
    losses = []
    for adata in (counts, binary):
        adata.obs["size"] = cell_sizes
        mosaic = Mosaic.from_anndata({"atac": adata}, size_factor_key="size")
        model = small(mosaic)
        torch.manual_seed(0)
        losses.append(MosaicELBO().loss(model.model, model.guide, measured(mosaic, np.arange(50))))
    assert losses[0] == losses[1]
    assert counts.X.max() > 1


# Private variables


def test_without_private_dimensions_nothing_changes(mosaic):
    minibatch = measured(mosaic, np.arange(60))
    losses = []
    for options in ({}, {"n_private": 0, "private_kl": 7.0}, {"n_private": {"rna": 0}}):
        model = small(mosaic, **options)
        torch.manual_seed(0)
        losses.append(MosaicELBO().loss(model.model, model.guide, minibatch))
        sites = poutine.trace(model.guide).get_trace(minibatch).nodes
        assert not any(name.startswith("z_") for name in sites)
        assert model.get_shared_share().empty
    assert losses[0] == losses[1] == losses[2]


def test_private_variables_follow_their_modality_or_the_prior(mosaic):
    model = small(mosaic, n_private={"rna": 2, "adt": 1}, left_out=1.0)
    cells = np.arange(0, 240, 4)
    minibatch = to_predict(mosaic, cells, ("rna", "adt"))
    sites = poutine.trace(model.guide).get_trace(minibatch).nodes
    for name in ("rna", "adt"):
        q = sites[f"z_{name}"]["fn"]
        present = torch.from_numpy(mosaic.modalities[name].present[cells])
        assert (q.mean[~present] == 0).all() and (q.stddev[~present] == 1).all()
        assert (q.stddev[present] != 1).all()
    # of two decoders, each sees its own private variable alone
    inputs = [model.model.modalities[name].decoder.hidden[0].in_features - 2 for name in ("rna", "adt", "atac")]
    assert inputs == [6, 5, 4]
    encoded = to_predict(mosaic, np.flatnonzero(mosaic.patterns == "rna+adt"), ("adt",), encode=("rna",))
    q = poutine.trace(model.guide).get_trace(encoded).nodes["z_adt"]["fn"]
    assert (q.mean == 0).all() and (q.stddev == 1).all()
    # a modality that is left out in training is left out here too
    model.guide.train()
    both = measured(mosaic, np.flatnonzero(mosaic.patterns == "rna+adt"))
    sites = poutine.trace(model.guide).get_trace(both).nodes
    prior = [(sites[f"z_{name}"]["fn"].stddev == 1).all(-1).squeeze(-1) for name in ("rna", "adt")]
    assert (prior[0] ^ prior[1]).all() and prior[0].any() and prior[1].any()


def test_imputation_is_less_sure_for_lack_of_the_private_variable(mosaic):
    model = small(mosaic, n_private=3, private_kl=0.1)
    with pytest.warns(UserWarning, match="shared latent space carries only"):
        model.train(40, batch_size=64, learning_rate=5e-3, kl_warmup_epochs=0, **QUIET)
    both = mosaic.obs_names[mosaic.patterns == "rna+adt"]
    sd = [
        np.log(model.get_imputed_values("rna", both, encode=encode, n_samples=30, library=100.0).sd).mean().mean()
        for encode in (None, ["adt"])
    ]
    assert sd[1] > sd[0] + 0.15


def test_share_of_the_shared_latent_variable(mosaic):
    """1 where the private variable is ignored, 0 where the shared one is."""
    model = small(mosaic, n_private={"rna": 2, "atac": 2}, private_kl=1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.train(20, batch_size=64, learning_rate=5e-3, kl_warmup_epochs=0, **QUIET)
    assert list(model.get_shared_share().index) == ["rna", "atac"]
    for ignored, share in ((slice(4, 6), 1.0), (slice(0, 4), 0.0)):
        other = copy.deepcopy(model)
        for name in ("rna", "atac"):
            with torch.no_grad():
                other.model.modalities[name].decoder.hidden[0].weight[:, ignored] = 0.0
        np.testing.assert_allclose(other.get_shared_share(), share, atol=1e-3)
    everyone = model.get_shared_share(model.split.validation)
    assert everyone.between(-1, 2).all()


def test_private_dimensions_are_checked(mosaic):
    with pytest.raises(ValueError, match="n_private must be .* from 0"):
        small(mosaic, n_private=-1)
    with pytest.raises(KeyError, match="no modality 'protein'"):
        small(mosaic, n_private={"protein": 2})


# Choices of the likelihood


@pytest.mark.parametrize("likelihood", ["nb", "zinb", "nb_mixture"])
@pytest.mark.parametrize(("dispersion", "shape"), [("gene", (8,)), ("gene-batch", (2, 8)), ("gene-label", (4, 8))])
def test_dispersion_by_batch_and_label(data, likelihood, dispersion, shape, tmp_path):
    spec = ModalitySpec(likelihood, batch_key="batch", label_key="type", unlabelled="3", dispersion=dispersion)
    shape = (3, 8) if dispersion == "gene-label" else shape
    mosaic = Mosaic.from_mudata(data, {"adt": spec})
    model = small(mosaic)
    log_theta = model.model.modalities["adt"].likelihood.log_theta
    assert log_theta.shape == shape
    with torch.no_grad():
        log_theta.normal_()
    view = measured(mosaic, np.arange(20)).observed["adt"]
    theta = model.model.modalities["adt"].likelihood.theta(view).log().expand(20, 8)
    obs = data["adt"].obs.loc[mosaic.obs_names[:20]]
    for i, (batch, label) in enumerate(zip(obs["batch"], obs["type"], strict=True)):
        row = {"gene": None, "gene-batch": "ab".index(batch), "gene-label": int(label)}[dispersion]
        expected = log_theta if row is None else log_theta.mean(0) if row == 3 else log_theta[row]
        torch.testing.assert_close(theta[i], expected)
    model.train(1, **QUIET)
    model.save(tmp_path / "model")
    loaded = MultiVI.load(tmp_path / "model", {"adt": data["adt"]})
    draws = [m.posterior_predictive_sample("adt", list(obs.index), n_samples=2) for m in (model, loaded)]
    np.testing.assert_array_equal(*draws)


def test_dispersion_is_checked():
    for spec, message in [
        ({"likelihood": "nb", "dispersion": "cell"}, "found 'cell'"),
        ({"likelihood": "bernoulli", "dispersion": "gene-batch", "batch_key": "b"}, "'bernoulli' has no inverse"),
        (
            {"likelihood": "multinomial", "dispersion": "gene-batch", "batch_key": "b"},
            "'multinomial' has no inverse dispersion that could be 'gene-batch'",
        ),
        ({"likelihood": "nb", "dispersion": "gene-batch"}, "needs a batch_key"),
        ({"likelihood": "nb", "dispersion": "gene-label"}, "needs a label_key"),
    ]:
        with pytest.raises(ValueError, match=message):
            ModalitySpec(**spec)


def test_cell_factors_of_rna_are_inferred_or_observed(data, mosaic, tmp_path):
    observed, latent = small(mosaic), small(mosaic, library="latent")
    latent.train(20, batch_size=64, learning_rate=5e-3, kl_warmup_epochs=0, **QUIET)
    counts = data["rna"].to_df().sum(axis=1)
    factors = latent.get_cell_factors()
    assert list(factors.columns) == ["rna", "atac", "adt"]
    assert (factors.notna() == mosaic.presence).all().all()
    np.testing.assert_allclose(
        observed.get_cell_factors()["rna"].dropna(), counts[factors["rna"].notna()[lambda x: x].index]
    )
    assert np.corrcoef(np.log(factors["rna"].dropna()), np.log(counts[factors["rna"].dropna().index]))[0, 1] > 0.9
    assert factors["atac"].dropna().between(0, 1).all()
    adt = factors["adt"].dropna()
    np.testing.assert_allclose(adt, data["adt"].to_df().sum(axis=1)[adt.index] / mosaic.schema["adt"].library)
    shares = latent.get_normalized_expression("rna")
    np.testing.assert_allclose(shares.sum(axis=1), 1, rtol=1e-4)
    latent.save(tmp_path / "model")
    loaded = MultiVI.load(tmp_path / "model", data)
    pd.testing.assert_frame_equal(loaded.get_cell_factors(), factors)
    with pytest.raises(ValueError, match="library must be .*network"):
        small(mosaic, library="network")


def test_the_background_of_antibodies_may_be_summed_out(data, tmp_path):
    """Against the integral over background levels on a grid; as a latent variable it is a site more, and a decoder."""
    cells = data["rna"].obs_names.intersection(data["adt"].obs_names)[:60]
    parts = {name: data[name][cells].copy() for name in ("rna", "adt")}
    registered = {
        background: Mosaic.from_anndata(
            parts,
            {"rna": ModalitySpec("nb"), "adt": ModalitySpec("nb_mixture", batch_key="batch", background=background)},
            match_cells=True,
        )
        for background in ("latent", "marginal")
    }
    assert registered["marginal"].schema["adt"].spec == ModalitySpec("nb_mixture", batch_key="batch")  # the default
    latent, minibatch = small(registered["latent"]), measured(registered["latent"], np.arange(60))
    assert poutine.trace(latent.model).get_trace(minibatch).nodes["adt_background"]["fn"].batch_shape == (60, 8)
    assert any("decoder" in name for name, _ in latent.guide.named_parameters())
    mosaic = registered["marginal"]
    model, minibatch = small(mosaic), measured(mosaic, np.arange(60))
    trace = poutine.trace(model.model).get_trace(minibatch)
    assert "adt_background" not in trace.nodes
    assert not any("decoder" in name for name, _ in model.guide.named_parameters())
    part, view = model.model.modalities["adt"], minibatch.decoded["adt"]
    predictors = part.decoder(trace.nodes["z"]["value"][:, 0], view)
    loc, scale = part.likelihood.background(view)
    size, theta = view.library / mosaic.schema["adt"].library, part.likelihood.log_theta.exp()
    counts, share, step, mixture = view.counts.to_dense(), predictors["mixing"].sigmoid(), 0.05, 0.0
    for u in torch.arange(-8, 8, step):
        low = size * (loc + scale * u).exp()
        high = low * (1 + predictors["foreground"].exp())
        of_low, of_high = (
            torch.distributions.NegativeBinomial(theta, logits=(mean / theta).log()).log_prob(counts).exp()
            for mean in (low, high)
        )
        weight = step * torch.distributions.Normal(0.0, 1.0).log_prob(u).exp()
        mixture = mixture + weight * (share * of_low + (1 - share) * of_high)
    torch.testing.assert_close(trace.nodes["adt"]["fn"].log_prob(counts), mixture.log(), rtol=1e-3, atol=1e-3)
    model.train(1, **QUIET)
    model.save(tmp_path)
    again = MultiVI.load(tmp_path, mosaic)
    assert again.schema["adt"].spec.background == "marginal"
    expected, found = (m.get_imputed_values("adt", n_samples=2).mean for m in (model, again))
    pd.testing.assert_frame_equal(expected, found)
    for likelihood, background in (("nb", "latent"), ("nb_mixture", "summed")):
        with pytest.raises(ValueError, match=f"background.*{background}|{background}.*background"):
            ModalitySpec(likelihood, background=background)
