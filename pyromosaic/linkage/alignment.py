"""Linkage of two modalities that share no cells: match, correlate, smooth, match again."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import ClassVar, Literal

import numpy as np
import pandas as pd

from pyromosaic.accepted import Count, Rate, Seed, Share, Weight, checked
from pyromosaic.data import Mosaic, Schema
from pyromosaic.linkage.canonical import (
    FEW_PAIRS,
    Canonical,
    count_components,
    crossfit_correlations,
    shuffled_covariances,
)
from pyromosaic.linkage.certainty import Alternative, ByShape, match_by_shape
from pyromosaic.linkage.keeping import Keeping
from pyromosaic.linkage.matching import (
    Correspondence,
    assignment,
    mutual_nearest,
    transport,
    unit_rows,
)
from pyromosaic.linkage.preprocess import Standardiser
from pyromosaic.linkage.rounds import JUDGE, Match, Pair, Side, warn_of_chance
from pyromosaic.links import GuidanceGraph, Links, links_of

#: Ways of matching cells by similarity.
MATCHES: Mapping[str, Match] = {"transport": transport, "mutual": mutual_nearest, "assignment": assignment}

ENOUGH_PAIRS = 50  # left-out pairs that suffice to choose the number of rounds


@dataclass
class Linkage(Keeping):
    """Two modalities in one latent space.

    Parameters
    ----------
    scores
        Cells × components for each modality: canonical variables weighted by their correlations, each cell scaled to
        length one, so that Euclidean distance and cosine rank cells equally.
    correlations
        Canonical correlation of each component. It is scaled by the variance of all cells. Therefore it may exceed 1 if
        matched cells vary more. Cells matched by their scores have correlated scores, so that it is no evidence of a
        correct matching.
    crossfit
        The same in cells that were left out of the estimation of the components (but not of the matching); NaN if
        nothing but known pairs was used.
    correspondence
        The soft matching of the cells.
    agreement
        Mean correlation over matched cells of the links left out of a trial, after each round and for each start; empty
        without a trial. If the start is ``"pairs"``, 1 minus twice the share of cells that are nearer to a cell than
        its partner, in pairs left out. It was used to choose the start and the number of rounds. It is near 0 if
        nothing is shared. Harder matchings have larger values without being better.
    links
        The linked features that were used, if any.
    by_shape
        How sure the matching is, and the alternatives, if cells were matched by the shape of the data.
    schema
        Features and columns of both modalities, by which new cells are registered for `transform`.

    Examples
    --------
    >>> from pyromosaic import Mosaic, linkage, simulate
    >>> mdata, truth = simulate(300, {"rna": 60, "adt": 20}, patterns=["rna", "adt"], links={"adt": 1.0})
    >>> mosaic, links = Mosaic.from_mudata(mdata, batch_key="batch"), truth.links[["gene", "feature"]]
    >>> link = linkage.cca(mosaic, ("rna", "adt"), links, n_pcs=10)
    >>> link.scores["adt"].shape[1] == len(link.correlations)
    True
    >>> link.feature_links().columns.tolist()
    ['rna', 'adt', 'correlation', 'mutual']
    """

    parts: ClassVar[tuple[type, ...]] = (Alternative, ByShape, Canonical, Correspondence, Links, Standardiser)

    scores: dict[str, pd.DataFrame]
    correlations: np.ndarray
    crossfit: np.ndarray
    correspondence: Correspondence
    agreement: dict[str, list[float]]
    links: Links | None
    by_shape: ByShape | None
    schema: Schema = field(repr=False)
    _null: np.ndarray = field(repr=False)
    _canonical: Canonical = field(repr=False)
    _reduced: "dict[str, tuple[Standardiser, np.ndarray, np.ndarray]]" = field(repr=False)

    @property
    def confidence(self) -> dict[str, pd.Series]:
        """Confidence in the match of each cell by shape, from 0 to 1, per modality; empty if links matched them."""
        return {} if self.by_shape is None else self.by_shape.confidence

    @property
    def alternatives(self) -> list[Alternative]:
        """Other matchings by shape, the best first; empty after matching by links."""
        return [] if self.by_shape is None else self.by_shape.alternatives

    @checked
    def transform(self, mosaic: Mosaic) -> dict[str, pd.DataFrame]:
        """Scores of new cells.

        Parameters
        ----------
        mosaic
            Cells with one or both of the modalities, with the same features, e.g. from ``Mosaic.from_mudata(mdata,
            schema=link.schema)``. A batch that was not seen before is centred separately.

        Returns
        -------
        dict of str to pandas.DataFrame
            Scores for each modality that is in the mosaic.

        Raises
        ------
        ValueError
            If neither modality is in the mosaic, or its features differ.
        """
        canonical = self._canonical.keep(len(self.correlations))
        names = list(self._reduced)
        return {
            name: scores_table(canonical.scores(values, names.index(name)), mosaic.obs_names[cells])
            for name, (cells, values) in self.components(mosaic).items()
        }

    def check(self) -> None:
        """Raise an error if the numbers do not belong together, as in a damaged file."""
        n = len(self.correlations)
        for (standardiser, loadings, structure), coefficients in zip(
            self._reduced.values(), self._canonical.coefficients, strict=True
        ):
            weights = (loadings / standardiser.scale[:, None] + structure) @ coefficients[:, :n]
            if weights.shape != (len(standardiser.features), n) or len(standardiser.mean) != len(standardiser.batches):
                raise ValueError(f"the numbers of {standardiser.name!r} are those of other features")

    def components(self, mosaic: Mosaic) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Positions of the cells that have a modality, and their principal components; raises as `transform` does."""
        found = {}
        for name, (standardiser, loadings, _) in self._reduced.items():
            if name in mosaic.modalities and mosaic.modalities[name].present.any():
                cells = np.flatnonzero(mosaic.modalities[name].present)
                found[name] = cells, standardiser.apply(mosaic.modalities[name], cells) @ loadings
        if not found:
            raise ValueError(
                f"the mosaic has the modalities {', '.join(map(repr, mosaic.modalities))}, but the linkage is between "
                f"{' and '.join(map(repr, self._reduced))}"
            )
        return found

    @checked
    def feature_links(self, level: Share = 0.05) -> pd.DataFrame:
        r"""Features whose correlation across modalities is stronger than by chance.

        The correlation of features j and k is that of the canonical model, :math:`l_j^T C_{xx} A \,\mathrm{diag}(\rho)
        B^T C_{yy} m_k`, with l and m the loadings of the features on the principal components. A pair is returned if
        the absolute value exceeds the largest over all pairs in all but a share `level` of the shuffled
        correspondences.

        Parameters
        ----------
        level
            Share of shuffled correspondences, from 0 to 1.

        Returns
        -------
        pandas.DataFrame
            One row per pair, the strongest first: columns named after the modalities, ``correlation``, and ``mutual``:
            whether each feature is the strongest partner of the other.
        """
        n = len(self.correlations)
        first, second = (
            structure @ coefficients
            for (*_, structure), coefficients in zip(self._reduced.values(), self._canonical.coefficients, strict=True)
        )
        correlation = (first[:, :n] * self.correlations) @ second[:, :n].T
        largest = []
        for rotated in self._canonical.rotated(self._null):
            u, s, vt = np.linalg.svd(rotated)
            largest.append(np.abs((first @ u[:, :n] * s[:n]) @ (second @ vt.T[:, :n]).T).max())
        size, threshold = np.abs(correlation), np.quantile(largest, 1 - level)
        rows, columns = np.nonzero(size > threshold)
        best_column, best_row = size.argmax(axis=1), size.argmax(axis=0)
        (name_x, (x, *_)), (name_y, (y, *_)) = self._reduced.items()
        table = pd.DataFrame(
            {
                name_x: np.array(x.features)[rows],
                name_y: np.array(y.features)[columns],
                "correlation": correlation[rows, columns],
                "mutual": (best_column[rows] == columns) & (best_row[columns] == rows),
            }
        )
        return table.sort_values("correlation", key=np.abs, ascending=False, ignore_index=True)


@checked
def link_recovery(found: pd.DataFrame, held_out: Links) -> tuple[float, float]:
    """Precision and recall of inferred feature links, given known ones.

    Parameters
    ----------
    found
        Pairs of features, as returned by `Linkage.feature_links` (or some of its rows).
    held_out
        Known links that were not passed to the linkage.

    Returns
    -------
    precision : float
        Share of known links among the found pairs whose features both have a known link; NaN if there is no such pair.
    recall : float
        Share of the known links that were found.
    """
    names = list(held_out.modalities)
    judged = found[np.all([found[name].isin(held_out.pairs[name]) for name in names], axis=0)]
    hits = len(judged[names].merge(held_out.pairs[names]))
    return hits / len(judged) if len(judged) else float("nan"), hits / len(held_out)


@checked
def cca(
    mosaic: Mosaic,
    modalities: tuple[str, str],
    links: pd.DataFrame | Links | GuidanceGraph | None = None,
    *,
    match: Literal["transport", "mutual", "assignment"] | Match = "transport",
    start: Literal["links", "diagonal", "geometry", "pairs"] | None = None,
    rounds: Count = 5,
    held_out: Rate = 0.25,
    link_share: Share = 0.5,
    n_components: Count | None = None,
    n_pcs: Count = 30,
    n_neighbors: Count = 15,
    ridge: Weight = 0.2,
    n_metacells: Count = 4096,
    correspondence: Correspondence | None = None,
    pairs: pd.DataFrame | None = None,
    population: Mapping[str, Sequence[str]] | None = None,
    seed: Seed = 0,
) -> Linkage:
    """Link two modalities by canonical correlation analysis with a soft correspondence, without pairs or labels.

    Cells are matched by their linked features, smoothed over nearest neighbours within each modality. Canonical
    correlation analysis of all features over the soft matching gives scores. The cells are matched again by these
    scores and the linked features. Trial runs without some of the links choose the start and the number of rounds:
    those for which the two features of the left-out links correlate best over matched cells. Unless the start is
    ``"pairs"``, the cells of the two modalities are separate rows throughout, even if a cell has both; only the batch
    is read from `obs`.

    Parameters
    ----------
    mosaic
        The data.
    modalities
        Names of the two modalities.
    links
        Linked features: a table (see `links_from_table`), `Links`, or a `GuidanceGraph`. Without links, cells are
        matched by the shape of the data, see the page "Without a map" of the user guide.
    match
        ``"transport"`` (entropic optimal transport on the cosine, a soft matching), ``"mutual"`` (mutual nearest
        neighbours), ``"assignment"`` (one to one), or a function that maps similarities and weights to a transport
        plan, such as ``functools.partial(linkage.transport, epsilon=0.05)``, which is softer.
    start
        Basis of the first matching: ``"links"`` (the linked features), ``"diagonal"`` (singular vectors of their
        product), ``"geometry"`` (the shape of the data: fused Gromov–Wasserstein transport, which needs POT) or
        ``"pairs"`` (the cells that have both modalities, in the first round alone; later rounds match the other cells
        too, and a trial without a quarter of the pairs chooses the number of rounds). By default, the better of the
        first two in a trial (``"links"`` without a trial); geometry without links, with `pairs` or a `population`.
    rounds
        Maximum number of rounds.
    held_out
        Share of the links that trial runs leave out. If it is 0, or by geometry, there is no trial and all rounds are
        run.
    link_share
        Weight of the linked features in the similarity after the first round.
    n_components
        Number of components; by default the number with correlations beyond chance, at most 15, see `count_components`.
    n_pcs
        Number of principal components of each modality.
    n_neighbors
        Number of neighbours in smoothing.
    ridge
        Added to the diagonal of covariances, as a share of their mean.
    n_metacells
        Maximum number of cells to match one by one. If there are more, metacells of equal size are matched instead;
        they come from repeated halving along the longest direction. Covariances within a modality and scores still use
        all cells. This limits all cost that grows with the square of the number of cells: 4,096 metacells make matrices
        of 64 MB.
    correspondence
        A correspondence to use instead of matching. If it comes from pairs, the result is an upper bound; if it comes
        from labels, it is supervised.
    pairs
        Known pairs of cells, a handful of which help geometry: a table with a column of names for each modality.
    population
        A known population: for each modality, the names of its cells.
    seed
        Seed of principal components, trial and shuffles.

    Returns
    -------
    Linkage
        Scores of the cells of both modalities, and how they were found.

    Warns
    -----
    UserWarning
        If the features of left-out links correlate no better over matched cells than with other partners (a permutation
        test at level 0.05; it needs at least 4 links), or there are too few links for a trial. By geometry, if the
        matching is not stable.

    Raises
    ------
    ValueError
        If a modality does not exist, an argument is out of range, both modalities hold the same measurements, there are
        fewer cells than components, or every linked feature is constant.

    References
    ----------
    Matching and correlating in turn: Chen et al., "Integration of spatial and single-cell data across modalities with
    weakly linked features", Nature Biotechnology 2024.

    Examples
    --------
    >>> from pyromosaic import Mosaic, linkage, pbmc_mosaic, protein_gene_links
    >>> mosaic = Mosaic.from_mudata(pbmc_mosaic(), batch_key="batch")
    >>> link = linkage.cca(mosaic, ("rna", "adt"), protein_gene_links())
    >>> link.scores["rna"].shape, link.scores["adt"].shape
    ((1200, 15), (1200, 15))
    """
    _check(mosaic, modalities)
    most = 15 if n_components is None else n_components
    first, second = (Side.fit(mosaic, name, n_pcs, n_neighbors, n_metacells, seed) for name in modalities)
    _refuse_same(first, second)
    smallest = min(first.loadings.shape[1], second.loadings.shape[1])
    if n_components is not None and not 1 <= n_components <= smallest:
        raise ValueError(
            f"n_components must be between 1 and {smallest}, the number of principal components; found {n_components}"
        )
    if links is not None:
        links = _varying(links_of(links, mosaic, modalities), mosaic, first, second)
    pair = Pair(
        (first, second),
        _linked(links, mosaic, first, second),
        MATCHES[match] if isinstance(match, str) else match,
        link_share,
        ridge,
        most,
        _known(first, second) if start == "pairs" else (np.empty(0, dtype=np.intp), np.empty(0, dtype=np.intp)),
    )
    agreement: dict[str, list[float]] = {}
    found: ByShape | None = None
    if correspondence is not None:
        pi, canonical = correspondence, pair.correlated(correspondence)
    elif start == "geometry" or pairs is not None or population is not None or (links is None and start != "pairs"):
        found = match_by_shape(pair, mosaic.obs_names, pairs, population, seed)
        pi, canonical = next(islice(pair.rounds(np.ones(0, dtype=bool), "geometry"), rounds - 1, None))
    else:
        chosen = np.ones(pair.linked[0].shape[1], dtype=bool)
        best: str = start or "links"
        order = np.random.default_rng(seed).permutation(len(chosen))
        left_out = np.flatnonzero(order < min(round(held_out * len(chosen)), len(chosen) - 1))
        if start == "pairs":
            agreement = _paired_agreement(pair, rounds, held_out, seed)
            rounds = int(np.argmax(agreement["pairs"])) + 1 if agreement else rounds
        elif links is not None and len(left_out):
            starts = ("links", "diagonal") if start is None else (start,)
            trials = {name: pair.trial(name, rounds, left_out) for name in starts}
            agreement = {name: [value for value, _ in trial] for name, trial in trials.items()}
            best = max(agreement, key=lambda name: max(agreement[name]))
            rounds = int(np.argmax(agreement[best])) + 1
            warn_of_chance(pair, links, best, rounds, left_out, trials[best][rounds - 1][1], seed)
        elif links is not None and held_out > 0:
            warnings.warn(
                f"{len(links)} link{'s' * (len(links) > 1)} cannot show whether the right cells are matched; {JUDGE}",
                stacklevel=2,
            )
        pi, canonical = next(islice(pair.rounds(chosen, best), rounds - 1, None))
    x, y = first.components, second.components
    null = shuffled_covariances(x, y, pi, seed=seed)
    kept = canonical.keep(n_components or min(most, max(1, count_components(canonical, null))))
    if start == "pairs" and pi is pair.pairs:
        crossfit = np.full(len(kept.correlations), np.nan)  # halves may have no pair
    else:
        crossfit = crossfit_correlations(x, y, pi, ridge, seed)
    return Linkage(
        {
            s.name: scores_table(kept.scores(s.components, k), mosaic.obs_names[s.cells])
            for k, s in enumerate((first, second))
        },
        kept.correlations,
        crossfit[: len(kept.correlations)],
        pi,
        agreement,
        links,
        found,
        Schema({name: mosaic.schema[name] for name in modalities}),
        null,
        canonical,
        {
            s.name: (s.standardiser, s.loadings, s.loadings @ np.cov(s.components, rowvar=False, bias=True))
            for s in (first, second)
        },
    )


def scores_table(scores: np.ndarray, cells: pd.Index) -> pd.DataFrame:
    """Scores as in a linkage: each cell has length one."""
    return pd.DataFrame(unit_rows(scores), cells, [f"cc{i + 1}" for i in range(scores.shape[1])])


def _check(mosaic: Mosaic, modalities: tuple[str, str]) -> None:
    for name in modalities:
        if name not in mosaic.modalities:
            raise ValueError(f"there is no modality {name!r}; the mosaic has {', '.join(map(repr, mosaic.modalities))}")
    if modalities[0] == modalities[1]:
        raise ValueError(f"linkage needs two different modalities; found {modalities[0]!r} twice")


def _known(first: Side, second: Side) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers of the cells that have both modalities."""
    _, rows, columns = np.intersect1d(first.cells, second.cells, assume_unique=True, return_indices=True)
    if not len(rows):
        raise ValueError(
            f"start='pairs' needs cells that have both {first.name!r} and {second.name!r}; found none. Start from links"
        )
    return rows, columns


def _paired_agreement(pair: Pair, rounds: int, held_out: float, seed: int) -> dict[str, list[float]]:
    """Agreement of left-out pairs after each round; nothing if there are too few pairs for a trial.

    Trials are repeated with other pairs, until enough pairs or all of them were left out once.
    """
    order = np.random.default_rng(seed).permutation(len(pair.known[0]))
    size = round(held_out * len(order))
    if len(order) < FEW_PAIRS or not size:
        return {}
    parts = [order[i : i + size] for i in range(0, min(len(order), max(ENOUGH_PAIRS, size)), size)]
    trials = [pair.paired_trial(rounds, part) for part in parts]
    return {"pairs": np.average(trials, axis=0, weights=[len(part) for part in parts]).tolist()}


def _refuse_same(first: Side, second: Side) -> None:
    """Refuse the same matrix under two names, in any order of rows and columns."""
    x, y = np.sort(first.data.scale), np.sort(second.data.scale)
    if len(first.cells) == len(second.cells) and x.shape == y.shape and np.allclose(x, y, rtol=1e-3):
        raise ValueError(
            f"modalities {first.name!r} and {second.name!r} hold the same measurements; choose two different ones"
        )


def _varying(links: Links, mosaic: Mosaic, first: Side, second: Side) -> Links:
    """The links for which both features vary."""
    columns = links.positions(mosaic)
    varies = np.isfinite(first.data.scale[columns[0]]) & np.isfinite(second.data.scale[columns[1]])
    if not varies.any():
        raise ValueError(f"no linked feature is left: each of the {len(links)} links has a feature that never varies")
    if not varies.all():
        pair = links.pairs[list(links.modalities)].iloc[int(np.argmin(varies))]
        warnings.warn(
            f"{int((~varies).sum())} of {len(links)} links are left out, because one of their features never varies "
            f"within a batch (the first: {pair.iloc[0]!r} and {pair.iloc[1]!r})",
            stacklevel=3,
        )
    return links.take(varies)


def _linked(links: Links | None, mosaic: Mosaic, first: Side, second: Side) -> tuple[np.ndarray, np.ndarray]:
    """Linked features of the metacells, weighted and with positive sign; no columns if there are no links."""
    if links is None:
        return np.zeros((len(first.means), 0)), np.zeros((len(second.means), 0))
    columns = links.positions(mosaic)
    factor = np.sqrt(links.pairs["weight"].to_numpy(dtype=np.float64))
    x, y = (s.data.averages(s.groups, len(s.means), c) * factor for s, c in zip((first, second), columns, strict=True))
    return x, y * links.pairs["sign"].to_numpy(dtype=np.float64)
