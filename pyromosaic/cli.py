"""The command line: integrate a MuData file, or packaged data as a demonstration."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import as_file
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile, mkdtemp
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pyromosaic import __version__

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from anndata import AnnData
    from mudata import MuData
    from rich.console import Console

    from pyromosaic.data import Mosaic
    from pyromosaic.models import MultiVI
    from pyromosaic.tasks import Estimate

FIGURES = (".png", ".pdf", ".svg")
WRITING = (OSError, RuntimeError, TypeError, ValueError, KeyError)  # what anndata raises if it cannot write a value
DEMO_OUT, DEMO_FIGURE = Path("pbmc_integrated.h5mu"), Path("pbmc_integrated.png")

app = typer.Typer(
    name="pyromosaic",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    rich_markup_mode="markdown",
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"pyromosaic {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """Integrate single cells that were measured by RNA, chromatin, surface protein, or any mix of them."""


@app.command()
def integrate(
    data: Annotated[
        Path,
        typer.Argument(
            metavar="DATA.h5mu",
            show_default=False,
            help="MuData file with raw counts, one modality each for RNA, chromatin or surface protein. "
            "A cell need not be in every modality.",
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(metavar="RESULT.h5mu", show_default=False, help="Where to write the data with the results added."),
    ],
    figure: Annotated[
        Path | None,
        typer.Option(metavar="FIGURE.png", show_default=False, help="Where to draw the results (.png, .pdf or .svg)."),
    ] = None,
    model: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", show_default=False, help="Where to keep the trained model, for use in Python."),
    ] = None,
    likelihood: Annotated[
        list[str] | None,
        typer.Option(
            metavar="MODALITY=NAME",
            show_default=False,
            help="Which kind of measurement a modality is, where its name does not say so (rna, atac and adt do) or "
            "says it wrongly: nb or zinb (RNA counts), bernoulli (chromatin), nb_mixture (antibody counts), normal, "
            "log1p_normal, ziln or zig (values that are not counts). Once for each such modality.",
        ),
    ] = None,
    batch_key: Annotated[
        str | None,
        typer.Option(show_default=False, help="Column of obs with the batch (donor, run, …) to correct for."),
    ] = None,
    label_key: Annotated[
        str | None,
        typer.Option(
            show_default=False, help="Column of obs with cell types. Training never sees them; metrics and figure do."
        ),
    ] = None,
    layer: Annotated[
        str | None, typer.Option(show_default=False, help="Layer that holds the raw counts, if X does not.")
    ] = None,
    hide: Annotated[
        int,
        typer.Option(
            min=0,
            help="Hide each modality in this many of the cells that have them all, and report how well it is imputed.",
        ),
    ] = 0,
    n_latent: Annotated[int, typer.Option(min=1, help="Dimensions of the latent space.")] = 15,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the data in training.")] = 150,
    batch_size: Annotated[int, typer.Option(min=1, help="Largest number of cells in a minibatch.")] = 256,
    seed: Annotated[int, typer.Option(min=0, help="Seed of all that is random.")] = 0,
    impute: Annotated[
        bool, typer.Option(help="Add the expected measurements of every modality in all cells to the result.")
    ] = True,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace outputs that exist.")] = False,
) -> None:
    """Integrate the modalities of a MuData file with MultiVI.

    The result holds the data as they were and, for all cells, the joint latent space (obsm "X_multivi"), its UMAP
    (obsm "X_multivi_umap", if a figure is drawn) and every modality as the model expects it: "rna_imputed" beside
    "rna", with standard deviations in layer "sd".

    Label transfer is measured between cells that have one modality only.
    """
    options = {name: value for name, value in locals().items() if value is not None}
    options = {name: value for name, value in options.items() if name not in ("out", "figure", "model", "overwrite")}
    with _sentence(2, ValueError):
        _check_outputs(data, out, figure, model, overwrite)
    from rich.console import Console

    console = Console()
    with _quiet():
        from pyromosaic.data import Mosaic
        from pyromosaic.models import MultiVI
        from pyromosaic.train import NonFiniteLossError

        with _sentence(2, ValueError):
            mdata = _read(data)
            _check_tables(data, mdata)
            likelihoods = _likelihoods(mdata, likelihood or [])
            shown, hidden = _hide(mdata, hide, seed)
            mosaic = Mosaic.from_mudata(shown, likelihoods, layer=layer, batch_key=batch_key, label_key=label_key)
        console.print(str(mosaic), highlight=False, markup=False)
        multivi = MultiVI(mosaic, n_latent=n_latent, seed=seed)
        with _sentence(1, NonFiniteLossError, OSError):
            _train(multivi, epochs, batch_size, seed)
            with console.status("Imputing and measuring"):
                latent = multivi.get_latent_representation()
                wanted = dict.fromkeys(mdata.mod) if impute else {name: a.obs_names for name, a in hidden.items()}
                imputed = {n: multivi.get_imputed_values(n, cells, quantiles=()) for n, cells in wanted.items()}
                compared = {
                    name: (a.X if layer is None else a.layers[layer], imputed[name].mean.loc[a.obs_names].to_numpy())
                    for name, a in hidden.items()
                }
                metrics = _metrics(mosaic, latent, compared)
            with console.status("Drawing and writing"):
                if model is not None:
                    with _draft(model) as draft:
                        multivi.save(draft)
                mdata.obsm["X_multivi"] = latent.loc[mdata.obs_names].to_numpy("float32")
                if figure is not None:
                    with _draft(figure) as draft:
                        coordinates = _draw(multivi, latent, compared, label_key, seed, draft)
                    mdata.obsm["X_multivi_umap"] = coordinates.loc[mdata.obs_names].to_numpy("float32")
                _add(mdata, imputed if impute else {}, hidden)
                mdata.uns["pyromosaic"] = {
                    "version": __version__,
                    "options": options | {"data": data.name, "likelihood": likelihoods},
                    "metrics": metrics["value"].to_dict(),
                }
                _write(mdata, out, multivi, model)
    _report(console, metrics)
    for path in (out, figure, model):
        if path is not None:
            console.print(f"Wrote {path}", highlight=False, markup=False, soft_wrap=True)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(metavar="RESULT.h5mu", help="Where to write the integrated data.")] = DEMO_OUT,
    figure: Annotated[Path, typer.Option(metavar="FIGURE.png", help="Where to draw the results.")] = DEMO_FIGURE,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the data in training.")] = 150,
    seed: Annotated[int, typer.Option(min=0, help="Seed of all that is random.")] = 0,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace outputs that exist; the default ones are replaced anyway.")
    ] = False,
) -> None:
    """Integrate packaged data: blood cells of four donors, one with RNA only, one with antibodies only, two with both.

    Each modality is hidden in 200 cells, and its imputed values are compared with what was hidden. It takes a
    few minutes.
    """
    with _sentence(2, ValueError):
        for path in (out, figure):
            if path.exists() and not overwrite and path not in (DEMO_OUT, DEMO_FIGURE):
                raise ValueError(f"{path} exists; pass --overwrite to replace it")
    from pyromosaic.data.datasets import FILES

    with as_file(FILES / "pbmc_mosaic.h5mu") as data:
        integrate(
            data,
            out,
            figure,
            batch_key="batch",
            label_key="celltype",
            hide=200,
            epochs=epochs,
            seed=seed,
            overwrite=True,
        )


@contextmanager
def _sentence(exit_code: int, *errors: type[Exception]) -> Iterator[None]:
    """Print an error as one sentence, and stop."""
    try:
        yield
    except errors as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(exit_code) from None


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide remarks of libraries, and keep MuData's tables as they are in the file."""
    import anndata
    import lightning.pytorch

    from pyromosaic.data.tables import kept_apart

    logger = logging.getLogger(lightning.pytorch.__name__)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        # anndata before 0.13 reads the names in files of 0.13 but writes them only if it is told to.
        strings = anndata.settings.override(allow_write_nullable_strings=True)
        with warnings.catch_warnings(), kept_apart(), strings:
            warnings.filterwarnings("ignore", module="mudata|anndata|lightning|umap|numba|sklearn")
            warnings.filterwarnings("ignore", message="The HDF5 file was not created by muon")
            yield
    finally:
        logger.setLevel(level)


def _check_outputs(data: Path, out: Path, figure: Path | None, model: Path | None, overwrite: bool) -> None:
    """Refuse outputs that could not be written at the end, before training."""
    taken = {data.resolve()}
    for option, path, suffixes in (("out", out, (".h5mu",)), ("figure", figure, FIGURES), ("model", model, ())):
        if path is None:
            continue
        if suffixes and path.suffix not in suffixes:
            raise ValueError(f"--{option} needs a file that ends in {' or '.join(suffixes)}; found {path}")
        if path.resolve() in taken:
            raise ValueError(f"--{option} {path} is the input or another output; give another name")
        taken.add(path.resolve())
        if path.is_dir() if suffixes else path.is_file():
            raise ValueError(f"--{option} {path} is a {'folder' if suffixes else 'file'}; give another name")
        if (path if suffixes else path / "model.json").exists() and not overwrite:
            raise ValueError(f"{path} exists; pass --overwrite to replace it")
        try:
            with TemporaryFile(dir=next(p for p in path.absolute().parents if p.exists())):
                pass
        except OSError as error:
            raise ValueError(f"--{option} {path} cannot be written: {error.strerror}") from error
    if figure is not None and not (find_spec("matplotlib") and find_spec("umap")):
        raise ValueError("--figure needs matplotlib and umap-learn; run pip install 'pyromosaic[plot]'")


def _read(path: Path) -> "MuData":
    import mudata

    if path.suffix != ".h5mu":
        raise ValueError(f"the data must be a MuData file that ends in .h5mu; found {path}")
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    try:
        mdata = mudata.read_h5mu(path)
    except (TypeError, AttributeError):  # so mudata 0.3 answers to an HDF5 file of another kind
        mdata = mudata.MuData({})
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{path} cannot be read as MuData: {_reason(error)}") from error
    if not mdata.mod:
        raise ValueError(f"{path} cannot be read as MuData: it has no modality. Is it a single AnnData (.h5ad)?")
    for name in mdata.mod:
        if f"{name}_imputed" in mdata.mod:
            raise ValueError(f"{path} already has a modality '{name}_imputed'; integrate the data without it")
    return mdata


def _check_tables(path: Path, mdata: "MuData") -> None:
    """Refuse tables that can be read but not written again, before training."""
    from anndata import AnnData

    for name, part in {"the whole": mdata, **mdata.mod}.items():
        with TemporaryDirectory() as folder:
            try:
                AnnData(obs=part.obs, var=part.var, uns=dict(part.uns)).write_h5ad(Path(folder) / "tables.h5ad")
            except WRITING as error:
                raise ValueError(
                    f"{path}, {name}: obs, var or uns cannot be written again: {_reason(error)}"
                ) from error


def _likelihoods(mdata: "MuData", given: list[str]) -> dict[str, str]:
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


def _hide(mdata: "MuData", n_cells: int, seed: int) -> "tuple[MuData, dict[str, AnnData]]":
    """The data to train on, and the measurements hidden from training."""
    from pyromosaic.data import hide

    if n_cells == 0:
        return mdata, {}
    if len(mdata.mod) < 2:
        raise ValueError("--hide needs at least two modalities, because a hidden modality is imputed from the others")
    return hide(mdata, dict.fromkeys(mdata.mod, n_cells), seed)


def _train(multivi: "MultiVI", epochs: int, batch_size: int, seed: int) -> None:
    """Train with one progress bar over all epochs."""
    from lightning.pytorch import Callback
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("Training"), BarColumn(), MofNCompleteColumn(), TextColumn("epochs"), TimeRemainingColumn())
    with Progress(*columns) as progress:
        task = progress.add_task("", total=epochs)

        class Advance(Callback):
            def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
                progress.advance(task)

        # One device: on several, Lightning would start this command once for each.
        multivi.train(epochs, batch_size=batch_size, seed=seed, progress_bar=False, callbacks=[Advance()], devices=1)


def _metrics(mosaic: "Mosaic", latent: "pd.DataFrame", compared: "dict[str, tuple[Any, np.ndarray]]") -> "pd.DataFrame":
    """Metrics of the integration, by key: description, value, and reference values."""
    from itertools import permutations

    import pandas as pd

    from pyromosaic import metrics

    rows: dict[str, tuple[str, float, str]] = {}
    patterns, labels = mosaic.patterns, mosaic.labels()
    n_neighbors = min(15, len(latent) - 1)
    shares = patterns.value_counts(normalize=True)
    if len(shares) > 1:
        value = metrics.modality_enrichment(latent, patterns, n_neighbors)
        reading = f"mixed 1, apart {1 / (shares**2).sum():.2f}"
        rows["modality_enrichment"] = ("Modality enrichment of neighbours", value, reading)
    known = labels.notna()
    if known.sum() > n_neighbors:
        value = metrics.label_purity(latent[known], labels[known], n_neighbors)
        chance = (labels[known].value_counts(normalize=True) ** 2).sum()
        rows["label_purity"] = ("Label purity of neighbours", value, f"best 1, chance {chance:.2f}")
    groups = {name: known & (patterns == name) for name in mosaic.modalities}
    for x, y in permutations([name for name, cells in groups.items() if cells.any()], 2):
        value = metrics.label_transfer_accuracy(
            latent[groups[x]], labels[groups[x]], latent[groups[y]], labels[groups[y]]
        )
        reading = f"best 1, majority {labels[groups[y]].value_counts(normalize=True).max():.2f}"
        rows[f"label_transfer_{x}_to_{y}"] = (f"Label transfer, {x} to {y}", value, reading)
    for name, (truth, values) in compared.items():
        value = float(metrics.imputation_spearman(truth, values))
        rows[f"spearman_{name}"] = (f"Spearman of {name}, all entries", value, "best 1, chance 0")
        median = pd.Series(metrics.imputation_spearman(truth, values, per="feature")).median()
        rows[f"spearman_per_feature_{name}"] = (f"Spearman of {name}, median feature", median, "best 1, chance 0")
        detected = (truth > 0).mean()
        if mosaic.modalities[name].spec.traits.binary and detected > 0:
            value = metrics.imputation_auprc(truth, values)
            reading = f"best 1, chance {detected:.2f}"
            rows[f"auprc_{name}"] = (f"AUPRC of {name}, all entries", value, reading)
    return pd.DataFrame.from_dict(rows, orient="index", columns=["measure", "value", "reading"])


def _draw(
    multivi: "MultiVI",
    latent: "pd.DataFrame",
    compared: "dict[str, tuple[Any, np.ndarray]]",
    label_key: str | None,
    seed: int,
    path: Path,
) -> "pd.DataFrame":
    """Draw the figure and return the UMAP in it."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    from pyromosaic import plot

    mosaic = multivi.mosaic
    assert mosaic is not None
    colours = [mosaic.patterns.rename("modalities in training")]
    if label_key is not None:
        colours.append(mosaic.labels().rename(label_key))
    panels: dict[str, tuple[Any, np.ndarray, str]] = {}
    for name, (truth, values) in compared.items():
        spec, title = mosaic.modalities[name].spec, f"{name}, {len(values)} hidden cells"
        if spec.traits.binary:
            open_share, expected = (np.atleast_2d(np.asarray(part.mean(axis=0))) for part in (truth > 0, values))
            panels[title] = (open_share, expected, "share of cells, by region")
        else:
            panels[title] = (truth, values, "counts" if spec.data_kind == "count" else "values")
    coordinates = plot.umap(latent, seed)
    figure = plot.overview(coordinates, colours, panels, multivi.history)
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return coordinates


def _add(mdata: "MuData", imputed: "dict[str, Estimate]", hidden: "dict[str, AnnData]") -> None:
    """Add the imputed modalities, and in obs which modality was hidden from training.

    MuData needs names of features that are unique over modalities; otherwise it cannot select features by name.
    Therefore the imputed features have its usual prefix, "rna_imputed:CD4", and their name in column "feature".
    """
    import pandas as pd
    from anndata import AnnData

    if hidden:
        which = {cell: name for name, adata in hidden.items() for cell in adata.obs_names}
        mdata.obs["hidden_modality"] = pd.Categorical([which.get(cell, "none") for cell in mdata.obs_names])
    for name, estimate in imputed.items():
        var = mdata.mod[name].var.copy()
        var["feature"] = var.index.astype(str)
        var.index = [f"{name}_imputed:{feature}" for feature in var["feature"]]
        mean, sd = (frame.loc[mdata.obs_names].to_numpy("float32") for frame in (estimate.mean, estimate.sd))
        obs = pd.DataFrame(index=mdata.obs_names)
        mdata.mod[f"{name}_imputed"] = AnnData(mean, obs=obs, var=var, layers={"sd": sd})
    mdata.update()


def _write(mdata: "MuData", out: Path, multivi: "MultiVI", model: Path | None) -> None:
    """Write the result; if that fails, keep the model and say where it is."""
    try:
        with _draft(out) as draft:
            mdata.write(draft, compression="gzip")
    except WRITING as error:
        kept = model
        if kept is None:
            kept = out.parent / Path(mkdtemp(prefix=f"{out.stem}-model-", dir=out.parent)).name
            multivi.save(kept)
        raise OSError(f"{out} cannot be written: {_reason(error)}. The trained model is in {kept}") from error


def _reason(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


@contextmanager
def _draft(path: Path) -> Iterator[Path]:
    """Temporary name for a file or folder, which is moved to `path` only if all goes well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=path.parent, prefix=".pyromosaic-") as folder:
        draft = Path(folder) / path.name
        yield draft
        if draft.is_dir():
            path.mkdir(exist_ok=True)
            for file in draft.iterdir():
                file.replace(path / file.name)
        else:
            draft.replace(path)


def _report(console: "Console", metrics: "pd.DataFrame") -> None:
    """Print the metrics as a table."""
    from rich.table import Table

    table = Table("measure", "value", "to compare with")
    table.columns[1].justify = "right"
    for measure, value, reading in metrics.itertuples(index=False):
        table.add_row(measure, f"{value:.3f}", reading)
    if len(metrics):
        console.print(table)
