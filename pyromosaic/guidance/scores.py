"""Scores of cells in one space for all modalities, from the links of their features."""

from typing import Any

import numpy as np
import pandas as pd

from pyromosaic.data import Mosaic
from pyromosaic.linkage import cca
from pyromosaic.linkage.preprocess import Standardiser
from pyromosaic.links import GuidanceGraph


def linked_scores(linkage: Any, mosaic: Mosaic, graph: GuidanceGraph | None, n_components: int) -> np.ndarray:
    """Scores of cells in one space for all modalities, from the `linkage` argument of a model.

    Parameters
    ----------
    linkage
        ``"cca"`` for `shared_scores` of the graph, or a table with one row per cell.
    mosaic, graph, n_components
        As in `shared_scores`.

    Raises
    ------
    ValueError
        If a cell has no row in the table, or `linkage` is something else.

    Examples
    --------
    >>> from pyromosaic import simulate
    >>> mosaic = Mosaic.from_mudata(simulate(20, {"rna": 50})[0])
    >>> table = pd.DataFrame(0.0, mosaic.obs_names, ["a", "b"])
    >>> linked_scores(table, mosaic, None, 2).shape
    (20, 2)
    """
    if isinstance(linkage, pd.DataFrame):
        names = linkage.index.astype(str)
        if names.has_duplicates:
            raise ValueError(
                f"the linkage has scores of cell {str(names[names.duplicated()][0])!r} twice; keep one row"
            )
        rows = names.get_indexer(mosaic.obs_names.astype(str))
        if (rows < 0).any():
            missing = mosaic.obs_names[rows < 0][0]
            raise ValueError(f"the linkage has no scores for cell {missing!r}; give a row for every cell")
        scores: np.ndarray = linkage.iloc[rows].apply(pd.to_numeric, errors="coerce").to_numpy(dtype=np.float32)
        bad = ~np.isfinite(scores).all(axis=1)
        if bad.any():
            raise ValueError(f"the linkage's scores of cell {mosaic.obs_names[bad][0]!r} are not finite numbers")
        return scores
    if linkage != "cca" or graph is None:
        raise ValueError(f'linkage must be "cca", a table of scores, or None; found {linkage!r}')
    return shared_scores(mosaic, graph, n_components)


def shared_scores(mosaic: Mosaic, graph: GuidanceGraph, n_components: int, seed: int = 0) -> np.ndarray:
    """Scores of cells in one space for all modalities, from canonical correlation that starts from linked features.

    The two modalities with the most links are linked by `pyromosaic.linkage.cca`. Each further modality is linked to a
    previous one, and its cells get their expected scores there.

    Parameters
    ----------
    mosaic
        The data; that cells have several modalities is not used.
    graph
        The guidance graph.
    n_components
        Number of scores.
    seed
        Seed of the linkage.

    Returns
    -------
    numpy.ndarray
        Cells × scores. The mean over cells of the summed squared scores is the sum of squared canonical correlations.
        Therefore the scores are on the scale of posterior means under a standard normal prior.
    """
    scores: dict[str, np.ndarray] = {}
    radius = 1.0
    while len(scores) < len(graph.features):
        pairs = [(a, b) for a in graph.features for b in graph.features if a not in scores and a != b]
        links = {(a, b): graph.links(a, b) for a, b in pairs if not scores or b in scores}
        a, b = max(links, key=lambda pair: len(links[pair]))
        sizes = [min(len(graph.features[k]), int(mosaic.modalities[k].present.sum())) - 1 for k in (a, b)]
        width = max(
            1, min(n_components, *sizes, *(_n_varying(mosaic, k) for k in (a, b)))
        )  # `cca` refuses a single one
        n_pcs = min(30, *(int(mosaic.modalities[k].present.sum()) - 1 for k in (a, b)))
        linkage = cca(mosaic, (a, b), links[a, b], n_components=width, n_pcs=n_pcs, seed=seed)
        if not scores:
            scores = {name: linkage.scores[name].to_numpy() for name in (a, b)}
            radius = float(np.sqrt((linkage.correlations**2).sum()))
        else:
            correspondence = linkage.correspondence
            other = correspondence.means(linkage.scores[a].to_numpy(), scores[b])[1]
            expected = (correspondence.plan @ other)[correspondence.groups[0]]
            scores[a] = expected / np.maximum(np.linalg.norm(expected, axis=1, keepdims=True), 1e-12)
    total, count = np.zeros((mosaic.n_cells, scores[a].shape[1])), np.zeros((mosaic.n_cells, 1))
    for name, own in scores.items():
        present = mosaic.modalities[name].present
        total[present] += own
        count[present] += 1
    return (radius * total / count).astype(np.float32)


def _n_varying(mosaic: Mosaic, name: str) -> int:
    """Number of features of a modality that vary within a batch, which limits the number of scores."""
    modality = mosaic.modalities[name]
    return int(np.isfinite(Standardiser.fit(modality, np.flatnonzero(modality.present))[1].scale).sum())
