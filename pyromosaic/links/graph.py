"""Guidance graphs: which features of different modalities are linked, with which sign and confidence.

Nodes are the features of all modalities. An edge links two features. Its weight in (0, 1] is the confidence of the
link; its sign is 1 if both features increase together, and -1 if one decreases as the other increases (DiagVI; Cao and
Gao, GLUE, Nature Biotechnology 2022).
"""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from typing import Any

import numpy as np
import pandas as pd
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from pyromosaic.accepted import checked
from pyromosaic.data import Mosaic, Schema
from pyromosaic.data.tables import in_order
from pyromosaic.links.pairs import Links, check_strength, links_by_overlap, links_from_table, strengths

FEW = 20  # warn if a modality has fewer linked features


@dataclass(frozen=True, eq=False)
class GuidanceGraph:
    """A validated guidance graph.

    Build one with `from_names`, `from_table`, `from_edges`, `from_data`, `from_overlap`, `from_matrix` or
    `from_linkage`.

    Parameters
    ----------
    features
        Names of the features by modality; nodes are numbered consecutively, modality after modality.
    edges
        Nodes of each edge, shape (2, E); every edge occurs once, and there are no self loops.
    weight
        Confidence of each edge, in (0, 1].
    sign
        1 or -1 for each edge.

    Raises
    ------
    ValueError
        If a node, weight or sign is out of range, the same edge has both signs, or a modality is not linked to the
        others.

    Warns
    -----
    UserWarning
        If a modality has fewer than 20 linked features.

    Examples
    --------
    >>> from pyromosaic import pbmc_mosaic, protein_gene_links
    >>> mosaic = Mosaic.from_mudata(pbmc_mosaic())
    >>> links = protein_gene_links().rename(columns={"protein": "adt", "gene": "rna"})
    >>> graph = GuidanceGraph.from_table(mosaic, links, drop_absent=True)
    >>> graph.linked()
    {'rna': 70, 'adt': 70}
    >>> graph.links("adt", "rna").head(2)
         adt      rna  weight  sign
    0    igm     IGHM     1.0   1.0
    1  cd301  CLEC10A     1.0   1.0
    """

    features: Mapping[str, tuple[str, ...]]
    edges: np.ndarray
    weight: np.ndarray
    sign: np.ndarray

    def __post_init__(self) -> None:
        edges = np.asarray(self.edges)
        weight, sign = np.asarray(self.weight, dtype=np.float32), np.asarray(self.sign, dtype=np.float32)
        n = self.n_features
        if edges.ndim != 2 or len(edges) != 2 or edges.shape[1] != len(weight) or weight.shape != sign.shape:
            raise ValueError(
                f"a graph needs two nodes, one weight and one sign per edge; found shapes {edges.shape}, "
                f"{weight.shape} and {sign.shape}"
            )
        if edges.size and (edges.dtype.kind not in "iu" or edges.min() < 0 or edges.max() >= n):
            raise ValueError(
                f"nodes must be integers from 0 to {n - 1}, one per feature; found {edges.min()} to {edges.max()}"
            )
        check_strength(weight, sign)
        edges = np.sort(edges.astype(np.int64), axis=0)
        table = pd.DataFrame({"i": edges[0], "j": edges[1], "weight": weight, "sign": sign})
        table = table[table["i"] != table["j"]]
        table = table.groupby(["i", "j"], as_index=False).agg(
            weight=("weight", "max"), sign=("sign", "first"), signs=("sign", "nunique")
        )
        if (table["signs"] > 1).any():
            names = self.names[table.loc[table["signs"] > 1, ["i", "j"]].to_numpy()[0]]
            raise ValueError(f"the edge between {names[0]!r} and {names[1]!r} has both signs; choose one")
        object.__setattr__(self, "edges", table[["i", "j"]].to_numpy(dtype=np.int64).T)
        object.__setattr__(self, "weight", table["weight"].to_numpy(dtype=np.float32))
        object.__setattr__(self, "sign", table["sign"].to_numpy(dtype=np.float32))
        self._check_links()

    def __repr__(self) -> str:
        counts = ", ".join(f"{n} of {len(self.features[k])} {k} features" for k, n in self.linked().items())
        return f"GuidanceGraph of {self.edges.shape[1]} edges ({int((self.sign < 0).sum())} negative), linking {counts}"

    @property
    def n_features(self) -> int:
        """Number of nodes."""
        return sum(map(len, self.features.values()))

    @property
    def names(self) -> np.ndarray:
        """Name of each node."""
        return np.array([name for names in self.features.values() for name in names], dtype=object)

    @property
    def nodes(self) -> dict[str, slice]:
        """Nodes of each modality."""
        ends = np.cumsum([len(names) for names in self.features.values()]).tolist()
        return {k: slice(end - len(names), end) for (k, names), end in zip(self.features.items(), ends, strict=True)}

    @property
    def modality(self) -> np.ndarray:
        """Number of the modality of each node."""
        return np.repeat(np.arange(len(self.features)), [len(names) for names in self.features.values()])

    def linked(self) -> dict[str, int]:
        """Number of features of each modality that have an edge to another modality."""
        across = self.edges[:, self.modality[self.edges[0]] != self.modality[self.edges[1]]]
        ends = np.unique(across)
        return {name: int(np.isin(ends, np.arange(s.start, s.stop)).sum()) for name, s in self.nodes.items()}

    def links(self, a: str, b: str) -> pd.DataFrame:
        """Edges between two modalities: their features (columns named after the modalities), ``weight``, ``sign``."""
        nodes, names = self.nodes, self.names
        inside = [np.isin(self.edges, np.arange(nodes[k].start, nodes[k].stop)) for k in (a, b)]
        chosen = (inside[0].any(0)) & (inside[1].any(0))
        first = np.where(inside[0][0], self.edges[0], self.edges[1])[chosen]
        second = np.where(inside[0][0], self.edges[1], self.edges[0])[chosen]
        columns = {a: names[first], b: names[second], "weight": self.weight[chosen], "sign": self.sign[chosen]}
        return pd.DataFrame(columns)

    def _check_links(self) -> None:
        ends = self.modality[self.edges]
        n = len(self.features)
        between = coo_array((np.ones(ends.shape[1]), (ends[0], ends[1])), shape=(n, n))
        group = connected_components(between, directed=False)[1]
        names = list(self.features)
        if (group != group[0]).any():
            stray = names[int(np.flatnonzero(group != group[0])[0])]
            raise ValueError(
                f"no edge links modality {stray!r} to {names[0]!r}, directly or through others; add links, e.g. by "
                "equal names, a table of links, or genomic overlap"
            )
        thin = {name: count for name, count in self.linked().items() if count < min(FEW, len(self.features[name]))}
        if thin:
            counts = ", ".join(f"{count} of {len(self.features[name])} {name} features" for name, count in thin.items())
            warnings.warn(f"the guidance graph has few links: it links {counts}", stacklevel=2)

    # Constructors

    @classmethod
    def from_names(cls, data: Mosaic | Schema) -> "GuidanceGraph":
        """Link features with the same name in different modalities.

        Parameters
        ----------
        data
            The registered data, or their schema.

        Raises
        ------
        ValueError
            If modalities have no names in common.
        """
        features = _features(data)
        nodes = pd.Series([f for fs in features.values() for f in fs])
        pairs = [pair for rows in nodes.groupby(nodes).groups.values() for pair in combinations(rows, 2)]
        if not pairs:
            raise ValueError(
                f"the modalities {_words(features)} have no feature names in common; pass links, e.g. as a table"
            )
        return cls(features, np.array(pairs).T, np.ones(len(pairs)), np.ones(len(pairs)))

    @classmethod
    @checked
    def from_table(cls, data: Mosaic | Schema, table: pd.DataFrame, *, drop_absent: bool = False) -> "GuidanceGraph":
        """Link the features in each row of a table.

        Parameters
        ----------
        data
            The registered data, or their schema.
        table
            One column per modality, named after it, with a feature or a sequence of features in each row, or a missing
            value if the row has no feature of that modality. Columns ``weight`` and ``sign`` are optional; both are 1
            by default.
        drop_absent
            Leave out features that the data do not have, instead of refusing the table.

        Raises
        ------
        ValueError
            If a modality has no column, or the data have no such feature.

        Examples
        --------
        >>> import pandas as pd
        >>> from pyromosaic import Mosaic, pbmc_mosaic, protein_gene_links
        >>> from pyromosaic.links import GuidanceGraph
        >>> mosaic = Mosaic.from_mudata(pbmc_mosaic())
        >>> table = protein_gene_links().rename(columns={"gene": "rna", "protein": "adt"})
        >>> GuidanceGraph.from_table(mosaic, table, drop_absent=True)
        GuidanceGraph of 74 edges (0 negative), linking 70 of 500 rna features, 70 of 224 adt features
        """
        features = _features(data)
        columns = [name for name in features if name in table]
        if len(columns) < 2:
            raise ValueError(
                f"a table of links needs a column for each of at least 2 modalities, out of {_words(features)}; "
                f"found the columns {_words(table.columns)}"
            )
        ends, rows = [], []
        for row, entries in enumerate(zip(*(table[name] for name in columns), strict=True)):
            members = [[(name, f) for f in _several(entry)] for name, entry in zip(columns, entries, strict=True)]
            for first, second in combinations(members, 2):
                for pair in product(first, second):
                    ends.append(pair)
                    rows.append(row)
        nodes = _find(features, [end for pair in ends for end in pair], drop_absent).reshape(-1, 2).T
        known = (nodes >= 0).all(axis=0)
        weight, sign = (strengths(table, column)[rows] for column in ("weight", "sign"))
        return cls(features, nodes[:, known], weight[known], sign[known])

    @classmethod
    def from_edges(
        cls,
        data: Mosaic | Schema,
        edges: Sequence[tuple[tuple[str, str], tuple[str, str]]],
        weight: Any = 1.0,
        sign: Any = 1.0,
    ) -> "GuidanceGraph":
        """Make edges one by one, within or between modalities, each with its weight and sign.

        Parameters
        ----------
        data
            The registered data, or their schema.
        edges
            Pairs of ``(modality, feature)``.
        weight, sign
            One number, or one per edge.

        Raises
        ------
        ValueError
            If a feature does not exist, or a weight or sign is out of range.

        Examples
        --------
        >>> import warnings
        >>> from pyromosaic import Mosaic, pbmc_mosaic
        >>> from pyromosaic.links import GuidanceGraph
        >>> mosaic = Mosaic.from_mudata(pbmc_mosaic())
        >>> edges = [(("rna", "CD8A"), ("adt", "cd8")), (("rna", "CD8A"), ("adt", "cd4.1"))]
        >>> with warnings.catch_warnings(action="ignore"):  # these are few
        ...     GuidanceGraph.from_edges(mosaic, edges, weight=[1.0, 0.5], sign=[1, -1])
        GuidanceGraph of 2 edges (1 negative), linking 1 of 500 rna features, 2 of 224 adt features
        """
        features = _features(data)
        nodes = _find(features, [end for edge in edges for end in edge], False).reshape(-1, 2).T
        shape = (len(edges),)
        return cls(features, nodes, np.broadcast_to(weight, shape), np.broadcast_to(sign, shape))

    @classmethod
    def from_data(cls, data: Mosaic | Schema, graph: Any) -> "GuidanceGraph":
        """Use an existing graph of PyTorch Geometric.

        Parameters
        ----------
        data
            The registered data, or their schema.
        graph
            `torch_geometric.data.Data` with ``edge_index``, and ``edge_weight`` and ``edge_sign`` if they are not 1.
            Nodes are the features of the modalities, one modality after the other in the order of the data, unless
            ``<modality>_indices`` assign nodes to the features of a modality.

        Raises
        ------
        ValueError
            If the indices do not fit the features.
        """
        features = _features(data)
        if getattr(graph, "edge_index", None) is None:
            raise ValueError("a graph of PyTorch Geometric needs an edge_index of shape (2, edges); found none")
        edges = np.asarray(graph.edge_index)
        n = sum(map(len, features.values()))
        if graph.num_nodes is not None and graph.num_nodes > n:
            raise ValueError(
                f"the graph has {graph.num_nodes} nodes, but the data have {n} features; it needs one node per feature"
            )
        position = np.arange(n)
        given = {k: np.asarray(i) for k in features if (i := getattr(graph, f"{k}_indices", None)) is not None}
        if len(given) == len(features):
            own = np.concatenate(list(given.values()))
            if not np.array_equal(np.sort(own), position) or any(len(given[k]) != len(features[k]) for k in features):
                raise ValueError(
                    "the indices of the modalities in the graph do not match its nodes: they give "
                    f"{', '.join(f'{len(v)} ({k})' for k, v in given.items())} nodes; accepted: each of 0 to {n - 1} "
                    f"once, {', '.join(f'{len(v)} ({k})' for k, v in features.items())}"
                )
            position = np.argsort(own)
            if edges.size and 0 <= edges.min() and edges.max() < n:
                edges = position[edges]
        weight, sign = (getattr(graph, name, None) for name in ("edge_weight", "edge_sign"))
        ones = np.ones(edges.shape[-1])
        return cls(
            features, edges, ones if weight is None else np.asarray(weight), ones if sign is None else np.asarray(sign)
        )

    @classmethod
    def from_overlap(
        cls, mosaic: Mosaic, modalities: tuple[str, str], genes: pd.DataFrame, promoter: int = 2000
    ) -> "GuidanceGraph":
        """Link a gene to the regions that overlap its body or its promoter.

        Parameters
        ----------
        mosaic
            The data.
        modalities
            The modality of genes, then the modality of regions, whose names are coordinates such as ``chr1:100-200``.
        genes
            Position of each gene, indexed by name, with columns ``chromosome``, ``start``, ``end`` and ``strand``.
        promoter
            Number of bases upstream of a gene that count as its promoter.

        Raises
        ------
        ValueError
            If a column is missing, the name of a region is not a coordinate, or nothing overlaps.
        """
        return cls.from_table(mosaic, links_by_overlap(mosaic, modalities, genes, promoter).pairs)

    @classmethod
    @checked
    def from_matrix(
        cls, data: Mosaic | Schema, a: str, b: str, matrix: Any, *, weighted: bool = False
    ) -> "GuidanceGraph":
        """Link features of two modalities where a matrix is not 0; negative entries are negative links.

        Parameters
        ----------
        data
            The registered data, or their schema.
        a, b
            The modalities of the rows and of the columns, which are in the order of their features.
        matrix
            Dense or sparse, features of `a` × features of `b`; a table is matched by its row and column names.
        weighted
            Whether absolute values are used as weights; otherwise all weights are 1.

        Raises
        ------
        ValueError
            If the shape does not fit.
        """
        features = _features(data)
        if isinstance(matrix, pd.DataFrame):
            rows = in_order(matrix.index, pd.Index(features[a]), "the matrix of links", f"modality {a!r}")
            columns = in_order(matrix.columns, pd.Index(features[b]), "the matrix of links", f"modality {b!r}")
            matrix = matrix.to_numpy()[np.ix_(rows, columns)]
        entries = coo_array(matrix)
        if entries.shape != (len(features[a]), len(features[b])):
            raise ValueError(
                f"the matrix of links has shape {entries.shape}; accepted: {len(features[a])} features of {a!r} × "
                f"{len(features[b])} of {b!r}"
            )
        first = dict(zip(features, np.cumsum([0, *(len(names) for names in features.values())]), strict=False))
        rows, columns = entries.coords
        values = entries.data.astype(float)
        edges = np.stack([rows + first[a], columns + first[b]])[:, values != 0]
        values = values[values != 0]
        return cls(features, edges, np.abs(values) if weighted else np.ones(len(values)), np.sign(values))

    @classmethod
    def from_linkage(cls, data: Mosaic | Schema, linkage: Any, level: float = 0.05) -> "GuidanceGraph":
        """Link features of two modalities that correlate beyond chance over cells matched without known links.

        Parameters
        ----------
        data
            The registered data, or their schema.
        linkage
            The `pyromosaic.linkage.Linkage` from `cca`.
        level
            See `pyromosaic.linkage.Linkage.feature_links`; the weight of an edge is the absolute correlation.
        """
        table = linkage.feature_links(level)
        size = table["correlation"].abs().clip(1e-6, 1.0)
        return cls.from_table(data, table.assign(weight=size, sign=np.sign(table["correlation"])))

    def merge(self, other: "GuidanceGraph") -> "GuidanceGraph":
        """The edges of both graphs; an edge in both keeps the larger weight."""
        if self.features != other.features:
            raise ValueError("graphs with different features cannot be merged; build both from the same data")
        both = ((self.edges, other.edges), (self.weight, other.weight), (self.sign, other.sign))
        return GuidanceGraph(self.features, *(np.concatenate(parts, axis=-1) for parts in both))

    # Saving

    def to_json(self) -> dict[str, list[Any]]:
        """Edges, weights and signs as plain lists; the names of features are in the schema."""
        return {"edges": self.edges.tolist(), "weight": self.weight.tolist(), "sign": self.sign.tolist()}

    @classmethod
    def of(cls, graph: Any, data: Mosaic | Schema) -> "GuidanceGraph":
        """Make a graph from any of the forms that a model accepts.

        Parameters
        ----------
        graph
            A `GuidanceGraph`, `Links`, a table for `from_table`, the output of `to_json`, a
            `torch_geometric.data.Data`, or None for `from_names`.
        data
            The registered data, or their schema.

        Raises
        ------
        ValueError
            If it is none of these or does not fit the data.
        """
        if graph is None:
            return cls.from_names(data)
        if isinstance(graph, pd.DataFrame | Links):
            return cls.from_table(data, graph.pairs if isinstance(graph, Links) else graph)
        if isinstance(graph, Mapping) and set(graph) == {"edges", "weight", "sign"}:
            edges = np.array(graph["edges"], dtype=np.int64).reshape(2, -1)
            with warnings.catch_warnings(action="ignore"):  # the user was warned when the graph was made
                return cls(_features(data), edges, np.array(graph["weight"]), np.array(graph["sign"]))
        if hasattr(graph, "edge_index"):
            return cls.from_data(data, graph)
        if not isinstance(graph, cls):
            raise ValueError(
                "graph must be a GuidanceGraph, Links, pandas.DataFrame or torch_geometric.data.Data, or None for "
                f"equal names; found a {type(graph).__name__}"
            )
        if graph.features != _features(data):
            raise ValueError("the guidance graph was made for other features; build it from the data of the model")
        return graph


def links_of(links: pd.DataFrame | Links | GuidanceGraph, mosaic: Mosaic, modalities: tuple[str, str]) -> Links:
    """The links of two modalities, given in any form; raises as `links_from_table` does."""
    if isinstance(links, Links):
        return links
    return links_from_table(mosaic, modalities, links if isinstance(links, pd.DataFrame) else links.links(*modalities))


def _features(data: Mosaic | Schema) -> dict[str, tuple[str, ...]]:
    modalities = (data.schema if isinstance(data, Mosaic) else data).modalities
    if len(modalities) < 2:
        raise ValueError(f"a guidance graph needs at least 2 modalities; found {_words(modalities)}")
    return {name: m.features for name, m in modalities.items()}


def _several(entry: Any) -> list[str]:
    """The features in one entry of a table."""
    if isinstance(entry, str):
        return [entry]
    if isinstance(entry, Iterable):
        return [str(feature) for feature in entry]
    return [] if pd.isna(entry) else [str(entry)]


def _find(features: Mapping[str, tuple[str, ...]], ends: list[tuple[str, str]], drop_absent: bool) -> np.ndarray:
    """Nodes of ``(modality, feature)`` pairs; -1 for absent features, if these are to be dropped."""
    node = {(k, f): i for i, (k, f) in enumerate((k, f) for k, names in features.items() for f in names)}
    nodes = np.array([node.get((modality, str(feature)), -1) for modality, feature in ends], dtype=np.int64)
    if (nodes < 0).any() and not drop_absent:
        absent = list(dict.fromkeys(end for end, found in zip(ends, nodes >= 0, strict=True) if not found))
        shown = ", ".join(f"{feature!r} ({modality})" for modality, feature in absent[:3])
        raise ValueError(
            f"{len(absent)} features of the links are not in the data: {shown}{', …' if len(absent) > 3 else ''}; "
            "leave them out, e.g. with drop_absent=True in GuidanceGraph.from_table"
        )
    return nodes


def _words(names: Iterable[Any]) -> str:
    return ", ".join(map(repr, names)) or "none"
