"""What a trained model says of cells, measured, drawn and written: the same for every command."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyromosaic.cli import evaluation
from pyromosaic.cli.outputs import RECORD, add, draft, named, orderly_hdf5, write, write_more, write_record
from pyromosaic.cli.running import phase

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData
    from mudata import MuData
    from rich.console import Console

    from pyromosaic.data import Mosaic
    from pyromosaic.linkage import Linkage


@dataclass(frozen=True)
class Result:
    """Latent spaces and metrics of cells.

    Parameters
    ----------
    model, mosaic
        The trained model, or a linkage, and the cells.
    spaces
        Latent spaces by their names in obsm, cells × dimensions; the first one is measured.
    measures
        Metrics.
    impute
        Modalities to impute in all cells.
    hidden
        Measurements that training did not see, by modality.
    columns
        Columns for obs.
    """

    model: Any
    mosaic: "Mosaic"
    spaces: "dict[str, pd.DataFrame]"
    measures: evaluation.Measures
    impute: tuple[str, ...] = ()
    hidden: "Mapping[str, AnnData]" = field(default_factory=dict)
    columns: "dict[str, pd.Series]" = field(default_factory=dict)


def ask(
    model: Any,
    mosaic: "Mosaic",
    labels: "pd.Series",
    impute: Iterable[str],
    hidden: "Mapping[str, AnnData]",
) -> Result:
    """Ask a trained model for what is known before anything is imputed.

    Parameters
    ----------
    model, mosaic
        The model, and the cells.
    labels
        Known cell types, for metrics.
    impute, hidden
        See `Result`.
    """
    from pyromosaic.models import ContrastiveVI

    name, contrastive = f"X_{type(model).__name__.lower()}", isinstance(model, ContrastiveVI)
    with phase("Latent space", mosaic.n_cells * (1 + contrastive)):
        spaces = {}
        if isinstance(model, ContrastiveVI):
            for kind in ("background", "salient"):
                spaces[f"{name}_{kind}"] = model.get_latent_representation(representation=kind, data=mosaic)
        else:
            spaces[name] = model.get_latent_representation(data=mosaic)
    measures, columns, latent = evaluation.Measures(), {}, next(iter(spaces.values()))
    measures.groups(latent, mosaic.patterns, "modality_enrichment", "Modality enrichment of neighbours")
    if isinstance(model, ContrastiveVI):
        key = model.schema.cohorts.key if model.schema.cohorts is not None else None
        if key is not None:
            measures.groups(latent, mosaic.words(key), "cohort_enrichment", f"{key} among neighbours, background")
        columns = {f"salient_{what}": scores for what, scores in model.contrast_scores(data=mosaic).items()}
    measures.labels(latent, mosaic.patterns, labels, list(mosaic.modalities))
    measures.pairs(latent, mosaic)
    return Result(model, mosaic, spaces, measures, tuple(impute), hidden, columns)


def scored(link: "Linkage", scores: "Mapping[str, pd.DataFrame]", mosaic: "Mosaic", labels: "pd.Series") -> Result:
    """The scores of a linkage, measured.

    Parameters
    ----------
    link, scores, mosaic
        The linkage, the scores of each modality, and the cells.
    labels
        Known cell types, for metrics.
    """
    import pandas as pd

    space, measures = pd.concat(list(scores.values())).loc[mosaic.obs_names], evaluation.Measures()
    measures.groups(space, mosaic.patterns, "modality_enrichment", "Modality enrichment of neighbours")
    measures.labels(space, mosaic.patterns, labels, list(mosaic.modalities))
    measures.pairs(space, mosaic)
    return Result(link, mosaic, {"X_linked": space}, measures)


def put(
    console: "Console",
    result: Result,
    mdata: "MuData",
    record: Mapping[str, Any],
    outputs: Mapping[str, Path | None],
    *,
    labels: "pd.Series",
    tables: "Mapping[str, Callable[[], pd.DataFrame]]",
    colours: "Sequence[pd.Series]" = (),
    trained: bool = True,
    seed: int = 0,
) -> None:
    """Impute, measure, and write all outputs, or none, and say which.

    Parameters
    ----------
    console
        Where to say it.
    result, mdata
        The result, and the data to which it is added.
    record
        What the result says of the run.
    outputs
        Places of the outputs, by the names of their options.
    labels, colours
        What the cells in the figure are coloured by: cell types, and others.
    tables
        Further outputs, by the names of their options.
    trained
        Whether the model was trained by this run, which the figure then shows.
    seed
        Seed of the draws and of the layout.
    """
    places = {option: path for option, path in outputs.items() if path is not None}
    with ExitStack() as stack:
        drafts = {o: stack.enter_context(draft(path)) for o, path in places.items() if o != "model"}
        for name, latent in result.spaces.items():
            mdata.obsm[name] = latent.loc[mdata.obs_names].to_numpy("float32")
        for name, column in result.columns.items():
            mdata.obs[name] = column.loc[mdata.obs_names].to_numpy()
        for option, table in tables.items():
            if option in places:
                with named(places[option]):
                    table().to_csv(drafts[option], index=option == "effects")
        add(mdata, {name: result.mosaic.schema[name].features for name in result.impute}, result.hidden)
        mdata.uns[RECORD] = {}
        with orderly_hdf5():
            with named(places["out"]):
                write(mdata, drafts["out"])
            compared = _imputed(result, mdata.obs_names, drafts["out"], places["out"], seed)
            result.measures.imputed(result.mosaic, compared)
            drawn = {}
            if "figure" in places:
                patterns = result.mosaic.patterns.rename("modalities in training" if trained else "modalities")
                shown = [*colours, *([patterns] if patterns.nunique() > 1 or not colours else [])]
                shown += [labels] if labels.notna().any() else []
                model = result.model if trained else None
                with named(places["figure"]), console.status("Drawing") if console.is_terminal else nullcontext():
                    drawn = evaluation.draw(result.spaces, shown, seed, drafts["figure"], model, compared)
            record = {**record, "metrics": result.measures.values}
            with named(places["out"]):
                write_more(drafts["out"], record, {f"{k}_umap": v.loc[mdata.obs_names] for k, v in drawn.items()})
        if "metrics" in places:
            with named(places["metrics"]):
                write_record(record, drafts["metrics"])
        if "model" in places:
            with named(places["model"]):
                result.model.save(places["model"], overwrite=True)
    result.measures.report(console)
    for path in places.values():
        console.print(f"Wrote {path}", highlight=False, markup=False, soft_wrap=True)


def _imputed(result: Result, cells: "pd.Index", written: Path, place: Path, seed: int) -> "evaluation.Compared":
    """Impute into a file, block by block; of hidden modalities, the measurements and what was imputed."""
    import h5py

    from pyromosaic.data import fragments

    model, mosaic, values = result.model, result.mosaic, {}
    asked: dict[str, Any] = {"quantiles": (), "data": mosaic, "seed": seed}
    few = {name: part.obs_names for name, part in result.hidden.items() if name not in result.impute}
    n_cells = mosaic.n_cells * len(result.impute) + sum(map(len, few.values()))
    with phase("Imputing", n_cells) if n_cells else nullcontext(), named(place, OSError, RuntimeError):
        for name, names in few.items():
            values[name] = model.get_imputed_values(name, names, **asked).mean.to_numpy()
        with h5py.File(written, "r+") as file:
            for name in result.impute:
                group = file["mod"][f"{name}_imputed"]
                model.get_imputed_values(name, cells, out=group, **asked)
                if name in result.hidden:
                    rows = cells.get_indexer(result.hidden[name].obs_names)
                    order = rows.argsort()
                    values[name] = group["X"][rows[order]][order.argsort()]
    compared = {}
    for name, part in result.hidden.items():
        spec = mosaic.schema[name].spec
        truth = part.X if spec.layer is None else part.layers[spec.layer]
        compared[name] = (fragments(truth) if spec.cut_sites else truth, values[name])
    return compared
