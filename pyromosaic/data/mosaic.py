"""The mosaic: cells × modalities with holes, registered once and checked before anything is trained."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch

from pyromosaic.data.cohorts import Cohorts, from_cells, from_column
from pyromosaic.data.matrix import DENSE_ABOVE, Matrix, check_values, is_readable
from pyromosaic.data.spec import DATA_KINDS, LIKELIHOOD_BY_NAME, ModalitySchema, ModalitySpec, Schema
from pyromosaic.data.tables import WHOLE, Table, codes, look_up, words

if TYPE_CHECKING:
    from anndata import AnnData
    from mudata import MuData

ENTRIES_FOR_START = 5_000_000  # entries, of at most 10,000 cells, from which start values are computed


@dataclass
class _Source:
    """One modality as it came: measurements, names, and the cells' columns."""

    matrix: Any
    cells: pd.Index
    features: pd.Index
    obs: pd.DataFrame
    measured: np.ndarray | None = None  # rows that are not holes; None for all
    exposures: Any = None


@dataclass
class Modality:
    """One registered modality of a mosaic of N cells.

    Parameters
    ----------
    name
        Its name.
    schema
        What a model remembers of it.
    matrix
        Its measurements, read by rows.
    rows
        Row of each cell in `matrix`, shape (N,); -1 where the cell has no such measurement.
    codes
        Category numbers, batch first, shape (N, categorical columns); -1 where unknown.
    continuous
        Standardised continuous covariates, shape (N, columns); 0, the mean, where unknown.
    library
        Size of each cell in counts, shape (N,); NaN where unmeasured.
    labels
        Label numbers, shape (N,); -1 where unknown.
    dense
        Whether minibatches are strided tensors rather than sparse ones.
    exposures
        What each measurement was made out of, rows as in `matrix`; None if the likelihood needs no such thing.

    Examples
    --------
    >>> from pyromosaic import Mosaic, simulate
    >>> adt = Mosaic.from_mudata(simulate(90, {"rna": 50, "adt": 5})[0]).modalities["adt"]
    >>> cells = np.flatnonzero(adt.present)
    >>> len(cells), adt.tensor(cells[:3]).shape
    (60, torch.Size([3, 5]))
    """

    name: str
    schema: ModalitySchema
    matrix: Matrix
    rows: np.ndarray
    codes: np.ndarray
    continuous: np.ndarray
    library: np.ndarray
    labels: np.ndarray
    dense: bool
    exposures: Matrix | None = None

    @property
    def spec(self) -> ModalitySpec:
        """The user's specification."""
        return self.schema.spec

    @property
    def n_categories(self) -> tuple[int, ...]:
        """Number of categories of each categorical column."""
        return tuple(len(c) for c in self.schema.categories.values())

    @property
    def present(self) -> np.ndarray:
        """Which cells have the modality, shape (N,), boolean."""
        return self.rows >= 0

    def tensor(self, cells: np.ndarray) -> torch.Tensor:
        """Measurements of cells that have the modality, shape (len(cells), features)."""
        return self.matrix.tensor(self.rows[cells], self.dense)

    def exposure(self, cells: np.ndarray) -> torch.Tensor | None:
        """What each measurement was made out of, shape (len(cells), features), the median where there is none."""
        if self.exposures is None:
            return None
        exposure = torch.full((len(cells), self.schema.n_features), self.schema.exposure)
        has = self.rows[cells] >= 0
        if has.any():
            exposure[torch.from_numpy(has)] = self.exposures.tensor(self.rows[cells][has], dense=True)
        return exposure

    def take(self, cells: np.ndarray) -> "Modality":
        """The modality of a mosaic of these cells, with the same matrix."""
        columns = ("rows", "codes", "continuous", "library", "labels")
        return replace(self, **{name: getattr(self, name)[cells] for name in columns})

    def read(self, cells: np.ndarray) -> Any:
        """Measurements of cells that have the modality, as a CSR matrix or a NumPy array."""
        return self.matrix[self.rows[cells]]

    def sample(self, seed: int = 0) -> np.ndarray:
        """Numbers of some cells that have the modality, few enough to be dense in memory, for start values."""
        cells = np.flatnonzero(self.present)
        n = min(10_000, max(500, ENTRIES_FOR_START // self.schema.n_features))
        if len(cells) > n:
            cells = np.sort(np.random.default_rng(seed).choice(cells, n, replace=False))
        return cells


@dataclass
class Mosaic:
    """Cells × modalities with holes.

    Made by `from_mudata`, `from_anndata` or `from_obsm`. Holds references to the user's matrices (never dense copies)
    and changes nothing in the user's objects.

    Parameters
    ----------
    obs_names
        Names of the N cells: all cells that have at least one modality.
    modalities
        The registered modalities, by name.
    tables
        The user's `obs` tables, of the whole and of each modality.
    cohorts
        Background and target groups, see `with_cohorts`; None if there are none.
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
            lines.append(line)
        if self.cohorts is not None and self.groups is not None:
            sizes = (f"{name!r} ({np.sum(self.groups == i)} cells)" for i, name in enumerate(self.cohorts.names))
            lines.append(f"  background {' against '.join(sizes)}")
        return "\n".join(lines)

    @property
    def n_cells(self) -> int:
        """Number of cells with at least one modality."""
        return len(self.obs_names)

    @property
    def presence(self) -> pd.DataFrame:
        """Which cell has which modality: cells × modalities, boolean."""
        return pd.DataFrame({k: m.present for k, m in self.modalities.items()}, index=self.obs_names)

    @property
    def patterns(self) -> pd.Series:
        """The modalities of each cell joined by ``"+"``, ``"rna+adt"`` say."""
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
        """The label of each cell, from the first modality that knows it; missing where none does."""
        labels = np.full(self.n_cells, None, dtype=object)
        for m in self.modalities.values():
            known = (m.labels >= 0) & pd.isna(labels)
            labels[known] = np.array(m.schema.labels, dtype=object)[m.labels[known]]
        return pd.Series(labels, index=self.obs_names, dtype="category")

    def column(self, key: str) -> pd.Series:
        """A column of the user's `obs` for every cell, from the first table that knows it; missing where none does.

        Parameters
        ----------
        key
            Name of the column, which may have been added after registration; ``"rna:batch"`` for the column
            ``"batch"`` of modality ``"rna"``.

        Raises
        ------
        ValueError
            If no table has such a column.
        """
        column = look_up(self.tables, key, self.obs_names)
        if column is None:
            raise ValueError(f"no obs has a column {key!r}; there are {_columns_of(self.tables, self.tables)}")
        return column

    def with_cohorts(self, key: str | None = None, *, background: Any, target: Any = None) -> "Mosaic":
        """The same mosaic with its cells divided into a background cohort and one or several target groups.

        Parameters
        ----------
        key
            Column of `obs` that tells conditions apart; None if cells are given one by one.
        background
            Value or values of the column; without `key`, cells by names, numbers or a mask.
        target
            Value or values of the column, each a group; by default all others. Without `key`, cells, or a dictionary
            from a group's name to its cells. Cells of neither cohort take no part in training.

        Raises
        ------
        ValueError
            If a cohort is empty or not there, or cohorts overlap.

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

    def find(self, cells: Sequence[str] | np.ndarray | pd.Index | None) -> np.ndarray:
        """Numbers of cells, given by names, by numbers or by a mask (None: all).

        Raises
        ------
        ValueError
            If a cell is not in the mosaic, or none is given.
        """
        if cells is None:
            return np.arange(self.n_cells)
        wanted = np.atleast_1d(cells)
        if wanted.size == 0:
            raise ValueError("no cell was asked for; give names, numbers or a mask with at least one cell")
        if wanted.dtype == bool:
            if wanted.shape != (self.n_cells,):
                raise ValueError(f"the mask has shape {wanted.shape}; the mosaic has {self.n_cells} cells")
            if not wanted.any():
                raise ValueError("no cell was asked for; give names, numbers or a mask with at least one cell")
            return np.flatnonzero(wanted)
        if np.issubdtype(wanted.dtype, np.integer):
            if wanted.min() < 0 or wanted.max() >= self.n_cells:
                raise ValueError(
                    f"cell numbers run from 0 to {self.n_cells - 1}; found {wanted.min()} to {wanted.max()}"
                )
            return wanted.astype(np.int64)
        numbers = self.obs_names.get_indexer(pd.Index(wanted))
        if (numbers < 0).any():
            raise ValueError(f"cell {str(wanted[numbers < 0][0])!r} is not in the mosaic")
        return numbers.astype(np.int64)

    @classmethod
    def from_mudata(
        cls,
        mdata: "MuData",
        modalities: Mapping[str, ModalitySpec | str] | None = None,
        *,
        schema: Schema | None = None,
        new_batches: str = "refuse",
        **shared: Any,
    ) -> "Mosaic":
        """Read a MuData as it is: a cell that is missing from a modality is a hole.

        Parameters
        ----------
        mdata
            The data. Columns are looked up in the modality's `obs`, then in `mdata.obs`.
        modalities
            The modalities to use, each with a `ModalitySpec` or the name of its likelihood. By default all of them,
            with the likelihood that goes with their name (``"rna"``: ``"nb"``, ``"atac"``: ``"bernoulli"``,
            ``"adt"`` and ``"protein"``: ``"nb_mixture"``).
        schema
            The schema of a trained model; the data are then checked against it and features put in its order. One of
            the model's modalities may be missing: no cell has it then.
        new_batches
            What becomes of batches that the schema does not know: ``"refuse"``; ``"average"``, they are treated as an
            average of those it knows; ``"add"``, the schema of the mosaic knows them, see `MosaicModel.adapt`.
        **shared
            Fields of `ModalitySpec` for all modalities given by a likelihood's name, ``batch_key="batch"`` say.

        Raises
        ------
        ValueError
            With one sentence that names the modality, column, cell or feature at fault.
        """
        sources = {name: lambda spec, n=name, a=adata: _source(n, a, spec) for name, adata in mdata.mod.items()}
        return cls._register(sources, modalities, schema, shared, mdata.obs, new_batches)

    @classmethod
    def from_anndata(
        cls,
        adatas: Mapping[str, "AnnData"],
        modalities: Mapping[str, ModalitySpec | str] | None = None,
        *,
        match_cells: bool = False,
        schema: Schema | None = None,
        new_batches: str = "refuse",
        **shared: Any,
    ) -> "Mosaic":
        """Read one AnnData a modality.

        Parameters
        ----------
        adatas
            The data by modality.
        match_cells
            Whether cells of the same name are the same cell. If not, every row is a cell of its own; should a name
            occur in two modalities, cells are named ``"modality:name"``.
        modalities, schema, new_batches, **shared
            As in `from_mudata`.

        Raises
        ------
        ValueError
            With one sentence that names the modality, column, cell or feature at fault.
        """
        names = pd.Index(np.concatenate([np.asarray(a.obs_names) for a in adatas.values()])) if adatas else pd.Index([])
        prefix = not match_cells and names.has_duplicates
        sources = {
            name: lambda spec, n=name, a=adata: _source(n, a, spec, f"{n}:" if prefix else "")
            for name, adata in adatas.items()
        }
        return cls._register(sources, modalities, schema, shared, None, new_batches)

    @classmethod
    def from_obsm(
        cls,
        adata: "AnnData",
        blocks: Mapping[str, str | None],
        modalities: Mapping[str, ModalitySpec | str] | None = None,
        *,
        schema: Schema | None = None,
        new_batches: str = "refuse",
        **shared: Any,
    ) -> "Mosaic":
        """Read one AnnData whose `X` is one modality and whose `obsm` holds the others.

        Parameters
        ----------
        adata
            The data.
        blocks
            For each modality the key in `obsm`, or None for `X`. A row that is missing (NaN) throughout is a hole.
            Feature names are the columns of a DataFrame, else ``"modality_0"``, ``"modality_1"``, …
        modalities, schema, new_batches, **shared
            As in `from_mudata`.

        Raises
        ------
        ValueError
            With one sentence that names the modality, column, cell or feature at fault.
        """
        obs = _obs(next(iter(blocks), ""), adata)

        def block(name: str, key: str | None, spec: ModalitySpec) -> _Source:
            if key is None:
                source = _source(name, adata, spec)
            elif key not in adata.obsm:
                raise ValueError(f"modality {name!r}: obsm has no key {key!r}; it has {_words(adata.obsm.keys())}")
            elif (layer := spec.layer or spec.exposure_layer) is not None:
                raise ValueError(f"modality {name!r}: a block of obsm has no layer, but its ModalitySpec has {layer!r}")
            else:
                values: Any = adata.obsm[key]
                features = pd.Index([f"{name}_{i}" for i in range(values.shape[1])])
                if isinstance(values, pd.DataFrame):
                    values, features = values.to_numpy(), values.columns.astype(str)
                source = _Source(values, adata.obs_names, features, obs)
            if isinstance(source.matrix, np.ndarray):
                source.measured = pd.DataFrame(source.matrix).notna().any(axis=1).to_numpy()
            return source

        sources = {name: lambda spec, n=name, k=key: block(n, k, spec) for name, key in blocks.items()}
        return cls._register(sources, modalities, schema, shared, obs, new_batches)

    @classmethod
    def _register(
        cls,
        sources: Mapping[str, Any],
        modalities: Mapping[str, ModalitySpec | str] | None,
        schema: Schema | None,
        shared: Mapping[str, Any],
        obs: pd.DataFrame | None,
        new_batches: str,
    ) -> "Mosaic":
        if new_batches not in ("refuse", "average", "add"):
            raise ValueError(f'new_batches is "refuse", "average" or "add"; found {new_batches!r}')
        specs = _specifications(list(sources), modalities, schema, shared)
        known = {} if schema is None else schema.modalities
        read = {name: sources[name](spec) for name, spec in specs.items() if name in sources}
        if known:  # a selection of cells may leave a modality of the model empty
            read = {name: source for name, source in read.items() if len(source.cells)}
            if not read:
                raise ValueError("the data have no cell")
        for name, source in read.items():
            if not is_readable(source.matrix):
                raise ValueError(
                    f"modality {name!r}: the measurements are a {type(source.matrix).__name__}; accepted: "
                    "a NumPy array, a scipy sparse matrix or array, or those of a backed AnnData"
                )
            if source.matrix.dtype.kind not in "biuf":
                raise ValueError(f"modality {name!r}: values of type {source.matrix.dtype}; accepted: real numbers")
            if source.cells.has_duplicates:
                raise ValueError(
                    f"modality {name!r}: cell name {_first_duplicate(source.cells)!r} occurs more than once; "
                    "cell names must be unique (obs_names_make_unique makes them so)"
                )
            if source.features.has_duplicates:
                raise ValueError(
                    f"modality {name!r}: feature name {_first_duplicate(source.features)!r} occurs more than once; "
                    "feature names must be unique (var_names_make_unique makes them so)"
                )
            if len(source.cells) == 0 or (source.measured is not None and not source.measured.any()):
                raise ValueError(f"modality {name!r} has no cell; leave it out, or give it cells")
            if len(source.features) == 0:
                raise ValueError(f"modality {name!r} has no feature; leave it out, or give it features")
            if obs is not None and not source.cells.isin(obs.index).all():
                stray = source.cells[~source.cells.isin(obs.index)][0]
                raise ValueError(
                    f"modality {name!r}: cell {stray!r} is not in the obs of the whole; call update() first"
                )
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
        if new_batches == "add":
            known = {name: _with_batches(m, read[name].cells, columns[name]) for name, m in known.items()}
        average = new_batches == "average"
        registered = {n: _modality(n, s, read[n], cells, columns[n], known.get(n), average) for n, s in specs.items()}
        mosaic = cls(cells, registered, tables)
        if schema is not None and schema.cohorts is not None:
            return replace(mosaic, cohorts=schema.cohorts, groups=schema.cohorts.codes(mosaic))
        return mosaic


def _words(names: Any) -> str:
    return ", ".join(repr(str(n)) for n in names) or "none"


def _first_duplicate(names: pd.Index) -> str:
    return str(names[names.duplicated()][0])


def _obs(name: str, data: "AnnData | MuData") -> pd.DataFrame:
    """The table of the cells, which must be in memory."""
    if not isinstance(data.obs, pd.DataFrame):
        raise ValueError(
            f"modality {name!r} was opened by read_lazy; accepted: anndata.read_h5ad(path), "
            'or anndata.read_h5ad(path, backed="r"), which leaves the measurements in the file'
        )
    return data.obs


def _source(name: str, adata: "AnnData", spec: ModalitySpec, prefix: str = "") -> _Source:
    obs = _obs(name, adata)
    for layer in (spec.layer, spec.exposure_layer):
        if layer is not None and layer not in adata.layers:
            raise ValueError(f"modality {name!r}: there is no layer {layer!r}; it has {_words(adata.layers.keys())}")
    matrix = adata.X if spec.layer is None else adata.layers[spec.layer]
    if matrix is None:
        raise ValueError(f"modality {name!r}: X is empty; name the layer that holds the values")
    cells = adata.obs_names if not prefix else pd.Index(prefix + adata.obs_names.astype(str))
    exposures = None if spec.exposure_layer is None else adata.layers[spec.exposure_layer]
    return _Source(matrix, cells, adata.var_names, obs, exposures=exposures)


def _absent(known: ModalitySchema) -> _Source:
    """A modality of the model that no cell of the data has."""
    names = pd.Index([], dtype=object)
    matrix = np.zeros((0, known.n_features), dtype=np.float32)
    return _Source(matrix, names, pd.Index(known.features), pd.DataFrame(index=names))


def _specifications(
    found: list[str],
    modalities: Mapping[str, ModalitySpec | str] | None,
    schema: Schema | None,
    shared: Mapping[str, Any],
) -> dict[str, ModalitySpec]:
    """The specification of each modality to be used."""
    if not found or modalities == {}:
        raise ValueError("there is no modality to register")
    if schema is not None:
        if modalities is not None or shared:
            raise ValueError("the schema already says how modalities are modelled; give it alone")
        absent = [name for name in schema.modalities if name not in found]
        strange = [name for name in found if name not in schema.modalities]
        if absent and strange:
            raise ValueError(
                f"the data lack the model's modality {absent[0]!r} and have {strange[0]!r}, "
                "which the model does not know; rename that one, or leave it out"
            )
        return {name: m.spec for name, m in schema.modalities.items()}
    if modalities is None:
        for name in found:
            if name.lower() not in LIKELIHOOD_BY_NAME:
                raise ValueError(
                    f"modality {name!r}: its name does not say which likelihood it needs; "
                    f'give one, modalities={{"{name}": "nb"}} say'
                )
        modalities = {name: LIKELIHOOD_BY_NAME[name.lower()] for name in found}
    specs = {}
    for name, given in modalities.items():
        if name not in found:
            raise ValueError(f"there is no modality {name!r}; found {_words(found)}")
        try:
            specs[name] = given if isinstance(given, ModalitySpec) else ModalitySpec(given, **shared)
        except ValueError as error:
            raise ValueError(f"modality {name!r}: {error}") from error
    if shared and all(isinstance(given, ModalitySpec) for given in modalities.values()):
        raise ValueError(f"{_words(shared)} would apply to no modality: each has a ModalitySpec; put it there")
    return specs


def _columns(
    specs: Mapping[str, ModalitySpec], tables: Sequence[Table], cells: pd.Index, absent: Collection[str]
) -> dict[str, pd.DataFrame]:
    """For each modality its columns over all cells of the mosaic.

    A cell's value is looked up in the modality's own columns, then in those of the whole, then in another modality's
    of the same name: so a cell that lacks the modality still knows its batch. Only sizes are each modality's own. An
    absent modality needs no columns.
    """
    found: dict[str, pd.DataFrame] = {}
    for name, spec in specs.items():
        wanted = [*spec.categorical, *spec.continuous_covariates]
        wanted += [k for k in (spec.label_key, spec.size_factor_key) if k is not None]
        columns = {}
        for key in wanted:
            places = [t for t in tables if key != spec.size_factor_key or t.modality in (name, WHOLE)]
            column = look_up(places, key, cells, name)
            if column is None and name not in absent:
                raise ValueError(
                    f"modality {name!r}: no obs has a column {key!r}; there are {_columns_of(places, tables)}"
                )
            columns[key] = pd.Series(None, cells, dtype=object) if column is None else column
        found[name] = pd.DataFrame(columns, index=cells)
    return found


def _columns_of(places: Sequence[Table], tables: Sequence[Table]) -> str:
    """Names of the columns in some places, without the copies that MuData makes of a modality's column."""
    copies = {f"{t.modality}:{column}" for t in tables for column in t.obs}
    return _words(dict.fromkeys(str(column) for t in places for column in t.obs if column not in copies))


def _with_batches(known: ModalitySchema, cells: pd.Index, table: pd.DataFrame) -> ModalitySchema:
    """The schema with the batches of these cells behind those that it knows."""
    key = known.spec.batch_key
    if key is None:
        return known
    batches = known.categories[key]
    new = sorted(set(words(table.loc[cells, key].dropna())) - set(batches))
    return replace(known, categories={**known.categories, key: (*batches, *new)})


def _modality(
    name: str,
    spec: ModalitySpec,
    source: _Source,
    cells: pd.Index,
    table: pd.DataFrame,
    known: ModalitySchema | None,
    average_new_batches: bool = False,
) -> Modality:
    """Check one modality and bring it into the mosaic's order of cells (and the schema's order of features)."""
    features, columns = source.features.astype(str), None
    if known is not None and tuple(features) != known.features:
        columns = features.get_indexer(pd.Index(known.features))
        if (columns < 0).any() or len(features) != len(known.features):
            strange = features[~features.isin(known.features)]
            raise ValueError(
                f"modality {name!r}: the model knows {len(known.features)} features and the data have {len(features)}; "
                f"missing: {_words(np.array(known.features)[columns < 0][:3])}; unknown: {_words(strange[:3])}; "
                "accepted: the same features in any order"
            )
        features = pd.Index(known.features)
    rows = source.cells.get_indexer(cells)
    if source.measured is not None:
        rows = np.where((rows >= 0) & source.measured[rows], rows, -1)
    present = rows >= 0
    matrix = Matrix(source.matrix, columns)
    totals, density = check_values(matrix, rows[present], spec.data_kind, name, cells[present], features)
    library = _library(name, spec, totals, cells, present, table)

    categorical = np.full((len(cells), len(spec.categorical)), -1, dtype=np.int64)
    categories: dict[str, tuple[str, ...]] = {}
    for i, key in enumerate(spec.categorical):
        values = table[key]
        lacking = values[present].isna()
        if lacking.any():
            raise ValueError(
                f"modality {name!r}: column {key!r} is missing for cell {lacking.index[lacking][0]!r}; "
                "every cell needs a value"
            )
        found = words(values)
        if known is None:
            categories[key] = tuple(sorted(found[present].unique()))
        else:
            categories[key] = known.categories[key]
            unseen = present & ~found.isin(categories[key]).to_numpy()
            if unseen.any() and not (average_new_batches and key == spec.batch_key):
                raise ValueError(
                    f"modality {name!r}: cell {cells[unseen][0]!r} has {key} {found[unseen].iloc[0]!r}, "
                    f"which the model has not seen; seen: {_words(categories[key])}"
                )
        categorical[:, i] = codes(found, categories[key])

    continuous = np.zeros((len(cells), len(spec.continuous_covariates)), dtype=np.float32)
    moments: dict[str, tuple[float, float]] = {}
    for i, key in enumerate(spec.continuous_covariates):
        numbers = pd.to_numeric(table[key], errors="coerce").to_numpy(dtype=float)
        bad = present & ~np.isfinite(numbers)
        if bad.any():
            raise ValueError(
                f"modality {name!r}: column {key!r} of cell {cells[bad][0]!r} is {table[key][bad].iloc[0]!r}; "
                "a continuous covariate takes finite numbers"
            )
        own = numbers[present]
        moments[key] = known.continuous[key] if known else (float(own.mean()), float(own.std()) or 1.0)
        continuous[:, i] = np.where(np.isfinite(numbers), (numbers - moments[key][0]) / moments[key][1], 0)

    labels, label_names = _labels(name, spec, table, cells, present, known)
    exposures, exposure = None, 1.0
    if source.exposures is not None:
        exposures = Matrix(source.exposures, columns)
        exposure = _exposure(name, spec, exposures, rows[present], cells[present], features)
    schema = known or ModalitySchema(
        spec=spec,
        features=tuple(features),
        categories=categories,
        continuous=moments,
        labels=label_names,
        library=float(np.nanmedian(library)),
        exposure=exposure,
    )
    # A likelihood of the user's own need not know of sparse tensors.
    dense = not isinstance(spec.likelihood, str) or DATA_KINDS[spec.likelihood] != "count" or density > DENSE_ABOVE
    return Modality(name, schema, matrix, rows, categorical, continuous, library, labels, dense, exposures)


def _exposure(
    name: str, spec: ModalitySpec, exposures: Matrix, rows: np.ndarray, cells: pd.Index, features: pd.Index
) -> float:
    """Median exposure above 0 in a sample of the cells, once all are seen to be finite and not negative."""
    check_values(exposures, rows, "nonnegative", f"{name}, layer {spec.exposure_layer}", cells, features)
    some = exposures.tensor(rows[:: 1 + len(rows) // 1000], dense=True)
    return float(some[some > 0].median()) if (some > 0).any() else 1.0


def _library(
    name: str, spec: ModalitySpec, totals: np.ndarray, cells: pd.Index, present: np.ndarray, table: pd.DataFrame
) -> np.ndarray:
    """Size of each cell in counts; NaN where the modality was not measured."""
    library = np.full(len(cells), np.nan)
    if spec.size_factor_key is not None:
        library[present] = pd.to_numeric(table[spec.size_factor_key][present], errors="coerce")
        source = f"column {spec.size_factor_key!r}"
    else:
        library[present], source = 1.0 if spec.data_kind == "real" else totals, "the sum of its counts"
    bad = present & ~((library > 0) & np.isfinite(library))
    if bad.any() and (spec.needs_library or spec.size_factor_key is not None):
        raise ValueError(
            f"modality {name!r}: cell {cells[bad][0]!r} has size {library[bad][0]} ({source}), but likelihood "
            f"{spec.likelihood_name!r} takes a finite size above 0; remove the cell from this modality"
        )
    return library.astype(np.float32)


def _labels(
    name: str,
    spec: ModalitySpec,
    table: pd.DataFrame,
    cells: pd.Index,
    present: np.ndarray,
    known: ModalitySchema | None,
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Label numbers of all cells (-1 unknown) and the label categories."""
    if spec.label_key is None:
        return np.full(len(cells), -1, dtype=np.int64), ()
    found = words(table[spec.label_key])
    found = found.where(found != spec.unlabelled)
    names = known.labels if known else tuple(sorted(found.dropna().unique()))
    unseen = present & (found.notna() & ~found.isin(names)).to_numpy()
    if unseen.any():
        raise ValueError(
            f"modality {name!r}: cell {cells[unseen][0]!r} has label {found[unseen].iloc[0]!r}, "
            f"which the model has not seen; seen: {_words(names)}, or {spec.unlabelled!r} for unknown"
        )
    return codes(found, names), names
