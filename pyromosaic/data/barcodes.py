"""Names of cells that hold a barcode, and what stands beside it."""

import warnings
from collections.abc import Mapping
from itertools import combinations

import pandas as pd

PARTS = r"^(.*?)[_:#-]*([ACGTN]{8,})[_:#-]*(.*)$"  # before the barcode, the barcode, and after it


def samples(names: pd.Index) -> pd.Series | None:
    """What stands beside the barcodes, if it differs between cells: a prefix, a suffix, or both.

    Parameters
    ----------
    names
        Names of cells.

    Returns
    -------
    pandas.Series
        By name; None if a name has no barcode, or nothing differs.

    Examples
    --------
    >>> samples(pd.Index(["AAACCTGAGAAACCAT-1", "AAACCTGAGAAACCGC-2"])).tolist()
    ['1', '2']
    """
    parts = names.to_series().str.extract(PARTS)[[0, 2]]
    if parts.isna().any(axis=None):
        return None
    differing = [parts[column] for column in parts if parts[column].nunique() > 1]
    if not differing:
        return None
    sample: pd.Series = differing[0] if len(differing) == 1 else differing[0] + "_" + differing[1]
    return sample


def warn_of_barcodes(cells: Mapping[str, pd.Index]) -> None:
    """Warn if two modalities have no cell in common by name, but most by barcode.

    Parameters
    ----------
    cells
        Names of the cells of each modality. Those that end with the name of the modality were set apart on purpose.
    """
    for (first, x), (second, y) in combinations(cells.items(), 2):
        names = (x.astype(str), y.astype(str))
        apart = any(n.str.endswith(f":{own}").any() for n, own in zip(names, (first, second), strict=True))
        if min(map(len, names)) == 0 or apart or names[0].isin(names[1]).any():
            continue
        barcodes = [n.to_series().str.extract(PARTS)[1].dropna() for n in names]
        common = barcodes[0].isin(barcodes[1])
        if 2 * common.sum() > min(map(len, names)):
            one = barcodes[0].index[common][0]
            other = barcodes[1].index[barcodes[1] == barcodes[0][one]][0]
            warnings.warn(
                f"modalities {first!r} and {second!r} have no cell in common by name, but {common.sum()} by barcode, "
                f"e.g. {one!r} and {other!r}; if these are the same cells, give them the same names",
                stacklevel=3,
            )
