import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb, to_rgba
from scipy import sparse
from scipy.stats import spearmanr

from pyromosaic import checks, plot

CELLS = [f"cell{i}" for i in range(60)]


@pytest.fixture(autouse=True)
def closed_figures():
    yield
    plt.close("all")


@pytest.fixture
def ax():
    return plt.figure().add_subplot()


@pytest.fixture
def coordinates():
    values = np.random.default_rng(0).normal(size=(60, 2))
    return pd.DataFrame(values, CELLS, ["UMAP 1", "UMAP 2"])


@pytest.fixture
def training():
    epochs = np.arange(100)
    elbo = -500 - 3000 * np.exp(-epochs / 2) - 40 * np.exp(-epochs / 30)
    return pd.DataFrame({"train_elbo": elbo, "validation_elbo": elbo - 3}, pd.Index(epochs, name="epoch"))


def drawn(ax):
    """Position and colour of each point, in the order of drawing."""
    (dots,) = ax.collections
    dots.update_scalarmappable()
    return np.asarray(dots.get_offsets()), [to_hex(c) for c in dots.get_facecolors()]


def legend(ax):
    entries = ax.get_legend()
    colours = [to_hex(handle.get_color()) for handle in entries.get_lines()]
    return dict(zip([text.get_text() for text in entries.get_texts()], colours, strict=True))


def test_umap_keeps_cells_apart_that_are_apart_and_their_names():
    latent = np.random.default_rng(0).normal(size=(60, 5))
    latent[:30] += 20
    latent = pd.DataFrame(latent, CELLS)
    before = latent.copy()
    layout = plot.umap(latent, seed=1)
    assert list(layout.index) == CELLS
    assert list(layout.columns) == ["UMAP 1", "UMAP 2"]
    gap = np.linalg.norm(layout[:30].mean() - layout[30:].mean())
    assert gap > 2 * max(layout[:30].std().max(), layout[30:].std().max())
    pd.testing.assert_frame_equal(plot.umap(latent, seed=1), layout)
    pd.testing.assert_frame_equal(latent, before)


def test_embedding_by_category(coordinates, ax):
    words = np.array(["B", "NK", "Mono"])[np.arange(60) % 3].astype(object)
    words[:12] = None
    colour = pd.Series(words, CELLS, name="cell type")
    before = coordinates.copy(), colour.copy()
    assert plot.embedding(coordinates, colour, ax) is ax
    assert list(legend(ax)) == ["B", "Mono", "NK", "unknown"]
    assert len(set(legend(ax).values())) == 4
    assert ax.get_title() == "cell type"
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("UMAP 1", "UMAP 2")
    assert len(ax.get_xticks()) == len(ax.get_yticks()) == 0

    positions, colours = drawn(ax)
    word = {tuple(xy): w for xy, w in zip(coordinates.to_numpy(), words, strict=True)}
    order = [word[tuple(xy)] for xy in positions]
    assert colours == [legend(ax)[w or "unknown"] for w in order]
    assert order[:12] == [None] * 12  # the unknown lie below
    runs = 1 + sum(a != b for a, b in zip(order[12:], order[13:], strict=False))
    assert runs > 15  # no group lies above another
    pd.testing.assert_frame_equal(coordinates, before[0])
    pd.testing.assert_series_equal(colour, before[1])


def test_embedding_matches_cells_by_name(coordinates):
    colour = pd.Series(np.repeat(["a", "b"], 30), CELLS)
    expected = drawn(plot.embedding(coordinates, colour))
    shuffled = drawn(plot.embedding(coordinates, colour.sample(frac=1, random_state=0)))
    np.testing.assert_array_equal(shuffled[0], expected[0])
    assert shuffled[1] == expected[1]


def test_embedding_refuses_colours_of_other_cells(coordinates):
    with pytest.raises(ValueError, match="no cell in common: found 'x' and"):
        plot.embedding(coordinates, pd.Series({"x": "B", "y": "NK"}))


def test_embedding_keeps_the_order_of_categories_and_leaves_out_empty_ones(coordinates):
    dtype = pd.CategoricalDtype(["late", "empty", "early"], ordered=True)
    colour = pd.Series(np.repeat(["early", "late"], 30), CELLS, dtype=dtype)
    assert list(legend(plot.embedding(coordinates, colour, title=""))) == ["late", "early"]


def test_embedding_of_booleans_has_a_legend(coordinates):
    colour = pd.Series(np.arange(60) < 9, CELLS)
    assert list(legend(plot.embedding(coordinates, colour))) == ["False", "True"]
    assert list(legend(plot.embedding(coordinates, colour[:50]))) == ["False", "True", "unknown"]


def test_embedding_by_number(coordinates, ax):
    colour = pd.Series(np.linspace(0, 5, 60), CELLS, name="CD4")
    colour[:6] = np.nan
    plot.embedding(coordinates, colour, ax, title="expression")
    assert ax.get_title() == "expression"
    assert ax.get_legend() is None
    dots = ax.collections[-1]
    value = {tuple(xy): v for xy, v in zip(coordinates.to_numpy(), colour, strict=True)}
    np.testing.assert_array_equal(dots.get_array(), [value[tuple(xy)] for xy in np.asarray(dots.get_offsets())])
    assert len(dots.get_offsets()) == 54
    assert len(ax.figure.axes) == 2  # the colour bar


def test_points_shrink_with_the_number_of_cells(coordinates):
    def size(n):
        cells = pd.DataFrame(np.zeros((n, 2)), columns=["x", "y"])
        return plot.embedding(cells, pd.Series("a", cells.index)).collections[0].get_sizes()[0]

    assert size(100) > size(5000) > size(20_000)


def simulated_views(colours):
    """Colours in OKLab for normal sight and protanopia, deuteranopia, tritanopia (Machado et al. 2009, severity 1)."""
    sights = [
        np.eye(3),
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
    ]
    to_lms = np.array(
        [
            [0.4122214708, 0.5363325363, 0.0514459929],
            [0.2119034982, 0.6806995451, 0.1073969566],
            [0.0883024619, 0.2817188376, 0.6299787005],
        ]
    )
    to_lab = np.array(
        [
            [0.2104542553, 0.793617785, -0.0040720468],
            [1.9779984951, -2.428592205, 0.4505937099],
            [0.0259040371, 0.7827717662, -0.808675766],
        ]
    )
    rgb = np.array([to_rgb(c) for c in colours])
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    return [np.cbrt(np.clip(linear @ np.transpose(sight), 0, 1) @ to_lms.T) @ to_lab.T for sight in sights]


def test_palette_holds_for_colour_blind_readers():
    assert len(plot.PALETTE) == 20
    for view in simulated_views([*plot.PALETTE, plot.UNKNOWN, "white"]):
        distance = np.linalg.norm(view[:, None] - view, axis=-1)[np.triu_indices(22, 1)]
        assert distance.min() > 0.045  # about twice what is just told apart, 0.02


def test_more_categories_than_the_palette_has_get_different_colours(coordinates):
    colour = pd.Series([f"type {i % 30:02d}" for i in range(60)], CELLS)
    assert len(set(legend(plot.embedding(coordinates, colour)).values())) == 30


def test_imputation_shows_every_entry_and_the_correlation(ax):
    generator = np.random.default_rng(0)
    expected = generator.gamma(0.7, 20, (50, 30)).astype(np.float32)
    truth = generator.poisson(expected).astype(np.float32)
    before = truth.copy(), expected.copy()
    assert plot.imputation(sparse.csr_matrix(truth), expected, ax, title="rna") is ax
    assert ax.collections[0].get_array().sum() == truth.size
    assert [t.get_text() for t in ax.texts] == [f"Spearman {spearmanr(truth.ravel(), expected.ravel())[0]:.2f}"]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("measured (counts)", "imputed (counts)")
    assert ax.get_title() == "rna"
    assert ax.get_xlim() == ax.get_ylim()
    labels = [t.get_text() for t in ax.get_xticklabels()]
    assert labels[:4] == ["0", "1", "3", "10"]
    np.testing.assert_allclose(ax.get_xticks()[:4], np.log1p([0, 1, 3, 10]))
    np.testing.assert_array_equal(truth, before[0])
    np.testing.assert_array_equal(expected, before[1])


def test_imputation_is_the_same_for_dense_and_sparse_truth():
    truth = np.random.default_rng(0).poisson(2.0, (20, 10))
    dense, thin = (plot.imputation(t, truth + 0.5) for t in (truth, sparse.csr_array(truth)))
    np.testing.assert_array_equal(dense.collections[0].get_array(), thin.collections[0].get_array())


@pytest.mark.parametrize("values", [[[-3.0, 1.0, 4.0]], [[0.0, 0.2, 0.7]]])
def test_imputation_of_real_values_and_shares_is_on_a_linear_scale(values):
    ax = plot.imputation(np.array(values), np.array(values), unit="z-score")
    assert ax.get_xlim()[0] < np.min(values) < np.max(values) < ax.get_xlim()[1]
    assert ax.get_xlim()[1] == pytest.approx(np.max(values) + 0.03 * np.ptp(values))
    assert ax.get_xlabel() == "measured (z-score)"


def test_history_shows_the_epochs_in_which_something_is_to_be_seen(training, ax):
    before = training.copy()
    assert plot.history(training, ax) is ax
    assert [line.get_label() for line in ax.lines] == ["train", "validation"]
    np.testing.assert_array_equal(ax.lines[1].get_ydata(), training["validation_elbo"])
    low, high = ax.get_ylim()
    assert low > training["train_elbo"].iloc[0]  # the steep start is cut
    assert training.iloc[10:].stack().between(low, high).all()
    assert high - low < 150
    assert "epoch" in ax.get_xlabel()
    assert "nats per cell" in ax.get_ylabel()
    pd.testing.assert_frame_equal(training, before)


@pytest.mark.parametrize("n_epochs", [1, 2, 100])
def test_history_without_validation(training, n_epochs):
    ax = plot.history(training[["train_elbo"]][:n_epochs])
    assert isinstance(ax, Axes)
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["train"]


@pytest.mark.parametrize("imputed", [[], ["rna", "adt"]])
def test_overview_has_a_panel_for_everything(coordinates, training, imputed, tmp_path):
    patterns = pd.Series(np.repeat(["rna", "rna+adt"], 30), CELLS, name="modalities")
    labels = pd.Series(np.tile(["B", "NK"], 30), CELLS, name="cell type")
    truth = np.random.default_rng(0).poisson(3.0, (60, 8))
    figure = plot.overview(
        coordinates, [patterns, labels], dict.fromkeys(imputed, (truth, truth + 0.5, "counts")), training
    )
    panels = [ax.get_title() for ax in figure.get_axes() if ax.get_xlabel()]
    assert panels == ["modalities", "cell type", *imputed, "training"]
    figure.savefig(tmp_path / "overview.png", dpi=40)
    edges = plt.imread(tmp_path / "overview.png")[:, [0, -1], :3]
    assert (edges == 1).all()  # nothing is cut off at the sides
    assert figure.get_facecolor() == to_rgba("white")


# Checks of models


@pytest.fixture
def check():
    """A check of 4 genes, two of them outside their intervals, and one pair."""
    genes = ["g0", "g1", "g2", "g3"]
    observed = np.array([0.5, 1.0, 20.0, 300.0])
    mean = pd.DataFrame({"observed": observed, "mean": [0.5, 2.0, 20.0, 100.0]}, genes)
    mean = mean.assign(lower=0.9 * mean["mean"], upper=1.1 * mean["mean"], p_value=[1.0, 0.05, 0.9, 0.05])
    pair = pd.DataFrame([[-0.2, 0.1, 0.0, 0.2, 0.1]], ["g0 ~ p0"], mean.columns)
    tables = {("rna", "mean"): mean, ("rna", "variance"): 2 * mean, ("rna ~ adt", "correlation"): pair}
    levels = ["modality", "statistic"]
    overall = pd.DataFrame(
        {"p_value": [0.05, 0.5, 0.1], "outside": [0.5, 0.5, 1.0], "n": [4, 4, 1]},
        pd.MultiIndex.from_tuples(list(tables), names=levels),
    )
    return checks.PredictiveCheck(pd.concat(tables, names=[*levels, "name"]), overall, True, 19)


def test_predictive_shows_what_lies_outside(check, ax):
    before = check.table.copy()
    assert plot.predictive(check, "rna", "mean", ax) is ax
    inside, outside = (np.asarray(dots.get_offsets()) for dots in ax.collections[1:])
    np.testing.assert_allclose(inside, [[0.5, 0.5], [20, 20]])
    np.testing.assert_allclose(outside, [[1, 2], [300, 100]])
    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")
    assert [text.get_text() for text in ax.texts] == ["50% of 4 outside\np ≤ 0.05"]
    assert "counts" in ax.get_title() and "prior" in ax.get_ylabel()
    pair = plot.predictive(check, "rna ~ adt", "correlation")
    assert pair.get_xscale() == "linear" and pair.texts[0].get_text().endswith("p = 0.1")
    pd.testing.assert_frame_equal(check.table, before)


def test_mean_variance_has_the_data_and_the_draws(check, ax):
    plot.mean_variance(check, "rna", ax)
    data, draws = (np.asarray(dots.get_offsets()) for dots in ax.collections)
    np.testing.assert_allclose(data[:, 1], 2 * data[:, 0])
    np.testing.assert_allclose(draws[:, 0], [0.5, 2.0, 20.0, 100.0])
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["data", "drawn"]


def test_predictive_checks_has_a_panel_for_every_statistic(check, tmp_path):
    figure = plot.predictive_checks(check)
    titles = [ax.get_title().split(":")[0] for ax in figure.axes]
    assert titles == ["rna", "rna", "rna", "rna ~ adt"]
    figure.savefig(tmp_path / "checks.png", dpi=40)


def of_ranks(below, n_samples=99):
    columns = pd.MultiIndex.from_product([["z"], [str(i) for i in range(below.shape[1])]], names=["variable", "name"])
    below = pd.DataFrame(below.astype(float), columns=columns)
    return checks.Ranks(below, 0 * below, n_samples)


@pytest.mark.parametrize("n_dimensions", [1, 3, 40])
def test_ranks_are_a_histogram(n_dimensions, ax):
    below = np.random.default_rng(0).integers(0, 100, (500, n_dimensions))
    assert plot.ranks(of_ranks(below), ax=ax) is ax
    heights = ax.patches[-1 if n_dimensions == 40 else 0].get_data().values
    np.testing.assert_allclose(heights.mean(), 1.0)
    assert np.abs(heights - 1).max() < 0.6 / np.sqrt(n_dimensions)
    assert "99 draws" in ax.get_xlabel() and ax.get_title() == "z"
    band = [patch for patch in ax.patches if not hasattr(patch, "get_data")]
    assert len(band) == (n_dimensions <= 30)


def test_coverage_lies_below_the_diagonal_where_intervals_are_too_narrow(ax):
    rng = np.random.default_rng(0)
    narrow = np.where(rng.random((2000, 1)) < 0.5, 0, 99)
    plot.coverage(of_ranks(narrow), ax)
    assert ax.lines[1].get_ydata().max() < 0.1
    fine = plot.coverage(of_ranks(rng.integers(0, 100, (2000, 1))))
    np.testing.assert_allclose(fine.lines[1].get_ydata(), fine.lines[1].get_xdata(), atol=0.04)
    assert [text.get_text() for text in fine.get_legend().get_texts()] == ["z"]


def test_differences_have_their_intervals_and_say_which_are_significant(ax):
    effects = {"difference_low": [0.1, -0.3], "difference_median": [0.2, -0.1], "difference_high": [0.4, 0.1]}
    table = pd.DataFrame(effects | {"is_significant": [True, False]}, ["a", "b"])
    assert plot.differential(table, ax, "B vs rest") is ax
    (lines, dots) = ax.collections
    assert [segment[:, 0].tolist() for segment in lines.get_segments()] == [[0.1, 0.4], [-0.3, 0.1]]
    assert dots.get_offsets().tolist() == [[0.2, 0], [-0.1, 1]]
    assert [to_hex(colour) for colour in dots.get_facecolor()] == [plot.PALETTE[0], plot.UNKNOWN]
    assert ax.get_xlabel() == "difference" and ax.yaxis_inverted() and ax.get_title() == "B vs rest"
    assert len(plot.differential(table, n_features=1).get_yticks()) == 1
    with pytest.raises(ValueError, match="has feature 'a' more than once; give one comparison"):
        plot.differential(pd.concat([table, table]))
    with pytest.raises(ValueError, match="the table has no effects; it has the columns 'is_significant'"):
        plot.differential(table[["is_significant"]])
