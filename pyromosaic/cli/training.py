"""Commands that train a model: integrate, align, contrast."""

from collections.abc import Callable, Mapping
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pyromosaic import __version__
from pyromosaic.cli import inputs, results
from pyromosaic.cli.options import TRAINING, Training, option, output, recorded, with_options
from pyromosaic.cli.outputs import check_checkpoints, check_outputs
from pyromosaic.cli.running import Kept, device_of, leads, n_epochs_of, orderly, quiet, sentence, train

if TYPE_CHECKING:
    import pandas as pd

    from pyromosaic.data import Mosaic
    from pyromosaic.models import MosaicModel

LINKED = "Links between features"
Links = Annotated[
    Path | None,
    option(
        LINKED,
        "LINKS.csv",
        "Table of linked features, one link a row, with a column for each modality, e.g. a gene and the protein that "
        "it encodes. Columns weight (0 to 1) and sign (1 or -1) are optional. Without it, features with equal names "
        "are linked.",
    ),
]
Genes = Annotated[
    Path | None,
    option(
        LINKED,
        "GENES.csv",
        "Table of genes (names in the first column, then chromosome, start, end, strand): a gene is linked to the "
        "regions, named chr1:100-200, at its body and promoter.",
    ),
]


class Method(StrEnum):
    """The model that aligns."""

    diagvi, scmodal = "diagvi", "scmodal"


@with_options
def integrate(
    options: Training,
    hide: Annotated[
        int,
        option(
            TRAINING,
            "N",
            "Hide each modality in this many of the cells that have them all, and report how well it is imputed.",
            min=0,
        ),
    ] = 0,
) -> None:
    """Integrate modalities that share some of their cells, with MultiVI.

    The result holds the data as they were and, for all cells, the joint latent space (obsm "X_multivi"), its UMAP
    (obsm "X_multivi_umap", if a figure is drawn) and every modality as the model expects it: "rna_imputed" beside
    "rna", with standard deviations in layer "sd".

    Label transfer is measured between cells that have one modality only.

    Example: pyromosaic integrate DATA.h5mu --out RESULT.h5mu --figure RESULT.png --batch-key donor
    """
    run_integrate(options, hide)


def run_integrate(options: Training, hide: int = 0) -> None:
    """As the command, which `demo` calls too."""

    def build(mosaic: "Mosaic", arguments: dict[str, Any]) -> "MosaicModel":
        from pyromosaic.models import MultiVI

        return MultiVI(mosaic, **{"n_latent": 15} | arguments)

    _carry_out("integrate", options, build, {"hide": hide}, hide=hide)


@with_options
def align(
    options: Training,
    method: Annotated[
        Method,
        typer.Option(
            rich_help_panel=TRAINING,
            help="diagvi connects the modalities by a graph of linked features, scmodal by adversaries and anchors.",
        ),
    ] = Method.diagvi,
    links: Links = None,
    genes: Genes = None,
) -> None:
    """Align modalities that share no cell, by linked features, with DiagVI or scMODAL.

    The result holds the data as they were and, for all cells, the common latent space (obsm "X_diagvi" or "X_scmodal"),
    its UMAP (if a figure is drawn) and every modality as the model expects it ("rna_imputed").

    If cells have several modalities, each of their measurements becomes a cell of its own ("rna:CELL"), and the metrics
    tell how near the two are.

    Example: pyromosaic align DATA.h5mu --links LINKS.csv --out RESULT.h5mu --figure RESULT.png
    """

    def build(mosaic: "Mosaic", arguments: dict[str, Any]) -> "MosaicModel":
        from pyromosaic import models

        cls = {Method.diagvi: models.DiagVI, Method.scmodal: models.ScModal}[method]
        return cls(mosaic, inputs.linked(mosaic, links, genes), **arguments)

    own = {"method": method.value, "links": links and links.name, "genes": genes and genes.name}
    _carry_out("align", options, build, own, apart=True)


@with_options
def contrast(
    options: Training,
    condition: Annotated[str, option(TRAINING, "COLUMN", "Column of obs with the condition.")],
    background: Annotated[
        list[str],
        option(TRAINING, "VALUE", "The value of untreated cells (controls), or several: once for each."),
    ],
    target: Annotated[
        list[str] | None,
        option(TRAINING, "VALUE", "A value of treated cells, once for each; by default all other values."),
    ] = None,
    n_salient: Annotated[int, option(TRAINING, "N", "Dimensions that only treated cells have.", min=1)] = 10,
    effects: Annotated[
        Path | None,
        output("TABLE.csv", "Where to write which features the treatment changes, the most certain first."),
    ] = None,
) -> None:
    """Find what treated (or diseased) cells have and controls do not, with ContrastiveVI.

    The result holds the data as they were and, for all cells, what they share with controls (obsm
    "X_contrastivevi_background"), what only treated cells have ("X_contrastivevi_salient"), the evidence for a response
    of each cell (obs "salient_evidence") and every modality as the model expects it ("rna_imputed").

    Example: pyromosaic contrast DATA.h5mu --condition treatment --background control --out RESULT.h5mu --effects
    EFFECTS.csv
    """

    def prepare(mosaic: "Mosaic") -> "Mosaic":
        return mosaic.with_cohorts(condition, background=background, target=target or None)

    def build(mosaic: "Mosaic", arguments: dict[str, Any]) -> "MosaicModel":
        from pyromosaic.models import ContrastiveVI

        return ContrastiveVI(mosaic, n_salient=n_salient, **arguments)

    def effect(model: Any) -> "pd.DataFrame":
        import pandas as pd

        found = {name: model.salient_effect(modality=name, seed=options.seed) for name in model.schema.modalities}
        return pd.concat([table.assign(modality=name) for name, table in found.items()])

    own = {"condition": condition, "background": background, "target": target, "n_salient": n_salient}
    _carry_out(
        "contrast",
        options,
        build,
        own,
        prepare=prepare,
        colour=condition,
        tables={"effects": (effects, effect)},
    )


def _carry_out(
    command: str,
    options: Training,
    build: "Callable[[Mosaic, dict[str, Any]], MosaicModel]",
    own: Mapping[str, Any],
    *,
    prepare: "Callable[[Mosaic], Mosaic]" = lambda mosaic: mosaic,
    hide: int = 0,
    apart: bool = False,
    colour: str | None = None,
    tables: "Mapping[str, tuple[Path | None, Callable[[Any], pd.DataFrame]]] | None" = None,
) -> None:
    """Read, train, ask, and write.

    Parameters
    ----------
    command, options, own
        The command, and its options: those of all commands that train, and its own.
    build
        Makes the model of a mosaic, with arguments that were given.
    prepare
        What is done to the mosaic before.
    hide
        Number of cells in which each modality is hidden.
    apart
        Whether each measurement of a cell is a cell of its own.
    colour
        A column by which the cells in the figure are coloured.
    tables
        Further outputs, by the names of their options: where to, and how a table is made of the model.
    """
    tables = tables or {}
    outputs = {name: getattr(options, name) for name in ("out", "figure", "metrics", "model")}
    outputs |= {name: path for name, (path, _) in tables.items()}
    with sentence(2, ValueError):
        check_outputs(options.data, outputs, options.overwrite)
        check_checkpoints(options.checkpoints, options.resume, options.overwrite)
    from rich.console import Console

    with sentence(2, ValueError):
        first = leads()
    console, keep = Console(quiet=not first), Kept(options.out, options.checkpoints)
    with quiet(), orderly(keep):
        with sentence(2, ValueError, ModuleNotFoundError):
            device = device_of(options.device.value, options.devices)
            mdata = inputs.choose_cells(inputs.read(options.data, options.read_as), options.cells or [])
            inputs.check_tables(options.data, mdata)
            likelihoods = inputs.likelihoods(mdata, options.likelihood or [])
            mdata = inputs.separated(mdata) if apart else mdata
            seen, hidden = inputs.hide(inputs.choose_features(mdata, options.features or []), hide, options.seed)
            mosaic = prepare(inputs.registered(seen, likelihoods, options))
            labels = inputs.labels(mosaic, options.label_key)
            colours = [] if colour is None else [mosaic.words(colour)]
            arguments = {} if options.n_latent is None else {"n_latent": options.n_latent}
            model = build(mosaic, arguments | {"seed": options.seed})
        console.print(str(mosaic), highlight=False, markup=False)
        keep.model, keep.n_epochs = model, n_epochs_of(options.epochs)
        with sentence(2, ValueError):
            train(keep, options, device)
        if not first:
            return
        result = results.ask(model, mosaic, labels, mosaic.modalities if options.impute else (), hidden)
        results.put(
            console,
            result,
            mdata,
            {
                "version": __version__,
                "command": command,
                "options": recorded(options, **own, likelihood=likelihoods),
            },
            outputs,
            labels=labels,
            tables={name: lambda make=make: make(model) for name, (_, make) in tables.items()},  # type: ignore[misc]
            colours=colours,
            seed=options.seed,
        )
