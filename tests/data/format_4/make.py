"""Wrote the models in this folder, under the last version that saved in format 4; the test makes the same data."""

import sys
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
from mudata import MuData


def data():
    """40 cells: 28 with RNA (10 genes), 28 with antibodies (4 proteins), half of them treated."""
    rng, names = np.random.default_rng(4), np.array([f"cell{i}" for i in range(40)])
    obs = pd.DataFrame({"batch": np.resize(["a", "b"], 40), "arm": np.resize(["no", "no", "yes"], 40)}, index=names)

    def modality(cells, prefix, n):
        counts = rng.poisson(3.0, (len(cells), n)).astype(np.float32) + 1
        var = pd.DataFrame(index=[f"{prefix}{i}" for i in range(n)])
        return anndata.AnnData(counts, obs.loc[names[cells]].copy(), var)

    return MuData({"rna": modality(np.arange(28), "gene", 10), "adt": modality(np.arange(12, 40), "protein", 4)})


def models():
    """Each model by the name of its folder."""
    from pyro import distributions as dist
    from pyro.nn import PyroSample

    from pyromosaic import ContrastiveVI, DiagVI, ModalitySpec, Mosaic, MultiVI, ScModal
    from pyromosaic.likelihoods import NB

    class Uncertain(NB):
        def __init__(self, schema):
            super().__init__(schema)
            self.log_theta = PyroSample(dist.Normal(0.0, 1.5).expand([schema.n_features]).to_event(1))

    links = pd.DataFrame({"rna": ["gene0", "gene1"], "adt": ["protein0", "protein1"]})
    mosaic, small = Mosaic.from_mudata(data(), batch_key="batch"), {"n_latent": 2, "n_hidden": 4}
    spec = ModalitySpec(Uncertain, batch_key="batch")
    uncertain = Mosaic.from_mudata(data(), {"rna": spec, "adt": "nb_mixture"})
    arms = mosaic.with_cohorts("arm", background="no")
    return {
        "multivi": MultiVI(mosaic, n_private=1, library="latent", **small),
        "uncertain": MultiVI(uncertain, **small),
        "diagvi": DiagVI(mosaic, links, linkage=None, **small),
        "contrastive": ContrastiveVI(arms, n_salient=2, library="latent", **small),
        "scmodal": ScModal(mosaic, links, linkage=None, n_adversary_steps=1, **small),
    }


if __name__ == "__main__":
    for name, model in models().items():
        model.train(2, validation=0.0, progress_bar=False)
        model.save(Path(sys.argv[1]) / name)
        model.get_latent_representation().to_csv(Path(sys.argv[1]) / name / "latent.csv", float_format="%.7g")
        values = model.get_imputed_values("adt", n_samples=None).mean
        values.to_csv(Path(sys.argv[1]) / name / "imputed.csv", float_format="%.7g")
