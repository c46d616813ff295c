import json
import warnings

import anndata
import numpy as np
import pandas as pd
import pyro
import pytest
import torch
from geomloss import SamplesLoss
from pyro import poutine
from pyro.infer import TraceMeanField_ELBO
from torch.distributions import Normal, kl_divergence
from torch.nn.functional import cross_entropy, logsigmoid, softplus

from pyromosaic import DiagVI, ModalitySpec, Mosaic, metrics, simulate
from pyromosaic.data import loader, measured, separate
from pyromosaic.distributions import NegativeBinomial
from pyromosaic.fusion import Posterior
from pyromosaic.guidance import GuidanceGraph, shared_scores
from pyromosaic.labels import Labels, check_labels
from pyromosaic.measurement import encoded
from pyromosaic.nn import GraphEncoder
from pyromosaic.penalties import Anchors, Pull, Scores, Sinkhorn, mutual_neighbors, sinkhorn_divergence
from pyromosaic.priors import GaussianMixture
from pyromosaic.train import MosaicELBO

QUIET = {"progress_bar": False, "accelerator": "cpu"}
pytestmark = pytest.mark.filterwarnings("ignore:the guidance graph has few links")


def unpaired(mdata, **options) -> Mosaic:
    """Every row a cell of its own: pairs are forgotten."""
    return Mosaic.from_anndata({name: adata.copy() for name, adata in mdata.mod.items()}, **options)


def linked(mosaic, truth) -> GuidanceGraph:
    """The simulation's links."""
    ends = [(("rna", row.gene), (row.modality, row.feature)) for row in truth.links.itertuples()]
    return GuidanceGraph.from_edges(mosaic, ends, sign=truth.links["sign"])


@pytest.fixture(scope="module")
def data():
    return simulate(240, {"rna": 40, "adt": 12}, links={"adt": 0.8}, types=3, negative_links=0.2, seed=1)


@pytest.fixture(scope="module")
def mosaic(data) -> Mosaic:
    return unpaired(data[0], batch_key="batch", label_key="celltype")


@pytest.fixture(scope="module")
def graph(mosaic, data) -> GuidanceGraph:
    with warnings.catch_warnings(action="ignore"):
        return linked(mosaic, data[1])


def small(mosaic, graph, **options) -> DiagVI:
    with warnings.catch_warnings(action="ignore"):
        return DiagVI(mosaic, graph, **{"n_latent": 4, "n_private": 2, "n_hidden": 16, **options})


@pytest.fixture(scope="module")
def trained(mosaic, graph) -> DiagVI:
    model = small(mosaic, graph, alignment=5.0)
    model.train(15, batch_size=128, kl_warmup_epochs=5, learning_rate=5e-3, **QUIET)
    return model


# The program


def test_sites_and_shapes_read_like_the_story(mosaic, graph):
    model = small(mosaic, graph)
    minibatch = measured(mosaic, np.arange(0, mosaic.n_cells, 8))
    trace = poutine.trace(model.model).get_trace(minibatch)
    shapes = {
        name: tuple(site["fn"].batch_shape + site["fn"].event_shape)
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and not name.endswith(("cells", "features", "pairs"))
    }
    n = {name: len(view.rows) for name, view in minibatch.decoded.items()}
    n_edges = 2 * (2 * graph.edges.shape[1] + 52)
    assert shapes == {
        "v": (52, 4),
        "edges": (n_edges,),
        "z": (len(minibatch), 1, 4),
        "z_rna": (n["rna"], 1, 2),
        "rna": (n["rna"], 40),
        "z_adt": (n["adt"], 1, 2),
        "adt": (n["adt"], 12),
    }
    assert "z_rna" not in poutine.trace(small(mosaic, graph, n_private=0).model).get_trace(minibatch).nodes


def test_the_reference_loss_is_that_of_the_seed(data):
    """Every term of the reference's objective, written out again for fixed weights and noise."""
    rna, adt = (data[0][name] for name in ("rna", "adt"))
    labels = adt.obs["celltype"].astype(str).where(np.arange(adt.n_obs) % 3 > 0, "unknown")
    adt = anndata.AnnData(np.log1p(adt.X.toarray() if hasattr(adt.X, "toarray") else adt.X), adt.obs, adt.var)
    adt.obs["label"] = labels.to_numpy()
    mosaic = Mosaic.from_anndata(
        {"rna": rna.copy(), "adt": adt},
        {"rna": ModalitySpec("nb", batch_key="batch"), "adt": ModalitySpec("normal", label_key="label")},
    )
    table = data[1].links.assign(weight=0.5).rename(columns={"gene": "rna", "feature": "adt"})
    graph = GuidanceGraph.from_table(mosaic, table[["rna", "adt", "weight", "sign"]])
    model = DiagVI(mosaic, graph, **{**DiagVI.presets["reference"].options, "n_latent": 5, "n_hidden": 16})
    for parameter in [*model.model.parameters(), *model.guide.parameters()]:
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
    minibatch = measured(mosaic, np.arange(0, mosaic.n_cells, 5))
    n = mosaic.n_cells
    negatives = {}

    def unlinked(n_tries=5, draw=model.model.unlinked):
        negatives["drawn"] = draw(n_tries)
        return negatives["drawn"]

    model.model.unlinked = unlinked
    elbo = MosaicELBO()
    torch.manual_seed(1)
    loss = elbo.differentiable_loss(model.model, model.guide, minibatch)
    torch.manual_seed(1)
    trace = poutine.trace(model.guide).get_trace(minibatch)
    v, z = trace.nodes["v"]["value"], trace.nodes["z"]["value"][:, 0]
    expected, posteriors = {}, {}

    for name, features in (("rna", slice(0, 40)), ("adt", slice(40, 52))):
        view = minibatch.observed[name]
        posteriors[name] = q = Normal(*model.guide.modalities[name].encoder(view))
        decoder, likelihood = model.model.modalities[name].decoder, model.model.modalities[name].likelihood
        predictor = likelihood.predictors[0]
        batch = view.codes[:, 0] if name == "rna" else torch.zeros(len(view.rows), dtype=torch.long)
        eta = (
            softplus(decoder.scale[predictor][batch]) * (z[view.rows] @ v[features].T) + decoder.bias[predictor][batch]
        )
        x = view.dense_counts()
        if name == "rna":
            mu = x.sum(1, keepdim=True) * eta.softmax(-1)
            log_likelihood = NegativeBinomial(mu, likelihood.log_theta.exp()).log_prob(x)
        else:
            log_likelihood = Normal(eta, likelihood.log_sigma.exp()).log_prob(x)
        expected[name] = -0.1 * log_likelihood.sum(1).mean()
        kl = kl_divergence(q, Normal(0.0, 1.0)).sum() / (len(x) * x.shape[1])
        expected["z"] = expected.get("z", 0.0) + kl

    positive = logsigmoid(model.model.sign * (v[model.model.edges[0]] * v[model.model.edges[1]]).sum(1))
    other, found = negatives["drawn"]
    assert found.all()
    negative = logsigmoid(-(v[model.model.edges[0]] * v[other]).sum(1))
    expected["edges"] = -15 * ((model.model.weight * positive).mean() + negative.mean()) / 2
    expected["v"] = 15 * kl_divergence(Normal(*model.guide.graph_encoder()), Normal(0.0, 1.0)).sum() / 52**2

    torch.manual_seed(1)
    torch.randn(52, 5)  # v is drawn first
    draws = [torch.normal(q.mean, q.stddev) for q in posteriors.values()]
    cost = torch.cdist(*draws).square() / 2
    blur = (0.5 * cost.mean()).sqrt().item()
    sinkhorn = SamplesLoss("sinkhorn", p=2, blur=blur, reach=3 * blur, debias=True, diameter=blur)
    expected["penalty/sinkhorn"] = 85 * sinkhorn(*draws)

    label = pd.Series(labels.to_numpy())[minibatch.index[minibatch.observed["adt"].rows].numpy() - rna.n_obs]
    known = (label != "unknown").to_numpy()
    assert 0 < known.sum() < len(known)
    codes = torch.from_numpy(pd.Categorical(label[known], categories=model.classifier.labels.names).codes.astype(int))
    expected["penalty/classifier"] = 5 * cross_entropy(
        model.classifier.logits(posteriors["adt"].mean[torch.tensor(known)]), codes
    )
    assert set(elbo.terms) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(elbo.terms[name] / n, value.detach(), rtol=1e-3, atol=1e-4, msg=name)
    torch.testing.assert_close(loss.detach() / n, sum(expected.values()).detach(), rtol=1e-3, atol=1e-3)


def test_elbo_and_gradients_are_those_of_pyro(mosaic, graph):
    model = small(mosaic, graph, anchors=0.0, pull=0.0)
    minibatch = measured(mosaic, np.arange(0, mosaic.n_cells, 7))
    results = []
    for elbo in (MosaicELBO(), TraceMeanField_ELBO()):
        torch.manual_seed(0)
        loss = elbo.differentiable_loss(model.model, model.guide, minibatch, 0.5)
        parameters = [*model.model.parameters(), *model.guide.parameters()]
        results.append([loss, *torch.autograd.grad(loss, parameters, allow_unused=True)])
    for ours, pyros in zip(*results, strict=True):
        torch.testing.assert_close(ours, pyros, rtol=1e-4, atol=1e-3)


def test_private_parts_have_their_own_weight_and_all_modalities_count_alike(mosaic, graph):
    cells = np.concatenate([np.flatnonzero(mosaic.modalities["rna"].present)[:10], mosaic.find(None)[-30:]])
    minibatch = measured(mosaic, cells)
    terms = []
    for weight in (1.0, 3.0):
        model = small(mosaic, graph, private_kl=weight)
        elbo = MosaicELBO()
        torch.manual_seed(0)
        elbo.loss(model.model, model.guide, minibatch)
        terms.append(elbo.terms)
    for name in ("z_rna", "z_adt"):
        torch.testing.assert_close(terms[1][name], 3 * terms[0][name])
    torch.testing.assert_close(terms[1]["z"], terms[0]["z"])
    _, private = encoded(model.guide.modalities, minibatch)
    q = private["rna"]
    assert len(q.loc) == 10
    expected = 3 * mosaic.n_cells * kl_divergence(Normal(q.loc, q.scale), Normal(0.0, 1.0)).sum() / 10
    torch.testing.assert_close(terms[1]["z_rna"], expected.detach(), rtol=1e-4, atol=1e-3)


def test_negatives_are_never_linked(mosaic, graph):
    model = small(mosaic, graph).model
    linked_pairs = set(map(tuple, model.edges.T.tolist()))
    torch.manual_seed(0)
    for _ in range(20):
        other, found = model.unlinked()
        pairs = zip(model.edges[0].tolist(), other.tolist(), found.tolist(), strict=True)
        assert all(((i, j) in linked_pairs) == (ok == 0) for i, j, ok in pairs)
    everything = GuidanceGraph.from_matrix(mosaic, "rna", "adt", np.ones((40, 12)))
    other, found = small(mosaic, everything).model.unlinked(1)
    assert 0 < found.mean() < 1, "a try that hits a neighbour counts nothing"


def test_the_graph_encoder_sums_signed_weighted_neighbours():
    edges = torch.tensor([[0, 1, 0, 1, 2], [1, 0, 0, 1, 2]])
    strength = torch.tensor([-0.5, -0.5, 1.0, 1.0, 1.0])
    encoder = GraphEncoder(3, edges, strength, 2)
    loc, scale = encoder()
    t = encoder.table
    torch.testing.assert_close(loc[0], (t[0] - 0.5 * t[1]) / 1.5)
    torch.testing.assert_close(loc[1], (t[1] - 0.5 * t[0]) / 1.5)
    torch.testing.assert_close(loc[2], t[2])
    assert (scale > 0).all()
    assert not any(size == 9 for size in map(torch.numel, encoder.state_dict().values())), "nothing is nodes × nodes"


def test_pairs_are_used_only_if_asked(data, graph):
    paired = Mosaic.from_mudata(data[0], batch_key="batch")
    taken_apart, together = small(paired, graph), small(paired, graph, pairing=True)
    n = {name: data[0][name].n_obs for name in ("rna", "adt")}
    assert taken_apart.mosaic.n_cells == n["rna"] + n["adt"]
    assert together.mosaic.n_cells == paired.n_cells < n["rna"] + n["adt"]
    both = np.flatnonzero(paired.presence.all(axis=1))
    cell = paired.obs_names[both[0]]
    latent = taken_apart.get_latent_representation()
    own = together.get_latent_representation([cell])
    alone = [together.get_latent_representation([cell], modality=name).to_numpy() for name in n]
    np.testing.assert_allclose(own, np.mean(alone, axis=0), atol=1e-5)
    for name, values in zip(n, alone, strict=True):
        np.testing.assert_allclose(latent.loc[f"{name}:{cell}"], values[0], atol=1e-5)
    pairs = separate(paired)
    assert (pairs.presence.sum(axis=1) == 1).all()
    np.testing.assert_array_equal(pairs.column("celltype")[f"adt:{cell}"], data[0].obs["celltype"][cell])
    rows = pairs.modalities["adt"].read(pairs.find([f"adt:{cell}"]))
    np.testing.assert_array_equal(rows.toarray() if hasattr(rows, "toarray") else rows, _values(data[0]["adt"][cell].X))


def _values(x):
    return x.toarray() if hasattr(x, "toarray") else np.asarray(x)


# Penalties


def test_sinkhorn_is_the_converged_divergence_and_homogeneous():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(40, 3, generator=generator), torch.randn(50, 3, generator=generator) + 0.7

    def entropic(a, b, eps, rho):  # dual of unbalanced transport by plain iterations, double precision
        cost = torch.cdist(a, b).square().double() / 2
        f, g = torch.zeros(len(a)).double(), torch.zeros(len(b)).double()
        log_a, log_b = -np.log(len(a)), -np.log(len(b))
        for _ in range(500):
            f = -eps / (1 + eps / rho) * torch.logsumexp((g - cost) / eps + log_b, 1)
            g = -eps / (1 + eps / rho) * torch.logsumexp((f.unsqueeze(1) - cost) / eps + log_a, 0)
        plan = torch.exp((f.unsqueeze(1) + g - cost) / eps + log_a + log_b)
        mass = lambda m, n: rho * (m * (m * n).log() - m + 1 / n).sum()  # noqa: E731
        entropy = eps * ((plan * (plan.log() - log_a - log_b)).sum() - plan.sum() + 1)
        return (plan * cost).sum() + entropy + mass(plan.sum(1), len(a)) + mass(plan.sum(0), len(b)), plan.sum()

    eps = 0.5 * (torch.cdist(x, y).square() / 2).mean()
    rho = 9 * eps
    (xy, m), (xx, m1), (yy, m2) = (entropic(*p, eps, rho) for p in ((x, y), (x, x), (y, y)))
    exact = xy - (xx + yy) / 2
    # Unbalanced self terms differ in mass; Sejourne et al. add eps/2 of the squared difference.
    del m, m1, m2
    torch.testing.assert_close(sinkhorn_divergence(x, y).double(), exact, rtol=0.05, atol=1e-3)
    torch.testing.assert_close(sinkhorn_divergence(7 * x, 7 * y), 49 * sinkhorn_divergence(x, y), rtol=1e-3, atol=0)
    torch.testing.assert_close(
        sinkhorn_divergence(7 * x, 7 * y, p=1), 7 * sinkhorn_divergence(x, y, p=1), rtol=1e-3, atol=0
    )
    assert abs(float(sinkhorn_divergence(x, x))) < 1e-4
    assert sinkhorn_divergence(x, y, blur=0.5, reach=float("inf")) > sinkhorn_divergence(x, y, blur=0.5, reach=0.5)


def test_sinkhorn_compares_some_of_the_cells(mosaic):
    generator = torch.Generator().manual_seed(0)
    draws = {name: torch.randn(n, 2, generator=generator) for name, n in (("rna", 30), ("adt", 20))}
    posteriors = {name: Posterior(torch.arange(len(z)), z, torch.ones_like(z)) for name, z in draws.items()}
    minibatch = measured(mosaic, np.arange(50))
    expected = sinkhorn_divergence(draws["rna"][:25], draws["adt"])
    torch.testing.assert_close(Sinkhorn(n_cells=25)(posteriors, minibatch), expected)
    with pytest.raises(ValueError, match="n_cells must be a whole number from 1 to 1e9; found 0"):
        Sinkhorn(n_cells=0)


def test_sinkhorn_sums_over_pairs_or_from_a_reference_and_warms_up(mosaic, graph):
    generator = torch.Generator().manual_seed(0)
    posteriors = {
        name: Posterior(torch.arange(9), torch.randn(9, 2, generator=generator), torch.full((9, 2), 1e-3))
        for name in "abc"
    }
    a, b, c = (q.loc for q in posteriors.values())
    total = sinkhorn_divergence(a, b) + sinkhorn_divergence(a, c) + sinkhorn_divergence(b, c)
    torch.testing.assert_close(Sinkhorn()(posteriors, None), total)
    torch.testing.assert_close(Sinkhorn(sampled=True)(posteriors, None), total, rtol=0.05, atol=1e-2)
    to_b = sinkhorn_divergence(a, b) + sinkhorn_divergence(b, c)
    torch.testing.assert_close(Sinkhorn(reference="b")(posteriors, None), to_b)
    assert Sinkhorn()({"a": posteriors["a"]}, None) == 0
    with pytest.raises(ValueError, match="reference must be one of rna, adt, or None; found 'atac'"):
        small(mosaic, graph, alignment=Sinkhorn(reference="atac"))
    assert Sinkhorn.warms_up


def test_anchors_are_mutual_neighbours_and_pull_is_a_distance(mosaic):
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(12, 3, generator=generator), torch.randn(15, 3, generator=generator)
    cosine = torch.nn.functional.cosine_similarity(x.unsqueeze(1), y, dim=-1)
    mutual = torch.zeros(12, 15)
    for i in range(12):
        for j in range(15):
            mutual[i, j] = (cosine[i] > cosine[i, j]).sum() < 4 and (cosine[:, j] > cosine[i, j]).sum() < 4
    assert 0 < mutual.sum() < 48
    torch.testing.assert_close(mutual_neighbors(x, y, 4), mutual)

    scores = Scores()
    minibatch = measured(mosaic, np.arange(27))
    posteriors = {"a": Posterior(torch.arange(12), x, x), "b": Posterior(torch.arange(12, 27), y, y)}
    assert Anchors(1.0, scores)(posteriors, minibatch) == Pull(1.0, scores)(posteriors, minibatch) == 0
    scores.set(torch.cat([x, y]))
    distance = torch.cdist(x, y).square() / 3
    torch.testing.assert_close(
        Anchors(1.0, scores, 4)(posteriors, minibatch), distance[mutual > 0].mean(), rtol=1e-4, atol=1e-5
    )
    assert Pull(1.0, scores)(posteriors, minibatch) == 0
    moved = torch.cat([x, y])[:, :2] + 1
    scores.set(moved)
    torch.testing.assert_close(Pull(1.0, scores)(posteriors, minibatch), 4.0 / moved.square().sum(-1).mean())
    scores.set(torch.zeros(27, 2))
    torch.testing.assert_close(  # scores of no size count as they are
        Pull(1.0, scores)(posteriors, minibatch), x[:, :2].square().sum(-1).mean() + y[:, :2].square().sum(-1).mean()
    )


# Priors and labels


def test_the_mixture_prior_is_tied_to_the_labels_that_are_known(mosaic):
    torch.manual_seed(0)
    prior = GaussianMixture(4, labels=Labels(mosaic.schema))
    minibatch = measured(mosaic, np.arange(6))
    minibatch.observed["rna"].labels[:3] = torch.tensor([-1, 0, 2])
    z = torch.randn(6, 1, 4)
    normals = [Normal(m, s.exp() + 1e-4) for m, s in zip(prior.loc, prior.log_scale, strict=True)]
    each = torch.stack([n.log_prob(z[:, 0]).sum(-1) for n in normals], -1)
    value = prior(minibatch).log_prob(z)
    assert value.shape == (6, 1)
    torch.testing.assert_close(value[0, 0], each[0].logsumexp(-1) - np.log(3))
    torch.testing.assert_close(value[1:3, 0], each[[1, 2], [0, 2]])
    free = GaussianMixture(4, n_components=7)
    assert len(free.logits) == 7 and free(minibatch).log_prob(z).shape == (6, 1)


def test_labels_are_one_vocabulary(data):
    rna, adt = (data[0][name].copy() for name in ("rna", "adt"))
    adt.obs["celltype"] = adt.obs["celltype"].astype(str).where(adt.obs["celltype"] != "type2", "other")
    spec = {name: ModalitySpec(k, label_key="celltype") for name, k in (("rna", "nb"), ("adt", "nb_mixture"))}
    with pytest.warns(UserWarning, match=r"although others have labels: 'type2' \(rna\), 'other' \(adt\)"):
        mosaic = Mosaic.from_anndata({"rna": rna, "adt": adt}, spec)
        check_labels(mosaic)
    labels = Labels(mosaic.schema)
    assert labels.names == ("other", "type0", "type1", "type2")
    adt.obs["celltype"] = "x" + adt.obs["celltype"].astype(str)
    with pytest.raises(ValueError, match="the labels of modality 'rna' .* have no name in common with those of other"):
        check_labels(Mosaic.from_anndata({"rna": rna, "adt": adt}, spec))


@pytest.mark.parametrize("prior", ["normal", "mixture"])
def test_labels_of_one_modality_are_predicted_in_the_other(prior):
    mdata, truth = simulate(
        400,
        {"rna": 100, "adt": 25},
        patterns=["rna", "adt"],
        types=3,
        links={"adt": 0.9},
        separation=5.0,
        depth=3.0,
        seed=3,
    )
    labels = mdata.obs["celltype"].astype(str)
    rna = mdata["rna"].copy()
    rna.obs["known"] = labels[rna.obs_names].where(np.arange(rna.n_obs) % 2 == 0, "unknown")
    specs = {"rna": ModalitySpec("nb", label_key="known"), "adt": ModalitySpec("nb_mixture")}
    mosaic = Mosaic.from_anndata({"rna": rna, "adt": mdata["adt"].copy()}, specs)
    model = DiagVI(mosaic, linked(mosaic, truth), n_latent=5, n_private=2, n_hidden=32, prior=prior)
    model.train(45, batch_size=128, kl_warmup_epochs=15, learning_rate=5e-3, **QUIET)
    predicted = model.predict_celltype()
    assert list(predicted.columns) == ["prediction", "confidence", "type0", "type1", "type2"]
    np.testing.assert_allclose(predicted.iloc[:, 2:].sum(axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(predicted.iloc[:, 2:].max(axis=1), predicted["confidence"], atol=1e-6)
    correct = predicted["prediction"] == labels[predicted.index]
    assert correct[rna.obs_names].mean() > 0.95 and correct[mdata["adt"].obs_names].mean() > 0.85
    assert metrics.expected_calibration_error(predicted["confidence"], correct) < 0.15
    votes = model.transfer_labels("celltype", "rna", "adt")
    assert (votes["prediction"] == labels[votes.index]).mean() > 0.9
    assert votes["confidence"].between(0, 1).all()
    assert model.transfer_labels("celltype", "rna", "adt", votes.index[:3]).equals(votes.iloc[:3])


# Likelihoods, modalities


@pytest.mark.parametrize(
    "likelihood", ["nb", "zinb", "nb_mixture", "bernoulli", "normal", "log1p_normal", "ziln", "zig"]
)
def test_every_likelihood_trains(data, graph, likelihood):
    adatas = {name: data[0][name].copy() for name in ("rna", "adt")}
    if likelihood == "normal":
        adatas["adt"].X = _values(adatas["adt"].X) - 3.5
    specs = {"rna": ModalitySpec("nb"), "adt": ModalitySpec(likelihood, batch_key="batch")}
    model = small(Mosaic.from_anndata(adatas, specs), graph, linkage=None)
    before = MosaicELBO().loss(model.model, model.guide, measured(model.mosaic, np.arange(model.mosaic.n_cells)))
    model.train(4, batch_size=64, **QUIET)
    after = MosaicELBO().loss(model.model, model.guide, measured(model.mosaic, np.arange(model.mosaic.n_cells)))
    assert np.isfinite(after) and after < before
    assert np.isfinite(model.get_imputed_values("adt", n_samples=2).mean.to_numpy()).all()


def test_three_modalities_share_one_space():
    patterns = {"rna": 1 / 3, "adt": 1 / 3, "image": 1 / 3}
    mdata, truth = simulate(
        900,
        {"rna": 100, "adt": 25, "image": 25},
        likelihoods={"image": "normal"},
        patterns=patterns,
        types=4,
        links={"adt": 0.9, "image": 0.9},
        separation=4.0,
        depth=2.0,
        seed=0,
    )
    mosaic = Mosaic.from_mudata(mdata, {"rna": "nb", "adt": "nb_mixture", "image": "normal"}, batch_key="batch")
    model = DiagVI(mosaic, linked(mosaic, truth), n_latent=6, n_private=2, n_hidden=32)
    model.train(16, batch_size=128, kl_warmup_epochs=8, learning_rate=5e-3, **QUIET)
    latent = {name: model.get_latent_representation(modality=name) for name in patterns}
    labels = {name: mdata[name].obs["celltype"].astype(str) for name in patterns}
    for a in patterns:
        for b in patterns:
            if a != b:
                accuracy = metrics.label_transfer_accuracy(latent[a], labels[a], latent[b], labels[b], 5)
                assert accuracy > 0.85, (a, b)
    images = model.get_imputed_values("image", latent["adt"].index, n_samples=None).mean
    expected = truth.mean["image"][mdata.obs_names.get_indexer(latent["adt"].index)]
    assert np.corrcoef(images.to_numpy().ravel(), expected.ravel())[0, 1] > 0.6


# What it is for


def test_embeddings_of_linked_features_have_the_sign_of_the_link():
    mdata, truth = simulate(
        800, {"rna": 150, "adt": 40}, patterns=["rna", "adt"], links={"adt": 1.0}, negative_links=0.4, seed=3
    )
    mosaic = Mosaic.from_mudata(mdata, batch_key="batch")
    graph = linked(mosaic, truth)
    model = DiagVI(mosaic, graph, n_latent=8, n_hidden=32, n_private=2)
    model.train(15, batch_size=128, learning_rate=5e-3, **QUIET)
    v = model.get_feature_embeddings().to_numpy()
    product = (v[graph.edges[0]] * v[graph.edges[1]]).sum(1)
    assert (graph.sign < 0).sum() >= 10
    assert (np.sign(product) == graph.sign).mean() > 0.95
    nearest = model.nearest_features("adt", "rna", n_neighbors=3)
    assert nearest["score"].abs().max() < 1 + 1e-5 and len(nearest) == 120
    positive = graph.links("adt", "rna").query("sign > 0")
    first = nearest.groupby("adt").head(1).set_index("adt").loc[positive["adt"]]
    assert first["linked"].mean() > 0.8


def test_shared_types_meet_and_a_private_type_stays_alone():
    """Types in other proportions in either modality, and one that the antibodies have not seen."""
    types = 12
    tilt = np.linspace(0.4, 1.6, types)
    mdata, truth = simulate(
        1200,
        {"rna": 200, "adt": 60},
        patterns={"rna": 0.35, "adt": 0.35, "rna+adt": 0.3},
        types={"rna": tilt, "adt": tilt[::-1], "rna+adt": np.ones(types)},
        private={"type11": ["rna"]},
        links={"adt": 0.9},
        separation=5.0,
        depth=3.0,
        seed=0,
    )
    mosaic = unpaired(mdata, batch_key="batch")
    model = DiagVI(mosaic, linked(mosaic, truth))
    model.train(32, learning_rate=5e-3, kl_warmup_epochs=12, **QUIET)
    latent = {}
    for name in ("rna", "adt"):
        z = model.get_latent_representation(modality=name)
        latent[name] = z.set_axis(z.index.str.removeprefix(f"{name}:"))
    paired = latent["rna"].index.intersection(latent["adt"].index)
    assert metrics.foscttm(latent["rna"].loc[paired], latent["adt"].loc[paired]) < 0.05
    nearest = model.nearest_cells("rna", "adt")
    private = mosaic.column("celltype")[nearest.index] == "type11"
    assert nearest.loc[private, "alone"].mean() > 0.75
    assert nearest.loc[~private, "alone"].mean() < 0.25
    assert nearest["nearest"].isin(mosaic.obs_names[mosaic.modalities["adt"].present]).all()


# Tasks


def test_imputation_across_modalities_says_how_sure_it_is(trained, mosaic):
    cells = mosaic.obs_names[mosaic.modalities["rna"].present][:20]
    proteins = trained.get_imputed_values("adt", cells, n_samples=10)
    assert proteins.mean.shape == (20, 12)
    assert (proteins.sd > 0).all(axis=None)
    assert (proteins.quantiles[0.05] <= proteins.quantiles[0.95]).all(axis=None)
    deep = trained.get_imputed_values("adt", cells, library=1000.0, batch="batch0", n_samples=None).mean
    deeper = trained.get_imputed_values("adt", cells, library=2000.0, batch="batch0", n_samples=None).mean
    np.testing.assert_allclose(deeper, 2 * deep, rtol=1e-4)
    other = trained.get_imputed_values("adt", cells, library=1000.0, batch="batch1", n_samples=None).mean
    assert not np.allclose(deep, other)
    draws = trained.posterior_predictive_sample("rna", cells[:5], n_samples=4)
    assert draws.shape == (4, 5, 40) and (draws == np.round(draws)).all()


def test_a_private_variable_of_an_unmeasured_modality_is_a_draw_from_its_prior(trained, mosaic):
    from pyromosaic.data import to_predict

    cells = np.flatnonzero(mosaic.modalities["rna"].present)[:7]
    minibatch = to_predict(mosaic, cells, ("adt", "rna"))
    sites = poutine.trace(trained.guide).get_trace(minibatch).nodes
    assert (sites["z_adt"]["fn"].base_dist.loc == 0).all() and (sites["z_adt"]["fn"].base_dist.scale == 1).all()
    assert (sites["z_rna"]["fn"].base_dist.loc != 0).all()


def test_a_saved_model_is_the_same_and_maps_new_cells(trained, mosaic, data, tmp_path):
    trained.save(tmp_path / "model")
    content = json.loads((tmp_path / "model" / "model.json").read_text())
    assert content["objects"] == [] and set(content["options"]["graph"]) == {"edges", "weight", "sign"}
    alone = DiagVI.load(tmp_path / "model")
    query = alone.register({"adt": data[0]["adt"][:30].copy()})
    again = alone.get_latent_representation(data=query)
    cells = [f"adt:{c}" for c in data[0]["adt"].obs_names[:30]]
    np.testing.assert_allclose(again, trained.get_latent_representation(cells), atol=1e-5)
    pd.testing.assert_frame_equal(
        alone.predict_celltype(data=query).reset_index(drop=True),
        trained.predict_celltype(cells).reset_index(drop=True),
        rtol=1e-4,
    )
    back = DiagVI.load(tmp_path / "model", mosaic)
    back.train(1, **QUIET)
    assert len(back.history) == 1 and "train_penalty/pull" in back.history


def test_what_is_learnt_does_not_depend_on_order_or_hidden_columns(data):
    """Without `obs`, and with the cells of a modality in another order, cells get scores and losses as before."""
    losses = []
    for order in (slice(None), slice(None, None, -1)):
        adatas = {name: data[0][name][order if name == "adt" else slice(None)].copy() for name in ("rna", "adt")}
        for adata in adatas.values():
            adata.obs = adata.obs[[]]
        mosaic = Mosaic.from_anndata(adatas)
        model = small(mosaic, linked(mosaic, data[1]))
        model.scores.set(torch.from_numpy(shared_scores(mosaic, model.graph, model.model.n_latent)))
        elbo = MosaicELBO()
        elbo.loss(model.model, model.guide, measured(mosaic, np.arange(mosaic.n_cells)))
        losses.append({k: float(elbo.terms[k]) for k in ("z", "z_rna", "z_adt", "penalty/sinkhorn", "penalty/pull")})
    for name, loss in losses[0].items():
        assert losses[1][name] == pytest.approx(loss, rel=1e-2), name


@pytest.mark.filterwarnings("ignore:.*like counts")
def test_bad_input_is_refused_in_one_sentence(mosaic, graph, data):
    cases = [
        ({"prior": "student"}, "prior must be 'normal', 'mixture' or a Module; found 'student'"),
        ({"alignment": -1.0}, "alignment must be a number from 0 to 1e9 or Penalty\\(...\\); found -1"),
        ({"graph_weight": -1.0}, "graph_weight must be a number from 0 to 1e9; found -1"),
        ({"n_private": -1}, "n_private must be a whole number from 0 to 100,000; found -1"),
        ({"alignment": "sinkhorn"}, "alignment must be a number from 0 to 1e9 or Penalty\\(...\\); found 'sinkhorn'"),
    ]
    for options, sentence in cases:
        with pytest.raises(ValueError, match=sentence):
            small(mosaic, graph, **options)
    with pytest.raises(ValueError, match="blur must be a number above 0, at most 1e9 or None; found -1"):
        Sinkhorn(blur=-1.0)
    with pytest.raises(ValueError, match="linkage must be 'cca', a DataFrame, a Linkage or None; found 'mnn'"):
        small(mosaic, graph, linkage="mnn").train(1, **QUIET)
    table = pd.DataFrame(np.zeros((2, 3)), index=mosaic.obs_names[:2])
    with pytest.raises(ValueError, match="the linkage has no scores for cell"):
        small(mosaic, graph, linkage=table).train(1, **QUIET)
    with pytest.raises(ValueError, match="no classifier"):
        small(unpaired(data[0]), graph).predict_celltype()
    adatas = {name: data[0][name].copy() for name in ("rna", "adt")}
    real = Mosaic.from_anndata(adatas, {"rna": "nb", "adt": "normal"})
    with pytest.raises(ValueError, match="modality 'adt': all values are integers, like counts"):
        small(real, graph)
    adatas["adt"].X = np.log1p(_values(adatas["adt"].X))
    with pytest.raises(ValueError, match="modality 'adt'"):
        Mosaic.from_anndata(adatas, {"rna": "nb", "adt": "nb_mixture"})


def test_plain_minibatches_of_one_modality_still_train(mosaic, graph):
    model = small(mosaic, graph)
    cells = np.flatnonzero(mosaic.modalities["adt"].present)[:20]
    elbo = MosaicELBO()
    with pyro.validation_enabled(True):
        assert np.isfinite(elbo.loss(model.model, model.guide, measured(mosaic, cells)))
    assert elbo.terms["penalty/sinkhorn"] == 0
    assert len(list(loader(mosaic, cells, 20))) == 1
