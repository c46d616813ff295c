import numpy as np
import pandas as pd
import pytest
from scipy import sparse, stats

import pyromosaic
from pyromosaic import Mosaic, simulate

PATTERNS = ["rna", "atac", "adt", "rna+atac", "rna+adt", "atac+adt", "rna+atac+adt"]


def rows(adata, truth_of):
    """Numbers of a modality's cells in the order of the truth."""
    return truth_of.obs_names.get_indexer(adata.obs_names)


def measured(mdata, truth, name):
    """Measurements, dense, and what was expected of them."""
    adata = mdata.mod[name]
    x = adata.X.toarray() if sparse.issparse(adata.X) else adata.X
    return x.astype(float), truth.mean[name][rows(adata, mdata)].astype(float)


def assert_standard(scores):
    """Scores that should be standard normal, to five standard errors of their mean and variance."""
    assert abs(scores.mean()) < 5 / np.sqrt(scores.size)
    assert abs(scores.var() - 1) < 5 * np.sqrt(2 / scores.size)
    assert np.abs(scores).max() < 6


@pytest.fixture(scope="module")
def drawn():
    return simulate(4000, {"rna": 60, "atac": 80, "adt": 20}, batch_effect=0.5, seed=3)


# What is measured where


def test_cells_features_and_columns(drawn):
    mdata, truth = drawn
    assert list(mdata.obs_names) == [f"cell{i}" for i in range(4000)]
    assert list(mdata.obs) == ["celltype", "batch"]
    assert (mdata.obs["celltype"] == np.asarray(truth.type)).all()
    assert (mdata.obs["batch"] == np.asarray(truth.batch)).all()
    for name, n in {"rna": 60, "atac": 80, "adt": 20}.items():
        adata = mdata.mod[name]
        assert adata.n_vars == n and adata.X.dtype == np.float32
        assert adata.var_names[n - 1] == f"{name}_{n - 1}"
        assert sparse.issparse(adata.X) == (name != "adt")
        assert (adata.obs["batch"] == mdata.obs["batch"][adata.obs_names]).all()
    assert mdata["rna"].X.format == "csr"
    assert truth.condition.unique().tolist() == ["control"] and truth.response.unique().tolist() == ["none"]


def test_all_patterns_by_default_and_a_mosaic_reads_them(drawn):
    mosaic = Mosaic.from_mudata(drawn[0], batch_key="batch", label_key="celltype")
    share = mosaic.patterns.value_counts(normalize=True)
    assert sorted(share.index) == sorted(PATTERNS)
    np.testing.assert_allclose(share, 1 / 7, atol=1 / 4000)
    assert [m.spec.likelihood for m in mosaic.modalities.values()] == ["nb", "bernoulli", "nb_mixture"]
    assert (mosaic.labels() == drawn[0].obs["celltype"].astype(str)).all()


def test_patterns_and_groups_have_the_shares_asked():
    patterns = {"adt+rna": 3, "atac": 1}
    mdata, truth = simulate(
        1000, {"rna": 20, "atac": 20, "adt": 5}, patterns=patterns, types=[0.2, 0.3, 0.5], n_batches=4
    )
    found = Mosaic.from_mudata(mdata, empty_cells="keep").patterns
    assert found.value_counts().to_dict() == {"rna+adt": 750, "atac": 250}
    assert np.bincount(truth.type.codes[found == "rna+adt"]).tolist() == [150, 225, 375]
    assert np.bincount(truth.type.codes[found == "atac"]).tolist() == [50, 75, 125]
    assert np.bincount(truth.batch.codes).tolist() == [250] * 4
    mdata, _ = simulate(90, {"rna": 20, "adt": 5}, patterns=["rna", "adt", "rna+adt"])
    assert set(Mosaic.from_mudata(mdata).patterns.value_counts()) == {30}


def test_types_by_pattern_and_private_types():
    sizes = {"rna": 20, "adt": 5}
    mdata, truth = simulate(400, sizes, patterns=["rna", "adt"], types={"rna": [3, 1], "adt": [1, 3]})
    crossed = pd.crosstab(Mosaic.from_mudata(mdata).patterns, np.asarray(truth.type))
    assert crossed.loc["rna"].tolist() == [150, 50] and crossed.loc["adt"].tolist() == [50, 150]
    mdata, truth = simulate(600, sizes, types=3, private={"type2": ["adt+rna", "adt"]})
    crossed = pd.crosstab(Mosaic.from_mudata(mdata).patterns, np.asarray(truth.type))
    assert crossed.loc["rna"].tolist() == [100, 100, 0]
    np.testing.assert_allclose(crossed.loc[["adt", "rna+adt"]], 200 / 3, atol=1)


# The latent variable and the measurements


def test_latent_variable_has_variance_1_around_its_centres():
    _, truth = simulate(20_000, {"rna": 10}, types=200, n_latent=4, separation=3.0)
    assert truth.z.shape == (20_000, 4) and truth.centers.shape == (200, 4)
    np.testing.assert_allclose(truth.z.var(0), 1, atol=0.3)
    within = truth.z - truth.centers[truth.type.codes]
    np.testing.assert_allclose(np.cov(within.T), np.eye(4) / 10, atol=0.005)
    np.testing.assert_allclose(truth.centers.var(), 0.9, rtol=0.2)


def nb_variance(mean, theta):
    return mean + mean**2 / theta


def test_gene_counts_have_the_means_and_dispersions_of_the_truth(drawn):
    mdata, truth = drawn
    x, mean = measured(mdata, truth, "rna")
    p = truth.parameters["rna"]
    size = p["size"][rows(mdata["rna"], mdata)]
    np.testing.assert_allclose(mean.sum(1), size, rtol=1e-4)
    assert np.log(p["size"] / 60).mean() == pytest.approx(0, abs=0.03)
    assert np.log(p["size"]).std() == pytest.approx(0.4, abs=0.03)
    assert_standard((x - mean).sum(0) / np.sqrt(nb_variance(mean, p["theta"]).sum(0)))
    # inverse dispersion by moments, where noise of the counts themselves is small
    mdata, truth = simulate(4000, {"rna": 60}, depth=50.0)
    x, mean = measured(mdata, truth, "rna")
    estimate = (mean**2).sum(0) / ((x - mean) ** 2 - mean).sum(0)
    theta = truth.parameters["rna"]["theta"]
    np.testing.assert_allclose(np.median(estimate / theta), 1, atol=0.05)
    assert stats.spearmanr(estimate, theta)[0] > 0.95


def test_gene_means_follow_the_story(drawn):
    mdata, truth = drawn
    p = truth.parameters["rna"]
    log_rate = p["base"][truth.batch.codes] + truth.z @ truth.loadings["rna"].T
    rate = np.exp(log_rate - log_rate.max(1, keepdims=True))
    np.testing.assert_allclose(truth.mean["rna"], p["size"][:, None] * rate / rate.sum(1, keepdims=True), rtol=1e-3)


def test_structural_zeros_come_on_top():
    mdata, truth = simulate(3000, {"rna": 40}, likelihoods={"rna": "zinb"}, depth=8.0, separation=0.0)
    x, mean = measured(mdata, truth, "rna")
    p = truth.parameters["rna"]
    mu = mean / (1 - p["gate"])
    zero = p["gate"] + (1 - p["gate"]) * (p["theta"] / (p["theta"] + mu)) ** p["theta"]
    assert_standard(((x == 0) - zero).sum(0) / np.sqrt((zero * (1 - zero)).sum(0)))
    variance = (1 - p["gate"]) * (nb_variance(mu, p["theta"]) + p["gate"] * mu**2)
    assert_standard((x - mean).sum(0) / np.sqrt(variance.sum(0)))
    assert p["gate"].min() > 0
    assert (simulate(50, {"rna": 20})[1].parameters["rna"]["gate"] == 0).all()


def test_regions_open_at_the_rate_of_the_truth(drawn):
    mdata, truth = drawn
    x, mean = measured(mdata, truth, "atac")
    assert set(np.unique(x)) == {0, 1}
    for axis in (0, 1):
        assert_standard((x - mean).sum(axis) / np.sqrt((mean * (1 - mean)).sum(axis)))
    p = truth.parameters["atac"]
    logits = p["base"][truth.batch.codes] + truth.z @ truth.loadings["atac"].T
    expected = p["cell_factor"][:, None] * p["region_factor"] / (1 + np.exp(-logits))
    np.testing.assert_allclose(truth.mean["atac"], expected, rtol=1e-3)


def test_protein_counts_are_the_mixture_of_the_truth(drawn):
    mdata, truth = drawn
    x, mean = measured(mdata, truth, "adt")
    p, cells = truth.parameters["adt"], rows(mdata["adt"], mdata)
    share = p["background_probability"][truth.type.codes[cells]]
    spread = p["background_scale"] ** 2
    size, loc = p["size"][cells, None], p["background_loc"][truth.batch.codes[cells]]
    factor = 1 + np.exp(p["foreground"] + truth.z[cells] @ truth.loadings["adt"].T)
    background = size * np.exp(loc + spread / 2)
    np.testing.assert_allclose(mean, background * (share + (1 - share) * factor), rtol=1e-3)
    # E[x^2] = E[mu] + (1 + 1/theta) E[mu^2] over backgrounds and components
    second = mean + (1 + 1 / p["theta"]) * background**2 * np.exp(spread) * (share + (1 - share) * factor**2)
    assert_standard((x - mean).sum(0) / np.sqrt((second - mean**2).sum(0)))
    # the whole distribution, by Gauss-Hermite quadrature over the log background
    nodes, weights = np.polynomial.hermite_e.hermegauss(15)
    for count in (0, 3, 10, 30):
        below = 0
        for node, weight in zip(nodes, weights / weights.sum(), strict=True):
            level = size * np.exp(loc + p["background_scale"] * node)
            for part, mu in ((share, level), (1 - share, level * factor)):
                below += weight * part * stats.nbinom.cdf(count, p["theta"], p["theta"] / (p["theta"] + mu))
        assert_standard(((x <= count) - below).sum(0) / np.sqrt((below * (1 - below)).sum(0)))


def test_real_values():
    mdata, truth = simulate(2000, {"cytometry": 15}, likelihoods={"cytometry": "normal"})
    x, mean = measured(mdata, truth, "cytometry")
    residual = (x - mean) / truth.parameters["cytometry"]["sigma"]
    assert stats.kstest(residual.ravel(), "norm").pvalue > 1e-3
    assert Mosaic.from_mudata(mdata, {"cytometry": "normal"}, batch_key="batch").n_cells == 2000


def test_batch_effect_is_seen_and_can_be_absent(drawn):
    mdata, truth = drawn
    for name, key in {"rna": "base", "atac": "base", "adt": "background_loc"}.items():
        shift = np.diff(truth.parameters[name][key], axis=0)[0]
        assert shift.std() == pytest.approx(0.5 * np.sqrt(2), rel=0.4)
        first = truth.batch.codes[rows(mdata[name], mdata)] == 0
        x, _ = measured(mdata, truth, name)
        seen = np.log(x[~first].mean(0) / x[first].mean(0))
        assert np.corrcoef(seen, shift)[0, 1] > 0.85
        without = simulate(60, batch_effect=0.0)[1].parameters[name][key]
        assert (without[0] == without[1]).all()


def test_types_differ_by_separation():
    def share_between(separation):
        _, truth = simulate(3000, {"rna": 50}, separation=separation, n_batches=1)
        log_mean = np.log(truth.mean["rna"])
        centre = np.stack([log_mean[truth.type.codes == k].mean(0) for k in range(5)])[truth.type.codes]
        return centre.var(0).mean() / log_mean.var(0).mean()

    assert share_between(0.0) < 0.02 < share_between(1.0) < share_between(4.0)


# Links


def test_links_follow_their_gene_with_the_sign_asked():
    mdata, truth = simulate(
        3000,
        {"rna": 300, "atac": 50, "adt": 20},
        links={"adt": 0.5, "atac": 0.2},
        negative_links=0.4,
        treated=0.5,
        affected=1.0,
        effect=0.3,
    )
    links = truth.links
    assert links.groupby("modality").size().to_dict() == {"adt": 10, "atac": 10}
    assert links.groupby("modality")["sign"].agg(lambda s: (s == -1).sum()).to_dict() == {"adt": 4, "atac": 4}
    assert not links.duplicated(["modality", "feature"]).any()
    sizes = {"rna": "size", "atac": "cell_factor", "adt": "size"}
    rate = {name: mean / truth.parameters[name][sizes[name]][:, None] for name, mean in truth.mean.items()}
    agreement = []
    for link in links.itertuples():
        gene, feature = int(link.gene.split("_")[1]), int(link.feature.split("_")[1])
        assert link.gene in mdata["rna"].var_names and link.feature in mdata[link.modality].var_names
        for loadings in (truth.loadings, truth.salient_loadings):
            np.testing.assert_array_equal(loadings[link.modality][feature], link.sign * loadings["rna"][gene])
        relation = stats.spearmanr(rate["rna"][:, gene], rate[link.modality][:, feature])[0]
        agreement.append(relation * link.sign)
    # not fully: a gene's rate is a share of all genes', and batches and types add to the others
    assert np.median(agreement) > 0.6 and np.mean(np.array(agreement) > 0.2) >= 0.9
    free = {f"adt_{i}" for i in range(20)} - set(links["feature"])
    genes = truth.loadings["rna"]
    for i in (int(name.split("_")[1]) for name in free):
        assert not (np.abs(genes - truth.loadings["adt"][i]).max(1) < 1e-3).any()


def test_no_links_and_more_links_than_genes():
    assert list(simulate(50, {"rna": 20})[1].links) == ["gene", "modality", "feature", "sign"]
    assert len(simulate(50, {"rna": 20})[1].links) == 0
    links = simulate(50, {"rna": 10, "atac": 60}, links={"atac": 1.0})[1].links
    assert len(links) == 60 and links["gene"].nunique() <= 10 and (links["sign"] == 1).all()


# Treated cells


def test_salient_variable_is_zero_in_controls_and_has_the_planted_dimension():
    _, truth = simulate(
        4000, {"rna": 100, "adt": 10}, treated=0.4, n_salient=3, n_responses=4, affected=0.3, effect=0.8, n_batches=1
    )
    control = np.asarray(truth.condition) == "control"
    assert control.sum() == 2400 and truth.s.shape == (4000, 3)
    assert (truth.s[control] == 0).all() and (np.abs(truth.s[~control]).sum(1) > 0).all()
    assert (np.asarray(truth.response)[control] == "none").all()
    assert np.bincount(truth.response.codes).tolist() == [2400, 400, 400, 400, 400]
    assert truth.response.categories.tolist() == ["none", *(f"treated:{i}" for i in range(4))]
    assert (truth.s[~control] ** 2).sum(1).mean() == pytest.approx(3, rel=0.05)
    centre = np.stack([truth.s[truth.response.codes == k].mean(0) for k in range(1, 5)])
    distance = np.linalg.norm(centre[:, None] - centre, axis=-1)[np.triu_indices(4, 1)]
    assert distance.min() > 4 * 0.4
    # what treatment does to the genes, beyond z: a shift of rank 3 in the features that are affected
    log_rate = np.log(truth.mean["rna"]) - truth.parameters["rna"]["base"][0] - truth.z @ truth.loadings["rna"].T
    shift = log_rate[~control].astype(float)
    affected = (truth.salient_loadings["rna"] != 0).any(1)
    assert affected.sum() == 30
    shift = shift - shift[:, ~affected].mean(1, keepdims=True)  # the size and the softmax's denominator
    assert np.abs(shift[:, ~affected]).max() < 1e-3
    singular = np.linalg.svd(shift, compute_uv=False)
    assert singular[2] > 100 * singular[3]
    assert shift[:, affected].std() == pytest.approx(0.8, rel=0.3)


def test_treatment_shifts_counts_only_where_it_acts():
    mdata, truth = simulate(6000, {"adt": 40}, treated=0.5, n_responses=1, n_salient=1, effect=2.0, batch_effect=0.0)
    x, mean = measured(mdata, truth, "adt")
    treated = (mdata.obs["condition"] == "treated").to_numpy()
    ratio = np.log(x[treated].mean(0) / x[~treated].mean(0))
    v = truth.salient_loadings["adt"][:, 0] * truth.s[treated].mean()
    assert np.abs(ratio[v == 0]).max() < 0.25
    assert np.corrcoef(ratio, v)[0, 1] > 0.6
    assert_standard((x - mean).sum(0) / np.sqrt(((x - mean) ** 2).sum(0)))


def test_several_conditions_and_their_types():
    options = {"treated": {"drug": 0.25, "heat": 0.25}, "types": 2, "n_responses": 2, "n_salient": 2}
    mdata, truth = simulate(800, {"rna": 20}, **options)
    assert list(mdata.obs) == ["celltype", "batch", "condition", "response"]
    crossed = pd.crosstab(mdata.obs["condition"], mdata.obs["response"])
    assert crossed.loc["control", "none"] == 400
    assert crossed.loc["drug", ["drug:0", "drug:1"]].tolist() == [100, 100]
    assert crossed.to_numpy().sum() == 800 and crossed.loc["heat", ["heat:0", "heat:1"]].sum() == 200
    types = pd.crosstab(np.asarray(truth.condition), np.asarray(truth.type))
    assert types.loc["drug"].tolist() == types.loc["heat"].tolist() == [100, 100]
    _, truth = simulate(800, {"rna": 20}, **options, treated_types=[1, 3])
    types = pd.crosstab(np.asarray(truth.condition), np.asarray(truth.type))
    assert types.loc["control"].tolist() == [200, 200] and types.loc["heat"].tolist() == [50, 150]


# Seeds, sizes, arguments


def test_same_seed_same_data_whether_means_are_kept():
    options = {"modalities": {"rna": 30, "atac": 20, "adt": 5}, "treated": 0.3, "links": {"adt": 0.4}}
    first, second = simulate(200, seed=7, **options), simulate(200, seed=7, keep_means=False, **options)
    other = simulate(200, seed=8, **options)
    pd.testing.assert_frame_equal(first[0].obs, second[0].obs)
    pd.testing.assert_frame_equal(first[1].links, second[1].links)
    np.testing.assert_array_equal(first[1].z, second[1].z)
    np.testing.assert_array_equal(first[1].s, second[1].s)
    for name in options["modalities"]:
        a, b, c = (np.asarray(m[name].X.sum(0)).ravel() for m, _ in (first, second, other))
        np.testing.assert_array_equal(a, b)
        assert (a != c).any()
    assert set(first[1].mean) == {"rna", "atac", "adt"} and second[1].mean == {}


def test_blocks_are_joined_in_order(monkeypatch):
    from importlib import import_module

    monkeypatch.setattr(import_module("pyromosaic.data.simulate"), "ENTRIES", 1000)
    mdata, truth = simulate(1500, {"rna": 20, "adt": 5})
    for name in ("rna", "adt"):
        x, mean = measured(mdata, truth, name)
        assert np.corrcoef(np.log1p(x).ravel(), np.log1p(mean).ravel())[0, 1] > 0.6
        permuted = np.random.default_rng(0).permutation(mean)
        assert ((x - mean) ** 2).sum() < 0.95 * ((x - permuted) ** 2).sum()


def test_no_cell_is_empty_where_a_likelihood_needs_its_size():
    mdata, _ = simulate(3000, {"rna": 20, "adt": 1}, depth=0.5)
    assert mdata["rna"].X.sum(1).min() > 0 and mdata["adt"].X.sum(1).min() > 0
    assert Mosaic.from_mudata(mdata, batch_key="batch").n_cells == 3000


def test_truth_is_frozen_and_names_are_exported(drawn):
    with pytest.raises(AttributeError, match="cannot assign"):
        drawn[1].z = 0
    assert "simulate" in pyromosaic.__all__
    assert isinstance(drawn[1], pyromosaic.data.Truth)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"n_cells": 0}, "n_cells must be a whole number from 1 to .*; found 0"),
        ({"n_latent": 2.5}, "n_latent must be a whole number from 1 to .*; found 2.5"),
        ({"n_batches": 0}, "n_batches must be a whole number"),
        ({"n_salient": 0}, "n_salient must be a whole number"),
        ({"n_responses": 0}, "n_responses must be a whole number"),
        ({"modalities": {"rna": 0}}, "modalities must be a dictionary"),
        ({"modalities": {}}, "there is no modality to draw"),
        ({"modalities": {"rna+adt": 3}}, "no modality 'rna[+]adt'"),
        ({"modalities": {"spots": 3}}, "the likelihood of modality 'spots' must be one of nb, zinb.*; found 'none'"),
        ({"likelihoods": {"rna": "zig"}}, "modality 'rna' must be one of .*; found 'zig'"),
        ({"likelihoods": {"spots": "nb"}}, "no modality 'spots'"),
        ({"patterns": ["rna", "rna+spots"]}, "a pattern must be some of 'rna', 'atac', 'adt', .*found 'rna[+]spots'"),
        ({"patterns": ["rna+rna"]}, "found 'rna[+]rna'"),
        ({"patterns": ["rna+adt", "adt+rna"]}, "patterns must be different"),
        ({"patterns": {}}, "patterns must be shares"),
        ({"patterns": {"rna+atac+adt": -1}}, "patterns must be shares of at least 0"),
        ({"patterns": {"rna+atac": 1}}, "modality 'adt' has no cell"),
        ({"types": 0}, "types must be"),
        ({"types": [0.5, np.nan]}, "types must be"),
        ({"types": {"rna": [1, 1]}}, "types must have shares for the patterns rna[+]atac[+]adt, .*found rna"),
        ({"types": {p: [1] * (1 + (p == "rna")) for p in PATTERNS}}, "different numbers of types"),
        ({"types": 2, "treated_types": [1, 1, 1]}, "different numbers of types"),
        ({"private": {"type9": ["rna"]}}, "private must name some of the types type0, .*found 'type9'"),
        ({"private": {"type0": ["spots"]}}, "a pattern must be .*found 'spots'"),
        ({"types": 1, "private": {"type0": ["rna"]}}, "no type occurs in the pattern 'rna[+]atac[+]adt'"),
        ({"separation": -1.0}, "separation must be a number from 0 to 1e9; found -1.0"),
        ({"batch_effect": np.inf}, "batch_effect (must be a number from 0 to 3|must be a finite number)"),
        ({"effect": np.nan}, "effect (must be a number from 0 to 3|must be a finite number)"),
        ({"depth": 0.001}, "at least 10 counts; found 300 genes of depth 0.001"),
        ({"affected": 1.5}, "affected must be a share from 0 to 1; found 1.5"),
        ({"negative_links": -0.1}, "negative_links must be a share from 0 to 1"),
        ({"links": {"adt": 2}}, "links must be a dictionary"),
        ({"links": {"rna": 0.5}}, "links must be between RNA"),
        ({"links": {"spots": 0.5}}, "links must be between RNA"),
        ({"modalities": {"atac": 20, "adt": 5}, "links": {"adt": 0.5}}, "links must be between RNA"),
        ({"treated": 1.2}, "treated must be a share from 0 to 1 .*; found 1.2"),
        ({"treated": {"drug": 0.7, "heat": 0.4}}, "treated must be a number from 0 to 1; found 1.1"),
        ({"treated": {"drug": -0.1, "heat": 0.4}}, "treated must be"),
        ({"treated": {"control": 0.4}}, "'control' is the name of the cells that are not treated"),
        ({"treated": 0.5, "n_responses": 5}, "n_salient must be at least half the number of response groups, 5"),
    ],
)
def test_bad_arguments_are_refused_in_one_sentence(options, message):
    with pytest.raises(ValueError, match=message) as error:
        simulate(**{"n_cells": 40, **options})
    assert "\n" not in str(error.value)
