"""Commands without training: check data, simulate them, use a saved model on them."""

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pyromosaic.cli import inputs
from pyromosaic.cli.outputs import add, check_out, draft, named, write
from pyromosaic.cli.running import quiet, sentence

if TYPE_CHECKING:
    from pyromosaic.models import MosaicModel

Data = Annotated[
    Path, typer.Argument(metavar="DATA.h5mu", show_default=False, help="MuData file with raw counts, as for integrate.")
]
Model = Annotated[
    Path,
    typer.Argument(
        metavar="MODEL", show_default=False, help="Folder of a trained model, from integrate --model or model.save()."
    ),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an output that exists.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of all that is random.")]


def check(
    data: Data,
    likelihood: Annotated[
        list[str] | None,
        typer.Option(metavar="MODALITY=NAME", show_default=False, help="As for integrate."),
    ] = None,
    batch_key: Annotated[
        str | None, typer.Option(show_default=False, help="Column of obs with the batch of each cell.")
    ] = None,
    label_key: Annotated[
        str | None, typer.Option(show_default=False, help="Column of obs with the cell type of each cell.")
    ] = None,
    layer: Annotated[str | None, typer.Option(show_default=False, help="Layer that holds the raw counts.")] = None,
) -> None:
    """Check whether a file can be integrated, without training.

    Shows how many cells have which modalities, and what is doubtful. The exit code is 0 if the data can be used, and 2
    if they cannot.
    """
    with quiet(), sentence(2, ValueError), warnings.catch_warnings(record=True) as doubts:
        warnings.simplefilter("always", UserWarning)
        from pyromosaic.data import Mosaic

        mdata = inputs.read(data)
        inputs.check_tables(data, mdata)
        likelihoods = inputs.likelihoods(mdata, likelihood or [])
        mosaic = Mosaic.from_mudata(mdata, likelihoods, layer=layer, batch_key=batch_key, label_key=label_key)
    typer.echo(str(mosaic))
    typer.echo("Cells by modalities:")
    for pattern, n in mosaic.patterns.value_counts().items():
        typer.echo(f"  {pattern}: {n}")
    said = [str(doubt.message) for doubt in doubts if doubt.category is UserWarning]
    for text in said:
        typer.echo(f"warning: {text}", err=True)
    typer.echo(f"The data can be integrated{', with warnings' if said else ''}.")


def simulate(
    out: Annotated[Path, typer.Argument(metavar="OUT.h5mu", show_default=False, help="Where to write the data.")],
    features: Annotated[
        list[str] | None,
        typer.Option(
            metavar="MODALITY=N",
            show_default=False,
            help="A modality and its number of features, e.g. rna=200; once for each. By default rna=200 and adt=20.",
        ),
    ] = None,
    cells: Annotated[int, typer.Option(min=10, help="Number of cells.")] = 500,
    types: Annotated[int, typer.Option(min=1, help="Number of cell types.")] = 5,
    batches: Annotated[int, typer.Option(min=1, help="Number of batches.")] = 2,
    seed: Seed = 0,
    overwrite: Overwrite = False,
) -> None:
    """Simulate a mosaic with known cell types, to try a command or to test a pipeline.

    A third of the cells has the first modality only, a third another one, a third all of them. The columns "celltype"
    and "batch" of obs can be used as --label-key and --batch-key.
    """
    with quiet(), sentence(2, ValueError):
        from pyromosaic.data import simulate as simulated

        sizes = _numbers("--features", features or ["rna=200", "adt=20"])
        check_out(out, overwrite)
        mdata, _ = simulated(cells, sizes, types=types, n_batches=batches, seed=seed)
        with sentence(1, OSError), draft(out) as result, named(out):
            write(mdata, result)
    typer.echo(f"Wrote {out}")


def query(
    model: Model,
    data: Data,
    out: Annotated[
        Path,
        typer.Option(metavar="RESULT.h5mu", show_default=False, help="Where to write the data with the results added."),
    ],
    average_batches: Annotated[
        bool,
        typer.Option("--average-batches", help="Treat batches that the model has not seen as an average of its own."),
    ] = False,
    impute: Annotated[
        bool, typer.Option(help="Add the expected measurements of every modality of the model in all cells.")
    ] = True,
    seed: Seed = 0,
    overwrite: Overwrite = False,
) -> None:
    """Map new cells into a trained model of MultiVI, without training.

    The result holds the data as they were, the latent space of the model (obsm "X_multivi") and every modality as the
    model expects it ("rna_imputed"), also modalities that the new cells do not have.
    """
    with quiet():
        with sentence(2, ValueError):
            check_out(out, overwrite, data)
            mdata = inputs.read(data)
            inputs.check_tables(data, mdata)
            trained = _load(model, ("MultiVI",))
            mosaic = trained.register(mdata, "average" if average_batches else "refuse")
        typer.echo(str(mosaic))
        latent = trained.get_latent_representation(data=mosaic)
        names = list(trained.schema.modalities) if impute else []
        imputed = {name: trained.get_imputed_values(name, quantiles=(), data=mosaic, seed=seed) for name in names}
        mdata.obsm["X_multivi"] = latent.loc[mdata.obs_names].to_numpy("float32")
        add(mdata, imputed, {})
        with sentence(1, OSError), draft(out) as result, named(out):
            write(mdata, result)
    typer.echo(f"Wrote {out}")


def differential(
    model: Model,
    data: Data,
    groupby: Annotated[str, typer.Option(metavar="COLUMN", show_default=False, help="Column of obs with the groups.")],
    out: Annotated[Path, typer.Option(metavar="TABLE.csv", show_default=False, help="Where to write the table.")],
    group1: Annotated[
        str | None, typer.Option(show_default=False, help="The group to compare; by default each in turn.")
    ] = None,
    group2: Annotated[
        str | None, typer.Option(show_default=False, help="The group to compare with; by default all other cells.")
    ] = None,
    modality: Annotated[
        str | None, typer.Option(show_default=False, help="The modality; by default the model's first.")
    ] = None,
    fdr: Annotated[float, typer.Option(help="Accepted false discovery rate among the significant features.")] = 0.05,
    batch_correction: Annotated[
        bool, typer.Option("--batch-correction", help="Compare cells as if all were measured in the same batches.")
    ] = False,
    seed: Seed = 0,
    overwrite: Overwrite = False,
) -> None:
    """Which genes, proteins or regions differ between groups of cells, by a trained model.

    The table has one row for each feature and pair of groups, the most certain first, with the probability that it
    differs ("probability"), the size of the difference and its uncertainty, and "is_significant".
    """
    with quiet():
        with sentence(2, ValueError):
            check_out(out, overwrite, data, (".csv",))
            mdata = inputs.read(data)
            trained = _load(model)
            mosaic = trained.register(mdata)
            if modality is not None and modality not in trained.schema.modalities:
                raise ValueError(
                    f"the model has no modality {modality!r}; it has {', '.join(trained.schema.modalities)}"
                )
            table = trained.differential(
                groupby,
                group1,
                group2,
                modality=modality,
                fdr=fdr,
                batch_correction=batch_correction,
                data=mosaic,
                seed=seed,
            )
        with sentence(1, OSError), draft(out) as result, named(out):
            table.to_csv(result)
    for comparison, rows in table.groupby("comparison", sort=False):
        typer.echo(f"{comparison}: {int(rows['is_significant'].sum())} of {len(rows)} features are significant")
    typer.echo(f"Wrote {out}")


def _load(folder: Path, classes: tuple[str, ...] = ()) -> "MosaicModel":
    """A saved model, of one of these classes of the package."""
    from pyromosaic import models

    found = {name: getattr(models, name) for name in ("MultiVI", "ContrastiveVI", "DiagVI", "ScModal")}
    try:
        name = json.loads((folder / "model.json").read_text())["class"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{folder} does not hold a saved model: {error}") from error
    accepted = classes or tuple(found)
    if name not in accepted:
        raise ValueError(f"{folder} holds a model of class {name}; this command takes {', '.join(accepted)}")
    loaded: MosaicModel = found[name].load(folder)
    return loaded


def _numbers(option: str, entries: list[str]) -> dict[str, int]:
    """Modalities and whole numbers."""
    found = {}
    for entry in entries:
        name, _, number = entry.partition("=")
        if not name or not number.isdigit() or int(number) < 1:
            raise ValueError(f"{option} needs MODALITY=N, e.g. rna=200; found {entry!r}")
        found[name] = int(number)
    return found


COMMANDS: Mapping[str, Any] = {"check": check, "simulate": simulate, "query": query, "differential": differential}
