"""What registration takes from users' measurements: the right value, or one sentence."""

import re
import warnings

import anndata
import numpy as np
import pandas as pd
import pytest
from mudata import MuData
from scipy import sparse
from small import make, names, overlap, with_zeros

from pyromosaic import ModalitySpec, Mosaic, MultiVI, simulate
from pyromosaic.data import Schema

# Zeros


LIKELIHOODS = [
    "nb",
    "zinb",
    "nb_mixture",
    "multinomial",
    "poisson",
    "bernoulli",
    "normal",
    "log1p_normal",
    "ziln",
    "zig",
]
STORED = [np.array, sparse.csr_matrix, sparse.csc_matrix]


@pytest.mark.filterwarnings("ignore:.*like counts")
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("store", STORED)
def test_rows_of_zeros_are_no_measurement(likelihood, store):
    with pytest.raises(ValueError, match="'x': all values are 0 in 15 of 60 cells .* 'c0'.*empty_cells=\"holes\""):
        Mosaic.from_anndata({"x": with_zeros(store)}, {"x": likelihood})
    spec = ModalitySpec(likelihood, empty_cells="holes")
    whole = {"rna": make(names(60)), "x": with_zeros(store)}
    mosaic = Mosaic.from_anndata(whole, {"rna": "nb", "x": spec}, match_cells=True)
    assert (~mosaic.presence["x"]).sum() == 15 and not mosaic.presence["x"].iloc[::4].any()
    assert Mosaic.from_mudata(MuData(whole), {"rna": "nb", "x": spec}).presence.equals(mosaic.presence)
    left_out = {"rna": make(names(60)), "x": with_zeros(store)[np.arange(60) % 4 > 0]}
    expected = Mosaic.from_anndata(left_out, {"rna": "nb", "x": likelihood}, match_cells=True)
    assert mosaic.schema["x"].library == expected.schema["x"].library
    again = Schema.from_json(mosaic.schema.to_json())
    assert again == mosaic.schema
    assert Mosaic.from_anndata(whole, schema=again, match_cells=True).presence.equals(mosaic.presence)


def test_zeros_that_are_measured():
    spec = ModalitySpec("bernoulli", empty_cells="keep")
    assert Mosaic.from_anndata({"x": with_zeros()}, {"x": spec}).presence["x"].all()
    with pytest.raises(ValueError, match="empty_cells must be 'refuse', 'holes' or 'keep'"):
        ModalitySpec("nb", empty_cells="drop")
    nothing = with_zeros()
    nothing.X[:] = 0
    with pytest.raises(ValueError, match="modality 'x': all values of all cells are 0"):
        Mosaic.from_anndata({"x": nothing}, {"x": "nb"} | {"x": ModalitySpec("nb", empty_cells="holes")})


@pytest.mark.parametrize("store", STORED)
@pytest.mark.parametrize("likelihood", ["nb", "nb_mixture", "bernoulli", "normal"])
def test_features_that_a_batch_did_not_measure(likelihood, store):
    x = np.random.default_rng(0).poisson(1, (90, 30)).astype(np.float32)
    x[:, 0] = 1
    x *= 0.5 if likelihood == "normal" else 1
    obs = pd.DataFrame({"b": np.resize(["p", "q", "r"], 90)}, names(90))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Mosaic.from_anndata({"x": anndata.AnnData(store(x), obs)}, {"x": likelihood}, batch_key="b")
    x[np.ix_(obs["b"] == "q", np.arange(3, 10))] = 0
    adata = anndata.AnnData(store(x), obs)
    with pytest.warns(
        UserWarning, match="some of 30 features are always 0, .* other batches: 7 in all 30 cells of batch 'q';"
    ):
        Mosaic.from_anndata({"x": adata}, {"x": likelihood}, batch_key="b")


def panel(n_cells=200, seed=0):
    """Two batches measured by one panel of antibodies."""
    mdata, _ = simulate(n_cells, {"rna": 50, "adt": 150}, patterns=["rna+adt"], n_batches=2, seed=seed)
    return mdata


@pytest.mark.parametrize(
    ("lacking", "said"),
    [([3], "of 150 features .* 1 in all 100 cells of batch 'batch1'"), ([3, 4, 5, 6], "4 in all 100 cells")],
)
def test_a_protein_that_a_batch_did_not_measure(lacking, said):
    adt = panel()["adt"]
    x = adt.X if isinstance(adt.X, np.ndarray) else adt.X.toarray()
    x[np.ix_(adt.obs["batch"] == "batch1", lacking)] = 0
    adt.X = x
    with pytest.warns(UserWarning, match=said):
        Mosaic.from_anndata({"adt": adt}, batch_key="batch")


def test_few_cells_or_rare_features_are_not_said():
    rng = np.random.default_rng(0)
    x = rng.poisson(0.05, (400, 100)).astype(np.float32)
    x[:, 0] = 1
    x[:, 50:60] = rng.poisson(0.6, (400, 10)) * (np.arange(400) >= 200)[:, None]  # a type that one batch lacks
    x[:, 50:60] *= rng.random((400, 10)) < 0.05
    adata = anndata.AnnData(x, pd.DataFrame({"b": np.repeat(["p", "q"], 200)}, names(400)))
    few = adata[np.r_[0:200, 200:204]].copy()
    few.X[200:, 1:] = 0
    for each in (adata, few):
        Mosaic.from_anndata({"rna": each}, batch_key="b")  # warnings are errors here


def test_features_that_new_data_did_not_measure_are_said():
    mdata = panel()
    half = np.arange(200) < 100
    for key in ("batch", None):
        model = MultiVI(Mosaic.from_mudata(mdata[half].copy(), batch_key=key), n_latent=2, n_hidden=8)
        new = mdata[~half].copy()
        model.register(new)  # warnings are errors here
        for lacking in ([3], list(range(20))):
            x = new["adt"].X if isinstance(new["adt"].X, np.ndarray) else new["adt"].X.toarray()
            x[:, lacking] = 0
            new["adt"].X = x
            with pytest.warns(UserWarning, match=f"always 0, but not in the training data: {len(lacking)} in all") as w:
                model.register(new)
            assert len(w) == 1
    averaged = new["adt"]
    averaged.obs["batch"] = "another"
    model = MultiVI(Mosaic.from_mudata(mdata, batch_key="batch"), n_latent=2, n_hidden=8)
    for register in (
        lambda: model.register({"adt": averaged}, new_batches="average"),
        lambda: model.adapt({"adt": averaged}, 1, progress_bar=False),
    ):
        with pytest.warns(UserWarning, match="not in the training data: 20 in all 100 cells"):
            register()


def test_what_was_detected_is_kept_with_a_model():
    schema = Mosaic.from_mudata(panel()).schema
    assert Schema.from_json(schema.to_json()) == schema
    assert len(schema["adt"].detected) == 150 and 0 < min(schema["adt"].detected)
    earlier = schema.to_json()
    del earlier["modalities"]["adt"]["detected"]
    assert Schema.from_json(earlier)["adt"].detected == ()


# Sizes


COUNTED = ["nb", "zinb", "nb_mixture", "multinomial", "poisson", "bernoulli"]
SIZES = {
    "near 1": (lambda totals, rng: totals / np.median(totals), "0.0.* times the cells' total counts"),
    "logs": (lambda totals, rng: np.log1p(totals), "0.0.* times the cells' total counts"),
    "of another modality": (lambda totals, rng: 10 * rng.permutation(totals), "times the cells' total counts"),
    "of other cells": (lambda totals, rng: rng.permutation(totals), "hardly correlate with the cells' total counts"),
    "one for all": (lambda totals, rng: np.full(len(totals), np.median(totals)), "hardly correlate with"),
    "totals": (lambda totals, rng: totals, None),
    "nearly totals": (lambda totals, rng: totals * rng.lognormal(0, 0.2, len(totals)), None),
}


@pytest.mark.parametrize("kind", SIZES)
@pytest.mark.parametrize("likelihood", COUNTED)
def test_sizes_that_are_no_counts(likelihood, kind):
    rng = np.random.default_rng(0)
    x = 1 + rng.poisson(5 * rng.lognormal(0, 0.5, (100, 1)), (100, 40))
    adata = anndata.AnnData(x.astype(np.float32), pd.DataFrame(index=names(100)))
    size, said = SIZES[kind]
    adata.obs["size"] = size(np.ravel(x.sum(1)).astype(float), rng)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Mosaic.from_anndata({"x": adata}, {"x": likelihood}, size_factor_key="size")
    found = [str(w.message) for w in caught if w.category is UserWarning]
    assert len(found) == (said is not None)
    if said is not None:
        assert re.search(f"modality 'x': the sizes in column 'size' .*{said}", found[0])


# The user's matrix


CHANGES = {
    "logarithms": np.log1p,
    "other counts of the same sum": lambda x: np.roll(x, 1, axis=-1),
    "one more and one less": lambda x: x + np.resize([1, -1, 0], x.shape[-1]),
    "the cells in another order": lambda x: x[::-1],
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("store", STORED[:2])
def test_counts_changed_after_registration_are_said(store, change):
    adata = make(names(30))
    original = adata.X.copy()
    adata.X = store(original)
    model = MultiVI(Mosaic.from_anndata({"rna": adata}), n_latent=2, n_hidden=8)
    before = model.get_latent_representation()
    x = adata.X if store is np.array else adata.X.data.reshape(original.shape)
    x[...] = CHANGES[change](original)
    for question in (
        lambda: model.train(1, progress_bar=False),
        model.get_latent_representation,
        lambda: model.differential(cells1=["c0"], n_samples=10),
    ):
        with pytest.raises(ValueError, match="modality 'rna': the measurements of .* were changed in place after"):
            question()
    x[...] = original
    pd.testing.assert_frame_equal(model.get_latent_representation(), before)


def test_a_matrix_is_known_again_however_it_is_read(tmp_path):
    """Rows in any order, repeated, and from a file: the same sums."""
    adata = make(names(40), 300)
    adata.X = sparse.csr_matrix(np.where(adata.X > 6, adata.X / 3, 0).astype(np.float32))
    adata.write_h5ad(tmp_path / "x.h5ad")
    on_disk = anndata.read_h5ad(tmp_path / "x.h5ad", backed="r")
    for each in (adata, on_disk):
        modality = Mosaic.from_anndata({"rna": each}, allow_non_integer=True).modalities["rna"]
        for cells in ([3], [39, 0, 7, 7], np.arange(40)[::-1]):
            assert modality.read(np.array(cells)).shape == (len(cells), 300)
    on_disk.file.close()


@pytest.mark.filterwarnings("ignore:.*like counts")
def test_exposures_changed_after_registration_are_said():
    adata = make(names(30))
    adata.layers["n"] = adata.X + 1
    spec = ModalitySpec("normal", exposure_layer="n")
    modality = Mosaic.from_anndata({"x": adata}, {"x": spec}).modalities["x"]
    adata.layers["n"][4] = adata.layers["n"][4, ::-1] + [0, 1, -1]
    assert modality.exposure(np.arange(4)).shape == (4, 3)
    with pytest.raises(ValueError, match="'x': the exposures of 1 of the 30 cells read were changed .*cell number 4"):
        modality.exposure(np.arange(30))


# Annotation


BODY, UPSTREAM, DOWNSTREAM = "chr1:1000-2000", "chr1:800-900", "chr1:2100-2200"


@pytest.mark.parametrize("strand", ["+", 1, 1.0, "1", "+1", " + "])
def test_the_plus_strand_in_all_its_words(strand):
    assert overlap(strand=[strand]) == {BODY, UPSTREAM}


@pytest.mark.parametrize("strand", ["-", -1, -1.0, "-1"])
def test_the_minus_strand_in_all_its_words(strand):
    assert overlap(strand=[strand]) == {BODY, DOWNSTREAM}


@pytest.mark.parametrize("strand", [".", None, np.nan, ""])
def test_a_strand_that_is_not_known(strand):
    with pytest.warns(UserWarning, match="the strand of 1 of 1 genes is unknown; they are linked by their body"):
        assert overlap(strand=[strand]) == {BODY}


def test_places_in_other_types():
    assert overlap(start="1200", end="1800") == {BODY, UPSTREAM}
    assert overlap(chromosome=[1]) == overlap(chromosome=["1"]) == overlap(chromosome=[1.0]) == {BODY, UPSTREAM}
    with pytest.raises(ValueError, match="the start of gene 'g0' is '1,200'; accepted: a number of bases"):
        overlap(start="1,200")
    with pytest.raises(ValueError, match="the end of gene 'g0' is 'nan'"):
        overlap(end=np.nan)
    with pytest.raises(ValueError, match="the strand of gene 'g0' is 'forward'; accepted: '[+]' and '-'"):
        overlap(strand="forward")
    assert overlap(chromosome="Chr1") == overlap(chromosome="CHR1") == {BODY, UPSTREAM}
    assert overlap(start=1800, end=1800) == {BODY}
    with pytest.raises(ValueError, match="gene 'g0' starts at 1800 and ends at 1200; accepted"):
        overlap(start=1800, end=1200)
    with pytest.raises(ValueError, match="gene 'g0' is on '7', and region 'chr1:800-900' is the first"):
        overlap(chromosome=7)
    two = {"start": 1200, "end": 1800, "strand": "+"}
    with pytest.warns(UserWarning, match="the chromosome of 1 of 2 genes is unknown"):
        assert overlap(["g0", "g1"], chromosome=["chr1", None], **two) == {BODY, UPSTREAM}
