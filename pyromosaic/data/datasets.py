"""Real data that come with the package."""

from importlib.resources import as_file, files
from typing import TYPE_CHECKING

import pandas as pd

from pyromosaic.data.tables import kept_apart

if TYPE_CHECKING:
    from mudata import MuData

FILES = files("pyromosaic") / "data" / "files"


def pbmc_mosaic() -> "MuData":
    """Peripheral blood cells of four donors: RNA, surface proteins, or both.

    The data have 400 cells of each donor: the first donor has RNA only (500 genes), the second has antibodies only
    (224), and the third and fourth have both. Values are raw counts; `obs` has ``batch`` (the donor) and ``celltype``
    (8 types).

    Returns
    -------
    MuData
        Modalities ``"rna"`` (1200 cells) and ``"adt"`` (1200 cells), 1600 cells in all.

    References
    ----------
    Hao et al., Integrated analysis of multimodal single-cell data, Cell 2021 (GEO GSE164378); the excerpt is the one
    that the `scmidas` 0.3.0 package ships under the MIT licence.

    Examples
    --------
    >>> {name: adata.shape for name, adata in pbmc_mosaic().mod.items()}
    {'rna': (1200, 500), 'adt': (1200, 224)}
    """
    import mudata

    with as_file(FILES / "pbmc_mosaic.h5mu") as path, kept_apart():
        return mudata.read_h5mu(path)


def protein_gene_links() -> pd.DataFrame:
    """The genes that encode the targets of the antibodies of `pbmc_mosaic`.

    Returns
    -------
    pandas.DataFrame
        Columns ``protein`` and ``gene``, with one link per row.

    Examples
    --------
    >>> protein_gene_links().shape
    (240, 2)
    """
    with as_file(FILES / "protein_gene_links.csv") as path:
        return pd.read_csv(path)
