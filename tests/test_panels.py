"""Panels: features that were measured in some cells only."""

import json
from dataclasses import replace

import anndata
import numpy as np
import pandas as pd
import pyro
import pytest
import torch
from mudata import MuData
from pyro import poutine
from scipy import sparse, stats

from pyromosaic import ContrastiveVI, DiagVI, ModalitySpec, Mosaic, MultiVI, ScModal, checks, simulate
from pyromosaic.data import Schema, View, measured
from pyromosaic.data.panel_sources import rates_of, sizes
from pyromosaic.likelihoods import LIKELIHOODS, likelihoods_of
from pyromosaic.linkage import cca
from pyromosaic.measurement import Plates
from pyromosaic.nn import Encoder

ABSENT = {"rna": {"batch0": range(20), "batch1": range(20, 40)}, "adt": {"batch0": (1, 2, 3)}}


@pytest.fixture(scope="module")
def whole():
    """A MuData in which all features were measured."""
    return simulate(160, {"rna": 60, "adt": 12}, types=3, n_batches=3, treated=0.5, patterns=["rna+adt"])[0]


def parts(whole, absent=ABSENT, fill=np.nan, kind=np.asarray):
    """AnnData by modality in which features of some batches have this value."""
    found = {}
    for name, adata in whole.mod.items():
        x = np.array(adata.to_df(), dtype=np.float32)
        batch = whole.obs["batch"].loc[adata.obs_names].astype(str).to_numpy()
        for b, columns in absent.get(name, {}).items():
            x[np.ix_(batch == b, list(columns))] = fill
        found[name] = anndata.AnnData(kind(x), whole.obs.loc[adata.obs_names], adata.var)
    return found


def registered(data, likelihoods=None, **more):
    return Mosaic.from_anndata(data, likelihoods, match_cells=True, batch_key="batch", **more)


def table(whole, name):
    """The panels as a table of batches × features."""
    features = whole[name].var_names
    made = pd.DataFrame(True, ["batch0", "batch1", "batch2"], features)
    for batch, columns in ABSENT[name].items():
        made.loc[batch, features[list(columns)]] = False
    return made


@pytest.fixture(scope="module")
def mosaic(whole):
    return registered(parts(whole))


@pytest.fixture(scope="module")
def model(mosaic):
    model = MultiVI(mosaic, n_latent=4, n_hidden=32)
    model.train(3, progress_bar=False)
    return model


# Sources


@pytest.mark.parametrize("source", ["dense", "sparse", "list", "table"])
def test_all_sources_say_the_same(whole, mosaic, source):
    """NaN in a dense or sparse matrix, AnnData with other features, and a table."""
    more = {}
    if source == "list":
        data = {}
        for name, adata in parts(whole).items():
            of = [adata[(adata.obs["batch"] == b).to_numpy()] for b in ("batch2", "batch0", "batch1")]
            data[name] = [a[:, ~np.isnan(a.X).all(axis=0)].copy() for a in of]
    elif source == "table":
        data, more = parts(whole, fill=0), {"panels": {name: table(whole, name) for name in ABSENT}}
    else:
        data = parts(whole, kind=sparse.csr_matrix if source == "sparse" else np.asarray)
    found = registered(data, **more)
    for name, m in found.modalities.items():
        expected = mosaic.modalities[name]
        cells = found.obs_names.get_indexer(mosaic.obs_names)
        columns = [m.schema.features.index(feature) for feature in expected.schema.features]
        every = np.arange(mosaic.n_cells)
        np.testing.assert_array_equal(m.measured(cells)[:, columns], expected.measured(every))
        values = m.tensor(cells).to_dense()[:, columns]
        assert torch.equal(values, expected.tensor(every).to_dense()) and torch.isfinite(values).all()
        np.testing.assert_allclose(m.library[cells], expected.library, rtol=1e-5)
        assert m.schema.panels.key == "batch"
    assert "panels of 9 to 12 features" in repr(found)


@pytest.mark.parametrize("kind", [np.asarray, sparse.csr_matrix])
def test_the_data_of_the_user_stay(whole, kind):
    """Also if they are a view of an AnnData, which copies itself when it is written to."""
    data = {name: adata[:, :] for name, adata in parts(whole, kind=kind).items()}
    before = {name: adata.copy() for name, adata in data.items()}
    mosaic = registered(data)
    measured(mosaic, np.arange(mosaic.n_cells))
    for name, adata in data.items():
        assert adata.is_view
        np.testing.assert_array_equal(adata.to_df(), before[name].to_df())


def test_groups_other_than_batches(whole):
    """The index of a table may have the name of another column."""
    data = parts(whole, absent={})
    half = np.arange(160) % 2 == 0
    for adata in data.values():
        adata.obs["kit"] = np.where(half, "x", "y")
    data["adt"].X[np.ix_(half, [0, 1])] = 0
    kits = pd.DataFrame({"adt_0": [False, True], "adt_1": [0, 1]}, pd.Index(["x", "y"], name="kit"))
    found = registered(data, panels={"adt": kits})
    assert found.schema["adt"].panels.key == "kit" and found.schema["adt"].by_batch is None
    cells = np.flatnonzero(data["adt"].obs["kit"].reindex(found.obs_names) == "x")
    assert (~found.modalities["adt"].measured(cells)).sum(axis=0).tolist() == [len(cells)] * 2 + [0] * 10
    again = Mosaic.from_anndata(data, match_cells=True, schema=found.schema)
    np.testing.assert_array_equal(again.modalities["adt"].library, found.modalities["adt"].library)


def test_zeros_of_a_batch_are_suggested_and_not_assumed(whole):
    data = parts(whole, fill=0)
    with pytest.warns(UserWarning, match="always 0, but not in other batches: .*mosaic.suggested_panels"):
        found = registered(data)
    assert found.schema["adt"].panels is None and found.modalities["adt"].panels is None
    suggested = found.suggested_panels("adt")
    pd.testing.assert_frame_equal(suggested, table(whole, "adt"), check_names=False, check_index_type=False)
    with_panels = registered(data, panels={name: found.suggested_panels(name) for name in ABSENT})
    assert with_panels.schema["adt"] == registered(parts(whole)).schema["adt"]


def bad(whole, what):
    data, given = parts(whole), None
    if what == "unknown feature":
        given = table(whole, "adt").rename(columns={"adt_3": "cd3"})
    elif what == "unknown batch":
        given = table(whole, "adt").rename(index={"batch1": "batch9"})
    elif what == "no row":
        given = table(whole, "adt").iloc[1:]
    elif what == "not booleans":
        given = table(whole, "adt").astype(str)
    elif what == "contradicted":
        given, data = table(whole, "adt"), parts(whole, absent={})
    elif what == "nothing in a batch":
        data = parts(whole, absent={"adt": {"batch1": range(12)}})
    elif what == "nowhere":
        data = parts(whole, absent={"adt": {f"batch{i}": [7] for i in range(3)}})
    elif what == "some cells":
        data["adt"].X[5, 6] = np.nan
    else:
        return data, {"protein": table(whole, "adt")}
    return data, None if given is None else {"adt": given}


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("unknown feature", "the table of panels has the column 'cd3', which is no feature of the modality"),
        ("unknown batch", "the table of panels has the row 'batch9', which is no value of column 'batch'; it has"),
        ("no row", "the table of panels has no row for batch 'batch0'; give one for each"),
        ("not booleans", "must have True or False for each group and feature"),
        ("contradicted", "says that feature 'adt_1' was not measured in batch 'batch0', but the data have values"),
        ("nothing in a batch", "no feature was measured in .* cells .*; remove them from this modality"),
        ("nowhere", "feature 'adt_7' was measured in no cell; leave it out"),
        ("some cells", "nan of feature 'adt_.*is NaN in only some cells of batch"),
        ("unknown modality", "there is no modality 'protein', of which panels are given; found 'rna', 'adt'"),
    ],
)
def test_bad_panels_get_one_sentence(whole, what, said):
    data, panels = bad(whole, what)
    with pytest.raises(ValueError, match=said):
        registered(data, panels=panels)


# Sizes


def test_sizes_agree_between_panels_of_different_depth():
    """A profile and sizes are recovered from cells of which each panel saw only a part."""
    rng = np.random.default_rng(0)
    profile, size = rng.dirichlet(np.ones(30)), rng.uniform(2000, 6000, 300)
    masks = np.ones((3, 30), dtype=bool)
    masks[0, :10] = masks[1, 10:20] = False
    codes = np.repeat([0, 1, 2], 100)
    x = rng.poisson(size[:, None] * profile) * masks[codes]
    sums = np.stack([x[codes == i].sum(0) for i in range(3)])
    found = rates_of(sums, np.array([100, 100, 100]), masks)
    np.testing.assert_allclose(found, profile, rtol=0.05, atol=3e-4)
    from pyromosaic.data.matrix import Matrix

    for shared in (masks.all(0), np.zeros(30, dtype=bool)):
        totals = sizes(Matrix(x.astype(np.float32)), np.arange(300), masks, codes, found, shared)
        ratio = totals / size
        assert max(abs(ratio[codes == i].mean() - 1) for i in range(3)) < 0.01


# The program


def view_of(mosaic, name, cells=None):
    return measured(mosaic, np.arange(mosaic.n_cells) if cells is None else cells).observed[name]


def evaluated(likelihood, view, predictors):
    """Log-probabilities that count, of one view."""
    plates = Plates("rna", likelihood.schema.n_features)
    with pyro.plate("cells", len(view.rows), dim=-2), plates.features(view), poutine.trace() as found:
        likelihood("rna", predictors, view)
    found.trace.compute_log_prob()
    return found.trace.nodes["rna"]


@pytest.mark.filterwarnings("ignore:.*like counts, and likelihood")
@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("name", list(LIKELIHOODS))
def test_log_probability_is_that_of_a_model_without_the_absent_features(whole, name, dense):
    """For the cells of each batch: a likelihood made for the measured features alone, with its own normalisation."""
    mosaic = registered({"rna": parts(whole, kind=sparse.csr_matrix)["rna"]}, {"rna": name})
    likelihood = likelihoods_of(mosaic.schema)["rna"]
    for parameter in likelihood.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    for batch in range(3):
        cells = np.flatnonzero(mosaic.modalities["rna"].codes[:, 0] == batch)
        view = view_of(mosaic, "rna", cells)
        if not dense and not view.counts.is_sparse:
            view = replace(view, counts=view.counts.to_sparse().coalesce())
        view = replace(view, counts=view.dense_counts()) if dense else view
        if not dense and name in ("normal", "log1p_normal", "ziln", "zig"):
            pytest.skip("values on a continuous scale are never sparse")
        predictors = {p: torch.randn(len(cells), 60, requires_grad=True) for p in likelihood.predictors}
        site = evaluated(likelihood, view, predictors)
        has = mosaic.modalities["rna"].measured(cells)[0]
        features = np.flatnonzero(has)
        schema = replace(mosaic.schema["rna"], features=tuple(np.array(mosaic.schema["rna"].features)[has]))
        alone = type(likelihood)(schema)
        kept = {k: v[..., features] if v.shape[-1:] == (60,) else v for k, v in likelihood.state_dict().items()}
        alone.load_state_dict(kept)
        share = 1.0 if view.share is None else view.share
        size = view.library * share if schema.spec.traits.shares else view.library  # of the measured genes alone
        part = replace(
            view, counts=view.dense_counts()[:, features], library=size, measured=None, share=None, batches=None
        )
        if schema.spec.traits.shares:
            torch.testing.assert_close(size[:, 0], part.counts.sum(1), rtol=1e-4, atol=1e-2)
        expected = evaluated(alone, part, {k: v[:, features] for k, v in predictors.items()})
        torch.testing.assert_close(site["log_prob"][:, features], expected["log_prob"], rtol=2e-4, atol=2e-4)
        torch.testing.assert_close(site["log_prob_sum"], expected["log_prob_sum"], rtol=1e-4, atol=1e-3)
        if name == "nb":
            mu = part.library * torch.softmax(predictors["rate"][:, features], -1)
            theta = likelihood.log_theta.exp()[features]
            by_scipy = stats.nbinom.logpmf(
                part.counts.numpy(), theta.detach().numpy(), (theta / (theta + mu)).detach().numpy()
            )
            np.testing.assert_allclose(site["log_prob"][:, features].detach(), by_scipy, rtol=1e-3, atol=1e-3)
        site["log_prob_sum"].backward()
        for parameter in (*predictors.values(), *likelihood.parameters()):
            assert parameter.grad is None or torch.isfinite(parameter.grad).all()
        for values in predictors.values():
            assert (values.grad[:, ~has] == 0).all()
        likelihood.zero_grad()


def test_encoders_do_not_see_what_was_not_measured(model, mosaic):
    """Whatever stands in the matrix at an unmeasured feature, and whatever its size."""
    view = view_of(mosaic, "adt")
    encoder = model.guide.modalities["adt"].encoder
    wrong = torch.where(view.measured, view.dense_counts(), 1e4)
    with torch.no_grad():
        before, after = encoder(view), encoder(replace(view, counts=wrong))
    torch.testing.assert_close(before, after, rtol=0, atol=0)


def test_padding_with_an_unmeasured_feature_changes_no_encoding(mosaic):
    view, schema = view_of(mosaic, "adt"), mosaic.schema["adt"]
    torch.manual_seed(0)
    encoder = Encoder(schema, 3).eval()
    encoder.start(view)
    torch.nn.init.normal_(encoder.missing)
    padded = Encoder(replace(schema, features=("pad", *schema.features)), 3).eval()
    first, second = encoder.state_dict(), padded.state_dict()
    for name, value in first.items():
        if second[name].shape == value.shape:
            second[name].copy_(value)
        else:  # the new feature comes first, with weights and scale of its own
            second[name][..., 1:].copy_(value)
    wide = replace(
        view,
        counts=torch.cat([torch.zeros(len(view.rows), 1), view.dense_counts()], 1),
        measured=torch.cat([torch.zeros(len(view.rows), 1, dtype=torch.bool), view.measured], 1),
    )
    with torch.no_grad():
        second["missing"][0] = 0.0
        torch.testing.assert_close(encoder(view), padded(wide), rtol=1e-4, atol=1e-5)


def test_equal_panels_change_nothing(whole):
    """A table in which all was measured gives the same numbers as none."""
    data = parts(whole, absent={})
    full = {"adt": pd.DataFrame(True, ["batch0", "batch1", "batch2"], whole["adt"].var_names)}
    plain, given = registered(data), registered(data, panels=full)
    assert plain.schema == given.schema and view_of(given, "adt").measured is None
    assert MultiVI(plain, n_latent=3).guide.modalities["adt"].encoder.missing is None


# Models


def links():
    return pd.DataFrame({"rna": [f"rna_{i}" for i in range(12)], "adt": [f"adt_{i}" for i in range(12)]})


@pytest.mark.filterwarnings(
    "ignore:the (guidance graph has few|shared latent space carries)", "ignore:it is not clear that the links"
)
@pytest.mark.parametrize(
    "make",
    [
        lambda m: MultiVI(m, n_latent=3, n_private=2, library="latent"),
        lambda m: ContrastiveVI(m.with_cohorts("condition", background="control"), n_latent=3, n_salient=2),
        lambda m: DiagVI(m, links(), n_latent=3),
        lambda m: ScModal(m, links(), n_latent=3),
        lambda m: ScModal(m, links(), **ScModal.presets["reference"].options | {"n_latent": 3}),
    ],
    ids=["MultiVI", "ContrastiveVI", "DiagVI", "ScModal", "ScModal reference"],
)
def test_each_model_trains_and_imputes(whole, make, tmp_path):
    latent = {"adt": ModalitySpec("nb_mixture", batch_key="batch", background="latent", dispersion="gene-batch")}
    model = make(registered(parts(whole), {"rna": "zinb", **latent}))
    model.train(2, progress_bar=False, sleep_steps=4)
    assert np.isfinite(model.history["train_elbo"]).all()
    for name in ABSENT:
        assert np.isfinite(model.get_imputed_values(name, n_samples=2).mean.to_numpy()).all()
        assert np.isfinite(model.posterior_predictive_sample(name)).all()
    model.save(tmp_path / "model")
    again = type(model).load(tmp_path / "model", parts(whole))
    assert again.schema == model.schema == Schema.from_json(json.loads(json.dumps(model.schema.to_json())))
    pd.testing.assert_frame_equal(again.get_latent_representation(), model.get_latent_representation())
    one, other = (m.get_imputed_values("adt", n_samples=2).mean for m in (model, again))
    pd.testing.assert_frame_equal(one, other)


def test_training_gradients_are_finite(mosaic):
    model = MultiVI(mosaic, n_latent=3)
    minibatch = measured(mosaic, np.arange(mosaic.n_cells))
    pyro.infer.TraceMeanField_ELBO().loss_and_grads(model.model, model.guide, minibatch)
    for program in (model.model, model.guide):
        for name, parameter in program.named_parameters():
            assert parameter.grad is None or torch.isfinite(parameter.grad).all(), name
    assert model.guide.modalities["adt"].encoder.missing.grad[[1, 2, 3]].abs().min() > 0
    head = model.model.modalities["adt"].decoder.heads["foreground"].weight.grad
    assert head[:, -3].nonzero().squeeze(-1).tolist() == [0, 4, 5, 6, 7, 8, 9, 10, 11]  # the indicator of batch0


def test_an_absent_feature_is_decoded_for_the_batches_that_have_it(model, mosaic):
    """Whatever untrained parameters of its own batch are."""
    cells = np.flatnonzero(mosaic.modalities["adt"].codes[:, 0] == 0)
    before = model.get_imputed_values("adt", cells, n_samples=3, seed=1).mean
    part = model.model.modalities["adt"]
    with torch.no_grad():
        kept = {k: v.clone() for k, v in part.state_dict().items()}
        for head in part.decoder.heads.values():
            head.weight[1:4, -3] += 50.0
        part.likelihood.background_loc[0, 1:4] += 5.0
    after = model.get_imputed_values("adt", cells, n_samples=3, seed=1).mean
    part.load_state_dict(kept)
    # the weights of the decoder are drawn too, from a posterior whose prior depends on their size
    np.testing.assert_allclose(before.iloc[:, 1:4], after.iloc[:, 1:4], rtol=0.25)


def test_proportions_add_up_where_genes_are_absent(model):
    shares = model.get_normalized_expression("rna")
    np.testing.assert_allclose(shares.sum(axis=1), 1, rtol=1e-4)


def test_absent_features_are_recovered(whole):
    """Imputed values of absent features follow the hidden counts of their cells."""
    mdata, _ = simulate(600, {"rna": 80, "adt": 12}, types=4, n_batches=2, patterns=["rna+adt"])
    absent = {"adt": {"batch0": range(4)}, "rna": {"batch0": range(25), "batch1": range(25, 50)}}
    model = MultiVI(registered(parts(mdata, absent)), n_latent=6)
    model.train(30, progress_bar=False)
    for name, columns in (("adt", range(4)), ("rna", range(25))):
        adata = mdata[name]
        cells = adata.obs_names[(mdata.obs.loc[adata.obs_names, "batch"] == "batch0").to_numpy()]
        features = list(adata.var_names[list(columns)])
        truth = adata.to_df().loc[cells, features]
        found = model.get_imputed_values(name, cells, features=features, n_samples=5).mean
        if name == "rna":  # the level of antibodies differs between batches, and that of an absent one is not known
            assert 0.75 < found.to_numpy().sum() / truth.to_numpy().sum() < 1.25
        of_types = truth.groupby(mdata.obs.loc[cells, "celltype"].to_numpy()).mean().to_numpy().ravel()
        imputed = found.groupby(mdata.obs.loc[cells, "celltype"].to_numpy()).mean().to_numpy().ravel()
        assert stats.spearmanr(of_types, imputed).statistic > 0.7


def test_answers_know_what_was_measured(model, mosaic):
    first = mosaic.obs_names[mosaic.modalities["adt"].codes[:, 0] == 0]
    other = mosaic.obs_names[mosaic.modalities["adt"].codes[:, 0] == 1]
    result = model.differential(cells1=first, cells2=other, modality="adt", n_samples=50)
    absent = [f"adt_{i}" for i in (1, 2, 3)]
    assert result.loc[absent, "raw_mean1"].isna().all() and result.loc[absent, "raw_mean2"].notna().all()
    assert result["probability"].notna().all() and result["raw_mean1"].notna().sum() == 9
    check = checks.predictive_check(model, n_samples=5)
    x = mosaic.modalities["adt"]
    values, has = x.tensor(np.arange(mosaic.n_cells)).to_dense().numpy(), x.measured(np.arange(mosaic.n_cells))
    expected = [values[has[:, i], i].mean() for i in range(12)]
    np.testing.assert_allclose(check.table.loc["adt", "mean"]["observed"], expected, rtol=1e-5)
    tree = model.to_inference_data("adt", n_samples=2)
    np.testing.assert_array_equal(np.isnan(tree["observed_data"]["adt"].to_numpy()), ~has)
    ranks = checks.simulation_based_calibration(model, of="mean", n_samples=3, n_steps=0)
    np.testing.assert_array_equal(ranks.below["adt"].isna().to_numpy(), ~has)
    assert np.isfinite(checks.held_out_log_likelihood(model, n_samples=2).to_numpy()).all()


@pytest.mark.filterwarnings("ignore:it is not clear that the links match")
def test_linkage_leaves_out_what_was_not_measured(whole, mosaic):
    """Absent features, whatever their values, are at the mean of their batch."""
    from pyromosaic.linkage.preprocess import Standardiser

    for name in ("rna", "adt"):
        modality = mosaic.modalities[name]
        cells = np.flatnonzero(modality.present)
        _, data = Standardiser.fit(modality, cells)
        standardised = data @ np.eye(modality.schema.n_features)
        assert np.abs(standardised[~modality.measured(cells)]).max() < 1e-6
        spread = np.array([standardised[has, i].std() for i, has in enumerate(modality.measured(cells).T)])
        np.testing.assert_allclose(spread, 1, atol=1e-3)
        means = data.averages(np.zeros(len(cells), dtype=int), 1, np.arange(modality.schema.n_features))
        np.testing.assert_allclose(means, 0, atol=1e-6)
    assert np.isfinite(cca(mosaic, ("rna", "adt"), links(), n_components=3).scores["adt"].to_numpy()).all()


# Queries


@pytest.mark.parametrize("form", ["dictionary", "mudata", "anndata"])
def test_a_query_with_other_features(whole, form):
    data = parts(whole, absent={})
    model = MultiVI(registered(data), n_latent=3)
    model.train(1, progress_bar=False)
    known = whole["rna"].var_names[:48]
    more = anndata.AnnData(data["rna"][:, known].X, data["rna"].obs, pd.DataFrame(index=known))
    extra = anndata.AnnData(np.ones((160, 2), np.float32), data["rna"].obs, pd.DataFrame(index=["new1", "new2"]))
    query = anndata.concat([more, extra], axis=1, merge="first")
    given = {"dictionary": {"rna": query}, "mudata": MuData({"rna": query}), "anndata": query}[form]
    with pytest.warns(
        UserWarning, match="the model does not know 2 of the 50 features of the data, which are left out"
    ) as said:
        cells = model.register(given)
    assert len(said) == 1 and "'new1', 'new2'" in str(said[0].message)
    rna = cells.modalities["rna"]
    assert rna.measured(np.arange(160)).sum(axis=1).tolist() == [48] * 160 and cells.schema == model.schema
    full = registered(data).modalities["rna"].library
    np.testing.assert_allclose(np.median(rna.library / full), 1, atol=0.05)
    assert np.isfinite(model.get_latent_representation(data=cells).to_numpy()).all()
    assert model.get_imputed_values("rna", data=cells, n_samples=2).mean.shape == (160, 60)


def test_a_query_that_shares_nothing(whole, model):
    data = parts(whole)["rna"]
    data.var_names = [f"ENSG{i}" for i in range(60)]
    with pytest.raises(ValueError, match="the data have none of the 60 features of the model; .*'rna_0'.*'ENSG0'"):
        model.register({"rna": data})
    with pytest.raises(ValueError, match="none of the features of any modality of the model"):
        model.register(data)


def test_a_query_with_a_small_part_of_the_features_is_doubtful(whole, model):
    data = {"rna": parts(whole, absent={})["rna"][:, :20].copy()}
    with pytest.warns(UserWarning, match="only 20 of the 60 features of the model; the others count as not measured"):
        model.register(data)


def test_a_new_batch_with_other_features_is_adapted_to(whole):
    data = parts(whole, absent={})
    old = {k: a[(a.obs["batch"] != "batch2").to_numpy()].copy() for k, a in data.items()}
    new = {k: a[(a.obs["batch"] == "batch2").to_numpy()].copy() for k, a in data.items()}
    model = MultiVI(registered(old), n_latent=3)
    model.train(2, progress_bar=False)
    adapted = model.adapt({"rna": new["rna"][:, :50].copy(), "adt": new["adt"]}, n_epochs=1, progress_bar=False)
    assert adapted.schema["adt"].panels is None
    assert adapted.schema["rna"].panels.by_batch(60).sum(axis=1).tolist() == [60, 60, 50]
    imputed = adapted.get_imputed_values("rna", n_samples=2).mean
    assert imputed.shape[1] == 60 and np.isfinite(imputed.to_numpy()).all()
    before = model.get_latent_representation()
    pd.testing.assert_frame_equal(adapted.get_latent_representation(data=adapted.register(old)), before)


def test_typical_views_know_the_batches(mosaic):
    view = View.typical(mosaic.schema["adt"], torch.zeros(4, 3))
    assert view.batches is not None and view.measured is None
    assert [len(features) for _, features in view.batches.patterns] == [3]
