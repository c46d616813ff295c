"""A modality's part in model and guide: names that data give, what is encoded once, and whose the objects are."""

import re

import numpy as np
import pandas as pd
import pyro
import pytest
import torch
from mudata import MuData
from pyro import distributions as dist
from pyro.nn import PyroSample

from pyromosaic import ContrastiveVI, DiagVI, ModalitySpec, Mosaic, MultiVI, ScModal, checks, simulate
from pyromosaic.data import measured
from pyromosaic.described import Described
from pyromosaic.likelihoods import NB
from pyromosaic.measurement import encoded_once
from pyromosaic.models import MosaicModel
from pyromosaic.models.base import RENAMED, accepted_options
from pyromosaic.nn import Encoder
from pyromosaic.penalties import (
    MMD,
    Adversary,
    Anchors,
    Dependence,
    Discriminator,
    Geometry,
    Jeffreys,
    MeanDistance,
    Penalty,
    Pull,
    Sinkhorn,
)
from pyromosaic.priors import ARD, GaussianMixture, StudentT
from pyromosaic.program import Program

pytestmark = pytest.mark.filterwarnings("ignore:the guidance graph has few links")
SMALL = {"n_latent": 3, "n_hidden": 8}
QUIET = {"progress_bar": False}


@pytest.fixture(scope="module")
def data():
    return simulate(80, {"rna": 20, "adt": 6}, treated=0.5, seed=2)[0]


@pytest.fixture
def mosaic(data):
    return Mosaic.from_mudata(data, batch_key="batch")


def contrasted(mosaic):
    return mosaic.with_cohorts("condition", background="control")


# Names that data give


class Uncertain(NB):
    def __init__(self, schema):
        super().__init__(schema)
        self.log_theta = PyroSample(dist.Normal(torch.zeros(schema.n_features), 1.5).to_event(1))


@pytest.mark.parametrize("name", ["rna.v2", "keys", "type", "items", "Gene Expression", "training", "modality_1"])
@pytest.mark.parametrize("kind", [MultiVI, DiagVI, ContrastiveVI, ScModal])
def test_any_name_of_a_modality_works(kind, name, data, tmp_path):
    mdata = MuData({name: data["rna"], "adt": data["adt"]})
    spec = ModalitySpec(Uncertain if kind is MultiVI else "nb", batch_key="batch", label_key="celltype")
    mosaic = contrasted(Mosaic.from_mudata(mdata, {name: spec, "adt": ModalitySpec("nb_mixture", batch_key="batch")}))
    links = pd.DataFrame({name: ["rna_0", "rna_1"], "adt": ["adt_0", "adt_1"]})
    unpaired = {"linkage": None, "graph": links} if kind in (DiagVI, ScModal) else {}
    model = kind(mosaic, **unpaired, **SMALL)
    model.train(1, **QUIET)
    found = model.get_imputed_values(name, n_samples=2).mean
    model.save(tmp_path / "model")
    again = kind.load(tmp_path / "model", **({"Uncertain": Uncertain} if kind is MultiVI else {}))
    pd.testing.assert_frame_equal(again.get_imputed_values(name, n_samples=2, data=mosaic).mean, found)
    svi = pyro.infer.SVI(model.model, model.guide, pyro.optim.Adam({"lr": 1e-3}), pyro.infer.TraceMeanField_ELBO())
    assert np.isfinite(svi.step(measured(model._data(None), np.arange(20))))


@pytest.mark.parametrize("name", ["z", "s", "v", "cells", "features", "edges", "z_adt", "adt_size", "adt_background"])
def test_names_of_sites_are_refused(name, data):
    mdata = MuData({name: data["rna"], "adt": data["adt"]})
    with pytest.raises(ValueError, match=f"modality '{name}' has the name of a variable or plate of the models"):
        MultiVI(Mosaic.from_mudata(mdata, {name: "nb", "adt": "nb_mixture"}))


# Encoded once


@pytest.mark.parametrize("kind", [MultiVI, ContrastiveVI])
def test_encoders_run_once_for_all_draws(kind, mosaic):
    calls = []

    class Counting(Encoder):
        def forward(self, view):
            calls.append("z")
            return super().forward(view)

        def seen(self, view):
            calls.append("seen")
            return super().seen(view)

    model = kind(contrasted(mosaic), encoder=Counting, **SMALL)
    for ask in (
        lambda n: model.get_imputed_values("adt", n_samples=n).mean,
        lambda n: model.posterior_predictive_sample("adt", n_samples=n),
        lambda n: checks.held_out_log_likelihood(model, n_samples=n),
    ):
        n_calls = []
        for n in (1, 7):
            calls.clear()
            ask(n)
            n_calls.append(len(calls))
        assert n_calls[0] == n_calls[1] > 0


def test_draws_are_as_if_encoded_each_time(mosaic, monkeypatch):
    model = MultiVI(mosaic, **SMALL)
    model.train(1, **QUIET)
    found = model.get_imputed_values("adt", n_samples=5)
    monkeypatch.setattr("pyromosaic.tasks.prediction.encoded_once", lambda guide: torch.no_grad())
    again = model.get_imputed_values("adt", n_samples=5)
    for a, b in ((found.mean, again.mean), (found.sd, again.sd)):
        pd.testing.assert_frame_equal(a, b, check_exact=True)
    part, minibatch = model.guide.modalities["rna"], measured(mosaic, np.arange(10))
    with encoded_once(model.guide):
        assert part.known == {}
        part.encode(minibatch.observed["rna"])
        assert len(part.known) == 1
    assert part.known is None


# Whose an object is


@pytest.mark.parametrize("make", [lambda: ARD(3), lambda: GaussianMixture(3, 4)])
def test_a_prior_in_two_models_has_parameters_for_each(make, mosaic, tmp_path):
    prior = make()
    first = MultiVI(mosaic, prior=prior, **SMALL)
    second = MultiVI(mosaic, prior=prior, **SMALL)
    assert first.model.prior is prior and second.model.prior is not prior
    before = {k: v.clone() for k, v in first.model.state_dict().items()}
    second.train(1, **QUIET)
    assert all(torch.equal(v, before[k]) for k, v in first.model.state_dict().items())
    second.save(tmp_path / "model")
    MultiVI.load(tmp_path / "model", prior=prior)  # does not write into the first
    assert all(torch.equal(v, before[k]) for k, v in first.model.state_dict().items())


class Wide(MultiVI):
    def __init__(self, data, *, extra=7, **options):
        super().__init__(data, **options)
        self.extra = extra


class Fixed(DiagVI):
    def __init__(self, data, graph, extra=7):
        super().__init__(data, graph, linkage=None, **SMALL)
        self.extra = extra


def test_options_of_a_subclass_are_kept(mosaic, tmp_path):
    model = Wide(mosaic, extra=9, **SMALL)
    model.save(tmp_path / "wide")
    again = Wide.load(tmp_path / "wide", mosaic)
    assert again.extra == 9 and again.options["n_latent"] == 3
    assert again.get_latent_representation().equals(model.get_latent_representation())
    links = pd.DataFrame({"rna": ["rna_0", "rna_1"], "adt": ["adt_0", "adt_1"]})
    model = Fixed(mosaic, links, 5)
    model.save(tmp_path / "fixed")
    again = Fixed.load(tmp_path / "fixed")
    assert again.extra == 5 and list(again.graph.weight) == list(model.graph.weight)
    assert type(again).__name__ == "Fixed"


class Passing(DiagVI):
    def __init__(self, data, graph, **options):
        super().__init__(data, graph, linkage=None, **options)


class Blurred(DiagVI):
    def __init__(self, data, graph, blur=2.0, **options):
        super().__init__(data, graph, linkage=None, alignment=Sinkhorn(blur=blur), **options)


def test_options_of_earlier_versions_are_refused_by_their_new_name(mosaic):
    links = pd.DataFrame({"rna": ["rna_0", "rna_1"], "adt": ["adt_0", "adt_1"]})
    for old, new in RENAMED.items():
        kinds = [k for k in (MultiVI, DiagVI, ContrastiveVI, ScModal) if new.split("=")[0] in accepted_options(k)]
        assert kinds, new
        for kind in [*kinds, *([Passing] if DiagVI in kinds else [])]:
            graph = [links] if issubclass(kind, DiagVI | ScModal) else []
            data = contrasted(mosaic) if kind is ContrastiveVI else mosaic
            message = f"the option '{old}' of {kind.__name__} was renamed; use '{new}'"
            with pytest.raises(TypeError, match=re.escape(message)):
                kind(data, *graph, **{old: 2})
    assert Blurred(mosaic, links, 0.5, **SMALL).guide.penalties[0].blur == 0.5  # its own option


def test_parts_of_the_package_are_saved_with_the_model(mosaic, tmp_path):
    links = pd.DataFrame({"rna": ["rna_0", "rna_1"], "adt": ["adt_0", "adt_1"]})
    unlinked = {"graph": links, "linkage": None}
    made = {
        MultiVI: {
            "adversary": Adversary(target="batch", weight=2.0),
            "mmd": MMD(3.0, n_cells=16),
            "prior": StudentT(df=4.0),
            "penalties": [MeanDistance(0.5)],
        },
        ContrastiveVI: {"dependence": Dependence(2.0), "salient_prior": ARD(), "penalties": {"modalities": [MMD(1.0)]}},
        DiagVI: {
            "alignment": Sinkhorn(4.0, reach=float("inf"), reference="rna"),
            "prior": GaussianMixture(n_components=3),
            "anchors": Anchors(1.0, n_neighbors=2),
            **unlinked,
        },
        ScModal: {
            "adversary": Discriminator(2.0, n_steps=1),
            "geometry": Geometry(2.0, likeness="cosine"),
            "pull": Pull(3.0),
            **unlinked,
        },
    }
    for kind, options in made.items():
        model = kind(contrasted(mosaic) if kind is ContrastiveVI else mosaic, **options, **SMALL)
        model.train(1, **QUIET)
        model.save(tmp_path / kind.__name__)
        again = kind.load(tmp_path / kind.__name__, model.mosaic)

        def told(m):
            plain = (str, int, float, type(None))
            return [
                (
                    type(p).__name__,
                    {k: v for k, v in vars(p).items() if isinstance(v, plain) and k[0] != "_" and k != "training"},
                )
                for p in [*m.guide.modules(), *m.model.modules()]
                if isinstance(p, Described)
            ]

        assert told(again) == told(model)
        assert again.get_latent_representation().equals(model.get_latent_representation())
        assert kind.load(tmp_path / kind.__name__, **{k: v for k, v in options.items() if k == "prior"})
    assert [p.n_steps for p in again.guide.modules() if isinstance(p, Discriminator)] == [1]
    text = (tmp_path / "ScModal" / "model.json").read_text()
    (tmp_path / "ScModal" / "model.json").write_text(text.replace('"Discriminator"', '"Popen"'))
    with pytest.raises(ValueError, match="model.json is not as it was saved"):
        ScModal.load(tmp_path / "ScModal")


def test_a_users_part_is_given_again(mosaic, tmp_path):
    model = MultiVI(mosaic, penalties=[Spread(2.0)], **SMALL)
    model.save(tmp_path)
    with pytest.raises(ValueError, match="pass penalties=<object> to load"):
        MultiVI.load(tmp_path)
    assert MultiVI.load(tmp_path, penalties=[Spread(2.0)]).guide.penalties[-1].weight == 2


def test_parts_that_only_some_models_complete_are_refused_elsewhere(mosaic):
    for part, needed in ((Anchors(1.0), "scores"), (Pull(1.0), "scores"), (Adversary(), "schema and n_latent")):
        with pytest.raises(ValueError, match=f"{type(part).__name__} takes {needed}, unless"):
            MultiVI(mosaic, penalties=[part], **SMALL)


@pytest.mark.filterwarnings("ignore:the shared latent space carries only")
@pytest.mark.parametrize("kind", [MultiVI, DiagVI, ScModal])
def test_the_history_counts_private_divergences_once(kind, mosaic):
    links = pd.DataFrame({"rna": ["rna_0", "rna_1"], "adt": ["adt_0", "adt_1"]})
    linked = {} if kind is MultiVI else {"graph": links, "linkage": None}
    found = {}
    for weight in (0.0, 1.0, 4.0):
        model = kind(mosaic, n_private=2, private_kl=weight, **linked, **SMALL)
        model.train(1, learning_rate=1e-12, gradient_clip=0.0, validation=0.0, batch_size=1000, **QUIET)
        found[weight] = model.history.iloc[0]
    assert found[1.0]["train_z_rna"] > 0 == found[0.0]["train_z_rna"]
    for column in ("train_z_rna", "train_z_adt", "train_elbo"):
        assert found[4.0][column] == pytest.approx(found[1.0][column], rel=1e-4)
    assert found[4.0]["train_objective"] > found[1.0]["train_objective"]


# Penalties


class Spread(Penalty):
    name = "spread"

    def forward(self, posteriors, minibatch):
        self.looked_at = [len(q.rows) for q in posteriors.values()]
        return torch.stack([q.loc.square().mean() for q in posteriors.values()]).sum()


def test_a_penalty_looks_at_so_many_cells_as_it_says(mosaic):
    penalty = Spread(1.0, n_cells=8)
    model = MultiVI(mosaic, penalties=[penalty], **SMALL)
    model.train(1, **QUIET)
    assert penalty.looked_at == [8, 8]


def test_a_penalty_takes_the_place_of_the_models_own(mosaic):
    model = MultiVI(mosaic, penalties=[MMD(1.0)], **SMALL)
    assert [(p.name, p.weight) for p in model.guide.penalties if p.name == "mmd"] == [("mmd", 1.0)]
    model.train(1, **QUIET)
    assert "train_penalty/mmd" in model.history


def test_penalties_of_contrastive_models_by_what_they_compare(mosaic):
    options = {"penalties": {"modalities": [Geometry(2.0), Jeffreys(3.0)], "target": [Spread(1.0)]}, **SMALL}
    model = ContrastiveVI(contrasted(mosaic), **options)
    model.train(1, **QUIET)
    assert {"train_penalty/geometry", "train_penalty/spread"} <= set(model.history)
    own = model.guide.penalties["modalities"]
    assert [(p.name, p.weight) for p in own] == [("mmd", 50.0), ("geometry", 2.0), ("jeffreys", 3.0)]
    with pytest.raises(
        ValueError, match="the keys of penalties must be among 'modalities', 'cohorts', .*found 'groups'"
    ):
        ContrastiveVI(contrasted(mosaic), penalties={"groups": [Spread(1.0)]}, **SMALL)
    with pytest.raises(ValueError, match="compares modalities .*'rna', 'adt'.*found posteriors of '0'"):
        ContrastiveVI(contrasted(mosaic), penalties=[Geometry(1.0)], **SMALL).train(1, **QUIET)


# Sizes


def test_latent_sizes_mean_the_same_in_all_models(mosaic):
    sites = []
    for library in ("latent", {"adt": "latent", "rna": "latent"}):
        for model in (MultiVI(mosaic, library=library), ContrastiveVI(contrasted(mosaic), library=library)):
            minibatch = measured(model.mosaic, np.arange(20))
            nodes = pyro.poutine.trace(model.guide).get_trace(minibatch).nodes
            sites.append([name for name in nodes if name.endswith("_library")])
    assert sites == [["rna_library"]] * 2 + [["rna_library", "adt_library"]] * 2
    with pytest.raises(ValueError, match="library must be .*known"):
        MultiVI(mosaic, library={"rna": "known"})
    with pytest.raises(KeyError, match="there is no modality 'atac'"):
        MultiVI(mosaic, library={"atac": "latent"})
    opened = Mosaic.from_mudata(simulate(60, {"rna": 20, "atac": 20}, seed=1)[0])
    with pytest.raises(ValueError, match="modality 'atac' has no size to infer"):
        MultiVI(opened, library={"atac": "latent"})


class Bare(Program):
    """A program without parts by modality."""

    def __init__(self, schema):
        super().__init__()
        self.loc = torch.nn.Parameter(torch.zeros(schema["rna"].n_features))

    def forward(self, minibatch, kl_weight=1.0):
        with pyro.plate("cells", minibatch.n_cells, subsample=minibatch.index, dim=-2):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([len(minibatch), 1, 2]).to_event(1))
        for name, view in minibatch.decoded.items():
            n, mean = len(view.rows), (self.loc + z[view.rows, 0].sum(-1, keepdim=True)).exp()
            with pyro.plate(f"{name}_cells", n, dim=-2), pyro.plate(f"{name}_features", mean.shape[1], dim=-1):
                pyro.sample(name, dist.Poisson(mean), obs=view.counts)


class BareGuide(Program):
    def __init__(self, schema):
        super().__init__("guide")
        self.scale = torch.nn.Parameter(torch.ones(2))

    def forward(self, minibatch, kl_weight=1.0):
        with pyro.plate("cells", minibatch.n_cells, subsample=minibatch.index, dim=-2):
            pyro.sample("z", dist.Normal(0.0, self.scale.exp()).expand([len(minibatch), 1, 2]).to_event(1))


class BareModel(MosaicModel):
    def __init__(self, data, *, seed=0):
        with self.construction(data, seed) as schema:
            self.model, self.guide = Bare(schema), BareGuide(schema)


def test_a_program_without_parts_trains_and_says_what_it_cannot_answer(data, tmp_path):
    mosaic = Mosaic.from_mudata(MuData({"rna": data["rna"]}))
    model = BareModel(mosaic)
    model.train(2, **QUIET)
    assert model.get_latent_representation().shape == (mosaic.n_cells, 2)
    assert np.isfinite(model.get_imputed_values("rna", n_samples=3).mean.to_numpy()).all()
    assert model.posterior_predictive_sample("rna", n_samples=2).shape == (2, mosaic.n_cells, 20)
    with pytest.raises(ValueError, match="the program has no likelihood for modality 'rna'"):
        model.get_normalized_expression("rna")
    model.save(tmp_path / "bare")
    pd.testing.assert_frame_equal(
        BareModel.load(tmp_path / "bare", mosaic).get_imputed_values("rna", n_samples=3).mean,
        model.get_imputed_values("rna", n_samples=3).mean,
    )


class Blind(torch.nn.Module):
    """A decoder that does not see the batch, and begins at random."""

    def __init__(self, schema, predictors, n_latent, n_hidden, n_layers):
        super().__init__()
        self.heads = torch.nn.ModuleDict({name: torch.nn.Linear(n_latent, schema.n_features) for name in predictors})

    def forward(self, z, view):
        return {name: head(z) for name, head in self.heads.items()}


def test_a_model_of_which_only_the_guide_sees_the_batch_meets_new_ones():
    mdata, _ = simulate(90, {"rna": 20}, n_batches=3, seed=1)
    new = (mdata["rna"].obs["batch"] == "batch2").to_numpy()
    model = MultiVI(Mosaic.from_mudata(mdata[~new].copy(), batch_key="batch"), decoder=Blind, **SMALL)
    model.train(1, **QUIET)
    adapted = model.adapt(mdata[new].copy(), 1, **QUIET)
    assert adapted.schema["rna"].categories["batch"] == ("batch0", "batch1", "batch2")
    for name, weight in model.model.state_dict().items():
        assert "heads" not in name or torch.equal(weight, adapted.model.state_dict()[name])
