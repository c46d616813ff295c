"""Links of two modalities: from a table, by name, or by genomic position."""

import re
import warnings
from dataclasses import dataclass

import numpy as np
import pandas as pd

from pyromosaic.accepted import Whole, checked
from pyromosaic.data import Mosaic
from pyromosaic.data.tables import words

#: Strand of a gene, as written in GTF files and BioMart; 0 if it is unknown.
STRANDS = {"+": 1, "1": 1, "+1": 1, "-": -1, "-1": -1, ".": 0, "0": 0, "": 0, "*": 0, "?": 0}


@dataclass(frozen=True)
class Links:
    """Linked features of two modalities, in pairs.

    Parameters
    ----------
    pairs
        One row per link: a column of feature names for each of the two modalities, named after it; ``weight``, above 0
        and at most 1; and ``sign``, 1 or -1.
    n_unknown
        Number of links that were left out because the mosaic lacks one of their features.
    """

    pairs: pd.DataFrame
    n_unknown: int = 0

    def __len__(self) -> int:
        return len(self.pairs)

    @property
    def modalities(self) -> tuple[str, str]:
        """Names of the two modalities."""
        return self.pairs.columns[0], self.pairs.columns[1]

    def positions(self, mosaic: Mosaic) -> tuple[np.ndarray, np.ndarray]:
        """Column numbers of the linked features in both modalities, shape (links,) each."""
        first, second = (_features(mosaic, m).get_indexer(pd.Index(self.pairs[m])) for m in self.modalities)
        return first, second

    def take(self, rows: np.ndarray) -> "Links":
        """Some of the links, by position or mask."""
        return Links(self.pairs.iloc[rows].reset_index(drop=True), self.n_unknown)


def links_from_table(mosaic: Mosaic, modalities: tuple[str, str], table: pd.DataFrame) -> Links:
    """Links from a table with a column of feature names for each modality and one row per link.

    Parameters
    ----------
    mosaic
        The data.
    modalities
        Names of the two modalities.
    table
        Columns named after the modalities, or two columns that can be assigned by the names in them
        (`pyromosaic.protein_gene_links` has ``protein`` and ``gene``). Columns ``weight`` (above 0, at most 1) and
        ``sign`` (1 or -1) are optional; both are 1 by default.

    Returns
    -------
    Links
        The links whose features are both in the mosaic, each pair once with its greatest weight; all others are
        counted.

    Raises
    ------
    ValueError
        If a modality does not exist, the columns cannot be assigned, a weight or sign is out of range, or no link is
        left.

    Examples
    --------
    >>> from pyromosaic import Mosaic, linkage, pbmc_mosaic, protein_gene_links
    >>> mosaic = Mosaic.from_mudata(pbmc_mosaic(), batch_key="batch")
    >>> links = linkage.links_from_table(mosaic, ("rna", "adt"), protein_gene_links())
    >>> len(links), links.n_unknown
    (74, 166)
    """
    features = [_features(mosaic, m) for m in modalities]
    columns = [c for c in table.columns if c not in ("weight", "sign")]
    if set(modalities) <= set(columns):
        columns = list(modalities)
    elif len(columns) == 2:
        known = [[int(f.isin(table[c].astype(str)).sum()) for c in columns] for f in features]
        if known[0][1] + known[1][0] > known[0][0] + known[1][1]:
            columns.reverse()
    else:
        raise ValueError(
            f"a table of links needs a column of names for each of {modalities[0]!r} and {modalities[1]!r}, and may "
            f"have 'weight' and 'sign'; found {', '.join(map(repr, table.columns)) or 'no column'}"
        )
    pairs = pd.DataFrame({m: table[c].astype(str).to_numpy() for m, c in zip(modalities, columns, strict=True)})
    for name in ("weight", "sign"):
        pairs[name] = strengths(table, name)
    check_strength(pairs["weight"].to_numpy(), pairs["sign"].to_numpy())
    same = pairs.groupby(list(modalities))
    both = (same["sign"].transform("nunique") > 1).to_numpy()
    if both.any():
        one, other = pairs.loc[both, list(modalities)].iloc[0]
        raise ValueError(f"the link between {one!r} and {other!r} has both signs; choose one")
    pairs["weight"] = same["weight"].transform("max")
    pairs = pairs.drop_duplicates(list(modalities))
    complete = pairs[modalities[0]].isin(features[0]) & pairs[modalities[1]].isin(features[1])
    if not complete.any():
        raise ValueError(
            f"no linked feature is left: none of the {len(pairs)} links has both its features among the "
            f"{len(features[0])} of {modalities[0]!r} and the {len(features[1])} of {modalities[1]!r}"
        )
    return Links(pairs[complete].reset_index(drop=True), int((~complete).sum()))


def strengths(table: pd.DataFrame, column: str) -> np.ndarray:
    """Weights or signs of links, 1 where the table has no such column; NaN for what is no number."""
    if column not in table:
        return np.ones(len(table))
    return pd.to_numeric(table[column], errors="coerce").to_numpy(dtype=float)


def check_strength(weight: np.ndarray, sign: np.ndarray) -> None:
    """Check that weights and signs of links are in range.

    Raises
    ------
    ValueError
        If one is not; the message names the first.

    Examples
    --------
    >>> check_strength(np.array([0.5, 1.0]), np.array([1, -1]))
    """
    for name, values, fits, accepted in (
        ("weight", weight, (weight > 0) & (weight <= 1), "above 0 and at most 1"),
        ("sign", sign, np.isin(sign, (-1, 1)), "1 or -1"),
    ):
        if not fits.all():
            raise ValueError(f"the {name} of a link must be {accepted}; found {values[~fits][0]:g}")


def links_by_name(mosaic: Mosaic, modalities: tuple[str, str]) -> Links:
    """Links between features with the same name, e.g. genes and gene activities.

    Parameters
    ----------
    mosaic
        The data.
    modalities
        Names of the two modalities.

    Returns
    -------
    Links
        One link for each name in both, with weight and sign 1.

    Raises
    ------
    ValueError
        If a modality does not exist, or the modalities have no name in common.

    Examples
    --------
    >>> from pyromosaic import Mosaic, simulate
    >>> mdata, _ = simulate(60, {"rna": 50, "activity": 50}, likelihoods={"activity": "normal"})
    >>> mdata["activity"].var_names = mdata["rna"].var_names
    >>> mosaic = Mosaic.from_mudata(mdata, {"rna": "nb", "activity": "normal"})
    >>> len(links_by_name(mosaic, ("rna", "activity")))
    50
    """
    names = _features(mosaic, modalities[0]).intersection(_features(mosaic, modalities[1]), sort=False)
    return links_from_table(mosaic, modalities, pd.DataFrame(dict.fromkeys(modalities, names)))


@checked
def links_by_overlap(mosaic: Mosaic, modalities: tuple[str, str], genes: pd.DataFrame, promoter: Whole = 2000) -> Links:
    """Links between genes and the regions that overlap their body or promoter.

    Parameters
    ----------
    mosaic
        The data.
    modalities
        The modality of genes, then the modality of regions. The names of regions are coordinates such as
        ``"chr1:100-200"``, separated by ``:``, ``-`` or ``_``.
    genes
        Position of each gene, indexed by name, with columns ``chromosome`` (with or without ``"chr"``), ``start``,
        ``end`` and ``strand`` (``"+"`` or ``"-"``, or 1 and -1). A gene whose strand is missing or ``"."`` has no
        promoter.
    promoter
        Number of bases upstream of the gene that count as its promoter.

    Returns
    -------
    Links
        One link for each gene and region that overlap, with weight and sign 1.

    Raises
    ------
    ValueError
        If a modality or a column does not exist, the name of a region or the position of a gene is not a coordinate, a
        strand is invalid, or nothing overlaps.

    Warns
    -----
    UserWarning
        If the strand or the chromosome of some genes is unknown.

    Examples
    --------
    >>> from pyromosaic import simulate
    >>> mdata, _ = simulate(60, {"rna": 10, "atac": 10})
    >>> mdata["atac"].var_names = [f"chr1:{start}-{start + 500}" for start in range(0, 10_000, 1000)]
    >>> mosaic, place = Mosaic.from_mudata(mdata), {"chromosome": "chr1", "start": 4600, "end": 5200, "strand": "+"}
    >>> genes = pd.DataFrame(place, index=mdata["rna"].var_names[:1])
    >>> links_by_overlap(mosaic, ("rna", "atac"), genes).pairs["atac"].tolist()
    ['chr1:3000-3500', 'chr1:4000-4500', 'chr1:5000-5500']
    """
    wanted = ["chromosome", "start", "end", "strand"]
    if not set(wanted) <= set(genes.columns):
        raise ValueError(
            f"the table of genes needs the columns {', '.join(wanted)}; found {', '.join(map(str, genes.columns))}"
        )
    names = _features(mosaic, modalities[1])
    places = [re.fullmatch(r"(.+?)[:_-](\d+)[-_](\d+)", name) for name in names]
    if None in places:
        raise ValueError(
            f"modality {modalities[1]!r}: the name {names[places.index(None)]!r} is not a region; accepted: names "
            "like 'chr1:100-200'"
        )
    regions = pd.DataFrame([p.groups() for p in places if p], index=names, columns=wanted[:3])
    regions = regions.astype({"start": int, "end": int}).sort_values("start")
    regions["chromosome"] = _without_chr(regions["chromosome"])
    pairs = []
    by_chromosome = dict(iter(regions.groupby("chromosome")))
    genes = genes.set_axis(genes.index.astype(str))  # numbers as names are names
    known = genes[genes.index.isin(_features(mosaic, modalities[0]))]
    located = pd.DataFrame({"chromosome": _without_chr(words(known["chromosome"]))})
    for column in ("start", "end"):
        located[column] = pd.to_numeric(known[column], errors="coerce")
        bad = ~np.isfinite(located[column].to_numpy(dtype=float))
        if bad.any():
            raise ValueError(
                f"the {column} of gene {known.index[bad][0]!r} is {str(known[column][bad].iloc[0])!r}; accepted: a "
                "number of bases"
            )
    backwards = (located["start"] > located["end"]).to_numpy()
    if backwards.any():
        start, end = known.loc[known.index[backwards][0], ["start", "end"]]
        raise ValueError(
            f"gene {known.index[backwards][0]!r} starts at {start} and ends at {end}; accepted: a start of at most the "
            "end, on both strands"
        )
    located["strand"] = words(known["strand"]).astype(object).fillna(".").map(STRANDS)
    if located["strand"].isna().any():
        bad = located["strand"].isna().to_numpy()
        raise ValueError(
            f"the strand of gene {known.index[bad][0]!r} is {str(known['strand'][bad].iloc[0])!r}; accepted: '+' and "
            "'-', or 1 and -1, or '.' if it is unknown"
        )
    n_unknown = int((located["strand"] == 0).sum())
    if n_unknown:
        warnings.warn(
            f"the strand of {n_unknown} of {len(located)} genes is unknown; they are linked by their body, without a "
            "promoter",
            stacklevel=2,
        )
    elsewhere = located.index[~located["chromosome"].isin(list(by_chromosome))]
    if len(elsewhere) == len(located) > 0:
        raise ValueError(
            f"no gene is on a chromosome of the regions: gene {elsewhere[0]!r} is on "
            f"{str(known['chromosome'].iloc[0])!r}, and region {names[0]!r} is the first; use the same names of "
            "chromosomes (with or without 'chr')"
        )
    n_unknown = int(located["chromosome"].isna().sum())
    if n_unknown:
        warnings.warn(
            f"the chromosome of {n_unknown} of {len(located)} genes is unknown; they are not linked", stacklevel=2
        )
    for gene, chromosome, start, end, strand in located.itertuples(name=None):
        if chromosome in by_chromosome:
            near = by_chromosome[chromosome]
            start, end = start - promoter * (strand == 1), end + promoter * (strand == -1)
            near = near.iloc[: np.searchsorted(near["start"], end, side="right")]
            pairs += [(gene, region) for region in near.index[near["end"] >= start]]
    return links_from_table(mosaic, modalities, pd.DataFrame(pairs, columns=list(modalities), dtype=str))


def _without_chr(chromosomes: pd.Series) -> pd.Series:
    return chromosomes.astype(object).str.replace("^chr", "", case=False, regex=True)


def _features(mosaic: Mosaic, modality: str) -> pd.Index:
    if modality not in mosaic.modalities:
        raise ValueError(f"there is no modality {modality!r}; the mosaic has {', '.join(map(repr, mosaic.modalities))}")
    return pd.Index(mosaic.modalities[modality].schema.features)
