"""The command that finds what the cells of two modalities have in common, without a model: link."""

from pathlib import Path
from typing import Annotated

from pyromosaic import __version__
from pyromosaic.cli import inputs, results
from pyromosaic.cli.options import (
    Figure,
    Keep,
    Metrics,
    Out,
    Overwrite,
    SeedOption,
    Source,
    output,
    recorded,
    with_options,
)
from pyromosaic.cli.outputs import check_outputs
from pyromosaic.cli.running import Kept, orderly, quiet, sentence
from pyromosaic.cli.training import Genes, Links


@with_options
def link(
    options: Source,
    out: Out,
    links: Links = None,
    genes: Genes = None,
    figure: Figure = None,
    model: Keep = None,
    metrics: Metrics = None,
    table: Annotated[
        Path | None,
        output(
            "TABLE.csv",
            "Where to write pairs of features that vary together over matched cells: candidates for new links.",
        ),
    ] = None,
    seed: SeedOption = 0,
    overwrite: Overwrite = False,
) -> None:
    """Find what the cells of two modalities have in common, from linked features alone, without a model.

    The result holds the data as they were and, for all cells, scores in one space (obsm "X_linked"). It takes about a
    minute. A warning says so if linked features hardly agree over the cells that were matched. A linkage kept by
    --model gives scores to other cells with `pyromosaic query`.

    Example: pyromosaic link DATA.h5mu --links LINKS.csv --out RESULT.h5mu --figure RESULT.png
    """
    outputs = {"out": out, "figure": figure, "metrics": metrics, "table": table, "model": model}
    with sentence(2, ValueError):
        check_outputs(options.data, outputs, overwrite)
    from rich.console import Console

    console = Console()
    with quiet(), orderly(Kept(out)):
        from pyromosaic import linkage

        with sentence(2, ValueError, ModuleNotFoundError):
            mdata = inputs.choose_cells(inputs.read(options.data, options.read_as), options.cells or [])
            if len(mdata.mod) != 2:
                raise ValueError(
                    f"link takes data with two modalities; found {', '.join(mdata.mod)}. For more, use align"
                )
            inputs.check_tables(options.data, mdata)
            likelihoods = inputs.likelihoods(mdata, options.likelihood or [])
            mdata = inputs.separated(mdata)
            seen = inputs.choose_features(mdata, options.features or [])
            mosaic = inputs.registered(seen, likelihoods, options)
            labels = inputs.labels(mosaic, options.label_key)
            console.print(str(mosaic), highlight=False, markup=False)
            first, second = mosaic.modalities
            with console.status("Matching cells"):
                found = linkage.cca(mosaic, (first, second), inputs.linked(mosaic, links, genes), seed=seed)
        result = results.scored(found, found.scores, mosaic, labels)
        if found.agreement:
            best = max(max(rounds) for rounds in found.agreement.values())
            result.measures.add("link_agreement", "Agreement of links that were left out", best, "best 1, chance 0")
        own = {"links": links and links.name, "genes": genes and genes.name, "seed": seed}
        results.put(
            console,
            result,
            mdata,
            {"version": __version__, "command": "link", "options": recorded(options, **own, likelihood=likelihoods)},
            outputs,
            labels=labels,
            tables={"table": found.feature_links},
            trained=False,
            seed=seed,
        )
