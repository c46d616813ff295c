"""Models and mosaics behave as Python objects: copied, pickled, moved, shown; and a loaded model knows its split."""

import copy
import io
import json
import pickle
import re

import anndata
import joblib
import numpy as np
import pandas as pd
import pytest
import torch
from pyro import distributions as dist
from pyro import optim
from pyro.infer import SVI, Trace_ELBO
from pyro.nn import PyroSample

from pyromosaic import ContrastiveVI, DiagVI, ModalitySpec, Mosaic, MultiVI, ScModal, simulate
from pyromosaic.data import loader
from pyromosaic.likelihoods import NB
from pyromosaic.nn import Encoder
from pyromosaic.penalties import Adversary
from pyromosaic.priors import StudentT

QUIET = {"progress_bar": False, "accelerator": "cpu"}
LINKS = pd.DataFrame({"rna": [f"rna_{i}" for i in range(5)], "adt": [f"adt_{i}" for i in range(5)]})
pytestmark = [
    pytest.mark.filterwarnings("ignore:the shared latent space carries only"),
    pytest.mark.filterwarnings("ignore:the guidance graph has few links"),
]


class Uncertain(NB):
    """Dispersions with a posterior, which is one of Pyro's automatic guides."""

    def __init__(self, schema):
        super().__init__(schema)
        self.log_theta = PyroSample(dist.Normal(torch.zeros(30), 1.5).to_event(1))


@pytest.fixture(scope="module")
def data():
    return simulate(90, {"rna": 30, "adt": 5}, treated=1 / 3, seed=3)[0]


def build(name, data):
    mosaic = Mosaic.from_mudata(data, batch_key="batch")
    if name == "ContrastiveVI":
        return ContrastiveVI(mosaic.with_cohorts("condition", background="control"), n_latent=3)
    if name == "global":
        return MultiVI(Mosaic.from_mudata(data, {"rna": ModalitySpec(Uncertain), "adt": "nb_mixture"}), n_latent=3)
    if name == "MultiVI":
        options = {"prior": StudentT(df=5.0), "adversary": Adversary(target="batch"), "n_private": 2, "fusion": "cell"}
        return MultiVI(mosaic, n_latent=3, library="latent", **options)
    return {"DiagVI": DiagVI, "ScModal": ScModal}[name](mosaic, LINKS, linkage=None, n_latent=3)


def through_torch(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def through_joblib(model):
    file = io.BytesIO()
    joblib.dump(model, file)
    file.seek(0)
    return joblib.load(file)


WAYS = {
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "joblib": through_joblib,
    "torch": through_torch,
    "deepcopy": copy.deepcopy,
}


def answers(model):
    modality = {"modality": "rna"} if isinstance(model, DiagVI | ScModal) else {}
    return (
        model.get_latent_representation(**modality, sample=True).to_numpy(),
        model.get_imputed_values("rna", n_samples=2).mean.to_numpy(),
        model.posterior_predictive_sample("adt"),
    )


@pytest.mark.parametrize("name", ["MultiVI", "ContrastiveVI", "DiagVI", "ScModal", "global"])
def test_a_copy_answers_alike_and_is_separate(name, data):
    model = build(name, data)
    model.train(2, **QUIET)
    known = answers(model)  # afterwards parameters know how plain Pyro asks for them
    for way, through in WAYS.items():
        again = through(model)
        assert repr(again) == repr(model), way
        assert (again.mosaic is model.mosaic) == (way == "deepcopy")
        for one, other in zip(answers(again), known, strict=True):
            np.testing.assert_array_equal(one, other)
        part = again.guide.modalities["rna"]
        assert part.owned_by_model[0] in (None, again.model.modalities["rna"].likelihood)
        again.train(1, **QUIET)  # the copy learns, and the model stays as it was
        assert not np.array_equal(answers(again)[0], known[0])
        for one, other in zip(answers(model), known, strict=True):
            np.testing.assert_array_equal(one, other)


def test_a_copy_learns_by_plain_pyro_and_as_the_model_would(data):
    model = build("MultiVI", data)
    losses = []
    for one in (model, pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        svi = SVI(one.model, one.guide, optim.Adam({"lr": 1e-2}), Trace_ELBO())
        torch.manual_seed(0)
        minibatches = loader(one.mosaic, one.mosaic.find(None), 30, seed=0)
        losses.append([svi.step(minibatch) for minibatch in minibatches])
        pickle.dumps(one)  # also in the middle of it
        losses[-1].append(svi.step(next(iter(minibatches))))
    assert losses[0] == losses[1] == losses[2] and losses[0][0] != losses[0][-1]


def test_the_parts_of_a_copy_belong_to_it(data):
    first = copy.deepcopy(build("MultiVI", data))
    second = MultiVI(first.mosaic, n_latent=3, prior=first.model.prior)
    assert second.model.prior is not first.model.prior


def test_data_in_a_file_are_not_pickled(data, tmp_path):
    data["rna"].write_h5ad(tmp_path / "rna.h5ad")
    backed = anndata.read_h5ad(tmp_path / "rna.h5ad", backed="r")
    model = MultiVI(Mosaic.from_anndata({"rna": backed}), n_latent=3)
    with pytest.raises(
        TypeError, match=r"measurements are in a file, .* read them into memory first .* or keep .*save"
    ):
        pickle.dumps(model)
    assert copy.deepcopy(model).mosaic is model.mosaic
    pickle.loads(pickle.dumps(MultiVI(Mosaic.from_anndata({"rna": backed.to_memory()}))))
    backed.file.close()


def test_to_a_device(data):
    model = build("MultiVI", data)
    known = answers(model)
    assert model.to(torch.device("cpu")) is model
    for device in ("meta", "nonsense", "cuda:99", 2.5):
        with pytest.raises(ValueError, match=f"device must be one that PyTorch can use here.*{device}"):
            model.to(device)
    for one, other in zip(answers(model), known, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ["MultiVI", "ContrastiveVI", "DiagVI", "ScModal", "global"])
def test_to_a_gpu_and_back(name, data):
    model = build(name, data)
    model.train(1, **QUIET)
    known = model.get_imputed_values("rna", n_samples=None).mean
    again = pickle.loads(pickle.dumps(model.to("cuda")))
    assert {p.device.type for part in (again.model, again.guide) for p in part.parameters()} == {"cuda"}
    np.testing.assert_allclose(again.get_imputed_values("rna", n_samples=None).mean, known, rtol=1e-3, atol=1e-4)
    again.train(1, progress_bar=False)
    np.testing.assert_array_equal(model.to("cpu").get_imputed_values("rna", n_samples=None).mean, known)


# How they are shown


def test_repr_names_the_options_that_are_not_defaults(data):
    assert repr(MultiVI(Mosaic.from_mudata(data))).startswith("MultiVI(), not trained, on Mosaic of 90 cells\n")
    shown = repr(build("MultiVI", data)).partition(", not trained")[0]
    assert shown == (
        "MultiVI(n_latent=3, library='latent', fusion='cell', n_private=2, adversary=Adversary(target='batch'), "
        "prior=StudentT(df=5.0))"
    )

    class Mine(MultiVI):
        def __init__(self, data, *, twice=2, **options):
            super().__init__(data, n_latent=twice * 2, **options)

    mosaic = Mosaic.from_mudata(data)
    assert repr(Mine(mosaic, encoder=lambda *a: Encoder(*a), mmd=50.0)).startswith("Mine(encoder=<lambda>), not")
    linked = repr(build("DiagVI", data)).partition(", not trained")[0]
    assert len(linked) < 200 and "n_latent=3" in linked


def cells_of(html):
    assert html.count("<td>") == html.count("</td>") and html.count("<div>") == html.count("</div>")
    return re.findall(r"<td>(.*?)</td>", html)


def test_html(data):
    mosaic = Mosaic.from_mudata(data, batch_key="batch", label_key="celltype")
    n = {name: str(modality.present.sum()) for name, modality in mosaic.modalities.items()}
    cells = cells_of(mosaic._repr_html_())
    assert cells[:6] == ["rna", n["rna"], "30", "nb", "2 (batch)", f"{len(mosaic.schema['rna'].labels)} (celltype)"]
    assert cells[6:9] == ["adt", n["adt"], "5"] and "30 rna+adt" in mosaic._repr_html_()
    treated = mosaic.with_cohorts("condition", background="control")
    assert "background &#x27;control&#x27; against &#x27;treated&#x27;" in treated._repr_html_()
    model = MultiVI(mosaic, n_latent=3)
    assert "MultiVI(n_latent=3)" in model._repr_html_() and mosaic._repr_html_() in model._repr_html_()
    assert cells_of(model._repr_html_())[:2] == ["epochs trained", "0"]
    model.train(2, **QUIET)
    cells = cells_of(model._repr_html_())
    assert cells[:4] == ["epochs trained", "2", "train_elbo", f"{model.history['train_elbo'].iloc[-1]:.4g}"]
    found = model.get_imputed_values("rna", n_samples=3)
    cells = cells_of(found._repr_html_())
    assert len(cells) == 30 and cells[1] == f"{found.mean.iloc[0, 0]:.3g} ± {found.sd.iloc[0, 0]:.2g}"
    assert max(len(shown._repr_html_()) for shown in (mosaic, model, found)) < 3000


def test_html_of_other_objects(data, tmp_path):
    data = data.copy()
    data["rna"].var_names = [f"<{name}>" for name in data["rna"].var_names]
    model = MultiVI(Mosaic.from_mudata(data), n_latent=3)
    assert "&lt;rna_0&gt;" in model.get_imputed_values("rna", n_samples=2)._repr_html_()
    model.save(tmp_path / "saved")
    assert "no data" in MultiVI.load(tmp_path / "saved")._repr_html_()


# The split


def parts(model):
    return {name: set(model.mosaic.obs_names[cells]) for name, cells in vars(model.split).items()}


def test_a_loaded_model_knows_its_split(data, tmp_path):
    model = MultiVI(Mosaic.from_mudata(data, batch_key="batch"), n_latent=3)
    model.save(tmp_path / "early")
    assert MultiVI.load(tmp_path / "early", data).split is None
    model.train(1, validation=0.2, test=0.1, **QUIET)
    model.save(tmp_path / "saved")
    again = MultiVI.load(tmp_path / "saved", data)
    for name, cells in vars(model.split).items():
        np.testing.assert_array_equal(getattr(again.split, name), cells)
    order = np.random.default_rng(0).permutation(90)
    shuffled = MultiVI.load(tmp_path / "saved", data[order].copy())
    assert parts(shuffled) == parts(model) and len(parts(model)["test"]) > 0
    shuffled.save(tmp_path / "saved", overwrite=True)
    assert parts(MultiVI.load(tmp_path / "saved", data)) == parts(model)
    assert MultiVI.load(tmp_path / "saved", data[:60].copy()).split is None
    assert MultiVI.load(tmp_path / "saved").split is None


def test_cells_of_neither_cohort_and_separate_cells_are_in_the_split(data, tmp_path):
    few = data.copy()
    for obs in (few.obs, few["rna"].obs, few["adt"].obs):
        obs["condition"] = obs["condition"].astype(str).where(~obs.index.isin(few.obs_names[:5]), "other")
    mosaic = Mosaic.from_mudata(few).with_cohorts("condition", background="control", target="treated")
    for model in (ContrastiveVI(mosaic, n_latent=3), build("DiagVI", data)):
        model.train(1, validation=0.2, **QUIET)
        model.save(tmp_path / type(model).__name__)
        source = mosaic if isinstance(model, ContrastiveVI) else data
        again = type(model).load(tmp_path / type(model).__name__, source)
        for name, cells in vars(model.split).items():
            np.testing.assert_array_equal(getattr(again.split, name), cells)


def test_a_model_saved_before_the_split_was_loads(data, tmp_path):
    model = MultiVI(Mosaic.from_mudata(data), n_latent=3)
    model.train(1, **QUIET)
    model.save(tmp_path)
    content = json.loads((tmp_path / "model.json").read_text())
    kept = {key: value for key, value in content.items() if key not in ("split", "digest")}
    (tmp_path / "model.json").write_text(json.dumps(kept))
    assert MultiVI.load(tmp_path, data).split is None
