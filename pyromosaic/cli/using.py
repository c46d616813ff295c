"""Commands that use a trained model: query, differential."""

import json
from collections.abc import Mapping
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer

from pyromosaic import __version__
from pyromosaic.cli import evaluation, inputs, results
from pyromosaic.cli.options import (
    DATA,
    Figure,
    Impute,
    LabelKey,
    Metrics,
    Out,
    Use,
    flag,
    option,
    output,
    recorded,
    with_options,
)
from pyromosaic.cli.outputs import check_outputs, draft, named
from pyromosaic.cli.running import Kept, device_of, orderly, quiet, sentence

COMPARISON = "Comparison"
MODELS = dict.fromkeys(("MultiVI", "ContrastiveVI", "DiagVI", "ScModal"), "models")  # and where they are
APART = ("DiagVI", "ScModal", "Linkage")  # for which each measurement of a cell is a cell of its own


@with_options
def query(
    options: Use,
    out: Out,
    figure: Figure = None,
    metrics: Metrics = None,
    label_key: LabelKey = None,
    average_batches: Annotated[
        bool,
        flag(DATA, "Treat batches that the model has not seen as an average of its own.", "--average-batches"),
    ] = False,
    impute: Impute = True,
) -> None:
    """Map new cells into a trained model, without training.

    The result holds the data as they were, the latent space of the model (obsm "X_multivi") and every modality as the
    model expects it ("rna_imputed"), also modalities that the new cells do not have. It takes models of integrate,
    align and contrast, and the linkage of link, which gives scores alone (obsm "X_linked").

    Example: pyromosaic query MODEL NEW.h5mu --out MAPPED.h5mu
    """
    outputs = {"out": out, "figure": figure, "metrics": metrics}
    with sentence(2, ValueError):
        check_outputs(options.data, outputs, options.overwrite)
    from rich.console import Console

    console = Console()
    with quiet(), orderly(Kept(out)):
        from pyromosaic.data import Mosaic
        from pyromosaic.linkage import Linkage

        with sentence(2, ValueError, ModuleNotFoundError):
            device = device_of(options.device.value)
            trained = _load(options.model, {**MODELS, "Linkage": "linkage"})
            mdata = inputs.choose_cells(inputs.read(options.data, options.read_as), options.cells or [])
            inputs.check_tables(options.data, mdata)
            if type(trained).__name__ in APART and not getattr(trained, "pairing", False):
                mdata = inputs.separated(mdata)
            known = inputs.of_model(mdata, trained.schema)
            mosaic = Mosaic.from_mudata(
                known, schema=trained.schema, new_batches="average" if average_batches else "refuse"
            )
            labels = inputs.labels(mosaic, label_key)
        console.print(str(mosaic), highlight=False, markup=False)
        with sentence(2, ValueError):
            if isinstance(trained, Linkage):
                result = results.scored(trained, trained.transform(mosaic), mosaic, labels)
            else:
                wanted = trained.schema.modalities if impute else ()
                result = results.ask(trained.to(device), mosaic, labels, wanted, {})
        own = {"trained": options.model.name, "label_key": label_key, "average_batches": average_batches}
        results.put(
            console,
            result,
            mdata,
            {"version": __version__, "command": "query", "options": recorded(options, **own, impute=impute)},
            outputs,
            labels=labels,
            tables={},
            trained=False,
            seed=options.seed,
        )


@with_options
def differential(
    options: Use,
    groupby: Annotated[str, option(COMPARISON, "COLUMN", "Column of obs with the groups.")],
    out: Annotated[Path, output("TABLE.csv", "Where to write the table.")],
    group1: Annotated[str | None, option(COMPARISON, "VALUE", "The group to compare; by default each in turn.")] = None,
    group2: Annotated[
        str | None, option(COMPARISON, "VALUE", "The group to compare with; by default all other cells.")
    ] = None,
    modality: Annotated[str | None, option(COMPARISON, "NAME", "The modality; by default the model's first.")] = None,
    fdr: Annotated[
        float, option(COMPARISON, "SHARE", "Accepted false discovery rate among the significant features.")
    ] = 0.05,
    batch_correction: Annotated[
        bool, flag(COMPARISON, "Compare cells as if all were measured in the same batches.", "--batch-correction")
    ] = False,
    figure: Figure = None,
) -> None:
    """Find which genes, proteins or regions differ between groups of cells, by a trained model.

    The table has one row for each feature and pair of groups, the most certain first, with the probability that it
    differs ("probability"), the size of the difference and its uncertainty, and "is_significant".

    Example: pyromosaic differential MODEL DATA.h5mu --groupby celltype --group1 B --out B.csv
    """
    with sentence(2, ValueError):
        check_outputs(options.data, {"table": out, "figure": figure}, options.overwrite)
    with quiet(), orderly(Kept(out)):
        with sentence(2, ValueError):
            device = device_of(options.device.value)
            trained = _load(options.model, MODELS)
            mdata = inputs.choose_cells(inputs.read(options.data, options.read_as), options.cells or [])
            mosaic = trained.register(inputs.of_model(mdata, trained.schema))
            if modality is not None and modality not in trained.schema.modalities:
                raise ValueError(
                    f"the model has no modality {modality!r}; it has {', '.join(trained.schema.modalities)}"
                )
            table = trained.to(device).differential(
                groupby,
                group1,
                group2,
                modality=modality,
                fdr=fdr,
                batch_correction=batch_correction,
                data=mosaic,
                seed=options.seed,
            )
        with draft(out) as result, draft(figure) if figure is not None else nullcontext() as drawing:
            with named(out):
                table.to_csv(result)
            if figure is not None and drawing is not None:
                with named(figure):
                    evaluation.draw_differences(table, drawing)
    for comparison, rows in table.groupby("comparison", sort=False):
        typer.echo(f"{comparison}: {int(rows['is_significant'].sum())} of {len(rows)} features are significant")
    for path in (out, figure):
        if path is not None:
            typer.echo(f"Wrote {path}")


def _load(folder: Path, classes: Mapping[str, str]) -> Any:
    """A saved object of one of these classes of the package."""
    try:
        name = json.loads((folder / "model.json").read_text())["class"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{folder} does not hold a saved model: {error}") from error
    if name not in classes:
        raise ValueError(f"{folder} holds an object of class {name}; this command takes {', '.join(classes)}")
    return getattr(import_module(f"pyromosaic.{classes[name]}"), name).load(folder)
