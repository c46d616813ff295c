"""Posteriors of z with full covariance: fusions, penalties, encoders and all models."""

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.distributions import MultivariateNormal, kl_divergence

from pyromosaic import ContrastiveVI, DiagVI, Mosaic, MultiVI, ScModal, checks, simulate
from pyromosaic.fusion import FUSIONS, Fusion
from pyromosaic.nn import Encoder
from pyromosaic.penalties import Jeffreys
from pyromosaic.posterior import Posterior

RULES = ("mean", "global", "product", "mixture")


def posteriors(full: bool, seed: int = 0) -> dict[str, Posterior]:
    """Posteriors of six cells by two modalities; cell 0 lacks the first, cell 5 the second."""
    torch.manual_seed(seed)
    found = {}
    for name, rows in (("rna", torch.arange(1, 6)), ("adt", torch.arange(5))):
        a = torch.randn(5, 3, 3)
        covariance = a @ a.mT + 0.5 * torch.eye(3)
        scale = covariance.diagonal(dim1=-2, dim2=-1).sqrt()
        factor = torch.linalg.cholesky(covariance) / scale.unsqueeze(-1)
        found[name] = Posterior(rows, torch.randn(5, 3), scale, factor if full else None)
    return found


USED = torch.tensor([[0.0, 1], [1, 1], [1, 1], [1, 1], [1, 1], [1, 0]])


@pytest.mark.parametrize("rule", RULES)
def test_independent_dimensions_are_a_special_case(rule: str) -> None:
    """With factors of 1, the full fusion has the moments and the density of the diagonal one."""
    plain = posteriors(full=False)
    eye = {k: Posterior(q.rows, q.loc, q.scale, torch.eye(3).expand(5, 3, 3)) for k, q in plain.items()}
    fusion = FUSIONS[rule](["rna", "adt"])
    a, b, z = fusion.posterior(plain, USED), fusion.posterior(eye, USED), torch.randn(6, 1, 3)
    torch.testing.assert_close(a.mean, b.mean)
    torch.testing.assert_close(a.log_prob(z), b.log_prob(z))


def test_product_is_the_normalised_product_of_densities() -> None:
    """Its log density differs from the sum of the experts' and the prior's by a constant of the cell."""
    found, z = posteriors(full=True), torch.randn(200, 3)
    with torch.no_grad():
        fused = FUSIONS["product"](["rna", "adt"]).posterior(found, USED)
    for cell in range(6):
        log_density = MultivariateNormal(torch.zeros(3), torch.eye(3)).log_prob(z)
        for q in found.values():
            for i in torch.nonzero(q.rows == cell).flatten():
                log_density = log_density + MultivariateNormal(q.loc[i], scale_tril=q.scale_tril[i]).log_prob(z)
        mine = MultivariateNormal(fused.loc[cell, 0], scale_tril=fused.scale_tril[cell, 0]).log_prob(z)
        assert float((mine - log_density).std()) < 1e-4


@pytest.mark.parametrize("rule", ["mean", "global", "mixture"])
def test_moments_are_those_of_draws(rule: str) -> None:
    """Mean and covariance of a fusion, against draws of the modalities' posteriors combined by hand."""
    found, n = posteriors(full=True), 200_000
    fusion = FUSIONS[rule](["rna", "adt"])
    with torch.no_grad():
        fused = fusion.normal(found, USED)
    both = found["rna"].of(slice(0, 1)), found["adt"].of(slice(1, 2))  # cell 1 has both
    draws = [MultivariateNormal(q.loc[0], scale_tril=q.scale_tril[0]).sample((n,)) for q in both]
    if rule == "mixture":
        combined = torch.where(torch.rand(n, 1) < 0.5, *draws)
    else:
        combined = (draws[0] + draws[1]) / 2
    torch.testing.assert_close(fused.mean[1, 0], combined.mean(0), atol=0.03, rtol=0.02)
    torch.testing.assert_close(fused.covariance_matrix[1, 0], combined.T.cov(), atol=0.08, rtol=0.03)


def test_jeffreys_between_full_covariances() -> None:
    """The penalty is the symmetric divergence of the two normals, by torch's formula."""
    found = posteriors(full=True)
    a, b = found["rna"].of(slice(0, 4)), found["adt"].of(slice(1, 5))
    p, q = (MultivariateNormal(each.loc, covariance_matrix=each.covariance) for each in (a, b))
    expected = (kl_divergence(p, q) + kl_divergence(q, p)).sum() / 6

    class SixCells:
        def __len__(self) -> int:
            return 6

    torch.testing.assert_close(Jeffreys(1.0)(found, SixCells()), expected)  # type: ignore[arg-type]


def test_an_own_fusion_says_what_it_lacks() -> None:
    """A fusion without `correlated` refuses correlated posteriors in one sentence."""

    class First(Fusion):
        def forward(self, posteriors, used, index=None):  # type: ignore[no-untyped-def]
            q = posteriors["adt"]
            return q.loc, q.scale

    with pytest.raises(TypeError, match="First takes posteriors with independent dimensions only"):
        First(["rna", "adt"]).posterior(posteriors(full=True), USED)


def two(shared: bool, treated: float = 0.0) -> Mosaic:
    patterns = None if shared else ["rna", "adt"]
    mdata, _ = simulate(90, {"rna": 20, "adt": 20}, patterns=patterns, treated=treated, links={"adt": 1.0})
    return Mosaic.from_mudata(mdata, batch_key="batch")


@pytest.mark.parametrize("fusion", ["mean", "cell", "product", "mixture"])
def test_multivi_trains_and_is_saved(fusion: str, tmp_path) -> None:  # type: ignore[no-untyped-def]
    """Posteriors are correlated after training, and a saved model gives the same digits."""
    mosaic = two(shared=True)
    model = MultiVI(mosaic, n_latent=4, fusion=fusion, covariance="full")
    model.train(3, sleep_steps=5, progress_bar=False)
    assert float(model.guide.modalities["rna"].encoder.correlation.weight.detach().abs().sum()) > 0
    model.save(tmp_path / "model")
    again = MultiVI.load(tmp_path / "model", mosaic)
    np.testing.assert_array_equal(model.get_latent_representation(), again.get_latent_representation())
    assert model.get_latent_posterior().sd.shape == (90, 4)


def test_every_model_takes_it() -> None:
    """ContrastiveVI, DiagVI and ScModal, which also has other encoders."""
    contrast = ContrastiveVI(
        two(True, 0.5).with_cohorts("condition", background="control"), n_latent=4, n_salient=2, covariance="full"
    )
    mosaic = two(shared=False)
    models = [contrast]
    for encoder in ("layers", "attention"):
        models.append(ScModal(mosaic, _links(mosaic), n_latent=4, covariance="full", encoder=encoder, linkage=None))
    models.append(DiagVI(mosaic, _links(mosaic), n_latent=4, covariance="full", linkage=None))
    for model in models:
        model.train(2, sleep_steps=2, progress_bar=False)
        site = model.guide.modalities["rna"].encoder
        factor = (site.z if hasattr(site, "z") else site).correlation
        assert float(factor.weight.detach().abs().sum()) > 0


def _links(mosaic: Mosaic) -> pd.DataFrame:
    return pd.DataFrame({name: mosaic.schema[name].features for name in ("rna", "adt")})


def test_an_encoder_of_ones_own_gives_its_own_factor() -> None:
    """covariance='full' with a given encoder is refused; the encoder may return the factor itself."""

    class Own(nn.Module):
        def __init__(self, schema, n_latent, *shape):  # type: ignore[no-untyped-def]
            super().__init__()
            self.network = Encoder(schema, n_latent, *shape, covariance="full")

        def forward(self, view):  # type: ignore[no-untyped-def]
            return self.network(view)

    with pytest.raises(ValueError, match="leave covariance out"):
        MultiVI(two(True), encoder=Own, covariance="full")
    model = MultiVI(two(True), n_latent=3, encoder=Own)
    model.train(2, sleep_steps=0, progress_bar=False)
    assert float(model.guide.modalities["rna"].encoder.network.correlation.weight.detach().abs().sum()) > 0


@pytest.mark.slow
def test_full_covariance_explains_no_worse_and_keeps_its_word() -> None:
    """The validation ELBO is not below that with independent dimensions, and intervals hold what they say."""
    mosaic = Mosaic.from_mudata(simulate(800, {"rna": 60, "adt": 20}, seed=61)[0], batch_key="batch")
    bounds = {}
    for covariance in ("diagonal", "full"):
        model = MultiVI(mosaic, n_latent=5, fusion="product", covariance=covariance)
        model.train(60, progress_bar=False)
        bounds[covariance] = model.history["validation_elbo"].dropna().iloc[-1]
        ranks = checks.simulation_based_calibration(model, n_steps=0, n_samples=49)
        held = ranks.coverage((0.9,))["randomised"]
        assert 0.85 < held.mean() < 0.95
    assert bounds["full"] > bounds["diagonal"] - 0.5
