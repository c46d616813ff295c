"""Calibration of every model on a small simulated mosaic, and of imputed counts on the packaged PBMC mosaic.

Each model is trained with its defaults. Then cells are drawn from the trained model, and their true latent variables
are ranked among draws from the guide, both as trained and after fitting it to data drawn from the model.

    python benchmarks/calibration.py
    python benchmarks/calibration.py --held-out
    python benchmarks/calibration.py --effects
    python benchmarks/calibration.py --means --epochs 40
    python benchmarks/calibration.py --likelihood --epochs 60

``--background``, ``--prior``, ``--likelihood-rate`` and ``--sleep-steps`` change how these models are made and trained;
the former defaults were ``--background latent --prior normal --sleep-steps 0``.
"""

import argparse
import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from common import quiet

from pyromosaic import (
    ContrastiveVI,
    DiagVI,
    ModalitySpec,
    Mosaic,
    MultiVI,
    ScModal,
    checks,
    hide,
    pbmc_mosaic,
    simulate,
)
from pyromosaic.models.mosaic_model import MosaicModel

N_CELLS, SIZES = 800, {"rna": 60, "adt": 20}


LIKELIHOODS = {"rna": "nb", "atac": "bernoulli", "adt": "nb_mixture"}


def registered(mdata: Any, given: Namespace, **columns: str) -> Mosaic:
    """The data, with the background of antibodies as asked for."""
    specs = {name: ModalitySpec(LIKELIHOODS[name], **columns) for name in mdata.mod}
    if "adt" in specs:
        specs["adt"] = replace(specs["adt"], background=given.background)
    return Mosaic.from_mudata(mdata, specs)


def train(model: MosaicModel, given: Namespace, n_epochs: int) -> MosaicModel:
    """Train with the given options."""
    rate, steps = given.likelihood_rate, given.sleep_steps
    model.train(n_epochs, likelihood_rate=rate, sleep_steps=steps, seed=given.seed, progress_bar=False)
    return model


def multivi(given: Namespace, fusion: str = "mean") -> MosaicModel:
    mdata, _ = simulate(N_CELLS, SIZES, seed=given.seed)
    return MultiVI(registered(mdata, given, batch_key="batch"), n_latent=5, fusion=fusion, prior=given.prior)


def contrastivevi(given: Namespace) -> MosaicModel:
    mdata, _ = simulate(N_CELLS, SIZES, treated=0.5, seed=given.seed)
    mosaic = registered(mdata, given, batch_key="batch").with_cohorts("condition", background="control")
    return ContrastiveVI(mosaic, n_latent=5, n_salient=2)


def unpaired(model: Callable[..., MosaicModel], given: Namespace) -> MosaicModel:
    mdata, truth = simulate(N_CELLS, SIZES, patterns=["rna", "adt"], links={"adt": 1.0}, seed=given.seed)
    links = truth.links.rename(columns={"gene": "rna", "feature": "adt"})[["rna", "adt"]]
    return model(registered(mdata, given, batch_key="batch"), links, n_latent=5, n_private=2)


MODELS: dict[str, Callable[[Namespace], MosaicModel]] = {
    "MultiVI": multivi,
    "MultiVI, product of experts": partial(multivi, fusion="product"),
    "ContrastiveVI": contrastivevi,
    "DiagVI": partial(unpaired, DiagVI),
    "ScModal": partial(unpaired, ScModal),
}


def latent_coverage(given: Namespace) -> pd.DataFrame:
    """Coverage of 50 % and 90 % intervals of each model's latent variables, by pattern of modalities."""
    tables = {}
    for name, make in MODELS.items():
        model = train(make(given), given, given.epochs)
        patterns = model._data(None).patterns.rename("pattern")
        for guide, steps in {"as trained": 0, **({"fitted": given.steps} if given.steps else {})}.items():
            ranks = checks.simulation_based_calibration(model, n_steps=steps, n_samples=given.samples)
            table = ranks.coverage((0.5, 0.9), by=patterns)["randomised"].unstack("level")
            tables[name, guide] = table.loc[[v for v in table.index.unique("variable") if v in ("z", "s")]]
            print(name, guide, tables[name, guide].round(2), sep="\n", flush=True)
    return pd.concat(tables, names=["model", "guide"])


def held_out_coverage(given: Namespace, n_hidden: int = 200) -> pd.DataFrame:
    """Coverage of intervals of held-out counts."""
    mdata, truth = hide(pbmc_mosaic(), dict.fromkeys(("rna", "adt"), n_hidden))
    model = train(MultiVI(registered(mdata, given, batch_key="batch"), prior=given.prior), given, 150)
    found = {}
    for name, hidden in truth.items():
        ranks = checks.imputation_ranks(model, name, hidden, n_samples=given.samples)
        found[name] = ranks.coverage((0.5, 0.9)).droplevel("variable")
    return pd.concat(found, names=["modality"])


def effect_coverage(given: Namespace, n_pairs: int = 50) -> pd.DataFrame:
    """Coverage of the 90 % intervals of differential effects between two cells, against the simulation's truth."""
    mdata, truth = simulate(N_CELLS, SIZES, seed=given.seed)
    model = train(
        MultiVI(registered(mdata, given, batch_key="batch"), n_latent=5, prior=given.prior), given, given.epochs
    )
    numbers = mdata.obs_names.get_indexer(model.mosaic.obs_names)
    pairs = np.random.default_rng(0).choice(N_CELLS, (n_pairs, 2), replace=False)
    found = {}
    for name in SIZES:
        signal = np.log2(truth.mean[name] / truth.parameters[name]["size"][:, None])[numbers]
        inside = []
        for a, b in pairs:
            table = model.differential(cells1=[a], cells2=[b], modality=name, n_samples=given.samples)
            effect = pd.Series(signal[a] - signal[b], model.schema[name].features)[table.index]
            inside.append(effect.between(table["lfc_low"], table["lfc_high"]).mean())
        found[name] = np.mean(inside)
    return pd.DataFrame({"coverage of 90 % intervals": found})


def mean_coverage(given: Namespace) -> pd.DataFrame:
    """Coverage of the 90 % intervals of expected measurements at the median size, against the simulation's truth."""
    patterns = {"rna+atac+adt": 0.5, "rna": 0.17, "atac": 0.17, "adt": 0.16}
    drawn = {"rna": ("size", 1), "atac": ("cell_factor", 1000), "adt": ("size", 100)}
    rows = {}
    for data, features in (
        ("156 features", {"rna": 60, "atac": 80, "adt": 16}),
        ("1,400 features", {"rna": 500, "atac": 800, "adt": 100}),
    ):
        mdata, truth = simulate(4000, features, patterns=patterns, n_batches=1, seed=given.seed)
        sizes = {name: scale * truth.parameters[name][size] for name, (size, scale) in drawn.items()}
        for name, size in sizes.items():
            mdata[name].obs["size"] = size[mdata.obs_names.get_indexer(mdata[name].obs_names)]
        mosaic = registered(mdata, given, size_factor_key="size")
        for of, options in (("defaults", {}), ("calibrated", MultiVI.presets["calibrated"].options)):
            model = train(MultiVI(mosaic, prior=given.prior, **options), given, given.epochs)
            for name, size in sizes.items():
                for kind, those in (("measured", mosaic.presence[name]), ("imputed", ~mosaic.presence[name])):
                    cells, median = mosaic.obs_names[those][:1000], float(np.median(size))
                    library = median if mosaic.modalities[name].spec.traits.sized else None
                    found = model.get_imputed_values(name, cells, library=library, n_samples=given.samples)
                    at = mdata.obs_names.get_indexer(cells)
                    expected = truth.mean[name][at] / size[at, None] * median
                    low, high = (found.quantiles[level].to_numpy() for level in (0.05, 0.95))
                    error = float(np.median(np.abs(found.mean / expected - 1)))
                    rows[data, of, name, kind] = {
                        "coverage": float(((low <= expected) & (expected <= high)).mean()),
                        "median relative error": error,
                    }
            print(pd.DataFrame(rows).T.round(3).tail(6), flush=True)
    return pd.DataFrame(rows).T.rename_axis(["data", "trained with", "modality", "cell"])


def likelihood(given: Namespace) -> pd.DataFrame:
    """Held-out likelihood of blood cells per cell, and the processor seconds of training."""
    model = MultiVI(registered(pbmc_mosaic(), given, batch_key="batch"), prior=given.prior, seed=given.seed)
    start = time.process_time()
    train(model, given, given.epochs)
    seconds = time.process_time() - start
    assert model.split is not None
    cells = checks.held_out_log_likelihood(model, model.split.validation, n_samples=given.samples)
    figures = {
        "validation ELBO": model.history["validation_elbo"].dropna().iloc[-1],
        "importance-weighted log-likelihood": cells["log_likelihood"].mean(),
        "processor seconds": seconds,
    }
    return pd.DataFrame({"per cell": figures})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--held-out", action="store_true", help="coverage of held-out counts instead")
    parser.add_argument("--effects", action="store_true", help="coverage of differential effects instead")
    parser.add_argument("--means", action="store_true", help="coverage of expected measurements instead")
    parser.add_argument("--likelihood", action="store_true", help="held-out likelihood of blood cells instead")
    parser.add_argument("--background", choices=("latent", "marginal"), default="marginal", help="of antibodies")
    parser.add_argument("--prior", choices=("mixture", "normal"), default="mixture", help="of z in MultiVI")
    parser.add_argument("--likelihood-rate", type=float, default=1.0, help="rate of parameters of likelihoods")
    parser.add_argument("--sleep-steps", type=int, help="steps of the sleep phase after training")
    parser.add_argument("--seed", type=int, default=0, help="seed of simulated data and of training")
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--steps", type=int, default=600, help="steps of fitting the guide; 0 leaves it as trained")
    parser.add_argument("--samples", type=int, default=49, help="number of posterior draws")
    parser.add_argument("--csv", type=Path, help="write the table here as well")
    given = parser.parse_args()
    quiet()
    asked = {
        "held_out": held_out_coverage,
        "effects": effect_coverage,
        "means": mean_coverage,
        "likelihood": likelihood,
    }
    chosen = [table for name, table in asked.items() if getattr(given, name)]
    table = (chosen or [latent_coverage])[0](given)
    print(table.round(3).to_string())
    if given.csv:
        table.to_csv(given.csv)


if __name__ == "__main__":
    main()
