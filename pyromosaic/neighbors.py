"""Nearest neighbours of cells, and majority votes of their labels."""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.neighbors import NearestNeighbors


def nearest(
    reference: NDArray[Any], n_neighbors: int, query: NDArray[Any] | None = None, *, algorithm: str = "auto"
) -> tuple[NDArray[Any], NDArray[np.intp]]:
    """The nearest cells by Euclidean distance, nearest first.

    Parameters
    ----------
    reference
        Cells among which to search, cells × dimensions.
    n_neighbors
        Number of neighbours of each cell; fewer if there are not enough cells.
    query
        Cells whose neighbours to find; None for the reference cells, each without itself.
    algorithm
        See `sklearn.neighbors.NearestNeighbors`.

    Returns
    -------
    tuple of numpy.ndarray
        Distances and rows of `reference`, each of shape (query cells, neighbours).

    Examples
    --------
    >>> distance, rows = nearest(np.array([[0.0], [1.0], [5.0]]), 1)
    >>> distance.ravel().tolist(), rows.ravel().tolist()
    ([1.0, 1.0, 4.0], [1, 0, 1])
    """
    n = min(n_neighbors, len(reference) - (query is None))
    distance, rows = NearestNeighbors(n_neighbors=n, algorithm=algorithm).fit(reference).kneighbors(query)
    return distance, rows


def vote(labels: NDArray[np.integer]) -> tuple[NDArray[np.integer], NDArray[np.float64]]:
    """The most frequent label among the neighbours; if labels tie, the one of the nearest neighbour among them.

    Parameters
    ----------
    labels
        Label numbers of each cell's neighbours, nearest first, shape (cells, neighbours).

    Returns
    -------
    tuple of numpy.ndarray
        Each cell's label, and its share of the votes.

    Examples
    --------
    >>> winners, shares = vote(np.array([[0, 1, 1, 1, 0, 0], [2, 0, 2, 1, 1, 1]]))
    >>> winners.tolist(), shares.tolist()
    ([0, 1], [0.5, 0.5])
    """
    rows = np.arange(len(labels))
    votes = np.zeros((len(labels), 1 + int(np.max(labels, initial=0))), dtype=np.intp)
    np.add.at(votes, (rows[:, None], labels), 1)
    most = votes.max(axis=1)
    first = np.argmax(votes[rows[:, None], labels] == most[:, None], axis=1)
    return labels[rows, first], most / labels.shape[1]
