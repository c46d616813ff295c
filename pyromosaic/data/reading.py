"""Files as instruments and other packages write them, read as MuData."""

import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy import io, sparse

from pyromosaic.accepted import Word, checked
from pyromosaic.data.barcodes import samples
from pyromosaic.data.disk import check_whole
from pyromosaic.data.matrix import _check_indices, row_totals
from pyromosaic.data.tables import kept_apart

if TYPE_CHECKING:
    from anndata import AnnData
    from mudata import MuData

#: The modality of each type of feature; another type is a modality of its name, in small letters.
MODALITIES: Mapping[str, str] = {
    **dict.fromkeys(("Gene Expression", "GEX"), "rna"),
    **dict.fromkeys(("Peaks", "ATAC"), "atac"),
    **dict.fromkeys(("Antibody Capture", "ADT"), "adt"),
    "CRISPR Guide Capture": "crispr",
    "Multiplexing Capture": "hashtags",
}
ACCEPTED = (
    "a .h5 file of Cell Ranger, a folder with matrix.mtx, features.tsv and barcodes.tsv, .h5ad, .h5mu, or a zarr store "
    "of AnnData or MuData"
)
MATRICES = (  # in the output folder of Cell Ranger: the first that exists is read
    *("filtered_feature_bc_matrix.h5", "filtered_feature_bc_matrix", "sample_filtered_feature_bc_matrix.h5"),
    *("sample_filtered_feature_bc_matrix", "filtered_peak_bc_matrix.h5", "filtered_peak_bc_matrix"),
    *("filtered_gene_bc_matrices_h5.h5", "filtered_gene_bc_matrices"),
)
FEATURES = ("features.tsv", "genes.tsv", "peaks.bed")
FEW = 10  # counts; droplets without a cell mostly have fewer, cells more
REPEATED = "(Variable|Observation) names are not unique|Suffix used|Duplicated var_names|var_names (are|is) not unique"


@checked
def read(path: str | PathLike[str], modality: Word | None = None, genome: Word | None = None) -> "MuData":
    """Read a file or folder of measurements.

    The kind of file follows from its content, not from its ending:

    * ``.h5`` of Cell Ranger 2 and later, of gene expression, ATAC, multiome, or with antibodies;
    * a folder with ``matrix.mtx``, ``features.tsv`` (or ``genes.tsv``, or ``peaks.bed``) and ``barcodes.tsv``,
      compressed or not, with a common prefix or not; or the path of its matrix; or the output folder of Cell Ranger,
      of which the filtered matrix is read;
    * ``.h5ad``, whose modalities are the values of ``feature_types`` in `var`;
    * ``.h5mu``;
    * zarr stores of AnnData or MuData.

    Types of features become modalities: ``"Gene Expression"`` is ``"rna"``, ``"Peaks"`` is ``"atac"`` and
    ``"Antibody Capture"`` is ``"adt"``. Features are named by their symbols. Within a modality, repeated names get
    ``"-1"``, ``"-2"``, … as by anndata's ``var_names_make_unique``; ``gene_ids`` in `var` stay unique. If the names of
    cells beside their barcodes differ (``"-1"``, ``"-2"``, or prefixes of samples), `obs` has the column ``"sample"``.

    Parameters
    ----------
    path
        The file or folder.
    modality
        Name of the modality, for data that do not say what their features are: an .h5ad or zarr store without
        ``feature_types``, or a ``features.tsv`` without a third column.
    genome
        Read the genes and regions of this genome only; by default those of all genomes in the file.

    Returns
    -------
    MuData
        Counts of 10x files as float32, cells × features.

    Raises
    ------
    ValueError
        If the file is of no such kind, is damaged, or does not say what its features are.

    Warns
    -----
    UserWarning
        If a matrix holds all barcodes, most of which are empty droplets, rather than cells.

    Examples
    --------
    >>> import tempfile
    >>> from pyromosaic import pbmc_mosaic, read
    >>> path = f"{tempfile.mkdtemp()}/pbmc.h5mu"
    >>> pbmc_mosaic().write(path)
    >>> {name: adata.shape for name, adata in read(path).mod.items()}
    {'rna': (1200, 500), 'adt': (1200, 224)}
    """
    if not isinstance(path, str | PathLike):
        raise ValueError(f"path must be a file or folder; found {path!r}")
    place = Path(path)
    if not place.exists():
        raise ValueError(f"there is no file {place}")
    with warnings.catch_warnings(), kept_apart():
        warnings.filterwarnings("ignore", REPEATED, UserWarning)
        warnings.filterwarnings("ignore", "The default value for `spmatrix`", DeprecationWarning)  # any is read
        found = _folder(place, genome) if place.is_dir() or ".mtx" in place.suffixes else _hdf5(place, genome)
        if hasattr(found, "mod"):
            return _with_unique_names(found, place, modality or genome)
        return _mudata(_by_type(_of_genome(found, genome, place), modality, place), place)


def _with_unique_names(mdata: "MuData", place: Path, chosen: str | None) -> "MuData":
    """A MuData as it was written, with unique names of features within each modality."""
    if not mdata.mod:
        raise ValueError(f"{place} is a MuData without modalities")
    if chosen is not None:
        raise ValueError(f"{place} is a MuData, which says what it holds; leave out modality and genome")
    repeated = [part for part in mdata.mod.values() if part.var_names.has_duplicates]
    for part in repeated:
        part.var_names = _unique(part.var_names).to_list()
    if repeated:
        mdata.update()
    return mdata


def _mudata(parts: "dict[str, AnnData]", place: Path) -> "MuData":
    """A MuData of these modalities, with unique names of features within each."""
    import mudata

    for name, part in parts.items():
        if part.obs_names.has_duplicates:
            twice = part.obs_names[part.obs_names.duplicated()][0]
            raise ValueError(f"{place}: the cell {twice!r} occurs more than once in modality {name!r}")
        part.var_names = _unique(part.var_names).to_list()
    return mudata.MuData(parts)


def _unique(names: pd.Index) -> pd.Index:
    from anndata.utils import make_index_unique

    unique: pd.Index = make_index_unique(names.astype(str))
    return unique


def _by_type(adata: "AnnData", modality: str | None, place: Path) -> "dict[str, AnnData]":
    """The features of each type as a modality."""
    if "feature_types" not in adata.var:
        if modality is None:
            raise ValueError(
                f"{place} does not say what its features are; pass the name of the modality, e.g. "
                "modality='rna' (on the command line, --as rna), or add a column 'feature_types' to var, e.g. 'Gene "
                "Expression'"
            )
        return {modality: adata}
    names = adata.var["feature_types"].astype(str)
    names = names.map(lambda kind: MODALITIES.get(kind, kind.lower().replace(" ", "_")))
    if modality is not None:
        raise ValueError(f"{place} says what its features are ({', '.join(names.unique())}); leave out modality")
    if names.nunique() == 1:
        return {names.iloc[0]: adata}
    return {name: adata[:, (names == name).to_numpy()].copy() for name in names.unique()}


def _of_genome(adata: "AnnData", genome: str | None, place: Path) -> "AnnData":
    """The genes and regions of a genome, and the features of none; all if no genome is given."""
    if genome is None:
        return adata
    genomes = adata.var["genome"].astype(str) if "genome" in adata.var else pd.Series("", adata.var_names)
    if genome not in set(genomes):
        known = ", ".join(sorted(set(genomes) - {""})) or "none"
        raise ValueError(f"{place} has no genome {genome!r}; it has {known}")
    kinds = adata.var["feature_types"] if "feature_types" in adata.var else genomes
    of_none = ~kinds.isin(["Gene Expression", "Peaks"]) & (kinds is not genomes)
    return adata[:, (of_none | (genomes == genome)).to_numpy()].copy()


def _joined(genomes: "dict[str, AnnData]", genome: str | None, place: Path) -> "AnnData":
    """The genomes of a file of Cell Ranger 2, which stores each as a matrix with its own barcodes."""
    if genome is not None and genome not in genomes:
        raise ValueError(f"{place} has no genome {genome!r}; it has {', '.join(genomes)}")
    parts = [adata for name, adata in genomes.items() if genome in (None, name)]
    first = parts[0]
    if len(parts) == 1:
        return first
    if not all(part.obs_names.equals(first.obs_names) for part in parts):
        raise ValueError(f"{place} has other cells for each genome; pass one as genome: {', '.join(genomes)}")
    import anndata

    return anndata.concat(parts, axis="var", merge="first")


# HDF5


def _hdf5(path: Path, genome: str | None) -> Any:
    """An AnnData or a MuData from an HDF5 file, by what is in it."""
    import h5py

    if not h5py.is_hdf5(path):
        raise ValueError(f"{path} cannot be read; accepted: {ACCEPTED}")
    with _reading(path):
        check_whole(path)
    with _reading(path), h5py.File(path, "r") as file:
        members = set(file)
        if "mod" in members:
            return _read("mudata", "read_h5mu", path)
        if "matrix" in members:
            return _tenx(file["matrix"], path)
        if {"obs", "var"} <= members:
            return _read("anndata", "read_h5ad", path)
        genomes = [name for name in file if isinstance(file[name], h5py.Group) and "gene_names" in file[name]]
        if genomes:
            return _joined({name: _tenx2(file[name], name, path) for name in genomes}, genome, path)
    raise ValueError(f"{path} holds {', '.join(sorted(members)) or 'nothing'}, no counts; accepted: {ACCEPTED}")


def _read(package: str, function: str, path: Path) -> Any:
    """What a package reads from a file in its own format."""
    from importlib import import_module

    return getattr(import_module(package), function)(path)


def _tenx(group: Any, path: Path) -> "AnnData":
    """The matrix of Cell Ranger 3 and later: barcodes × features, with a type for each feature."""
    if "features" not in group:
        raise ValueError(f"{path}: matrix has no features; it is not a whole file of Cell Ranger")
    features = group["features"]
    ids, names, kinds = (_text(features, name, path) for name in ("id", "name", "feature_type"))
    var = pd.DataFrame({"gene_ids": ids, "feature_types": kinds}, index=names)
    for name in ("genome", "interval", "pattern", "read", "sequence"):
        if name in features:
            var[name] = _text(features, name, path)
    return _counted(group, var, path)


def _tenx2(group: Any, genome: str, path: Path) -> "AnnData":
    """A genome of Cell Ranger 2: barcodes × genes."""
    names, ids = _text(group, "gene_names", path), _text(group, "genes", path)
    var = pd.DataFrame({"gene_ids": ids, "feature_types": "Gene Expression", "genome": genome}, index=names)
    return _counted(group, var, path)


def _counted(group: Any, var: pd.DataFrame, path: Path) -> "AnnData":
    """Counts of a group with these features; the columns that Cell Ranger stores are the rows of cells here."""
    barcodes = _text(group, "barcodes", path)
    data = _numbers(group, "data", path, "f4")
    kind = "i4" if max(len(data), len(var)) < 2**31 else "i8"
    indices, indptr = _numbers(group, "indices", path, kind), _numbers(group, "indptr", path, kind)
    shape = tuple(_numbers(group, "shape", path, "i8"))
    if shape != (len(var), len(barcodes)):
        raise ValueError(_misfit(path, shape, len(var), len(barcodes)))
    with _reading(path, "the matrix"):
        matrix = sparse.csr_matrix((data, indices, indptr), shape[::-1])
        _check_indices(matrix)
    return _anndata(matrix, pd.Index(barcodes), var, path)


def _misfit(path: Path, shape: tuple[int, ...], n_features: int, n_barcodes: int) -> str:
    rows, columns = shape
    hint = "; it is the other way round" if (columns, rows) == (n_features, n_barcodes) else ""
    return (
        f"{path}: the matrix has {rows} × {columns} entries, and there are {n_features} features and {n_barcodes} "
        f"barcodes; accepted: features × barcodes{hint}"
    )


def _dataset(group: Any, name: str, path: Path) -> Any:
    if name not in group:
        raise ValueError(f"{path}: {group.name} has no {name!r}; it is not a whole file of Cell Ranger")
    return group[name]


def _text(group: Any, name: str, path: Path) -> np.ndarray:
    with _reading(path, f"{group.name}/{name}"):
        return _dataset(group, name, path).asstr()[()].astype(object)


def _numbers(group: Any, name: str, path: Path, kind: str) -> np.ndarray:
    with _reading(path, f"{group.name}/{name}"):
        return _dataset(group, name, path).astype(kind)[()]


# Folders


def _folder(path: Path, genome: str | None) -> Any:
    """An AnnData or a MuData from a folder, by what is in it; or the AnnData of a matrix in it."""
    folder = path if path.is_dir() else path.parent
    if any((folder / name).exists() for name in (".zgroup", "zarr.json")):
        with _reading(folder):
            import zarr

            kind = "mod" in zarr.open_group(folder, mode="r")
            return _read("mudata", "read_zarr", folder) if kind else _read("anndata", "read_zarr", folder)
    matrices = [path] if path.is_file() else [p for p in sorted(folder.iterdir()) if _prefix(p) is not None]
    prefixes = sorted({str(_prefix(matrix)) for matrix in matrices})
    if len(prefixes) > 1:
        raise ValueError(f"{folder} holds {len(prefixes)} matrices; pass the path of one, e.g. {matrices[0]}")
    if matrices:
        return _mtx(matrices[-1], prefixes[0])  # of matrix.mtx and matrix.mtx.gz, the one that Cell Ranger wrote
    for name in MATRICES:
        if (inner := folder / name).exists():
            return _folder(inner, genome) if inner.is_dir() else _hdf5(inner, genome)
    inner_folders = [p for p in sorted(folder.iterdir()) if p.is_dir() and (p / "genes.tsv").exists()]
    if inner_folders:  # Cell Ranger 2 has a folder for each genome
        found = {p.name: _folder(p, None) for p in inner_folders}
        for name, adata in found.items():
            adata.var["genome"] = name
        return _joined(found, genome, folder)
    raise ValueError(f"the folder {folder} has no matrix.mtx, and none of a zarr store; accepted: {ACCEPTED}")


def _prefix(path: Path) -> str | None:
    """What stands before ``matrix.mtx`` in the name of a file; None for other files."""
    name = path.name.removesuffix(".gz")
    return name.removesuffix("matrix.mtx") if name.endswith("matrix.mtx") else None


def _mtx(path: Path, prefix: str) -> "AnnData":
    """A matrix of features × barcodes as text, with tables of its features and barcodes beside it."""
    members = [_beside(path, prefix + name) for name in FEATURES]
    features = next((member for member in members if member is not None), None)
    barcodes = _beside(path, f"{prefix}barcodes.tsv")
    for member, accepted in ((features, " or ".join(FEATURES)), (barcodes, "barcodes.tsv")):
        if member is None:
            raise ValueError(f"{path} has no {accepted} beside it (with the prefix {prefix!r}, compressed or not)")
    assert features is not None and barcodes is not None
    var, cells = _features(features), _table(barcodes)[0].to_numpy()
    with _reading(path):
        matrix = sparse.coo_matrix(io.mmread(path))
    if matrix.shape != (len(var), len(cells)):
        raise ValueError(_misfit(path, matrix.shape, len(var), len(cells)))
    return _anndata(matrix.T.tocsr().astype(np.float32), pd.Index(cells), var, path)


def _beside(path: Path, name: str) -> Path | None:
    """The file of this name in the folder of another, compressed or not."""
    return next((p for p in (path.parent / f"{name}.gz", path.parent / name) if p.exists()), None)


def _table(path: Path) -> pd.DataFrame:
    """A table of text without a header. No text is missing: a gene may be called nan."""
    with _reading(path):
        return pd.read_csv(path, sep="\t", header=None, dtype=str, keep_default_na=False, quoting=3, comment=None)


def _features(path: Path) -> pd.DataFrame:
    """The table of features, by name."""
    table = _table(path)
    if "peaks.bed" in path.name:
        place = table[0] + ":" + table[1] + "-" + table[2]
        return pd.DataFrame({"gene_ids": place.to_numpy(), "feature_types": "Peaks"}, index=place.to_numpy())
    var = pd.DataFrame({"gene_ids": table[0].to_numpy()}, index=table[min(1, table.shape[1] - 1)].to_numpy())
    if "genes.tsv" in path.name:
        var["feature_types"] = "Gene Expression"
    elif table.shape[1] > 2:
        var["feature_types"] = table[2].to_numpy()
    return var


# Both


def _anndata(matrix: Any, barcodes: pd.Index, var: pd.DataFrame, path: Path) -> "AnnData":
    """Counts of cells; a warning says if most barcodes are no cells."""
    from anndata import AnnData

    totals = row_totals(matrix)
    few = int((totals < FEW).sum())
    name = path.parent.name if _prefix(path) is not None else path.name
    if re.search(r"raw_\w*bc_matri", name) or 2 * few > len(totals):
        warnings.warn(
            f"{path} looks like a raw matrix: {few} of its {len(totals)} barcodes have fewer than {FEW} counts, as "
            "empty droplets do; read the filtered matrix, or keep only the barcodes that are cells",
            stacklevel=2,
        )
    return AnnData(matrix, _obs(barcodes), var)


def _obs(barcodes: pd.Index) -> pd.DataFrame:
    """A table of cells, with their sample if their names say one beside the barcode."""
    obs = pd.DataFrame(index=barcodes.astype(str))
    if (sample := samples(obs.index)) is not None:
        obs["sample"] = sample
    return obs


@contextmanager
def _reading(path: Path, member: str = "") -> Iterator[None]:
    """Say which file, and which member of it, cannot be read."""
    try:
        yield
    except Exception as error:  # whatever HDF5, zarr, gzip and other packages say of a damaged file
        if isinstance(error, ValueError) and str(error).startswith(str(path)):
            raise  # says so already
        said = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise ValueError(f"{path}: {member + ' ' if member else 'it '}cannot be read ({said})") from error
