"""Baselines without a deep model: a few lines of linear algebra on the cells that have all modalities.

Every function takes the data as a user has them and the hidden measurements (names and counts of their cells), and
returns what a system of `few_pairs.py` returns. Except for the mean profile, all start from 30 principal components of
each modality (log-normalised, centred within batches), and take what cells of single modalities lack from pairs.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy import sparse

N_PCS, N_SCORES, N_NEIGHBORS = 30, 15, 20


@dataclass
class Result:
    """What a system says about a mosaic; None or nothing where it has no answer.

    Parameters
    ----------
    latent
        Cells of the mosaic × dimensions.
    hidden
        Latents of the hidden measurements by modality, each from this modality alone.
    imputed
        Expected hidden counts (antibodies), shares of the cell's total (RNA) or propensities (chromatin) by modality.
    seconds, memory
        Processor seconds and memory (MB) of a system that ran in another process.
    """

    latent: pd.DataFrame | None
    hidden: Mapping[str, pd.DataFrame]
    imputed: Mapping[str, np.ndarray]
    seconds: float | None = None
    memory: float | None = None


class Components:
    """Principal components of every modality, of the cells of the mosaic and of the hidden measurements."""

    def __init__(self, mdata: Any, truth: Mapping[str, Any], batch_key: str) -> None:
        from mudata import MuData

        from pyromosaic import Mosaic
        from pyromosaic.linkage.preprocess import Standardiser, principal_components

        mosaic = Mosaic.from_mudata(mdata, batch_key=batch_key)
        hidden = Mosaic.from_mudata(MuData(dict(truth)), schema=mosaic.schema)
        self.shown: dict[str, pd.DataFrame] = {}
        self.hidden: dict[str, pd.DataFrame] = {}
        for name, modality in mosaic.modalities.items():
            cells = np.flatnonzero(modality.present)
            standardiser, data = Standardiser.fit(modality, cells)
            loadings = principal_components(data, min(N_PCS, len(data.scale) - 1), seed=0)
            self.shown[name] = pd.DataFrame(data @ loadings, mosaic.obs_names[cells])
            cells = np.flatnonzero(hidden.modalities[name].present)
            values = standardiser.apply(hidden.modalities[name], cells) @ loadings
            self.hidden[name] = pd.DataFrame(values, hidden.obs_names[cells])
        self.cells = mosaic.obs_names
        self.names = list(self.shown)
        both = set.intersection(*(set(values.index) for values in self.shown.values()))
        self.pairs = pd.Index([cell for cell in self.cells if cell in both])

    def paired(self, name: str) -> np.ndarray:
        """Components of the paired cells."""
        return self.shown[name].loc[self.pairs].to_numpy()

    def mapped(self, maps: Mapping[str, Callable[[np.ndarray], np.ndarray]]) -> tuple[pd.DataFrame, Any]:
        """Latents of cells, the mean over the modalities that they have, and of the hidden measurements."""
        each = {n: pd.DataFrame(maps[n](v.to_numpy()), v.index) for n, v in self.shown.items()}
        latent = pd.concat(each.values()).groupby(level=0).mean().reindex(self.cells)
        return latent, {n: pd.DataFrame(maps[n](v.to_numpy()), v.index) for n, v in self.hidden.items()}


def profiles(name: str, adata: Any) -> Any:
    """Counts as they are averaged: shares of RNA, open regions, counts of antibodies."""
    counts = sparse.csr_matrix(adata.X, dtype=np.float64)
    if name == "atac":
        return (counts > 0).astype(np.float64)
    if name == "rna":
        return sparse.diags(1 / np.maximum(np.asarray(counts.sum(axis=1)).ravel(), 1)) @ counts
    return counts


def from_neighbors(mdata: Any, truth: Mapping[str, Any], latent: pd.DataFrame) -> dict[str, np.ndarray]:
    """Mean profile of the nearest cells that have the modality."""
    from pyromosaic.neighbors import nearest

    imputed = {}
    for name, hidden in truth.items():
        donors = mdata[name].obs_names
        rows = nearest(latent.loc[donors].to_numpy(), N_NEIGHBORS, latent.loc[hidden.obs_names].to_numpy())[1]
        shape = (len(rows), len(donors))
        ends = np.arange(0, rows.size + 1, rows.shape[1])
        mean = sparse.csr_matrix((np.full(rows.size, 1 / rows.shape[1]), rows.ravel(), ends), shape)
        imputed[name] = np.asarray((mean @ profiles(name, mdata[name])).todense())
    return imputed


def mean_profile(mdata: Any, truth: Mapping[str, Any], batch_key: str, seed: int) -> Result:
    """The same mean profile for every cell."""
    imputed = {}
    for name, hidden in truth.items():
        mean = np.asarray(profiles(name, mdata[name]).mean(axis=0)).ravel()
        imputed[name] = np.broadcast_to(mean, hidden.shape).copy()
    return Result(None, {}, imputed)


def ridge(mdata: Any, truth: Mapping[str, Any], batch_key: str, seed: int) -> Result:
    """Log counts regressed on the principal components of the other modalities; left-out pairs choose the penalty."""
    from sklearn.linear_model import RidgeCV

    components = Components(mdata, truth, batch_key)
    if len(components.pairs) < 4:
        return Result(None, {}, {})
    imputed = {}
    for name, hidden in truth.items():
        log = np.log1p(1e4 * profiles(name, mdata[name]).toarray() if name == "rna" else mdata[name].to_df().to_numpy())
        if name == "atac":
            log = profiles(name, mdata[name]).toarray()
        log = pd.DataFrame(log, mdata[name].obs_names)
        others = [other for other in components.names if other != name]
        total, count = np.zeros(hidden.shape), np.zeros((hidden.n_obs, 1))
        for other in others:
            cells = hidden.obs_names.isin(components.shown[other].index)
            model = RidgeCV(np.logspace(0, 6, 13)).fit(components.paired(other), log.loc[components.pairs])
            total[cells] += model.predict(components.shown[other].loc[hidden.obs_names[cells]].to_numpy())
            count[cells] += 1
        value = total / np.maximum(count, 1)
        imputed[name] = value if name == "atac" else np.maximum(np.expm1(value), 0)
        if name == "rna":
            imputed[name] /= 1e4
    return Result(None, {}, imputed)


def stabmap(mdata: Any, truth: Mapping[str, Any], batch_key: str, seed: int) -> Result:
    """As StabMap (Ghazanfar et al. 2024): components of the first modality, by least squares where it is missing."""
    components = Components(mdata, truth, batch_key)
    if not len(components.pairs):
        return Result(None, {}, {})
    first, *others = components.names
    target = components.paired(first)
    maps: dict[str, Callable[[np.ndarray], np.ndarray]] = {first: lambda values: values}
    for name in others:
        x = components.paired(name)
        centre = x.mean(0)
        weight = np.linalg.lstsq(x - centre, target - target.mean(0), rcond=None)[0]
        maps[name] = lambda v, w=weight, c=centre: (v - c) @ w + target.mean(0)  # type: ignore[misc]
    latent, hidden = components.mapped(maps)
    return Result(latent, hidden, from_neighbors(mdata, truth, latent))


def paired_cca(mdata: Any, truth: Mapping[str, Any], batch_key: str, seed: int, harmony: bool = False) -> Result:
    """Canonical correlation of the paired cells (of two modalities; MAXVAR for more), cells scaled to length one."""
    components = Components(mdata, truth, batch_key)
    if len(components.pairs) < 2:
        return Result(None, {}, {})
    x = {name: components.paired(name) for name in components.names}
    centred = {name: v - v.mean(0) for name, v in x.items()}
    within = {}
    for name in x:
        c = np.cov(components.shown[name].to_numpy(), rowvar=False, bias=True)
        within[name] = len(x[name]) * (c + 0.2 * np.diag(c).mean() * np.eye(len(c)))
    shared = sum(v @ np.linalg.solve(within[name], v.T) for name, v in centred.items())
    values, vectors = np.linalg.eigh(np.asarray(shared))
    n = min(N_SCORES, len(values) - 1)
    rho, scores = np.maximum(values[::-1][:n] - 1 / len(x), 1e-3), vectors[:, ::-1][:, :n]
    maps: dict[str, Callable[[np.ndarray], np.ndarray]] = {}
    for name in x:
        weight = np.linalg.solve(within[name], centred[name].T @ scores) * rho

        def mapped(v: np.ndarray, weight: np.ndarray = weight, name: str = name) -> np.ndarray:
            s = (v - components.shown[name].to_numpy().mean(0)) @ weight
            return np.asarray(s / np.maximum(np.linalg.norm(s, axis=1, keepdims=True), 1e-12))

        maps[name] = mapped
    latent, hidden = components.mapped(maps)
    if harmony:
        latent, hidden = harmonised(mdata, latent, hidden, truth, batch_key, seed)
    return Result(latent, hidden, from_neighbors(mdata, truth, latent))


def paired_cca_harmony(mdata: Any, truth: Mapping[str, Any], batch_key: str, seed: int) -> Result:
    """The same, then Harmony (Korsunsky et al. 2019) over batches and sets of modalities."""
    return paired_cca(mdata, truth, batch_key, seed, harmony=True)


def harmonised(
    mdata: Any, latent: pd.DataFrame, hidden: Mapping[str, pd.DataFrame], truth: Any, batch_key: str, seed: int
) -> tuple[pd.DataFrame, dict[str, pd.DataFrame]]:
    """Latents after Harmony; hidden measurements are cells of the modality alone."""
    import harmonypy

    tables = {"": latent, **hidden}
    batch = pd.concat([a.obs[batch_key].astype(str) for a in mdata.mod.values()])
    batch = batch[~batch.index.duplicated()]
    pattern = pd.Series("", latent.index)
    for name, adata in mdata.mod.items():
        pattern += np.where(latent.index.isin(adata.obs_names), f"{name} ", "")
    meta = [pd.DataFrame({"batch": batch.reindex(latent.index), "pattern": pattern})]
    meta += [
        pd.DataFrame({"batch": truth[n].obs[batch_key].astype(str).reindex(h.index), "pattern": f"{n} "})
        for n, h in hidden.items()
    ]
    covariates = pd.concat(meta, ignore_index=True)
    varied = [key for key in covariates if covariates[key].nunique() > 1]
    values = np.concatenate([table.to_numpy() for table in tables.values()])
    found = np.asarray(harmonypy.run_harmony(values, covariates, varied, random_state=seed, verbose=False).Z_corr)
    found = found if found.shape == values.shape else found.T
    parts = np.split(found, np.cumsum([len(table) for table in tables.values()])[:-1])
    moved = {n: pd.DataFrame(p, t.index) for (n, t), p in zip(tables.items(), parts, strict=True)}
    return moved.pop(""), moved


#: Each takes the mosaic, the hidden measurements, the column of batches and a seed.
BASELINES: Mapping[str, Callable[..., Result]] = {
    "mean profile": mean_profile,
    "ridge": ridge,
    "StabMap-like": stabmap,
    "paired CCA": paired_cca,
    "paired CCA + Harmony": paired_cca_harmony,
}
