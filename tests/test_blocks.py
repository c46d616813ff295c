"""Answers block by block of cells and features: the same numbers as all at once, in memory and in files."""

import warnings
from contextlib import nullcontext

import anndata
import h5py
import mudata
import numpy as np
import pandas as pd
import pytest
import torch
import zarr
from torch import nn

from pyromosaic import ModalitySpec, Mosaic, MultiVI, simulate
from pyromosaic.data.tables import kept_apart
from pyromosaic.likelihoods import Bernoulli, Normal
from pyromosaic.nn import Decoder
from pyromosaic.tasks import answers, blocks
from pyromosaic.tasks.question import Question

SMALL = {"n_latent": 3, "n_hidden": 8, "n_encoder_layers": 1}


class Plain(Decoder):
    """A decoder that is not known to be one whose features can be decoded apart."""


@pytest.fixture(scope="module")
def mosaic():
    mdata, _ = simulate(60, {"rna": 30, "atac": 50}, patterns=["rna", "rna+atac"], seed=3)
    mdata["rna"].layers["real"] = np.log1p(mdata["rna"].X.toarray())
    specs = {
        "rna": ModalitySpec("normal", layer="real", batch_key="batch"),
        "atac": ModalitySpec("bernoulli", batch_key="batch"),
    }
    return Mosaic.from_mudata(mdata, specs)


@pytest.fixture(scope="module")
def model(mosaic):
    model = MultiVI(mosaic, **SMALL, n_private={"rna": 2})
    with warnings.catch_warnings(action="ignore"):  # a private variable of a model that is hardly trained
        model.train(2, sleep_steps=2, progress_bar=False)
    return model


def whole(model, question):
    """The draws of all blocks put together."""
    found = [
        (b, b.values.clone()) for b in blocks(model.model, model.guide, model.mosaic, question, torch.device("cpu"))
    ]
    values = torch.full_like(found[0][1][..., :1, :1], torch.nan)
    n_cells, n_features = (max(getattr(b, axis).stop for b, _ in found) for axis in ("cells", "features"))
    values = values.expand(-1, n_cells, n_features).clone()
    for block, part in found:
        values[:, block.cells, block.features] = part
    return values, len(found)


@pytest.mark.parametrize("name", ["rna", "atac"])
@pytest.mark.parametrize("n_samples", [None, 3])
@pytest.mark.parametrize("features", [None, [7, 2, 11]])
def test_features_decoded_apart_are_those_of_the_whole_program(model, name, n_samples, features, monkeypatch):
    monkeypatch.setattr("pyromosaic.tasks.blockwise.ENTRIES", 60 * 4)
    features = features and [model.schema[name].features[i] for i in features]
    for value in (lambda d: d.mean, model._likelihood(name).normalized):
        question = Question(name, value, None, features, n_samples=n_samples, weights=5, seed=1)
        found, n_blocks = whole(model, question)
        chunks = answers(model.model, model.guide, model.mosaic, question, torch.device("cpu"))
        expected = torch.cat(list(chunks), dim=1)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        assert n_blocks == -(-found.shape[-1] // 4)


def test_blocks_of_cells_cover_all(model, monkeypatch):
    monkeypatch.setattr("pyromosaic.tasks.blockwise.CELLS", 17)
    found = model.get_accessibility_estimates("atac")
    monkeypatch.undo()
    pd.testing.assert_frame_equal(found, model.get_accessibility_estimates("atac"), rtol=1e-5)


def test_parts_of_a_user_are_asked_as_a_whole(mosaic, monkeypatch):
    class Twisted(Bernoulli):
        """A feature depends on the one before it."""

        def distribution(self, predictors, view):
            return super().distribution({"accessibility": predictors["accessibility"].roll(1, -1)}, view)

    class Own(Normal):
        pointwise = True

    assert not Twisted.pointwise and Own.pointwise and not type("Heir", (Own,), {}).pointwise
    monkeypatch.setattr("pyromosaic.tasks.blockwise._by_features", None)
    twisted = MultiVI(
        Mosaic.from_mudata(simulate(30, {"rna": 20, "atac": 20})[0], {"rna": "nb", "atac": ModalitySpec(Twisted)}),
        **SMALL,
    )
    assert twisted.get_imputed_values("atac", n_samples=2).mean.shape == (30, 20)
    plain = MultiVI(mosaic, decoder=lambda *args: Plain(*args[:3], n_hidden=8), **SMALL)
    assert plain.get_imputed_values("atac", n_samples=2).mean.shape == (60, 50)
    assert isinstance(plain.model.modalities["rna"].decoder, nn.Module)


@pytest.mark.parametrize("suffix", [".h5ad", ".h5mu", ".zarr"])
def test_a_file_holds_what_is_returned_without_one(model, tmp_path, suffix, monkeypatch):
    monkeypatch.setattr("pyromosaic.tasks.blockwise.ENTRIES", 60 * 4)
    monkeypatch.setattr("pyromosaic.tasks.blockwise.CELLS", 23)
    asked = {"cells": np.arange(50), "n_samples": 4, "quantiles": (0.1, 0.9)}
    read = {
        ".h5ad": anndata.read_h5ad,
        ".h5mu": lambda path: mudata.read_h5mu(path)["atac"],
        ".zarr": anndata.read_zarr,
    }
    expected = model.get_imputed_values("atac", **asked)
    path = model.get_imputed_values("atac", **asked, out=tmp_path / f"imputed{suffix}")
    with kept_apart():
        found = read[suffix](path)
    assert list(found.obs_names) == list(expected.mean.index) and list(found.var_names) == list(expected.mean.columns)
    np.testing.assert_array_equal(found.X, expected.mean)
    np.testing.assert_array_equal(found.layers["sd"], expected.sd)
    for level in (0.1, 0.9):
        np.testing.assert_array_equal(found.layers[f"q{level}"], expected.quantiles[level])
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("suffix", [".h5ad", ".zarr"])
def test_an_open_file_gets_the_values(model, tmp_path, suffix):
    expected = model.get_imputed_values("atac", n_samples=4, quantiles=(0.1,))
    tables = {"obs": expected.mean[[]], "var": expected.mean.T[[]]}
    empty = anndata.AnnData(**tables)
    path = tmp_path / f"there{suffix}"
    with warnings.catch_warnings(action="ignore"):
        getattr(empty, f"write_{'zarr' if suffix == '.zarr' else 'h5ad'}")(path)
    opened = (lambda: zarr.open_group(str(path), mode="r+", use_consolidated=False)) if suffix == ".zarr" else None
    with h5py.File(path, "r+") if opened is None else nullcontext(opened()) as group:
        with pytest.raises(ValueError, match="out: the tables are of 60 × 50, and the result of 60 × 2"):
            model.get_imputed_values("atac", features=["atac_0", "atac_1"], out=group)
        assert model.get_imputed_values("atac", n_samples=4, quantiles=(0.1,), out=group) is group
    if suffix == ".zarr":
        with warnings.catch_warnings(action="ignore"):
            zarr.consolidate_metadata(str(path))
    found = (anndata.read_zarr if suffix == ".zarr" else anndata.read_h5ad)(path)
    np.testing.assert_array_equal(found.X, expected.mean)
    np.testing.assert_array_equal(found.layers["q0.1"], expected.quantiles[0.1])


def test_a_file_that_cannot_be_made_is_refused_and_none_is_left_by_a_failure(model, tmp_path, monkeypatch):
    (tmp_path / "there.h5ad").touch()
    for name, said in [
        ("there.h5ad", "exists; give another name"),
        ("table.csv", r"out must end in .h5ad, .h5mu or .zarr; found"),
        ("nowhere/x.h5ad", "there is no folder"),
    ]:
        with pytest.raises(ValueError, match=said):
            model.get_imputed_values("atac", out=tmp_path / name)
    with pytest.raises(ValueError, match="quantiles must be a list"):
        model.get_imputed_values("atac", quantiles=[2.0], out=tmp_path / "new.h5ad")

    def fails(*_, **__):
        raise OSError("no space left")

    monkeypatch.setattr("pyromosaic.models.asking.fill", fails)
    with pytest.raises(OSError, match="no space"):
        model.get_imputed_values("atac", out=tmp_path / "new.h5ad")
    assert [p.name for p in tmp_path.iterdir()] == ["there.h5ad"]
