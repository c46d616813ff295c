"""Hiding measurements of cells, to compare the predictions of a model with them."""

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from pyromosaic.accepted import Seed, Share, Whole, checked
from pyromosaic.data.mosaic import Mosaic
from pyromosaic.data.tables import kept_apart

if TYPE_CHECKING:
    from anndata import AnnData
    from mudata import MuData


def _complete(mdata: "MuData") -> pd.Index:
    """Cells that have all modalities."""
    if not hasattr(mdata, "mod"):
        raise ValueError(f"mdata must be a MuData; found a {type(mdata).__name__}")
    return mdata.obs_names[np.all([mdata.obs_names.isin(a.obs_names) for a in mdata.mod.values()], axis=0)]


def _mudata(modalities: "dict[str, AnnData]", obs: pd.DataFrame, origin: Mapping[str, str]) -> "MuData":
    """A MuData in which each cell has the columns of `obs` of the cell that it was made from."""
    import mudata

    with kept_apart():
        mdata = mudata.MuData(modalities)
    names = [origin.get(name, name) for name in mdata.obs_names]
    for column in obs.columns.difference(mdata.obs.columns, sort=False):
        mdata.obs[column] = obs[column].reindex(names).array
    return mdata


@checked
def hide(mdata: "MuData", n_hidden: Mapping[str, Whole], seed: Seed = 0) -> "tuple[MuData, dict[str, AnnData]]":
    """Hide modalities in randomly chosen cells that have all modalities; each of them loses one.

    Parameters
    ----------
    mdata
        The data; left as they are.
    n_hidden
        Number of cells that lose each modality, e.g. ``{"adt": 200, "rna": 200}``.
    seed
        Seed of the choice.

    Returns
    -------
    mosaic
        The data without the hidden measurements.
    truth
        The hidden measurements of each modality.

    Raises
    ------
    ValueError
        If there are too few cells with all modalities, a number is negative, or a modality does not exist.

    Examples
    --------
    >>> from pyromosaic import pbmc_mosaic
    >>> shown, hidden = hide(pbmc_mosaic(), {"adt": 200})
    >>> shown["adt"].n_obs, hidden["adt"].n_obs
    (1000, 200)
    """
    complete = _complete(mdata)
    for name in n_hidden:
        if name not in mdata.mod:
            raise ValueError(f"there is no modality {name!r}; found {', '.join(map(repr, mdata.mod))}")
    total = sum(n_hidden.values())
    if total > len(complete):
        raise ValueError(f"n_hidden must sum to at most {len(complete)}, the cells with all modalities; found {total}")
    chosen = np.random.default_rng(seed).permutation(complete)[:total]
    ends = np.cumsum(list(n_hidden.values()), dtype=int)
    lost = {name: chosen[end - n : end] for (name, n), end in zip(n_hidden.items(), ends, strict=True)}
    kept, truth = {}, {}
    for name, adata in mdata.mod.items():
        hidden = adata.obs_names.isin(lost.get(name, []))
        kept[name] = adata[~hidden].copy()
        if name in lost:
            truth[name] = adata[hidden].copy()
    return _mudata(kept, mdata.obs, {}), truth


@checked
def unpair(mdata: "MuData", share: Share, seed: Seed = 0) -> "MuData":
    """Replace a share of the complete cells by copies with one modality each (as in the MultiVI paper).

    Parameters
    ----------
    mdata
        The data; left as they are.
    share
        Share of the cells with all modalities that are unpaired, from 0 to 1.
    seed
        Seed of the choice.

    Returns
    -------
    MuData
        Every unpaired cell ``c`` is replaced by ``c:rna``, ``c:atac``, …, one for each modality.

    Raises
    ------
    ValueError
        If `share` is not between 0 and 1.

    Examples
    --------
    >>> from pyromosaic import pbmc_mosaic
    >>> unpair(pbmc_mosaic(), 0.5).n_obs  # 400 of 800 complete cells are now two
    2000
    """
    complete = _complete(mdata)
    chosen = np.random.default_rng(seed).permutation(complete)[: round(share * len(complete))]
    copies = {}
    for name, adata in mdata.mod.items():
        copy = adata.copy()
        copy.obs_names = np.where(copy.obs_names.isin(chosen), copy.obs_names + f":{name}", copy.obs_names)
        copies[name] = copy
    origin = {f"{cell}:{name}": cell for name in copies for cell in chosen}
    return _mudata(copies, mdata.obs, origin)


def separate(mosaic: Mosaic) -> Mosaic:
    """The same measurements with one modality per cell: which measurements share a cell is removed.

    Parameters
    ----------
    mosaic
        The data; left as they are.

    Returns
    -------
    Mosaic
        One modality after the other, with cells named ``"modality:cell"``; the given mosaic if no cell has two
        modalities.

    Examples
    --------
    >>> from pyromosaic import Mosaic, pbmc_mosaic
    >>> separate(Mosaic.from_mudata(pbmc_mosaic())).patterns.value_counts().to_dict()
    {'adt': 1200, 'rna': 1200}
    """
    cells = [np.flatnonzero(m.present) for m in mosaic.modalities.values()]
    index = np.concatenate(cells)
    if len(index) == len(np.unique(index)):
        return mosaic
    owner = np.repeat(np.arange(len(cells)), [len(own) for own in cells])
    modalities = {
        name: replace(
            m.take(index),
            rows=np.where(owner == i, m.rows[index], -1),
            library=np.where(owner == i, m.library[index], np.float32(np.nan)),
        )
        for i, (name, m) in enumerate(mosaic.modalities.items())
    }
    prefixes = np.array([f"{name}:" for name in modalities], dtype=object)
    return replace(
        mosaic,
        obs_names=pd.Index(prefixes[owner] + mosaic.obs_names.to_numpy(dtype=object)[index]),
        modalities=modalities,
        tables=tuple(t._replace(cells=prefix + t.cells.astype(str)) for t in mosaic.tables for prefix in prefixes),
        groups=None if mosaic.groups is None else mosaic.groups[index],
    )
