"""Commands to begin with: check data, simulate them, and a demonstration."""

import warnings
from importlib.resources import as_file
from pathlib import Path
from typing import Annotated

import typer

from pyromosaic.cli import inputs
from pyromosaic.cli.options import (
    DATA,
    OUTPUTS,
    Checkpoints,
    Device,
    DeviceOption,
    Epochs,
    Keep,
    Metrics,
    Overwrite,
    Resume,
    SeedOption,
    Source,
    Training,
    argument,
    flag,
    option,
    output,
    with_options,
)
from pyromosaic.cli.outputs import check_checkpoints, check_outputs, draft, named, write
from pyromosaic.cli.running import Kept, orderly, quiet, sentence
from pyromosaic.cli.training import run_integrate

DEMO_OUT, DEMO_FIGURE = Path("pbmc_integrated.h5mu"), Path("pbmc_integrated.png")


@with_options
def check(options: Source) -> None:
    """Check whether a file can be integrated, without training.

    Shows how many cells have which modalities, and what is doubtful. The exit code is 0 if the data can be used, and 2
    if they cannot.

    Example: pyromosaic check DATA.h5mu --batch-key donor
    """
    with quiet(), sentence(2, ValueError), warnings.catch_warnings(record=True) as doubts:
        warnings.simplefilter("always", UserWarning)
        mdata = inputs.choose_cells(inputs.read(options.data, options.read_as), options.cells or [])
        inputs.check_tables(options.data, mdata)
        likelihoods = inputs.likelihoods(mdata, options.likelihood or [])
        seen = inputs.choose_features(mdata, options.features or [])
        mosaic = inputs.registered(seen, likelihoods, options, label_key=options.label_key)
    typer.echo(str(mosaic))
    typer.echo("Cells by modalities:")
    for pattern, n in mosaic.patterns.value_counts().items():
        typer.echo(f"  {pattern}: {n}")
    said = [str(doubt.message) for doubt in doubts if doubt.category is UserWarning]
    for text in said:
        typer.echo(f"warning: {text}", err=True)
    typer.echo(f"The data can be integrated{', with warnings' if said else ''}.")


def simulate(
    out: Annotated[Path, argument("OUT.h5mu", "Where to write the data.")],
    features: Annotated[
        list[str] | None,
        option(
            DATA,
            "MODALITY=N",
            "A modality and its number of features, e.g. rna=200; once for each. By default rna=200 and adt=20.",
        ),
    ] = None,
    cells: Annotated[int, option(DATA, "N", "Number of cells.", min=10)] = 500,
    types: Annotated[int, option(DATA, "N", "Number of cell types.", min=1)] = 5,
    batches: Annotated[int, option(DATA, "N", "Number of batches.", min=1)] = 2,
    unpaired: Annotated[
        bool, flag(DATA, "Give each cell one modality only, as align needs them.", "--unpaired")
    ] = False,
    links: Annotated[
        Path | None,
        output(
            "LINKS.csv",
            "Let every feature of the other modalities follow a gene, and write which one here, for align and link.",
        ),
    ] = None,
    treated: Annotated[
        float,
        option(
            DATA,
            "SHARE",
            "Share of treated cells (column condition: control, treated), for contrast.",
            min=0.0,
            max=0.9,
        ),
    ] = 0.0,
    seed: SeedOption = 0,
    overwrite: Overwrite = False,
) -> None:
    """Simulate a mosaic with known cell types, to try a command or to test a pipeline.

    A third of the cells has the first modality only, a third another one, a third all of them. The columns "celltype"
    and "batch" of obs can be used as --label-key and --batch-key.

    Example: pyromosaic simulate TRY.h5mu --cells 300
    """
    with quiet(), orderly(Kept(out)):
        with sentence(2, ValueError):
            from pyromosaic.data import simulate as simulated

            sizes = _numbers("--features", features or ["rna=200", "adt=20"])
            check_outputs(Path(), {"out": out, "links": links}, overwrite)
            first, *others = sizes
            mdata, truth = simulated(
                cells,
                sizes,
                types=types,
                n_batches=batches,
                patterns=list(sizes) if unpaired else None,
                links=dict.fromkeys(others, 1.0) if links is not None else None,
                treated=treated,
                seed=seed,
            )
        if links is not None:
            table = truth.links.rename(columns={"gene": first})
            if len(others) == 1:
                table = table.rename(columns={"feature": others[0]})
            with draft(links) as written, named(links):
                table.to_csv(written, index=False)
            typer.echo(f"Wrote {links}")
        with draft(out) as result, named(out):
            write(mdata, result)
    typer.echo(f"Wrote {out}")


def demo(
    out: Annotated[Path, output("RESULT.h5mu", "Where to write the integrated data.")] = DEMO_OUT,
    figure: Annotated[Path, output("FIGURE.png", "Where to draw the results.")] = DEMO_FIGURE,
    model: Keep = None,
    metrics: Metrics = None,
    epochs: Epochs = None,
    seed: SeedOption = 0,
    device: DeviceOption = Device.auto,
    checkpoints: Checkpoints = None,
    resume: Resume = False,
    overwrite: Annotated[
        bool, flag(OUTPUTS, "Replace outputs that exist; the default ones are replaced anyway.", "--overwrite")
    ] = False,
) -> None:
    """Integrate packaged data: blood cells of four donors, one with RNA only, one with antibodies only, two with both.

    Each modality is hidden in 200 cells, and its imputed values are compared with what was hidden. It takes a
    few minutes.
    """
    with sentence(2, ValueError):
        check_checkpoints(checkpoints, resume, overwrite)
        for path in (out, figure, metrics, model and model / "model.json"):
            if path is not None and path.exists() and not overwrite and path not in (DEMO_OUT, DEMO_FIGURE):
                raise ValueError(f"{path} exists; pass --overwrite to replace it")
    from pyromosaic.data.datasets import FILES

    with as_file(FILES / "pbmc_mosaic.h5mu") as data:
        options = Training(
            data=data,
            out=out,
            figure=figure,
            model=model,
            metrics=metrics,
            batch_key="batch",
            label_key="celltype",
            epochs=epochs,
            seed=seed,
            device=device,
            checkpoints=checkpoints,
            resume=resume,
            overwrite=True,
        )
        run_integrate(options, hide=200)


def _numbers(option: str, entries: list[str]) -> dict[str, int]:
    """Modalities and whole numbers."""
    found = {}
    for entry in entries:
        name, _, number = entry.partition("=")
        if not name or not number.isdigit() or int(number) < 1:
            raise ValueError(f"{option} needs MODALITY=N, e.g. rna=200; found {entry!r}")
        found[name] = int(number)
    return found
