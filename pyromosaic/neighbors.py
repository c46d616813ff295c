"""Nearest neighbours of cells, and what they vote for."""

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
        Where to look, cells × dimensions.
    n_neighbors
        Neighbours of each cell; fewer if there are not as many.
    query
        The cells that look; None for the reference cells, each without itself.
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
    """The label that most neighbours have; of labels with equal votes that of the nearest cell among them.

    Parameters
    ----------
    labels
        Numbers of the labels of each cell's neighbours, nearest first, shape (cells, neighbours).

    Returns
    -------
    tuple of numpy.ndarray
        Each cell's label, and the share of the votes that it got.

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
