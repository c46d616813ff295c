import sys
import tracemalloc
import warnings
from functools import partial
from itertools import permutations

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from mudata import MuData
from numpy.testing import assert_allclose, assert_array_equal
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from scipy import linalg, sparse, stats
from torch import nn

from pyromosaic import Mosaic, linkage, metrics, pbmc_mosaic, protein_gene_links, simulate
from pyromosaic.linkage import Correspondence, variational
from pyromosaic.linkage.canonical import canonical_variables
from pyromosaic.linkage.matching import cosine
from pyromosaic.linkage.preprocess import Smoother, Standardiser, metacells, principal_components
from pyromosaic.linkage.rounds import chance


def adata(counts, names, features, **obs):
    frame = pd.DataFrame(obs or {"batch": "a"}, index=list(names))
    return anndata.AnnData(sparse.csr_matrix(np.asarray(counts, np.float32)), frame, pd.DataFrame(index=list(features)))


@pytest.fixture(scope="module")
def two_sets():
    """RNA and antibodies of 300 cells each, 100 of them the same; half of the antibodies tell of a gene."""
    mdata, truth = simulate(
        500,
        {"rna": 120, "adt": 40},
        patterns={"rna": 0.4, "adt": 0.4, "rna+adt": 0.2},
        types=4,
        depth=2.0,
        links={"adt": 0.5},
        keep_means=False,
        seed=1,
    )
    return mdata, pd.DataFrame({"rna": truth.links["gene"], "adt": truth.links["feature"]})


def mosaic_of(mdata):
    return Mosaic.from_mudata(mdata, batch_key="batch")


def copies(mdata, scores):
    both = mdata.mod["rna"].obs_names.intersection(mdata.mod["adt"].obs_names)
    return scores["rna"].loc[both], scores["adt"].loc[both]


# ---------------------------------------------------------------------------------------------- linked features


def test_links_from_a_table_are_told_apart_by_names_and_counted():
    mosaic = mosaic_of(pbmc_mosaic())
    links = linkage.links_from_table(mosaic, ("rna", "adt"), protein_gene_links())
    assert len(links) == 74 and links.n_unknown == 240 - 74
    back = linkage.links_from_table(mosaic, ("adt", "rna"), protein_gene_links())
    assert list(back.pairs.columns) == ["adt", "rna", "weight", "sign"]
    assert_array_equal(links.pairs[["adt", "rna"]], back.pairs[["adt", "rna"]])
    rna, adt = links.positions(mosaic)
    genes, proteins = (np.array(mosaic.modalities[m].schema.features) for m in ("rna", "adt"))
    table = set(zip(protein_gene_links()["gene"], protein_gene_links()["protein"], strict=True))
    assert set(zip(genes[rna], proteins[adt], strict=True)) <= table


def test_weight_and_sign_are_kept_and_checked(mdata):
    mosaic = mosaic_of(mdata)
    table = pd.DataFrame(
        {"rna": ["gene1", "gene2"], "adt": ["protein1", "protein2"], "weight": [0.5, 1], "sign": [1, -1]}
    )
    links = linkage.links_from_table(mosaic, ("rna", "adt"), table)
    assert links.pairs["weight"].tolist() == [0.5, 1] and links.pairs["sign"].tolist() == [1, -1]
    with pytest.raises(ValueError, match="the weight of a link must be above 0 and at most 1; found 0"):
        linkage.links_from_table(mosaic, ("rna", "adt"), table.assign(weight=[0.0, 1]))
    with pytest.raises(ValueError, match="the sign of a link must be 1 or -1; found 2"):
        linkage.links_from_table(mosaic, ("rna", "adt"), table.assign(sign=[2, 1]))
    with pytest.raises(ValueError, match="no linked feature is left: none of the 1 links has both"):
        linkage.links_from_table(mosaic, ("rna", "adt"), pd.DataFrame({"rna": ["gene1"], "adt": ["cd8"]}))
    with pytest.raises(ValueError, match="found 'a'"):
        linkage.links_from_table(mosaic, ("rna", "adt"), pd.DataFrame({"a": ["gene1"]}))
    with pytest.raises(ValueError, match="there is no modality 'atac'"):
        linkage.links_from_table(mosaic, ("rna", "atac"), table)


def test_links_by_name():
    cells = [f"c{i}" for i in range(4)]
    rna, activity = adata(np.ones((4, 3)), cells, "abc"), adata(np.ones((4, 2)), cells, "ca")
    mosaic = Mosaic.from_anndata({"rna": rna, "activity": activity}, {"rna": "nb", "activity": "nb"})
    links = linkage.links_by_name(mosaic, ("rna", "activity"))
    assert_array_equal(links.pairs[["rna", "activity"]], [["a", "a"], ["c", "c"]])


def test_links_by_overlap_of_gene_body_and_promoter():
    regions = [
        "chr1:100-200",
        "chr1-4000-4100",
        "chr1_9000_9100",
        "chr2:100-200",
        "chr1:12001-12100",
        "chr1:11990-12000",
    ]
    cells = ["c0", "c1"]
    mosaic = Mosaic.from_anndata(
        {"rna": adata(np.ones((2, 3)), cells, "abc"), "atac": adata(np.ones((2, 6)), cells, regions)}
    )
    genes = pd.DataFrame(
        {
            "chromosome": ["chr1", "chr1", "chr3"],
            "start": [5000, 8000, 1],
            "end": [6000, 10000, 9],
            "strand": ["+", "-", "+"],
        },
        index=["a", "b", "c"],
    )
    links = linkage.links_by_overlap(mosaic, ("rna", "atac"), genes)
    found = set(links.pairs[["rna", "atac"]].itertuples(index=False, name=None))
    # a: promoter from 3000; b, on the other strand: promoter up to 12000; c: a chromosome without regions
    assert found == {("a", "chr1-4000-4100"), ("b", "chr1_9000_9100"), ("b", "chr1:11990-12000")}
    with pytest.raises(ValueError, match="needs the columns chromosome, start, end, strand"):
        linkage.links_by_overlap(mosaic, ("rna", "atac"), genes[["start"]])
    with pytest.raises(ValueError, match="the name 'a' is not a region"):
        linkage.links_by_overlap(mosaic, ("atac", "rna"), genes)


# ------------------------------------------------------------------------------------------------ preprocessing


def standardised_by_hand(values, batch):
    centred = values.copy()
    for b in np.unique(batch):
        centred[batch == b] -= values[batch == b].mean(axis=0)
    scale = centred.std(axis=0)
    return np.divide(centred, scale, out=np.zeros_like(centred), where=scale > 1e-6)


@pytest.mark.parametrize("name", ["rna", "atac", "adt"])
def test_implicit_standardisation_is_the_explicit_one(name):
    mdata, _ = simulate(200, {"rna": 50, "atac": 60, "adt": 20}, n_batches=3, keep_means=False)
    mosaic = Mosaic.from_mudata(mdata, batch_key="batch", empty_cells="keep")
    modality, counts = mosaic.modalities[name], mdata.mod[name].X
    cells = np.flatnonzero(modality.present)
    counts = counts[modality.rows[cells]]
    counts = np.asarray(counts.todense() if sparse.issparse(counts) else counts, dtype=float)
    total = counts.sum(axis=1, keepdims=True)
    if name == "rna":
        values = np.log1p(counts / total * np.median(total))
    elif name == "atac":
        values = np.log1p((counts > 0) / np.maximum((counts > 0).sum(axis=1, keepdims=True), 1))
    else:
        values = np.log1p(counts) - np.log1p(counts).mean(axis=1, keepdims=True)
    expected = standardised_by_hand(values, modality.codes[cells, 0])
    standardiser, data = Standardiser.fit(modality, cells)
    right, left = np.random.default_rng(0).normal(size=(2, 300, 4))
    assert_allclose(data @ right[: expected.shape[1]], expected @ right[: expected.shape[1]], rtol=1e-3, atol=1e-3)
    assert_allclose(data.transposed_times(left[: len(cells)]), expected.T @ left[: len(cells)], rtol=1e-3, atol=1e-2)
    groups = np.arange(len(cells)) % 7
    by_hand = np.array([expected[groups == g][:, [3, 1]].mean(axis=0) for g in range(7)])
    assert_allclose(data.averages(groups, 7, np.array([3, 1])), by_hand, rtol=1e-3, atol=1e-4)
    again = standardiser.apply(modality, cells)
    assert_allclose(again @ right[: expected.shape[1]], data @ right[: expected.shape[1]], rtol=1e-5, atol=1e-5)


def test_principal_components_are_those_of_the_dense_matrix():
    mdata, _ = simulate(300, {"rna": 80}, keep_means=False)
    modality = mosaic_of(mdata).modalities["rna"]
    _, data = Standardiser.fit(modality, np.arange(300))
    dense = data @ np.eye(80)
    _, singular, vt = np.linalg.svd(dense, full_matrices=False)
    loadings = principal_components(data, 5, seed=3)
    assert_allclose(np.abs(np.diag(vt[:5] @ loadings)), 1, atol=1e-3)
    assert_allclose(np.linalg.norm(dense @ loadings, axis=0), singular[:5], rtol=1e-3)


def test_metacells_are_of_equal_size_compact_and_independent_of_order():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1000, 4)) * [5, 2, 1, 0.5]
    groups = metacells(x, 100)
    size = np.bincount(groups)
    assert len(size) == 64 and size.min() >= 15 and size.max() <= 16
    within = np.mean([x[groups == g].var(axis=0).sum() for g in range(64)])
    shuffled = np.mean([x[rng.permutation(groups) == g].var(axis=0).sum() for g in range(64)])
    assert within < 0.3 * shuffled
    order = rng.permutation(1000)
    assert_array_equal(metacells(x[order], 100), groups[order])
    assert_array_equal(metacells(x, 1000), np.arange(1000))


def test_smoothing_is_the_mean_of_neighbours():
    x = np.random.default_rng(1).normal(size=(30, 3))
    values = np.random.default_rng(2).normal(size=(30, 2))
    distance = np.linalg.norm(x[:, None] - x[None], axis=-1)
    nearest = distance.argsort(axis=1)[:, 1:5]
    assert_allclose(Smoother.fit(x, 4)(values), 0.3 * values + 0.7 * values[nearest].mean(axis=1))


# ----------------------------------------------------------------------------------------------------- matching


def test_balanced_transport_meets_its_weights_and_agrees_with_pot():
    ot = pytest.importorskip("ot")
    rng = np.random.default_rng(0)
    similarity = cosine(rng.normal(size=(20, 4)), rng.normal(size=(30, 4)))
    weights = rng.dirichlet(np.ones(20)), rng.dirichlet(np.ones(30))
    plan = linkage.transport(similarity, weights, epsilon=0.1, reach=np.inf, n_iterations=2000)
    assert_allclose(plan.sum(axis=1), weights[0], rtol=1e-3)
    assert_allclose(plan.sum(axis=0), weights[1], rtol=1e-3)
    assert_allclose(plan, ot.sinkhorn(*weights, 1.0 - similarity.astype(float), 0.1, numItermax=10_000), atol=1e-5)


def test_unbalanced_transport_agrees_with_pot_and_leaves_out_what_resembles_none():
    ot = pytest.importorskip("ot")
    similarity = np.array([[1.0, -0.9], [-0.9, 0.9], [-1.0, -1.0]])
    weights = np.full(3, 1 / 3), np.full(2, 1 / 2)
    plan = linkage.transport(similarity, weights, epsilon=0.1, reach=0.2, n_iterations=2000)
    expected = ot.unbalanced.sinkhorn_unbalanced(*weights, 1 - similarity, 0.1, 0.2, numItermax=10_000, stopThr=1e-12)
    assert_allclose(plan, expected, rtol=1e-3, atol=1e-9)
    assert plan[2].sum() < 0.01 * plan[0].sum()


def test_hard_matchings():
    similarity = np.array([[0.9, 0.8, 0.0], [0.7, 0.1, 0.0], [0.0, 0.0, 0.3]], dtype=np.float32)
    weights = (np.full(3, 1 / 3),) * 2
    nearest = linkage.mutual_nearest(similarity, weights, k=1).toarray()
    assert_array_equal(nearest, [[1, 0, 0], [0, 0, 0], [0, 0, 1]])
    assigned = linkage.assignment(similarity, weights, keep=1.0).toarray()
    assert_array_equal(assigned, [[0, 1, 0], [1, 0, 0], [0, 0, 1]])
    assert_array_equal(linkage.assignment(similarity, weights, keep=0.5).sum(axis=1), [1, 1, 0])


def test_diagonal_is_the_decomposition_of_the_product():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(12, 5)), rng.normal(size=(9, 5))
    u, _, vt = np.linalg.svd(x @ y.T)
    first, second = linkage.diagonal(x, y, 3)
    expected = [v[:, :3] / np.linalg.norm(v[:, :3], axis=1, keepdims=True) for v in (u, vt.T)]
    assert_allclose(first @ second.T, expected[0] @ expected[1].T, atol=1e-8)


def test_geometry_alone_finds_a_shape_without_symmetries():
    pytest.importorskip("ot")
    rng = np.random.default_rng(0)
    x = rng.exponential(size=(40, 2)) * [3, 1]
    turned = x @ stats.ortho_group.rvs(2, random_state=1) + 5
    weights = (np.full(40, 1 / 40),) * 2
    linked = rng.normal(size=(40, 6))
    similarity = cosine(linked, linked + 0.5 * rng.normal(size=(40, 6)))
    plan = linkage.gromov_wasserstein(x, turned, weights, similarity)
    assert np.trace(plan) > 0.9
    assert np.trace(linkage.gromov_wasserstein(x, turned, weights)) > 0.5
    by_links = linkage.gromov_wasserstein(x, turned[::-1], weights, similarity, geometry=0)
    by_shape = linkage.gromov_wasserstein(x, turned[::-1], weights, similarity, geometry=1)
    assert np.trace(by_links) > 0.9 and np.trace(by_shape[:, ::-1]) > 0.5
    with pytest.raises(ValueError, match="geometry weighs distances against similarity.*0.5 without similarity"):
        linkage.gromov_wasserstein(x, turned, weights, geometry=0.5)


# ---------------------------------------------------------------------------------------- canonical correlations


@pytest.fixture
def planted():
    """Two sets of 8 and 6 variables of the same 2,000 cells, with correlations 0.9, 0.6 and 0.4 and noise."""
    rng = np.random.default_rng(0)
    shared = rng.normal(size=(2000, 3))
    other = np.array([0.9, 0.6, 0.4]) * shared + np.sqrt(1 - np.array([0.9, 0.6, 0.4]) ** 2) * rng.normal(
        size=(2000, 3)
    )
    x = np.hstack([shared, rng.normal(size=(2000, 5))]) @ rng.normal(size=(8, 8))
    y = np.hstack([other, rng.normal(size=(2000, 3))]) @ rng.normal(size=(6, 6))
    return x - x.mean(axis=0), y - y.mean(axis=0)


def pairs(n):
    return Correspondence.from_pairs(np.arange(n), np.arange(n), (n, n))


def test_with_true_pairs_it_is_canonical_correlation_analysis(planted):
    x, y = planted
    canonical = linkage.canonical_correlation(x, y, pairs(2000), ridge=0)
    # Closed form: singular values of the product of orthonormal bases.
    expected = np.linalg.svd(np.linalg.qr(x)[0].T @ np.linalg.qr(y)[0], compute_uv=False)
    assert_allclose(canonical.correlations, expected, atol=1e-10)
    assert_allclose(canonical.correlations[:3], [0.9, 0.6, 0.4], atol=0.05)
    u, v = (canonical.scores(values, k, power=0) for k, values in enumerate((x, y)))
    assert_allclose(np.cov(u[:, :6], rowvar=False, bias=True), np.eye(6), atol=1e-8)
    assert_allclose(u[:, :6].T @ v / 2000, np.diag(expected), atol=1e-8)


def test_scores_agree_with_scikit_learn(planted):
    from sklearn.cross_decomposition import CCA

    x, y = planted
    reference = CCA(n_components=2, scale=False, max_iter=5000, tol=1e-12).fit(x, y)
    canonical = linkage.canonical_correlation(x, y, pairs(2000), ridge=0)
    for ours, theirs in zip((canonical.scores(x, 0), canonical.scores(y, 1)), reference.transform(x, y), strict=True):
        for k in range(2):
            assert abs(np.corrcoef(ours[:, k], theirs[:, k])[0, 1]) > 1 - 1e-6


def test_a_correspondence_without_information_has_no_correlation(planted):
    x, y = planted
    rng = np.random.default_rng(0)
    product = Correspondence(np.outer(rng.dirichlet(np.ones(2000)), rng.dirichlet(np.ones(2000))), pairs(2000).groups)
    assert_allclose(linkage.canonical_correlation(x, y, product).correlations, 0, atol=1e-12)


def test_cross_covariance_is_its_formula_also_between_groups():
    rng = np.random.default_rng(0)
    x, y, plan = rng.normal(size=(7, 3)), rng.normal(size=(6, 2)), rng.random((3, 2))
    groups = np.array([0, 0, 1, 1, 1, 2, 2]), np.array([0, 1, 1, 0, 0, 1])
    size = [np.bincount(g) for g in groups]
    full = (plan / plan.sum())[np.ix_(*groups)] / np.outer(size[0][groups[0]], size[1][groups[1]])
    assert_allclose(full.sum(), 1)
    expected = x.T @ full @ y - np.outer(x.T @ full.sum(axis=1), full.sum(axis=0) @ y)
    assert_allclose(Correspondence(plan, groups).cross_covariance(x, y), expected)
    assert_allclose(Correspondence(sparse.csr_array(plan), groups).cross_covariance(x, y), expected)


def test_shuffles_keep_the_planted_number_of_components(planted):
    x, y = planted
    canonical = linkage.canonical_correlation(x, y, pairs(2000), ridge=0)
    null = linkage.shuffled_covariances(x, y, pairs(2000), n_shuffles=100)
    assert linkage.count_components(canonical, null) == 3


def test_crossfit_shows_over_fitting():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(120, 30)), rng.normal(size=(120, 30))
    assert linkage.canonical_correlation(x, y, pairs(120), ridge=0.01).correlations[0] > 0.6
    assert np.abs(linkage.crossfit_correlations(x, y, pairs(120), ridge=0.01)[:5]).mean() < 0.2


def test_crossfit_keeps_what_is_there(planted):
    held_out = linkage.crossfit_correlations(*planted, pairs(2000), ridge=0)
    assert_allclose(held_out[:3], [0.9, 0.6, 0.4], atol=0.1)
    assert np.abs(held_out[3:]).max() < 0.1


# ------------------------------------------------------------------------------------------------- the whole way


@pytest.mark.parametrize(
    "options",
    [{}, {"match": "mutual"}, {"match": "assignment"}, {"start": "diagonal"}, {"n_metacells": 128}],
    ids=["transport", "mutual", "assignment", "diagonal", "metacells"],
)
def test_cells_meet_their_copies(two_sets, options):
    mdata, links = two_sets
    link = linkage.cca(mosaic_of(mdata), ("rna", "adt"), links, n_pcs=20, **options)
    assert metrics.foscttm(*copies(mdata, link.scores)) < 0.2
    x, y = link.scores["rna"], link.scores["adt"]
    labels = mdata.mod["rna"].obs["celltype"].loc[x.index], mdata.mod["adt"].obs["celltype"].loc[y.index]
    assert min(metrics.label_transfer_both_ways(x, labels[0], y, labels[1])) > 0.85
    assert all(len(a) == 5 and max(a) > 0.1 for a in link.agreement.values())


@pytest.mark.filterwarnings("ignore:it is not sure")
def test_links_beside_geometry(two_sets):
    pytest.importorskip("ot")
    mdata, links = two_sets
    link = linkage.cca(mosaic_of(mdata), ("rna", "adt"), links, start="geometry", n_pcs=20)
    assert metrics.foscttm(*copies(mdata, link.scores)) < 0.25
    without = linkage.cca(mosaic_of(mdata), ("rna", "adt"), n_pcs=20, rounds=2)
    assert without.links is None and without.agreement == {}


def test_negative_links_are_turned(two_sets):
    mdata, links = two_sets
    turned = mdata.mod["adt"].copy()
    counts = turned.X.toarray() if sparse.issparse(turned.X) else np.array(turned.X)
    turned.X = counts.max(axis=0) - counts
    mirrored = MuData({"rna": mdata.mod["rna"], "adt": turned})
    settings = {"rna": "nb", "adt": "nb"}
    signed = links.assign(sign=-1)
    mosaic = Mosaic.from_mudata(mirrored, settings, batch_key="batch")
    good = linkage.cca(mosaic, ("rna", "adt"), signed, n_pcs=20, rounds=1)
    bad = linkage.cca(mosaic, ("rna", "adt"), links, n_pcs=20, rounds=1)
    assert metrics.foscttm(*copies(mdata, good.scores)) < 0.25 < metrics.foscttm(*copies(mdata, bad.scores))


def test_known_pairs_and_labels_are_given_from_outside(two_sets):
    mdata, links = two_sets
    mosaic = mosaic_of(mdata)
    link = linkage.cca(mosaic, ("rna", "adt"), links, n_pcs=20)
    x, y = link.scores["rna"], link.scores["adt"]
    both = x.index.intersection(y.index)
    oracle = Correspondence.from_pairs(x.index.get_indexer(both), y.index.get_indexer(both), (len(x), len(y)))
    ceiling = linkage.cca(mosaic, ("rna", "adt"), correspondence=oracle, n_pcs=20)
    assert metrics.foscttm(*copies(mdata, ceiling.scores)) < metrics.foscttm(*copies(mdata, link.scores))
    labels = [mdata.mod[m].obs["celltype"].loc[s.index].astype(str) for m, s in link.scores.items()]
    supervised = linkage.cca(
        mosaic, ("rna", "adt"), correspondence=Correspondence.from_labels(*labels), n_components=3, n_pcs=20
    )
    transfer = metrics.label_transfer_both_ways(
        supervised.scores["rna"], labels[0], supervised.scores["adt"], labels[1]
    )
    assert min(transfer) > 0.9


def test_labels_that_one_side_lacks_take_no_part():
    pi = Correspondence.from_labels(["B", "T", None, "B"], ["T", "NK", "B", "T"])
    full = pi.plan[np.ix_(*pi.groups)]
    assert_array_equal(full > 0, [[0, 0, 1, 0], [1, 0, 0, 1], [0, 0, 0, 0], [0, 0, 1, 0]])
    assert_allclose(pi.plan.sum(), 1)


def test_new_cells_get_the_scores_they_would_have_had(two_sets):
    mdata, links = two_sets
    mosaic = mosaic_of(mdata)
    link = linkage.cca(mosaic, ("rna", "adt"), links, n_pcs=20)
    again = link.transform(mosaic)
    for name, scores in link.scores.items():
        assert_allclose(again[name].loc[scores.index], scores, atol=1e-6)
    part = mosaic_of(MuData({"adt": mdata.mod["adt"][:40].copy()}))
    new = link.transform(part)
    assert list(new) == ["adt"]
    assert_allclose(new["adt"], link.scores["adt"].loc[new["adt"].index], atol=1e-6)
    with pytest.raises(ValueError, match="the features must be the same 40"):
        link.transform(mosaic_of(MuData({"adt": mdata.mod["adt"][:, :30].copy()})))
    with pytest.raises(ValueError, match="the linkage is between 'rna' and 'adt'"):
        link.transform(Mosaic.from_anndata({"atac": mdata.mod["adt"]}, batch_key="batch"))


def test_feature_links_are_found_again(two_sets):
    mdata, links = two_sets
    mosaic = mosaic_of(mdata)
    held_out = np.random.default_rng(0).permutation(len(links)) < 6
    link = linkage.cca(mosaic, ("rna", "adt"), links[~held_out], n_pcs=20)
    found = link.feature_links()
    assert found["correlation"].abs().is_monotonic_decreasing and found["mutual"].any()
    hidden = linkage.links_from_table(mosaic, ("rna", "adt"), links[held_out])
    precision, recall = linkage.link_recovery(found[found["correlation"] > 0], hidden)
    assert recall > 0.6
    # Known links stand out among all pairs of their features, and have the right sign.
    at_random = recall * len(found) / (120 * 40)
    assert precision > at_random / len(hidden)
    known = found.merge(links, on=["rna", "adt"])
    assert (known["correlation"] > 0).mean() > 0.8
    assert len(link.feature_links(level=0.5)) >= len(found)


def test_precision_and_recall_count_pairs(mdata):
    table = pd.DataFrame({"rna": ["gene1", "gene2"], "adt": ["protein1", "protein2"]})
    links = linkage.links_from_table(mosaic_of(mdata), ("rna", "adt"), table)
    found = pd.DataFrame({"rna": ["gene1", "gene1", "gene9"], "adt": ["protein1", "protein2", "protein1"]})
    assert linkage.link_recovery(found, links) == (0.5, 0.5)


# --------------------------------------------------------------------------------------------------- variational


def scaled(values):
    return ((values - values.mean(axis=0)) / values.std(axis=0)).astype(np.float32)


@pytest.fixture
def exact():
    """A linear model of 5 and 4 variables at arbitrary parameters, and the guide that is its exact posterior."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    widths = {"rna": 5, "adt": 4}
    model, guide = linkage.VariationalCCAModel(widths, 2, 0), linkage.VariationalCCAGuide(widths, 2, 0)
    parameters = {}
    for name, p in widths.items():
        private, log_noise, mean = rng.normal(size=(p, p)), rng.normal(size=p) / 3, rng.normal(size=p)
        within = private @ private.T + np.diag(np.exp(2 * log_noise))
        precision = rng.uniform(0.5, 3, size=2)  # of the expert, diagonal
        weight = linalg.sqrtm(within) @ stats.ortho_group.rvs(p, random_state=1)[:, :2] * np.sqrt(precision)
        with torch.no_grad():
            model.private[name].copy_(torch.tensor(private))
            model.log_noise[name].copy_(torch.tensor(log_noise))
            model.decoders[name].linear.weight.copy_(torch.tensor(weight))
            model.decoders[name].linear.bias.copy_(torch.tensor(mean))
            expert = (weight / precision).T @ np.linalg.inv(within)
            linear = guide.encoders[name].linear
            linear.weight.copy_(torch.tensor(np.vstack([expert, np.zeros_like(expert)])))
            linear.bias.copy_(torch.tensor(np.concatenate([-expert @ mean, -0.5 * np.log(precision)])))
        parameters[name] = weight, within, mean
    x, y = (torch.tensor(rng.normal(size=(6, p)), dtype=torch.float32) for p in widths.values())
    # Cells 0 to 3 have both, 4 and 5 the first modality, 6 and 7 the second.
    views = {"rna": (torch.arange(6), x), "adt": (torch.tensor([0, 1, 2, 3, 6, 7]), y)}
    return model, guide, views, parameters


def marginal(views, parameters):
    """Log likelihood of the linear model, cell by cell, with z and h integrated out."""
    (w_x, within_x, mean_x), (w_y, within_y, mean_y) = parameters.values()
    (_, x), (_, y) = views.values()
    xx, yy = w_x @ w_x.T + within_x, w_y @ w_y.T + within_y
    joint = np.block([[xx, w_x @ w_y.T], [w_y @ w_x.T, yy]])
    both = stats.multivariate_normal(np.concatenate([mean_x, mean_y]), joint).logpdf(np.hstack([x[:4], y[:4]]))
    alone = stats.multivariate_normal(mean_x, xx).logpdf(x[4:]), stats.multivariate_normal(mean_y, yy).logpdf(y[4:])
    return np.concatenate([both, *alone])


def test_bound_of_the_linear_model_is_the_exact_marginal_likelihood_at_the_exact_posterior(exact):
    model, guide, views, parameters = exact
    expected = marginal(views, parameters).mean()
    # log p(x, z) - log q(z) is the same whatever z is drawn.
    for _ in range(3):
        assert_allclose(-Trace_ELBO().loss(model, guide, views, 8), expected, rtol=1e-4)
    with torch.no_grad():
        guide.encoders["rna"].linear.bias += 1.0
    assert -np.mean([Trace_ELBO().loss(model, guide, views, 8) for _ in range(30)]) < expected - 0.1


def test_posterior_is_the_exact_one_and_narrower_with_both_modalities(exact):
    model, guide, views, parameters = exact
    with torch.no_grad():
        loc, scale = guide.posterior(views, 8)
    (w_x, within_x, mean_x), (w_y, within_y, mean_y) = parameters.values()
    joint = np.vstack([w_x, w_y])
    gain = joint.T @ np.linalg.inv(joint @ joint.T + linalg.block_diag(within_x, within_y))
    x, y = (values.numpy() for _, values in views.values())
    residuals = np.hstack([x[:4] - mean_x, y[:4] - mean_y])
    assert_allclose(loc[:4], residuals @ gain.T, atol=1e-4)
    assert_allclose(scale[:4] ** 2, np.tile(np.diag(np.eye(2) - gain @ joint), (4, 1)), rtol=1e-4)
    gain = w_x.T @ np.linalg.inv(w_x @ w_x.T + within_x)
    assert_allclose(loc[4:6], (x[4:] - mean_x) @ gain.T, atol=1e-4)
    assert_allclose(scale[4:6] ** 2, np.tile(np.diag(np.eye(2) - gain @ w_x), (2, 1)), rtol=1e-4)
    assert scale[:4].max(0).values.lt(scale[4:].min(0).values).all()


def test_every_term_of_the_bound_of_a_deep_model():
    torch.manual_seed(1)
    widths = {"rna": 3, "adt": 2}
    model, guide = linkage.VariationalCCAModel(widths, 2, 4), linkage.VariationalCCAGuide(widths, 2, 4)
    for curve in [*model.decoders.values(), *guide.encoders.values()]:
        nn.init.normal_(curve.bend[2].weight)
    views = {"rna": (torch.arange(3), torch.randn(3, 3)), "adt": (torch.tensor([0, 3]), torch.randn(2, 2))}
    with torch.no_grad():
        q = poutine.trace(guide).get_trace(views, 4)
        p = poutine.trace(poutine.replay(model, trace=q)).get_trace(views, 4)
        p.compute_log_prob()
        z = q.nodes["z"]["value"]
        loc, scale = guide.posterior(views, 4)
        for name, (rows, values) in views.items():
            layer, (first, _, last) = model.decoders[name].linear, model.decoders[name].bend
            mean = layer(z) + last(torch.relu(first(z)))
            within = model.private[name] @ model.private[name].T + torch.diag(torch.exp(2 * model.log_noise[name]))
            by_hand = [stats.multivariate_normal(mean[r], within).logpdf(v) for r, v in zip(rows, values, strict=True)]
            assert_allclose(p.nodes[name]["log_prob_sum"], sum(by_hand) / 4, rtol=1e-4)
        divergence = 0.5 * (scale**2 + loc**2 - 1 - 2 * scale.log()).sum() / 4
        torch.manual_seed(2)
        loss = TraceMeanField_ELBO().loss(model, guide, views, 4)
        torch.manual_seed(2)
        q = poutine.trace(guide).get_trace(views, 4)
        p = poutine.trace(poutine.replay(model, trace=q)).get_trace(views, 4)
        p.compute_log_prob()
        assert_allclose(loss, divergence - sum(p.nodes[n]["log_prob_sum"] for n in views), rtol=1e-5)


def test_from_a_random_start_with_true_pairs_it_finds_canonical_correlations():
    from sklearn.cross_decomposition import CCA

    rng, correlations = np.random.default_rng(0), np.array([0.95, 0.8])
    shared = rng.normal(size=(2000, 2))
    other = correlations * shared + np.sqrt(1 - correlations**2) * rng.normal(size=(2000, 2))
    x = np.hstack([shared, rng.normal(size=(2000, 2))]) @ rng.normal(size=(4, 4))
    y = np.hstack([other, rng.normal(size=(2000, 1))]) @ rng.normal(size=(3, 3))
    data = {
        name: (np.linalg.qr(v - v.mean(axis=0))[0] * np.sqrt(2000)).astype(np.float32)
        for name, v in (("rna", x), ("adt", y))
    }
    torch.manual_seed(0)
    widths = {name: v.shape[1] for name, v in data.items()}
    model, guide = linkage.VariationalCCAModel(widths, 2, 0), linkage.VariationalCCAGuide(widths, 2, 0)
    tensors = {name: torch.from_numpy(v) for name, v in data.items()}
    drawn = variational.minibatches(tensors, pairs(2000), {"rna": 0.0, "adt": 0.0}, 400, 256, 0)
    variational.train(model, guide, drawn, 0.05, 400)
    expected = linkage.canonical_correlation(*data.values(), pairs(2000), ridge=0).keep(2)
    implied = canonical_variables([np.eye(4), np.eye(3)], variational.implied_covariance(model))
    assert_allclose(implied.correlations[:2], expected.correlations, atol=0.04)
    reference = CCA(n_components=2, scale=False, max_iter=5000).fit(*data.values()).transform(*data.values())
    for k, (name, v) in enumerate(data.items()):
        weight = model.decoders[name].linear.weight.detach().double().numpy()
        assert linalg.subspace_angles(weight, expected.coefficients[k]).max() < 0.06
        # Given one modality, z is its canonical variables, known but for 1 - rho of its variance.
        z, sd = variational.encoded(guide, {name: (np.arange(2000), v)}, 2000)
        order = sd.mean(axis=0).argsort()
        assert_allclose((sd**2).mean(axis=0)[order], 1 - expected.correlations, atol=0.05)
        for i in range(2):
            assert abs(np.corrcoef(z[:, order[i]], reference[k][:, i])[0, 1]) > 0.98


def test_the_closed_form_is_a_maximum(planted):
    data = {name: scaled(values) for name, values in zip(("rna", "adt"), planted, strict=True)}
    covariances = {name: np.cov(v, rowvar=False, bias=True) for name, v in data.items()}
    canonical = canonical_variables(list(covariances.values()), pairs(2000).cross_covariance(*data.values())).keep(6)
    widths = {name: v.shape[1] for name, v in data.items()}
    model, guide = linkage.VariationalCCAModel(widths, 6, 0), linkage.VariationalCCAGuide(widths, 6, 0)
    variational.start(model, guide, canonical, covariances)
    views = {name: (torch.arange(2000), torch.from_numpy(v)) for name, v in data.items()}
    # With as many components as there are, the maximum of the likelihood is that of a normal without constraint.
    both = np.hstack(list(data.values())).astype(float)
    best = stats.multivariate_normal(np.zeros(14), both.T @ both / 2000).logpdf(both).mean()
    assert_allclose(-Trace_ELBO().loss(model, guide, views, 2000), best, atol=2e-3)


def test_networks_find_what_is_not_linear():
    rng = np.random.default_rng(0)
    angle = rng.uniform(0, 2 * np.pi, 500)  # sin t and cos t are uncorrelated with sin 2t and cos 2t, but tell them
    curves = {"first": [np.cos(angle), np.sin(angle)], "second": [np.cos(angle), np.sin(2 * angle), np.cos(2 * angle)]}
    parts = {}
    for name, curve in curves.items():
        values = np.array(curve).T @ rng.normal(size=(len(curve), 12)) + 0.1 * rng.normal(size=(500, 12))
        parts[name] = anndata.AnnData(values.astype(np.float32), pd.DataFrame(index=[f"c{i}" for i in range(500)]))
    mosaic = Mosaic.from_anndata(parts, {"first": "normal", "second": "normal"})
    options = {"correspondence": pairs(500), "n_components": 2, "n_pcs": 3, "ridge": 0.02, "batch_size": 256}
    explained = []
    for n_hidden in (0, 32):
        link = linkage.variational_cca(
            mosaic, ("first", "second"), n_hidden=n_hidden, n_steps=200, learning_rate=0.03, **options
        )
        x, y = (values / link._scale[name] for name, (_, values) in link.components(mosaic).items())
        z, _ = variational.encoded(link.guide, {"first": (np.arange(500), x)}, 500)
        predicted = link.model.decoders["second"](torch.from_numpy(z)).detach().numpy()
        explained.append(1 - ((y - predicted) ** 2).sum() / ((y - y.mean(axis=0)) ** 2).sum())
    assert explained[0] < 0.36 and explained[1] > 0.5  # by a line a third is explained at most: cos t of three


def test_pairs_are_drawn_as_they_correspond():
    rng = np.random.default_rng(0)
    groups = np.array([0, 2, 1, 0]), np.array([1, 0, 1])
    plan = np.array([[0.1, 0.2], [0.0, 0.4], [0.3, 0.0]])
    pi = Correspondence(plan, groups)
    size = [np.bincount(g) for g in groups]
    expected = plan[np.ix_(*groups)] / np.outer(size[0][groups[0]], size[1][groups[1]])
    for same in (pi, Correspondence(sparse.csr_array(plan), groups)):
        first, second = same.draw(20_000, rng)
        counts = np.zeros((4, 3))
        np.add.at(counts, (first, second), 1)
        assert counts[expected == 0].sum() == 0
        observed = counts[expected > 0]
        assert stats.chisquare(observed, 20_000 * expected[expected > 0]).pvalue > 1e-3


def test_variational_linkage_of_blood_cells_has_all_that_a_linkage_has():
    mdata = pbmc_mosaic()
    mosaic = mosaic_of(mdata)
    classical = linkage.cca(mosaic, ("rna", "adt"), protein_gene_links())
    link = linkage.variational_cca(mosaic, ("rna", "adt"), protein_gene_links(), n_steps=100)
    assert isinstance(link, linkage.Linkage)
    assert metrics.foscttm(*copies(mdata, link.scores)) <= 0.056
    x, y = link.scores["rna"], link.scores["adt"]
    labels = mdata.mod["rna"].obs["celltype"].loc[x.index], mdata.mod["adt"].obs["celltype"].loc[y.index]
    there, back = metrics.label_transfer_both_ways(x, labels[0], y, labels[1])
    assert there >= 0.94 and back >= 0.92
    assert_allclose(link.correlations, classical.correlations, atol=0.08)
    mean, sd = link.posterior(mosaic)
    assert list(mean.index) == list(mosaic.obs_names) and (sd < 1).all(axis=None)
    both = mosaic.presence.all(axis=1)
    assert (sd[both].mean() < sd[~both].mean()).all()
    new = link.transform(mosaic_of(MuData({"adt": mdata.mod["adt"][:40].copy()})))
    assert list(new) == ["adt"]
    assert_allclose(new["adt"], link.scores["adt"].loc[new["adt"].index], atol=1e-5)
    expected, found = (table.feature_links().iloc[:200] for table in (classical, link))
    assert len(found.merge(expected, on=["rna", "adt"])) > 150
    given = {"correspondence": classical.correspondence, "n_steps": 100}
    again = linkage.variational_cca(mosaic, ("rna", "adt"), protein_gene_links(), **given)
    assert_array_equal(again.scores["rna"], link.scores["rna"])
    with pytest.raises(ValueError, match="batch_size must be a multiple of 4; found 6"):
        linkage.variational_cca(mosaic, ("rna", "adt"), protein_gene_links(), batch_size=6)
    with pytest.raises(ValueError, match="there is no modality 'atac'"):
        linkage.variational_cca(mosaic, ("rna", "atac"))


# ------------------------------------------------------------------------------------------------------- leakage


@pytest.mark.parametrize("n_metacells", [4096, 128])
def test_the_order_of_cells_does_not_matter(two_sets, n_metacells):
    mdata, links = two_sets
    order = np.random.default_rng(0).permutation(mdata.mod["adt"].n_obs)
    shuffled = MuData({"rna": mdata.mod["rna"], "adt": mdata.mod["adt"][order].copy()})
    first, second = (
        linkage.cca(mosaic_of(m), ("rna", "adt"), links, n_pcs=20, n_metacells=n_metacells) for m in (mdata, shuffled)
    )
    for start, agreement in first.agreement.items():
        assert_allclose(agreement, second.agreement[start], atol=1e-5)
    for name in first.scores:
        assert_allclose(second.scores[name].loc[first.scores[name].index], first.scores[name], atol=1e-4)


def test_pairing_and_obs_are_not_looked_at(two_sets):
    mdata, links = two_sets
    expected = linkage.cca(mosaic_of(mdata), ("rna", "adt"), links, n_pcs=20).scores
    bare = {}
    for name, data in mdata.mod.items():
        bare[name] = data.copy()
        bare[name].obs = data.obs[["batch"]]
        bare[name].obs_names = [f"{name}{i}" for i in range(data.n_obs)]  # no cell is in both
    mosaic = Mosaic.from_anndata(bare, batch_key="batch")
    assert not mosaic.presence.all(axis=1).any()
    found = linkage.cca(mosaic, ("rna", "adt"), links, n_pcs=20).scores
    for name, data in mdata.mod.items():
        assert_allclose(found[name].loc[bare[name].obs_names], expected[name].loc[data.obs_names], atol=1e-6)


def test_shuffled_features_give_chance():
    mdata = pbmc_mosaic()
    rng = np.random.default_rng(0)
    adt = mdata.mod["adt"].copy()
    counts = adt.X.toarray()
    adt.X = sparse.csr_matrix(rng.permuted(counts, axis=0))
    null = MuData({"rna": mdata.mod["rna"], "adt": adt})
    with pytest.warns(UserWarning, match="it is not clear that the links match the right cells"):
        link = linkage.cca(mosaic_of(null), ("rna", "adt"), protein_gene_links())
    assert abs(metrics.foscttm(*copies(mdata, link.scores)) - 0.5) < 0.03


def test_links_that_agree_by_chance_are_warned_of():
    doubtful = "it is not clear that the links match the right cells"
    false, missed = [], []
    for seed in range(5000, 5010):
        mdata, truth = simulate(400, {"rna": 80, "adt": 30}, patterns=["rna", "adt"], links={"adt": 1.0}, seed=seed)
        mosaic = mosaic_of(mdata)
        linked = truth.links.sample(20, random_state=seed)
        right = pd.DataFrame({"rna": linked["gene"], "adt": linked["feature"]})
        wrong = right.assign(adt=np.roll(right["adt"], 1))
        for links, warned in ((right, false), (wrong, missed)):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                linkage.cca(mosaic, ("rna", "adt"), links, n_pcs=10)
            warned.append(any(doubtful in str(w.message) for w in caught))
    assert sum(false) <= 1 and sum(missed) >= 8


def test_too_few_links_are_warned_of(two_sets):
    mdata, links = two_sets
    with pytest.warns(UserWarning, match="1 link cannot show whether the right cells are matched"):
        linkage.cca(mosaic_of(mdata), ("rna", "adt"), links[:1], n_pcs=20)
    with pytest.warns(UserWarning, match=r"hardly better than other features do \(p = .*, 3 links\)"):
        linkage.cca(mosaic_of(mdata), ("rna", "adt"), links[:3], n_pcs=20)


def test_chance_is_a_permutation_test():
    """Against all exchanges of four partners, one by one."""
    correlations = np.random.default_rng(1).normal(size=(4, 4))
    left_out = np.array([2, 0, 3, 1])
    own = correlations[np.arange(4), left_out].mean()
    every = [correlations[np.arange(4), list(order)].mean() for order in permutations(range(4))]
    assert abs(chance(correlations, left_out, seed=0) - np.mean(np.array(every) >= own - 1e-12)) < 0.05


def test_one_matrix_under_two_names_is_refused():
    rna = pbmc_mosaic().mod["rna"]
    order = np.random.default_rng(0).permutation(rna.n_obs)
    twice = Mosaic.from_anndata(
        {"rna": rna, "again": rna[order].copy()}, {"rna": "nb", "again": "nb"}, batch_key="batch"
    )
    with pytest.raises(ValueError, match="hold the same measurements"):
        linkage.cca(twice, ("rna", "again"), linkage.links_by_name(twice, ("rna", "again")))
    link = linkage.cca(mosaic_of(pbmc_mosaic()), ("rna", "adt"), protein_gene_links(), rounds=1)
    with pytest.raises(ValueError, match="are the same matrix"):
        metrics.foscttm(link.scores["rna"], link.scores["rna"])


# ---------------------------------------------------------------------------------------------------- real cells


def test_antibodies_and_rna_of_blood_cells():
    mdata = pbmc_mosaic()
    link = linkage.cca(mosaic_of(mdata), ("rna", "adt"), protein_gene_links())
    assert metrics.foscttm(*copies(mdata, link.scores)) <= 0.056
    x, y = link.scores["rna"], link.scores["adt"]
    labels = mdata.mod["rna"].obs["celltype"].loc[x.index], mdata.mod["adt"].obs["celltype"].loc[y.index]
    there, back = metrics.label_transfer_both_ways(x, labels[0], y, labels[1])
    assert there >= 0.94 and back >= 0.92


# ------------------------------------------------------------------------------------------------------ bad input


def test_bad_input_is_refused_in_one_sentence(two_sets, mdata):
    whole, links = two_sets
    mosaic = mosaic_of(whole)
    run = partial(linkage.cca, mosaic, ("rna", "adt"))
    with pytest.raises(ValueError, match="there is no modality 'atac'; the mosaic has 'rna', 'adt'"):
        linkage.cca(mosaic, ("rna", "atac"), links)
    with pytest.raises(ValueError, match="needs two different modalities; found 'rna' twice"):
        linkage.cca(mosaic, ("rna", "rna"), links)
    with pytest.raises(ValueError, match="has 24 cells; 30 principal components need at least 31"):
        linkage.cca(mosaic_of(mdata), ("rna", "adt"), pd.DataFrame({"rna": ["gene1"], "adt": ["protein1"]}))
    one = MuData({name: data[:1].copy() for name, data in whole.mod.items()})
    with pytest.raises(ValueError, match="has 1 cell; 30 principal components need"):
        linkage.cca(mosaic_of(one), ("rna", "adt"), links)
    with pytest.raises(
        ValueError, match="n_components must be between 1 and 20, the number of principal components; found 21"
    ):
        run(links, n_pcs=20, n_components=21)
    with pytest.raises(ValueError, match="no linked feature is left: none of the 1 links"):
        run(pd.DataFrame({"rna": ["unheard"], "adt": ["of"]}))
    with pytest.raises(ValueError, match="match must be 'transport', 'mutual', 'assignment' or .* found 'best'"):
        run(links, match="best")
    with pytest.raises(ValueError, match="start must be 'links', 'diagonal', 'geometry', 'pairs' or None; found 'end'"):
        run(links, start="end")
    with pytest.raises(ValueError, match="rounds must be a whole number from 1 to 1e9; found 0"):
        run(links, rounds=0)
    with pytest.raises(ValueError, match="at least one pair of cells"):
        Correspondence.from_pairs([], [], (3, 3))


def test_constant_features_are_left_out_and_named(two_sets):
    mdata, links = two_sets
    rna = mdata.mod["rna"].copy()
    counts = rna.X.toarray()
    constant = rna.var_names.get_loc(links["rna"].iloc[0])
    counts[:, constant] = 0
    rna.X = sparse.csr_matrix(counts)
    mosaic = mosaic_of(MuData({"rna": rna, "adt": mdata.mod["adt"]}))
    with pytest.warns(UserWarning, match=f"1 of {len(links)} links are left out.*{links['rna'].iloc[0]}"):
        link = linkage.cca(mosaic, ("rna", "adt"), links, n_pcs=20)
    assert len(link.links) == len(links) - 1 and np.isfinite(link.scores["rna"].to_numpy()).all()
    with pytest.raises(ValueError, match="each of the 1 links has a feature that never varies"):
        linkage.cca(mosaic, ("rna", "adt"), links[:1], n_pcs=20)


def test_geometry_without_pot_says_what_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "ot", None)
    with pytest.raises(ModuleNotFoundError, match="pip install 'pyromosaic\\[linkage\\]'"):
        linkage.gromov_wasserstein(np.eye(3), np.eye(3), (np.full(3, 1 / 3),) * 2)


# --------------------------------------------------------------------------------------------------------- memory


def test_large_sparse_data_stay_sparse():
    """20,000 × 3,000 and 20,000 × 200: as an array the first alone has 480 MB, a full matching 3.2 GB."""
    rng = np.random.default_rng(0)
    kind = rng.integers(0, 6, 20_000)

    def block(width, per_cell, name):
        rows = np.repeat(np.arange(20_000), per_cell)
        columns = rng.integers(0, width // 6, len(rows)) * 6 + np.where(
            rng.random(len(rows)) < 0.3, kind[rows], rng.integers(0, 6, len(rows))
        )
        counts = sparse.csr_matrix((np.ones(len(rows), np.float32), (rows, columns)), shape=(20_000, width))
        return anndata.AnnData(counts, var=pd.DataFrame(index=[f"{name}{i}" for i in range(width)]))

    mosaic = Mosaic.from_anndata({"rna": block(3000, 90, "g"), "adt": block(200, 40, "p")})
    table = pd.DataFrame({"rna": [f"g{i}" for i in range(120)], "adt": [f"p{i}" for i in range(120)]})
    tracemalloc.start()
    link = linkage.cca(mosaic, ("rna", "adt"), table, n_metacells=1024, rounds=2)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 150e6
    x, y = (s.to_numpy() for s in link.scores.values())
    assert np.mean(kind[(x[:500] @ y.T).argmax(axis=1)] == kind[:500]) > 0.9


def test_what_never_varies_has_no_correlation():
    """Two cells leave one in each half, and sparse ones may leave a half of zeros."""
    x, y = np.array([[1.0, 0.0]] * 4), np.array([[0.0, 1.0], [1.0, 0.0], [2.0, 1.0], [0.0, 3.0]])
    for n in (4, 2):
        pi = Correspondence(np.full((n, n), 1 / n**2), (np.arange(n), np.arange(n)))
        canonical = linkage.canonical_correlation(x[:n], y[:n], pi)
        assert_array_equal(canonical.correlations, 0)
        assert np.isfinite(np.concatenate(canonical.coefficients)).all()
        with pytest.warns(UserWarning, match="come from few pairs of cells"):
            assert_array_equal(linkage.crossfit_correlations(x[:n], y[:n], pi), 0)


def test_few_hard_pairs_give_a_warning_and_none_in_a_half_an_error():
    """Only pairs with both cells in one half count, which is half of them; the spread is that of all cells."""
    shared = np.random.default_rng(0).standard_normal((400, 1))
    x, y = (shared + np.random.default_rng(seed).standard_normal((400, 3)) for seed in (1, 2))

    def crossfit(n):
        return linkage.crossfit_correlations(x, y, Correspondence.from_pairs(np.arange(n), np.arange(n), (400, 400)))

    with warnings.catch_warnings(action="error"):
        assert 0.4 < crossfit(400)[0] < 0.9
    with pytest.warns(UserWarning, match=r"come from few pairs of cells \(\d+ within one half\) and are rough"):
        crossfit(20)
    with pytest.raises(ValueError, match="needs cells that correspond within each half"):
        crossfit(1)
