"""Scores of cells in one space for all modalities, from the links of their features or from cells with several."""

from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from pyromosaic.data import Mosaic
from pyromosaic.linkage import Linkage, cca
from pyromosaic.linkage.matching import unit_rows
from pyromosaic.linkage.preprocess import Standardiser
from pyromosaic.links import GuidanceGraph

FEWEST_PAIRS = 5  # cells with both modalities from which a linkage starts; with fewer it starts from links
ENOUGH_PAIRS = 300  # cells with several modalities from which networks learn what linear scores would tell them
N_LEARNT = 20_000  # cells from which a linkage is learnt; scores of the others follow from it


def linked_scores(
    linkage: Any, mosaic: Mosaic, graph: GuidanceGraph | None, n_components: int, paired: bool = False
) -> np.ndarray:
    """Scores of cells in one space for all modalities, from the `linkage` argument of a model.

    Parameters
    ----------
    linkage
        ``"cca"`` for `shared_scores` of the graph, a `Linkage`, or a table with one row per cell.
    mosaic, graph, n_components
        As in `shared_scores`.
    paired
        Whether ``"cca"`` means `mosaic_scores`, which also uses cells with several modalities.

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
    if isinstance(linkage, Linkage):
        return scores_of(linkage, mosaic, n_components)
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
    if linkage == "cca" and paired:
        return mosaic_scores(mosaic, graph, n_components)
    if linkage != "cca" or graph is None:
        raise ValueError(f'linkage must be "cca", a Linkage, a table of scores, or None; found {linkage!r}')
    return shared_scores(mosaic, graph, n_components)


def scores_of(linkage: Linkage, mosaic: Mosaic, n_components: int) -> np.ndarray:
    """Scores of cells from a linkage, on the scale of `shared_scores`.

    The scores of a cell that was matched by shape are multiplied by the confidence in its match: expected scores, if
    those of a wrong match are 0 on average. Therefore a model is pulled less where the linkage is not sure.

    Parameters
    ----------
    linkage
        A linkage of all modalities of the mosaic.
    mosaic
        The data, in which each measurement may be a separate cell (``"modality:cell"``).
    n_components
        Largest number of scores.

    Raises
    ------
    ValueError
        If a modality is not in the linkage.
    """
    found = linkage.transform(mosaic)
    for name in mosaic.modalities:
        if name not in found:
            raise ValueError(f"the linkage is between {' and '.join(map(repr, found))}; it has no scores of {name!r}")
    width = min(n_components, len(linkage.correlations))
    total, count = np.zeros((mosaic.n_cells, width)), np.zeros((mosaic.n_cells, 1))
    for name, table in found.items():
        own = table.to_numpy()[:, :width]
        own = own / np.maximum(np.linalg.norm(own, axis=1, keepdims=True), 1e-12)
        if name in linkage.confidence:
            cells = table.index.astype(str).str.removeprefix(f"{name}:")
            own = own * linkage.confidence[name].reindex(cells).fillna(1.0).to_numpy()[:, None]
        present = mosaic.modalities[name].present
        total[present] += own
        count[present] += 1
    radius = np.sqrt((linkage.correlations[:width] ** 2).sum())
    return (radius * total / np.maximum(count, 1)).astype(np.float32)


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


def mosaic_scores(mosaic: Mosaic, graph: GuidanceGraph | None, n_components: int, seed: int = 0) -> np.ndarray:
    """Scores of cells in one space for all modalities, from pairs (cells with several modalities), links, or both.

    `pyromosaic.linkage.cca` links the two modalities with the most pairs, or, if fewer than 5 cells have both, with the
    most links. Further modalities are linked to one of them, and the first scores are regressed on the new ones.

    Parameters
    ----------
    mosaic
        The data.
    graph
        Links; None without.
    n_components
        Maximum number of scores.
    seed
        Seed of the linkage.

    Returns
    -------
    numpy.ndarray
        Cells × scores, on the scale of `shared_scores`; of a cell with several modalities, the mean. NaN in cells whose
        modalities nothing links to others, and no columns if nothing is linked.
    """
    learnt = _taken(mosaic, _learnt(mosaic, np.random.default_rng(seed)))
    varying = {} if len(learnt.modalities) < 2 else _usable(learnt)
    total, count = np.zeros((mosaic.n_cells, 0)), np.zeros((mosaic.n_cells, 1))
    placed: dict[str, np.ndarray] = {}
    radius = 1.0
    while (tie := _strongest_tie(learnt, graph, list(varying), placed)) is not None:
        a, b, start = tie
        n_pcs = min(30, *(int(learnt.modalities[k].present.sum()) - 1 for k in (a, b)))
        width = min(n_components, n_pcs, varying[a], varying[b])
        links = None if graph is None or graph.links(a, b).empty else graph.links(a, b)
        linkage = cca(learnt, (a, b), links, start=start, n_components=width, n_pcs=n_pcs, n_metacells=2048, seed=seed)
        turn = np.eye(width)
        if placed:
            turn = np.linalg.lstsq(linkage.scores[b].to_numpy(), placed[b], rcond=None)[0]
        else:
            radius = float(np.sqrt((linkage.correlations**2).sum()))
            total = np.zeros((mosaic.n_cells, width))
        for name in (a,) if placed else (a, b):
            cells = np.flatnonzero(mosaic.modalities[name].present)
            for part in np.array_split(cells, -(-len(cells) // N_LEARNT)):
                total[part] += unit_rows(linkage.transform(_taken(mosaic, part))[name].to_numpy() @ turn)
            count[cells] += 1
        placed |= {k: unit_rows(linkage.scores[k].to_numpy() @ turn) for k in (a, b) if k not in placed}
    total[count[:, 0] == 0] = np.nan
    return (radius * total / np.maximum(count, 1)).astype(np.float32)


def few_pairs(mosaic: Mosaic, graph: GuidanceGraph | None) -> bool:
    """Whether `mosaic_scores` have something to start from, and a modality has fewer pairs than a network needs.

    It is so if fewer than 300 cells, and less than a third of the modality's cells, have another modality too.

    Examples
    --------
    >>> from pyromosaic import simulate
    >>> patterns = ({"rna+adt": p, "rna": 0.5 - p / 2, "adt": 0.5 - p / 2} for p in (0.1, 0.6))
    >>> mosaics = [Mosaic.from_mudata(simulate(200, {"rna": 50, "adt": 5}, patterns=p)[0]) for p in patterns]
    >>> [few_pairs(mosaic, None) for mosaic in mosaics]
    [True, False]
    """
    present = {name: mosaic.modalities[name].present for name in _measured(mosaic)}
    for a, own in present.items():
        shared = {b: int((own & other).sum()) for b, other in present.items() if b != a}
        linked = graph is not None and any(len(graph.links(a, b)) for b in shared)
        n_pairs = int((own & np.any([present[b] for b in shared], axis=0)).sum()) if shared else 0
        begins = linked or max(shared.values(), default=0) >= FEWEST_PAIRS
        if begins and n_pairs < ENOUGH_PAIRS and 3 * n_pairs < int(own.sum()):
            return True
    return False


def _measured(mosaic: Mosaic) -> list[str]:
    """Modalities with enough cells for a linkage."""
    return [name for name, modality in mosaic.modalities.items() if modality.present.sum() > 2 * FEWEST_PAIRS]


def _usable(mosaic: Mosaic) -> dict[str, int]:
    """Number of features that vary within a batch, of the modalities that have two or more and enough cells."""
    return {name: n for name in _measured(mosaic) if (n := _n_varying(mosaic, name)) > 1}


def _strongest_tie(
    mosaic: Mosaic, graph: GuidanceGraph | None, usable: list[str], placed: Any
) -> tuple[str, str, Any] | None:
    """A modality without scores, one to link it to, and what the linkage starts from; None if nothing is left."""
    ties = {}
    for a in usable:
        for b in usable:
            if a in placed or a == b or (placed and b not in placed):
                continue
            n_pairs = int((mosaic.modalities[a].present & mosaic.modalities[b].present).sum())
            n_links = 0 if graph is None else len(graph.links(a, b))
            if n_pairs >= FEWEST_PAIRS or n_links:
                ties[a, b] = (n_pairs if n_pairs >= FEWEST_PAIRS else 0, n_links)
    if not ties:
        return None
    a, b = max(ties, key=lambda pair: ties[pair])
    return a, b, "pairs" if ties[a, b][0] else None


def _learnt(mosaic: Mosaic, rng: np.random.Generator) -> np.ndarray:
    """Cells from which to learn: all if they are few; otherwise half of them those with the most modalities."""
    if mosaic.n_cells <= N_LEARNT:
        return np.arange(mosaic.n_cells)
    order = rng.permutation(mosaic.n_cells)
    several = np.sum([m.present[order] for m in mosaic.modalities.values()], axis=0) > 1
    most = order[several][: N_LEARNT // 2]
    others = order[~np.isin(order, most)][: N_LEARNT - len(most)]
    return np.sort(np.concatenate([most, others]))


def _taken(mosaic: Mosaic, cells: np.ndarray) -> Mosaic:
    """The measurements of some cells."""
    if len(cells) == mosaic.n_cells:
        return mosaic
    modalities = {name: m.take(cells) for name, m in mosaic.modalities.items()}
    return replace(mosaic, obs_names=mosaic.obs_names[cells], modalities=modalities, groups=None, cohorts=None)
