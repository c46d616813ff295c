"""Options that commands have in common, each written once."""

from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, dataclass, fields
from enum import Enum, StrEnum
from functools import wraps
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import Annotated, Any

import typer

from pyromosaic.cli.config import take_config

DATA, OUTPUTS, TRAINING, RUN = "Data", "Outputs", "Model and training", "Run"


class Device(StrEnum):
    """Where to compute."""

    auto, cpu, gpu, cuda, mps = "auto", "cpu", "gpu", "cuda", "mps"


class Strategy(StrEnum):
    """How several processes are started."""

    ddp, ddp_spawn, ddp_fork = "ddp", "ddp_spawn", "ddp_fork"


def whole_or_auto(text: str) -> int | str:
    """A whole number from 1, or "auto"."""
    if str(text) == "auto":
        return "auto"
    if not str(text).isdigit() or int(text) < 1:
        raise typer.BadParameter(f"it must be a whole number from 1, or auto; found {text!r}")
    return int(text)


def argument(metavar: str, help: str) -> Any:
    """What a command is given without an option's name."""
    return typer.Argument(metavar=metavar, show_default=False, help=help)


def option(panel: str, metavar: str, help: str, *names: str, **more: Any) -> Any:
    """An option with a value, in a panel of the help."""
    return typer.Option(*names, metavar=metavar, rich_help_panel=panel, help=help, **more)


def flag(panel: str, help: str, *names: str) -> Any:
    """An option without a value."""
    return typer.Option(*names, rich_help_panel=panel, help=help)


def output(metavar: str, help: str) -> Any:
    """An option that names a place."""
    return option(OUTPUTS, metavar, help)


Data = Annotated[
    Path,
    argument(
        "DATA",
        "File or folder with raw counts of RNA, chromatin or surface protein: MuData (.h5mu), AnnData (.h5ad, .zarr) "
        "or Cell Ranger. A cell need not be in every modality.",
    ),
]
Trained = Annotated[
    Path, argument("MODEL", "Folder of a trained model, from --model of another command or model.save() in Python.")
]
ReadAs = Annotated[
    str | None,
    option(
        DATA,
        "MODALITY",
        "What the measurements are (rna, atac or adt), if the file does not say so, as some .h5ad files.",
        "--as",
    ),
]
Likelihood = Annotated[
    list[str] | None,
    option(
        DATA,
        "MODALITY=NAME",
        "Which kind of measurement a modality is, where its name does not say so (rna, atac and adt do) or says it "
        "wrongly: nb or zinb (RNA counts), bernoulli or poisson (chromatin), nb_mixture (antibody counts), normal, "
        "log1p_normal, ziln or zig (values that are not counts). Once for each such modality.",
    ),
]
CutSites = Annotated[
    list[str] | None,
    option(
        DATA,
        "MODALITY",
        "The counts of this modality are cut sites, two for each fragment of chromatin, as in the matrices of 10x "
        "Genomics; they are halved. For --likelihood atac=poisson or nb; once for each such modality.",
    ),
]
BatchKey = Annotated[str | None, option(DATA, "COLUMN", "Column of obs with the batch (donor, run, …) to correct for.")]
LabelKey = Annotated[
    str | None,
    option(DATA, "COLUMN", "Column of obs with cell types. Training never sees them; metrics and figure do."),
]
Layer = Annotated[str | None, option(DATA, "NAME", "Layer that holds the raw counts, if X does not hold them.")]
Cells = Annotated[
    list[str] | None,
    option(
        DATA,
        "FILE|COLUMN==VALUE",
        "Use these cells only: a text file with one name a line, or the cells with a value in a column of obs, e.g. "
        "celltype==B or celltype==B,NK. If it is given several times, all conditions must hold.",
    ),
]
Features = Annotated[
    list[str] | None,
    option(
        DATA,
        "MODALITY=FILE|COLUMN==VALUE",
        "Train on these features of a modality only: a text file with one name a line, e.g. rna=genes.txt, or those "
        "with a value in a column of var, e.g. rna=highly_variable==True. Once for each such modality.",
    ),
]
Out = Annotated[Path, output("RESULT.h5mu", "Where to write the data with the results added.")]
Figure = Annotated[Path | None, output("FIGURE.png", "Where to draw the results (.png, .pdf or .svg).")]
Keep = Annotated[
    Path | None,
    output("FOLDER", "Where to keep the trained model, for `pyromosaic query`, `pyromosaic differential`, and Python."),
]
Metrics = Annotated[Path | None, output("FILE.json", "Where to write the metrics, with the options of the run.")]
Impute = Annotated[bool, flag(OUTPUTS, "Add the expected measurements of every modality in all cells to the result.")]
Overwrite = Annotated[bool, flag(OUTPUTS, "Replace outputs that exist.", "--overwrite")]
NLatent = Annotated[
    int | None,
    option(
        TRAINING,
        "N",
        "Dimensions of the latent space; by default 15 (integrate, align --method scmodal), 12 (align) or 10 "
        "(contrast).",
        min=1,
    ),
]
Epochs = Annotated[
    int | None,
    option(
        TRAINING,
        "N|auto",
        "Passes over the data in training; by default (auto) 150, or fewer for more than about 10,000 cells.",
        parser=whole_or_auto,
    ),
]
BatchSize = Annotated[
    int | None,
    option(
        TRAINING,
        "N",
        "Largest number of cells in a step of training, of each process; by default 256 (integrate), 2,048 (align), or "
        "640 (contrast).",
        min=1,
    ),
]
SeedOption = Annotated[int, option(RUN, "N", "Seed of all that is random.", min=0)]
DeviceOption = Annotated[
    Device,
    typer.Option(
        "--device",
        "--accelerator",
        rich_help_panel=RUN,
        help="Where to compute: on the processor (cpu), an NVIDIA GPU (cuda), Apple's GPU (mps) or either GPU (gpu); "
        "auto takes an NVIDIA GPU if there is one.",
    ),
]
Devices = Annotated[
    int | None,
    option(
        RUN,
        "N|auto",
        "Number of devices, or of processes on the processor, that train; by default 1, or as torchrun or SLURM "
        "say. auto takes all GPUs.",
        parser=whole_or_auto,
    ),
]
NumNodes = Annotated[
    int | None, option(RUN, "N", "Number of machines that train; by default 1, or as torchrun or SLURM say.", min=1)
]
StrategyOption = Annotated[
    Strategy | None,
    typer.Option(
        rich_help_panel=RUN,
        help="How several processes are started: by default ddp_spawn, in which only training runs several times; ddp "
        "under torchrun and SLURM.",
    ),
]
Checkpoints = Annotated[Path | None, option(RUN, "FOLDER", "Where to keep checkpoints of the run, for --resume.")]
Resume = Annotated[
    bool,
    flag(
        RUN,
        "Go on from the newest checkpoint in the folder, with the same data and settings, as if the run had never "
        "stopped; begin if there is none.",
        "--resume",
    ),
]
Config = Annotated[
    Path | None,
    option(
        RUN,
        "FILE.toml",
        "Read options from this file, a line for each, e.g. batch-key = 'donor'. Options on the command line come "
        "first.",
        is_eager=True,
        callback=take_config,
    ),
]


@dataclass(frozen=True, kw_only=True)
class Source:
    """Data that are registered for a model."""

    data: Data
    read_as: ReadAs = None
    likelihood: Likelihood = None
    cut_sites: CutSites = None
    batch_key: BatchKey = None
    label_key: LabelKey = None
    layer: Layer = None
    cells: Cells = None
    features: Features = None
    config: Config = None


@dataclass(frozen=True, kw_only=True)
class Training(Source):
    """A run that trains a model."""

    out: Out
    figure: Figure = None
    model: Keep = None
    metrics: Metrics = None
    impute: Impute = True
    n_latent: NLatent = None
    epochs: Epochs = None
    batch_size: BatchSize = None
    seed: SeedOption = 0
    device: DeviceOption = Device.auto
    devices: Devices = None
    num_nodes: NumNodes = None
    strategy: StrategyOption = None
    checkpoints: Checkpoints = None
    resume: Resume = False
    overwrite: Overwrite = False


@dataclass(frozen=True, kw_only=True)
class Use:
    """A run that uses a trained model."""

    model: Trained
    data: Data
    read_as: ReadAs = None
    cells: Cells = None
    seed: SeedOption = 0
    device: DeviceOption = Device.auto
    config: Config = None
    overwrite: Overwrite = False


#: Options of a run that are no part of its result.
NOT_RECORDED = ("out", "figure", "model", "metrics", "effects", "table", "checkpoints", "resume", "overwrite", "config")


def recorded(options: Any, **own: Any) -> dict[str, Any]:
    """The options of a command as its result records them; those that were not given are left out."""
    given = {field.name: getattr(options, field.name) for field in fields(options)} | own
    plain = {name: value.value if isinstance(value, Enum) else value for name, value in given.items()}
    plain = {name: value.name if isinstance(value, Path) else value for name, value in plain.items()}
    return {name: value for name, value in plain.items() if value is not None and name not in NOT_RECORDED}


def with_options(command: Callable[..., None]) -> Callable[..., None]:
    """A command whose first parameter, e.g. a `Training`, is taken apart into its options.

    Parameters
    ----------
    command
        The command; its other parameters are options too.
    """
    first, *own = signature(command).parameters.values()
    shared: Mapping[str, Field[Any]] = {field.name: field for field in fields(first.annotation)}

    @wraps(command)
    def call(**given: Any) -> None:
        options = first.annotation(**{name: given.pop(name) for name in shared})
        command(options, **given)

    def parameter(field: Field[Any]) -> Parameter:
        default = Parameter.empty if field.default is MISSING else field.default
        return Parameter(field.name, Parameter.KEYWORD_ONLY, default=default, annotation=field.type)

    own = [p.replace(kind=Parameter.KEYWORD_ONLY) for p in own]
    needed = [p for p in map(parameter, shared.values()) if p.default is Parameter.empty]
    others = [p for p in map(parameter, shared.values()) if p.default is not Parameter.empty]
    everything = [*needed, *own, *others]
    call.__signature__ = Signature(everything)  # type: ignore[attr-defined]
    call.__annotations__ = {p.name: p.annotation for p in everything}
    return call
