"""The mosaic: cells × modalities with holes, registered once and checked before anything is trained."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import pandas as pd

from pyromosaic.accepted import Column, checked
from pyromosaic.data.barcodes import warn_of_barcodes
from pyromosaic.data.cohorts import Cohorts, from_cells, from_column
from pyromosaic.data.panel_sources import grouping, suggested
from pyromosaic.data.spec import ModalitySpec, Schema
from pyromosaic.data.tables import (
    WHOLE,
    Table,
    contradictions,
    find,
    look_up,
    readings,
    warn_of,
    warn_of_not_known,
    words,
)

if TYPE_CHECKING:
    from anndata import AnnData
    from mudata import MuData
from pyromosaic.data.modality import Modality
from pyromosaic.data.registration import (
    _check_new_batches,
    _check_vocabularies,
    _columns,
    _columns_of,
    _modality,
    _specifications,
    _with_batches,
    not_empty,
    unlabelled,
)
from pyromosaic.data.sources import _absent, _block, _check_source, _obs, _source, _words
from pyromosaic.shown import as_html

NewBatches = Literal["refuse", "average", "add"]


@dataclass
class Mosaic:
    """Cells × modalities with holes.

    Make one with `from_mudata`, `from_anndata` or `from_obsm`. A mosaic refers to the user's matrices, without dense
    copies, and changes nothing in the user's objects.

    Parameters
    ----------
    obs_names
        Names of the N cells: all cells that have at least one modality.
    modalities
        The registered modalities, by name.
    tables
        The user's `obs` tables: of the whole MuData, and of each modality.
    cohorts
        Background and target groups, see `with_cohorts`; None without cohorts.
    groups
        Group number of each cell, shape (N,): 0 background, 1, 2, … target groups, -1 neither; None without cohorts.

    Examples
    --------
    >>> import anndata, numpy as np, pandas as pd
    >>> from pyromosaic import Mosaic
    >>> names = [f"cell{i}" for i in range(6)]
    >>> def counts(cells, width):
    ...     obs = pd.DataFrame({"batch": "a"}, index=cells)
    ...     return anndata.AnnData(np.ones((len(cells), width), np.float32), obs=obs)
    >>> mosaic = Mosaic.from_anndata(
    ...     {"rna": counts(names[:4], 3), "adt": counts(names[2:], 2)}, match_cells=True, batch_key="batch"
    ... )
    >>> mosaic
    Mosaic of 6 cells
      rna: 4 cells × 3 features, nb, batch 'batch' (1)
      adt: 4 cells × 2 features, nb_mixture, batch 'batch' (1)
    """

    made_by: ClassVar[str] = " (register the data: Mosaic.from_mudata, from_anndata, or model.register)"

    obs_names: pd.Index
    modalities: dict[str, Modality] = field(repr=False)
    tables: tuple[Table, ...] = field(default=(), repr=False)
    cohorts: Cohorts | None = field(default=None, repr=False)
    groups: np.ndarray | None = field(default=None, repr=False)

    def __repr__(self) -> str:
        lines = [f"Mosaic of {self.n_cells} cells"]
        for name, m in self.modalities.items():
            line = f"  {name}: {m.present.sum()} cells × {m.schema.n_features} features, {m.spec.likelihood_name}"
            if m.spec.batch_key:
                line += f", batch {m.spec.batch_key!r} ({m.n_categories[0]})"
            if m.panels is not None:
                line += f", panels of {_range(m.panels.masks.sum(axis=1))} features"
            lines.append(line)
        if self.cohorts is not None and self.groups is not None:
            sizes = (f"{name!r} ({np.sum(self.groups == i)} cells)" for i, name in enumerate(self.cohorts.names))
            lines.append(f"  background {' against '.join(sizes)}")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        columns = ["modality", "cells", "features", "likelihood", "batches", "labels"]
        rows = [
            [name, m.present.sum(), m.schema.n_features, m.spec.likelihood_name, *_counted(m)]
            for name, m in self.modalities.items()
        ]
        patterns = [f"{n} {pattern}" for pattern, n in self.patterns.value_counts().items()]
        some = patterns[:8] + ["…"] * (len(patterns) > 8)
        title = f"Mosaic of {self.n_cells} cells"
        if self.cohorts is not None:
            title += f", background {' against '.join(map(repr, self.cohorts.names))}"
        return as_html(title, columns, rows, f"cells by modalities: {', '.join(some)}")

    @property
    def n_cells(self) -> int:
        """Number of cells with at least one modality."""
        return len(self.obs_names)

    @property
    def presence(self) -> pd.DataFrame:
        """Which cells have which modality: cells × modalities, boolean."""
        return pd.DataFrame({k: m.present for k, m in self.modalities.items()}, index=self.obs_names)

    @property
    def patterns(self) -> pd.Series:
        """The modalities of each cell, joined by ``"+"``, e.g. ``"rna+adt"``."""
        names = np.array(list(self.modalities))
        present = self.presence.to_numpy()
        codes = present @ (1 << np.arange(len(names)))
        unique, inverse = np.unique(codes, return_inverse=True)
        words = np.array(["+".join(names[(code >> np.arange(len(names))) & 1 == 1]) for code in unique])
        return pd.Series(words[inverse], index=self.obs_names, dtype="category")

    @property
    def schema(self) -> Schema:
        """What a model remembers of this mosaic."""
        return Schema({name: m.schema for name, m in self.modalities.items()}, self.cohorts)

    def labels(self) -> pd.Series:
        """The label of each cell, from the first modality that has one; missing if none has."""
        labels = np.full(self.n_cells, None, dtype=object)
        for m in self.modalities.values():
            known = (m.labels >= 0) & pd.isna(labels)
            labels[known] = np.array(m.schema.labels, dtype=object)[m.labels[known]]
        return pd.Series(labels, index=self.obs_names, dtype="category")

    @checked
    def column(self, key: Column) -> pd.Series:
        """A column of the user's `obs` for every cell, from the first table that has a value; missing if none has.

        The tables of the modalities come first, in their order, then that of the whole MuData. The value
        `ModalitySpec.unlabelled` of labels counts as missing.

        Parameters
        ----------
        key
            Name of the column, which may have been added after registration; ``"rna:batch"`` for the column
            ``"batch"`` of modality ``"rna"``.

        Raises
        ------
        ValueError
            If no table has such a column.

        Warns
        -----
        UserWarning
            If two tables have different values for a cell.
        """
        found = readings(self.tables, key, self.obs_names, self._unlabelled(key))
        warn_of(contradictions(found))
        column = look_up(found)
        if column is None:
            raise ValueError(f"no obs has a column {key!r}; there are {_columns_of(self.tables, self.tables)}")
        return column

    @checked
    def has_column(self, key: Column) -> bool:
        """Whether any of the user's tables has this column."""
        return bool(readings(self.tables, key, self.obs_names))

    @checked
    def words(self, key: Column) -> pd.Series:
        """A column as the strings by which cells are grouped; missing where `column` is missing.

        Parameters
        ----------
        key
            As for `column`.

        Warns
        -----
        UserWarning
            If a value usually means "not known" and was not named as `unlabelled` at registration.
        """
        column = words(self.column(key))
        warn_of_not_known(column, f"column {key!r}")
        return column

    def _unlabelled(self, key: str) -> set[str]:
        """The values of a column that mean "not known", as given at registration."""
        return unlabelled({name: m.spec for name, m in self.modalities.items()}, key)

    @checked
    def with_cohorts(self, key: Column | None = None, *, background: Any, target: Any = None) -> "Mosaic":
        """The same mosaic with its cells divided into a background cohort and one or several target groups.

        Parameters
        ----------
        key
            Column of `obs` with the condition of each cell; None to give the cells themselves.
        background
            Value or values of the column; without `key`, cells, given by names, numbers or a mask.
        target
            Value or values of the column, each of which is a group; by default all other values. Without `key`, cells,
            or a dictionary from names of groups to their cells. Cells of neither cohort are not used in training.

        Raises
        ------
        ValueError
            If a cohort is empty or does not exist, or cohorts overlap.

        Examples
        --------
        >>> import anndata, numpy as np, pandas as pd
        >>> from pyromosaic import Mosaic
        >>> obs = pd.DataFrame({"condition": ["ctrl", "ctrl", "stim"]}, index=["a", "b", "c"])
        >>> mosaic = Mosaic.from_anndata({"rna": anndata.AnnData(np.ones((3, 4), np.float32), obs=obs)})
        >>> mosaic.with_cohorts("condition", background="ctrl")
        Mosaic of 3 cells
          rna: 3 cells × 4 features, nb
          background 'ctrl' (2 cells) against 'stim' (1 cells)
        """
        if key is not None:
            cohorts, groups = from_column(self, key, background, target)
        else:
            cohorts, groups = from_cells(self, background, target)
        return replace(self, cohorts=cohorts, groups=groups)

    @checked
    def suggested_panels(self, modality: str, key: Column | None = None) -> pd.DataFrame:
        """A table of panels to look at, and to pass as `panels` at registration.

        Parameters
        ----------
        modality
            The modality.
        key
            Column of `obs` with groups of cells; the batches by default.

        Returns
        -------
        pandas.DataFrame
            Groups × features: False where a feature is 0 in all cells of a group, which would be too unlikely by chance
            given how often it is not 0 in other groups; and where it is known not to have been measured.
        """
        found = self.modalities[modality]
        key = found.spec.batch_key if key is None else key
        if key is None:
            raise ValueError(f"modality {modality!r} has no batch_key; name a column of obs with groups of cells")
        return suggested(found, self.words(key))

    def find(self, cells: Sequence[str] | np.ndarray | pd.Index | pd.Series | None) -> np.ndarray:
        """Numbers of cells, given by names, by numbers or by a mask (None: all).

        A pandas mask is matched by the names in its index, in any order; cells that are not in the index are left out.
        An array has no names; its entries are matched by position.

        Raises
        ------
        ValueError
            If a cell is not in the mosaic, or none is given.
        """
        if cells is None:
            return np.arange(self.n_cells)
        return find(self.obs_names, cells, "cell", "the mosaic")

    @classmethod
    @checked
    def from_mudata(
        cls,
        mdata: "MuData",
        modalities: Mapping[str, ModalitySpec | str | type] | None = None,
        *,
        schema: Schema | None = None,
        new_batches: NewBatches = "refuse",
        panels: Mapping[str, pd.DataFrame] | None = None,
        **shared: Any,
    ) -> "Mosaic":
        """Register a MuData as it is: a cell that is missing from a modality is a hole.

        Parameters
        ----------
        mdata
            The data. Columns are looked up in the `obs` of the modality, then in those of other modalities, then in
            `mdata.obs`.
        modalities
            The modalities to use, each with a `ModalitySpec` or the name of its likelihood. By default, all modalities
            are used, with a likelihood that depends on their name (``"rna"``: ``"nb"``, ``"atac"``: ``"bernoulli"``,
            ``"adt"`` and ``"protein"``: ``"nb_mixture"``).
        schema
            The schema of a trained model. The data are checked against it, and features are put in its order. A
            modality of the model may be missing from the data.
        new_batches
            What to do with batches that the schema does not have: ``"refuse"`` raises an error; ``"average"`` treats
            them as the average of its batches; ``"add"`` adds them to the schema of the mosaic, see
            `MosaicModel.adapt`.
        panels
            For some modalities, a table of batches × features that is True where a feature was measured; features
            without a column were measured everywhere. If the index has the name of another column of `obs`, the rows
            are the groups of that column. Without a table, a feature that is NaN in all cells of a batch was not
            measured there. See `suggested_panels`.
        **shared
            Fields of `ModalitySpec`, e.g. ``batch_key="batch"``, for all modalities given by the name of a likelihood.

        Raises
        ------
        ValueError
            If the data cannot be used. The message names the modality, column, cell or feature.
        """
        if not isinstance(getattr(mdata, "mod", None), Mapping):
            raise ValueError(
                f"mdata must be a MuData; found a {type(mdata).__name__}. For one AnnData per modality, use "
                'from_anndata({"rna": adata}); mudata.read_h5mu reads a file'
            )
        sources = {name: lambda spec, n=name, a=adata: _source(n, a, spec) for name, adata in mdata.mod.items()}
        warn_of_barcodes({name: adata.obs_names for name, adata in mdata.mod.items()})
        return cls._register(sources, modalities, schema, shared, mdata.obs, new_batches, panels)

    @classmethod
    @checked
    def from_anndata(
        cls,
        adatas: "Mapping[str, AnnData | Sequence[AnnData]]",
        modalities: Mapping[str, ModalitySpec | str | type] | None = None,
        *,
        match_cells: bool = False,
        schema: Schema | None = None,
        new_batches: NewBatches = "refuse",
        panels: Mapping[str, pd.DataFrame] | None = None,
        **shared: Any,
    ) -> "Mosaic":
        """Register one AnnData per modality.

        Parameters
        ----------
        adatas
            The data of each modality, by its name: an AnnData, or a list of AnnData of different cells, which may have
            other features. A feature that one of them lacks was not measured in its cells.
        match_cells
            Whether rows of the same name are the same cell. If not, every row is a separate cell; if a name occurs in
            two modalities, all cells are named ``"modality:name"``.
        modalities, schema, new_batches, panels, **shared
            As in `from_mudata`.

        Raises
        ------
        ValueError
            If the data cannot be used. The message names the modality, column, cell or feature.
        """
        lists: dict[str, list[Any]] = (
            {k: list(v) if isinstance(v, list | tuple) else [v] for k, v in adatas.items()}
            if isinstance(adatas, Mapping)
            else {}
        )
        each = [adata for part in lists.values() for adata in part]
        if not isinstance(adatas, Mapping) or not all(hasattr(a, "obs_names") for a in each) or [] in lists.values():
            raise ValueError(
                'adatas must be a dictionary from modality to AnnData, e.g. {"rna": adata}; found a '
                + (type(adatas).__name__ if not isinstance(adatas, Mapping) else "dictionary with other values")
            )
        names = pd.Index(np.concatenate([np.asarray(a.obs_names) for a in each])) if each else pd.Index([])
        prefix = not match_cells and names.has_duplicates
        if match_cells:
            warn_of_barcodes({k: pd.Index(np.concatenate([a.obs_names for a in part])) for k, part in lists.items()})
        sources = {
            name: lambda spec, n=name, a=adata: _source(n, a, spec, f"{n}:" if prefix else "")
            for name, adata in adatas.items()
        }
        return cls._register(sources, modalities, schema, shared, None, new_batches, panels)

    @classmethod
    @checked
    def from_obsm(
        cls,
        adata: "AnnData",
        blocks: Mapping[str, str | None],
        modalities: Mapping[str, ModalitySpec | str | type] | None = None,
        *,
        schema: Schema | None = None,
        new_batches: NewBatches = "refuse",
        panels: Mapping[str, pd.DataFrame] | None = None,
        **shared: Any,
    ) -> "Mosaic":
        """Register one AnnData whose `X` is one modality and whose `obsm` has the others.

        Parameters
        ----------
        adata
            The data.
        blocks
            For each modality, the key in `obsm`, or None for `X`. A row of which all values are missing (NaN) is a
            hole. Features are named by the columns of a DataFrame, or else ``"modality_0"``, ``"modality_1"``, …
        modalities, schema, new_batches, panels, **shared
            As in `from_mudata`.

        Raises
        ------
        ValueError
            If the data cannot be used. The message names the modality, column, cell or feature.
        """
        if not hasattr(adata, "obsm") or hasattr(adata, "mod"):
            raise ValueError(f"adata must be an AnnData; found a {type(adata).__name__}")
        obs = _obs(next(iter(blocks), ""), adata)

        sources = {name: lambda spec, n=name, k=key: _block(n, k, adata, obs, spec) for name, key in blocks.items()}
        return cls._register(sources, modalities, schema, shared, obs, new_batches, panels)

    @classmethod
    def _register(
        cls,
        sources: Mapping[str, Any],
        modalities: Mapping[str, ModalitySpec | str | type] | None,
        schema: Schema | None,
        shared: Mapping[str, Any],
        obs: pd.DataFrame | None,
        new_batches: str,
        panels: Mapping[str, pd.DataFrame] | None,
    ) -> "Mosaic":
        if schema is None and new_batches != "refuse":
            raise ValueError(f"new_batches={new_batches!r} needs the schema of a trained model; see model.register")
        specs = _specifications(list(sources), modalities, schema, shared)
        known = {} if schema is None else schema.modalities
        read = {name: sources[name](spec) for name, spec in specs.items() if name in sources}
        if known:  # a selection of cells may have no cell with a modality of the model
            read = {name: source for name, source in read.items() if len(source.cells)}
            if not read:
                raise ValueError("the data have no cell; register at least one")
        for name, source in read.items():
            _check_source(name, source, obs)
        for name, source in read.items():
            if specs[name].empty_cells == "holes":
                found = not_empty(source.matrix)
                source.measured = found if source.measured is None else source.measured & found
                if not source.measured.any():
                    raise ValueError(f"modality {name!r}: all values of all cells are 0; leave the modality out")
        present = [s.cells if s.measured is None else s.cells[s.measured] for s in read.values()]
        cells = pd.Index(np.concatenate([np.asarray(c) for c in present])).unique()
        if obs is not None:
            lost = ~obs.index.isin(cells)
            if lost.any() and sources.keys() <= specs.keys():
                raise ValueError(
                    f"cell {obs.index[lost][0]!r} has no modality; remove it, or give it one of {_words(sources)}"
                )
            cells = obs.index[~lost]  # without cells of modalities that were left out on purpose
        absent = {name: _absent(known[name]) for name in specs if name not in read}
        read |= absent
        whole = () if obs is None else (Table(WHOLE, obs.index, obs),)
        tables = (*whole, *(Table(name, source.cells, source.obs) for name, source in read.items()))
        columns = _columns(specs, tables, cells, absent)
        if known and new_batches != "refuse":
            _check_new_batches(known, columns)
        if new_batches == "add":
            known = {name: _with_batches(m, read[name].cells, columns[name]) for name, m in known.items()}
        average = new_batches == "average"
        for name in panels or {}:
            if name not in specs:
                raise ValueError(f"there is no modality {name!r}, of which panels are given; found {_words(specs)}")
        registered = {}
        for name, spec in specs.items():
            given = panels.get(name) if panels else None
            by = grouping(name, spec, tables, cells, given, known.get(name))
            n_old = len(schema[name].categories.get(spec.batch_key or "", ())) if schema else 0
            registered[name] = _modality(
                name, spec, read[name], cells, columns[name], known.get(name), average, n_old, by, given
            )
        if schema is None:
            _check_vocabularies(registered)
        mosaic = cls(cells, registered, tables)
        if schema is not None and schema.cohorts is not None:
            return replace(mosaic, cohorts=schema.cohorts, groups=schema.cohorts.codes(mosaic))
        return mosaic


def _range(numbers: np.ndarray) -> str:
    """The smallest and the largest number, for a message."""
    return " to ".join(map(str, np.unique([numbers.min(), numbers.max()])))


def _counted(modality: Modality) -> tuple[str, str]:
    """How many batches and labels a modality has, and in which columns."""
    spec, schema = modality.spec, modality.schema
    batches = f"{len(schema.categories[spec.batch_key])} ({spec.batch_key})" if spec.batch_key else ""
    return batches, f"{len(schema.labels)} ({spec.label_key})" if spec.label_key else ""
