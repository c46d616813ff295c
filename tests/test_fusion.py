import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData
from pyro import poutine
from torch.distributions import Normal

from pyromosaic import Mosaic, MultiVI
from pyromosaic.checks import simulation_based_calibration
from pyromosaic.data import loader, measured
from pyromosaic.fusion import (
    CellFusion,
    ExpertMixture,
    FusedWidth,
    GlobalFusion,
    MeanFusion,
    MixtureFusion,
    Posterior,
    ProductFusion,
    alone,
    presence,
)
from pyromosaic.measurement import encoded
from pyromosaic.train import MosaicELBO, sleep

QUIET = {"progress_bar": False, "accelerator": "cpu"}
NAMES = ("rna", "atac", "adt")


@pytest.fixture
def posteriors():
    """Six cells, of which cell 0 has all modalities, and two latent dimensions."""
    rng = torch.Generator().manual_seed(0)
    rows = {"rna": [0, 1, 2, 5], "atac": [0, 2, 3], "adt": [0, 3, 4, 5]}
    return {
        name: Posterior(
            torch.tensor(r), torch.randn(len(r), 2, generator=rng), 0.2 + torch.rand(len(r), 2, generator=rng)
        )
        for name, r in rows.items()
    }


def experts(posteriors, cell):
    """Posteriors that a cell has, by modality."""
    return {
        name: Normal(q.loc[q.rows == cell][0], q.scale[q.rows == cell][0])
        for name, q in posteriors.items()
        if (q.rows == cell).any()
    }


def test_the_width_is_learnt_for_each_number_of_modalities(posteriors):
    """Alone a modality keeps its width; cells with two or three have a factor each, which is 1 before training."""
    fusion, used = MeanFusion(NAMES), presence(posteriors, 6)
    before, said = fusion.posterior(posteriors, used).base_dist, fusion(posteriors, used)
    torch.testing.assert_close(before.scale.squeeze(1), said[1])
    with torch.no_grad():
        fusion.width.tenth_of_log.copy_(torch.tensor([1.5, 3.0]).log() / 10)
    after = fusion.posterior(posteriors, used).base_dist
    torch.testing.assert_close(after.loc.squeeze(1), said[0])
    factors = torch.tensor([1.0, 1.5, 3.0])[used.sum(-1).long() - 1]
    torch.testing.assert_close(after.scale.squeeze(1), said[1] * factors.unsqueeze(-1))
    assert FusedWidth(1).tenth_of_log is None and not list(MixtureFusion(NAMES).parameters())


def test_sleep_finds_the_width_of_a_fusion_that_is_too_sure():
    """Two copies of one measurement: as if independent, their product is narrower than the posterior."""
    rng = np.random.default_rng(0)
    weight = np.array([[1.0], [0.5]])
    x = rng.normal(size=(400, 1)) @ weight.T + rng.normal(size=(400, 2))
    cells = [f"c{i}" for i in range(400)]
    parts = {name: AnnData(x.astype(np.float32), obs=pd.DataFrame(index=cells)) for name in ("a", "b")}
    mosaic = Mosaic.from_anndata(parts, dict.fromkeys(parts, "normal"), match_cells=True)
    model = MultiVI(mosaic, n_latent=1, n_hidden=16, dropout=0.0, prior="normal", fusion="product", mmd=0.0)
    model.train(30, learning_rate=0.01, sleep_steps=0, **QUIET)
    inside = []
    for n_steps in (0, 300):
        sleep(model.model, model.guide, loader(mosaic, mosaic.find(None), 128, seed=0), n_steps)
        ranks = simulation_based_calibration(model, n_steps=0)
        inside.append(float(ranks.coverage([0.9])["randomised"].iloc[0]))
    assert 0.86 < inside[1] < 0.94
    assert abs(float(model.guide.fusion.width.tenth_of_log.detach())) > 0.005


def test_mean_is_that_of_independent_normals(posteriors):
    loc, scale = MeanFusion()(posteriors, presence(posteriors, 6))
    for cell in range(6):
        own = list(experts(posteriors, cell).values())
        torch.testing.assert_close(loc[cell], sum(q.loc for q in own) / len(own))
        torch.testing.assert_close(scale[cell] ** 2, sum(q.variance for q in own) / len(own) ** 2)


def test_global_weights_are_a_softmax_over_what_a_cell_has(posteriors):
    fusion = GlobalFusion(NAMES)
    used = presence(posteriors, 6)
    for mine, mean in zip(fusion(posteriors, used), MeanFusion()(posteriors, used), strict=True):
        torch.testing.assert_close(mine, mean)
    with torch.no_grad():
        fusion.log_weights.copy_(torch.tensor([0.5, -1.0, 2.0]))
    loc, scale = fusion(posteriors, used)
    for cell in range(6):
        own = experts(posteriors, cell)
        w = fusion.log_weights[[NAMES.index(name) for name in own]].softmax(0)
        torch.testing.assert_close(loc[cell], sum(w[i] * q.loc for i, q in enumerate(own.values())))
        torch.testing.assert_close(scale[cell] ** 2, sum(w[i] ** 2 * q.variance for i, q in enumerate(own.values())))
    backwards = dict(reversed(posteriors.items()))
    torch.testing.assert_close(fusion(backwards, presence(backwards, 6))[0], loc)
    loc[0].sum().backward()
    assert (fusion.log_weights.grad != 0).all()


def test_product_of_experts_is_the_normalised_product_of_densities(posteriors):
    loc, scale = ProductFusion()(posteriors, presence(posteriors, 6))
    grid = torch.linspace(-6, 6, 4001).unsqueeze(-1)
    for cell in (0, 1, 3):
        log_product = Normal(0.0, 1.0).log_prob(grid) + sum(
            q.log_prob(grid) for q in experts(posteriors, cell).values()
        )
        p = log_product.softmax(0)
        mean = (p * grid).sum(0)
        torch.testing.assert_close(loc[cell], mean, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(scale[cell] ** 2, (p * (grid - mean) ** 2).sum(0), rtol=1e-3, atol=1e-4)


def test_mixture_of_experts_is_the_mean_density(posteriors):
    used = presence(posteriors, 6)
    q = MixtureFusion().posterior(posteriors, used)
    assert q.batch_shape == (6, 1) and q.event_shape == (2,) and isinstance(q, ExpertMixture)
    torch.manual_seed(0)
    draws = q.rsample((4000,))
    log_prob = q.log_prob(draws)
    for cell in range(6):
        own = list(experts(posteriors, cell).values())
        density = sum(e.log_prob(draws[:, cell, 0]).sum(-1).exp() for e in own) / len(own)
        torch.testing.assert_close(log_prob[:, cell, 0], density.log(), rtol=1e-4, atol=1e-4)
        error = draws[:, cell, 0].std(0) / 4000**0.5
        assert ((draws[:, cell, 0].mean(0) - sum(e.loc for e in own) / len(own)).abs() < 4 * error).all()
    loc, scale = MixtureFusion()(posteriors, used)
    torch.testing.assert_close(draws[:, :, 0].mean(0), loc, rtol=0, atol=0.08)
    torch.testing.assert_close(draws[:, :, 0].std(0), scale, rtol=0.08, atol=0.0)


def test_gradients_through_a_mixture_are_those_of_the_expectation(posteriors):
    for q in posteriors.values():
        q.loc.requires_grad_(), q.scale.requires_grad_()
    used = presence(posteriors, 6)
    torch.manual_seed(0)
    draws = MixtureFusion().posterior(posteriors, used).rsample((20000,))
    draws.square().mean(0).sum().backward()
    for i, q in enumerate(posteriors.values()):
        share = (used[:, i] / used.sum(-1))[q.rows].unsqueeze(-1)
        torch.testing.assert_close(q.loc.grad, 2 * share * q.loc.detach(), rtol=0.05, atol=0.05)
        torch.testing.assert_close(q.scale.grad, 2 * share * q.scale.detach(), rtol=0.05, atol=0.05)


def test_a_variable_of_one_modality_has_its_prior_elsewhere(posteriors):
    q = posteriors["rna"]
    used = torch.tensor([1.0, 0.0, 1.0, 0.0, 0.0, 1.0])  # left out of cell 1, absent from 3 and 4
    own = alone(q, used, 2, torch.arange(6))
    assert own.batch_shape == (6, 1) and own.event_shape == (2,)
    torch.testing.assert_close(own.mean[[0, 2, 5], 0], q.loc[[0, 2, 3]])
    torch.testing.assert_close(own.stddev[[0, 2, 5], 0], q.scale[[0, 2, 3]])
    assert (own.mean[[1, 3, 4]] == 0).all() and (own.stddev[[1, 3, 4]] == 1).all()
    assert (alone(None, used, 2, torch.tensor([4, 0])).stddev == 1).all()


# In a model


@pytest.fixture
def mosaic(mdata):
    return Mosaic.from_mudata(mdata)


def small(mosaic, **options) -> MultiVI:
    return MultiVI(mosaic, **{"n_latent": 3, "n_hidden": 8, "mmd": 0.0, **options})


@pytest.mark.parametrize("fusion", ["mean", "equal", "global", "universal", "cell", "product", "mixture"])
def test_models_train_answer_and_are_kept_with_each_fusion(fusion, mosaic, mdata, tmp_path):
    model = small(mosaic, fusion=fusion)
    before = {name: p.clone() for name, p in model.guide.fusion.named_parameters()}
    model.train(4, batch_size=16, kl_warmup_epochs=0, **QUIET)
    assert np.isfinite(model.history["train_elbo"]).all()
    assert all(not torch.equal(p, before[name]) for name, p in model.guide.fusion.named_parameters())
    z = model.get_latent_representation()
    assert model.get_latent_representation(sample=True).shape == z.shape == (32, 3)
    assert np.isfinite(model.get_imputed_values("adt", n_samples=2).mean).all().all()
    model.save(tmp_path / "model")
    loaded = MultiVI.load(tmp_path / "model", mdata)
    pd.testing.assert_frame_equal(loaded.get_latent_representation(), z)


def test_objective_with_a_mixture_is_that_of_its_density(mosaic):
    model = small(mosaic, fusion="mixture", jeffreys=0.0, left_out=0.0, prior="normal")
    minibatch = measured(mosaic, np.arange(32))
    elbo = MosaicELBO()
    torch.manual_seed(0)
    elbo.differentiable_loss(model.model, model.guide, minibatch, 0.5)
    torch.manual_seed(0)
    z = poutine.trace(model.guide).get_trace(minibatch, 0.5).nodes["z"]["value"][:, 0]
    shared, _ = encoded(model.guide.modalities, minibatch)
    expected = 0.0
    for cell in range(32):
        own = list(experts(shared, cell).values())
        log_q = torch.stack([e.log_prob(z[cell]).sum() for e in own]).logsumexp(0) - np.log(len(own))
        expected += log_q - Normal(0.0, 1.0).log_prob(z[cell]).sum()
    torch.testing.assert_close(elbo.terms["z"], 0.5 * expected.detach())


def test_cell_weights_belong_to_cells_by_name(mosaic, mdata):
    model = small(mosaic, fusion="cell")
    with torch.no_grad():
        model.guide.fusion.own.normal_()
    z = model.get_latent_representation()
    backwards = model.register({name: adata[::-1].copy() for name, adata in mdata.mod.items()})
    turned = model.get_latent_representation(data=backwards).loc[z.index]
    pd.testing.assert_frame_equal(turned, z, atol=1e-6)  # sums are of another order
    again = model.get_latent_representation()  # after other data were looked at
    pd.testing.assert_frame_equal(again, z)

    strangers = {name: adata.copy() for name, adata in mdata.mod.items()}
    for adata in strangers.values():
        adata.obs_names = "new_" + adata.obs_names
    with pytest.warns(UserWarning, match="get the global weights"):
        new = model.get_latent_representation(data=model.register(strangers))
    everyone = small(mosaic, fusion="global")
    everyone.guide.load_state_dict(
        {k: v for k, v in model.guide.state_dict().items() if k not in ("fusion.cells", "fusion.own")}
    )
    expected = everyone.get_latent_representation()
    np.testing.assert_allclose(new, expected, atol=1e-6)
    assert not np.allclose(new, z)


def test_a_fusion_of_the_users_own(mosaic):
    class First(MeanFusion):
        def weights(self, names, used, index):
            return torch.nn.functional.one_hot(used.argmax(-1), used.shape[-1]).to(used)

    z = small(mosaic, fusion=First()).get_latent_representation()
    rna = small(mosaic).get_latent_representation(modality="rna")
    pd.testing.assert_frame_equal(z.loc[rna.index], rna)
    with pytest.raises(ValueError, match="fusion must be a Fusion or one of 'mean', .*; found 'median'"):
        small(mosaic, fusion="median")


def test_cell_fusion_without_cells_is_global():
    assert torch.equal(CellFusion(NAMES).logits(torch.arange(3)), torch.zeros(3))
