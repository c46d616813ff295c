"""Exact nearest neighbours, for all metrics that use a cell's neighbourhood."""

import numpy as np
from numpy.typing import NDArray

from pyromosaic.metrics._checks import check_number
from pyromosaic.neighbors import nearest


def nearest_neighbors(
    reference: NDArray[np.float64], n_neighbors: int, query: NDArray[np.float64] | None = None
) -> NDArray[np.intp]:
    """Return the rows of `reference` nearest to each cell by Euclidean distance, nearest first.

    Parameters
    ----------
    reference
        Latents among which to search, cells by dimensions.
    n_neighbors
        Number of neighbours of each cell.
    query
        Latents of the cells whose neighbours to find; by default the reference cells, each without itself.

    Returns
    -------
    numpy.ndarray
        Row numbers, query cells by `n_neighbors`. Cells at exactly the same distance come in the order of the search
        tree, which depends only on the input.

    Raises
    ------
    ValueError
        If there are fewer cells than neighbours.

    Examples
    --------
    >>> nearest_neighbors(np.array([[0.0], [1.0], [5.0]]), 1).ravel()
    array([1, 0, 1])
    """
    n_candidates = len(reference) - (query is None)
    limit = "the number of cells" if query is not None else "the number of other cells"
    check_number(n_neighbors, "n_neighbors", n_candidates, limit)
    # A tree uses coordinate differences; scikit-learn's brute-force search expands the square, which loses digits far
    # from the origin and makes ties depend on rounding and on the number of threads.
    return nearest(reference, n_neighbors, query, algorithm="kd_tree")[1]
