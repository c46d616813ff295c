"""Data for the command line: read, chosen and checked before anything is trained."""

from collections.abc import Callable, Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import typer

from pyromosaic.cli.outputs import RECORD, WRITING, reason

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from anndata import AnnData
    from mudata import MuData

    from pyromosaic.cli.options import Source
    from pyromosaic.data import Mosaic, Schema
    from pyromosaic.links import GuidanceGraph, Links


def read(path: Path, modality: str | None = None) -> "MuData":
    """The data of any file that `pyromosaic.read` takes; of a result of an earlier command, without what it imputed."""
    from pyromosaic import data

    mdata = data.read(path, modality)
    imputed = [f"{name}_imputed" for name in mdata.mod if f"{name}_imputed" in mdata.mod]
    if imputed and RECORD not in mdata.uns:
        raise ValueError(f"{path} already has a modality {imputed[0]!r}; give the data without it")
    if imputed:
        note(f"{path} is a result of an earlier run; it is used without {', '.join(imputed)}")
        mdata = only(mdata, [name for name in mdata.mod if name not in imputed])
    return mdata


def only(mdata: "MuData", names: Iterable[str]) -> "MuData":
    """The data with some of their modalities, in which each cell has one of them."""
    import mudata

    kept = mudata.MuData({name: mdata.mod[name] for name in names})
    whole = kept.obs_names
    kept.obs = mdata.obs.loc[whole]
    kept.uns = mdata.uns
    for key, values in mdata.obsm.items():
        if key not in mdata.mod:  # where MuData notes which cells have a modality
            kept.obsm[key] = values[mdata.obs_names.get_indexer(whole)]
    return kept


def note(text: str) -> None:
    """Say something that is no result."""
    typer.echo(f"note: {text}", err=True)


def choose_cells(mdata: "MuData", given: list[str]) -> "MuData":
    """The data of some cells, as `--cells` names them; modalities that none of them has are left out."""
    if not given:
        return mdata
    import numpy as np

    from pyromosaic.data.tables import WHOLE, Table, look_up, readings

    tables = [Table(name, part.obs_names, part.obs) for name, part in mdata.mod.items()]
    tables.append(Table(WHOLE, mdata.obs_names, mdata.obs))

    def column(key: str) -> "pd.Series | None":
        return look_up(readings(tables, key, mdata.obs_names))

    chosen = np.ones(mdata.n_obs, dtype=bool)
    for entry in given:
        chosen &= _chosen(f"--cells {entry}", entry, mdata.obs_names, "cell", column)
    if not chosen.any():
        raise ValueError(f"--cells {' --cells '.join(given)}: no cell is left")
    some = mdata[chosen].copy()
    absent = [name for name, part in some.mod.items() if part.n_obs == 0]
    if absent:
        note(f"none of the chosen cells has {', '.join(absent)}; it is left out")
        some = only(some, [name for name in some.mod if name not in absent])
    return some


def choose_features(mdata: "MuData", given: list[str]) -> "MuData":
    """The data with some features of their modalities, as `--features` names them."""
    chosen: dict[str, np.ndarray] = {}
    for entry in given:
        name, sign, what = entry.partition("=")
        option = f"--features {entry}"
        if not (name and sign and what):
            raise ValueError(f"{option}: give MODALITY=FILE or MODALITY=COLUMN==VALUE, e.g. rna=genes.txt")
        if name not in mdata.mod:
            raise ValueError(f"{option}: there is no modality {name!r}; found {', '.join(mdata.mod)}")
        part = mdata.mod[name]
        mask = _chosen(option, what, part.var_names, f"feature of {name}", part.var.get)
        chosen[name] = mask & chosen.get(name, True)
        if not chosen[name].any():
            raise ValueError(f"{option}: no feature of {name} is left")
    return with_features(mdata, chosen) if chosen else mdata


def with_features(mdata: "MuData", chosen: "dict[str, np.ndarray]") -> "MuData":
    """A copy in which some modalities have some of their features."""
    import mudata

    parts = {name: part[:, chosen[name]].copy() if name in chosen else part for name, part in mdata.mod.items()}
    few = mudata.MuData(parts)
    few.obs = mdata.obs.loc[few.obs_names]
    return few


def of_model(mdata: "MuData", schema: "Schema") -> "MuData":
    """The data with the features that a model knows; what it lacks is refused when the data are registered."""
    chosen = {}
    for name, part in mdata.mod.items():
        if name in schema.modalities:
            known = part.var_names.astype(str).isin(schema[name].features)
            if known.any() and not known.all():
                note(f"{name}: {int((~known).sum()):,} features that the model does not know are left out")
                chosen[name] = known
    return with_features(mdata, chosen) if chosen else mdata


def _chosen(
    option: str, entry: str, names: "pd.Index", noun: str, column: "Callable[[str], pd.Series | None]"
) -> "np.ndarray":
    """Which of the names are meant by a file of names, or by a value of a column."""
    import numpy as np
    import pandas as pd

    from pyromosaic.data.tables import word, words

    key, sign, value = entry.partition("==")
    if sign:
        values = column(key.strip())
        if values is None:
            raise ValueError(f"{option}: there is no column {key.strip()!r}")
        found = words(values)
        there = set(found.dropna())
        wanted = [word(value)] if word(value) in there else [word(part) for part in value.split(",")]
        absent = [part for part in wanted if part not in there]
        if absent:
            raise ValueError(f"{option}: no {noun} has the value {absent[0]!r}; there are {_some(sorted(there))}")
        return np.asarray(found.isin(wanted))
    path = Path(entry)
    if not path.is_file():
        raise ValueError(f"{option}: give COLUMN==VALUE, or a file with one name a line; there is no file {entry}")
    try:
        lines = pd.Index([line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()])
    except (OSError, ValueError) as error:
        raise ValueError(f"{option} cannot be read as text: {reason(error)}") from error
    absent = [line for line in lines if line not in names]
    if absent:
        raise ValueError(f"{option}: {len(absent):,} of {len(lines):,} names are no {noun}: {_some(absent)}")
    return np.asarray(names.isin(lines))


def _some(words: list[str]) -> str:
    return ", ".join(map(repr, words[:5])) + (", …" if len(words) > 5 else "")


def labels(mosaic: "Mosaic", key: str | None) -> "pd.Series":
    """The label of each cell from a column, which the model does not see; missing where there is none."""
    import pandas as pd

    from pyromosaic.data import ModalitySpec
    from pyromosaic.data.tables import look_up, readings, words

    if key is None:
        return pd.Series(None, mosaic.obs_names, dtype="category")
    mosaic.column(key)  # which says if there is none, or tables contradict each other
    found = look_up(readings(mosaic.tables, key, mosaic.obs_names, {ModalitySpec("nb").unlabelled}))
    assert found is not None
    return words(found).astype("category").rename(key)


def check_tables(path: Path, mdata: "MuData") -> None:
    """Refuse tables that can be read but not written again, before training."""
    from anndata import AnnData

    for name, part in {"the whole": mdata, **mdata.mod}.items():
        with TemporaryDirectory() as folder:
            try:
                AnnData(obs=part.obs, var=part.var, uns=dict(part.uns)).write_h5ad(Path(folder) / "tables.h5ad")
            except WRITING as error:
                raise ValueError(f"{path}, {name}: obs, var or uns cannot be written again: {reason(error)}") from error


def likelihoods(mdata: "MuData", given: list[str]) -> dict[str, str]:
    """The likelihood of each modality, as given or by its name."""
    from pyromosaic.data.spec import LIKELIHOOD_BY_NAME

    likelihoods = {name: LIKELIHOOD_BY_NAME.get(name.lower(), "") for name in mdata.mod}
    for entry in given:
        name, sign, likelihood = entry.partition("=")
        if not (name and sign and likelihood):
            raise ValueError(f"--likelihood needs MODALITY=NAME, e.g. rna=nb; found {entry!r}")
        if name not in likelihoods:
            raise ValueError(f"--likelihood {entry}: there is no modality {name!r}; found {', '.join(mdata.mod)}")
        likelihoods[name] = likelihood
    for name, likelihood in likelihoods.items():
        if not likelihood:
            raise ValueError(
                f"the name of modality {name!r} does not say which likelihood it needs; pass one, e.g. "
                f"--likelihood {name}=nb"
            )
    return likelihoods


def registered(
    mdata: "MuData", likelihoods: dict[str, str], options: "Source", label_key: str | None = None
) -> "Mosaic":
    """The data as a mosaic, with the batches, the layer and the cut sites that the options name."""
    from pyromosaic.data import ModalitySpec, Mosaic

    cut = options.cut_sites or []
    for name in cut:
        if name not in likelihoods:
            raise ValueError(f"--cut-sites {name}: there is no modality {name!r}; found {', '.join(likelihoods)}")
    shared: dict[str, Any] = {"layer": options.layer, "batch_key": options.batch_key, "label_key": label_key}
    specs: dict[str, ModalitySpec | str | type] = dict(likelihoods)
    for name in cut:
        try:
            specs[name] = ModalitySpec(likelihoods[name], cut_sites=True, **shared)
        except ValueError as error:
            raise ValueError(f"--cut-sites {name}: {error}") from error
    return Mosaic.from_mudata(mdata, specs, **(shared if set(cut) < set(specs) else {}))


def hide(mdata: "MuData", n_cells: int, seed: int) -> "tuple[MuData, dict[str, AnnData]]":
    """The data to train on, and the measurements hidden from training."""
    from pyromosaic import data

    if n_cells == 0:
        return mdata, {}
    if len(mdata.mod) < 2:
        raise ValueError("--hide needs at least two modalities, because a hidden modality is imputed from the others")
    return data.hide(mdata, dict.fromkeys(mdata.mod, n_cells), seed)


def separated(mdata: "MuData") -> "MuData":
    """The data with each measurement of a cell as a cell of its own, named "rna:CELL", if a cell has several.

    The column "cell" of obs has the names as they were.
    """
    import mudata
    import pandas as pd

    total = sum(part.n_obs for part in mdata.mod.values())
    if total == mdata.n_obs:
        return mdata
    note(
        f"{total - mdata.n_obs:,} cells have more than one modality; each of their measurements is a cell of its own, "
        "named MODALITY:CELL"
    )
    parts, tables = {}, []
    for name, part in mdata.mod.items():
        own = part.copy()
        own.obs_names = [f"{name}:{cell}" for cell in part.obs_names]
        tables.append(mdata.obs.loc[part.obs_names].assign(cell=part.obs_names.astype(str)).set_axis(own.obs_names))
        parts[name] = own
    apart = mudata.MuData(parts)
    apart.obs = pd.concat(tables).loc[apart.obs_names]
    apart.uns = mdata.uns
    return apart


def linked(mosaic: "Mosaic", links: Path | None, genes: Path | None) -> "Links | GuidanceGraph":
    """The linked features of the modalities: from a table, from positions of genes, or by equal names."""
    from pyromosaic.links import GuidanceGraph, links_by_overlap, links_from_table

    names = list(mosaic.modalities)
    if links is not None and genes is not None:
        raise ValueError("--links and --genes are two ways to link features; give one of them")
    if len(names) < 2:
        raise ValueError(f"the data need at least two modalities to be aligned; found {', '.join(names)}")
    if links is not None:
        table = _table("--links", links)
        for column in {"weight", "sign"} & set(table):
            table[column] = _numbers(f"--links {links}", table[column])
        if len(names) > 2:
            return GuidanceGraph.from_table(mosaic, table, drop_absent=True)
        found = links_from_table(mosaic, (names[0], names[1]), table)
        if found.n_unknown:
            note(f"{len(found):,} links are used; {found.n_unknown:,} name features that the data do not have")
        return found
    if genes is None:
        return GuidanceGraph.from_names(mosaic)
    table = _table("--genes", genes)
    table = table.set_index(table.columns[0])
    for column in {"start", "end"} & set(table):
        table[column] = _numbers(f"--genes {genes}", table[column])
    if len(names) != 2:
        raise ValueError(f"--genes links two modalities; found {', '.join(names)}. Give --links instead")
    n_genes = [len(set(mosaic.schema[name].features) & set(table.index)) for name in names]
    if n_genes[1] > n_genes[0]:
        names.reverse()
    return links_by_overlap(mosaic, (names[0], names[1]), table)


def _table(option: str, path: Path) -> "pd.DataFrame":
    """A table of text, separated by commas (.csv) or tabs."""
    import pandas as pd

    try:
        return pd.read_csv(path, sep="," if path.suffix == ".csv" else "\t", dtype=str)
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else reason(error)
        raise ValueError(f"{option} {path} cannot be read as a table: {why}") from error


def _numbers(what: str, values: "pd.Series") -> "pd.Series":
    import pandas as pd

    numbers = pd.to_numeric(values, errors="coerce")
    if numbers.isna().any():
        wrong = values[numbers.isna()].iloc[0]
        raise ValueError(f"{what}: column {values.name!r} must have a number in each row; found {wrong!r}")
    return numbers
