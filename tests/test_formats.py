"""Models that earlier versions saved are read, and say what they said."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from pyro import distributions as dist
from pyro.nn import PyroSample
from safetensors.torch import load_file, save_file

from pyromosaic import ContrastiveVI, DiagVI, ModalitySpec, Mosaic, MultiVI, ScModal, simulate
from pyromosaic.likelihoods import NB
from pyromosaic.models.base import accepted_options
from pyromosaic.models.formats import upgraded

SAVED = Path(__file__).parent / "data" / "format_4"
spec = importlib.util.spec_from_file_location("make", SAVED / "make.py")
make = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make)


class Uncertain(NB):
    def __init__(self, schema):
        super().__init__(schema)
        self.log_theta = PyroSample(dist.Normal(0.0, 1.5).expand([schema.n_features]).to_event(1))


@pytest.mark.parametrize(
    ("name", "kind", "objects"),
    [
        ("multivi", MultiVI, {}),
        ("uncertain", MultiVI, {"Uncertain": Uncertain}),
        ("diagvi", DiagVI, {}),
        ("contrastive", ContrastiveVI, {}),
        ("scmodal", ScModal, {}),
    ],
)
def test_models_of_format_4_are_read(name, kind, objects, tmp_path):
    assert json.loads((SAVED / name / "model.json").read_text())["format"] == 4
    model = kind.load(SAVED / name, **objects)
    mosaic = model.register(make.data())
    if name == "contrastive":
        mosaic = mosaic.with_cohorts("arm", background="no")
    for again in (False, True):
        for file, found in (
            ("latent.csv", model.get_latent_representation(data=mosaic)),
            ("imputed.csv", model.get_imputed_values("adt", n_samples=None, data=mosaic).mean),
        ):
            expected = pd.read_csv(SAVED / name / file, index_col=0)
            assert list(found.columns) == list(expected.columns)
            np.testing.assert_allclose(found.loc[expected.index], expected, rtol=1e-4, atol=1e-5)
        if not again:
            model.save(tmp_path / name)  # in the present format
            model = kind.load(tmp_path / name, **objects)


def test_other_formats_are_refused(tmp_path):
    for file in ("model.json", "weights.safetensors"):
        (tmp_path / file).write_bytes((SAVED / "multivi" / file).read_bytes())
    content = json.loads((tmp_path / "model.json").read_text())
    (tmp_path / "model.json").write_text(json.dumps(content | {"format": 3}))
    with pytest.raises(ValueError, match="saved in format 3; this version of pyromosaic reads formats 4, 5, 6"):
        MultiVI.load(tmp_path)


def test_options_of_format_5_become_arguments_of_parts():
    old = {
        "DiagVI": {"lam_sinkhorn": 85.0, "align_draws": True, "blur": None, "reach": 2.0, "reference": None}
        | {"lam_data": 0.1, "lam_kl": 1.0, "lam_graph": 15.0, "lam_anchors": 0.0, "lam_pull": None, "lam_class": 5.0}
        | {"prior": "mixture", "n_components": 7},
        "ScModal": {"lam_anchors": 1.0, "n_neighbors": 30, "lam_geometry": 10.0, "geometry": "cosine"}
        | {"lam_adversary": 2.0, "n_adversary_steps": 1, "lam_cycle": 3.0, "lam_pull": 4.0},
        "MultiVI": {"adversary": 2.0, "adversary_target": "batch", "jeffreys": None},
        "Silent": {"adversary": 0.0, "adversary_target": "pattern"},
        "Own": {"adversary_target": "batch", "n_components": 3},  # a subclass that has such options itself
    }
    new = {
        "DiagVI": {
            "alignment": {
                "part": "Sinkhorn",
                "arguments": {"weight": 85.0, "sampled": True, "blur": None, "reach": 2.0, "reference": None},
            },
            "prior": {"part": "GaussianMixture", "arguments": {"n_components": 7}},
        }
        | {"likelihood_weight": 0.1, "shared_kl": 1.0, "graph_weight": 15.0}
        | {"anchors": 0.0, "pull": None, "classifier": 5.0},
        "ScModal": {
            "anchors": {"part": "Anchors", "arguments": {"weight": 1.0, "n_neighbors": 30}},
            "geometry": {"part": "Geometry", "arguments": {"weight": 10.0, "likeness": "cosine"}},
            "adversary": {"part": "Discriminator", "arguments": {"weight": 2.0, "n_steps": 1}},
        }
        | {"cycle": 3.0, "pull": 4.0},
        "MultiVI": {
            "adversary": {"part": "Adversary", "arguments": {"weight": 2.0, "target": "batch"}},
            "jeffreys": None,
        },
        "Silent": {"adversary": 0.0},
        "Own": {"adversary_target": "batch", "n_components": 3},
    }
    kinds = {"DiagVI": DiagVI, "ScModal": ScModal}
    for name, options in old.items():
        accepted = accepted_options(kinds.get(name, MultiVI)) | (dict.fromkeys(options) if name == "Own" else {})
        found, _ = upgraded({"format": 5, "options": options}, {}, None, accepted)
        assert found == new[name]


def test_a_dispersion_that_a_multinomial_ignored_is_read(tmp_path):
    mdata = make.data()
    model = MultiVI(Mosaic.from_mudata(mdata, {"rna": ModalitySpec("multinomial", batch_key="batch")}), n_latent=2)
    model.save(tmp_path)
    content = json.loads((tmp_path / "model.json").read_text()) | {"format": 5}
    del content["digest"]  # which format 5 had not
    content["schema"]["modalities"]["rna"]["spec"]["dispersion"] = "gene-batch"
    (tmp_path / "model.json").write_text(json.dumps(content))
    again = MultiVI.load(tmp_path, model.mosaic)
    assert again.schema["rna"].spec.dispersion == "gene"
    assert again.get_latent_representation().equals(model.get_latent_representation())


def test_what_format_6_had_by_default_is_kept(tmp_path):
    """A latent background in every modality, a standard normal prior, and no width of the fusion."""
    mdata, _ = simulate(60, {"rna": 20, "adt": 5}, seed=0)
    specs = {"rna": ModalitySpec("nb"), "adt": ModalitySpec("nb_mixture", background="latent")}
    model = MultiVI(Mosaic.from_mudata(mdata, specs), n_latent=2, prior="normal")
    model.save(tmp_path)
    weights = load_file(tmp_path / "weights.safetensors")
    assert float(weights.pop("guide.fusion.width.tenth_of_log")) == 0
    save_file(weights, tmp_path / "weights.safetensors")
    content = json.loads((tmp_path / "model.json").read_text()) | {"format": 6}
    del content["digest"], content["weights"]  # of the files before these changes
    content["options"]["prior"] = None
    for modality in content["schema"]["modalities"].values():
        modality["spec"]["background"] = "latent"
    (tmp_path / "model.json").write_text(json.dumps(content))
    again = MultiVI.load(tmp_path, model.mosaic)
    assert again.schema["rna"].spec == ModalitySpec("nb") and again.schema["adt"].spec.background == "latent"
    assert again.options["prior"] == "normal"
    assert again.get_imputed_values("adt", n_samples=3).mean.equals(model.get_imputed_values("adt", n_samples=3).mean)


def test_sizes_of_format_7_do_not_use_other_modalities(tmp_path):
    mdata, _ = simulate(60, {"rna": 20, "adt": 5}, seed=0)
    model = MultiVI(Mosaic.from_mudata(mdata), n_latent=2)
    model.save(tmp_path)
    weights = load_file(tmp_path / "weights.safetensors")
    for name in ("rna", "adt"):
        assert float(weights.pop(f"model.modalities.{name}.size.of_depths")) == 0
    save_file(weights, tmp_path / "weights.safetensors")
    content = json.loads((tmp_path / "model.json").read_text()) | {"format": 7}
    del content["digest"], content["weights"]  # of the files before these changes
    (tmp_path / "model.json").write_text(json.dumps(content))
    again = MultiVI.load(tmp_path, model.mosaic)
    assert again.get_imputed_values("adt", n_samples=3).mean.equals(model.get_imputed_values("adt", n_samples=3).mean)
