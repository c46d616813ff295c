"""Chromatin counts: cut sites, of which a fragment has two, and fragments."""

import warnings
from typing import Any

import numpy as np
from scipy import sparse

from pyromosaic.data.spec import ModalitySpec


def fragments(counts: Any) -> Any:
    """Fragments behind counts of cut sites, ``ceil(x / 2)``.

    A fragment of chromatin is cut at both ends, and the matrices of 10x Genomics count the ends. Therefore most of
    their counts are even; a fragment of which one end is outside the region makes a count odd.

    Parameters
    ----------
    counts
        Cut sites: a scipy sparse matrix or array, a NumPy array, or a pandas DataFrame.

    Returns
    -------
    sparse matrix, numpy.ndarray or pandas.DataFrame
        Fragments, in a new object of the same type. Values that are not counts stay as they are, so that registration
        can name them.

    References
    ----------
    Martens, Fischer, Yépez, Theis and Gagneur, Modeling fragment counts improves single-cell ATAC-seq analysis, Nature
    Methods 2024.

    Examples
    --------
    >>> fragments(np.array([[0, 1, 2], [3, 4, 40]]))
    array([[ 0,  1,  1],
           [ 2,  2, 20]])
    """
    if sparse.issparse(counts):
        stored: Any = counts
        halved = stored.copy()
        halved.data = fragments(halved.data)
        return halved
    values = np.asarray(counts)
    are_counts = np.isfinite(values).all() and (values >= 0).all() and (values % 1 == 0).all()
    return counts // 2 + counts % 2 if are_counts else counts


def warn_of_cut_sites(name: str, spec: ModalitySpec, block: Any) -> bool:
    """Warn, and return True, if counts are mostly even and are not said to be cut sites, or the reverse.

    Of other counts, half are even if they are large, and less if they are small. The share must be above a half by four
    standard errors, and by a tenth.

    Parameters
    ----------
    name, spec
        The modality.
    block
        Counts of some of its cells, as they are stored.
    """
    if not (spec.cut_sites or (spec.data_kind == "count" and spec.traits.sized and not spec.traits.background)):
        return False
    stored: Any = block
    values = stored.data if sparse.issparse(block) else stored
    values = values[values > 0]
    share = float((values % 2 == 0).mean()) if len(values) else 0.0
    if spec.cut_sites:
        said = (
            f"cut_sites=True, but only {share:.0%} of the counts above 0 are even; counts of fragments or molecules "
            "must not be halved: leave it out"
        )
        doubtful = share < 0.5
    else:
        said = (
            f"{share:.0%} of the counts above 0 are even, as are counts of cut sites, of which a fragment has two; if "
            f"these are, set cut_sites=True in its ModalitySpec (on the command line, --cut-sites {name}), so that the "
            "model counts fragments"
        )
        doubtful = share > 0.5 + max(0.1, 2 / np.sqrt(max(1, len(values))))
    if doubtful:
        warnings.warn(f"modality {name!r}: {said}", stacklevel=2)
    return doubtful
