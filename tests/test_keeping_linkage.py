"""A saved linkage is the linkage, to the last bit, or refused in one sentence."""

import json
from dataclasses import fields, is_dataclass, replace

import numpy as np
import pandas as pd
import pytest
from scipy import sparse
from torch import nn

from pyromosaic import Mosaic, MultiVI, linkage, simulate
from pyromosaic.likelihoods import NB
from pyromosaic.linkage import Linkage, VariationalLinkage

pytestmark = pytest.mark.filterwarnings("ignore:it is not clear that the links match", "ignore:.*links are left out")


class Own(NB):
    """A likelihood of a user's own."""


@pytest.fixture(scope="module")
def data():
    return simulate(200, {"rna": 40, "adt": 15}, patterns=["rna", "adt"], links={"adt": 1.0}, depth=2.0, seed=1)


@pytest.fixture(scope="module")
def mosaic(data):
    return Mosaic.from_mudata(data[0], {"rna": Own, "adt": "nb_mixture"}, batch_key="batch")


@pytest.fixture(scope="module")
def links(data):
    return data[1].links[["gene", "feature"]]


@pytest.fixture(scope="module")
def kept(mosaic, links):
    return linkage.cca(mosaic, ("rna", "adt"), links, n_pcs=8)


def alike(one, other):
    """Whether two things are the same, to the last bit."""
    if is_dataclass(one):
        return type(one) is type(other) and all(
            alike(getattr(one, f.name), getattr(other, f.name)) for f in fields(one)
        )
    if isinstance(one, dict):
        return list(one) == list(other) and all(alike(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return type(one) is type(other) and len(one) == len(other) and all(map(alike, one, other))
    if isinstance(one, pd.DataFrame | pd.Series):
        getattr(pd.testing, f"assert_{'frame' if one.ndim == 2 else 'series'}_equal")(one, other, check_exact=True)
        return True
    if isinstance(one, nn.Module):
        states = [{k: v.numpy() for k, v in part.state_dict().items()} for part in (one, other)]
        return alike(*states)
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and np.array_equal(one, other, equal_nan=one.dtype.kind == "f")
    if sparse.issparse(one):
        return (one != other).nnz == 0
    return one == other


@pytest.mark.filterwarnings("ignore:it is not sure", "ignore:modalities .* share nothing")
@pytest.mark.parametrize("how", ["links", "shape", "pairs", "known", "variational", "networks"])
def test_all_of_it_is_kept(data, mosaic, links, tmp_path, how):
    given = {"n_pcs": 8}
    if how == "pairs":
        both, truth = simulate(80, {"rna": 40, "adt": 15}, links={"adt": 1.0}, depth=2.0, seed=1)
        mosaic, links = Mosaic.from_mudata(both), truth.links[["gene", "feature"]]
        given |= {"start": "pairs"}
    if how == "known":
        n = mosaic.n_cells // 2
        given |= {"correspondence": linkage.Correspondence.from_pairs(np.arange(n), np.arange(n), (n, n))}
    if how in ("variational", "networks"):
        given |= {"n_steps": 3, "n_hidden": 4 if how == "networks" else 0}
        link = linkage.variational_cca(mosaic, ("rna", "adt"), links, **given)
    else:
        link = linkage.cca(mosaic, ("rna", "adt"), None if how == "shape" else links, **given)
    link.save(tmp_path / "kept")
    own = {} if how == "pairs" else {"Own": Own}
    again = type(link).load(tmp_path / "kept", **own)
    assert alike(link, again)
    assert alike(again.transform(mosaic), link.transform(mosaic))
    assert alike(again.feature_links(), link.feature_links())
    new = Mosaic.from_mudata(data[0] if how != "pairs" else both, schema=again.schema)
    assert alike(again.transform(new), link.transform(mosaic))


def test_of_new_cells_one_modality_is_enough(data, kept):
    few = data[0][data[0]["adt"].obs_names[:10]].copy()
    few.mod.pop("rna")
    few.update()
    (scores,) = kept.transform(Mosaic.from_mudata(few, schema=kept.schema)).values()
    np.testing.assert_allclose(scores, kept.scores["adt"].loc[scores.index], rtol=1e-5, atol=1e-6)


def test_what_is_there_stays_unless_it_may_be_replaced(kept, mosaic, tmp_path):
    MultiVI(mosaic, n_latent=2).save(tmp_path)
    with pytest.raises(FileExistsError, match="already holds a saved model or linkage; pass overwrite=True"):
        kept.save(tmp_path)
    kept.save(tmp_path, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.json", "weights.safetensors"]
    assert alike(Linkage.load(tmp_path, Own=Own), kept)


def refused(folder, message, cls=Linkage, **likelihoods):
    with pytest.raises(ValueError, match=message) as error:
        cls.load(folder, **likelihoods)
    assert "\n" not in str(error.value)


def test_other_classes_say_what_they_are(kept, mosaic, tmp_path):
    kept.save(tmp_path / "link")
    refused(tmp_path / "link", "pass Own=<class> to load")
    refused(
        tmp_path / "link", "of class Linkage, not VariationalLinkage; use Linkage.load", VariationalLinkage, Own=Own
    )
    refused(tmp_path / "nowhere", "does not hold a complete saved model")
    with pytest.raises(ValueError, match="holds a model of class Linkage, not MultiVI; use Linkage.load"):
        MultiVI.load(tmp_path / "link")
    MultiVI(mosaic, n_latent=2).save(tmp_path / "model")
    refused(tmp_path / "model", "holds a model of class MultiVI, not Linkage; use MultiVI.load")


def test_damaged_files_are_refused(kept, tmp_path):
    kept.save(tmp_path)
    whole = {path: path.read_bytes() for path in tmp_path.iterdir()}
    generator = np.random.default_rng(0)
    for path, content in whole.items():
        for at in generator.integers(len(content), size=20):
            changed = bytearray(content)
            changed[at] ^= 1 << generator.integers(8)
            path.write_bytes(changed if at % 3 else content[:at])
            refused(tmp_path, "kept|model|weights|numbers", Own=Own)
        path.write_bytes(content)
    assert alike(Linkage.load(tmp_path, Own=Own), kept)


def test_numbers_of_another_linkage_are_refused(kept, tmp_path):
    """A file that is whole, but whose parts do not belong together."""
    standardiser, loadings, structure = kept._reduced["rna"]
    wrong = replace(kept, _reduced=kept._reduced | {"rna": (standardiser, loadings[:-1], structure)})
    wrong.save(tmp_path)
    refused(tmp_path, "do not fit together", Own=Own)
    content = json.loads((tmp_path / "model.json").read_text())
    content["parts"]["dict"][0][1] = {"part": ["Popen", {"args": "true"}]}
    del content["digest"]
    (tmp_path / "model.json").write_text(json.dumps(content))
    refused(tmp_path, "do not fit together: 'Popen'", Own=Own)
