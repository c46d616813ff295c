"""Tables in any order of rows and columns, with names and values of any type: the same answer, or a refusal."""

import anndata
import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy import sparse
from small import names

from pyromosaic import DiagVI, ModalitySpec, Mosaic, MultiVI, ScModal, checks, linkage, metrics
from pyromosaic.guidance.scores import linked_scores
from pyromosaic.links import GuidanceGraph, links_by_overlap

FEW = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
N = 24
NUMBERED = [str(i) for i in range(N)]  # names that could be positions
X = 1 + np.random.default_rng(0).poisson(4, (N, 6)).astype(np.float32)
OBS = {"batch": np.resize(["1", "2"], N), "label": np.resize(["T", "B", "unknown"], N), "age": np.arange(N) % 7}

TYPES = {
    "batch": [lambda v: v, lambda v: v.astype(int), lambda v: v.astype(float), pd.Categorical, lambda v: v.astype("O")],
    "label": [
        lambda v: v,
        pd.Categorical,
        lambda v: np.where(v == "unknown", None, v),
        lambda v: pd.array(v, "string"),
    ],
    "age": [lambda v: v, lambda v: v.astype(np.float32), lambda v: v.astype(str), lambda v: pd.array(v, "Int64")],
}
STORED = [
    np.array,
    sparse.csr_matrix,
    sparse.csc_matrix,
    sparse.csr_array,
    lambda x: x.astype(np.int64),
    np.asfortranarray,
]


def registered(cells, features, obs, x):
    adata = anndata.AnnData(x, pd.DataFrame(obs, index=pd.Index(cells, dtype=object)), pd.DataFrame(index=features))
    options = {"batch_key": "batch", "label_key": "label", "continuous_covariates": ["age"]}
    return Mosaic.from_anndata({"rna": adata}, **options)


GENES = [f"g{i}" for i in range(6)]
EXPECTED = registered(NUMBERED, GENES, OBS, X)


@FEW
@given(data=st.data())
def test_registration_of_the_same_cells(data):
    rows, columns = data.draw(st.permutations(range(N))), data.draw(st.permutations(range(6)))
    keys = data.draw(st.permutations(list(OBS)))
    obs = {key: data.draw(st.sampled_from(TYPES[key]))(OBS[key][rows]) for key in keys}
    store = data.draw(st.sampled_from(STORED))
    cells, features = [NUMBERED[i] for i in rows], [GENES[i] for i in columns]
    mosaic = registered(cells, features, obs, store(X[np.ix_(rows, columns)]))
    assert list(mosaic.obs_names) == cells
    found, known = mosaic.modalities["rna"], EXPECTED.modalities["rna"]
    assert found.schema.categories == known.schema.categories and found.schema.labels == known.schema.labels == (
        "B",
        "T",
    )
    assert found.schema.continuous["age"] == pytest.approx(known.schema.continuous["age"])
    np.testing.assert_array_equal(found.tensor(np.arange(N)).to_dense(), X[np.ix_(rows, columns)])
    for name in ("codes", "labels", "library"):
        np.testing.assert_array_equal(getattr(found, name), getattr(known, name)[rows])
    np.testing.assert_allclose(found.continuous, known.continuous[rows], rtol=1e-5, atol=1e-6)
    # The schema of a model puts features into its order.
    again = anndata.AnnData(store(X[np.ix_(rows, columns)]), pd.DataFrame(obs, cells), pd.DataFrame(index=features))
    asked = Mosaic.from_anndata({"rna": again}, schema=EXPECTED.schema)
    np.testing.assert_array_equal(asked.modalities["rna"].tensor(np.arange(N)).to_dense(), X[rows])


TWO = Mosaic.from_anndata(
    {
        "rna": anndata.AnnData(X, pd.DataFrame(index=NUMBERED), pd.DataFrame(index=list("012345"))),
        "adt": anndata.AnnData(X[:, ::-1].copy(), pd.DataFrame(index=NUMBERED), pd.DataFrame(index=names(6, "p"))),
    },
    match_cells=True,
)
LINKS = pd.DataFrame({"rna": list("0123"), "adt": names(4, "p"), "weight": [1, 0.5, 0.25, 1], "sign": [1, -1, 1, 1]})
ENDS = [lambda v: v, pd.Categorical, lambda v: np.asarray(v, dtype=str), lambda v: pd.array(v, "string")]
STRENGTHS = [lambda v: v, lambda v: v.astype(np.float32), lambda v: v.astype(str), lambda v: v.astype(object)]


def links_drawn(data):
    """The links in another order of rows and columns, in other types, with a row index of any kind."""
    table = LINKS.iloc[data.draw(st.permutations(range(4)))]
    columns = {}
    for key in data.draw(st.permutations(list(LINKS))):
        ways = [*ENDS, lambda v: v.astype(int)] if key == "rna" else ENDS if key == "adt" else STRENGTHS
        columns[key] = pd.Series(data.draw(st.sampled_from(ways))(table[key].reset_index(drop=True)))
    index = data.draw(st.sampled_from([range(4), names(4), [7, 7, 7, 7]]))
    return pd.DataFrame(columns).set_axis(pd.Index(index))


def in_one_order(links):
    table = links.astype({"rna": str, "adt": str, "weight": float, "sign": float})[["rna", "adt", "weight", "sign"]]
    return table.sort_values("rna", ignore_index=True)


@pytest.mark.filterwarnings("ignore:.*few links")
@FEW
@given(data=st.data())
def test_tables_of_links(data):
    table = links_drawn(data)
    expected = in_one_order(LINKS)
    graph = GuidanceGraph.from_table(TWO, table)
    pd.testing.assert_frame_equal(in_one_order(graph.links("rna", "adt")), expected, check_dtype=False)
    found = linkage.links_from_table(TWO, ("rna", "adt"), table)
    pd.testing.assert_frame_equal(in_one_order(found.pairs), expected, check_dtype=False)
    swapped = linkage.links_from_table(TWO, ("adt", "rna"), table)
    pd.testing.assert_frame_equal(in_one_order(swapped.pairs), expected, check_dtype=False)
    features = TWO.schema["rna"].features, TWO.schema["adt"].features
    matrix = pd.DataFrame(0.0, *features)
    for _, link in LINKS.iterrows():
        matrix.loc[link["rna"], link["adt"]] = link["weight"] * link["sign"]
    permuted = matrix.iloc[data.draw(st.permutations(range(6))), data.draw(st.permutations(range(6)))]
    named = permuted.set_axis(permuted.index.astype(data.draw(st.sampled_from([int, str, object]))))
    graph = GuidanceGraph.from_matrix(TWO, "rna", "adt", named, weighted=True)
    pd.testing.assert_frame_equal(in_one_order(graph.links("rna", "adt")), expected, check_dtype=False)


@pytest.mark.parametrize(
    "make", [GuidanceGraph.from_table, lambda d, t: linkage.links_from_table(d, ("rna", "adt"), t)]
)
@pytest.mark.parametrize("column", ["weight", "sign"])
@pytest.mark.parametrize("value", ["high", None, np.nan, 7])
def test_strengths_that_are_refused(make, column, value):
    table = LINKS.astype({column: object})
    table.loc[2, column] = value
    with pytest.raises(ValueError, match="weight|sign"):
        make(TWO, table)


@pytest.mark.filterwarnings("ignore:.*few links")
def test_links_that_stand_twice():
    table = pd.concat([LINKS, LINKS.assign(weight=0.25)])
    for twice in (table, table[::-1]):
        for pairs in (
            GuidanceGraph.from_table(TWO, twice).links("rna", "adt"),
            linkage.links_from_table(TWO, ("rna", "adt"), twice).pairs,
        ):
            pd.testing.assert_frame_equal(in_one_order(pairs), in_one_order(LINKS), check_dtype=False)
    table = pd.concat([LINKS, LINKS.assign(sign=-LINKS["sign"])])
    for make in (GuidanceGraph.from_table, lambda d, t: linkage.links_from_table(d, ("rna", "adt"), t)):
        with pytest.raises(ValueError, match="between '.*' and '.*' has both signs; choose one"):
            make(TWO, table)


@FEW
@given(data=st.data())
def test_positions_of_genes(data):
    regions = ["chr1:100-200", "chr1:900-1000", "chr2:100-200", "chr3:5-9"]
    genes = pd.DataFrame(
        {"chromosome": ["1", "2", "3"], "start": [150, 90, 7], "end": [160, 300, 8], "strand": ["+", "-", "+"]},
        list("012"),
    )
    atac = anndata.AnnData(X[:, :4].copy(), pd.DataFrame(index=NUMBERED), pd.DataFrame(index=regions))
    mosaic = Mosaic.from_anndata(
        {"rna": anndata.AnnData(X, pd.DataFrame(index=NUMBERED), pd.DataFrame(index=list("012345"))), "atac": atac},
        match_cells=True,
    )
    expected = links_by_overlap(mosaic, ("rna", "atac"), genes, 10).pairs
    rows, columns = data.draw(st.permutations(range(3))), data.draw(st.permutations(range(4)))
    other = genes.iloc[rows, columns].set_axis(genes.index[rows].astype(data.draw(st.sampled_from([str, int, object]))))
    for key, kinds in {"chromosome": [str, int, float], "start": [int, str, float], "end": [int, str, float]}.items():
        other[key] = other[key].astype(data.draw(st.sampled_from(kinds)))
    found = links_by_overlap(mosaic, ("rna", "atac"), other, 10).pairs
    order = ["rna", "atac"]
    assert found[order].sort_values(order).to_numpy().tolist() == expected[order].sort_values(order).to_numpy().tolist()


SCORES = pd.DataFrame(np.random.default_rng(1).normal(size=(N, 3)).astype(np.float32), NUMBERED, list("abc"))


@FEW
@given(data=st.data())
def test_scores_of_a_linkage(data):
    rows = data.draw(st.permutations(range(N)))
    kind = data.draw(st.sampled_from([str, int, object, "category"]))
    more = pd.DataFrame(0.0, ["other"], list("abc")) if kind in (str, object) else SCORES[:0]
    table = pd.concat([SCORES.iloc[rows], more])
    table.index = table.index.astype(kind)
    table = table.astype(data.draw(st.sampled_from([np.float32, np.float64, str])))
    np.testing.assert_allclose(linked_scores(table, TWO, None, 2), SCORES, rtol=1e-6)


def spoiled(value):
    table = SCORES.astype(object)
    table.loc["3", "b"] = value
    return table


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (SCORES[1:], "no scores for cell '0'"),
        (pd.concat([SCORES, SCORES[:1]]), "scores of cell '0' twice"),
        (spoiled(np.nan), "scores of cell '3' are not finite numbers"),
        (
            spoiled("x"),
            "scores of cell '3' are not finite",
        ),
    ],
)
def test_scores_that_are_refused(scores, message):
    with pytest.raises(ValueError, match=message):
        linked_scores(scores, TWO, None, 2)


@pytest.mark.parametrize("cls", [DiagVI, ScModal])
@pytest.mark.parametrize("scores", [SCORES.to_numpy(), SCORES["a"], [1.0], {"a": 1}, "nonsense", 3, True])
def test_a_linkage_that_is_no_table(cls, scores):
    with pytest.warns(UserWarning, match="few links"):
        graph = GuidanceGraph.from_table(TWO, LINKS)
    with pytest.raises(ValueError, match="linkage must be"):
        cls(TWO, graph, linkage=scores, n_latent=2, n_hidden=8)


# Answers of a model, by cells and features in any order


MODEL = MultiVI(EXPECTED, n_latent=2, n_hidden=8)


@FEW
@given(data=st.data())
def test_questions_about_cells_and_features(data):
    cells = data.draw(st.lists(st.sampled_from(NUMBERED), min_size=1, max_size=6, unique=True))
    features = data.draw(st.lists(st.sampled_from(GENES), min_size=1, max_size=4, unique=True))
    form = data.draw(st.sampled_from([list, tuple, np.array, pd.Index, lambda v: pd.Series(v, dtype=object)]))
    whole = MODEL.get_normalized_expression("rna")
    found = MODEL.get_normalized_expression("rna", form(cells), features=form(features))
    pd.testing.assert_frame_equal(found, whole.loc[cells, features], rtol=1e-4)
    mask = pd.Series(np.isin(NUMBERED, cells), NUMBERED).sample(frac=1, random_state=data.draw(st.integers(0, 99)))
    masked = MODEL.get_normalized_expression("rna", mask, features=form(features))
    pd.testing.assert_frame_equal(masked, whole.loc[mask.index[mask], features].loc[masked.index], rtol=1e-4)
    cohorts = EXPECTED.with_cohorts(background=form(cells[:1]), target={"others": ~mask})
    assert cohorts.groups[EXPECTED.find(cells[0])] == 0 and (cohorts.groups == 1).sum() == N - len(cells)


@FEW
@given(data=st.data())
def test_labels_of_any_type_in_measures(data):
    latent = SCORES.set_axis(pd.Index(np.arange(N)))
    labels = pd.Series(np.resize([0, 1], N), np.arange(N))
    expected = metrics.label_purity(latent.to_numpy(), labels.to_numpy(), n_neighbors=5)
    kind = data.draw(st.sampled_from([int, float, str, object, "category", "Int64", "string"]))
    index = data.draw(st.sampled_from([int, str, object]))
    other = labels.astype(kind).iloc[data.draw(st.permutations(range(N)))]
    other.index = other.index.astype(index)
    table = latent.astype(data.draw(st.sampled_from([np.float32, np.float64])))
    assert metrics.label_purity(table, other, n_neighbors=5) == pytest.approx(expected, rel=1e-6)
    frame = other.to_frame("label")
    assert metrics.label_purity(table, frame["label"], n_neighbors=5) == pytest.approx(expected, rel=1e-6)


def boolean(mask, kind):
    """A mask of names in a type of pandas."""
    return pd.Series(mask, NUMBERED).astype(kind)


@FEW
@given(data=st.data())
def test_groups_of_cells_in_differential(data):
    first = np.isin(np.arange(N), data.draw(st.lists(st.integers(0, N - 1), min_size=2, max_size=9, unique=True)))
    forms = [
        lambda m: np.array(NUMBERED)[m],
        lambda m: list(np.flatnonzero(m)),
        lambda m: pd.Index(np.flatnonzero(m)),  # numbers as names are names
        lambda m: pd.Series(np.array(NUMBERED)[m], dtype="string"),
        lambda m: pd.Categorical(np.array(NUMBERED)[m]),
        lambda m: pd.array(np.flatnonzero(m), "Int64"),
        lambda m: m,
        *(lambda m, kind=kind: boolean(m, kind) for kind in (bool, object, "category", "boolean")),
    ]
    one, other = (data.draw(st.sampled_from(forms))(mask) for mask in (first, ~first))
    if isinstance(one, pd.Series) and one.index.size == N:
        one = one.iloc[data.draw(st.permutations(range(N)))]
        one.index = one.index.astype(data.draw(st.sampled_from([str, int, object])))
    found = MODEL.differential(modality="rna", cells1=one, cells2=other, n_samples=5).loc[GENES]
    np.testing.assert_allclose(found["raw_mean1"], X[first].mean(0), rtol=1e-5)
    np.testing.assert_allclose(found["raw_mean2"], X[~first].mean(0), rtol=1e-5)


TRUTH = pd.DataFrame(X, NUMBERED, GENES)
IMPUTED = TRUTH + np.random.default_rng(3).normal(size=X.shape)
FRAMES = [
    lambda t: t,
    lambda t: t.astype(np.float64),
    lambda t: t.astype(object),
    lambda t: t.astype("Float64"),
    lambda t: t.astype(pd.SparseDtype(np.float64, 0)),
    lambda t: anndata.AnnData(t.to_numpy(), pd.DataFrame(index=t.index), pd.DataFrame(index=t.columns)),
    lambda t: anndata.AnnData(sparse.csc_matrix(t), pd.DataFrame(index=t.index), pd.DataFrame(index=t.columns)),
]


def drawn(data, table, forms):
    """A table in another order, of another type, with names of another type."""
    table = table.iloc[data.draw(st.permutations(range(N))), data.draw(st.permutations(range(6)))]
    index = data.draw(st.sampled_from([str, object, "category", "string"]))
    return data.draw(st.sampled_from(forms))(table.set_axis(table.index.astype(index)))


@FEW
@given(data=st.data())
def test_tables_of_measures(data):
    truth, imputed = drawn(data, TRUTH, FRAMES), drawn(data, IMPUTED, FRAMES[:4])
    expected = metrics.imputation_spearman(TRUTH.to_numpy(), IMPUTED.to_numpy())
    np.testing.assert_allclose(np.mean(metrics.imputation_spearman(truth, imputed)), np.mean(expected), rtol=1e-5)
    share = IMPUTED.rank(pct=True)
    expected = metrics.imputation_auprc((TRUTH > 4).to_numpy(), share.to_numpy())
    kinds = [bool, int, "boolean", "Int64", np.float32]
    detected = drawn(data, TRUTH > 4, [lambda t: t.astype(data.draw(st.sampled_from(kinds)))])
    found = metrics.imputation_auprc(detected, drawn(data, share, FRAMES[:4]))
    np.testing.assert_allclose(np.mean(found), np.mean(expected), rtol=1e-5)


@FEW
@given(data=st.data())
def test_scaled_and_smoothed_tables_keep_their_names(data):
    forms = [*FRAMES[:5], lambda t: t.astype(int), lambda t: t.astype("Int64")]
    counts, expected = drawn(data, TRUTH, forms), metrics.scale_by_library(X, 10).toarray()
    scaled = metrics.scale_by_library(counts, 10).loc[NUMBERED, GENES]
    np.testing.assert_allclose(scaled, expected, rtol=1e-5)
    smooth = metrics.smooth_by_neighbors(counts, n_components=5, n_neighbors=N - 1).loc[NUMBERED, GENES]
    other = metrics.scale_by_library(X).toarray()  # all other cells are neighbours
    np.testing.assert_allclose(smooth, (other.sum(0) - other) / (N - 1), rtol=1e-4)
    for store in STORED:
        np.testing.assert_allclose(metrics.scale_by_library(store(X), 10).toarray(), expected, rtol=1e-5)
    with pytest.raises(ValueError, match="found a AnnData, pass its X"):
        metrics.scale_by_library(FRAMES[5](TRUTH))


def test_labels_are_compared_as_words():
    latent, other = SCORES.to_numpy(), SCORES.to_numpy() + 0.01
    labels = np.resize([1, 2], N)
    for same in (labels.astype(str), labels.astype(float), pd.array(labels, "Int64"), labels.astype("O")):
        assert metrics.label_transfer_accuracy(latent, labels, other, same) == 1
    with pytest.warns(UserWarning, match="no label of `query_labels` is in"):
        assert metrics.label_transfer_accuracy(latent, labels, other, labels + 5) == 0


@pytest.mark.parametrize("table", [TRUTH.astype("Int64").mask(TRUTH > 8), TRUTH.astype(str)])
def test_tables_of_measures_that_are_refused(table):
    with pytest.raises(ValueError, match="must be finite; found NaN|must be real numbers; found dtype"):
        metrics.imputation_spearman(table, IMPUTED)


@pytest.mark.parametrize("kind", [bool, np.uint8, np.uint16, np.uint32, np.uint64, np.int8])
@pytest.mark.parametrize("store", STORED[:3])
def test_measurements_of_any_type(kind, store):
    x = X % 2
    x[:, 0] = 1
    adata = anndata.AnnData(store(x.astype(kind)), pd.DataFrame(index=NUMBERED))
    for likelihood in ("bernoulli", "nb"):
        modality = Mosaic.from_anndata({"x": adata}, {"x": likelihood}).modalities["x"]
        np.testing.assert_array_equal(modality.tensor(np.arange(N)).to_dense(), x)


@pytest.mark.parametrize("kind", ["Int64", "Float64", "UInt8", np.int32, np.float32, object])
def test_blocks_of_obsm_of_any_type(kind):
    holes = np.arange(N) < 3
    proteins = pd.DataFrame(X, NUMBERED, GENES)
    expected = np.where(holes[:, None], np.nan, X)
    adata = anndata.AnnData(X, pd.DataFrame(index=NUMBERED))
    nullable = isinstance(kind, str)
    adata.obsm["p"] = proteins.astype(kind).mask(pd.Series(holes, NUMBERED)) if nullable else proteins.astype(kind)
    if kind is object:
        with pytest.raises(ValueError, match="modality 'adt': values of type object; accepted: real numbers"):
            Mosaic.from_obsm(adata, {"rna": None, "adt": "p"})
        return
    modality = Mosaic.from_obsm(adata, {"rna": None, "adt": "p"}).modalities["adt"]
    assert modality.present.tolist() == (~holes if nullable else holes | ~holes).tolist()
    cells = np.flatnonzero(modality.present)
    np.testing.assert_array_equal(modality.tensor(cells).to_dense(), (expected if nullable else X)[cells])


def test_masked_arrays_are_refused():
    adata = anndata.AnnData(X)
    adata.layers["masked"] = np.ma.masked_greater(X, 5)
    with pytest.raises(ValueError, match="modality 'rna': the measurements are a MaskedArray; accepted: a NumPy array"):
        Mosaic.from_anndata({"rna": adata}, {"rna": ModalitySpec("nb", layer="masked")})


@pytest.mark.parametrize("kind", [np.float32, "Int64", "Float64", object])
def test_hidden_measurements_that_are_missing_have_no_rank(kind):
    missing = np.random.default_rng(5).random(X.shape) < 0.3
    whole = checks.imputation_ranks(MODEL, "rna", TRUTH, n_samples=4)
    if kind is object:
        found = checks.imputation_ranks(MODEL, "rna", TRUTH.astype(object).mask(missing, None), n_samples=4)
    else:
        found = checks.imputation_ranks(MODEL, "rna", TRUTH.astype(kind).mask(missing), n_samples=4)
    for table in ("below", "equal"):
        expected = getattr(whole, table).mask(missing)
        pd.testing.assert_frame_equal(getattr(found, table), expected)
    assert found.coverage([0.5])["n"].sum() == (~missing).sum()
    with pytest.raises(ValueError, match="truth must be a table of numbers"):
        checks.imputation_ranks(MODEL, "rna", TRUTH.astype(object).mask(missing, "x"))


def test_batches_of_integers_with_holes():
    numbers = pd.array(np.resize([1, 2], N), "Int64")
    holes = numbers.copy()
    holes[:3] = pd.NA
    adatas = {
        name: anndata.AnnData(X, pd.DataFrame({"b": b}, NUMBERED), pd.DataFrame(index=names(6, name)))
        for name, b in (("rna", holes), ("adt", numbers.to_numpy(float)))
    }
    mosaic = Mosaic.from_anndata(adatas, batch_key="b", match_cells=True)
    for modality in mosaic.modalities.values():
        assert modality.schema.categories == {"b": ("1", "2")}
        np.testing.assert_array_equal(modality.codes[:, 0], np.resize([0, 1], N))


@pytest.mark.parametrize("cells", [pd.array([1, None], "Int64"), ["1", None], pd.Series([1, np.nan])])
def test_cells_with_a_missing_value(cells):
    with pytest.raises(ValueError, match="found a missing value"):
        EXPECTED.find(cells)


def test_imputed_ranks_of_something_else_than_a_table():
    with pytest.raises(ValueError, match="truth must be an AnnData or a table with names"):
        checks.imputation_ranks(MODEL, "rna", X)


def test_a_layer_that_does_not_exist():
    adata = anndata.AnnData(X, layers={"counts": X})
    with pytest.raises(ValueError, match="there is no layer 'cnts'; it has 'counts'$"):
        Mosaic.from_anndata({"rna": adata}, {"rna": ModalitySpec("nb", layer="cnts")})
