"""Models that earlier versions saved are read, and say what they said."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from pyro import distributions as dist
from pyro.nn import PyroSample

from pyromosaic import ContrastiveVI, DiagVI, MultiVI, ScModal
from pyromosaic.likelihoods import NB

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
