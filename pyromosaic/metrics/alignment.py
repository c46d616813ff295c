"""Alignment: whether the latents of the modalities agree, for the same cells or for cells of the same type."""

import warnings
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy.spatial.distance import cdist

from pyromosaic.accepted import Count, checked
from pyromosaic.metrics._checks import aligned, as_copies, as_labels, as_latent, as_latent_pair, check_number
from pyromosaic.metrics.neighbors import nearest_neighbors
from pyromosaic.neighbors import vote


@checked
def foscttm(
    x: ArrayLike, y: ArrayLike, *, per_cell: bool = False, block_size: Count = 512
) -> float | NDArray[np.float64]:
    r"""Fraction of samples closer than the true match, from both sides.

    For cell :math:`i` with latents :math:`x_i` and :math:`y_i` of its two modalities,

    .. math::

        f_i = \frac{1}{2 (n - 1)} \sum_{j \ne i} \Big(
            \big[\lVert x_i - y_j \rVert < \lVert x_i - y_i \rVert\big] +
            \big[\lVert x_j - y_i \rVert < \lVert x_i - y_i \rVert\big] \Big),

    where an equal distance counts one half, so that a latent space that has collapsed to a point scores as chance and
    not as perfect. The divisor is the number of *other* cells (some authors divide by n). Therefore 0 is perfect, 0.5
    is exactly chance and 1 is the worst.

    Parameters
    ----------
    x, y
        Latents of the two modalities, cells by dimensions; row i of both is the same cell.
    per_cell
        Return :math:`f_i` of each cell instead of their mean.
    block_size
        Number of rows whose distances are in memory at a time (times the number of cells). It does not change the
        result.

    Returns
    -------
    float or numpy.ndarray
        The mean over cells, or one value per cell.

    Raises
    ------
    ValueError
        If the shapes differ, an entry is not finite, there are fewer than two cells, or `x` and `y` are the same
        matrix, which measures no alignment.

    Notes
    -----
    Distances are Euclidean over all dimensions. The measure is from Liu et al., "Jointly embedding multiple single-cell
    omics measurements", WABI 2019.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.array([[0.0], [1.0], [5.0]])
    >>> foscttm(x, x + 0.1)
    0.0
    >>> foscttm(x, x[::-1])
    0.6666666666666666

    """
    latent_x, latent_y = as_copies(x, y)
    match = np.arange(len(latent_x))
    closer = _closer_than_match(latent_x, latent_y, match, block_size)
    closer += _closer_than_match(latent_y, latent_x, match, block_size)
    fraction = closer / (2 * (len(match) - 1))
    return fraction if per_cell else float(fraction.mean())


@checked
def neighbor_rank_distance(
    x: ArrayLike,
    y: ArrayLike,
    *,
    others: ArrayLike | None = None,
    normalized: bool = True,
    block_size: Count = 512,
) -> float:
    r"""Mean rank distance: how many neighbours lie between the two copies of a cell.

    A cell measured with two modalities and split into two unpaired copies has two latents in one space. Its rank
    distance is the smallest K for which each copy is among the K nearest neighbours of the other. Neighbours come from
    *all* latents of that space: both copies of every cell, and the cells that were never split (`others`).

    Parameters
    ----------
    x, y
        Latents of the two copies, cells by dimensions; row i of both is the same cell.
    others
        Latents of all other cells in the space, such as those that stayed paired. They count as neighbours but have no
        rank distance.
    normalized
        Return :math:`(K - 1) / (K_{max} - 1)`, where :math:`K_{max}` is the number of possible neighbours, `2 n - 1`
        plus the number of others: 0 if the copies are each other's nearest neighbour, 1 if they are each other's
        farthest. If False, return K.
    block_size
        Number of rows whose distances are in memory at a time. It does not change the result.

    Returns
    -------
    float
        The mean over cells.

    Raises
    ------
    ValueError
        If the shapes differ, an entry is not finite, there are fewer than two cells, or `x` and `y` are the same
        matrix.

    Notes
    -----
    From the MultiVI paper (Ashuach et al., Nature Methods 2023), main text and Methods, "Neighbor rank distance
    calculation": the larger of the two one-sided ranks. Latents at the same distance as the other copy count one half.
    Copies paired at random score above 1/2, because the larger rank counts: up to 2/3, the mean of the larger of two
    independent uniform numbers.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.array([[0.0], [1.0], [5.0]])
    >>> neighbor_rank_distance(x, x + 0.1)
    0.0
    >>> neighbor_rank_distance(x, x + 0.1, normalized=False)
    1.0

    """
    latent_x, latent_y = as_copies(x, y)
    latents = [latent_x, latent_y]
    if others is not None:
        latents.append(as_latent_pair(latent_x, others, ("x", "others"))[1])
    space = np.concatenate(latents)
    rows_x = np.arange(len(latent_x))
    rows_y = rows_x + len(latent_x)
    between = np.maximum(
        _closer_than_match(latent_x, space, rows_y, block_size, itself=rows_x),
        _closer_than_match(latent_y, space, rows_x, block_size, itself=rows_y),
    ).mean()
    return float(between / (len(space) - 2) if normalized else between + 1)


def _closer_than_match(
    latent: NDArray[np.float64],
    candidates: NDArray[np.float64],
    match: NDArray[np.intp],
    block_size: int,
    itself: NDArray[np.intp] | None = None,
) -> NDArray[np.float64]:
    """Count, for each latent, the other candidates that are closer than its match; ties count one half."""
    check_number(block_size, "block_size", np.iinfo(np.int64).max, "rows at a time")
    closer = np.empty(len(latent))
    for start in range(0, len(latent), block_size):
        rows = slice(start, start + block_size)
        # Coordinate differences, not the expanded square, so that equal pairs have exactly equal distances.
        distance = cdist(latent[rows], candidates, "sqeuclidean")
        if itself is not None:
            np.put_along_axis(distance, itself[rows, None], np.inf, axis=1)
        true = np.take_along_axis(distance, match[rows, None], axis=1)
        ties = (distance == true).sum(axis=1) - 1
        closer[rows] = (distance < true).sum(axis=1) + ties / 2
    return closer


class LabelTransfer(NamedTuple):
    """Label transfer accuracy in both directions.

    Examples
    --------
    >>> found = label_transfer_both_ways([[0.0], [1.0]], ["B", "T"], [[0.1], [0.2]], ["B", "T"])
    >>> found.x_to_y, found.y_to_x
    (0.5, 1.0)
    """

    x_to_y: float
    """Share of `y` cells whose label is predicted correctly from `x` cells."""
    y_to_x: float
    """Share of `x` cells whose label is predicted correctly from `y` cells."""


@checked
def label_transfer_accuracy(
    reference: ArrayLike,
    reference_labels: Any,
    query: ArrayLike,
    query_labels: Any,
    n_neighbors: Count = 1,
) -> float:
    """Share of query cells whose label wins the vote of their nearest reference neighbours.

    Parameters
    ----------
    reference, query
        Latents of the labelled cells and of the cells to label, cells by dimensions, in one latent space.
    reference_labels, query_labels
        One label per cell, none missing. A query label that no reference cell has is always counted as wrong.
    n_neighbors
        Number of nearest reference cells that vote, by Euclidean distance. The default of 1 is how the published
        accuracies of scMODAL and of linkage by canonical correlation were measured; the function in the scMODAL package
        uses 20 (by cosine). If labels tie, the one of the nearest neighbour among them wins.

    Returns
    -------
    float
        Accuracy from 0 to 1. Compare it with the share of the most frequent label, not with 0.

    Raises
    ------
    ValueError
        If the latents have different dimensions, are the same matrix or are not finite, a cell has no label, or there
        are fewer reference cells than neighbours.

    Examples
    --------
    >>> import numpy as np
    >>> reference, query = np.array([[0.0], [1.0], [5.0], [6.0]]), np.array([[0.2], [5.2], [2.0]])
    >>> label_transfer_accuracy(reference, ["B", "B", "NK", "NK"], query, ["B", "NK", "B"])
    1.0

    """
    reference, reference_labels = aligned(
        ("reference", "reference_labels"), reference, reference_labels, axes=("rows",)
    )
    query, query_labels = aligned(("query", "query_labels"), query, query_labels, axes=("rows",))
    reference, query = as_latent_pair(reference, query, ("reference", "query"))
    known = as_labels(reference_labels, len(reference), "reference_labels")
    wanted = as_labels(query_labels, len(query), "query_labels")
    codes, labels = pd.factorize(known)
    if not np.isin(wanted.astype(str), labels.astype(str)).any():
        warnings.warn(
            f"no label of `query_labels` is in `reference_labels` (the first are {wanted[0]!r} and {known[0]!r}), so "
            "the accuracy is 0; spell labels in the same way in both",
            stacklevel=3,
        )
    winners, _ = vote(codes[nearest_neighbors(reference, n_neighbors, query)])
    return float(np.mean(labels[winners] == wanted))


@checked
def label_transfer_both_ways(
    x: ArrayLike, x_labels: Any, y: ArrayLike, y_labels: Any, n_neighbors: Count = 1
) -> LabelTransfer:
    """Label transfer accuracy from `x` to `y` and from `y` to `x`; see :func:`label_transfer_accuracy`.

    Parameters
    ----------
    x, y
        Latents of the cells of two modalities, cells by dimensions; the cells may differ.
    x_labels, y_labels
        One label per cell.
    n_neighbors
        Number of cells of the other modality that vote.

    Returns
    -------
    LabelTransfer
        Accuracies ``x_to_y`` and ``y_to_x``, each from 0 to 1.

    Raises
    ------
    ValueError
        As :func:`label_transfer_accuracy`.

    Examples
    --------
    >>> label_transfer_both_ways([[0.0], [1.0]], ["B", "T"], [[0.1], [0.9]], ["B", "T"])
    LabelTransfer(x_to_y=1.0, y_to_x=1.0)
    """
    as_latent(x, "x"), as_latent(y, "y")
    return LabelTransfer(
        x_to_y=label_transfer_accuracy(x, x_labels, y, y_labels, n_neighbors),
        y_to_x=label_transfer_accuracy(y, y_labels, x, x_labels, n_neighbors),
    )
