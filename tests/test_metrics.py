from collections import Counter

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.testing import assert_allclose, assert_array_equal
from scipy import sparse, stats
from sklearn.metrics import average_precision_score

from pyromosaic import metrics
from pyromosaic.metrics import (
    error_by_uncertainty,
    expected_calibration_error,
    foscttm,
    imputation_auprc,
    imputation_spearman,
    interval_coverage,
    label_purity,
    label_transfer_accuracy,
    label_transfer_both_ways,
    modality_enrichment,
    neighbor_rank_distance,
    reliability_curve,
    scale_by_library,
    smooth_by_neighbors,
)
from pyromosaic.metrics.neighbors import nearest_neighbors
from pyromosaic.neighbors import vote

few_draws = settings(max_examples=40, deadline=None, derandomize=True)
small_integers = st.integers(-2, 2).map(float)


def lattice(n_cells):
    """Latents on a small grid: many cells at equal distances, some on top of each other."""
    return arrays(np.float64, (n_cells, 2), elements=small_integers)


@st.composite
def copies(draw):
    n_cells = draw(st.integers(2, 9))
    x, y = draw(lattice(n_cells)), draw(lattice(n_cells))
    x[0] = 9.0  # never one matrix twice
    return x, y


@pytest.fixture
def rng():
    return np.random.default_rng(20)


def distance(a, b):
    return sum((p - q) ** 2 for p, q in zip(a.tolist(), b.tolist(), strict=True))


def half_ties(others, true):
    return sum(1.0 if d < true else 0.5 if d == true else 0.0 for d in others)


# ---------------------------------------------------------------------------------------------------- FOSCTTM


def foscttm_by_definition(x, y):
    n = len(x)
    per_cell = []
    for i in range(n):
        true = distance(x[i], y[i])
        from_x = half_ties([distance(x[i], y[j]) for j in range(n) if j != i], true)
        from_y = half_ties([distance(x[j], y[i]) for j in range(n) if j != i], true)
        per_cell.append((from_x + from_y) / (2 * (n - 1)))
    return np.array(per_cell)


@few_draws
@given(copies(), st.integers(1, 12))
def test_foscttm_is_its_definition_with_ties_on_both_sides(pair, block_size):
    x, y = pair
    expected = foscttm_by_definition(x, y)
    assert_allclose(foscttm(x, y, per_cell=True, block_size=block_size), expected, atol=1e-12)
    assert foscttm(x, y, block_size=block_size) == pytest.approx(expected.mean(), abs=1e-12)
    assert foscttm(y, x) == pytest.approx(foscttm(x, y), abs=1e-12)


def test_foscttm_sees_both_sides():
    x = np.array([[0.0], [1.0], [2.0], [3.0]])
    y = np.array([[0.0], [0.1], [0.2], [0.3]])
    per_cell = foscttm(x, y, per_cell=True)
    assert_allclose(per_cell, foscttm_by_definition(x, y))
    # No y is nearer to x_3 than y_3, but all of x_0, x_1 and x_2 are nearer to y_3 than x_3.
    assert per_cell[3] == 0.5
    assert per_cell[0] == 0.0


def test_foscttm_known_values(rng):
    x = rng.normal(size=(600, 8))
    assert foscttm(x, x + 1e-6 * rng.normal(size=x.shape)) == 0.0
    assert foscttm(x, rng.permutation(x)) == pytest.approx(0.5, abs=0.02)
    assert foscttm(x, rng.normal(size=x.shape)) == pytest.approx(0.5, abs=0.02)
    # Two modalities, each collapsed to a point, know nothing of their cells.
    assert foscttm(np.zeros((50, 3)), np.ones((50, 3))) == 0.5
    # The true match is the farthest of all.
    assert foscttm(np.array([[-1.0], [1.0]]), np.array([[1.0], [-1.0]])) == 1.0


@pytest.mark.parametrize("measure", [foscttm, neighbor_rank_distance])
def test_copies_may_come_in_any_order_dtype_place_and_block(measure, rng):
    x = rng.normal(size=(157, 5)).astype(np.float32)
    y = (x + rng.normal(size=x.shape)).astype(np.float32)
    whole = measure(x, y)
    assert isinstance(whole, float)
    assert 0.05 < whole < 0.5
    order = rng.permutation(len(x))
    assert measure(x[order], y[order]) == pytest.approx(whole, abs=1e-12)
    assert measure(x, y, block_size=1) == measure(x, y, block_size=157) == measure(x, y, block_size=50) == whole
    assert measure(x.astype(np.float64), pd.DataFrame(y)) == whole
    assert measure(x.astype(np.float64) + 1e6, y.astype(np.float64) + 1e6) == pytest.approx(whole, abs=1e-4)
    assert measure(x, y[order]) > whole


def test_foscttm_cells_follow_their_order(rng):
    x, y = rng.normal(size=(40, 3)), rng.normal(size=(40, 3))
    order = rng.permutation(40)
    assert_allclose(foscttm(x[order], y[order], per_cell=True), foscttm(x, y, per_cell=True)[order], atol=1e-12)


# --------------------------------------------------------------------------------------- Neighbour rank distance


def rank_distance_by_definition(x, y, others=None):
    """Grow K until each copy is among the other's K nearest; no equal distances here."""
    space = np.concatenate([x, y] + ([] if others is None else [others]))
    n = len(x)
    ranks = []
    for i in range(n):
        nearest = {}
        for own, copy in ((i, n + i), (n + i, i)):
            order = sorted((p for p in range(len(space)) if p != own), key=lambda p: distance(space[own], space[p]))
            nearest[copy] = order
        k = 1
        while not all(copy in order[:k] for copy, order in nearest.items()):
            k += 1
        ranks.append(k)
    return float(np.mean(ranks)), len(space) - 1


@pytest.mark.parametrize("n_others", [0, 17])
@pytest.mark.parametrize("noise", [0.3, 3.0])
def test_rank_distance_is_its_definition(n_others, noise, rng):
    x = rng.normal(size=(23, 3))
    y = x + noise * rng.normal(size=x.shape)
    others = rng.normal(size=(n_others, 3)) if n_others else None
    k, k_max = rank_distance_by_definition(x, y, others)
    assert neighbor_rank_distance(x, y, others=others, normalized=False, block_size=5) == pytest.approx(k, abs=1e-12)
    assert neighbor_rank_distance(x, y, others=others) == pytest.approx((k - 1) / (k_max - 1), abs=1e-12)


@few_draws
@given(copies())
def test_rank_distance_counts_ties_one_half(pair):
    x, y = pair
    n, space = len(x), np.concatenate(pair)
    between = []
    for i in range(n):
        true = distance(x[i], y[i])
        sides = [
            half_ties([distance(space[own], space[p]) for p in range(2 * n) if p not in (i, n + i)], true)
            for own in (i, n + i)
        ]
        between.append(max(sides))
    assert neighbor_rank_distance(x, y) == pytest.approx(np.mean(between) / (2 * n - 2), abs=1e-12)


def test_rank_distance_known_values(rng):
    x = rng.normal(size=(200, 4))
    near = x + 1e-6 * rng.normal(size=x.shape)
    assert neighbor_rank_distance(x, near) == 0.0
    assert neighbor_rank_distance(x, near, normalized=False) == 1.0
    # Modalities far apart: at least all the other cells of a copy's own modality come first.
    apart = neighbor_rank_distance(x, near + 100.0)
    assert apart >= 0.5
    # Scattered at random on a line the larger of two ranks is what counts.
    line = rng.uniform(size=(500, 1))
    assert 0.5 < neighbor_rank_distance(line, rng.uniform(size=line.shape)) < 2 / 3


def test_rank_distance_takes_the_worse_side():
    # y_0 is the nearest to x_0, but three other copies are nearer to y_0 than x_0 is.
    x = np.array([[0.0], [12.0]])
    y = np.array([[5.0], [6.0]])
    others = np.array([[7.0]])
    # From x_0: y_0 first (K = 1); from y_0: y_1, others, x_0 (K = 3). Cell 1: x_1 has others first (K = 2),
    # y_1 has y_0 and others at distance 1, x_0 and x_1 tied at 6: 2 closer and half a tie (K = 3.5).
    assert neighbor_rank_distance(x, y, others=others, normalized=False) == (3 + 3.5) / 2


# ------------------------------------------------------------------------------------------------ Label transfer


def transfer_by_definition(reference, reference_labels, query, query_labels, k):
    right = 0
    for cell, wanted in zip(query, query_labels, strict=True):
        order = sorted(range(len(reference)), key=lambda i: distance(cell, reference[i]))[:k]
        votes = Counter(reference_labels[i] for i in order)
        most = max(votes.values())
        right += next(reference_labels[i] for i in order if votes[reference_labels[i]] == most) == wanted
    return right / len(query)


@pytest.mark.parametrize("k", [1, 2, 3, 6, 15, 40])
def test_label_transfer_is_its_definition(k, rng):
    centers = 1.5 * rng.normal(size=(5, 3))
    labels_x, labels_y = rng.integers(5, size=40), rng.integers(5, size=31)
    x, y = centers[labels_x] + rng.normal(size=(40, 3)), centers[labels_y] + rng.normal(size=(31, 3))
    names = np.array(["B", "NK", "CD4 T", "CD8 T", "Mono"])
    expected = transfer_by_definition(x, names[labels_x], y, names[labels_y], k)
    assert 0 < expected < 1
    given_labels = pd.Categorical(names[labels_x]), pd.Series(names[labels_y])
    assert label_transfer_accuracy(x, given_labels[0], y, given_labels[1], k) == expected


def test_label_transfer_asks_the_nearest_cell_by_default(rng):
    x, y = rng.normal(size=(60, 3)), rng.normal(size=(50, 3))
    labels_x, labels_y = rng.integers(3, size=60), rng.integers(3, size=50)
    expected = transfer_by_definition(x, labels_x, y, labels_y, 1)
    assert label_transfer_accuracy(x, labels_x, y, labels_y) == expected


def test_label_transfer_settles_equal_votes_by_the_nearest():
    reference, labels = np.array([[1.0], [2.0], [3.0], [4.0]]), ["B", "NK", "NK", "B"]
    assert label_transfer_accuracy(reference, labels, [[0.0]], ["B"], 4) == 1.0
    assert label_transfer_accuracy(reference, labels, [[0.0]], ["NK"], 3) == 1.0
    assert label_transfer_accuracy(reference, labels, [[2.4]], ["NK"], 4) == 1.0


def test_label_transfer_is_deterministic_under_equal_distances():
    reference, query = np.zeros((50, 2)), np.zeros((3, 2))
    labels = [f"type {i % 7}" for i in range(50)]
    scores = {label_transfer_accuracy(reference, labels, query, ["type 1"] * 3, 9) for _ in range(5)}
    assert len(scores) == 1
    assert scores <= {0.0, 1.0}


def test_label_transfer_knows_direction(rng):
    # Every y cell has an x cell of its type; the last x cell has no y cell of its type.
    x = np.array([[0.0], [10.0], [20.0]])
    y = np.array([[0.1], [10.1]])
    both = label_transfer_both_ways(x, ["B", "NK", "Mono"], y, ["B", "NK"])
    assert both == (1.0, pytest.approx(2 / 3))
    assert both.x_to_y == label_transfer_accuracy(x, ["B", "NK", "Mono"], y, ["B", "NK"])
    assert both.y_to_x == label_transfer_accuracy(y, ["B", "NK"], x, ["B", "NK", "Mono"])
    wide_x, wide_y = rng.normal(size=(30, 2)), rng.normal(size=(40, 2))
    types_x, types_y = rng.integers(3, size=30), rng.integers(3, size=40)
    both = label_transfer_both_ways(wide_x, types_x, wide_y, types_y, n_neighbors=5)
    assert both.x_to_y == transfer_by_definition(wide_x, types_x, wide_y, types_y, 5)
    assert both.y_to_x == transfer_by_definition(wide_y, types_y, wide_x, types_x, 5)


def test_label_transfer_ignores_the_order_of_cells(rng):
    x, y = rng.normal(size=(80, 4)), rng.normal(size=(70, 4))
    a, b = rng.integers(3, size=80), rng.integers(3, size=70)
    p, q = rng.permutation(80), rng.permutation(70)
    assert label_transfer_accuracy(x[p], a[p], y[q], b[q], 7) == label_transfer_accuracy(x, a, y, b, 7)


# --------------------------------------------------------------------------------------- Neighbours, purity, mixing


@pytest.mark.parametrize("n_dims", [2, 30])
def test_nearest_neighbors_are_exact_and_leave_the_cell_out(n_dims, rng):
    x, y = rng.normal(size=(70, n_dims)), rng.normal(size=(20, n_dims))
    own = [sorted((j for j in range(70) if j != i), key=lambda j: distance(x[i], x[j]))[:9] for i in range(70)]
    assert_array_equal(nearest_neighbors(x, 9), own)
    assert_array_equal(nearest_neighbors(x + 1e7, 9), own)
    other = [sorted(range(70), key=lambda j: distance(y[i], x[j]))[:9] for i in range(20)]
    assert_array_equal(nearest_neighbors(x, 9, y), other)
    assert (np.sort(nearest_neighbors(x, 69), axis=1) == [[j for j in range(70) if j != i] for i in range(70)]).all()


def test_a_cell_on_top_of_others_is_still_not_its_own_neighbor():
    neighbors = nearest_neighbors(np.zeros((12, 3)), 5)
    assert not (neighbors == np.arange(12)[:, None]).any()
    assert all(len(set(row)) == 5 for row in neighbors.tolist())
    assert_array_equal(neighbors, nearest_neighbors(np.zeros((12, 3)), 5))


def own_share_by_definition(latent, labels, k):
    shares = []
    for i in range(len(latent)):
        order = sorted((j for j in range(len(latent)) if j != i), key=lambda j: distance(latent[i], latent[j]))[:k]
        shares.append(sum(labels[j] == labels[i] for j in order) / k)
    return float(np.mean(shares))


@pytest.mark.parametrize("k", [1, 4, 15, 49])
def test_purity_and_enrichment_are_their_definitions(k, rng):
    groups = rng.choice(["rna", "adt", "both"], p=[0.5, 0.2, 0.3], size=50)
    latent = rng.normal(size=(50, 3)) + (groups == "adt")[:, None]
    share = own_share_by_definition(latent, groups.tolist(), k)
    assert label_purity(latent, groups, k) == pytest.approx(share, abs=1e-12)
    chance = sum((count / 50) ** 2 for count in Counter(groups.tolist()).values())
    assert modality_enrichment(latent, pd.Categorical(groups), k) == pytest.approx(share / chance, abs=1e-12)


def test_purity_and_enrichment_look_at_fifteen_neighbors_by_default(rng):
    latent, groups = rng.normal(size=(60, 2)), rng.integers(2, size=60)
    assert label_purity(latent, groups) == label_purity(latent, groups, 15)
    assert modality_enrichment(latent, groups) == modality_enrichment(latent, groups, 15)


def test_enrichment_is_one_when_mixed_and_its_greatest_when_apart(rng):
    groups = np.repeat(["rna", "adt", "both"], [600, 300, 300])
    greatest = 1 / (0.5**2 + 2 * 0.25**2)
    latent = rng.normal(size=(1200, 5))
    assert modality_enrichment(latent, groups) == pytest.approx(1.0, abs=0.03)
    apart = latent + 1000.0 * np.repeat([0, 1, 2], [600, 300, 300])[:, None]
    assert modality_enrichment(apart, groups) == pytest.approx(greatest, abs=1e-12)
    assert label_purity(apart, groups) == 1.0
    assert label_purity(latent, groups) == pytest.approx(1 / greatest, abs=0.02)


def test_purity_ignores_order_scale_and_names(rng):
    latent = rng.normal(size=(90, 4)).astype(np.float32)
    labels = rng.integers(4, size=90)
    order = rng.permutation(90)
    purity = label_purity(latent, labels, 8)
    assert label_purity(latent[order], labels[order], 8) == pytest.approx(purity, abs=1e-12)
    assert label_purity(4 * latent, labels.astype(str), 8) == pytest.approx(purity, abs=1e-12)
    enrichment = modality_enrichment(latent, labels, 8)
    assert modality_enrichment(latent[order], labels[order], 8) == pytest.approx(enrichment, abs=1e-12)


# ---------------------------------------------------------------------------------------------------- Imputation


@few_draws
@given(
    arrays(np.float64, (6, 4), elements=st.integers(-2, 3).map(float)),
    arrays(np.float64, (6, 4), elements=st.integers(-2, 3).map(float)),
)
def test_spearman_agrees_with_scipy_whatever_the_signs_and_ties(truth, imputed):
    def reference(a, b):
        constant = np.ptp(a) == 0 or np.ptp(b) == 0
        return np.nan if constant else stats.spearmanr(a, b).statistic

    assert_allclose(imputation_spearman(truth, imputed), reference(truth.ravel(), imputed.ravel()), atol=1e-12)
    per_feature = [reference(truth[:, j], imputed[:, j]) for j in range(4)]
    assert_allclose(imputation_spearman(truth, imputed, per="feature"), per_feature, atol=1e-12)
    per_cell = [reference(truth[i], imputed[i]) for i in range(6)]
    assert_allclose(imputation_spearman(truth, imputed, per="cell"), per_cell, atol=1e-12)


@pytest.mark.parametrize("container", [sparse.csr_matrix, sparse.csc_array, sparse.coo_array, pd.DataFrame])
@pytest.mark.parametrize("per", ["all", "feature", "cell"])
def test_spearman_takes_sparse_and_dense_truth_alike(container, per, rng):
    truth = rng.poisson(0.3, size=(80, 30))
    imputed = rng.gamma(1.0, size=truth.shape).astype(np.float32) + 0.2 * truth.astype(np.float32)
    dense = imputation_spearman(truth, imputed, per)
    assert_array_equal(imputation_spearman(container(truth), imputed, per), dense)
    assert np.all(np.asarray(dense)[np.isfinite(dense)] > -0.5)
    assert np.shape(dense) == {"all": (), "feature": (30,), "cell": (80,)}[per]


def test_spearman_reads_stored_zeros_and_duplicates_as_the_matrix_they_make(rng):
    truth = rng.poisson(0.5, size=(20, 6)).astype(float)
    entries, bounds = [], [0]
    for row in truth:
        entries += [(0, row[0] - 2.0), (0, 2.0), (1, row[1])] + [(j, row[j]) for j in range(2, 6) if row[j]]
        bounds.append(len(entries))
    columns, values = np.array(entries).T
    stored = sparse.csr_array((values, columns.astype(int), bounds), shape=truth.shape)
    assert_array_equal(stored.toarray(), truth)
    assert not stored.has_canonical_format
    imputed = rng.normal(size=truth.shape)
    for per in ("all", "feature", "cell"):
        assert_array_equal(imputation_spearman(stored, imputed, per), imputation_spearman(truth, imputed, per))


def test_spearman_is_blind_to_monotone_change_and_nan_for_constants(rng):
    truth = rng.poisson(2.0, size=(40, 5)).astype(float)
    truth[:, 2] = 0.0
    truth[:, 3] = 7.0
    imputed = rng.gamma(2.0, size=truth.shape)
    imputed[:, 4] = 1.0
    per_feature = imputation_spearman(truth, imputed, per="feature")
    assert_array_equal(np.isnan(per_feature), [False, False, True, True, True])
    assert_allclose(imputation_spearman(truth, np.log(imputed), per="feature"), per_feature)
    assert imputation_spearman(truth, 3 * truth + 1) == pytest.approx(1.0)
    assert imputation_spearman(truth, -truth) == pytest.approx(-1.0)
    assert np.isnan(imputation_spearman(np.zeros((3, 2)), imputed[:3, :2]))


@few_draws
@given(st.integers(0, 10_000), st.floats(0.02, 0.9))
def test_auprc_agrees_with_scikit_learn(seed, density):
    rng = np.random.default_rng(seed)
    truth = rng.poisson(2.0, size=(15, 7)) * (rng.uniform(size=(15, 7)) < density)
    truth[3, 4] = 2
    probability = rng.integers(0, 11, size=truth.shape) / 10
    expected = average_precision_score((truth > 0).ravel(), probability.ravel())
    assert imputation_auprc(truth, probability) == pytest.approx(expected, abs=1e-12)
    assert imputation_auprc(sparse.csr_array(truth), probability.astype(np.float32)) == pytest.approx(expected)


def test_auprc_known_values(rng):
    truth = rng.poisson(0.1, size=(200, 50))
    assert imputation_auprc(truth, truth / truth.max()) == 1.0
    assert imputation_auprc(truth, np.full(truth.shape, 0.3)) == pytest.approx((truth > 0).mean())
    # Ranks: hit, miss, hit; precision 1 at recall 1/2 and 2/3 at recall 1.
    assert imputation_auprc([[5, 0, 1]], [[0.9, 0.8, 0.7]]) == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)


# ----------------------------------------------------------------------------------------------------- Smoothing


def test_library_scaling_gives_every_cell_the_same_total(rng):
    counts = rng.poisson(0.5, size=(30, 20))
    counts[4] = 0
    scaled = scale_by_library(sparse.csr_matrix(counts), total=500.0)
    total = counts.sum(axis=1, keepdims=True)
    assert_allclose(scaled.toarray(), np.where(total > 0, 500.0 * counts / np.maximum(total, 1), 0.0))
    assert_allclose(scale_by_library(counts).sum(axis=1)[np.arange(30) != 4], 1e4)
    assert_array_equal(counts[4], 0)


def mean_of_neighbors(space, values, k):
    apart = ((space[:, None] - space[None]) ** 2).sum(axis=-1)
    np.fill_diagonal(apart, np.inf)
    return values[np.argsort(apart, axis=1)[:, :k]].mean(axis=1)


@pytest.fixture
def typed_counts(rng):
    """Counts of three cell types with their own profiles, and the types."""
    types = np.repeat([0, 1, 2], 40)
    profile = rng.gamma(0.5, size=(3, 60))
    return rng.poisson(2 * profile[types] * rng.lognormal(sigma=0.3, size=(120, 1))), types


@pytest.mark.parametrize("container", [np.asarray, sparse.csr_matrix])
def test_expression_smoothing_is_the_papers_recipe(container, typed_counts):
    counts, _ = typed_counts
    scaled = 1e4 * counts / counts.sum(axis=1, keepdims=True)
    centered = np.log1p(scaled) - np.log1p(scaled).mean(axis=0)
    u, s, _ = np.linalg.svd(centered, full_matrices=False)
    expected = mean_of_neighbors(u[:, :6] * s[:6], scaled, 10)
    smoothed = smooth_by_neighbors(container(counts), n_components=6, n_neighbors=10)
    assert isinstance(smoothed, np.ndarray)
    assert smoothed.dtype == np.float32
    assert_allclose(smoothed, expected, rtol=1e-5)


@pytest.mark.parametrize("container", [np.asarray, sparse.csc_array])
def test_accessibility_smoothing_is_latent_semantic_indexing(container, typed_counts):
    counts, _ = typed_counts
    is_open = (counts > 0).astype(float)
    weighted = is_open * (np.log((1 + len(counts)) / (1 + is_open.sum(axis=0))) + 1)
    weighted /= np.linalg.norm(weighted, axis=1, keepdims=True)
    u, s, _ = np.linalg.svd(weighted, full_matrices=False)
    expected = mean_of_neighbors(u[:, :6] * s[:6], is_open, 10)
    smoothed = smooth_by_neighbors(container(counts), "lsi", n_components=6, n_neighbors=10)
    assert_allclose(smoothed, expected, atol=1e-6)
    assert smoothed.min() >= 0
    assert smoothed.max() <= 1 + 1e-6


@pytest.mark.parametrize("method", ["pca", "lsi"])
def test_smoothing_takes_noise_out(method, typed_counts):
    counts, types = typed_counts
    smoothed = smooth_by_neighbors(counts, method, n_components=5, n_neighbors=20)
    measured = scale_by_library(counts).toarray() if method == "pca" else (counts > 0).astype(float)
    within = sum(measured[types == t].var(axis=0).sum() for t in range(3))
    assert sum(smoothed[types == t].var(axis=0).sum() for t in range(3)) < 0.1 * within
    assert_array_equal(smoothed, smooth_by_neighbors(counts, method, n_components=5, n_neighbors=20))


def test_smoothing_defaults_are_the_papers(rng):
    counts = rng.poisson(1.0, size=(60, 40))
    for method in ("pca", "lsi"):
        assert_array_equal(
            smooth_by_neighbors(counts, method),
            smooth_by_neighbors(counts, method, n_components=30, n_neighbors=50),
        )


# --------------------------------------------------------------------------------------------------- Calibration


def test_coverage_counts_values_between_and_on_the_ends(rng):
    truth = np.array([[0.0, 1.0], [2.0, 3.0]])
    assert interval_coverage(truth, np.full((2, 2), 1.0), np.full((2, 2), 2.0)) == 0.5
    assert interval_coverage(truth, truth, truth) == 1.0
    assert interval_coverage(truth, truth + 0.1, truth + 0.2) == 0.0
    z = rng.normal(size=20_000)
    half_width = np.full(z.shape, stats.norm.ppf(0.95))
    assert interval_coverage(z, -half_width, half_width) == pytest.approx(0.9, abs=0.01)


def bins_by_definition(confidence, correct, n_bins):
    table = []
    for b in range(n_bins):
        low, high = b / n_bins, (b + 1) / n_bins
        inside = [(p, c) for p, c in zip(confidence, correct, strict=True) if (low < p <= high) or (b == 0 and p == 0)]
        table.append((len(inside), *(np.mean(inside, axis=0) if inside else (np.nan, np.nan))))
    return table


@few_draws
@given(st.integers(0, 10_000), st.sampled_from([1, 4, 8]))
def test_reliability_and_calibration_error_are_their_definitions(seed, n_bins):
    rng = np.random.default_rng(seed)
    confidence = np.append(rng.integers(0, 33, size=25) / 32, [0.0, 0.25, 1.0])  # on the edges too
    correct = rng.uniform(size=28) < confidence
    expected = bins_by_definition(confidence.tolist(), correct.tolist(), n_bins)
    curve = reliability_curve(confidence, correct, n_bins)
    assert curve.columns.tolist() == ["lower", "upper", "confidence", "accuracy", "n"]
    assert_array_equal(curve["n"], [n for n, _, _ in expected])
    assert_allclose(curve["confidence"], [p for _, p, _ in expected])
    assert_allclose(curve["accuracy"], [a for _, _, a in expected])
    assert_allclose(curve["lower"], np.arange(n_bins) / n_bins)
    assert_allclose(curve["upper"], np.arange(1, n_bins + 1) / n_bins)
    error = sum(n * abs(a - p) for n, p, a in expected if n) / 28
    assert expected_calibration_error(confidence, correct, n_bins) == pytest.approx(error, abs=1e-12)
    as_matrix = confidence.reshape(4, 7), correct.reshape(4, 7).astype(np.float32)
    assert expected_calibration_error(*as_matrix, n_bins) == pytest.approx(error, abs=1e-12)


def test_calibration_error_known_values(rng):
    confidence = rng.uniform(size=40_000)
    assert expected_calibration_error(confidence, rng.uniform(size=40_000) < confidence) < 0.015
    assert expected_calibration_error(np.ones(10), np.zeros(10)) == 1.0
    overconfident = expected_calibration_error(np.full(1000, 0.9), rng.permutation(1000) < 600)
    assert overconfident == pytest.approx(0.3)


def test_error_by_uncertainty_is_a_mean_per_quantile_bin(rng):
    uncertainty = rng.gamma(2.0, size=(40, 25))
    error = uncertainty * rng.normal(size=uncertainty.shape)
    table = error_by_uncertainty(error, uncertainty, n_bins=8)
    order = np.argsort(uncertainty.ravel())
    assert_array_equal(table["n"], np.full(8, 125))
    for column, values in (("uncertainty", uncertainty), ("squared_error", error**2)):
        expected = values.ravel()[order].reshape(8, 125).mean(axis=1)
        assert_allclose(table[column], expected, rtol=1e-12)
    assert stats.spearmanr(table["uncertainty"], table["squared_error"]).statistic > 0.9


@few_draws
@given(arrays(np.float64, 23, elements=st.integers(0, 6).map(float)), st.integers(1, 23))
def test_equal_uncertainties_stay_together(uncertainty, n_bins):
    error = np.arange(23.0)
    table = error_by_uncertainty(error, uncertainty, n_bins)
    assert table["n"].sum() == 23
    assert 1 <= len(table) <= n_bins
    assert (table["n"] > 0).all()
    assert (np.diff(table["uncertainty"]) > 0).all()
    assert (table["n"] * table["squared_error"]).sum() == pytest.approx(np.sum(error**2))
    order = np.random.default_rng(0).permutation(23)
    shuffled = error_by_uncertainty(error[order], uncertainty[order], n_bins)
    pd.testing.assert_frame_equal(shuffled, table, rtol=1e-12)


def test_many_predictions_of_the_least_uncertainty_are_a_bin_of_their_own():
    uncertainty = np.array([0.0] * 64 + list(range(1, 65)))
    table = error_by_uncertainty(np.where(uncertainty == 0, 0.0, 1.0), uncertainty, n_bins=8)
    assert table["uncertainty"][0] == table["squared_error"][0] == 0.0
    assert table["n"].tolist() == [64, 16, 16, 16, 16]


def test_small_integers_do_not_overflow():
    table = error_by_uncertainty(np.array([100, -100], dtype=np.int8), np.array([1, 1], dtype=np.uint8), n_bins=1)
    assert table["squared_error"].tolist() == [10_000.0]


def test_one_uncertainty_is_one_bin():
    table = error_by_uncertainty([1.0, 2.0, 3.0], [0.5, 0.5, 0.5], n_bins=3)
    assert table.to_dict("list") == {"uncertainty": [0.5], "squared_error": [pytest.approx(14 / 3)], "n": [3]}


# ------------------------------------------------------------------------------------------------------ Refusals

X = np.arange(12.0).reshape(6, 2)
Y = X[::-1] + 0.5
HOLE = np.where(X == 3, np.nan, X)
LABELS = list("aabbcc")
COUNTS = np.arange(12).reshape(6, 2)
PROBABILITY = COUNTS / 12


@pytest.mark.parametrize("measure", [foscttm, neighbor_rank_distance])
@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (X, X, "are the same matrix; pass the latents of two modalities"),
        (X, X.astype(np.float32), "are the same matrix; pass the latents of two modalities"),
        (X, Y[:5], "found 6 and 5 rows"),
        (X, np.ones((6, 3)), "`x` and `y` need the same dimensions; found 2 and 3"),
        (HOLE, Y, "`x` must be finite; found NaN or infinity in 1 of 12 entries"),
        (X, np.where(Y > 9, np.inf, Y), "`y` must be finite; found NaN or infinity in 3 of 12 entries"),
        (X[:, 0], Y[:, 0], r"`x` must be a matrix .* found shape \(6,\)"),
        (X[:1], Y[:1], "at least 2 cells"),
        (X[:0], Y[:0], "at least one entry"),
        (X.astype(str), Y, "real numbers"),
        (X.astype(complex), Y, "real numbers"),
    ],
)
def test_copies_are_checked(measure, x, y, message):
    with pytest.raises(ValueError, match=message):
        measure(x, y)


@pytest.mark.parametrize("block_size", [0, -1, 2.5, True])
def test_block_size_is_checked(block_size):
    with pytest.raises(ValueError, match="block_size must be"):
        foscttm(X, Y, block_size=block_size)


def test_other_cells_are_checked():
    with pytest.raises(ValueError, match="`others` must be finite; found NaN or infinity in 1 of"):
        neighbor_rank_distance(X, Y, others=HOLE)
    with pytest.raises(ValueError, match="`x` and `others` need the same dimensions; found 2 and 3"):
        neighbor_rank_distance(X, Y, others=np.ones((4, 3)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((X, LABELS, X.copy(), LABELS), "are the same matrix; pass the latents of two modalities"),
        ((X, LABELS, Y, LABELS, 7), "`n_neighbors` must be a whole number from 1 to 6 .*; found 7"),
        ((X, LABELS, Y, LABELS, 0), "n_neighbors must be .* found 0"),
        ((X, LABELS, Y, LABELS, 2.0), "n_neighbors must be .* found 2.0"),
        ((X, LABELS[:5], Y, LABELS), r"`reference_labels` must have one label for each of 6 cells; found shape \(5,\)"),
        ((X, LABELS, Y, [*LABELS[:5], None]), "`query_labels` has no label for 1 of 6"),
        ((X, [*LABELS[:4], np.nan, np.nan], Y, LABELS), "`reference_labels` has no label for 2 of 6"),
        ((HOLE, LABELS, Y, LABELS), "`reference` must be finite; found NaN or infinity in 1 of"),
        ((X, LABELS, Y[:, :1], LABELS), "`reference` and `query` need the same dimensions; found 2 and 1"),
    ],
)
def test_label_transfer_is_checked(arguments, message):
    with pytest.raises(ValueError, match=message):
        label_transfer_accuracy(*arguments)


@pytest.mark.parametrize("measure", [label_purity, modality_enrichment])
@pytest.mark.parametrize(
    ("latent", "labels", "k", "message"),
    [
        (X, LABELS, 6, "`n_neighbors` must be a whole number from 1 to 5 .*; found 6"),
        (X, LABELS[:3], 2, "must have one label for each of 6 cells"),
        (X, [None, *LABELS[1:]], 2, "`(labels|groups)` has no label for 1 of 6"),
        (HOLE, LABELS, 2, "`latent` must be finite; found NaN or infinity in 1 of"),
        (X[0], LABELS, 2, "cells by dimensions"),
    ],
)
def test_neighborhoods_are_checked(measure, latent, labels, k, message):
    with pytest.raises(ValueError, match=message):
        measure(latent, labels, k)


def test_one_group_cannot_mix():
    with pytest.raises(ValueError, match="at least 2 groups; found only 'rna'"):
        modality_enrichment(X, ["rna"] * 6, 2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: imputation_spearman(COUNTS, PROBABILITY[:5]),
            r"`truth` and `imputed` must have the same shape; found \(6, 2\) and",
        ),
        (lambda: imputation_spearman(COUNTS, PROBABILITY, per="gene"), "'all', 'cell' or 'feature'; found"),
        (lambda: imputation_spearman(HOLE, PROBABILITY), "`truth` must be finite; found NaN or infinity in 1 of"),
        (
            lambda: imputation_spearman(sparse.csr_array(HOLE), PROBABILITY),
            "`truth` must be finite; found NaN or infinity in 1 of",
        ),
        (lambda: imputation_spearman(COUNTS, HOLE), "`imputed` must be finite; found NaN or infinity in 1 of"),
        (
            lambda: imputation_spearman(COUNTS, sparse.csr_array(PROBABILITY)),
            "`imputed` must be real numbers; found dtype object",
        ),
        (lambda: imputation_spearman(COUNTS[0], PROBABILITY[0]), "must be a matrix of cells by features"),
        (lambda: imputation_spearman(sparse.csr_array((0, 3)), np.ones((0, 3))), "a matrix of cells by features"),
        (lambda: imputation_auprc(np.zeros((2, 2)), np.ones((2, 2))), "at least one detection"),
        (lambda: imputation_auprc(COUNTS - 2, PROBABILITY), "`truth` must not be negative; found -2"),
        (lambda: imputation_auprc(COUNTS, PROBABILITY.T), "must have the same shape"),
        (lambda: imputation_auprc(COUNTS, HOLE), "`probability` must be finite; found NaN or infinity in 1 of"),
        (lambda: scale_by_library(-COUNTS), "must not be negative"),
        (lambda: scale_by_library(COUNTS, total=0), "total must be .* found 0"),
        (lambda: scale_by_library(COUNTS, total=np.inf), "total must be .* found inf"),
        (lambda: smooth_by_neighbors(COUNTS, "umap"), "'pca' or 'lsi'; found"),
        (
            lambda: smooth_by_neighbors(COUNTS, n_components=2, n_neighbors=2),
            "`n_components` must be a whole number from 1 .*; found 2",
        ),
        (
            lambda: smooth_by_neighbors(COUNTS, n_components=1, n_neighbors=6),
            "`n_neighbors` must be a whole number from 1 .*; found 6",
        ),
        (
            lambda: smooth_by_neighbors(HOLE, n_components=1, n_neighbors=2),
            "`counts` must be finite; found NaN or infinity in 1 of",
        ),
        (
            lambda: interval_coverage([1.0], [2.0], [0.0]),
            "`lower` must not be above `upper`; found this in 1 of 1 intervals",
        ),
        (
            lambda: interval_coverage([1.0, 2.0], [0.0], [3.0]),
            r"`truth` and `lower` must have the same shape; found \(2,\)",
        ),
        (
            lambda: interval_coverage([1.0], [0.0], [3.0, 4.0]),
            r"`truth` and `upper` must have the same shape; found \(1,\)",
        ),
        (lambda: interval_coverage([np.nan], [0.0], [3.0]), "`truth` must be finite; found NaN or infinity in 1 of"),
        (lambda: reliability_curve([0.5, 1.2], [0, 1]), "`confidence` must be probabilities, .* found 0.5 to 1.2"),
        (lambda: reliability_curve([-0.5, 1.0], [0, 1]), "`confidence` must be probabilities, .* found -0.5 to 1"),
        (lambda: reliability_curve([0.5, 0.7], [0, 2]), "must be 0 or 1"),
        (lambda: reliability_curve([0.5, 0.7], [1]), "must have the same shape"),
        (lambda: expected_calibration_error([0.5], [1], n_bins=0), "n_bins must be .* found 0"),
        (lambda: error_by_uncertainty([1.0, 2.0], [0.1]), "must have the same shape"),
        (lambda: error_by_uncertainty([1.0, 2.0], [0.1, -0.1], 1), "`uncertainty` must not be negative; found -0.1"),
        (
            lambda: error_by_uncertainty([1.0, 2.0], [0.1, 0.2], 3),
            "`n_bins` must be a whole number from 1 to 2 .*; found 3",
        ),
        (
            lambda: error_by_uncertainty([1.0, np.nan], [0.1, 0.2], 1),
            "`error` must be finite; found NaN or infinity in 1 of",
        ),
    ],
)
def test_imputation_and_calibration_are_checked(call, message):
    with pytest.raises(ValueError, match=message) as refusal:
        call()
    assert str(refusal.value).count(". ") == 0
    assert "\n" not in str(refusal.value)


def test_inputs_are_left_as_they_were(rng):
    x, y = rng.normal(size=(30, 3)), rng.normal(size=(30, 3))
    counts = sparse.csr_array(rng.poisson(1.0, size=(30, 12)).astype(float))
    counts.data[:4] = 0.0
    before = x.copy(), y.copy(), counts.data.copy()
    foscttm(x, y)
    neighbor_rank_distance(x, y, others=x[:4])
    smooth_by_neighbors(counts, n_components=3, n_neighbors=4)
    smooth_by_neighbors(counts, "lsi", n_components=3, n_neighbors=4)
    imputation_spearman(counts, np.tile(x, 4))
    imputation_auprc(counts, np.tile(x, 4))
    for now, then in zip((x, y, counts.data), before, strict=True):
        assert_array_equal(now, then)


def test_everything_public_is_documented():
    for name in metrics.__all__:
        assert len(getattr(metrics, name).__doc__) > 30


def test_of_labels_with_equal_votes_the_nearest_cells_wins_in_metrics_and_models():
    nearest_first = np.array([[0, 1, 1, 1, 0, 0], [1, 0, 0, 1, 2, 2], [2, 2, 1, 0, 1, 1]])
    winners, shares = vote(nearest_first)
    assert winners.tolist() == [0, 1, 1] and shares.tolist() == [1 / 2, 1 / 3, 1 / 2]
    reference, query = np.arange(1.0, 7.0)[:, None], np.array([[0.0]])
    labels = np.array(["A", "B", "B", "B", "A", "A"])
    assert label_transfer_accuracy(reference, labels, query, ["A"], n_neighbors=6) == 1
