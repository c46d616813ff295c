"""Mixing: whether a cell's neighbours come from all modalities (mixed) and have the same label (pure)."""

from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from pyromosaic.accepted import Count, checked
from pyromosaic.metrics._checks import aligned, as_labels, as_latent
from pyromosaic.metrics.neighbors import nearest_neighbors


@checked
def label_purity(latent: ArrayLike, labels: Any, n_neighbors: Count = 15) -> float:
    """Mean share of a cell's nearest neighbours that have the same label as the cell.

    Parameters
    ----------
    latent
        Latents, cells by dimensions.
    labels
        One label per cell, such as its type; none missing.
    n_neighbors
        Number of neighbours of each cell by Euclidean distance, without the cell itself.

    Returns
    -------
    float
        Purity from 0 to 1; labels unrelated to the latents give about the sum of their squared shares.

    Raises
    ------
    ValueError
        If the latents are not finite, a cell has no label, or there are too few cells for `n_neighbors`.

    Examples
    --------
    >>> label_purity([[0.0], [1.0], [2.0], [7.0], [8.0]], ["B", "B", "NK", "NK", "NK"], n_neighbors=1)
    0.8

    """
    latent, labels = aligned(("latent", "labels"), latent, labels, axes=("rows",))
    latent = as_latent(latent, "latent")
    return _share_of_own(latent, as_labels(labels, len(latent), "labels"), n_neighbors)


@checked
def modality_enrichment(latent: ArrayLike, groups: Any, n_neighbors: Count = 15) -> float:
    r"""How much more often than by chance a cell's neighbours come from the same modality.

    .. math::

        \frac{1}{n} \sum_i s_i \Big/ \sum_l p_l^2,

    where :math:`s_i` is the share of cell i's neighbours in its group and :math:`p_l` the share of group l among all
    cells.

    Parameters
    ----------
    latent
        Latents of all cells of all groups, cells by dimensions.
    groups
        One group per cell: its modality, its pattern of present modalities, its batch or its condition.
    n_neighbors
        Number of neighbours of each cell by Euclidean distance, without the cell itself. The paper gives no number; 15
        is the usual neighbourhood size of single-cell graphs.

    Returns
    -------
    float
        1 if mixed; :math:`1 / \sum_l p_l^2` if no cell has a neighbour of another group (2 for two equal groups).

    Raises
    ------
    ValueError
        If the latents are not finite, a cell has no group, there is only one group, or there are too few cells for
        `n_neighbors`.

    Notes
    -----
    From the MultiVI paper (Ashuach et al., Nature Methods 2023), Methods, "LISI score calculation". Mixed groups
    of a few cells score slightly below 1 because a cell is not its own neighbour.

    Examples
    --------
    >>> modality_enrichment([[0.0], [1.0], [7.0], [8.0]], ["rna", "rna", "adt", "adt"], n_neighbors=1)
    2.0

    """
    latent, groups = aligned(("latent", "groups"), latent, groups, axes=("rows",))
    latent = as_latent(latent, "latent")
    groups = as_labels(groups, len(latent), "groups")
    shares = pd.Series(groups).value_counts(normalize=True)
    if len(shares) < 2:
        raise ValueError(f"mixing needs at least 2 groups; found only {groups[0]!r}.")
    return _share_of_own(latent, groups, n_neighbors) / float(np.sum(shares**2))


def _share_of_own(latent: NDArray[np.float64], labels: NDArray[np.object_], n_neighbors: int) -> float:
    """Return the mean share of a cell's neighbours that have the cell's label."""
    return float(np.mean(labels[nearest_neighbors(latent, n_neighbors)] == labels[:, None]))
