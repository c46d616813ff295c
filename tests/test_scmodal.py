import warnings
from dataclasses import replace
from itertools import combinations

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from lightning.pytorch.callbacks import LambdaCallback
from pyro import poutine
from pyro.infer import TraceMeanField_ELBO
from torch.nn.functional import mse_loss, relu, softplus

from pyromosaic import ModalitySpec, Mosaic, ScModal, metrics, simulate
from pyromosaic.data import measured
from pyromosaic.fusion import Posterior
from pyromosaic.guidance import GuidanceGraph, shared_scores
from pyromosaic.linkage import link_recovery, links_from_table
from pyromosaic.penalties import (
    Anchors,
    Discriminator,
    Geometry,
    Pairs,
    Scores,
    kernel_alignment,
    mutual_neighbors,
    row_cosine,
)
from pyromosaic.penalties.kernels import squared_distances
from pyromosaic.train import MosaicELBO
from pyromosaic.train.plan import Optimisation, Plan

QUIET = {"progress_bar": False, "accelerator": "cpu"}
pytestmark = pytest.mark.filterwarnings("ignore:the guidance graph has few links")
REFERENCE = dict(ScModal.presets["reference"].options)


def unpaired(mdata, **options) -> Mosaic:
    """Every row a cell of its own: pairs are forgotten."""
    return Mosaic.from_anndata({name: adata.copy() for name, adata in mdata.mod.items()}, **options)


def linked(mosaic, truth) -> GuidanceGraph:
    """The simulation's links."""
    ends = [(("rna", row.gene), (row.modality, row.feature)) for row in truth.links.itertuples()]
    with warnings.catch_warnings(action="ignore"):
        return GuidanceGraph.from_edges(mosaic, ends, sign=truth.links["sign"])


@pytest.fixture(scope="module")
def data():
    return simulate(160, {"rna": 40, "adt": 12}, links={"adt": 0.8}, types=3, negative_links=0.2, seed=1)


@pytest.fixture(scope="module")
def mosaic(data) -> Mosaic:
    return unpaired(data[0], batch_key="batch")


@pytest.fixture(scope="module")
def graph(mosaic, data) -> GuidanceGraph:
    return linked(mosaic, data[1])


def small(mosaic, graph, **options) -> ScModal:
    with warnings.catch_warnings(action="ignore"):
        return ScModal(mosaic, graph, **{"n_latent": 4, "n_private": 2, "n_hidden": 16, **options})


def reference(mosaic, graph, **options) -> ScModal:
    return small(mosaic, graph, **{**REFERENCE, "n_latent": 4, "n_hidden": 16, **options})


def normals(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def posteriors_of(**points) -> dict[str, Posterior]:
    ends = np.cumsum([0, *map(len, points.values())])
    return {
        name: Posterior(torch.arange(start, end), z, torch.zeros_like(z))
        for (name, z), start, end in zip(points.items(), ends[:-1], ends[1:], strict=True)
    }


# The program


def test_sites_and_shapes_read_like_the_story(mosaic, graph):
    minibatch = measured(mosaic, np.arange(0, mosaic.n_cells, 8))
    n = {name: len(view.rows) for name, view in minibatch.decoded.items()}

    def shapes(model):
        nodes = poutine.trace(model.model).get_trace(minibatch).nodes
        return {
            name: tuple(site["fn"].batch_shape + site["fn"].event_shape)
            for name, site in nodes.items()
            if site["type"] == "sample" and not name.endswith(("cells", "features"))
        }

    common = {"z": (len(minibatch), 1, 4), "rna": (n["rna"], 40), "adt": (n["adt"], 12)}
    private = {"z_rna": (n["rna"], 1, 2), "z_adt": (n["adt"], 1, 2)}
    assert shapes(small(mosaic, graph)) == common | private
    assert shapes(reference(mosaic, graph)) == common


def test_every_term_of_the_reference_is_the_formula(mosaic, graph):
    """The loss written out with plain matrix products, for fixed weights."""
    model = reference(mosaic, graph, anchors=Anchors(1.0, n_neighbors=8))
    minibatch = measured(mosaic, np.arange(0, mosaic.n_cells, 3))
    model.matches["rna", "adt"].set(torch.from_numpy(model.linked_features(mosaic, "rna", "adt")))
    elbo = MosaicELBO()
    loss = elbo.differentiable_loss(model.model, model.guide, minibatch)

    def net(module, x):
        parameters = list(module.parameters())
        for i in range(0, len(parameters), 2):
            x = x @ parameters[i].T + parameters[i + 1]
            x = relu(x) if i + 2 < len(parameters) else x
        return x

    x, z, encoders, decoders = {}, {}, {}, {}
    for name, view in minibatch.observed.items():
        counts, size = view.dense_counts(), mosaic.schema[name].library
        scaling = model.guide.modalities[name].encoder.scaling
        x[name] = (torch.log1p(counts * size / view.library) - scaling.mean) / scaling.sd
        encoders[name] = model.guide.modalities[name].encoder.network
        decoders[name] = model.model.modalities[name].decoder.network
        z[name] = net(encoders[name], x[name])
    a, b = z["rna"], z["adt"]
    d = model.guide.penalties[0].penalties[0].network
    expected = {
        "penalty/adversary": -(softplus(-net(d, a).clamp(-50, 50)).mean() + softplus(net(d, b).clamp(-50, 50)).mean()),
        "penalty/cycle": 10
        * (
            mse_loss(net(encoders["adt"], net(decoders["adt"], a)), a)
            + mse_loss(net(encoders["rna"], net(decoders["rna"], b)), b)
        ),
    }
    links = graph.links("rna", "adt")
    columns = {
        name: [mosaic.schema[name].features.index(feature) for feature in links[name]] for name in ("rna", "adt")
    }
    u, v = x["rna"][:, columns["rna"]].numpy(), x["adt"][:, columns["adt"]].numpy() * links["sign"].to_numpy()
    assert (links["sign"] < 0).any()
    cosine = (u @ v.T) / np.linalg.norm(u, axis=1)[:, None] / np.linalg.norm(v, axis=1)
    rank_row = (-cosine).argsort(1).argsort(1)
    rank_column = (-cosine).argsort(0).argsort(0)
    anchors = torch.from_numpy((rank_row < 8) & (rank_column < 8))
    assert 0 < anchors.sum() < anchors.numel() / 2
    distances = (a.unsqueeze(1) - b).square().mean(-1)
    expected["penalty/anchors"] = distances[anchors].mean()
    cosines = []
    for name in z:
        kernels = []
        for values in (x[name], z[name]):
            naive = (values.unsqueeze(1) - values).square().sum(-1)
            kernels.append(torch.exp(-naive / (2 * values.shape[1])))
        top = (kernels[0] * kernels[1]).sum(1)
        cosines.append((top / kernels[0].norm(dim=1) / kernels[1].norm(dim=1)).clamp_max(0.975).mean())
    expected["penalty/geometry"] = -10 * sum(cosines)
    for name, value in expected.items():
        torch.testing.assert_close(elbo.terms[name] / mosaic.n_cells, value.detach(), rtol=1e-4, atol=1e-4, msg=name)
    assert set(elbo.terms) == {*expected, "z", "rna", "adt"} and elbo.terms["z"] == 0
    for name in x:
        p = x[name].shape[1]
        mean_square = 10 * (net(decoders[name], z[name]) - x[name]).square().mean()
        constant = 10 * p * 0.5 * np.log(2 * np.pi * p / 2)
        torch.testing.assert_close(
            elbo.terms[name] / mosaic.n_cells, (mean_square + constant).detach(), rtol=1e-4, atol=1e-3
        )
        expected[name] = mean_square
    parts = [part.encoder for _, part in model.guide.modalities.items()]
    parts += [part.decoder for _, part in model.model.modalities.items()]
    parameters = [parameter for part in parts for parameter in part.parameters()]
    for ours, theirs in zip(
        torch.autograd.grad(loss / mosaic.n_cells, parameters),
        torch.autograd.grad(sum(expected.values()), parameters),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def test_elbo_and_gradients_are_those_of_pyro(mosaic, graph):
    model = small(mosaic, graph)
    minibatch = measured(mosaic, np.arange(0, mosaic.n_cells, 7))
    results = []
    for elbo in (MosaicELBO(), TraceMeanField_ELBO()):
        torch.manual_seed(0)
        loss = elbo.differentiable_loss(model.model, model.guide, minibatch, 0.5)
        parameters = [*model.model.parameters(), *model.guide.parameters()]
        results.append([loss, *torch.autograd.grad(loss, parameters, allow_unused=True)])
    for ours, pyros in zip(*results, strict=True):
        torch.testing.assert_close(ours, pyros, rtol=1e-4, atol=1e-3)


def test_all_modalities_count_alike(mosaic, graph):
    model = small(mosaic, graph)
    rna = np.flatnonzero(mosaic.modalities["rna"].present)[:10]
    adt = np.flatnonzero(mosaic.modalities["adt"].present)
    terms = []
    for n in (10, 40):
        elbo = MosaicELBO()
        torch.manual_seed(0)
        elbo.loss(model.model, model.guide, measured(mosaic, np.concatenate([rna, adt[:n]])))
        terms.append(float(elbo.terms["rna"]) / mosaic.n_cells)
    assert terms[0] == pytest.approx(terms[1], rel=0.05)  # the noise differs, the weight does not


# Penalties


def test_kernels_need_no_tensor_of_cells_cells_features():
    x, z = normals(0, 30, 7), normals(1, 30, 3)
    naive = (x.unsqueeze(1) - x).square().sum(-1)
    torch.testing.assert_close(squared_distances(x), naive, rtol=1e-4, atol=1e-4)
    k, l = (torch.exp(-(v.unsqueeze(1) - v).square().sum(-1) / (2 * v.shape[1])) for v in (x, z))  # noqa: E741
    expected = torch.nn.functional.cosine_similarity(k, l, dim=1).clamp_max(0.975).mean()
    torch.testing.assert_close(row_cosine(x, z), expected)


def test_alignment_is_the_unbiased_estimate_and_does_not_saturate():
    x, z = normals(0, 12, 5), normals(1, 12, 3)

    def hsic(k, l):  # Song et al. 2012, equation 5  # noqa: E741
        n = len(k)
        k, l = k * (1 - np.eye(n)), l * (1 - np.eye(n))  # noqa: E741
        one = np.ones(n)
        middle = (one @ k @ one) * (one @ l @ one) / ((n - 1) * (n - 2))
        return (np.trace(k @ l) + middle - 2 / (n - 2) * (one @ k @ l @ one)) / (n * (n - 3))

    kernels = []
    for v in (x, z):
        distances = torch.cdist(v, v).square().double().numpy()
        kernels.append(np.exp(-distances / (distances.sum() / (12 * 11))))
    k, l = kernels  # noqa: E741
    expected = hsic(k, l) / np.sqrt(hsic(k, k) * hsic(l, l))
    assert float(kernel_alignment(x, z)) == pytest.approx(expected, abs=1e-5)
    turned = 3 * x @ torch.linalg.qr(normals(2, 5, 5)).Q + 1
    assert float(kernel_alignment(x, turned)) == pytest.approx(1, abs=1e-4)
    wide, unrelated = normals(3, 60, 2000), normals(4, 60, 4)
    assert row_cosine(wide, unrelated) > 0.9 and abs(kernel_alignment(wide, unrelated).item()) < 0.1
    assert kernel_alignment(x[:3], z[:3]) == 0
    same = torch.zeros(12, 3, requires_grad=True)
    kernel_alignment(x, same).backward()
    assert torch.isfinite(same.grad).all()


def test_no_gradient_of_the_reference_geometry_above_the_ceiling():
    x = torch.zeros(20, 10)
    near = (1e-3 * normals(1, 20, 4)).requires_grad_()
    value = row_cosine(x, near)
    value.backward()
    assert value.item() == pytest.approx(0.975)
    assert (near.grad == 0).all()
    far = (5 * normals(1, 20, 4)).requires_grad_()
    value = row_cosine(x, far)
    value.backward()
    assert value.item() < 0.9 and (far.grad != 0).any()


def test_the_adversary_is_minus_its_loss_and_leaves_the_network_alone():
    z = posteriors_of(rna=normals(0, 9, 4).requires_grad_(), adt=normals(1, 14, 4).requires_grad_())
    torch.manual_seed(0)
    adversary = Discriminator(1.0, 4, 16).eval()
    value = adversary(z, None)
    loss = adversary.loss(z["rna"].loc, z["adt"].loc)
    torch.testing.assert_close(value, -loss)
    ours = torch.autograd.grad(value, [q.loc for q in z.values()], retain_graph=True)
    theirs = torch.autograd.grad(loss, [q.loc for q in z.values()])
    for mine, its in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, -its)
    assert torch.autograd.grad(value, list(adversary.parameters()), allow_unused=True) == (None,) * 6
    for parameter in adversary.parameters():
        parameter.data.zero_()
    assert adversary(z, None).item() == pytest.approx(-2 * np.log(2))
    adversary.network[-1].bias.data.fill_(80.0)
    assert adversary(z, None).item() == pytest.approx(-50)  # scores are cut off


def test_the_adversary_takes_its_own_steps():
    z = posteriors_of(rna=normals(0, 20, 4), adt=normals(1, 20, 4) + 1)
    torch.manual_seed(0)
    adversary = Discriminator(1.0, 4, 16, n_steps=5, weight_decay=1e-3)
    twin = Discriminator(1.0, 4, 16)
    twin.load_state_dict(adversary.state_dict())
    adam = torch.optim.Adam(twin.parameters(), lr=1e-3, weight_decay=1e-3)
    for _ in range(5):
        adam.zero_grad()
        twin.loss(z["rna"].loc, z["adt"].loc).backward()
        adam.step()
    value = adversary(z, None)
    torch.testing.assert_close(value, -twin.loss(z["rna"].loc, z["adt"].loc))
    for mine, its in zip(adversary.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine, its)
        assert mine.grad is None
    before = {k: v.clone() for k, v in adversary.state_dict().items()}
    with torch.no_grad():
        adversary(z, None)
    adversary.eval()(z, None)
    for name, values in adversary.state_dict().items():
        torch.testing.assert_close(values, before[name])


def test_the_plan_leaves_the_network_to_its_own_optimiser(mosaic, graph):
    model = small(mosaic, graph)
    plan = Plan(model.model, model.guide, Optimisation(schedule="constant"), 1)
    optimiser = plan.configure_optimizers()
    network = {id(p) for p in model.guide.penalties[0].parameters()}
    assert network and not network & {id(p) for group in optimiser.param_groups for p in group["params"]}
    assert len(plan.own_optimisers) == 1


def test_anchors_are_the_same_from_either_side():
    x, y = normals(0, 20, 3), normals(1, 25, 3)
    torch.testing.assert_close(mutual_neighbors(x, y, 4), mutual_neighbors(y, x, 4).T)
    scores = Scores()
    scores.set(torch.cat([x, y]))
    z = posteriors_of(rna=normals(2, 20, 2), adt=normals(3, 25, 2))
    minibatch = _index(45)
    swapped = {"adt": z["adt"], "rna": z["rna"]}
    torch.testing.assert_close(Anchors(1.0, scores, 4)(z, minibatch), Anchors(1.0, scores, 4)(swapped, minibatch))


class _index:
    """What anchors look at in a minibatch."""

    def __init__(self, n):
        self.index = torch.arange(n)


def test_nothing_breaks_without_anchors():
    scores = Scores()
    scores.set(torch.cat([torch.zeros(5, 2), torch.zeros(6, 2)]))
    z = posteriors_of(rna=normals(0, 5, 2), adt=normals(1, 6, 2))
    assert torch.isfinite(Anchors(1.0, scores, 1)(z, _index(11)))
    # cell 0 is nearest to all, its nearest is cell 0: leave one mutual pair; then none in what is left
    scores.set(torch.tensor([[1.0, 0.0], [0.9, 0.1], [1.0, 0.01], [-1.0, 0.0]]))
    pair = posteriors_of(rna=normals(0, 2, 2), adt=normals(1, 2, 2))
    assert torch.isfinite(Anchors(1.0, scores, 1)(pair, _index(4)))
    assert Anchors(1.0, Scores())(pair, _index(4)) == 0


def test_a_chain_of_two_is_the_pair_and_of_three_skips_the_ends():
    points = posteriors_of(a=normals(0, 8, 3), b=normals(1, 9, 3), c=normals(2, 7, 3))
    torch.manual_seed(0)
    each = {pair: Discriminator(1.0, 3, 8).eval() for pair in (("a", "b"), ("b", "c"))}
    alone = {pair: penalty({k: points[k] for k in pair}, None) for pair, penalty in each.items()}
    two = {k: points[k] for k in "ab"}
    torch.testing.assert_close(Pairs(1.0, {("a", "b"): each["a", "b"]})(two, None), alone["a", "b"])
    torch.testing.assert_close(Pairs(1.0, each)(points, None), alone["a", "b"] + alone["b", "c"])
    torch.testing.assert_close(Pairs(1.0, each)(two, None), alone["a", "b"])  # c is in no cell of the minibatch
    assert Pairs(1.0, each)({"a": points["a"]}, None) == 0


def test_the_order_of_cells_does_not_matter(mosaic, graph):
    model = reference(mosaic, graph)
    model.matches["rna", "adt"].set(torch.from_numpy(model.linked_features(mosaic, "rna", "adt")))
    cells = np.arange(0, mosaic.n_cells, 3)
    shuffled = np.random.default_rng(0).permutation(cells)
    terms = []
    for index in (cells, shuffled):
        elbo = MosaicELBO()
        elbo.loss(model.model, model.guide, measured(mosaic, index))
        terms.append(elbo.terms)
    assert set(terms[0]) == set(terms[1])
    for name, value in terms[0].items():
        torch.testing.assert_close(value, terms[1][name], rtol=1e-4, atol=1e-2, msg=name)


@pytest.mark.parametrize("likelihood", ["nb", "nb_mixture", "bernoulli", "normal", "log1p_normal", "ziln", "zig"])
def test_every_likelihood_trains(data, likelihood):
    adatas = {name: data[0][name].copy() for name in ("rna", "adt")}
    if likelihood == "normal":
        adatas["adt"].X = _values(adatas["adt"].X) - 3.5
    specs = {"rna": ModalitySpec("nb"), "adt": ModalitySpec(likelihood, batch_key="batch")}
    mosaic = Mosaic.from_anndata(adatas, specs)
    model = small(mosaic, None, linkage=None)
    cells = measured(mosaic, np.arange(mosaic.n_cells))
    before = MosaicELBO().loss(model.model, model.guide, cells)
    model.train(3, batch_size=128, **QUIET)
    after = MosaicELBO()
    assert after.loss(model.model, model.guide, cells) < before
    assert 0 < after.terms["penalty/cycle"] < np.inf
    estimate = model.get_imputed_values("adt", n_samples=3, quantiles=())
    assert np.isfinite(estimate.mean.to_numpy()).all() and (estimate.sd.to_numpy() > 0).any()


def _values(x):
    return x.toarray() if hasattr(x, "toarray") else np.asarray(x)


# Alignment and tasks


@pytest.fixture(scope="module")
def simulated():
    return simulate(
        200,
        {"rna": 60, "adt": 25},
        patterns=["rna+adt"],
        types=4,
        links={"adt": 0.9},
        separation=3.0,
        depth=5.0,
        seed=3,
    )


@pytest.fixture(scope="module")
def trained(simulated) -> ScModal:
    mosaic = unpaired(simulated[0], batch_key="batch")
    model = small(mosaic, linked(mosaic, simulated[1]), n_latent=6, n_hidden=32, adversary=Discriminator(n_steps=1))
    model.train(45, batch_size=200, learning_rate=5e-3, kl_warmup_epochs=8, **QUIET)
    return model


def _named(index, name, cells) -> list[str]:
    """Cells that two tables have are named by modality; the others keep their name."""
    return [f"{name}:{cell}" if f"{name}:{cell}" in index else cell for cell in cells]


def aligned(model, mdata) -> float:
    latent = model.get_latent_representation()
    both = mdata["rna"].obs_names.intersection(mdata["adt"].obs_names)
    own = [latent.loc[_named(latent.index, name, both)] for name in ("rna", "adt")]
    return float(metrics.foscttm(*(values.to_numpy() for values in own)))


def test_pairs_are_found_and_labels_cross(trained, simulated):
    assert aligned(trained, simulated[0]) < 0.2
    votes = trained.transfer_labels("celltype", "rna", "adt")
    truth = simulated[0].obs["celltype"].astype(str)
    assert (votes["prediction"] == truth[votes.index.str.removeprefix("adt:")].to_numpy()).mean() > 0.8


def test_the_deterministic_program_aligns_too(simulated):
    """With heavier anchors of fewer neighbours, and one step of the discriminator: not the reference's own weights."""
    mosaic = unpaired(simulated[0])
    parts = {"anchors": Anchors(10.0, n_neighbors=10), "adversary": Discriminator(n_steps=1)}
    options = {"n_hidden": 64, "n_latent": 8, **parts}
    model = reference(mosaic, linked(mosaic, simulated[1]), **options)
    training = {**ScModal.presets["reference"].training, "max_steps": 100, "batch_size": 400}
    model.train(**training | QUIET)
    assert len(model.history) == 100
    assert aligned(model, simulated[0]) < 0.3
    counts = _values(simulated[0]["rna"].X)
    cells = "adt:" + simulated[0]["adt"].obs_names
    estimate = model.get_imputed_values("rna", cells, n_samples=2)
    assert (estimate.sd.to_numpy() == 0).all() and (estimate.mean.to_numpy() >= 0).all()
    truth = pd.DataFrame(counts, "adt:" + simulated[0]["rna"].obs_names, simulated[0]["rna"].var_names)
    assert np.log1p(estimate.mean).corrwith(np.log1p(truth.loc[cells])).mean() > 0.2


def test_the_other_modality_is_imputed_with_uncertainty(trained, simulated):
    mdata = simulated[0]
    cells = "rna:" + mdata["rna"].obs_names
    estimate = trained.get_imputed_values("adt", cells, n_samples=10)
    truth = pd.DataFrame(_values(mdata["adt"].X), "rna:" + mdata["adt"].obs_names, mdata["adt"].var_names)
    r = np.log1p(estimate.mean).corrwith(np.log1p(truth.loc[cells]), method="spearman")
    assert r.mean() > 0.25
    assert (estimate.sd.to_numpy() > 0).all()


def test_paired_cells_are_taken_apart(data, graph):
    paired = Mosaic.from_mudata(data[0], batch_key="batch")
    model = small(paired, graph)
    assert model.mosaic.n_cells == data[0]["rna"].n_obs + data[0]["adt"].n_obs
    assert (model.mosaic.presence.sum(axis=1) == 1).all()


@pytest.mark.parametrize("build", [small, reference])
def test_saved_models_answer_alike_also_about_new_cells(mosaic, graph, data, tmp_path, build):
    model = build(mosaic, graph)
    model.train(2, batch_size=128, validation=0.0, **QUIET)
    model.save(tmp_path)
    loaded = ScModal.load(tmp_path, mosaic)
    pd.testing.assert_frame_equal(loaded.get_latent_representation(), model.get_latent_representation())
    some = {name: adata[:7].copy() for name, adata in data[0].mod.items()}
    new = loaded.register(some)
    latent = loaded.get_latent_representation(data=new)
    cell = data[0]["adt"].obs_names[0]
    whole = model.get_latent_representation()
    row = whole.loc[cell if cell in whole.index else f"adt:{cell}"]
    np.testing.assert_allclose(latent.loc[f"adt:{cell}" if f"adt:{cell}" in latent.index else cell], row, atol=1e-5)


def test_three_modalities_form_a_chain_or_all_pairs():
    mdata, _ = simulate(
        150,
        {"rna": 40, "adt": 12, "image": 12},
        likelihoods={"rna": "nb", "adt": "nb_mixture", "image": "normal"},
        patterns=["rna", "adt", "image"],
        seed=5,
    )
    mosaic = unpaired(mdata, modalities={"rna": "nb", "adt": "nb_mixture", "image": "normal"})
    chain = small(mosaic, None, linkage=None)
    assert list(chain.matches) == [("rna", "adt"), ("adt", "image")]
    model = small(mosaic, None, linkage=None, pairs="all")
    assert list(model.matches) == [("rna", "adt"), ("rna", "image"), ("adt", "image")]
    model.train(1, batch_size=200, validation=0.0, **QUIET)
    assert np.isfinite(model.history["train_objective"]).all()


def test_three_data_sets_in_a_chain_are_aligned_pair_by_pair():
    sizes = {"adt": 150, "rna": 100, "image": 40}
    kinds = {"adt": "nb_mixture", "rna": "nb", "image": "normal"}
    mdata, truth = simulate(
        200,
        sizes,
        likelihoods=kinds,
        patterns=["adt+rna+image"],
        types=12,
        links={"adt": 1.0, "image": 1.0},
        separation=2.0,
        depth=10.0,
        seed=3,
    )
    mosaic = unpaired(mdata, modalities=kinds)
    model = small(mosaic, linked(mosaic, truth), n_latent=12, n_hidden=64, adversary=Discriminator(n_steps=1))
    assert list(model.matches) == [("adt", "rna"), ("rna", "image")]
    model.train(20, batch_size=100, learning_rate=5e-3, kl_warmup_epochs=5, **QUIET)
    latent = model.get_latent_representation()
    cells = {name: latent.loc[_named(latent.index, name, mdata[name].obs_names)] for name in sizes}
    for a, b in combinations(sizes, 2):
        assert metrics.foscttm(cells[a].to_numpy(), cells[b].to_numpy()) < 0.05, (a, b)


# No answer leaks in


def test_the_linkage_follows_rows_that_are_permuted(mosaic, graph, data):
    adatas = {name: adata.copy() for name, adata in data[0].mod.items()}
    order = np.random.default_rng(0).permutation(adatas["adt"].n_obs)
    adatas["adt"] = adatas["adt"][order].copy()
    permuted = Mosaic.from_anndata(adatas, batch_key="batch")
    scores = [pd.DataFrame(shared_scores(m, graph, small(m, graph).n_latent), m.obs_names) for m in (mosaic, permuted)]
    np.testing.assert_allclose(scores[1].loc[mosaic.obs_names], scores[0], atol=1e-4)


def test_labels_have_no_influence(data, graph):
    latents = []
    for columns in (["batch", "celltype"], ["batch"]):
        adatas = {name: adata[::2].copy() for name, adata in data[0].mod.items()}
        for adata in adatas.values():
            adata.obs = adata.obs[columns]
        model = small(Mosaic.from_anndata(adatas, batch_key="batch"), graph)
        model.train(2, batch_size=64, **QUIET)
        latents.append(model.get_latent_representation())
    pd.testing.assert_frame_equal(*latents)


def test_shuffled_features_come_out_at_chance(simulated):
    rng = np.random.default_rng(0)
    adatas = {name: adata.copy() for name, adata in simulated[0].mod.items()}
    for adata in adatas.values():
        adata.X = rng.permuted(_values(adata.X), axis=0)
    mosaic = Mosaic.from_anndata(adatas)
    model = small(mosaic, linked(mosaic, simulated[1]), adversary=Discriminator(n_steps=1))
    with pytest.warns(UserWarning, match="it is not clear that the links match the right cells"):
        model.train(8, batch_size=200, **QUIET)
    assert abs(aligned(model, simulated[0]) - 0.5) < 0.06


def test_the_same_matrix_on_both_sides_is_refused(data):
    rna = data[0]["rna"].copy()
    mosaic = Mosaic.from_anndata({"rna": rna, "again": rna.copy()}, modalities={"rna": "nb", "again": "nb"})
    with pytest.raises(ValueError, match="hold the same measurements"):
        small(mosaic, None).train(1, **QUIET)
    model = small(mosaic, None, linkage=None)
    latent = model.get_latent_representation(modality="rna")
    with pytest.raises(ValueError, match="same matrix"):
        metrics.foscttm(latent, latent)


# Anchors by the embedding, attention, links


def test_anchors_are_sought_anew_by_scores_and_embedding(mosaic, graph):
    model = small(mosaic, graph, refresh_every=2)
    seen = []
    watch = LambdaCallback(on_train_epoch_end=lambda *_: seen.append(model.matches["rna", "adt"].values.clone()))
    model.train(4, batch_size=128, callbacks=[watch], **QUIET)
    torch.testing.assert_close(seen[0], model.scores.values)
    torch.testing.assert_close(seen[1], model.scores.values)
    width = model.scores.values.shape[1]
    torch.testing.assert_close(seen[2][:, :width], torch.nn.functional.normalize(model.scores.values))
    assert seen[2].shape == (mosaic.n_cells, width + 4) and torch.equal(seen[2], seen[3])
    z = seen[2][:, width:]
    torch.testing.assert_close(z.norm(dim=1), torch.ones(len(z)))
    again = small(mosaic, graph, refresh_every=2)
    again.train(3, batch_size=128, **QUIET)
    assert again.matches["rna", "adt"].values.shape == seen[2].shape
    again.train(1, batch_size=128, **QUIET)  # begins at the linkage again
    torch.testing.assert_close(again.matches["rna", "adt"].values, again.scores.values)


def test_attention_sees_all_features_and_trains(mosaic, graph):
    model = small(mosaic, graph, encoder="attention")
    encoder = model.guide.modalities["rna"].encoder
    view = measured(mosaic, np.arange(0, mosaic.n_cells, 8)).observed["rna"]
    loc, scale = encoder(view)
    assert loc.shape == scale.shape == (len(view.rows), 6) and (scale > 0).all()
    x = encoder.scaling(view).requires_grad_()
    encoder.posterior(x, view)[0].sum().backward()
    assert (x.grad != 0).any(0).all()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in encoder.hidden.parameters())
    half = encoder.posterior(x[:5], _rows(view, 5))[0]
    torch.testing.assert_close(half, loc[:5], rtol=1e-4, atol=1e-5)  # cells do not see each other
    model.train(15, batch_size=128, **QUIET)
    elbo = model.history["train_elbo"]
    assert elbo.iloc[-1] > elbo.iloc[0]
    assert np.isfinite(model.get_latent_representation()).all(axis=None)


def _rows(view, n):
    return replace(view, rows=view.rows[:n], codes=view.codes[:n], continuous=view.continuous[:n])


@pytest.fixture(scope="module")
def part():
    """A model that was given two thirds of the links, and the other third."""
    mdata, truth = simulate(
        300,
        {"rna": 60, "adt": 60},
        patterns=["rna+adt"],
        types=10,
        links={"adt": 0.8},
        separation=2.0,
        depth=10.0,
        seed=3,
    )
    mosaic = unpaired(mdata, batch_key="batch")
    links = linked(mosaic, truth).links("rna", "adt")
    out = np.random.default_rng(0).permutation(len(links)) < len(links) // 3
    graph = GuidanceGraph.from_table(mosaic, links[~out].reset_index(drop=True))
    model = small(mosaic, graph, n_latent=8, n_hidden=32, adversary=Discriminator(n_steps=1))
    model.train(20, batch_size=200, learning_rate=5e-3, kl_warmup_epochs=5, **QUIET)
    return model, links[out].reset_index(drop=True)


def test_links_that_were_left_out_are_found(part):
    model, left_out = part
    table = model.feature_links("rna", "adt")
    assert table.columns.tolist() == ["rna", "adt", "correlation", "mutual"]
    everything = model.feature_links("rna", "adt", level=1.0)
    assert 0 < len(table) < len(everything) == 60 * 60
    assert table["correlation"].abs().is_monotonic_decreasing
    signed = everything.assign(rank=everything["correlation"].rank(pct=True)).merge(left_out, on=["rna", "adt"])
    assert len(signed) == len(left_out) == 16
    assert (np.sign(signed["correlation"]) == signed["sign"]).mean() > 0.9
    assert (signed["sign"] == 1).all() and signed["rank"].mean() > 0.7  # by chance 0.5 ± 0.07
    best = everything[everything["correlation"] > 0].groupby("adt").head(5)
    precision, recall = link_recovery(best, links_from_table(model.mosaic, ("rna", "adt"), left_out[["rna", "adt"]]))
    assert recall > 0.25 and precision > 0.15  # by chance 5 of 60, and 1 of 16


def test_unrelated_latent_spaces_have_no_links(part, monkeypatch):
    model, _ = part
    turn = torch.linalg.qr(normals(5, 8, 8)).Q
    z = torch.tensor(model.get_latent_representation().to_numpy())
    spread = torch.linalg.cholesky(torch.cov(z.T))
    expected = model.cycle.expected

    def turned(name, values):
        centre = z.mean(0)
        white = torch.linalg.solve_triangular(spread, (values - centre).T, upper=False)
        return expected(name, values if name == "rna" else centre + (spread @ turn @ white).T)

    aligned_links = len(model.feature_links("rna", "adt"))
    monkeypatch.setattr(model.cycle, "expected", turned)
    assert len(model.feature_links("rna", "adt")) <= 1 < aligned_links


def test_agreement_of_links_tells_an_aligned_model(part):
    model, left_out = part
    mosaic = model.mosaic
    value = model.link_agreement(left_out[["rna", "adt", "sign"]], n_neighbors=7)
    z = model.get_latent_representation().to_numpy()
    scaled, rows, r = {}, {}, []
    for name, modality in mosaic.modalities.items():
        rows[name] = np.flatnonzero(modality.present)
        view = measured(mosaic, rows[name]).observed[name]
        scaled[name] = model.guide.modalities[name].encoder.scaling(view).numpy()
    for a, b in (("rna", "adt"), ("adt", "rna")):
        distances = ((z[rows[a]][:, None] - z[rows[b]]) ** 2).sum(-1)
        near = distances.argsort(1)[:, :7]
        for link in left_out.itertuples():
            column = {name: mosaic.schema[name].features.index(getattr(link, name)) for name in (a, b)}
            mean = scaled[b][:, column[b]][near].mean(1) * link.sign
            r.append(np.corrcoef(scaled[a][:, column[a]], mean)[0, 1])
    assert value == pytest.approx(np.mean(r), abs=1e-3)
    untrained = small(mosaic, model.graph, n_latent=8, n_hidden=32)
    assert value > 0.15 > abs(untrained.link_agreement(left_out[["rna", "adt", "sign"]]))


def test_the_reference_says_what_it_cannot_answer(mosaic, graph, data):
    model = reference(mosaic, graph)
    with pytest.raises(ValueError, match="modality 'adt' has no foreground here"):
        model.get_protein_foreground_probability()
    assert np.isfinite(model.get_normalized_expression("adt")).all(axis=None)
    assert np.isfinite(model.get_cell_factors()["rna"].dropna()).all()
    regions = Mosaic.from_anndata({"rna": data[0]["rna"].copy(), "atac": data[0]["adt"].copy()})
    open_or_not = reference(regions, None, linkage=None)
    with pytest.raises(ValueError, match="modality 'atac' has no region factors here"):
        open_or_not.get_region_factors()
    assert np.isfinite(open_or_not.get_accessibility_estimates()).all(axis=None)


# Bad input


def test_bad_input_is_answered_in_one_sentence(mosaic, graph, data):
    adatas = {name: adata.copy() for name, adata in data[0].mod.items()}
    with pytest.raises(ValueError, match="modality 'adt' must have at least 2 cells; found 1"):
        small(Mosaic.from_anndata({**adatas, "adt": adatas["adt"][:1].copy()}), graph)
    with pytest.raises(ValueError, match="needs at least 2 modalities; found 'rna'"):
        small(Mosaic.from_anndata({"rna": adatas["rna"]}), None, linkage=None)
    with pytest.raises(ValueError, match="no feature names in common"):
        small(mosaic, None)
    with pytest.raises(ValueError, match="a deterministic program has no private variables"):
        reference(mosaic, graph, n_private=2)
    with pytest.raises(ValueError, match="geometry must be .* or Geometry.* found 'cosine'"):
        small(mosaic, graph, geometry="cosine")
    with pytest.raises(ValueError, match="likeness must be a function or one of 'alignment', 'cosine'; found 'flat'"):
        Geometry(likeness="flat")
    with pytest.raises(ValueError, match="anchors must be a number from 0 to 1e9 or Anchors\\(...\\); found"):
        small(mosaic, graph, anchors=Geometry())
    for wrong in ({"pairs": "ring"}, {"encoder": "graph"}):
        with pytest.raises(ValueError, match="must be"):
            small(mosaic, graph, **wrong)
    with pytest.raises(ValueError, match="refresh_every must be a whole number from 0"):
        small(mosaic, graph, refresh_every=-1)
    with pytest.raises(ValueError, match="linkage must be"):
        small(mosaic, graph, linkage="labels")
    with pytest.raises(ValueError, match="likelihood_weight must be a number from 0"):
        small(mosaic, graph, likelihood_weight=-1.0)
    with pytest.raises(ValueError, match="must be a number from 0"):
        small(mosaic, graph, geometry=-1.0)
    own = pd.DataFrame(np.zeros((3, 2)), mosaic.obs_names[:3])
    with pytest.raises(ValueError, match="the linkage has no scores for cell"):
        small(mosaic, None, linkage=own).train(1, **QUIET)


def test_linked_features_that_do_not_vary_are_left_out(mosaic, graph, data):
    rows = graph.links("rna", "adt")
    adatas = {name: adata.copy() for name, adata in data[0].mod.items()}
    x = _values(adatas["rna"].X).astype(np.float32)
    constant = rows["rna"].iloc[0]
    x[:, adatas["rna"].var_names.get_loc(constant)] = 0
    adatas["rna"] = anndata.AnnData(x, adatas["rna"].obs, adatas["rna"].var)
    quiet = Mosaic.from_anndata(adatas)
    model = reference(quiet, graph)
    assert model.linked_features(quiet, "rna", "adt").shape[1] == (rows["rna"] != constant).sum()
    model.train(1, batch_size=400, validation=0.0, **QUIET)
    assert np.isfinite(model.history["train_objective"]).all()
    with warnings.catch_warnings(action="ignore"):
        single = GuidanceGraph.from_edges(quiet, [(("rna", constant), ("adt", rows["adt"].iloc[0]))])
    with pytest.raises(ValueError, match="no linked features that vary, out of 1"):
        reference(quiet, single).train(1, **QUIET)


def test_few_cells_are_linked_by_few_components(data, graph):
    few = {name: adata[:20].copy() for name, adata in data[0].mod.items()}
    model = small(Mosaic.from_anndata(few), graph)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".* of 10 links are left out|it is not clear that the links match")
        model.train(1, **QUIET)
    assert model.scores.values.shape[0] == 40
