"""Controls among antibodies: isotype controls, which bind no protein, and hashtags, which mark samples."""

import re
import warnings
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from sklearn.linear_model import PoissonRegressor

from pyromosaic.accepted import checked
from pyromosaic.data.matrix import CHUNK, Matrix, row_totals

if TYPE_CHECKING:
    from anndata import AnnData

ISOTYPE = re.compile(
    r"isotype|(^|[\W_])(mouse|mo|rat|rag|hamster|rabbit|goat)[\W_]*igg|^igg(1|2[abc])([\W_]|k|$)", re.IGNORECASE
)
HASHTAG = re.compile(r"hash[\W_]*tag|(^|[\W_])hto([\W_\d]|$)|^cmo\d", re.IGNORECASE)


@checked
def control_roles(names: pd.Index) -> pd.Series:
    """Which antibodies are controls, by their names.

    Parameters
    ----------
    names
        Names of antibodies, as 10x Genomics and BioLegend write them: ``"IgG1_control_TotalSeqB"``, ``"Rat-IgG2b"``,
        ``"Isotype_MOPC.21"``; ``"Hashtag1"``, ``"HTO_B"``, ``"CMO301"``. ``"IgD"``, ``"IgM"`` and ``"IgG-Fc"`` are
        proteins of B cells, not controls.

    Returns
    -------
    pandas.Series
        By name, ``"isotype"``, ``"hashtag"`` or ``""``.

    Examples
    --------
    >>> control_roles(pd.Index(["CD4", "IgG1_control_TotalSeqB", "HTO-2", "IgD"])).tolist()
    ['', 'isotype', 'hashtag', '']
    """
    roles = [
        "hashtag" if HASHTAG.search(name) else "isotype" if ISOTYPE.search(name) else "" for name in map(str, names)
    ]
    return pd.Series(roles, names, dtype=object)


def warn_of_controls(name: str, features: pd.Index) -> None:
    """Warn if some antibodies of a modality are controls by their names."""
    roles, found = control_roles(features), []
    for role, what in (("isotype", "isotype controls"), ("hashtag", "hashtags")):
        if names := list(roles.index[roles == role]):
            found.append(f"{', '.join(names[:3])}{', …' * (len(names) > 3)} ({what})")
    if found:
        warnings.warn(
            f"modality {name!r}: {' and '.join(found)} are modelled as proteins; set controls apart by "
            "pyromosaic.data.separate_controls, or rename what is none",
            stacklevel=2,
        )


@checked
def separate_controls(adata: "AnnData", layer: str | None = None) -> "AnnData":
    r"""Set the controls among antibodies apart, and estimate the sizes of cells from the isotype controls.

    An isotype control binds no protein. Its count tells how much antibody a cell holds unspecifically, and how well the
    cell was captured, as does the background of all other antibodies. The total of a cell does so only for cells of the
    same kind: cells with more protein have a larger total, and the same background. With the counts of the isotype
    controls :math:`c_n` and totals of the other antibodies :math:`t_n`, the size of a cell is the posterior mean of

    .. math::

        c_n \sim \mathrm{Poisson}(\lambda_n),\quad
        \lambda_n \sim \mathrm{Gamma}(\text{mean } \alpha t_n^\beta, \text{shape } a),

    multiplied so that the median cell has its total as its size. The three parameters are estimated from all cells:
    the fewer counts the controls have, the more the totals decide.

    Parameters
    ----------
    adata
        Antibody counts; controls are recognised by name, see `control_roles`. To compare cells of several objects, call
        it on all together.
    layer
        Layer that holds the counts; None for `X`.

    Returns
    -------
    AnnData
        The other antibodies. ``obsm["isotype_controls"]`` and ``obsm["hashtags"]`` hold the counts of the controls.
        With isotype controls, ``obs["control_size"]`` holds the sizes, for ``ModalitySpec("nb_mixture",
        size_factor_key="control_size")``.

    Raises
    ------
    ValueError
        If no antibody is a control by its name, or all are.

    Examples
    --------
    >>> from pyromosaic import simulate
    >>> adt = simulate(50, {"adt": 12})[0]["adt"]
    >>> adt.var_names = [f"CD{i}" for i in range(8)] + ["Rat-IgG1", "Mouse-IgG2a", "HTO1", "HTO2"]
    >>> apart = separate_controls(adt)
    >>> apart.shape, list(apart.obs), list(apart.obsm)
    ((50, 8), ['celltype', 'batch', 'control_size'], ['isotype_controls', 'hashtags'])
    """
    roles = control_roles(adata.var_names).to_numpy()
    if not roles.any() or roles.all():
        raise ValueError(
            f"{'all' if roles.all() else 'none'} of the {len(roles)} antibodies are controls by their names; "
            "isotype controls are recognised by names like 'Rat-IgG1', hashtags by names like 'HTO1'"
        )
    apart = adata[:, roles == ""].copy()
    for role, name in (("isotype", "isotype_controls"), ("hashtag", "hashtags")):
        if (roles == role).any():
            apart.obsm[name] = adata[:, roles == role].to_df(layer)
    if "isotype_controls" in apart.obsm:
        matrix = Matrix(apart.X if layer is None else apart.layers[layer])
        rows = np.array_split(np.arange(apart.n_obs), 1 + apart.n_obs // CHUNK)
        totals = np.concatenate([row_totals(matrix[part]) for part in rows])
        controls = np.asarray(apart.obsm["isotype_controls"], np.float64).sum(axis=1)
        apart.obs["control_size"] = _sizes(controls, totals)
    return apart


def _sizes(controls: np.ndarray, totals: np.ndarray) -> np.ndarray:
    """Posterior means of the sizes of cells, from the counts of their controls and of the other antibodies."""
    log_totals = np.log(totals + 1)[:, None]
    mean = PoissonRegressor(alpha=0).fit(log_totals, controls).predict(log_totals)
    # the variance of the counts is mean + mean² / shape
    excess = ((controls - mean) ** 2 - controls).sum() / (mean**2).sum()
    inverse_shape = max(excess, 0.0)
    rate = mean * (1 + inverse_shape * controls) / (1 + inverse_shape * mean)
    sizes: np.ndarray = rate * np.median(totals) / np.median(rate)
    return sizes
