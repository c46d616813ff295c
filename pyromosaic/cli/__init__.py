"""The command line: integrate a MuData file, or packaged data as a demonstration."""

from contextlib import nullcontext
from importlib.resources import as_file
from pathlib import Path
from typing import Annotated

import typer

from pyromosaic import __version__
from pyromosaic.cli import evaluation, inputs, using
from pyromosaic.cli.outputs import add, check_checkpoints, check_outputs, draft, named, write
from pyromosaic.cli.running import kept, quiet, sentence, train

DEMO_OUT, DEMO_FIGURE = Path("pbmc_integrated.h5mu"), Path("pbmc_integrated.png")
NO_OPTIONS_OF_THE_RUN = ("out", "figure", "model", "checkpoints", "resume", "overwrite")
Checkpoints = Annotated[
    Path | None,
    typer.Option(metavar="FOLDER", show_default=False, help="Where to keep checkpoints of the run, for --resume."),
]
Resume = Annotated[
    bool,
    typer.Option(
        "--resume",
        help="Go on from the newest checkpoint in the folder, with the same data and settings, as if the run had never "
        "stopped; begin if there is none.",
    ),
]

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
    checkpoints: Checkpoints = None,
    resume: Resume = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace outputs that exist.")] = False,
) -> None:
    """Integrate the modalities of a MuData file with MultiVI.

    The result holds the data as they were and, for all cells, the joint latent space (obsm "X_multivi"), its UMAP
    (obsm "X_multivi_umap", if a figure is drawn) and every modality as the model expects it: "rna_imputed" beside
    "rna", with standard deviations in layer "sd".

    Label transfer is measured between cells that have one modality only.
    """
    options = {name: value for name, value in locals().items() if value is not None}
    options = {name: value for name, value in options.items() if name not in NO_OPTIONS_OF_THE_RUN}
    with sentence(2, ValueError):
        check_outputs(data, out, figure, model, overwrite)
        check_checkpoints(checkpoints, resume, overwrite)
    from rich.console import Console

    console = Console()
    with quiet():
        from pyromosaic.data import Mosaic
        from pyromosaic.models import MultiVI
        from pyromosaic.train import NonFiniteLossError

        with sentence(2, ValueError):
            mdata = inputs.read(data)
            inputs.check_tables(data, mdata)
            likelihoods = inputs.likelihoods(mdata, likelihood or [])
            shown, hidden = inputs.hide(mdata, hide, seed)
            mosaic = Mosaic.from_mudata(shown, likelihoods, layer=layer, batch_key=batch_key, label_key=label_key)
        console.print(str(mosaic), highlight=False, markup=False)
        multivi = MultiVI(mosaic, n_latent=n_latent, seed=seed)
        with kept(multivi, epochs, out, checkpoints, NonFiniteLossError, OSError, MemoryError):
            with sentence(2, ValueError):
                train(multivi, epochs, batch_size, seed, checkpoints, resume)
            with console.status("Imputing and measuring"):
                latent = multivi.get_latent_representation()
                wanted = dict.fromkeys(mdata.mod) if impute else {name: a.obs_names for name, a in hidden.items()}
                imputed = {n: multivi.get_imputed_values(n, cells, quantiles=()) for n, cells in wanted.items()}
                compared = {
                    name: (a.X if layer is None else a.layers[layer], imputed[name].mean.loc[a.obs_names].to_numpy())
                    for name, a in hidden.items()
                }
                metrics = evaluation.measure(mosaic, latent, compared)
            with (
                console.status("Drawing and writing"),
                draft(out) as result,
                draft(figure) if figure is not None else nullcontext() as drawing,
            ):
                mdata.obsm["X_multivi"] = latent.loc[mdata.obs_names].to_numpy("float32")
                if figure is not None and drawing is not None:
                    with named(figure):
                        coordinates = evaluation.draw(multivi, latent, compared, label_key, seed, drawing)
                    mdata.obsm["X_multivi_umap"] = coordinates.loc[mdata.obs_names].to_numpy("float32")
                add(mdata, imputed if impute else {}, hidden)
                mdata.uns["pyromosaic"] = {
                    "version": __version__,
                    "options": options | {"data": data.name, "likelihood": likelihoods},
                    "metrics": metrics["value"].to_dict(),
                }
                with named(out):
                    write(mdata, result)
                if model is not None:
                    with named(model):
                        multivi.save(model, overwrite=True)
    evaluation.report(console, metrics)
    for path in (out, figure, model):
        if path is not None:
            console.print(f"Wrote {path}", highlight=False, markup=False, soft_wrap=True)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(metavar="RESULT.h5mu", help="Where to write the integrated data.")] = DEMO_OUT,
    figure: Annotated[Path, typer.Option(metavar="FIGURE.png", help="Where to draw the results.")] = DEMO_FIGURE,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the data in training.")] = 150,
    seed: Annotated[int, typer.Option(min=0, help="Seed of all that is random.")] = 0,
    checkpoints: Checkpoints = None,
    resume: Resume = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace outputs that exist; the default ones are replaced anyway.")
    ] = False,
) -> None:
    """Integrate packaged data: blood cells of four donors, one with RNA only, one with antibodies only, two with both.

    Each modality is hidden in 200 cells, and its imputed values are compared with what was hidden. It takes a
    few minutes.
    """
    with sentence(2, ValueError):
        check_checkpoints(checkpoints, resume, overwrite)
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
            checkpoints=checkpoints,
            resume=resume,
            overwrite=True,
        )


for name, command in using.COMMANDS.items():
    app.command(name)(command)
