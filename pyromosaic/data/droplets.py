"""Droplets without a cell, which show how much of each antibody floats around."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd


def droplet_profile(droplets: Any) -> dict[str, tuple[float, float]]:
    """Log share of each antibody in empty droplets, and its spread between droplets.

    The spread is the standard deviation of the log share beyond that of Poisson counts, so that droplets with few
    counts do not seem to differ.

    Parameters
    ----------
    droplets
        An AnnData with counts in `X`, or a table droplets × antibodies; or what this function returned.

    Returns
    -------
    dict
        Two numbers for each antibody, by its name.

    Raises
    ------
    ValueError
        If it is something else, or holds other than counts, or no counts.

    Examples
    --------
    >>> counts = pd.DataFrame({"CD4": [3, 2, 4], "CD8": [1, 1, 0]})
    >>> {name: f"{np.exp(level):.2f}" for name, (level, _) in droplet_profile(counts).items()}
    {'CD4': '0.79', 'CD8': '0.21'}
    """
    if isinstance(droplets, Mapping):
        return {str(name): (float(level), float(spread)) for name, (level, spread) in droplets.items()}
    if not (isinstance(droplets, pd.DataFrame) or hasattr(droplets, "to_df")):
        raise ValueError(
            f"empty_droplets must be an AnnData or a table droplets × antibodies; found a {type(droplets).__name__}"
        )
    names = droplets.columns if isinstance(droplets, pd.DataFrame) else droplets.var_names
    x = np.asarray(droplets.to_numpy() if isinstance(droplets, pd.DataFrame) else droplets.to_df().to_numpy(), float)
    if not (np.isfinite(x).all() and (x >= 0).all() and (x % 1 == 0).all()):
        raise ValueError("empty_droplets must hold raw counts; found other numbers")
    if not x.any():
        raise ValueError("empty_droplets hold no counts; leave them out")
    share = (x.sum(axis=0) + 0.5) / (x.sum() + 0.5 * x.shape[1])
    expected = x.sum(axis=1, keepdims=True) * share
    excess = ((x - expected) ** 2 - expected).sum(axis=0) / (expected**2).sum(axis=0)
    spread = np.sqrt(np.log1p(np.maximum(excess, 0)))
    return {str(name): (float(a), float(b)) for name, a, b in zip(names, np.log(share), spread, strict=True)}
